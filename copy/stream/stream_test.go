// SPDX-License-Identifier: Apache-2.0

package stream_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/copy/job/jobtest"
	"github.com/blkstream/blkstream/copy/stream"
)

const (
	cluster = 64 << 10
	size    = 40*cluster + 9*512
)

// rig is a disk on base <- middle <- top, with traps over the storage of the last and over the first two.
type rig struct {
	*testing.T
	base, middle, storage *blktest.Fault
	disk                  *blktest.CrashDisk // the top's storage
	top                   *qcow2.Node
	g                     *blk.Graph
	guest                 blktest.Guest
	jobs                  *job.Manager
	setup                 stream.Setup
	want                  []byte
	dropped, closed       int
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func do(t testing.TB, n blk.Node, op blk.Op, off, l int64, b []byte) {
	t.Helper()
	q := &blk.Request{Op: op, Off: off, Len: l}
	if b != nil {
		q.Len, q.Data = int64(len(b)), blk.BytesVec(nil, b)
	}
	must(t, blk.Do(blk.NewTask(), n, q))
}

// pattern is never zero.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed+i/512*7+i%509) | 1
	}
	return b
}

func create(t *testing.T, storage, backing blk.Node, version int) *qcow2.Node {
	t.Helper()
	must(t, qcow2.Create(blk.NewTask(), storage, qcow2.CreateOptions{
		Size: size, Version: version, BackingFile: "below", BackingFormat: "raw",
	}))
	return open(t, storage, backing)
}

func open(t *testing.T, storage, backing blk.Node) *qcow2.Node {
	t.Helper()
	n, err := qcow2.Open(blk.NewTask(), storage, qcow2.Options{Name: "image", Backing: backing})
	must(t, err)
	return n
}

func newRig(t *testing.T, base uint16) *rig {
	t.Helper()
	r := &rig{T: t, want: pattern(1, size), disk: blktest.NewCrashDisk(0)}
	mem := blktest.NewMemory(size)
	clear(r.want[20*cluster : 24*cluster])
	do(t, mem, blk.OpWrite, 0, 0, r.want)
	r.base = blktest.NewFault(mem)
	middle := create(t, blktest.NewMemory(0), r.base, 3)
	r.change(middle, 3*cluster, pattern(2, 5*cluster))
	r.change(middle, 9*cluster+512, pattern(3, 1024))
	do(t, middle, blk.OpWriteZeroes, 12*cluster, 2*cluster, nil)
	clear(r.want[12*cluster : 14*cluster])
	r.middle = blktest.NewFault(middle)
	r.storage = blktest.NewFault(r.disk)
	r.top = create(t, r.storage, r.middle, 3)
	r.change(r.top, 5*cluster, pattern(4, cluster))
	do(t, r.top, blk.OpFlush, 0, 0, nil)
	r.g = blk.NewGraph(r.top)
	r.g.Attach(&r.guest)
	store, err := job.OpenStore(t.TempDir())
	must(t, err)
	r.jobs, _, err = job.NewManager(store)
	must(t, err)
	t.Cleanup(r.jobs.Shutdown)
	r.setup = stream.Setup{
		Graph: r.g, Cluster: cluster, Base: base,
		Drop: func(task *blk.Task) (blk.Node, error) {
			if base > 0 {
				return r.top, r.top.SetBacking(task, r.base, "base", "raw")
			}
			return r.top, r.top.SetBacking(task, nil, "", "")
		},
		Close:  func() error { r.closed++; return nil },
		Keep:   base > 0,
		Failed: func(err error) { t.Errorf("a copy for the guest: %v", err) },
	}
	return r
}

func (r *rig) change(n blk.Node, off int64, b []byte) {
	r.Helper()
	do(r, n, blk.OpWrite, off, 0, b)
	copy(r.want[off:], b)
}

