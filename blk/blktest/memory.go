// SPDX-License-Identifier: Apache-2.0

// Package blktest is for tests of the block layer: a conformance suite for nodes (Run), a disk in memory (Memory), a
// filter that injects errors and holds requests up (Fault), and a disk that can lose its power (CrashDisk).
package blktest

import (
	"sync"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// Memory is a disk in memory. It gives no extents to write to, so every request passes Do.
type Memory struct {
	info atomic.Pointer[blk.Info]
	mu   sync.RWMutex
	data []byte
}

// NewMemory returns a disk of size zeros.
func NewMemory(size int64) *Memory { return newMemory(make([]byte, size)) }

func newMemory(data []byte) *Memory {
	m := &Memory{data: data}
	m.setSize()
	return m
}

func (m *Memory) setSize() {
	m.info.Store(&blk.Info{Name: "memory", Kind: "memory", Size: int64(len(m.data)), Align: 1, Discard: true})
}

// Bytes is a copy of the contents.
func (m *Memory) Bytes() []byte {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return append([]byte(nil), m.data...)
}

// Info describes the disk.
func (m *Memory) Info() *blk.Info { return m.info.Load() }

// TryMap never knows.
func (m *Memory) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

// Map tells zeros from data, in blocks of 4 KiB.
func (m *Memory) Map(_ *blk.Task, off, l int64) (blk.Extent, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if off < 0 || l <= 0 || off >= int64(len(m.data)) {
		return blk.Extent{}, blk.ErrRange
	}
	const block = 4096
	end := min(off+l, int64(len(m.data)))
	blockEnd := func(at int64) int64 { return min(at/block*block+block, end) }
	at := blockEnd(off)
	zero := blk.IsZero(m.data[off:at])
	for at < end && blk.IsZero(m.data[at:blockEnd(at)]) == zero {
		at = blockEnd(at)
	}
	state := blk.Data
	if zero {
		state = blk.Zero
	}
	return blk.Extent{Len: at - off, State: state}, nil
}

// Do carries out the request. A discard zeroes.
func (m *Memory) Do(_ *blk.Task, r *blk.Request) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch r.Op {
	case blk.OpRead:
		r.Data.CopyFrom(m.data[r.Off:])
	case blk.OpWrite:
		r.Data.CopyTo(m.data[r.Off : r.Off+r.Len])
	case blk.OpDiscard, blk.OpWriteZeroes:
		clear(m.data[r.Off : r.Off+r.Len])
	case blk.OpFlush:
	default:
		return blk.ErrNotSupported
	}
	return nil
}

// Resize changes the size, a multiple of blk.SectorSize.
func (m *Memory) Resize(_ *blk.Task, size int64, shrink bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := int64(len(m.data))
	if size < 0 || size%blk.SectorSize != 0 || size < old && !shrink {
		return blk.ErrInvalid
	}
	data := make([]byte, size)
	copy(data, m.data)
	m.data = data
	m.setSize()
	return nil
}

// Children: there are none.
func (m *Memory) Children() []blk.Node { return nil }

// Close does nothing.
func (m *Memory) Close() error { return nil }
