// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/raw"
)

// diskDir is a directory on a real disk, gone after the test.
func diskDir(t *testing.T) string { return tempIn(t, "/var/tmp") }

func tempIn(t *testing.T, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "blkstream-test-")
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func create(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "disk.img")
	os.Remove(path)
	if err := Create(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustOpen(t *testing.T, path string, o Options) *Node {
	t.Helper()
	n, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil && !errors.Is(err, blk.ErrClosed) {
			t.Errorf("close: %v", err)
		}
	})
	return n
}

func request(op blk.Op, off, n int64) *blk.Request {
	r := &blk.Request{Op: op, Off: off, Len: n}
	if op == blk.OpRead || op == blk.OpWrite {
		r.Data = blk.BytesVec(nil, bytes.Repeat([]byte{0xab}, int(n)))
	}
	return r
}

func do(n blk.Node, r *blk.Request) error { return blk.Do(blk.NewTask(), n, r) }

func TestConformance(t *testing.T) {
	open := func(dir string, o Options) func(*testing.T, int64) blk.Node {
		return func(t *testing.T, size int64) blk.Node {
			n, err := Open(create(t, dir, size), o)
			if err != nil {
				t.Fatal(err)
			}
			return raw.Open(n)
		}
	}
	t.Run("buffered", func(t *testing.T) { blktest.Run(t, open(diskDir(t), Options{})) })
	t.Run("direct", func(t *testing.T) {
		blktest.Run(t, open(diskDir(t), Options{Direct: true, Align: 512}), blktest.Options{Align: 512})
	})
	t.Run("direct, no promise", func(t *testing.T) { blktest.Run(t, open(diskDir(t), Options{Direct: true})) })
	t.Run("tmpfs", func(t *testing.T) { blktest.Run(t, open(tempIn(t, "/dev/shm"), Options{})) })
	t.Run("tmpfs, direct", func(t *testing.T) {
		blktest.Run(t, open(tempIn(t, "/dev/shm"), Options{Direct: true, NoSync: true}))
	})
	t.Run("no help from the storage", func(t *testing.T) {
		dir := diskDir(t)
		blktest.Run(t, func(t *testing.T, size int64) blk.Node {
			n, err := Open(create(t, dir, size), Options{Direct: true})
			if err != nil {
				t.Fatal(err)
			}
			n.noPunch.Store(true)
			n.noZero.Store(true)
			return n
		})
	})
	t.Run("read-only", func(t *testing.T) {
		path := create(t, diskDir(t), blktest.DefaultSize)
		want := bytes.Repeat([]byte("blkstream"), 5000)
		if err := os.WriteFile(path, want, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, blktest.DefaultSize); err != nil {
			t.Fatal(err)
		}
		blktest.Run(t, func(t *testing.T, _ int64) blk.Node {
			n, err := Open(path, Options{ReadOnly: true, Direct: true})
			if err != nil {
				t.Fatal(err)
			}
			return n
		}, blktest.Options{Contents: want})
	})
	t.Run("fault filter", func(t *testing.T) {
		base := open(diskDir(t), Options{Direct: true, Align: 512})
		blktest.Run(t, func(t *testing.T, size int64) blk.Node {
			f := blktest.NewFault(base(t, size))
			f.Transparent = true
			return f
		}, blktest.Options{Align: 512})
	})
}

// loop attaches a file to a loop device with the given sector size.
func loop(t *testing.T, path, sector string) string {
	t.Helper()
	out, err := exec.Command("losetup", "--show", "-f", "-b", sector, "--direct-io=on", path).Output()
	if err != nil {
		t.Skipf("no loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "-d", dev).Run(); err != nil {
			t.Errorf("losetup -d %s: %v", dev, err)
		}
	})
	return dev
}

