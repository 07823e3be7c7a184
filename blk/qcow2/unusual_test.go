// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Images that are unusual, or damaged where one does not look at first.

func noise(n int) []byte {
	rng := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32()) | 1
	}
	return b
}

func created(t *testing.T, o qcow2.CreateOptions) *blktest.Memory {
	t.Helper()
	m := blktest.NewMemory(0)
	if err := qcow2.Create(blk.NewTask(), m, o); err != nil {
		t.Fatal(err)
	}
	return m
}

func writeTo(n blk.Node, off int64, b []byte) error {
	return blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A program that does not know bitmaps has written to the image: where they were may be anything now.
func TestBitmapsOutOfDate(t *testing.T) {
	b := withBitmap(t, created(t, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096}).Bytes())
	b[95] &^= qcow2.AutoclearBitmaps
	m := memoryOf(t, b)
	if r := check(t, m, qcow2.RepairLeaks); r.LeaksFixed == 0 {
		t.Errorf("%+v", r)
	}
	n := open(t, m, qcow2.Options{})
	want := noise(1 << 20)
	must(t, writeTo(n, 0, want))
	if !bytes.Equal(contents(t, n), want) {
		t.Error("other contents")
	}
	must(t, n.Close())
	if r := check(t, m, qcow2.RepairNone); r.Errors+r.Leaks > 0 {
		t.Errorf("%+v", r)
	}
	checkWithQEMU(t, m.Bytes())
}

// The header's numbers, the bitmaps' extension and the names change as one, also where they take several sectors, and
// never before what they point to.
func TestPowerCutsStoreBitmaps(t *testing.T) {
	rng := blktest.Rand(t)
	for _, c := range []struct {
		cluster int64
		name    string
		kept    int // bytes of another extension
	}{{4096, "", 0}, {4096, "", 400}, {8192, "", 400}, {8192, "base", 400}, {64 << 10, strings.Repeat("x", 400), 400}, {8192, strings.Repeat("y", 1000), 400}} {
		disk := blktest.NewCrashDisk(0)
		o := qcow2.CreateOptions{Size: 256 << 10, ClusterSize: c.cluster, BackingFile: c.name}
		if c.name != "" {
			o.BackingFormat = "raw"
		}
		must(t, qcow2.Create(blk.NewTask(), disk, o))
		// As QEMU places the name: right behind the extensions, which grow.
		h, err := qcow2.ReadHeader(blk.NewTask(), disk)
		must(t, err)
		h.Extensions = append(h.Extensions, qcow2.Extension{Type: 0x12345678, Data: bytes.Repeat([]byte("k"), c.kept)})
		h.BackingFile = ""
		head, err := h.Encode()
		must(t, err)
		if c.name != "" {
			binary.BigEndian.PutUint64(head[8:], uint64(len(head)))
			binary.BigEndian.PutUint32(head[16:], uint32(len(c.name)))
			head = append(head, c.name...)
		}
		head = append(head, make([]byte, -len(head)&511)...)
		must(t, writeTo(disk, 0, head))
		do(t, disk, &blk.Request{Op: blk.OpFlush})
		n := qcow2.ReserveLittle(open(t, disk, qcow2.Options{}))
		first := disk.Points()
		for i, names := range []string{"a", "ab", "", "b"} {
			bits := blk.NewBitmap(o.Size, 4096)
			bits.Set(0, 4096)
			bits.Set(int64(i+1)*8192, 4096)
			var list []qcow2.BitmapData
			for _, x := range names {
				list = append(list, qcow2.BitmapData{Name: string(x), Bits: bits})
			}
			must(t, n.StoreBitmaps(blk.NewTask(), []string{"a", "b"}, list))
		}
		for at := first; at <= disk.Points(); at++ {
			for range 12 {
				left := disk.CrashAt(at, rng)
				h, err := qcow2.ReadHeader(blk.NewTask(), left)
				if err != nil || h.BackingFile != c.name || h.BackingFormat != o.BackingFormat {
					t.Fatalf("clusters of %d, a name of %d bytes, cut at %d of %d to %d: %v, %+v", c.cluster, len(c.name), at, first, disk.Points(), err, h)
				}
				if r := check(t, left, qcow2.RepairNone); r.Errors > 0 {
					t.Fatalf("cut at %d: %+v", at, r)
				}
				n := open(t, left, qcow2.Options{ReadOnly: true})
				list, err := n.Bitmaps(blk.NewTask())
				must(t, err)
				for _, b := range list {
					bits, err := n.LoadBitmap(blk.NewTask(), b)
					must(t, err)
					if !bits.Any(0, 4096) || bits.Count() != 2 {
						t.Fatalf("cut at %d of %d to %d: bitmap %q has %d bits", at, first, disk.Points(), b.Name, bits.Count())
					}
				}
				must(t, n.Close())
			}
		}
		must(t, n.Close())
		if h, err = qcow2.ReadHeader(blk.NewTask(), disk); err != nil || len(h.Extensions) == 0 || h.Bitmaps.Count != 1 {
			t.Errorf("in the end: %v, %+v", err, h)
		}
		if len(c.name) < 10 { // it is opened, too
			checkWithQEMU(t, disk.Bytes())
		}
	}
}

