// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// tripwire is storage that fails its operations from the one with the number from on, a given number of them.
type tripwire struct {
	*blktest.Memory
	from, count int64
	err         error
	seen        atomic.Int64
	hit         atomic.Int64
	best        atomic.Int64 // hits on discards: space that is given back if that works
}

func (f *tripwire) trip(op blk.Op) error {
	i := f.seen.Add(1) - 1
	if i < f.from || i >= f.from+f.count {
		return nil
	}
	f.hit.Add(1)
	if op == blk.OpDiscard {
		f.best.Add(1)
	}
	return f.err
}

func (f *tripwire) Do(t *blk.Task, r *blk.Request) error {
	if err := f.trip(r.Op); err != nil {
		if r.Op == blk.OpWrite && f.from%2 == 1 { // a part is written
			half := r.Len / 2 / blk.SectorSize * blk.SectorSize
			_ = f.Memory.Do(t, &blk.Request{Op: blk.OpWrite, Off: r.Off, Len: half, Data: r.Data.AppendSlice(nil, 0, half)})
		}
		return err
	}
	return f.Memory.Do(t, r)
}

func (f *tripwire) Resize(t *blk.Task, size int64, shrink bool) error {
	if err := f.trip(blk.OpWrite); err != nil {
		return err
	}
	return f.Memory.Resize(t, size, shrink)
}

// below is a backing file that takes part in that.
type below struct {
	blk.Node
	f *tripwire
}

func (b below) Do(t *blk.Task, r *blk.Request) error {
	if err := b.f.trip(r.Op); err != nil {
		return err
	}
	return b.Node.Do(t, r)
}

// TestFaultsEverywhere lets each I/O fail, alone and with those after it. The error reaches whoever asked; what was
// there stays, or is what was to be written; when the fault is gone all goes on; and in the end nothing is counted
// wrong and no space is lost.
func TestFaultsEverywhere(t *testing.T) {
	for _, s := range scenes() {
		if s.workers > 1 {
			continue
		}
		for _, err := range []error{syscall.EIO, syscall.ENOSPC} {
			t.Run(fmt.Sprintf("%s/%v", s.name, err), func(t *testing.T) {
				t.Parallel()
				rng := blktest.Rand(t)
				seed := rng.Uint64()
				disk, base := s.prepare(t, rng)
				image := disk.Bytes()
				for at := int64(0); ; {
					f := &tripwire{Memory: memoryOf(t, image), from: at, count: 1 + at%3*2, err: err}
					var lower blk.Node
					if base != nil {
						lower = below{base, f}
					}
					if !s.faulty(t, rand.New(rand.NewPCG(seed, 2)), f, lower) {
						t.Logf("%d operations", at)
						return
					}
					at++
					if s.reached != nil {
						at += 6
					}
					if testing.Short() {
						at += int64(s.faultyOps()) / 3
					}
				}
			})
		}
	}
}

// faulty goes through the scene. It returns false if that was too short for the fault.
func (s *scene) faulty(t *testing.T, rng *rand.Rand, f *tripwire, base blk.Node) bool {
	t.Helper()
	n, err := qcow2.Open(blk.NewTask(), f, qcow2.Options{Name: "image", Backing: base, Ahead: true})
	if f.hit.Load() > 0 {
		if !errors.Is(err, f.err) {
			t.Fatalf("operation %d failed, and Open says %v", f.from, err)
		}
		f.count = 0
		n, err = qcow2.Open(blk.NewTask(), f, qcow2.Options{Name: "image", Backing: base, Ahead: true})
	}
	if err != nil {
		t.Fatal(err)
	}
	n = qcow2.ReserveLittle(n)
	var model []byte
	f.quietly(func() { model = contents(t, n) })
	snapshot := bytes.Clone(model)
	next := int64(0)
	for i := range s.faultyOps() {
		if s.grow > 0 && i%(s.ops/s.grow) == s.ops/s.grow/2 {
			model = append(model, make([]byte, 2*len(model))...)
			s.try(t, f, n, func() error { return n.Resize(blk.NewTask(), int64(len(model)), false) })
		}
		if rng.IntN(s.flushRate) == 0 {
			s.try(t, f, n, func() error { return blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}) })
			continue
		}
		r, b := change(rng, &next, int64(len(model)), s.o.ClusterSize, s.kinds)
		part := model[r.Off : r.Off+r.Len]
		old := append([]byte(nil), part...)
		failed := s.try(t, f, n, func() error { return blk.Do(blk.NewTask(), n, r) })
		if r.Op == blk.OpDiscard || failed {
			f.quietly(func() { s.settled(t, f, n, r, old, b) })
		}
		copy(part, b)
	}
	f.quietly(func() {
		if !bytes.Equal(contents(t, n), model) {
			t.Fatalf("operation %d failed: other contents", f.from)
		}
	})
	err = n.Close()
	if err != nil && !errors.Is(err, f.err) {
		t.Fatalf("operation %d failed, and Close says %v", f.from, err)
	}
	if r := check(t, f.Memory, qcow2.RepairNone); r.Errors > 0 || err == nil && r.Leaks > 0 {
		t.Fatalf("operation %d and %d more failed: %+v", f.from, f.hit.Load()-1, r)
	}
	if s.snapshot && !bytes.Equal(snapshotOf(t, f.Bytes(), base), snapshot) {
		t.Fatalf("operation %d failed: the snapshot changed", f.from)
	}
	return f.hit.Load() > 0
}

