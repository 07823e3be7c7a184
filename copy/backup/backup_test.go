// SPDX-License-Identifier: Apache-2.0

package backup_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/copy/backup"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/copy/job/jobtest"
)

const (
	cluster = 64 << 10
	size    = 40*cluster + 9*512
)

// rig is a disk, what its guest has written to it, and a target, with traps over both.
type rig struct {
	*testing.T
	dir            string
	source, target *blktest.Fault
	g              *blk.Graph
	guest          blktest.Guest
	jobs           *job.Manager
	setup          backup.Setup
	named          *blk.Bitmap // nil: no bitmap

	now    []byte // the disk; by the guest's goroutines, each in ranges of its own
	was    []byte // at the instant, when the guest is paused
	thawed []bool
	closed atomic.Int64
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func request(op blk.Op, off int64, b []byte) *blk.Request {
	return &blk.Request{Op: op, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

// pattern is never zero.
func pattern(seed, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(seed+i/512*7+i%509) | 1
	}
	return b
}

func contents(t testing.TB, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	must(t, blk.Do(blk.NewTask(), n, request(blk.OpRead, 0, b)))
	return b
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{T: t, dir: t.TempDir(), now: pattern(1, size)}
	clear(r.now[20*cluster : 24*cluster])
	r.source, r.target = blktest.NewFault(blktest.NewMemory(size)), blktest.NewFault(blktest.NewMemory(size))
	must(t, blk.Do(blk.NewTask(), r.source, request(blk.OpWrite, 0, r.now)))
	r.g = blk.NewGraph(r.source)
	r.g.Attach(&r.guest)
	store, err := job.OpenStore(r.dir)
	must(t, err)
	r.jobs, _, err = job.NewManager(store)
	must(t, err)
	t.Cleanup(r.jobs.Shutdown)
	r.setup = backup.Setup{
		Graph: r.g, Target: r.target, Cluster: cluster, Grain: 4096, Blank: true,
		Close: func() error {
			if r.g.Root() != blk.Node(r.source) {
				t.Error("the target is closed while the filter uses it")
			}
			r.closed.Add(1)
			return nil
		},
		// Called with a bitmap only, but there is no other way to learn of the instant.
		Freeze: func() (*blk.Bitmap, error) {
			r.was = bytes.Clone(r.now)
			return r.named, nil
		},
		Thaw: func(done bool) error {
			if text, err := os.ReadFile(filepath.Join(r.dir, "jobs/j.json")); err != nil || strings.Contains(string(text), `"target_consistent": true`) != done {
				t.Errorf("thawed as %v, and the record says: %s, %v", done, text, err)
			}
			r.thawed = append(r.thawed, done)
			return nil
		},
	}
	return r
}

func (r *rig) start(options func(*job.Options)) *job.Job {
	r.Helper()
	rec := job.Record{ID: "j", Kind: "backup", Disk: "d", Target: "t", Options: job.Options{
		OnSourceError: job.OnErrorReport, OnTargetError: job.OnErrorEnospc, OnCBWError: job.OnCBWErrorBreak, CBWTimeout: 30,
	}}
	if options != nil {
		options(&rec.Options)
	}
	j, err := r.jobs.Start(rec, func(ctx context.Context, j *job.Job) error { return backup.Run(ctx, j, r.setup) })
	must(r, err)
	return j
}

func hold(o *job.Options) { o.OnCBWError, o.CBWTimeout = job.OnCBWErrorHold, 0 }

func (r *rig) state(j *job.Job, want string) job.Record {
	r.Helper()
	return jobtest.State(r, j, want)
}

// write is the guest's, which never sees an error.
func (r *rig) write(q *blk.Request, b []byte) {
	r.guest.Mu.RLock()
	defer r.guest.Mu.RUnlock()
	if err := blk.Do(blk.NewTask(), r.g.Root(), q); err != nil {
		r.Errorf("the guest sees an error: %v", err)
	}
	copy(r.now[q.Off:], b)
}

// complete wants the target to be what the disk was, where the bitmap says so.
func (r *rig) complete(j *job.Job) {
	r.Helper()
	rec := r.state(j, job.StateCompleted)
	if rec.Error != "" || !rec.TargetConsistent || rec.Stage != job.StageFlush || rec.BytesDone != rec.BytesTotal || !strings.Contains(rec.Message, "t holds") {
		r.Errorf("completed: %+v", rec)
	}
	if r.closed.Load() != 1 || fmt.Sprint(r.thawed) != "[true]" || r.g.Root() != blk.Node(r.source) || r.target.Count(blk.OpFlush) == 0 {
		r.Errorf("closed %d times, thawed %v, %d flushes, the root is %s", r.closed.Load(), r.thawed, r.target.Count(blk.OpFlush), r.g)
	}
	r.same(contents(r, r.target), r.was)
	r.same(contents(r, r.source), r.now)
}

func (r *rig) same(got, want []byte) {
	r.Helper()
	for i := range want {
		if got[i] != want[i] {
			r.Fatalf("byte %d (cluster %d) is %#x, want %#x", i, i/cluster, got[i], want[i])
		}
	}
}

// failed wants the guest to be as well off as ever, and the user to be told.
func (r *rig) failed(j *job.Job, state, reason string) {
	r.Helper()
	rec := r.state(j, state)
	if !strings.Contains(rec.Error, reason) || rec.TargetConsistent || !strings.Contains(rec.Message, "t is incomplete") {
		r.Errorf("%s: %+v", state, rec)
	}
	if r.closed.Load() != 1 || fmt.Sprint(r.thawed) != "[false]" || r.g.Root() != blk.Node(r.source) {
		r.Errorf("closed %d times, thawed %v, the root is %s", r.closed.Load(), r.thawed, r.g)
	}
	r.same(contents(r, r.source), r.now)
}

// load lets a guest write everywhere until the returned function is called.
func (r *rig) load() (stop func()) {
	const workers = 4
	seed := uint64(time.Now().UnixNano())
	r.Logf("seed %d", seed)
	var wg sync.WaitGroup
	over := make(chan struct{})
	for k := range workers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(k)))
			for {
				select {
				case <-over:
					return
				default:
				}
				b := pattern(rng.IntN(200), 512)
				q := request(blk.OpWrite, int64(rng.IntN(size/512/workers)*workers+k)*512, b)
				if rng.IntN(4) == 0 {
					q.Op, q.Data = [...]blk.Op{blk.OpWriteZeroes, blk.OpDiscard}[rng.IntN(2)], nil
					clear(b)
				}
				r.write(q, b)
				time.Sleep(time.Duration(rng.IntN(100)) * time.Microsecond)
			}
		})
	}
	return func() { close(over); wg.Wait() }
}