func (r *rig) start(options func(*job.Record)) *job.Job {
	r.Helper()
	rec := job.Record{ID: "j", Kind: "stream", Disk: "d", Options: job.Options{OnSourceError: job.OnErrorReport, OnTargetError: job.OnErrorEnospc}}
	if options != nil {
		options(&rec)
	}
	j, err := r.jobs.Start(rec, func(ctx context.Context, j *job.Job) error { return stream.Run(ctx, j, r.setup) })
	must(r, err)
	return j
}

func (r *rig) state(j *job.Job, want string) job.Record {
	r.Helper()
	return jobtest.State(r, j, want)
}

func contents(t testing.TB, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	do(t, n, blk.OpRead, 0, 0, b)
	return b
}

func (r *rig) same(n blk.Node) {
	r.Helper()
	got := contents(r, n)
	for i := range got {
		if got[i] != r.want[i] {
			r.Fatalf("byte %d (cluster %d) is %#x, want %#x", i, i/cluster, got[i], r.want[i])
		}
	}
}

// complete wants the job to be completed, and nothing but the top (and the base) to be used from then on.
func (r *rig) complete(j *job.Job) {
	r.Helper()
	rec := r.state(j, job.StateCompleted)
	if rec.Error != "" || rec.BytesDone != size || rec.BytesTotal != size {
		r.Errorf("completed: %+v", rec)
	}
	if r.closed != 1 {
		r.Errorf("what is dropped was closed %d times", r.closed)
	}
	if r.g.Root() != blk.Node(r.top) {
		r.Errorf("the root is %v", r.g.Root().Info())
	}
	r.middle.Add(blktest.Rule{Err: syscall.EIO})
	if r.setup.Base == 0 {
		r.base.Add(blktest.Rule{Err: syscall.EIO})
	}
	r.same(r.top)
}

func TestStream(t *testing.T) {
	r := newRig(t, 0)
	r.complete(r.start(nil))
	if h := r.top.Header(); h.BackingFile != "" {
		t.Errorf("the backing file is still %q", h.BackingFile)
	}
}

// What the base holds is not even read; zeros of the middle hide it still.
// A cluster that the top holds in several ways is not looked at for ever.
func TestClusterOfSeveralKinds(t *testing.T) {
	r := newRig(t, 0)
	storage := blktest.NewMemory(0)
	must(t, qcow2.Create(blk.NewTask(), storage, qcow2.CreateOptions{
		Size: size, BackingFile: "below", BackingFormat: "qcow2", ExtendedL2: true,
	}))
	below := r.top
	r.top = open(t, storage, below)
	for _, at := range []int64{2 * cluster, 7 * cluster} { // the second one not whole
		do(t, r.top, blk.OpWriteZeroes, at, cluster/2, nil)
		clear(r.want[at : at+cluster/2])
		r.change(r.top, at+4096, pattern(9, 4096))
	}
	do(t, r.top, blk.OpWriteZeroes, 2*cluster+cluster/2, cluster/2, nil)
	clear(r.want[2*cluster+cluster/2 : 3*cluster])
	r.g = blk.NewGraph(r.top)
	r.setup.Graph = r.g
	r.complete(r.start(nil))
}

func TestStreamToBase(t *testing.T) {
	r := newRig(t, 2)
	traps := []*blktest.Trap{
		r.base.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Off: 20 * cluster, Len: 20 * cluster, Err: syscall.EIO}),
		r.base.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Len: 3 * cluster, Err: syscall.EIO}),
	}
	j := r.start(nil)
	r.state(j, job.StateCompleted)
	if h := r.top.Header(); h.BackingFile != "base" || h.BackingFormat != "raw" {
		t.Errorf("the backing file is %q, %q", h.BackingFile, h.BackingFormat)
	}
	e, err := r.top.Map(blk.NewTask(), 0, size)
	must(t, err)
	if e.Depth == 0 {
		t.Error("what the base holds was copied")
	}
	r.middle.Add(blktest.Rule{Err: syscall.EIO})
	for _, trap := range traps {
		trap.Remove()
	}
	r.same(r.top)
}

