// SPDX-License-Identifier: Apache-2.0

package cor_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/loop/looptest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

const (
	cluster = 64 << 10
	size    = 24*cluster + 17*512
)

// rig is the filter over a qcow2 image whose backing image is a disk in memory, with a trap over the latter.
type rig struct {
	*testing.T
	n        *cor.Node
	top      *qcow2.Node
	storage  *blktest.Fault // of the top
	base     *blktest.Fault
	mem      *blktest.Memory // under base
	failures atomic.Int64
}

// pattern is never zero, and different in each sector.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i/512*7+i%509) | 1
	}
	return b
}

func newRig(t *testing.T, o qcow2.CreateOptions, contents []byte) *rig {
	t.Helper()
	r := &rig{T: t, mem: blktest.NewMemory(int64(len(contents)))}
	must(t, blk.Do(blk.NewTask(), r.mem, write(0, contents)))
	r.base = blktest.NewFault(r.mem)
	r.open(o, blktest.NewMemory(0), r.base)
	return r
}

// open makes the top image in storage, over backing.
func (r *rig) open(o qcow2.CreateOptions, storage, backing blk.Node) {
	r.Helper()
	task := blk.NewTask()
	o.BackingFile, o.BackingFormat = "base", "raw"
	if o.Size == 0 {
		o.Size = size
	}
	must(r, qcow2.Create(task, storage, o))
	r.storage = blktest.NewFault(storage)
	_, r.storage.Transparent = storage.(*file.Node)
	var err error
	r.top, err = qcow2.Open(task, r.storage, qcow2.Options{Name: "top", Backing: backing})
	must(r, err)
	r.n = cor.New(r.top, r.top.Header().ClusterSize(), func(error) { r.failures.Add(1) })
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(off int64, b []byte) *blk.Request {
	return &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

func (r *rig) read(off, l int64) ([]byte, error) {
	b := make([]byte, l)
	return b, blk.Do(blk.NewTask(), r.n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, b)})
}

func (r *rig) mustRead(off int64, want []byte) {
	r.Helper()
	got, err := r.read(off, int64(len(want)))
	must(r, err)
	if !bytes.Equal(got, want) {
		r.Fatalf("wrong contents in [%d, +%d)", off, len(want))
	}
}

func (r *rig) must(q *blk.Request) {
	r.Helper()
	must(r, blk.Do(blk.NewTask(), r.n, q))
}

// held says whether the top holds all of a range itself.
func (r *rig) held(off, l int64) bool {
	r.Helper()
	for end := off + l; off < end; {
		e, err := r.top.Map(blk.NewTask(), off, end-off)
		must(r, err)
		if e.Depth > 0 {
			return false
		}
		off += e.Len
	}
	return true
}

// alone reads the top without what is behind it.
func (r *rig) alone() []byte {
	r.Helper()
	must(r, r.top.SetBacking(blk.NewTask(), nil, "", ""))
	b := make([]byte, r.top.Info().Size)
	must(r, blk.Do(blk.NewTask(), r.top, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}))
	return b
}

// What was read is in the top, in whole clusters, and is not fetched again.
func TestCopies(t *testing.T) {
	want := pattern(size)
	r := newRig(t, qcow2.CreateOptions{}, want)
	r.mustRead(3*cluster+100, want[3*cluster+100:][:5000])
	if !r.held(3*cluster, cluster) || r.held(2*cluster, cluster) || r.held(4*cluster, cluster) {
		t.Error("not exactly the cluster that was read is in the top")
	}
	fetched := r.base.Count(blk.OpRead)
	r.mustRead(3*cluster, want[3*cluster:4*cluster])
	if r.base.Count(blk.OpRead) != fetched {
		t.Error("the cluster is fetched again")
	}
	r.mustRead(0, want)
	if !r.held(0, size) {
		t.Error("all was read and not all is in the top")
	}
	if !bytes.Equal(r.alone(), want) {
		t.Error("the top alone reads otherwise")
	}
	must(t, r.n.Close())
}

// Many readers of a cluster fetch it once.
func TestFetchedOnce(t *testing.T) {
	want := pattern(size)
	r := newRig(t, qcow2.CreateOptions{}, want)
	trap := r.base.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Count: 1, Hold: true})
	var wg sync.WaitGroup
	for k := range int64(8) {
		wg.Go(func() { r.mustRead(cluster+k*512, want[cluster+k*512:][:4096]) })
	}
	trap.Wait(t, 1)
	time.Sleep(5 * time.Millisecond) // what is wrongly not held back reads too
	trap.Release()
	wg.Wait()
	if n := r.base.Count(blk.OpRead); n != 1 {
		t.Errorf("the base was read %d times", n)
	}
}

