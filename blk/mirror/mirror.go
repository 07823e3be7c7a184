// SPDX-License-Identifier: Apache-2.0

// Package mirror is the filter over a disk's image while a block copy of it runs. It begins by logging the guest's
// writes in a dirty bitmap, which leaves them on the fast path; after Mirror it sends each write to the source and
// to the target.
//
// What the copier and the filter promise each other: the copier holds Lock over a range from before it clears the
// range's dirty bits until its copy is on the target; the filter holds Lock over each mirrored write; a logged
// write marks its bits when it has ended. So a copied block never lands on a newer one. What they promise whoever comes
// after the process has died stands at State.
package mirror

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// maxPiece bounds the private copy of one mirrored write, in bytes.
const maxPiece = 1 << 20

var errUnfinished = errors.New("a flush did not finish")

// Node is the filter.
type Node struct {
	info    blk.Info
	source  blk.Node
	target  blk.Node
	failed  func(error)
	mirrors atomic.Bool // each write goes to both; else it is logged

	State *State
	Dirty *blk.Bitmap // the state's
	// Lock is held over a range by whoever writes it to the target.
	Lock blk.RangeLock
}

// New returns the filter, logging.
func New(source blk.Node, s *State) *Node {
	n := &Node{source: source, info: *source.Info(), State: s, Dirty: s.Dirty}
	n.info.Kind = "mirror"
	return n
}

// To says where the copy goes, before the first Mirror; nil: nowhere any more, writes are only logged from now on.
// Nothing is in flight. failed is told, perhaps many times and from a queue's thread, that the target could not take a
// mirrored write or flush; by then the filter logs again.
func (n *Node) To(target blk.Node, failed func(error)) {
	n.mirrors.Store(false)
	n.target, n.failed = target, failed
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
func (n *Node) Children() []blk.Node {
	if n.target == nil {
		return []blk.Node{n.source}
	}
	return []blk.Node{n.source, n.target}
}

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
		if !ok || e.Log != nil {
			return blk.Extent{}, false // a log of the source's own: Do marks both
		}
		n.State.note(off, min(l, e.Len))
		e.Log = n.Dirty
		return e, true
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
		defer n.State.End(n.State.Begin(r.Off, r.Len))
		if !n.mirrors.Load() {
			// Marked after the write, whatever came of it, and before it is acknowledged. Guest memory that goes away in
			// its middle is a panic.
			defer n.Dirty.Set(r.Off, r.Len)
			return blk.Do(t, n.source, r)
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
		func(t *blk.Task) error {
			write := func() error { return blk.Do(t, n.target, &toTarget) }
			if toTarget.Flags&blk.FUA != 0 {
				return n.syncing(write)
			}
			return write()
		},
	)
	if errSource != nil || errTarget != nil {
		n.Dirty.Set(toSource.Off, toSource.Len)
	}
	if errTarget != nil {
		n.State.Doubt(errTarget)
		n.fallBack(errTarget)
	}
	return errSource // a target's error never fails a guest's write
}

// flush makes both images durable: while writes are mirrored either may become the only one.
func (n *Node) flush(t *blk.Task, r *blk.Request) error {
	if !n.mirrors.Load() {
		return blk.Do(t, n.source, r)
	}
	errSource, errTarget := t.Par(
		func(t *blk.Task) error { return blk.Do(t, n.source, r) },
		n.FlushTarget,
	)
	if errTarget != nil {
		n.failed(errTarget)
	}
	return errSource
}

// FlushTarget makes the target durable. If that fails every block is marked, and the filter logs again.
func (n *Node) FlushTarget(t *blk.Task) error {
	return n.syncing(func() error { return blk.Do(t, n.target, &blk.Request{Op: blk.OpFlush}) })
}

// syncing carries out what makes something on the target durable. If that fails the host may have dropped anything that
// was written since the last good flush, and if we do not live to see the result nobody will ever learn it.
func (n *Node) syncing(do func() error) error {
	unsure := &n.State.words[wordUnsure]
	unsure.Add(1)
	err := error(errUnfinished)
	defer func() {
		if err != nil {
			n.mirrors.Store(false)
			n.Dirty.Set(0, n.info.Size)
		}
		unsure.Add(^uint64(0))
	}()
	err = do()
	return err
}

// fallBack returns to logging. Writes that still see the old mode mirror, or mark their bits when that fails.
func (n *Node) fallBack(err error) {
	n.mirrors.Store(false)
	n.failed(err)
}

// Close implements blk.Node: it closes both images.
func (n *Node) Close() (err error) {
	for _, c := range n.Children() {
		err = errors.Join(err, c.Close())
	}
	return err
}
