// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// mergeBed is a chain in use, and what it must read as.
type mergeBed struct {
	*dir
	rng   *rand.Rand
	o     Options
	g     *Image
	model []byte
	lower map[int][]byte // what the images behind the first one show, by place
}

// chainInUse makes a chain of images of several properties and sizes; the first is 0, the last raw or not.
func chainInUse(t *testing.T, depth int) *mergeBed {
	rng := blktest.Rand(t)
	b := &mergeBed{dir: newDir(t), rng: rng, o: Options{Direct: rng.IntN(2) == 0, Align: blk.SectorSize}, lower: map[int][]byte{}}
	var below []byte
	for i := depth - 1; i >= 0; i-- {
		size := overlaySize
		if i > 0 && rng.IntN(2) == 0 {
			size = (1 + rng.IntN(6)) * overlaySize / 4
		}
		o := CreateOptions{Format: Qcow2}
		if i == depth-1 && rng.IntN(2) == 0 {
			o.Format = Raw
		} else {
			o.ClusterSize = []int64{512, 4096, 64 << 10, 256 << 10}[rng.IntN(4)]
			o.ExtendedL2 = o.ClusterSize >= 16<<10 && rng.IntN(2) == 0
			if !o.ExtendedL2 {
				o.Version = 2 + rng.IntN(2)
			}
			if i < depth-1 {
				o.BackingFile, o.BackingFormat = b.at(fmt.Sprint(i+1)), b.format(i+1)
			}
		}
		o.Size = int64(size)
		b.make(fmt.Sprint(i), o)
		h := b.open(fmt.Sprint(i), o.Format, Options{Align: blk.SectorSize})
		m := make([]byte, size)
		copy(m, below)
		if q, ok := h.Root.(*qcow2.Node); ok && rng.IntN(2) == 0 && int64(size) >= q.Header().ClusterSize() {
			packed := bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, int(q.Header().ClusterSize()))
			if err := q.WriteCompressed(blk.NewTask(), 0, packed); err != nil {
				t.Fatal(err)
			}
			copy(m, packed)
		}
		for range 6 {
			b.changeSome(h.Root, m)
		}
		b.checkContents(h, m)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		below, b.lower[i] = m, m
	}
	b.model = bytes.Clone(below)
	b.g = b.open("0", Qcow2, b.o)
	return b
}

func (b *mergeBed) format(i int) string {
	if b.isQcow2(fmt.Sprint(i)) {
		return Qcow2
	}
	return Raw
}

// changeSome is change for a disk of another size.
func (b *mergeBed) changeSome(n blk.Node, model []byte) {
	b.Helper()
	off := b.rng.Int64N(int64(len(model))/512) * 512
	l := min((1+b.rng.Int64N(400))*512, int64(len(model))-off)
	b.changeAt(off, l, byte(b.rng.IntN(5)*b.rng.IntN(60)), model, n)
}

