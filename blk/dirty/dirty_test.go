// SPDX-License-Identifier: Apache-2.0

package dirty

import (
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

const (
	size  = 2 << 30 // 512 regions, of which 128 may be on the list
	block = 64 << 10
)

func TestMain(m *testing.M) {
	idle, patience = 200*time.Millisecond, 400*time.Millisecond
	os.Exit(m.Run())
}

// disk is a child without contents that tells which writes it has seen.
type disk struct {
	info  blk.Info
	wrote func(r *blk.Request) error
}

func newDisk(size int64) *disk {
	return &disk{info: blk.Info{Name: "disk", Kind: "test", Size: size, Align: 1, Discard: true}, wrote: func(*blk.Request) error { return nil }}
}

func (d *disk) Info() *blk.Info { return &d.info }

func (d *disk) TryMap(_ blk.Op, off, l int64) (blk.Extent, bool) {
	return blk.Extent{Len: l, Writable: true, HostOff: off}, true
}

func (d *disk) Map(_ *blk.Task, off, l int64) (blk.Extent, error) {
	return blk.Extent{Len: l, HostOff: off}, nil
}
func (d *disk) Do(_ *blk.Task, r *blk.Request) error { return d.wrote(r) }
func (d *disk) Children() []blk.Node                 { return nil }
func (d *disk) Close() error                         { return nil }

// storages are the log and the files, each a disk with a power cut of its own, at one and the same moment.
type storages struct {
	mu     sync.Mutex
	disks  []*blktest.CrashDisk
	points [][]int // of all disks, after each step
}

// storage is one of them.
type storage struct {
	*blktest.CrashDisk
	all *storages
}

func (s *storages) add(size int64) *storage {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := blktest.NewCrashDisk(size)
	s.disks = append(s.disks, d)
	return &storage{d, s}
}

func (s *storage) Do(t *blk.Task, r *blk.Request) error {
	s.all.mu.Lock()
	defer s.all.mu.Unlock()
	err := s.CrashDisk.Do(t, r)
	var now []int
	for _, d := range s.all.disks {
		now = append(now, d.Points())
	}
	s.all.points = append(s.all.points, now)
	return err
}

func (s *storages) steps() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.points)
}

// cut is what a power cut after so many steps leaves.
func (s *storages) cut(steps int, rng *rand.Rand) (all []blk.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range s.points[steps-1] {
		all = append(all, s.disks[i].CrashAt(p, rng))
	}
	return all
}

func (s *storages) now() (all []blk.Node) {
	for _, d := range s.disks {
		all = append(all, d)
	}
	return all
}

// rig is a filter over a disk, with the queues' side.
type rig struct {
	*testing.T
	n      *Node
	disk   *disk
	store  storages
	faults []*blktest.Fault // over the log and the files

	pause sync.RWMutex // read: a request is in flight
	fast  sync.RWMutex // read: one that TryMap has let pass
	fasts atomic.Int64
	told  atomic.Int64 // calls of Broken
	acked func(off, l int64)
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{T: t, disk: newDisk(size)}
	log := r.storage(LogSize)
	r.must(FormatLog(blk.NewTask(), log))
	r.start(log)
	return r
}

func (r *rig) storage(size int64) blk.Node {
	f := blktest.NewFault(r.store.add(size))
	r.faults = append(r.faults, f)
	return f
}

func (r *rig) start(log blk.Node) {
	r.Helper()
	n, err := New(Options{
		Log: log,
		Barrier: func(*blk.Task) error {
			r.fast.Lock()
			r.fast.Unlock() //nolint:staticcheck // waits for those inside
			return nil
		},
		Broken: func(error) error {
			r.told.Add(1)
			return nil
		},
	})
	r.must(err)
	n.Over(r.disk)
	r.n = n
	r.Cleanup(func() { n.Close() })
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) add(granularity int64) *Bitmap {
	r.Helper()
	b, err := r.n.Add(blk.NewTask(), r.storage(0), blk.NewBitmap(size, granularity))
	r.must(err)
	return b
}

