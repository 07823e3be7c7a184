// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// qemu runs one of QEMU's tools and returns what it prints.
func qemu(t testing.TB, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(args[0])
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	out, err := exec.Command(path, args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// tempDir is a directory whose name means nothing to QEMU.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "blkstream-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// qemuImage makes an image of size bytes with qemu-img and options for -o, and returns its path.
func qemuImage(t testing.TB, size int64, options string) string {
	t.Helper()
	return qemuImageIn(t, tempDir(t), size, options)
}

// fresh has what qemu-img made, by its arguments: most tests want the same again.
var fresh sync.Map

func qemuImageIn(t testing.TB, dir string, size int64, options string) string {
	t.Helper()
	path := filepath.Join(dir, "image.qcow2")
	args := []string{"qemu-img", "create", "-q", "-f", "qcow2", "-o", strings.Trim("size="+fmt.Sprint(size)+","+options, ",")}
	key := strings.Join(args, " ")
	made, ok := fresh.Load(key)
	if !ok {
		qemu(t, append(args, path)...)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		made, _ = fresh.LoadOrStore(key, b)
	}
	if err := os.WriteFile(path, made.([]byte), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// intoMemory reads a file into a disk in memory.
func intoMemory(t *testing.T, path string) *blktest.Memory {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	m := blktest.NewMemory(roundUp(int64(len(b)), blk.SectorSize))
	fillDisk(t, m, b)
	return m
}

func fillDisk(t *testing.T, n blk.Node, b []byte) {
	t.Helper()
	if len(b) == 0 {
		return
	}
	mustDo(t, n, &blk.Request{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func mustDo(t *testing.T, n blk.Node, r *blk.Request) {
	t.Helper()
	if err := blk.Do(blk.NewTask(), n, r); err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, storage blk.Node, o Options) *Node {
	t.Helper()
	o.Ahead = true
	n, err := Open(blk.NewTask(), storage, o)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func mustClose(t testing.TB, n *Node) {
	t.Helper()
	if err := n.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func readAll(t *testing.T, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	mustDo(t, n, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	return b
}

func writeAt(t *testing.T, n blk.Node, off int64, b []byte) {
	t.Helper()
	mustDo(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func pattern(seed uint64, n int) []byte {
	rng := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32()) | 1
	}
	return b
}

// checkClean has qemu-img check an image. leaks: these are no failure.
func checkClean(t *testing.T, image []byte, leaks bool) {
	t.Helper()
	path := filepath.Join(tempDir(t), "check.qcow2")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("qemu-img", "check", path).CombinedOutput()
	var exit *exec.ExitError
	if leaks && errors.As(err, &exit) && exit.ExitCode() == 3 {
		return
	}
	if err != nil {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
}

// With these options, as for qemu-img create.
var variants = []struct{ name, options string }{
	{"default", ""},
	{"v2", "compat=0.10"},
	{"512", "cluster_size=512"},
	{"4k", "cluster_size=4k"},
	{"2M", "cluster_size=2M"},
	{"subclusters", "extended_l2=on"},
	{"subclusters16k", "extended_l2=on,cluster_size=16k"},
	{"counts1", "refcount_bits=1,cluster_size=4k"},
	{"counts2", "refcount_bits=2"},
	{"counts64", "refcount_bits=64,cluster_size=512"},
	{"lazy", "lazy_refcounts=on"},
	{"metadata", "preallocation=metadata,cluster_size=8k"},
	{"zstd", "compression_type=zstd"},
}

func TestConformance(t *testing.T) {
	for _, v := range variants {
		t.Run(v.name, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				m := intoMemory(t, qemuImage(t, size, v.options))
				t.Cleanup(func() { checkClean(t, m.Bytes(), false) })
				return mustOpen(t, m, Options{Name: "test"})
			})
		})
	}
}

func TestConformanceBacking(t *testing.T) {
	// Shorter than the image: zeros follow.
	contents := pattern(1, blktest.DefaultSize*2/3&^511)
	base := filepath.Join(tempDir(t), "base.raw")
	if err := os.WriteFile(base, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{"", "compat=0.10", "extended_l2=on", "cluster_size=4k"} {
		t.Run(options, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				m := intoMemory(t, qemuImage(t, size, "backing_fmt=raw,backing_file="+base+","+options))
				below := intoMemory(t, base)
				t.Cleanup(func() {
					checkClean(t, m.Bytes(), false)
					if !bytes.Equal(below.Bytes(), contents) {
						t.Error("the backing image was written")
					}
				})
				return mustOpen(t, m, Options{Name: "test", Backing: below})
			}, blktest.Options{Contents: contents})
		})
	}
}

// Compressed, shared and zeroed clusters as QEMU makes them.
func TestConformanceContents(t *testing.T) {
	const size = blktest.DefaultSize
	contents := pattern(2, size)
	for i := range contents {
		contents[i] &= 0x0f // something to compress
	}
	clear(contents[300<<10 : 500<<10])
	raw := filepath.Join(tempDir(t), "contents.raw")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, options, compress, snapshot string }{
		{"deflate", "cluster_size=64k", "-c", ""},
		{"deflate v2", "compat=0.10,cluster_size=4k", "-c", ""},
		{"zstd", "compression_type=zstd,cluster_size=16k", "-c", ""},
		{"subclusters", "extended_l2=on", "-c", ""},
		{"snapshot", "cluster_size=8k", "", "one"},
		{"snapshot of compressed", "cluster_size=8k", "-c", "one"},
		{"snapshot with subclusters", "extended_l2=on", "", "one"},
	} {
		image := filepath.Join(tempDir(t), "image.qcow2")
		args := []string{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", c.options, raw, image}
		if c.compress != "" {
			args = append(args[:2], append([]string{c.compress}, args[2:]...)...)
		}
		qemu(t, args...)
		if c.snapshot != "" {
			qemu(t, "qemu-img", "snapshot", "-c", c.snapshot, image)
		}
		t.Run(c.name, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				m := intoMemory(t, image)
				t.Cleanup(func() {
					checkClean(t, m.Bytes(), false)
					if c.snapshot != "" {
						checkSnapshot(t, m.Bytes(), c.snapshot, contents)
					}
				})
				return mustOpen(t, m, Options{Name: "test"})
			}, blktest.Options{Contents: contents})
		})
	}
}

// checkSnapshot has QEMU read an internal snapshot.
func checkSnapshot(t *testing.T, image []byte, name string, want []byte) {
	t.Helper()
	dir := tempDir(t)
	path, raw := filepath.Join(dir, "image.qcow2"), filepath.Join(dir, "snapshot.raw")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-l", "snapshot.name="+name, path, raw)
	if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the snapshot has changed, %v", err)
	}
}

func TestConformanceDataFile(t *testing.T) {
	for _, options := range []string{"data_file_raw=off", "data_file_raw=on", "data_file_raw=off,extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				data := filepath.Join(tempDir(t), "data")
				m := intoMemory(t, qemuImage(t, size, "data_file="+data+","+options))
				d := intoMemory(t, data)
				dataSize := d.Info().Size
				t.Cleanup(func() { checkClean(t, m.Bytes(), false) })
				n := mustOpen(t, m, Options{Name: "test", Data: d})
				if n.raw {
					t.Cleanup(func() {
						r := mustOpen(t, m, Options{Name: "test", Data: d, ReadOnly: true})
						if !bytes.Equal(readAll(t, r), d.Bytes()[:size]) || d.Info().Size >= size+blk.SectorSize && d.Info().Size > dataSize {
							t.Error("the data file is not the raw image")
						}
					})
				}
				return n
			})
		})
	}
}

