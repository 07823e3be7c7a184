// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
)

// ErrMemory is wrapped by every error about an address that guest memory does not hold.
var ErrMemory = errors.New("outside guest memory")

// Region is one mapped piece of guest memory.
type Region struct {
	gpa, user uint64
	mem       []byte // the region's bytes, inside mapping
	mapping   []byte // whole pages
}

// MapRegion maps size bytes of the file fd from mmapOffset, which need not be page multiples. gpa is the guest-physical
// address of the first byte and userAddr its address in the front-end's space. The size must not be 0, no range may
// wrap, and the bytes must lie within a regular file (memfd and hugetlbfs files are regular; the size of a character
// device is not known). fd stays the caller's and may be closed afterwards.
//
// The file may still shrink later; touching the lost bytes then raises SIGBUS, which is the caller's to turn into a
// panic with [runtime/debug.SetPanicOnFault].
func MapRegion(fd int, gpa, size, userAddr, mmapOffset uint64) (*Region, error) {
	const maxFile = math.MaxInt64 / 2 // leaves room for rounding up to pages of any size
	switch {
	case size == 0:
		return nil, errors.New("virtq: map region: size is 0")
	case size > math.MaxUint64-gpa:
		return nil, fmt.Errorf("virtq: map region: %#x bytes at guest address %#x wrap around", size, gpa)
	case size > math.MaxUint64-userAddr:
		return nil, fmt.Errorf("virtq: map region: %#x bytes at user address %#x wrap around", size, userAddr)
	case mmapOffset > maxFile || size > maxFile-mmapOffset:
		return nil, fmt.Errorf("virtq: map region: %#x bytes at file offset %#x are too many", size, mmapOffset)
	}
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("virtq: map region: fstat: %w", err)
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFREG && mmapOffset+size > uint64(st.Size) {
		return nil, fmt.Errorf("virtq: map region: %#x bytes at file offset %#x, but the file has %#x", size, mmapOffset, st.Size)
	}
	page, err := pageSize(fd)
	if err != nil {
		return nil, fmt.Errorf("virtq: map region: %w", err)
	}
	lead := mmapOffset % page
	length := (lead + size + page - 1) / page * page
	if mapped.Add(length) > maxMapped {
		mapped.Add(-length)
		return nil, fmt.Errorf("virtq: map region: %#x bytes: guests have no more than %#x together", length, uint64(maxMapped))
	}
	// The guest's owner has reserved the memory, if anybody has; this mapping is a second view of it.
	m, err := syscall.Mmap(fd, int64(mmapOffset-lead), int(length), syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_SHARED|syscall.MAP_NORESERVE)
	if err != nil {
		mapped.Add(-length)
		return nil, fmt.Errorf("virtq: map region: mmap %#x bytes: %w", length, err)
	}
	const madvDontDump = 0x10
	_ = syscall.Madvise(m, madvDontDump) // best effort: a guest's memory has no place in our core dumps
	return &Region{gpa: gpa, user: userAddr, mem: m[lead : lead+size : lead+size], mapping: m}, nil
}

// maxMapped leaves the process a quarter of its address space, 128 TiB on amd64: sparse files of any size cost a hostile
// front-end nothing, and a process without room for its own heap ends.
const maxMapped = 96 << 40

var mapped atomic.Uint64 // bytes of address space that all regions take

// pageSize is the unit in which fd must be mapped and unmapped.
func pageSize(fd int) (uint64, error) {
	const hugetlbfs = 0x958458f6
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(fd, &fs); err != nil {
		return 0, fmt.Errorf("fstatfs: %w", err)
	}
	if err := checkFS(fs.Type); err != nil {
		return 0, err
	}
	if fs.Type == hugetlbfs {
		return uint64(fs.Bsize), nil
	}
	return uint64(os.Getpagesize()), nil
}

// Unmap gives the region's address space back. Nothing may use the region any more: no ring, no memory table, no chain
// and no I/O in flight. A second call is an error.
func (r *Region) Unmap() error {
	m := r.mapping
	r.mem, r.mapping = nil, nil // a late use fails instead of touching what is mapped there next
	if err := syscall.Munmap(m); err != nil {
		return fmt.Errorf("virtq: unmap region: %w", err)
	}
	mapped.Add(-uint64(len(m)))
	return nil
}

// CheckFile refuses a file whose pages another process delivers: one that does not would stop whoever touches them in a
// page fault, in which Go's scheduler cannot interrupt it, and so the whole process at its next garbage collection.
func CheckFile(fd int) error {
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("fstatfs: %w", err)
	}
	return checkFS(fs.Type)
}

func checkFS(magic int64) error {
	const fuse = 0x65735546
	if magic == fuse {
		return errors.New("the file is on FUSE, and memory must not be")
	}
	return nil
}

// GPA is the guest-physical address of the region's first byte.
func (r *Region) GPA() uint64 { return r.gpa }

// Size is the region's length in bytes.
func (r *Region) Size() uint64 { return uint64(len(r.mem)) }

