// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/blkstream/blkstream/virtq"
)

// Request types (virtio 1.2, section 5.2.6).
const (
	TypeIn          = 0
	TypeOut         = 1
	TypeFlush       = 4
	TypeGetID       = 8
	TypeDiscard     = 11
	TypeWriteZeroes = 13
)

// Statuses of a completed request; StatusNone is what the driver puts there beforehand.
const (
	StatusOK     = 0
	StatusIOErr  = 1
	StatusUnsupp = 2
	StatusNone   = 0xff
)

var (
	// ErrIO is VIRTIO_BLK_S_IOERR.
	ErrIO = errors.New("frontend: device reports an I/O error")
	// ErrUnsupported is VIRTIO_BLK_S_UNSUPP.
	ErrUnsupported = errors.New("frontend: device does not support the request")
)

const (
	maxPieces   = 128 // descriptors in an indirect table: a header, a status and 126 data segments
	requestSize = 64  // of a request's header and status in guest memory
	statusOff   = 32
	headerLen   = 16
	chunk       = 4 // completions between two publications of what their callbacks added
)

// Request is one request. Whoever submits it leaves it alone until Done is called, and may use it again from there on.
type Request struct {
	Type   uint32
	Sector uint64      // in units of 512 bytes
	Data   []virtq.Buf // in guest memory; written by the device for TypeIn and TypeGetID, read by it otherwise

	// Done is called when the request is complete, on the queue's goroutine and with the queue locked: it may call
	// Queue.Add, and must neither block nor call anything else of the queue. A request that a lost back-end or a
	// Close cut off gets its call too, from another goroutine.
	Done func(*Request)

	Status  byte   // as the device wrote it
	Written uint32 // bytes written, by the device's own account

	err  error
	slot uint16
}

// Err tells how the request ended: nil, ErrIO, ErrUnsupported, or what kept it from ending.
func (r *Request) Err() error {
	switch {
	case r.err != nil:
		return r.err
	case r.Status == StatusOK:
		return nil
	case r.Status == StatusIOErr:
		return ErrIO
	case r.Status == StatusUnsupp:
		return ErrUnsupported
	default:
		return fmt.Errorf("frontend: device left status %#x", r.Status)
	}
}

// Queue is one virtqueue with its goroutine.
type Queue struct {
	disk              *Disk
	index             int
	kick, call, errFD int                // eventfds, the same ones for every back-end
	ring              virtq.DriverConfig // where the ring is
	requests          uint64             // guest address of headers and statuses
	waiter            int                // epoll on call
	base              uint16             // for SET_VRING_BASE; guarded by Disk.mu

	mu       sync.Mutex // guards everything below
	drv      *virtq.Driver
	mem      []byte     // headers and statuses
	slots    []uint16   // free places in mem
	byHead   []*Request // in flight
	inflight int
	waiting  []*Request // for room in the ring
	out, in  []virtq.Buf
	err      error // set: nothing can be submitted any more
}

// ringStride is the guest memory that one queue takes.
func ringStride(size int) uint64 {
	n := uint64(size)
	return roundUp(16*n, 64) + roundUp(6+2*n, 64) + roundUp(6+8*n, 64) + n*maxPieces*16 + n*requestSize
}

func newQueue(d *Disk, index int) (*Queue, error) {
	q := &Queue{disk: d, index: index, kick: -1, call: -1, errFD: -1, waiter: -1}
	var err error
	for _, fd := range []*int{&q.kick, &q.call, &q.errFD} {
		if *fd, err = eventfd(); err != nil {
			q.closeFDs()
			return nil, err
		}
	}
	if q.waiter, err = newWaiter(q.call); err != nil {
		q.closeFDs()
		return nil, err
	}
	return q, nil
}

// makeRing lays the ring out at gpa.
func (q *Queue) makeRing(gpa uint64, mem *virtq.Memory, features uint64) (err error) {
	n := uint64(q.disk.opts.QueueSize)
	take := func(size uint64) (at uint64) {
		at, gpa = gpa, gpa+size
		return at
	}
	q.ring = virtq.DriverConfig{
		SplitConfig: virtq.SplitConfig{
			Mem: mem, Size: uint16(n),
			Desc: take(roundUp(16*n, 64)), Avail: take(roundUp(6+2*n, 64)), Used: take(roundUp(6+8*n, 64)),
			EventIdx: features&FeatureEventIdx != 0, Indirect: features&FeatureIndirect != 0,
		},
		Tables: take(n * maxPieces * 16), TableLen: maxPieces,
	}
	q.requests = take(n * requestSize)
	if q.drv, err = virtq.NewDriver(q.ring); err != nil {
		return fmt.Errorf("frontend: queue %d: %w", q.index, err)
	}
	if q.mem, err = mem.Bytes(q.requests, n*requestSize); err != nil {
		return fmt.Errorf("frontend: queue %d: %w", q.index, err)
	}
	q.byHead = make([]*Request, n)
	for i := range uint16(n) {
		q.slots = append(q.slots, i)
	}
	return nil
}

// Submit hands r to the device. If the ring is full, r waits its turn. An error means that r will never complete.
func (q *Queue) Submit(r *Request) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	err := q.Add(r)
	q.publish()
	return err
}

// Do calls fn as a completion is called: with the queue locked, so that it may Add several requests at once.
func (q *Queue) Do(fn func()) {
	q.mu.Lock()
	defer q.mu.Unlock()
	fn()
	q.publish()
}

