// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/loop"
	"github.com/blkstream/blkstream/vhostuser"
	"github.com/blkstream/blkstream/virtq"
)

const (
	// chunk is how many requests are taken, and how many used elements published, at a time. One submission and
	// one publication for a whole batch would put driver, device and disk in lockstep.
	chunk = 4
	// maxTasks is how many requests of a queue may be on the slow path. Each holds bounded memory.
	maxTasks = 64
	// drainFor is how long Stop and SetConfig wait for requests in flight.
	drainFor = 60 * time.Second
)

// queue serves one virtqueue on a loop of its own. It implements loop.Driver for the loop, vhostuser.Queue for the
// session and blk.Source for the graph; the latter two talk to the loop by posting to it. Everything below is the
// loop's.
type queue struct {
	dev  *Device
	loop *loop.Loop
	r    vhostuser.Ring
	ring *virtq.Split
	end  chan struct{} // closed when the loop has ended

	free     []*request // not in use
	taken    int        // requests popped and not yet pushed
	staged   int        // used elements pushed and not yet published
	resubmit []uint16   // heads that were in flight when an earlier daemon died
	pauses   int        // who wants the queue to rest: the session, the graph
	rest     []chan struct{}
	fast     epochs // requests whose host I/O goes to extents from TryMap
	broken   bool

	meter blk.Meter
	count counters
}

// startQueue returns when the queue serves its ring.
func startQueue(d *Device, r vhostuser.Ring) (vhostuser.Queue, error) {
	ring, err := virtq.NewSplit(virtq.SplitConfig{
		Mem: r.Mem, Size: r.Size, Desc: r.Desc, Avail: r.Avail, Used: r.Used, Base: r.Base,
		EventIdx: r.Features&featEventIdx != 0, Indirect: r.Features&featIndirect != 0,
	})
	if err != nil {
		return nil, err
	}
	q := &queue{dev: d, r: r, ring: ring, end: make(chan struct{}), resubmit: r.Resubmit, pauses: 1}
	ready := make(chan error, 1)
	go func() {
		defer close(q.end)
		err := loop.Run(loop.Options{
			Depth: d.opts.Depth, PollMax: d.opts.PollMax, NoURing: d.opts.NoURing, Log: d.opts.Log,
		}, func(l *loop.Loop) loop.Driver {
			q.loop = l
			l.WatchKick(r.Kick)
			l.SetCall(r.Call)
			ready <- nil
			return q
		})
		if err != nil {
			ready <- err
		}
	}()
	if err := <-ready; err != nil {
		return nil, err
	}
	d.graph.Attach(q)
	d.mu.Lock()
	d.queues[q] = false
	d.mu.Unlock()
	q.resumeAfter(d.lost()) // it began at rest
	return sessionQueue{q}, nil
}

// resumeAfter resumes the queue when the lost ones have ended. An old write that comes after a new one would undo it, and
// a request of an earlier life must not be done twice at once.
func (q *queue) resumeAfter(lost []*queue) {
	if len(lost) == 0 {
		q.Resume()
		return
	}
	q.dev.opts.Log.Warn("a queue waits for requests of an earlier one that are still in flight", "disk", q.dev.opts.ID, "queue", q.r.Index)
	go func() {
		for _, l := range lost {
			select {
			case <-l.end:
			case <-q.end: // a front-end may begin and stop as many as it likes meanwhile
				return
			}
		}
		q.Resume()
	}()
}

// The loop's side, in the order of a turn.

// Work implements loop.Driver.
func (q *queue) Work() bool {
	defer q.recoverFault()
	if !q.open() {
		return false
	}
	n := 0
	for ; n < chunk; n++ {
		r := q.take()
		if r == nil {
			break
		}
		r.begin()
	}
	return n > 0
}

// open reports whether the queue may take requests now.
func (q *queue) open() bool {
	return q.pauses == 0 && !q.broken && q.loop.Tasks() < maxTasks
}

// take pops a request, those of an earlier life first; nil: there is none.
func (q *queue) take() *request {
	if len(q.free) == 0 {
		q.free = append(q.free, newRequest(q))
	}
	r := q.free[len(q.free)-1]
	if len(q.resubmit) > 0 {
		head := q.resubmit[0]
		q.resubmit = q.resubmit[1:]
		if err := q.ring.Chain(head, &r.chain); err != nil {
			q.breakRing(err)
			return nil
		}
	} else {
		ok, err := q.ring.Pop(&r.chain)
		if err != nil {
			q.breakRing(err)
		}
		if !ok || err != nil {
			return nil
		}
		if q.r.Inflight != nil {
			q.r.Inflight.Fetch(r.chain.Head)
		}
	}
	q.free = q.free[:len(q.free)-1]
	q.taken++
	return r
}