// UserAddr is the address of the region's first byte in the front-end's address space.
func (r *Region) UserAddr() uint64 { return r.user }

// Memory is a guest's memory: an immutable set of regions. The zero value is the empty set. Its methods are safe from
// any goroutine.
type Memory struct {
	regions []*Region // sorted by gpa, none overlapping
}

// NewMemory makes a set of regions. Guest ranges that overlap, or user ranges that overlap, are an error.
func NewMemory(regions ...*Region) (*Memory, error) {
	overlap := func(rs []*Region, start func(*Region) uint64) error {
		slices.SortFunc(rs, func(a, b *Region) int { return cmp.Compare(start(a), start(b)) })
		for i := 1; i < len(rs); i++ {
			if a, b := rs[i-1], rs[i]; start(b)-start(a) < a.Size() {
				return fmt.Errorf("virtq: regions of %#x bytes at %#x and of %#x at %#x overlap", a.Size(), start(a), b.Size(), start(b))
			}
		}
		return nil
	}
	rs := slices.Clone(regions)
	if err := overlap(rs, (*Region).UserAddr); err != nil {
		return nil, fmt.Errorf("%w in the front-end's space", err)
	}
	if err := overlap(rs, (*Region).GPA); err != nil {
		return nil, fmt.Errorf("%w in the guest's space", err)
	}
	return &Memory{rs}, nil
}

// Add returns a set that has r as well.
func (m *Memory) Add(r *Region) (*Memory, error) {
	return NewMemory(append(slices.Clip(m.regions), r)...)
}

// Remove returns a set without the region that has exactly these addresses and this size, and that region, which the
// caller unmaps once nothing uses the old set.
func (m *Memory) Remove(gpa, size, userAddr uint64) (*Memory, *Region, error) {
	i := slices.IndexFunc(m.regions, func(r *Region) bool {
		return r.gpa == gpa && r.Size() == size && r.user == userAddr
	})
	if i < 0 {
		return nil, nil, fmt.Errorf("virtq: no region of %#x bytes at guest address %#x and user address %#x", size, gpa, userAddr)
	}
	return &Memory{slices.Delete(slices.Clone(m.regions), i, i+1)}, m.regions[i], nil
}

// Regions returns the regions, sorted by guest address.
func (m *Memory) Regions() []*Region { return slices.Clone(m.regions) }

// UserToGPA translates an address of the front-end's space. ok tells whether the n bytes there, at least 1, lie wholly
// inside one region.
func (m *Memory) UserToGPA(ua, n uint64) (gpa uint64, ok bool) {
	for _, r := range m.regions {
		if off := ua - r.user; ua >= r.user && off < r.Size() {
			return r.gpa + off, n > 0 && n <= r.Size()-off
		}
	}
	return 0, false
}

// find returns the index of the region that holds gpa, and the offset in it.
func (m *Memory) find(gpa uint64) (i int, off uint64, ok bool) {
	lo, hi := 0, len(m.regions) // the regions before lo start at or below gpa, those from hi on above it
	for lo < hi {
		if mid := (lo + hi) / 2; m.regions[mid].gpa <= gpa {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return 0, 0, false
	}
	r := m.regions[lo-1]
	off = gpa - r.gpa
	return lo - 1, off, off < r.Size()
}

// Bytes returns the n bytes, at least 1, at a guest address. They must lie wholly inside one region.
func (m *Memory) Bytes(gpa, n uint64) ([]byte, error) {
	i, off, ok := m.find(gpa)
	if !ok || n == 0 || n > m.regions[i].Size()-off {
		return nil, fmt.Errorf("%#x bytes at %#x: %w", n, gpa, ErrMemory)
	}
	return m.regions[i].mem[off : off+n : off+n], nil
}

// AppendVec appends the n bytes, at least 1, at a guest address to dst, and the guest address of each piece to gpas. The
// bytes may go on from one region into the next if nothing lies between. After an error, what was appended is void.
func (m *Memory) AppendVec(dst []syscall.Iovec, gpas []uint64, gpa, n uint64) ([]syscall.Iovec, []uint64, error) {
	i, off, ok := m.find(gpa)
	if !ok || n == 0 {
		return dst, gpas, fmt.Errorf("%#x bytes at %#x: %w", n, gpa, ErrMemory)
	}
	for at, left := gpa, n; ; i++ {
		r := m.regions[i]
		piece := min(left, r.Size()-off)
		dst = append(dst, syscall.Iovec{Base: &r.mem[off], Len: piece})
		gpas = append(gpas, at)
		if left -= piece; left == 0 {
			return dst, gpas, nil
		}
		at, off = at+piece, 0 // no region wraps around, so neither does at
		if i+1 == len(m.regions) || m.regions[i+1].gpa != at {
			return dst, gpas, fmt.Errorf("%#x bytes at %#x: %w from %#x on", n, gpa, ErrMemory, at)
		}
	}
}
