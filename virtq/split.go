// SPDX-License-Identifier: Apache-2.0

// Package virtq holds guest memory and virtqueues.
//
//   - memory.go: the regions that a front-end shares, and translation of addresses into scatter lists.
//   - split.go: the device's side of a split virtqueue (virtio 1.3, section 2.7). Packed ones (section 2.8) have their
//     place beside it.
//   - driver.go: the driver's side, for front-ends and tests.
//
// The other side of a ring is hostile: each shared field is read once into a local and then checked. What breaks the
// rules breaks the ring, with an error that wraps [ErrRing]; nothing panics, loops without end, or reaches outside guest
// memory. The package runs on little-endian 64-bit machines.
package virtq

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// ErrRing is wrapped by the error of a ring that its other side broke.
var ErrRing = errors.New("virtq: broken ring")

const (
	maxSize = 32768 // entries of a ring (virtio 1.3, 2.7); crosvm offers its guests as many

	// MaxInFlight is how many requests of a ring are in flight at most. The others wait in it: each that was popped holds
	// memory of ours.
	MaxInFlight = 1024

	// maxSegments bounds one chain and one indirect table. It is also the longest vector that the kernel takes
	// (UIO_MAXIOV).
	maxSegments = 1024

	descSize     = 16
	descNext     = 1 // descriptor flags
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1 // avail.flags
	usedNoNotify     = 1 // used.flags

	flagsOff = 0 // in avail and used
	idxOff   = 2
	ringOff  = 4
	usedSize = 8 // bytes of one element of used.ring: id, len
)

// Chain is one request of the driver: a chain of descriptors as scatter lists over guest memory. It is made to be used
// again: the lists are truncated and filled anew, and allocate nothing once they have grown. They hold no more than 1024
// pieces together.
type Chain struct {
	Head uint16 // the chain's name for Push

	Out    []syscall.Iovec // device-readable, in order
	OutGPA []uint64        // guest address of each piece of Out
	OutLen uint64          // bytes of Out; with InLen, below 4 GiB

	In    []syscall.Iovec // device-writable, in order
	InGPA []uint64        // guest address of each piece of In
	InLen uint64          // bytes of In
}

func (c *Chain) reset(head uint16) {
	*c = Chain{Head: head, Out: c.Out[:0], OutGPA: c.OutGPA[:0], In: c.In[:0], InGPA: c.InGPA[:0]}
}

// SplitConfig says where a split virtqueue is and what was negotiated.
type SplitConfig struct {
	Mem               *Memory
	Size              uint16 // entries: a power of two, 1 to 32768
	Desc, Avail, Used uint64 // guest addresses; multiples of 16, 2 and 4
	EventIdx          bool   // VIRTIO_F_EVENT_IDX
	Indirect          bool   // VIRTIO_F_INDIRECT_DESC
	Base              uint16 // index of the first avail entry to take
}

// ring is a split virtqueue's three areas.
type ring struct {
	desc, avail, used []byte
}

// resolve finds the areas in mem and checks all that their later use relies on.
func (cfg *SplitConfig) resolve(mem *Memory) (ring, error) {
	if n := cfg.Size; n == 0 || n > maxSize || n&(n-1) != 0 {
		return ring{}, fmt.Errorf("virtq: ring of %d entries: not a power of two from 1 to %d", n, maxSize)
	}
	if mem == nil {
		return ring{}, fmt.Errorf("virtq: ring: no memory table: %w", ErrMemory)
	}
	n, event := uint64(cfg.Size), uint64(0)
	if cfg.EventIdx {
		event = 2
	}
	area := func(name string, gpa, size, align uint64) ([]byte, error) {
		b, err := mem.Bytes(gpa, size)
		if err != nil {
			return nil, fmt.Errorf("virtq: %s: %w", name, err)
		}
		// A region's guest address and its place in our space may be aligned differently.
		if gpa%align != 0 || !aligned(b, uintptr(align)) {
			return nil, fmt.Errorf("virtq: %s at %#x: not aligned to %d", name, gpa, align)
		}
		return b, nil
	}
	desc, err1 := area("descriptor table", cfg.Desc, descSize*n, 16)
	avail, err2 := area("avail ring", cfg.Avail, ringOff+2*n+event, 2)
	used, err3 := area("used ring", cfg.Used, ringOff+usedSize*n+event, 4)
	return ring{desc, avail, used}, errors.Join(err1, err2, err3)
}

// Split is the device's side of a split virtqueue. One goroutine at a time uses it.
//
// The order of a loop: Pop until there is nothing, do the requests, Push each, Publish and interrupt the driver if it
// says so; before sleeping, EnableNotify, and Pop again if it says so.
type Split struct {
	ring
	cfg  SplitConfig
	mask uint16

	lastAvail uint16 // the next avail entry to take
	availIdx  uint16 // avail.idx as last read: entries before it need no new look

	nextUsed  uint16 // where the next element is staged
	usedIdx   uint16 // used.idx as published
	usedFlags uint16 // used.flags; we are the only writer
	published bool   // something was, so usedIdx says what the driver has been told

	inFlight []bool // by head: popped and not yet pushed
	flying   int    // how many of inFlight
	err      error  // the ring is broken
}

