// SPDX-License-Identifier: Apache-2.0

// Package backup copies a running disk, as it was at one instant, to an image.
//
// The stages, in order:
//
//	backup  copy-before-write is put over the disk with the guest paused, which is the instant: what was acknowledged
//	        before is in the backup, and nothing that came later. Then all of the disk, or what a bitmap names, is copied
//	        in the disk's order, and what the guest is about to change before it does
//	flush   the target is made durable and closed, and copy-before-write removed
//
// Then the record says that the target is complete, durably, and only then the bitmap begins anew at the instant. A
// crash before leaves a target that is of no use, since nothing but the filter knew what the guest has overwritten, and
// a bitmap that names everything that it named before and more.
package backup

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/cbw"
	"github.com/blkstream/blkstream/copy/job"
)

// Setup is what a job works on.
type Setup struct {
	Graph *blk.Graph
	// Below is where the disk is read, given the root of the graph. nil: there.
	Below func(root blk.Node) blk.Node
	// Target, Cluster, Grain, Blank and Explicit are those of cbw.Options.
	Target          blk.Node
	Cluster, Grain  int64
	Blank, Explicit bool
	Close           func() error // closes the target with all that belongs to it
	Begun           func()       // called when the instant is past; nil: nobody waits for that

	// Freeze begins the bitmap anew and returns what it named. The guest is paused meanwhile. nil: there is no bitmap.
	Freeze func() (*blk.Bitmap, error)
	// Thaw follows each Freeze: the bitmap names what has changed since the instant if the backup was done, and what it
	// named before as well if not.
	Thaw func(done bool) error
}

const (
	pauseWait = 30 * time.Second // for requests in flight
	zeroRange = 64 << 20         // bytes of zeros that are written at a time
)

// backup is one run.
type backup struct {
	Setup
	job     *job.Job
	opts    job.Options
	pacer   *job.Pacer
	filter  *cbw.Node
	size    int64
	total   int64 // to be copied, in bytes
	instant time.Time
}

// Run makes the backup. If it returns nil the target is complete and durable.
func Run(ctx context.Context, j *job.Job, s Setup) error {
	b := &backup{Setup: s, job: j, opts: j.Record().Options, pacer: job.NewPacer(s.Graph)}
	err := b.insert(ctx)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	err = b.copyAndFlush(ctx)
	err = errors.Join(err, b.remove(ctx))
	if err == nil {
		err = b.complete()
	}
	if err != nil {
		j.Update(func(r *job.Record) { r.TargetConsistent, r.Message = false, Incomplete(r) })
	}
	if s.Freeze != nil {
		if thawErr := s.Thaw(err == nil); thawErr != nil {
			j.Update(func(r *job.Record) {
				r.Message += fmt.Sprintf("; bitmap %s names more than it should: %v", r.Bitmap, thawErr)
			})
		}
	}
	return err
}

// insert puts the filter over the disk, with every queue at rest.
func (b *backup) insert(ctx context.Context) error {
	b.job.Update(func(r *job.Record) { r.Stage = job.StageBackup })
	wait, cancel := context.WithTimeout(ctx, pauseWait)
	defer cancel()
	var named *blk.Bitmap
	err := b.Graph.Change(wait, func(tx *blk.Tx) (err error) {
		root := tx.Root()
		source := root
		if b.Below != nil {
			source = b.Below(root)
		}
		b.size = root.Info().Size
		if b.Freeze != nil {
			if named, err = b.Freeze(); err != nil {
				return err
			}
		}
		b.filter = cbw.New(root, cbw.Options{
			Source: source, Target: b.Target, Cluster: b.Cluster, Grain: b.Grain, Blank: b.Blank, Explicit: b.Explicit,
			Timeout: time.Duration(b.opts.CBWTimeout) * time.Second,
			Failed:  func(err error) error { return b.guestFailed(ctx, err) },
		})
		b.instant = time.Now()
		tx.SetRoot(b.filter)
		return nil
	})
	if err != nil {
		return err
	}
	if b.Begun != nil {
		b.Begun()
	}
	if named != nil && !b.opts.Full {
		b.onlyNamed(named)
	}
	b.total = b.left()
	return nil
}

// onlyNamed takes out of what is to be copied what the bitmap does not name. What the guest's writes had copied of that
// in the meantime does no harm.
func (b *backup) onlyNamed(named *blk.Bitmap) {
	for at := int64(0); at < b.size; {
		off, n, ok := named.Next(at, b.size)
		if !ok {
			b.filter.Todo.Clear(at, b.size-at)
			return
		}
		if lo := off &^ (b.Cluster - 1); at < lo {
			b.filter.Todo.Clear(at, lo-at)
		}
		at = (off + n + b.Cluster - 1) &^ (b.Cluster - 1)
	}
}

// guestFailed decides about a copy for the guest, on a goroutine on which it may wait; nil: try again.
func (b *backup) guestFailed(ctx context.Context, err error) error {
	var src *cbw.SourceError
	if b.opts.OnCBWError != job.OnCBWErrorHold || errors.As(err, &src) && b.opts.OnSourceError != job.OnErrorStop {
		return fmt.Errorf("what the guest was about to overwrite could not be copied: %w", err)
	}
	err = fmt.Errorf("the guest's writes wait: %w", err)
	b.job.PauseFor(err)
	b.job.Update(func(r *job.Record) {
		if r.State == job.StatePaused && r.Error == "" { // by the user
			r.Error = err.Error()
		}
	})
	return b.job.Gate(ctx)
}

