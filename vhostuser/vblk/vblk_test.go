// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/loop"
	"github.com/blkstream/blkstream/blk/raw"
	"github.com/blkstream/blkstream/vhostuser"
	"github.com/blkstream/blkstream/vhostuser/frontend"
	"github.com/blkstream/blkstream/virtq"
)

// target is a device that is served on a socket.
type target struct {
	dev    *Device
	graph  *blk.Graph
	path   string
	log    *logBuffer
	cancel func() // ends listening and the session, and waits for them
}

// logBuffer collects a log from several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Count(l.b.Bytes(), []byte(s))
}

func defaults(o Options) Options {
	if o.Queues == 0 {
		o.Queues = 4
	}
	if o.Depth == 0 {
		o.Depth = 64
	}
	if o.BlockSize == 0 {
		o.BlockSize = 512
	}
	return o
}

// serve serves a node until the test ends.
func serve(t *testing.T, n blk.Node, o Options) *target {
	t.Helper()
	return serveAt(t, filepath.Join(t.TempDir(), "s"), n, o)
}

func serveAt(t *testing.T, path string, n blk.Node, o Options) *target {
	t.Helper()
	s := &target{path: path, graph: blk.NewGraph(n), log: &logBuffer{}}
	o = defaults(o)
	o.Log = slog.New(slog.NewTextHandler(s.log, nil))
	s.dev = New(s.graph, n.Info().Size, o)
	l, err := vhostuser.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	srv := vhostuser.NewServer(s.dev, vhostuser.Options{Logger: o.Log})
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.ServeListener(context.Background(), l); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	s.cancel = sync.OnceFunc(func() {
		if err := srv.Close(); err != nil {
			t.Errorf("close the server: %v", err)
		}
		wg.Wait()
		if n := s.dev.Running(); n != 0 {
			t.Errorf("%d queues are left", n)
		}
	})
	t.Cleanup(s.cancel)
	return s
}