func TestConformanceReadOnly(t *testing.T) {
	blktest.Run(t, func(t *testing.T, size int64) blk.Node {
		return mustOpen(t, intoMemory(t, qemuImage(t, size, "")), Options{Name: "test", ReadOnly: true})
	})
}

// TestTinyCache runs with a cache that can hold nothing.
func TestTinyCache(t *testing.T) {
	cache := NewCache(0)
	blktest.Run(t, func(t *testing.T, size int64) blk.Node {
		m := intoMemory(t, qemuImage(t, size, "cluster_size=512"))
		t.Cleanup(func() { checkClean(t, m.Bytes(), false) })
		return mustOpen(t, m, Options{Name: "test", Cache: cache})
	})
	if cache.used != 0 || len(cache.ring) != 0 {
		t.Errorf("%d bytes in %d tables are left in the cache", cache.used, len(cache.ring))
	}
}

// TestBarrier checks that freed clusters wait for the barrier.
func TestBarrier(t *testing.T) {
	m := intoMemory(t, qemuImage(t, 1<<20, ""))
	var before []byte
	called := 0
	n := mustOpen(t, m, Options{Name: "test", Barrier: func(*blk.Task) error {
		called++
		if !bytes.Contains(m.Bytes(), before) {
			t.Error("the cluster was given back before the barrier")
		}
		return nil
	}})
	before = pattern(3, 64<<10)
	writeAt(t, n, 0, before)
	mustDo(t, n, &blk.Request{Op: blk.OpDiscard, Len: 64 << 10})
	if !bytes.Contains(m.Bytes(), before) {
		t.Error("the cluster was given back before the flush")
	}
	mustDo(t, n, &blk.Request{Op: blk.OpFlush})
	if called != 1 || bytes.Contains(m.Bytes(), before) {
		t.Errorf("the barrier was called %d times; the data is gone: %v", called, !bytes.Contains(m.Bytes(), before))
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestGrowTables makes the refcount table and the L1 table grow.
func TestGrowTables(t *testing.T) {
	for _, options := range []string{"cluster_size=512,refcount_bits=64", "cluster_size=512", "cluster_size=1k,refcount_bits=1"} {
		t.Run(options, func(t *testing.T) {
			m := intoMemory(t, qemuImage(t, 1<<20, options))
			n := mustOpen(t, m, Options{Name: "test"})
			task := blk.NewTask()
			want := pattern(4, 12<<20)
			writeAt(t, n, 0, want[:1<<20])
			if err := n.Resize(task, 12<<20, false); err != nil {
				t.Fatal(err)
			}
			writeAt(t, n, 1<<20, want[1<<20:])
			if !bytes.Equal(readAll(t, n), want) {
				t.Error("wrong contents")
			}
			mustClose(t, n)
			checkClean(t, m.Bytes(), false)
			n = mustOpen(t, m, Options{Name: "test"})
			if !bytes.Equal(readAll(t, n), want) {
				t.Error("wrong contents after opening again")
			}
			if err := n.Resize(task, 5<<20+512, true); err != nil {
				t.Fatal(err)
			}
			if err := n.Resize(task, 6<<20, false); err != nil {
				t.Fatal(err)
			}
			if got := readAll(t, n); !bytes.Equal(got[:5<<20+512], want[:5<<20+512]) || len(bytes.Trim(got[5<<20+512:], "\x00")) > 0 {
				t.Error("wrong contents after shrinking and growing")
			}
			mustClose(t, n)
			checkClean(t, m.Bytes(), false)
		})
	}
}

// TestGrowOverBacking: new space does not show the backing image.
func TestGrowOverBacking(t *testing.T) {
	for _, options := range []string{"", "compat=0.10", "extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			base := blktest.NewMemory(2 << 20)
			fillDisk(t, base, pattern(5, 2<<20))
			raw := filepath.Join(tempDir(t), "base")
			if err := os.WriteFile(raw, base.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			m := intoMemory(t, qemuImage(t, 1<<20+512, "backing_fmt=raw,backing_file="+raw+","+options))
			n := mustOpen(t, m, Options{Name: "test", Backing: base})
			if err := n.Resize(blk.NewTask(), 3<<20, false); err != nil {
				t.Fatal(err)
			}
			got := readAll(t, n)
			if !bytes.Equal(got[:1<<20+512], base.Bytes()[:1<<20+512]) || len(bytes.Trim(got[1<<20+512:], "\x00")) > 0 {
				t.Error("wrong contents")
			}
			mustClose(t, n)
			checkClean(t, m.Bytes(), false)
		})
	}
}

func TestResizeDataFile(t *testing.T) {
	for _, options := range []string{"data_file_raw=off", "data_file_raw=on"} {
		t.Run(options, func(t *testing.T) {
			data := filepath.Join(tempDir(t), "data")
			m := intoMemory(t, qemuImage(t, 1<<20, "data_file="+data+","+options))
			d := intoMemory(t, data)
			n := mustOpen(t, m, Options{Name: "test", Data: d})
			task := blk.NewTask()
			want := pattern(13, 3<<20)
			writeAt(t, n, 0, want[:1<<20])
			if err := n.Resize(task, 3<<20, false); err != nil {
				t.Fatal(err)
			}
			if got := readAll(t, n); !bytes.Equal(got[:1<<20], want[:1<<20]) || len(bytes.Trim(got[1<<20:], "\x00")) > 0 {
				t.Error("wrong contents")
			}
			writeAt(t, n, 1<<20, want[1<<20:])
			for _, size := range []int64{2<<20 - 512, 3 << 20} {
				if err := n.Resize(task, size, true); err != nil {
					t.Fatal(err)
				}
			}
			clear(want[2<<20-512:])
			if !bytes.Equal(readAll(t, n), want) || n.raw && !bytes.Equal(d.Bytes(), want) {
				t.Error("wrong contents after shrinking and growing")
			}
			mustClose(t, n)
			checkClean(t, m.Bytes(), false)
		})
	}
}

// The backing image stays when parts of the tables may be lost that show what it showed: they are right in memory alone, also
// when a later flush succeeds.
func TestSetBackingAfterLoss(t *testing.T) {
	storage := blktest.NewFault(blktest.NewMemory(0))
	task := blk.NewTask()
	if err := Create(task, storage, CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"}); err != nil {
		t.Fatal(err)
	}
	n, err := Open(task, storage, Options{Name: "top", Backing: blktest.NewMemory(1 << 20)})
	if err != nil {
		t.Fatal(err)
	}
	flush := &blk.Request{Op: blk.OpFlush}
	trap := storage.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Count: 1, Err: syscall.EIO})
	if err := blk.Do(task, n, flush); err == nil || trap.Caught() != 1 {
		t.Fatalf("the flush did not fail: %v", err)
	}
	if err := blk.Do(task, n, flush); err != nil {
		t.Fatal(err)
	}
	if err := n.SetBacking(task, nil, "", ""); err == nil || n.Header().BackingFile != "base" {
		t.Errorf("the backing image is gone: %v", err)
	}
}

