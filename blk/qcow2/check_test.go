// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// anImage is an image whose clusters are all allocated, with its parts at hand.
type anImage struct {
	b []byte
	h *Header
}

func newImage(t *testing.T, o CreateOptions) *anImage {
	t.Helper()
	storage := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), storage, o); err != nil {
		t.Fatal(err)
	}
	b := storage.Bytes()
	h, err := ParseHeader(b, int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	return &anImage{b, h}
}

func (im *anImage) memory() *blktest.Memory { return memoryOf(im.b) }

func memoryOf(b []byte) *blktest.Memory {
	m := blktest.NewMemory(int64(len(b)))
	_ = writeFull(blk.NewTask(), m, b, 0) // a Memory never fails
	return m
}

func (im *anImage) word(off int64) uint64       { return binary.BigEndian.Uint64(im.b[off:]) }
func (im *anImage) setWord(off int64, v uint64) { binary.BigEndian.PutUint64(im.b[off:], v) }
func (im *anImage) l2(i int64) int64            { return l1Entry(im.word(im.h.L1Offset + 8*i)).offset() }

func (im *anImage) refBlockOf(cluster int64) (block []byte, i int64) {
	at := int64(im.word(im.h.RefTableOffset + cluster>>im.h.refBlockBits()*8))
	return im.b[at : at+im.h.ClusterSize()], cluster & (1<<im.h.refBlockBits() - 1)
}

func (im *anImage) setRefcount(off int64, v uint64) {
	b, i := im.refBlockOf(off >> im.h.ClusterBits)
	putCount(b, im.h.RefcountOrder, i, v)
}

// damages is what can be wrong with an image, and what becomes of it.
var damages = []struct {
	name          string
	do            func(im *anImage)
	errors, leaks any  // whether a check finds them; nil: that depends on options
	stays         bool // nothing can be done
}{
	{"nothing", func(*anImage) {}, false, false, false},
	{"count of a data cluster too low", func(im *anImage) { im.setRefcount(int64(im.word(im.l2(0)+8)&offsetMask), 0) }, true, false, false},
	{"count of a data cluster too high", func(im *anImage) {
		im.setRefcount(int64(im.word(im.l2(0)+8)&offsetMask), 3)
		im.setWord(im.l2(0)+8, im.word(im.l2(0)+8)&^copied)
	}, false, true, false},
	{"count of a data cluster too high, copied bit set", func(im *anImage) { im.setRefcount(int64(im.word(im.l2(0)+8)&offsetMask), 2) }, true, true, false},
	{"a cluster without references", func(im *anImage) { im.setWord(im.l2(1)+16, 0) }, false, true, false},
	{"an L2 table without references", func(im *anImage) { im.setWord(im.h.L1Offset+8, 0) }, false, true, false},
	{"count of an L2 table too low", func(im *anImage) { im.setRefcount(im.l2(1), 0) }, true, false, false},
	{"count of the header too low", func(im *anImage) { im.setRefcount(0, 0) }, true, false, false},
	{"L1 entry not copied", func(im *anImage) { im.setWord(im.h.L1Offset+8, im.word(im.h.L1Offset+8)&^copied) }, true, false, false},
	{"L2 entry not copied", func(im *anImage) { im.setWord(im.l2(0), im.word(im.l2(0))&^copied) }, true, false, false},
	{"a cluster twice", func(im *anImage) { im.setWord(im.l2(0), im.word(im.l2(1))) }, true, true, false},
	{"an L2 table twice", func(im *anImage) { im.setWord(im.h.L1Offset, im.word(im.h.L1Offset+8)) }, true, true, false},
	{"no refcount block", func(im *anImage) { im.setWord(im.h.RefTableOffset, 0) }, true, false, false},
	{"no refcount blocks", func(im *anImage) { clear(im.b[im.h.RefTableOffset:][:im.h.ClusterSize()]) }, true, false, false},
	{"refcount block nowhere", func(im *anImage) { im.setWord(im.h.RefTableOffset+8, 1<<50) }, true, nil, false},
	{"refcount block beside a cluster", func(im *anImage) { im.setWord(im.h.RefTableOffset+8, im.word(im.h.RefTableOffset+8)+8) }, true, nil, false},
	{"refcount block twice", func(im *anImage) { im.setWord(im.h.RefTableOffset+8, im.word(im.h.RefTableOffset)) }, true, nil, false},
	{"refcount block also data", func(im *anImage) { im.setWord(im.l2(0), copied|im.word(im.h.RefTableOffset)) }, true, true, false},
	{"refcount table also data", func(im *anImage) { im.setWord(im.l2(0), copied|uint64(im.h.RefTableOffset)) }, true, true, false},
	{"counts all 0", func(im *anImage) {
		for i := int64(0); i < int64(len(im.b))>>im.h.ClusterBits; i++ {
			im.setRefcount(i<<im.h.ClusterBits, 0)
		}
	}, true, false, false},
	{"dirty", func(im *anImage) { im.b[79] |= IncompatDirty }, false, false, false},
	{"corrupt", func(im *anImage) { im.b[79] |= IncompatCorrupt }, false, false, false},
	{"data cluster also header", func(im *anImage) { im.setWord(im.l2(0), copied|0x100<<1) }, true, true, true},
	{"data cluster also L1 table", func(im *anImage) { im.setWord(im.l2(0), copied|uint64(im.h.L1Offset)) }, true, true, true},
	{"data cluster also L2 table", func(im *anImage) { im.setWord(im.l2(0), copied|uint64(im.l2(1))) }, true, true, true},
	{"data behind the end", func(im *anImage) { im.setWord(im.l2(0), copied|1<<40) }, true, true, true},
	{"L2 table behind the end", func(im *anImage) { im.setWord(im.h.L1Offset, copied|1<<40) }, true, true, true},
	{"L2 table beside a cluster", func(im *anImage) { im.b[im.h.L1Offset+6] += 2 }, true, true, true},
	{"reserved bits", func(im *anImage) { im.setWord(im.l2(0), im.word(im.l2(0))|1<<57) }, true, false, true},
	{"behind the end, and no refcount block", func(im *anImage) {
		im.setWord(im.l2(0), copied|uint64(len(im.b)))
		im.setWord(im.h.RefTableOffset, 0)
	}, true, nil, true},
}

