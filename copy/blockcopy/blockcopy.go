// SPDX-License-Identifier: Apache-2.0

// Package blockcopy copies the image of a running disk to another image and switches the guest to it.
//
// The stages, in order:
//
//	bulk    each block is copied once, in the disk's order; guest writes are logged in a dirty bitmap
//	dirty   blocks that were written meanwhile are copied again, in passes, as long as a pass leaves less than it found
//	mirror  each guest write goes to both images while the last dirty blocks are copied, so that the end comes under
//	        any load; then, if asked, both images are compared; then the job is ready
//	switch  on command: with the guest paused and nothing dirty the target is flushed, the switch recorded, and the
//	        guest goes on with the target only
//
// A target that fails sends the job back to the dirty stage: the guest's writes are logged again. If it has tables of its
// own, and a flush of these fails, the job ends.
package blockcopy

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/copy/job"
)

// DefaultGranularity is what a bit of the dirty bitmap stands for, in bytes.
const DefaultGranularity = 64 << 10

// Setup is what a copy works on.
type Setup struct {
	Graph  *blk.Graph // its root is the source, or the filter over it, from which the copy goes on
	Target blk.Node   // at least as large; the job owns it
	// State is to outlive the process, so that the next one goes on: while the daemon stops, the filter stays and logs
	// what the guest writes until it is gone. nil: it is not.
	State *mirror.State
	// Release closes the source after the switch, or else the target, with all that belongs to it. nil: its Close.
	Release func(blk.Node) error
	// Blank: what the bulk stage has not come to of the target holds nothing of its own: it reads as the base, or as zeros
	// if there is none.
	Blank bool
	// Base is the shared base: what lies at least this many images behind the source's first one is left out, for the
	// target reads the same there, unless it holds something of its own. 0: there is none.
	Base uint16
	// Pack, if not nil, writes PackUnit bytes at a multiple of PackUnit compressed. The bulk stage uses it.
	Pack     func(t *blk.Task, off int64, data []byte) error
	PackUnit int64
	// Commit records durably that the disk is on the target. The guest is paused meanwhile. After an error the disk
	// stays on the source.
	Commit func() error
	// Settle is called after an error of Commit, again and again until it returns nil: nobody can doubt then that the disk is
	// on the source. Up to that guest writes go to both images, and the job does not end. nil: there is no doubt.
	Settle func() error
	// Hint tells the user what to do after the switch, Left before it what the target will not have. Left may be empty.
	Hint, Left string
}

const (
	smallRest    = 64 << 20         // bytes: mirrored writes start when no more than this is dirty
	shrinkFactor = 0.75             // a pass must leave less than this part of what it found; so must a flush take, of the last one
	switchWait   = 10 * time.Second // for requests in flight
	rangeBytes   = 64 << 20         // of zeroes at a time
)

// copier is one run.
type copier struct {
	Setup
	job    *job.Job
	opts   job.Options
	pacer  *job.Pacer
	filter *mirror.Node
	size   int64

	targetErr chan error // from a queue's thread: the target could not take a mirrored write
	asked     bool       // for a switch that is still to come

	settleMu  sync.Mutex // held over Settle
	unsettled error      // of Settle: the next daemon may find the disk on the target

	progress progress
}

// Run copies until the switch, an error or the end of ctx. The guest ends up on the target if it returns nil and on
// the source otherwise.
func Run(ctx context.Context, j *job.Job, s Setup) error {
	c := &copier{Setup: s, job: j, opts: j.Record().Options, targetErr: make(chan error, 1), pacer: job.NewPacer(s.Graph)}
	if err := c.insert(ctx); err != nil {
		if c.filter != nil {
			return errors.Join(err, c.remove(ctx))
		}
		return errors.Join(err, c.release(s.Target))
	}
	watch, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { c.report(watch) })
	wg.Go(func() { c.filter.State.Settle(watch, c.Graph.Barrier) })
	wg.Go(func() { c.keepSettling(watch) })
	err := c.stages(ctx)
	stop()
	wg.Wait()
	if err != nil {
		return errors.Join(err, c.remove(ctx))
	}
	return nil
}

