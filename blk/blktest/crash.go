// SPDX-License-Identifier: Apache-2.0

package blktest

import (
	"math/rand/v2"
	"sync"

	"github.com/blkstream/blkstream/blk"
)

// CrashDisk is a disk in memory with a volatile write cache, as real disks have. It remembers everything that was
// done to it, so that a test can ask for each moment of the past what the disk might hold if the power had gone
// then: all that was flushed or written with FUA, and any part of the rest, in any order, torn at sectors.
//
// Resize is durable at once. A discard zeroes.
type CrashDisk struct {
	mem *Memory

	mu    sync.Mutex
	first []byte // the contents at the beginning
	log   []logged
}

// logged is one step of the disk's history.
type logged struct {
	flush  bool
	forced bool // FUA
	resize bool // to off
	off    int64
	data   []byte
}

// NewCrashDisk returns a disk of size zeros.
func NewCrashDisk(size int64) *CrashDisk { return newCrashDisk(make([]byte, size)) }

func newCrashDisk(data []byte) *CrashDisk {
	return &CrashDisk{mem: newMemory(data), first: append([]byte(nil), data...)}
}

// Bytes is a copy of what the disk reads as now.
func (d *CrashDisk) Bytes() []byte { return d.mem.Bytes() }

// Points is the number of steps so far. Before and after each there is a point, 0 to Points(), at which the power
// may go. Steps are writes, discards, zeroings, flushes and resizes.
func (d *CrashDisk) Points() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.log)
}

// Crash returns the disk after a power cut now. rng decides what survives; d itself goes on.
func (d *CrashDisk) Crash(rng *rand.Rand) *CrashDisk { return d.CrashAt(d.Points(), rng) }

// CrashAt returns the disk after a power cut at an earlier point.
func (d *CrashDisk) CrashAt(point int, rng *rand.Rand) *CrashDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	img := append([]byte(nil), d.first...)

	// Everything before the last flush is there; so is a forced write after it.
	synced := 0
	for i, s := range d.log[:point] {
		if s.flush {
			synced = i + 1
		}
	}
	// Now and then all or nothing survives, else each write with the same odds, whole or torn.
	keep := [...]float64{0, 1, 0.5, rng.Float64()}[rng.IntN(4)]
	for i, s := range d.log[:point] {
		switch {
		case s.flush:
		case s.resize:
			img = append(img[:min(s.off, int64(len(img)))], make([]byte, max(0, s.off-int64(len(img))))...)
		case i < synced || s.forced:
			copy(img[s.off:], s.data)
		case rng.IntN(4) == 0: // torn
			for lo := int64(0); lo < int64(len(s.data)); {
				hi := min((s.off+lo)/blk.SectorSize*blk.SectorSize+blk.SectorSize-s.off, int64(len(s.data)))
				if rng.Float64() < keep {
					copy(img[s.off+lo:], s.data[lo:hi])
				}
				lo = hi
			}
		case rng.Float64() < keep:
			copy(img[s.off:], s.data)
		}
	}
	return newCrashDisk(img)
}

// KilledAt returns what a program that died at an earlier point has left: everything that the disk was given.
func (d *CrashDisk) KilledAt(point int) *CrashDisk {
	d.mu.Lock()
	defer d.mu.Unlock()
	img := append([]byte(nil), d.first...)
	for _, s := range d.log[:point] {
		if s.resize {
			img = append(img[:min(s.off, int64(len(img)))], make([]byte, max(0, s.off-int64(len(img))))...)
		}
		copy(img[min(s.off, int64(len(img))):], s.data)
	}
	return newCrashDisk(img)
}

// Info describes the disk.
func (d *CrashDisk) Info() *blk.Info { return d.mem.Info() }

// TryMap never knows.
func (d *CrashDisk) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

// Map tells zeros from data.
func (d *CrashDisk) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return d.mem.Map(t, off, l) }

// Do carries out the request and writes the history.
func (d *CrashDisk) Do(t *blk.Task, r *blk.Request) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	step := logged{off: r.Off, forced: r.Flags&blk.FUA != 0}
	switch r.Op {
	case blk.OpRead:
		return d.mem.Do(t, r)
	case blk.OpWrite:
		step.data = make([]byte, r.Len)
		r.Data.CopyTo(step.data)
		// What is logged is what is written, even if the caller's buffer changes meanwhile.
		r = &blk.Request{Op: blk.OpWrite, Off: r.Off, Len: r.Len, Data: blk.BytesVec(nil, step.data)}
	case blk.OpDiscard, blk.OpWriteZeroes:
		step.data = make([]byte, r.Len)
	case blk.OpFlush:
		step.flush = true
	default:
		return blk.ErrNotSupported
	}
	d.log = append(d.log, step)
	return d.mem.Do(t, r)
}

// Resize changes the size, a multiple of blk.SectorSize.
func (d *CrashDisk) Resize(t *blk.Task, size int64, shrink bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.mem.Resize(t, size, shrink); err != nil {
		return err
	}
	d.log = append(d.log, logged{resize: true, off: size})
	return nil
}

// Children: there are none.
func (d *CrashDisk) Children() []blk.Node { return nil }

// Close does nothing.
func (d *CrashDisk) Close() error { return nil }
