// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// sky is over the disks of an image, its data file's too: it says when requests fail, and what went on when.
type sky struct {
	bad atomic.Int64 // one request of so many fails; 0: none

	mu      sync.Mutex
	disks   []*blktest.CrashDisk
	moments [][]int // the points of each disk after each request
}

func newSky(disks ...*blktest.CrashDisk) *sky {
	s := &sky{disks: disks}
	s.noteLocked()
	return s
}

func (s *sky) noteLocked() {
	var points []int
	for _, d := range s.disks {
		points = append(points, d.Points())
	}
	s.moments = append(s.moments, points)
}

// points is the number of moments so far.
func (s *sky) points() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.moments) - 1
}

func (s *sky) fails() bool {
	bad := s.bad.Load()
	return bad > 0 && rand.Int64N(bad) == 0
}

// stormy is a disk with a volatile cache that takes its time, in bad weather fails requests after it has carried out
// none, a part, or all of them, and gives extents, as a file does.
type stormy struct {
	*blktest.CrashDisk
	sky  *sky
	host blk.HostFile
}

func (s *stormy) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	in := s.Info()
	if op != blk.OpRead && op != blk.OpWrite || off >= in.Size {
		return blk.Extent{}, false
	}
	return blk.Extent{Len: min(l, in.Size-off), State: blk.Data, Writable: true, Host: &s.host, HostOff: off}, true
}

func (s *stormy) delay() {
	if rand.IntN(3) == 0 {
		time.Sleep(time.Duration(rand.IntN(200)) * time.Microsecond)
	}
}

func (s *stormy) Do(t *blk.Task, r *blk.Request) error {
	s.delay()
	defer s.delay()
	s.sky.mu.Lock()
	defer s.sky.mu.Unlock()
	defer s.sky.noteLocked()
	if !s.sky.fails() {
		return s.CrashDisk.Do(t, r)
	}
	if r.Op == blk.OpWrite {
		if l := rand.Int64N(r.Len/blk.SectorSize+1) * blk.SectorSize; rand.IntN(2) == 0 {
			_ = s.CrashDisk.Do(t, r)
		} else if l > 0 {
			_ = s.CrashDisk.Do(t, &blk.Request{Op: blk.OpWrite, Off: r.Off, Len: l, Data: r.Data.AppendSlice(nil, 0, l)})
		}
	}
	return syscall.EIO
}

func (s *stormy) Resize(t *blk.Task, size int64, shrink bool) error {
	s.delay()
	s.sky.mu.Lock()
	defer s.sky.mu.Unlock()
	defer s.sky.noteLocked()
	if s.sky.fails() {
		return syscall.ENOSPC
	}
	return s.CrashDisk.Resize(t, size, shrink)
}

// storm is an image under all that can happen to it at the same time.
type storm struct {
	t      *testing.T
	sky    *sky
	disk   *stormy // where the guest's clusters are
	n      *qcow2.Node
	h      *history
	begun  atomic.Int64 // I/O on extents, each of which has its number locked
	onFast blk.RangeLock
	fast   atomic.Int64
}

func (s *storm) barrier(t *blk.Task) error {
	s.onFast.Unlock(s.onFast.Lock(t, 0, s.begun.Load()+1))
	return nil
}

// tryFast does what a queue does by itself. ok is false if it has to ask the node.
func (s *storm) tryFast(t *blk.Task, r *blk.Request) (ok bool, err error) {
	if r.Op != blk.OpRead && r.Op != blk.OpWrite {
		return false, nil
	}
	defer s.onFast.Unlock(s.onFast.Lock(t, s.begun.Add(1), 1))
	e, ok := s.n.TryMap(r.Op, r.Off, r.Len)
	if !ok || e.Len < r.Len || e.State != blk.Data || e.Host == nil || r.Op == blk.OpWrite && !e.Writable || e.Unsynced && r.Flags&blk.FUA != 0 {
		return false, nil
	}
	s.fast.Add(1)
	return true, blk.Do(t, s.disk, &blk.Request{Op: r.Op, Flags: r.Flags, Off: e.HostOff, Len: r.Len, Data: r.Data})
}

