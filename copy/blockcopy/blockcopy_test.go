// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/copy/job"
)

const (
	gran = 1 << 20 // as large as pieces become
	size = 8 * gran
)

func TestCopy(t *testing.T) {
	for _, c := range []struct {
		source, target    string
		size, targetSize  int64
		granularity       int64
		existing, verify  bool
		full, manual, dis bool
	}{
		{source: "memory", target: "memory", size: size, granularity: gran},
		{source: "memory", target: "memory", size: 1<<20 + 512, granularity: 64 << 10, verify: true, full: true},
		{source: "memory", target: "memory", size: 1<<20 - 512, targetSize: 1<<20 + 8*512, granularity: 4096, existing: true, verify: true},
		{source: "memory", target: "memory", size: 512, granularity: 16 << 20, verify: true, full: true},
		{source: "memory", target: "memory", size: 192 << 10, granularity: 16 << 20, existing: true, manual: true},
		{source: "tmpfs", target: "tmpfs", size: 5<<20 + 7*512, granularity: 4096, verify: true},
		{source: "tmpfs", target: "tmpfs", size: 5<<20 + 7*512, granularity: 1 << 20, existing: true, full: true, manual: true},
		{source: "tmpfs", target: "direct", size: 3<<20 + 8*512, targetSize: 4 << 20, granularity: 64 << 10, existing: true, verify: true},
		{source: "direct", target: "tmpfs", size: 3 << 20, granularity: 1 << 20, verify: true, manual: true},
		{source: "direct", target: "direct", size: 2 << 20, granularity: 64 << 10, verify: true, full: true},
	} {
		t.Run(fmt.Sprintf("%s-%s-%d-%d", c.source, c.target, c.size, c.granularity), func(t *testing.T) {
			c.targetSize = max(c.targetSize, c.size)
			source, target := kinds[c.source](t, c.size), kinds[c.target](t, c.targetSize)
			r := newRig(t, source, target)
			r.setup.Blank = !c.existing
			want := make([]byte, c.size)
			if c.full {
				want = pattern(1, int(c.size))
				put(t, source, 0, want)
			} else {
				// Data here and there, at odd places.
				for off := int64(512); off+2048 < c.size; off += 300*512 + 37*512 {
					copy(want[off:], pattern(uint64(off), 2048))
					put(t, source, off, want[off:off+2048])
				}
			}
			if c.existing {
				put(t, target, 0, pattern(2, int(c.targetSize)))
			}
			j := r.start(func(rec *job.Record) {
				rec.Granularity, rec.Verify = c.granularity, c.verify
				if !c.manual {
					rec.SwitchMode = "auto"
				}
			})
			r.over(j)
			if rec := j.Record(); c.verify && rec.VerifiedBytes != c.size {
				t.Errorf("verified %d bytes of %d", rec.VerifiedBytes, c.size)
			}
			r.equal("the target", get(t, target, c.size), want)
			// From now on the target is the disk.
			if in := r.g.Root().Info(); in.Size != c.targetSize {
				t.Errorf("the disk has %d bytes, want %d", in.Size, c.targetSize)
			}
			r.guest(write(0, fill(512, 9)))
			if b := get(t, target, 512); b[0] != 9 {
				t.Error("the guest does not write to the target")
			}
		})
	}
}

func TestTargetTooSmall(t *testing.T) {
	source, target := blktest.NewMemory(size), &closing{Memory: blktest.NewMemory(size - 512)}
	r := newRig(t, source, target)
	j := r.start(nil)
	if rec := r.state(j, job.StateFailed); !strings.Contains(rec.Error, fmt.Sprint(size)) || !strings.Contains(rec.Error, fmt.Sprint(size-512)) {
		t.Errorf("the error is %q", rec.Error)
	}
	r.stays(source)
	if target.closed.Load() != 1 {
		t.Errorf("the target was closed %d times", target.closed.Load())
	}
}