// The guest writes all the time.
func TestUnderLoad(t *testing.T) {
	for range 5 {
		r := newRig(t)
		stop := r.load()
		time.Sleep(2 * time.Millisecond)
		j := r.start(nil)
		r.state(j, job.StateCompleted)
		stop()
		r.complete(j)
	}
}

// Only what the bitmap names is copied, also zeros, over what a target had there; all of it if that is asked for.
func TestBitmap(t *testing.T) {
	for _, granularity := range []int64{512, cluster, 4 * cluster} {
		for _, full := range []bool{false, true} {
			r := newRig(t)
			r.setup.Blank = false
			old := pattern(99, size)
			must(t, blk.Do(blk.NewTask(), r.target, request(blk.OpWrite, 0, old)))
			r.named = blk.NewBitmap(size, granularity)
			for _, at := range []int64{4*cluster + 512, 8 * cluster, 21 * cluster, size - 512} {
				r.named.Set(at, 512)
			}
			j := r.start(func(o *job.Options) { o.Full, o.Bitmap, o.Existing = full, "b", true })
			r.state(j, job.StateCompleted)
			if full {
				r.complete(j)
				continue
			}
			for off := int64(0); off < size; off += cluster {
				n := min(cluster, size-off)
				if !r.named.Any(off, n) {
					copy(r.was[off:off+n], old[off:])
				}
			}
			r.complete(j)
			if rec := j.Record(); rec.BytesTotal != 4*max(cluster, granularity) && rec.BytesTotal > 16*cluster {
				t.Errorf("%d bytes for 4 clusters", rec.BytesTotal)
			}
		}
	}
}

// A bitmap that cannot be frozen: nothing has happened.
func TestNoBitmap(t *testing.T) {
	r := newRig(t)
	r.setup.Freeze = func() (*blk.Bitmap, error) { return nil, errors.New("no such bitmap") }
	rec := r.state(r.start(nil), job.StateFailed)
	if !strings.Contains(rec.Error, "no such bitmap") || r.closed.Load() != 1 || len(r.thawed) > 0 || r.g.Root() != blk.Node(r.source) {
		t.Errorf("%+v, closed %d times, thawed %v", rec, r.closed.Load(), r.thawed)
	}
}

