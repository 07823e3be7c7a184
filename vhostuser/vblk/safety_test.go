// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/loop"
	"github.com/blkstream/blkstream/vhostuser"
	"github.com/blkstream/blkstream/vhostuser/frontend"
	"github.com/blkstream/blkstream/virtq"
)

// spy remembers the flags of the changes that reach it.
type spy struct {
	blk.Node
	mu    sync.Mutex
	flags map[blk.Op][]blk.Flags
}

func (s *spy) Do(t *blk.Task, r *blk.Request) error {
	s.mu.Lock()
	s.flags[r.Op] = append(s.flags[r.Op], r.Flags)
	s.mu.Unlock()
	return s.Node.Do(t, r)
}

func (s *spy) take(op blk.Op) []blk.Flags {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flags[op]
	delete(s.flags, op)
	return f
}

// Without a write cache each change carries FUA: the driver switched it off, cannot flush, or was offered none.
func TestFUA(t *testing.T) {
	for _, c := range []struct {
		name     string
		opts     Options
		features uint64 // not accepted
		off      bool   // the driver switches the cache off
		want     blk.Flags
	}{
		{"cache on", Options{}, 0, false, 0},
		{"cache on, no CONFIG_WCE", Options{}, frontend.FeatureConfigWCE, false, 0},
		{"cache off", Options{}, 0, true, blk.FUA},
		{"no FLUSH", Options{}, frontend.FeatureFlush, false, blk.FUA},
		{"no FLUSH, no CONFIG_WCE", Options{}, frontend.FeatureFlush | frontend.FeatureConfigWCE, false, blk.FUA},
		{"write-through", Options{WriteThrough: true}, 0, false, blk.FUA},
		{"write-through, no FLUSH", Options{WriteThrough: true}, frontend.FeatureFlush, false, blk.FUA},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := &spy{Node: blktest.NewMemory(1 << 20), flags: map[blk.Op][]blk.Flags{}}
			c.opts.Discard = true
			s := serve(t, n, c.opts)
			d := s.dial(t, frontend.Options{Queues: 2, Features: frontend.AllFeatures &^ c.features})
			one := func(want blk.Flags) {
				t.Helper()
				_, err1 := d.WriteAt(make([]byte, 4096), 0)
				_, err2 := d.WriteAt(make([]byte, 512), 512)
				if err := errors.Join(err1, err2, d.Discard(0, 4096), d.WriteZeroes(0, 4096, true)); err != nil {
					t.Fatal(err)
				}
				for op, number := range map[blk.Op]int{blk.OpWrite: 2, blk.OpDiscard: 1, blk.OpWriteZeroes: 1} {
					got := n.take(op)
					for _, f := range got {
						if f&blk.FUA != want {
							t.Errorf("%v: flags %d, want %d", op, f, want)
						}
					}
					if len(got) != number {
						t.Errorf("%d of %v", len(got), op)
					}
				}
			}
			if c.off {
				one(0)
				if err := d.SetWriteCache(false); err != nil {
					t.Fatal(err)
				}
				if n := len(n.take(blk.OpFlush)); n != 1 {
					t.Errorf("%d flushes when the cache was switched off, after which the driver has no reason to flush", n)
				}
			}
			one(c.want)
			if c.off {
				if err := d.SetWriteCache(true); err != nil {
					t.Fatal(err)
				}
				one(0)
			}
			if c.opts.WriteThrough {
				if err := d.SetWriteCache(true); !errors.Is(err, frontend.ErrRefused) {
					t.Errorf("the cache of a write-through disk was switched on: %v", err)
				}
				one(c.want)
			}
			// A reset forgets neither what the driver chose, which the front-end shows the next one, nor what the user did.
			before := s.dev.writeback.Load()
			s.dev.Reset()
			if got := s.dev.writeback.Load(); got != before || got && c.opts.WriteThrough {
				t.Errorf("write-back %v after a reset", got)
			}
		})
	}
}

// The fast path passes FUA and flushes on to the host.
func TestFUAFast(t *testing.T) {
	g := blk.NewGraph(newPieces(image(t, t.TempDir(), 1<<20, file.Options{}), 4096))
	g.Root().(*pieces).used.Set(0, 1<<20)
	d := New(g, 1<<20, defaults(Options{}))
	r := newRequest(&queue{dev: d})
	for _, fua := range []bool{false, true} {
		d.writeback.Store(!fua)
		d.acked.Store(featFlush)
		out := make([]byte, 16+3*4096)
		out[0] = typeOut
		r.chain.Out = append(r.chain.Out[:0], blk.BytesVec(nil, out)...)
		if err := r.parse(nil, 0); err != nil {
			t.Fatal(err)
		}
		n, ok := r.mapAll(g.Root())
		if n != 3 || !ok {
			t.Fatalf("%d extents, %v", n, ok)
		}
		for i := range n {
			if r.ios[i].FUA != fua || r.ios[i].Kind != blk.IOWrite {
				t.Errorf("extent %d: %+v, want FUA %v", i, r.ios[i], fua)
			}
		}
	}
	r.req = blk.Request{Op: blk.OpFlush}
	if n, ok := r.mapAll(g.Root()); n != 1 || !ok || r.ios[0].Kind != blk.IOSync || r.ios[0].File == nil {
		t.Errorf("flush: %d operations, %v, %+v", n, ok, r.ios[0])
	}
}

