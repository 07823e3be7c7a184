// SPDX-License-Identifier: Apache-2.0

package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/mirror"
)

const (
	gran = 4096
	size = 64*gran + 512
)

var changing = []blk.Op{blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes}

// rig is a filter over two disks in memory, with a trap layer over each.
type rig struct {
	*testing.T
	n              *mirror.Node
	g              *blk.Graph
	source, target *blktest.Fault
	mem            [2]*blktest.Memory // source, target
	failures       atomic.Int64
}

func newNode(source, target blk.Node, gran int64, failed func(error)) *mirror.Node {
	n := mirror.New(source, mirror.NewState(nil, source.Info().Size, gran))
	n.To(target, failed)
	return n
}

func newRig(t *testing.T) *rig {
	r := &rig{T: t, mem: [2]*blktest.Memory{blktest.NewMemory(size), blktest.NewMemory(size + 8192)}}
	r.source, r.target = blktest.NewFault(r.mem[0]), blktest.NewFault(r.mem[1])
	r.n = newNode(r.source, r.target, gran, func(error) { r.failures.Add(1) })
	r.g = blk.NewGraph(r.n)
	return r
}

func (r *rig) mirror() {
	r.Helper()
	if err := r.n.Mirror(context.Background(), r.g); err != nil || !r.n.Mirroring() {
		r.Fatalf("Mirror: %v", err)
	}
}

func (r *rig) do(q *blk.Request) error { return blk.Do(blk.NewTask(), r.n, q) }

func (r *rig) must(q *blk.Request) {
	r.Helper()
	if err := r.do(q); err != nil {
		r.Fatal(err)
	}
}

func write(off int64, b []byte) *blk.Request {
	return &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

// same compares both images, block by block; dirty blocks may differ.
func (r *rig) same() {
	r.Helper()
	a, b := r.mem[0].Bytes(), r.mem[1].Bytes()
	for off := 0; off < size; off += gran {
		end := min(off+gran, size)
		if !bytes.Equal(a[off:end], b[off:end]) && !r.n.Dirty.Any(int64(off), 1) {
			r.Fatalf("source and target differ at %d, in a clean block", off)
		}
	}
}

func TestInfo(t *testing.T) {
	r := newRig(t)
	if in := r.n.Info(); in.Size != size || in.Kind != "mirror" {
		t.Errorf("info %+v", in)
	}
	if r.n.Source() != blk.Node(r.source) || r.n.Target() != blk.Node(r.target) || len(r.n.Children()) != 2 {
		t.Error("the children are not source and target")
	}
	if err := r.n.Do(blk.NewTask(), &blk.Request{Op: 99}); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("an unknown operation: %v", err)
	}
}

// Each change is logged, and one that fails too: it may have changed a part.
func TestLogged(t *testing.T) {
	for _, op := range changing {
		for _, fails := range []bool{false, true} {
			r := newRig(t)
			if fails {
				r.source.Add(blktest.Rule{Err: syscall.EIO})
			}
			q := &blk.Request{Op: op, Off: gran - 512, Len: gran + 1024}
			if op == blk.OpWrite {
				q = write(q.Off, fill(int(q.Len), 1))
			}
			if err := r.do(q); (err != nil) != fails {
				t.Fatalf("%v: %v", op, err)
			}
			if r.n.Dirty.Count() != 3 || !r.n.Dirty.Any(0, 1) || !r.n.Dirty.Any(2*gran, 1) {
				t.Errorf("%v, fails %v: %d dirty blocks, want the first three", op, fails, r.n.Dirty.Count())
			}
			if r.target.Count(op) != 0 {
				t.Errorf("%v reached the target", op)
			}
		}
	}
}

// The mark comes after the write: a copier that clears the bit and reads the old bytes meanwhile must find it again.
func TestLoggedAfterWrite(t *testing.T) {
	for _, op := range changing {
		r := newRig(t)
		r.must(write(0, fill(gran, 1)))
		trap := r.source.Add(blktest.Rule{Ops: []blk.Op{op}, Hold: true})
		q := &blk.Request{Op: op, Off: 0, Len: gran}
		if op == blk.OpWrite {
			q = write(0, fill(gran, 2))
		}
		done := make(chan error)
		go func() { done <- r.do(q) }()
		trap.Wait(t, 1)
		r.n.Dirty.Clear(0, gran)
		trap.Release()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if !r.n.Dirty.Any(0, gran) {
			t.Errorf("%v: the bit is clear after the write has ended", op)
		}
	}
}

