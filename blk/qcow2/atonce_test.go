// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// hooked lets a test decide what becomes of a request: do carries it out.
type hooked struct {
	*blktest.Memory
	hook atomic.Pointer[func(r *blk.Request, do func() error) error]
}

func (h *hooked) Do(t *blk.Task, r *blk.Request) error {
	do := func() error { return h.Memory.Do(t, r) }
	if hook := h.hook.Load(); hook != nil {
		return (*hook)(r, do)
	}
	return do()
}

// checkNow has Check find no errors in what the storage holds at this moment, as if the program had been killed.
func checkNow(t *testing.T, storage blk.Node) {
	t.Helper()
	if r, err := Check(blk.NewTask(), storage, RepairNone); err != nil || r.Errors > 0 {
		t.Fatalf("%+v, %v", r, err)
	}
}

// TestFreeAtOnce: what a failed change of the tables gives up may still be what the storage points to. It is not freed
// by somebody who repeats an earlier failed change at that moment.
func TestFreeAtOnce(t *testing.T) {
	const size, far = 256 << 10, 64 << 10 // clusters there have another table
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: size, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	h := &hooked{Memory: m}
	n := mustOpen(t, h, Options{Name: "test"})
	writeAt(t, n, 0, pattern(1, 512))
	writeAt(t, n, far, pattern(2, 512))
	l1 := n.l1.Load()
	first, second := l1.tables[0].Load().host, l1.tables[far>>n.l1Shift].Load().host

	var linked, discarded, flushes atomic.Int64
	atLink, atFlush := make(chan struct{}), [2]chan struct{}{make(chan struct{}), make(chan struct{})}
	goLink, goFlush := make(chan struct{}), [2]chan struct{}{make(chan struct{}), make(chan struct{})}
	hook := func(r *blk.Request, do func() error) error {
		switch {
		case r.Op == blk.OpWrite && r.Off == first && linked.Add(1) == 1:
			close(atLink)
			<-goLink
			_ = do()
			return syscall.EIO // and yet it was written
		case r.Op == blk.OpWrite && r.Off == second && discarded.Add(1) == 1:
			return syscall.EIO
		case r.Op == blk.OpFlush:
			if i := flushes.Add(1) - 1; i < 2 {
				close(atFlush[i])
				<-goFlush[i]
			}
		}
		return do()
	}
	h.hook.Store(&hook)
	run := func(r *blk.Request) chan error {
		done := make(chan error, 1)
		go func() { done <- blk.Do(blk.NewTask(), n, r) }()
		return done
	}
	written := run(&blk.Request{Op: blk.OpWrite, Off: 10 * 512, Len: 512, Data: blk.BytesVec(nil, pattern(3, 512))})
	<-atLink
	flushed := run(&blk.Request{Op: blk.OpFlush})
	<-atFlush[0]
	if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpDiscard, Off: far, Len: 512}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the discard says %v", err)
	}
	close(goFlush[0])
	<-atFlush[1] // the discard has been repeated
	close(goLink)
	if err := <-written; !errors.Is(err, syscall.EIO) {
		t.Fatalf("the write says %v", err)
	}
	close(goFlush[1])
	if err := <-flushed; err != nil {
		t.Fatal(err)
	}
	checkNow(t, m)
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestReuseAtOnce: nor is it given to somebody who began before the change failed, and has not settled that.
func TestReuseAtOnce(t *testing.T) {
	const size, far = 256 << 10, 64 << 10
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: size, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	n := mustOpen(t, m, Options{Name: "test"})
	writeAt(t, n, 0, pattern(1, 512))
	writeAt(t, n, far, pattern(2, 512))
	l1 := n.l1.Load()
	first, second := l1.tables[0].Load().host, l1.tables[far>>n.l1Shift].Load().host
	mustClose(t, n)

	h := &hooked{Memory: m}
	n = mustOpen(t, h, Options{Name: "test"})
	n.batch, n.maxBatch = 1, 1
	var read, failed atomic.Bool
	held, proceed := make(chan struct{}), make(chan struct{})
	hook := func(r *blk.Request, do func() error) error {
		if r.Op == blk.OpRead && r.Off == second && !read.Swap(true) {
			close(held)
			<-proceed
		}
		err := do()
		if r.Op == blk.OpWrite && r.Off == first && !failed.Swap(true) {
			return syscall.EIO
		}
		return err
	}
	h.hook.Store(&hook)
	write := func(off int64) error {
		return blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: off, Len: 512, Data: blk.BytesVec(nil, pattern(3, 512))})
	}
	done := make(chan error, 1)
	go func() { done <- write(far + 512) }()
	<-held
	if err := write(512); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the write that fails says %v", err)
	}
	close(proceed)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	checkNow(t, m)
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestOpenAfterDeath: what a program wrote that died without a flush is durable once the image is open. Who writes with
// FUA in place then, or sees there that a job is done, relies on it.
func TestOpenAfterDeath(t *testing.T) {
	rng := blktest.Rand(t)
	disk := blktest.NewCrashDisk(0)
	if err := Create(blk.NewTask(), disk, CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	want := pattern(1, 4096)
	writeAt(t, mustOpen(t, disk, Options{Name: "test"}), 0, want)
	mustOpen(t, disk, Options{Name: "test"})
	for range 20 {
		if !bytes.Equal(readAll(t, mustOpen(t, disk.Crash(rng), Options{Name: "test", ReadOnly: true}))[:4096], want) {
			t.Fatal("what was there when the image was opened is gone")
		}
	}
}

// TestRepairAfterDeath: a repair makes counts agree with tables that a power cut leaves, too.
func TestRepairAfterDeath(t *testing.T) {
	rng := blktest.Rand(t)
	disk := blktest.NewCrashDisk(0)
	if err := Create(blk.NewTask(), disk, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	n := mustOpen(t, disk, Options{Name: "test"})
	writeAt(t, n, 0, pattern(1, 64<<10))
	mustDo(t, n, &blk.Request{Op: blk.OpFlush})
	mustDo(t, n, &blk.Request{Op: blk.OpDiscard, Len: 64 << 10})
	first := disk.Points() // it dies
	if r, err := Check(blk.NewTask(), disk, RepairLeaks); err != nil || r.LeaksFixed < 16 {
		t.Fatalf("%+v, %v", r, err)
	}
	for at := first; at <= disk.Points(); at++ {
		for range 20 {
			checkNow(t, disk.CrashAt(at, rng))
		}
	}
}

// TestFirstWriteAtOnce: a bitmap that the first write of a session marks as in use stays marked when others are stored or
// removed at that moment. It lacks that write.
func TestFirstWriteAtOnce(t *testing.T) {
	const size = 1 << 20
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: size}); err != nil {
		t.Fatal(err)
	}
	first := mustOpen(t, m, Options{Name: "test"})
	bits := blk.NewBitmap(size, 64<<10)
	if err := first.StoreBitmaps(blk.NewTask(), nil, []BitmapData{{"kept", bits}, {"removed", bits}}); err != nil {
		t.Fatal(err)
	}
	mustClose(t, first)
	h := &hooked{Memory: m}
	n := mustOpen(t, h, Options{Name: "test"})
	var once atomic.Bool
	held, proceed := make(chan struct{}), make(chan struct{})
	hook := func(r *blk.Request, do func() error) error {
		if r.Op == blk.OpWrite && !once.Swap(true) {
			close(held)
			<-proceed
		}
		return do()
	}
	h.hook.Store(&hook)
	stored := make(chan error, 1)
	go func() { stored <- n.StoreBitmaps(blk.NewTask(), []string{"removed"}, nil) }()
	<-held
	written := make(chan error, 1)
	go func() {
		r := &blk.Request{Op: blk.OpWrite, Len: 512, Data: blk.BytesVec(nil, pattern(1, 512))}
		written <- blk.Do(blk.NewTask(), n, r)
	}()
	time.Sleep(20 * time.Millisecond)
	close(proceed)
	for _, done := range []chan error{stored, written} {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	list, err := n.Bitmaps(blk.NewTask())
	if err != nil || len(list) != 1 || !list[0].InUse {
		t.Errorf("%+v, %v", list, err)
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestInUseAtOnce: a place that a slow request reads or writes is given to nobody else before that has ended, though the
// tables have not pointed there for long.
func TestInUseAtOnce(t *testing.T) {
	const size, cluster = 1 << 20, 4096
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: size, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	h := &hooked{Memory: m}
	n := reserveLittle(mustOpen(t, h, Options{Name: "test"}))
	old := bytes.Repeat([]byte("old"), cluster)[:cluster]
	if err := n.WriteCompressed(blk.NewTask(), 0, old); err != nil {
		t.Fatal(err)
	}
	writeAt(t, n, cluster, pattern(1, cluster))
	tab := n.l1.Load().tables[0].Load()
	packed, _ := tab.stableAt(0).packed.compressedRange(n.clusterBits)
	place := tab.stableAt(1).host

	var wg sync.WaitGroup
	held, proceed := make(chan struct{}, 2), make(chan struct{})
	var reads, writes atomic.Int64
	hook := func(r *blk.Request, do func() error) error {
		if r.Op == blk.OpRead && r.Off == packed && reads.Add(1) == 1 || r.Op == blk.OpWrite && r.Off == place && writes.Add(1) == 1 {
			held <- struct{}{}
			<-proceed
		}
		return do()
	}
	h.hook.Store(&hook)
	got := make([]byte, cluster)
	wg.Go(func() {
		if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Len: cluster, Data: blk.BytesVec(nil, got)}); err != nil {
			t.Errorf("read: %v", err)
		}
	})
	late := pattern(2, cluster)
	wg.Go(func() {
		r := &blk.Request{Op: blk.OpWrite, Off: cluster, Len: cluster, Data: blk.BytesVec(nil, late)}
		if err := blk.Do(blk.NewTask(), n, r); err != nil {
			t.Errorf("write: %v", err)
		}
	})
	<-held
	<-held
	mustDo(t, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Len: 2 * cluster})
	want := pattern(3, size-2*cluster)
	wg.Go(func() {
		for _, r := range []*blk.Request{
			{Op: blk.OpFlush},
			{Op: blk.OpWrite, Off: 2 * cluster, Len: int64(len(want)), Data: blk.BytesVec(nil, want)},
		} {
			if err := blk.Do(blk.NewTask(), n, r); err != nil {
				t.Errorf("%v: %v", r.Op, err)
			}
		}
	})
	time.Sleep(50 * time.Millisecond)
	close(proceed)
	wg.Wait()
	if !bytes.Equal(got, old) && !blk.IsZero(got) {
		t.Error("a slow read finds something else")
	}
	if !bytes.Equal(readAll(t, n)[2*cluster:], want) {
		t.Error("a slow write landed on a newer one")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// flushFails fails flushes while it is told to.
type flushFails struct {
	*blktest.CrashDisk
	fail atomic.Bool
}

func (f *flushFails) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpFlush && f.fail.Load() {
		return syscall.EIO
	}
	return f.CrashDisk.Do(t, r)
}

// TestMarkIsDurable: no write is on stable storage before the mark of a bitmap that lacks it, even if the mark was
// written by an attempt that failed, or by a program that died then.
func TestMarkIsDurable(t *testing.T) {
	const size = 1 << 20
	for _, dies := range []bool{false, true} {
		rng := blktest.Rand(t)
		f := &flushFails{CrashDisk: blktest.NewCrashDisk(0)}
		if err := Create(blk.NewTask(), f, CreateOptions{Size: size}); err != nil {
			t.Fatal(err)
		}
		n := mustOpen(t, f, Options{Name: "test"})
		writeAt(t, n, 0, pattern(1, 512))
		if err := n.StoreBitmaps(blk.NewTask(), nil, []BitmapData{{"a", blk.NewBitmap(size, 64<<10)}}); err != nil {
			t.Fatal(err)
		}
		mustClose(t, n)
		n = mustOpen(t, f, Options{Name: "test"})
		want := pattern(2, 512)
		r := &blk.Request{Op: blk.OpWrite, Len: 512, Data: blk.BytesVec(nil, want)}
		f.fail.Store(true)
		if err := blk.Do(blk.NewTask(), n, r); !errors.Is(err, syscall.EIO) {
			t.Fatalf("the first write says %v", err)
		}
		f.fail.Store(false)
		if dies {
			n = mustOpen(t, f, Options{Name: "test"})
		}
		mustDo(t, n, r)
		for range 60 {
			left := mustOpen(t, f.Crash(rng), Options{Name: "test", ReadOnly: true})
			list, err := left.Bitmaps(blk.NewTask())
			if err != nil || len(list) != 1 || !list[0].InUse && bytes.Equal(readAll(t, left)[:512], want) {
				t.Fatalf("died: %v: %+v, %v", dies, list, err)
			}
		}
	}
}

// TestPackedReuse: compressed data that comes to a place where other data lay, and was read, reads as itself.
func TestPackedReuse(t *testing.T) {
	const cluster, clusters = 4096, 16
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: clusters * cluster, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	n := reserveLittle(mustOpen(t, m, Options{Name: "test"}))
	seen, again := map[l2Entry]bool{}, 0
	for round := range 10 {
		for i := range int64(clusters) {
			want := make([]byte, cluster)
			copy(want, pattern(uint64(round)*clusters+uint64(i), cluster/2))
			if err := n.WriteCompressed(blk.NewTask(), i*cluster, want); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, cluster)
			mustDo(t, n, &blk.Request{Op: blk.OpRead, Off: i * cluster, Len: cluster, Data: blk.BytesVec(nil, got)})
			if !bytes.Equal(got, want) {
				t.Fatalf("round %d: cluster %d reads as something else", round, i)
			}
			e := n.l1.Load().tables[0].Load().stableAt(int(i)).packed
			if seen[e] {
				again++
			}
			seen[e] = true
		}
		mustDo(t, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Len: clusters * cluster})
		mustDo(t, n, &blk.Request{Op: blk.OpFlush})
	}
	if again == 0 {
		t.Error("no place was used again")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestFreeAfterTable: a place is not given up before the table without it is written, whoever frees clusters meanwhile.
func TestFreeAfterTable(t *testing.T) {
	const cluster = 4096
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: 1 << 20, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	h := &hooked{Memory: m}
	n := mustOpen(t, h, Options{Name: "test"})
	if err := n.WriteCompressed(blk.NewTask(), 0, bytes.Repeat([]byte("old"), cluster)[:cluster]); err != nil {
		t.Fatal(err)
	}
	writeAt(t, n, cluster, pattern(1, cluster))
	mustClose(t, n) // the counts of the compressed one are lowered to what they should be
	n = mustOpen(t, h, Options{Name: "test"})
	readAll(t, n)
	table := n.l1.Load().tables[0].Load().host
	for _, r := range []*blk.Request{
		{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: cluster, Len: cluster},
		{Op: blk.OpWrite, Len: 512, Data: blk.BytesVec(nil, pattern(2, 512))}, // a copy of the compressed one
	} {
		held, proceed := make(chan struct{}), make(chan struct{})
		hook := func(r *blk.Request, do func() error) error {
			if r.Op == blk.OpWrite && r.Off == table {
				close(held)
				<-proceed
			}
			return do()
		}
		h.hook.Store(&hook)
		done := make(chan error, 1)
		go func() { done <- blk.Do(blk.NewTask(), n, r) }()
		<-held
		mustDo(t, n, &blk.Request{Op: blk.OpFlush})
		checkNow(t, m)
		close(proceed)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		h.hook.Store(nil)
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestRetryForLess: where there is no room for many clusters, fewer are reserved; but what has failed is settled before.
// Else somebody else settles it meanwhile, and writes the table of counts as it was over the table as it is.
func TestRetryForLess(t *testing.T) {
	const size, cluster = 512 << 10, 512
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: size, ClusterSize: cluster}); err != nil {
		t.Fatal(err)
	}
	h := &hooked{Memory: m}
	n := mustOpen(t, h, Options{Name: "test"})
	step := int64(1) << n.l1Shift
	for off := size - step; off >= 0; off -= step { // all tables
		writeAt(t, n, off, pattern(1, cluster))
	}
	var (
		table         = n.refs.Load().host
		writes        int        // of the table of counts
		flushed       chan error // of somebody else, who comes if the table is not settled
		held, proceed = make(chan struct{}), make(chan struct{})
	)
	hook := func(r *blk.Request, do func() error) error {
		if r.Op != blk.OpWrite {
			return do()
		}
		if r.Off == table {
			writes++
			switch {
			case writes == 1:
				return syscall.ENOSPC
			case writes == 2 && flushed != nil:
				close(held)
				<-proceed
			}
		} else if writes == 1 && flushed == nil {
			flushed = make(chan error, 1)
			go func() { flushed <- blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}) }()
			<-held
		}
		return do()
	}
	h.hook.Store(&hook)
	for off := int64(size - cluster); writes == 0; off -= cluster {
		if off < 0 {
			t.Fatal("the disk is too small")
		}
		writeAt(t, n, off, pattern(2, cluster))
	}
	h.hook.Store(nil)
	close(proceed)
	if flushed != nil {
		if err := <-flushed; err != nil {
			t.Error(err)
		}
	}
	checkNow(t, m)
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}