func TestSetBacking(t *testing.T) {
	base := blktest.NewMemory(1 << 20)
	fillDisk(t, base, pattern(6, 1<<20))
	m := intoMemory(t, qemuImage(t, 1<<20, ""))
	n := mustOpen(t, m, Options{Name: "test"})
	task := blk.NewTask()
	for _, name := range []string{"base.raw", strings.Repeat("x", 1000), "", "other"} {
		var node blk.Node
		if name != "" {
			node = base
		}
		if err := n.SetBacking(task, node, name, "raw"); err != nil {
			t.Fatal(err)
		}
		h, err := ReadHeader(task, m)
		if err != nil || h.BackingFile != name {
			t.Fatalf("the header says %q, %v", h.BackingFile, err)
		}
		want := make([]byte, 1<<20)
		if node != nil {
			want = base.Bytes()
		}
		if !bytes.Equal(readAll(t, n), want) {
			t.Errorf("with %q: wrong contents", name)
		}
	}
	mustClose(t, n)
}

func TestWriteCompressed(t *testing.T) {
	for _, options := range []string{"", "compression_type=zstd", "cluster_size=4k,refcount_bits=1", "cluster_size=512", "cluster_size=2M"} {
		t.Run(options, func(t *testing.T) {
			const size = 5<<20 + 512
			m := intoMemory(t, qemuImage(t, size, options))
			n := mustOpen(t, m, Options{Name: "test"})
			want := pattern(7, size)
			for i := range want[:4<<20] {
				want[i] &= 3
			}
			cs := int(n.clusterSize())
			var wg sync.WaitGroup
			for w := range 3 {
				wg.Go(func() {
					for off := w * cs; off < size; off += 3 * cs {
						if err := n.WriteCompressed(blk.NewTask(), int64(off), want[off:min(off+cs, size)]); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			if err := n.WriteCompressed(blk.NewTask(), 0, want[:min(cs, size)]); err == nil && n.maxRef > 1 {
				t.Error("a cluster was written twice")
			}
			if !bytes.Equal(readAll(t, n), want) {
				t.Error("wrong contents")
			}
			mustClose(t, n)
			if l := len(m.Bytes()); options == "" && l > 4<<20 {
				t.Errorf("%d bytes: not compressed", l)
			}
			checkClean(t, m.Bytes(), false)
			path, raw := filepath.Join(tempDir(t), "i"), filepath.Join(tempDir(t), "o")
			if err := os.WriteFile(path, m.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
			if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
				t.Errorf("QEMU reads something else, %v", err)
			}
		})
	}
}

// TestAhead: who writes one cluster behind the other changes the tables seldom. Over a backing image each cluster gets
// its place from a write to itself, which copy on read needs.
func TestAhead(t *testing.T) {
	const (
		size  = 8 << 20
		piece = 16 << 10
	)
	base := filepath.Join(tempDir(t), "base")
	if err := os.WriteFile(base, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options string
		slow    int // writes of a piece that change the tables, at most
	}{
		{"cluster_size=64k", 16},
		{"cluster_size=4k", 24},
		{"cluster_size=512", 210}, // tables of 32 KiB
		{"cluster_size=2M", 4},
		{"cluster_size=64k,extended_l2=on", 48},
		{"backing_fmt=raw,backing_file=" + base, size / piece},
	} {
		t.Run(c.options, func(t *testing.T) {
			m := intoMemory(t, qemuImage(t, size, c.options))
			var b blk.Node
			if strings.Contains(c.options, "backing") {
				b = intoMemory(t, base)
			}
			n := mustOpen(t, m, Options{Name: "test", Backing: b})
			want, slow := pattern(8, size), 0
			clear(want[size*3/4:])
			for off := int64(0); off < size*3/4; off += piece {
				if p, err := n.lookup(blk.NewTask(), off, piece); err != nil || p.kind != kindData || p.len < piece {
					slow++
				}
				writeAt(t, n, off, want[off:off+piece])
				next := (off | (n.clusterSize() - 1)) + 1
				if p, err := n.lookup(blk.NewTask(), next, piece); err != nil || b != nil && p.kind != kindBacking {
					t.Fatalf("after a write at %d the next cluster is not free: %+v, %v", off, p, err)
				}
			}
			if slow > c.slow {
				t.Errorf("%d slow writes, want at most %d", slow, c.slow)
			}
			mustDo(t, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: size / 2, Len: 1 << 20})
			clear(want[size/2 : size/2+1<<20])
			if !bytes.Equal(readAll(t, n), want) {
				t.Error("wrong contents")
			}
			mustClose(t, n)
			checkClean(t, m.Bytes(), false)
		})
	}
}

// slowWrites lets others run while it writes.
type slowWrites struct{ *blktest.Memory }

func (s slowWrites) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpWrite {
		time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
	}
	return s.Memory.Do(t, r)
}

// TestAheadAtOnce: nobody is given beforehand what another one is taking.
func TestAheadAtOnce(t *testing.T) {
	const size = 4 << 20
	m := intoMemory(t, qemuImage(t, size, "cluster_size=4k"))
	n := mustOpen(t, slowWrites{m}, Options{Name: "test"})
	want := pattern(9, size)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for {
				off := next.Add(4096) - 4096
				if off >= size {
					return
				}
				writeAt(t, n, off, want[off:off+4096])
			}
		})
	}
	wg.Wait()
	if got := readAll(t, n); !bytes.Equal(got, want) {
		t.Error("wrong contents")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// halfDone fails the first write of a table, and holds the first write of data until it is told to go on.
type halfDone struct {
	*blktest.Memory
	data          []byte
	failed        atomic.Bool
	held, proceed chan struct{}
}

func (h *halfDone) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpWrite {
		b := make([]byte, r.Len)
		r.Data.CopyTo(b)
		switch {
		case bytes.Equal(b, h.data):
			close(h.held)
			<-h.proceed
		case r.Off > 0 && !h.failed.Swap(true):
			<-h.held
			return syscall.EIO
		}
	}
	return h.Memory.Do(t, r)
}

