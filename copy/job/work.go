// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// ErrDone says that there is no further piece of work.
var ErrDone = errors.New("done")

// Work is what a job does piece by piece, several pieces at once, at the pace and the speed that it is allowed.
type Work[P any] struct {
	Job   *Job
	Pacer *Pacer
	// Next gives the next piece and its length in bytes, which should not be more than limit; ErrDone: there is none. It
	// is called by one worker at a time.
	Next func(ctx context.Context, t *blk.Task, limit int64) (P, int64, error)
	Do   func(ctx context.Context, t *blk.Task, p P) error
	// OnError decides about an error of Next or Do: nil means to go on with the next piece, perhaps after a pause.
	OnError func(ctx context.Context, err error) error
}

// Run works until there is no further piece, the first error, or the end of ctx.
func (w *Work[P]) Run(ctx context.Context) error {
	var (
		wg    sync.WaitGroup
		next  sync.Mutex // held in Next
		mu    sync.Mutex // guards first
		first error
	)
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for range w.Pacer.Workers() {
		wg.Go(func() {
			t := blk.NewTask()
			for {
				err := w.step(work, t, &next)
				if errors.Is(err, ErrDone) {
					return // the others still have pieces, which may fail
				}
				if err != nil {
					mu.Lock()
					defer mu.Unlock()
					if first == nil {
						first = err
						cancel(err)
					}
					return
				}
			}
		})
	}
	var pacing sync.WaitGroup
	pacing.Go(func() { w.Pacer.Run(work) })
	wg.Wait()
	cancel(nil)
	pacing.Wait()
	if first != nil {
		return first
	}
	return w.Job.Gate(ctx) // a pause that came with the last pieces
}

// step does one piece.
func (w *Work[P]) step(ctx context.Context, t *blk.Task, next *sync.Mutex) error {
	if err := w.Job.Gate(ctx); err != nil {
		return err
	}
	next.Lock()
	p, n, err := w.Next(ctx, t, w.Job.Piece(w.Pacer.Size()))
	next.Unlock()
	if err == nil {
		// Paid before the window, so that no piece that was paid late is copied while the guest is to be left alone.
		if err := w.Job.Limit(ctx, n); err != nil {
			return err
		}
		if err := w.Pacer.Begin(ctx); err != nil {
			return err
		}
		err = w.Do(ctx, t, p)
		w.Pacer.End()
	}
	if err == nil || errors.Is(err, ErrDone) || ctx.Err() != nil {
		return err
	}
	return w.OnError(ctx, err)
}

const (
	shortFlush   = 5 * time.Millisecond // one that may hold the guest
	maxFlushes   = 8                    // while waiting for a short one
	shrinkFactor = 0.75                 // a flush must take less than this part of the one before it
)

// FlushUntilShort prepares for a flush that holds the guest. That one has to write what came since the one before it,
// which is what the guest wrote while that one ran: each is shorter than the last, unless the guest writes as fast as
// the storage, or the time is not that of writing.
func FlushUntilShort(ctx context.Context, flush func() error) error {
	for n, before := 0, time.Duration(0); n < maxFlushes && ctx.Err() == nil; n++ {
		start := time.Now()
		if err := flush(); err != nil {
			return err
		}
		took := time.Since(start)
		if took <= shortFlush || n > 0 && float64(took) > shrinkFactor*float64(before) {
			break
		}
		before = took
	}
	return nil
}