// changeAt writes to all the nodes.
func (b *mergeBed) changeAt(off, l int64, fill byte, model []byte, nodes ...blk.Node) {
	b.Helper()
	copy(model[off:], bytes.Repeat([]byte{fill}, int(l)))
	for _, n := range nodes {
		err := write(blk.NewTask(), n, model[off:off+l], off)
		if fill == 0 {
			err = blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: off, Len: l})
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// copyHeld copies what view holds less deep than depth, a piece at a time, with during in between.
func (b *mergeBed) copyHeld(view blk.Node, depth int, base blk.Node, during func()) {
	b.Helper()
	t := blk.NewTask()
	size := view.Info().Size
	for off := int64(0); off < size; {
		x, err := view.Map(t, off, min(size-off, int64(1+b.rng.IntN(500))*512))
		if err != nil {
			b.Fatal(err)
		}
		if int(x.Depth) < depth {
			buf := make([]byte, x.Len)
			if err := errors.Join(read(t, view, buf, off), write(t, base, buf, off)); err != nil {
				b.Fatal(err)
			}
		}
		off += x.Len
		during()
	}
	if rest := base.Info().Size - size; rest > 0 {
		if err := writeZeroes(t, base, size, rest); err != nil {
			b.Fatal(err)
		}
	}
}

// done closes the chain and looks at the images with these names.
func (b *mergeBed) done(names ...int) {
	b.Helper()
	b.checkContents(b.g, b.model)
	if err := b.g.Close(); err != nil {
		b.Fatal(err)
	}
	for i, name := range names {
		f := b.format(name)
		h := b.open(fmt.Sprint(name), f, Options{}) // no lock is left
		if i == 0 {
			b.checkContents(h, b.model)
		}
		if len(h.Chain) != len(names)-i {
			b.Errorf("image %d has %d images behind it, want %v", name, len(h.Chain)-1, names[i+1:])
		}
		if err := h.Close(); err != nil {
			b.Fatal(err)
		}
		if f == Qcow2 {
			if r, err := Check(b.Context(), b.at(fmt.Sprint(name)), f, qcow2.RepairNone, nil, nil); err != nil || r.Errors != 0 || r.Leaks != 0 {
				b.Errorf("image %d: %+v, %v", name, r, err)
			}
		}
	}
}

func (b *mergeBed) begin(top, base int) *Merge {
	b.Helper()
	m, err := OpenMerge(blk.NewTask(), b.g, top, base, b.o)
	if err != nil {
		b.Fatal(err)
	}
	b.checkContents(b.g, b.model)
	b.locked(b.g.Chain[base].Path)
	b.step(m, m.Insert)
	b.locked(b.g.Chain[base].Path)
	if err := m.Grow(blk.NewTask()); err != nil {
		b.Fatal(err)
	}
	b.checkContents(b.g, b.model)
	return m
}

func (b *mergeBed) step(m *Merge, change func() (*Image, error)) {
	b.Helper()
	g, err := change()
	if err != nil {
		b.Fatal(err)
	}
	b.g = g
	b.checkContents(g, b.model)
	if err := m.Settle(); err != nil {
		b.Fatal(err)
	}
	b.checkContents(g, b.model)
}

// locked wants an image that nobody else may write.
func (b *mergeBed) locked(path string) {
	b.Helper()
	if n, err := file.Open(path, file.Options{}); !errors.Is(err, file.ErrInUse) {
		b.Errorf("%s may be written: %v", path, err)
		n.Close()
	}
}

// Images in the middle of a chain are merged while the guest writes.
func TestMergeMiddle(t *testing.T) {
	for range 30 {
		b := chainInUse(t, 5)
		top := 1 + b.rng.IntN(3)
		base := top + 1 + b.rng.IntN(4-top)
		m := b.begin(top, base)
		view, err := m.View()
		if err != nil {
			t.Fatal(err)
		}
		during := func() {
			switch b.rng.IntN(10) {
			case 0:
				b.changeSome(b.g.Root, b.model)
			case 1:
				b.checkContents(b.g, b.model)
			}
		}
		stop := b.rng.IntN(5) == 0
		b.copyHeld(view, m.Depth(), m.Base(), during)
		if stop {
			b.step(m, func() (*Image, error) { return m.Remove(blk.NewTask()) })
			b.locked(b.g.Chain[base].Path)
			b.changeSome(b.g.Root, b.model)
			b.done(0, 1, 2, 3, 4)
			continue
		}
		b.step(m, func() (*Image, error) { return m.Drop(blk.NewTask()) })
		b.changeSome(b.g.Root, b.model)
		for _, i := range b.g.Chain {
			b.locked(i.Path)
		}
		names := []int{0, 1, 2, 3, 4}
		left := append(names[:top:top], names[base:]...)
		// What the base shows is what the first of the merged images did, and zeros behind its end.
		b.done(left...)
		want := make([]byte, max(len(b.lower[top]), len(b.lower[base])))
		copy(want, b.lower[top])
		h := b.open(fmt.Sprint(base), b.format(base), Options{ReadOnly: true})
		b.checkContents(h, want)
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("merged %d to %d into %d", top, base-1, base)
		}
	}
}

// The images from the first one on are merged; the guest's writes go to the base too, before or after the first one.
func TestMergeFirst(t *testing.T) {
	for range 30 {
		b := chainInUse(t, 4)
		base := 1 + b.rng.IntN(3)
		if b.g.Chain[base].Size > overlaySize {
			if _, err := OpenMerge(blk.NewTask(), b.g, 0, base, b.o); !errors.Is(err, ErrMerge) {
				t.Fatalf("merged into a longer base: %v", err)
			}
			b.done(0, 1, 2, 3)
			continue
		}
		m := b.begin(0, base)
		both := func() {
			off := b.rng.Int64N(overlaySize/512) * 512
			l := min((1+b.rng.Int64N(200))*512, overlaySize-off)
			nodes := []blk.Node{b.g.Root, m.Base()}
			if b.rng.IntN(2) == 0 {
				nodes[0], nodes[1] = nodes[1], nodes[0]
			}
			b.changeAt(off, l, byte(b.rng.IntN(200)), b.model, nodes...)
		}
		b.copyHeld(b.g.Root, base, m.Base(), func() {
			switch b.rng.IntN(10) {
			case 0, 1:
				both()
			case 2:
				b.checkContents(b.g, b.model)
			}
		})
		both()
		if b.rng.IntN(5) == 0 {
			b.step(m, func() (*Image, error) { return m.Remove(blk.NewTask()) })
			b.changeSome(b.g.Root, b.model)
			b.done(0, 1, 2, 3)
			continue
		}
		b.step(m, func() (*Image, error) { return m.Turn(), nil })
		for range 5 {
			b.changeSome(b.g.Root, b.model)
		}
		b.done([]int{0, 1, 2, 3}[base:]...)
		if t.Failed() {
			t.Fatalf("merged into %d", base)
		}
	}
}