// write is what a queue does; fast: it may take the fast path.
func (r *rig) write(op blk.Op, off, l int64, fast bool) error {
	r.pause.RLock()
	defer r.pause.RUnlock()
	if r.acked != nil {
		defer r.acked(off, l)
	}
	q := &blk.Request{Op: op, Off: off, Len: l}
	if op == blk.OpWrite {
		q.Data = blk.BytesVec(nil, nothing[:l])
		if fast {
			r.fast.RLock()
			if e, ok := r.n.TryMap(op, off, l); ok {
				defer r.fast.RUnlock()
				err := r.disk.wrote(q)
				if e.Tracked != nil {
					e.Tracked.Set(off, l)
				}
				r.fasts.Add(1)
				return err
			}
			r.fast.RUnlock()
		}
	}
	return blk.Do(blk.NewTask(), r.n, q)
}

var nothing [2 << 20]byte

func (r *rig) change(fn func()) {
	r.pause.Lock()
	defer r.pause.Unlock()
	fn()
}

// stored is what a restart makes of the log and the files.
func stored(t *testing.T, from []blk.Node) []*blk.Bitmap {
	t.Helper()
	task := blk.NewTask()
	var all []*blk.Bitmap
	for _, f := range from[1:] {
		m, err := ReadBits(task, f, size)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, m)
	}
	if err := ReadLog(task, from[0], all...); err != nil {
		t.Fatal(err)
	}
	return all
}

// A write does not begin before its region is on the list, durably.
func TestIntentFirst(t *testing.T) {
	r := newRig(t)
	r.add(block)
	var begun atomic.Bool
	r.disk.wrote = func(*blk.Request) error {
		begun.Store(true)
		return nil
	}
	if _, ok := r.n.TryMap(blk.OpWrite, 0, 4096); ok {
		t.Error("the fast path, before the region is on the list")
	}
	trap := r.faults[0].Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Hold: true})
	done := make(chan error)
	go func() { done <- r.write(blk.OpWrite, 0, 4096, true) }()
	trap.Wait(t, 1)
	time.Sleep(20 * time.Millisecond)
	if begun.Load() {
		t.Error("the write has begun, and the list is not durable")
	}
	trap.Release()
	r.must(<-done)
	e, ok := r.n.TryMap(blk.OpWrite, 1<<20, 4096)
	if !ok || e.Tracked == nil {
		t.Error("no fast path in a region that is on the list")
	}
	if n := testing.AllocsPerRun(1000, func() { r.n.TryMap(blk.OpWrite, 1<<20, 4096) }); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
	if m := stored(t, r.store.now())[0]; !m.All(0, 1<<22) || m.Any(1<<22, size) {
		t.Errorf("after a crash now: %d bytes", m.Bytes())
	}
}

