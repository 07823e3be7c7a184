// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// history is what a disk held when. Sectors are written by one goroutine each, and clusters by several.
type history struct {
	points  func() int // the number of steps so far
	clock   atomic.Int64
	sectors [][]version

	mu      sync.Mutex
	flushes []flush
	grown   [][2]int // from and to which point the disk became larger
}

// version is what was written to a sector. It may be there after a power cut at a point from begin on.
type version struct {
	begin  int   // point of the disk
	end    int64 // by the clock: when the write had ended
	acked  int   // point of the disk when the write had ended
	forced int   // FUA: durable from this point on
	failed bool  // it may be there, or what was there before
	data   []byte
}

// flush is one that went well: what had ended before it began is durable from the point end on.
type flush struct {
	begin int64
	end   int
}

func newHistory(points func() int, contents []byte) *history {
	h := &history{points: points}
	h.extend(contents)
	return h
}

func (h *history) extend(b []byte) {
	for i := 0; i < len(b); i += blk.SectorSize {
		h.sectors = append(h.sectors, []version{{end: -1, data: b[i : i+blk.SectorSize]}})
	}
}

// change carries out a request that changes the disk.
func (h *history) change(t *testing.T, n blk.Node, r *blk.Request, b []byte) {
	t.Helper()
	task := blk.NewTask()
	begin := h.points()
	if err := blk.Do(task, n, r); err != nil {
		t.Errorf("%v at %d: %v", r.Op, r.Off, err)
		return
	}
	if r.Op == blk.OpDiscard { // whatever it is now, that it stays
		err := blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: r.Off, Len: r.Len, Data: blk.BytesVec(nil, b)})
		if err != nil {
			t.Errorf("read at %d: %v", r.Off, err)
		}
	}
	h.add(r, b, version{begin: begin, end: h.clock.Add(1), acked: h.points()})
}

// add takes down what a request has changed.
func (h *history) add(r *blk.Request, b []byte, v version) {
	if r.Flags&blk.FUA != 0 {
		v.forced = v.acked
	}
	for i := 0; i < len(b); i += blk.SectorSize {
		v.data = b[i : i+blk.SectorSize]
		s := &h.sectors[(r.Off+int64(i))/blk.SectorSize]
		*s = append(*s, v)
	}
}

func (h *history) flush(t *testing.T, n blk.Node) {
	t.Helper()
	begin := h.clock.Add(1)
	if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}); err != nil {
		t.Errorf("flush: %v", err)
		return
	}
	f := flush{begin, h.points()}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.flushes = append(h.flushes, f)
}

// matches holds the disk after a power cut against the history: what is durable, or anything that came later.
func (h *history) matches(t *testing.T, at int, got []byte) {
	t.Helper()
	var flushed int64
	for _, f := range h.flushes {
		if f.end <= at {
			flushed = max(flushed, f.begin)
		}
	}
	h.holds(t, at, got, func(v version) bool { return v.end < flushed || v.forced > 0 && v.forced <= at })
}

// holds wants each sector to be what was written last of what is sure to be there, or anything that came later.
func (h *history) holds(t *testing.T, at int, got []byte, sure func(version) bool) {
	t.Helper()
	for i, versions := range h.sectors[:len(got)/blk.SectorSize] {
		b := got[i*blk.SectorSize:][:blk.SectorSize]
		ok := false
		for k := len(versions) - 1; k >= 0 && !ok; k-- {
			v := versions[k]
			ok = v.begin <= at && bytes.Equal(v.data, b)
			if !v.failed && sure(v) {
				break // what came before is gone
			}
		}
		if !ok {
			t.Fatalf("at %d of the disk's history: sector %d holds %x…, of %d versions", at, i, b[:8], len(versions))
		}
	}
}

// growing says whether the disk becomes larger at this point.
func (h *history) growing(at int) bool {
	return slices.ContainsFunc(h.grown, func(g [2]int) bool { return at >= g[0] && at <= g[1] })
}