// A cluster of which nothing is wanted, though its parts are of several kinds, does not keep the job from its end.
func TestUnwantedCluster(t *testing.T) {
	r := newRig(t, 2)
	do(t, r.base, blk.OpWriteZeroes, 25*cluster+4096, 4096, nil) // a hole in what stays in the base
	clear(r.want[25*cluster+4096 : 25*cluster+8192])
	r.state(r.start(nil), job.StateCompleted)
	if e, err := r.top.Map(blk.NewTask(), 25*cluster, 1); err != nil || e.Depth == 0 {
		t.Errorf("what the base holds was copied: %+v, %v", e, err)
	}
	r.same(r.top)
}

// A filter that was there before is used, and stays with a base.
func TestUsesFilter(t *testing.T) {
	for _, base := range []uint16{0, 2} {
		r := newRig(t, base)
		f := cor.New(r.top, cluster, nil)
		must(t, r.g.Change(t.Context(), func(tx *blk.Tx) error { tx.SetRoot(f); return nil }))
		r.state(r.start(nil), job.StateCompleted)
		want := blk.Node(r.top)
		if base > 0 {
			want = f
		}
		if r.g.Root() != want {
			t.Errorf("base %d: the root is %v", base, r.g.Root().Info())
		}
		r.same(r.g.Root())
	}
}

// The guest writes, reads and discards all the time.
func TestUnderLoad(t *testing.T) {
	const workers = 4
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for _, base := range []uint16{0, 2} {
		r := newRig(t, base)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for k := range workers {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(seed, uint64(k)))
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					default:
					}
					off := int64(rng.IntN(size/512/workers)*workers+k) * 512
					part := r.want[off : off+512]
					b := make([]byte, 512)
					q := &blk.Request{Op: []blk.Op{blk.OpWrite, blk.OpWriteZeroes, blk.OpRead}[rng.IntN(3)], Off: off, Len: 512}
					if q.Op == blk.OpWrite {
						copy(b, pattern(rng.IntN(200), 512))
					}
					if q.Op != blk.OpWriteZeroes {
						q.Data = blk.BytesVec(nil, b)
					}
					r.guest.Mu.RLock()
					err := blk.Do(blk.NewTask(), r.g.Root(), q)
					r.guest.Mu.RUnlock()
					if err != nil {
						t.Error(err)
						return
					}
					if q.Op == blk.OpRead && !bytes.Equal(b, part) {
						t.Errorf("wrong contents at %d", off)
						return
					}
					copy(part, b)
				}
			})
		}
		j := r.start(func(rec *job.Record) { rec.Speed = 12 << 20 })
		r.state(j, job.StateCompleted)
		time.Sleep(20 * time.Millisecond)
		close(stop)
		wg.Wait()
		r.same(r.g.Root())
	}
}

