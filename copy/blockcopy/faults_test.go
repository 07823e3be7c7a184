// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/job"
)

// Rule 2: an error at any I/O pauses the job, and loses nothing: after a resume it ends with equal images.
func TestErrorAtEachIndex(t *testing.T) {
	contents := pattern(1, size)
	clear(contents[4*gran : 6*gran])
	clear(contents[2*gran+8192 : 2*gran+20480])
	for _, c := range []struct {
		source bool
		op     blk.Op
	}{{true, blk.OpRead}, {false, blk.OpWrite}, {false, blk.OpWriteZeroes}} {
		seen := 1
		for i := 0; i < seen; i++ {
			r, source, target, mem := memRig(t, contents)
			r.setup.Blank = false
			put(t, mem[1], 0, fill(size, 0xaa))
			f := target
			if c.source {
				f = source
			}
			tr := r.trap(f, blktest.Rule{Ops: []blk.Op{c.op}, After: i, Count: 1, Err: syscall.EIO})
			j := r.start(onTarget(job.OnErrorStop))
			rec := r.until(j, "pause", func(rec job.Record) bool { return rec.State == job.StatePaused || rec.State == job.StateReady })
			if rec.State == job.StatePaused {
				if !strings.Contains(rec.Error, "input/output error") || rec.TargetConsistent {
					t.Errorf("paused as %+v", rec)
				}
				seen = i + 2
				r.guest(write(int64(i%8)*gran, fill(512, 3)))
				if err := j.Resume(); err != nil {
					t.Fatal(err)
				}
			} else if tr.Caught() > 0 {
				t.Errorf("%v %d failed unnoticed", c.op, i)
			}
			r.over(j)
			r.equal(fmt.Sprintf("%v %d", c.op, i), mem[1].Bytes(), mem[0].Bytes())
		}
		if seen < 3 {
			t.Errorf("%v: only %d I/Os seen", c.op, seen)
		}
	}
}

// An error that stays is reported, even if it is the last piece's, and the guest notices nothing.
func TestPersistentError(t *testing.T) {
	for _, policy := range []string{job.OnErrorReport, job.OnErrorEnospc, job.OnErrorStop} {
		for _, off := range []int64{0, size - gran} {
			for _, onSource := range []bool{false, true} {
				r, source, target, _ := memRig(t, pattern(1, size))
				f, ops := target, []blk.Op{blk.OpWrite}
				if onSource {
					f, ops = source, []blk.Op{blk.OpRead}
				}
				tr := r.trap(f, blktest.Rule{Ops: ops, Off: off, Len: gran, Err: syscall.EIO})
				j := r.start(onTarget(policy))
				want := job.StateFailed
				if policy == job.OnErrorStop {
					want = job.StatePaused
				}
				rec := r.state(j, want)
				if !strings.Contains(rec.Error, "input/output error") || rec.TargetConsistent {
					t.Errorf("%s as %+v", want, rec)
				}
				r.guest(write(off, fill(512, 2)))
				if policy != job.OnErrorStop {
					r.stays(source)
					continue
				}
				tr.Remove()
				if err := j.Resume(); err != nil {
					t.Fatal(err)
				}
				r.over(j)
			}
		}
	}
}

// An error of the source is handled as the user said of the source, one of the target as he said of the target.
func TestErrorPolicies(t *testing.T) {
	for _, onSource := range []bool{true, false} {
		r, source, target, _ := memRig(t, pattern(1, size))
		f, op := target, blk.OpWrite
		if onSource {
			f, op = source, blk.OpRead
		}
		r.trap(f, blktest.Rule{Ops: []blk.Op{op}, Err: syscall.EIO})
		r.state(r.start(func(rec *job.Record) {
			rec.OnSourceError, rec.OnTargetError = job.OnErrorReport, job.OnErrorStop
		}), map[bool]string{true: job.StateFailed, false: job.StatePaused}[onSource])
	}
}