// scene is an image and what is done to it while the power goes.
type scene struct {
	name      string
	o         qcow2.CreateOptions
	base      int64 // size of the backing file
	fill      bool  // beforehand
	packed    bool  // with compressed clusters
	snapshot  bool  // taken after that
	workers   int64
	ops       int // of each worker
	grow      int // this often, three times the size
	flushRate int // one operation of so many is a flush
	kinds     []kind
	// reached says whether the scene got to what it is about; nil: it always does.
	reached func(before, after *qcow2.Header) bool
}

func scenes() []scene {
	all := []kind{write, write, write, zero, unmap, discard, discard}
	return []scene{
		{name: "allocation", o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 512}, workers: 1, ops: 60, flushRate: 8, kinds: []kind{write}},
		{
			name: "many refcount blocks", o: qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 512, RefcountBits: 64},
			workers: 1, ops: 150, flushRate: 40, kinds: []kind{write},
		},
		// A refcount block has room for 64 counts, the table for 64 blocks: it grows at 2 MiB.
		{
			name:    "growth of the refcount table",
			o:       qcow2.CreateOptions{Size: 1960 << 10, ClusterSize: 512, RefcountBits: 64, Preallocation: "metadata"},
			workers: 1, ops: 140, grow: 1, flushRate: 20, kinds: []kind{write},
			reached: func(a, b *qcow2.Header) bool { return b.RefTableClusters > a.RefTableClusters },
		},
		{
			name: "growth of the L1 table", o: qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 512},
			fill: true, workers: 1, ops: 40, grow: 3, flushRate: 6, kinds: all,
			reached: func(a, b *qcow2.Header) bool { return b.L1Size > a.L1Size && b.L1Offset != a.L1Offset },
		},
		{
			name: "growth over a longer backing file", o: qcow2.CreateOptions{Size: 32 << 10, ClusterSize: 1024}, base: 300 << 10,
			workers: 1, ops: 30, grow: 2, flushRate: 10, kinds: all,
		},
		{
			name: "copies of a snapshot", o: qcow2.CreateOptions{Size: 300 << 10, ClusterSize: 4096, RefcountBits: 8},
			fill: true, snapshot: true, workers: 1, ops: 60, flushRate: 8, kinds: all,
		},
		{
			name: "copies of a snapshot in small clusters", o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 512, RefcountBits: 2},
			fill: true, snapshot: true, workers: 1, ops: 60, flushRate: 8, kinds: all,
		},
		{
			name: "discards and reuse", o: qcow2.CreateOptions{Size: 128 << 10, ClusterSize: 1024},
			fill: true, workers: 1, ops: 120, flushRate: 5, kinds: []kind{write, discard, unmap},
		},
		{
			name: "subclusters over a backing file", o: qcow2.CreateOptions{Size: 400 << 10, ClusterSize: 16 << 10, ExtendedL2: true}, base: 500 << 10,
			fill: true, workers: 1, ops: 80, flushRate: 8, kinds: all,
		},
		{
			name: "subclusters of a snapshot", o: qcow2.CreateOptions{Size: 300 << 10, ClusterSize: 16 << 10, ExtendedL2: true},
			fill: true, snapshot: true, workers: 1, ops: 60, flushRate: 8, kinds: all,
		},
		{
			name: "version 2 over a backing file", o: qcow2.CreateOptions{Size: 300 << 10, ClusterSize: 4096, Version: 2}, base: 100 << 10,
			fill: true, workers: 1, ops: 80, flushRate: 8, kinds: all,
		},
		{
			name: "lazy counts", o: qcow2.CreateOptions{Size: 200 << 10, ClusterSize: 2048, LazyRefcounts: true, RefcountBits: 1},
			fill: true, workers: 1, ops: 80, flushRate: 8, kinds: all,
		},
		{
			name: "compressed clusters", o: qcow2.CreateOptions{Size: 400 << 10, ClusterSize: 4096, Compression: "zstd"},
			packed: true, workers: 1, ops: 60, flushRate: 8, kinds: all,
		},
		{
			name: "compressed clusters of a snapshot", o: qcow2.CreateOptions{Size: 100 << 10, ClusterSize: 1024},
			packed: true, snapshot: true, workers: 1, ops: 60, flushRate: 8, kinds: all,
		},
		{
			name: "many at once", o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 4096},
			workers: 4, ops: 40, flushRate: 6, kinds: all,
		},
		{
			name: "many at once over a snapshot", o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 8192},
			fill: true, snapshot: true, workers: 4, ops: 40, flushRate: 6, kinds: all,
		},
		{
			name: "many at once in subclusters", o: qcow2.CreateOptions{Size: 512 << 10, ClusterSize: 32 << 10, ExtendedL2: true}, base: 512 << 10,
			workers: 4, ops: 40, flushRate: 6, kinds: all,
		},
	}
}

