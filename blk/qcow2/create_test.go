// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// allOptions is every combination of options that an image can have, but for names.
func allOptions(size int64) []CreateOptions {
	var all []CreateOptions
	for _, version := range []int{2, 3} {
		for _, cluster := range []int64{512, 1024, 4096, 16 << 10, 64 << 10, 2 << 20} {
			for _, refcounts := range []int{1, 2, 4, 8, 16, 32, 64} {
				for _, prealloc := range []string{"off", "metadata", "full"} {
					for flags := range 8 {
						o := CreateOptions{
							Size: size, Version: version, ClusterSize: cluster, RefcountBits: refcounts, Preallocation: prealloc,
							LazyRefcounts: flags&1 != 0, ExtendedL2: flags&2 != 0,
						}
						if flags&4 != 0 {
							o.DataFile = "data"
							o.Data = blktest.NewMemory(0)
							o.DataFileRaw = prealloc != "off"
						}
						if o.check() == nil {
							all = append(all, o)
						}
					}
				}
			}
		}
	}
	return all
}

func mustBeSound(t *testing.T, storage blk.Node, window int64) CheckResult {
	t.Helper()
	r, err := check(blk.NewTask(), storage, RepairNone, window, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors+r.Leaks != 0 {
		t.Fatalf("%d errors, %d leaks: %v", r.Errors, r.Leaks, brief(r))
	}
	return r
}

func TestCreate(t *testing.T) {
	if testing.Short() {
		t.Skip("long, and nothing in it happens at once")
	}
	for _, size := range []int64{0, 512, 3<<20 + 512} {
		for i, o := range allOptions(size) {
			if size < 1<<20 && i%7 > 0 || o.ClusterSize >= 64<<10 && i%5 > 0 { // large ones take long
				continue
			}
			storage := blktest.NewMemory(12345 * 512)
			if err := Create(blk.NewTask(), storage, o); err != nil {
				t.Fatalf("%+v: %v", o, err)
			}
			for _, window := range []int64{1, checkWindow} {
				r := mustBeSound(t, storage, window)
				if want := (size + o.ClusterSize - 1) / o.ClusterSize; r.TotalClusters != want || o.Preallocation != "off" && r.AllocatedClusters != want {
					t.Fatalf("%+v: %+v", o, r)
				}
				if r.ImageEnd != storage.Info().Size {
					t.Fatalf("%+v: the image ends at %d, the storage at %d", o, r.ImageEnd, storage.Info().Size)
				}
			}
			h, err := ReadHeader(blk.NewTask(), storage)
			if err != nil {
				t.Fatal(err)
			}
			if h.Size != size || int(h.Version) != o.Version || h.ClusterSize() != o.ClusterSize || int(h.RefcountBits()) != o.RefcountBits ||
				h.ExtendedL2() != o.ExtendedL2 || (h.Compatible&CompatLazyRefcounts != 0) != o.LazyRefcounts ||
				h.DataFile != o.DataFile || h.dataFileRaw() != o.DataFileRaw {
				t.Fatalf("%+v became %+v", o, h)
			}
			if o.Data != nil && o.Data.Info().Size != size {
				t.Fatalf("%+v: the data file has %d bytes", o, o.Data.Info().Size)
			}
		}
	}
}

func TestCreateNames(t *testing.T) {
	for _, o := range []CreateOptions{
		{Size: 1 << 20, BackingFile: "base", BackingFormat: "raw"},
		{Size: 1 << 20, BackingFile: strings.Repeat("n", 1023), BackingFormat: "qcow2", ClusterSize: 4096, Version: 2},
		{Size: 1 << 20, BackingFile: strings.Repeat("n", 300), BackingFormat: "qcow2", ClusterSize: 512},
		{Size: 1 << 20, BackingFile: "base", BackingFormat: "qcow2", DataFile: "data", Compression: "zstd", ExtendedL2: true},
	} {
		storage := blktest.NewMemory(0)
		if err := Create(blk.NewTask(), storage, o); err != nil {
			t.Fatal(err)
		}
		mustBeSound(t, storage, checkWindow)
		h, err := ReadHeader(blk.NewTask(), storage)
		if err != nil {
			t.Fatal(err)
		}
		if h.BackingFile != o.BackingFile || h.BackingFormat != o.BackingFormat || h.DataFile != o.DataFile ||
			(h.Compression == CompressionZstd) != (o.Compression == "zstd") {
			t.Errorf("%+v became %+v", o, h)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, c := range []struct {
		o    CreateOptions
		says string
	}{
		{CreateOptions{Size: 1000}, "multiple of 512"},
		{CreateOptions{Size: -512}, "multiple of 512"},
		{CreateOptions{Version: 4}, "there are 2 and 3"},
		{CreateOptions{ClusterSize: 3000}, "power of two"},
		{CreateOptions{ClusterSize: 256}, "from 512"},
		{CreateOptions{ClusterSize: 4 << 20}, "to 2097152"},
		{CreateOptions{RefcountBits: 3}, "power of two from 1 to 64"},
		{CreateOptions{RefcountBits: 128}, "power of two from 1 to 64"},
		{CreateOptions{Version: 2, RefcountBits: 8}, "version 3 is needed"},
		{CreateOptions{Version: 2, LazyRefcounts: true}, "version 3 is needed"},
		{CreateOptions{Version: 2, Compression: "zstd"}, "version 3 is needed"},
		{CreateOptions{Version: 2, ExtendedL2: true}, "version 3 is needed"},
		{CreateOptions{Version: 2, DataFile: "d"}, "version 3 is needed"},
		{CreateOptions{ExtendedL2: true, ClusterSize: 8192}, "at least 16384"},
		{CreateOptions{Compression: "lz4"}, "zlib and zstd"},
		{CreateOptions{Preallocation: "some"}, "metadata, falloc and full"},
		{CreateOptions{BackingFile: "b"}, "format must be named"},
		{CreateOptions{BackingFormat: "raw"}, "without a backing file"},
		{CreateOptions{BackingFile: strings.Repeat("b", 1024), BackingFormat: "raw"}, "at most 1023"},
		{CreateOptions{BackingFile: strings.Repeat("b", 500), BackingFormat: "raw", ClusterSize: 512}, "do not fit"},
		{CreateOptions{BackingFile: "b", BackingFormat: "raw", Preallocation: "metadata"}, "extended L2 entries are needed"},
		{CreateOptions{DataFileRaw: true}, "no data file is named"},
		{CreateOptions{DataFile: "d", DataFileRaw: true, BackingFile: "b", BackingFormat: "raw"}, "raw data file"},
		{CreateOptions{DataFile: "d", Preallocation: "full"}, "not opened"},
		{CreateOptions{Data: blktest.NewMemory(0)}, "not named"},
		{CreateOptions{Size: 129 << 30, ClusterSize: 512}, "137438953472 at most"},
		{CreateOptions{Size: 1 << 62}, "at most"},
		{CreateOptions{Size: 100 << 30, ClusterSize: 512, RefcountBits: 64, Preallocation: "metadata"}, "34359738368 at most"},
	} {
		storage := blktest.NewMemory(512)
		err := Create(blk.NewTask(), storage, c.o)
		if !errors.Is(err, blk.ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%+v: error %v, want one about %q", c.o, err, c.says)
		}
		if storage.Info().Size != 512 {
			t.Errorf("%+v: the storage was changed", c.o)
		}
	}
}

// sparse is a disk of any size that remembers only what is not zero, in pieces.
type sparse struct {
	info   blk.Info
	pieces map[int64][]byte
}

const sparsePiece = 64 << 10

func newSparse() *sparse {
	return &sparse{info: blk.Info{Name: "sparse", Align: 1}, pieces: map[int64][]byte{}}
}

func (s *sparse) Info() *blk.Info                                { return &s.info }
func (s *sparse) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }
func (s *sparse) Map(*blk.Task, int64, int64) (blk.Extent, error) {
	return blk.Extent{}, blk.ErrNotSupported
}
func (s *sparse) Children() []blk.Node { return nil }
func (s *sparse) Close() error         { return nil }
func (s *sparse) Resize(_ *blk.Task, size int64, shrink bool) error {
	in := s.info // what Info gave before does not change
	in.Size = size
	s.info = in
	return nil
}

func (s *sparse) Do(_ *blk.Task, r *blk.Request) error {
	if r.Op != blk.OpRead && r.Op != blk.OpWrite {
		return nil // there are no zeros to write where nothing is
	}
	for off := r.Off; off < r.Off+r.Len; {
		i, in := off/sparsePiece, off%sparsePiece
		n := min(sparsePiece-in, r.Off+r.Len-off)
		v := r.Data.AppendSlice(nil, off-r.Off, n)
		p := s.pieces[i]
		switch {
		case r.Op == blk.OpRead && p == nil:
			v.Zero()
		case r.Op == blk.OpRead:
			v.CopyFrom(p[in:])
		default:
			b := make([]byte, n)
			v.CopyTo(b)
			if p == nil {
				if len(strings.Trim(string(b), "\x00")) == 0 {
					break
				}
				p = make([]byte, sparsePiece)
				s.pieces[i] = p
			}
			copy(p[in:], b)
		}
		off += n
	}
	return nil
}

// TestCreateLarge: 64 TiB, and the largest disk there can be.
func TestCreateLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("long, and nothing in it happens at once")
	}
	for _, o := range []CreateOptions{
		{Size: 64 << 40},
		{Size: 64 << 40, ClusterSize: 2 << 20, Preallocation: "metadata"},
		{Size: 128 << 30, ClusterSize: 512},
		{Size: 1<<61 - 512, ClusterSize: 2 << 20},
	} {
		s := newSparse()
		if err := Create(blk.NewTask(), s, o); err != nil {
			t.Fatal(err)
		}
		if o.Preallocation == "" {
			mustBeSound(t, s, checkWindow)
		}
	}
}

