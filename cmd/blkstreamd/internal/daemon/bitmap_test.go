// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/copy/control"
)

// bitmap is one of a disk's bitmaps, as listed; nil: it has none of that name.
func (b *bed) bitmap(c *control.Client, disk, name string) *control.Bitmap {
	b.Helper()
	r, err := c.BitmapList(b.Context(), &control.BitmapListRequest{Disk: disk})
	b.must(err)
	for _, m := range r.Bitmaps {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// dirty wants a bitmap that records and says so many bytes.
func (b *bed) dirty(c *control.Client, disk, name string, bytes int64) {
	b.Helper()
	if m := b.bitmap(c, disk, name); m == nil || m.State != bitmapRecording || m.DirtyBytes != bytes {
		b.Errorf("bitmap %q: %v, want %d bytes", name, m, bytes)
	}
}

func (b *bed) inconsistent(c *control.Client, disk, name, reason string) {
	b.Helper()
	if m := b.bitmap(c, disk, name); m == nil || m.State != bitmapInconsistent || !strings.Contains(m.Reason, reason) {
		b.Errorf("bitmap %q: %v, want inconsistent: %s", name, m, reason)
	}
}

func (b *bed) addBitmap(c *control.Client, disk, name string, granularity int64) {
	b.Helper()
	_, err := c.BitmapAdd(b.Context(), &control.BitmapAddRequest{Disk: disk, Name: name, Granularity: granularity})
	b.must(err)
}

// writeAt lets a guest write 4 KiB at each of the places.
func (b *bed) writeAt(id string, places ...int64) {
	b.Helper()
	g := b.guest(id)
	defer g.Close()
	for _, off := range places {
		_, err := g.WriteAt(make([]byte, 4096), off)
		b.must(err)
	}
}

// crash stops the daemon and leaves what there would be had it died instead.
func (b *bed) crash(d *Daemon) {
	b.Helper()
	kept := b.TempDir()
	cp := func(from, to string) {
		if out, err := exec.Command("cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
			b.Fatalf("cp: %v: %s", err, out)
		}
	}
	cp(b.dir, kept)
	b.stop(d)
	b.must(os.RemoveAll(b.dir))
	b.must(os.Mkdir(b.dir, 0o700))
	cp(kept, b.dir)
}

// Bitmaps live over restarts and crashes, and are what was written since.
func TestBitmap(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a.img")))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "one", 4096)
	b.writeAt("disk0", 0, 8192)
	b.addBitmap(c, "disk0", "two", 1<<20)
	b.writeAt("disk0", 2<<20)
	b.dirty(c, "disk0", "one", 3*4096)
	b.dirty(c, "disk0", "two", 1<<20)

	_, err := c.BitmapAdd(t.Context(), &control.BitmapAddRequest{Disk: "disk0", Name: "one"})
	b.wants(err, control.ErrExists, "one")
	for _, r := range []*control.BitmapAddRequest{
		{Disk: "disk0", Name: "a b"}, {Disk: "disk0", Name: "x", Granularity: 5000}, {Disk: "disk0", Name: "x", Granularity: 512},
	} {
		_, err := c.BitmapAdd(t.Context(), r)
		b.wants(err, control.ErrInvalid)
	}
	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "x"})
	b.wants(err, control.ErrNotFound, "x")
	b.stop(d)

	d, c = b.start(f)
	b.dirty(c, "disk0", "one", 3*4096)
	b.dirty(c, "disk0", "two", 1<<20)
	b.writeAt("disk0", 3<<20)
	b.dirty(c, "disk0", "one", 4*4096)

	// The disk is smaller than a region of the intent log, so all of it counts after a crash, once.
	b.crash(d)
	d, c = b.start(f)
	b.dirty(c, "disk0", "one", diskSize)
	_, err = c.BitmapClear(t.Context(), &control.BitmapClearRequest{Disk: "disk0", Name: "one"})
	b.must(err)
	b.writeAt("disk0", 4096)
	b.dirty(c, "disk0", "one", 4096)
	b.stop(d)
	d, c = b.start(f)
	b.dirty(c, "disk0", "one", 4096)
	b.dirty(c, "disk0", "two", diskSize)

	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "one"})
	b.must(err)
	b.dirty(c, "disk0", "two", diskSize)
	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "two"})
	b.must(err)
	k, err := d.find("disk0")
	b.must(err)
	if s := k.graph.String(); strings.Contains(s, "dirty") || exists(b.path("state/bitmaps/disk0.d")) ||
		exists(b.path("state/bitmaps/disk0.json")) {
		t.Errorf("something is left of the bitmaps: %s", s)
	}
	b.stop(d)
}

// A crash after which the configuration names the image that the disk has moved to.
func TestBitmapMoved(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.disk("disk0", b.image("a.img"))))
	b.addBitmap(c, "disk0", "one", 4096)
	b.writeAt("disk0", 0)
	b.move(c, "disk0", b.path("b.img"))
	b.crash(d)
	f := b.load("", b.disk("disk0", b.path("b.img")))
	for range 2 {
		d, c = b.start(f)
		b.dirty(c, "disk0", "one", diskSize)
		b.crash(d)
	}
	if r := b.record("disk0"); len(r.Moved) != 0 {
		t.Errorf("the record remembers the move: %+v", r)
	}
}

// A backup takes what was written before, and what is written meanwhile is for the next one.
func TestBitmapFreeze(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a.img")))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	b.writeAt("disk0", 0)
	k, err := d.find("disk0")
	b.must(err)
	freeze := func() (m *blk.Bitmap) {
		t.Helper()
		b.must(k.graph.Change(context.Background(), func(*blk.Tx) (err error) {
			m, err = k.bitmaps.freeze("m")
			return err
		}))
		return m
	}
	if m := freeze(); m.Count() != 1 || !m.Any(0, 1) {
		t.Errorf("frozen: %d bits", m.Count())
	}
	b.writeAt("disk0", 4096, 8192)
	if m := b.bitmap(c, "disk0", "m"); m.State != bitmapBusy || m.DirtyBytes != 3*4096 {
		t.Errorf("during a backup: %v", m)
	}
	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "m"})
	b.wants(err, control.ErrPrecondition, "backup")
	_, err = c.BitmapClear(t.Context(), &control.BitmapClearRequest{Disk: "disk0", Name: "m"})
	b.wants(err, control.ErrPrecondition, "backup")
	b.must(k.bitmaps.thaw("m", false))
	b.dirty(c, "disk0", "m", 3*4096)
	if m := freeze(); m.Count() != 3 {
		t.Errorf("frozen again: %d bits", m.Count())
	}
	b.writeAt("disk0", 1<<20)
	b.must(k.bitmaps.thaw("m", true))
	b.dirty(c, "disk0", "m", 4096)
	freeze()
	b.stop(d) // with the backup not done
	_, c = b.start(f)
	b.dirty(c, "disk0", "m", 4096)
}

// Somebody else writes to the image.
func TestBitmapChangedImage(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a.img")))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	b.stop(d)
	b.must(os.WriteFile(b.path("a.img"), make([]byte, diskSize), 0o600))
	d, c = b.start(f)
	b.inconsistent(c, "disk0", "m", "the image was changed")
	_, err := c.BitmapClear(t.Context(), &control.BitmapClearRequest{Disk: "disk0", Name: "m"})
	b.wants(err, control.ErrPrecondition, "inconsistent")
	b.stop(d)
	_, c = b.start(f)
	b.inconsistent(c, "disk0", "m", "the image was changed")
	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "m"})
	b.must(err)
	b.addBitmap(c, "disk0", "m", 4096)
	b.dirty(c, "disk0", "m", 0)
}