// A cancel during the switch: before it is recorded the guest stays on the source, afterwards the user is told that it came
// too late.
func TestCancelDuringSwitch(t *testing.T) {
	for _, late := range []bool{false, true} {
		mem := blktest.NewMemory(size)
		var cancelled atomic.Bool
		var j *job.Job
		target := &hooked{Node: blktest.NewMemory(size)}
		r := newRig(t, mem, target)
		done := make(chan error, 1)
		cancel := func() {
			if !cancelled.Swap(true) {
				go func() { done <- j.Cancel(context.Background()) }()
				time.Sleep(10 * time.Millisecond)
			}
		}
		commit := r.setup.Commit
		r.setup.Commit = func() error {
			if late {
				cancel()
			}
			return commit()
		}
		j = r.start(nil)
		r.state(j, job.StateReady)
		target.before = func(q *blk.Request) error {
			if q.Op == blk.OpFlush && !late {
				cancel()
			}
			return nil
		}
		if err := j.AskSwitch(); err != nil {
			t.Fatal(err)
		}
		err := <-done
		if !late {
			if err != nil || j.Record().State != job.StateCancelled {
				t.Errorf("cancelled before: %v, %+v", err, j.Record())
			}
			r.stays(mem)
		} else if !errors.Is(err, job.ErrState) || j.Record().State != job.StateCompleted {
			t.Errorf("cancelled after: %v, %+v", err, j.Record())
		}
	}
}

// closing counts.
type closing struct {
	*blktest.Memory
	closed atomic.Int64
}

func (c *closing) Close() error {
	c.closed.Add(1)
	return nil
}

// The source is closed after the switch, the target after everything else.
func TestCloses(t *testing.T) {
	for _, switched := range []bool{true, false} {
		source, target := &closing{Memory: blktest.NewMemory(size)}, &closing{Memory: blktest.NewMemory(size)}
		r := newRig(t, source, target)
		j := r.start(nil)
		if r.state(j, job.StateReady); switched {
			r.over(j)
		} else if err := j.Cancel(context.Background()); err != nil {
			t.Fatal(err)
		}
		if s, d := source.closed.Load() == 1, target.closed.Load() == 1; s != switched || d == switched {
			t.Errorf("switched %v: source closed %v, target closed %v", switched, s, d)
		}
	}
}

// A source that cannot be closed in order is told of, and the switch has happened all the same.
func TestCloseSourceFails(t *testing.T) {
	r, _, target, _ := memRig(t, pattern(1, size))
	r.setup.Release = func(blk.Node) error { return syscall.EIO }
	j := r.start(auto)
	for failed := false; ; {
		changed := j.Changed()
		if rec := j.Record(); rec.Error != "" && !failed {
			failed = true
			t.Errorf("whoever waits for the switch is told that it failed: %s", rec.Error)
		} else if job.Ended(rec.State) {
			break
		}
		<-changed
	}
	if rec := j.Record(); rec.State != job.StateCompleted || !strings.Contains(rec.Message, syscall.EIO.Error()) || !strings.Contains(rec.Message, r.setup.Hint) {
		t.Errorf("the job is %+v", rec)
	}
	r.stays(target)
}

// mapped calls a function before each look at how the source is stored.
type mapped struct {
	blk.Node
	before func(off int64)
}

func (m *mapped) Map(t *blk.Task, off, n int64) (blk.Extent, error) {
	m.before(off)
	return m.Node.Map(t, off, n)
}

// A hole that ends within a block: what the guest writes into the part that was passed over must not be forgotten when the
// rest is copied, with which it shares a bit.
func TestHoleEndsInBlock(t *testing.T) {
	source, target := &mapped{Node: image(t, memDir(t), size, false)}, blktest.NewMemory(size)
	want := make([]byte, size)
	copy(want[gran+gran/2:], pattern(1, gran))
	put(t, source.Node, gran+gran/2, want[gran+gran/2:][:gran])
	copy(want[gran+4096:], fill(4096, 7))
	r := newRig(t, source, target)
	r.setup.Blank = true
	var once sync.Once
	source.before = func(off int64) {
		if off >= gran {
			once.Do(func() { r.guest(write(gran+4096, fill(4096, 7))) })
		}
	}
	r.over(r.start(auto))
	r.equal("the target", get(t, target, size), want)
}