// Rule 15: whenever the power goes, what was acknowledged before a flush is there; without a write cache, what was
// acknowledged.
func TestCrash(t *testing.T) {
	const size, writers, sectors = 1 << 20, 4, 64
	for _, c := range []struct {
		name     string
		opts     Options
		features uint64 // not accepted
		off      bool
		durable  bool // without a flush
	}{
		{"write-back", Options{}, 0, false, false},
		{"cache off", Options{}, 0, true, true},
		{"no FLUSH", Options{}, frontend.FeatureFlush, false, true},
		{"write-through", Options{WriteThrough: true}, 0, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := blktest.NewCrashDisk(size)
			d := serve(t, disk, c.opts).dial(t, frontend.Options{Queues: 4, Features: frontend.AllFeatures &^ c.features})
			if c.off {
				if err := d.SetWriteCache(false); err != nil {
					t.Fatal(err)
				}
			}
			// promised[w][s] is the oldest generation that sector s of writer w may hold after a crash.
			var promised [writers][sectors]atomic.Uint32
			var wg sync.WaitGroup
			stop := make(chan struct{})
			for w := range writers {
				wg.Go(func() {
					var acked [sectors]uint32
					rng := rand.New(rand.NewPCG(uint64(w), 7))
					for gen := uint32(1); ; gen++ {
						select {
						case <-stop:
							return
						default:
						}
						if gen%8 == 0 {
							if err := d.Flush(); err != nil {
								t.Error(err)
								return
							}
							for s := range sectors {
								promised[w][s].Store(acked[s])
							}
							continue
						}
						s := rng.IntN(sectors)
						b := bytes.Repeat([]byte{byte(gen), byte(gen >> 8), byte(gen >> 16), byte(w)}, 128)
						if _, err := d.WriteAt(b, int64(w*sectors+s)*512); err != nil {
							t.Error(err)
							return
						}
						if acked[s] = gen; c.durable {
							promised[w][s].Store(gen)
						}
					}
				})
			}
			rng := rand.New(rand.NewPCG(5, 6))
			for range 60 {
				var want [writers][sectors]uint32
				for w := range writers {
					for s := range sectors {
						want[w][s] = promised[w][s].Load()
					}
				}
				img := disk.Crash(rng).Bytes() // after the promises were read
				for w := range writers {
					for s := range sectors {
						b := img[(w*sectors+s)*512:]
						if got := uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16; got < want[w][s] {
							t.Errorf("writer %d, sector %d: generation %d after the crash, %d was promised", w, s, got, want[w][s])
						}
					}
				}
			}
			close(stop)
			wg.Wait()
		})
	}
}

// A flush that fails says so.
func TestFlushFails(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	d := serve(t, f, Options{}).dial(t, frontend.Options{})
	f.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Count: 1, Err: syscall.EIO})
	if err := d.Flush(); !errors.Is(err, frontend.ErrIO) {
		t.Errorf("flush: %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Errorf("next flush: %v", err)
	}
}

// Rule 13: a broken ring stops its queue, tells the driver once, and nothing else.
func TestBrokenRing(t *testing.T) {
	const gpa = 1 << 40 // not in guest memory
	// break leaves something bad in r's ring. mem is free guest memory at at.
	for _, c := range []struct {
		name  string
		spoil func(r *ring, at uint64, mem []byte)
	}{
		{"unmapped header", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: gpa, Len: 16}}, []virtq.Buf{{GPA: at, Len: 1}}, false)
		}},
		{"unmapped status", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{{GPA: gpa, Len: 1}}, false)
		}},
		{"data wraps around", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 16}, {GPA: 1<<64 - 512, Len: 1024}}, []virtq.Buf{{GPA: at, Len: 1}}, true)
		}},
		{"buffer over the end of memory", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 1<<32 - 1}}, []virtq.Buf{{GPA: at, Len: 1}}, false)
		}},
		{"empty buffer", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 16}, {GPA: at, Len: 0}}, []virtq.Buf{{GPA: at, Len: 1}}, false)
		}},
		{"index jump", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{{GPA: at + 64, Len: 1}}, false)
			r.drv.Publish()
			r.poke(r.q.Ring().Avail+2, 5000)
		}},
		{"head too large", func(r *ring, at uint64, _ []byte) {
			r.add([]virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{{GPA: at + 64, Len: 1}}, false)
			r.poke(r.q.Ring().Avail+4+2, 128) // one came before
		}},
		{"loop", func(r *ring, at uint64, _ []byte) {
			head := r.add([]virtq.Buf{{GPA: at, Len: 16}, {GPA: at, Len: 16}}, []virtq.Buf{{GPA: at + 64, Len: 1}}, false)
			desc := r.q.Ring().Desc + 16*uint64(head)
			r.poke(desc+12, 1) // NEXT
			r.poke(desc+14, head)
		}},
		{"readable after writable", func(r *ring, at uint64, _ []byte) {
			head := r.add([]virtq.Buf{{GPA: at, Len: 16}, {GPA: at, Len: 16}}, nil, false)
			r.poke(r.q.Ring().Desc+16*uint64(head)+12, 1|2) // NEXT, WRITE
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, blktest.NewMemory(1<<20), Options{})
			d := s.dial(t, frontend.Options{Queues: 2, Manual: true, ProtocolFeatures: frontend.AllProtocolFeatures &^ frontend.ProtocolInflight})
			other := serve(t, blktest.NewMemory(1<<20), Options{}).dial(t, frontend.Options{})
			bad, good := newRing(t, d, 0), newRing(t, d, 1)
			at, err := d.Alloc(4096)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := d.Memory().Bytes(at, 4096)
			if err != nil {
				t.Fatal(err)
			}
			flush := func(r *ring) {
				mem[0] = typeFlush
				mem[64] = 0xff
				r.add([]virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{{GPA: at + 64, Len: 1}}, false)
				r.publish()
			}
			for _, r := range []*ring{bad, good} {
				flush(r)
				if r.wait(); mem[64] != statusOK {
					t.Fatalf("status %d", mem[64])
				}
			}
			// Within a change the queue rests, so that it sees the ring only when it is spoilt.
			err = s.graph.Change(t.Context(), func(*blk.Tx) error {
				c.spoil(bad, at, mem)
				bad.drv.Publish()
				loop.Signal(bad.kick)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			_, _, badErr := bad.q.FDs()
			if !waitFD(badErr, 5*time.Second) {
				t.Fatal("the err descriptor was not signalled")
			}
			for range 5 {
				loop.Signal(bad.kick)
				flush(good)
				if good.wait(); mem[64] != statusOK {
					t.Errorf("other queue: status %d", mem[64])
				}
			}
			if head, _, ok := bad.drv.PopUsed(); ok {
				t.Errorf("the broken queue completed head %d", head)
			}
			if _, _, goodErr := good.q.FDs(); waitFD(goodErr, 0) || waitFD(badErr, 0) {
				t.Error("an err descriptor was signalled too often")
			}
			if err := other.Flush(); err != nil {
				t.Errorf("another disk: %v", err)
			}
			if n := s.log.count("its ring is damaged"); n != 1 {
				t.Errorf("logged %d times", n)
			}
			// It can be paused and stopped like any other, and the next session starts afresh.
			if err := s.graph.Change(t.Context(), func(*blk.Tx) error { return nil }); err != nil {
				t.Errorf("change: %v", err)
			}
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if err := s.dial(t, frontend.Options{Queues: 2}).Flush(); err != nil {
				t.Errorf("next session: %v", err)
			}
		})
	}
}

