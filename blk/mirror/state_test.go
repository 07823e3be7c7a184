// SPDX-License-Identifier: Apache-2.0

package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/job"
)

func TestMain(m *testing.M) {
	mirror.SetSettleEvery(time.Millisecond)
	os.Exit(m.Run())
}

// world is everything that survives a process: two images, and the words of the copy's state. Whatever changes an image
// does so under mu, so that a crash is a copy that is made under mu, of which each change that is on its way is then
// done, or half done, or not.
type world struct {
	mu      sync.Mutex
	rng     *rand.Rand
	images  [2][]byte // source, target
	fresh   map[int]struct{}
	pending map[*change]struct{}
	words   []atomic.Uint64
	blank   bool
	faults  bool
}

const (
	wGran = 4096
	wSize = 256*wGran + 512
)

// change is what an image is about to get. data nil: a flush of the target, which may lose all that it has got since the
// last one.
type change struct {
	image int
	off   int64
	data  []byte
}

// do carries out a change after a while. It may fail, half done.
func (w *world) do(c *change) error {
	w.mu.Lock()
	w.pending[c] = struct{}{}
	wait := time.Duration(w.rng.IntN(1500)) * time.Microsecond
	w.mu.Unlock()
	time.Sleep(wait)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.pending, c)
	switch {
	case w.faults && w.rng.IntN(100) == 0:
		w.apply(c, true)
		return [...]error{syscall.EIO, syscall.ENOSPC, syscall.ENOSPC}[w.rng.IntN(3)]
	case c.data == nil:
		w.fresh = map[int]struct{}{}
	default:
		w.apply(c, false)
	}
	return nil
}

func (w *world) apply(c *change, half bool) {
	data := c.data
	if data == nil { // a flush that fails
		for b := range w.fresh {
			if w.rng.IntN(2) == 0 {
				copy(w.images[1][b*512:], bytes.Repeat([]byte{0xee}, 512))
			}
		}
		return
	}
	if half {
		data = data[:w.rng.IntN(len(data)/512+1)*512]
	}
	copy(w.images[c.image][c.off:], data)
	for b := range len(data) / 512 {
		if c.image == 1 {
			w.fresh[int(c.off)/512+b] = struct{}{}
		}
	}
}

// crash is what the next process finds.
func (w *world) crash() *world {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := &world{rng: rand.New(rand.NewPCG(w.rng.Uint64(), 1)), blank: w.blank, faults: w.faults, pending: map[*change]struct{}{}, fresh: maps.Clone(w.fresh)}
	for i := range n.images {
		n.images[i] = bytes.Clone(w.images[i])
	}
	// Bits are set and cleared all the time, but no image changes: what is cleared before it could be seen has been set
	// elsewhere before, and that is looked at later, or also earlier, since what needs mu cannot end.
	n.words = make([]atomic.Uint64, len(w.words))
	read := func(from, to int) {
		for i := from; i < to; i++ {
			n.words[i].Or(w.words[i].Load())
		}
	}
	const head = 8
	bits := (len(w.words) - head) / 3
	read(0, head)
	read(head+bits, len(w.words))
	read(head, head+bits)
	read(head+bits, len(w.words))
	for c := range w.pending {
		switch n.rng.IntN(3) {
		case 0:
			n.apply(c, false)
		case 1:
			n.apply(c, true)
		}
	}
	return n
}

// open gives the state that the next process goes on from, and checks it.
func (w *world) open() (*mirror.State, error) {
	s, err := mirror.OpenState(w.words, wSize, wGran)
	if err != nil {
		return nil, err
	}
	for off := int64(0); off < wSize; off += wGran {
		end := min(off+wGran, wSize)
		switch source, target := w.images[0][off:end], w.images[1][off:end]; {
		case s.Dirty.Any(off, 1) || bytes.Equal(source, target) && off < s.Bulk():
		case off < s.Bulk():
			return nil, fmt.Errorf("block %d differs, and nothing says so", off/wGran)
		case w.blank && !bytes.Equal(target, make([]byte, end-off)):
			return nil, fmt.Errorf("block %d is not blank, the bulk stage has come to %d", off/wGran, s.Bulk()/wGran)
		}
	}
	return s, nil
}

