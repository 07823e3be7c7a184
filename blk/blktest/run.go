// SPDX-License-Identifier: Apache-2.0

package blktest

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/blkstream/blkstream/blk"
)

// Options of Run. The zero value is for a node that takes any alignment and starts with zeros.
type Options struct {
	// Task returns a runner for the test: it runs its argument in a task of the engine under test and returns when
	// that has ended. It may be called from several goroutines at once. Default: blk.NewTask on the caller's.
	Task func(t *testing.T) func(func(*blk.Task))
	// Align is what all offsets and lengths of changes are multiples of, a power of two; 0 is 1.
	Align int64
	// Size of the disks that are opened, bytes; 0 is DefaultSize.
	Size int64
	// Contents is what a fresh disk reads as; nil: zeros.
	Contents []byte
}

// DefaultSize is whole blocks of 4 KiB and no whole clusters of 64 KiB.
const DefaultSize = 2<<20 + 17*4096

// Run checks that the nodes from open, each fresh, of the given size and the caller's to close, do what blk.Node
// demands. It compares them with a slice of bytes. The random parts print their seed; BLKTEST_SEED repeats one.
func Run(t *testing.T, open func(t *testing.T, size int64) blk.Node, opts ...Options) {
	t.Helper()
	var o Options
	if len(opts) > 0 {
		o = opts[0]
	}
	if o.Task == nil {
		o.Task = func(*testing.T) func(func(*blk.Task)) {
			return func(fn func(*blk.Task)) { fn(blk.NewTask()) }
		}
	}
	o.Align = max(o.Align, 1)
	if o.Size == 0 {
		o.Size = DefaultSize
	}
	for _, c := range []struct {
		name     string
		readOnly bool // for read-only nodes too
		fn       func(*disk)
	}{
		{"Info", true, (*disk).testInfo},
		{"Refused", true, (*disk).testRefused},
		{"Fresh", true, (*disk).testFresh},
		{"ReadSplits", true, (*disk).testReadSplits},
		{"Maps", true, (*disk).testMaps},
		{"Alignments", false, (*disk).testAlignments},
		{"Edges", false, (*disk).testEdges},
		{"Zeroes", false, (*disk).testZeroes},
		{"Discard", false, (*disk).testDiscard},
		{"MapsAfterWrites", false, (*disk).testMapsAfterWrites},
		{"WriteThroughExtents", false, (*disk).testWriteThroughExtents},
		{"Random", false, (*disk).testRandom},
		{"Concurrent", false, (*disk).testConcurrent},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := &disk{
				T: t, n: open(t, o.Size), run: o.Task(t), align: o.Align,
				rng: Rand(t), model: make([]byte, o.Size),
			}
			copy(d.model, o.Contents)
			defer func() {
				if err := d.n.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			}()
			if d.n.Info().ReadOnly && !c.readOnly {
				t.Skip("the node is read-only")
			}
			c.fn(d)
			d.compare()
		})
	}
}

// disk is a node and what it should hold.
type disk struct {
	*testing.T
	n     blk.Node
	run   func(func(*blk.Task))
	align int64
	rng   *rand.Rand
	model []byte
}

func (d *disk) size() int64 { return int64(len(d.model)) }

func (d *disk) do(r *blk.Request) (err error) {
	d.run(func(t *blk.Task) { err = blk.Do(t, d.n, r) })
	return err
}

// split says how a buffer is cut into pieces.
type split int

const (
	whole   split = iota
	aligned       // whole, at a page boundary
	odd           // pieces of odd lengths at odd addresses
	sectors       // pieces of 512 bytes
	unalign       // begins at an odd address
	numSplits
)

// pieces returns memory for n bytes and its vec.
func (d *disk) pieces(rng *rand.Rand, n int64, s split) (blk.Vec, func()) {
	switch s {
	case aligned:
		buf := blk.GetBuffer(int(n))
		return blk.BytesVec(nil, buf.B), buf.Free
	case odd:
		var v blk.Vec
		for n > 0 {
			l := min(n, 1+rng.Int64N(max(n/4, 3000)))
			v = blk.BytesVec(v, make([]byte, l+3)[3:])
			n -= l
		}
		return v, func() {}
	case sectors:
		var v blk.Vec
		b := make([]byte, n)
		for len(b) > 0 {
			l := min(len(b), 512)
			v, b = blk.BytesVec(v, b[:l]), b[l:]
		}
		return v, func() {}
	case unalign:
		return blk.BytesVec(nil, make([]byte, n+1)[1:]), func() {}
	default:
		return blk.BytesVec(nil, make([]byte, n)), func() {}
	}
}