func (s *storm) request(t *blk.Task, r *blk.Request) error {
	if ok, err := s.tryFast(t, r); ok {
		return err
	}
	return blk.Do(t, s.n, r)
}

// read reads until it works.
func (s *storm) read(t *blk.Task, off, l int64) []byte {
	b := make([]byte, l)
	for {
		err := s.request(t, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, b)})
		if err == nil {
			return b
		}
		s.known(err)
	}
}

// known wants an error to be one that the weather can have brought.
func (s *storm) known(err error) {
	if !errors.Is(err, syscall.EIO) && !errors.Is(err, syscall.ENOSPC) {
		s.t.Errorf("error %v", err)
	}
}

// change carries out a request, and looks at what it left. Nobody else changes these sectors.
func (s *storm) change(t *blk.Task, r *blk.Request, b []byte) {
	v := version{begin: s.h.points()}
	err := s.request(t, r)
	if v.failed = err != nil; v.failed {
		s.known(err)
	} else if r.Op == blk.OpDiscard {
		copy(b, s.read(t, r.Off, r.Len))
	}
	v.end, v.acked = s.h.clock.Add(1), s.h.points()
	if v.failed {
		r.Flags = 0
	}
	s.h.add(r, b, v)
	s.look(t, r.Off, r.Len)
}

// look reads sectors of the caller's.
func (s *storm) look(t *blk.Task, off, l int64) {
	got := s.read(t, off, l)
	for i := int64(0); i < l; i += blk.SectorSize {
		sector := (off + i) / blk.SectorSize
		versions, ok := s.h.sectors[sector], false
		for k := len(versions) - 1; k >= 0 && !ok; k-- {
			ok = bytes.Equal(versions[k].data, got[i:i+blk.SectorSize])
			if !versions[k].failed {
				break
			}
		}
		if !ok {
			s.t.Errorf("sector %d reads as %x…, of %d versions", sector, got[i:i+8], len(versions))
		}
	}
}

// work is what a queue does, to sectors of its own: small pieces in the first half of what the disk is at first, so that
// clusters are shared, and whole clusters behind.
func (s *storm) work(rng *rand.Rand, w, workers, cluster, half int64, ops int, kinds []kind) {
	task := blk.NewTask()
	next := int64(0)
	for range ops {
		size := s.n.Info().Size
		if rng.IntN(6) == 0 {
			s.flush(task)
			continue
		}
		r, b := change(rng, &next, size, cluster, kinds)
		start, stripe := int64(0), int64(3*blk.SectorSize)
		if r.Off >= half {
			start, stripe = half, 2*cluster
		}
		first := start + ((r.Off-start)/stripe/workers*workers+w)*stripe
		end := min(first+stripe, size)
		if start == 0 {
			end = min(end, half)
		}
		r.Off = first + (r.Off-start)%stripe
		if r.Off >= end {
			continue
		}
		r.Len = min(r.Len, end-r.Off)
		b = b[:r.Len]
		if r.Op == blk.OpWrite {
			r.Data = blk.BytesVec(nil, b)
		}
		s.change(task, r, b)
	}
}

func (s *storm) flush(t *blk.Task) {
	begin := s.h.clock.Add(1)
	if err := s.request(t, &blk.Request{Op: blk.OpFlush}); err != nil {
		s.known(err)
		return
	}
	f := flush{begin, s.h.points()}
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	s.h.flushes = append(s.h.flushes, f)
}

// weather changes until stop is closed.
func (s *storm) weather(stop chan struct{}) {
	for {
		for _, bad := range []int64{0, 20, 0, 5} {
			s.sky.bad.Store(bad)
			select {
			case <-stop:
				s.sky.bad.Store(0)
				return
			case <-time.After(time.Duration(rand.IntN(8)) * time.Millisecond):
			}
		}
	}
}

