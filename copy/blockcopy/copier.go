// SPDX-License-Identifier: Apache-2.0

package blockcopy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/copy/job"
)

// piece is a range to be copied: whole blocks, the last of which may end past the disk.
type piece struct {
	off, n int64
	bulk   bool // of the bulk stage
	blank  bool // the target reads as zeros there
}

// sourceError marks an error as the source's; all others are the target's.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }

// copyAll copies the pieces, several at once. An error that the user wants to survive pauses the job; the blocks
// concerned stay dirty.
func (c *copier) copyAll(ctx context.Context, next func(limit int64) (piece, error)) error {
	return c.workers(ctx, next, c.copyPiece)
}

// workers runs do on every piece, unless an error ends it before. next is called by one worker at a time.
func (c *copier) workers(ctx context.Context, next func(limit int64) (piece, error), do func(*blk.Task, piece) error) error {
	w := job.Work[piece]{
		Job: c.job, Pacer: c.pacer,
		Next: func(_ context.Context, _ *blk.Task, limit int64) (piece, int64, error) {
			p, err := next(max(limit&^(c.opts.Granularity-1), c.opts.Granularity))
			return p, min(p.n, c.size-p.off), err
		},
		Do:      func(_ context.Context, t *blk.Task, p piece) error { return do(t, p) },
		OnError: c.pieceFailed,
	}
	return w.Run(ctx)
}

// pieceFailed does what the user asked for, except about errors that are no disk's.
func (c *copier) pieceFailed(ctx context.Context, err error) error {
	var mismatch *mismatchError
	var lost *targetLost
	if errors.As(err, &mismatch) || errors.As(err, &lost) {
		return err
	}
	policy := c.opts.OnTargetError
	var src *sourceError
	if errors.As(err, &src) {
		policy = c.opts.OnSourceError
	} else {
		c.filter.State.Doubt(err)
	}
	return c.onError(ctx, policy, err)
}

// copyPiece copies one range. The lock is held from before the dirty bits are cleared until the copy is written,
// and the bits are set again if anything fails: no guest write is ever forgotten or overwritten by older data.
func (c *copier) copyPiece(t *blk.Task, p piece) (err error) {
	held := c.filter.Lock.Lock(t, p.off, p.n)
	defer c.filter.Lock.Unlock(held)
	end := min(p.off+p.n, c.size)
	defer c.filter.State.End(c.filter.State.Begin(p.off, p.n))
	c.progress.begin(end - p.off)
	c.filter.Dirty.Clear(p.off, p.n)
	defer func() {
		if err != nil {
			c.filter.Dirty.Set(p.off, p.n)
		}
		c.progress.end(end-p.off, err == nil)
	}()
	for off := p.off; off < end; {
		e, err := c.filter.Source().Map(t, off, end-off)
		if err != nil {
			return &sourceError{err}
		}
		n, k := min(e.Len, end-off), c.kindOf(e)
		if k == kindShared {
			if n, k, err = c.shared(t, off, n); err != nil {
				return err
			}
		}
		if n, k, err = c.toPack(t, p, off, end, n, k); err != nil {
			return err
		}
		switch k {
		case kindShared:
		case kindHole:
			err = c.zero(t, p, off, n)
		default:
			n = min(n, max(maxRead, c.PackUnit))
			err = c.copyData(t, p, off, n)
		}
		if err != nil {
			return err
		}
		off += n
	}
	return nil
}

// toPack cuts what begins at off to whole units, where such are to be compressed. One that is of data and holes is data
// to its end; one of which the base holds a part is left as it is.
func (c *copier) toPack(t *blk.Task, p piece, off, end, n int64, k kind) (int64, kind, error) {
	if !c.packing(p) || k == kindShared || off%c.PackUnit != 0 || end-off < c.PackUnit {
		return n, k, nil
	}
	if n >= c.PackUnit {
		return n &^ (c.PackUnit - 1), k, nil
	}
	for at := off + n; c.Base > 0 && at < off+c.PackUnit; {
		e, err := c.filter.Source().Map(t, at, off+c.PackUnit-at)
		if err != nil {
			return 0, 0, &sourceError{err}
		}
		if c.kindOf(e) == kindShared {
			return n, k, nil
		}
		at += e.Len
	}
	return c.PackUnit, kindData, nil
}

const (
	maxRead  = 1 << 20
	zeroUnit = 4096 // blocks of zeros of this size, aligned, become holes
)

func (c *copier) zero(t *blk.Task, p piece, off, n int64) error {
	if p.blank {
		return nil
	}
	return blk.Do(t, c.Target, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: off, Len: n})
}

