// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// heapRegion is a region that the race detector watches: it ignores what is not on Go's heap.
func heapRegion(gpa, size, user uint64) *Region {
	const large = 64 << 10 // Go starts large objects at a page
	return &Region{gpa: gpa, user: user, mem: make([]byte, max(size, large))[:size:size]}
}

func mustMemory(t testing.TB, regions ...*Region) *Memory {
	t.Helper()
	m, err := NewMemory(regions...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func tempFile(t testing.TB, size int64) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "mem"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return f
}

func mapRegion(t testing.TB, f *os.File, gpa, size, user, off uint64) *Region {
	t.Helper()
	r, err := MapRegion(int(f.Fd()), gpa, size, user, off)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if r.mapping != nil {
			_ = r.Unmap()
		}
	})
	return r
}

// TestAddressSpace: sparse files cannot use up the process's address space.
func TestAddressSpace(t *testing.T) {
	f := tempFile(t, 0)
	const size = 1 << 40
	fd, err := unix.MemfdCreate("sparse", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, size); err != nil {
		t.Fatal(err)
	}
	// The race detector leaves too little to map it all.
	others := maxMapped - 2*size - mapped.Load()
	mapped.Add(others)
	defer mapped.Add(-others)
	before := mapped.Load()
	for range 2 {
		var all []*Region
		for {
			r, err := MapRegion(fd, 0, size, 0, 0)
			if err != nil || len(all) > 2 {
				break
			}
			all = append(all, r)
		}
		if n := len(all); n != 2 {
			t.Errorf("%d regions", n)
		}
		// One that cannot be mapped takes nothing.
		if _, err := MapRegion(int(f.Fd()), 0, 4096, 0, 0); err == nil {
			t.Error("an empty file was mapped")
		}
		for _, r := range all {
			if err := r.Unmap(); err != nil {
				t.Error(err)
			}
		}
		if got := mapped.Load(); got != before {
			t.Errorf("%#x bytes are counted, %#x before", got, before)
		}
	}
}

func TestCheckFile(t *testing.T) {
	if err := CheckFile(int(tempFile(t, 1).Fd())); err != nil {
		t.Error(err)
	}
	if checkFS(0x65735546) == nil {
		t.Error("FUSE is accepted")
	}
}