// extents is a node that gives its range as an extent.
type extents struct {
	*blktest.Memory
	host blk.HostFile
	log  *blk.Bitmap
}

func (e *extents) TryMap(_ blk.Op, off, l int64) (blk.Extent, bool) {
	return blk.Extent{Len: l, Writable: true, Host: &e.host, HostOff: off, Log: e.log}, true
}

// faulting is an image into which a write gets half-way when guest memory goes away, which is a panic.
type faulting struct{ blk.Node }

func (f faulting) Do(t *blk.Task, r *blk.Request) error {
	half := *r
	half.Len /= 2
	half.Data = r.Data.AppendSlice(nil, 0, half.Len)
	if err := f.Node.Do(t, &half); err != nil {
		return err
	}
	panic("fault in guest memory")
}

// A logged write that ends in a panic, which the queue survives, has changed the source all the same.
func TestLoggedFault(t *testing.T) {
	r := newRig(t)
	n := newNode(faulting{r.mem[0]}, r.target, gran, func(error) {})
	func() {
		defer func() { _ = recover() }()
		_ = blk.Do(blk.NewTask(), n, write(gran, bytes.Repeat([]byte{1}, 1024)))
	}()
	if r.mem[0].Bytes()[gran] != 1 {
		t.Fatal("nothing was written")
	}
	if !n.Dirty.Any(gran, 1) {
		t.Error("the block is not dirty")
	}
}

func TestTryMap(t *testing.T) {
	source := &extents{Memory: blktest.NewMemory(size)}
	n := newNode(source, blktest.NewMemory(size), gran, func(error) {})
	e, ok := n.TryMap(blk.OpWrite, gran, gran)
	if !ok || e.Log != n.Dirty || e.Host != &source.host || e.HostOff != gran {
		t.Errorf("a logged write: %+v %v", e, ok)
	}
	if e, ok := n.TryMap(blk.OpRead, 0, gran); !ok || e.Host != &source.host {
		t.Errorf("a read: %+v %v", e, ok)
	}
	if e, ok := n.TryMap(blk.OpFlush, 0, 0); !ok || e.Host != &source.host {
		t.Errorf("a flush: %+v %v", e, ok)
	}
	for _, op := range []blk.Op{blk.OpDiscard, blk.OpWriteZeroes} {
		if _, ok := n.TryMap(op, 0, gran); ok {
			t.Errorf("%v takes the fast path", op)
		}
	}
	source.log = blk.NewBitmap(size, gran)
	if _, ok := n.TryMap(blk.OpWrite, 0, gran); ok {
		t.Error("two logs do not fit into an extent, but the fast path is open")
	}
	source.log = nil
	if err := n.Mirror(context.Background(), blk.NewGraph(n)); err != nil {
		t.Fatal(err)
	}
	for _, op := range append(changing, blk.OpFlush) {
		if _, ok := n.TryMap(op, 0, gran); ok {
			t.Errorf("a mirrored %v takes the fast path", op)
		}
	}
	if e, ok := n.TryMap(blk.OpRead, 0, gran); !ok || e.Host != &source.host {
		t.Errorf("a read while writes are mirrored: %+v %v", e, ok)
	}
}

// source is a guest that can be paused when its one request is not in flight.
type source struct {
	inFlight chan struct{} // holds one element while a request is in flight
	meter    blk.Meter
}