// growing makes the disk longer, until it works.
func (s *storm) growing(rng *rand.Rand, size int64, times int) {
	for range times {
		time.Sleep(time.Duration(rng.IntN(40)) * time.Millisecond)
		size = size * 3
		for {
			err := s.n.Resize(blk.NewTask(), size, false)
			if err == nil {
				break
			}
			s.known(err)
		}
	}
}

// storing stores a bitmap over and over.
func (s *storm) storing(rng *rand.Rand, stop chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		m := blk.NewBitmap(s.n.Info().Size, 512)
		for range rng.IntN(40) {
			m.Set(rng.Int64N(s.n.Info().Size/512)*512, 512)
		}
		list := []qcow2.BitmapData{{Name: "a", Bits: m}, {Name: "b", Bits: m}}[:1+rng.IntN(2)]
		if err := s.n.StoreBitmaps(blk.NewTask(), []string{"a", "b"}, list); err != nil {
			s.known(err)
		}
	}
}

// TestStormAtOnce: several queues, a disk that fails now and then, tables that grow, extents in use, all at once. What is
// left whenever the program dies or the power goes has no errors, and holds what it must. In the end no space is lost.
func TestStormAtOnce(t *testing.T) {
	kinds := []kind{write, write, write, zero, unmap, discard, discard}
	for _, c := range []struct {
		scene
		bitmaps bool
	}{
		{scene: scene{
			name: "small clusters", grow: 2, ops: 150,
			o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 512, RefcountBits: 64},
		}},
		{scene: scene{
			name: "small clusters of a snapshot", ops: 150, fill: true, snapshot: true,
			o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 512, RefcountBits: 2},
		}},
		{scene: scene{
			name: "over a backing file", grow: 1, ops: 150, fill: true, base: 700 << 10,
			o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 4096},
		}},
		{scene: scene{
			name: "without one", grow: 1, ops: 150,
			o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 4096},
		}},
		{scene: scene{
			name: "subclusters over a backing file", ops: 200, fill: true, base: 500 << 10,
			o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 16 << 10, ExtendedL2: true},
		}},
		{scene: scene{
			name: "subclusters of a snapshot", ops: 150, fill: true, snapshot: true,
			o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 16 << 10, ExtendedL2: true},
		}},
		{scene: scene{
			name: "version 2 over a backing file", ops: 150, fill: true, base: 100 << 10,
			o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 2048, Version: 2},
		}},
		{scene: scene{
			name: "compressed clusters of a snapshot", ops: 150, packed: true, snapshot: true,
			o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096},
		}},
		{scene: scene{
			name: "compressed clusters", ops: 150, packed: true,
			o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 4096},
		}},
		{bitmaps: true, scene: scene{
			name: "bitmaps", ops: 150,
			o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 1024},
		}},
		{scene: scene{
			name: "data file", ops: 150, grow: 1,
			o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 2048, DataFile: "data"},
		}},
		{scene: scene{
			name: "data file with subclusters", ops: 150,
			o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 16 << 10, ExtendedL2: true, DataFile: "data"},
		}},
		{scene: scene{
			name: "raw data file", ops: 150, grow: 1,
			o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 512, DataFile: "data", DataFileRaw: true},
		}},
		{scene: scene{
			name: "large clusters", ops: 150,
			o: qcow2.CreateOptions{Size: 2 << 20, ClusterSize: 64 << 10},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			const workers = 4
			rng := blktest.Rand(t)
			disks, o := c.prepareAll(t, rng)
			disk := disks[0]
			s := &storm{t: t, sky: newSky(disks...)}
			var all []*stormy
			for _, d := range disks {
				all = append(all, &stormy{CrashDisk: d, sky: s.sky})
			}
			s.disk = all[len(all)-1]
			o.Barrier, o.Cache = s.barrier, qcow2.NewCache([]int64{0, 16 << 10, 1 << 20}[rng.IntN(3)])
			if len(all) > 1 {
				o.Data = s.disk
			}
			s.n = qcow2.ReserveLittle(open(t, all[0], o))
			start := contents(t, s.n)
			s.h = newHistory(s.sky.points, start)
			end := c.o.Size
			for range c.grow {
				s.h.extend(make([]byte, 2*end))
				end *= 3
			}
			first := s.sky.points()
			var wg, more sync.WaitGroup
			stop := make(chan struct{})
			more.Go(func() { s.weather(stop) })
			if c.bitmaps {
				rng := rand.New(rand.NewPCG(rng.Uint64(), 100))
				more.Go(func() { s.storing(rng, stop) })
			}
			for w := range int64(workers) {
				rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
				wg.Go(func() {
					s.work(rng, w, workers, c.o.ClusterSize, c.o.Size/2/c.o.ClusterSize*c.o.ClusterSize, c.ops, kinds)
				})
			}
			grow := rand.New(rand.NewPCG(rng.Uint64(), 101))
			wg.Go(func() { s.growing(grow, c.o.Size, c.grow) })
			wg.Wait()
			close(stop)
			more.Wait()
			do(t, s.n, &blk.Request{Op: blk.OpFlush})
			for off := int64(0); off < end; off += blk.SectorSize {
				s.look(blk.NewTask(), off, blk.SectorSize)
			}
			if err := s.n.Close(); err != nil {
				t.Fatal(err)
			}
			// The space of a bitmap is lost if its table cannot be read when it goes.
			if r := check(t, disk, qcow2.RepairNone); r.Errors > 0 || r.Leaks > 0 && !c.bitmaps {
				t.Errorf("after all, and closed: %+v", r)
			}
			if s.fast.Load() == 0 {
				t.Error("nothing was done on extents")
			}
			cuts := 120
			if testing.Short() {
				cuts = 20
			}
			for range cuts {
				if t.Failed() {
					return
				}
				at := first + rng.IntN(s.sky.points()-first+1)
				s.died(&c.scene, rng, o, at, start)
			}
			t.Logf("%d points, %d times on extents", s.sky.points()-first, s.fast.Load())
		})
	}
}