// Where a cut in StoreBitmaps could leave an image without the long name of its data file, none are stored.
func TestPowerCutsDataFileName(t *testing.T) {
	rng := blktest.Rand(t)
	for _, l := range []int{250, 300, 420, 1000} {
		disk := blktest.NewCrashDisk(0)
		o := qcow2.CreateOptions{Size: 256 << 10, ClusterSize: 4096, DataFile: strings.Repeat("d", l)}
		must(t, qcow2.Create(blk.NewTask(), disk, o))
		do(t, disk, &blk.Request{Op: blk.OpFlush})
		n := open(t, disk, qcow2.Options{Data: blktest.NewMemory(o.Size)})
		first := disk.Points()
		err := n.StoreBitmaps(blk.NewTask(), nil, []qcow2.BitmapData{{Name: "a", Bits: blk.NewBitmap(o.Size, 4096)}})
		if can := l == 250; can != (err == nil) || can != n.CanStoreBitmaps() {
			t.Errorf("a name of %d bytes: %v", l, err)
		}
		for at := first; at <= disk.Points(); at++ {
			for range 10 {
				if h, err := qcow2.ReadHeader(blk.NewTask(), disk.CrashAt(at, rng)); err != nil || h.DataFile != o.DataFile {
					t.Fatalf("a name of %d bytes, cut at %d of %d to %d: %v, %+v", l, at, first, disk.Points(), err, h)
				}
			}
		}
		must(t, n.Close())
	}
}

// A size that is not whole sectors is rounded up, and what the guest wrote to the last one stays when the disk grows.
func TestResizeOddSize(t *testing.T) {
	for _, size := range []uint64{1000, 1<<19 - 100, 300<<10 + 1} {
		b := created(t, qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096}).Bytes()
		binary.BigEndian.PutUint64(b[24:], size)
		m := memoryOf(t, b)
		n := open(t, m, qcow2.Options{})
		want := noise(int(n.Info().Size))
		must(t, writeTo(n, 0, want))
		for _, to := range []int64{n.Info().Size, n.Info().Size + 512, 1 << 20, 2 << 20} {
			must(t, n.Resize(blk.NewTask(), to, false))
			want = append(want, make([]byte, int(to)-len(want))...)
			if !bytes.Equal(contents(t, n), want) {
				t.Errorf("%d to %d: other contents", size, to)
			}
		}
		must(t, n.Close())
		checkWithQEMU(t, m.Bytes())
	}
}

// tablesOf are the offsets of an image's L1 table and first L2 table.
func tablesOf(b []byte) (l1, l2 uint64) {
	l1 = binary.BigEndian.Uint64(b[40:])
	return l1, binary.BigEndian.Uint64(b[l1:]) & (1<<56 - 1<<9)
}