// poke writes a 16-bit field in guest memory.
func (r *ring) poke(gpa uint64, v uint16) {
	r.Helper()
	b, err := r.q.Ring().Mem.Bytes(gpa, 2)
	if err != nil {
		r.Fatal(err)
	}
	b[0], b[1] = byte(v), byte(v>>8)
}

// guestMemory finds the descriptor of the front-end's memory, to do what a hostile one could do.
func guestMemory(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := -1
	for _, n := range names {
		link, _ := os.Readlink("/proc/self/fd/" + n.Name())
		if strings.HasPrefix(link, "/memfd:guest-memory") {
			if found >= 0 {
				t.Fatal("there are two guests")
			}
			if _, err := fmt.Sscan(n.Name(), &found); err != nil {
				t.Fatal(err)
			}
		}
	}
	return found
}

// Guest memory that shrinks under a running queue ends that queue, or gives errors; the process lives.
func TestTruncatedMemory(t *testing.T) {
	const size = 4 << 20
	for _, kind := range []string{"slow", "tmpfs", "disk", "pool", "zero extents"} {
		for _, c := range []struct {
			name string
			typ  uint64
			left int64 // bytes of the file that stay: 64 KiB hold the rings and their requests
			want bool  // the request's header is gone too, so the ring breaks
		}{
			{"data of a read", typeIn, 128 << 10, false},
			{"data of a write", typeOut, 128 << 10, false},
			{"header", typeIn, 64 << 10, true},
			{"rings", typeIn, 0, true},
		} {
			t.Run(kind+"/"+c.name, func(t *testing.T) {
				var n blk.Node
				o := Options{}
				switch kind {
				case "slow":
					n = blktest.NewMemory(size)
				case "tmpfs":
					n = image(t, tmpfs(t), size, file.Options{})
				case "disk":
					n = image(t, t.TempDir(), size, file.Options{NoSync: true})
				case "pool":
					n, o.NoURing = image(t, t.TempDir(), size, file.Options{NoSync: true}), true
				case "zero extents":
					n = newPieces(image(t, t.TempDir(), size, file.Options{}), 1<<20)
				}
				s := serve(t, n, o)
				features := uint64(frontend.AllFeatures &^ frontend.FeatureEventIdx)
				// 8 entries: the rings take one page, and the guest's buffers begin at 64 KiB.
				d := s.dial(t, frontend.Options{Manual: true, QueueSize: 8, Features: features})
				r := newRing(t, d, 0)
				kick, _, errFD := r.q.FDs()
				at, err := d.Alloc(1 << 20)
				if err != nil {
					t.Fatal(err)
				}
				mem := r.q.Ring().Mem
				lo := uint64(1 << 32) // where guest memory for buffers begins: at 64 KiB of the file
				head, err := mem.Bytes(lo, 64)
				if err != nil {
					t.Fatal(err)
				}
				err = s.graph.Change(t.Context(), func(*blk.Tx) error {
					copy(head, le64(c.typ))
					hdr, st, data := virtq.Buf{GPA: lo, Len: 16}, virtq.Buf{GPA: lo + 32, Len: 1}, virtq.Buf{GPA: at, Len: 64 << 10}
					head[32] = 0xee
					if c.typ == typeIn {
						r.add([]virtq.Buf{hdr}, []virtq.Buf{data, st}, false)
					} else {
						r.add([]virtq.Buf{hdr, data}, []virtq.Buf{st}, false)
					}
					r.drv.Publish()
					loop.Signal(kick)
					return unix.Ftruncate(guestMemory(t), c.left)
				})
				if err != nil {
					t.Fatal(err)
				}
				if c.want {
					if !waitFD(errFD, 5*time.Second) {
						t.Error("the err descriptor was not signalled")
					}
				} else {
					// The status lies in memory that is left: the request ends with an error, or the ring is stopped.
					if r.waitOrErr(errFD) {
						if head[32] != statusIOErr {
							t.Errorf("status %d", head[32])
						}
					}
				}
				if err := s.graph.Change(t.Context(), func(*blk.Tx) error { return nil }); err != nil {
					t.Errorf("change: %v", err)
				}
				if err := d.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
				if err := s.dial(t, frontend.Options{}).Flush(); err != nil {
					t.Errorf("next session: %v", err)
				}
			})
		}
	}
}

