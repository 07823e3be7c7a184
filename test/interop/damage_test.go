// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/blkstream/blkstream/blk/qcow2"
)

// raw is an image as bytes, with just enough knowledge of the format to break it. It shares nothing with the package
// under test.
type raw struct {
	b           []byte
	rng         *rand.Rand
	clusterBits uint
	refBits     int64 // bits of a reference count
	l2Step      int64 // bytes of an L2 entry
}

func load(t *testing.T, path string, rng *rand.Rand) *raw {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &raw{b: b, rng: rng, clusterBits: uint(binary.BigEndian.Uint32(b[20:])), refBits: 16, l2Step: 8}
	b = append(b, make([]byte, -len(b)&(1<<r.clusterBits-1))...)
	r.b = b
	if binary.BigEndian.Uint32(b[4:]) == 3 {
		r.refBits = 1 << binary.BigEndian.Uint32(b[96:])
		if b[79]&16 != 0 {
			r.l2Step = 16
		}
	}
	return r
}

const mask = 1<<56 - 1<<9

func (r *raw) cluster() int64           { return 1 << r.clusterBits }
func (r *raw) get(off int64) int64      { return int64(binary.BigEndian.Uint64(r.b[off:])) }
func (r *raw) put(off int64, v int64)   { binary.BigEndian.PutUint64(r.b[off:], uint64(v)) }
func (r *raw) flip(off int64, bit uint) { r.put(off, r.get(off)^1<<bit) }
func (r *raw) l1() (off, entries int64) { return r.get(40), int64(binary.BigEndian.Uint32(r.b[36:])) }

func (r *raw) refTable() (off, n int64) {
	return r.get(48), int64(binary.BigEndian.Uint32(r.b[56:])) << r.clusterBits / 8
}
func (r *raw) pick(list []int64) int64 { return list[r.rng.IntN(len(list))] }
func (r *raw) l2s() (entries []int64) { // offsets of L1 entries in use
	off, n := r.l1()
	for i := range n {
		if r.get(off+8*i)&mask != 0 {
			entries = append(entries, off+8*i)
		}
	}
	return entries
}

// clusters are the offsets of the L2 entries of one kind.
func (r *raw) clusters(packed bool) (entries []int64) {
	for _, e := range r.l2s() {
		at := r.get(e) & mask
		for off := at; off < at+r.cluster(); off += r.l2Step {
			if w := r.get(off); w&mask != 0 && (w>>62&1 != 0) == packed {
				entries = append(entries, off)
			}
		}
	}
	return entries
}

// setCount sets the reference count of the cluster at off.
func (r *raw) setCount(off int64, v uint64) {
	i := off >> r.clusterBits
	per := r.cluster() * 8 / r.refBits
	table, _ := r.refTable()
	block := r.get(table + 8*(i/per))
	bit := i % per * r.refBits
	for j := range r.refBits { // from the last bit on
		at := block + bit/8
		shift := uint(bit%8 + j)
		if r.refBits >= 8 {
			at += r.refBits/8 - 1 - j/8
			shift = uint(j % 8)
		}
		r.b[at] = r.b[at]&^(1<<shift) | byte(v>>j&1)<<shift
	}
}