func (s *target) dial(t *testing.T, o frontend.Options) *frontend.Disk {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if o.Timeout == 0 {
		o.Timeout = 10 * time.Second
	}
	d, err := frontend.Dial(ctx, s.path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// tmpfs is a directory in memory, or skips the test.
func tmpfs(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "vblk")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// image opens a new file of size bytes as a raw disk.
func image(t testing.TB, dir string, size int64, o file.Options) blk.Node {
	t.Helper()
	path := filepath.Join(dir, "img")
	if err := file.Create(path, size); err != nil {
		t.Fatal(err)
	}
	n, err := file.Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return raw.Open(n)
}

// pieces maps its child in extents of at most size bytes. Pieces that were never written are zeros, and writes to them
// go the slow way. It marks changes in log.
type pieces struct {
	child blk.Node
	info  blk.Info
	size  int64
	used  *blk.Bitmap
	log   *blk.Bitmap
}

func newPieces(child blk.Node, size int64) *pieces {
	n := child.Info().Size
	p := &pieces{child: child, info: *child.Info(), size: size, used: blk.NewBitmap(n, size), log: blk.NewBitmap(n, size)}
	p.info.Kind = "pieces"
	return p
}

func (p *pieces) Info() *blk.Info { return &p.info }

func (p *pieces) TryMap(op blk.Op, off, n int64) (blk.Extent, bool) {
	if op != blk.OpRead && op != blk.OpWrite {
		return p.child.TryMap(op, off, n)
	}
	n = min(n, p.size-off%p.size)
	if !p.used.Any(off, n) {
		return blk.Extent{Len: n, State: blk.Zero}, op == blk.OpRead
	}
	e, ok := p.child.TryMap(op, off, n)
	e.Log = p.log
	return e, ok
}

func (p *pieces) Map(t *blk.Task, off, n int64) (blk.Extent, error) { return p.child.Map(t, off, n) }

func (p *pieces) Do(t *blk.Task, r *blk.Request) error {
	err := blk.Do(t, p.child, r)
	if r.Op.Changes() {
		p.used.Set(r.Off, r.Len)
		p.log.Set(r.Off, r.Len)
	}
	return err
}

func (p *pieces) Children() []blk.Node { return []blk.Node{p.child} }
func (p *pieces) Close() error         { return p.child.Close() }

func randomBytes(rng *rand.Rand, n int64) []byte {
	b := make([]byte, n)
	for i := 0; i < len(b); i += copy(b[i:], le64(rng.Uint64()|0x0101010101010101)) {
	}
	return b
}

// load is one writer with a part of the disk to itself.
type load struct {
	*testing.T
	d     *frontend.Disk
	rng   *rand.Rand
	off   int64
	model []byte
	align int64
	most  int64 // bytes a request
}

// step does something and checks it.
func (l *load) step() bool {
	units := int64(len(l.model)) / l.align
	n := 1 + l.rng.Int64N(l.most/l.align)
	if l.rng.IntN(2) == 0 {
		n = 1 + l.rng.Int64N(min(8, l.most/l.align))
	}
	at := l.rng.Int64N(units-n+1) * l.align
	n *= l.align
	part := l.model[at:][:n]
	var err error
	switch op := l.rng.IntN(10); op {
	case 0, 1, 2, 3:
		copy(part, randomBytes(l.rng, n))
		_, err = l.d.WriteAt(part, l.off+at)
	case 4:
		clear(part)
		err = l.d.WriteZeroes(l.off+at, n, l.rng.IntN(2) == 0)
	case 5:
		got := make([]byte, n)
		if err = l.d.Discard(l.off+at, n); err != nil {
			break
		}
		_, err = l.d.ReadAt(got, l.off+at)
		for i := range got {
			if got[i] != 0 && got[i] != part[i] {
				l.Errorf("byte %d is %#x after a discard, was %#x", l.off+at+int64(i), got[i], part[i])
				return false
			}
		}
		copy(part, got)
	case 6:
		err = l.d.Flush()
	default:
		got := make([]byte, n)
		_, err = l.d.ReadAt(got, l.off+at)
		if err == nil && !bytes.Equal(got, part) {
			l.Errorf("wrong bytes in [%d, +%d)", l.off+at, n)
			return false
		}
	}
	if err != nil {
		l.Error(err)
	}
	return err == nil
}

// loads divides a disk among writers.
func loads(t *testing.T, d *frontend.Disk, size, align, most int64, writers int) []*load {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var ls []*load
	part := size / int64(writers) / 4096 * 4096
	for i := range int64(writers) {
		ls = append(ls, &load{T: t, d: d, rng: rand.New(rand.NewPCG(seed, uint64(i))), off: i * part, model: make([]byte, part), align: align, most: most})
	}
	return ls
}

// check compares the node below with what was written.
func check(t *testing.T, n blk.Node, ls []*load) {
	t.Helper()
	for _, l := range ls {
		got := make([]byte, len(l.model))
		r := &blk.Request{Op: blk.OpRead, Off: l.off, Len: int64(len(got)), Data: blk.BytesVec(nil, got)}
		if err := blk.Do(blk.NewTask(), n, r); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, l.model) {
			t.Errorf("the image holds other bytes in [%d, +%d)", l.off, len(got))
		}
	}
}

func TestModel(t *testing.T) {
	const size = 16 << 20
	for _, c := range []struct {
		name  string
		open  func(t *testing.T) blk.Node
		opts  Options
		align int64
	}{
		{name: "tmpfs", open: func(t *testing.T) blk.Node { return image(t, tmpfs(t), size, file.Options{}) }},
		{name: "direct", open: func(t *testing.T) blk.Node {
			return image(t, t.TempDir(), size, file.Options{Direct: true, Align: 512, NoSync: true})
		}},
		{name: "direct 4096", opts: Options{BlockSize: 4096}, align: 4096, open: func(t *testing.T) blk.Node {
			return image(t, t.TempDir(), size, file.Options{Direct: true, Align: 4096, NoSync: true})
		}},
		{name: "direct pool", opts: Options{NoURing: true, Depth: 3}, open: func(t *testing.T) blk.Node {
			return image(t, t.TempDir(), size, file.Options{Direct: true, Align: 512, NoSync: true})
		}},
		{name: "buffered polling", opts: Options{PollMax: 50 * time.Microsecond}, open: func(t *testing.T) blk.Node {
			return image(t, t.TempDir(), size, file.Options{NoSync: true})
		}},
		{name: "slow", open: func(*testing.T) blk.Node { return blktest.NewMemory(size) }},
		{name: "pieces", opts: Options{Depth: 2}, open: func(t *testing.T) blk.Node {
			return newPieces(image(t, t.TempDir(), size, file.Options{NoSync: true}), 4096)
		}},
	} {
		for _, queues := range []int{1, 4} {
			t.Run(fmt.Sprintf("%s/%d", c.name, queues), func(t *testing.T) {
				n := c.open(t)
				c.opts.Discard, c.opts.Serial = true, "serial"
				s := serve(t, n, c.opts)
				d := s.dial(t, frontend.Options{Queues: queues})
				ls := loads(t, d, size, max(c.align, 512), 192<<10, 8)
				var wg sync.WaitGroup
				for _, l := range ls {
					wg.Go(func() {
						for i := 0; i < 100 && l.step(); i++ {
						}
					})
				}
				wg.Wait()
				if id, err := d.GetID(); id != "serial" || err != nil {
					t.Errorf("serial %q, error %v", id, err)
				}
				if _, err := d.Stop(); err != nil {
					t.Error(err)
				}
				st := s.dev.Stats()
				if st.Errors != 0 || st.Reads == 0 || st.Writes == 0 || st.Flushes == 0 || st.Others == 0 || st.BytesRead == 0 || st.BytesWritten == 0 {
					t.Errorf("%+v", st)
				}
				check(t, n, ls)
				if p, ok := n.(*pieces); ok {
					for _, l := range ls {
						for off := int64(0); off < int64(len(l.model)); off += 4096 {
							if !bytes.Equal(l.model[off:][:4096], make([]byte, 4096)) && !p.log.Any(l.off+off, 4096) {
								t.Fatalf("the change at %d was not logged", l.off+off)
							}
						}
					}
				}
			})
		}
	}
}

// A write through an extent with a log marks it before it is acknowledged, also if it fails.
func TestLog(t *testing.T) {
	const size = 1 << 20
	n := newPieces(image(t, t.TempDir(), size, file.Options{}), 4096)
	n.used.Set(0, size)
	d := serve(t, n, Options{}).dial(t, frontend.Options{})
	if _, err := d.WriteAt(make([]byte, 8192), 4096+512); err != nil {
		t.Fatal(err)
	}
	for i, want := range []bool{false, true, true, true, false} {
		if n.log.Any(int64(i)*4096, 4096) != want {
			t.Errorf("piece %d: marked %v", i, !want)
		}
	}
	if _, err := d.ReadAt(make([]byte, 4096), 64<<10); err != nil || n.log.Any(64<<10, 4096) {
		t.Errorf("a read was logged, error %v", err)
	}
	if n.child.(*raw.Node).Close() != nil { // writes fail from now on
		t.Fatal("close")
	}
	if _, err := d.WriteAt(make([]byte, 4096), 128<<10); !errors.Is(err, frontend.ErrIO) || !n.log.Any(128<<10, 4096) {
		t.Errorf("a failed write: %v, marked %v", err, n.log.Any(128<<10, 4096))
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		name          string
		opts          Options
		with, without uint64
		want          frontend.Config
	}{
		{
			name: "default", opts: Options{Discard: true},
			with: frontend.FeatureFlush | frontend.FeatureConfigWCE | frontend.FeatureDiscard | frontend.FeatureWriteZeroes |
				frontend.FeatureMQ | frontend.FeatureIndirect | frontend.FeatureEventIdx | frontend.FeatureVersion1,
			without: frontend.FeatureRO,
			want:    frontend.Config{BlkSize: 512, WCE: true, NumQueues: 4, MaxDiscardSectors: 1 << 21, MaxDiscardSeg: 16, DiscardAlignment: 1},
		},
		{
			name: "4k", opts: Options{Discard: true, BlockSize: 4096, Queues: 2},
			want: frontend.Config{BlkSize: 4096, WCE: true, NumQueues: 2, MaxDiscardSectors: 1 << 21, MaxDiscardSeg: 16, DiscardAlignment: 8},
		},
		{
			name: "no discard", without: frontend.FeatureDiscard, with: frontend.FeatureWriteZeroes,
			want: frontend.Config{BlkSize: 512, WCE: true, NumQueues: 4},
		},
		{
			name: "read-only", opts: Options{ReadOnly: true, Discard: true}, with: frontend.FeatureRO | frontend.FeatureFlush,
			without: frontend.FeatureDiscard | frontend.FeatureWriteZeroes | frontend.FeatureConfigWCE,
			want:    frontend.Config{BlkSize: 512, NumQueues: 4, MaxDiscardSectors: 1 << 21, MaxDiscardSeg: 16, DiscardAlignment: 1},
		},
		{
			name: "write-through", opts: Options{WriteThrough: true}, with: frontend.FeatureFlush, without: frontend.FeatureConfigWCE,
			want: frontend.Config{BlkSize: 512, NumQueues: 4},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, blktest.NewMemory(12<<20), c.opts)
			d := s.dial(t, frontend.Options{})
			f, _ := d.Features()
			if f&c.with != c.with || f&c.without != 0 {
				t.Errorf("features %#x, want %#x and not %#x", f, c.with, c.without)
			}
			got, err := d.Config()
			if err != nil {
				t.Fatal(err)
			}
			c.want.Capacity, c.want.SizeMax, c.want.SegMax = 12<<20/512, 4<<20, 126
			c.want.MaxWriteZeroesSectors, c.want.MaxWriteZeroesSeg, c.want.WriteZeroesMayUnmap = 1<<21, 16, true
			if got != c.want {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
			s.dev.SetSize(13 << 20)
			if got, err := d.Config(); err != nil || got.Size() != 13<<20 {
				t.Errorf("after SetSize: %d, error %v", got.Size(), err)
			}
		})
	}
}