// waitOrErr waits for a completion, or for the queue to say that it is broken; true: a completion.
func (r *ring) waitOrErr(errFD int) bool {
	r.Helper()
	for range 500 {
		if _, _, ok := r.drv.PopUsed(); ok {
			return true
		}
		if waitFD(errFD, 10*time.Millisecond) {
			return false
		}
	}
	r.Fatal("neither an answer nor an error")
	return false
}

// run runs the loads until it is stopped.
func run(ls []*load) (stop func()) {
	var wg sync.WaitGroup
	over := make(chan struct{})
	for _, l := range ls {
		wg.Go(func() {
			for l.step() {
				select {
				case <-over:
					return
				default:
				}
			}
		})
	}
	return func() {
		close(over)
		wg.Wait()
	}
}

// A graph changes while load runs: nothing is lost, and in the change nothing is in flight.
func TestChange(t *testing.T) {
	const size = 8 << 20
	for _, kind := range []string{"tmpfs", "disk", "pool", "slow"} {
		t.Run(kind, func(t *testing.T) {
			var n blk.Node
			o := Options{Discard: true, PollMax: 20 * time.Microsecond}
			switch kind {
			case "tmpfs":
				n = image(t, tmpfs(t), size, file.Options{})
			case "disk":
				n = image(t, t.TempDir(), size, file.Options{NoSync: true})
			case "pool":
				n, o.NoURing = image(t, t.TempDir(), size, file.Options{NoSync: true}), true
			case "slow":
				n = blktest.NewMemory(size)
			}
			s := serve(t, n, o)
			d := s.dial(t, frontend.Options{Queues: 4})
			ls := loads(t, d, size, 512, 64<<10, 8)
			stop := run(ls)
			for i := range 150 {
				fault := blktest.NewFault(n)
				fault.Transparent = i%3 == 0 // slow, fast and direct in turn
				err := s.graph.Change(t.Context(), func(tx *blk.Tx) error {
					s.dev.mu.Lock()
					defer s.dev.mu.Unlock()
					for q := range s.dev.queues {
						q.do(func() {
							if q.taken != 0 || q.staged != 0 || q.loop.Tasks() != 0 || q.pauses == 0 {
								t.Errorf("queue %d: %d taken, %d staged, %d tasks, %d pauses", q.r.Index, q.taken, q.staged, q.loop.Tasks(), q.pauses)
							}
						})
					}
					if tx.SetRoot(n); i%2 == 0 {
						tx.SetRoot(fault)
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if i%20 == 0 { // the guest stops and starts as well
					if _, err := d.Stop(); err != nil {
						t.Error(err)
					}
					if err := d.Start(); err != nil {
						t.Error(err)
					}
				}
			}
			stop()
			if _, err := d.Stop(); err != nil {
				t.Error(err)
			}
			check(t, n, ls)
		})
	}
}

// A change that cannot be made in time lets all queues go on.
func TestChangeTimeout(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	s := serve(t, f, Options{})
	d := s.dial(t, frontend.Options{Queues: 4})
	hold := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Count: 1, Hold: true})
	done := make(chan error, 1)
	go func() { _, err := d.WriteAt(make([]byte, 512), 0); done <- err }()
	hold.Wait(t, 1)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		err := s.graph.Change(ctx, func(*blk.Tx) error { t.Error("changed with a request in flight"); return nil })
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("change: %v", err)
		}
		for range 8 { // each queue twice
			if err := d.Flush(); err != nil {
				t.Errorf("flush: %v", err)
			}
		}
	}
	hold.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.graph.Change(t.Context(), func(*blk.Tx) error { return nil }); err != nil {
		t.Error(err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}

// A loop that hangs is as bad as a request that does, for the disk itself. Others that are changed with it go on.
func TestChangeHung(t *testing.T) {
	hung, other := serve(t, blktest.NewMemory(1<<20), Options{}), serve(t, blktest.NewMemory(1<<20), Options{})
	d, o := hung.dial(t, frontend.Options{}), other.dial(t, frontend.Options{})
	release := make(chan struct{})
	hung.dev.mu.Lock()
	for q := range hung.dev.queues {
		q.loop.Post(func() { <-release })
	}
	hung.dev.mu.Unlock()
	over := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		over <- blk.ChangeAll(ctx, []*blk.Graph{hung.graph, other.graph}, func([]*blk.Tx) error {
			t.Error("changed under a queue that does not rest")
			return nil
		})
	}()
	select {
	case err := <-over:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("change: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the change waits for ever")
	}
	if !t.Failed() {
		if err := o.Flush(); err != nil {
			t.Errorf("the other disk: %v", err)
		}
	}
	close(release)
	if err := d.Flush(); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if err := hung.graph.Change(t.Context(), func(*blk.Tx) error { return nil }); err != nil {
		t.Errorf("change: %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Errorf("after the change: %v", err)
	}
}

// rig is a ring in memory of its own, for queues without a session.
type rig struct {
	mem *virtq.Memory
	drv *virtq.Driver
	r   vhostuser.Ring
	buf []byte // free memory, at bufGPA
}

const bufGPA = 0x10000

func newRig(t *testing.T) *rig {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "mem")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 0x20000
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	region, err := virtq.MapRegion(int(f.Fd()), 0, size, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := region.Unmap(); err != nil {
			t.Error(err)
		}
	})
	g := &rig{}
	if g.mem, err = virtq.NewMemory(region); err != nil {
		t.Fatal(err)
	}
	cfg := virtq.SplitConfig{Mem: g.mem, Size: 64, Desc: 0x1000, Avail: 0x2000, Used: 0x3000, EventIdx: true}
	if g.drv, err = virtq.NewDriver(virtq.DriverConfig{SplitConfig: cfg}); err != nil {
		t.Fatal(err)
	}
	if g.buf, err = g.mem.Bytes(bufGPA, 0x10000); err != nil {
		t.Fatal(err)
	}
	g.r = vhostuser.Ring{
		Size: 64, Desc: cfg.Desc, Avail: cfg.Avail, Used: cfg.Used, Features: featEventIdx | featVersion1,
		Kick: -1, Call: -1, Err: -1, Mem: g.mem,
	}
	return g
}