// insert puts the filter over the source, with every queue at rest: each write from then on is logged.
func (c *copier) insert(ctx context.Context) error {
	return c.Graph.Change(ctx, func(tx *blk.Tx) error {
		var there bool
		c.filter, there = tx.Root().(*mirror.Node)
		c.size = tx.Root().Info().Size
		if t := c.Target.Info().Size; t < c.size {
			return fmt.Errorf("%s has %d bytes, the disk has %d: make the target larger", c.Target.Info().Name, t, c.size)
		}
		if !there {
			state := c.State
			if state == nil {
				state = mirror.NewState(nil, c.size, c.opts.Granularity)
			}
			c.filter = mirror.New(tx.Root(), state)
			tx.SetRoot(c.filter)
		}
		c.progress.done.Store(min(c.filter.State.Bulk(), c.size))
		c.filter.To(c.Target, func(err error) {
			select {
			case c.targetErr <- err:
			default: // one is enough
			}
		})
		return nil
	})
}

// remove takes the filter away, or at least the target from it; the guest stays on the source. If the copy was complete
// the target is left as it was at that instant.
func (c *copier) remove(ctx context.Context) error {
	c.waitSettled()
	stays := c.State != nil && job.Stopping(ctx)
	var flushErr error
	err := c.Graph.Change(context.WithoutCancel(ctx), func(tx *blk.Tx) error {
		consistent := c.job.Record().TargetConsistent && c.filter.Mirroring() && c.filter.Dirty.Count() == 0
		if consistent {
			flushErr = c.filter.FlushTarget(blk.NewTask())
			consistent = flushErr == nil && c.whole() == nil
		}
		if stays {
			c.filter.To(nil, nil)
			c.filter.State.Rest()
		} else {
			c.filter.State.Over()
			tx.SetRoot(c.filter.Source())
		}
		c.job.Update(func(r *job.Record) {
			r.TargetConsistent = consistent
			if consistent {
				r.Message = fmt.Sprintf("%s is a consistent copy of the disk as of the end of the job; the guest stays on %s", r.Target, r.Source)
			} else {
				r.Message = fmt.Sprintf("%s is incomplete; the guest stays on %s", r.Target, r.Source)
			}
		})
		return nil
	})
	if err != nil {
		return err // the filter stays, and with it the target: the guest's writes are logged in vain
	}
	return errors.Join(flushErr, c.release(c.Target))
}

// settleEvery is how often it is tried to record that a disk is still on the source. Tests change it.
var settleEvery = time.Second

// settle follows a Commit that failed.
func (c *copier) settle() error {
	if c.Settle == nil {
		return nil
	}
	c.settleMu.Lock()
	defer c.settleMu.Unlock()
	c.unsettled = c.Settle()
	return c.unsettled
}

func (c *copier) inDoubt() error {
	c.settleMu.Lock()
	defer c.settleMu.Unlock()
	return c.unsettled
}

// keepSettling removes a doubt as soon as it can be, until ctx ends: should the target fail meanwhile, only the source has
// what the guest writes.
func (c *copier) keepSettling(ctx context.Context) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if c.inDoubt() != nil {
			c.settle() //nolint:errcheck // it is kept
		}
	}
}

// waitSettled waits until there is no doubt that the disk is on the source, whatever else is to be done. A daemon that stops
// or dies meanwhile leaves two images that are the same.
func (c *copier) waitSettled() {
	for err := c.inDoubt(); err != nil; err = c.settle() {
		c.job.Update(func(r *job.Record) {
			r.Message = fmt.Sprintf("cannot end before it is recorded that the disk is on %s: %v", r.Source, err)
		})
		time.Sleep(settleEvery)
	}
}

func (c *copier) release(n blk.Node) error {
	if c.Release != nil {
		return c.Release(n)
	}
	return n.Close()
}

