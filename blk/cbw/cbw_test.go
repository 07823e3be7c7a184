// SPDX-License-Identifier: Apache-2.0

package cbw_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cbw"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/blk/raw"
)

const (
	cluster = 64 << 10
	size    = 12*cluster + 9*512
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pattern is never zero, and different in each sector.
func pattern(seed byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i/512*7+i%509) | 1
	}
	return b
}

func write(t testing.TB, n blk.Node, off int64, b []byte) {
	t.Helper()
	must(t, blk.Do(blk.NewTask(), n, request(blk.OpWrite, off, b)))
}

func request(op blk.Op, off int64, b []byte) *blk.Request {
	return &blk.Request{Op: op, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

func contents(t testing.TB, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	must(t, blk.Do(blk.NewTask(), n, request(blk.OpRead, 0, b)))
	return b
}

// rig is the filter over one disk in memory, with another as its target, and traps over both.
type rig struct {
	*testing.T
	n              *cbw.Node
	source, target *blktest.Fault
	was            []byte // at the instant
	failed         func(error) error
	failures       atomic.Int64
}

func newRig(t *testing.T, o cbw.Options) *rig {
	t.Helper()
	r := &rig{T: t, was: pattern(1, size)}
	clear(r.was[3*cluster : 5*cluster])
	r.source, r.target = blktest.NewFault(blktest.NewMemory(size)), blktest.NewFault(blktest.NewMemory(size))
	write(t, r.source, 0, r.was)
	o.Source, o.Target, o.Cluster, o.Grain = r.source, r.target, cluster, 4096
	o.Failed = func(err error) error {
		r.failures.Add(1)
		if r.failed == nil {
			return err
		}
		return r.failed(err)
	}
	r.n = cbw.New(r.source, o)
	return r
}

// guest writes without pause for errors: a guest never sees any.
func (r *rig) guest(off int64, b []byte) {
	r.Helper()
	write(r, r.n, off, b)
}

// copies copies the rest and compares the target with what the disk was.
func (r *rig) copies() {
	r.Helper()
	must(r, r.n.Copy(blk.NewTask(), 0, size))
	if n := r.n.Todo.Count(); n > 0 {
		r.Errorf("%d clusters are not copied", n)
	}
	if !bytes.Equal(contents(r, r.target), r.was) {
		r.Error("the target is not what the disk was")
	}
}

// Each kind of change is preceded by a copy of the whole clusters, once, and nothing else is copied.
func TestCopiesBefore(t *testing.T) {
	r := newRig(t, cbw.Options{Blank: true})
	r.guest(cluster+512, pattern(2, cluster)) // of two clusters
	if got := contents(t, r.target); !bytes.Equal(got[cluster:3*cluster], r.was[cluster:3*cluster]) || !bytes.Equal(got[:cluster], make([]byte, cluster)) {
		t.Error("not exactly the two clusters that were written to are on the target")
	}
	if r.n.Todo.Any(cluster, 2*cluster) || r.n.Todo.Count() != size/cluster+1-2 {
		t.Errorf("still to be copied: %d clusters", r.n.Todo.Count())
	}
	reads := r.source.Count(blk.OpRead)
	r.guest(cluster, pattern(3, 4096))
	if r.source.Count(blk.OpRead) != reads {
		t.Error("a cluster that is on the target is read again")
	}
	r.guest(3*cluster, pattern(4, 2*cluster)) // zeros
	task := blk.NewTask()
	must(t, blk.Do(task, r.n, &blk.Request{Op: blk.OpDiscard, Off: 6 * cluster, Len: 512}))
	must(t, blk.Do(task, r.n, &blk.Request{Op: blk.OpWriteZeroes, Off: 7 * cluster, Len: 512}))
	r.guest(size-512, pattern(5, 512))
	must(t, blk.Do(task, r.n, &blk.Request{Op: blk.OpFlush}))
	if !bytes.Equal(contents(t, r.n)[cluster:][:4096], pattern(3, 4096)) {
		t.Error("the guest does not read what it wrote")
	}
	r.copies()
	if err := blk.Do(task, r.n, &blk.Request{Op: 99}); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("an unknown request: %v", err)
	}
}

// Zeros overwrite what a target had before, and are left out of a blank one.
func TestZeros(t *testing.T) {
	r := newRig(t, cbw.Options{})
	write(t, r.target, 0, pattern(9, size))
	r.copies()
	r = newRig(t, cbw.Options{Blank: true})
	r.copies()
	if r.target.Count(blk.OpWriteZeroes) > 0 {
		t.Error("zeros are written to a target that has them")
	}
}

// An image that holds nothing but what is copied holds zeros, too: whatever is put behind it does not show.
func TestZerosExplicit(t *testing.T) {
	for _, version := range []int{2, 3} {
		task := blk.NewTask()
		source := blktest.NewMemory(size)
		write(t, source, cluster, pattern(1, cluster))
		storage := blktest.NewMemory(0)
		must(t, qcow2.Create(task, storage, qcow2.CreateOptions{Size: size, Version: version}))
		target, err := qcow2.Open(task, storage, qcow2.Options{})
		must(t, err)
		n := cbw.New(source, cbw.Options{Source: source, Target: target, Cluster: cluster, Grain: cluster, Explicit: true})
		must(t, n.Copy(task, 0, size))
		behind := blktest.NewMemory(size)
		write(t, behind, 0, pattern(2, size))
		must(t, target.SetBacking(task, behind, "behind", "raw"))
		if !bytes.Equal(contents(t, target), contents(t, source)) {
			t.Errorf("version %d: what is behind the target shows", version)
		}
		must(t, target.Close())
	}
}

// A guest that waits for a target that hangs is let go at once when the backup ends, with its write done, and what it
// changes from then on is not copied.
func TestBreakLetsGo(t *testing.T) {
	r := newRig(t, cbw.Options{Blank: true})
	trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true})
	var guests sync.WaitGroup
	for k := range int64(4) {
		guests.Go(func() { r.guest(k*512, pattern(byte(k), 512)) })
	}
	guests.Go(func() { r.guest(8*cluster, pattern(7, cluster)) })
	copier := make(chan error)
	go func() { copier <- r.n.Copy(blk.NewTask(), 9*cluster, cluster) }()
	trap.Wait(t, 3)
	gone := make(chan struct{})
	go func() { guests.Wait(); close(gone) }()
	select {
	case <-gone:
		t.Fatal("the guest does not wait for the target")
	case <-time.After(20 * time.Millisecond):
	}
	reason := errors.New("cancelled")
	r.n.Break(reason)
	r.n.Break(errors.New("later"))
	<-gone
	r.guest(10*cluster, pattern(8, cluster))
	trap.Release()
	if err := <-copier; err != nil && !errors.Is(err, reason) {
		t.Error(err)
	}
	r.n.Wait()
	<-r.n.Broken()
	if !errors.Is(r.n.Reason(), reason) {
		t.Errorf("the reason: %v", r.n.Reason())
	}
	if err := r.n.Copy(blk.NewTask(), 0, size); !errors.Is(err, reason) {
		t.Errorf("a copy after the end: %v", err)
	}
	if got := contents(t, r.source); !bytes.Equal(got[8*cluster:9*cluster], pattern(7, cluster)) || !bytes.Equal(got[10*cluster:11*cluster], pattern(8, cluster)) {
		t.Error("a write of the guest is lost")
	}
	if !bytes.Equal(contents(t, r.target)[10*cluster:11*cluster], make([]byte, cluster)) {
		t.Error("copied after the end")
	}
}