// flush adds a flush whose status goes to byte i of a table.
func (g *rig) flush(t *testing.T, i int) {
	t.Helper()
	copy(g.buf, le64(typeFlush))
	g.buf[1024+i] = 0xff
	if _, err := g.drv.AddChain([]virtq.Buf{{GPA: bufGPA, Len: 16}}, []virtq.Buf{{GPA: bufGPA + 1024 + uint64(i), Len: 1}}, false); err != nil {
		t.Fatal(err)
	}
	g.drv.Publish()
}

func (g *rig) wait(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; runtime.Gosched() {
		if _, _, ok := g.drv.PopUsed(); ok {
			return
		}
		if err := g.drv.Err(); err != nil || time.Now().After(end) {
			t.Fatalf("no answer; %v", err)
		}
	}
}

// Stopping a queue and changing the graph meet at any moment.
func TestStopWhilePaused(t *testing.T) {
	g := newRig(t)
	d := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(Options{}))
	for i := range 400 {
		vq, err := d.Start(g.r)
		if err != nil {
			t.Fatal(err)
		}
		q := vq.(sessionQueue).queue
		if g.drv.Free() >= 2 {
			g.flush(t, i%64)
		}
		vq.Kick()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if err := q.Pause(t.Context()); err != nil {
					t.Error(err)
				}
				q.Resume()
			})
		}
		if i%2 == 0 {
			runtime.Gosched()
		}
		wg.Go(func() {
			base, err := vq.Stop()
			if err != nil {
				t.Error(err)
			}
			g.r.Base = base
		})
		wg.Wait()
		for _, _, ok := g.drv.PopUsed(); ok; _, _, ok = g.drv.PopUsed() {
		}
	}
}

// Whoever waits for a queue to rest is told after the driver was signalled: a monitor that has paused its guest takes the
// state of the interrupts next, and what comes later is lost with a snapshot.
func TestRestAfterCall(t *testing.T) {
	g := newRig(t)
	call, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(call)
	g.r.Call = call
	vq, err := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(Options{})).Start(g.r)
	if err != nil {
		t.Fatal(err)
	}
	q := vq.(sessionQueue).queue
	for i := range 3 {
		vq.Pause()
		g.drv.EnableInterrupts()
		copy(g.buf, le64(typeGetID))
		if _, err := g.drv.AddChain([]virtq.Buf{{GPA: bufGPA, Len: 16}}, []virtq.Buf{{GPA: bufGPA + 1024, Len: 21}}, false); err != nil {
			t.Fatal(err)
		}
		g.drv.Publish()
		// The turn in which the last request ends.
		q.do(func() {
			q.take().begin()
			rest := make(chan struct{})
			q.rest = append(q.rest, rest)
			late := q.Publish()
			select {
			case <-rest:
				if late || !waitFD(call, 0) {
					t.Errorf("request %d: the queue said that it rests before it signalled", i)
				}
			default:
				t.Errorf("request %d: the queue does not rest", i)
			}
		})
		g.wait(t)
		vq.Resume()
	}
	if _, err := vq.Stop(); err != nil {
		t.Error(err)
	}
}

// do tells whether its function ran, also if the loop ends right after it.
func TestDoAtTheEnd(t *testing.T) {
	d := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(Options{}))
	g := newRig(t)
	for range 1000 {
		vq, err := d.Start(g.r)
		if err != nil {
			t.Fatal(err)
		}
		q := vq.(sessionQueue).queue
		ran := false
		if ok := q.do(func() { ran = true; q.loop.Stop() }); !ok || !ran {
			t.Fatalf("returned %v, ran %v", ok, ran)
		}
		<-q.end
		if q.do(func() { t.Error("ran in a loop that has ended") }) {
			t.Fatal("ran after the end")
		}
		d.graph.Detach(q)
	}
}