func TestSetConfig(t *testing.T) {
	d := New(blk.NewGraph(blktest.NewMemory(1<<20)), 1<<20, defaults(Options{}))
	for _, c := range []struct {
		off uint32
		b   []byte
		ok  bool
	}{
		{32, []byte{0}, true},
		{32, []byte{1}, true},
		{32, []byte{2}, false},
		{32, []byte{1, 0}, false},
		{32, nil, false},
		{0, []byte{1}, false},
		{33, []byte{1}, false},
		{1 << 31, []byte{1}, false},
	} {
		if err := d.SetConfig(c.off, c.b); (err == nil) != c.ok {
			t.Errorf("offset %d, %v: %v", c.off, c.b, err)
		}
	}
}

// submit runs one request and waits for it.
func submit(t *testing.T, d *frontend.Disk, queue int, r *frontend.Request) *frontend.Request {
	t.Helper()
	done := make(chan struct{})
	r.Done = func(*frontend.Request) { close(done) }
	if err := d.Queue(queue).Submit(r); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("no answer")
	}
	return r
}

// rangeBytesOf encodes ranges of a discard or write-zeroes request: sector, sectors, flags.
func rangeBytesOf(ranges ...[3]uint64) []byte {
	b := make([]byte, 16*len(ranges))
	for i, r := range ranges {
		copy(b[16*i:], le64(r[0]))
		copy(b[16*i+8:], le64(r[1]|r[2]<<32))
	}
	return b
}

