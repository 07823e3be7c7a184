// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// fake is a layer as a format makes it: pieces of its own size that it holds or not, some in a host file, not
// necessarily in order. With cold set it knows a stretch only after Map was called for it.
type fake struct {
	info  blk.Info
	piece int64
	state []blk.State
	at    []int64 // place of a piece in the host file; -1: none
	host  *blk.HostFile
	data  []byte
	cold  bool

	mu     sync.Mutex
	known  map[int64]bool
	fail   func(off int64) error
	maps   atomic.Int64
	tries  atomic.Int64
	closed atomic.Bool
}

func (f *fake) Info() *blk.Info { return &f.info }

func (f *fake) TryMap(op blk.Op, off, n int64) (blk.Extent, bool) {
	f.tries.Add(1)
	if op != blk.OpRead {
		return blk.Extent{}, false
	}
	if f.cold {
		f.mu.Lock()
		defer f.mu.Unlock()
		if !f.known[off/f.piece] {
			return blk.Extent{}, false
		}
	}
	return f.extent(off, n), true
}

func (f *fake) extent(off, n int64) blk.Extent {
	p := off / f.piece
	x := blk.Extent{State: f.state[p], Len: (p+1)*f.piece - off}
	if x.State == blk.Data && f.at[p] >= 0 {
		x.Host, x.HostOff = f.host, f.at[p]+off%f.piece
	}
	for q := p + 1; x.Len < n && q < int64(len(f.state)); q++ {
		if f.state[q] != x.State || x.State == blk.Encoded ||
			x.State == blk.Data && (f.at[q] < 0) != (x.Host == nil) || x.Host != nil && f.at[q] != f.at[q-1]+f.piece {
			break
		}
		x.Len += f.piece
	}
	x.Len = min(x.Len, n, f.info.Size-off)
	return x
}

func (f *fake) Map(_ *blk.Task, off, n int64) (blk.Extent, error) {
	f.maps.Add(1)
	if f.fail != nil {
		if err := f.fail(off); err != nil {
			return blk.Extent{}, err
		}
	}
	x := f.extent(off, n)
	if f.cold {
		f.mu.Lock()
		defer f.mu.Unlock()
		for p := off / f.piece; p <= (off+x.Len-1)/f.piece; p++ {
			f.known[p] = true
		}
	}
	return x, nil
}

func (f *fake) Do(_ *blk.Task, r *blk.Request) error {
	if r.Op != blk.OpRead {
		return blk.ErrNotSupported
	}
	if f.fail != nil {
		if err := f.fail(r.Off); err != nil {
			return err
		}
	}
	r.Data.CopyFrom(f.data[r.Off:])
	return nil
}

func (f *fake) Children() []blk.Node { return nil }

func (f *fake) Close() error {
	if f.closed.Swap(true) {
		return errors.New("closed twice")
	}
	return nil
}

func (f *fake) allocated(off int64) bool { return f.state[off/f.piece] != blk.Unallocated }

