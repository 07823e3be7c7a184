// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"
)

// pair is a device and a driver on one ring.
type pair struct {
	*raw
	q *Split
	d *Driver
}

func newPair(t testing.TB, size int, eventIdx bool, base uint16) *pair {
	t.Helper()
	r := newRaw(t, size)
	cfg := DriverConfig{SplitConfig: r.config(), Tables: tableAt, TableLen: 16}
	cfg.EventIdx, cfg.Base = eventIdx, base
	d, err := NewDriver(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &pair{r, mustSplit(t, cfg.SplitConfig), d}
}

// add makes n chains available, and tells whether the device is kicked.
func (p *pair) add(t testing.TB, n int) (kick bool) {
	t.Helper()
	for range n {
		if _, err := p.d.AddChain(nil, []Buf{{dataAt, 1}}, false); err != nil {
			t.Fatal(err)
		}
	}
	return p.d.Publish()
}

// complete does the next n chains, and tells whether the driver is interrupted.
func (p *pair) complete(t testing.TB, n int) (notify bool) {
	t.Helper()
	var c Chain
	for range n {
		if ok, err := p.q.Pop(&c); !ok || err != nil {
			t.Fatalf("Pop = %v, %v", ok, err)
		}
		p.q.Push(c.Head, 1)
	}
	return p.q.Publish()
}

// reap takes the next n completions.
func (p *pair) reap(t testing.TB, n int) {
	t.Helper()
	for range n {
		if _, written, ok := p.d.PopUsed(); !ok || written != 1 {
			t.Fatalf("PopUsed = %d, %v: %v", written, ok, p.d.Err())
		}
	}
}

func TestSuppression(t *testing.T) {
	for _, eventIdx := range []bool{false, true} {
		for _, base := range []uint16{0, 65500} { // 80 chains later the indices have wrapped around
			t.Run(fmt.Sprintf("event_idx=%v,base=%d", eventIdx, base), func(t *testing.T) {
				p := newPair(t, 16, eventIdx, base)
				if p.q.Publish() || p.d.Publish() {
					t.Error("a notification about nothing")
				}
				p.add(t, 1)
				p.d.DisableInterrupts()
				if !p.complete(t, 1) {
					t.Error("the first completion did not interrupt")
				}
				p.reap(t, 1)
				for i := range 10 {
					if p.q.EnableNotify() || p.d.EnableInterrupts() {
						t.Fatal("more work than there is")
					}
					if !p.add(t, 1) {
						t.Fatalf("round %d: no kick", i)
					}
					p.q.DisableNotify()
					if p.add(t, 3) {
						t.Fatalf("round %d: kick while the device is busy", i)
					}
					if !p.q.EnableNotify() {
						t.Fatalf("round %d: chains overlooked before sleeping", i)
					}
					p.q.DisableNotify()
					if !p.complete(t, 2) {
						t.Fatalf("round %d: no interrupt", i)
					}
					p.d.DisableInterrupts()
					if p.complete(t, 1) {
						t.Fatalf("round %d: interrupt while the driver is busy", i)
					}
					if !p.d.EnableInterrupts() {
						t.Fatalf("round %d: completions overlooked before sleeping", i)
					}
					p.reap(t, 3)
					if p.d.EnableInterrupts() {
						t.Fatalf("round %d: more completions than there are", i)
					}
					if !p.complete(t, 1) {
						t.Fatalf("round %d: no interrupt after sleeping", i)
					}
					p.reap(t, 1)
					// A batch that passes the event in its middle.
					p.q.EnableNotify()
					if !p.add(t, 4) {
						t.Fatalf("round %d: no kick for a batch", i)
					}
					if !p.d.EnableInterrupts() && !p.complete(t, 4) {
						t.Fatalf("round %d: no interrupt for a batch", i)
					}
					p.reap(t, 4)
				}
				if p.d.Free() != 16 || !p.q.Empty() {
					t.Errorf("%d free descriptors", p.d.Free())
				}
				if p.q.LastAvail() != base+81 || p.q.UsedIdx() != base+81 {
					t.Errorf("indices %d, %d", p.q.LastAvail(), p.q.UsedIdx())
				}
			})
		}
	}
}

// An event may lie ahead: the notification comes when its entry is passed, and only then.
func TestEventInFuture(t *testing.T) {
	p := newPair(t, 16, true, 65530)
	p.add(t, 1)
	p.complete(t, 1)           // the first one always interrupts
	p.put16(availAt+4+2*16, 2) // 65530+8
	p.add(t, 10)
	for i := range 10 { // the completions 65531 to 4
		if got, want := p.complete(t, 1), i == 7; got != want {
			t.Errorf("completion %d: interrupt %v", i, got)
		}
	}
	p.put16(usedAt+4+8*16, 7) // 65530+11+2
	p.reap(t, 11)
	for i := range 5 {
		if got, want := p.add(t, 1), i == 2; got != want {
			t.Errorf("chain %d: kick %v", i, got)
		}
	}
}

func TestDriverErrors(t *testing.T) {
	r := newRaw(t, 8)
	good := DriverConfig{SplitConfig: r.config(), Tables: tableAt, TableLen: 4}
	for name, change := range map[string]func(*DriverConfig){
		"avail":             func(c *DriverConfig) { c.Avail += 2 },
		"ring":              func(c *DriverConfig) { c.Size = 3 },
		"tables misaligned": func(c *DriverConfig) { c.Tables += 8 },
		"tables unmapped":   func(c *DriverConfig) { c.Tables = 0 },
	} {
		cfg := good
		change(&cfg)
		if _, err := NewDriver(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	d, err := NewDriver(good)
	if err != nil {
		t.Fatal(err)
	}
	bufs := make([]Buf, 9)
	for i := range bufs {
		bufs[i] = Buf{dataAt, 1}
	}
	if _, err := d.AddChain(nil, nil, false); err == nil {
		t.Error("chain of nothing")
	}
	if _, err := d.AddChain(bufs, nil, true); err == nil || errors.Is(err, ErrFull) {
		t.Errorf("too long for a table: %v", err)
	}
	if _, err := d.AddChain(bufs[:5], bufs[:4], false); !errors.Is(err, ErrFull) {
		t.Errorf("too long for the ring: %v", err)
	}
	if _, err := d.AddChain(bufs[:4], bufs[:3], false); err != nil || d.Free() != 1 {
		t.Errorf("%v, %d free", err, d.Free())
	}
	if _, err := d.AddChain(bufs[:2], bufs[:2], true); err != nil || d.Free() != 0 {
		t.Errorf("%v, %d free", err, d.Free())
	}
	if _, err := d.AddChain(bufs[:1], nil, true); !errors.Is(err, ErrFull) {
		t.Errorf("ring full: %v", err)
	}
}

func TestDriverHostileDevice(t *testing.T) {
	for _, tc := range []struct {
		name string
		idx  uint16
		id   uint32
	}{
		{"head past the ring", 1, 8},
		{"head of 32 bits", 1, 0x10000},
		{"head that is not in flight", 1, 5},
		{"index jump", 9, 0},
	} {
		p := newPair(t, 8, true, 0)
		p.add(t, 1)
		binary.LittleEndian.PutUint32(p.at(usedAt+4, 4), tc.id)
		p.put16(usedAt+2, tc.idx)
		for range 2 {
			if _, _, ok := p.d.PopUsed(); ok || !errors.Is(p.d.Err(), ErrRing) {
				t.Errorf("%s: %v, %v", tc.name, ok, p.d.Err())
			}
		}
	}
}

func TestAllocs(t *testing.T) {
	for _, indirect := range []bool{false, true} {
		p := newPair(t, 64, true, 0)
		out, in := []Buf{{dataAt, 16}, {nextAt - 100, 200}}, []Buf{{dataAt + 4096, 4096}, {dataAt + 16, 1}}
		var c Chain
		if n := testing.AllocsPerRun(1000, func() {
			for range 4 {
				if _, err := p.d.AddChain(out, in, indirect); err != nil {
					t.Fatal(err)
				}
			}
			p.d.Publish()
			for range 4 {
				if ok, err := p.q.Pop(&c); !ok || err != nil || len(c.Out) != 3 || len(c.In) != 2 {
					t.Fatal(ok, err, &c)
				}
				p.q.Push(c.Head, 1)
			}
			p.q.Publish()
			p.q.EnableNotify()
			p.reap(t, 4)
			p.d.EnableInterrupts()
		}); n != 0 {
			t.Errorf("indirect=%v: %v allocations", indirect, n)
		}
	}
}

// answer is byte i of what the device writes for a request.
func answer(request []byte, head uint16, i int) byte {
	if len(request) == 0 {
		return byte(i) ^ byte(head)
	}
	return request[i%len(request)] + byte(i)
}

// device serves a ring until stop: it completes chains out of order and in random batches.
func device(q *Split, m *Memory, rng *rand.Rand, kick, stop <-chan struct{}, call chan<- struct{}) error {
	type done struct {
		head    uint16
		written uint32
	}
	var held []done
	var c Chain
	var request []byte
	for {
		got := 0
		for limit := 1 + rng.IntN(16); got < limit; got++ {
			ok, err := q.Pop(&c)
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			if err := c.check(m); err != nil {
				return err
			}
			request = request[:0]
			for i, v := range c.Out {
				b, _ := m.Bytes(c.OutGPA[i], v.Len)
				request = append(request, b...)
			}
			n := 0
			for i, v := range c.In {
				b, _ := m.Bytes(c.InGPA[i], v.Len)
				for j := range b {
					b[j] = answer(request, c.Head, n)
					n++
				}
			}
			held = append(held, done{c.Head, uint32(n)})
		}
		rng.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
		push := len(held)
		if got > 0 {
			push = rng.IntN(push + 1)
		}
		for _, h := range held[:push] {
			q.Push(h.head, h.written)
		}
		held = held[push:]
		if q.Publish() {
			signal(call)
		}
		if got > 0 || len(held) > 0 {
			continue
		}
		if q.EnableNotify() {
			q.DisableNotify()
			continue
		}
		select {
		case <-kick:
			q.DisableNotify()
		case <-stop:
			return nil
		}
	}
}

func signal(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is there already, as with an eventfd
	}
}

// pieces gives the bytes of a buffer that may lie across the two regions of raw.
func pieces(m *Memory, b Buf) [][]byte {
	if first := nextAt - b.GPA; b.GPA < nextAt && first < uint64(b.Len) {
		return append(pieces(m, Buf{b.GPA, uint32(first)}), pieces(m, Buf{nextAt, b.Len - uint32(first)})...)
	}
	p, err := m.Bytes(b.GPA, uint64(b.Len))
	if err != nil {
		panic(err)
	}
	return [][]byte{p}
}

// Random chains through a device and a driver that run at the same time and sleep when there is nothing to do. A lost
// notification hangs the test; under -race, missing order between the two sides is a data race.
func TestDeviceAndDriver(t *testing.T) {
	const chains = 3000
	for _, size := range []int{1, 4, 64, 256} {
		for _, eventIdx := range []bool{false, true} {
			seed := rand.Uint64()
			t.Run(fmt.Sprintf("size=%d,event_idx=%v,seed=%d", size, eventIdx, seed), func(t *testing.T) {
				t.Parallel()
				rng := rand.New(rand.NewPCG(seed, 1))
				p := newPair(t, size, eventIdx, 65000)
				kick, call, stop := make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
				var wg sync.WaitGroup
				var devErr error
				wg.Go(func() {
					devErr = device(p.q, p.mem, rand.New(rand.NewPCG(seed, 2)), kick, stop, call)
				})
				defer func() {
					close(stop)
					wg.Wait()
					if devErr != nil {
						t.Errorf("device: %v", devErr)
					}
				}()
				timeout := time.After(30 * time.Second)
				type request struct {
					out []byte
					in  []Buf
				}
				flying := map[uint16]request{}
				perHead := uint32(2 * (memAt + memSize - dataAt) / size) // each request has its own data, half of it
				if perHead > 4096 {                                      // in the second region
					perHead = 4096
				}
				places := rng.Perm(size)
				place := map[uint16]int{}
				added, reaped := 0, 0
				for reaped < chains {
					progress := false
					for limit := rng.IntN(2 * size); limit >= 0 && added < chains && len(places) > 0; limit-- {
						at := places[len(places)-1]
						gpa := nextAt - uint64(size)*uint64(perHead)/2 + uint64(at)*uint64(perHead)
						var bufs []Buf
						n := 1 + rng.IntN(8)
						for range n {
							l := 1 + rng.Uint32N(perHead/8)
							bufs = append(bufs, Buf{gpa, l})
							gpa += uint64(l)
						}
						writable := rng.IntN(n + 1)
						out, in := bufs[:n-writable], bufs[n-writable:]
						var r request
						r.in = in
						for _, b := range out {
							for _, piece := range pieces(p.mem, b) {
								for i := range piece {
									piece[i] = byte(rng.Uint32())
								}
								r.out = append(r.out, piece...)
							}
						}
						head, err := p.d.AddChain(out, in, n > size || rng.IntN(2) == 0)
						if errors.Is(err, ErrFull) {
							break
						}
						if err != nil {
							t.Fatal(err)
						}
						if _, twice := flying[head]; twice {
							t.Fatalf("head %d is in flight", head)
						}
						flying[head], place[head] = r, at
						places = places[:len(places)-1]
						added++
						progress = true
						if rng.IntN(4) == 0 && p.d.Publish() {
							signal(kick)
						}
					}
					if p.d.Publish() {
						signal(kick)
					}
					for {
						head, written, ok := p.d.PopUsed()
						if !ok {
							break
						}
						r, ok := flying[head]
						if !ok {
							t.Fatalf("completion of head %d, which is not in flight", head)
						}
						n := 0
						for _, b := range r.in {
							for _, piece := range pieces(p.mem, b) {
								for _, v := range piece {
									if want := answer(r.out, head, n); v != want {
										t.Fatalf("head %d, byte %d: %#x, want %#x", head, n, v, want)
									}
									n++
								}
							}
						}
						if int(written) != n {
							t.Fatalf("head %d: %d bytes written, want %d", head, written, n)
						}
						delete(flying, head)
						places = append(places, place[head])
						reaped++
						progress = true
					}
					if err := p.d.Err(); err != nil {
						t.Fatal(err)
					}
					if progress {
						continue
					}
					if p.d.EnableInterrupts() {
						p.d.DisableInterrupts()
						continue
					}
					select {
					case <-call:
						p.d.DisableInterrupts()
					case <-timeout:
						t.Fatalf("%d chains added, %d completed, then nothing", added, reaped)
					}
				}
				if p.d.Free() != size || len(flying) != 0 {
					t.Errorf("%d free, %d in flight", p.d.Free(), len(flying))
				}
			})
		}
	}
}

func BenchmarkRing(b *testing.B) {
	p := newPair(b, 256, true, 0)
	out, in := []Buf{{dataAt, 16}}, []Buf{{dataAt + 4096, 4096}, {dataAt + 16, 1}}
	var c Chain
	for b.Loop() {
		if _, err := p.d.AddChain(out, in, true); err != nil {
			b.Fatal(err)
		}
		p.d.Publish()
		if ok, err := p.q.Pop(&c); !ok || err != nil {
			b.Fatal(ok, err)
		}
		p.q.Push(c.Head, 1)
		p.q.Publish()
		p.d.PopUsed()
	}
}