// prepareAll is prepare; with a data file there are two disks.
func (s *scene) prepareAll(t *testing.T, rng *rand.Rand) ([]*blktest.CrashDisk, qcow2.Options) {
	t.Helper()
	if s.o.DataFile == "" {
		disk, base := s.prepare(t, rng)
		return []*blktest.CrashDisk{disk}, qcow2.Options{Backing: base}
	}
	disks := []*blktest.CrashDisk{blktest.NewCrashDisk(0), blktest.NewCrashDisk(0)}
	s.o.Data = disks[1]
	if err := qcow2.Create(blk.NewTask(), disks[0], s.o); err != nil {
		t.Fatal(err)
	}
	for _, d := range disks {
		do(t, d, &blk.Request{Op: blk.OpFlush})
	}
	return disks, qcow2.Options{}
}

// died looks at what the death of the program at a moment leaves, and what a power cut does.
func (s *storm) died(c *scene, rng *rand.Rand, o qcow2.Options, at int, start []byte) {
	t := s.t
	t.Helper()
	var killed, cut []*blktest.CrashDisk
	for i, d := range s.sky.disks {
		killed = append(killed, d.KilledAt(s.sky.moments[at][i]))
		cut = append(cut, d.CrashAt(s.sky.moments[at][i], rng))
	}
	of := func(disks []*blktest.CrashDisk) qcow2.Options {
		o := qcow2.Options{Backing: o.Backing}
		if len(disks) > 1 {
			o.Data = disks[1]
		}
		return o
	}
	if r := check(t, killed[0], qcow2.RepairNone); r.Errors > 0 {
		t.Fatalf("killed at %d: %+v", at, r)
	}
	got := contents(t, open(t, killed[0], of(killed)))
	s.h.holds(t, at, got, func(v version) bool { return v.acked <= at })
	c.cut(t, rng, s.h, cut[0], of(cut), at, start)
	if c.o.DataFileRaw {
		s.h.holds(t, at, killed[1].Bytes()[:len(got)], func(v version) bool { return v.acked <= at })
	}
}
