// SPDX-License-Identifier: Apache-2.0

package addcow_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/raw"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// stale is what is in an image file before anything of the disk is: never what the disk shows.
func stale(n int64) []byte { return bytes.Repeat([]byte{0xee}, int(n)) }

func random(rng *rand.Rand, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(1 + rng.IntN(200))
	}
	return b
}

func memory(t testing.TB, b []byte) *blktest.Memory {
	t.Helper()
	m := blktest.NewMemory(int64(len(b)))
	write(t, m, 0, b)
	return m
}

func write(t testing.TB, n blk.Node, off int64, b []byte) {
	t.Helper()
	must(t, blk.Do(blk.NewTask(), n, writeOf(off, b)))
}

func writeOf(off int64, b []byte) *blk.Request {
	return &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
}

func contents(t testing.TB, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	must(t, blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}))
	return b
}

func flush(t testing.TB, n blk.Node) {
	t.Helper()
	must(t, blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}))
}

func create(t testing.TB, storage blk.Node, size, cluster int64) {
	t.Helper()
	must(t, addcow.Create(blk.NewTask(), storage, size, addcow.CreateOptions{
		BackingFile: "base", BackingFormat: "raw", ImageFile: "image", ImageFormat: "raw", ClusterSize: cluster,
	}))
}

func open(t testing.TB, storage blk.Node, o addcow.Options) *addcow.Node {
	t.Helper()
	n, err := addcow.Open(blk.NewTask(), storage, o)
	must(t, err)
	return n
}

// image is a fresh image in memory over base.
func image(t testing.TB, size, cluster int64, base blk.Node) *addcow.Node {
	t.Helper()
	storage := blktest.NewMemory(0)
	create(t, storage, size, cluster)
	return open(t, storage, addcow.Options{Name: "a", Image: memory(t, stale(size)), Backing: base})
}

// shown is what a disk of size bytes shows of a backing image.
func shown(base []byte, size int64) []byte {
	b := make([]byte, size)
	copy(b, base)
	return b
}

func TestConformance(t *testing.T) {
	base := random(rand.New(rand.NewPCG(1, 2)), blktest.DefaultSize)
	for _, c := range []struct {
		name    string
		base    int64
		cluster int64
	}{
		{"", blktest.DefaultSize, 64 << 10}, {"short base", 1<<20 + 512, 4096}, {"long base", blktest.DefaultSize + 8<<10, 2 << 20}, {"no base", 0, 64 << 10},
	} {
		var back blk.Node
		if c.base > 0 {
			back = memory(t, append(bytes.Clone(base), base...)[:c.base])
		}
		t.Run("memory "+c.name, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node { return image(t, size, c.cluster, back) },
				blktest.Options{Contents: shown(base[:min(c.base, int64(len(base)))], blktest.DefaultSize)})
		})
	}
	for _, direct := range []bool{false, true} {
		t.Run(fmt.Sprint("file, direct ", direct), func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				dir := t.TempDir()
				at := func(name string, b []byte, o file.Options) *file.Node {
					o.Direct = direct
					must(t, os.WriteFile(filepath.Join(dir, name), b, 0o600))
					f, err := file.Open(filepath.Join(dir, name), o)
					must(t, err)
					return f
				}
				back := raw.Open(at("base", base, file.Options{ReadOnly: true}))
				t.Cleanup(func() { must(t, back.Close()) })
				storage := at("a", nil, file.Options{Grows: true, Align: 512})
				create(t, storage, size, 64<<10)
				return open(t, storage, addcow.Options{
					Name: "a", Image: raw.Open(at("image", stale(size), file.Options{Align: 512})), Backing: back,
				})
			}, blktest.Options{Contents: base, Align: 512})
		})
	}
}