// small is an image with several of everything.
func small(refcountBits int) CreateOptions {
	return CreateOptions{Size: 300 << 10, ClusterSize: 1024, RefcountBits: refcountBits, Preallocation: "metadata"}
}

func TestDamage(t *testing.T) {
	if testing.Short() {
		t.Skip("long, and nothing in it happens at once")
	}
	for _, d := range damages {
		for _, refcountBits := range []int{2, 16, 64} {
			for _, window := range []int64{1, checkWindow} {
				t.Run(fmt.Sprintf("%s/%d/%d", d.name, refcountBits, window), func(t *testing.T) {
					if refcountBits == 2 && d.name == "counts all 0" {
						t.Skip("one block has room for all counts, and with them for all zeros")
					}
					im := newImage(t, small(refcountBits))
					d.do(im)
					m := im.memory()
					found, err := check(blk.NewTask(), m, RepairNone, window, nil)
					if err != nil {
						t.Fatal(err)
					}
					if d.errors != (found.Errors > 0) || d.leaks != nil && d.leaks != (found.Leaks > 0) {
						t.Fatalf("errors %v, leaks %v were expected: %v", d.errors, d.leaks, brief(found))
					}
					if !bytes.Equal(m.Bytes(), im.b) {
						t.Fatal("a check without repair changed the image")
					}

					lower := im.memory()
					left, err := check(blk.NewTask(), lower, RepairLeaks, window, nil)
					if err != nil {
						t.Fatal(err)
					}
					// Counts in a block that is also something else are not touched.
					lowered := !d.stays && !strings.HasPrefix(d.name, "refcount")
					if lowered && left.Leaks > 0 || left.Errors > found.Errors || d.errors == false && left.Errors > 0 {
						t.Fatalf("leaks repaired: %v", brief(left))
					}
					assertLowered(t, im, lower.Bytes())

					left, err = check(blk.NewTask(), m, RepairAll, window, nil)
					if err != nil {
						t.Fatal(err)
					}
					if left.Errors > 0 != d.stays || !d.stays && left.Leaks > 0 {
						t.Fatalf("repaired: %v", brief(left))
					}
					if left.ErrorsFixed > 0 != (left.Errors < found.Errors) {
						t.Errorf("of %d errors %d were fixed, and %d are left", found.Errors, left.ErrorsFixed, left.Errors)
					}
					if d.stays {
						return
					}
					mustBeSound(t, m, window)
					if b := m.Bytes(); b[79]&(IncompatDirty|IncompatCorrupt) != 0 {
						t.Error("the image is still marked")
					}
				})
			}
		}
	}
}

