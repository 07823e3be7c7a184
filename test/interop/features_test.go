// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// TestKilled: QEMU dies with counts that it has not written. We repair that when we open the image, as QEMU does.
func TestKilled(t *testing.T) {
	needQEMU(t)
	for _, v := range []variant{
		plain(func(v *variant) { v.lazy = true }),
		plain(func(v *variant) { v.lazy = true; v.cluster = 512; v.refcounts = 64 }),
		plain(func(v *variant) { v.lazy = true; v.cluster = 16 << 10; v.extended = true; v.refcounts = 1 }),
	} {
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			rng := seeded(t)
			m := newModel(t, rng, 3<<20, v.cluster)
			path := createWithQEMU(t, v, m)
			m.onQEMU(t, rng, path, 10, []kind{write, write, zeroUnmap})
			var commands []string
			for range 30 {
				o := m.random(rng, []kind{write, write, zeroUnmap})
				m.apply(o)
				commands = append(commands, m.command(o))
			}
			// After the flush everything but the counts is in the file.
			commands = append(commands, "flush", "abort")
			if _, err := try("", strings.Join(commands, "\n"), "qemu-io", "-f", "qcow2", "-t", "writeback", "-d", "unmap", path); err == nil {
				t.Fatal("qemu-io did not abort")
			}
			f := openFile(t, path, true)
			h, err := qcow2.ReadHeader(blk.NewTask(), f)
			if err != nil {
				t.Fatal(err)
			}
			closeNode(t, f)
			if h.Incompatible&qcow2.IncompatDirty == 0 {
				t.Fatal("the image is not marked as dirty")
			}
			compareVerdicts(t, "killed", path, false)

			// Read-only it can be used as it is.
			n := openOurs(t, path, true)
			mustEqual(t, "read-only", readNode(t, n), m.data)
			closeNode(t, n)
			n = openOurs(t, path, false)
			m.onOurs(t, rng, n, 20)
			closeNode(t, n)
			mustBeClean(t, path)
			mustEqual(t, "as QEMU reads it", readWithQEMU(t, path, ""), m.data)
		})
	}
}

// TestBitmaps: persistent bitmaps are counted as they should be, and stay when we write.
func TestBitmaps(t *testing.T) {
	needQEMU(t)
	rng := seeded(t)
	v := plain(func(v *variant) { v.cluster = 4096 })
	m := newModel(t, rng, 3<<20, v.cluster)
	path := createWithQEMU(t, v, m)
	run(t, "", "qemu-img", "bitmap", "--add", "--enable", "-g", "4096", path, "on")
	run(t, "", "qemu-img", "bitmap", "--add", "--disable", path, "off")
	m.onQEMU(t, rng, path, 20, []kind{write, zero})
	mustBeClean(t, path)
	n := openOurs(t, path, false)
	m.see(t, "as we read it", readNode(t, n))
	closeNode(t, n)
	bitmaps := func() string {
		text := run(t, "", "qemu-img", "info", path)
		_, text, _ = strings.Cut(text, "bitmaps:")
		text, _, _ = strings.Cut(text, "refcount bits")
		return strings.Join(strings.Fields(text), " ")
	}
	untouched := bitmaps()
	if strings.Contains(untouched, "in-use") || !strings.Contains(untouched, "name: on") {
		t.Errorf("after reading: %s", untouched)
	}
	n = openOurs(t, path, false)
	m.onOurs(t, rng, n, 30)
	closeNode(t, n)
	mustBeClean(t, path)
	mustEqual(t, "as QEMU reads it", readWithQEMU(t, path, ""), m.data)
	// We did not record our writes in it, and say so.
	if now := bitmaps(); !strings.Contains(now, "in-use") || !strings.Contains(now, "name: off") {
		t.Errorf("after writing: %s", now)
	}
}