// A region does not leave the list while a write that began there is in flight.
func TestRetireWaits(t *testing.T) {
	r := newRig(t)
	b := r.add(block)
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	r.fast.RLock()
	e, ok := r.n.TryMap(blk.OpWrite, 0, 4096) // in flight
	if !ok {
		t.Fatal("no fast path")
	}
	done := make(chan error, 1)
	go func() {
		for i := range int64(3 * maxActive) {
			if err := r.write(blk.OpWrite, i<<22|1<<20, 4096, false); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	select {
	case err := <-done:
		r.must(err)
		t.Fatal("regions were retired with a write in flight")
	case <-time.After(50 * time.Millisecond):
	}
	e.Tracked.Set(block, 4096) // where nothing else is marked
	r.fast.RUnlock()
	r.must(<-done)
	if m := stored(t, r.store.now())[0]; !m.Any(block, 1) || !m.All(0, 1) {
		t.Error("a mark is not in the file")
	}
	if bytes, _ := b.State(); bytes != (3*maxActive+2)*block {
		t.Errorf("%d blocks are dirty", bytes/block)
	}
}

type acked struct {
	off, n int64
	point  int // of the crash disk, when it was acknowledged
}

// Thousands of racing writes, some of them discards, over more regions than the list has, with bitmaps cleared, frozen
// and thawed meanwhile: in memory the bitmaps are exact, and whatever a power cut at any moment leaves of the log and
// the files is at least what was acknowledged.
func TestPowerCut(t *testing.T) {
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	r := newRig(t)
	grans := []int64{block, 1 << 20}
	bitmaps := []*Bitmap{r.add(grans[0]), r.add(grans[1])}
	complete := r.store.steps()
	var (
		mu   sync.Mutex
		all  [2][]acked // of both bitmaps, since they were cleared
		gone [2][]struct {
			list       []acked
			begun, end int
		}
	)
	r.acked = func(off, n int64) {
		mu.Lock()
		defer mu.Unlock()
		p := r.store.steps()
		for i := range all {
			all[i] = append(all[i], acked{off, n, p})
		}
	}
	forget := func(i int, from []acked, begun int) {
		gone[i] = append(gone[i], struct {
			list       []acked
			begun, end int
		}{from, begun, r.store.steps()})
	}
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			home := rng.Int64N(size)
			for range 300 {
				off := rng.Int64N(size-(1<<20)) &^ 511
				if rng.IntN(4) > 0 { // most of them near each other
					off = (home + rng.Int64N(16<<20)) % (size - 1<<20) &^ 511
				}
				l, op := int64(512+512*rng.IntN(256)), blk.OpWrite
				switch rng.IntN(40) {
				case 0:
					op, l = blk.OpDiscard, min(64<<20, size-off)
				case 1:
					op = blk.OpWriteZeroes
				}
				if err := r.write(op, off, l, rng.IntN(4) > 0); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 100))
		for range 12 {
			time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
			i := rng.IntN(2)
			switch rng.IntN(3) {
			case 0:
				bitmaps[i].State()
			case 1:
				r.change(func() {
					begun := r.store.steps()
					if err := bitmaps[i].Clear(blk.NewTask()); err != nil {
						t.Error(err)
					}
					forget(i, all[i], begun)
					all[i] = nil
				})
			case 2:
				var frozen int
				r.change(func() {
					m, err := bitmaps[i].Freeze()
					if err != nil {
						t.Error(err)
						return
					}
					frozen = len(all[i])
					for _, a := range all[i] {
						if !m.All(a.off, a.n) {
							t.Errorf("frozen without %v", a)
						}
					}
				})
				time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
				done := rng.IntN(2) == 0
				r.change(func() {
					begun := r.store.steps()
					if err := bitmaps[i].Thaw(blk.NewTask(), done); err != nil {
						t.Error(err)
					}
					if done {
						forget(i, all[i][:frozen], begun)
						all[i] = slices.Clone(all[i][frozen:])
					}
				})
			}
		}
	})
	wg.Wait()
	if r.fasts.Load() == 0 {
		t.Error("nothing took the fast path")
	}
	for i, b := range bitmaps {
		want := blk.NewBitmap(size, grans[i])
		for _, a := range all[i] {
			want.Set(a.off, a.n)
		}
		got := b.Bits()
		for w := range want.Words() {
			if got.Word(w) != want.Word(w) {
				t.Fatalf("bitmap %d: word %d is %#x, want %#x", i, w, got.Word(w), want.Word(w))
			}
		}
	}
	rng := rand.New(rand.NewPCG(seed, 200))
	points := r.store.steps()
	for range 100 {
		// Not before the bitmaps were complete.
		p := complete + rng.IntN(points-complete+1)
		for i, m := range stored(t, r.store.cut(p, rng)) {
			check := func(l []acked, until int) {
				for _, a := range l {
					if a.point <= p && p <= until && !m.All(a.off, a.n) {
						t.Fatalf("bitmap %d, power cut at %d of %d: %v is missing", i, p, points, a)
					}
				}
			}
			check(all[i], points)
			for _, g := range gone[i] {
				check(g.list, g.begun)
			}
		}
	}
	r.must(r.n.Sync(blk.NewTask()))
	for i, m := range stored(t, r.store.now()) {
		if m.Count() != bitmaps[i].Bits().Count() {
			t.Errorf("bitmap %d: stored %d bits, want %d", i, m.Count(), bitmaps[i].Bits().Count())
		}
	}
}