// assertLowered checks that no reference count is higher than before, where both images have one.
func assertLowered(t *testing.T, before *anImage, now []byte) {
	t.Helper()
	h, err := ParseHeader(now, int64(len(now)))
	if err != nil {
		t.Fatal(err)
	}
	if h.RefTableOffset != before.h.RefTableOffset {
		t.Fatal("the reference counts were rebuilt")
	}
	for i, e := 0, before.h.RefTableOffset; i < int(before.h.ClusterSize())/8; i++ {
		at := int64(before.word(e + 8*int64(i)))
		if at == 0 || at&(before.h.ClusterSize()-1) != 0 || at >= int64(len(now)) {
			continue
		}
		for j := range int64(1) << h.refBlockBits() {
			if getCount(now[at:], h.RefcountOrder, j) > getCount(before.b[at:], h.RefcountOrder, j) {
				t.Fatalf("the reference count of cluster %d was raised", int64(i)<<h.refBlockBits()+j)
			}
		}
	}
}

// TestRepairCrash: after a power cut anywhere in a repair, another repair ends well.
func TestRepairCrash(t *testing.T) {
	if testing.Short() {
		t.Skip("long, and nothing in it happens at once")
	}
	rng := rand.New(rand.NewPCG(7, 7))
	for _, d := range damages {
		if d.stays {
			continue
		}
		im := newImage(t, small(16))
		d.do(im)
		m := im.memory()
		before := must(check(blk.NewTask(), m, RepairNone, checkWindow, nil))
		disk := blktest.NewCrashDisk(int64(len(im.b)))
		if err := writeFull(blk.NewTask(), disk, im.b, 0); err != nil {
			t.Fatal(err)
		}
		if err := blk.Do(blk.NewTask(), disk, &blk.Request{Op: blk.OpFlush}); err != nil {
			t.Fatal(err)
		}
		first := disk.Points()
		must(check(blk.NewTask(), disk, RepairAll, checkWindow, nil))
		for point := first; point <= disk.Points(); point++ {
			for range 3 {
				after := disk.CrashAt(point, rng)
				r := must(check(blk.NewTask(), after, RepairNone, checkWindow, nil))
				// A copied bit that is wrong now was wrong before: only the count was not as it had been promised.
				for _, f := range r.Findings {
					if strings.Contains(f.What, "the copied bit is") {
						r.Errors--
					}
				}
				if r.Errors > before.Errors {
					t.Fatalf("%s: cut at %d of %d: %d errors became %d: %v", d.name, point, disk.Points(), before.Errors, r.Errors, brief(r))
				}
				if point == disk.Points() && r.Errors+r.Leaks > 0 {
					t.Fatalf("%s: not durable: %+v", d.name, brief(r))
				}
				if r = must(check(blk.NewTask(), after, RepairAll, checkWindow, nil)); r.Errors+r.Leaks > 0 {
					t.Fatalf("%s: cut at %d of %d: cannot be repaired any more: %+v", d.name, point, disk.Points(), brief(r))
				}
			}
		}
	}
}

// brief is a result of which one can read the report.
func brief(r CheckResult) string {
	r.Findings = r.Findings[:min(len(r.Findings), 5)]
	return fmt.Sprintf("%+v", r)
}

func must(r CheckResult, err error) CheckResult {
	if err != nil {
		panic(err)
	}
	return r
}

// TestRepairFaults: an error of the storage ends a repair with that error, and the next one repairs.
func TestRepairFaults(t *testing.T) {
	if testing.Short() {
		t.Skip("long, and nothing in it happens at once")
	}
	for _, name := range []string{"no refcount block", "count of a data cluster too low", "a cluster twice", "dirty"} {
		for _, d := range damages {
			if d.name != name {
				continue
			}
			for i := 0; ; i++ {
				im := newImage(t, small(16))
				d.do(im)
				f := blktest.NewFault(im.memory())
				trap := f.Add(blktest.Rule{After: i, Count: 1, Err: syscall.EIO})
				_, err := check(blk.NewTask(), f, RepairAll, checkWindow, nil)
				if trap.Caught() == 0 {
					if err != nil || i < 10 {
						t.Fatalf("%d requests, error %v", i, err)
					}
					break
				}
				if !errors.Is(err, syscall.EIO) {
					t.Fatalf("%s: request %d failed, and the check says %v", name, i, err)
				}
				if r, err := check(blk.NewTask(), f, RepairAll, checkWindow, nil); err != nil || r.Errors+r.Leaks > 0 {
					t.Fatalf("%s: request %d failed, and afterwards: %+v, %v", name, i, brief(r), err)
				}
			}
		}
	}
}