// Each request to the target fails once, for the copier: the job fails, or pauses and goes on.
func TestTargetFails(t *testing.T) {
	for i := range 3 {
		for _, err := range []error{syscall.EIO, syscall.ENOSPC} {
			r := newRig(t)
			r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, After: i, Count: 2, Err: err})
			j := r.start(nil)
			if !blk.IsNoSpace(err) {
				r.failed(j, job.StateFailed, err.Error())
				continue
			}
			if rec := r.state(j, job.StatePaused); !strings.Contains(rec.Error, err.Error()) {
				t.Errorf("paused: %+v", rec)
			}
			r.resumed(j)
		}
	}
}

// resumed wants a job to be complete at last: a piece that fails late may pause it again.
func (r *rig) resumed(j *job.Job) {
	r.Helper()
	for !job.Ended(j.Record().State) {
		if j.Record().State == job.StatePaused {
			must(r, j.Resume())
		}
		time.Sleep(5 * time.Millisecond)
	}
	r.complete(j)
}

// The source cannot be read.
func TestSourceFails(t *testing.T) {
	for _, policy := range []string{job.OnErrorReport, job.OnErrorStop} {
		r := newRig(t)
		r.source.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, After: 2, Count: 1, Err: syscall.EIO})
		j := r.start(func(o *job.Options) { o.OnSourceError = policy })
		if policy == job.OnErrorReport {
			r.failed(j, job.StateFailed, syscall.EIO.Error())
			continue
		}
		r.state(j, job.StatePaused)
		r.resumed(j)
	}
}

// After a flush that failed nothing on the target can be relied on.
func TestFlushFails(t *testing.T) {
	r := newRig(t)
	r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Count: 1, Err: syscall.ENOSPC})
	r.failed(r.start(nil), job.StateFailed, syscall.ENOSPC.Error())
}

// A backup whose end cannot be recorded has failed: otherwise the bitmap would begin anew, and the next daemon say that
// there is no backup.
func TestRecordFails(t *testing.T) {
	r := newRig(t)
	trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Hold: true})
	j := r.start(nil)
	trap.Wait(t, 1)
	must(t, os.Mkdir(filepath.Join(r.dir, "jobs/j.json.new"), 0o700))
	trap.Release()
	r.failed(j, job.StateFailed, "j.json")
}

// paused starts a job and pauses it before it has copied all.
func (r *rig) paused(options func(*job.Options)) *job.Job {
	r.Helper()
	trap := r.target.Add(blktest.Rule{Hold: true})
	j := r.start(func(o *job.Options) {
		if o.Speed = 1 << 20; options != nil { // pieces of one cluster, of which one is paid for
			options(o)
		}
	})
	trap.Wait(r.T, 1)
	must(r, j.Pause())
	must(r, j.SetSpeed(0))
	trap.Remove()
	return j
}

// far is where a paused job has not copied yet.
const far = 38 * cluster

// For a write of the guest the copy fails: the guest goes on, and the backup fails.
func TestBreaks(t *testing.T) {
	for _, ofSource := range []bool{false, true} {
		r := newRig(t)
		j := r.paused(nil)
		node, op := r.target, blk.OpWrite
		if ofSource {
			node, op = r.source, blk.OpRead
		}
		trap := node.Add(blktest.Rule{Ops: []blk.Op{op}, Off: far, Len: cluster, Err: syscall.ENOSPC})
		b := pattern(3, 512)
		r.write(request(blk.OpWrite, far, b), b)
		rec := r.state(j, job.StateFailed)
		if !strings.Contains(rec.Error, "could not be copied") {
			t.Errorf("the error is %s", rec.Error)
		}
		trap.Remove()
		r.failed(j, job.StateFailed, syscall.ENOSPC.Error())
	}
}

// Held, the guest waits until there is room, and the job goes on.
func TestHolds(t *testing.T) {
	for _, byUser := range []bool{false, true} {
		r := newRig(t)
		j := r.paused(hold)
		trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.ENOSPC})
		fails := 1
		if !byUser {
			must(t, j.Resume())
			trap.Wait(t, fails)
			r.state(j, job.StatePaused)
			fails = trap.Caught() + 1
		}
		written := make(chan struct{})
		go func() {
			b := pattern(3, 512)
			r.write(request(blk.OpWrite, far, b), b)
			close(written)
		}()
		trap.Wait(t, fails)
		for rec := j.Record(); !strings.Contains(rec.Error, syscall.ENOSPC.Error()); rec = r.state(j, job.StatePaused) {
			time.Sleep(time.Millisecond)
		}
		select {
		case <-written:
			t.Fatal("the guest was not held")
		case <-time.After(10 * time.Millisecond):
		}
		trap.Remove()
		for done := false; !done; {
			must(t, j.Resume())
			select {
			case <-written:
				done = true
			case <-time.After(5 * time.Millisecond):
			}
		}
		r.resumed(j)
	}
}