// wNode is one of the images.
type wNode struct {
	w     *world
	image int
}

func (n wNode) Info() *blk.Info {
	return &blk.Info{Name: fmt.Sprint("image ", n.image), Kind: "world", Size: wSize, Align: 1}
}
func (n wNode) Children() []blk.Node { return nil }
func (n wNode) Close() error         { return nil }

func (n wNode) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	return blk.Extent{Len: min(l, 3*wGran-off%wGran), State: blk.Data, Writable: true}, op == blk.OpWrite
}

func (n wNode) Map(_ *blk.Task, off, l int64) (blk.Extent, error) {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	e := blk.Extent{State: blk.Zero}
	if n.w.images[n.image][off] != 0 {
		e.State = blk.Data
	}
	for _, b := range n.w.images[n.image][off : off+l] {
		if (b == 0) != (e.State == blk.Zero) {
			break
		}
		e.Len++
	}
	return e, nil
}

func (n wNode) Do(_ *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
		n.w.mu.Lock()
		defer n.w.mu.Unlock()
		r.Data.CopyFrom(n.w.images[n.image][r.Off : r.Off+r.Len])
		return nil
	case blk.OpFlush:
		if n.image == 0 {
			return nil
		}
		return n.w.do(&change{image: 1})
	default:
		data := make([]byte, r.Len)
		if r.Op == blk.OpWrite {
			r.Data.CopyTo(data)
		}
		return n.w.do(&change{n.image, r.Off, data})
	}
}

// wGuest issues writes as a queue does: the fast way it writes by itself, upon an extent.
type wGuest struct {
	w     *world
	g     *blk.Graph
	meter blk.Meter

	mu     sync.Mutex
	cond   *sync.Cond
	pauses int
	flying map[chan struct{}]struct{}
}

func (q *wGuest) Meter() *blk.Meter { return &q.meter }

func (q *wGuest) Pause(ctx context.Context) error {
	q.mu.Lock()
	q.pauses++
	q.mu.Unlock()
	q.Barrier()
	return nil
}

func (q *wGuest) Resume() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pauses--
	q.cond.Broadcast()
}

func (q *wGuest) Barrier() {
	q.mu.Lock()
	all := slices.Collect(maps.Keys(q.flying))
	q.mu.Unlock()
	for _, c := range all {
		<-c
	}
}

func (q *wGuest) do(r *blk.Request, fast bool) {
	done := make(chan struct{})
	q.mu.Lock()
	for q.pauses > 0 {
		q.cond.Wait()
	}
	q.flying[done] = struct{}{}
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.flying, done)
		q.mu.Unlock()
		close(done)
	}()
	if e, ok := q.g.Root().TryMap(r.Op, r.Off, r.Len); fast && ok && e.Len >= r.Len {
		data := make([]byte, r.Len)
		r.Data.CopyTo(data)
		_ = q.w.do(&change{0, r.Off, data}) // the guest is told; the image may have got a part
		if e.Log != nil {
			e.Log.Set(r.Off, r.Len)
		}
	} else {
		_ = blk.Do(blk.NewTask(), q.g.Root(), r)
	}
	q.meter.Ops.Add(1)
}

func (q *wGuest) run(stop *atomic.Bool, rng *rand.Rand) {
	for !stop.Load() {
		off := rng.Int64N(wSize/512) * 512
		r := &blk.Request{Op: blk.OpWrite, Off: off, Len: min(rng.Int64N(3*wGran/512)*512+512, wSize-off)}
		switch rng.IntN(8) {
		case 0:
			r = &blk.Request{Op: blk.OpFlush}
		case 1:
			r.Op = []blk.Op{blk.OpDiscard, blk.OpWriteZeroes}[rng.IntN(2)]
		case 2:
			r.Flags = blk.FUA
		}
		if r.Op == blk.OpWrite {
			r.Data = blk.BytesVec(nil, bytes.Repeat([]byte{byte(rng.IntN(200)) + 1}, int(r.Len)))
		}
		q.do(r, r.Op == blk.OpWrite && rng.IntN(3) > 0)
		time.Sleep(time.Duration(rng.IntN(500)) * time.Microsecond)
	}
}