// A base that somebody else reads, or an image that would have to be changed, is refused, and all is as before.
func TestMergeLocks(t *testing.T) {
	for _, other := range []int{1, 3} {
		b := chainInUse(t, 4)
		h := b.open(fmt.Sprint(other), b.format(other), Options{ReadOnly: true})
		if _, err := OpenMerge(blk.NewTask(), b.g, 2, 3, b.o); !errors.Is(err, file.ErrInUse) {
			t.Fatalf("image %d is read by someone else: %v", other, err)
		}
		if err := h.Close(); err != nil {
			t.Fatal(err)
		}
		b.locked(b.g.Chain[other].Path)
		b.checkContents(b.g, b.model)
		m := b.begin(2, 3)
		b.step(m, func() (*Image, error) { return m.Remove(blk.NewTask()) })
		b.done(0, 1, 2, 3)
	}
}

// What was copied is durable before an image says that it lies over the base. If the flush fails, the chain is the old one.
func TestMergeFlushes(t *testing.T) {
	need(t, "qemu-img")
	b := chainInUse(t, 4)
	m := b.begin(2, 3)
	fault := blktest.NewFault(m.writer.Node)
	m.writer.Node = fault
	view, err := m.View()
	if err != nil {
		t.Fatal(err)
	}
	b.copyHeld(view, m.Depth(), m.Base(), func() {})
	trap := fault.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: errors.New("no")})
	if _, err := m.Drop(blk.NewTask()); err == nil {
		t.Fatal("dropped without a flush")
	}
	trap.Remove()
	if got := b.tool("qemu-img", "info", "-U", b.at("1")); !strings.Contains(got, "backing file: "+b.at("2")) {
		t.Errorf("the image before the ones to merge has changed: %s", got)
	}
	b.checkContents(b.g, b.model)
	before := fault.Count(blk.OpFlush)
	b.step(m, func() (*Image, error) { return m.Drop(blk.NewTask()) })
	if fault.Count(blk.OpFlush) == before {
		t.Error("dropped without a flush")
	}
	b.done(0, 1, 3)
}