// stages goes through them, back to dirty whenever the target failed and the user or the space let it go on.
func (c *copier) stages(ctx context.Context) error {
	if err := c.bulk(ctx); err != nil {
		return err
	}
	for {
		err := c.converge(ctx)
		if err == nil {
			err = c.verify(ctx)
		}
		if err == nil {
			err = c.whole()
		}
		if err == nil {
			err = c.ready(ctx)
		}
		if errors.Is(err, errBehind) {
			continue
		}
		var back *targetLost
		if !errors.As(err, &back) {
			return err
		}
		if err := c.onError(ctx, c.opts.OnTargetError, back.err); err != nil {
			return err
		}
	}
}

// targetLost says that a mirrored write failed on the target, so that writes are logged again.
type targetLost struct{ err error }

func (e *targetLost) Error() string { return e.err.Error() }
func (e *targetLost) Unwrap() error { return e.err }

// errBehind says that blocks have become dirty under mirrored writes, with a good target: they are copied again.
var errBehind = errors.New("some blocks could not be written or read on the source and are copied again")

// lost returns a targetLost if the filter has fallen back to logging.
func (c *copier) lost() error {
	select {
	case err := <-c.targetErr:
		return &targetLost{err}
	default:
		return nil
	}
}

// whole fails if a flush within the target has failed that may have lost tables of it. They are in memory and look right, also
// to a comparison, and what is copied again goes where they say without their being written again.
func (c *copier) whole() error {
	target, ok := c.Target.(interface{ Lost() error })
	if !ok || target.Lost() == nil {
		return nil
	}
	err := fmt.Errorf("%s could not be flushed, which may have lost parts of its tables: copy anew (%v)",
		c.Target.Info().Name, target.Lost()) //nolint:errorlint // room on the storage is no remedy
	c.filter.State.Doubt(err)
	return err
}

// onError does what the user asked for: nil means go on, perhaps after a pause.
func (c *copier) onError(ctx context.Context, policy string, err error) error {
	c.job.Update(func(r *job.Record) { r.TargetConsistent = false })
	if err := c.whole(); err != nil {
		return err
	}
	if policy == job.OnErrorStop || policy == job.OnErrorEnospc && blk.IsNoSpace(err) {
		c.job.PauseFor(err)
		gate := c.job.Gate(ctx)
		c.lost() //nolint:errcheck // of the time before the pause: the blocks are marked
		return gate
	}
	return err
}

// bulk copies what the source holds, once.
func (c *copier) bulk(ctx context.Context) error {
	c.job.Update(func(r *job.Record) { r.Stage = job.StageBulk })
	t := blk.NewTask()
	var (
		at, end int64 // from at to end the source is of one kind
		k       kind
		blank   = c.Blank && c.Base == 0
		state   = c.filter.State
		unit    = c.unit()
	)
	at = state.Bulk()
	return c.copyAll(ctx, func(limit int64) (piece, error) {
		limit = max(limit&^(unit-1), unit)
		for at < c.size {
			if at >= end {
				var err error
				if end, k, err = c.extent(t, at); err != nil {
					return piece{}, err
				}
			}
			from := at
			switch {
			case k == kindShared || k == kindHole && blank:
				// The dirty bits stay: what is written here from now on is copied in the dirty stage.
				at = end
				state.SetBulk(at)
				c.progress.done.Add(at - from)
				continue
			case k == kindHole:
				at += min(end-at, rangeBytes)
			default:
				at += min(end-at, limit)
			}
			c.filter.Dirty.Set(from, at-from) // until it is copied
			state.SetBulk(at)
			return piece{off: from, n: at - from, bulk: true, blank: blank}, nil
		}
		return piece{}, job.ErrDone
	})
}

// kind is what the bulk stage needs to know of a part of the source.
type kind uint8

const (
	kindData   kind = iota
	kindHole        // reads as zeros
	kindShared      // held by the shared base, in both images
)