func TestCheckReadOnly(t *testing.T) {
	im := newImage(t, small(16))
	if _, err := Check(blk.NewTask(), readOnly{im.memory()}, RepairAll); !errors.Is(err, blk.ErrReadOnly) {
		t.Errorf("repair of read-only storage: %v", err)
	}
	if _, err := Check(blk.NewTask(), readOnly{im.memory()}, RepairNone); err != nil {
		t.Error(err)
	}
}

type readOnly struct{ *blktest.Memory }

func (r readOnly) Info() *blk.Info {
	in := *r.Memory.Info()
	in.ReadOnly = true
	return &in
}

// TestRebuildFull: counts that their bits cannot hold end a rebuild, and storage that cannot grow.
func TestRebuildFull(t *testing.T) {
	im := newImage(t, small(1))
	im.setWord(im.l2(0), im.word(im.l2(1)))
	im.setWord(im.h.RefTableOffset, 0)
	if _, err := Check(blk.NewTask(), im.memory(), RepairAll); !errors.Is(err, ErrTooLarge) {
		t.Errorf("2 references and counts of 1 bit: %v", err)
	}
	im = newImage(t, small(16))
	im.setWord(im.h.RefTableOffset, 0)
	if _, err := Check(blk.NewTask(), fixed{im.memory()}, RepairAll); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("storage of fixed size: %v", err)
	}
}

// fixed is storage without Resize.
type fixed struct{ blk.Node }

// TestCounts holds the windowed counts against a map.
func TestCounts(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	c := newCounts(3 * countPage)
	for _, lo := range []int64{0, 1 << 40} {
		c.reset(lo)
		want := map[int64]uint64{}
		for range 20000 {
			cl := lo + rng.Int64N(4*countPage) - countPage/2
			if cl-lo > countPage && cl-lo < 2*countPage {
				continue // a page without any
			}
			w := uint64(1 + rng.IntN(3))
			switch rng.IntN(20) {
			case 0:
				w = 60000
			case 1:
				w = 1<<64 - 1
			}
			if err := c.add(cl, w); err != nil {
				t.Fatal(err)
			}
			if c.has(cl) {
				if want[cl]+w < w {
					w = 1<<64 - 1 - want[cl]
				}
				want[cl] += w
			}
		}
		seen := 0
		for cl := c.next(lo - 5); cl < lo+3*countPage; cl = c.next(cl + 1) {
			if seen++; c.get(cl) != want[cl] {
				t.Fatalf("cluster %d: %d, want %d", cl, c.get(cl), want[cl])
			}
		}
		if seen != len(want) {
			t.Fatalf("%d clusters, want %d", seen, len(want))
		}
	}
	c = newCounts(2 * maxMany)
	for i := range int64(maxMany) {
		if err := c.add(i, countMany); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.add(maxMany, countMany); !errors.Is(err, ErrTooLarge) {
		t.Errorf("error %v", err)
	}
}

// TestCheckEndless: a file that claims to be enormous is refused, and not walked over for years.
func TestCheckEndless(t *testing.T) {
	s := newSparse()
	if err := Create(blk.NewTask(), s, CreateOptions{Size: 1 << 20, ClusterSize: 512}); err != nil {
		t.Fatal(err)
	}
	if err := s.Resize(blk.NewTask(), 1<<60, false); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(blk.NewTask(), s, RepairNone); !errors.Is(err, ErrTooLarge) {
		t.Errorf("error %v", err)
	}
}

// TestCheckWatched: whoever watches a check sees each turn begin and end, and can end it.
func TestCheckWatched(t *testing.T) {
	m := blktest.NewMemory(0)
	if err := Create(blk.NewTask(), m, CreateOptions{Size: 4 << 20, ClusterSize: 512, Preallocation: "metadata"}); err != nil {
		t.Fatal(err)
	}
	for _, window := range []int64{4096, checkWindow} {
		var last, all, calls int64
		_, err := check(blk.NewTask(), m, RepairNone, window, func(done, total int64) error {
			if done < last || done > total || all != 0 && total != all {
				t.Errorf("%d of %d after %d of %d", done, total, last, all)
			}
			last, all = done, total
			calls++
			return nil
		})
		if err != nil || last != all || calls < 128 {
			t.Errorf("window %d: %d calls, up to %d of %d: %v", window, calls, last, all, err)
		}
		for at := int64(0); at < calls; at += 37 {
			enough, left := errors.New("enough"), at
			_, err := check(blk.NewTask(), m, RepairAll, window, func(int64, int64) error {
				if left--; left < 0 {
					return enough
				}
				return nil
			})
			if !errors.Is(err, enough) || left != -1 {
				t.Fatalf("window %d, ended at call %d, and %d more: %v", window, at, -1-left, err)
			}
		}
	}
}