// Holes and zeros of the source are holes of the target, also where there was something before.
func TestHoles(t *testing.T) {
	for _, existing := range []bool{false, true} {
		const size = 32 << 20
		dir := memDir(t)
		source, target := image(t, dir, size, false), image(t, dir, size, false)
		want := make([]byte, size)
		copy(want[3<<20:], pattern(1, 1<<20))
		copy(want[20<<20+4096:], pattern(2, 8192))
		put(t, source, 3<<20, want[3<<20:4<<20])
		put(t, source, 20<<20, want[20<<20:20<<20+5*4096])
		put(t, source, 9<<20, make([]byte, 4<<20)) // allocated zeros
		r := newRig(t, source, target)
		if r.setup.Blank = !existing; existing {
			put(t, target, 0, fill(size, 0xaa))
		}
		r.over(r.start(auto))
		r.equal("the target", get(t, target, size), want)
		if got, most := blocks(t, target), int64(1<<20+2*4096); got > most {
			t.Errorf("existing %v: the target takes %d bytes, the data %d", existing, got, most)
		}
	}
}

// All units that hold anything are compressed, each once and whole, be they larger than what the pace or the speed allows
// at once, and whatever holes they have.
func TestPack(t *testing.T) {
	const size = 16<<20 + 512
	for _, unit := range []int64{512, 64 << 10, 2 << 20} {
		source, target := image(t, memDir(t), size, false), blktest.NewMemory(size)
		want := make([]byte, size)
		for _, off := range []int64{0, 3<<20 + 8192, 6<<20 - 512, 7 << 20, 15 << 20, size - 4096} {
			n := copy(want[off:min(off+100<<10, size)], pattern(uint64(off), 100<<10))
			put(t, source, off, want[off:off+int64(n)])
		}
		put(t, source, 9<<20, make([]byte, 3<<20)) // allocated zeros
		r := newRig(t, source, target)
		r.setup.Blank, r.setup.PackUnit = true, unit
		var mu sync.Mutex
		packed := map[int64]int{}
		r.setup.Pack = func(t *blk.Task, off int64, data []byte) error {
			mu.Lock()
			defer mu.Unlock()
			if packed[off]++; off%unit != 0 || int64(len(data)) != unit {
				return fmt.Errorf("%d bytes at %d: %w", len(data), off, blk.ErrInvalid)
			}
			return blk.Do(t, target, &blk.Request{Op: blk.OpWrite, Off: off, Len: unit, Data: blk.BytesVec(nil, data)})
		}
		r.over(r.start(func(rec *job.Record) {
			rec.SwitchMode, rec.Granularity, rec.Speed = "auto", 4096, 16<<20
		}))
		r.equal("the target", get(t, target, size), want)
		for off := int64(0); off+unit <= size; off += unit {
			times := 1
			if blk.IsZero(want[off : off+unit]) {
				times = 0
			}
			if packed[off] != times {
				t.Fatalf("units of %d: the one at %d was compressed %d times, want %d", unit, off, packed[off], times)
			}
		}
	}
}

func blocks(t *testing.T, n blk.Node) int64 {
	t.Helper()
	st, err := os.Stat(n.Info().Name)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// Rule 1: a write that is in flight when the job starts is waited for, before the bulk stage reads.
func TestInFlightAtStart(t *testing.T) {
	for _, fast := range []bool{false, true} {
		var source blk.Node
		g := newGate(t)
		if fast {
			source = image(t, memDir(t), size, false)
		} else {
			source = &hooked{Node: blktest.NewMemory(size), before: func(r *blk.Request) error {
				if r.Op == blk.OpWrite {
					g.pass()
				}
				return nil
			}}
		}
		target := blktest.NewMemory(size)
		r := newRig(t, source, target)
		if fast {
			r.q.mapped = func(*blk.Request) { g.pass() }
		}
		done := r.async(write(gran, fill(512, 1)))
		r.reached(g)
		j := r.start(nil)
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if s := j.Record().Stage; s != "" {
				t.Fatalf("stage %s while a request of before is in flight", s)
			}
		}
		g.release()
		r.ended(done)
		r.over(j)
		if b := target.Bytes(); b[gran] != 1 {
			t.Errorf("fast %v: a write that was in flight at the start is lost", fast)
		}
	}
}

