// SPDX-License-Identifier: Apache-2.0

// Package dirty is the filter that keeps a disk's dirty bitmaps: each has a bit for every block that the guest has
// changed since the bitmap was made or cleared. It is the head of the disk's graph, so that it stays whatever image the
// guest is on.
//
// A bitmap never misses a write, whatever dies. That takes three things:
//
//   - Recent: what has been written lately, marked in memory when a write has ended and before it is acknowledged.
//   - The bitmaps, in memory, each with a file that has the same bits a little later (bits.go).
//   - The intent log (log.go): a list of regions of the disk, at most 128. A write goes only to regions on the list,
//     or to blocks that are marked in the bitmaps' files already.
//
// After a crash a bitmap is what its file says, and all of the regions on the list: at most 128 regions too much.
//
// A write to regions that are on the list, which is the rule, costs an atomic load for each and stays on the fast path.
// Another one waits in Do until the keeper (keeper.go) has put its regions on the list, durably. The keeper makes room
// for that by retiring regions: nobody may begin a write in them; those that have begun end (blk.Graph.Barrier); their
// marks go from recent into the bitmaps and to the files; then the list is written without them.
//
// If a file cannot be written, writes do not fail: the bitmaps have missed something from then on, and say so (Err).
// Writes that would be missed wait until that is durable, so that a crash does not make the bitmaps look complete, but
// not for longer than patience: if nothing can be written at all, the guest goes on, and what remains is that a crash
// before it can be written leaves bitmaps that have missed writes and do not say so.
//
// Locks, in the order in which they may be taken: Node.files, Node.mu. Node.files is held over I/O and never taken by
// who runs on a queue's thread; Node.mu is not.
package dirty

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
)

const (
	// maxActive is how many regions may be on the list.
	maxActive = 128
	// A region has 4 MiB, more if that makes too many of them: each takes 4 bytes of memory.
	minRegionShift = 22
	maxRegions     = 1 << 20
	// maxSpan is how many regions a write may take from the list. A larger one, mostly a discard, is marked in the
	// files before it is done.
	maxSpan = 8
)

// idle is how long a region stays on the list, at least, after the last write. Tests are in more of a hurry.
var idle = 2 * time.Second

// patience is how long writes wait until it is durable that they are missed.
var patience = 3 * time.Second

// States of a region.
const (
	absent  = iota // not on the list
	quiet          // on the list; no write since the keeper looked
	written        // on the list
)

// Options of New.
type Options struct {
	// Log is the storage of the intent log, formatted. The node owns it.
	Log blk.Node
	// Barrier is the graph's.
	Barrier func(t *blk.Task) error
	// Broken is told that the bitmaps have missed writes, from the keeper's goroutine, and again every few seconds until
	// it returns nil: it is to make that durable.
	Broken func(err error) error
}

// Node is the filter.
type Node struct {
	o    Options
	info atomic.Pointer[blk.Info]

	// These change with nothing in flight only.
	child   blk.Node
	size    int64
	shift   uint            // log2 of a region's bytes
	regions []atomic.Uint32 // states
	recent  *blk.Bitmap
	stable  *blk.Bitmap // what all bitmaps' files hold for sure; more bits are added at any time

	untracked atomic.Bool // nothing is recorded: there is no bitmap, or they have missed writes

	files   sync.Mutex // all below up to mu
	log     intentLog
	bitmaps []*Bitmap
	fresh   []span // went from recent into the bitmaps and not into their files

	mu      sync.Mutex
	active  map[int64]int // regions on the list, with the number of writes in Do there
	waiting []*admission
	leaves  bool // the keeper wants to know that a write in Do has ended
	err     error
	gone    bool // after an error: writes are missed, and go on

	kick  chan struct{}
	stop  chan struct{}
	ended chan struct{}

	once   sync.Once
	closed error // of Close
}

// Bitmap is one of the disk's bitmaps. Its fields are the node's.
type Bitmap struct {
	n      *Node
	file   bitsFile
	bits   *blk.Bitmap
	frozen *blk.Bitmap // bits before Freeze; nil: not frozen
}

type span struct{ off, n int64 }