// A process copies under a busy guest and dies, again and again. Each one goes on from what the last one left, and the
// last of all comes to its end.
func TestCrash(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v, err := strconv.ParseUint(os.Getenv("MIRROR_SEED"), 10, 64); err == nil {
		seed = v
	}
	rounds := uint64(8)
	if testing.Short() {
		rounds = 2
	}
	for s := range rounds {
		t.Run(fmt.Sprint(seed+s), func(t *testing.T) {
			t.Parallel()
			t.Logf("MIRROR_SEED=%d", seed+s)
			crashes(t, seed+s)
		})
	}
}

func crashes(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := &world{rng: rand.New(rand.NewPCG(seed, 2)), pending: map[*change]struct{}{}, fresh: map[int]struct{}{}, faults: rng.IntN(3) == 0}
	w.images = [2][]byte{make([]byte, wSize), make([]byte, wSize)}
	for off := 0; off < wSize; off += 16 * wGran {
		copy(w.images[0][off:], bytes.Repeat([]byte{1}, rng.IntN(16)*wGran))
	}
	if w.blank = rng.IntN(2) == 0; !w.blank {
		copy(w.images[1], bytes.Repeat([]byte{0xaa}, wSize))
	}
	w.words = make([]atomic.Uint64, mirror.StateWords(wSize, wGran))
	went, began := 0, 0
	for life := 0; life < 10 && !t.Failed(); life++ {
		s, err := w.open()
		switch {
		case err == nil:
			went++
		case errors.Is(err, mirror.ErrUnsure):
			began++
			w.words, w.blank = make([]atomic.Uint64, mirror.StateWords(wSize, wGran)), false
			s = mirror.NewState(w.words, wSize, wGran)
		default:
			t.Fatalf("seed %d, life %d: %v", seed, life, err)
		}
		w = w.live(t, seed, s, rng, life == 9)
	}
	t.Logf("went on %d times, began again %d times", went, began)
	if !w.faults && went < 3 {
		t.Errorf("seed %d: went on only %d times", seed, went)
	}
}

// live copies from the state on, for some time or to the end.
func (w *world) live(t *testing.T, seed uint64, s *mirror.State, rng *rand.Rand, last bool) *world {
	g := blk.NewGraph(mirror.New(wNode{w, 0}, s))
	q := &wGuest{w: w, g: g, flying: map[chan struct{}]struct{}{}}
	q.cond = sync.NewCond(&q.mu)
	g.Attach(q)
	store, err := job.OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := job.NewManager(store)
	if err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var guests sync.WaitGroup
	for range 3 {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 3))
		guests.Go(func() { q.run(&stop, rng) })
	}
	rec := job.Record{Kind: "copy", Disk: "vda", Options: job.Options{
		SwitchMode: "manual", Granularity: wGran, Speed: []int64{0, 1 << 20, 4 << 20}[rng.IntN(3)],
		OnSourceError: job.OnErrorStop, OnTargetError: job.OnErrorStop,
	}}
	if last {
		rec.SwitchMode, rec.Speed, rec.Verify = "auto", 0, true
		w.mu.Lock()
		w.faults = false
		w.mu.Unlock()
	}
	setup := blockcopy.Setup{Graph: g, Target: wNode{w, 1}, State: s, Blank: w.blank, Commit: func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if !bytes.Equal(w.images[0], w.images[1]) {
			t.Errorf("seed %d: the images are not the same at the switch", seed)
		}
		return nil
	}}
	j, err := m.Start(rec, func(ctx context.Context, j *job.Job) error { return blockcopy.Run(ctx, j, setup) })
	if err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(time.Duration(20+rng.IntN(200)) * time.Millisecond)
	if last {
		end = time.Now().Add(20 * time.Second)
	}
	for time.Now().Before(end) && !job.Ended(j.Record().State) && !t.Failed() {
		time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
		if j.Record().State == job.StatePaused {
			_ = j.Resume()
		}
		if last {
			continue
		}
		if _, err := w.crash().open(); err != nil && !errors.Is(err, mirror.ErrUnsure) {
			t.Errorf("seed %d: had the process died: %v", seed, err)
		}
	}
	next := w.crash()
	if r := j.Record(); last && r.State != job.StateCompleted {
		t.Errorf("seed %d: the last one does not end: %+v", seed, r)
	}
	stop.Store(true)
	m.Shutdown()
	guests.Wait()
	return next
}