// Rule 1: a logged write, held before its I/O or before its mark while its block is copied, is copied again; and
// mirrored writes do not begin before it has ended.
func TestInFlightAtMirror(t *testing.T) {
	for _, at := range []string{"mapped", "written", "slow", "discard"} {
		source := blk.Node(image(t, memDir(t), size, false))
		want := pattern(1, size)
		put(t, source, 0, want)
		g := newGate(t)
		hold := func(r *blk.Request) {
			if r.Off == gran && r.Op.Changes() {
				g.pass()
			}
		}
		if at == "slow" || at == "discard" {
			source = &hooked{Node: source, before: func(r *blk.Request) error { hold(r); return nil }}
		}
		target := blktest.NewFault(blktest.NewMemory(size))
		r := newRig(t, source, target)
		switch at {
		case "mapped":
			r.q.mapped = hold
		case "written":
			r.q.written = hold
		}
		bulk := r.trap(target, blktest.Rule{Off: 5 * gran, Len: gran, Hold: true})
		j := r.start(nil)
		bulk.Wait(t, 1)
		req := write(gran, fill(512, 1))
		copy(want[gran:], fill(512, 1))
		if at == "discard" {
			req = &blk.Request{Op: blk.OpDiscard, Off: gran, Len: 512}
			clear(want[gran : gran+512])
		}
		done := r.async(req)
		r.reached(g)
		bulk.Release()
		r.stage(j, job.StageDirty)
		for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if rec := j.Record(); rec.Stage != job.StageDirty || rec.State != job.StateRunning {
				t.Fatalf("%s: stage %s, %s, while a logged write is in flight", at, rec.Stage, rec.State)
			}
		}
		g.release()
		r.ended(done)
		r.over(j)
		r.equal(at, get(t, target, size), want)
	}
}

// Rules 1, 2 and 8: whatever the guest changes between the copier's read and its write is copied again.
func TestChangedUnderCopier(t *testing.T) {
	for _, op := range []blk.Op{blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes} {
		for _, where := range []string{"after the read", "before the write", "after the write"} {
			mem := [2]*blktest.Memory{blktest.NewMemory(size), blktest.NewMemory(size)}
			put(t, mem[0], 0, pattern(1, size))
			g := newGate(t)
			var once sync.Once
			hold := func(op blk.Op) func(*blk.Request) error {
				return func(r *blk.Request) error {
					if r.Op == op && r.Off <= 2*gran && r.Off+r.Len > 2*gran {
						once.Do(g.pass)
					}
					return nil
				}
			}
			source, target := &hooked{Node: mem[0]}, &hooked{Node: mem[1]}
			switch where {
			case "after the read":
				source.after = hold(blk.OpRead)
			case "before the write":
				target.before = hold(blk.OpWrite)
			case "after the write":
				target.after = hold(blk.OpWrite)
			}
			r := newRig(t, source, target)
			j := r.start(nil)
			r.reached(g)
			q := &blk.Request{Op: op, Off: 2*gran + 512, Len: 1024}
			if op == blk.OpWrite {
				q = write(q.Off, fill(1024, 0))
			}
			r.guest(q)
			g.release()
			r.over(j)
			want := pattern(1, size)
			clear(want[q.Off : q.Off+q.Len])
			r.equal(fmt.Sprintf("%v %s", op, where), mem[1].Bytes(), want)
		}
	}
}

// Rule 3: a copier's late write to the target does not land on top of a mirrored one.
func TestMirroredUnderCopier(t *testing.T) {
	for _, op := range []blk.Op{blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes} {
		r, _, target, mem := memRig(t, pattern(1, size))
		bulk := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 5 * gran, Len: gran, Count: 1, Hold: true})
		again := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 5 * gran, Len: gran, Count: 1, Hold: true})
		j := r.start(nil)
		bulk.Wait(t, 1)
		r.guest(write(5*gran, fill(512, 1)))
		bulk.Release()
		again.Wait(t, 1)
		if s := j.Record().Stage; s != job.StageMirror {
			t.Fatalf("the copier is in stage %s", s)
		}
		q := &blk.Request{Op: op, Off: 5*gran + 1024, Len: 1024}
		if op == blk.OpWrite {
			q = write(q.Off, fill(1024, 2))
		}
		done := r.async(q)
		time.Sleep(10 * time.Millisecond) // what is wrongly let through is there by now
		again.Release()
		r.ended(done)
		r.over(j)
		r.equal(op.String(), mem[1].Bytes(), mem[0].Bytes())
	}
}