// Rule 3: a change that comes while a cluster is copied is not lost, whether it is in the cluster's part that was read or
// in another one.
func TestChangeWhileCopied(t *testing.T) {
	for _, op := range []blk.Op{blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard} {
		r := newRig(t, qcow2.CreateOptions{}, pattern(size))
		trap := r.base.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Count: 1, Hold: true})
		done := make(chan error, 2)
		go func() {
			_, err := r.read(cluster, 512)
			done <- err
		}()
		trap.Wait(t, 1)
		q := &blk.Request{Op: op, Off: cluster, Len: cluster}
		if op == blk.OpWrite {
			q = write(cluster+512, bytes.Repeat([]byte{2}, 1024))
		}
		go func() { done <- blk.Do(blk.NewTask(), r.n, q) }()
		// A change elsewhere is not held up.
		r.must(write(9*cluster, bytes.Repeat([]byte{3}, cluster)))
		time.Sleep(5 * time.Millisecond) // what is wrongly not held back gets through
		trap.Release()
		must(t, <-done)
		must(t, <-done)
		want := pattern(size)[cluster : 2*cluster]
		switch op {
		case blk.OpWrite:
			copy(want[512:], bytes.Repeat([]byte{2}, 1024))
		default:
			clear(want)
		}
		r.mustRead(cluster, want)
	}
}

// The other order: what a write under way brings into the top is not fetched by the read that waited for it.
func TestCopyWhileChanged(t *testing.T) {
	r := newRig(t, qcow2.CreateOptions{}, pattern(size))
	trap := r.storage.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
	data := bytes.Repeat([]byte{2}, cluster)
	done := make(chan error)
	go func() { done <- blk.Do(blk.NewTask(), r.n, write(cluster, data)) }()
	trap.Wait(t, 1)
	read := make(chan []byte)
	go func() {
		b, err := r.read(cluster, cluster)
		if err != nil {
			t.Error(err)
		}
		read <- b
	}()
	time.Sleep(5 * time.Millisecond)
	trap.Release()
	must(t, <-done)
	if !bytes.Equal(<-read, data) {
		t.Error("the read got what was there before the write that it waited for")
	}
	if n := r.base.Count(blk.OpRead); n != 0 {
		t.Errorf("the base was read %d times, for a cluster that was written whole", n)
	}
	r.mustRead(cluster, data)
}

// Zeros that are found become zero clusters, which take no space.
func TestZeroes(t *testing.T) {
	want := pattern(size)
	clear(want[2*cluster : 5*cluster])
	r := newRig(t, qcow2.CreateOptions{}, want)
	// As an image behind it that stores zeros as data.
	r.n = cor.New(opaque{r.top}, cluster, func(err error) { t.Error(err) })
	r.mustRead(0, want)
	for c := int64(2); c < 5; c++ {
		e, err := r.top.Map(blk.NewTask(), c*cluster, cluster)
		must(t, err)
		if e.Depth != 0 || e.State != blk.Zero {
			t.Errorf("cluster %d: %+v", c, e)
		}
	}
	if !bytes.Equal(r.alone(), want) {
		t.Error("the top alone reads otherwise")
	}
}

// opaque says of all that lies behind the top that it is data.
type opaque struct{ *qcow2.Node }

func (n opaque) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	e, err := n.Node.Map(t, off, l)
	if e.Depth > 0 {
		e.State = blk.Data
	}
	return e, err
}

func TestTryMap(t *testing.T) {
	contents := pattern(size)
	clear(contents[5*cluster : 6*cluster])
	r := newRig(t, qcow2.CreateOptions{}, contents)
	r.base.Transparent = true
	f := openFile(t)
	r.open(qcow2.CreateOptions{}, f, r.base)
	r.must(write(cluster, bytes.Repeat([]byte{1}, cluster)))
	r.must(&blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: 2 * cluster, Len: cluster})
	if e, ok := r.n.TryMap(blk.OpRead, cluster, cluster); !ok || e.Host == nil || e.Len != cluster {
		t.Errorf("a read of what the top holds: %+v %v", e, ok)
	}
	if e, ok := r.n.TryMap(blk.OpWrite, cluster, cluster); !ok || !e.Writable {
		t.Errorf("a write of what the top holds: %+v %v", e, ok)
	}
	if e, ok := r.n.TryMap(blk.OpRead, 2*cluster, cluster); !ok || e.State != blk.Zero {
		t.Errorf("a read of zeros in the top: %+v %v", e, ok)
	}
	if _, ok := r.n.TryMap(blk.OpWrite, 3*cluster, cluster); ok {
		t.Error("a write of what the top does not hold takes the fast path")
	}
	if e, ok := cor.New(behind{r.top, blk.Data}, cluster, nil).TryMap(blk.OpRead, 0, cluster); ok {
		t.Errorf("a read of data behind the top takes the fast path: %+v", e)
	}
	if e, ok := cor.New(behind{r.top, blk.Zero}, cluster, nil).TryMap(blk.OpRead, 0, cluster); !ok || e.State != blk.Zero {
		t.Errorf("a read of zeros behind the top: %+v %v", e, ok)
	}
	if _, ok := r.n.TryMap(blk.OpFlush, 0, 0); !ok {
		t.Error("a flush takes the slow path")
	}
	must(t, r.n.Close())
}