// After an error of the target, or a flush that has not ended, the next process begins again; not after a full disk.
func TestUnsure(t *testing.T) {
	for _, c := range []struct {
		rule   blktest.Rule
		op     blk.Op
		flags  blk.Flags
		unsure bool
	}{
		{blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.EIO}, blk.OpWrite, 0, true},
		{blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.ENOSPC}, blk.OpWrite, 0, false},
		{blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true}, blk.OpWrite, 0, false},
		{blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true}, blk.OpWrite, blk.FUA, true},
		{blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Hold: true}, blk.OpFlush, 0, true},
		{blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: syscall.EIO}, blk.OpFlush, 0, false}, // all is dirty
	} {
		words := make([]atomic.Uint64, mirror.StateWords(wSize, wGran))
		source, target := blktest.NewMemory(wSize), blktest.NewFault(blktest.NewMemory(wSize))
		n := mirror.New(source, mirror.NewState(words, wSize, wGran))
		n.State.SetBulk(wSize)
		n.To(target, func(error) {})
		if err := n.Mirror(t.Context(), blk.NewGraph(n)); err != nil {
			t.Fatal(err)
		}
		trap := target.Add(c.rule)
		q := &blk.Request{Op: c.op}
		if c.op == blk.OpWrite {
			q = write(512, fill(512, 1))
			q.Flags = c.flags
		}
		done := make(chan error, 1)
		go func() { done <- blk.Do(blk.NewTask(), n, q) }()
		if c.rule.Hold {
			trap.Wait(t, 1)
		} else if err := <-done; err != nil {
			t.Errorf("%v: the guest is told of the target's error: %v", c, err)
		}
		next := make([]atomic.Uint64, len(words))
		for i := range words {
			next[i].Store(words[i].Load())
		}
		s, err := mirror.OpenState(next, wSize, wGran)
		if errors.Is(err, mirror.ErrUnsure) != c.unsure {
			t.Errorf("%v: %v", c, err)
		} else if err == nil && !s.Dirty.Any(512, 1) || err == nil && c.op == blk.OpFlush && s.Left() < wSize {
			t.Errorf("%v: %d bytes may differ", c, s.Left())
		}
		trap.Release()
		if c.rule.Hold {
			if err := <-done; err != nil {
				t.Errorf("%v: %v", c, err)
			}
		}
	}
}

// What a state says that cannot be, or is unsure of, is not gone on from.
func TestOpenState(t *testing.T) {
	for word, bad := range map[int]uint64{0: wGran + 1, 1: 1} {
		words := make([]atomic.Uint64, mirror.StateWords(wSize, wGran))
		words[word].Store(bad)
		if _, err := mirror.OpenState(words, wSize, wGran); err == nil {
			t.Errorf("word %d is %d", word, bad)
		}
	}
	for _, bulk := range []uint64{wSize + wGran, 1 << 63, ^uint64(wGran - 1)} {
		words := make([]atomic.Uint64, mirror.StateWords(wSize, wGran))
		words[0].Store(bulk)
		if _, err := mirror.OpenState(words, wSize, wGran); err == nil {
			t.Errorf("the bulk stage has come to %#x", bulk)
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	words := make([]atomic.Uint64, mirror.StateWords(wSize, wGran))
	for i := 8; i < len(words); i++ {
		words[i].Store(rng.Uint64() & rng.Uint64() & rng.Uint64())
	}
	words[0].Store(wGran)
	s, err := mirror.OpenState(words, wSize, wGran)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Dirty.Count(); n == 0 || n > wSize/wGran+1 || s.Left() != wSize-wGran+n*wGran {
		t.Errorf("%d blocks are dirty, %d bytes left", n, s.Left())
	}
	source, target := blktest.NewMemory(wSize), blktest.NewMemory(wSize)
	n := mirror.New(source, s)
	n.To(target, nil)
	if err := blk.Do(blk.NewTask(), n, write(0, fill(512, 1))); err != nil || !s.Dirty.Any(0, 1) {
		t.Errorf("a write is not logged: %v", err)
	}
}
