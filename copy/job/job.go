// SPDX-License-Identifier: Apache-2.0

// Package job is what all jobs share: their records, stages and states, the commands that reach them, the pace at
// which they work, the journal, and the manager.
package job

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Stages of a copy.
const (
	StageBulk   = "bulk"
	StageDirty  = "dirty"
	StageMirror = "mirror"
	StageSwitch = "switch"
)

// Stages of streaming.
const (
	StageStream = "stream" // what is behind the top image is copied into it
	StageDrop   = "drop"   // the images behind it are left
)

// Stages of a backup.
const (
	StageBackup = "backup" // the disk as it was at one instant is copied
	StageFlush  = "flush"  // the target is made durable
)

// States of a job.
const (
	StateRunning   = "running"
	StateReady     = "ready"
	StatePaused    = "paused"
	StateCompleted = "completed"
	StateFailed    = "failed"
	StateCancelled = "cancelled"
)

// What to do about an I/O error.
const (
	OnErrorReport = "report" // the job fails
	OnErrorStop   = "stop"   // the job pauses
	OnErrorEnospc = "enospc" // the job pauses when the storage is full and fails otherwise
)

// Ended reports whether a job in this state is over.
func Ended(state string) bool {
	return state == StateCompleted || state == StateFailed || state == StateCancelled
}

// Record is all that is known of a job. It is what users see and what the journal keeps. Sizes are bytes, rates
// bytes a second, times milliseconds since the epoch.
type Record struct {
	ID     string `json:"id"`
	Kind   string `json:"kind"`
	Disk   string `json:"disk"`
	Source string `json:"source"`
	Target string `json:"target"`
	Format string `json:"format"`

	Stage   string `json:"stage"`
	State   string `json:"state"`
	Error   string `json:"error,omitempty"`
	Message string `json:"message,omitempty"`

	BytesDone     int64 `json:"bytes_done"`
	BytesTotal    int64 `json:"bytes_total"`
	Rate          int64 `json:"rate"`
	DirtyRate     int64 `json:"dirty_rate"`
	ETASeconds    int64 `json:"eta_seconds"` // -1: unknown
	Converging    bool  `json:"converging"`
	VerifiedBytes int64 `json:"verified_bytes"`

	// TargetConsistent: the target holds the disk as it was at one instant, the present or the job's end.
	TargetConsistent bool `json:"target_consistent"`

	Options
	StartedMS int64 `json:"started_ms"`
	EndedMS   int64 `json:"ended_ms"`
}

// Options are what the user asked of a copy.
type Options struct {
	Method        string `json:"method"`
	Existing      bool   `json:"existing"`
	Base          string `json:"base,omitempty"` // shared base: what it and the images behind it hold is not copied
	SwitchMode    string `json:"switch_mode"`
	Verify        bool   `json:"verify"`
	Speed         int64  `json:"speed"` // 0: no limit
	Granularity   int64  `json:"granularity"`
	OnSourceError string `json:"on_source_error"`
	OnTargetError string `json:"on_target_error"`

	// Of a backup.
	Bitmap     string `json:"bitmap,omitempty"`       // what is copied, unless Full is set; begins anew
	Full       bool   `json:"full,omitempty"`         // all is copied
	OnCBWError string `json:"on_cbw_error,omitempty"` // when what the guest is about to change cannot be copied
	CBWTimeout int64  `json:"cbw_timeout,omitempty"`  // s
}

// What to do when the target of a backup does not take what the guest is about to overwrite.
const (
	OnCBWErrorBreak = "break" // the backup fails and the guest goes on
	OnCBWErrorHold  = "hold"  // the guest's write waits, and the job pauses
)

// ErrState is the kind of error of a command that does not fit the job's state.
var ErrState = errors.New("not possible in this state")

// stateError is an ErrState that says why by itself.
type stateError struct{ error }

func (stateError) Is(target error) bool { return target == ErrState }

func errState(format string, args ...any) error { return stateError{fmt.Errorf(format, args...)} }

// errCancelled is the cause of a context that ends because the user cancels the job.
var errCancelled = errors.New("cancelled")