// behind maps everything to a place behind the top.
type behind struct {
	*qcow2.Node
	state blk.State
}

func (n behind) TryMap(_ blk.Op, _, l int64) (blk.Extent, bool) {
	return blk.Extent{Len: l, State: n.state, Depth: 1}, true
}

// A copy that cannot be written never fails the read; it is counted and told, and tried again the next time.
func TestWriteError(t *testing.T) {
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		want := pattern(size)
		r := newRig(t, qcow2.CreateOptions{}, want)
		trap := r.storage.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpFlush}, Err: errno})
		r.mustRead(100, want[100:][:3*cluster])
		if r.failures.Load() == 0 || r.n.Failures() != r.failures.Load() {
			t.Errorf("%d failures told, %d counted", r.failures.Load(), r.n.Failures())
		}
		if r.held(0, 1) {
			t.Error("the top has the cluster that could not be written")
		}
		var werr *cor.WriteError
		if err := r.n.Pull(blk.NewTask(), 0, cluster, 0); !errors.As(err, &werr) || !errors.Is(err, errno) {
			t.Errorf("a pull: %v", err)
		}
		trap.Remove()
		r.mustRead(0, want)
		if !r.held(0, size) {
			t.Error("with room again, not all that was read is in the top")
		}
	}
}

// A part of a cluster that cannot be read fails nobody who does not read it.
func TestReadError(t *testing.T) {
	want := pattern(size)
	r := newRig(t, qcow2.CreateOptions{}, want)
	r.base.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Off: cluster + 4096, Len: 512, Err: syscall.EIO})
	r.mustRead(cluster, want[cluster:][:4096])
	if r.failures.Load() != 1 {
		t.Errorf("%d failures told", r.failures.Load())
	}
	if _, err := r.read(cluster+4096, 512); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read of what cannot be read: %v", err)
	}
	err := r.n.Pull(blk.NewTask(), 0, size, 0)
	var werr *cor.WriteError
	if !errors.Is(err, syscall.EIO) || errors.As(err, &werr) {
		t.Errorf("a pull: %v", err)
	}
}

// Pull leaves what the images behind the depth hold, and stores the zeros that hide it.
func TestPullAboveBase(t *testing.T) {
	for _, version := range []int{2, 3} {
		want := pattern(size)
		task := blk.NewTask()
		r := newRig(t, qcow2.CreateOptions{}, want)
		// base <- middle <- top; the middle holds zeros in cluster 1, data in clusters 2 and 3.
		middle := r.top
		for _, q := range []*blk.Request{
			{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: cluster, Len: cluster},
			write(2*cluster, bytes.Repeat([]byte{5}, 2*cluster)),
		} {
			must(t, blk.Do(task, middle, q))
		}
		clear(want[cluster : 2*cluster])
		copy(want[2*cluster:], bytes.Repeat([]byte{5}, 2*cluster))
		storage := blktest.NewMemory(0)
		must(t, qcow2.Create(task, storage, qcow2.CreateOptions{Size: size, Version: version, BackingFile: "middle", BackingFormat: "qcow2"}))
		top, err := qcow2.Open(task, storage, qcow2.Options{Name: "top", Backing: middle})
		must(t, err)
		r.top, r.n = top, cor.New(top, cluster, func(err error) { t.Error(err) })
		read := r.base.Count(blk.OpRead)
		must(t, r.n.Pull(task, 0, size, 2))
		if r.base.Count(blk.OpRead) != read {
			t.Errorf("version %d: the base was read", version)
		}
		if !r.held(cluster, 3*cluster) || r.held(0, cluster) || r.held(4*cluster, cluster) {
			t.Errorf("version %d: not exactly the middle's clusters are in the top", version)
		}
		must(t, top.SetBacking(task, r.base, "base", "raw"))
		r.mustRead(0, want)
	}
}

