// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

// patch changes bytes of an image.
func patch(t *testing.T, n blk.Node, off int64, b ...byte) {
	t.Helper()
	mustDo(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func word(w uint64) []byte { return binary.BigEndian.AppendUint64(nil, w) }

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name  string
		off   int64
		bytes []byte
		want  error
		says  string
	}{
		{"unnamed feature", 72, word(1 << 40), ErrFeature, "bit 40"},
		{"AES", 32, []byte{0, 0, 0, 1}, ErrEncrypted, "AES"},
		{"LUKS", 32, []byte{0, 0, 0, 2}, ErrEncrypted, "LUKS"},
		{"corrupt", 72, word(IncompatCorrupt), ErrCorrupt, "corrupt"},
		{"version 4", 4, []byte{0, 0, 0, 4}, ErrFeature, "version 4"},
		{"magic", 0, []byte("raw!"), ErrFormat, "magic"},
		{"huge L1", 36, []byte{0xff, 0xff, 0xff, 0xff}, ErrFormat, "L1"},
		{"no refcount table", 56, []byte{0, 0, 0, 0}, ErrFormat, "refcount table"},
	} {
		m := intoMemory(t, qemuImage(t, 1<<20, ""))
		patch(t, m, c.off, c.bytes...)
		_, err := Open(blk.NewTask(), m, Options{Name: "test"})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
		n, err := Open(blk.NewTask(), m, Options{Name: "test", ReadOnly: true})
		if errors.Is(c.want, ErrCorrupt) {
			if err != nil {
				t.Errorf("%s, to read: %v", c.name, err)
				continue
			}
			readAll(t, n)
		} else if !errors.Is(err, c.want) {
			t.Errorf("%s, to read: %v", c.name, err)
		}
	}
}

func TestNamedFeature(t *testing.T) {
	m := intoMemory(t, qemuImage(t, 1<<20, ""))
	b := m.Bytes()
	i := bytes.Index(b[:4096], []byte("dirty bit"))
	if i < 0 {
		t.Fatal("qemu-img wrote no feature names")
	}
	patch(t, m, int64(i-1), append([]byte{17}, "time travel"...)...)
	patch(t, m, 72, word(1<<17)...)
	if _, err := Open(blk.NewTask(), m, Options{Name: "test"}); err == nil || !strings.Contains(err.Error(), `"time travel" (bit 17)`) {
		t.Error(err)
	}
}

// TestHeaderKept: unknown extensions stay, unknown autoclear bits go, and only when the image is opened for writing.
func TestHeaderKept(t *testing.T) {
	m := intoMemory(t, qemuImage(t, 1<<20, ""))
	h, err := ReadHeader(blk.NewTask(), m)
	if err != nil {
		t.Fatal(err)
	}
	h.Extensions = append(h.Extensions, Extension{0x12345678, []byte("kept as it is")})
	h.Autoclear |= 1 << 33
	b, err := h.Encode()
	if err != nil {
		t.Fatal(err)
	}
	patch(t, m, 0, b...)
	mustClose(t, mustOpen(t, m, Options{Name: "test", ReadOnly: true}))
	if !bytes.Equal(m.Bytes()[:len(b)], b) {
		t.Error("the header changed")
	}
	n := mustOpen(t, m, Options{Name: "test"})
	if err := n.Resize(blk.NewTask(), 2<<20, false); err != nil {
		t.Fatal(err)
	}
	mustClose(t, n)
	got, err := ReadHeader(blk.NewTask(), m)
	if err != nil {
		t.Fatal(err)
	}
	e := got.Extensions
	i := slices.IndexFunc(e, func(e Extension) bool { return e.Type == 0x12345678 })
	if len(e) != len(h.Extensions) || i < 0 || string(e[i].Data) != "kept as it is" {
		t.Errorf("extensions: %v", e)
	}
	if got.Autoclear != 0 || got.Size != 2<<20 {
		t.Errorf("autoclear %#x, size %d", got.Autoclear, got.Size)
	}
	checkClean(t, m.Bytes(), false)
}