// The copy ends however much the guest writes, without a pause.
func TestConverges(t *testing.T) {
	for _, kind := range []string{"memory", "tmpfs"} {
		const size = 8 << 20
		source, target := kinds[kind](t, size), kinds[kind](t, size)
		put(t, source, 0, pattern(1, size))
		r := newRig(t, source, target)
		model := get(t, source, size)
		var stop atomic.Bool
		var wg sync.WaitGroup
		for k := range 2 {
			wg.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(k), 5))
				for !stop.Load() {
					off := rng.Int64N(size/8192)*8192 + int64(k)*4096
					b := fill(4096, byte(rng.Int()))
					copy(model[off:], b)
					if err := r.q.do(write(off, b)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		r.over(r.start(auto))
		stop.Store(true)
		wg.Wait()
		r.equal(kind, get(t, target, size), model)
		if kind == "tmpfs" && r.q.fast.Load() == 0 {
			t.Error("the guest never took the fast way")
		}
	}
}

// Much that is dirty is copied in passes, before writes are mirrored.
func TestDirtyPasses(t *testing.T) {
	const size = 200 << 20
	source, target := image(t, memDir(t), size, false), image(t, memDir(t), size, false)
	f := blktest.NewFault(target)
	r := newRig(t, source, f)
	r.guest(write(0, fill(4096, 1)))
	r.guest(write(180<<20, fill(4096, 2)))
	bulk := r.trap(f, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 180 << 20, Len: 4096, Count: 1, Hold: true})
	pass := r.trap(f, blktest.Rule{Ops: []blk.Op{blk.OpWriteZeroes}, Hold: true})
	j := r.start(nil)
	bulk.Wait(t, 1)
	r.guest(&blk.Request{Op: blk.OpWriteZeroes, Off: 4096, Len: size - 4096, Flags: blk.Unmap})
	bulk.Release()
	pass.Wait(t, 1)
	if rec := r.until(j, "figures", func(rec job.Record) bool { return rec.BytesTotal-rec.BytesDone > 64<<20 }); rec.Stage != job.StageDirty {
		t.Errorf("stage %s with much that is dirty", rec.Stage)
	}
	pass.Release()
	r.over(j)
	r.equal("the target", get(t, target, 1<<20), append(fill(4096, 1), make([]byte, 1<<20-4096)...))
	if got := blocks(t, target); got > 4096 {
		t.Errorf("the target takes %d bytes", got)
	}
}

func TestCancel(t *testing.T) {
	// Before it is ready.
	r, source, target, mem := memRig(t, pattern(1, size))
	hold := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 3 * gran, Len: 512, Hold: true})
	j := r.start(nil)
	hold.Wait(t, 1)
	r.guest(write(0, fill(512, 1)))
	done := make(chan error, 1)
	go func() { done <- j.Cancel(context.Background()) }()
	time.Sleep(5 * time.Millisecond)
	hold.Release()
	r.ended(done)
	if rec := j.Record(); rec.State != job.StateCancelled || rec.TargetConsistent || !strings.Contains(rec.Message, "incomplete") || r.moved.Load() {
		t.Errorf("cancelled as %+v", rec)
	}
	r.stays(source)

	// When it is ready.
	r, source, target, mem = memRig(t, pattern(1, size))
	j = r.start(nil)
	if rec := r.state(j, job.StateReady); !rec.TargetConsistent || rec.Stage != job.StageMirror || rec.ETASeconds > 0 {
		t.Errorf("ready as %+v", rec)
	}
	r.guest(write(gran, fill(512, 2)))
	want := mem[0].Bytes()
	if err := j.Cancel(context.Background()); err != nil {
		t.Fatal(err)
	}
	if rec := j.Record(); rec.State != job.StateCancelled || !rec.TargetConsistent || !strings.Contains(rec.Message, "consistent copy") || r.moved.Load() {
		t.Errorf("cancelled as %+v", rec)
	}
	if target.Count(blk.OpFlush) == 0 {
		t.Error("the copy was not flushed")
	}
	r.guest(write(2*gran, fill(512, 3)))
	r.equal("the copy", mem[1].Bytes(), want)
	r.stays(source)

	// When it is ready, and the target cannot be made durable.
	r, source, target, _ = memRig(t, pattern(1, size))
	j = r.start(nil)
	r.state(j, job.StateReady)
	r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: syscall.EIO})
	if err := j.Cancel(context.Background()); err != nil {
		t.Fatal(err)
	}
	if rec := j.Record(); rec.TargetConsistent || !strings.Contains(rec.Message, "incomplete") {
		t.Errorf("cancelled as %+v", rec)
	}
	r.stays(source)
}