func (c *copier) kindOf(e blk.Extent) kind {
	switch {
	case c.Base > 0 && e.Depth >= c.Base:
		return kindShared
	case e.State == blk.Zero || e.State == blk.Unallocated:
		return kindHole
	default:
		return kindData
	}
}

// unit is what the bulk stage copies at least: whole blocks, and of those as many as are compressed as one.
func (c *copier) unit() int64 {
	if c.Pack == nil {
		return c.opts.Granularity
	}
	return max(c.opts.Granularity, c.PackUnit)
}

// extent finds out up to where the source is of one kind, in whole units. One that is of several kinds counts as data.
func (c *copier) extent(t *blk.Task, at int64) (end int64, k kind, err error) {
	e, err := c.filter.Source().Map(t, at, c.size-at)
	if err != nil {
		return 0, 0, &sourceError{err}
	}
	k = c.kindOf(e)
	if k == kindShared && !c.Blank {
		if e.Len, k, err = c.shared(t, at, e.Len); err != nil {
			return 0, 0, err
		}
	}
	unit := c.unit()
	end = at + e.Len
	if k != kindData {
		if end < c.size {
			end &^= unit - 1
		}
		if end > at {
			return end, k, nil
		}
		return (at + unit) &^ (unit - 1), kindData, nil
	}
	return (end + unit - 1) &^ (unit - 1), kindData, nil
}

// shared looks whether the target shows the base too where the source does. It holds something of its own there if it
// was used before, or if only the target's half of a mirrored write was done: that is copied over.
func (c *copier) shared(t *blk.Task, off, l int64) (int64, kind, error) {
	e, err := c.Target.Map(t, off, l)
	if err != nil {
		return 0, 0, err
	}
	if e.Depth == 0 {
		return min(e.Len, l), kindData, nil
	}
	return min(e.Len, l), kindShared, nil
}

// converge makes the bitmap empty with mirrored writes on.
func (c *copier) converge(ctx context.Context) error {
	for {
		if err := c.lost(); err != nil {
			return err
		}
		if !c.filter.Mirroring() {
			if err := c.shrink(ctx); err != nil {
				return err
			}
		}
		for c.filter.Mirroring() && c.filter.Dirty.Count() > 0 {
			if err := c.dirtyPass(ctx); err != nil {
				return err
			}
		}
		if c.filter.Mirroring() {
			return nil
		}
	}
}

// shrink copies dirty blocks while that makes them fewer, then lets each write go to both images. From there on no
// block becomes dirty, so the copy ends whatever the guest does.
func (c *copier) shrink(ctx context.Context) error {
	c.job.Update(func(r *job.Record) { r.Stage = job.StageDirty })
	left := c.filter.Dirty.Bytes()
	for before := int64(-1); left > smallRest && (before < 0 || float64(left) <= shrinkFactor*float64(before)); {
		before = left
		if err := c.dirtyPass(ctx); err != nil {
			return err
		}
		left = c.filter.Dirty.Bytes()
	}
	if err := c.filter.Mirror(ctx, c.Graph); err != nil {
		return err
	}
	c.job.Update(func(r *job.Record) {
		r.Stage, r.Converging = job.StageMirror, true
		if left > smallRest {
			r.Message = "the guest writes as fast as dirty blocks are copied: its writes now go to both images, so that the copy ends"
		}
	})
	return nil
}

// dirtyPass copies the blocks that are dirty, once through the disk.
func (c *copier) dirtyPass(ctx context.Context) error {
	var at int64
	return c.copyAll(ctx, func(limit int64) (piece, error) {
		off, n, ok := c.filter.Dirty.Next(at, limit)
		if !ok {
			return piece{}, job.ErrDone
		}
		at = off + n
		return piece{off: off, n: n}, nil
	})
}