// give takes back a request whose status stands in guest memory.
func (q *queue) give(r *request, written uint32) {
	defer q.recoverFault()
	q.free = append(q.free, r)
	q.taken--
	if !q.broken {
		if q.r.Inflight != nil {
			q.r.Inflight.Complete(r.chain.Head)
		}
		q.ring.Push(r.chain.Head, written)
		if q.staged++; q.staged >= chunk {
			q.publishNow()
		}
	}
}

// Publish implements loop.Driver. When nothing is in flight any more it tells those who wait for that. What has completed
// is published, and the driver signalled, before: a pause is also the moment at which the states of rings and interrupts
// are read.
func (q *queue) Publish() bool {
	if q.taken > 0 || len(q.rest) == 0 {
		return q.publish()
	}
	q.publishNow()
	for _, c := range q.rest {
		close(c)
	}
	q.rest = nil
	return false
}

// publish reports whether the driver is to be called.
func (q *queue) publish() (call bool) {
	if q.staged == 0 || q.broken {
		return false
	}
	defer q.recoverFault()
	q.staged = 0
	call = q.ring.Publish()
	if q.r.Inflight != nil {
		q.r.Inflight.Commit(q.ring.UsedIdx())
	}
	if q.r.Log != nil && q.r.LogUsed {
		q.r.Log.Mark(q.r.UsedLog, 6+8*uint64(q.r.Size))
	}
	return call
}

func (q *queue) publishNow() {
	if q.publish() {
		loop.Signal(q.r.Call)
	}
}

// Poll implements loop.Driver.
func (q *queue) Poll() bool {
	defer q.recoverFault()
	return q.open() && (len(q.resubmit) > 0 || !q.ring.Empty())
}

// Arm implements loop.Driver.
func (q *queue) Arm() bool {
	defer q.recoverFault()
	if !q.open() {
		return false // whatever opens it again wakes the loop
	}
	return q.ring.EnableNotify() || q.r.Kick < 0 // nobody kicks a ring that is to be polled
}

// Disarm implements loop.Driver.
func (q *queue) Disarm() {
	defer q.recoverFault()
	if !q.broken {
		q.ring.DisableNotify()
	}
}

// recoverFault catches a fault in guest memory: its file was truncated. It is deferred directly.
func (q *queue) recoverFault() {
	if e := recover(); e != nil {
		q.breakRing(fmt.Errorf("fault in guest memory: %v", e))
	}
}

// breakRing stops the queue for good: what the ring says cannot be trusted. The driver learns it by the err fd.
func (q *queue) breakRing(err error) {
	if q.broken {
		return
	}
	q.broken = true
	q.dev.opts.Log.Error("a queue is stopped: its ring is damaged", "disk", q.dev.opts.ID, "queue", q.r.Index, "err", err)
	loop.Signal(q.r.Err)
}

// Rest.

func (q *queue) pause() { q.pauses++ }

func (q *queue) resume() { q.pauses-- }

// do runs fn on the loop and waits for it; false: the loop has ended.
func (q *queue) do(fn func()) bool {
	done := make(chan struct{})
	q.loop.Post(func() {
		defer close(done)
		defer q.recoverFault()
		fn()
	})
	select {
	case <-done:
		return true
	case <-q.end:
	}
	select { // it may have run in the loop's last turn
	case <-done:
		return true
	default:
		return false
	}
}

// settle asks the loop to take nothing more; the channel is closed when nothing is in flight, unless the loop ends before.
// It does not wait for the loop, which may hang.
func (q *queue) settle() <-chan struct{} {
	c := make(chan struct{})
	q.loop.Post(func() {
		q.pause()
		q.rest = append(q.rest, c)
	})
	return c
}

// The session's side: vhostuser.Queue.

var errDrain = errors.New("requests are still in flight")

// Stop implements vhostuser.Queue.
func (q *queue) Stop() (uint16, error) {
	settled := q.settle()
	select {
	case <-settled:
		base := q.lastAvail()
		q.finish()
		return base, nil
	case <-time.After(q.dev.drain):
	}
	// The kernel may still write to guest memory, so the loop lives on until it does not. It leaves the ring alone, which
	// may be another queue's soon.
	var base uint16
	q.do(func() {
		q.publishNow()
		q.broken, base = true, q.ring.LastAvail()
	})
	q.dev.mu.Lock()
	q.dev.queues[q] = true
	q.dev.mu.Unlock()
	go func() {
		<-settled
		q.finish()
	}()
	return base, fmt.Errorf("queue %d: %w after %v", q.r.Index, errDrain, q.dev.drain)
}