func TestBlockDevice(t *testing.T) {
	for _, c := range []struct {
		name, sector string
		o            Options
		shared       bool
	}{
		{"512, direct", "512", Options{Direct: true, Align: 512}, false},
		{"4096, direct, sectors of 512", "4096", Options{Direct: true, Align: 512}, true},
		{"4096, direct, sectors of 4096", "4096", Options{Direct: true, Align: 4096}, false},
		{"4096, buffered", "4096", Options{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := create(t, diskDir(t), blktest.DefaultSize)
			dev := loop(t, path, c.sector)
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				n, err := Open(dev, c.o)
				if err != nil {
					t.Fatal(err)
				}
				if n.shared != c.shared || !n.device || n.host.Direct != c.o.Direct {
					t.Errorf("shared %v, device %v, direct %v", n.shared, n.device, n.host.Direct)
				}
				if err := do(n, request(blk.OpWriteZeroes, 0, size)); err != nil {
					t.Fatal(err)
				}
				return n
			}, blktest.Options{Align: c.o.Align})

			n := mustOpen(t, dev, c.o)
			if err := n.Resize(blk.NewTask(), 8<<20, false); !errors.Is(err, blk.ErrNotSupported) {
				t.Errorf("resize of a device: %v", err)
			}
			if err := os.Truncate(path, 8<<20); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command("losetup", "-c", dev).CombinedOutput(); err != nil {
				t.Fatalf("losetup -c: %v %s", err, out)
			}
			r := raw.Open(n)
			if err := r.Refresh(); err != nil || r.Info().Size != 8<<20 {
				t.Errorf("after the device grew: size %d, %v", r.Info().Size, err)
			}
		})
	}
}

func TestTryMap(t *testing.T) {
	path := create(t, diskDir(t), 1<<20)
	n := mustOpen(t, path, Options{Direct: true, Align: 512})
	if len(n.Warnings()) > 0 || !n.host.Direct {
		t.Skipf("no direct I/O here: %v", n.Warnings())
	}
	for _, c := range []struct {
		op     blk.Op
		off, l int64
		ok     bool
		n      int64
	}{
		{blk.OpRead, 0, 4096, true, 4096},
		{blk.OpWrite, 512, 1 << 19, true, 1 << 19},
		{blk.OpRead, 1<<20 - 512, 4096, true, 512},
		{blk.OpRead, 1 << 20, 512, false, 0},
		{blk.OpFlush, 0, 0, true, 0},
		{blk.OpDiscard, 0, 512, false, 0},
		{blk.OpWriteZeroes, 0, 512, false, 0},
	} {
		e, ok := n.TryMap(c.op, c.off, c.l)
		if ok != c.ok || e.Len != c.n || ok && (e.Host != &n.host || e.HostOff != c.off) {
			t.Errorf("%v [%d, +%d): %+v %v", c.op, c.off, c.l, e, ok)
		}
	}
	if err := do(n, request(blk.OpWrite, 100, 512)); !errors.Is(err, blk.ErrInvalid) {
		t.Errorf("a write that breaks the promise: %v", err)
	}
	n.Close()

	// No promise: writes must come through Do, reads need not.
	n = mustOpen(t, path, Options{Direct: true})
	if _, ok := n.TryMap(blk.OpWrite, 0, 4096); ok {
		t.Error("a write past the lock was allowed")
	}
	if e, ok := n.TryMap(blk.OpRead, 0, 4096); !ok || e.Writable {
		t.Errorf("read: %+v %v", e, ok)
	}
	n.Close()

	n = mustOpen(t, path, Options{ReadOnly: true})
	if _, ok := n.TryMap(blk.OpWrite, 0, 4096); ok {
		t.Error("a write to a read-only file was allowed")
	}
}

func TestProbeAlign(t *testing.T) {
	for _, c := range []struct {
		size     int64
		sector   string
		mem, off int64
	}{{1 << 20, "512", 512, 512}, {1 << 20, "4096", 4096, 4096}} {
		n := mustOpen(t, loop(t, create(t, diskDir(t), c.size), c.sector), Options{Direct: true})
		if mem, off, err := probeAlign(n.host.Fd); mem != c.mem || off != c.off || err != nil {
			t.Errorf("%s: %d %d %v", c.sector, mem, off, err)
		}
		n.Close()
	}
	// A file that is too short to tell is taken for the worst.
	n := mustOpen(t, create(t, diskDir(t), 0), Options{Direct: true})
	if mem, off, err := probeAlign(n.host.Fd); mem != 4096 || off != 4096 || err != nil {
		t.Errorf("empty file: %d %d %v", mem, off, err)
	}
}