// What lies past the end of a short image reads as zeros, and still does when only a longer one stays behind the top.
func TestPullShort(t *testing.T) {
	const short = 5*cluster + 7*512
	task := blk.NewTask()
	r := newRig(t, qcow2.CreateOptions{Size: short}, pattern(size))
	r.open(qcow2.CreateOptions{}, blktest.NewMemory(0), r.top)
	want := pattern(size)
	clear(want[short:])
	r.mustRead(0, want)
	must(t, r.n.Pull(task, 0, size, 2))
	must(t, r.top.SetBacking(task, r.base, "base", "raw"))
	r.mustRead(0, want)
}

// While zeros are stored, a write goes through Do: the top may give an extent before the zeros are in it.
func TestNoExtentWhileZeroing(t *testing.T) {
	r := newRig(t, qcow2.CreateOptions{Version: 2}, make([]byte, size))
	f := openFile(t)
	r.open(qcow2.CreateOptions{Version: 2}, f, r.base)
	r.must(write(3*cluster, bytes.Repeat([]byte{1}, cluster)))
	if _, ok := r.n.TryMap(blk.OpWrite, 3*cluster, 512); !ok {
		t.Fatal("no extent for what the top holds")
	}
	trap := r.storage.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
	done := make(chan error)
	go func() { done <- r.n.Pull(blk.NewTask(), 0, cluster, 9) }()
	trap.Wait(t, 1)
	if _, ok := r.n.TryMap(blk.OpWrite, 3*cluster, 512); ok {
		t.Error("an extent for writing while zeros are stored")
	}
	trap.Release()
	must(t, <-done)
	if _, ok := r.n.TryMap(blk.OpWrite, 0, 512); !ok {
		t.Error("no extent afterwards")
	}
	must(t, r.n.Close())
}

func openFile(t *testing.T) *file.Node {
	t.Helper()
	path := filepath.Join(t.TempDir(), "top.qcow2")
	must(t, os.WriteFile(path, nil, 0o600))
	f, err := file.Open(path, file.Options{Grows: true})
	must(t, err)
	return f
}

func TestResize(t *testing.T) {
	r := newRig(t, qcow2.CreateOptions{}, pattern(size))
	must(t, r.n.Resize(blk.NewTask(), size+10*cluster, false))
	if r.n.Info().Size != size+10*cluster || r.n.Info().Kind != "copy-on-read" {
		t.Errorf("after a resize: %+v", r.n.Info())
	}
	r.mustRead(size, make([]byte, 10*cluster))
}

// The filter is a disk like any other, over a chain of two qcow2 images, with whole clusters and with subclusters, and
// over a short one.
func TestConformance(t *testing.T) {
	for name, o := range map[string]qcow2.CreateOptions{
		"64k":         {},
		"512":         {ClusterSize: 512},
		"Version2":    {Version: 2},
		"Subclusters": {ExtendedL2: true},
		"2M":          {ClusterSize: 2 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			contents := pattern(blktest.DefaultSize)
			clear(contents[len(contents)*3/4:])
			clear(contents[cluster : 3*cluster])
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				below := newRig(t, qcow2.CreateOptions{Size: size, ClusterSize: 4096}, contents[:size*3/4/512*512])
				below.open(qcow2.CreateOptions{Size: size, ClusterSize: 4096}, blktest.NewMemory(0), below.mem) // without a trap, which allocates
				r := &rig{T: t}
				o := o
				o.Size = size
				r.open(o, openFile(t), below.top)
				t.Cleanup(func() {
					if r.failures.Load() > 0 {
						t.Errorf("%d copies failed", r.failures.Load())
					}
				})
				return r.n
			}, blktest.Options{Contents: contents})
		})
	}
}

// TestConformanceLoops runs in the coroutines of two queues, on one thread each: whoever waits otherwise than through
// its task stops them all.
func TestConformanceLoops(t *testing.T) {
	contents := pattern(blktest.DefaultSize)
	blktest.Run(t, func(t *testing.T, size int64) blk.Node {
		mem := blktest.NewMemory(size)
		must(t, blk.Do(blk.NewTask(), mem, write(0, contents)))
		r := &rig{T: t}
		r.open(qcow2.CreateOptions{Size: size, ClusterSize: 4096}, openFile(t), mem)
		return r.n
	}, blktest.Options{Align: 512, Contents: contents, Task: looptest.Tasks})
}