// finish ends the loop, which has nothing in flight.
func (q *queue) finish() {
	q.loop.Post(q.loop.Stop)
	<-q.end
	q.dev.graph.Detach(q)
	q.dev.mu.Lock()
	delete(q.dev.queues, q)
	q.dev.past.add(q.count.load())
	q.dev.mu.Unlock()
	q.dev.unuse()
}

func (q *queue) lastAvail() (base uint16) {
	q.do(func() { base = q.ring.LastAvail() })
	return base
}

// sessionQueue is a queue as the session sees it: its Pause has no bound, the graph's has a context.
type sessionQueue struct{ *queue }

// SetMemory implements vhostuser.Queue.
func (q *queue) SetMemory(m *virtq.Memory) error {
	err := error(nil)
	q.do(func() {
		if err = q.ring.Remap(m); err == nil {
			q.r.Mem = m
		}
	})
	return err
}

// SetCall implements vhostuser.Queue.
func (q *queue) SetCall(fd int) {
	q.do(func() {
		q.r.Call = fd
		q.loop.SetCall(fd)
	})
}

// SetErr implements vhostuser.Queue.
func (q *queue) SetErr(fd int) { q.do(func() { q.r.Err = fd }) }

// SetLog implements vhostuser.Queue.
func (q *queue) SetLog(l *vhostuser.Log, used bool, usedLog uint64) {
	q.do(func() { q.r.Log, q.r.LogUsed, q.r.UsedLog = l, used, usedLog })
}

// Kick implements vhostuser.Queue.
func (q *queue) Kick() { q.loop.Post(func() {}) }

// Pause implements vhostuser.Queue. It has no bound: whoever pauses takes guest memory away.
func (q sessionQueue) Pause() {
	select {
	case <-q.settle():
	case <-q.end:
	}
}

// Resume implements vhostuser.Queue.
func (q sessionQueue) Resume() { q.queue.Resume() }

// epochs counts the requests of two epochs, so that one can wait for all that are older than now. While a barrier waits
// for the older ones, those behind it wait for the next epoch.
type epochs struct {
	now     int // 0 or 1: the epoch of requests that begin
	flying  [2]int
	waiting []chan struct{} // for the other epoch to end
	next    []chan struct{} // for the present one
}

func (e *epochs) begin() (epoch int) {
	e.flying[e.now]++
	return e.now
}

func (e *epochs) end(epoch int) {
	if e.flying[epoch]--; epoch != e.now && e.flying[epoch] == 0 {
		e.advance()
	}
}

// wait closes c when all requests that have begun are over.
func (e *epochs) wait(c chan struct{}) {
	e.next = append(e.next, c)
	e.advance()
}

func (e *epochs) advance() {
	for e.flying[1-e.now] == 0 {
		for _, c := range e.waiting {
			close(c)
		}
		e.waiting = nil
		if len(e.next) == 0 {
			return
		}
		e.waiting, e.next, e.now = e.next, nil, 1-e.now
	}
}

// The graph's side: blk.Source.

// Barrier implements blk.Source.
func (q *queue) Barrier() {
	c := make(chan struct{})
	if q.do(func() { q.fast.wait(c) }) {
		<-c
	}
}

// Pause implements blk.Source.
func (q *queue) Pause(ctx context.Context) error {
	select {
	case <-q.settle():
		return nil
	case <-q.end:
		return nil
	case <-ctx.Done():
		q.Resume()
		return fmt.Errorf("queue %d of disk %s: %w: %w", q.r.Index, q.dev.opts.ID, errDrain, ctx.Err())
	}
}

// Resume implements blk.Source.
func (q *queue) Resume() { q.loop.Post(q.resume) }

// Meter implements blk.Source.
func (q *queue) Meter() *blk.Meter { return &q.meter }

// counters are written by the loop and read by anyone.
type counters struct {
	reads, writes, flushes, others, bytesRead, bytesWritten, errors atomic.Uint64
}

func (c *counters) load() Stats {
	return Stats{
		Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(), Others: c.others.Load(),
		BytesRead: c.bytesRead.Load(), BytesWritten: c.bytesWritten.Load(), Errors: c.errors.Load(),
	}
}