// TestTablesOverlap: whatever an image points to, no table is overwritten or given back.
func TestTablesOverlap(t *testing.T) {
	be := binary.BigEndian
	m := created(t, qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	n := open(t, m, qcow2.Options{})
	must(t, writeTo(n, 0, noise(64<<10)))
	must(t, n.Close())
	plain := m.Bytes()
	takeSnapshot(t, m)
	snapshot := m.Bytes()
	for _, c := range []struct {
		name   string
		image  []byte
		damage func(b []byte) (kept uint64) // the cluster that must not change
	}{
		{"compressed data in the L1 table", plain, func(b []byte) uint64 {
			l1, l2 := tablesOf(b)
			be.PutUint64(b[l2:], 1<<62|l1)
			return l1
		}},
		{"the L2 table in the snapshot table", snapshot, func(b []byte) uint64 {
			l1, _ := tablesOf(b)
			be.PutUint64(b[l1:], be.Uint64(b[64:])|1<<63)
			return be.Uint64(b[64:])
		}},
		{"the L2 table in a snapshot's L1 table", snapshot, func(b []byte) uint64 {
			l1, _ := tablesOf(b)
			at := be.Uint64(b[be.Uint64(b[64:]):])
			be.PutUint64(b[l1:], at|1<<63)
			return at
		}},
		{"the L1 table in the snapshot table", snapshot, func(b []byte) uint64 {
			be.PutUint64(b[40:], be.Uint64(b[64:]))
			return be.Uint64(b[64:])
		}},
		{"data that is not counted", plain, func(b []byte) uint64 {
			_, l2 := tablesOf(b)
			host := be.Uint64(b[l2:]) & (1<<56 - 1<<9)
			block := be.Uint64(b[be.Uint64(b[48:]):])
			be.PutUint16(b[block+host/4096*2:], 0)
			return host
		}},
	} {
		b := bytes.Clone(c.image)
		at := c.damage(b)
		m := memoryOf(t, b)
		n, err := qcow2.Open(blk.NewTask(), m, qcow2.Options{Name: "image"})
		if err == nil {
			task := blk.NewTask()
			_ = blk.Do(task, n, &blk.Request{Op: blk.OpRead, Len: 4096, Data: blk.BytesVec(nil, make([]byte, 4096))})
			if err = writeTo(n, 2<<20, noise(4096)); err == nil { // takes a table
				err = errors.Join(
					blk.Do(task, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Len: 4096}),
					blk.Do(task, n, &blk.Request{Op: blk.OpFlush}))
			}
			must(t, n.Close())
		}
		if !errors.Is(err, qcow2.ErrCorrupt) && !errors.Is(err, qcow2.ErrFormat) {
			t.Errorf("%s: %v", c.name, err)
		}
		if !bytes.Equal(m.Bytes()[at:at+4096], b[at:at+4096]) {
			t.Errorf("%s: it was overwritten", c.name)
		}
	}
}

// What was cut off does not come back, in any version and over any backing image.
func TestShrinkGrow(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512},
		{ClusterSize: 4096},
		{ClusterSize: 16 << 10, ExtendedL2: true},
		{ClusterSize: 4096, Version: 2},
		{ClusterSize: 4096, Version: 2, BackingFile: "b", BackingFormat: "raw"},
		{ClusterSize: 512, RefcountBits: 64, BackingFile: "b", BackingFormat: "raw"},
	} {
		for _, bs := range []int{100 << 10, 500 << 10} {
			o.Size = 400 << 10
			var base blk.Node
			if o.BackingFile != "" {
				base = memoryOf(t, noise(bs))
			}
			disk := created(t, o)
			n := qcow2.ReserveLittle(open(t, disk, qcow2.Options{Backing: base}))
			want := noise(400 << 10)
			must(t, writeTo(n, 0, want))
			for _, sizes := range [][]int{{300<<10 + 512}, {101 << 10, 100 << 10, 30 << 10}, {512}} {
				s := sizes[len(sizes)-1]
				for _, to := range sizes {
					must(t, n.Resize(blk.NewTask(), int64(to), true))
				}
				must(t, n.Resize(blk.NewTask(), 600<<10, false))
				got := contents(t, n)
				first := -1
				for i := s; i < len(got); i++ {
					if got[i] != 0 {
						first = i
						break
					}
				}
				if !bytes.Equal(got[:s], want[:s]) || first >= 0 {
					t.Errorf("%+v base %d to %d: nonzero at %d", o, bs, s, first)
				}
			}
			must(t, n.Close())
			if r := check(t, disk, qcow2.RepairNone); r.Errors+r.Leaks > 0 {
				t.Errorf("%+v", r)
			}
		}
	}
}