// The end of the daemon leaves the record for the next one.
func TestShutdown(t *testing.T) {
	r, source, _, _ := memRig(t, pattern(1, size))
	j := r.start(nil)
	r.state(j, job.StateReady)
	r.m.Shutdown()
	<-j.Done()
	r.stays(source)
	_, open, err := job.NewManager(r.store)
	if err != nil || len(open) != 1 || job.Ended(open[0].State) {
		b, _ := json.Marshal(open)
		t.Errorf("open jobs: %s, %v", b, err)
	}
}

func TestPauseAndResume(t *testing.T) {
	r, _, target, mem := memRig(t, pattern(1, size))
	first := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
	j := r.start(func(rec *job.Record) { rec.Speed = 16 << 20 })
	first.Wait(t, 1)
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	begun := target.Count(blk.OpWrite)
	first.Release()
	// What is past the gates ends; nothing new begins.
	last, calm := -1, 0
	for calm < 30 {
		time.Sleep(2 * time.Millisecond)
		if n := target.Count(blk.OpWrite); n != last {
			last, calm = n, 0
		} else {
			calm++
		}
	}
	if last > begun+2 {
		t.Errorf("%d pieces were begun after a pause", last-begun)
	}
	r.guest(write(0, fill(512, 9)))
	r.guest(write(7*gran, fill(512, 9)))
	if n := target.Count(blk.OpWrite); n != last || j.Record().State != job.StatePaused {
		t.Error("a paused job copies")
	}
	if err := j.SetSpeed(0); err != nil {
		t.Fatal(err)
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	r.over(j)
	r.equal("the target", mem[1].Bytes(), mem[0].Bytes())
}

// A pause that comes with the last piece keeps the job from being ready, and from switching by itself.
func TestPauseAtTheEnd(t *testing.T) {
	r, _, target, _ := memRig(t, pattern(1, gran))
	last := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true})
	j := r.start(auto)
	last.Wait(t, 1)
	time.Sleep(10 * time.Millisecond) // the other workers have found nothing to do
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	last.Release()
	for end := time.Now().Add(50 * time.Millisecond); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if s := j.Record().State; s != job.StatePaused {
			t.Fatalf("a paused job is %s", s)
		}
	}
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	r.over(j)
}

// A slow copy is smooth: no window of a quarter of a second gets much more than its share.
func TestSpeed(t *testing.T) {
	// A little less than half a piece is let through at once: copiers that pay side by side would all be done with
	// that together.
	const size, gran, speed = 1 << 20, 128 << 10, 20 * (64<<10 - 1)
	target := blktest.NewMemory(size)
	type event struct {
		at time.Duration
		n  int64
	}
	var mu sync.Mutex
	var events []event
	begin := time.Now()
	h := &hooked{Node: target, before: func(r *blk.Request) error {
		mu.Lock()
		defer mu.Unlock()
		events = append(events, event{time.Since(begin), r.Len})
		return nil
	}}
	source := blktest.NewMemory(size)
	put(t, source, 0, pattern(1, size))
	r := newRig(t, source, h)
	j := r.start(func(rec *job.Record) { rec.Speed, rec.Granularity = speed, gran })
	r.state(j, job.StateReady)
	if d, least := time.Since(begin), time.Second*(size-speed/4)/speed; d < least {
		t.Errorf("%d bytes took %v at %d bytes a second", size, d, speed)
	}
	const window = 100 * time.Millisecond
	for i := range events {
		var sum int64
		for _, e := range events[i:] {
			if e.at < events[i].at+window {
				sum += e.n
			}
		}
		// Its share, what the limiter lets through at once, and a few pieces that were late.
		if most := int64(speed*window/time.Second) + speed/20 + 3*gran; sum > most {
			t.Errorf("%d bytes within %v from %v on, want at most %d", sum, window, events[i].at, most)
		}
	}
}

