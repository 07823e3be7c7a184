// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// TestDrop copies up random chains, drops what is not needed any more, and compares with what they read as before and
// with what QEMU's rebase makes.
func TestDrop(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	for round := range 8 {
		d := newDir(t)
		depth := 2 + rng.IntN(4)
		top := d.chain(rng, depth, 3<<20)
		data := d.contents(top, Qcow2)
		base := depth
		if depth > 2 && rng.IntN(2) == 0 {
			base = 2 + rng.IntN(depth-2)
		}
		t.Logf("round %d: depth %d, to %d", round, depth, base)
		d.tool("cp", top, "theirs")
		args := []string{"qemu-img", "rebase", "-f", Qcow2, "-b", ""}
		var name, format string
		if base < depth {
			name, format = fmt.Sprint("img", depth-1-base), Qcow2
			if name == "img0" && !d.isQcow2("img0") {
				format = Raw
			}
			args = append(args[:5], name, "-F", format)
		}
		d.tool(append(args, "theirs")...)

		task := blk.NewTask()
		g := d.open(top, Qcow2, Options{})
		f := cor.New(g.Root, g.Chain[0].Header.ClusterSize(), func(err error) { t.Error(err) })
		behind := uint16(base)
		if base == depth {
			behind = 0
		}
		if err := f.Pull(task, 0, g.Root.Info().Size, behind); err != nil {
			t.Fatal(err)
		}
		next, dropped, err := g.Drop(task, base)
		if err != nil {
			t.Fatal(err)
		}
		if len(dropped) != base-1 || len(next.Chain) != 1+depth-base || (next.Lower == nil) != (base == depth) {
			t.Fatalf("%d images are dropped, %d stay", len(dropped), len(next.Chain))
		}
		if err := CloseMembers(dropped); err != nil {
			t.Error(err)
		}
		for _, m := range dropped { // nobody holds them any more
			if err := write(task, d.lockable(m.Path), []byte("gone"), 0); err != nil {
				t.Error(err)
			}
		}
		d.checkContents(next, data)
		if h := next.Chain[0].Header; h.BackingFile != name || h.BackingFormat != format {
			t.Errorf("the backing file is %q, %q; want %q, %q", h.BackingFile, h.BackingFormat, name, format)
		}
		if base < depth && next.Chain[0].Backing != next.Chain[1].Path {
			t.Errorf("the chain goes on with %q", next.Chain[0].Backing)
		}
		if err := next.Close(); err != nil {
			t.Error(err)
		}
		d.checkClean(top)
		d.tool("qemu-img", "compare", "-f", Qcow2, "-F", Qcow2, top, "theirs")
	}
}

// lockable opens a file that nobody has open.
func (d *dir) lockable(path string) blk.Node {
	d.Helper()
	f, err := file.Open(path, file.Options{})
	if err != nil {
		d.Fatal(err)
	}
	d.Cleanup(func() { f.Close() }) //nolint:errcheck // only its lock counts
	return f
}

// A base in another directory is named by its path.
func TestDropNames(t *testing.T) {
	d := newDir(t)
	o := func(backing, format string) CreateOptions {
		return CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: 1 << 20, BackingFile: backing, BackingFormat: format}}
	}
	sub := d.at("sub")
	for _, err := range []error{
		os.Mkdir(sub, 0o700),
		Create(t.Context(), filepath.Join(sub, "base"), o("", "")),
		Create(t.Context(), filepath.Join(sub, "middle"), o("base", Qcow2)),
		Create(t.Context(), d.at("top"), o("sub/middle", Qcow2)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	g := d.open("top", Qcow2, Options{})
	for _, base := range []int{0, 1, 4} {
		if _, _, err := g.Drop(blk.NewTask(), base); !errors.Is(err, blk.ErrInvalid) {
			t.Errorf("base %d: %v", base, err)
		}
	}
	next, dropped, err := g.Drop(blk.NewTask(), 2)
	if err != nil {
		t.Fatal(err)
	}
	if h := next.Chain[0].Header; h.BackingFile != filepath.Join(sub, "base") || h.BackingFormat != Qcow2 {
		t.Errorf("the backing file is %q, %q", h.BackingFile, h.BackingFormat)
	}
	if err := errors.Join(CloseMembers(dropped), next.Close()); err != nil {
		t.Error(err)
	}
	// Another one is in what looks like the same directory, but for a symbolic link.
	for _, err := range []error{
		os.MkdirAll(d.at("there/vm"), 0o700),
		os.Symlink(d.at("there/vm"), d.at("vm")),
		Create(t.Context(), d.at("base"), o("", "")),
		Create(t.Context(), d.at("there/base"), o("", "")),
		Create(t.Context(), d.at("there/middle"), o("base", Qcow2)),
		Create(t.Context(), d.at("linked"), o("vm/../middle", Qcow2)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	g = d.open("linked", Qcow2, Options{})
	if next, dropped, err = g.Drop(blk.NewTask(), 2); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(CloseMembers(dropped), next.Close()); err != nil {
		t.Error(err)
	}
	g = d.open("linked", Qcow2, Options{ReadOnly: true})
	defer g.Close()
	if !g.Uses(d.at("there/base")) {
		t.Errorf("behind the image is %s", g.Chain[1].Path)
	}
}

// What lies behind the end of an image that is left reads as zeros, though the base that stays is longer.
func TestDropShort(t *testing.T) {
	d := newDir(t)
	for name, o := range map[string]CreateOptions{
		"base":   {Format: Raw, CreateOptions: qcow2.CreateOptions{Size: 4 << 20}},
		"middle": {Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: 1<<20 + 512}},
		"top":    {Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: 4 << 20}},
	} {
		if err := Create(t.Context(), d.at(name), o); err != nil {
			t.Fatal(err)
		}
	}
	d.tool("qemu-io", "-f", Raw, "-c", "write -q -P 7 0 4M", "base")
	d.tool("qemu-img", "rebase", "-u", "-f", Qcow2, "-F", Raw, "-b", "base", "middle")
	d.tool("qemu-img", "rebase", "-u", "-f", Qcow2, "-F", Qcow2, "-b", "middle", "top")
	data := d.contents("top", Qcow2)
	task := blk.NewTask()
	g := d.open("top", Qcow2, Options{})
	f := cor.New(g.Root, g.Chain[0].Header.ClusterSize(), func(err error) { t.Error(err) })
	if err := f.Pull(task, 0, g.Root.Info().Size, 2); err != nil {
		t.Fatal(err)
	}
	next, dropped, err := g.Drop(task, 2)
	if err != nil {
		t.Fatal(err)
	}
	d.checkContents(next, data)
	if err := errors.Join(CloseMembers(dropped), next.Close()); err != nil {
		t.Error(err)
	}
}