// errShutdown is the cause of a context that ends because the daemon does: the job's record stays as it is.
var errShutdown = errors.New("the daemon stops")

// Stopping reports whether a job's context has ended because the daemon stops.
func Stopping(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errShutdown) }

// Job is one job. Users command it, its runner asks what they want.
type Job struct {
	store   *Store
	cancel  context.CancelCauseFunc
	done    chan struct{}
	limiter *rate.Limiter
	paying  sync.Mutex // held in Limit

	mu        sync.Mutex
	rec       Record
	unsaved   bool          // the journal says something older
	before    string        // the state to go back to after a pause
	switching bool          // the user asked for the switch
	changed   chan struct{} // closed and replaced when rec changes
}

// Record is the job as it is now.
func (j *Job) Record() Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rec
}

// Changed is closed when the job has changed since.
func (j *Job) Changed() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.changed
}

// Done is closed when the job is over and its record written.
func (j *Job) Done() <-chan struct{} { return j.done }

// Update changes the record. A new stage, state or error, and what is said of the target's consistency, is durable when
// Update returns; an error of the journal is kept in the record's error.
func (j *Job) Update(fn func(*Record)) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.updateLocked(fn)
}

func (j *Job) updateLocked(fn func(*Record)) {
	old := j.rec
	fn(&j.rec)
	if old.Stage != j.rec.Stage || old.State != j.rec.State || old.Error != j.rec.Error ||
		old.TargetConsistent != j.rec.TargetConsistent || old.Options != j.rec.Options {
		if err := j.saveLocked(); err != nil && j.rec.Error == "" {
			j.rec.Error = err.Error()
		}
	}
	close(j.changed)
	j.changed = make(chan struct{})
}

func (j *Job) saveLocked() error {
	err := j.store.Save(jobs, j.rec.ID, &j.rec)
	j.unsaved = err != nil
	return err
}

// Commands.

// Pause stops the copying; guest writes go on being tracked.
func (j *Job) Pause() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch j.rec.State {
	case StatePaused:
		return nil
	case StateRunning:
		j.pauseLocked("")
		return nil
	default:
		return errState("job %s is %s: only a running job can be paused", j.rec.ID, j.rec.State)
	}
}

func (j *Job) pauseLocked(reason string) {
	j.before = j.rec.State
	j.updateLocked(func(r *Record) {
		r.State, r.Error = StatePaused, reason
		r.Rate, r.ETASeconds = 0, -1
		r.Message = resumeHint(r.ID)
	})
}

func resumeHint(id string) string { return "go on with: blkstream job resume " + id }

// Resume goes on after a pause, by the user or by an error.
func (j *Job) Resume() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch j.rec.State {
	case StatePaused:
		j.updateLocked(func(r *Record) { r.State, r.Error, r.Message = j.before, "", "" })
		return nil
	case StateRunning:
		return nil
	default:
		return errState("job %s is %s: only a paused job can be resumed", j.rec.ID, j.rec.State)
	}
}

// Cancel ends the job and waits for that. The guest stays where it is; ErrState: the job was completed by then, or is over
// already. If ctx ends before, which it does when the
// storage does not answer, the job still ends as soon as it can.
func (j *Job) Cancel(ctx context.Context) error {
	j.mu.Lock()
	if r := j.rec; Ended(r.State) {
		j.mu.Unlock()
		return errState("job %s is already %s", r.ID, r.State)
	}
	if j.rec.Stage != StageSwitch { // whose message is what the user must know then
		j.updateLocked(func(r *Record) { r.Message = "being cancelled: waits for requests in flight" })
	}
	j.mu.Unlock()
	j.cancel(errCancelled)
	select {
	case <-j.done:
	case <-ctx.Done():
		return ctx.Err()
	}
	if r := j.Record(); r.State == StateCompleted {
		return fmt.Errorf("job %s was completed before it could be cancelled: %w", r.ID, ErrState)
	}
	return nil
}