func (s *source) Pause(ctx context.Context) error {
	select {
	case s.inFlight <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
func (s *source) Resume()           { <-s.inFlight }
func (s *source) Barrier()          {}
func (s *source) Meter() *blk.Meter { return &s.meter }

// Mirrored writes begin with no logged write in flight.
func TestMirrorWaits(t *testing.T) {
	r := newRig(t)
	s := &source{inFlight: make(chan struct{}, 1)}
	r.g.Attach(s)
	trap := r.source.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true})
	s.inFlight <- struct{}{}
	done := make(chan error)
	go func() {
		err := r.do(write(0, fill(512, 1)))
		<-s.inFlight
		done <- err
	}()
	trap.Wait(t, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := r.n.Mirror(ctx, r.g); err == nil || r.n.Mirroring() {
		t.Errorf("mirrored writes begin (%v) while a logged write is in flight", err)
	}
	trap.Release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.mirror()
	if !r.n.Dirty.Any(0, 1) {
		t.Error("the write is not logged")
	}
}

// A mirrored write goes out of one private copy, whatever the guest does to its buffer, in pieces too.
func TestPrivateCopy(t *testing.T) {
	const big = 3<<20 + 512
	for _, held := range []string{"source", "target"} {
		mem := [2]*blktest.Memory{blktest.NewMemory(big), blktest.NewMemory(big)}
		f := [2]*blktest.Fault{blktest.NewFault(mem[0]), blktest.NewFault(mem[1])}
		n := newNode(f[0], f[1], gran, func(error) {})
		if err := n.Mirror(context.Background(), blk.NewGraph(n)); err != nil {
			t.Fatal(err)
		}
		side := 0
		if held == "target" {
			side = 1
		}
		trap := f[side].Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
		other := f[1-side].Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}})
		buf := fill(big, 1)
		done := make(chan error)
		go func() { done <- blk.Do(blk.NewTask(), n, write(0, buf)) }()
		trap.Wait(t, 1)
		other.Wait(t, 1)
		// The other side of the first piece is not waited for: it has its copy, or takes it from the same one.
		for i := range 1 << 20 {
			buf[i] = 2
		}
		trap.Release()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		a, b := mem[0].Bytes(), mem[1].Bytes()
		if !bytes.Equal(a, b) {
			t.Errorf("%s held: the images differ", held)
		}
		if a[0] != 1 || a[big-1] != 1 {
			t.Errorf("%s held: not what the guest wrote", held)
		}
	}
}

// Overlapping changes of any kind, many at once, end the same on both images.
func TestOverlapping(t *testing.T) {
	r := newRig(t)
	r.mirror()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(k)))
			buf := make([]byte, 8*gran)
			for i := range 400 {
				off := rng.Int64N(size/512) * 512
				l := min(512+rng.Int64N(16)*512, size-off)
				q := &blk.Request{Op: changing[rng.IntN(3)], Off: off, Len: l}
				if q.Op == blk.OpWrite {
					for j := range buf[:l] {
						buf[j] = byte(k*31 + i)
					}
					q.Data = blk.BytesVec(nil, buf[:l])
				}
				if err := r.do(q); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if r.n.Dirty.Count() != 0 {
		t.Errorf("%d dirty blocks", r.n.Dirty.Count())
	}
	r.same()
}

// An overlapping write waits for the earlier one on both sides.
func TestOrder(t *testing.T) {
	for _, second := range changing {
		r := newRig(t)
		r.mirror()
		trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
		done := make(chan error, 2)
		go func() { done <- r.do(write(0, fill(gran, 1))) }()
		trap.Wait(t, 1)
		q := &blk.Request{Op: second, Off: 512, Len: 512}
		if second == blk.OpWrite {
			q = write(512, fill(512, 2))
		}
		go func() { done <- r.do(q) }()
		// A write elsewhere is not held up.
		r.must(write(8*gran, fill(512, 3)))
		time.Sleep(5 * time.Millisecond) // what is wrongly not held back gets through
		trap.Release()
		for range 2 {
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		r.same()
	}
}

// A discard reads the same on both images afterwards, whatever each would make of it.
func TestMirroredZeroes(t *testing.T) {
	for _, op := range []blk.Op{blk.OpDiscard, blk.OpWriteZeroes} {
		r := newRig(t)
		r.mirror()
		r.must(write(0, fill(4*gran, 7)))
		r.must(&blk.Request{Op: op, Off: gran, Len: gran, Flags: blk.FUA})
		r.same()
		if r.source.Count(blk.OpDiscard)+r.target.Count(blk.OpDiscard) != 0 {
			t.Errorf("%v is passed on as a discard, which promises no contents", op)
		}
		if b := r.mem[1].Bytes(); b[gran] != 0 || b[gran-1] != 7 || b[2*gran] != 7 {
			t.Errorf("%v: wrong range", op)
		}
	}
}

// A target's error never fails the guest's request; the block is marked and the filter logs again.
func TestTargetError(t *testing.T) {
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		for _, op := range changing {
			r := newRig(t)
			r.mirror()
			r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpWriteZeroes}, Count: 1, Err: errno})
			q := &blk.Request{Op: op, Off: 2 * gran, Len: 2 * gran}
			if op == blk.OpWrite {
				q = write(2*gran, fill(2*gran, 1))
			}
			r.must(q)
			if r.n.Mirroring() || r.failures.Load() == 0 || r.n.Dirty.Count() != 2 || !r.n.Dirty.Any(2*gran, 2*gran) {
				t.Errorf("%v %v: mirroring %v, told %d times, %d dirty blocks", errno, op, r.n.Mirroring(), r.failures.Load(), r.n.Dirty.Count())
			}
			r.must(write(9*gran, fill(512, 1)))
			if r.n.Dirty.Count() != 3 {
				t.Error("the next write is not logged")
			}
			r.same()
		}
	}
}