// TestBitmaps: an enabled bitmap is marked before the first write, a disabled one stays good.
func TestBitmaps(t *testing.T) {
	path := qemuImage(t, 1<<20, "")
	qemu(t, "qemu-img", "bitmap", "--add", path, "on")
	qemu(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "4096", path, "off")
	m := intoMemory(t, path)
	before := m.Bytes()
	task := blk.NewTask()
	n := mustOpen(t, m, Options{Name: "test"})
	readAll(t, n)
	mustDo(t, n, &blk.Request{Op: blk.OpFlush})
	if !bytes.Equal(m.Bytes(), before) {
		t.Error("the image was changed without a write")
	}
	if _, ok := n.TryMap(blk.OpWrite, 0, 512); ok {
		t.Error("a write could pass by")
	}
	if err := n.Resize(task, 2<<20, false); !errors.Is(err, blk.ErrNotSupported) {
		t.Errorf("resize: %v", err)
	}
	writeAt(t, n, 0, pattern(1, 512))
	list, err := ReadBitmaps(task, m, n.Header())
	if err != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	for _, b := range list {
		if b.InUse != (b.Name == "on") || b.Enabled != (b.Name == "on") || b.Name == "off" && b.Granularity != 4096 {
			t.Errorf("%+v", b)
		}
	}
	if w := n.Warnings(); len(w) != 1 || !strings.Contains(w[0], `"on"`) {
		t.Errorf("warnings: %q", w)
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
	out := filepath.Join(tempDir(t), "out.qcow2")
	if err := os.WriteFile(out, m.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if info := qemu(t, "qemu-img", "info", out); strings.Count(info, "in-use") != 1 || !strings.Contains(info, "name: off") {
		t.Errorf("QEMU says %s", info)
	}
}

// TestDirty: the counts of an image that was not closed are repaired.
func TestDirty(t *testing.T) {
	m := intoMemory(t, qemuImage(t, 1<<20, "lazy_refcounts=on"))
	n := mustOpen(t, m, Options{Name: "test"})
	want := pattern(2, 1<<20)
	writeAt(t, n, 0, want)
	refs := n.refs.Load()
	mustClose(t, n)
	patch(t, m, 72, word(IncompatDirty)...)
	patch(t, m, int64(refs.entries[0])+16, make([]byte, 16)...)
	r := mustOpen(t, m, Options{Name: "test", ReadOnly: true})
	if !bytes.Equal(readAll(t, r), want) {
		t.Error("wrong contents, not repaired")
	}
	n = mustOpen(t, m, Options{Name: "test"})
	if h := n.Header(); h.Incompatible&IncompatDirty != 0 || h.Compatible&CompatLazyRefcounts == 0 {
		t.Errorf("incompatible %#x, compatible %#x", h.Incompatible, h.Compatible)
	}
	if !bytes.Equal(readAll(t, n), want) {
		t.Error("wrong contents")
	}
	mustClose(t, n)
	checkClean(t, m.Bytes(), false)
}

// TestDamage: damage that is found makes the image read-only, and marks it.
func TestDamageAtRunTime(t *testing.T) {
	type image struct {
		m  *blktest.Memory
		l2 int64
		h  *Header
	}
	for _, c := range []struct {
		name   string
		damage func(i image)
	}{
		{"misplaced cluster", func(i image) { patch(t, i.m, i.l2, word(copied|0x50200)...) }},
		{"reserved bit", func(i image) { patch(t, i.m, i.l2, word(copied|0x50000|1<<60)...) }},
		{"data over the L1 table", func(i image) { patch(t, i.m, i.l2, word(copied|uint64(i.h.L1Offset))...) }},
		{"data over the refcount table", func(i image) { patch(t, i.m, i.l2, word(copied|uint64(i.h.RefTableOffset))...) }},
		{"L1 entry", func(i image) { patch(t, i.m, i.h.L1Offset, word(copied|0x40200)...) }},
		{"L1 entry far away", func(i image) { patch(t, i.m, i.h.L1Offset, word(copied|1<<50)...) }},
		{"metadata not counted", func(i image) {
			table := readAllOf(t, i.m, i.h.RefTableOffset, 8)
			patch(t, i.m, int64(binary.BigEndian.Uint64(table)), make([]byte, 10)...)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := intoMemory(t, qemuImage(t, 1<<20, ""))
			n := mustOpen(t, m, Options{Name: "test"})
			writeAt(t, n, 0, pattern(3, 128<<10))
			i := image{m, n.l1.Load().entry(0).offset(), n.Header()}
			mustClose(t, n)
			c.damage(i)

			n = mustOpen(t, m, Options{Name: "test"})
			b := make([]byte, 512)
			err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Len: 512, Data: blk.BytesVec(nil, b)})
			if err == nil {
				err = blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: 512 << 10, Len: 512, Data: blk.BytesVec(nil, b)})
			}
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%v", err)
			}
			before := m.Bytes()
			for _, off := range []int64{0, 64 << 10, 512 << 10} {
				if _, ok := n.TryMap(blk.OpWrite, off, 512); ok {
					t.Error("a write gets through")
				}
				err = blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Off: off, Len: 512, Data: blk.BytesVec(nil, b)})
				if !errors.Is(err, ErrCorrupt) {
					t.Errorf("%v", err)
				}
			}
			if w := n.Warnings(); len(w) != 1 {
				t.Errorf("warnings: %q", w)
			}
			mustClose(t, n)
			if !bytes.Equal(before, m.Bytes()) {
				t.Error("the image was written after the damage was found")
			}
			if h, err := ReadHeader(blk.NewTask(), m); err != nil || h.Incompatible&IncompatCorrupt == 0 {
				t.Errorf("not marked, %v", err)
			}
		})
	}
}

func readAllOf(t *testing.T, n blk.Node, off, l int64) []byte {
	t.Helper()
	b := make([]byte, l)
	mustDo(t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, b)})
	return b
}