func le64(v uint64) []byte {
	return []byte{byte(v), byte(v >> 8), byte(v >> 16), byte(v >> 24), byte(v >> 32), byte(v >> 40), byte(v >> 48), byte(v >> 56)}
}

func TestStatus(t *testing.T) {
	const (
		ok, ioErr, unsupp = frontend.StatusOK, frontend.StatusIOErr, frontend.StatusUnsupp

		in, out, flush, id, discard, zeroes = frontend.TypeIn, frontend.TypeOut, frontend.TypeFlush, frontend.TypeGetID, frontend.TypeDiscard, frontend.TypeWriteZeroes

		sectors = 2048 // of the disk
	)
	many := func(n int) (rs [][3]uint64) {
		for i := range n {
			rs = append(rs, [3]uint64{uint64(i), 1, 0})
		}
		return rs
	}
	type request struct {
		name   string
		typ    uint32
		sector uint64
		n      uint32 // bytes of data
		ranges []byte // instead
		want   byte
		writes bool // the disk may change
	}
	for _, c := range []struct {
		name     string
		opts     Options
		features uint64 // not accepted
		reqs     []request
	}{
		{"512", Options{Discard: true}, 0, []request{
			{name: "read", typ: in, n: 512, want: ok},
			{name: "last sector", typ: in, sector: sectors - 1, n: 512, want: ok},
			{name: "empty read", typ: in, want: ok},
			{name: "read past the end", typ: in, sector: sectors, n: 512, want: ioErr},
			{name: "read over the end", typ: in, sector: sectors - 1, n: 1024, want: ioErr},
			{name: "sector overflow to 0", typ: in, sector: 1 << 55, n: 512, want: ioErr},
			{name: "sector overflow to negative", typ: in, sector: 1 << 54, n: 512, want: ioErr},
			{name: "end overflow", typ: in, sector: 1<<54 - 1, n: 1024, want: ioErr},
			{name: "largest sector", typ: in, sector: 1<<64 - 1, n: 512, want: ioErr},
			{name: "read of 511", typ: in, n: 511, want: ioErr},
			{name: "read of 513", typ: in, n: 513, want: ioErr},
			{name: "write", typ: out, n: 512, want: ok, writes: true},
			{name: "empty write", typ: out, want: ok},
			{name: "write past the end", typ: out, sector: sectors, n: 512, want: ioErr},
			{name: "write over the end", typ: out, sector: sectors - 1, n: 1024, want: ioErr},
			{name: "write overflow", typ: out, sector: 1 << 55, n: 512, want: ioErr},
			{name: "write of 100", typ: out, n: 100, want: ioErr},
			{name: "flush", typ: flush, want: ok},
			{name: "serial", typ: id, n: 20, want: ok},
			{name: "short serial", typ: id, n: 3, want: ok},
			{name: "unknown type", typ: 0x1234, n: 512, want: unsupp},
			{name: "SCSI command", typ: 2, n: 512, want: unsupp},
			{name: "zone report", typ: 16, n: 512, want: unsupp},
			{name: "discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: ok, writes: true},
			{name: "16 discards", typ: discard, ranges: rangeBytesOf(many(16)...), want: ok, writes: true},
			{name: "17 discards", typ: discard, ranges: rangeBytesOf(many(17)...), want: unsupp},
			{name: "1000 discards", typ: discard, ranges: rangeBytesOf(many(1000)...), want: unsupp},
			{name: "empty discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 0, 0}), want: ok},
			{name: "no range", typ: discard, want: ioErr},
			{name: "half a range", typ: discard, n: 8, want: ioErr},
			{name: "discard with unmap", typ: discard, ranges: rangeBytesOf([3]uint64{0, 8, 1}), want: unsupp},
			{name: "discard with reserved flags", typ: discard, ranges: rangeBytesOf([3]uint64{0, 8, 2}), want: unsupp},
			{name: "discard past the end", typ: discard, ranges: rangeBytesOf([3]uint64{sectors, 1, 0}), want: ioErr},
			{name: "discard overflow", typ: discard, ranges: rangeBytesOf([3]uint64{1<<64 - 1, 8, 0}), want: ioErr},
			{name: "discard overflow to 0", typ: discard, ranges: rangeBytesOf([3]uint64{1 << 55, 8, 0}), want: ioErr},
			{name: "long discard", typ: discard, ranges: rangeBytesOf([3]uint64{0, 1<<32 - 1, 0}), want: ioErr},
			{name: "good and bad range", typ: discard, ranges: rangeBytesOf([3]uint64{1024, 8, 0}, [3]uint64{sectors, 8, 0}), want: ioErr},
			{name: "good range and flags", typ: zeroes, ranges: rangeBytesOf([3]uint64{1024, 8, 0}, [3]uint64{0, 8, 4}), want: unsupp},
			{name: "zeroes", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: ok, writes: true},
			{name: "zeroes with unmap", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 1}), want: ok, writes: true},
			{name: "zeroes with reserved flags", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 1 << 31}), want: unsupp},
			{name: "zeroes over the end", typ: zeroes, ranges: rangeBytesOf([3]uint64{sectors - 1, 2, 0}), want: ioErr},
			{name: "17 zeroes", typ: zeroes, ranges: rangeBytesOf(many(17)...), want: unsupp},
		}},
		{"4096", Options{Discard: true, BlockSize: 4096}, 0, []request{
			{name: "read", typ: in, sector: 8, n: 4096, want: ok},
			{name: "sector inside a block", typ: in, sector: 1, n: 4096, want: ioErr},
			{name: "part of a block", typ: in, sector: 8, n: 512, want: ioErr},
			{name: "write", typ: out, sector: 8, n: 8192, want: ok, writes: true},
			{name: "write inside a block", typ: out, sector: 12, n: 4096, want: ioErr},
			{name: "write part of a block", typ: out, n: 4096 + 512, want: ioErr},
			{name: "discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: ok, writes: true},
			{name: "misaligned discard", typ: discard, ranges: rangeBytesOf([3]uint64{4, 8, 0}), want: ioErr},
			{name: "short discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 1, 0}), want: ioErr},
			{name: "misaligned zeroes", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 9, 0}), want: ioErr},
		}},
		{"not negotiated", Options{Discard: true}, frontend.FeatureDiscard | frontend.FeatureWriteZeroes, []request{
			{name: "discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: unsupp},
			{name: "zeroes", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: unsupp},
		}},
		{"no discard", Options{}, 0, []request{
			{name: "discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: unsupp},
			{name: "zeroes", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 1}), want: ok, writes: true},
		}},
		{"read-only", Options{ReadOnly: true, Discard: true}, 0, []request{
			{name: "read", typ: in, n: 4096, want: ok},
			{name: "flush", typ: flush, want: ok},
			{name: "write", typ: out, n: 512, want: ioErr},
			{name: "discard", typ: discard, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: unsupp},
			{name: "zeroes", typ: zeroes, ranges: rangeBytesOf([3]uint64{8, 8, 0}), want: unsupp},
		}},
	} {
		for _, kind := range []string{"fast", "slow"} {
			t.Run(c.name+"/"+kind, func(t *testing.T) {
				var n blk.Node
				rng := rand.New(rand.NewPCG(1, 2))
				contents := randomBytes(rng, sectors*512)
				if kind == "slow" {
					n = blktest.NewMemory(sectors * 512)
				} else {
					n = image(t, t.TempDir(), sectors*512, file.Options{NoSync: true})
				}
				r := &blk.Request{Op: blk.OpWrite, Len: int64(len(contents)), Data: blk.BytesVec(nil, contents)}
				if err := blk.Do(blk.NewTask(), n, r); err != nil {
					t.Fatal(err)
				}
				if c.opts.ReadOnly {
					n = readOnly{n}
				}
				s := serve(t, n, c.opts)
				d := s.dial(t, frontend.Options{Features: frontend.AllFeatures &^ c.features})
				gpa, err := d.Alloc(32 << 10)
				if err != nil {
					t.Fatal(err)
				}
				buf, err := d.Memory().Bytes(gpa, 32<<10)
				if err != nil {
					t.Fatal(err)
				}
				read := func() []byte {
					b := make([]byte, len(contents))
					r := &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
					if err := blk.Do(blk.NewTask(), n, r); err != nil {
						t.Fatal(err)
					}
					return b
				}
				for _, q := range c.reqs {
					before := read()
					clear(buf)
					copy(buf, q.ranges)
					r := &frontend.Request{Type: q.typ, Sector: q.sector}
					if l := max(q.n, uint32(len(q.ranges))); l > 0 {
						r.Data = []virtq.Buf{{GPA: gpa, Len: l}}
					}
					if submit(t, d, 0, r); r.Status != q.want {
						t.Errorf("%s: status %d, want %d", q.name, r.Status, q.want)
					}
					if changed := !bytes.Equal(before, read()); changed && !q.writes {
						t.Errorf("%s: changed the disk", q.name)
					}
				}
			})
		}
	}
}

