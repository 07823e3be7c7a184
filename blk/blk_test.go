// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestRangeLockModel(t *testing.T) {
	const space, workers, rounds = 64, 8, 300
	var (
		l     RangeLock
		owner [space]int // plain: -race sees two owners at once
		wg    sync.WaitGroup
	)
	for w := 1; w <= workers; w++ {
		rng := rand.New(rand.NewPCG(1, uint64(w)))
		wg.Go(func() {
			task := NewTask()
			for range rounds {
				off := rng.Int64N(space)
				n := 1 + rng.Int64N(min(16, space-off))
				r := l.Lock(task, off, n)
				for i := off; i < off+n; i++ {
					if owner[i] != 0 {
						t.Errorf("byte %d belongs to %d and %d", i, owner[i], w)
					}
					owner[i] = w
				}
				for i := off; i < off+n; i++ {
					owner[i] = 0
				}
				l.Unlock(r)
			}
		})
	}
	wg.Wait()
	if len(l.list) != 0 {
		t.Errorf("%d ranges left", len(l.list))
	}
}

// TestRangeLockOrder: overlapping ranges come in turn, others at once.
func TestRangeLockOrder(t *testing.T) {
	var l RangeLock
	waiters := func(n int) {
		for {
			l.mu.Lock()
			have := len(l.list)
			l.mu.Unlock()
			if have >= n {
				return
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	first := l.Lock(NewTask(), 0, 10)
	turns := make(chan int, 3)
	for i, r := range [][2]int64{{5, 10}, {12, 10}, {0, 5}} {
		go func() {
			held := l.Lock(NewTask(), r[0], r[1])
			turns <- i
			l.Unlock(held)
		}()
		waiters(i + 2)
	}
	l.Unlock(l.Lock(NewTask(), 100, 1)) // not held up by anybody
	l.Unlock(first)
	pos := map[int]int{}
	for at := range 3 {
		pos[<-turns] = at
	}
	if pos[0] > pos[1] {
		t.Error("a later range that only overlaps a waiting one went first")
	}
}

func TestBitmapTwin(t *testing.T) {
	const gran = 4096
	for _, size := range []int64{1, gran, gran * 64, gran*200 + 5} {
		b := NewBitmap(size, gran)
		bits := make([]bool, (size+gran-1)/gran)
		rng := rand.New(rand.NewPCG(2, uint64(size)))
		touched := func(off, n int64) (lo, hi int64) {
			return off / gran, min((off+n-1)/gran, int64(len(bits))-1)
		}
		for range 3000 {
			off := rng.Int64N(size)
			n := 1 + rng.Int64N(size*2/(1+rng.Int64N(40))+1)
			lo, hi := touched(off, n)
			switch rng.IntN(3) {
			case 0, 1:
				set := rng.IntN(2) == 0
				if set {
					b.Set(off, n)
				} else {
					b.Clear(off, n)
				}
				for i := lo; i <= hi; i++ {
					bits[i] = set
				}
			default:
				any := false
				for i := lo; i <= hi; i++ {
					any = any || bits[i]
				}
				if got := b.Any(off, n); got != any {
					t.Fatalf("size %d: Any(%d, %d) = %v", size, off, n, got)
				}
			}
			count := int64(0)
			for _, x := range bits {
				if x {
					count++
				}
			}
			if b.Count() != count || b.Bytes() != count*gran {
				t.Fatalf("size %d: count %d, want %d", size, b.Count(), count)
			}
			limit := 1 + rng.Int64N(10*gran)
			wantAt := off / gran
			for wantAt < int64(len(bits)) && !bits[wantAt] {
				wantAt++
			}
			wantN := int64(0)
			for wantAt+wantN < int64(len(bits)) && bits[wantAt+wantN] && (wantN == 0 || (wantN+1)*gran <= limit) {
				wantN++
			}
			at, l, ok := b.Next(off, limit)
			if ok != (wantN > 0) || ok && (at != wantAt*gran || l != wantN*gran) {
				t.Fatalf("size %d: Next(%d, %d) = %d %d %v, want %d %d", size, off, limit, at, l, ok, wantAt*gran, wantN*gran)
			}
		}
	}
}

// TestBitmapConcurrentCount: whatever sets and clears race, the count is that of the bits.
func TestBitmapConcurrentCount(t *testing.T) {
	b := NewBitmap(1000, 1)
	var wg sync.WaitGroup
	for w := range 4 {
		rng := rand.New(rand.NewPCG(3, uint64(w)))
		wg.Go(func() {
			for range 3000 {
				off := rng.Int64N(1000)
				if n := 1 + rng.Int64N(200); rng.IntN(2) == 0 {
					b.Set(off, n)
				} else {
					b.Clear(off, n)
				}
			}
		})
	}
	wg.Wait()
	n := int64(0)
	for i := range int64(1000) {
		if b.Any(i, 1) {
			n++
		}
	}
	if n != b.Count() {
		t.Errorf("count %d, bits %d", b.Count(), n)
	}
	b.Clear(0, 1000)
	if b.Count() != 0 || b.Any(0, 1000) {
		t.Errorf("count %d after clearing all", b.Count())
	}
}

func TestVec(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	for range 300 {
		var (
			v    Vec
			flat []byte
		)
		for range rng.IntN(6) {
			b := make([]byte, rng.IntN(20))
			for i := range b {
				b[i] = byte(rng.Uint32()) | 1
			}
			flat = append(flat, b...)
			v = BytesVec(v, b)
			if rng.IntN(3) == 0 {
				v = append(v, syscall.Iovec{}) // an empty piece
			}
		}
		if v.Len() != int64(len(flat)) {
			t.Fatalf("length %d, want %d", v.Len(), len(flat))
		}
		off := rng.IntN(len(flat) + 1)
		n := rng.IntN(len(flat) - off + 1)
		part := v.AppendSlice(nil, int64(off), int64(n))
		got := make([]byte, n+3)
		if m := part.CopyTo(got); m != n || string(got[:n]) != string(flat[off:off+n]) {
			t.Fatalf("slice [%d, +%d) of %d bytes is wrong", off, n, len(flat))
		}
		src := make([]byte, n)
		for i := range src {
			src[i] = byte(i) | 0x80
		}
		part.CopyFrom(src)
		copy(flat[off:], src)
		all := make([]byte, len(flat))
		if v.CopyTo(all); string(all) != string(flat) {
			t.Fatal("CopyFrom wrote elsewhere")
		}
		part.Zero()
		clear(flat[off : off+n])
		if v.CopyTo(all); string(all) != string(flat) {
			t.Fatal("Zero wrote elsewhere")
		}
	}
}

func TestBufferAndFits(t *testing.T) {
	for _, n := range []int{1, 4096, 4097, 1 << 20, 8 << 20, 8<<20 + 1} {
		b := GetBuffer(n)
		if len(b.B) != n || !isAligned(b.B, BufferAlign) {
			t.Errorf("buffer of %d: length %d", n, len(b.B))
		}
		b.Free()
	}
	b := GetBuffer(8192)
	defer b.Free()
	for _, c := range []struct {
		mem, off int
		at       int64
		from, to int
		want     bool
	}{
		{1, 1, 7, 3, 50, true},
		{1, 512, 512, 0, 512, true},
		{1, 512, 100, 0, 512, false}, // an offset to align though the memory needs not
		{1, 512, 512, 0, 100, false},
		{4, 512, 512, 512, 1024, true},
		{512, 4096, 512, 0, 4096, false},
		{512, 4096, 4096, 0, 4096, true},
		{512, 4096, 4096, 0, 512, false},
	} {
		f := &HostFile{MemAlign: c.mem, OffAlign: c.off}
		if got := f.Fits(c.at, BytesVec(nil, b.B[c.from:c.to])); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestIOFinish(t *testing.T) {
	f := &HostFile{}
	start := func(kind IOKind, n int) (*IO, []byte) {
		b := make([]byte, n)
		for i := range b {
			b[i] = 0xff
		}
		var o IO
		o.Reset(kind, f, 100, int64(n), BytesVec(BytesVec(nil, b[:n/2]), b[n/2:]), nil)
		return &o, b
	}

	o, b := start(IORead, 10)
	for _, step := range []struct {
		res, left int
		off       int64
	}{{-int(syscall.EINTR), 10, 100}, {3, 7, 103}, {-int(syscall.EAGAIN), 7, 103}, {4, 3, 107}} {
		if o.Finish(step.res) {
			t.Fatalf("ended after %d", step.res)
		}
		if v, off := o.Next(); off != step.off || v.Len() != int64(step.left) {
			t.Fatalf("after %d: %d bytes at %d are left", step.res, v.Len(), off)
		}
	}
	if !o.Finish(0) || o.Err != nil || string(b) != "\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00" {
		t.Errorf("read over the end: %v %x", o.Err, b)
	}

	for _, c := range []struct {
		kind IOKind
		res  []int
		want error
	}{
		{IOWrite, []int{10}, nil},
		{IOWrite, []int{4, 6}, nil},
		{IOWrite, []int{4, 0}, io.ErrShortWrite},
		{IOWrite, []int{4, -int(syscall.ENOSPC)}, syscall.ENOSPC},
		{IORead, []int{-int(syscall.EIO)}, syscall.EIO},
		{IOFallocate, []int{0}, nil},
		{IOFallocate, []int{-int(syscall.EOPNOTSUPP)}, syscall.EOPNOTSUPP},
	} {
		o, _ := start(c.kind, 10)
		for i, res := range c.res {
			if end := o.Finish(res); end != (i == len(c.res)-1) {
				t.Errorf("%v: step %d: ended %v", c, i, end)
			}
		}
		if !errors.Is(o.Err, c.want) {
			t.Errorf("%v: %v", c, o.Err)
		}
	}

	// Direct I/O cannot go on from the middle of the file's last block: what is not there reads as zeros.
	direct := &HostFile{Direct: true, MemAlign: 512, OffAlign: 512}
	o.Reset(IORead, direct, 0, 2048, BytesVec(nil, bytes.Repeat([]byte{0xff}, 2048)), nil)
	if o.Finish(512) || !o.Finish(100) || o.Err != nil {
		t.Errorf("a direct read of the last block: %v", o.Err)
	}

	// More pieces than the kernel takes at once.
	many := make(Vec, 3000)
	for i := range many {
		many[i] = BytesVec(nil, make([]byte, 1))[0]
	}
	o.Reset(IORead, f, 0, 3000, many, nil)
	for n := 0; n < 3000; {
		v, off := o.Next()
		if len(v) > iovMax || off != int64(n) {
			t.Fatalf("%d pieces at %d", len(v), off)
		}
		n += len(v)
		if end := o.Finish(len(v)); end != (n == 3000) {
			t.Fatalf("ended %v at %d", end, n)
		}
	}
}

// TestFailedSyncSticks: after a failed sync of the page cache no flush is acknowledged any more.
func TestFailedSyncSticks(t *testing.T) {
	for _, c := range []struct {
		name   string
		direct bool
		kind   IOKind
		fua    bool
		err    syscall.Errno
		sticks bool
	}{
		{"buffered sync", false, IOSync, false, syscall.EIO, true},
		{"buffered sync, disk full", false, IOSync, false, syscall.ENOSPC, true},
		{"direct sync", true, IOSync, false, syscall.EIO, false},
		{"buffered forced write", false, IOWrite, true, syscall.EIO, true},
		{"buffered forced write, disk full", false, IOWrite, true, syscall.ENOSPC, false},
		{"buffered write", false, IOWrite, false, syscall.EIO, false},
	} {
		f := &HostFile{Direct: c.direct}
		var o IO
		o.Reset(c.kind, f, 0, 1, nil, nil)
		o.FUA = c.fua
		if !o.Finish(-int(c.err)) || !errors.Is(o.Err, c.err) {
			t.Errorf("%s: %v", c.name, o.Err)
		}
		o.Reset(IOSync, f, 0, 0, nil, nil)
		if !o.Finish(0) || errors.Is(o.Err, syscall.EIO) != c.sticks {
			t.Errorf("%s: the next sync: %v", c.name, o.Err)
		}
	}
}

// stub is a node that answers each request with err.
type stub struct {
	info Info
	err  error
	got  []Op
}

func (s *stub) Info() *Info                             { return &s.info }
func (s *stub) TryMap(Op, int64, int64) (Extent, bool)  { return Extent{}, false }
func (s *stub) Map(*Task, int64, int64) (Extent, error) { return Extent{}, s.err }
func (s *stub) Do(_ *Task, r *Request) error            { s.got = append(s.got, r.Op); return s.err }
func (s *stub) Children() []Node                        { return nil }
func (s *stub) Close() error                            { return nil }

func TestDo(t *testing.T) {
	b := make([]byte, 512)
	vec := BytesVec(nil, b)
	const size = 1024
	for _, c := range []struct {
		name string
		ro   bool
		r    Request
		want error
	}{
		{"read", true, Request{Op: OpRead, Off: 512, Len: 512, Data: vec}, nil},
		{"flush", true, Request{Op: OpFlush}, nil},
		{"flush with an offset", false, Request{Op: OpFlush, Off: 1}, ErrInvalid},
		{"write", false, Request{Op: OpWrite, Flags: FUA, Len: 512, Data: vec}, nil},
		{"write, read-only", true, Request{Op: OpWrite, Len: 512, Data: vec}, ErrReadOnly},
		{"discard, read-only", true, Request{Op: OpDiscard, Len: 512}, ErrReadOnly},
		{"zeroes, read-only", true, Request{Op: OpWriteZeroes, Len: 512}, ErrReadOnly},
		{"zeroes, unmap", false, Request{Op: OpWriteZeroes, Flags: Unmap, Len: size}, nil},
		{"discard, unmap", false, Request{Op: OpDiscard, Flags: Unmap, Len: 512}, ErrInvalid},
		{"read, FUA", false, Request{Op: OpRead, Flags: FUA, Len: 512, Data: vec}, ErrInvalid},
		{"read, wrong length", false, Request{Op: OpRead, Len: 1024, Data: vec}, ErrInvalid},
		{"over the end", false, Request{Op: OpRead, Off: 513, Len: 512, Data: vec}, ErrRange},
		{"far away", false, Request{Op: OpDiscard, Off: 1 << 62, Len: 1 << 62}, ErrRange},
		{"overflow", false, Request{Op: OpDiscard, Off: 512, Len: 1<<63 - 1}, ErrRange},
		{"negative", false, Request{Op: OpDiscard, Off: -1, Len: 1}, ErrRange},
		{"negative length", false, Request{Op: OpDiscard, Off: 1, Len: -1}, ErrRange},
		{"empty", false, Request{Op: OpDiscard}, ErrRange},
		{"unknown", false, Request{Op: 99, Len: 512}, ErrNotSupported},
	} {
		s := &stub{info: Info{Name: "stub", Size: size, ReadOnly: c.ro}}
		err := Do(NewTask(), s, &c.r)
		if !errors.Is(err, c.want) || (len(s.got) == 1) != (c.want == nil) {
			t.Errorf("%s: %v, the node saw %v", c.name, err, s.got)
		}
	}

	inner := &OpError{Op: OpWrite, Node: "disk.img", Off: 512, Len: 512, Err: syscall.ENOSPC}
	s := &stub{info: Info{Name: "top", Size: size}, err: inner}
	err := Do(NewTask(), s, &Request{Op: OpWrite, Len: 512, Data: vec})
	if !IsNoSpace(err) || err.Error() != "disk.img: write of 512 bytes at offset 512: no space left on device" {
		t.Errorf("error from below: %v", err)
	}
}

// queue is a source for TestChange.
type queue struct {
	meter    Meter
	fail     error
	hang     bool
	paused   atomic.Int32
	barriers atomic.Int32
}

func (q *queue) Meter() *Meter { return &q.meter }
func (q *queue) Resume()       { q.paused.Add(-1) }
func (q *queue) Barrier()      { q.barriers.Add(1) }
func (q *queue) Pause(ctx context.Context) error {
	if q.hang {
		<-ctx.Done()
		return ctx.Err()
	}
	if q.fail == nil {
		q.paused.Add(1)
	}
	return q.fail
}

// The sources of all graphs are paused at the same time, or the change does not happen.
func TestChangeAll(t *testing.T) {
	stuck := errors.New("ring is stuck")
	var graphs []*Graph
	sources := []*queue{{}, {}, {}}
	for i, s := range sources {
		graphs = append(graphs, NewGraph(&stub{info: Info{Kind: "raw"}}))
		graphs[i].Attach(s)
	}
	after := &stub{info: Info{Name: "after", Kind: "raw"}}
	all := func() error {
		return ChangeAll(context.Background(), graphs, func(txs []*Tx) error {
			for i, s := range sources {
				if s.paused.Load() != 1 {
					t.Errorf("source %d is not paused", i)
				}
				if root := txs[i].Root(); root != graphs[i].Root() {
					t.Errorf("graph %d comes as another one", i)
				}
			}
			txs[1].SetRoot(after)
			return nil
		})
	}
	sources[2].fail = stuck
	if err := all(); !errors.Is(err, stuck) || graphs[1].Root() == after {
		t.Errorf("one fails to pause: %v", err)
	}
	sources[2].fail = nil
	if err := all(); err != nil || graphs[1].Root() != after || graphs[0].Root() == after {
		t.Errorf("all pause: %v", err)
	}
	for i, s := range sources {
		if s.paused.Load() != 0 {
			t.Errorf("source %d stays paused", i)
		}
	}
}

func TestChange(t *testing.T) {
	failed := errors.New("ring is stuck")
	for _, c := range []struct {
		name   string
		source *queue
		fn     error
		want   error
		ran    bool
	}{
		{"all pause", &queue{}, nil, nil, true},
		{"the change fails", &queue{}, failed, failed, true},
		{"one fails to pause", &queue{fail: failed}, nil, failed, false},
		{"one never pauses", &queue{hang: true}, nil, context.DeadlineExceeded, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			before, after := &stub{info: Info{Name: "a", Kind: "raw"}}, &stub{info: Info{Name: "b", Kind: "raw"}}
			g := NewGraph(before)
			sources := []*queue{{}, {}, c.source}
			for _, s := range sources {
				g.Attach(s)
			}
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			ran := false
			err := g.Change(ctx, func(tx *Tx) error {
				ran = true
				for i, s := range sources {
					if s.paused.Load() != 1 {
						t.Errorf("source %d is not paused", i)
					}
				}
				if c.fn == nil {
					tx.SetRoot(after)
				}
				return c.fn
			})
			if !errors.Is(err, c.want) || ran != c.ran {
				t.Errorf("%v, ran %v", err, ran)
			}
			for i, s := range sources {
				if s.paused.Load() != 0 {
					t.Errorf("source %d: paused %d times after the change", i, s.paused.Load())
				}
			}
			want := Node(before)
			if c.want == nil {
				want = after
			}
			if g.Root() != want {
				t.Errorf("root is %s", g.Root().Info().Name)
			}
		})
	}
}

func TestGraphActivity(t *testing.T) {
	g := NewGraph(&stub{info: Info{Name: "disk", Kind: "raw"}})
	a, b := &queue{}, &queue{}
	g.Attach(a)
	g.Time(true)
	g.Attach(b)
	if !a.meter.Timed.Load() || !b.meter.Timed.Load() {
		t.Error("times are off")
	}
	a.meter.Ops.Add(2)
	b.meter.Ops.Add(3)
	a.meter.Slowest.Store(7)
	if got := g.Activity(); got.Ops != 5 || got.Slowest != 7 {
		t.Errorf("%+v", got)
	}
	if got := g.Activity(); got.Slowest != 0 {
		t.Errorf("slowest was not reset: %+v", got)
	}
	g.Detach(a)
	g.Time(false)
	if got := g.Activity(); got.Ops != 3 || b.meter.Timed.Load() {
		t.Errorf("%+v", got)
	}
	if g.String() != "raw disk\n" {
		t.Errorf("%q", g.String())
	}
}

func TestTaskOff(t *testing.T) {
	task := NewTask()
	for range 200 { // stale wake-ups of one must not end the next
		v := 0
		if err := task.Off(func() error { v = 1; return syscall.EIO }); !errors.Is(err, syscall.EIO) || v != 1 {
			t.Fatalf("%v %d", err, v)
		}
	}
}

func TestTaskPar(t *testing.T) {
	task := NewTask()
	for range 200 {
		meet := make(chan int)
		a, b := 0, 0
		errA, errB := task.Par(
			func(t *Task) error { meet <- 1; a = 1; return t.Off(func() error { return syscall.EIO }) },
			func(t *Task) error { <-meet; b = 1; return t.Off(func() error { return syscall.ENOSPC }) },
		)
		if !errors.Is(errA, syscall.EIO) || !errors.Is(errB, syscall.ENOSPC) || a+b != 2 {
			t.Fatalf("%v, %v, %d %d", errA, errB, a, b)
		}
	}
}

// A first function that panics, as one does when guest memory faults, does not leave the second one behind.
func TestTaskParPanic(t *testing.T) {
	var ended atomic.Bool
	func() {
		defer func() {
			if recover() == nil || !ended.Load() {
				t.Errorf("the panic came through before the second function ended")
			}
		}()
		_, _ = NewTask().Par(
			func(*Task) error { panic("fault") },
			func(*Task) error {
				time.Sleep(10 * time.Millisecond)
				ended.Store(true)
				return nil
			})
	}()
}