// A change of the speed of a running job takes effect.
func TestSetSpeed(t *testing.T) {
	r, _, _, mem := memRig(t, pattern(1, size))
	j := r.start(func(rec *job.Record) { rec.Speed, rec.SwitchMode = 1000, "auto" })
	time.Sleep(20 * time.Millisecond)
	if j.Record().State != job.StateRunning {
		t.Error("too fast")
	}
	if err := j.SetSpeed(0); err != nil {
		t.Fatal(err)
	}
	r.over(j)
	r.equal("the target", mem[1].Bytes(), mem[0].Bytes())
}

// verify names the first byte that differs, and the guest stays on the source.
func TestVerifyMismatch(t *testing.T) {
	for _, off := range []int64{0, 3*gran + 777, size - 1} {
		source, target := blktest.NewMemory(size), blktest.NewMemory(size)
		put(t, source, 0, pattern(1, size))
		var once sync.Once
		h := &hooked{Node: target, before: func(r *blk.Request) error {
			if r.Op == blk.OpRead {
				once.Do(func() {
					put(t, target, off, []byte{0})
					put(t, target, min(off+100, size-1), []byte{0})
				})
			}
			return nil
		}}
		r := newRig(t, source, h)
		j := r.start(func(rec *job.Record) { rec.Verify, rec.SwitchMode, rec.Granularity = true, "auto", 1<<20 })
		rec := r.state(j, job.StateFailed)
		if !strings.HasSuffix(rec.Error, fmt.Sprintf("differ at offset %d", off)) || rec.TargetConsistent || r.moved.Load() {
			t.Errorf("failed as %+v, want offset %d", rec, off)
		}
		r.stays(source)
	}
}

// A guest that writes during the comparison is no mismatch, not even when the target fails and writes are only logged.
func TestVerifyUnderWrites(t *testing.T) {
	r, _, target, mem := memRig(t, pattern(1, size))
	first := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpRead}, Count: 1, Hold: true})
	j := r.start(func(rec *job.Record) { rec.Verify, rec.Granularity = true, 4096 })
	first.Wait(t, 1)
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(k), 5))
			for range 300 {
				if err := r.q.do(write(rng.Int64N(size/512)*512, fill(512, byte(rng.Int())))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	time.Sleep(2 * time.Millisecond)
	first.Release()
	r.state(j, job.StateReady)
	wg.Wait()
	r.equal("both", mem[1].Bytes(), mem[0].Bytes())
	r.over(j)
}

func TestVerifyWhileTargetFails(t *testing.T) {
	mem := [2]*blktest.Memory{blktest.NewMemory(size), blktest.NewMemory(size)}
	put(t, mem[0], 0, pattern(1, size))
	read, wrote := newGate(t), newGate(t)
	source, target := &hooked{Node: mem[0]}, blktest.NewFault(mem[1])
	r := newRig(t, source, target)
	var reads atomic.Int64
	source.before = func(q *blk.Request) error {
		if q.Op == blk.OpRead && q.Off == 0 && reads.Add(1) == 2 { // to compare
			read.pass()
		}
		return nil
	}
	source.after = func(q *blk.Request) error {
		if q.Op == blk.OpWrite && q.Off == 512 {
			wrote.pass()
		}
		return nil
	}
	j := r.start(func(rec *job.Record) { rec.Verify, rec.OnTargetError = true, job.OnErrorStop })
	r.reached(read)
	bad := target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 5 * gran, Len: 512, Err: syscall.EIO})
	r.guest(write(5*gran, fill(512, 1)))
	bad.Remove()
	// The copier will read the new bytes of a logged write whose mark is still to come.
	done := r.async(write(512, fill(512, 2)))
	r.reached(wrote)
	read.release()
	r.state(j, job.StatePaused)
	wrote.release()
	r.ended(done)
	if err := j.Resume(); err != nil {
		t.Fatal(err)
	}
	r.over(j)
	r.equal("the target", mem[1].Bytes(), mem[0].Bytes())
}