// The file is what the specification says, byte by byte.
func TestFormat(t *testing.T) {
	for _, cluster := range []int64{4096, 64 << 10} {
		storage := blktest.NewMemory(0)
		size := 9*cluster + 512
		create(t, storage, size, cluster)
		img := memory(t, stale(size))
		n := open(t, storage, addcow.Options{Image: img})
		write(t, n, 3*cluster+512, []byte{1})
		write(t, n, 8*cluster, random(rand.New(rand.NewPCG(1, 1)), 2*512))
		write(t, n, 9*cluster, []byte{1})
		b, le := storage.Bytes(), binary.LittleEndian
		if int64(len(b)) != 2*cluster || string(b[:4]) != "ACOW" || le.Uint32(b[40:]) != uint32(cluster) || int64(1)<<le.Uint32(b[20:]) != cluster ||
			!bytes.Equal(b[44:60], append([]byte("raw"), make([]byte, 13)...)) || !bytes.Equal(b[60:76], b[44:60]) || le.Uint64(b[24:]) != 0 {
			t.Errorf("the header is %q, the file has %d bytes", b[:90], len(b))
		}
		if at := le.Uint32(b[4:]); string(b[at:at+le.Uint32(b[8:])]) != "base" {
			t.Errorf("the backing file's name: %q", b[:90])
		}
		if at := le.Uint32(b[12:]); string(b[at:at+le.Uint32(b[16:])]) != "image" {
			t.Errorf("the image file's name: %q", b[:90])
		}
		want := make([]byte, cluster)
		want[0], want[1] = 1<<3, 3
		if !bytes.Equal(b[cluster:], want) {
			t.Errorf("the bitmap is %x", b[cluster:cluster+8])
		}
	}
}

func TestBadHeaders(t *testing.T) {
	le := binary.LittleEndian
	storage := blktest.NewMemory(0)
	create(t, storage, 1<<20, 4096)
	for name, c := range map[string]struct {
		want   error
		says   string
		change func(b []byte)
	}{
		"magic":           {addcow.ErrFormat, "ACOW", func(b []byte) { b[0] = 'Q' }},
		"feature":         {addcow.ErrFeature, "bit 5, 63", func(b []byte) { le.PutUint64(b[24:], 1<<5|1<<63) }},
		"small clusters":  {addcow.ErrFormat, "clusters of 11", func(b []byte) { le.PutUint32(b[20:], 11) }},
		"large clusters":  {addcow.ErrFormat, "clusters of 4294967295", func(b []byte) { le.PutUint32(b[20:], 1<<32-1) }},
		"header size":     {addcow.ErrFormat, "header of 76", func(b []byte) { le.PutUint32(b[40:], 76) }},
		"header behind":   {addcow.ErrFormat, "in a file of", func(b []byte) { le.PutUint32(b[40:], 2<<20) }},
		"name outside":    {addcow.ErrFormat, "image file's name", func(b []byte) { le.PutUint32(b[12:], 4095) }},
		"name wraps":      {addcow.ErrFormat, "backing file's name", func(b []byte) { le.PutUint32(b[4:], 1<<32-2) }},
		"name in fields":  {addcow.ErrFormat, "offset 20", func(b []byte) { le.PutUint32(b[4:], 20) }},
		"no image file":   {addcow.ErrFormat, "no image file", func(b []byte) { clear(b[12:20]) }},
		"no image format": {addcow.ErrFormat, "format", func(b []byte) { clear(b[60:76]) }},
		"same file":       {addcow.ErrFormat, "is the image file and the backing file", func(b []byte) { copy(b[12:20], b[4:12]) }},
	} {
		b := storage.Bytes()
		c.change(b)
		_, err := addcow.ReadHeader(blk.NewTask(), memory(t, b))
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	b := storage.Bytes()
	le.PutUint64(b[32:], 1<<40)
	if _, err := addcow.ReadHeader(blk.NewTask(), memory(t, b)); err != nil {
		t.Errorf("an unknown compatible feature: %v", err)
	}
	copy(b[44:], "sixteen letters!")
	if h, err := addcow.ReadHeader(blk.NewTask(), memory(t, b)); err != nil || h.BackingFormat != "sixteen letters!" {
		t.Errorf("a format without a NUL: %+v, %v", h, err)
	}
	_, err := addcow.Open(blk.NewTask(), storage, addcow.Options{Image: &huge{}})
	if !errors.Is(err, addcow.ErrFeature) || !strings.Contains(err.Error(), "larger clusters") {
		t.Errorf("a disk that needs a bitmap of too many bytes: %v", err)
	}
}

type huge struct{ blktest.Memory }

func (*huge) Info() *blk.Info { return &blk.Info{Size: 1<<63 - 512, Align: 1} }

// FuzzOpen: whatever is in the file, opening and using it neither panics nor asks for much.
func FuzzOpen(f *testing.F) {
	for _, cluster := range []int64{4096, 64 << 10} {
		storage := blktest.NewMemory(0)
		create(f, storage, 300<<10, cluster)
		f.Add(storage.Bytes()[:8192])
	}
	base, img := memory(f, stale(100<<10)), memory(f, stale(300<<10))
	f.Fuzz(func(t *testing.T, b []byte) {
		if b = b[:len(b)/512*512]; len(b) == 0 || len(b) > 1<<20 {
			return // no file that a storage could be
		}
		storage := memory(t, b)
		task := blk.NewTask()
		_, _ = addcow.Check(task, storage, img.Info().Size, false)
		n, err := addcow.Open(task, storage, addcow.Options{Image: img, Backing: base})
		if err != nil {
			return
		}
		contents(t, n)
		write(t, n, 70000, []byte{1, 2, 3})
		flush(t, n)
		want := contents(t, n)
		r, err := addcow.Check(task, storage, img.Info().Size, true)
		must(t, err)
		if len(r.Findings) > 0 && !r.Fixed {
			t.Errorf("not repaired: %+v", r)
		}
		if got := contents(t, open(t, storage, addcow.Options{Image: img, Backing: base})); !bytes.Equal(got, want) {
			t.Error("opened again it shows something else")
		}
	})
}

// Zeros over the backing image stay, and so does what was discarded there: whole clusters as zeros.
func TestNeverShowsTheBackingAgain(t *testing.T) {
	const cluster = 4096
	base := random(rand.New(rand.NewPCG(1, 2)), 8*cluster)
	for _, op := range []blk.Op{blk.OpWriteZeroes, blk.OpDiscard} {
		storage, img := blktest.NewMemory(0), memory(t, stale(8*cluster+512))
		create(t, storage, 8*cluster+512, cluster)
		o := addcow.Options{Image: img, Backing: memory(t, base)}
		n := open(t, storage, o)
		must(t, blk.Do(blk.NewTask(), n, &blk.Request{Op: op, Off: cluster + 512, Len: 5 * cluster}))
		want := shown(base, 8*cluster+512)
		from, to := cluster+512, 6*cluster+512
		if op == blk.OpDiscard {
			from, to = 2*cluster, 6*cluster // parts of clusters stay
		}
		clear(want[from:to])
		for range 2 {
			if !bytes.Equal(contents(t, n), want) {
				t.Errorf("%v: not what it should be", op)
			}
			must(t, blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpDiscard, Off: 2 * cluster, Len: 4 * cluster}))
			n = open(t, storage, o)
		}
	}
}

