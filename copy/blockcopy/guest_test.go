// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/raw"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/job"
)

// guest issues requests to a graph as a virtqueue does: on the fast way it does the host I/O by itself and marks the
// log afterwards, else it calls blk.Do; and it rests when the graph wants it to. Any number of goroutines may use it.
type guest struct {
	g     *blk.Graph
	meter blk.Meter
	fast  atomic.Int64 // writes on the fast way

	// If set, called in a fast write when it is mapped, and when its I/O has ended and it is not yet marked.
	mapped, written func(*blk.Request)

	mu     sync.Mutex
	cond   *sync.Cond
	pauses int
	flying int
}

func newGuest(t *testing.T, g *blk.Graph) *guest {
	q := &guest{g: g}
	q.cond = sync.NewCond(&q.mu)
	g.Attach(q)
	t.Cleanup(func() { g.Detach(q) })
	return q
}

func (q *guest) Pause(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.cond.Broadcast()
	})()
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pauses++
	for q.flying > 0 {
		if err := ctx.Err(); err != nil {
			q.pauses--
			q.cond.Broadcast()
			return err
		}
		q.cond.Wait()
	}
	return nil
}

func (q *guest) Resume() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pauses--
	q.cond.Broadcast()
}

// Barrier: these tests have no node that frees what extents point to.
func (q *guest) Barrier() {}

func (q *guest) Meter() *blk.Meter { return &q.meter }

func (q *guest) fly(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for n > 0 && q.pauses > 0 {
		q.cond.Wait()
	}
	q.flying += n
	q.cond.Broadcast()
}

func (q *guest) do(r *blk.Request) error {
	q.fly(1)
	defer q.fly(-1)
	start := time.Now()
	root := q.g.Root()
	done, err := q.tryFast(root, r)
	if !done {
		err = blk.Do(blk.NewTask(), root, r)
	}
	q.meter.Ops.Add(1)
	q.meter.Bytes.Add(uint64(r.Len))
	if q.meter.Timed.Load() {
		d := uint64(time.Since(start))
		q.meter.Nanos.Add(d)
		if d > q.meter.Slowest.Load() {
			q.meter.Slowest.Store(d)
		}
	}
	return err
}

func (q *guest) tryFast(root blk.Node, r *blk.Request) (bool, error) {
	kind := blk.IOWrite
	switch r.Op {
	case blk.OpWrite:
	case blk.OpRead:
		kind = blk.IORead
	case blk.OpFlush:
		e, ok := root.TryMap(r.Op, 0, 0)
		if !ok || e.Host == nil {
			return false, nil
		}
		var o blk.IO
		o.Reset(blk.IOSync, e.Host, 0, 0, nil, nil)
		o.Run()
		return true, o.Err
	default:
		return false, nil
	}
	if err := blk.Check(root.Info(), r); err != nil {
		return true, err
	}
	var ios []*blk.IO
	var log *blk.Bitmap
	for done := int64(0); done < r.Len; {
		e, ok := root.TryMap(r.Op, r.Off+done, r.Len-done)
		l := min(e.Len, r.Len-done)
		part := r.Data.AppendSlice(nil, done, l)
		if !ok || e.State != blk.Data || e.Host == nil || !e.Host.Fits(e.HostOff, part) || kind == blk.IOWrite && !e.Writable ||
			len(ios) > 0 && log != e.Log {
			return false, nil
		}
		log = e.Log
		o := &blk.IO{}
		o.Reset(kind, e.Host, e.HostOff, l, part, nil)
		o.FUA = r.Flags&blk.FUA != 0
		ios = append(ios, o)
		done += l
	}
	write := r.Op == blk.OpWrite
	if write {
		q.fast.Add(1)
	}
	if write && q.mapped != nil {
		q.mapped(r)
	}
	var err error
	for _, o := range ios {
		if o.Run(); o.Err != nil {
			err = o.Err
		}
	}
	if write && q.written != nil {
		q.written(r)
	}
	if write && log != nil {
		log.Set(r.Off, r.Len)
	}
	return true, err
}

// hooked lets a test look at the requests of a node, at its own risk.
type hooked struct {
	blk.Node
	before, after func(*blk.Request) error
}

func (h *hooked) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

func (h *hooked) Do(t *blk.Task, r *blk.Request) error {
	if h.before != nil {
		if err := h.before(r); err != nil {
			return err
		}
	}
	err := blk.Do(t, h.Node, r)
	if err == nil && h.after != nil {
		return h.after(r)
	}
	return err
}