// NewSplit takes a virtqueue into use. Each of its areas must lie wholly inside one region. It goes on at entry cfg.Base
// of the avail ring and at the used index that it finds in guest memory: after a reconnect they may differ.
func NewSplit(cfg SplitConfig) (*Split, error) {
	r, err := cfg.resolve(cfg.Mem)
	if err != nil {
		return nil, err
	}
	q := &Split{ring: r, cfg: cfg, mask: cfg.Size - 1, inFlight: make([]bool, cfg.Size)}
	q.SetLastAvail(cfg.Base)
	q.usedIdx = load16(q.used, idxOff)
	q.nextUsed = q.usedIdx
	return q, nil
}

// Remap finds the ring at the same guest addresses in another memory table. Nothing may be in flight or staged; after an
// error the queue is as before.
func (q *Split) Remap(m *Memory) error {
	if q.flying > 0 || q.nextUsed != q.usedIdx {
		return fmt.Errorf("virtq: remap: %d requests in flight, %d not published", q.flying, q.nextUsed-q.usedIdx)
	}
	r, err := q.cfg.resolve(m)
	if err != nil {
		return err
	}
	q.ring, q.cfg.Mem = r, m
	return nil
}

// Empty tells, with one load, whether there is nothing to pop, or not before a Push.
func (q *Split) Empty() bool {
	return q.flying >= MaxInFlight || load16(q.avail, idxOff) == q.lastAvail
}

// Pop takes the next chain that the driver made available; ok is false if there is none, or [MaxInFlight] have been popped
// and not pushed. An error means that the ring is broken for ever; then c holds nothing. The error wraps [ErrRing].
func (q *Split) Pop(c *Chain) (ok bool, err error) {
	if q.err != nil {
		return false, q.err
	}
	if q.flying >= MaxInFlight {
		return false, nil
	}
	if q.availIdx == q.lastAvail {
		idx := load16(q.avail, idxOff)
		if idx == q.lastAvail {
			return false, nil
		}
		if n := idx - q.lastAvail; n > q.cfg.Size {
			q.err = fmt.Errorf("%w: avail index jumped by %d from %d", ErrRing, n, q.lastAvail)
			return false, q.err
		}
		q.availIdx = idx
	}
	head := load16(q.avail, ringOff+2*int(q.lastAvail&q.mask))
	if err := q.Chain(head, c); err != nil {
		return false, err
	}
	q.lastAvail++
	return true, nil
}

// Chain takes the chain that starts at descriptor head, without looking at the avail ring: a request that was in flight
// when the backend before us died. Errors are those of Pop.
func (q *Split) Chain(head uint16, c *Chain) error {
	if q.err != nil {
		return q.err
	}
	if err := q.parse(head, c); err != nil {
		c.reset(head)
		q.err = fmt.Errorf("%w: head %d: %w", ErrRing, head, err)
		return q.err
	}
	q.inFlight[head] = true
	q.flying++
	return nil
}

// InFlight tells whether the chain was popped and not yet pushed.
func (q *Split) InFlight(head uint16) bool { return head < q.cfg.Size && q.inFlight[head] }

func (q *Split) parse(head uint16, c *Chain) error {
	c.reset(head)
	if head >= q.cfg.Size {
		return fmt.Errorf("not below the ring's size %d", q.cfg.Size)
	}
	if q.inFlight[head] {
		return errors.New("already in flight")
	}
	return q.walk(c, q.desc, int(head), false)
}

// walk adds the descriptors of a table from i on.
func (q *Split) walk(c *Chain, table []byte, i int, nested bool) error {
	n := len(table) / descSize
	for range n { // a longer chain runs in a circle
		if i >= n {
			return fmt.Errorf("next descriptor %d in a table of %d", i, n)
		}
		d := loadDesc(table, i)
		if d.flags&descIndirect != 0 {
			if nested {
				return errors.New("indirect descriptor in an indirect table")
			}
			return q.indirect(c, d)
		}
		if err := q.add(c, d); err != nil {
			return fmt.Errorf("descriptor %d: %w", i, err)
		}
		if d.flags&descNext == 0 {
			return nil
		}
		i = int(d.next)
	}
	return errors.New("descriptor loop")
}