// Rule 11: what the target does is no matter of the guest's. A full one pauses the job, which ends when there is room.
func TestTargetFailsGuestWrite(t *testing.T) {
	for _, c := range []struct {
		policy string
		errno  syscall.Errno
		state  string
	}{
		{job.OnErrorReport, syscall.ENOSPC, job.StateFailed},
		{job.OnErrorReport, syscall.EIO, job.StateFailed},
		{job.OnErrorEnospc, syscall.EIO, job.StateFailed},
		{job.OnErrorEnospc, syscall.ENOSPC, job.StatePaused},
		{job.OnErrorEnospc, syscall.EDQUOT, job.StatePaused},
		{job.OnErrorStop, syscall.EIO, job.StatePaused},
	} {
		for _, op := range []blk.Op{blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes} {
			if op != blk.OpWrite && c.errno != syscall.ENOSPC {
				continue
			}
			r, source, target, mem := memRig(t, pattern(1, size))
			j := r.start(onTarget(c.policy))
			r.state(j, job.StateReady)
			tr := r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpWriteZeroes}, Err: c.errno})
			q := &blk.Request{Op: op, Off: gran, Len: 1024}
			if op == blk.OpWrite {
				q = write(gran, fill(1024, 5))
			}
			r.guest(q)
			rec := r.state(j, c.state)
			if rec.TargetConsistent || !strings.Contains(rec.Error, c.errno.Error()) {
				t.Errorf("%s, %v: %+v", c.policy, c.errno, rec)
			}
			r.guest(write(7*gran, fill(1024, 6)))
			if c.state == job.StateFailed {
				if r.stays(source); !strings.Contains(rec.Message, "incomplete") && !strings.Contains(j.Record().Message, "incomplete") {
					t.Errorf("the message is %q", j.Record().Message)
				}
				continue
			}
			// Still full: it pauses again.
			if err := j.Resume(); err != nil {
				t.Fatal(err)
			}
			r.until(j, "the second pause", func(rec job.Record) bool { return rec.State == job.StatePaused && tr.Caught() > 1 })
			tr.Remove()
			r.until(j, "ready", func(rec job.Record) bool {
				// An error of before the resume pauses it again.
				if rec.State == job.StatePaused && j.Resume() != nil {
					t.Error("cannot be resumed")
				}
				return rec.State == job.StateReady
			})
			r.over(j)
			r.equal("the target", mem[1].Bytes(), mem[0].Bytes())
		}
	}
}

// forgetful is a disk whose flush fails once and then has lost what was written.
type forgetful struct {
	*blktest.Memory
	fail atomic.Int64 // that many flushes from now
}

func (f *forgetful) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpFlush && f.fail.Add(-1) == 0 {
		junk := fill(int(f.Info().Size), 0xee)
		if err := f.Memory.Do(t, write(0, junk)); err != nil {
			return err
		}
		return syscall.EIO
	}
	return f.Memory.Do(t, r)
}

// Rules 7 and 11: after a failed flush of the target nothing on it is relied on: all is copied again.
func TestTargetFlushFails(t *testing.T) {
	for _, c := range []string{"the guest's", "before the switch", "at the switch"} {
		mem := [2]*blktest.Memory{blktest.NewMemory(size), blktest.NewMemory(size)}
		contents := pattern(1, size)
		clear(contents[2*gran : 5*gran])
		put(t, mem[0], 0, contents)
		target := &forgetful{Memory: mem[1]}
		r := newRig(t, mem[0], target)
		j := r.start(onTarget(job.OnErrorStop))
		r.state(j, job.StateReady)
		switch c {
		case "at the switch":
			target.fail.Store(2)
		default:
			target.fail.Store(1)
		}
		if c == "the guest's" {
			r.guest(&blk.Request{Op: blk.OpFlush})
		} else if err := j.AskSwitch(); err != nil {
			t.Fatal(err)
		}
		if rec := r.state(j, job.StatePaused); !strings.Contains(rec.Error, "input/output error") || rec.TargetConsistent || r.moved.Load() {
			t.Errorf("%s flush: %+v", c, rec)
		}
		r.guest(write(0, fill(512, 4)))
		if err := j.Resume(); err != nil {
			t.Fatal(err)
		}
		r.over(j)
		r.equal(c+" flush", mem[1].Bytes(), mem[0].Bytes())
	}
}

var errCommit = errors.New("the journal is full")

// Rule 7: if the switch cannot be recorded, the guest stays on the source, mirrored, and the user may try again.
func TestCommitFails(t *testing.T) {
	r, _, _, mem := memRig(t, pattern(1, size))
	var fail atomic.Bool
	fail.Store(true)
	commit := r.setup.Commit
	r.setup.Commit = func() error {
		if fail.Load() {
			return errCommit
		}
		return commit()
	}
	j := r.start(nil)
	r.state(j, job.StateReady)
	if err := j.AskSwitch(); err != nil {
		t.Fatal(err)
	}
	rec := r.until(j, "the failure", func(rec job.Record) bool { return strings.Contains(rec.Error, errCommit.Error()) })
	if rec.State != job.StateReady || rec.Stage != job.StageMirror || !rec.TargetConsistent {
		t.Errorf("after a switch that failed: %+v", rec)
	}
	r.guest(write(gran, fill(512, 2)))
	r.equal("both", mem[1].Bytes(), mem[0].Bytes())
	fail.Store(false)
	r.over(j)
}