func TestCreateFaults(t *testing.T) {
	o := CreateOptions{Size: 1 << 20, ClusterSize: 4096, Preallocation: "full"}
	for i := 0; ; i++ {
		f := blktest.NewFault(blktest.NewMemory(0))
		trap := f.Add(blktest.Rule{After: i, Count: 1, Err: syscall.ENOSPC})
		err := Create(blk.NewTask(), f, o)
		if trap.Caught() == 0 {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("request %d failed, and Create says %v", i, err)
		}
		if _, err := ReadHeader(blk.NewTask(), f); err == nil && i < f.Count(blk.OpRead)+f.Count(blk.OpWrite)-1 {
			t.Fatalf("request %d failed, and there is an image", i)
		}
	}
}

// TestCreateCrash: a power cut leaves the whole image or none; after Create it is there.
func TestCreateCrash(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	o := CreateOptions{Size: 1 << 20, ClusterSize: 16 << 10, BackingFile: "base", BackingFormat: "qcow2"}
	d := blktest.NewCrashDisk(0)
	if err := Create(blk.NewTask(), d, o); err != nil {
		t.Fatal(err)
	}
	for point := range d.Points() + 1 {
		for range 4 {
			after := d.CrashAt(point, rng)
			if _, err := ReadHeader(blk.NewTask(), after); err == nil {
				mustBeSound(t, after, checkWindow)
			} else if point == d.Points() {
				t.Fatal(err)
			}
		}
	}
}

func ExampleCreate() {
	storage := blktest.NewMemory(0)
	err := Create(blk.NewTask(), storage, CreateOptions{Size: 10 << 30})
	fmt.Println(storage.Info().Size, err)
	// Output: 262144 <nil>
}