// TestHoles: discarded and zeroed space is given back, and Map sees it.
func TestHoles(t *testing.T) {
	path := create(t, diskDir(t), 8<<20)
	n := mustOpen(t, path, Options{})
	used := func() int64 {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	must := func(r *blk.Request) {
		t.Helper()
		if err := do(n, r); err != nil {
			t.Fatal(err)
		}
	}
	task := blk.NewTask()
	if e, err := n.Map(task, 4096, 1<<20); err != nil || e.State != blk.Zero || e.Len != 1<<20 || e.Host != nil {
		t.Fatalf("empty: %+v %v", e, err)
	}
	must(request(blk.OpWrite, 0, 4<<20))
	must(&blk.Request{Op: blk.OpFlush})
	if u := used(); u < 4<<20 {
		t.Fatalf("%d bytes in use after writing 4 MiB", u)
	}
	must(request(blk.OpDiscard, 1<<20, 1<<20))
	must(&blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap | blk.FUA, Off: 2 << 20, Len: 1 << 20})
	must(request(blk.OpWriteZeroes, 3<<20, 1<<20))
	must(&blk.Request{Op: blk.OpFlush})
	if u := used(); u > 2<<20+64<<10 || u < 2<<20 {
		t.Errorf("%d bytes in use, want 2 MiB: plain zeroing keeps the space, the rest gives it back", u)
	}
	for off, want := range map[int64]blk.Extent{
		0:       {Len: 1 << 20, State: blk.Data, Writable: true, Host: &n.host},
		1 << 20: {Len: 7 << 20, State: blk.Zero},
	} {
		if e, err := n.Map(task, off, 8<<20); err != nil || e != want {
			t.Errorf("map at %d: %+v %v", off, e, err)
		}
	}
	if _, err := n.Map(task, 8<<20, 512); !errors.Is(err, blk.ErrRange) {
		t.Errorf("map past the end: %v", err)
	}
	// Room is allocated where there is none, and nothing else happens: data stays, and zeros are still holes.
	before := used()
	if err := n.Reserve(task, 512<<10, 5<<20-100); err != nil {
		t.Fatal(err)
	}
	if u := used() - before; u < 7<<19-64<<10 || u > 7<<19 {
		t.Errorf("%d bytes more in use, want 3.5 MiB", u)
	}
	b := make([]byte, 1<<20)
	must(&blk.Request{Op: blk.OpRead, Len: 1 << 20, Data: blk.BytesVec(nil, b)})
	if e, err := n.Map(task, 1<<20, 8<<20); err != nil || e.State != blk.Zero || e.Len != 7<<20 || bytes.Count(b, []byte{0}) == len(b) {
		t.Errorf("after Reserve: %+v %v", e, err)
	}
}

func TestOddSize(t *testing.T) {
	path := filepath.Join(diskDir(t), "odd.img")
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	n := mustOpen(t, path, Options{Direct: true})
	if n.Info().Size != 1024 || len(n.Warnings()) != 2 || n.host.Direct {
		t.Errorf("size %d, direct %v, warnings %q", n.Info().Size, n.host.Direct, n.Warnings())
	}
	buf := bytes.Repeat([]byte{1}, 1024)
	r := &blk.Request{Op: blk.OpRead, Len: 1024, Data: blk.BytesVec(nil, buf)}
	if err := do(n, r); err != nil || !bytes.Equal(buf, append(bytes.Repeat([]byte{7}, 1000), make([]byte, 24)...)) {
		t.Errorf("read over the end of the file: %v", err)
	}
	if e, err := n.Map(blk.NewTask(), 0, 1024); err != nil || e.State != blk.Data || e.Len != 1024 {
		t.Errorf("map: %+v %v", e, err)
	}
	if err := do(n, request(blk.OpWrite, 512, 512)); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(path); st.Size() != 1024 {
		t.Errorf("file of %d bytes", st.Size())
	}
}

func TestResize(t *testing.T) {
	path := create(t, diskDir(t), 1<<20)
	n := mustOpen(t, path, Options{Direct: true, Align: 512})
	task := blk.NewTask()
	for _, c := range []struct {
		size   int64
		shrink bool
		want   error
	}{
		{2 << 20, false, nil},
		{2<<20 + 100, false, blk.ErrInvalid},
		{-512, true, blk.ErrInvalid},
		{1 << 20, false, blk.ErrInvalid},
		{1 << 20, true, nil},
		{3 << 20, false, nil},
	} {
		before := n.Info().Size
		err := n.Resize(task, c.size, c.shrink)
		if !errors.Is(err, c.want) {
			t.Errorf("resize to %d: %v, want %v", c.size, err, c.want)
		}
		want := c.size
		if c.want != nil {
			want = before
		}
		if st, _ := os.Stat(path); n.Info().Size != want || st.Size() != want {
			t.Errorf("resize to %d: node of %d bytes, file of %d", c.size, n.Info().Size, st.Size())
		}
	}
	if err := do(n, request(blk.OpWrite, 3<<20-4096, 4096)); err != nil {
		t.Errorf("write into the new part: %v", err)
	}
}

