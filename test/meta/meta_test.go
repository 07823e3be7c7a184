// SPDX-License-Identifier: Apache-2.0

// Package meta runs one list of random operations over different formats and settings. All must end with the same
// contents, whatever each does inside. A failure prints META_SEED; set it to run the same list again.
package meta

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/blk/raw"
)

// disk is one way to keep the contents.
type disk interface {
	// open opens the disk anew; the node is closed before.
	open(t *testing.T) blk.Node
	// look is what a tool does while the disk is closed.
	look(t *testing.T)
}

// rawDisk is a plain file.
type rawDisk struct{ path string }

func newRaw(t *testing.T, start []byte, size int64) disk {
	d := rawDisk{filepath.Join(t.TempDir(), "raw")}
	b := make([]byte, size)
	copy(b, start)
	if err := os.WriteFile(d.path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d rawDisk) open(t *testing.T) blk.Node {
	return raw.Open(openFile(t, d.path, file.Options{NoSync: true}))
}
func (d rawDisk) look(*testing.T) {}

// qcow2Disk is an image, perhaps with a backing file and a data file.
type qcow2Disk struct {
	path, data, base string
	direct           bool
	cache            int64 // bytes; 0: the default
}

func newQcow2(t *testing.T, start []byte, o qcow2.CreateOptions, set qcow2Disk) disk {
	dir := t.TempDir()
	d := set
	d.path = filepath.Join(dir, "image")
	create(t, d.path)
	if o.DataFile != "" {
		d.data = filepath.Join(dir, o.DataFile)
		create(t, d.data)
		o.Data = openFile(t, d.data, file.Options{NoSync: true, Grows: true})
	}
	if o.BackingFile != "" {
		d.base = filepath.Join(dir, o.BackingFile)
		if err := os.WriteFile(d.base, start, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f := openFile(t, d.path, file.Options{NoSync: true, Grows: true})
	err := qcow2.Create(blk.NewTask(), f, o)
	closeNode(t, f)
	if o.Data != nil {
		closeNode(t, o.Data)
	}
	if err != nil {
		t.Fatal(err)
	}
	if d.base == "" {
		n := d.open(t)
		defer closeNode(t, n)
		r := &blk.Request{Op: blk.OpWrite, Len: int64(len(start)), Data: blk.BytesVec(nil, start)}
		if err := blk.Do(blk.NewTask(), n, r); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func create(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func openFile(t *testing.T, path string, o file.Options) *file.Node {
	t.Helper()
	f, err := file.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func (d qcow2Disk) open(t *testing.T) blk.Node {
	t.Helper()
	o := qcow2.Options{Name: d.path}
	if d.cache > 0 {
		o.Cache = qcow2.NewCache(d.cache)
	}
	if d.data != "" {
		o.Data = openFile(t, d.data, file.Options{NoSync: true, Grows: true})
	}
	if d.base != "" {
		o.Backing = raw.Open(openFile(t, d.base, file.Options{ReadOnly: true}))
	}
	f := openFile(t, d.path, file.Options{NoSync: true, Grows: true, Direct: d.direct})
	n, err := qcow2.Open(blk.NewTask(), f, o)
	if err != nil {
		t.Fatal(err)
	}
	return withBase{n, o.Backing}
}

// withBase closes the backing file with the image.
type withBase struct {
	*qcow2.Node
	base blk.Node
}

func (w withBase) Close() error {
	err := w.Node.Close()
	if w.base != nil {
		err = w.base.Close()
	}
	return err
}

func (d qcow2Disk) look(t *testing.T) {
	t.Helper()
	f := openFile(t, d.path, file.Options{NoSync: true, Grows: true})
	defer closeNode(t, f)
	r, err := qcow2.Check(blk.NewTask(), f, qcow2.RepairNone)
	if err != nil || r.Errors+r.Leaks > 0 {
		t.Fatalf("check: %d errors, %d leaks, %v: %v", r.Errors, r.Leaks, err, r.Findings)
	}
}

func closeNode(t *testing.T, n blk.Node) {
	t.Helper()
	if err := n.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// step is one operation of the list. All of its requests are in flight at once; they do not overlap.
type step struct {
	reopen   bool
	grow     int64 // to this size
	requests []request
}

type request struct {
	op     blk.Op
	flags  blk.Flags
	off, n int64
	seed   uint64 // of what is written
}

// list makes up the operations.
func list(rng *rand.Rand, size int64, steps int) []step {
	const sector = blk.SectorSize
	var all []step
	for i := range steps {
		switch {
		case i%40 == 39:
			all = append(all, step{reopen: true})
			continue
		case i == steps/3 || i == 2*steps/3:
			size += (1 + rng.Int64N(size/sector)) * sector
			all = append(all, step{grow: size})
			continue
		}
		s := step{requests: batch(rng, size)}
		if rng.IntN(10) == 0 {
			s.requests = append(s.requests, request{op: blk.OpFlush})
		}
		all = append(all, s)
	}
	return all
}

// batch makes up to six requests, side by side: they meet in clusters, and do not overlap.
func batch(rng *rand.Rand, size int64) (all []request) {
	const sector = blk.SectorSize
	at := rng.Int64N(size/sector) * sector
	for range 1 + rng.IntN(6) {
		if at >= size {
			break
		}
		n := min((1+rng.Int64N(1<<rng.IntN(9)))*sector, size-at)
		r := request{off: at, n: n, seed: rng.Uint64()}
		switch rng.IntN(8) {
		case 0:
			r.op = blk.OpWriteZeroes
		case 1:
			r.op, r.flags = blk.OpWriteZeroes, blk.Unmap
		case 2: // contents are anybody's choice after a discard, so zeros follow
			r.op = blk.OpDiscard
		case 3:
			r.op, r.flags = blk.OpWrite, blk.FUA
		default:
			r.op = blk.OpWrite
		}
		all = append(all, r)
		at += n
		if rng.IntN(2) == 0 {
			at += rng.Int64N(32) * sector
		}
	}
	return all
}

// play carries out the list and returns what the disk holds in the end.
func play(t *testing.T, d disk, steps []step) []byte {
	t.Helper()
	n := d.open(t)
	for i, s := range steps {
		switch {
		case s.reopen:
			closeNode(t, n)
			d.look(t)
			n = d.open(t)
		case s.grow > 0:
			g, ok := n.(interface {
				Resize(t *blk.Task, size int64, shrink bool) error
			})
			if !ok {
				t.Fatalf("%T cannot grow", n)
			}
			if err := g.Resize(blk.NewTask(), s.grow, false); err != nil {
				t.Fatalf("step %d: %v", i, err)
			}
		}
		var wg sync.WaitGroup
		for _, r := range s.requests {
			wg.Go(func() {
				if err := do(n, r); err != nil {
					t.Errorf("step %d, %+v: %v", i, r, err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			t.FailNow()
		}
	}
	b := make([]byte, n.Info().Size)
	err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	if err != nil {
		t.Fatal(err)
	}
	closeNode(t, n)
	d.look(t)
	return b
}

// data is what a write writes.
func (r request) data() []byte {
	b := make([]byte, r.n)
	rng := rand.New(rand.NewPCG(r.seed, 0))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func do(n blk.Node, r request) error {
	task := blk.NewTask()
	q := &blk.Request{Op: r.op, Flags: r.flags, Off: r.off, Len: r.n}
	if r.op == blk.OpWrite {
		q.Data = blk.BytesVec(nil, r.data())
	}
	if err := blk.Do(task, n, q); err != nil || r.op != blk.OpDiscard {
		return err
	}
	return blk.Do(task, n, &blk.Request{Op: blk.OpWriteZeroes, Off: r.off, Len: r.n})
}

// anySeed is META_SEED, or a new one.
func anySeed() uint64 {
	if s, err := strconv.ParseUint(os.Getenv("META_SEED"), 10, 64); err == nil {
		return s
	}
	return uint64(time.Now().UnixNano())
}

func TestFormats(t *testing.T) {
	seed := anySeed()
	t.Logf("META_SEED=%d", seed)
	count := 400
	if testing.Short() {
		count = 120
	}
	const size = 3<<20 + 7*512
	rng := rand.New(rand.NewPCG(seed, 1))
	start := make([]byte, size/3/512*512)
	for i := range start {
		start[i] = byte(rng.Uint32())
	}
	steps := list(rng, size, count)
	want := play(t, newRaw(t, start, size), steps)

	for _, c := range []struct {
		o   qcow2.CreateOptions
		set qcow2Disk
	}{
		{o: qcow2.CreateOptions{}},
		{o: qcow2.CreateOptions{}, set: qcow2Disk{direct: true}},
		{o: qcow2.CreateOptions{Version: 2, ClusterSize: 4096}},
		{o: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64}, set: qcow2Disk{cache: 1}},
		{o: qcow2.CreateOptions{ClusterSize: 1024, RefcountBits: 1}, set: qcow2Disk{direct: true}},
		{o: qcow2.CreateOptions{ClusterSize: 2 << 20}},
		{o: qcow2.CreateOptions{ExtendedL2: true, ClusterSize: 16 << 10}},
		{o: qcow2.CreateOptions{ExtendedL2: true, ClusterSize: 128 << 10, BackingFile: "base", BackingFormat: "raw"}, set: qcow2Disk{cache: 1}},
		{o: qcow2.CreateOptions{ClusterSize: 8192, BackingFile: "base", BackingFormat: "raw"}},
		{o: qcow2.CreateOptions{Version: 2, BackingFile: "base", BackingFormat: "raw"}},
		{o: qcow2.CreateOptions{Preallocation: "metadata", ClusterSize: 4096}},
		{o: qcow2.CreateOptions{Preallocation: "falloc"}},
		{o: qcow2.CreateOptions{DataFile: "data"}},
		{o: qcow2.CreateOptions{DataFile: "data", ExtendedL2: true, ClusterSize: 32 << 10}},
		{o: qcow2.CreateOptions{DataFile: "data", DataFileRaw: true, ClusterSize: 4096}},
		{o: qcow2.CreateOptions{LazyRefcounts: true, ClusterSize: 2048}},
	} {
		o := c.o
		o.Size = size
		name := fmt.Sprintf("v%d,cluster=%d,refcount=%d,extended=%v,%s,base=%q,data=%q,raw=%v,lazy=%v,direct=%v,cache=%d", o.Version,
			o.ClusterSize, o.RefcountBits, o.ExtendedL2, o.Preallocation, o.BackingFile, o.DataFile, o.DataFileRaw, o.LazyRefcounts,
			c.set.direct, c.set.cache)
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := play(t, newQcow2(t, start, o, c.set), steps)
			if !bytes.Equal(got, want) {
				for i := range want {
					if got[i] != want[i] {
						t.Fatalf("META_SEED=%d: other bytes than raw from %#x on", seed, i)
					}
				}
			}
		})
	}
}