// damages break an image in ways that a check must find. Those that say so are found by us alone.
var damages = []struct {
	name   string
	strict bool // qemu-img check does not see it, or sees more in it
	lost   bool // no repair brings back what was there
	do     func(r *raw)
}{
	{"nothing", false, false, func(*raw) {}},
	{"count of a data cluster is 0", false, false, func(r *raw) { r.setCount(r.get(r.pick(r.clusters(false)))&mask, 0) }},
	{"count of a data cluster is too high", false, false, func(r *raw) {
		e := r.pick(r.clusters(false))
		r.setCount(r.get(e)&mask, 2)
	}},
	{"count of a data cluster is too high, and the copied bit says so", false, false, func(r *raw) {
		e := r.pick(r.clusters(false))
		r.setCount(r.get(e)&mask, 2)
		r.put(e, r.get(e)&(1<<63-1))
	}},
	{"count of an L2 table is 0", false, false, func(r *raw) { r.setCount(r.get(r.pick(r.l2s()))&mask, 0) }},
	{"count of the header is 0", false, false, func(r *raw) { r.setCount(0, 0) }},
	{"count of the L1 table is too high", false, false, func(r *raw) { off, _ := r.l1(); r.setCount(off, 2) }},
	{"copied bit of a cluster is wrong", false, false, func(r *raw) { r.flip(r.pick(r.clusters(false)), 63) }},
	{"copied bit of an L2 table is wrong", false, false, func(r *raw) { r.flip(r.pick(r.l2s()), 63) }},
	{"copied bit of a compressed cluster is set", false, false, func(r *raw) { r.flip(r.pick(r.clusters(true)), 63) }},
	{"a compressed cluster is not counted", false, false, func(r *raw) {
		e := r.pick(r.clusters(true))
		x := 62 - (r.clusterBits - 8)
		r.setCount(r.get(e)&(1<<x-1), 0)
	}},
	{"a cluster is forgotten", false, true, func(r *raw) { r.put(r.pick(r.clusters(false)), 0) }},
	{"an L2 table is forgotten", false, true, func(r *raw) { r.put(r.pick(r.l2s()), 0) }},
	{"a refcount block is forgotten", false, false, func(r *raw) { off, _ := r.refTable(); r.put(off, 0) }},
	{"a refcount block lies beside a cluster", false, false, func(r *raw) { off, _ := r.refTable(); r.put(off, r.get(off)+512) }},
	{"all counts are 0", false, false, func(r *raw) { off, _ := r.refTable(); clear(r.b[r.get(off):][:r.cluster()]) }},
	{"a cluster has two owners", false, true, func(r *raw) {
		list := r.clusters(false)
		r.put(list[0], r.get(list[len(list)-1]))
	}},
	{"a cluster is the L1 table", true, true, func(r *raw) { off, _ := r.l1(); r.put(r.pick(r.clusters(false)), off|-1<<63) }},
	{"a cluster lies behind the end", false, true, func(r *raw) { r.put(r.pick(r.clusters(false)), 1<<40|-1<<63) }},
	{"an L2 table lies behind the end", false, true, func(r *raw) { r.put(r.pick(r.l2s()), 1<<40|-1<<63) }},
	{"an L2 table lies beside a cluster", true, true, func(r *raw) { e := r.pick(r.l2s()); r.put(e, r.get(e)+512) }},
	{"a cluster lies beside one", false, true, func(r *raw) { e := r.pick(r.clusters(false)); r.put(e, r.get(e)+512) }},
	{"reserved bits of a cluster are set", false, true, func(r *raw) { r.flip(r.pick(r.clusters(false)), 58) }},
	{"reserved bits of an L2 table are set", false, true, func(r *raw) { r.flip(r.pick(r.l2s()), 58) }},
	{"the dirty bit is set", false, false, func(r *raw) { r.b[79] |= 1 }},
	{"the corrupt bit is set", false, false, func(r *raw) { r.b[79] |= 2 }},
	{"some byte of the counts is random", false, false, func(r *raw) {
		off, _ := r.refTable()
		r.b[r.get(off)+r.rng.Int64N(r.cluster())] = byte(r.rng.Uint32())
	}},
}

// TestDamage: our check and QEMU's agree on what is broken, and what ours repairs, QEMU's finds in order, with the
// same contents.
func TestDamage(t *testing.T) {
	needQEMU(t)
	for _, v := range []variant{
		plain(func(v *variant) { v.cluster = 4096 }),
		plain(func(v *variant) { v.cluster = 1024; v.refcounts = 8 }), // with fewer bits QEMU's snapshot of many compressed clusters overflows
		plain(func(v *variant) { v.cluster = 16 << 10; v.extended = true; v.refcounts = 64; v.compression = "zstd" }),
	} {
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			rng := seeded(t)
			m := newModel(t, rng, 2<<20, v.cluster)
			image := createWithQEMU(t, v, m)
			m.onQEMU(t, rng, image, 30, []kind{write, zero, writeCompressed, writeCompressed})
			run(t, "", "qemu-img", "snapshot", "-c", "one", image)
			m.onQEMU(t, rng, image, 10, []kind{write, zeroUnmap, writeCompressed})
			mustBeClean(t, image)
			for _, d := range damages {
				for range 3 {
					r := load(t, image, rng)
					d.do(r)
					path := filepath.Join(t.TempDir(), "damaged")
					if err := os.WriteFile(path, r.b, 0o600); err != nil {
						t.Fatal(err)
					}
					compareVerdicts(t, d.name, path, d.strict)
					if d.lost {
						continue
					}
					left := checkOurs(t, path, qcow2.RepairAll)
					if left.Errors+left.Leaks != 0 {
						t.Errorf("%s: our repair left %d errors, %d leaks: %v", d.name, left.Errors, left.Leaks, left.Findings)
						continue
					}
					theirs := checkWithQEMU(t, path)
					if theirs.Errors+theirs.Corrupt+theirs.Leaks != 0 {
						t.Errorf("%s: after our repair qemu-img check says %s", d.name, theirs.text)
						continue
					}
					compareStatistics(t, theirs, left)
					mustEqual(t, d.name+", repaired", readWithQEMU(t, path, ""), m.data)
					os.Remove(path)
				}
			}
		})
	}
}

func compareVerdicts(t *testing.T, name, path string, strict bool) {
	t.Helper()
	theirs, ours := checkWithQEMU(t, path), checkOurs(t, path, qcow2.RepairNone)
	verdict := func(errors, leaks int64) string { return fmt.Sprintf("errors: %v, leaks: %v", errors > 0, leaks > 0) }
	got, want := verdict(ours.Errors, ours.Leaks), verdict(theirs.Errors+theirs.Corrupt, theirs.Leaks)
	if got != want && !(strict && ours.Errors > 0) {
		t.Errorf("%s: our check says %s: %v\nqemu-img check says %s: %s", name, got, ours.Findings, want, theirs.text)
	}
}