func TestMapRegion(t *testing.T) {
	f := tempFile(t, 5<<12)
	if _, err := f.WriteAt([]byte("guest"), 4096+100); err != nil {
		t.Fatal(err)
	}
	r, err := MapRegion(int(f.Fd()), 0x10000, 5000, 0x7000_0000, 4096+100)
	if err != nil {
		t.Fatal(err)
	}
	if r.GPA() != 0x10000 || r.Size() != 5000 || r.UserAddr() != 0x7000_0000 {
		t.Errorf("region %#x %d %#x", r.GPA(), r.Size(), r.UserAddr())
	}
	if len(r.mapping) != 2*os.Getpagesize() && os.Getpagesize() == 4096 {
		t.Errorf("mapped %d bytes", len(r.mapping))
	}
	// The file is not needed any more.
	other, err := os.OpenFile(f.Name(), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_ = f.Close()
	b, err := mustMemory(t, r).Bytes(0x10000, 5000)
	if err != nil {
		t.Fatal(err)
	}
	if string(b[:5]) != "guest" {
		t.Errorf("read %q", b[:5])
	}
	copy(b[4995:], "owner")
	got := make([]byte, 5)
	if _, err := other.ReadAt(got, 4096+100+4995); err != nil || string(got) != "owner" {
		t.Errorf("file has %q, %v", got, err)
	}
	if err := r.Unmap(); err != nil {
		t.Error(err)
	}
	if err := r.Unmap(); err == nil {
		t.Error("second Unmap succeeded")
	}
}

func TestMapRegionUnknownSize(t *testing.T) {
	f, err := os.OpenFile("/dev/zero", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	if r := mapRegion(t, f, 0, 10000, 0, 0); r.Size() != 10000 {
		t.Errorf("size %d", r.Size())
	}
}

func TestMapRegionErrors(t *testing.T) {
	f := tempFile(t, 8192)
	ro, err := os.Open(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pr.Close()
	defer pw.Close()
	file := int(f.Fd())
	for _, tc := range []struct {
		name                 string
		fd                   int
		gpa, size, user, off uint64
	}{
		{"size 0", file, 0, 0, 0, 0},
		{"guest range wraps", file, math.MaxUint64 - 100, 4096, 0, 0},
		{"user range wraps", file, 0, 4096, math.MaxUint64 - 100, 0},
		{"past the end", file, 0, 8193, 0, 0},
		{"offset past the end", file, 0, 1, 0, 8192},
		{"offset and size past the end", file, 0, 4097, 0, 4096},
		{"offset wraps", file, 0, 4096, 0, math.MaxUint64 - 4095},
		{"offset of 63 bits", file, 0, 4096, 0, math.MaxInt64},
		{"size of 64 bits", file, 0, math.MaxUint64, 0, 0},
		{"size of 63 bits, offset too", file, 0, math.MaxInt64, 0, math.MaxInt64},
		{"no fd", -1, 0, 4096, 0, 0},
		{"pipe", int(pr.Fd()), 0, 4096, 0, 0},
		{"read-only", int(ro.Fd()), 0, 4096, 0, 0},
	} {
		if r, err := MapRegion(tc.fd, tc.gpa, tc.size, tc.user, tc.off); err == nil {
			t.Errorf("%s: no error", tc.name)
			_ = r.Unmap()
		}
	}
}

// A file that shrinks while it is mapped must not end the process.
func TestTruncatedMemory(t *testing.T) {
	f := tempFile(t, 1<<16)
	q, err := NewSplit(SplitConfig{Mem: mustMemory(t, mapRegion(t, f, 0, 1<<16, 0, 0)), Size: 8, Desc: 0, Avail: 4096, Used: 8192})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	for name, use := range map[string]func(){
		"Pop":          func() { _, _ = q.Pop(new(Chain)) },
		"EnableNotify": func() { q.EnableNotify() },
		"Chain":        func() { _ = q.Chain(1, new(Chain)) },
	} {
		func() {
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no fault", name)
				}
			}()
			use()
		}()
	}
}

func TestNewMemoryOverlap(t *testing.T) {
	type span struct{ gpa, size, user uint64 }
	for _, tc := range []struct {
		name string
		rs   []span
		ok   bool
	}{
		{"none", nil, true},
		{"adjacent", []span{{0x2000, 0x1000, 0x9000}, {0x1000, 0x1000, 0xa000}}, true},
		{"guest overlap by a byte", []span{{0x1fff, 0x1000, 0x9000}, {0x1000, 0x1000, 0x20000}}, false},
		{"user overlap by a byte", []span{{0x1000, 0x1000, 0x9000}, {0x8000, 0x1000, 0x9fff}}, false},
		{"same twice", []span{{0x1000, 0x1000, 0x9000}, {0x1000, 0x1000, 0x9000}}, false},
		{"one in another", []span{{0, 0x10000, 0}, {0x1000, 1, 0x90000}}, false},
		{"third overlaps the first", []span{{0, 0x10000, 0}, {0x20000, 1, 0x90000}, {0x100, 1, 0xa0000}}, false},
		{"top of the address space", []span{{math.MaxUint64 - 0x1000, 0x1000, math.MaxUint64 - 0x1000}, {0, 0x1000, 0}}, true},
	} {
		var rs []*Region
		m := new(Memory)
		var addErr error
		for _, s := range tc.rs {
			r := heapRegion(s.gpa, s.size, s.user)
			rs = append(rs, r)
			if addErr == nil {
				m, addErr = m.Add(r)
			}
		}
		all, err := NewMemory(rs...)
		if (err == nil) != tc.ok || (addErr == nil) != tc.ok {
			t.Errorf("%s: NewMemory: %v; Add: %v", tc.name, err, addErr)
		}
		if tc.ok && !slices.Equal(all.Regions(), m.Regions()) {
			t.Errorf("%s: NewMemory and Add differ", tc.name)
		}
	}
}

func TestAddRemove(t *testing.T) {
	a, b, c := heapRegion(0x1000, 0x1000, 0x1000), heapRegion(0x3000, 0x1000, 0x3000), heapRegion(0x2000, 0x1000, 0x2000)
	m := mustMemory(t, a, b)
	grown, err := m.Add(c)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.Regions(), []*Region{a, b}) || !slices.Equal(grown.Regions(), []*Region{a, c, b}) {
		t.Error("wrong regions after Add")
	}
	for _, no := range [][3]uint64{{0x2000, 0x1000, 0x3000}, {0x2000, 0xfff, 0x2000}, {0x2001, 0x1000, 0x2000}} {
		if _, _, err := grown.Remove(no[0], no[1], no[2]); err == nil {
			t.Errorf("removed %#x", no)
		}
	}
	less, r, err := grown.Remove(0x2000, 0x1000, 0x2000)
	if err != nil || r != c {
		t.Fatalf("removed %v, %v", r, err)
	}
	if !slices.Equal(less.Regions(), []*Region{a, b}) || !slices.Equal(grown.Regions(), []*Region{a, c, b}) {
		t.Error("wrong regions after Remove")
	}
}