// Rule 7: as long as it is not known which image the next daemon finds the disk on, both have every write, the job does not
// end, and nothing but the record is waited for.
func TestCommitUnsure(t *testing.T) {
	was := blockcopy.SetSettleEvery(time.Millisecond)
	t.Cleanup(func() { blockcopy.SetSettleEvery(was) })
	for _, c := range []string{"cancelled", "auto", "again", "settled", "target fails"} {
		r, source, target, mem := memRig(t, pattern(1, size))
		var broken, tried atomic.Int64
		broken.Store(1)
		commit := r.setup.Commit
		r.setup.Commit = func() error {
			if broken.Load() > 0 {
				return errCommit
			}
			return commit()
		}
		r.setup.Settle = func() error {
			tried.Add(1)
			if broken.Load() > 0 {
				return errCommit
			}
			return nil
		}
		again := func() {
			t.Helper()
			n := tried.Load()
			r.eventually("another try", func() bool { return tried.Load() > n+1 })
		}
		set := func(*job.Record) {}
		if c == "auto" {
			set = auto
		}
		j := r.start(set)
		if c != "auto" {
			r.state(j, job.StateReady)
			if err := j.AskSwitch(); err != nil {
				t.Fatal(err)
			}
		}
		again()
		ended := make(chan error, 1)
		switch c {
		case "cancelled":
			go func() { ended <- j.Cancel(context.Background()) }()
			r.until(j, "the reason", func(rec job.Record) bool { return strings.Contains(rec.Message, "cannot end") })
		case "target fails":
			r.trap(target, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.ENOSPC})
			r.guest(write(0, fill(512, 1)))
			r.state(j, job.StatePaused)
		}
		again()
		if job.Ended(j.Record().State) {
			t.Fatalf("%s: the job has ended: %+v", c, j.Record())
		}
		r.guest(write(gran, fill(512, 2)))
		if c != "target fails" {
			r.equal(c, mem[1].Bytes(), mem[0].Bytes())
		}
		broken.Store(0)
		switch c {
		case "cancelled":
			if err := <-ended; err != nil {
				t.Error(err)
			}
			r.stays(source)
		case "auto":
			r.state(j, job.StateFailed)
			r.stays(source)
		case "again":
			r.over(j)
			r.stays(target)
		default:
			n := tried.Load()
			r.eventually("the end of the doubt", func() bool {
				time.Sleep(10 * time.Millisecond)
				m := tried.Load()
				defer func() { n = m }()
				return m == n
			})
			if err := j.Cancel(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestAutoCommitFails(t *testing.T) {
	r, source, _, mem := memRig(t, pattern(1, size))
	r.setup.Commit = func() error { return errCommit }
	j := r.start(auto)
	if rec := r.state(j, job.StateFailed); !strings.Contains(rec.Error, errCommit.Error()) {
		t.Errorf("failed as %+v", rec)
	}
	r.stays(source)
	r.guest(write(0, fill(512, 2)))
	if b := mem[0].Bytes(); b[0] != 2 {
		t.Error("the guest's write is not on the source")
	}
}

// A guest's write that fails on the source leaves a dirty block. That is no fault of the target's: the block is copied
// again before the switch.
func TestSourceFailsGuestWrite(t *testing.T) {
	r, source, _, mem := memRig(t, pattern(1, size))
	j := r.start(func(rec *job.Record) { rec.OnTargetError = job.OnErrorReport })
	r.state(j, job.StateReady)
	r.trap(source, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Err: syscall.EIO})
	if err := r.q.do(write(gran, fill(512, 7))); err == nil {
		t.Error("the guest is not told")
	}
	r.over(j)
	r.equal("the target", mem[1].Bytes(), mem[0].Bytes())

	// Cancelled instead, the target is not called a copy: it may hold what the guest was told is not written.
	r, source, _, _ = memRig(t, pattern(1, size))
	j = r.start(nil)
	r.state(j, job.StateReady)
	r.trap(source, blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Err: syscall.EIO})
	if err := r.q.do(write(gran, fill(512, 7))); err == nil {
		t.Error("the guest is not told")
	}
	if err := j.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	if rec := j.Record(); rec.TargetConsistent {
		t.Errorf("%+v", rec)
	}
}

// Rule 7: wherever the power goes, the image that the record names holds every write that was flushed.
func TestPowerCut(t *testing.T) {
	s := seed(t)
	for round := range uint64(8) {
		powerCut(t, s+round, round%2 == 0)
	}
}

const (
	pcBlocks = 64
	pcBlock  = 4096
)

// stamped fills a block whose sectors say which block and version they are.
func stamped(block int, version uint64) []byte {
	b := make([]byte, pcBlock)
	for at := 0; at < pcBlock; at += blk.SectorSize {
		binary.LittleEndian.PutUint64(b[at:], uint64(block)+1)
		binary.LittleEndian.PutUint64(b[at+8:], version)
	}
	return b
}

func powerCut(t *testing.T, seed uint64, blank bool) {
	rng := rand.New(rand.NewPCG(seed, 0))
	disks := [2]*blktest.CrashDisk{blktest.NewCrashDisk(pcBlocks * pcBlock), blktest.NewCrashDisk(pcBlocks * pcBlock)}
	var (
		mu      sync.Mutex
		issued  [pcBlocks]uint64
		acked   [pcBlocks]uint64
		durable [pcBlocks]uint64
		on      int // which image the record names
		cuts    int
	)
	task := blk.NewTask()
	for b := range pcBlocks {
		put(t, disks[0], int64(b)*pcBlock, stamped(b, 0))
	}
	if err := disks[0].Do(task, &blk.Request{Op: blk.OpFlush}); err != nil {
		t.Fatal(err)
	}
	if !blank {
		put(t, disks[1], 0, fill(pcBlocks*pcBlock, 0xaa))
	}
	cut := func(when string) {
		mu.Lock()
		defer mu.Unlock()
		if t.Failed() {
			return
		}
		cuts++
		img := disks[on].Crash(rng).Bytes()
		for b := range pcBlocks {
			for at := 0; at < pcBlock; at += blk.SectorSize {
				s := img[b*pcBlock+at:]
				id, v := binary.LittleEndian.Uint64(s), binary.LittleEndian.Uint64(s[8:])
				if id != uint64(b)+1 || v < durable[b] || v > issued[b] {
					t.Errorf("seed %d: power cut %s, image %d: sector %d of block %d has id %d version %d, flushed was %d, written %d",
						seed, when, on, at/blk.SectorSize, b, id, v, durable[b], issued[b])
					return
				}
			}
		}
	}
	target := &hooked{Node: disks[1], after: func(q *blk.Request) error {
		if q.Op.Changes() {
			cut("while copying")
		}
		return nil
	}}
	r := newRig(t, disks[0], target)
	r.setup.Blank = blank
	r.setup.Commit = func() error {
		cut("before the commit")
		mu.Lock()
		on = 1
		mu.Unlock()
		cut("after the commit")
		r.moved.Store(true)
		return nil
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	// Two queues with blocks of their own; a flush covers what either had acknowledged before.
	for k := range 2 {
		rng := rand.New(rand.NewPCG(seed, uint64(k)+1))
		flushes := rng.IntN(2) == 0
		wg.Go(func() {
			for !stop.Load() && !t.Failed() {
				if flushes && rng.IntN(20) == 0 {
					mu.Lock()
					before := acked
					mu.Unlock()
					if err := r.q.do(&blk.Request{Op: blk.OpFlush}); err != nil {
						t.Error(err)
					}
					mu.Lock()
					for b := range before {
						durable[b] = max(durable[b], before[b])
					}
					mu.Unlock()
					cut("after a flush")
					continue
				}
				b := rng.IntN(pcBlocks/2)*2 + k
				mu.Lock()
				issued[b]++
				v := issued[b]
				mu.Unlock()
				q := write(int64(b)*pcBlock, stamped(b, v))
				fua := rng.IntN(8) == 0
				if fua {
					q.Flags = blk.FUA
				}
				if err := r.q.do(q); err != nil {
					t.Error(err)
				}
				mu.Lock()
				acked[b] = v
				if fua {
					durable[b] = v
				}
				mu.Unlock()
				time.Sleep(time.Duration(rng.IntN(100)) * time.Microsecond)
			}
		})
	}
	j := r.start(func(rec *job.Record) { rec.SwitchMode, rec.Granularity, rec.Speed = "auto", 8192, 2<<20 })
	r.over(j)
	time.Sleep(2 * time.Millisecond)
	stop.Store(true)
	wg.Wait()
	cut("at the end")
	if cuts < 20 {
		t.Errorf("only %d power cuts", cuts)
	}
}