// rig is a disk with a guest, and what a copy needs.
type rig struct {
	*testing.T
	g     *blk.Graph
	q     *guest
	store *job.Store
	m     *job.Manager
	setup blockcopy.Setup
	moved atomic.Bool // the switch is recorded
}

func newRig(t *testing.T, source, target blk.Node) *rig {
	t.Helper()
	store, err := job.OpenStore(memDir(t))
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := job.NewManager(store)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Shutdown)
	r := &rig{T: t, g: blk.NewGraph(source), store: store, m: m}
	r.q = newGuest(t, r.g)
	r.setup = blockcopy.Setup{
		Graph: r.g, Target: target, Blank: true, Hint: "change the configuration",
		Commit: func() error { r.moved.Store(true); return nil },
	}
	return r
}

// memRig is a rig over two disks in memory, with a fault filter over each.
func memRig(t *testing.T, contents []byte) (r *rig, source, target *blktest.Fault, mem [2]*blktest.Memory) {
	t.Helper()
	mem = [2]*blktest.Memory{blktest.NewMemory(int64(len(contents))), blktest.NewMemory(int64(len(contents)))}
	source, target = blktest.NewFault(mem[0]), blktest.NewFault(mem[1])
	put(t, mem[0], 0, contents)
	return newRig(t, source, target), source, target, mem
}

// start begins the copy with blocks of gran and a manual switch, changed by set.
func (r *rig) start(set func(*job.Record)) *job.Job {
	r.Helper()
	rec := job.Record{Kind: "copy", Disk: "vda", Source: "source.img", Target: "target.img", Options: job.Options{
		Method: "mirror", SwitchMode: "manual", Granularity: gran,
		OnSourceError: job.OnErrorReport, OnTargetError: job.OnErrorEnospc,
	}}
	if set != nil {
		set(&rec)
	}
	j, err := r.m.Start(rec, func(ctx context.Context, j *job.Job) error { return blockcopy.Run(ctx, j, r.setup) })
	if err != nil {
		r.Fatal(err)
	}
	return j
}

func auto(rec *job.Record) { rec.SwitchMode = "auto" }

func onTarget(policy string) func(*job.Record) {
	return func(rec *job.Record) { rec.OnTargetError, rec.OnSourceError = policy, policy }
}

// eventually waits for something else than the job.
func (r *rig) eventually(what string, ok func() bool) {
	r.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.Fatalf("waited for %s", what)
		}
	}
}

// until waits for the job to be as wanted.
func (r *rig) until(j *job.Job, what string, ok func(job.Record) bool) job.Record {
	r.Helper()
	timeout := time.After(20 * time.Second)
	for {
		changed := j.Changed()
		rec := j.Record()
		switch {
		case ok(rec):
			return rec
		case job.Ended(rec.State):
			r.Fatalf("waited for %s, the job has ended: %+v", what, rec)
		}
		select {
		case <-changed:
		case <-timeout:
			r.Fatalf("waited for %s: %+v", what, rec)
		}
	}
}

func (r *rig) state(j *job.Job, state string) job.Record {
	r.Helper()
	rec := r.until(j, state, func(rec job.Record) bool { return rec.State == state })
	if job.Ended(state) {
		<-j.Done()
	}
	return rec
}

func (r *rig) stage(j *job.Job, stage string) job.Record {
	r.Helper()
	return r.until(j, stage, func(rec job.Record) bool { return rec.Stage == stage })
}

// over waits for the switch.
func (r *rig) over(j *job.Job) {
	r.Helper()
	if j.Record().SwitchMode != "auto" {
		r.state(j, job.StateReady)
		if err := j.AskSwitch(); err != nil {
			r.Fatal(err)
		}
	}
	if rec := r.state(j, job.StateCompleted); rec.Error != "" || rec.Message != r.setup.Hint || !r.moved.Load() ||
		rec.BytesDone < rec.BytesTotal || rec.BytesTotal == 0 {
		r.Errorf("completed as %+v", rec)
	}
	r.g.View(func(root blk.Node) {
		if root != r.setup.Target {
			r.Errorf("the guest is on %s %s", root.Info().Kind, root.Info().Name)
		}
	})
}

// stays checks that the guest is on the source, without a filter.
func (r *rig) stays(source blk.Node) {
	r.Helper()
	r.g.View(func(root blk.Node) {
		if root != source {
			r.Errorf("the guest is on %s %s, not on the source", root.Info().Kind, root.Info().Name)
		}
	})
}

// trap adds a rule that the test's end takes away.
func (r *rig) trap(f *blktest.Fault, rule blktest.Rule) *blktest.Trap {
	tr := f.Add(rule)
	r.Cleanup(tr.Remove)
	return tr
}