func TestFinish(t *testing.T) {
	const cluster = 4096
	storage, img := blktest.NewMemory(0), memory(t, stale(20*cluster+512))
	create(t, storage, 20*cluster+512, cluster)
	base := memory(t, random(rand.New(rand.NewPCG(1, 2)), 15*cluster))
	n := open(t, storage, addcow.Options{Image: img, Backing: base})
	f := cor.New(n, cluster, func(error) {})
	task := blk.NewTask()
	must(t, f.Pull(task, 0, 20*cluster, 2))
	if err := n.Finish(task); !errors.Is(err, addcow.ErrPartial) {
		t.Errorf("a cluster is missing: %v", err)
	}
	want := contents(t, n)
	must(t, f.Pull(task, 0, n.Info().Size, 2))
	must(t, n.Finish(task))
	if !bytes.Equal(img.Bytes(), want) {
		t.Error("the image file does not hold what the disk shows")
	}
	n = open(t, storage, addcow.Options{Image: img, Backing: base})
	write(t, n, 100, []byte("something"))
	copy(want[100:], "something")
	if h := n.Header(); !h.AllAllocated() || h.ImageFile != "image" || len(n.Children()) != 2 || !bytes.Equal(contents(t, n), want) {
		t.Errorf("finished: %+v", h)
	}
}