// A target that hangs breaks the backup after the timeout, and not before.
func TestTimeout(t *testing.T) {
	r := newRig(t, cbw.Options{Blank: true, Timeout: 100 * time.Millisecond})
	trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true})
	begin := time.Now()
	r.guest(0, pattern(2, 512))
	if took := time.Since(begin); took < 100*time.Millisecond {
		t.Errorf("the guest waited for %v", took)
	}
	if err := r.n.Reason(); err == nil || !strings.Contains(err.Error(), "100ms") {
		t.Errorf("the reason: %v", err)
	}
	trap.Release()
	r.n.Wait()
}

// Every request to source and target fails once: the guest notices nothing. The backup is broken, or, if that is tried
// again, complete.
func TestFaults(t *testing.T) {
	for _, hold := range []bool{false, true} {
		for _, ofSource := range []bool{false, true} {
			for i := 0; ; i++ {
				r := newRig(t, cbw.Options{})
				write(t, r.target, 0, pattern(9, size))
				node, ops := r.target, []blk.Op{blk.OpWrite, blk.OpWriteZeroes}
				if ofSource {
					node, ops = r.source, []blk.Op{blk.OpRead}
				}
				var isSource atomic.Bool
				r.failed = func(err error) error {
					var src *cbw.SourceError
					isSource.Store(errors.As(err, &src))
					if !errors.Is(err, syscall.ENOSPC) {
						t.Errorf("failed with %v", err)
					}
					if hold {
						return nil
					}
					return err
				}
				trap := node.Add(blktest.Rule{Ops: ops, After: i, Count: 1, Err: syscall.ENOSPC})
				for off := int64(0); off < size; off += cluster {
					r.guest(off, pattern(3, 512))
				}
				if trap.Caught() == 0 {
					if i < size/cluster-2 {
						t.Errorf("only %d requests", i)
					}
					break
				}
				if isSource.Load() != ofSource || r.failures.Load() != 1 {
					t.Fatalf("request %d: %d failures, source %v", i, r.failures.Load(), isSource.Load())
				}
				if hold {
					r.copies()
				} else if !errors.Is(r.n.Reason(), syscall.ENOSPC) {
					t.Errorf("request %d: %v", i, r.n.Reason())
				}
				got := contents(t, r.source)
				for off := int64(0); off < size; off += cluster {
					if !bytes.Equal(got[off:off+512], pattern(3, 512)) {
						t.Fatalf("request %d: the guest's write at %d is lost", i, off)
					}
				}
				r.n.Wait()
			}
		}
	}
}