// TestLateData: where data is still being written, though the table could not be, nobody else is given the place.
func TestLateData(t *testing.T) {
	const size = 4 << 20
	m := intoMemory(t, qemuImage(t, size, "cluster_size=64k"))
	first := mustOpen(t, m, Options{Name: "test"})
	writeAt(t, first, 0, pattern(1, 64<<10)) // there is a table
	mustClose(t, first)
	h := &halfDone{Memory: m, data: pattern(2, 64<<10), held: make(chan struct{}), proceed: make(chan struct{})}
	n := mustOpen(t, h, Options{Name: "test"})
	h.failed.Store(true)
	mustDo(t, n, &blk.Request{Op: blk.OpWrite, Off: 3 << 20, Len: 512, Data: blk.BytesVec(nil, pattern(3, 512))}) // there are clusters
	h.failed.Store(false)
	late := make(chan error)
	go func() {
		late <- blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: 1 << 20, Len: 64 << 10, Data: blk.BytesVec(nil, h.data)})
	}()
	<-h.held
	for !h.failed.Load() || n.doubts.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	mustDo(t, n, &blk.Request{Op: blk.OpFlush}) // gives up what waits for it
	want := pattern(4, 1<<20)
	writeAt(t, n, 2<<20, want)
	close(h.proceed)
	if err := <-late; !errors.Is(err, syscall.EIO) {
		t.Fatalf("the late write says %v", err)
	}
	if got := readAll(t, n)[2<<20:][:1<<20]; !bytes.Equal(got, want) {
		t.Error("a late write landed on a newer one")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestAheadCompressed: what a write was given beforehand can still be written by WriteCompressed.
func TestAheadCompressed(t *testing.T) {
	const size = 1 << 20
	m := intoMemory(t, qemuImage(t, size, ""))
	n := mustOpen(t, m, Options{Name: "test"})
	want := make([]byte, size)
	for i := range want {
		want[i] = byte(i / 1000)
	}
	cs := int(n.clusterSize())
	for off := 0; off < size; off += cs {
		b := want[off : off+cs]
		if off < size/2 {
			writeAt(t, n, int64(off), b)
		} else if err := n.WriteCompressed(blk.NewTask(), int64(off), b); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(readAll(t, n), want) {
		t.Error("wrong contents")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestNoSpace: a storage that cannot grow says so, and takes writes again when there is room.
func TestNoSpace(t *testing.T) {
	m := intoMemory(t, qemuImage(t, 8<<20, ""))
	if err := m.Resize(blk.NewTask(), 2<<20, false); err != nil {
		t.Fatal(err)
	}
	n := mustOpen(t, fixedSize{m}, Options{Name: "test"})
	b := pattern(8, 64<<10)
	off := int64(0)
	var err error
	for ; err == nil; off += 64 << 10 {
		err = blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: off, Len: 64 << 10, Data: blk.BytesVec(nil, b)})
	}
	if !blk.IsNoSpace(err) || off < 1<<20 {
		t.Fatalf("after %d bytes: %v", off, err)
	}
	mustDo(t, n, &blk.Request{Op: blk.OpDiscard, Len: 512 << 10})
	for range 8 {
		writeAt(t, n, off, b)
		off += 64 << 10
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// fixedSize hides that a storage can grow.
type fixedSize struct{ blk.Node }

// reserveLittle makes reservations so small that there are many.
func reserveLittle(n *Node) *Node {
	n.batch, n.maxBatch = 2, 5
	return n
}

// flaky fails some operations. A write that fails may have been carried out, in part or whole.
type flaky struct {
	*blktest.Memory
	rng    *rand.Rand
	mu     sync.Mutex
	index  int
	fail   func(index int) bool
	failed int
}

func (f *flaky) Do(t *blk.Task, r *blk.Request) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.index++
	if f.fail == nil || !f.fail(f.index) {
		return f.Memory.Do(t, r)
	}
	f.failed++
	if part := f.rng.Int64N(r.Len/512*2+1) * 512; r.Op == blk.OpWrite && part > 0 {
		part = min(part, r.Len)
		w := blk.Request{Op: blk.OpWrite, Off: r.Off, Len: part, Data: r.Data.AppendSlice(nil, 0, part)}
		if err := f.Memory.Do(t, &w); err != nil {
			return err
		}
	}
	return syscall.EIO
}

// Resize fails for want of room.
func (f *flaky) Resize(t *blk.Task, size int64, shrink bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.index++; f.fail != nil && f.fail(f.index) {
		f.failed++
		return syscall.ENOSPC
	}
	return f.Memory.Resize(t, size, shrink)
}

// TestFaults fails each I/O in turn, and looks at the image after each step.
func TestFaults(t *testing.T) {
	contents := pattern(9, 1<<20)
	raw := filepath.Join(tempDir(t), "base")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{"cluster_size=512", "cluster_size=4k,refcount_bits=64", "extended_l2=on,cluster_size=16k"} {
		t.Run(options, func(t *testing.T) {
			image := intoMemory(t, qemuImage(t, 1<<20, "backing_fmt=raw,backing_file="+raw+","+options)).Bytes()
			base := intoMemory(t, raw)
			step := 1
			if testing.Short() {
				step = 9
			}
			for index := 1; ; index += step + index/20 {
				rng := rand.New(rand.NewPCG(uint64(index), 10))
				f := &flaky{Memory: blktest.NewMemory(int64(len(image))), rng: rng}
				fillDisk(t, f.Memory, image)
				n := reserveLittle(mustOpen(t, f, Options{Name: "test", Backing: base}))
				first := f.index
				f.fail = func(i int) bool { return i >= first+index && i < first+index+1+index%3 }
				if !faulty(t, n, f, index, rng, contents) {
					t.Logf("%d operations", index)
					return
				}
			}
		})
	}
}

// faulty works on the image and checks it. It returns whether there was a fault.
func faulty(t *testing.T, n *Node, f *flaky, index int, rng *rand.Rand, contents []byte) bool {
	t.Helper()
	model := bytes.Clone(contents)
	unknown := make([]bool, len(model))
	try := func(op blk.Op, off, l int64) {
		t.Helper()
		r := &blk.Request{Op: op, Off: off, Len: l, Flags: blk.Flags(rng.IntN(2))}
		if op == blk.OpWrite {
			r.Data = blk.BytesVec(nil, pattern(rng.Uint64(), int(l)))
		} else if op == blk.OpFlush {
			r.Flags = 0
		}
		err := blk.Do(blk.NewTask(), n, r)
		if err != nil && !errors.Is(err, syscall.EIO) && !blk.IsNoSpace(err) {
			t.Fatalf("fault %d: %v", index, err)
		}
		if f.failed > 0 { // thousands of times: qemu-img looks at the end only
			if r, err := Check(blk.NewTask(), f.Memory, RepairNone); err != nil || r.Errors > 0 {
				t.Fatalf("fault %d: %+v, %v", index, r, err)
			}
		}
		for i := off; i < off+l; i++ {
			unknown[i] = err != nil || op == blk.OpDiscard
		}
		if op == blk.OpWrite {
			r.Data.CopyTo(model[off : off+l])
		} else if op == blk.OpWriteZeroes {
			clear(model[off : off+l])
		}
	}
	for range 25 {
		off, l := rng.Int64N(1024)*512, 512+rng.Int64N(100)*512
		try([]blk.Op{blk.OpWrite, blk.OpWrite, blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard}[rng.IntN(5)], off, l)
		if rng.IntN(4) == 0 {
			try(blk.OpFlush, 0, 0)
		}
	}
	f.fail = nil
	try(blk.OpFlush, 0, 0)
	for off := int64(0); off < 1<<20; off += 128 << 10 {
		try(blk.OpWrite, off, 1024)
	}
	got := readAll(t, n)
	for i := range got {
		if !unknown[i] && got[i] != model[i] {
			t.Fatalf("fault %d: byte %d is %#x, want %#x", index, i, got[i], model[i])
		}
	}
	if err := n.Close(); err != nil {
		t.Fatalf("fault %d: close: %v", index, err)
	}
	checkClean(t, f.Bytes(), false)
	return f.failed > 0
}

// TestFaultsAtOnce has several workers meet random faults.
func TestFaultsAtOnce(t *testing.T) {
	const size, workers = 1 << 20, 4
	contents := pattern(12, size)
	raw := filepath.Join(tempDir(t), "base")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	rounds := 12
	if testing.Short() {
		rounds = 2
	}
	for _, options := range []string{"cluster_size=512", "cluster_size=4k,refcount_bits=64", "extended_l2=on,cluster_size=16k"} {
		t.Run(options, func(t *testing.T) {
			image := intoMemory(t, qemuImage(t, size, "backing_fmt=raw,backing_file="+raw+","+options)).Bytes()
			base := intoMemory(t, raw)
			for range rounds {
				seed := rand.Uint64()
				rng := rand.New(rand.NewPCG(seed, 10))
				f := &flaky{Memory: blktest.NewMemory(int64(len(image))), rng: rng}
				fillDisk(t, f.Memory, image)
				n := reserveLittle(mustOpen(t, f, Options{Name: "test", Backing: base, Cache: NewCache(16 << 10)}))
				f.fail = func(int) bool { return rng.IntN(60) == 0 }
				model := bytes.Clone(contents)
				unknown := make([]bool, size)
				var wg sync.WaitGroup
				for w := range int64(workers) {
					rng := rand.New(rand.NewPCG(seed, uint64(w)+20))
					wg.Go(func() {
						for range 80 {
							off := (rng.Int64N(size/4096/workers)*workers+w)*4096 + rng.Int64N(4)*512
							l := (1 + rng.Int64N(4)) * 512
							op := []blk.Op{blk.OpWrite, blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard, blk.OpFlush}[rng.IntN(5)]
							r := &blk.Request{Op: op, Off: off, Len: l}
							switch op {
							case blk.OpWrite:
								r.Data = blk.BytesVec(nil, pattern(rng.Uint64(), int(l)))
								r.Data.CopyTo(model[off : off+l])
							case blk.OpWriteZeroes:
								clear(model[off : off+l])
							case blk.OpFlush:
								r.Off, r.Len, off, l = 0, 0, 0, 0
							default:
							}
							err := blk.Do(blk.NewTask(), n, r)
							for i := off; i < off+l; i++ {
								unknown[i] = err != nil || op == blk.OpDiscard
							}
						}
					})
				}
				wg.Wait()
				checkClean(t, f.Bytes(), true)
				f.fail = nil
				mustDo(t, n, &blk.Request{Op: blk.OpFlush})
				for _, got := range [][]byte{readAll(t, n), reread(t, f.Bytes(), base)} {
					for i := range got {
						if !unknown[i] && got[i] != model[i] {
							t.Fatalf("seed %d: byte %d is %#x, want %#x", seed, i, got[i], model[i])
						}
					}
				}
				mustClose(t, n)
				checkClean(t, f.Bytes(), false)
			}
		})
	}
}

// reread is what an image reads as when it is opened again.
func reread(t *testing.T, image []byte, base blk.Node) []byte {
	t.Helper()
	m := blktest.NewMemory(int64(len(image)))
	fillDisk(t, m, image)
	return readAll(t, mustOpen(t, m, Options{Name: "test", Backing: base, ReadOnly: true}))
}

// TestPowerCut cuts the power at every point of a history and looks at what is left.
func TestPowerCut(t *testing.T) {
	contents := pattern(11, 1<<20)
	raw := filepath.Join(tempDir(t), "base")
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options string
		backing bool
	}{
		{"cluster_size=4k", false},
		{"cluster_size=4k", true},
		{"cluster_size=512,refcount_bits=64", true},
		{"extended_l2=on,cluster_size=16k", true},
		{"compat=0.10,cluster_size=4k", true},
	} {
		t.Run(fmt.Sprint(c.options, c.backing), func(t *testing.T) {
			options := c.options
			var base blk.Node
			start := make([]byte, 1<<20)
			if c.backing {
				options, base = "backing_fmt=raw,backing_file="+raw+","+options, intoMemory(t, raw)
				copy(start, contents)
			}
			image := intoMemory(t, qemuImage(t, 1<<20, options)).Bytes()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 1))
			d := blktest.NewCrashDisk(int64(len(image)))
			fillDisk(t, d, image)
			mustDo(t, d, &blk.Request{Op: blk.OpFlush})
			n := reserveLittle(mustOpen(t, d, Options{Name: "test", Backing: base}))
			first := d.Points()
			h := &history{t: t, d: d, sectors: make([][]version, 1<<20/512)}
			for i := range h.sectors {
				h.sectors[i] = []version{{first, first, start[i*512 : i*512+512]}}
			}
			work := func(rng *rand.Rand, w, workers int64, steps int) {
				for range steps {
					// Ranges of 10 KiB; each worker has some, so that neighbours share clusters.
					off := (rng.Int64N(25)*workers+w)*10240/workers&^511 + rng.Int64N(4)*512
					l := min((1+rng.Int64N(40))*512, (10240/workers&^511)-2048)
					switch rng.IntN(10) {
					case 0, 1:
						h.flush(n)
					case 2, 3:
						h.change(n, blk.OpDiscard, off, make([]byte, l))
					case 4:
						h.change(n, blk.OpWriteZeroes, off, make([]byte, l))
					default:
						h.change(n, blk.OpWrite, off, pattern(rng.Uint64(), int(l)))
					}
				}
			}
			work(rng, 0, 1, 100)
			var wg sync.WaitGroup
			for w := range int64(3) {
				wg.Go(func() { work(rand.New(rand.NewPCG(seed, uint64(w)+2)), w, 3, 60) })
			}
			wg.Wait()
			h.killed(d.Bytes(), base)
			cuts := 150
			if testing.Short() {
				cuts = 20
			}
			for range cuts {
				at := first + rng.IntN(d.Points()-first+1)
				h.check(at, d.CrashAt(at, rng), base)
			}
			mustClose(t, n)
			checkClean(t, d.Bytes(), false)
		})
	}
}