// readOnly is a node that was opened for reading only, and trips over a change that reaches it all the same.
type readOnly struct{ blk.Node }

func (n readOnly) Info() *blk.Info { in := *n.Node.Info(); in.ReadOnly = true; return &in }

func (n readOnly) Do(t *blk.Task, r *blk.Request) error {
	if r.Op.Changes() {
		panic("a change of a read-only disk")
	}
	return n.Node.Do(t, r)
}

// sink is a large disk that takes all changes and keeps their flags.
type sink struct{ *spy }

func (s sink) Info() *blk.Info { in := *s.Node.Info(); in.Size = 1 << 40; return &in }

func (s sink) Do(_ *blk.Task, r *blk.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flags[r.Op] = append(s.flags[r.Op], r.Flags)
	return nil
}

// The largest range that is offered is taken and a larger one is not, and space is given back to the host only if the user
// lets the guest do that.
func TestRanges(t *testing.T) {
	const most = 1 << 30 / 512
	for _, discard := range []bool{true, false} {
		n := sink{&spy{Node: blktest.NewMemory(1 << 20), flags: map[blk.Op][]blk.Flags{}}}
		d := serve(t, n, Options{Discard: discard}).dial(t, frontend.Options{})
		gpa, err := d.Alloc(512)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			sectors, flags uint64
			want           byte
		}{{most, 0, frontend.StatusOK}, {most, 1, frontend.StatusOK}, {most + 1, 0, frontend.StatusIOErr}, {1<<32 - 1, 1, frontend.StatusIOErr}} {
			b, err := d.Memory().Bytes(gpa, 16)
			if err != nil {
				t.Fatal(err)
			}
			copy(b, rangeBytesOf([3]uint64{0, c.sectors, c.flags}))
			r := submit(t, d, 0, &frontend.Request{Type: frontend.TypeWriteZeroes, Data: []virtq.Buf{{GPA: gpa, Len: 16}}})
			if r.Status != c.want {
				t.Errorf("%d sectors: status %d, want %d", c.sectors, r.Status, c.want)
			}
		}
		want := []blk.Flags{0, blk.Unmap}
		if !discard {
			want[1] = 0
		}
		if got := n.take(blk.OpWriteZeroes); !slices.Equal(got, want) {
			t.Errorf("discard %v: flags %v, want %v", discard, got, want)
		}
	}
}