// A ring without a kick descriptor is polled, and its I/O submitted, though the loop never sleeps.
func TestNoKick(t *testing.T) {
	for name, root := range map[string]blk.Node{
		"memory": blktest.NewMemory(1 << 20), "file": image(t, t.TempDir(), 1<<20, file.Options{}),
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			d := New(blk.NewGraph(root), 1<<20, defaults(Options{}))
			vq, err := d.Start(g.r)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 20 {
				time.Sleep(time.Millisecond) // long enough to fall asleep
				g.flush(t, i)
				g.wait(t)
			}
			if _, err := vq.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A call descriptor that cannot take any more does not stop the queue: the front-end can fill it, and it blocks.
func TestFullCall(t *testing.T) {
	g := newRig(t)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := unix.Write(pipe[1], make([]byte, 4096)); err != nil {
			break
		}
	}
	if err := unix.SetNonblock(pipe[1], false); err != nil {
		t.Fatal(err)
	}
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(event, le64(1<<64-2)); err != nil {
		t.Fatal(err)
	}
	nonblocking, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(nonblocking, le64(1<<64-2)); err != nil {
		t.Fatal(err)
	}
	fds := []int{event, nonblocking, pipe[1]}
	defer func() {
		for _, fd := range append(fds, pipe[0]) {
			unix.Close(fd)
		}
	}()
	for _, g.r.Call = range fds {
		g.r.Err = g.r.Call
		d := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(Options{}))
		vq, err := d.Start(g.r)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 20 {
			g.drv.EnableInterrupts()
			g.flush(t, i)
			vq.Kick()
			g.wait(t)
		}
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			if g.r.Base, err = vq.Stop(); err != nil {
				t.Error(err)
			}
		}()
		select {
		case <-stopped:
		case <-time.After(5 * time.Second):
			t.Fatal("the queue hangs")
		}
	}
}

// A call descriptor that is replaced while the queue runs is signalled from then on, and the old one is not, whichever way
// the signal takes.
func TestReplacedCall(t *testing.T) {
	for _, o := range []Options{{}, {PollMax: time.Hour}, {NoURing: true}} {
		g := newRig(t)
		vq, err := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(o)).Start(g.r)
		if err != nil {
			t.Fatal(err)
		}
		old := -1
		for i := range 6 {
			call, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK*(i&1))
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(call)
			vq.SetCall(call)
			for range 10 {
				g.drv.EnableInterrupts()
				g.flush(t, i)
				vq.Kick()
				if !waitFD(call, 5*time.Second) {
					t.Fatal("the new descriptor was not signalled")
				}
				g.wait(t)
			}
			if old >= 0 && waitFD(old, 0) {
				t.Error("the old descriptor was signalled")
			}
			old = call
		}
		if _, err := vq.Stop(); err != nil {
			t.Error(err)
		}
	}
}

// A daemon that dies with requests in flight: the next one does each of them, once, in the order of the guest.
func TestRecovery(t *testing.T) {
	const size, requests = 1 << 20, 24
	for _, queues := range []int{1, 2} {
		t.Run(fmt.Sprint(queues), func(t *testing.T) {
			disk := blktest.NewMemory(size)
			f := blktest.NewFault(disk)
			path := filepath.Join(t.TempDir(), "s")
			old := serveAt(t, path, f, Options{Discard: true})
			d := old.dial(t, frontend.Options{Queues: queues, Reconnect: 10 * time.Millisecond})
			ls := loads(t, d, size/2, 512, 4096, 2)
			for _, l := range ls {
				for range 50 { // the indices have moved on
					l.d = d
					if !l.step() {
						return
					}
				}
			}
			gpa, err := d.Alloc(requests * 4096)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := d.Memory().Bytes(gpa, requests*4096)
			if err != nil {
				t.Fatal(err)
			}
			copy(mem, randomBytes(rand.New(rand.NewPCG(1, 1)), int64(len(mem))))
			// Every third request is held, so that used.idx does not tell which are in flight.
			var holds []*blktest.Trap
			for i := 0; i < requests; i += 3 {
				at := int64(size/2 + i*4096)
				holds = append(holds, f.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Off: at, Len: 4096, Hold: true}))
			}
			// The first daemon is as good as dead: it stays frozen until the guest has gone.
			t.Cleanup(func() {
				d.Close()
				for _, h := range holds {
					h.Release()
				}
			})
			var done [requests]atomic.Int32
			all := make(chan *frontend.Request, 10*requests)
			for i := range requests {
				r := &frontend.Request{
					Type: frontend.TypeOut, Sector: uint64(size/2/512 + i*8),
					Data: []virtq.Buf{{GPA: gpa + uint64(i)*4096, Len: 4096}},
					Done: func(r *frontend.Request) { done[i].Add(1); all <- r },
				}
				if err := d.Queue(i % queues).Submit(r); err != nil {
					t.Fatal(err)
				}
			}
			for _, h := range holds {
				h.Wait(t, 1)
			}
			for range requests - len(holds) {
				if err := (<-all).Err(); err != nil {
					t.Error(err)
				}
			}
			resumed := d.Reconnects()
			go old.cancel() // drops the connection at once, then waits for what is held
			for {           // the listener is gone when its file is
				if _, err := os.Stat(path); err != nil {
					break
				}
				time.Sleep(time.Millisecond)
			}
			next := serveAt(t, path, disk, Options{Discard: true})
			for range holds {
				select {
				case r := <-all:
					if err := r.Err(); err != nil {
						t.Error(err)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("a request was lost")
				}
			}
			for end := time.Now().Add(5 * time.Second); d.Reconnects() == resumed; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the connection was never lost")
				}
			}
			for _, l := range ls {
				for range 50 {
					if !l.step() {
						return
					}
				}
			}
			for i := range done {
				if n := done[i].Load(); n != 1 {
					t.Errorf("request %d was completed %d times", i, n)
				}
			}
			if n := next.dev.Stats().Writes; n < uint64(len(holds)) {
				t.Errorf("the second daemon did %d writes", n)
			}
			if !bytes.Equal(disk.Bytes()[size/2:][:len(mem)], mem) {
				t.Error("the disk does not hold what was written")
			}
			check(t, disk, ls)
		})
	}
}