// The storage of the log fails: no write fails, and the bitmaps say that they have missed something, also
// after a restart.
func TestBroken(t *testing.T) {
	for i, what := range []blk.Op{blk.OpWrite, blk.OpFlush, blk.OpWrite, blk.OpFlush} {
		r := newRig(t)
		b := r.add(block)
		trap := r.faults[i/2].Add(blktest.Rule{Ops: []blk.Op{what}, After: 1, Err: syscall.ENOSPC})
		for i := range int64(400) {
			r.must(r.write(blk.OpWrite, i<<22, 4096, i%2 == 0))
		}
		if err := b.Err(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v fails: %v", what, err)
		}
		if _, err := b.Freeze(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%v fails: frozen, %v", what, err)
		}
		for range 100 {
			if r.told.Load() > 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if r.told.Load() == 0 {
			t.Errorf("%v fails: nobody was told", what)
		}
		trap.Remove()
	}
}

// What could not be made durable at once is tried again.
func TestBrokenLater(t *testing.T) {
	r := newRig(t)
	r.add(block)
	r.n.o.Broken = func(err error) error {
		r.told.Add(1)
		return err
	}
	trap := r.faults[0].Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.EIO})
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	trap.Remove()
	deadline := time.Now().Add(3 * idle)
	for time.Now().Before(deadline) {
		if err := ReadLog(blk.NewTask(), r.store.disks[0]); errors.Is(err, ErrMissed) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("the log does not say that writes were missed")
}

// A write that is missed waits until that is durable, whatever is killed then; and not for ever.
func TestBrokenFirst(t *testing.T) {
	for _, last := range []bool{false, true} {
		r := newRig(t)
		r.add(block)
		var durable atomic.Bool
		r.n.o.Broken = func(err error) error {
			if !durable.Load() {
				return err
			}
			r.told.Add(1)
			return nil
		}
		for _, f := range r.faults {
			defer f.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.EIO}).Remove()
		}
		if !last {
			time.AfterFunc(patience/3, func() { durable.Store(true) })
		}
		began := time.Now()
		var all sync.WaitGroup
		for i, l := range []int64{4096, 64 << 20, 4096} { // the second marks ahead
			all.Go(func() {
				if err := blk.Do(blk.NewTask(), r.n, &blk.Request{Op: blk.OpDiscard, Off: int64(i) << 28, Len: l}); err != nil {
					t.Error(err)
				}
				if !last && r.told.Load() == 0 {
					t.Error("a write was done that a restart knows nothing of")
				}
			})
		}
		all.Wait()
		if took := time.Since(began); last && took < patience || took > patience+2*time.Second {
			t.Errorf("writes waited %v", took)
		}
		if _, ok := r.n.TryMap(blk.OpWrite, 0, 4096); !ok {
			t.Error("the fast path is still closed")
		}
	}
}