// gate is a place where a goroutine waits.
type gate struct {
	reached, open chan struct{}
	once          sync.Once
}

func newGate(t *testing.T) *gate {
	g := &gate{reached: make(chan struct{}, 100), open: make(chan struct{})}
	t.Cleanup(g.release)
	return g
}

func (g *gate) pass() {
	g.reached <- struct{}{}
	<-g.open
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func (r *rig) reached(g *gate) {
	r.Helper()
	select {
	case <-g.reached:
	case <-time.After(10 * time.Second):
		r.Fatal("nobody came")
	}
}

func write(off int64, b []byte) *blk.Request {
	return &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

func (r *rig) guest(q *blk.Request) {
	r.Helper()
	if err := r.q.do(q); err != nil {
		r.Fatalf("the guest's %v of %d at %d: %v", q.Op, q.Len, q.Off, err)
	}
}

// async lets the guest issue a request; the result is to be taken from the channel.
func (r *rig) async(q *blk.Request) chan error {
	done := make(chan error, 1)
	go func() { done <- r.q.do(q) }()
	return done
}

func (r *rig) ended(done chan error) {
	r.Helper()
	select {
	case err := <-done:
		if err != nil {
			r.Fatalf("a guest's request failed: %v", err)
		}
	case <-time.After(10 * time.Second):
		r.Fatal("a guest's request does not end")
	}
}

func put(t *testing.T, n blk.Node, off int64, b []byte) {
	t.Helper()
	for at := 0; at < len(b); at += 1 << 20 {
		if err := blk.Do(blk.NewTask(), n, write(off+int64(at), b[at:min(at+1<<20, len(b))])); err != nil {
			t.Fatal(err)
		}
	}
}

func get(t *testing.T, n blk.Node, size int64) []byte {
	t.Helper()
	b := make([]byte, size)
	if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Len: size, Data: blk.BytesVec(nil, b)}); err != nil {
		t.Fatal(err)
	}
	return b
}

func (r *rig) equal(what string, got, want []byte) {
	r.Helper()
	if bytes.Equal(got, want) {
		return
	}
	bad := 0
	first := -1
	for i := range want {
		if got[i] != want[i] {
			bad++
			if first < 0 {
				first = i
			}
		}
	}
	r.Fatalf("%s: %d bytes differ, the first at %d: %#x, want %#x", what, bad, first, got[first], want[first])
}

// pattern is size bytes without a zero.
func pattern(seed uint64, n int) []byte {
	if seed == 1 && n == size {
		return bytes.Clone(pattern1())
	}
	return random(seed, n)
}

var pattern1 = sync.OnceValue(func() []byte { return random(1, size) })

func random(seed uint64, size int) []byte {
	rng := rand.New(rand.NewPCG(seed, 99))
	b := make([]byte, size+8)
	for i := 0; i < size; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64()|0x0101010101010101)
	}
	return b[:size]
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

// memDir is a temporary folder in memory, where there is one.
func memDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "blockcopy")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) }) //nolint:errcheck // a leftover of a test
	return dir
}

var imageNo atomic.Int64

// image makes and opens a raw image.
func image(t *testing.T, dir string, size int64, direct bool) blk.Node {
	t.Helper()
	path := filepath.Join(dir, fmt.Sprintf("%d.img", imageNo.Add(1)))
	if err := file.Create(path, size); err != nil {
		t.Fatal(err)
	}
	f, err := file.Open(path, file.Options{Direct: direct, Align: blk.SectorSize})
	if err != nil {
		t.Fatal(err)
	}
	n := raw.Open(f)
	t.Cleanup(func() { n.Close() }) //nolint:errcheck // the copy may have closed it
	return n
}

// kinds of disks.
var kinds = map[string]func(t *testing.T, size int64) blk.Node{
	"memory": func(_ *testing.T, size int64) blk.Node { return blktest.NewMemory(size) },
	"tmpfs":  func(t *testing.T, size int64) blk.Node { return image(t, memDir(t), size, false) },
	"direct": func(t *testing.T, size int64) blk.Node { return image(t, t.TempDir(), size, true) },
}

// seed is random, or what the environment says.
func seed(t *testing.T) uint64 {
	s := uint64(time.Now().UnixNano())
	if v, err := strconv.ParseUint(os.Getenv("BLOCKCOPY_SEED"), 10, 64); err == nil {
		s = v
	}
	t.Logf("BLOCKCOPY_SEED=%d", s)
	return s
}
