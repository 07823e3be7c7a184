// SPDX-License-Identifier: Apache-2.0

// Package mirror is the filter over a disk's image while a block copy of it runs. It begins by logging the guest's
// writes in a dirty bitmap, which leaves them on the fast path; after Mirror it sends each write to the source and
// to the target.
//
// What the copier and the filter promise each other: the copier holds Lock over a range from before it clears the
// range's dirty bits until its copy is on the target; the filter holds Lock over each mirrored write; a logged
// write marks its bits when it has ended. So a copied block never lands on a newer one.
package mirror

import (
	"context"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// maxPiece bounds the private copy of one mirrored write, in bytes.
const maxPiece = 1 << 20

// Node is the filter.
type Node struct {
	info    blk.Info
	source  blk.Node
	target  blk.Node
	failed  func(error)
	mirrors atomic.Bool // each write goes to both; else it is logged

	// Dirty has a bit for each block in which source and target may differ, not counting what the copier's bulk
	// stage has not come to.
	Dirty *blk.Bitmap
	// Lock is held over a range by whoever writes it to the target.
	Lock blk.RangeLock
}

// New returns the filter, logging. failed is told, perhaps many times and from a queue's thread, that the target
// could not take a mirrored write or flush; by then the filter logs again.
func New(source, target blk.Node, granularity int64, failed func(error)) *Node {
	n := &Node{source: source, target: target, failed: failed, info: *source.Info()}
	n.info.Kind = "mirror"
	n.Dirty = blk.NewBitmap(n.info.Size, granularity)
	return n
}

// Source is the image that the guest is on.
func (n *Node) Source() blk.Node { return n.source }

// Target is the image that is being made.
func (n *Node) Target() blk.Node { return n.target }

// Mirroring reports whether each write goes to both images.
func (n *Node) Mirroring() bool { return n.mirrors.Load() }

// Mirror makes every write from now on go to both images. No write may be in flight that is only logged, so the
// guest is paused for a moment.
func (n *Node) Mirror(ctx context.Context, g *blk.Graph) error {
	return g.Change(ctx, func(*blk.Tx) error {
		n.mirrors.Store(true)
		return nil
	})
}

// Info implements blk.Node.
func (n *Node) Info() *blk.Info { return &n.info }

// Children implements blk.Node.
func (n *Node) Children() []blk.Node { return []blk.Node{n.source, n.target} }

// TryMap implements blk.Node. Reads, and writes that are only logged, go straight to the source.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	switch op {
	case blk.OpRead:
		return n.source.TryMap(op, off, l)
	case blk.OpFlush:
		if n.mirrors.Load() {
			return blk.Extent{}, false
		}
		return n.source.TryMap(op, off, l)
	case blk.OpWrite:
		if n.mirrors.Load() {
			return blk.Extent{}, false
		}
		e, ok := n.source.TryMap(op, off, l)
		if e.Log != nil {
			return blk.Extent{}, false // a log of the source's own: Do marks both
		}
		e.Log = n.Dirty
		return e, ok
	default:
		return blk.Extent{}, false
	}
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return n.source.Map(t, off, l) }

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
		return blk.Do(t, n.source, r)
	case blk.OpFlush:
		return n.flush(t, r)
	case blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard:
		if !n.mirrors.Load() {
			err := blk.Do(t, n.source, r)
			// Marked after the write, whatever came of it, and before it is acknowledged.
			n.Dirty.Set(r.Off, r.Len)
			return err
		}
		if r.Op == blk.OpWrite {
			return n.mirrorData(t, r)
		}
		return n.mirrorZeroes(t, r)
	default:
		return blk.ErrNotSupported
	}
}

// mirrorData writes private copies of the guest's buffer: the guest may change its memory meanwhile, and both
// images must get the same bytes.
func (n *Node) mirrorData(t *blk.Task, r *blk.Request) error {
	buf := blk.GetBuffer(int(min(r.Len, maxPiece)))
	defer buf.Free()
	for done := int64(0); done < r.Len; {
		l := min(r.Len-done, maxPiece)
		b := buf.B[:l]
		r.Data.AppendSlice(nil, done, l).CopyTo(b)
		w := blk.Request{Op: blk.OpWrite, Flags: r.Flags, Off: r.Off + done, Len: l, Data: blk.BytesVec(nil, b)}
		if err := n.both(t, w, w); err != nil {
			return err
		}
		done += l
	}
	return nil
}

// mirrorZeroes carries out a discard as unmapping write-zeroes, so that both images read the same afterwards.
func (n *Node) mirrorZeroes(t *blk.Task, r *blk.Request) error {
	w := blk.Request{Op: blk.OpWriteZeroes, Flags: r.Flags, Off: r.Off, Len: r.Len}
	if r.Op == blk.OpDiscard {
		w.Flags |= blk.Unmap
	}
	return n.both(t, w, w)
}

// both sends a write to source and target under the range's lock, which also keeps overlapping writes in the same
// order on both.
func (n *Node) both(t *blk.Task, toSource, toTarget blk.Request) error {
	held := n.Lock.Lock(t, toSource.Off, toSource.Len)
	defer n.Lock.Unlock(held)
	errSource, errTarget := t.Par(
		func(t *blk.Task) error { return blk.Do(t, n.source, &toSource) },
		func(t *blk.Task) error { return blk.Do(t, n.target, &toTarget) },
	)
	if errSource != nil || errTarget != nil {
		n.Dirty.Set(toSource.Off, toSource.Len)
	}
	if errTarget != nil {
		n.fallBack(errTarget)
	}
	return errSource // a target's error never fails a guest's write
}

// flush makes both images durable: while writes are mirrored either may become the only one.
func (n *Node) flush(t *blk.Task, r *blk.Request) error {
	if !n.mirrors.Load() {
		return blk.Do(t, n.source, r)
	}
	toTarget := *r
	errSource, errTarget := t.Par(
		func(t *blk.Task) error { return blk.Do(t, n.source, r) },
		func(t *blk.Task) error { return blk.Do(t, n.target, &toTarget) },
	)
	if errTarget != nil {
		// The host may have dropped anything that was written since the last good flush.
		n.Distrust()
		n.failed(errTarget)
	}
	return errSource
}

// Distrust marks every block and returns to logging: nothing on the target can be relied on.
func (n *Node) Distrust() {
	n.mirrors.Store(false)
	n.Dirty.Set(0, n.info.Size)
}

// fallBack returns to logging. Writes that still see the old mode mirror, or mark their bits when that fails.
func (n *Node) fallBack(err error) {
	n.mirrors.Store(false)
	n.failed(err)
}

// Close implements blk.Node: it closes both images.
func (n *Node) Close() error {
	errSource, errTarget := n.source.Close(), n.target.Close()
	if errSource != nil {
		return errSource
	}
	return errTarget
}
