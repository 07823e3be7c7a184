// SPDX-License-Identifier: Apache-2.0

// Package commit merges images in the middle of a running disk's chain into the one behind them.
//
// Nobody writes to the images that are merged, so each place is copied once, and the base then holds what they show.
// The rest is the caller's Finish: with the base durable, the image before them names the base. Until then the chain is
// the old one, in which the base does not show where it is written; see blk/image.
package commit

import (
	"context"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/copy/job"
)

// Setup is what a commit works on.
type Setup struct {
	Graph *blk.Graph // of the disk, whose guest is to be left room
	View  blk.Node   // what the merged images show
	Depth int        // what lies at least this deep in View is the base's already
	Base  blk.Node   // at least as large as View
	// Finish takes the merged images out of the chain. After an error they are still there.
	Finish func(ctx context.Context) error
}

const (
	zeroBytes = 64 << 20 // of zeroes at a time
	every     = 250 * time.Millisecond
)

type committer struct {
	Setup
	job   *job.Job
	pacer *job.Pacer
	size  int64

	mu   sync.Mutex // guards what follows
	at   int64      // everything before has been given out
	done int64      // bytes copied, or not to be copied
}

// piece is a range that the merged images hold, all of one kind.
type piece struct {
	off, n int64
	zero   bool
}

// Run copies and finishes.
func Run(ctx context.Context, j *job.Job, s Setup) error {
	c := &committer{Setup: s, job: j, pacer: job.NewPacer(s.Graph), size: s.Base.Info().Size}
	j.Update(func(r *job.Record) { r.Stage, r.BytesTotal = job.StageBulk, c.size })
	watch, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { c.report(watch) })
	err := c.copyAll(ctx)
	stop()
	watching.Wait()
	if err != nil {
		return err
	}
	// So that the flush that holds the guest up is short.
	if err := blk.Do(blk.NewTask(), s.Base, &blk.Request{Op: blk.OpFlush}); err != nil {
		return err
	}
	if err := j.Gate(ctx); err != nil {
		return err
	}
	j.Update(func(r *job.Record) { r.Stage = job.StageSwitch })
	return s.Finish(ctx)
}

// copyAll copies the pieces.
func (c *committer) copyAll(ctx context.Context) error {
	w := job.Work[piece]{
		Job: c.job, Pacer: c.pacer, Do: c.copyPiece,
		Next: func(_ context.Context, t *blk.Task, limit int64) (piece, int64, error) {
			p, err := c.next(t, limit)
			return p, p.n, err
		},
		OnError: func(_ context.Context, err error) error { return err },
	}
	return w.Run(ctx)
}

// next gives out the next piece.
func (c *committer) next(t *blk.Task, limit int64) (piece, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	shown := c.View.Info().Size
	for c.at < shown {
		e, err := c.View.Map(t, c.at, shown-c.at)
		if err != nil {
			return piece{}, err
		}
		p := piece{off: c.at, n: e.Len, zero: e.State == blk.Zero || e.State == blk.Unallocated}
		if int(e.Depth) >= c.Depth {
			c.at += p.n
			c.done += p.n
			continue
		}
		p.n = min(p.n, limit)
		if p.zero {
			p.n = min(e.Len, zeroBytes)
		} else if whole := p.n &^ (blk.SectorSize - 1); whole > 0 {
			p.n = whole
		} else {
			p.n = min(e.Len, blk.SectorSize)
		}
		c.at += p.n
		return p, nil
	}
	// A longer base shows nothing of its own behind the end of the merged images.
	if c.at < c.size {
		p := piece{off: c.at, n: min(c.size-c.at, zeroBytes), zero: true}
		c.at += p.n
		return p, nil
	}
	return piece{}, job.ErrDone
}

// copyPiece copies a piece. A base that is full pauses the job, and the piece is copied again then.
func (c *committer) copyPiece(ctx context.Context, t *blk.Task, p piece) error {
	for {
		err := c.copy(t, p)
		if err == nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.done += p.n
			return nil
		}
		if !blk.IsNoSpace(err) {
			return err
		}
		c.job.PauseFor(err)
		if err := c.job.Gate(ctx); err != nil {
			return err
		}
	}
}

func (c *committer) copy(t *blk.Task, p piece) error {
	if p.zero {
		return blk.Do(t, c.Base, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: p.off, Len: p.n})
	}
	buf := blk.GetBuffer(int(p.n))
	defer buf.Free()
	v := blk.BytesVec(nil, buf.B)
	if err := blk.Do(t, c.View, &blk.Request{Op: blk.OpRead, Off: p.off, Len: p.n, Data: v}); err != nil {
		return err
	}
	return blk.Do(t, c.Base, &blk.Request{Op: blk.OpWrite, Off: p.off, Len: p.n, Data: v})
}

// report writes the progress into the job's record, a few times a second.
func (c *committer) report(ctx context.Context) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	var last int64
	var rate float64
	for {
		over := ctx.Err() != nil // asked first: the last figures are told
		c.mu.Lock()
		done := c.done
		c.mu.Unlock()
		rate += (float64(done-last)/every.Seconds() - rate) / 4
		last = done
		c.job.Update(func(r *job.Record) {
			r.BytesDone, r.BytesTotal, r.Rate, r.ETASeconds = done, c.size, int64(rate), -1
			if rate > 1 {
				r.ETASeconds = int64(float64(c.size-done) / rate)
			}
		})
		if over {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}