// The last bitmap is removed while the daemon stops.
func TestCloseTwice(t *testing.T) {
	r := newRig(t)
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			if err := r.n.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

// The disk grows: what came counts as written, the files too.
func TestGrow(t *testing.T) {
	r := newRig(t)
	r.disk.info.Size = size / 2
	r.n.Over(r.disk)
	b := r.add(block)
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	r.disk.info.Size = size
	r.change(func() { r.n.Over(r.disk) })
	if bytes, _ := b.State(); bytes != block+size/2 {
		t.Errorf("%d bytes are dirty", bytes)
	}
	if m := stored(t, r.store.now())[0]; !m.All(0, 1) || !m.All(size/2, size/2) {
		t.Error("after a crash at once something is missing")
	}
	r.must(r.write(blk.OpWrite, size/2-block, 4096, true))
	r.must(r.n.Sync(blk.NewTask()))
	if m := stored(t, r.store.now())[0]; m.Bytes() != 2*block+size/2 {
		t.Errorf("%d bytes are stored", m.Bytes())
	}
}

// Regions leave the list by themselves.
func TestIdle(t *testing.T) {
	r := newRig(t)
	r.add(block)
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	deadline := time.Now().Add(5 * idle)
	for time.Now().Before(deadline) {
		if stored(t, r.store.now())[0].Bytes() == block {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("the region is still on the list")
}

// Damage counts as written, or is told.
func TestDamage(t *testing.T) {
	task := blk.NewTask()
	log, bits := blktest.NewCrashDisk(LogSize), blktest.NewCrashDisk(0)
	if err := FormatLog(task, log); err != nil {
		t.Fatal(err)
	}
	n, err := New(Options{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	n.Over(newDisk(size))
	if _, err := n.Add(task, bits, blk.NewBitmap(size, block)); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := flip(task, bits, 3*sector); err != nil {
		t.Fatal(err)
	}
	m, err := ReadBits(task, bits, size)
	if per := int64(64 * sectorWords * block); err != nil || m.Bytes() != per || !m.All(2*per, per) {
		t.Errorf("a damaged sector: %v", err)
	}
	if _, err := ReadBits(task, bits, size/2); !errors.Is(err, ErrDamaged) {
		t.Errorf("a smaller disk: %v", err)
	}
	for _, off := range []int64{8, 16, 24, 508} { // one after the other: what is wrong stays wrong
		if err := flip(task, bits, off); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadBits(task, bits, size); !errors.Is(err, ErrDamaged) {
			t.Errorf("a damaged head at %d: %v", off, err)
		}
	}
	if err := flip(task, log, logSlot+30); err != nil {
		t.Fatal(err)
	}
	if err := ReadLog(task, log); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged log: %v", err)
	}
}

// flip changes a byte.
func flip(t *blk.Task, n blk.Node, off int64) error {
	b := make([]byte, sector)
	if err := readAt(t, n, b, off&^(sector-1)); err != nil {
		return err
	}
	b[off&(sector-1)] ^= 0xff
	return writeAt(t, n, b, off&^(sector-1))
}

// What the files have needs no region on the list, until a bitmap forgets it.
func TestStable(t *testing.T) {
	r := newRig(t)
	b := r.add(block)
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	r.must(r.n.Sync(blk.NewTask()))
	mapped := func() bool {
		_, ok := r.n.TryMap(blk.OpWrite, 0, 4096)
		return ok
	}
	if !mapped() {
		t.Error("no fast path to a block that the file has")
	}
	r.change(func() { r.must(b.Clear(blk.NewTask())) })
	if mapped() {
		t.Error("the fast path to a block that the file has no more")
	}
}

// Until a backup is done, what it has counts after a crash.
func TestFrozenIsStored(t *testing.T) {
	r := newRig(t)
	b := r.add(block)
	r.must(r.write(blk.OpWrite, 0, 4096, true))
	r.change(func() {
		_, err := b.Freeze()
		r.must(err)
	})
	r.must(r.write(blk.OpWrite, block, 4096, true))
	r.must(r.n.Sync(blk.NewTask()))
	if m := stored(t, r.store.now())[0]; !m.All(0, 2*block) || m.Count() != 2 {
		t.Errorf("%d blocks are stored during a backup", m.Count())
	}
	r.change(func() { r.must(b.Thaw(blk.NewTask(), true)) })
	if m := b.Bits(); m.Count() != 1 || !m.Any(block, 1) {
		t.Errorf("%d blocks are left after a backup", m.Count())
	}
}

// The guest takes its memory away while a write is under way, a part of which is done: it counts as written.
func TestFaultIsWritten(t *testing.T) {
	r := newRig(t)
	b := r.add(block)
	r.disk.wrote = func(*blk.Request) error { panic("guest memory is gone") }
	for _, op := range []blk.Op{blk.OpWrite, blk.OpDiscard} {
		off := int64(op) << 24
		func() {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			_ = r.write(op, off, block, false)
		}()
		if !b.Bits().All(off, block) {
			t.Errorf("%v is missing", op)
		}
	}
}

// After a flush of the log that failed nobody knows what its slot holds. The other one, which is good, stays until
// there is a better one, whatever a power cut leaves of what is written next.
func TestLogFlushFails(t *testing.T) {
	const shift = minRegionShift
	task, rng := blk.NewTask(), blktest.Rand(t)
	d := blktest.NewCrashDisk(LogSize)
	f := blktest.NewFault(d)
	if err := FormatLog(task, f); err != nil {
		t.Fatal(err)
	}
	gen, err := readLog(task, f)
	if err != nil {
		t.Fatal(err)
	}
	l := intentLog{f, gen}
	for _, regions := range [][]int64{{1}, {2}} {
		if err := l.write(task, size, shift, regions); err != nil {
			t.Fatal(err)
		}
	}
	good := d.Points()
	f.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: syscall.EIO})
	if err := l.write(task, size, shift, []int64{2, 3}); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	for range 2 {
		if err := l.put(task, size, shift, logBroken, nil); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
	}
	for range 300 {
		p := good + rng.IntN(d.Points()-good+1)
		m := blk.NewBitmap(size, block)
		if err := ReadLog(task, d.CrashAt(p, rng), m); !errors.Is(err, ErrMissed) && (err != nil || !m.All(2<<shift, 1<<shift)) {
			t.Fatalf("power cut at %d of %d: %v, and region 2 is missing", p, d.Points(), err)
		}
	}
}