// A block that could not be read for the comparison is not taken as compared.
func TestVerifyReadError(t *testing.T) {
	for side := range 2 {
		mem := [2]*blktest.Memory{blktest.NewMemory(size), blktest.NewMemory(size)}
		put(t, mem[0], 0, pattern(1, size))
		h := [2]*hooked{{Node: mem[0]}, {Node: mem[1]}}
		var reads atomic.Int64
		h[side].before = func(r *blk.Request) error {
			if r.Op == blk.OpRead && r.Off <= 3*gran && 3*gran < r.Off+r.Len && reads.Add(1) == int64(2-side) { // the source was read before
				return syscall.EIO
			}
			return nil
		}
		r := newRig(t, h[0], h[1])
		j := r.start(func(rec *job.Record) {
			rec.Verify, rec.OnSourceError, rec.OnTargetError = true, job.OnErrorStop, job.OnErrorStop
		})
		r.state(j, job.StatePaused)
		if err := j.Resume(); err != nil {
			t.Fatal(err)
		}
		if rec := r.state(j, job.StateReady); rec.VerifiedBytes != size {
			t.Errorf("side %d: ready, and %d bytes of %d were compared", side, rec.VerifiedBytes, size)
		}
		r.over(j)
		r.equal("the target", mem[1].Bytes(), mem[0].Bytes())
	}
}

// Progress and what follows from it.
func TestProgress(t *testing.T) {
	r, _, target, _ := memRig(t, pattern(1, size))
	hold := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: 4 * gran, Len: gran, Hold: true})
	j := r.start(nil)
	hold.Wait(t, 1)
	r.until(j, "figures", func(rec job.Record) bool {
		return rec.Stage == job.StageBulk && rec.BytesTotal == size && rec.BytesDone > 0 && rec.BytesDone < size
	})
	r.guest(write(0, fill(512, 1)))
	r.until(j, "the dirty block", func(rec job.Record) bool { return rec.BytesTotal == size+gran })
	hold.Release()
	r.over(j)
}

// A target that writes back slowly, to which the guest wrote a lot: that is flushed while the guest runs, and what it
// writes meanwhile too, so that little is left for the flush that holds it.
func TestSwitchPause(t *testing.T) {
	const perMiB = 20 * time.Millisecond
	var (
		r        *rig
		dirty    atomic.Int64 // bytes that the target has not flushed
		flushes  atomic.Int64
		held     atomic.Int64 // bytes that were flushed with the guest at rest
		watching atomic.Bool
	)
	part := pattern(2, size)
	target := &hooked{Node: blktest.NewMemory(size), before: func(q *blk.Request) error {
		switch {
		case q.Op == blk.OpWrite:
			dirty.Add(q.Len)
		case q.Op == blk.OpFlush && watching.Load():
			flushes.Add(1)
			n := dirty.Swap(0)
			time.Sleep(time.Duration(n) * perMiB / (1 << 20))
			r.q.mu.Lock()
			rests := r.q.pauses > 0
			r.q.mu.Unlock()
			if rests {
				held.Store(n)
				return nil
			}
			// A quarter of what the target writes back in this time.
			if n = n / 4 &^ (blk.SectorSize - 1); n > 0 {
				return r.q.do(write(0, part[:n]))
			}
		}
		return nil
	}}
	r = newRig(t, blktest.NewMemory(size), target)
	j := r.start(nil)
	r.state(j, job.StateReady)
	r.guest(write(0, part))
	watching.Store(true)
	r.over(j)
	if n := held.Load(); n > size/16 {
		t.Errorf("%d bytes were flushed while the guest was held, of %d", n, size)
	}
	if n := flushes.Load(); n < 2 || n > 9 {
		t.Errorf("%d flushes", n)
	}
	r.equal("the target", get(t, target, size), part)
}

// A flush that takes its time whatever there is to write is not tried again and again.
func TestSwitchSlowFlush(t *testing.T) {
	var flushes atomic.Int64
	target := &hooked{Node: blktest.NewMemory(size), before: func(q *blk.Request) error {
		if q.Op == blk.OpFlush {
			flushes.Add(1)
			time.Sleep(50 * time.Millisecond)
		}
		return nil
	}}
	r := newRig(t, blktest.NewMemory(size), target)
	j := r.start(nil)
	r.state(j, job.StateReady)
	flushes.Store(0)
	r.over(j)
	// A first one, one that is no shorter, and that which holds the guest; more if this machine is busy.
	if n := flushes.Load(); n < 3 || n > 5 {
		t.Errorf("%d flushes, want 3", n)
	}
}