// testMemory is three regions: the first two are adjacent for the guest, the last ends at the last address but one.
func testMemory(t testing.TB) (m *Memory, a, b, top *Region) {
	a, b = heapRegion(0x10000, 0x1000, 0x700000), heapRegion(0x11000, 0x2000, 0x500000)
	top = heapRegion(math.MaxUint64-0x1000, 0x1000, math.MaxUint64-0x1000)
	return mustMemory(t, top, b, a), a, b, top
}

func TestUserToGPA(t *testing.T) {
	m, _, _, _ := testMemory(t)
	for _, tc := range []struct {
		ua, n, gpa uint64
		ok         bool
	}{
		{0x700000, 0x1000, 0x10000, true},
		{0x700fff, 1, 0x10fff, true},
		{0x700fff, 2, 0, false},
		{0x701000, 1, 0, false},
		{0x6fffff, 2, 0, false},
		{0x700000, 0, 0, false},
		{0x501000, 0x1000, 0x12000, true},
		{0x501000, math.MaxUint64, 0, false},
		{math.MaxUint64 - 1, 1, math.MaxUint64 - 1, true},
		{math.MaxUint64, 1, 0, false},
		{math.MaxUint64 - 1, 3, 0, false},
	} {
		if gpa, ok := m.UserToGPA(tc.ua, tc.n); ok != tc.ok || ok && gpa != tc.gpa {
			t.Errorf("UserToGPA(%#x, %#x) = %#x, %v", tc.ua, tc.n, gpa, ok)
		}
	}
}

func TestBytesAndAppendVec(t *testing.T) {
	m, a, b, top := testMemory(t)
	vec := func(p []byte) syscall.Iovec { return syscall.Iovec{Base: &p[0], Len: uint64(len(p))} }
	for _, tc := range []struct {
		gpa, n uint64
		bytes  []byte // what Bytes gives; nil: error
		vec    []syscall.Iovec
		gpas   []uint64
	}{
		{0x10000, 0x1000, a.mem, []syscall.Iovec{vec(a.mem)}, []uint64{0x10000}},
		{0x10fff, 1, a.mem[0xfff:], []syscall.Iovec{vec(a.mem[0xfff:])}, []uint64{0x10fff}},
		{0x11000, 1, b.mem[:1], []syscall.Iovec{vec(b.mem[:1])}, []uint64{0x11000}},
		{0x10ffe, 4, nil, []syscall.Iovec{vec(a.mem[0xffe:]), vec(b.mem[:2])}, []uint64{0x10ffe, 0x11000}},
		{0x10000, 0x3000, nil, []syscall.Iovec{vec(a.mem), vec(b.mem)}, []uint64{0x10000, 0x11000}},
		{math.MaxUint64 - 1, 1, top.mem[0xfff:], []syscall.Iovec{vec(top.mem[0xfff:])}, []uint64{math.MaxUint64 - 1}},
		{0x10000, 0x3001, nil, nil, nil},
		{0x12fff, 2, nil, nil, nil},
		{0x13000, 1, nil, nil, nil},
		{0xffff, 2, nil, nil, nil},
		{0, 1, nil, nil, nil},
		{0x10000, 0, nil, nil, nil},
		{0x10000, math.MaxUint64, nil, nil, nil},
		{0x10800, math.MaxUint64 - 0x107ff, nil, nil, nil}, // ends at 2^64
		{0x10800, math.MaxUint64 - 0x1000, nil, nil, nil},  // wraps around
		{math.MaxUint64, 1, nil, nil, nil},
		{math.MaxUint64 - 1, 2, nil, nil, nil},
		{math.MaxUint64 - 1, math.MaxUint64, nil, nil, nil},
	} {
		got, err := m.Bytes(tc.gpa, tc.n)
		switch {
		case tc.bytes == nil:
			if !errors.Is(err, ErrMemory) {
				t.Errorf("Bytes(%#x, %#x): %v", tc.gpa, tc.n, err)
			}
		case err != nil || &got[0] != &tc.bytes[0] || len(got) != len(tc.bytes) || cap(got) != len(got):
			t.Errorf("Bytes(%#x, %#x): %d bytes, %v", tc.gpa, tc.n, len(got), err)
		}
		v, gpas, err := m.AppendVec(make([]syscall.Iovec, 1), make([]uint64, 1), tc.gpa, tc.n)
		switch {
		case tc.vec == nil:
			if !errors.Is(err, ErrMemory) {
				t.Errorf("AppendVec(%#x, %#x): %v", tc.gpa, tc.n, err)
			}
		case err != nil || !slices.Equal(v[1:], tc.vec) || !slices.Equal(gpas[1:], tc.gpas):
			t.Errorf("AppendVec(%#x, %#x): %v %#x %v", tc.gpa, tc.n, v, gpas, err)
		}
	}
	if _, _, err := new(Memory).AppendVec(nil, nil, 0, 1); !errors.Is(err, ErrMemory) {
		t.Errorf("empty memory: %v", err)
	}
}
