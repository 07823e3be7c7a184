// SPDX-License-Identifier: Apache-2.0

// Package cbw is the filter that copies before writes: while a backup runs, what the guest is about to change is copied
// to the target first, so that the target gets the disk as it was when the filter was put over it.
//
// Todo has a bit for each cluster that is still to be copied, and bits are only ever cleared. Whoever copies, for the
// job or for a write of the guest, locks the clusters, looks at their bits, reads the source, writes the target, and
// clears the bits. A change to a cluster whose bit is set waits for that; one whose bit is clear goes straight to the
// source, and as bits are never set again it does not matter how long ago it looked. So a cluster whose bit is set has
// not changed since the beginning.
//
// The guest waits for a copy on another goroutine, so that it can be let go while the target hangs: Break ends the
// backup, and no write waits any more.
package cbw

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// maxPiece bounds what is copied at a time, in bytes, unless one cluster is larger.
const maxPiece = 1 << 20

// Options of New.
type Options struct {
	// Source is where the old contents are read: below the filter, or further down if reading there changes less.
	Source blk.Node
	Target blk.Node // at least as large
	// Cluster is what a bit of Todo stands for, in bytes: a power of two, a multiple of the target's own cluster, so that
	// no two copies write to the same one.
	Cluster int64
	// Grain is the unit in which zeros are told from data, in bytes. It divides Cluster.
	Grain int64
	// Blank: the target reads as zeros where nothing was copied to, and zeros are left out.
	Blank bool
	// Explicit: the target is to hold zeros itself, though it has nothing behind it that they hide.
	Explicit bool
	// Timeout is how long a write of the guest waits for the copy of a piece before that breaks the backup. 0: for ever.
	Timeout time.Duration
	// Failed is told that a copy for a write of the guest failed, on a goroutine on which it may wait: nil means to try
	// again, an error breaks the backup.
	Failed func(error) error
}

// Node is the filter.
type Node struct {
	o    Options
	next blk.Node // what the guest's requests go to
	info blk.Info

	// Todo is what is still to be copied. All of it in the beginning; bits may be cleared of what need not be copied.
	Todo *blk.Bitmap

	lock    blk.RangeLock  // whole clusters, by who copies them
	copies  sync.WaitGroup // for the guest
	broken  chan struct{}
	over    atomic.Bool // broken is closed
	breakMu sync.Mutex
	reason  error // guarded by breakMu
}

// New puts the filter over a node.
func New(next blk.Node, o Options) *Node {
	n := &Node{o: o, next: next, info: *next.Info(), broken: make(chan struct{})}
	n.info.Kind = "copy-before-write"
	n.Todo = blk.NewBitmap(n.info.Size, o.Cluster)
	n.Todo.Set(0, n.info.Size)
	return n
}

// Next is what the filter was put over.
func (n *Node) Next() blk.Node { return n.next }

// Source is where the old contents are read.
func (n *Node) Source() blk.Node { return n.o.Source }

// Break ends the copying for the guest at once: its writes go to the source, those that wait included. The first reason
// counts. Any goroutine may call it.
func (n *Node) Break(reason error) {
	n.breakMu.Lock()
	defer n.breakMu.Unlock()
	if !n.over.Load() {
		n.reason = reason
		n.over.Store(true)
		close(n.broken)
	}
}

// Broken is closed by Break.
func (n *Node) Broken() <-chan struct{} { return n.broken }

// Reason is that of Break, nil before it.
func (n *Node) Reason() error {
	n.breakMu.Lock()
	defer n.breakMu.Unlock()
	return n.reason
}

// Wait waits until no copy for the guest is under way. It is for after the filter was removed.
func (n *Node) Wait() { n.copies.Wait() }

// Info implements blk.Node.
func (n *Node) Info() *blk.Info { return &n.info }

// Children implements blk.Node.
func (n *Node) Children() []blk.Node { return []blk.Node{n.next, n.o.Target} }

// TryMap implements blk.Node: no extents for writing to what is still to be copied.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	if op == blk.OpWrite && n.Todo.Any(off, l) && !n.over.Load() {
		return blk.Extent{}, false
	}
	return n.next.TryMap(op, off, l)
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return n.next.Map(t, off, l) }

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead, blk.OpFlush:
	case blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard:
		n.save(t, r.Off, r.Off+r.Len)
	default:
		return blk.ErrNotSupported
	}
	return blk.Do(t, n.next, r)
}

// save returns when [off, end) may be changed: all of it was copied, or the backup is broken.
func (n *Node) save(t *blk.Task, off, end int64) {
	for !n.over.Load() {
		at, l, ok := n.Todo.Next(off, max(maxPiece, n.o.Cluster))
		if !ok || at >= end {
			return
		}
		l = min(at+l, n.roundUp(end)) - at
		n.await(t, at, l)
		off = at + l
	}
}