// New returns the filter, which is to be the head of a graph. Its log has no regions that count.
func New(o Options) (*Node, error) {
	t := blk.NewTask()
	gen, err := readLog(t, o.Log)
	if err != nil {
		return nil, err
	}
	n := &Node{
		o: o, log: intentLog{o.Log, gen}, active: map[int64]int{},
		kick: make(chan struct{}, 1), stop: make(chan struct{}), ended: make(chan struct{}),
	}
	n.untracked.Store(true)
	go n.keep()
	return n, nil
}

// Over implements blk.Head. If the size is another one, what has come to the disk counts as written.
func (n *Node) Over(child blk.Node) {
	in := *child.Info()
	in.Kind = "dirty-bitmaps"
	n.info.Store(&in)
	n.child = child
	if in.Size != n.size {
		n.files.Lock()
		defer n.files.Unlock()
		n.setSize(in.Size)
	}
}

// Info implements blk.Node.
func (n *Node) Info() *blk.Info { return n.info.Load() }

// Children implements blk.Node.
func (n *Node) Children() []blk.Node { return []blk.Node{n.child} }

// TryMap implements blk.Node.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	e, ok := n.child.TryMap(op, off, l)
	if op != blk.OpWrite || !ok {
		return e, ok
	}
	if !n.covered(off, min(l, e.Len)) {
		return blk.Extent{}, false
	}
	e.Tracked = n.recent
	return e, true
}

// covered reports whether a write may begin that the keeper has not been told of.
func (n *Node) covered(off, l int64) bool {
	for r := off >> n.shift; r <= (off+l-1)>>n.shift; r++ {
		s := &n.regions[r]
		switch s.Load() {
		case absent:
			return n.untracked.Load() || n.stable.All(off, l)
		case quiet:
			s.CompareAndSwap(quiet, written)
		}
	}
	return true
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return n.child.Map(t, off, l) }

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead, blk.OpFlush:
		return blk.Do(t, n.child, r)
	case blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard:
		a := n.enter(t, r.Off, r.Len)
		defer n.leave(a)
		// Marked after the write, whatever came of it, a fault in the guest's memory too, and before it is acknowledged.
		defer n.recent.Set(r.Off, r.Len)
		return blk.Do(t, n.child, r)
	default:
		return blk.ErrNotSupported
	}
}

// admission is a write in Do that may begin when its regions are on the list, and keeps them there until it ends.
type admission struct {
	off, n      int64
	first, last int64 // regions
	holds       bool
	ready       chan struct{}
}

// enter waits until a write may begin.
func (n *Node) enter(t *blk.Task, off, l int64) *admission {
	a := &admission{off: off, n: l, first: off >> n.shift, last: (off + l - 1) >> n.shift}
	n.mu.Lock()
	if n.untracked.Load() || n.stable.All(off, l) || n.takeLocked(a) {
		n.mu.Unlock()
		return a
	}
	a.ready = make(chan struct{})
	n.waiting = append(n.waiting, a)
	n.mu.Unlock()
	n.wake()
	_ = t.Off(func() error { // never fails
		<-a.ready
		return nil
	})
	return a
}

// takeLocked holds the regions if all are on the list.
func (n *Node) takeLocked(a *admission) bool {
	if a.last-a.first >= maxSpan {
		return false
	}
	for r := a.first; r <= a.last; r++ {
		if _, on := n.active[r]; !on {
			return false
		}
	}
	for r := a.first; r <= a.last; r++ {
		n.active[r]++
		n.regions[r].Store(written)
	}
	a.holds = true
	return true
}

func (n *Node) leave(a *admission) {
	if !a.holds {
		return
	}
	n.mu.Lock()
	for r := a.first; r <= a.last; r++ {
		n.active[r]--
	}
	tell := n.leaves
	n.leaves = false
	n.mu.Unlock()
	if tell {
		n.wake()
	}
}

func (n *Node) wake() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

// Err says why the bitmaps cannot be relied on any more; nil: they can.
func (n *Node) Err() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.err
}

// Close ends the keeper and closes the files. If the bitmaps' files are to be complete, Sync comes before. What the
// filter is over stays open: it is the graph's. The daemon's end and a command may both call it.
func (n *Node) Close() error {
	n.once.Do(func() { n.closed = n.close() })
	return n.closed
}

func (n *Node) close() error {
	close(n.stop)
	<-n.ended
	err := n.o.Log.Close()
	for _, b := range n.bitmaps {
		if cerr := b.file.storage.Close(); err == nil {
			err = cerr
		}
	}
	return err
}
