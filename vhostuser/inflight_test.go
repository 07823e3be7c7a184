// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/blkstream/blkstream/virtq"
)

// part returns memory for a queue's part, aligned as a mapping is.
func inflightPart(entries int) []byte {
	return make([]byte, inflightHeader+entries*inflightEntry)
}

// TestInflightCrash runs random requests, dies after each store to the region or the used index, and compares what
// recovery finds with what was fetched and not published.
func TestInflightCrash(t *testing.T) {
	const size = 16
	for seed := range uint64(50) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			part := inflightPart(size)
			usedIdx := uint16(rnd.Uint32()) // wraps in some runs
			q, live, _, err := recoverInflight(part, size, usedIdx)
			if err != nil || live {
				t.Fatal(live, err)
			}
			var inFlight []uint16 // in the order of the fetches
			die := func(where string, want []uint16) {
				t.Helper()
				snapshot := slices.Clone(part)
				q2, live, got, err := recoverInflight(snapshot, size, usedIdx)
				if err != nil || !live || !slices.Equal(got, want) {
					t.Fatalf("%s: resubmit %v, want %v; live %t, %v", where, got, want, live, err)
				}
				// The one that recovers dies as well, and the next finds the same.
				if _, _, again, _ := recoverInflight(snapshot, size, usedIdx); !slices.Equal(again, want) {
					t.Fatalf("%s: second recovery %v, want %v", where, again, want)
				}
				if len(got) > 0 && q2.counter <= binary.NativeEndian.Uint64(snapshot[inflightHeader+int(got[len(got)-1])*inflightEntry+8:]) {
					t.Fatalf("%s: the counter goes back", where)
				}
			}
			for range 200 {
				// Fetch some.
				for range rnd.IntN(4) {
					head := uint16(rnd.IntN(size))
					if slices.Contains(inFlight, head) {
						continue
					}
					q.Fetch(head)
					inFlight = append(inFlight, head)
					die("after fetch", inFlight)
				}
				// Complete a batch, out of order.
				batch := slices.Clone(inFlight)
				rnd.Shuffle(len(batch), func(i, j int) { batch[i], batch[j] = batch[j], batch[i] })
				batch = batch[:rnd.IntN(len(batch)+1)]
				for _, head := range batch {
					q.Complete(head)
					die("after complete", inFlight)
				}
				usedIdx += uint16(len(batch))
				inFlight = slices.DeleteFunc(inFlight, func(h uint16) bool { return slices.Contains(batch, h) })
				die("after publish", inFlight)
				// A crash within Commit: any prefix of the flags is cleared.
				for n := range batch {
					torn := slices.Clone(part)
					for _, head := range batch[:n] {
						torn[inflightHeader+int(head)*inflightEntry] = 0
					}
					if _, _, got, _ := recoverInflight(torn, size, usedIdx); !slices.Equal(got, inFlight) {
						t.Fatalf("within commit: %v, want %v", got, inFlight)
					}
				}
				q.Commit(usedIdx)
				die("after commit", inFlight)
				// Now and then another back-end takes over for good.
				if rnd.IntN(20) == 0 {
					if q, _, _, err = recoverInflight(part, size, usedIdx); err != nil {
						t.Fatal(err)
					}
				}
			}
		})
	}
}

func TestInflightFresh(t *testing.T) {
	part := inflightPart(64)
	for i := range part[inflightHeader:] {
		part[inflightHeader+i] = 0xff // nobody's entries
	}
	_, live, resubmit, err := recoverInflight(part, 64, 1000)
	if live || resubmit != nil || err != nil {
		t.Fatal(live, resubmit, err)
	}
	if v, n, used := binary.NativeEndian.Uint16(part[8:]), binary.NativeEndian.Uint16(part[10:]), binary.NativeEndian.Uint16(part[14:]); v != 1 || n != 64 || used != 1000 {
		t.Fatalf("version %d, %d entries, used index %d", v, n, used)
	}
	if _, live, resubmit, err = recoverInflight(part, 64, 1000); !live || len(resubmit) != 0 || err != nil {
		t.Fatal(live, resubmit, err)
	}
}