// faultyOps: each runs for each fault.
func (s *scene) faultyOps() int {
	if s.reached != nil {
		return s.ops
	}
	return min(s.ops, 40)
}

// quietly runs fn without faults and does not count what it does.
func (f *tripwire) quietly(fn func()) {
	count, seen := f.count, f.seen.Load()
	f.count = 0
	fn()
	f.count = count
	f.seen.Store(seen)
}

// try does something until it works. It says whether it failed before.
func (s *scene) try(t *testing.T, f *tripwire, n *qcow2.Node, fn func() error) (failed bool) {
	t.Helper()
	for range 20 {
		hit, best := f.hit.Load(), f.best.Load()
		err := fn()
		// A request that finds the disk full tries with less; there it may meet what the first attempt left unsettled.
		known := errors.Is(err, f.err) || f.hit.Load() > hit && errors.Is(err, syscall.EIO)
		switch {
		case err == nil:
			return failed
		case !known:
			t.Fatalf("operation %d failed with %v, and one later says %v", f.from, f.err, err)
		case f.hit.Load()-hit-(f.best.Load()-best) == 0:
			t.Fatalf("operation %d failed long ago, and now it says %v", f.from, err)
		}
		failed = true
		// What the image holds now has no errors.
		if r := check(t, f.Memory, qcow2.RepairNone); r.Errors > 0 {
			t.Fatalf("operation %d failed: %+v", f.from, r)
		}
	}
	t.Fatalf("it still fails")
	return true
}

// settled reads what a request left that went well after it had failed, and takes over what a discard did.
func (s *scene) settled(t *testing.T, f *tripwire, n blk.Node, r *blk.Request, old, b []byte) {
	t.Helper()
	got := make([]byte, r.Len)
	do(t, n, &blk.Request{Op: blk.OpRead, Off: r.Off, Len: r.Len, Data: blk.BytesVec(nil, got)})
	for i := 0; i < len(got); i += blk.SectorSize {
		sector := func(x []byte) []byte { return x[i : i+blk.SectorSize] }
		if r.Op == blk.OpDiscard && (isZero(sector(got)) || bytes.Equal(sector(got), sector(old))) {
			copy(sector(b), sector(got))
			continue
		}
		if !bytes.Equal(sector(got), sector(b)) {
			t.Fatalf("operation %d failed: %v at %d: other bytes in sector %d", f.from, r.Op, r.Off, i/blk.SectorSize)
		}
	}
}

// TestDamagedEntryStays: the request that finds a damaged entry does not write over it, nor does any later one. What
// it said may still help to rescue data.
func TestDamagedEntryStays(t *testing.T) {
	m := blktest.NewMemory(0)
	o := qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 4096, Preallocation: "metadata"}
	if err := qcow2.Create(blk.NewTask(), m, o); err != nil {
		t.Fatal(err)
	}
	b := m.Bytes()
	be := binary.BigEndian
	entry := int64(be.Uint64(b[be.Uint64(b[40:]):])&(1<<56-1<<9)) + 3*8
	word := be.AppendUint64(nil, 1<<63|be.Uint64(b[48:])) // the refcount table
	copy(b[entry:], word)
	m = memoryOf(t, b)
	n := open(t, m, qcow2.Options{})
	for range 2 {
		err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWriteZeroes, Off: 5 * 4096, Len: 4096})
		if !errors.Is(err, qcow2.ErrCorrupt) {
			t.Errorf("error %v", err)
		}
	}
	if now := m.Bytes()[entry:][:8]; !bytes.Equal(now, word) {
		t.Errorf("the entry was %x and is %x", word, now)
	}
}