// newFake makes a layer of which about a share of full in 100 pieces is held.
func newFake(t testing.TB, rng *rand.Rand, size, piece int64, full int) *fake {
	f := &fake{
		info:  blk.Info{Name: "fake", Kind: "fake", Size: size, ReadOnly: true, Align: 1},
		piece: piece, data: make([]byte, size), known: map[int64]bool{}, cold: rng.IntN(2) == 0,
	}
	pieces := (size + piece - 1) / piece
	f.state, f.at = make([]blk.State, pieces), make([]int64, pieces)
	order := make([]int64, pieces)
	for i := range order {
		order[i] = int64(i)
	}
	if rng.IntN(2) == 0 {
		rng.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	file := make([]byte, pieces*piece+512)
	shift := int64(rng.IntN(2)) * 512
	for p := range pieces {
		f.at[p] = -1
		held := rng.IntN(100) < full
		if p > 0 && rng.IntN(3) > 0 {
			held = f.state[p-1] != blk.Unallocated // runs
		}
		if !held {
			f.state[p] = blk.Unallocated
			continue
		}
		part := f.data[p*piece : min((p+1)*piece, size)]
		switch rng.IntN(8) {
		case 0:
			f.state[p] = blk.Zero
		case 1:
			f.state[p] = blk.Encoded
			random(rng, part)
		case 2:
			random(rng, part)
		default:
			random(rng, part)
			f.at[p] = order[p]*piece + shift
			copy(file[f.at[p]:], part)
		}
	}
	f.host = hostFile(t, file)
	return f
}

func random(rng *rand.Rand, b []byte) {
	for i := range b {
		b[i] = byte(rng.Uint32()) | 1
	}
}

func hostFile(t testing.TB, data []byte) *blk.HostFile {
	path := filepath.Join(t.TempDir(), "layer")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return &blk.HostFile{Fd: int(file.Fd()), Path: path, MemAlign: 1, OffAlign: 1}
}

// model is what a chain of the layers reads as: what its own words promise, byte by byte.
func model(layers []*fake) (data []byte, held []int) {
	size := layers[0].info.Size
	data, held = make([]byte, size), make([]int, size)
	for off := range size {
		held[off] = -1
		for i, l := range layers {
			if off >= l.info.Size {
				held[off] = i // zeros, and the view ends
				break
			}
			if l.allocated(off) {
				data[off], held[off] = l.data[off], i
				break
			}
		}
	}
	return data, held
}

func nodes(layers []*fake) []blk.Node {
	all := make([]blk.Node, len(layers))
	for i, l := range layers {
		all[i] = l
	}
	return all
}

// randomLayers makes layers of mixed sizes and pieces. The first has exactly size bytes.
func randomLayers(t testing.TB, rng *rand.Rand, depth int, size int64) []*fake {
	var layers []*fake
	for i := range depth {
		piece := int64(512) << rng.IntN(9)
		s := size
		switch rng.IntN(6) {
		case 0:
			s += rng.Int64N(200) * 512
		case 1:
			s -= rng.Int64N(min(200, size/512)) * 512
		case 2:
			if rng.IntN(8) == 0 {
				s = 512 * rng.Int64N(20) // tiny, even empty
			}
		}
		if i == 0 {
			s = size
		}
		layers = append(layers, newFake(t, rng, s, piece, 10+rng.IntN(80)/depth))
	}
	return layers
}

func TestConformance(t *testing.T) {
	for _, unit := range []int64{512, 4096, 65536, 1 << 20} {
		t.Run(fmt.Sprint(unit), func(t *testing.T) {
			rng := blktest.Rand(t)
			layers := randomLayers(t, rng, 7, blktest.DefaultSize)
			data, _ := model(layers)
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				for _, l := range layers {
					l.closed.Store(false)
				}
				n, err := New(nodes(layers), Options{Unit: unit, Memory: 1 << 16})
				if err != nil || n.Info().Size != size {
					t.Fatalf("size %d, error %v", n.Info().Size, err)
				}
				return n
			}, blktest.Options{Contents: data})
		})
	}
}

// check reads and maps at random places and compares, then once all over.
func check(t *testing.T, rng *rand.Rand, n *Node, data []byte, held []int) {
	t.Helper()
	task := blk.NewTask()
	size := int64(len(data))
	for range 60 {
		off := rng.Int64N(size)
		l := min(1+rng.Int64N(300<<10), size-off)
		if x, ok := n.TryMap(blk.OpRead, off, l); ok {
			checkExtent(t, "TryMap", task, x, off, l, data, held)
		}
		switch rng.IntN(3) {
		case 0:
			x, err := n.Map(task, off, l)
			if err != nil {
				t.Fatal(err)
			}
			checkExtent(t, "Map", task, x, off, l, data, held)
		default:
			checkRead(t, task, n, off, l, data)
		}
	}
	for off := int64(0); off < size; {
		x, err := n.Map(task, off, size-off)
		if err != nil {
			t.Fatal(err)
		}
		checkExtent(t, "Map", task, x, off, size-off, data, held)
		off += x.Len
	}
	checkRead(t, task, n, 0, size, data)
}