// One error of the block layer, one status.
func TestStatusOf(t *testing.T) {
	for _, c := range []struct {
		err  error
		want byte
	}{
		{nil, statusOK},
		{blk.ErrNotSupported, statusUnsupp},
		{&blk.OpError{Err: blk.ErrNotSupported}, statusUnsupp},
		{fmt.Errorf("x: %w", unix.EOPNOTSUPP), statusUnsupp},
		{blk.ErrRange, statusIOErr},
		{blk.ErrReadOnly, statusIOErr},
		{unix.ENOSPC, statusIOErr},
		{errors.New("anything"), statusIOErr},
	} {
		if got := status(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

// ring drives a queue of a disk with Options.Manual, descriptor by descriptor.
type ring struct {
	*testing.T
	q    *frontend.Queue
	drv  *virtq.Driver
	kick int
	call int
}

func newRing(t *testing.T, d *frontend.Disk, queue int) *ring {
	r := &ring{T: t, q: d.Queue(queue), drv: d.Queue(queue).Driver()}
	r.kick, r.call, _ = r.q.FDs()
	return r
}

func (r *ring) add(out, in []virtq.Buf, indirect bool) (head uint16) {
	r.Helper()
	head, err := r.drv.AddChain(out, in, indirect)
	if err != nil {
		r.Fatal(err)
	}
	return head
}

func (r *ring) publish() {
	if r.drv.Publish() {
		loop.Signal(r.kick)
	}
}

// wait waits for a completion.
func (r *ring) wait() (head uint16, written uint32) {
	r.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		if head, written, ok := r.drv.PopUsed(); ok {
			return head, written
		}
		if err := r.drv.Err(); err != nil {
			r.Fatal(err)
		}
		if r.drv.EnableInterrupts() {
			continue
		}
		if !waitFD(r.call, time.Until(end)) {
			r.Fatal("no answer")
		}
	}
}

// waitFD takes an event from an eventfd; false: none came in time.
func waitFD(fd int, d time.Duration) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for end := time.Now().Add(d); ; {
		n, err := unix.Poll(p, max(int(time.Until(end).Milliseconds()), 0))
		if err == unix.EINTR { //nolint:errorlint // unix returns the bare errno
			continue
		}
		if n == 1 {
			var b [8]byte
			_, _ = unix.Read(fd, b[:])
		}
		return n == 1
	}
}

// cut divides n bytes at gpa into buffers of the given lengths, which make up n.
func cut(t *testing.T, gpa uint64, n int, lens []int) (bufs []virtq.Buf) {
	t.Helper()
	for _, l := range lens {
		bufs = append(bufs, virtq.Buf{GPA: gpa, Len: uint32(l)})
		gpa += uint64(l)
		n -= l
	}
	if n != 0 {
		t.Fatalf("%v leaves %d", lens, n)
	}
	return bufs
}

func TestLayouts(t *testing.T) {
	const size = 1 << 20
	ones := func(n int) (v []int) {
		for range n {
			v = append(v, 1)
		}
		return v
	}
	for _, kind := range []string{"tmpfs", "direct", "slow"} {
		t.Run(kind, func(t *testing.T) {
			var n blk.Node
			switch kind {
			case "tmpfs":
				n = image(t, tmpfs(t), size, file.Options{})
			case "direct":
				n = image(t, t.TempDir(), size, file.Options{Direct: true, Align: 512, NoSync: true})
			case "slow":
				n = blktest.NewMemory(size)
			}
			s := serve(t, n, Options{Serial: "0123456789abcdefghij", Discard: true})
			d := s.dial(t, frontend.Options{Manual: true})
			r := newRing(t, d, 0)
			gpa, err := d.Alloc(64 << 10)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := d.Memory().Bytes(gpa, 64<<10)
			if err != nil {
				t.Fatal(err)
			}
			outMem, inMem := mem[:32<<10], mem[32<<10:]
			rng := rand.New(rand.NewPCG(3, 4))
			// do lays header and data, and status behind room for an answer, and cuts both at will.
			do := func(typ uint32, sector uint64, data []byte, outCut, inCut []int, indirect bool) (status byte, answer []byte, written uint32) {
				t.Helper()
				copy(outMem, le64(uint64(typ)))
				copy(outMem[8:], le64(sector))
				copy(outMem[16:], data)
				var room int
				for _, l := range inCut {
					room += l
				}
				for i := range inMem {
					inMem[i] = 0xee
				}
				head := r.add(cut(t, gpa, 16+len(data), outCut), cut(t, gpa+32<<10, room, inCut), indirect)
				r.publish()
				got, written := r.wait()
				if got != head {
					t.Fatalf("head %d came back, want %d", got, head)
				}
				if written != uint32(room) {
					t.Errorf("%d bytes written, want %d", written, room)
				}
				if inMem[room] != 0xee {
					t.Error("something was written past the status")
				}
				return inMem[room-1], inMem[:room-1], written
			}
			for _, indirect := range []bool{false, true} {
				for i, outCut := range [][]int{
					{16, 1024},
					{8, 8, 1024},
					{1, 15, 512, 512},
					{1040},
					{20, 1020},
					{15, 1025},
					{528, 512},
					{16, 1, 1023},
					{3, 3, 3, 3, 3, 1020, 5},
					append(ones(40), 1000),
					{16, 512, 512},
				} {
					for _, inCut := range [][]int{{1}, {3}, {1, 1}} {
						want := randomBytes(rng, 1024)
						if st, _, _ := do(typeOut, uint64(i), want, outCut, inCut, indirect); st != statusOK {
							t.Errorf("write %v %v: status %d", outCut, inCut, st)
						}
						got := make([]byte, 1024)
						req := &blk.Request{Op: blk.OpRead, Off: int64(i) * 512, Len: 1024, Data: blk.BytesVec(nil, got)}
						if err := blk.Do(blk.NewTask(), n, req); err != nil || !bytes.Equal(got, want) {
							// A writable part of more than a byte has its status at the end.
							t.Errorf("write %v %v: wrong bytes, error %v", outCut, inCut, err)
						}
						for _, inCut := range [][]int{
							{1024, 1}, {1025}, {512, 513}, {1, 1024}, {1000, 25}, {1, 1023, 1}, {512, 512, 1}, append(ones(25), 1000),
						} {
							for _, outCut := range [][]int{{16}, {8, 8}, {1, 15}} {
								st, got, _ := do(typeIn, uint64(i), nil, outCut, inCut, indirect)
								if st != statusOK || !bytes.Equal(got, want) {
									t.Fatalf("read %v %v: status %d, wrong bytes: %v", outCut, inCut, st, !bytes.Equal(got, want))
								}
							}
						}
					}
				}
				for _, c := range []struct {
					inCut []int
					want  string
				}{
					{[]int{20, 1}, "0123456789abcdefghij"},
					{[]int{21}, "0123456789abcdefghij"},
					{[]int{5, 1}, "01234"},
					{[]int{1, 5}, "01234"},
					{[]int{22, 1}, "0123456789abcdefghij\xee\xee"},
					{[]int{1}, ""},
				} {
					if st, got, _ := do(typeGetID, 0, nil, []int{16}, c.inCut, indirect); st != statusOK || string(got) != c.want {
						t.Errorf("serial %v: status %d, %q", c.inCut, st, got)
					}
				}
				zero := rangeBytesOf([3]uint64{100, 2, 0}, [3]uint64{104, 1, 0})
				for _, outCut := range [][]int{{16, 32}, {48}, {17, 31}, {16, 16, 16}, {16, 20, 12}, ones(48)} {
					do(typeOut, 100, randomBytes(rng, 2560), []int{16, 2560}, []int{1}, indirect)
					if st, _, _ := do(typeWriteZeroes, 0, zero, outCut, []int{1}, indirect); st != statusOK {
						t.Errorf("zeroes %v: status %d", outCut, st)
					}
					_, got, _ := do(typeIn, 100, nil, []int{16}, []int{2561}, indirect)
					for i, b := range got {
						if (b == 0) != (i < 1024 || i >= 2048) {
							t.Fatalf("zeroes %v: byte %d is %#x", outCut, i, b)
						}
					}
				}
				// A short header is an error, and so is none at all.
				copy(outMem, make([]byte, 16))
				for _, out := range [][]virtq.Buf{{{GPA: gpa, Len: 15}}, nil} {
					inMem[0] = 0xee
					r.add(out, []virtq.Buf{{GPA: gpa + 32<<10, Len: 1}}, indirect)
					r.publish()
					if _, written := r.wait(); written != 1 || inMem[0] != statusIOErr {
						t.Errorf("header %v: status %d, %d written", out, inMem[0], written)
					}
				}
				// No place for a status: nothing is done, and nothing written.
				before := make([]byte, 1024)
				req := &blk.Request{Op: blk.OpRead, Len: 1024, Data: blk.BytesVec(nil, before)}
				if err := blk.Do(blk.NewTask(), n, req); err != nil {
					t.Fatal(err)
				}
				copy(outMem, append(le64(typeOut), make([]byte, 1024+8)...))
				r.add([]virtq.Buf{{GPA: gpa, Len: 16 + 1024}}, nil, indirect)
				r.publish()
				if _, written := r.wait(); written != 0 {
					t.Errorf("without a writable byte: %d written", written)
				}
				after := make([]byte, 1024)
				req.Data = blk.BytesVec(nil, after)
				if err := blk.Do(blk.NewTask(), n, req); err != nil || !bytes.Equal(before, after) {
					t.Errorf("without a writable byte: the disk changed, error %v", err)
				}
			}
		})
	}
}