func (c *copier) copyData(t *blk.Task, p piece, off, n int64) error {
	buf := blk.GetBuffer(int(n))
	defer buf.Free()
	if err := blk.Do(t, c.filter.Source(), &blk.Request{Op: blk.OpRead, Off: off, Len: n, Data: blk.BytesVec(nil, buf.B)}); err != nil {
		return &sourceError{err}
	}
	for b := buf.B; len(b) > 0; {
		part := b
		if c.packing(p) { // one unit after the other
			part = b[:min(int64(len(b)), c.PackUnit-off%c.PackUnit)]
		}
		l, zero := run(part)
		var err error
		switch {
		case c.packing(p) && int64(len(part)) == c.PackUnit && !(zero && l == len(part)):
			l = len(part)
			err = c.Pack(t, off, part)
		case zero:
			err = c.zero(t, p, off, int64(l))
		default:
			err = blk.Do(t, c.Target, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(l), Data: blk.BytesVec(nil, b[:l])})
		}
		if err != nil {
			return err
		}
		b, off = b[l:], off+int64(l)
	}
	return nil
}

// packing reports whether whole units of the piece are compressed.
func (c *copier) packing(p piece) bool { return c.Pack != nil && p.bulk }

// run is the length of the run of units at the start of b that are all zero, or all not.
func run(b []byte) (n int, zero bool) {
	for n < len(b) {
		u := b[n:min(n+zeroUnit, len(b))]
		z := bytes.Equal(u, zeros[:len(u)])
		if n > 0 && z != zero {
			break
		}
		zero = z
		n += len(u)
	}
	return n, zero
}

var zeros [zeroUnit]byte

// mismatchError is fatal: the copy is not what it should be.
type mismatchError struct{ off int64 }

func (e *mismatchError) Error() string {
	return fmt.Sprintf("verification failed: source and target differ at offset %d", e.off)
}

// compare reads a range of both images, with the guest's mirrored writes to it held back. What cannot be read is made
// dirty, so that verify sees that it was not compared.
func (c *copier) compare(t *blk.Task, p piece) (err error) {
	held := c.filter.Lock.Lock(t, p.off, p.n)
	defer c.filter.Lock.Unlock(held)
	if c.filter.Dirty.Any(p.off, p.n) {
		return nil // a write failed meanwhile: all is looked at again
	}
	defer func() {
		if err != nil {
			c.filter.Dirty.Set(p.off, p.n)
		}
	}()
	a, b := blk.GetBuffer(int(p.n)), blk.GetBuffer(int(p.n))
	defer a.Free()
	defer b.Free()
	if err := blk.Do(t, c.filter.Source(), &blk.Request{Op: blk.OpRead, Off: p.off, Len: p.n, Data: blk.BytesVec(nil, a.B)}); err != nil {
		return &sourceError{err}
	}
	if err := blk.Do(t, c.Target, &blk.Request{Op: blk.OpRead, Off: p.off, Len: p.n, Data: blk.BytesVec(nil, b.B)}); err != nil {
		return err
	}
	if !bytes.Equal(a.B, b.B) {
		if !c.filter.Mirroring() {
			return nil // a write that is only logged may have come in between, its bit not set yet
		}
		i := 0
		for a.B[i] == b.B[i] {
			i++
		}
		return &mismatchError{p.off + int64(i)}
	}
	c.job.Update(func(r *job.Record) { r.VerifiedBytes += p.n })
	return nil
}

// progress counts bytes.
type progress struct {
	now  atomic.Int64 // being copied, so that their bits are clear
	done atomic.Int64 // copied or skipped, repeats included
}

func (p *progress) begin(n int64) { p.now.Add(n) }

func (p *progress) end(n int64, ok bool) {
	if ok {
		p.done.Add(n)
	}
	p.now.Add(-n)
}

// report writes the progress into the job's record, a few times a second.
func (c *copier) report(ctx context.Context) {
	const every = 250 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	var rate, dirtyRate float64
	var lastDone, lastLeft int64
	last := time.Now()
	lastLeft = c.left()
	for {
		over := ctx.Err() != nil // asked first: the last figures are told
		done := c.progress.done.Load()
		left := c.left()
		if dt := time.Since(last).Seconds(); dt > 0.01 {
			smooth(&rate, float64(done-lastDone)/dt)
			// What is left grows by what the guest dirties and shrinks by what is copied.
			smooth(&dirtyRate, max(0, float64(left-lastLeft+done-lastDone)/dt))
			last, lastDone, lastLeft = time.Now(), done, left
		}
		c.job.Update(func(r *job.Record) {
			r.BytesDone, r.BytesTotal = done, done+left
			r.Rate, r.DirtyRate, r.ETASeconds = int64(rate), int64(dirtyRate), -1
			net := rate
			if r.Stage != job.StageMirror {
				net -= dirtyRate
			}
			if left == 0 {
				r.ETASeconds = 0
			} else if net > 1 {
				r.ETASeconds = int64(float64(left) / net)
			}
			// Without mirrored writes a copy that is slower than the guest would not end.
			r.Converging = r.Stage == job.StageMirror || rate == 0 || left == 0 || net > 0
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

// left is what is still to be copied, in bytes.
func (c *copier) left() int64 {
	return c.filter.State.Left() + c.progress.now.Load()
}

func smooth(mean *float64, v float64) {
	if *mean == 0 {
		*mean = v
		return
	}
	*mean += (v - *mean) / 8
}