// A guest that is held by a target that hangs is let go at once by a cancel. The job ends when the target answers.
func TestCancelLetsGo(t *testing.T) {
	r := newRig(t)
	trap := r.target.Add(blktest.Rule{Hold: true})
	j := r.start(hold)
	trap.Wait(t, 1)
	written := make(chan struct{})
	go func() {
		b := pattern(3, 512)
		r.write(request(blk.OpWrite, far, b), b)
		close(written)
	}()
	trap.Wait(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := j.Cancel(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("cancelled while the target hangs: %v", err)
	}
	select {
	case <-written:
	case <-time.After(5 * time.Second):
		t.Fatal("the guest is still held")
	}
	trap.Release()
	r.failed(j, job.StateCancelled, "")
}

// So is one that waits for the source's policy, or for the user.
func TestCancelPaused(t *testing.T) {
	r := newRig(t)
	j := r.paused(func(o *job.Options) { hold(o); o.OnSourceError = job.OnErrorStop })
	trap := r.source.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Err: syscall.EIO})
	written := make(chan struct{})
	go func() {
		b := pattern(3, 512)
		r.write(request(blk.OpWrite, far, b), b)
		close(written)
	}()
	trap.Wait(t, 1)
	must(t, j.Cancel(t.Context()))
	<-written
	trap.Remove()
	r.failed(j, job.StateCancelled, "")
}

// When the copier fails for good, a guest that is held is let go, too.
func TestFailureLetsGo(t *testing.T) {
	r := newRig(t)
	hang := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: far, Len: cluster, Hold: true})
	fails := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 0, Len: cluster, Hold: true, Err: syscall.EIO})
	j := r.start(hold)
	fails.Wait(t, 1)
	written := make(chan struct{})
	go func() {
		b := pattern(3, 512)
		r.write(request(blk.OpWrite, far, b), b)
		close(written)
	}()
	hang.Wait(t, 1)
	fails.Release()
	<-written
	hang.Release()
	r.failed(j, job.StateFailed, syscall.EIO.Error())
}

// The daemon stops: the next one finds the job unfinished, and the bitmap has all that it had.
func TestShutdown(t *testing.T) {
	r := newRig(t)
	j := r.paused(nil)
	r.jobs.Shutdown()
	<-j.Done()
	if rec := j.Record(); rec.State != job.StatePaused || rec.TargetConsistent || fmt.Sprint(r.thawed) != "[false]" || r.closed.Load() != 1 {
		t.Errorf("after the daemon's end: %+v, thawed %v, closed %d times", rec, r.thawed, r.closed.Load())
	}
}

// Holes of a large disk are skipped, not walked through.
func TestSparse(t *testing.T) {
	const huge = 1 << 40
	r := newRig(t)
	g := blk.NewGraph(&hole{huge})
	r.setup.Graph, r.setup.Target, r.setup.Freeze = g, &hole{huge}, nil
	r.setup.Close = func() error { return nil }
	begin := time.Now()
	if rec := r.state(r.start(nil), job.StateCompleted); rec.BytesTotal != huge {
		t.Errorf("%+v", rec)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// hole is a disk without contents.
type hole struct{ size int64 }

func (h *hole) Info() *blk.Info                                { return &blk.Info{Name: "hole", Size: h.size, Align: 1} }
func (h *hole) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }
func (h *hole) Map(_ *blk.Task, _, l int64) (blk.Extent, error) {
	return blk.Extent{Len: l, State: blk.Zero}, nil
}
func (h *hole) Children() []blk.Node { return nil }
func (h *hole) Close() error         { return nil }
func (h *hole) Do(_ *blk.Task, r *blk.Request) error {
	if r.Op != blk.OpFlush {
		return blk.ErrNotSupported
	}
	return nil
}

// holey is a target with tables, parts of which are lost.
type holey struct{ blk.Node }

func (holey) Lost() error { return syscall.EIO }

// A target that shows more than its storage holds is no backup.
func TestTargetHasLostTables(t *testing.T) {
	r := newRig(t)
	r.setup.Target = holey{r.target}
	r.failed(r.start(nil), job.StateFailed, syscall.EIO.Error())
}
