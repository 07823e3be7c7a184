// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// Where raw puts things; the data that chains name starts at dataAt.
const (
	memAt   = 0x100000
	descAt  = memAt
	availAt = memAt + 0x4000
	usedAt  = memAt + 0x6000
	tableAt = memAt + 0x10000
	dataAt  = memAt + 0x20000
	memSize = 0x40000
	nextAt  = memAt + memSize // a second region, adjacent to the first
)

// raw writes ring memory by hand, as any guest can.
type raw struct {
	mem  *Memory
	size int
}

func newRaw(t testing.TB, size int) *raw {
	return &raw{mustMemory(t, heapRegion(memAt, memSize, 0), heapRegion(nextAt, memSize, memSize)), size}
}

func (r *raw) config() SplitConfig {
	return SplitConfig{Mem: r.mem, Size: uint16(r.size), Desc: descAt, Avail: availAt, Used: usedAt, EventIdx: true, Indirect: true}
}

func (r *raw) at(gpa, n uint64) []byte {
	b, err := r.mem.Bytes(gpa, n)
	if err != nil {
		panic(err)
	}
	return b
}

func (r *raw) put16(gpa uint64, v uint16) { binary.LittleEndian.PutUint16(r.at(gpa, 2), v) }
func (r *raw) get16(gpa uint64) uint16    { return binary.LittleEndian.Uint16(r.at(gpa, 2)) }

// desc writes a descriptor of the table at gpa.
func (r *raw) desc(gpa uint64, i int, addr uint64, length uint32, flags, next uint16) {
	b := r.at(gpa+uint64(i)*16, 16)
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], length)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// avail makes heads available from index 0 on.
func (r *raw) avail(heads ...uint16) {
	for i, h := range heads {
		r.put16(availAt+4+2*uint64(i%r.size), h)
	}
	r.put16(availAt+2, uint16(len(heads)))
}

func (r *raw) used(i uint16) (id, written uint32) {
	b := r.at(usedAt+4+8*uint64(int(i)%r.size), 8)
	return binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
}