func TestCheck(t *testing.T) {
	const cluster = 4096
	storage := blktest.NewMemory(0)
	create(t, storage, 40000*cluster, cluster)
	img := blktest.NewMemory(40000 * cluster)
	n := open(t, storage, addcow.Options{Image: img})
	for _, i := range []int64{0, 7, 12, 39000} {
		write(t, n, i*cluster, []byte{1})
	}
	task := blk.NewTask()
	r, err := addcow.Check(task, storage, 40000*cluster, false)
	if err != nil || len(r.Findings) != 0 || r.Allocated != 4 || r.Clusters != 40000 || r.End != 3*cluster {
		t.Errorf("%+v, %v", r, err)
	}
	// The image file is shorter, and so is the bitmap than it would have to be for a longer one.
	for _, c := range []struct {
		clusters int64
		says     string
		left     int64
	}{{13, "1 bits are set for clusters behind the end", 3}, {8*cluster*2 + 1, "ends, 4096 bytes early", 3}} {
		if r, err = addcow.Check(task, storage, c.clusters*cluster, true); err != nil || !r.Fixed || len(r.Findings) != 1 ||
			!strings.Contains(r.Findings[0].What, c.says) || r.Allocated != c.left {
			t.Errorf("%+v, %v", r, err)
		}
		if r, err = addcow.Check(task, storage, c.clusters*cluster, false); err != nil || len(r.Findings) != 0 {
			t.Errorf("after the repair: %+v, %v", r, err)
		}
	}
}

// Writers, readers and a copier at once, with clusters in common and no sectors.
func TestConcurrent(t *testing.T) {
	for _, copying := range []bool{false, true} {
		testConcurrent(t, copying)
	}
}

func testConcurrent(t *testing.T, copying bool) {
	rng := blktest.Rand(t)
	const cluster, size, workers = 4096, 64*4096 + 1024, 4
	base := random(rng, size-5000)
	n := image(t, size, cluster, memory(t, base))
	f := cor.New(n, cluster, func(err error) { t.Error(err) })
	model := shown(base, size)
	var wg sync.WaitGroup
	for w := range workers {
		rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
		wg.Go(func() {
			task := blk.NewTask()
			for range 300 {
				off := (rng.Int64N(size/512/workers)*workers + int64(w)) * 512
				part := model[off : off+512]
				r := writeOf(off, part)
				var top blk.Node = f
				if !copying {
					top = n
				}
				switch rng.IntN(4) {
				case 0:
					r = &blk.Request{Op: blk.OpWriteZeroes, Off: off, Len: 512}
					clear(part)
				case 1:
					got := make([]byte, 512)
					r = &blk.Request{Op: blk.OpRead, Off: off, Len: 512, Data: blk.BytesVec(nil, got)}
					must(t, blk.Do(task, top, r))
					if !bytes.Equal(got, part) {
						t.Errorf("at %d: not what was written", off)
					}
					continue
				default:
					copy(part, random(rng, 512))
				}
				must(t, blk.Do(task, top, r))
			}
		})
	}
	wg.Go(func() {
		if !copying {
			return
		}
		for off := int64(0); off < size; off += 3 * cluster {
			must(t, f.Pull(blk.NewTask(), off, min(3*cluster, size-off), 2))
		}
	})
	wg.Wait()
	if !bytes.Equal(contents(t, n), model) {
		t.Error("not what was written")
	}
	if copying {
		must(t, n.Finish(blk.NewTask()))
	}
}

// Every I/O fails once, in the image file and in the bitmap. The guest's write fails then and may be repeated, nothing
// else is damaged, and what a later flush promises is there when the files are opened again.
func TestFaults(t *testing.T) {
	rng := blktest.Rand(t)
	const cluster, size = 4096, 40*4096 + 512
	base := random(rng, size)
	for _, inBitmap := range []bool{false, true} {
		for after := range 40 {
			storage, img := blktest.NewMemory(0), memory(t, stale(size))
			create(t, storage, size, cluster)
			fs, fi := blktest.NewFault(storage), blktest.NewFault(img)
			n := open(t, fs, addcow.Options{Image: fi, Backing: memory(t, base)})
			at := fi
			if inBitmap {
				at = fs
			}
			at.Add(blktest.Rule{After: after, Count: 1 + rng.IntN(2), Err: syscall.EIO})
			model, failed := bytes.Clone(base), 0
			for range 20 {
				off := rng.Int64N(size/512) * 512
				b := random(rng, min(512*(1+rng.Int64N(12)), size-off))
				for blk.Do(blk.NewTask(), n, writeOf(off, b)) != nil {
					failed++
				}
				copy(model[off:], b)
				for rng.IntN(3) == 0 && blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}) != nil {
					failed++
				}
			}
			for blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}) != nil {
				failed++
			}
			if after == 0 && failed == 0 {
				t.Error("nothing failed")
			}
			again := open(t, storage, addcow.Options{Image: img, Backing: memory(t, base)})
			if got := contents(t, again); failed > 4 || !bytes.Equal(got, model) {
				t.Fatalf("bitmap %v, after %d I/Os: %d errors, or opened again it differs", inBitmap, after, failed)
			}
		}
	}
}