func TestCreate(t *testing.T) {
	dir := diskDir(t)
	path := create(t, dir, 1<<30)
	if st, err := os.Stat(path); err != nil || st.Size() != 1<<30 || st.Sys().(*syscall.Stat_t).Blocks > 64 {
		t.Errorf("not a sparse file of 1 GiB: %v", err)
	}
	if err := Create(path, 512); !errors.Is(err, fs.ErrExist) {
		t.Errorf("create over an existing file: %v", err)
	}
	if err := Create(filepath.Join(dir, "none", "x"), 512); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("create in a missing directory: %v", err)
	}
	huge := filepath.Join(dir, "huge")
	if err := Create(huge, 1<<62); err == nil {
		t.Error("create of 4 EiB succeeded")
	}
	if _, err := os.Stat(huge); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a failed create left its file behind: %v", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := diskDir(t)
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/null", filepath.Join(dir, "missing")} {
		if n, err := Open(path, Options{ReadOnly: true}); err == nil {
			n.Close()
			t.Errorf("%s was opened", path)
		}
	}
	if _, err := Open(create(t, dir, 512), Options{Align: 3}); !errors.Is(err, blk.ErrInvalid) {
		t.Errorf("alignment of 3: %v", err)
	}
}

// TestGrows: the length of a format's file may be anything, with direct I/O too.
func TestGrows(t *testing.T) {
	path := filepath.Join(diskDir(t), "image")
	want := bytes.Repeat([]byte{7}, 3*4096+700)
	for _, readOnly := range []bool{true, false} {
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		n := mustOpen(t, path, Options{Direct: true, Grows: true, ReadOnly: readOnly, Align: 512})
		in := n.Info()
		if in.Size < int64(len(want)) || in.Size%max(in.Align, 512) != 0 {
			t.Errorf("size %d, alignment %d", in.Size, in.Align)
		}
		if !n.host.Direct {
			t.Log("no direct I/O here: ", n.Warnings())
		}
		// Straight from the file, as a queue reads, and through the node.
		buf := blk.GetBuffer(4 * 4096)
		defer buf.Free()
		e, ok := n.TryMap(blk.OpRead, 0, in.Size)
		if !ok || e.Len != in.Size {
			t.Fatalf("TryMap: %+v, %v", e, ok)
		}
		b := buf.B[:in.Size]
		if err := blk.NewTask().ReadAt(e.Host, blk.BytesVec(nil, b), 0); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[:len(want)], want) || len(bytes.Trim(b[len(want):], "\x00")) > 0 {
			t.Error("wrong bytes")
		}
		r := request(blk.OpRead, 4096+1, in.Size-4097)
		if err := do(n, r); err != nil {
			t.Fatal(err)
		}
		if !readOnly {
			if st, err := os.Stat(path); err != nil || st.Size() != in.Size {
				t.Errorf("the file is %d bytes long, %v", st.Size(), err)
			}
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	}
}

// syncs does a task's I/O at once, and counts what is made durable.
type syncs struct{ n int }

func (e *syncs) Start(o *blk.IO) {
	if o.Kind == blk.IOSync || o.Kind == blk.IOWrite && o.FUA {
		e.n++
	}
	o.Run()
	o.By.IODone(o)
}

func (*syncs) Suspend(*blk.Task)     { panic("waits") }
func (*syncs) Wake(*blk.Task)        {}
func (*syncs) Spawn(func(*blk.Task)) { panic("spawns") }

// FUA makes every kind of change durable, and nothing else does.
func TestFUA(t *testing.T) {
	n := mustOpen(t, create(t, diskDir(t), 1<<20), Options{})
	defer n.Close()
	for _, op := range []blk.Op{blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes} {
		for _, fua := range []blk.Flags{0, blk.FUA} {
			e := &syncs{}
			var task blk.Task
			task.Init(e)
			r := &blk.Request{Op: op, Flags: fua, Off: 4096, Len: 8192}
			if op == blk.OpWrite {
				r.Data = blk.BytesVec(nil, make([]byte, r.Len))
			}
			if err := blk.Do(&task, n, r); err != nil {
				t.Errorf("%v: %v", op, err)
			}
			if (e.n > 0) != (fua != 0) {
				t.Errorf("%v, flags %d: made durable %d times", op, fua, e.n)
			}
		}
	}
}