// guest does I/O as a queue does: on extents where it gets them, else through Do.
func guest(task *blk.Task, n blk.Node, q *blk.Request) error {
	if q.Op == blk.OpRead || q.Op == blk.OpWrite {
		if e, ok := n.TryMap(q.Op, q.Off, q.Len); ok && e.Len >= q.Len && e.Host != nil && e.State == blk.Data {
			if q.Op == blk.OpRead {
				return task.ReadAt(e.Host, q.Data, e.HostOff)
			}
			return task.WriteAt(e.Host, q.Data, e.HostOff, false)
		}
	}
	return blk.Do(task, n, q)
}

// Thousands of overlapping reads, writes, discards and pulls, against a model. In the first half of the disk each cluster
// has blocks of all workers; in the second half workers have whole clusters, for discards and zeros that are more than
// data.
func TestRace(t *testing.T) {
	for name, o := range map[string]qcow2.CreateOptions{
		"Clusters": {ClusterSize: 16 << 10}, "Subclusters": {ClusterSize: 32 << 10, ExtendedL2: true}, "Version2": {ClusterSize: 16 << 10, Version: 2},
	} {
		t.Run(name, func(t *testing.T) { race(t, o) })
	}
}

func race(t *testing.T, o qcow2.CreateOptions) {
	const (
		workers = 6
		block   = 1024
		total   = 96 * 32 << 10
		ops     = 1500
	)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	model := pattern(total)
	clear(model[total/8 : total/4])
	clear(model[total*5/8 : total*3/4])
	r := newRig(t, qcow2.CreateOptions{Size: total}, model)
	o.Size = total
	r.open(o, openFile(t), r.base)
	c := o.ClusterSize
	var wg sync.WaitGroup
	for k := range int64(workers) {
		wg.Go(func() {
			rng, task := rand.New(rand.NewPCG(seed, uint64(k))), blk.NewTask()
			for range ops {
				// A range of the worker's own.
				unit, from, to := int64(block), int64(0), int64(total/2)
				if rng.IntN(2) == 0 {
					unit, from, to = c, total/2, total
				}
				off := from + (rng.Int64N((to-from)/unit/workers)*workers+k)*unit
				l := unit
				if rng.IntN(2) == 0 {
					l = (1 + rng.Int64N(unit/512)) * 512
					off += rng.Int64N((unit-l)/512+1) * 512
				}
				part := model[off : off+l]
				b := make([]byte, l)
				q := &blk.Request{Off: off, Len: l, Data: blk.BytesVec(nil, b)}
				switch rng.IntN(8) {
				case 0, 1, 2:
					q.Op = blk.OpWrite
					for i := range b {
						b[i] = byte(rng.Uint32())
					}
				case 3:
					q.Op, q.Data = blk.OpWriteZeroes, nil
					q.Flags = blk.Flags(rng.IntN(2)) * blk.Unmap
				case 4:
					q.Op, q.Data = blk.OpDiscard, nil
				default:
					q.Op = blk.OpRead
				}
				if err := guest(task, r.n, q); err != nil {
					t.Error(err)
					return
				}
				switch q.Op {
				case blk.OpWrite:
					copy(part, b)
				case blk.OpWriteZeroes:
					clear(part)
				default:
					if q.Op == blk.OpDiscard {
						if err := guest(task, r.n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, b)}); err != nil {
							t.Error(err)
							return
						}
						for i := range b { // each byte is what it was or zero, and stays so
							if b[i] == 0 {
								part[i] = 0
							}
						}
					}
					if !bytes.Equal(b, part) {
						t.Errorf("worker %d: %v at %d: wrong contents in [%d, +%d)", k, q.Op, off, off, l)
						return
					}
				}
			}
		})
	}
	// Readers of everything, and a job.
	for k := range 3 {
		wg.Go(func() {
			rng, task := rand.New(rand.NewPCG(seed, uint64(100+k))), blk.NewTask()
			b := make([]byte, 5*c)
			for range ops / 10 {
				off := rng.Int64N(total-int64(len(b))) &^ 511
				var err error
				if k == 0 {
					err = r.n.Pull(task, off, c, uint16(rng.IntN(2)*9))
				} else {
					err = guest(task, r.n, &blk.Request{Op: blk.OpRead, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
				}
				if err != nil {
					t.Error(err)
				}
				time.Sleep(50 * time.Microsecond)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	r.mustRead(0, model)
	must(t, r.n.Pull(blk.NewTask(), 0, total, 0))
	if !bytes.Equal(r.alone(), model) {
		t.Error("the top alone reads otherwise")
	}
	if r.failures.Load() > 0 {
		t.Errorf("%d copies failed", r.failures.Load())
	}
	must(t, r.n.Close())
}