// SetSpeed limits the copying, in bytes a second; 0: no limit.
func (j *Job) SetSpeed(n int64) error {
	if n < 0 {
		return fmt.Errorf("a speed of %d: it cannot be negative", n)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if Ended(j.rec.State) {
		return errState("job %s is already %s", j.rec.ID, j.rec.State)
	}
	j.updateLocked(func(r *Record) { r.Speed = n })
	setLimit(j.limiter, n)
	return nil
}

// AskSwitch asks for the switch of a job that is ready.
func (j *Job) AskSwitch() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.rec.State != StateReady {
		return errState("job %s is %s in stage %s: it can switch when it is ready", j.rec.ID, j.rec.State, j.rec.Stage)
	}
	j.switching = true
	j.updateLocked(func(r *Record) { r.Error = "" })
	return nil
}

// Switching reports whether a switch that the user asked for has not been tried yet.
func (j *Job) Switching() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.switching
}

// The runner's side.

// SwitchAsked reports whether the user asked for the switch, and forgets it.
func (j *Job) SwitchAsked() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	asked := j.switching
	j.switching = false
	return asked
}

// PauseFor pauses the job because of an error.
func (j *Job) PauseFor(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.rec.State == StateRunning || j.rec.State == StateReady {
		j.pauseLocked(err.Error())
		j.before = StateRunning
	}
}

// Gate waits while the job is paused.
func (j *Job) Gate(ctx context.Context) error {
	for {
		j.mu.Lock()
		paused, changed := j.rec.State == StatePaused, j.changed
		j.mu.Unlock()
		if !paused {
			return context.Cause(ctx)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Limit waits until n more bytes may be copied: as long as the speed limit wants, and while the job is paused. Pieces
// are let through one by one, so that several copiers do not come in bursts.
func (j *Job) Limit(ctx context.Context, n int64) error {
	j.paying.Lock()
	defer j.paying.Unlock()
	for n > 0 {
		burst := j.limiter.Burst()
		k := int(min(n, int64(burst)))
		if err := j.limiter.WaitN(ctx, k); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			continue // the burst shrank meanwhile
		}
		n -= int64(k)
	}
	return j.Gate(ctx)
}

// Piece is how many bytes to copy at a time so that the speed limit works smoothly: at most most.
func (j *Job) Piece(most int64) int64 { return min(most, int64(j.limiter.Burst())) }

// setLimit keeps the burst at a twentieth of a second, so that a limit never shows as bursts and pauses.
func setLimit(l *rate.Limiter, speed int64) {
	if speed <= 0 {
		l.SetLimit(rate.Inf)
		l.SetBurst(1 << 30)
		return
	}
	l.SetBurst(int(min(max(speed/20, 1), 1<<30)))
	l.SetLimit(rate.Limit(speed))
}

func (j *Job) finish(err error, ctxErr error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil && errors.Is(ctxErr, errShutdown) {
		return // the next daemon goes on with it
	}
	j.updateLocked(func(r *Record) {
		r.EndedMS = time.Now().UnixMilli()
		r.Rate, r.DirtyRate, r.ETASeconds = 0, 0, 0
		switch {
		case err == nil:
			r.State, r.Error = StateCompleted, ""
		case ctxErr != nil:
			r.State = StateCancelled
		default:
			r.State, r.Error = StateFailed, err.Error()
		}
	})
}

// saveEvery is how often the end of a job is tried to be written that the journal did not take. Tests change it.
var saveEvery = time.Second

// persist writes the end of a job that the journal did not take, as soon as it does, or until over is closed: the next
// daemon would take the job up again, and write to a target that is not its own any more.
func (j *Job) persist(over <-chan struct{}) {
	tick := time.NewTicker(saveEvery)
	defer tick.Stop()
	for j.pending() {
		select {
		case <-tick.C:
		case <-over:
			return
		}
	}
}

func (j *Job) pending() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return Ended(j.rec.State) && j.unsaved && j.saveLocked() != nil
}

// forget takes the job out of the journal.
func (j *Job) forget() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.unsaved = false
	return j.store.Delete(jobs, j.rec.ID)
}