func (d *disk) readSplit(off, n int64, s split) []byte {
	d.Helper()
	v, free := d.pieces(d.rng, n, s)
	defer free()
	if err := d.do(&blk.Request{Op: blk.OpRead, Off: off, Len: n, Data: v}); err != nil {
		d.Fatalf("read %d bytes at %d: %v", n, off, err)
	}
	got := make([]byte, n)
	v.CopyTo(got)
	return got
}

func (d *disk) read(off, n int64) []byte { return d.readSplit(off, n, whole) }

// change carries out a request of any changing kind and the model with it. Data is random.
func (d *disk) change(op blk.Op, flags blk.Flags, off, n int64, s split) {
	d.Helper()
	if err := changeOn(d, d.rng, d.model, op, flags, off, n, s); err != nil {
		d.Fatal(err)
	}
}

func changeOn(d *disk, rng *rand.Rand, model []byte, op blk.Op, flags blk.Flags, off, n int64, s split) error {
	r := &blk.Request{Op: op, Flags: flags, Off: off, Len: n}
	part := model[off : off+n]
	old := append([]byte(nil), part...)
	switch op {
	case blk.OpWrite:
		fill(rng, part)
		v, free := d.pieces(rng, n, s)
		defer free()
		v.CopyFrom(part)
		r.Data = v
	case blk.OpWriteZeroes, blk.OpDiscard:
		clear(part)
	default:
		return fmt.Errorf("%v changes nothing", op)
	}
	if err := d.do(r); err != nil {
		return fmt.Errorf("%v flags %d of %d bytes at %d: %w", op, flags, n, off, err)
	}
	if op == blk.OpDiscard {
		// Each byte is what it was or zero, and stays so.
		v := blk.BytesVec(nil, make([]byte, n))
		if err := d.do(&blk.Request{Op: blk.OpRead, Off: off, Len: n, Data: v}); err != nil {
			return fmt.Errorf("read after a discard: %w", err)
		}
		v.CopyTo(part)
		if blk.IsZero(part) || bytes.Equal(part, old) {
			return nil
		}
		for i, b := range part {
			if b != 0 && b != old[i] {
				return fmt.Errorf("discard of %d bytes at %d: byte %d is %#x, was %#x", n, off, off+int64(i), b, old[i])
			}
		}
	}
	return nil
}

// fill makes random bytes, never 0: a byte that is lost shows. The pattern's length is prime to every block size, so
// that a block in the wrong place shows too.
func fill(rng *rand.Rand, b []byte) {
	pattern := make([]byte, min(len(b), 509))
	for i := range pattern {
		pattern[i] = byte(rng.Uint32()) | 1
	}
	for n := 0; n < len(b); {
		n += copy(b[n:], pattern)
	}
}

func (d *disk) compare() {
	d.Helper()
	const step = 64 << 10
	for off := int64(0); off < d.size(); off += step {
		n := min(step, d.size()-off)
		if got := d.read(off, n); !bytes.Equal(got, d.model[off:off+n]) {
			for i := range got {
				if got[i] != d.model[off+int64(i)] {
					d.Fatalf("byte %d is %#x, want %#x", off+int64(i), got[i], d.model[off+int64(i)])
				}
			}
		}
	}
}

// place picks an aligned range of at most most bytes.
func (d *disk) place(rng *rand.Rand, most int64) (off, n int64) {
	units := d.size() / d.align
	n = 1 + rng.Int64N(max(most/d.align, 1))
	if rng.IntN(2) == 0 {
		n = 1 + rng.Int64N(max(min(most, 8192)/d.align, 1))
	}
	n = min(n, units)
	return rng.Int64N(units-n+1) * d.align, n * d.align
}

func (d *disk) testInfo() {
	in := d.n.Info()
	if in.Size != d.size() || in.Size%blk.SectorSize != 0 {
		d.Errorf("size %d, want %d", in.Size, d.size())
	}
	if in.Align < 1 || in.Align&(in.Align-1) != 0 {
		d.Errorf("align %d is not a power of two", in.Align)
	}
	if in.Kind == "" || in.Name == "" {
		d.Errorf("kind %q, name %q", in.Kind, in.Name)
	}
	for _, c := range d.n.Children() {
		if c == nil {
			d.Error("a child is nil")
		}
	}
}