func mustSplit(t testing.TB, cfg SplitConfig) *Split {
	t.Helper()
	q, err := NewSplit(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// String is the chain as a driver described it.
func (c *Chain) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%d:", c.Head)
	for i, v := range c.Out {
		fmt.Fprintf(&s, " r%#x+%d", c.OutGPA[i], v.Len)
	}
	for i, v := range c.In {
		fmt.Fprintf(&s, " w%#x+%d", c.InGPA[i], v.Len)
	}
	return s.String()
}

// check tells what is wrong with a chain that was accepted.
func (c *Chain) check(m *Memory) error {
	if len(c.Out) != len(c.OutGPA) || len(c.In) != len(c.InGPA) || len(c.Out)+len(c.In) > 1024 {
		return fmt.Errorf("%d out, %d addresses; %d in, %d addresses", len(c.Out), len(c.OutGPA), len(c.In), len(c.InGPA))
	}
	sum := uint64(0)
	gpas := slices.Concat(c.OutGPA, c.InGPA)
	for i, v := range slices.Concat(c.Out, c.In) {
		b, err := m.Bytes(gpas[i], v.Len)
		if err != nil {
			return err
		}
		if &b[0] != v.Base {
			return fmt.Errorf("piece at %#x: wrong place", gpas[i])
		}
		sum += v.Len
	}
	if sum != c.OutLen+c.InLen || sum == 0 || sum > math.MaxUint32 {
		return fmt.Errorf("%d bytes, %d out, %d in", sum, c.OutLen, c.InLen)
	}
	return nil
}

func TestNewSplitErrors(t *testing.T) {
	good := newRaw(t, 8).config()
	odd := mustMemory(t, heapRegion(memAt+1, memSize, 0)) // guest addresses that are aligned, ours not
	for _, tc := range []struct {
		name   string
		change func(*SplitConfig)
	}{
		{"size 0", func(c *SplitConfig) { c.Size = 0 }},
		{"size not a power of two", func(c *SplitConfig) { c.Size = 24 }},
		{"size without room for it", func(c *SplitConfig) { c.Size = 32768 }},
		{"desc misaligned", func(c *SplitConfig) { c.Desc += 8 }},
		{"avail misaligned", func(c *SplitConfig) { c.Avail++ }},
		{"used misaligned", func(c *SplitConfig) { c.Used += 2 }},
		{"desc unmapped", func(c *SplitConfig) { c.Desc = 0 }},
		{"avail unmapped", func(c *SplitConfig) { c.Avail = math.MaxUint64 - 1 }},
		{"used unmapped", func(c *SplitConfig) { c.Used = nextAt + memSize }},
		{"desc across regions", func(c *SplitConfig) { c.Desc = nextAt - 16*7 }},
		{"avail across regions", func(c *SplitConfig) { c.Avail = nextAt - 4 - 16 }},
		{"used across regions", func(c *SplitConfig) { c.Used = nextAt - 4 - 64 }},
		{"no memory", func(c *SplitConfig) { c.Mem = nil }},
		{"empty memory", func(c *SplitConfig) { c.Mem = new(Memory) }},
		{"misaligned in our space", func(c *SplitConfig) { c.Mem, c.Desc = odd, c.Desc+16 }},
	} {
		cfg := good
		tc.change(&cfg)
		if _, err := NewSplit(cfg); err == nil {
			t.Errorf("%s: no error", tc.name)
		}
	}
	cfg := good
	cfg.EventIdx, cfg.Avail, cfg.Used = false, nextAt-4-16, nextAt+memSize-4-64 // no room for the event fields, and no need
	mustSplit(t, cfg)
}

func TestPop(t *testing.T) {
	for _, tc := range []struct {
		name string
		head uint16
		fill func(*raw)
		want string
	}{
		{"one", 3, func(r *raw) { r.desc(descAt, 3, dataAt, 512, descWrite, 77) }, "3: w0x120000+512"},
		{"header, data, status", 7, func(r *raw) {
			r.desc(descAt, 7, dataAt, 16, descNext, 0)
			r.desc(descAt, 0, dataAt+4096, 4096, descNext|descWrite, 5)
			r.desc(descAt, 5, dataAt+16, 1, descWrite, 0)
		}, "7: r0x120000+16 w0x121000+4096 w0x120010+1"},
		{"all of the ring", 0, func(r *raw) {
			for i := range 8 {
				r.desc(descAt, i, dataAt, 1, descNext, uint16(i+1))
			}
			r.desc(descAt, 7, dataAt, 1, 0, 0)
		}, "0:" + strings.Repeat(" r0x120000+1", 8)},
		{"across regions", 0, func(r *raw) { r.desc(descAt, 0, nextAt-3, 10, 0, 0) }, "0: r0x13fffd+3 r0x140000+7"},
		{"indirect", 1, func(r *raw) {
			r.desc(descAt, 1, tableAt, 48, descIndirect|descWrite, 99)
			r.desc(tableAt, 0, dataAt, 16, descNext, 2)
			r.desc(tableAt, 2, dataAt+16, 1, descWrite, 0)
		}, "1: r0x120000+16 w0x120010+1"},
		{"indirect, misaligned table", 1, func(r *raw) {
			r.desc(descAt, 1, tableAt+3, 32, descIndirect, 0)
			r.desc(tableAt+3, 0, dataAt, 16, descNext, 1)
			r.desc(tableAt+3, 1, dataAt+16, 1, descWrite, 0)
		}, "1: r0x120000+16 w0x120010+1"},
		{"direct, then indirect", 1, func(r *raw) {
			r.desc(descAt, 1, dataAt, 16, descNext, 2)
			r.desc(descAt, 2, tableAt, 16, descIndirect, 0)
			r.desc(tableAt, 0, dataAt+16, 1, descWrite, 0)
		}, "1: r0x120000+16 w0x120010+1"},
		{"longest indirect", 1, func(r *raw) {
			r.desc(descAt, 1, tableAt, 1024*16, descIndirect, 0)
			for i := range 1024 {
				r.desc(tableAt, i, dataAt, 1, descWrite|descNext, uint16(i+1))
			}
			r.desc(tableAt, 1023, dataAt, 1, descWrite, 0)
		}, "1:" + strings.Repeat(" w0x120000+1", 1024)},
		{"unknown flags", 0, func(r *raw) { r.desc(descAt, 0, dataAt, 1, 0xfff8, 1) }, "0: r0x120000+1"},
	} {
		for _, availMove := range []uint64{0, 2} { // the avail ring's alignment is 2
			r := newRaw(t, 8)
			tc.fill(r)
			r.put16(availAt+availMove+4, tc.head)
			r.put16(availAt+availMove+2, 1)
			cfg := r.config()
			cfg.Avail += availMove
			q := mustSplit(t, cfg)
			if q.Empty() || q.InFlight(tc.head) {
				t.Errorf("%s: Empty or InFlight", tc.name)
			}
			var c Chain
			if ok, err := q.Pop(&c); !ok || err != nil {
				t.Errorf("%s: Pop = %v, %v", tc.name, ok, err)
				continue
			}
			if got := c.String(); got != tc.want {
				t.Errorf("%s: got %s, want %s", tc.name, got, tc.want)
			}
			if err := c.check(r.mem); err != nil {
				t.Errorf("%s: %v", tc.name, err)
			}
			if !q.Empty() || !q.InFlight(tc.head) || q.InFlight(tc.head^1) || q.InFlight(8) || q.LastAvail() != 1 {
				t.Errorf("%s: wrong state after Pop", tc.name)
			}
			if ok, err := q.Pop(&c); ok || err != nil {
				t.Errorf("%s: second Pop = %v, %v", tc.name, ok, err)
			}
			q.Push(tc.head, 0x1234567)
			if q.InFlight(tc.head) || q.UsedIdx() != 0 || r.get16(usedAt+2) != 0 {
				t.Errorf("%s: visible before Publish", tc.name)
			}
			q.Publish()
			id, written := r.used(0)
			if id != uint32(tc.head) || written != 0x1234567 || q.UsedIdx() != 1 || r.get16(usedAt+2) != 1 {
				t.Errorf("%s: used: head %d, %#x bytes, index %d", tc.name, id, written, q.UsedIdx())
			}
		}
	}
}

func TestHostile(t *testing.T) {
	one := func(addr uint64, length uint32, flags, next uint16) func(*raw) {
		return func(r *raw) {
			r.desc(descAt, 0, addr, length, flags, next)
			r.avail(0)
		}
	}
	indirect := func(length uint32, fill func(*raw)) func(*raw) {
		return func(r *raw) {
			one(tableAt, length, descIndirect, 0)(r)
			fill(r)
		}
	}
	for _, tc := range []struct {
		name string
		want string // part of the error
		fill func(*raw)
	}{
		{"descriptor that is its own next", "loop", one(dataAt, 1, descNext, 0)},
		{"loop of two", "loop", func(r *raw) {
			one(dataAt, 1, descNext, 1)(r)
			r.desc(descAt, 1, dataAt, 1, descNext, 0)
		}},
		{"loop in an indirect table", "loop", indirect(32, func(r *raw) {
			r.desc(tableAt, 0, dataAt, 1, descNext, 1)
			r.desc(tableAt, 1, dataAt, 1, descNext, 0)
		})},
		{"next past the ring", "next descriptor 8", one(dataAt, 1, descNext, 8)},
		{"next 65535", "next descriptor 65535", one(dataAt, 1, descNext, 65535)},
		{"next past an indirect table", "next descriptor 2", indirect(32, func(r *raw) {
			r.desc(tableAt, 0, dataAt, 1, descNext, 2)
		})},
		{"head past the ring", "head 8", func(r *raw) { r.avail(8) }},
		{"head 65535", "head 65535", func(r *raw) { r.avail(65535) }},
		{"head twice", "in flight", func(r *raw) {
			r.desc(descAt, 0, dataAt, 1, 0, 0)
			r.avail(0, 0)
		}},
		{"nested indirect", "in an indirect table", indirect(32, func(r *raw) {
			r.desc(tableAt, 0, tableAt+16, 16, descIndirect, 0)
		})},
		{"table that names itself", "in an indirect table", indirect(16, func(r *raw) {
			r.desc(tableAt, 0, tableAt, 16, descIndirect, 0)
		})},
		{"indirect with next", "with a next", one(tableAt, 16, descIndirect|descNext, 1)},
		{"indirect of 0 bytes", "table of 0 bytes", one(tableAt, 0, descIndirect, 0)},
		{"indirect of 24 bytes", "table of 24 bytes", one(tableAt, 24, descIndirect, 0)},
		{"indirect of 8 bytes", "table of 8 bytes", one(tableAt, 8, descIndirect, 0)},
		{"indirect of 1025 entries", "table of 16400 bytes", one(tableAt, 1025*16, descIndirect, 0)},
		{"indirect of 4 GiB", "table of 4294967280 bytes", one(tableAt, math.MaxUint32&^15, descIndirect, 0)},
		{"indirect unmapped", "indirect table: ", one(0, 16, descIndirect, 0)},
		{"indirect at the end of memory", "indirect table: ", one(nextAt+memSize-16, 32, descIndirect, 0)},
		{"indirect wraps", "indirect table: ", one(math.MaxUint64-15, 16, descIndirect, 0)},
		{"readable after writable", "after a writable", func(r *raw) {
			one(dataAt, 1, descNext|descWrite, 1)(r)
			r.desc(descAt, 1, dataAt, 1, 0, 0)
		}},
		{"readable after writable, in a table", "after a writable", func(r *raw) {
			one(dataAt, 1, descNext|descWrite, 1)(r)
			r.desc(descAt, 1, tableAt, 16, descIndirect, 0)
			r.desc(tableAt, 0, dataAt, 1, 0, 0)
		}},
		{"avail index jumps", "jumped by 9", func(r *raw) {
			r.desc(descAt, 0, dataAt, 1, 0, 0)
			r.put16(availAt+2, 9)
		}},
		{"avail index goes back", "jumped by 65535", func(r *raw) { r.put16(availAt+2, 65535) }},
		{"buffer of 0 bytes", "outside", one(dataAt, 0, 0, 0)},
		{"buffer unmapped", "outside", one(1, 1, 0, 0)},
		{"buffer before memory", "outside", one(memAt-1, 2, descWrite, 0)},
		{"buffer past the end", "outside", one(nextAt+memSize-1, 2, descWrite, 0)},
		{"buffer of 4 GiB - 1", "outside", one(dataAt, math.MaxUint32, descWrite, 0)},
		{"buffer wraps", "outside", one(math.MaxUint64-1, 4, 0, 0)},
		{"too many pieces", "more than 1024 pieces", func(r *raw) {
			one(dataAt, 1, descNext, 1)(r)
			r.desc(descAt, 1, tableAt, 1024*16, descIndirect, 0)
			for i := range 1024 {
				r.desc(tableAt, i, dataAt, 1, descNext, uint16(i+1))
			}
			r.desc(tableAt, 1023, dataAt, 1, 0, 0)
		}},
	} {
		r := newRaw(t, 8)
		tc.fill(r)
		q := mustSplit(t, r.config())
		var c Chain
		ok, err := true, error(nil)
		pops := 0
		for ; ok && err == nil; pops++ {
			ok, err = q.Pop(&c)
		}
		if ok || !errors.Is(err, ErrRing) || !strings.Contains(err.Error(), tc.want) || pops > 2 {
			t.Errorf("%s: %v after %d pops", tc.name, err, pops)
		}
		if pops == 1 && len(c.Out)+len(c.In)+len(c.OutGPA)+len(c.InGPA) > 0 {
			t.Errorf("%s: the chain is not empty", tc.name)
		}
		// For ever: a ring that was repaired stays broken.
		r.desc(descAt, 0, dataAt, 1, 0, 0)
		r.avail(0)
		if ok, again := q.Pop(&c); ok || !errors.Is(again, err) {
			t.Errorf("%s: later Pop = %v, %v", tc.name, ok, again)
		}
		if again := q.Chain(0, &c); !errors.Is(again, err) {
			t.Errorf("%s: later Chain: %v", tc.name, again)
		}
	}
}

func TestChainOf4GiB(t *testing.T) {
	f := tempFile(t, 1<<30) // sparse
	r := newRaw(t, 8)
	m, err := r.mem.Add(mapRegion(t, f, 1<<32, 1<<30, 1<<32, 0))
	if err != nil {
		t.Fatal(err)
	}
	r.mem = m
	for i, flags := range []uint16{descNext, descNext, descNext | descWrite, descWrite} {
		r.desc(descAt, i, 1<<32, 1<<30, flags, uint16(i+1))
	}
	r.avail(0)
	if _, err := mustSplit(t, r.config()).Pop(new(Chain)); !errors.Is(err, ErrRing) || !strings.Contains(err.Error(), "4 GiB") {
		t.Errorf("4 GiB: %v", err)
	}
	r.desc(descAt, 3, 1<<32, 1<<30-1, descWrite, 0)
	var c Chain
	if ok, err := mustSplit(t, r.config()).Pop(&c); !ok || err != nil || c.OutLen != 2<<30 || c.InLen != 2<<30-1 {
		t.Errorf("a byte less: %v, %v, %d out, %d in", ok, err, c.OutLen, c.InLen)
	}
}

func TestIndirectNotNegotiated(t *testing.T) {
	r := newRaw(t, 8)
	r.desc(descAt, 0, tableAt, 16, descIndirect, 0)
	r.desc(tableAt, 0, dataAt, 1, 0, 0)
	r.avail(0)
	cfg := r.config()
	cfg.Indirect = false
	if _, err := mustSplit(t, cfg).Pop(new(Chain)); !errors.Is(err, ErrRing) {
		t.Errorf("Pop: %v", err)
	}
}

// A backend takes over from one that died: two chains were taken and not completed, one was not taken.
func TestReconnect(t *testing.T) {
	r := newRaw(t, 8)
	for i := range 8 {
		r.desc(descAt, i, dataAt, uint32(i+1), 0, 0)
	}
	for i, head := range []uint16{6, 4, 1} {
		r.put16(availAt+4+2*uint64((65535+i)%8), head) // entries 65535 and 0 were taken, 1 was not
	}
	r.put16(availAt+2, 2)
	r.put16(usedAt+2, 65535)
	cfg := r.config()
	cfg.Base = 7 // a lie that SetLastAvail corrects
	q := mustSplit(t, cfg)
	q.SetLastAvail(1)
	if q.UsedIdx() != 65535 || q.LastAvail() != 1 {
		t.Fatalf("used %d, avail %d", q.UsedIdx(), q.LastAvail())
	}
	var c Chain
	for _, head := range []uint16{6, 4} { // 65535 and 0: resubmitted
		if err := q.Chain(head, &c); err != nil || c.Head != head || c.OutLen != uint64(head)+1 {
			t.Fatalf("Chain(%d) = %v, %v", head, &c, err)
		}
	}
	if ok, err := q.Pop(&c); !ok || err != nil || c.Head != 1 {
		t.Fatalf("Pop = %v, %v, %v", ok, err, &c)
	}
	for _, head := range []uint16{1, 6, 4} {
		q.Push(head, 0)
	}
	if !q.Publish() || q.UsedIdx() != 2 {
		t.Errorf("used %d", q.UsedIdx())
	}
	for i, head := range []uint32{1, 6, 4} {
		if id, _ := r.used(uint16(65535 + i)); id != head {
			t.Errorf("used[%d] is %d, want %d", uint16(65535+i), id, head)
		}
	}
	// A chain that is resubmitted and available at once is a head twice.
	if err := q.Chain(6, &c); err != nil {
		t.Fatal(err)
	}
	r.put16(availAt+4+2*2, 6)
	r.put16(availAt+2, 3)
	if _, err := q.Pop(&c); !errors.Is(err, ErrRing) {
		t.Errorf("head twice: %v", err)
	}
	for _, head := range []uint16{6, 8} {
		q := mustSplit(t, cfg)
		_ = q.Chain(6, &c)
		if err := q.Chain(head, &c); !errors.Is(err, ErrRing) {
			t.Errorf("Chain(%d): %v", head, err)
		}
	}
}

func TestPushNotInFlight(t *testing.T) {
	q := mustSplit(t, newRaw(t, 8).config())
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	q.Push(1, 0)
}

func TestRemap(t *testing.T) {
	r := newRaw(t, 8)
	r.desc(descAt, 0, dataAt, 1, 0, 0)
	r.desc(descAt, 1, nextAt, 1, 0, 0)
	r.avail(0, 1)
	q := mustSplit(t, r.config())
	var c Chain
	if ok, err := q.Pop(&c); !ok || err != nil {
		t.Fatal(ok, err)
	}
	less, _, err := r.mem.Remove(nextAt, memSize, memSize)
	if err != nil {
		t.Fatal(err)
	}
	if q.Remap(less) == nil {
		t.Error("remapped with a chain in flight")
	}
	q.Push(0, 0)
	if q.Remap(less) == nil {
		t.Error("remapped with a completion staged")
	}
	q.Publish()
	none, _, err := less.Remove(memAt, memSize, 0)
	if err != nil {
		t.Fatal(err)
	}
	if q.Remap(none) == nil || q.Remap(nil) == nil {
		t.Error("remapped to nothing")
	}
	if q.Empty() || q.UsedIdx() != 1 {
		t.Error("a failed Remap changed the queue")
	}
	if err := q.Remap(less); err != nil {
		t.Fatal(err)
	}
	if _, err := q.Pop(&c); !errors.Is(err, ErrMemory) || !errors.Is(err, ErrRing) {
		t.Errorf("buffer in a region that went: %v", err)
	}
}

func TestCrossed(t *testing.T) {
	for _, tc := range []struct {
		event, now, before uint16
		want               bool
	}{
		{0, 1, 0, true},
		{1, 1, 0, false},
		{0, 0, 0, false},
		{5, 8, 5, true},
		{7, 8, 5, true},
		{8, 8, 5, false},
		{4, 8, 5, false},
		{65535, 0, 65535, true},
		{0, 0, 65535, false},
		{65534, 2, 65533, true},
		{1, 2, 65533, true},
		{2, 2, 65533, false},
		{65532, 2, 65533, false},
		{32768, 2, 65533, false},
	} {
		if got := crossed(tc.event, tc.now, tc.before); got != tc.want {
			t.Errorf("crossed(%d, %d, %d) = %v", tc.event, tc.now, tc.before, got)
		}
	}
}

// The neighbour of avail_event in its word belongs to somebody else.
func TestEnableNotifyKeepsNeighbour(t *testing.T) {
	r := newRaw(t, 8)
	event := uint64(usedAt + 4 + 8*8)
	r.put16(event, 0xffff)
	r.put16(event+2, 0xbeef)
	cfg := r.config()
	cfg.Base = 0x1234
	r.put16(availAt+2, 0x1234)
	q := mustSplit(t, cfg)
	if q.EnableNotify() {
		t.Error("more")
	}
	if r.get16(event) != 0x1234 || r.get16(event+2) != 0xbeef {
		t.Errorf("%#x %#x", r.get16(event), r.get16(event+2))
	}
	r.put16(availAt+2, 0x1235)
	if !q.EnableNotify() {
		t.Error("no more")
	}
}

// TestLargest: a ring of as many entries as there can be, all of them available at once, several times round.
func TestLargest(t *testing.T) {
	const (
		size    = 32768
		avail   = memAt + 16*size
		used    = avail + 0x20000
		buffers = used + 0x80000
	)
	mem := mustMemory(t, heapRegion(memAt, 1<<21, 0))
	cfg := SplitConfig{Mem: mem, Size: size, Desc: memAt, Avail: avail, Used: used, EventIdx: true}
	drv, err := NewDriver(DriverConfig{SplitConfig: cfg})
	if err != nil {
		t.Fatal(err)
	}
	q := mustSplit(t, cfg)
	for round := range 3 {
		for i := range size {
			if _, err := drv.AddChain([]Buf{{GPA: buffers + uint64(i), Len: 1}}, nil, false); err != nil {
				t.Fatal(err)
			}
		}
		drv.Publish()
		for done := 0; done < size; done += MaxInFlight {
			var c Chain
			var heads []uint16
			ok, err := q.Pop(&c)
			for ; ok; ok, err = q.Pop(&c) {
				heads = append(heads, c.Head)
			}
			// There are more, but it is of no use to look before a Push.
			if err != nil || len(heads) != MaxInFlight || !q.Empty() || q.EnableNotify() {
				t.Fatalf("round %d: %d popped after %d, empty %t, %v", round, len(heads), done, q.Empty(), err)
			}
			q.Push(heads[0], 0)
			if last := done+MaxInFlight == size; q.Empty() != last {
				t.Fatalf("round %d: empty %t after a push, %d done", round, q.Empty(), done)
			}
			for _, h := range heads[1:] {
				q.Push(h, 0)
			}
			q.Publish()
		}
		for i := range size {
			if _, _, ok := drv.PopUsed(); !ok {
				t.Fatalf("round %d: %d completions, %v", round, i, drv.Err())
			}
		}
	}
}

// The guest changes everything at any time; memory is mapped, so that the race detector does not mind.
func TestScribble(t *testing.T) {
	f := tempFile(t, memSize)
	m := mustMemory(t, mapRegion(t, f, memAt, memSize, 0, 0))
	r := &raw{m, 64}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for seed := uint64(1); ; {
			select {
			case <-stop:
				return
			default:
			}
			for range 100 {
				seed = seed*6364136223846793005 + 1442695040888963407
				i, v := int(seed>>33)%64, uint16(seed>>48)
				addr, flags := dataAt+uint64(v)*2, v%3 // the highest ones are outside; 1 is next, 2 is write
				r.desc(descAt, i, addr, uint32(v%4096), flags, v%66)
				r.desc(tableAt, i, addr, uint32(v%4096), flags, v%66)
				if i%4 == 0 {
					r.desc(descAt, i, tableAt, 64*16, descIndirect, 0)
				}
				r.put16(availAt+4+2*uint64(i), v%66)
				r.put16(availAt+2, r.get16(usedAt+2)+v%5)
			}
			runtime.Gosched()
		}
	}()
	defer func() { close(stop); <-done }()
	var c Chain
	deadline := time.Now().Add(20 * time.Second)
	for popped, broken := 0, 0; popped < 2000 || broken < 2000; {
		if time.Now().After(deadline) {
			t.Fatalf("%d chains, %d broken rings: too tame", popped, broken)
		}
		runtime.Gosched()
		cfg := r.config()
		cfg.Base = r.get16(usedAt + 2)
		q := mustSplit(t, cfg)
		for range 10 {
			ok, err := q.Pop(&c)
			if err != nil {
				broken++
				break
			}
			if !ok {
				q.EnableNotify()
				continue
			}
			popped++
			if err := c.check(m); err != nil {
				t.Fatal(err)
			}
			q.Push(c.Head, 1)
			q.Publish()
		}
	}
}