// indirect adds the table that a descriptor stands for. The descriptor's write flag means nothing (virtio 1.3, 2.7.5.3.2).
func (q *Split) indirect(c *Chain, d desc) error {
	switch {
	case !q.cfg.Indirect:
		return errors.New("indirect descriptor, but the feature was not negotiated")
	case d.flags&descNext != 0:
		return errors.New("indirect descriptor with a next one")
	case d.len == 0 || d.len%descSize != 0 || d.len > maxSegments*descSize:
		return fmt.Errorf("indirect table of %d bytes", d.len)
	}
	table, err := q.cfg.Mem.Bytes(d.addr, uint64(d.len))
	if err != nil {
		return fmt.Errorf("indirect table: %w", err)
	}
	return q.walk(c, table, 0, true)
}

// add adds one buffer.
func (q *Split) add(c *Chain, d desc) (err error) {
	if d.flags&descWrite != 0 {
		c.In, c.InGPA, err = q.cfg.Mem.AppendVec(c.In, c.InGPA, d.addr, uint64(d.len))
		c.InLen += uint64(d.len)
	} else if len(c.In) > 0 {
		return errors.New("readable buffer after a writable one")
	} else {
		c.Out, c.OutGPA, err = q.cfg.Mem.AppendVec(c.Out, c.OutGPA, d.addr, uint64(d.len))
		c.OutLen += uint64(d.len)
	}
	switch {
	case err != nil:
		return err
	case len(c.Out)+len(c.In) > maxSegments:
		return fmt.Errorf("chain of more than %d pieces", maxSegments)
	case c.OutLen+c.InLen >= 1<<32:
		return errors.New("chain of 4 GiB or more")
	}
	return nil
}

// Push stages the completion of a chain that was popped: written bytes, from the first on, of its device-writable part.
// The driver does not see it before Publish. Pushing a head that is not in flight is a bug of the caller and panics.
func (q *Split) Push(head uint16, written uint32) {
	if !q.inFlight[head] {
		panic(fmt.Sprintf("virtq: push of head %d, which is not in flight", head))
	}
	// Plain stores: the driver reads the element after it has seen the index that Publish stores atomically.
	e := q.used[ringOff+usedSize*int(q.nextUsed&q.mask):][:usedSize]
	binary.LittleEndian.PutUint32(e, uint32(head))
	binary.LittleEndian.PutUint32(e[4:], written)
	q.inFlight[head] = false
	q.flying--
	q.nextUsed++
}

// Publish makes the staged completions visible and tells whether the driver wants an interrupt for them. The first time
// it always does: whoever served the ring before may have died between publishing and interrupting.
func (q *Split) Publish() (notify bool) {
	if q.nextUsed == q.usedIdx {
		return false
	}
	before, first := q.usedIdx, !q.published
	q.usedIdx, q.published = q.nextUsed, true
	q.storeUsed()
	// The index is stored before this load; a driver that waits stores its wish, then loads the index.
	if q.cfg.EventIdx {
		return crossed(load16(q.avail, ringOff+2*int(q.cfg.Size)), q.usedIdx, before) || first
	}
	return load16(q.avail, flagsOff)&availNoInterrupt == 0 || first
}

// storeUsed stores used.flags and used.idx in one step.
func (q *Split) storeUsed() { store32(q.used, flagsOff, uint32(q.usedFlags)|uint32(q.usedIdx)<<16) }

// EnableNotify asks the driver for a kick when it makes a chain available. more: one is available already, and no kick
// may come for it, so do not sleep.
func (q *Split) EnableNotify() (more bool) {
	q.usedFlags = 0
	if q.cfg.EventIdx {
		// While the field reads 0, a driver may leave out a kick, but then the load below sees its index.
		store16(q.used, ringOff+usedSize*int(q.cfg.Size), q.lastAvail)
	} else {
		q.storeUsed()
	}
	return !q.Empty()
}

// DisableNotify tells the driver that kicks are not needed; some may come all the same. With EVENT_IDX there is nothing
// to say: the driver kicks only when it passes the index of the last EnableNotify.
func (q *Split) DisableNotify() {
	if !q.cfg.EventIdx && q.usedFlags == 0 {
		q.usedFlags = usedNoNotify
		q.storeUsed()
	}
}

// LastAvail is the index of the avail entry that the next Pop takes.
func (q *Split) LastAvail() uint16 { return q.lastAvail }

// SetLastAvail changes it.
func (q *Split) SetLastAvail(idx uint16) { q.lastAvail, q.availIdx = idx, idx }

// UsedIdx is the used index that the driver sees.
func (q *Split) UsedIdx() uint16 { return q.usedIdx }

// crossed tells whether an index that moved from before to now passed event, modulo 2^16: the other side asked to be
// told when entry event is there (virtio 1.3, 2.7.7.1 and 2.7.10.1).
func crossed(event, now, before uint16) bool { return now-event-1 < now-before }

// desc is one descriptor, in private memory.
type desc struct {
	addr        uint64
	len         uint32
	flags, next uint16
}

// makeDesc decodes a descriptor's two words.
func makeDesc(lo, hi uint64) desc {
	return desc{addr: lo, len: uint32(hi), flags: uint16(hi >> 32), next: uint16(hi >> 48)}
}