// prepare makes the image, durably on a disk, and its backing file.
func (s *scene) prepare(t *testing.T, rng *rand.Rand) (*blktest.CrashDisk, blk.Node) {
	t.Helper()
	var base blk.Node
	if s.base > 0 {
		b := make([]byte, s.base)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		base = memoryOf(t, b)
		s.o.BackingFile, s.o.BackingFormat = "base", "raw"
	}
	image := blktest.NewMemory(0)
	if err := qcow2.Create(blk.NewTask(), image, s.o); err != nil {
		t.Fatal(err)
	}
	n := qcow2.ReserveLittle(open(t, image, qcow2.Options{Backing: base}))
	if s.packed {
		s.pack(t, rng, n)
	}
	if s.fill {
		next := int64(0)
		for range 30 {
			r, _ := change(rng, &next, s.o.Size, s.o.ClusterSize, []kind{write, write, zero})
			do(t, n, r)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if s.snapshot {
		takeSnapshot(t, image)
	}
	b := image.Bytes()
	disk := blktest.NewCrashDisk(int64(len(b)))
	do(t, disk, &blk.Request{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	do(t, disk, &blk.Request{Op: blk.OpFlush})
	return disk, base
}

// pack writes compressed clusters, of which several fit into one.
func (s *scene) pack(t *testing.T, rng *rand.Rand, n *qcow2.Node) {
	t.Helper()
	for off := int64(0); off < s.o.Size; off += s.o.ClusterSize {
		b := make([]byte, min(s.o.ClusterSize, s.o.Size-off))
		for i := range b[:rng.IntN(len(b))] {
			b[i] = byte(rng.Uint32())
		}
		if err := n.WriteCompressed(blk.NewTask(), off, b); err != nil {
			t.Fatal(err)
		}
	}
}

// TestPowerCuts cuts the power before and after every I/O of the image's file. Whatever the disk made of its cache, the
// image has no errors, and holds what it must.
func TestPowerCuts(t *testing.T) {
	for _, s := range scenes() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			rng := blktest.Rand(t)
			disk, base := s.prepare(t, rng)
			n := qcow2.ReserveLittle(open(t, disk, qcow2.Options{Backing: base}))
			first := disk.Points()
			start, before := contents(t, n), n.Header()
			h := newHistory(disk.Points, start)
			s.play(t, rng, h, n)
			if s.reached != nil && !s.reached(before, n.Header()) {
				t.Error("it did not come to that")
			}
			if t.Failed() {
				return
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			step, samples := 1, 3
			if testing.Short() {
				step = 7
			}
			if len(disk.Bytes()) > 1<<20 {
				samples = 1
			}
			for at := first; at <= disk.Points(); at++ {
				many := samples // what is left of a moment differs
				switch {
				case h.growing(at):
					many = 20 // a table moves in few steps
				case (at-first)%step > 0:
					continue
				}
				for range many {
					s.cut(t, rng, h, disk.CrashAt(at, rng), qcow2.Options{Backing: base}, at, start)
				}
			}
			t.Logf("%d points", disk.Points()-first)
			if r := check(t, disk, qcow2.RepairNone); r.Errors+r.Leaks > 0 {
				t.Errorf("after all, and closed: %+v", r)
			}
		})
	}
}

// play carries out the scene. Each worker has stripes of the disk.
func (s *scene) play(t *testing.T, rng *rand.Rand, h *history, n *qcow2.Node) {
	const stripe = 3 * blk.SectorSize
	var wg sync.WaitGroup
	for w := range s.workers {
		rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
		wg.Go(func() {
			next := int64(0)
			for i := range s.ops {
				if s.grow > 0 && i%(s.ops/s.grow) == s.ops/s.grow/2 {
					old, begin := n.Info().Size, h.points()
					if err := n.Resize(blk.NewTask(), old*3, false); err != nil {
						t.Errorf("resize: %v", err)
						return
					}
					h.grown = append(h.grown, [2]int{begin, h.points()})
					h.extend(make([]byte, 2*old))
				}
				if rng.IntN(s.flushRate) == 0 {
					h.flush(t, n)
					continue
				}
				size := n.Info().Size
				r, b := change(rng, &next, size, s.o.ClusterSize, s.kinds)
				if s.workers > 1 {
					r.Off = (r.Off/stripe/s.workers*s.workers + w) * stripe
					if r.Off >= size {
						continue
					}
					r.Len = min(r.Len, stripe, size-r.Off)
					b = b[:r.Len]
					if r.Op == blk.OpWrite {
						r.Data = blk.BytesVec(nil, b)
					}
				}
				h.change(t, n, r, b)
			}
		})
	}
	wg.Wait()
}

// cut looks at what a power cut left. start is what the disk held at first, and its snapshot does.
func (s *scene) cut(t *testing.T, rng *rand.Rand, h *history, left *blktest.CrashDisk, o qcow2.Options, at int, start []byte) {
	t.Helper()
	if r := check(t, left, qcow2.RepairNone); r.Errors > 0 {
		t.Fatalf("cut at %d: %+v", at, r)
	}
	if s.o.DataFile == "" && rng.IntN(100) == 0 {
		checkWithQEMU(t, left.Bytes())
	}
	if s.snapshot && rng.IntN(10) == 0 {
		if !bytes.Equal(snapshotOf(t, left.Bytes(), o.Backing), start) {
			t.Fatalf("cut at %d: the snapshot changed", at)
		}
	}
	n := open(t, left, o)
	h.matches(t, at, contents(t, n))
	if rng.IntN(8) > 0 {
		return
	}
	// It goes on as if nothing had been: what is given out now belongs to nobody else.
	b := bytes.Repeat([]byte{0xa5}, blk.SectorSize)
	for off := int64(0); off < n.Info().Size; off += 7 * blk.SectorSize {
		do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: blk.SectorSize, Data: blk.BytesVec(nil, b)})
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if r := check(t, left, qcow2.RepairLeaks); r.Errors+r.Leaks > 0 {
		t.Fatalf("cut at %d, written, leaks repaired: %+v", at, r)
	}
	if s.snapshot && !bytes.Equal(snapshotOf(t, left.Bytes(), o.Backing), start) {
		t.Fatalf("cut at %d, written: the snapshot changed", at)
	}
}

// pair is a disk and another one, of which one step at a time is done. It notes how far both were after each.
type pair struct {
	*blktest.CrashDisk
	steps *[][2]int
	disks *[2]*blktest.CrashDisk
}

func (p pair) Do(t *blk.Task, r *blk.Request) error {
	defer p.note()
	return p.CrashDisk.Do(t, r)
}

func (p pair) Resize(t *blk.Task, size int64, shrink bool) error {
	defer p.note()
	return p.CrashDisk.Resize(t, size, shrink)
}

func (p pair) note() { *p.steps = append(*p.steps, [2]int{p.disks[0].Points(), p.disks[1].Points()}) }

// TestPowerCutsDataFile: the image's file and the data file each lose their own part.
func TestPowerCutsDataFile(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 4096},
		{ClusterSize: 16 << 10, ExtendedL2: true},
		{ClusterSize: 512, DataFileRaw: true},
		{ClusterSize: 2048, LazyRefcounts: true},
	} {
		t.Run(fmt.Sprintf("cluster=%d,extended=%v,raw=%v,lazy=%v", o.ClusterSize, o.ExtendedL2, o.DataFileRaw, o.LazyRefcounts), func(t *testing.T) {
			t.Parallel()
			rng := blktest.Rand(t)
			o.Size, o.DataFile = 200<<10, "data"
			disks := [2]*blktest.CrashDisk{blktest.NewCrashDisk(0), blktest.NewCrashDisk(0)}
			o.Data = disks[1]
			if err := qcow2.Create(blk.NewTask(), disks[0], o); err != nil {
				t.Fatal(err)
			}
			steps := [][2]int{{disks[0].Points(), disks[1].Points()}}
			n := qcow2.ReserveLittle(open(t, pair{disks[0], &steps, &disks}, qcow2.Options{Data: pair{disks[1], &steps, &disks}}))
			h := newHistory(func() int { return len(steps) - 1 }, contents(t, n))
			next := int64(0)
			for range 100 {
				if rng.IntN(7) == 0 {
					h.flush(t, n)
					continue
				}
				r, b := change(rng, &next, o.Size, o.ClusterSize, []kind{write, write, write, zero, unmap, discard})
				h.change(t, n, r, b)
			}
			if err := n.Close(); err != nil {
				t.Fatal(err)
			}
			for at, p := range steps {
				left := [2]*blktest.CrashDisk{disks[0].CrashAt(p[0], rng), disks[1].CrashAt(p[1], rng)}
				if r := check(t, left[0], qcow2.RepairNone); r.Errors > 0 {
					t.Fatalf("cut at %d: %+v", at, r)
				}
				n := open(t, left[0], qcow2.Options{Data: left[1], ReadOnly: true})
				h.matches(t, at, contents(t, n))
				if o.DataFileRaw {
					h.matches(t, at, left[1].Bytes()[:o.Size])
				}
			}
		})
	}
}