func checkRead(t *testing.T, task *blk.Task, n *Node, off, l int64, data []byte) {
	t.Helper()
	got := bytes.Repeat([]byte{0xee}, int(l))
	err := blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, got)})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data[off:off+l]) {
		for i := range got {
			if got[i] != data[off+int64(i)] {
				t.Fatalf("byte %d reads as %#x, want %#x", off+int64(i), got[i], data[off+int64(i)])
			}
		}
	}
}

func checkExtent(t *testing.T, who string, task *blk.Task, x blk.Extent, off, l int64, data []byte, held []int) {
	t.Helper()
	if x.Len < 1 || x.Len > l || x.Writable || x.Log != nil {
		t.Fatalf("%s [%d, +%d): %+v", who, off, l, x)
	}
	want := data[off : off+x.Len]
	for i := off; i < off+x.Len; i++ {
		switch {
		case x.State == blk.Unallocated && held[i] >= 0:
			t.Fatalf("%s: byte %d is not held, it says, but layer %d has it", who, i, held[i])
		case x.State != blk.Unallocated && int(x.Depth) != held[i]:
			t.Fatalf("%s: byte %d lies at depth %d, it says, not %d (%+v at %d)", who, i, x.Depth, held[i], x, off)
		}
	}
	switch {
	case x.State == blk.Zero:
		if !bytes.Equal(want, make([]byte, x.Len)) {
			t.Fatalf("%s: [%d, +%d) is not zeros", who, off, x.Len)
		}
	case x.State == blk.Data && x.Host != nil:
		got := make([]byte, x.Len)
		if err := task.ReadAt(x.Host, blk.BytesVec(nil, got), x.HostOff); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%s: [%d, +%d) is not at %d of the file: %v", who, off, x.Len, x.HostOff, err)
		}
	}
}

// TestModel compares random chains with the model, and with what it says after layers were put on top.
func TestModel(t *testing.T) {
	rng := blktest.Rand(t)
	rounds := 60
	if testing.Short() {
		rounds = 8
	}
	for range rounds {
		size := (1 + rng.Int64N(2000)) * 512
		layers := randomLayers(t, rng, 1+rng.IntN(9), size)
		o := Options{Unit: 512 << rng.IntN(9), Memory: 1 + rng.Int64N(4)*4*pageMemory}
		n, err := New(nodes(layers), o)
		if err != nil {
			t.Fatal(err)
		}
		data, held := model(layers)
		check(t, rng, n, data, held)
		for range 3 { // snapshots: of equal, smaller and larger size
			o.From = n
			if rng.IntN(3) == 0 {
				size = max(512, size+(rng.Int64N(401)-200)*512)
			}
			layers = append(randomLayers(t, rng, 1+rng.IntN(2), size), layers...)
			if n, err = New(nodes(layers), o); err != nil {
				t.Fatal(err)
			}
			data, held = model(layers)
			check(t, rng, n, data, held)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		for i, l := range layers {
			if !l.closed.Load() {
				t.Fatalf("layer %d was not closed", i)
			}
		}
	}
}

// Units of one layer cost no other layer anything, and pages that were taken over only the new layers.
func TestAsksNobodyTwice(t *testing.T) {
	rng := blktest.Rand(t)
	const size = 8 << 20
	var layers []*fake
	for range 40 {
		f := newFake(t, rng, size, 64<<10, 5)
		f.cold = false
		layers = append(layers, f)
	}
	n, err := New(nodes(layers), Options{})
	if err != nil {
		t.Fatal(err)
	}
	task := blk.NewTask()
	count := func() (all int64) {
		for _, l := range layers {
			all += l.tries.Swap(0) + l.maps.Swap(0)
		}
		return all
	}
	read := func() {
		for off := int64(0); off < size; off += 4096 {
			if x, ok := n.TryMap(blk.OpRead, off, 4096); !ok && x.Len != 0 {
				t.Fatal("an extent that is not one")
			}
		}
	}
	if _, err := n.Map(task, 0, size); err != nil {
		t.Fatal(err)
	}
	count()
	read()
	// Only the one layer is asked, for what has no place.
	if got := count(); got > size/4096 {
		t.Errorf("%d questions for %d reads", got, size/4096)
	}

	top := newFake(t, rng, size, 64<<10, 5)
	top.cold = false
	n2, err := New(nodes(append([]*fake{top}, layers...)), Options{From: n})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := n2.TryMap(blk.OpRead, 0, 512); ok {
		t.Error("a page is used that does not consider the new layer")
	}
	if _, err := n2.Map(task, 0, 1); err != nil {
		t.Fatal(err)
	}
	if got := count(); got > 1 {
		t.Errorf("%d questions to the old layers", got)
	}
}

// A layer that fails hurts only those who read what it would have to say.
func TestLayerFails(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	const size = 1 << 20
	top, mid, base := newFake(t, rng, size, 65536, 50), newFake(t, rng, size, 65536, 50), newFake(t, rng, size, 65536, 100)
	layers := []*fake{top, mid, base}
	data, held := model(layers)
	bad := errors.New("cannot read the table")
	mid.cold = true
	broken := true
	mid.fail = func(int64) error {
		if broken {
			return bad
		}
		return nil
	}
	n, err := New(nodes(layers), Options{})
	if err != nil {
		t.Fatal(err)
	}
	task := blk.NewTask()
	failed, read := 0, 0
	for off := int64(0); off < size; off += 65536 {
		got := make([]byte, 65536)
		err := blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: off, Len: 65536, Data: blk.BytesVec(nil, got)})
		switch {
		case top.allocated(off):
			read++
			if err != nil || !bytes.Equal(got, data[off:off+65536]) {
				t.Errorf("at %d: %v", off, err)
			}
		default:
			failed++
			if !errors.Is(err, bad) {
				t.Errorf("at %d: %v, want the layer's error", off, err)
			}
		}
	}
	if failed == 0 || read == 0 {
		t.Fatal("the layers do not test anything")
	}
	broken = false
	check(t, rng, n, data, held)
}