// TestTour: an image goes to and fro between us and QEMU's tools that change more than contents.
func TestTour(t *testing.T) {
	needQEMU(t)
	rng := seeded(t)
	v := plain(func(v *variant) { v.cluster = 4096 })
	m := newModel(t, rng, 3<<20, v.cluster)
	path := createOurs(t, v, m)
	all := []kind{write, write, zero, zeroUnmap, discard}
	grow := func(size int) {
		m.data = append(m.data, make([]byte, size-len(m.data))...)
		m.loose = append(m.loose, make([]bool, size/blk.SectorSize-len(m.loose))...)
	}
	ours := func(what string) {
		t.Helper()
		n := openOurs(t, path, false)
		m.see(t, what+", as we read it", readNode(t, n))
		m.onOurs(t, rng, n, 20)
		closeNode(t, n)
		mustBeClean(t, path)
		mustEqual(t, what+", as QEMU reads it", readWithQEMU(t, path, ""), m.data)
	}
	ours("new")
	for i, amend := range []string{"refcount_bits=64", "lazy_refcounts=on", "refcount_bits=16,lazy_refcounts=off", "compat=0.10", "compat=1.1", "refcount_bits=1"} {
		run(t, "", "qemu-img", "amend", "-f", "qcow2", "-o", amend, path)
		ours("amended with " + amend)
		grow(len(m.data) + 1<<20 + i*512)
		run(t, "", "qemu-img", "resize", "-q", "-f", "qcow2", path, fmt.Sprint(len(m.data)))
		ours("resized by QEMU")
		m.onQEMU(t, rng, path, 20, all)
		n := openOurs(t, path, false)
		grow(len(m.data) + 2<<20)
		if err := n.Resize(blk.NewTask(), int64(len(m.data)), false); err != nil {
			t.Fatal(err)
		}
		closeNode(t, n)
		mustBeClean(t, path)
		mustEqual(t, "resized by us, as QEMU reads it", readWithQEMU(t, path, ""), m.data)
	}
	shrunk := len(m.data) / 2 / 512 * 512
	run(t, "", "qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path, fmt.Sprint(shrunk))
	m.data, m.loose = m.data[:shrunk], m.loose[:shrunk/blk.SectorSize]
	ours("made smaller by QEMU")
}

// TestOverlay: an overlay of ours over an image of QEMU's is committed and rebased by QEMU.
func TestOverlay(t *testing.T) {
	needQEMU(t)
	rng := seeded(t)
	v := plain(func(v *variant) { v.backing = "short"; v.cluster = 4096 })
	m := newModel(t, rng, v.size(), v.cluster)
	path := createOurs(t, v, m)
	n := openOurs(t, path, false)
	m.onOurs(t, rng, n, 40)
	closeNode(t, n)
	mustBeClean(t, path)
	run(t, "", "qemu-img", "rebase", "-f", "qcow2", "-b", "", path)
	m.see(t, "rebased", readWithQEMU(t, path, ""))
	n = openOurs(t, path, false)
	if n.Header().BackingFile != "" {
		t.Errorf("the backing file is still named %q", n.Header().BackingFile)
	}
	m.see(t, "rebased, as we read it", readNode(t, n))

	// And we put one under it again. What the image does not hold shows it; it was zeros.
	base := filepath.Join(filepath.Dir(path), "zeros")
	run(t, "", "qemu-img", "create", "-q", "-f", "raw", base, "1M")
	zeros := openFile(t, base, true)
	if err := n.SetBacking(blk.NewTask(), zeros, "zeros", "raw"); err != nil {
		t.Fatal(err)
	}
	m.onOurs(t, rng, n, 20)
	closeNode(t, n)
	closeNode(t, zeros)
	mustBeClean(t, path)
	mustEqual(t, "over zeros", readWithQEMU(t, path, ""), m.data)
	if got := run(t, "", "qemu-img", "info", path); !strings.Contains(got, "backing file: zeros") || !strings.Contains(got, "backing file format: raw") {
		t.Errorf("qemu-img info: %s", got)
	}
	run(t, "", "qemu-img", "commit", "-q", "-f", "qcow2", path)
}