// history is what a disk held when.
type history struct {
	mu      sync.Mutex
	t       *testing.T
	d       *blktest.CrashDisk
	sectors [][]version
	flushed []flushed
}

// flushed is a flush that was asked for at one point and had returned at another.
type flushed struct{ begin, end int }

// version is contents that were being written between two points.
type version struct {
	begin, end int
	data       []byte
}

func (h *history) flush(n blk.Node) {
	h.t.Helper()
	begin := h.d.Points()
	mustDo(h.t, n, &blk.Request{Op: blk.OpFlush})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.flushed = append(h.flushed, flushed{begin, h.d.Points()})
}

func (h *history) change(n blk.Node, op blk.Op, off int64, b []byte) {
	h.t.Helper()
	begin := h.d.Points()
	r := &blk.Request{Op: op, Off: off, Len: int64(len(b))}
	if op == blk.OpWrite {
		r.Data = blk.BytesVec(nil, b)
	}
	mustDo(h.t, n, r)
	end := h.d.Points()
	if op == blk.OpDiscard {
		mustDo(h.t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range len(b) / 512 {
		s := &h.sectors[int(off)/512+i]
		*s = append(*s, version{begin, end, b[i*512 : i*512+512]})
	}
}

// killed opens what the storage has got: all that was acknowledged is there, flushed or not.
func (h *history) killed(image []byte, base blk.Node) {
	h.t.Helper()
	checkClean(h.t, image, true)
	got := reread(h.t, image, base)
	for i, v := range h.sectors {
		if !bytes.Equal(v[len(v)-1].data, got[i*512:i*512+512]) {
			h.t.Fatalf("killed: sector %d holds %x…", i, got[i*512:i*512+8])
		}
	}
}

// check opens the image that a power cut left: each sector holds what was flushed or anything that came later.
func (h *history) check(at int, left *blktest.CrashDisk, base blk.Node) {
	h.t.Helper()
	checkClean(h.t, left.Bytes(), true)
	n := mustOpen(h.t, left, Options{Name: "test", Backing: base, ReadOnly: true})
	got := readAll(h.t, n)
	flushed := 0
	for _, f := range h.flushed {
		if f.end <= at {
			flushed = max(flushed, f.begin)
		}
	}
	for i, versions := range h.sectors {
		ok := false
		for k, v := range versions {
			overwritten := k+1 < len(versions) && versions[k+1].end <= flushed
			ok = ok || v.begin <= at && !overwritten && bytes.Equal(v.data, got[i*512:i*512+512])
		}
		if !ok {
			h.t.Fatalf("cut at %d, flushed at %d: sector %d holds %x…", at, flushed, i, got[i*512:i*512+8])
		}
	}
}