// TestPowerCutsSetBacking: the header names the old backing file or the new one, and no backing file only when the
// image holds everything.
func TestPowerCutsSetBacking(t *testing.T) {
	rng := blktest.Rand(t)
	const size = 64 << 10
	base := memoryOf(t, bytes.Repeat([]byte{0xb5}, size))
	for _, cluster := range []int64{2048, 16 << 10} {
		disk := blktest.NewCrashDisk(0)
		names := []string{"base", strings.Repeat("longer/", 40), "x", strings.Repeat("y", 1000), "base", ""}
		o := qcow2.CreateOptions{Size: size, ClusterSize: cluster, BackingFile: names[0], BackingFormat: "raw"}
		if err := qcow2.Create(blk.NewTask(), disk, o); err != nil {
			t.Fatal(err)
		}
		n := qcow2.ReserveLittle(open(t, disk, qcow2.Options{Backing: base}))
		data := bytes.Repeat([]byte{0xda}, size)
		do(t, n, &blk.Request{Op: blk.OpWrite, Len: size, Data: blk.BytesVec(nil, data)})
		for i, name := range names[1:] {
			var to blk.Node
			format := ""
			if name != "" {
				to, format = base, "raw"
			}
			first := disk.Points()
			if err := n.SetBacking(blk.NewTask(), to, name, format); err != nil {
				t.Fatal(err)
			}
			if i == 0 && disk.Points()-first < 2 {
				t.Fatalf("%d steps", disk.Points()-first)
			}
			for at := first; at <= disk.Points(); at++ {
				for range 20 {
					left := disk.CrashAt(at, rng)
					h, err := qcow2.ReadHeader(blk.NewTask(), left)
					if err != nil {
						t.Fatalf("to %q, cut at %d: %v", name, at, err)
					}
					if h.BackingFile != names[i] && h.BackingFile != name || at == disk.Points() && h.BackingFile != name ||
						(h.BackingFile != "") != (h.BackingFormat == "raw") {
						t.Fatalf("clusters of %d, from %.9q to %.9q, cut at %d of %d to %d: %.9q of %d bytes, format %q", cluster, names[i], name, at, first,
							disk.Points(), h.BackingFile, len(h.BackingFile), h.BackingFormat)
					}
					if r := check(t, left, qcow2.RepairNone); r.Errors > 0 {
						t.Fatalf("to %q, cut at %d: %+v", name, at, r)
					}
					if h.BackingFile != "" {
						continue
					}
					if !bytes.Equal(contents(t, open(t, left, qcow2.Options{ReadOnly: true})), data) {
						t.Fatalf("cut at %d: the backing file is gone before the data was there", at)
					}
				}
			}
			// So that the next change has something to make durable.
			for j := range data {
				data[j]++
			}
			do(t, n, &blk.Request{Op: blk.OpDiscard, Len: size})
			do(t, n, &blk.Request{Op: blk.OpWrite, Len: size, Data: blk.BytesVec(nil, data)})
		}
	}
}