// await copies a piece for the guest, and waits for that no longer than the backup lives.
func (n *Node) await(t *blk.Task, off, l int64) {
	done := make(chan struct{})
	n.copies.Go(func() {
		defer close(done)
		task := blk.NewTask()
		for !n.over.Load() {
			err := n.Copy(task, off, l)
			if err == nil || n.over.Load() {
				return
			}
			if err := n.o.Failed(err); err != nil {
				n.Break(err)
			}
		}
	})
	_ = t.Off(func() error { // never fails
		var late <-chan time.Time
		if n.o.Timeout > 0 {
			timer := time.NewTimer(n.o.Timeout)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-done:
		case <-n.broken:
		case <-late:
			n.Break(fmt.Errorf("a write of the guest waited for the target for %v", n.o.Timeout))
		}
		return nil
	})
}

// SourceError says that what is to be copied could not be read. Any other error of Copy is the target's.
type SourceError struct{ Err error }

func (e *SourceError) Error() string { return e.Err.Error() }
func (e *SourceError) Unwrap() error { return e.Err }

// Copy copies what is still to be copied of the clusters that [off, off+l) touches. After an error the bits of what was
// not copied are set. After Break it does nothing, or ends early, and returns the reason.
func (n *Node) Copy(t *blk.Task, off, l int64) error {
	at, end := off&^(n.o.Cluster-1), n.roundUp(off+l)
	defer n.lock.Unlock(n.lock.Lock(t, at, end-at))
	for !n.over.Load() {
		next, run, ok := n.Todo.Next(at, end-at)
		if !ok || next >= end {
			return nil
		}
		copied, err := n.copy(t, next, min(next+run, end, n.info.Size)-next)
		if err != nil {
			return err
		}
		n.Todo.Clear(next, copied)
		at = n.roundUp(next + copied)
	}
	return n.Reason()
}

func (n *Node) roundUp(off int64) int64 { return (off + n.o.Cluster - 1) &^ (n.o.Cluster - 1) }

// copy copies the first of l bytes, from a cluster's beginning, and returns how many: whole clusters, as far as the disk
// goes.
func (n *Node) copy(t *blk.Task, off, l int64) (int64, error) {
	e, err := n.o.Source.Map(t, off, l)
	if err != nil {
		return 0, &SourceError{err}
	}
	if e.State == blk.Zero || e.State == blk.Unallocated {
		if e.Len < l {
			e.Len &^= n.o.Cluster - 1
		}
		if e.Len > 0 {
			return e.Len, n.zero(t, off, e.Len)
		}
	}
	l = min(l, max(maxPiece, n.o.Cluster))
	buf := blk.GetBuffer(int(l))
	defer buf.Free()
	if err := blk.Do(t, n.o.Source, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, buf.B)}); err != nil {
		return 0, &SourceError{err}
	}
	for b, at := buf.B, off; len(b) > 0; {
		run, zero := n.alike(b)
		if zero {
			err = n.zero(t, at, run)
		} else {
			err = n.write(t, at, b[:run])
		}
		if err != nil {
			return 0, err
		}
		b, at = b[run:], at+run
	}
	return l, nil
}

// alike is the length of the run of grains at the start of b that are all zeros, or all not.
func (n *Node) alike(b []byte) (l int64, zero bool) {
	for l < int64(len(b)) {
		end := min(l+n.o.Grain, int64(len(b)))
		z := blk.IsZero(b[l:end])
		if l > 0 && z != zero {
			break
		}
		l, zero = end, z
	}
	return l, zero
}

func (n *Node) write(t *blk.Task, off int64, b []byte) error {
	return blk.Do(t, n.o.Target, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

// zero lets the target read as zeros.
func (n *Node) zero(t *blk.Task, off, l int64) error {
	if n.o.Blank {
		return nil
	}
	err := blk.Do(t, n.o.Target, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: off, Len: l})
	if err != nil || !n.o.Explicit {
		return err
	}
	for end := off + l; off < end; {
		e, err := n.o.Target.Map(t, off, end-off)
		if err != nil {
			return err
		}
		to := off + min(e.Len, int64(len(zeros)))
		if e.State == blk.Unallocated {
			if err := n.write(t, off, zeros[:to-off]); err != nil {
				return err
			}
		}
		off = to
	}
	return nil
}

var zeros [64 << 10]byte

// Close implements blk.Node: it closes the disk and the target.
func (n *Node) Close() error {
	err, errTarget := n.next.Close(), n.o.Target.Close()
	if err != nil {
		return err
	}
	return errTarget
}