func (d *disk) testRefused() {
	vec := func(n int) blk.Vec { return blk.BytesVec(nil, make([]byte, n)) }
	const big = math.MaxInt64 - 511
	for _, c := range []struct {
		name string
		r    blk.Request
		want error
	}{
		{"read past the end", blk.Request{Op: blk.OpRead, Off: d.size(), Len: 512, Data: vec(512)}, blk.ErrRange},
		{"read over the end", blk.Request{Op: blk.OpRead, Off: d.size() - 512, Len: 1024, Data: vec(1024)}, blk.ErrRange},
		{"negative offset", blk.Request{Op: blk.OpRead, Off: -512, Len: 512, Data: vec(512)}, blk.ErrRange},
		{"overflow", blk.Request{Op: blk.OpRead, Off: 512, Len: big, Data: vec(512)}, blk.ErrRange},
		{"empty read", blk.Request{Op: blk.OpRead}, blk.ErrRange},
		{"less data than length", blk.Request{Op: blk.OpRead, Len: 1024, Data: vec(512)}, blk.ErrInvalid},
		{"read with FUA", blk.Request{Op: blk.OpRead, Flags: blk.FUA, Len: 512, Data: vec(512)}, blk.ErrInvalid},
		{"flush of a range", blk.Request{Op: blk.OpFlush, Len: 512}, blk.ErrInvalid},
		{"unknown operation", blk.Request{Op: 77, Len: 512}, blk.ErrNotSupported},
		{"write over the end", blk.Request{Op: blk.OpWrite, Off: d.size() - 512, Len: 1024, Data: vec(1024)}, blk.ErrRange},
		{"discard over the end", blk.Request{Op: blk.OpDiscard, Off: d.size() - 512, Len: 1024}, blk.ErrRange},
		{"zeroes over the end", blk.Request{Op: blk.OpWriteZeroes, Off: d.size() - 512, Len: 1024}, blk.ErrRange},
		{"write with unmap", blk.Request{Op: blk.OpWrite, Flags: blk.Unmap, Len: 512, Data: vec(512)}, blk.ErrInvalid},
	} {
		if d.n.Info().ReadOnly && c.r.Op.Changes() {
			c.want = blk.ErrReadOnly
		}
		if err := d.do(&c.r); !errors.Is(err, c.want) {
			d.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	// Do of the node itself knows no operation that it was not made for.
	d.run(func(t *blk.Task) {
		if err := d.n.Do(t, &blk.Request{Op: 77, Len: 512}); !errors.Is(err, blk.ErrNotSupported) {
			d.Errorf("unknown operation given to the node: %v", err)
		}
	})
	if _, ok := d.n.TryMap(77, 0, 512); ok {
		d.Error("unknown operation mapped")
	}
}

func (d *disk) testFresh() {
	d.compare()
	if err := d.do(&blk.Request{Op: blk.OpFlush}); err != nil {
		d.Errorf("flush: %v", err)
	}
}

// testReadSplits reads at any alignment: only changes may need one.
func (d *disk) testReadSplits() {
	for s := range numSplits {
		for _, c := range [][2]int64{{0, 1}, {511, 2}, {513, 4096}, {4096, 8192}, {65536 - 7, 70000}, {d.size() - 1, 1}} {
			if got := d.readSplit(c[0], c[1], s); !bytes.Equal(got, d.model[c[0]:c[0]+c[1]]) {
				d.Errorf("split %d: wrong bytes in [%d, +%d)", s, c[0], c[1])
			}
		}
	}
}

func (d *disk) testAlignments() {
	d.change(blk.OpWrite, 0, 0, d.size(), whole)
	for _, align := range []int64{1, 512, 4096} {
		if align < d.align {
			continue
		}
		for s := range numSplits {
			for range 4 {
				off := d.rng.Int64N(d.size()/align-40) * align
				n := (1 + d.rng.Int64N(39)) * align
				flags := blk.Flags(d.rng.IntN(2)) // FUA or not
				d.change(blk.OpWrite, flags, off, n, s)
				lo, hi := max(off-5000, 0), min(off+n+5000, d.size())
				if got := d.readSplit(lo, hi-lo, s); !bytes.Equal(got, d.model[lo:hi]) {
					d.Fatalf("alignment %d, split %d: wrong bytes around [%d, +%d)", align, s, off, n)
				}
			}
		}
	}
}

func (d *disk) testEdges() {
	a := d.align
	end := d.size()
	for _, op := range []blk.Op{blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard, blk.OpWrite} {
		d.change(op, 0, 0, a, whole)
		d.change(op, 0, end-a, a, whole)
		d.change(op, 0, 0, end, odd)
		d.compare()
		for _, at := range []int64{4096, 65536, 1 << 20} {
			d.change(op, 0, at-a, 2*a, odd)
			d.change(op, 0, at, a, aligned)
		}
		d.compare()
		// Longer than the pieces in which anybody works.
		d.change(op, blk.FUA, a, end-2*a, unalign)
		d.compare()
	}
}

func (d *disk) testZeroes() {
	for _, flags := range []blk.Flags{0, blk.FUA, blk.Unmap, blk.Unmap | blk.FUA} {
		d.change(blk.OpWrite, 0, 0, d.size(), whole)
		for range 8 {
			off, n := d.place(d.rng, 300<<10)
			d.change(blk.OpWriteZeroes, flags, off, n, whole)
			if !blk.IsZero(d.read(off, n)) {
				d.Fatalf("flags %d: [%d, +%d) does not read as zeros", flags, off, n)
			}
		}
		d.compare()
		d.change(blk.OpWriteZeroes, flags, 0, d.size(), whole)
		d.compare()
		off, n := d.place(d.rng, 64<<10)
		d.change(blk.OpWrite, 0, off, n, odd)
		d.compare()
	}
}

func (d *disk) testDiscard() {
	d.change(blk.OpWrite, 0, 0, d.size(), whole)
	for range 32 {
		off, n := d.place(d.rng, 300<<10)
		d.change(blk.OpDiscard, blk.Flags(d.rng.IntN(2)), off, n, whole)
		off, n = d.place(d.rng, 32<<10)
		d.change(blk.OpWrite, 0, off, n, whole)
	}
	d.compare()
}

// testMaps walks over the disk with Map and TryMap and checks what they say against the contents.
func (d *disk) testMaps() {
	d.run(func(t *blk.Task) {
		for off := int64(0); off < d.size(); {
			n := min(1+d.rng.Int64N(300<<10), d.size()-off)
			e, err := d.n.Map(t, off, n)
			if err != nil {
				d.Errorf("map [%d, +%d): %v", off, n, err)
				return
			}
			if !d.checkExtent(t, "Map", e, off, n) {
				return
			}
			off += e.Len
		}
		for range 50 {
			off := d.rng.Int64N(d.size())
			n := min(1+d.rng.Int64N(128<<10), d.size()-off)
			if e, ok := d.n.TryMap(blk.OpRead, off, n); ok && !d.checkExtent(t, "TryMap", e, off, n) {
				return
			}
			if e, ok := d.n.TryMap(blk.OpWrite, off, n); ok {
				if d.n.Info().ReadOnly || !e.Writable || e.Host == nil {
					d.Errorf("TryMap gives an extent for writing that is not: %+v", e)
					return
				}
				if !d.checkExtent(t, "TryMap", e, off, n) {
					return
				}
			}
		}
	})
	if e, ok := d.n.TryMap(blk.OpFlush, 0, 0); ok && e.Host == nil {
		d.Error("TryMap of a flush gives no file")
	}
	for _, op := range []blk.Op{blk.OpRead, blk.OpWrite, blk.OpFlush, blk.OpDiscard, blk.OpWriteZeroes} {
		n := int64(4096)
		if op == blk.OpFlush {
			n = 0
		}
		if got := testing.AllocsPerRun(100, func() { d.n.TryMap(op, 0, n) }); got != 0 {
			d.Errorf("TryMap(%v) allocates %v times", op, got)
		}
	}
}

func (d *disk) checkExtent(t *blk.Task, who string, e blk.Extent, off, n int64) bool {
	if e.Len < 1 || e.Len > n {
		d.Errorf("%s [%d, +%d): length %d", who, off, n, e.Len)
		return false
	}
	want := d.model[off : off+e.Len]
	switch e.State {
	case blk.Zero, blk.Unallocated:
		if !blk.IsZero(want) {
			d.Errorf("%s: [%d, +%d) should be zeros and is not", who, off, e.Len)
			return false
		}
	case blk.Data:
		if e.Host == nil {
			return true
		}
		got, err := readHost(t, e.Host, e.HostOff, e.Len)
		if err != nil || !bytes.Equal(got, want) {
			d.Errorf("%s: [%d, +%d) at %d of %s: other bytes there, error %v", who, off, e.Len, e.HostOff, e.Host.Path, err)
			return false
		}
	case blk.Encoded:
		if e.Host != nil && e.Writable {
			d.Errorf("%s: [%d, +%d) is encoded and writable", who, off, e.Len)
			return false
		}
	default:
		d.Errorf("%s: unknown state %d", who, e.State)
		return false
	}
	return true
}

func readHost(t *blk.Task, f *blk.HostFile, off, n int64) ([]byte, error) {
	a := int64(max(f.MemAlign, f.OffAlign, 1))
	lo := off &^ (a - 1)
	hi := (off + n + a - 1) &^ (a - 1)
	buf := blk.GetBuffer(int(hi - lo))
	defer buf.Free()
	err := t.ReadAt(f, blk.BytesVec(nil, buf.B), lo)
	return append([]byte(nil), buf.B[off-lo:off-lo+n]...), err
}

func (d *disk) testMapsAfterWrites() {
	for range 30 {
		off, n := d.place(d.rng, 100<<10)
		d.change(blk.OpWrite, 0, off, n, aligned)
		off, n = d.place(d.rng, 200<<10)
		d.change(blk.OpWriteZeroes, blk.Unmap, off, n, whole)
	}
	d.testMaps()
}

// testWriteThroughExtents does as the fast path does.
func (d *disk) testWriteThroughExtents() {
	d.change(blk.OpWrite, 0, 0, d.size()/2/d.align*d.align, aligned)
	written := 0
	for range 60 {
		off, n := d.place(d.rng, 64<<10)
		e, ok := d.n.TryMap(blk.OpWrite, off, n)
		if !ok {
			continue
		}
		if !e.Writable || e.Host == nil || e.Len < 1 || e.Len > n {
			d.Fatalf("TryMap gives an extent for writing that is not: %+v", e)
		}
		buf := blk.GetBuffer(int(e.Len))
		if v := blk.BytesVec(nil, buf.B); e.Host.Fits(e.HostOff, v) {
			fill(d.rng, buf.B)
			copy(d.model[off:], buf.B)
			d.run(func(t *blk.Task) {
				if err := t.WriteAt(e.Host, v, e.HostOff, false); err != nil {
					d.Errorf("write %d bytes at %d: %v", e.Len, off, err)
				}
			})
			if e.Log != nil {
				e.Log.Set(off, e.Len)
			}
			written++
		}
		buf.Free()
	}
	d.Logf("%d writes through extents", written)
}

func (d *disk) testRandom() {
	for range 400 {
		off, n := d.place(d.rng, 128<<10)
		s := split(d.rng.IntN(int(numSplits)))
		switch d.rng.IntN(10) {
		case 0, 1, 2, 3:
			d.change(blk.OpWrite, blk.Flags(d.rng.IntN(2)), off, n, s)
		case 4:
			d.change(blk.OpWriteZeroes, blk.Flags(d.rng.IntN(4)), off, n, s)
		case 5:
			d.change(blk.OpDiscard, 0, off, n, s)
		case 6:
			if err := d.do(&blk.Request{Op: blk.OpFlush}); err != nil {
				d.Fatalf("flush: %v", err)
			}
		default:
			if got := d.readSplit(off, n, s); !bytes.Equal(got, d.model[off:off+n]) {
				d.Fatalf("wrong bytes in [%d, +%d)", off, n)
			}
		}
	}
}

// testConcurrent gives each worker every fourth slice of the disk, so that neighbours share blocks and clusters.
func (d *disk) testConcurrent() {
	const workers, rounds = 4, 150
	unit := max(d.align, blk.SectorSize)
	slices := d.size() / unit
	var wg sync.WaitGroup
	for w := range int64(workers) {
		rng := rand.New(rand.NewPCG(d.rng.Uint64(), uint64(w)))
		wg.Go(func() {
			for range rounds {
				// The first slices are everybody's favourites.
				i := rng.Int64N(slices/workers)*workers + w
				if rng.IntN(2) == 0 {
					i = rng.Int64N(8)*workers + w
				}
				off := i * unit
				op := [...]blk.Op{blk.OpWrite, blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard, blk.OpRead}[rng.IntN(5)]
				if op != blk.OpRead {
					if err := changeOn(d, rng, d.model, op, 0, off, unit, split(rng.IntN(int(numSplits)))); err != nil {
						d.Errorf("worker %d: %v", w, err)
						return
					}
				}
				v := blk.BytesVec(nil, make([]byte, unit))
				err := d.do(&blk.Request{Op: blk.OpRead, Off: off, Len: unit, Data: v})
				got := make([]byte, unit)
				v.CopyTo(got)
				if err != nil || !bytes.Equal(got, d.model[off:off+unit]) {
					d.Errorf("worker %d: wrong bytes in [%d, +%d) after %v, error %v", w, off, unit, op, err)
					return
				}
			}
			if err := d.do(&blk.Request{Op: blk.OpFlush}); err != nil {
				d.Errorf("worker %d: flush: %v", w, err)
			}
		})
	}
	wg.Wait()
}