// A source's error is the guest's. The target may be ahead, so the block is marked.
func TestSourceError(t *testing.T) {
	r := newRig(t)
	r.mirror()
	r.source.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Err: syscall.EIO})
	if err := r.do(write(0, fill(512, 1))); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
	if !r.n.Dirty.Any(0, 1) || !r.n.Mirroring() || r.failures.Load() != 0 {
		t.Error("the block is not marked, or the target is blamed")
	}
}

func TestFlush(t *testing.T) {
	flush := &blk.Request{Op: blk.OpFlush}
	r := newRig(t)
	r.must(flush)
	if r.source.Count(blk.OpFlush) != 1 || r.target.Count(blk.OpFlush) != 0 {
		t.Error("while writes are logged a flush is the source's alone")
	}
	r.mirror()
	r.must(flush)
	if r.source.Count(blk.OpFlush) != 2 || r.target.Count(blk.OpFlush) != 1 {
		t.Error("while writes are mirrored a flush goes to both")
	}
	r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: syscall.EIO})
	r.must(flush)
	if r.n.Mirroring() || r.n.Dirty.Count() != (size+gran-1)/gran || r.failures.Load() != 1 {
		t.Errorf("after a failed flush of the target: mirroring %v, %d dirty", r.n.Mirroring(), r.n.Dirty.Count())
	}
	r.source.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: syscall.EIO})
	if err := r.do(flush); !errors.Is(err, syscall.EIO) {
		t.Errorf("a failed flush of the source: %v", err)
	}
}

// A write that fails on the target just while others end well: each block is on both images or marked.
func TestRandomFailures(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := newRig(t)
	r.mirror()
	r.target.Add(blktest.Rule{Off: 17 * gran, Len: gran, After: 5, Count: 1, Err: syscall.EIO})
	var wg sync.WaitGroup
	for k := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(k)))
			for range 300 {
				off := rng.Int64N(60) * gran
				if err := r.do(write(off, fill(gran*(1+rng.IntN(4)), byte(rng.Int())))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	r.same()
}

type closer struct {
	*blktest.Memory
	closed int
}

func (c *closer) Close() error { c.closed++; return syscall.EIO }

func TestClose(t *testing.T) {
	a, b := &closer{Memory: blktest.NewMemory(size)}, &closer{Memory: blktest.NewMemory(size)}
	n := newNode(a, b, gran, func(error) {})
	if err := n.Close(); !errors.Is(err, syscall.EIO) || a.closed != 1 || b.closed != 1 {
		t.Errorf("close: %v, closed %d and %d times", err, a.closed, b.closed)
	}
}

// The filter in both modes is a disk like any other.
func TestConformance(t *testing.T) {
	for _, mirrored := range []bool{false, true} {
		name := map[bool]string{false: "Logged", true: "Mirrored"}[mirrored]
		t.Run(name, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				n := newNode(blktest.NewMemory(size), blktest.NewMemory(size), 64<<10, func(err error) { t.Error(err) })
				if mirrored {
					if err := n.Mirror(context.Background(), blk.NewGraph(n)); err != nil {
						t.Fatal(err)
					}
				}
				return n
			})
		})
	}
}