// A name that leads through a symbolic link and back up is the file that the kernel finds, not what is left when ".." is
// taken out of it: another image may lie there.
func TestMergeNames(t *testing.T) {
	d, task := newDir(t), blk.NewTask()
	for _, name := range []string{"there", "there/vm", "here"} {
		if err := os.Mkdir(d.at(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(d.at("there/vm"), d.at("here/vm")); err != nil {
		t.Fatal(err)
	}
	d.make("there/base", CreateOptions{Format: Qcow2})
	d.make("here/base", CreateOptions{Format: Qcow2}) // here/vm/../base is not this one
	d.overlay("there/vm/2", "../base", Qcow2)
	d.overlay("there/vm/1", "2", Qcow2)
	g := d.open("here/vm/1", Qcow2, Options{})
	if err := write(task, g.Root, bytes.Repeat([]byte{1}, 512), 0); err != nil {
		t.Fatal(err)
	}
	m, err := OpenMerge(task, g, 1, 2, Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []func() (*Image, error){m.Insert, func() (*Image, error) { return m.Drop(task) }} {
		if g, err = step(); err != nil {
			t.Fatal(err)
		}
		if err := m.Settle(); err != nil {
			t.Fatal(err)
		}
	}
	// An overlay names the image in the same way.
	under := &Image{Chain: g.Chain[1:]}
	name, err := under.BackingName()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g = d.open("there/vm/1", Qcow2, Options{ReadOnly: true})
	defer g.Close()
	for _, got := range []string{name, g.Chain[1].Path} {
		if seen := (&identities{}); seen.add(d.at("there/base")) != nil || !errors.Is(seen.add(got), ErrLoop) {
			t.Errorf("the image behind the disk is %s, want there/base", got)
		}
	}
}

// A merge could not be taken back, and the base stays open for writing in the chain. Nobody may open it for writing a
// second time: the first one has tables of its own, and writes them when it is closed.
func TestMergeOverMerge(t *testing.T) {
	b := chainInUse(t, 6)
	m := b.begin(2, 3)
	// Into the same base, from the disk and from the middle, and into the one behind it, which the base would name.
	for _, places := range [][2]int{{0, 3}, {1, 3}, {4, 5}} {
		if _, err := OpenMerge(blk.NewTask(), b.g, places[0], places[1], b.o); !errors.Is(err, ErrMerge) {
			t.Errorf("merge %v: %v", places, err)
		}
	}
	b.step(m, func() (*Image, error) { return m.Remove(blk.NewTask()) })
	b.done(0, 1, 2, 3, 4, 5)
}

// Internal snapshots show what was behind their image when they were taken, where it held nothing then. So that must not
// change: not by a merge, even one that is taken back, nor by a rebase.
func TestInternalSnapshots(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d, task := newDir(t), blk.NewTask()
	d.make("2", CreateOptions{Format: Qcow2})
	d.tool("qemu-io", "-f", Qcow2, "-c", "write -P 1 0 64k", d.at("2"))
	d.overlay("1", "2", Qcow2)
	d.tool("qemu-img", "snapshot", "-c", "one", d.at("1"))
	d.tool("qemu-io", "-f", Qcow2, "-c", "write -P 2 0 64k", d.at("1"))
	d.overlay("0", "1", Qcow2)
	// The snapshot becomes the disk, in a copy of the image.
	snapshot := func() {
		t.Helper()
		d.tool("cp", d.at("1"), d.at("then"))
		d.tool("qemu-img", "snapshot", "-a", "one", d.at("then"))
		if out := d.tool("qemu-io", "-f", Qcow2, "-c", "read -P 1 0 64k", d.at("then")); strings.Contains(out, "failed") {
			t.Errorf("the snapshot has changed: %s", out)
		}
	}
	snapshot()
	for name, top := range map[string]int{"0": 1, "1": 0} {
		g := d.open(name, Qcow2, Options{})
		m, err := OpenMerge(task, g, top, top+1, Options{})
		if err == nil {
			if g, err = m.Insert(); err == nil {
				err = errors.Join(m.Settle(), write(task, m.Base(), bytes.Repeat([]byte{2}, 64<<10), 0))
			}
			if err == nil {
				if g, err = m.Remove(task); err == nil {
					err = m.Settle()
				}
			}
		}
		if !errors.Is(err, ErrMerge) || !strings.Contains(err.Error(), "snapshots") {
			t.Errorf("merge of an image with internal snapshots: %v", err)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		snapshot()
	}
	err := Rebase(t.Context(), d.at("1"), RebaseOptions{})
	if !errors.Is(err, blk.ErrNotSupported) || !strings.Contains(err.Error(), "snapshots") {
		t.Errorf("rebase of an image with internal snapshots: %v", err)
	}
	snapshot()
	// It may be right that only the name changes.
	if err := Rebase(t.Context(), d.at("1"), RebaseOptions{Layer: Layer{d.at("2"), Qcow2}, Unsafe: true}); err != nil {
		t.Error(err)
	}
	snapshot()
}

// A base that is made longer moves what its last cluster holds. The chain in use reads that all the time, also if nothing is
// merged then.
func TestMergeIntoShort(t *testing.T) {
	for _, inserted := range []bool{false, true} {
		d, task := newDir(t), blk.NewTask()
		const size = 128<<10 + 512
		d.make("1", CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: size}})
		model := make([]byte, overlaySize)
		last := model[128<<10 : size] // alone in a host cluster
		copy(last, bytes.Repeat([]byte("0123456789abcdef"), len(last)/16))
		g := d.open("1", Qcow2, Options{})
		packed, ok := g.Root.(*qcow2.Node)
		if !ok {
			t.Fatal("no qcow2 image")
		}
		if err := packed.WriteCompressed(task, 128<<10, last); err != nil {
			t.Fatal(err)
		}
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		d.overlay("0", "1", Qcow2)
		g = d.open("0", Qcow2, Options{})
		if err := read(task, g.Root, make([]byte, 512), 0); err != nil { // the tables are in memory
			t.Fatal(err)
		}
		m, err := OpenMerge(task, g, 0, 1, Options{})
		if err != nil {
			t.Fatal(err)
		}
		d.checkContents(g, model)
		if inserted {
			if g, err = m.Insert(); err == nil {
				err = errors.Join(m.Settle(), m.Grow(task))
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.Base().Info().Size != overlaySize {
				t.Errorf("the base has %d bytes", m.Base().Info().Size)
			}
			d.checkContents(g, model)
			if g, err = m.Remove(task); err == nil {
				err = m.Settle()
			}
		} else {
			err = m.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		d.checkContents(g, model)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