// A job that cannot read or write fails or pauses, as asked, and goes on from there. The guest notices nothing.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		name           string
		target         bool
		policy         string
		err            error
		pauses, onDrop bool
	}{
		{name: "source fails", policy: job.OnErrorReport, err: syscall.EIO},
		{name: "source stops", policy: job.OnErrorStop, err: syscall.EIO, pauses: true},
		{name: "target fails", target: true, policy: job.OnErrorReport, err: syscall.EIO},
		{name: "target stops", target: true, policy: job.OnErrorStop, err: syscall.EIO, pauses: true},
		{name: "target is full", target: true, policy: job.OnErrorEnospc, err: syscall.ENOSPC, pauses: true},
		{name: "target fails, not full", target: true, policy: job.OnErrorEnospc, err: syscall.EIO},
		{name: "flush fails", target: true, policy: job.OnErrorReport, err: syscall.EIO, onDrop: true},
		{name: "flush stops", target: true, policy: job.OnErrorStop, err: syscall.EIO, onDrop: true, pauses: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, 0)
			r.setup.Failed = func(error) {}
			rule, trap := blktest.Rule{Ops: []blk.Op{blk.OpRead}, Off: 7 * cluster, Len: cluster, Err: c.err}, (*blktest.Trap)(nil)
			switch {
			case c.onDrop:
				r.setup.Drop = func(*blk.Task) (blk.Node, error) {
					if r.dropped++; r.dropped == 1 {
						return nil, c.err
					}
					return r.top, r.top.SetBacking(blk.NewTask(), nil, "", "")
				}
			case c.target:
				rule.Ops, rule.Off, rule.Len, rule.After = []blk.Op{blk.OpWrite}, 0, 0, 1
				trap = r.storage.Add(rule)
			default:
				trap = r.middle.Add(rule)
			}
			j := r.start(func(rec *job.Record) { rec.OnSourceError, rec.OnTargetError = c.policy, c.policy })
			if !c.pauses {
				if rec := r.state(j, job.StateFailed); !strings.Contains(rec.Error, c.err.Error()) {
					t.Errorf("the error is %q", rec.Error)
				}
				if trap != nil {
					trap.Remove()
				}
				if r.g.Root() != blk.Node(r.top) || r.closed != 0 || r.top.Header().BackingFile == "" {
					t.Error("the chain is not the old one")
				}
				r.same(r.top)
				return
			}
			if rec := r.state(j, job.StatePaused); !strings.Contains(rec.Error, c.err.Error()) {
				t.Errorf("the error is %q", rec.Error)
			}
			if trap != nil {
				trap.Remove()
			}
			// A piece that had failed by then may pause the job again.
			for deadline := time.Now().Add(20 * time.Second); !job.Ended(j.Record().State) && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if j.Record().State == job.StatePaused {
					must(t, j.Resume())
				}
			}
			r.complete(j)
		})
	}
}

func TestCommands(t *testing.T) {
	r := newRig(t, 0)
	j := r.start(func(rec *job.Record) { rec.Speed = 64 << 10 })
	must(t, j.Pause())
	r.state(j, job.StatePaused)
	must(t, j.Resume())
	must(t, j.Cancel(t.Context()))
	if rec := r.state(j, job.StateCancelled); rec.BytesDone >= size {
		t.Errorf("cancelled: %+v", rec)
	}
	if r.g.Root() != blk.Node(r.top) || r.closed != 0 || r.top.Header().BackingFile == "" {
		t.Error("the chain is not the old one")
	}
	r.same(r.top)
	// What is copied is not read again.
	read := r.base.Count(blk.OpRead)
	must(t, r.jobs.Dismiss("j"))
	r.complete(r.start(nil))
	if n := r.base.Count(blk.OpRead) - read; n > size/cluster {
		t.Errorf("%d reads", n)
	}
}

// Rule 6: the power may go at any point; the image reads the same, over what its header names.
func TestPowerCut(t *testing.T) {
	for _, base := range []uint16{0, 2} {
		r := newRig(t, base)
		first := r.disk.Points()
		r.state(r.start(nil), job.StateCompleted)
		rng := rand.New(rand.NewPCG(1, 2))
		old, now := 0, 0
		step, most := 1, 100
		if testing.Short() {
			step, most = 8, 20
		}
		for p := first; p <= r.disk.Points(); p++ {
			tries := 3
			if p > r.disk.Points()-8 { // the header changes
				tries = most
			} else if p%step != 0 {
				continue
			}
			for range tries {
				after := r.disk.CrashAt(p, rng)
				n := open(t, after, r.middle)
				switch n.Header().BackingFile {
				case "below":
					old++
				case "base":
					now++
					n = open(t, after, r.base)
				case "":
					now++
					n = open(t, after, nil)
				}
				r.same(n)
			}
		}
		if old == 0 || now == 0 {
			t.Errorf("%d cuts with the old header, %d with the new one", old, now)
		}
	}
}

// An error leaves no filter behind, also if the disk cannot be paused.
func TestNotPaused(t *testing.T) {
	r := newRig(t, 0)
	r.g.Detach(&r.guest)
	r.g.Attach(&stuck{})
	r.state(r.start(nil), job.StateFailed)
	if r.g.Root() != blk.Node(r.top) {
		t.Error("the filter stays")
	}
}

type stuck struct{ blktest.Guest }

func (*stuck) Pause(context.Context) error { return errors.New("stuck") }