// The end of a session drains: a request that is held is completed in the guest's ring before anything is unmapped.
func TestDrain(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	s := serve(t, f, Options{})
	d := s.dial(t, frontend.Options{Queues: 2, Reconnect: 5 * time.Millisecond})
	hold := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Hold: true, Count: 4})
	done := make(chan error, 4)
	for range 4 {
		go func() { _, err := d.ReadAt(make([]byte, 4096), 0); done <- err }()
	}
	hold.Wait(t, 4)
	back := make(chan error, 1)
	go func() { back <- d.Reconnect(t.Context()) }()
	select {
	case err := <-back:
		t.Errorf("a session began before the last one had drained: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	hold.Release()
	if err := <-back; err != nil {
		t.Error(err)
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := f.Count(blk.OpRead); n != 4 {
		t.Errorf("%d reads, want 4: a drained request was done again", n)
	}
}

// What could not be drained is done before anything of the next session, and the ring is not told of it: an old write after
// a new one would undo it, and a request must not be answered twice.
func TestUndrained(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	s := serve(t, f, Options{})
	s.dev.drain = 20 * time.Millisecond
	d := s.dial(t, frontend.Options{Reconnect: 5 * time.Millisecond})
	hold := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Hold: true, Count: 1})
	old, fresh := bytes.Repeat([]byte{1}, 4096), bytes.Repeat([]byte{2}, 4096)
	done := make(chan error, 1)
	go func() { _, err := d.WriteAt(old, 0); done <- err }()
	hold.Wait(t, 1)
	if err := d.Reconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		t.Errorf("the write was done again while the first try was in flight; error %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	before := runtime.NumGoroutine()
	for range 20 {
		if err := d.Reconnect(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine() - before; n > 10 {
		t.Errorf("%d goroutines are left of queues that waited and were stopped", n)
	}
	hold.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := f.Count(blk.OpWrite); n != 2 {
		t.Errorf("%d writes, want the lost one and its repetition", n)
	}
	if _, err := d.WriteAt(fresh, 0); err != nil {
		t.Error(err)
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, fresh) {
		t.Errorf("an old write shows; error %v", err)
	}
	if n := s.dev.Running(); n != 1 {
		t.Errorf("%d queues run", n)
	}
}

// Whoever takes memory away or disables a ring is answered when nothing is in flight: by then a front-end may unmap the
// memory, or take a snapshot of it.
func TestPauseDrains(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	d := serve(t, f, Options{}).dial(t, frontend.Options{})
	enable := func(on byte) error {
		_, err := d.Conn().Call(frontend.Message{Request: frontend.MsgSetVringEnable, Flags: frontend.FlagNeedReply, Payload: []byte{0, 0, 0, 0, on, 0, 0, 0}}, 10*time.Second)
		return err
	}
	var gpa uint64
	for _, c := range []struct {
		name string
		do   func() error
	}{
		{"ADD_MEM_REG", func() (err error) { gpa, err = d.AddMemory(1 << 20); return err }},
		{"REM_MEM_REG", func() error { return d.RemoveMemory(gpa) }},
		{"VRING_ENABLE 0", func() error { return enable(0) }},
	} {
		hold := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Hold: true, Count: 1})
		read, done := make(chan error, 1), make(chan error, 1)
		go func() { _, err := d.ReadAt(make([]byte, 4096), 0); read <- err }()
		hold.Wait(t, 1)
		go func() { done <- c.do() }()
		select {
		case err := <-done:
			t.Errorf("%s was answered with a request in flight; error %v", c.name, err)
		case <-time.After(30 * time.Millisecond):
			hold.Release()
			if err := <-done; err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		hold.Release()
		if err := <-read; err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := enable(1); err != nil {
		t.Error(err)
	}
	if _, err := d.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
}

// More slow requests than coroutines: they wait their turn.
func TestManySlow(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	s := serve(t, f, Options{})
	d := s.dial(t, frontend.Options{QueueSize: 256})
	hold := f.Add(blktest.Rule{Hold: true})
	gpa, err := d.Alloc(512)
	if err != nil {
		t.Fatal(err)
	}
	const n = 200
	done := make(chan *frontend.Request, n)
	for i := range n {
		r := &frontend.Request{Type: frontend.TypeIn, Sector: uint64(i), Data: []virtq.Buf{{GPA: gpa, Len: 512}}, Done: func(r *frontend.Request) { done <- r }}
		if err := d.Queue(0).Submit(r); err != nil {
			t.Fatal(err)
		}
	}
	hold.Wait(t, maxTasks)
	time.Sleep(10 * time.Millisecond)
	if c := hold.Caught(); c > maxTasks+chunk {
		t.Errorf("%d requests are on the slow path, want about %d", c, maxTasks)
	}
	hold.Release()
	for range n {
		if err := (<-done).Err(); err != nil {
			t.Error(err)
		}
	}
}

// Every page of guest memory that the device changes is in the dirty-page log before the driver hears of it, whatever way
// the bytes came: read straight into it, through a buffer of ours, filled with zeros, or copied.
func TestDirtyLog(t *testing.T) {
	const (
		size  = 1 << 20
		page  = 4096
		count = 300 // used elements: more than one page of the used ring
	)
	direct := file.Options{Direct: true, Align: 512}
	for _, c := range []struct {
		name  string
		open  func() blk.Node
		opts  Options
		shift uint64 // of the buffers: direct I/O cannot use them when they are not aligned
	}{
		{"tmpfs", func() blk.Node { return image(t, tmpfs(t), size, file.Options{}) }, Options{}, 0},
		{"direct", func() blk.Node { return image(t, t.TempDir(), size, direct) }, Options{}, 0},
		{"direct, pool", func() blk.Node { return image(t, t.TempDir(), size, direct) }, Options{NoURing: true}, 0},
		{"bounced", func() blk.Node { return image(t, t.TempDir(), size, direct) }, Options{}, 1},
		{"zeros", func() blk.Node { return newPieces(blktest.NewMemory(size), page) }, Options{}, 0},
		{"slow", func() blk.Node { return blktest.NewMemory(size) }, Options{}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := c.open()
			if c.name != "zeros" {
				b := randomBytes(rand.New(rand.NewPCG(1, 2)), size)
				if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Len: size, Data: blk.BytesVec(nil, b)}); err != nil {
					t.Fatal(err)
				}
			}
			c.opts.Serial = "serial"
			d := serve(t, n, c.opts).dial(t, frontend.Options{Manual: true, QueueSize: 1024})
			r := newRing(t, d, 0)
			gpa, err := d.Alloc(64 * page)
			if err != nil {
				t.Fatal(err)
			}
			gpa = (gpa + page - 1) &^ (page - 1)
			rings := d.Memory().Regions()[0].GPA()
			var watched [2][]byte
			for i, at := range []uint64{rings, gpa} {
				if watched[i], err = d.Memory().Bytes(at, 16*page); err != nil {
					t.Fatal(err)
				}
			}
			for i := range watched[1] {
				watched[1][i] = 0xee
			}
			log, err := d.StartLog()
			if err != nil {
				t.Fatal(err)
			}
			for i := range count {
				typ, in := uint64(typeIn), []virtq.Buf{
					{GPA: gpa + page + c.shift, Len: 2 * page}, {GPA: gpa + 5*page + c.shift, Len: page}, {GPA: gpa + 9*page, Len: 1},
				}
				if i == count-1 {
					typ, in = typeGetID, []virtq.Buf{{GPA: gpa + 11*page - 2, Len: 20}, {GPA: gpa + 13*page, Len: 1}}
				}
				copy(watched[1], le64(typ))
				r.add([]virtq.Buf{{GPA: gpa, Len: 16}}, in, false)
				r.drv.EnableInterrupts()
				r.drv.Publish()
				var before [2][]byte
				for j := range watched {
					before[j] = bytes.Clone(watched[j])
				}
				loop.Signal(r.kick)
				r.wait()
				for j, at := range []uint64{rings, gpa} {
					for off := 0; off < len(watched[j]); off += page {
						changed := !bytes.Equal(before[j][off:][:page], watched[j][off:][:page])
						if changed && !log.Dirty(at+uint64(off)) {
							t.Fatalf("request %d: page %#x changed and is not marked", i, at+uint64(off))
						}
					}
				}
			}
			for _, p := range []uint64{0, 4, 7, 8} {
				if log.Dirty(gpa + p*page) {
					t.Errorf("page %d is marked, and was not written", p)
				}
			}
			if !log.Dirty(gpa+9*page) || !log.Dirty(gpa+10*page) || !log.Dirty(gpa+11*page) {
				t.Error("status or serial number are not marked")
			}
		})
	}
}