// TestInflightHostile: nothing in a region leads out of it, or out of the ring.
func TestInflightHostile(t *testing.T) {
	if _, _, _, err := recoverInflight(inflightPart(32), 64, 0); err == nil {
		t.Error("a region smaller than the ring was accepted")
	}
	part := inflightPart(64)
	binary.NativeEndian.PutUint16(part[8:], 2)
	if _, _, _, err := recoverInflight(part, 64, 0); err == nil {
		t.Error("version 2 was accepted")
	}
	binary.NativeEndian.PutUint16(part[8:], 1)
	part[0] = 1
	if _, _, _, err := recoverInflight(part, 64, 0); err == nil {
		t.Error("unknown features were accepted")
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		part := inflightPart(64)
		for i := range part {
			part[i] = byte(rnd.Uint32())
		}
		clear(part[:8])
		binary.NativeEndian.PutUint16(part[8:], 1)
		q, _, resubmit, err := recoverInflight(part, 32, uint16(rnd.Uint32()))
		if err != nil {
			t.Fatal(err)
		}
		seen := make(map[uint16]bool)
		for _, h := range resubmit {
			if h >= 32 || seen[h] {
				t.Fatalf("resubmit %v", resubmit)
			}
			seen[h] = true
		}
		for _, h := range []uint16{0, 63, 64, 1024, 65535} {
			q.Fetch(h)
			q.Complete(h)
		}
		q.Commit(1)
	}
	// A list that runs in a circle.
	part = inflightPart(64)
	binary.NativeEndian.PutUint16(part[8:], 1)
	if _, _, _, err := recoverInflight(part, 64, 0xffff); err != nil {
		t.Error(err)
	}
	// The largest counter.
	part[inflightHeader] = 1
	copy(part[inflightHeader+8:], "\xff\xff\xff\xff\xff\xff\xff\xff")
	if _, _, got, err := recoverInflight(part, 64, 0xffff); err != nil || len(got) != 1 {
		t.Error(got, err)
	}
}

func TestInflightAllocs(t *testing.T) {
	q, _, _, err := recoverInflight(inflightPart(1024), 1024, 0)
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() { q.Fetch(5); q.Fetch(1023); q.Complete(1023); q.Complete(5); q.Commit(2) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestInflightLarge: rings larger than QEMU's have a region when the front-end says so, and no more requests in flight
// than others.
func TestInflightLarge(t *testing.T) {
	const size = 4096
	d := newFakeDevice(1)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures)
	c.set(reqAddMemReg, g.memReg(), g.fd)
	for _, tt := range []struct {
		announced uint32
		want      []string
	}{
		{128, nil}, // the ring is larger
		{size, []string{"start 0 size 4096 base 0"}},
	} {
		c.raw(reqGetInflightFD, flagVersion, append(u64s(0, 0), u32s(1|tt.announced<<16)...))
		b, fds := c.reply(reqGetInflightFD)
		if len(b) != 20 || len(fds) != 1 {
			t.Fatalf("%d bytes, %d descriptors", len(b), len(fds))
		}
		c.set(reqSetInflightFD, b, fds...)
		closeFD(fds[0])
		base := g.user
		c.set(reqSetVringNum, u32s(0, size))
		c.set(reqSetVringAddr, append(u32s(0, 0), u64s(base, base+0x20000, base+0x10000, 0)...))
		c.set(reqSetVringKick, u64s(0), g.kick[0])
		c.sync()
		d.take()
		c.set(reqSetVringEnable, u32s(0, 1))
		c.expect(d, tt.want...)
		c.set(reqSetVringEnable, u32s(0, 0))
		d.take()
	}
	for _, flying := range []int{virtq.MaxInFlight, virtq.MaxInFlight + 1} {
		part := inflightPart(size)
		q, _, _, err := recoverInflight(part, size, 0)
		if err != nil {
			t.Fatal(err)
		}
		for head := range flying {
			q.Fetch(uint16(head))
		}
		_, _, resubmit, err := recoverInflight(part, size, 0)
		if ok := err == nil && len(resubmit) == flying; ok != (flying <= virtq.MaxInFlight) {
			t.Errorf("%d in flight: %d to be done again, %v", flying, len(resubmit), err)
		}
	}
}