// A write whose bit could not be stored counts as not done: its cluster shows the backing image, now and after the next
// write to the same block of the bitmap.
func TestFailedBitIsTakenBack(t *testing.T) {
	const cluster, size = 4096, 8 * 4096
	base := bytes.Repeat([]byte{7}, size)
	storage, img := blktest.NewMemory(0), memory(t, stale(size))
	create(t, storage, size, cluster)
	fs := blktest.NewFault(storage)
	n := open(t, fs, addcow.Options{Image: img, Backing: memory(t, base)})
	tr := fs.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, Err: syscall.EIO})
	if err := blk.Do(blk.NewTask(), n, writeOf(0, []byte{1})); !errors.Is(err, syscall.EIO) {
		t.Fatalf("the write: %v", err)
	}
	if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}); !errors.Is(err, syscall.EIO) {
		t.Fatalf("a flush while the bitmap is in doubt: %v", err)
	}
	tr.Remove()
	write(t, n, 5*cluster, []byte{2})
	base[5*cluster] = 2
	for _, n := range []blk.Node{n, open(t, storage, addcow.Options{Image: img, Backing: memory(t, bytes.Repeat([]byte{7}, size))})} {
		if !bytes.Equal(contents(t, n), base) {
			t.Error("it does not show the backing image")
		}
	}
}

// The caller writes to what the image file holds by itself, and knows when the bitmap is not durable yet.
func TestExtents(t *testing.T) {
	const cluster = 64 << 10
	dir := t.TempDir()
	at := func(name string) *file.Node {
		must(t, os.WriteFile(filepath.Join(dir, name), stale(4*cluster), 0o600))
		f, err := file.Open(filepath.Join(dir, name), file.Options{Grows: name == "a"})
		must(t, err)
		return f
	}
	storage, img, base := at("a"), at("image"), at("base")
	must(t, storage.Resize(blk.NewTask(), 0, true))
	create(t, storage, 4*cluster, cluster)
	n := open(t, storage, addcow.Options{Image: raw.Open(img), Backing: base})
	defer base.Close()
	defer n.Close()
	if _, ok := n.TryMap(blk.OpWrite, cluster, 512); ok {
		t.Error("an extent to write where the backing image shows")
	}
	if e, ok := n.TryMap(blk.OpRead, cluster, 2*cluster); !ok || e.Depth != 1 || e.Writable || e.Len != 2*cluster || filepath.Base(e.Host.Path) != "base" {
		t.Errorf("the backing image: %+v, %v", e, ok)
	}
	write(t, n, cluster+100, []byte{1})
	if e, ok := n.TryMap(blk.OpWrite, cluster+512, 2*cluster); !ok || !e.Unsynced || !e.Writable || e.Len != cluster-512 || filepath.Base(e.Host.Path) != "image" {
		t.Errorf("after a write: %+v, %v", e, ok)
	}
	if _, ok := n.TryMap(blk.OpFlush, 0, 0); ok {
		t.Error("one file is to be synced, and there are two")
	}
	flush(t, n)
	if e, ok := n.TryMap(blk.OpWrite, cluster+512, 512); !ok || e.Unsynced {
		t.Errorf("after a flush: %+v, %v", e, ok)
	}
	if e, ok := n.TryMap(blk.OpFlush, 0, 0); !ok || filepath.Base(e.Host.Path) != "image" {
		t.Errorf("what to sync: %+v, %v", e, ok)
	}
	if a := testing.AllocsPerRun(100, func() {
		n.TryMap(blk.OpRead, 0, 4*cluster)
		n.TryMap(blk.OpWrite, cluster, 512)
	}); a != 0 {
		t.Errorf("%v allocations", a)
	}
}