// Memory comes and goes while load runs.
func TestHotplug(t *testing.T) {
	const size = 4 << 20
	n := image(t, t.TempDir(), size, file.Options{NoSync: true})
	s := serve(t, n, Options{Discard: true})
	d := s.dial(t, frontend.Options{Queues: 2})
	ls := loads(t, d, size, 512, 64<<10, 4)
	stop := run(ls)
	for range 20 {
		gpa, err := d.AddMemory(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		r := &frontend.Request{Type: frontend.TypeIn, Data: []virtq.Buf{{GPA: gpa, Len: 64 << 10}}}
		if err := submit(t, d, 0, r).Err(); err != nil {
			t.Error(err)
		}
		if err := d.RemoveMemory(gpa); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	check(t, n, ls)
}

// All that a device had is given back.
func TestLeaks(t *testing.T) {
	s := serve(t, image(t, t.TempDir(), 1<<20, file.Options{NoSync: true}), Options{})
	blktest.NoLeaks(t, func() {
		d := s.dial(t, frontend.Options{Queues: 4})
		if _, err := d.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Error(err)
		}
		if err := errors.Join(d.WriteZeroes(0, 4096, false), d.Close()); err != nil {
			t.Error(err)
		}
		for end := time.Now().Add(5 * time.Second); s.dev.Running() > 0 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
	})
}