// Many tasks read a chain whose memory is much too small.
func TestConcurrent(t *testing.T) {
	rng := blktest.Rand(t)
	rounds := 60
	if testing.Short() {
		rounds = 8
	}
	layers := randomLayers(t, rng, 12, 3<<20)
	data, _ := model(layers)
	n, err := New(nodes(layers), Options{Unit: 512, Memory: 1})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 6 {
		r := rand.New(rand.NewPCG(rng.Uint64(), 1))
		wg.Go(func() {
			task := blk.NewTask()
			for range rounds {
				off := r.Int64N(n.info.Size)
				l := min(1+r.Int64N(100<<10), n.info.Size-off)
				n.TryMap(blk.OpRead, off, l)
				got := make([]byte, l)
				err := blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, got)})
				if err != nil || !bytes.Equal(got, data[off:off+l]) {
					t.Errorf("[%d, +%d): wrong, error %v", off, l, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestMemoryIsBounded(t *testing.T) {
	rng := blktest.Rand(t)
	f := newFake(t, rng, 16<<20, 4096, 50)
	n, err := New([]blk.Node{f}, Options{Unit: 512, Memory: 10 * pageMemory})
	if err != nil {
		t.Fatal(err)
	}
	task := blk.NewTask()
	for off := int64(0); off < f.info.Size; off += n.span() {
		if _, err := n.Map(task, off, 1); err != nil {
			t.Fatal(err)
		}
	}
	have := 0
	for i := range n.pages.slots {
		if n.pages.slots[i].Load() != nil {
			have++
		}
	}
	if have > 10 || have < 4 {
		t.Errorf("%d pages in memory, want at most 10", have)
	}
	// A page that is read all the time stays, whatever passes by.
	for off := int64(0); off < f.info.Size; off += n.span() {
		if n.pages.get(0) == nil && off > 0 {
			t.Fatalf("the page in use has gone after %d others", off/n.span())
		}
		for _, at := range []int64{0, 0, off} {
			if _, err := n.Map(task, at, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestNoAllocations(t *testing.T) {
	rng := blktest.Rand(t)
	layers := randomLayers(t, rng, 9, 4<<20)
	n, err := New(nodes(layers), Options{Unit: 4096})
	if err != nil {
		t.Fatal(err)
	}
	task := blk.NewTask()
	for off := int64(0); off < n.info.Size; off += n.span() {
		if _, err := n.Map(task, off, 1); err != nil {
			t.Fatal(err)
		}
	}
	at := int64(0)
	if got := testing.AllocsPerRun(2000, func() {
		n.TryMap(blk.OpRead, at, 4096)
		at = (at + 12288) % n.info.Size
	}); got != 0 {
		t.Errorf("TryMap allocates %v times", got)
	}
}

func TestRefused(t *testing.T) {
	rng := blktest.Rand(t)
	f := newFake(t, rng, 1<<20, 65536, 50)
	g := newFake(t, rng, 1<<20, 65536, 50)
	from, err := New([]blk.Node{f}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		layers []blk.Node
		o      Options
	}{
		"no layer":         {nil, Options{}},
		"too many":         {make([]blk.Node, MaxDepth+1), Options{}},
		"unit too small":   {[]blk.Node{f}, Options{Unit: 256}},
		"unit not a power": {[]blk.Node{f}, Options{Unit: 1536}},
		"other layers":     {[]blk.Node{g}, Options{From: from}},
		"fewer layers":     {[]blk.Node{}, Options{From: from}},
		"in the middle":    {[]blk.Node{f, g}, Options{From: from}},
	} {
		if _, err := New(c.layers, c.o); !errors.Is(err, blk.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// spread is a disk whose blocks lie in any of depth layers.
func spread(b testing.TB, depth int, size int64) (*Node, []*fake) {
	rng := rand.New(rand.NewPCG(7, 7))
	host := hostFile(b, make([]byte, size))
	layers := make([]*fake, depth)
	for i := range layers {
		pieces := size >> 16
		f := &fake{
			info:  blk.Info{Name: "fake", Kind: "fake", Size: size, ReadOnly: true, Align: 1},
			piece: 64 << 10, host: host, state: make([]blk.State, pieces), at: make([]int64, pieces),
		}
		for p := range f.state {
			f.state[p], f.at[p] = blk.Unallocated, int64(p)<<16
		}
		layers[i] = f
	}
	for p := range size >> 16 {
		layers[rng.IntN(depth)].state[p] = blk.Data
	}
	n, err := New(nodes(layers), Options{})
	if err != nil {
		b.Fatal(err)
	}
	return n, layers
}

// BenchmarkTryMap is the fast path of a 4 KiB read at a random place, after each place was read once.
func BenchmarkTryMap(b *testing.B) {
	for _, depth := range []int{1, 64, 500} {
		b.Run(fmt.Sprint("depth=", depth), func(b *testing.B) {
			const size = 1 << 30
			n, _ := spread(b, depth, size)
			task := blk.NewTask()
			for off := int64(0); off < size; off += n.span() {
				if _, err := n.Map(task, off, 1); err != nil {
					b.Fatal(err)
				}
			}
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			for b.Loop() {
				x, ok := n.TryMap(blk.OpRead, rng.Int64N(size/4096)*4096, 4096)
				if !ok || x.Host == nil {
					b.Fatal("not in the map")
				}
			}
		})
	}
}

// BenchmarkRead is the slow path, with the host's read.
func BenchmarkRead(b *testing.B) {
	for _, depth := range []int{1, 64, 500} {
		b.Run(fmt.Sprint("depth=", depth), func(b *testing.B) {
			const size = 1 << 30
			n, _ := spread(b, depth, size)
			task := blk.NewTask()
			rng := rand.New(rand.NewPCG(1, 1))
			buf := blk.GetBuffer(4096)
			defer buf.Free()
			r := &blk.Request{Op: blk.OpRead, Len: 4096, Data: blk.BytesVec(nil, buf.B)}
			b.ReportAllocs()
			for b.Loop() {
				r.Off = rng.Int64N(size/4096) * 4096
				if err := blk.Do(task, n, r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkFirstTouch makes one page.
func BenchmarkFirstTouch(b *testing.B) {
	for _, depth := range []int{1, 64, 500} {
		b.Run(fmt.Sprint("depth=", depth), func(b *testing.B) {
			n, _ := spread(b, depth, 32<<20)
			task := blk.NewTask()
			for b.Loop() {
				for i := range n.pages.slots {
					n.pages.slots[i].Store(nil)
				}
				if _, err := n.Map(task, 0, 1); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