// ready waits for the command, and switches.
func (c *copier) ready(ctx context.Context) error {
	for ready := false; !ready; {
		if err := c.job.Gate(ctx); err != nil {
			return err
		}
		c.job.Update(func(r *job.Record) {
			if ready = r.State != job.StatePaused; ready {
				r.State, r.TargetConsistent, r.Error = job.StateReady, true, ""
				r.BytesDone = c.progress.done.Load()
				r.BytesTotal = r.BytesDone + c.left()
				if r.Message = "both images are the same"; r.SwitchMode != "auto" {
					r.Message += "; finish with: blkstream switch " + r.Disk
				}
				if c.Left != "" {
					r.Message += "; " + c.Left
				}
			}
		})
	}
	for {
		changed := c.job.Changed()
		c.asked = c.asked || c.job.SwitchAsked()
		if c.opts.SwitchMode == "auto" || c.asked {
			err := c.switchOver(ctx)
			if errors.Is(err, errBehind) {
				return c.notReady(err) // and switch then
			}
			c.asked = false
			var back *targetLost
			if err == nil || errors.As(err, &back) {
				return c.notReady(err)
			}
			if c.opts.SwitchMode == "auto" {
				return err
			}
			c.job.Update(func(r *job.Record) {
				r.Stage, r.State = job.StageMirror, job.StateReady
				r.Error = fmt.Sprintf("the switch failed, the guest is still on %s: %v", r.Source, err)
			})
			continue
		}
		select {
		case <-changed:
		case err := <-c.targetErr:
			return c.notReady(&targetLost{err})
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// notReady takes the readiness back if err is not nil.
func (c *copier) notReady(err error) error {
	if err != nil {
		c.job.Update(func(r *job.Record) {
			r.State, r.Stage, r.TargetConsistent = job.StateRunning, job.StageDirty, false
			r.Message, r.Error = "", err.Error()
		})
	}
	return err
}

// switchOver moves the guest to the target. Up to Commit nothing has changed for a restart; from then on the
// target is the disk.
func (c *copier) switchOver(ctx context.Context) error {
	c.job.Update(func(r *job.Record) { r.Stage = job.StageSwitch })
	t := blk.NewTask()
	flush := func() error {
		if err := c.filter.FlushTarget(t); err != nil {
			return &targetLost{err}
		}
		return nil
	}
	if err := job.FlushUntilShort(ctx, flush); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, switchWait)
	defer cancel()
	var source blk.Node
	err := c.Graph.Change(wait, func(tx *blk.Tx) error {
		if !c.filter.Mirroring() || c.filter.Dirty.Count() > 0 {
			if err := c.lost(); err != nil {
				return err
			}
			return errBehind
		}
		if err := flush(); err != nil {
			return err
		}
		if err := c.whole(); err != nil {
			return &targetLost{err}
		}
		if ctx.Err() != nil { // cancelled while the guest was brought to rest
			return context.Cause(ctx)
		}
		if err := c.Commit(); err != nil {
			return errors.Join(err, c.settle())
		}
		c.filter.State.Over()
		source = c.filter.Source()
		tx.SetRoot(c.Target)
		return nil
	})
	if err != nil {
		return err
	}
	c.job.Update(func(r *job.Record) { r.Message, r.Error = c.Hint, "" })
	if err := c.release(source); err != nil {
		// Not an error of the job, which whoever asked for the switch would take for its failure.
		c.job.Update(func(r *job.Record) { r.Message += fmt.Sprintf("; closing %s: %v", r.Source, err) })
	}
	return nil
}

// verify reads both images and compares them, under mirrored writes.
func (c *copier) verify(ctx context.Context) error {
	if !c.opts.Verify {
		return nil
	}
	var at int64
	c.job.Update(func(r *job.Record) { r.VerifiedBytes, r.Message = 0, "comparing both images" })
	err := c.workers(ctx, func(limit int64) (piece, error) {
		if err := c.lost(); err != nil {
			return piece{}, err
		}
		if at >= c.size {
			return piece{}, job.ErrDone
		}
		p := piece{off: at, n: min(limit, c.size-at)}
		at += p.n
		return p, nil
	}, c.compare)
	if err == nil && c.filter.Dirty.Count() > 0 {
		return errBehind
	}
	return err
}