func (b *backup) copyAndFlush(ctx context.Context) error {
	// Writes of the guest that wait are let go at once when the job ends, whatever the target does.
	defer context.AfterFunc(ctx, func() { b.filter.Break(context.Cause(ctx)) })()
	work, stop := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { b.job.Report(work, func() (int64, int64) { left := b.left(); return b.total - left, left }) })
	watching.Go(func() {
		select {
		case <-b.filter.Broken():
			reason := b.filter.Reason()
			if ctx.Err() == nil {
				b.job.Update(func(r *job.Record) { r.Error = reason.Error() }) // the end may have to wait for the target
			}
			stop(reason)
		case <-work.Done():
		}
	})
	err := b.copyAll(work)
	if err == nil {
		b.job.Update(func(r *job.Record) { r.Stage = job.StageFlush })
		err = b.flush()
	}
	stop(nil)
	watching.Wait()
	return err
}

// flush makes the target durable. If one of its own flushes has failed before, while it was full perhaps, parts of its tables
// may be lost for good, though it shows them.
func (b *backup) flush() error {
	if err := blk.Do(blk.NewTask(), b.Target, &blk.Request{Op: blk.OpFlush}); err != nil {
		return err
	}
	if target, ok := b.Target.(interface{ Lost() error }); ok {
		return target.Lost()
	}
	return nil
}

// left is what is still to be copied, in bytes.
func (b *backup) left() int64 { return min(b.filter.Todo.Bytes(), b.size) }

// copyAll copies in passes until nothing is left: a piece that failed is tried again by the next one.
func (b *backup) copyAll(ctx context.Context) error {
	for b.filter.Todo.Count() > 0 {
		if err := b.pass(ctx); err != nil {
			return err
		}
	}
	return b.job.Gate(ctx)
}

// piece is a range to be copied.
type piece struct{ off, n int64 }

// pass goes through the disk once.
func (b *backup) pass(ctx context.Context) error {
	var at int64
	w := job.Work[piece]{
		Job: b.job, Pacer: b.pacer, OnError: b.onError,
		Next: func(ctx context.Context, t *blk.Task, limit int64) (piece, int64, error) {
			p, err := b.next(ctx, t, at, max(limit&^(b.Cluster-1), b.Cluster))
			at = p.off + p.n
			return p, p.n, err
		},
		Do: func(_ context.Context, t *blk.Task, p piece) error { return b.filter.Copy(t, p.off, p.n) },
	}
	return w.Run(ctx)
}

// next finds the first piece at or after at. With an error it is the place that was reached.
func (b *backup) next(ctx context.Context, t *blk.Task, at, limit int64) (piece, error) {
	for ctx.Err() == nil {
		off, n, ok := b.filter.Todo.Next(at, b.size)
		if !ok {
			return piece{off: at}, job.ErrDone
		}
		n = min(n, b.size-off)
		e, err := b.filter.Source().Map(t, off, n)
		if err != nil {
			return piece{off: off}, &cbw.SourceError{Err: err}
		}
		hole := min(e.Len, n)
		if hole < n {
			hole &^= b.Cluster - 1
		}
		switch {
		case hole == 0 || e.State != blk.Zero && e.State != blk.Unallocated:
			return piece{off, min(n, limit)}, nil
		case !b.Blank:
			return piece{off, min(hole, zeroRange)}, nil
		}
		// Without the lock: what has changed since the instant, so that the hole may be a new one, has no bit any more.
		b.filter.Todo.Clear(off, hole)
		at = off + hole
	}
	return piece{off: at}, context.Cause(ctx)
}

// onError does what the user asked for: nil means go on, perhaps after a pause.
func (b *backup) onError(ctx context.Context, err error) error {
	if reason := b.filter.Reason(); reason != nil {
		return reason
	}
	policy := b.opts.OnTargetError
	var src *cbw.SourceError
	if errors.As(err, &src) {
		policy = b.opts.OnSourceError
	}
	if policy == job.OnErrorStop || policy == job.OnErrorEnospc && blk.IsNoSpace(err) {
		b.job.PauseFor(err)
		return b.job.Gate(ctx)
	}
	b.filter.Break(err) // other pieces may still have to wait for the target; the guest has not
	return err
}

// remove takes the filter away, and closes the target when nothing is under way to it any more.
func (b *backup) remove(ctx context.Context) error {
	b.filter.Break(errors.New("the backup is over"))
	err := b.Graph.Change(context.WithoutCancel(ctx), func(tx *blk.Tx) error {
		tx.SetRoot(b.filter.Next())
		return nil
	})
	if err != nil {
		return err // the filter stays, and with it the target: nothing is copied
	}
	b.filter.Wait()
	return b.Close()
}

// complete records that the target holds the disk as of the instant. From here on the backup is done for a restart, too.
func (b *backup) complete() error {
	b.job.Update(func(r *job.Record) {
		r.TargetConsistent, r.Error = true, ""
		r.Message = fmt.Sprintf("%s holds disk %s as of %s", r.Target, r.Disk, b.instant.Format(time.RFC3339))
		if r.Bitmap != "" && !r.Full && r.Base == "" && !r.Existing {
			r.Message = fmt.Sprintf("%s holds what had changed of disk %s by %s, and nothing else", r.Target, r.Disk, b.instant.Format(time.RFC3339))
		}
	})
	if r := b.job.Record(); r.Error != "" { // of the journal
		return errors.New(r.Error)
	}
	return nil
}

// Incomplete says what a backup leaves that did not come to its end.
func Incomplete(r *job.Record) string {
	s := r.Target + " is incomplete and of no use: remove it, and begin again"
	if r.Existing {
		s = r.Target + " is incomplete: begin again"
	}
	if r.Bitmap != "" {
		s += fmt.Sprintf("; bitmap %s has kept all that it named", r.Bitmap)
	}
	return s
}