// An error of the job's own copying leaves what was not copied to be copied.
func TestCopyFails(t *testing.T) {
	for i := range 6 {
		r := newRig(t, cbw.Options{})
		trap := r.target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpWriteZeroes}, After: i, Count: 1, Err: syscall.EIO})
		err := r.n.Copy(blk.NewTask(), 0, size)
		if failed := trap.Caught() > 0; errors.Is(err, syscall.EIO) != failed || r.n.Reason() != nil || failed == (r.n.Todo.Count() == 0) {
			t.Errorf("request %d: %v, %d clusters left", i, err, r.n.Todo.Count())
		}
		r.copies()
	}
}

// The filter is a disk like any other, also with a target that fails.
func TestConformance(t *testing.T) {
	for _, broken := range []bool{false, true} {
		t.Run(fmt.Sprintf("broken=%v", broken), func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				f := blktest.NewFault(blktest.NewMemory(size))
				if broken {
					f.Add(blktest.Rule{Err: syscall.EIO})
				}
				m := blktest.NewMemory(size)
				return cbw.New(m, cbw.Options{Source: m, Target: f, Cluster: cluster, Grain: 4096, Failed: func(err error) error { return err }})
			})
		})
	}
}

// guest does I/O as a queue does: on extents where it gets them, else through Do.
func guest(task *blk.Task, n blk.Node, q *blk.Request) error {
	if q.Op == blk.OpWrite {
		if e, ok := n.TryMap(q.Op, q.Off, q.Len); ok && e.Len >= q.Len && e.Host != nil && e.State == blk.Data {
			return task.WriteAt(e.Host, q.Data, e.HostOff, false)
		}
	}
	return blk.Do(task, n, q)
}

func openRaw(t *testing.T, size int64) blk.Node {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	must(t, file.Create(path, size))
	f, err := file.Open(path, file.Options{})
	must(t, err)
	return raw.Open(f)
}

func openQcow2(t *testing.T, o qcow2.CreateOptions, backing blk.Node) blk.Node {
	t.Helper()
	path, task := filepath.Join(t.TempDir(), "disk"), blk.NewTask()
	must(t, file.Create(path, 0))
	f, err := file.Open(path, file.Options{Grows: true})
	must(t, err)
	must(t, qcow2.Create(task, f, o))
	n, err := qcow2.Open(task, f, qcow2.Options{Backing: backing})
	must(t, err)
	return n
}

// Thousands of writes, discards and zeroes of several guests against several copiers, with slow storage now and then:
// the target is what the disk was at the instant, and the disk what the guests made of it.
func TestRace(t *testing.T) {
	const total = 48*cluster + 4096
	const rounds = 5
	for name, rig := range map[string]struct {
		source, target func(*testing.T) blk.Node
		o              cbw.Options
	}{
		"raw": {
			func(t *testing.T) blk.Node { return openRaw(t, total) },
			func(t *testing.T) blk.Node { return openRaw(t, total) },
			cbw.Options{Cluster: cluster, Grain: 4096, Blank: true},
		},
		"qcow2": {
			func(t *testing.T) blk.Node { return openQcow2(t, qcow2.CreateOptions{Size: total}, nil) },
			func(t *testing.T) blk.Node {
				return openQcow2(t, qcow2.CreateOptions{Size: total, ClusterSize: 128 << 10}, nil)
			},
			cbw.Options{Cluster: 2 * cluster, Grain: 2 * cluster, Blank: true},
		},
		"over a base": {
			func(t *testing.T) blk.Node { return openQcow2(t, qcow2.CreateOptions{Size: total}, nil) },
			func(t *testing.T) blk.Node {
				base := openRaw(t, total)
				write(t, base, 0, pattern(9, total))
				return openQcow2(t, qcow2.CreateOptions{Size: total, ClusterSize: 4096, BackingFile: "b", BackingFormat: "raw"}, base)
			},
			cbw.Options{Cluster: cluster, Grain: 4096},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for range rounds {
				race(t, rig.source(t), rig.target(t), rig.o, total)
				if t.Failed() {
					return
				}
			}
		})
	}
}

