// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"errors"
	"fmt"
)

// ErrFull: the ring has too few free descriptors for a chain now.
var ErrFull = errors.New("virtq: no free descriptors")

// Buf is a buffer in guest memory.
type Buf struct {
	GPA uint64
	Len uint32 // bytes, at least 1
}

// DriverConfig says where a driver puts its split virtqueue.
type DriverConfig struct {
	// SplitConfig is what the device is told. Avail must be a multiple of 4, and Base is the index at which both rings
	// start.
	SplitConfig
	// Tables is the guest address, a multiple of 16, of Size indirect tables of TableLen descriptors each, 16 bytes a
	// descriptor, wholly inside one region. A TableLen of 0 means none.
	Tables   uint64
	TableLen uint16
}

// Driver is the driver's side of a split virtqueue: what a guest has. One goroutine at a time uses it; the device may be
// another one of the same process.
//
// AddChain, Publish and kick the device if it says so; PopUsed until there is nothing; before sleeping,
// EnableInterrupts, and PopUsed again if it says so.
type Driver struct {
	ring
	cfg    DriverConfig
	mask   uint16
	tables []byte

	next      []uint16 // by descriptor: the next one of its chain or of the free list
	slots     []uint16 // by head: descriptors of the ring that the chain has; 0: not in flight
	firstFree uint16
	free      int

	nextAvail  uint16 // where the next head goes
	availIdx   uint16 // avail.idx as published
	availFlags uint16
	lastUsed   uint16 // the next used element to take
	err        error
}

// NewDriver clears the rings' memory and starts a driver there, with interrupts enabled. The device may start after it.
func NewDriver(cfg DriverConfig) (*Driver, error) {
	r, err := cfg.resolve(cfg.Mem)
	if err != nil {
		return nil, err
	}
	if !aligned(r.avail, 4) {
		return nil, fmt.Errorf("virtq: driver: avail ring at %#x: not aligned to 4", cfg.Avail)
	}
	d := &Driver{
		ring: r, cfg: cfg, mask: cfg.Size - 1, free: int(cfg.Size),
		next: make([]uint16, cfg.Size), slots: make([]uint16, cfg.Size),
		nextAvail: cfg.Base, availIdx: cfg.Base, lastUsed: cfg.Base,
	}
	if cfg.TableLen > 0 {
		d.tables, err = cfg.Mem.Bytes(cfg.Tables, uint64(cfg.Size)*uint64(cfg.TableLen)*descSize)
		if err != nil {
			return nil, fmt.Errorf("virtq: driver: indirect tables: %w", err)
		}
		if !aligned(d.tables, descSize) {
			return nil, fmt.Errorf("virtq: driver: indirect tables at %#x: not aligned to %d", cfg.Tables, descSize)
		}
	}
	for i := range d.next {
		d.next[i] = uint16(i + 1)
	}
	clear(d.desc)
	clear(d.avail)
	clear(d.used)
	d.storeAvail()
	store32(d.used, flagsOff, uint32(cfg.Base)<<16)
	d.EnableInterrupts()
	return d, nil
}

// Free is the number of free descriptors. A chain takes one for each buffer, or one in all if it is indirect.
func (d *Driver) Free() int { return d.free }

// Err is what the device did wrong, if it did. The error wraps [ErrRing].
func (d *Driver) Err() error { return d.err }

// AddChain stages a chain of the device-readable buffers out and the device-writable buffers in, at least one in all.
// The device does not see it before Publish. If there are too few free descriptors, the error is [ErrFull].
func (d *Driver) AddChain(out, in []Buf, indirect bool) (head uint16, err error) {
	n := len(out) + len(in)
	slots := n
	if indirect {
		slots = 1
	}
	switch {
	case n == 0:
		return 0, errors.New("virtq: driver: chain without buffers")
	case indirect && n > int(d.cfg.TableLen):
		return 0, fmt.Errorf("virtq: driver: chain of %d, indirect tables of %d", n, d.cfg.TableLen)
	case slots > d.free:
		return 0, ErrFull
	}
	head = d.firstFree
	table, at := d.desc, head
	if indirect {
		size := int(d.cfg.TableLen) * descSize
		first := int(head) * size
		storeDesc(d.desc, int(head), desc{addr: d.cfg.Tables + uint64(first), len: uint32(n * descSize), flags: descIndirect})
		table, at = d.tables[first:first+size], 0
		d.firstFree = d.next[head]
	}
	for i := range n {
		e := desc{next: at + 1}
		if !indirect {
			e.next = d.next[at]
			d.firstFree = e.next
		}
		if i < len(out) {
			e.addr, e.len = out[i].GPA, out[i].Len
		} else {
			e.addr, e.len, e.flags = in[i-len(out)].GPA, in[i-len(out)].Len, descWrite
		}
		if i+1 < n {
			e.flags |= descNext
		}
		storeDesc(table, int(at), e)
		at = e.next
	}
	d.slots[head] = uint16(slots)
	d.free -= slots
	store16(d.avail, ringOff+2*int(d.nextAvail&d.mask), head)
	d.nextAvail++
	return head, nil
}

// Publish makes the staged chains visible and tells whether the device wants a kick for them.
func (d *Driver) Publish() (kick bool) {
	if d.nextAvail == d.availIdx {
		return false
	}
	before := d.availIdx
	d.availIdx = d.nextAvail
	d.storeAvail()
	if d.cfg.EventIdx {
		return crossed(load16(d.used, ringOff+usedSize*int(d.cfg.Size)), d.availIdx, before)
	}
	return load16(d.used, flagsOff)&usedNoNotify == 0
}

// storeAvail stores avail.flags and avail.idx in one step.
func (d *Driver) storeAvail() {
	store32(d.avail, flagsOff, uint32(d.availFlags)|uint32(d.availIdx)<<16)
}

// PopUsed takes the next completion: the chain's head, whose descriptors are free again, and how many bytes the device
// says it wrote. ok is false if there is none, and for ever once the device broke the ring: see Err.
func (d *Driver) PopUsed() (head uint16, written uint32, ok bool) {
	n := load16(d.used, idxOff) - d.lastUsed
	if d.err != nil || n == 0 {
		return 0, 0, false
	}
	e := ringOff + usedSize*int(d.lastUsed&d.mask)
	id, written := load32(d.used, e), load32(d.used, e+4)
	if n > d.cfg.Size || id >= uint32(d.cfg.Size) || d.slots[id] == 0 {
		d.err = fmt.Errorf("%w: used index %d, %d ahead, names head %d", ErrRing, d.lastUsed, n, id)
		return 0, 0, false
	}
	head = uint16(id)
	last := head
	for range d.slots[head] - 1 {
		last = d.next[last]
	}
	d.next[last], d.firstFree = d.firstFree, head
	d.free += int(d.slots[head])
	d.slots[head] = 0
	d.lastUsed++
	return head, written, true
}

// EnableInterrupts asks the device for an interrupt when it completes a chain. more: a completion is there already, and
// no interrupt may come for it, so do not sleep.
func (d *Driver) EnableInterrupts() (more bool) {
	d.availFlags = 0
	if d.cfg.EventIdx {
		store16(d.avail, ringOff+2*int(d.cfg.Size), d.lastUsed)
	} else {
		d.storeAvail()
	}
	return load16(d.used, idxOff) != d.lastUsed
}

// DisableInterrupts tells the device that interrupts are not needed; some may come all the same.
func (d *Driver) DisableInterrupts() {
	if !d.cfg.EventIdx && d.availFlags == 0 {
		d.availFlags = availNoInterrupt
		d.storeAvail()
	}
}