// Add is Submit for callers inside Request.Done or Do; the device learns of r a little later.
func (q *Queue) Add(r *Request) error {
	if q.err != nil {
		return q.err
	}
	if len(q.waiting) > 0 { // in order
		q.waiting = append(q.waiting, r)
		return nil
	}
	err := q.add(r)
	if errors.Is(err, virtq.ErrFull) && q.inflight > 0 {
		q.waiting = append(q.waiting, r)
		return nil
	}
	return err
}

func (q *Queue) add(r *Request) error {
	if len(q.slots) == 0 {
		return virtq.ErrFull
	}
	slot := q.slots[len(q.slots)-1]
	at := uint64(slot) * requestSize
	mem := q.mem[at:][:requestSize]
	binary.LittleEndian.PutUint32(mem, r.Type)
	binary.LittleEndian.PutUint32(mem[4:], 0)
	binary.LittleEndian.PutUint64(mem[8:], r.Sector)
	mem[statusOff] = StatusNone
	q.out = append(q.out[:0], virtq.Buf{GPA: q.requests + at, Len: headerLen})
	q.in = q.in[:0]
	if r.Type == TypeIn || r.Type == TypeGetID {
		q.in = append(q.in, r.Data...)
	} else {
		q.out = append(q.out, r.Data...)
	}
	q.in = append(q.in, virtq.Buf{GPA: q.requests + at + statusOff, Len: 1})
	head, err := q.drv.AddChain(q.out, q.in, q.ring.Indirect)
	if err != nil {
		return err
	}
	q.slots = q.slots[:len(q.slots)-1]
	r.slot, r.err = slot, nil
	q.byHead[head] = r
	q.inflight++
	return nil
}

// publish shows the device what was added.
func (q *Queue) publish() {
	if q.err == nil && q.drv.Publish() {
		signal(q.kick)
	}
}

// loop is the queue's goroutine. It sleeps in a system call, which keeps it on one thread.
func (q *Queue) loop() {
	var events epollEvents
	for {
		q.mu.Lock()
		q.reap()
		ended := q.err != nil
		q.mu.Unlock()
		if ended {
			return
		}
		await(q.waiter, &events)
	}
}

// reap completes what the device has done, until there is no more and the device will interrupt for the next.
func (q *Queue) reap() {
	for q.err == nil {
		q.drv.DisableInterrupts()
		for n := 1; ; n++ {
			head, written, ok := q.drv.PopUsed()
			if !ok {
				break
			}
			r := q.byHead[head]
			q.byHead[head] = nil
			q.slots = append(q.slots, r.slot)
			q.inflight--
			r.Status, r.Written = q.mem[uint64(r.slot)*requestSize+statusOff], written
			r.Done(r)
			q.retry()
			if n%chunk == 0 {
				q.publish()
			}
		}
		if err := q.drv.Err(); err != nil {
			q.failLocked(fmt.Errorf("frontend: queue %d: %w", q.index, err))
		}
		q.publish()
		if q.err != nil || !q.drv.EnableInterrupts() {
			return
		}
	}
}

// retry adds what has waited for room.
func (q *Queue) retry() {
	for len(q.waiting) > 0 {
		r := q.waiting[0]
		err := q.add(r)
		if errors.Is(err, virtq.ErrFull) && q.inflight > 0 {
			return
		}
		q.waiting = append(q.waiting[:0], q.waiting[1:]...)
		if err != nil {
			r.err = err
			r.Done(r)
		}
	}
}

// fail ends all requests, and those to come, with err.
func (q *Queue) fail(err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.failLocked(err)
}

func (q *Queue) failLocked(err error) {
	if q.err != nil {
		return
	}
	q.err = err
	waiting := q.waiting
	q.waiting = nil
	for i, r := range q.byHead {
		if r != nil {
			q.byHead[i] = nil
			q.inflight--
			r.err = err
			r.Done(r)
		}
	}
	for _, r := range waiting {
		r.err = err
		r.Done(r)
	}
}

// end reaps what a stopped back-end has left, fails the rest and ends the goroutine.
func (q *Queue) end() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.drv != nil && !q.disk.opts.Manual {
		q.reap()
	}
	q.failLocked(ErrClosed)
	signal(q.call)
}

func (q *Queue) closeFDs() {
	for _, fd := range []int{q.kick, q.call, q.errFD, q.waiter} {
		if fd >= 0 {
			syscall.Close(fd)
		}
	}
}

// usedIdx reads the ring's used.idx.
func (q *Queue) usedIdx() (uint16, error) {
	b, err := q.ring.Mem.Bytes(q.ring.Used+2, 2)
	if err != nil {
		return 0, fmt.Errorf("frontend: used ring of queue %d: %w", q.index, err)
	}
	return binary.LittleEndian.Uint16(b), nil
}

// Index returns the queue's number.
func (q *Queue) Index() int { return q.index }

// Ring returns where in guest memory the ring lies.
func (q *Queue) Ring() virtq.DriverConfig { return q.ring }

// Driver returns the ring itself. It is the caller's with Options.Manual, and the queue's own otherwise.
func (q *Queue) Driver() *virtq.Driver { return q.drv }

// FDs returns the eventfds for kick, call and err. They stay the queue's.
func (q *Queue) FDs() (kick, call, errFD int) { return q.kick, q.call, q.errFD }