func race(t *testing.T, source, target blk.Node, o cbw.Options, total int64) {
	const guests, ops = 4, 80
	seed := uint64(time.Now().UnixNano())
	was := pattern(byte(seed), int(total))
	clear(was[total/8 : total/4])
	for off := total / 2; off < total*3/4; off += 2 * 4096 {
		clear(was[off : off+4096])
	}
	write(t, source, 0, was[:total/8])
	write(t, source, total/4, was[total/4:])
	slow := blktest.NewFault(source)
	slow.Transparent = true
	o.Source, o.Target = slow, target
	o.Failed = func(err error) error { t.Error(err); return err }
	n := cbw.New(slow, o)
	now := slices.Clone(was)
	var wg sync.WaitGroup
	for k := range int64(guests) {
		wg.Go(func() {
			rng, task := rand.New(rand.NewPCG(seed, uint64(k))), blk.NewTask()
			for range ops {
				// A range of the guest's own; each cluster has some of all guests.
				const block = 4096
				off := (rng.Int64N(total/block/guests)*guests + k) * block
				l := (1 + rng.Int64N(block/512)) * 512
				b := bytes.Repeat([]byte{byte(rng.Uint32())}, int(l))
				q := request(blk.OpWrite, off, b)
				if op := rng.IntN(6); op < 2 {
					q.Op, q.Data = [...]blk.Op{blk.OpDiscard, blk.OpWriteZeroes}[op], nil
				}
				if err := guest(task, n, q); err != nil {
					t.Error(err)
					return
				}
				if q.Op == blk.OpWriteZeroes {
					clear(b)
				}
				if q.Op == blk.OpDiscard {
					if err := blk.Do(task, n, request(blk.OpRead, off, b)); err != nil {
						t.Error(err)
						return
					}
				}
				copy(now[off:], b)
			}
		})
	}
	var at atomic.Int64
	for range 3 {
		wg.Go(func() {
			task := blk.NewTask()
			for {
				const piece = 4 * cluster
				off := at.Add(piece) - piece
				if off >= total {
					return
				}
				if err := n.Copy(task, off, min(piece, total-off)); err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	wg.Wait()
	n.Wait()
	if c := n.Todo.Count(); c > 0 {
		t.Errorf("%d clusters are not copied", c)
	}
	for what, c := range map[string]struct{ got, want []byte }{"target": {contents(t, target), was}, "disk": {contents(t, source), now}} {
		for i := range c.want {
			if c.got[i] != c.want[i] {
				t.Errorf("seed %d: the %s is wrong at %d", seed, what, i)
				break
			}
		}
	}
	must(t, n.Close())
}

// The fast path neither copies nor allocates where nothing is to be copied any more.
func TestFastPath(t *testing.T) {
	source := openRaw(t, size)
	n := cbw.New(source, cbw.Options{Source: source, Target: blktest.NewMemory(size), Cluster: cluster, Grain: 4096, Blank: true})
	defer n.Close()
	if _, ok := n.TryMap(blk.OpWrite, 0, 4096); ok {
		t.Error("an extent for writing to what is to be copied")
	}
	if _, ok := n.TryMap(blk.OpRead, 0, 4096); !ok {
		t.Error("no extent for reading")
	}
	must(t, n.Copy(blk.NewTask(), 0, cluster))
	ok := false
	if a := testing.AllocsPerRun(100, func() { _, ok = n.TryMap(blk.OpWrite, 0, 4096) }); a > 0 || !ok {
		t.Errorf("what is copied: an extent %v, %v allocations", ok, a)
	}
	if _, ok := n.TryMap(blk.OpWrite, 4096, cluster); ok {
		t.Error("an extent for writing to what is to be copied in part")
	}
	n.Break(errors.New("over"))
	if _, ok := n.TryMap(blk.OpWrite, cluster, 4096); !ok {
		t.Error("no extent for writing after the end")
	}
}
