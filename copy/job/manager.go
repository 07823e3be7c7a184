// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// The errors of the manager.
var (
	ErrNotFound = errors.New("no such job; `blkstream job list` names them")
	ErrExists   = errors.New("exists already")
)

const jobs = "jobs" // the journal's kind of record

// Manager owns all jobs.
type Manager struct {
	store *Store

	mu   sync.Mutex
	jobs []*Job        // oldest first
	over bool          // Shutdown was called
	end  chan struct{} // closed then
}

// NewManager reads the journal. Jobs that had ended are there to be looked at; those that had not are returned, for
// the caller to start again or to give up.
func NewManager(store *Store) (*Manager, []Record, error) {
	m := &Manager{store: store, end: make(chan struct{})}
	ids, err := store.IDs(jobs)
	if err != nil {
		return nil, nil, err
	}
	var open []Record
	for _, id := range ids {
		var r Record
		if _, err := store.Load(jobs, id, &r); err != nil {
			return nil, nil, err
		}
		if r.ID != id || r.State == "" {
			return nil, nil, fmt.Errorf("state directory: %s is damaged: it does not name its job and state", store.Path(jobs, id))
		}
		if !Ended(r.State) {
			open = append(open, r)
			continue
		}
		m.jobs = append(m.jobs, m.ended(r))
	}
	slices.SortFunc(m.jobs, func(a, b *Job) int { return int(a.rec.StartedMS - b.rec.StartedMS) })
	return m, open, nil
}

func (m *Manager) ended(r Record) *Job {
	j := m.newJob(r)
	close(j.done)
	return j
}

func (m *Manager) newJob(r Record) *Job {
	j := &Job{store: m.store, rec: r, done: make(chan struct{}), changed: make(chan struct{}), cancel: func(error) {}}
	j.limiter = rate.NewLimiter(rate.Inf, 1<<30)
	setLimit(j.limiter, r.Speed)
	return j
}

// End records that a job of an earlier daemon is over.
func (m *Manager) End(r Record) error {
	r.EndedMS = time.Now().UnixMilli()
	r.Rate, r.DirtyRate, r.ETASeconds = 0, 0, -1
	m.mu.Lock()
	defer m.mu.Unlock()
	m.jobs = append(m.jobs, m.ended(r))
	return m.store.Save(jobs, r.ID, &r)
}

// Start begins a job; one that an earlier daemon left paused begins paused. An empty id is chosen. run returns nil when
// the job is completed; when ctx ends it cleans up and returns the cause.
func (m *Manager) Start(r Record, run func(ctx context.Context, j *Job) error) (*Job, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return nil, errShutdown
	}
	if r.ID == "" {
		for n := 1; r.ID == "" || m.find(r.ID) != nil; n++ {
			r.ID = fmt.Sprintf("%s-%s-%d", r.Kind, r.Disk, n)
		}
	}
	if !ValidID(r.ID) {
		return nil, fmt.Errorf("job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", r.ID)
	}
	if m.find(r.ID) != nil {
		return nil, fmt.Errorf("job %s: %w; dismiss it or choose another --id", r.ID, ErrExists)
	}
	for _, j := range m.jobs {
		if o := j.Record(); o.Disk == r.Disk && !Ended(o.State) {
			return nil, errState("job %s works on disk %s", o.ID, r.Disk)
		}
	}
	if r.State == StatePaused {
		r.Message = strings.TrimPrefix(r.Message+"; "+resumeHint(r.ID), "; ")
	} else {
		r.State = StateRunning
	}
	r.StartedMS, r.ETASeconds, r.Converging = time.Now().UnixMilli(), -1, true
	if err := m.store.Save(jobs, r.ID, &r); err != nil {
		return nil, err
	}
	j := m.newJob(r)
	j.before = StateRunning
	ctx, cancel := context.WithCancelCause(context.Background())
	j.cancel = cancel
	m.jobs = append(m.jobs, j)
	go func() {
		err := run(ctx, j)
		j.finish(err, context.Cause(ctx))
		cancel(nil)
		close(j.done)
		j.persist(m.end)
	}()
	return j, nil
}

func (m *Manager) find(id string) *Job {
	for _, j := range m.jobs {
		if j.Record().ID == id {
			return j
		}
	}
	return nil
}

// Get finds a job.
func (m *Manager) Get(id string) (*Job, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if j := m.find(id); j != nil {
		return j, nil
	}
	return nil, fmt.Errorf("job %s: %w", id, ErrNotFound)
}

// List returns all jobs, oldest first.
func (m *Manager) List() []*Job {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.jobs)
}

// OnDisk returns the job that works on the disk, or nil.
func (m *Manager) OnDisk(disk string) *Job {
	for _, j := range m.List() {
		if r := j.Record(); r.Disk == disk && !Ended(r.State) {
			return j
		}
	}
	return nil
}

// Dismiss forgets a job that has ended.
func (m *Manager) Dismiss(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	j := m.find(id)
	if j == nil {
		return fmt.Errorf("job %s: %w", id, ErrNotFound)
	}
	if r := j.Record(); !Ended(r.State) {
		return errState("job %s is %s: cancel it first", id, r.State)
	}
	if err := j.forget(); err != nil {
		return err
	}
	m.jobs = slices.DeleteFunc(m.jobs, func(o *Job) bool { return o == j })
	return nil
}

// Shutdown tells all jobs to end, and lets none begin any more. Their records stay as they are, so that the next daemon
// can go on with them.
func (m *Manager) Shutdown() {
	m.mu.Lock()
	if !m.over {
		m.over = true
		close(m.end)
	}
	m.mu.Unlock()
	for _, j := range m.List() {
		j.cancel(errShutdown)
	}
}