// FuzzSplit: whatever the ring's memory holds, Pop never panics, ends, and gives only pieces of guest memory.
func FuzzSplit(f *testing.F) {
	r := newRaw(f, 8)
	r.desc(descAt, 0, dataAt, 16, descNext, 1)
	r.desc(descAt, 1, dataAt, 512, descWrite, 0)
	r.desc(descAt, 2, tableAt, 32, descIndirect, 0)
	r.avail(0, 2)
	rings := slices.Concat(r.at(descAt, 8*16), r.at(availAt, 22), make([]byte, 6), r.at(usedAt, 70))
	r.desc(tableAt, 0, nextAt-4, 16, descNext, 1)
	r.desc(tableAt, 1, dataAt, 512, descWrite, 0)
	f.Add(uint8(3), uint8(3), uint16(0), rings, r.at(tableAt, 32))
	f.Add(uint8(0), uint8(2), uint16(65535), []byte{}, []byte{})
	mem := newRaw(f, 8).mem
	f.Fuzz(func(t *testing.T, logSize, features uint8, base uint16, rings, table []byte) {
		r := &raw{mem, 1 << (logSize % 11)}
		for _, g := range mem.Regions() {
			clear(g.mem)
		}
		n := uint64(r.size)
		cfg := SplitConfig{
			Mem: mem, Size: uint16(n), Desc: memAt, Avail: memAt + 16*n, Used: memAt + (18*n+9)&^3, Base: base,
			EventIdx: features&1 != 0, Indirect: features&2 != 0,
		}
		copy(mem.Regions()[0].mem, rings)
		copy(r.at(tableAt, memAt+memSize-tableAt), table)
		q := mustSplit(t, cfg)
		var c Chain
		for i := range 4 * r.size { // completions may overwrite the avail ring and feed it for ever
			ok, err := q.Pop(&c)
			if err != nil && !errors.Is(err, ErrRing) || ok && err != nil {
				t.Fatal(ok, err)
			}
			if !ok {
				q.EnableNotify()
				q.DisableNotify()
				break
			}
			if err := c.check(mem); err != nil {
				t.Fatal(err)
			}
			if i%3 == 0 {
				q.Push(c.Head, uint32(c.InLen))
				q.Publish()
			}
		}
	})
}
