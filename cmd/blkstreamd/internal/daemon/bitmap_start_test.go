// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/dirty"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
)

// The disk moves to an image that has a bitmap of the same name, in order and of another time, and dies before it writes
// there.
func TestBitmapOfSameName(t *testing.T) {
	b := newBed(t)
	path := b.qcow2("a.qcow2", "", "")
	over := b.qcow2("o.qcow2", path, "qcow2")
	b.qemu("qemu-img", "bitmap", "--add", "-g", "4k", over, "m")
	f := b.load("", b.qcow2Disk("disk0", path, ""))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	b.writeAt("disk0", 0, 8192)
	_, err := b.snapshot(c, "disk0", over)
	b.must(err)
	b.dirty(c, "disk0", "m", 8192)
	b.crash(d)
	d, c = b.start(f)
	if m := b.bitmap(c, "disk0", "m"); m.State != bitmapRecording || m.DirtyBytes != diskSize {
		t.Errorf("the bitmap has lost what was written before: %v", m)
	}
	b.stop(d)
}

// Somebody else writes to the image file of an add-cow image while the disk is not served.
func TestBitmapChangedImageFile(t *testing.T) {
	b := newBed(t)
	b.holey()
	target := b.path("target.raw")
	f := b.load("", b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	r := toAddCow(target)
	r.Speed = 4096
	_, err := c.Copy(b.Context(), r)
	b.must(err)
	b.addBitmap(c, "a", "m", 4096)
	k, err := d.find("a")
	b.must(err)
	if k.record().Format != image.AddCow {
		t.Fatalf("the disk is on %v", k.record())
	}
	b.stop(d)
	h, err := os.OpenFile(target, os.O_WRONLY, 0)
	b.must(err)
	_, err = h.WriteAt(make([]byte, 512), 0)
	b.must(err)
	b.must(h.Close())
	d, c = b.start(f)
	b.inconsistent(c, "a", "m", "the image was changed")
	b.stop(d)
}

// What a file says of a disk and its bitmaps must not take much memory.
func TestBitmapsTooLarge(t *testing.T) {
	b := newBed(t)
	defer func(n int64) { maxImageBitmapBytes = n }(maxImageBitmapBytes)
	maxImageBitmapBytes = 4 << 20
	const size = 128 << 30
	path := b.path("a.qcow2")
	b.must(image.Create(b.Context(), path, image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{Size: size}}))
	task := blk.NewTask()
	img, err := image.Open(task, path, image.Qcow2, image.Options{})
	b.must(err)
	var all []qcow2.BitmapData
	bits := blk.NewBitmap(size, 16<<10) // 1 MiB
	for i := range 6 {
		all = append(all, qcow2.BitmapData{Name: fmt.Sprint(i), Bits: bits})
	}
	b.must(img.Root.(*qcow2.Node).StoreBitmaps(task, nil, all))
	b.must(img.Close())
	fi, err := os.Stat(path)
	b.must(err)
	f := b.load("", b.qcow2Disk("disk0", path, ""))
	d, c := b.start(f)
	loaded := 0
	for i := range all {
		if m := b.bitmap(c, "disk0", fmt.Sprint(i)); m != nil && m.State == bitmapRecording {
			loaded++
		}
	}
	if loaded != 4 {
		t.Errorf("an image of %d bytes makes the daemon keep %d bitmaps of 1 MiB", fi.Size(), loaded)
	}
	b.stop(d)
}

// The log says that a bitmap has missed writes. A crash while the disk is started, with another bitmap from the image,
// must not lose that.
func TestBitmapMissedStays(t *testing.T) {
	b := newBed(t)
	path := b.qcow2("a.qcow2", "", "")
	f := b.load("", b.qcow2Disk("disk0", path, ""))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	b.writeAt("disk0", 0)
	b.crash(d)
	b.qemu("qemu-img", "check", "-q", "-r", "leaks", path)
	b.qemu("qemu-img", "bitmap", "--add", path, "other")
	// As dirty.Node leaves it.
	log, err := file.Open(b.path("state/bitmaps/disk0.d/log"), file.Options{})
	b.must(err)
	b.must(blk.Do(blk.NewTask(), log, &blk.Request{Op: blk.OpWrite, Len: dirty.LogSize, Data: blk.BytesVec(nil, make([]byte, dirty.LogSize))}))
	b.must(log.Close())
	// The start fails after the log was made.
	b.must(os.Mkdir(b.path("state/bitmaps/disk0.json.new"), 0o700))
	if d, err := b.try(f); err == nil {
		d.Stop()
		t.Fatal("it has started")
	}
	b.must(os.RemoveAll(b.path("state/bitmaps/disk0.json.new")))
	d, c = b.start(f)
	b.inconsistent(c, "disk0", "m", "damaged")
	b.stop(d)
}

// The configuration follows the disk after a switch, and the daemon was killed between.
func TestBitmapNewConfiguration(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.disk("disk0", b.image("a.img"))))
	b.addBitmap(c, "disk0", "m", 4096)
	b.writeAt("disk0", 0)
	b.copyTo(c, "disk0", b.path("b.img"))
	_, err := c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"})
	b.must(err)
	b.crash(d)
	d, c = b.start(b.load("", b.disk("disk0", b.path("b.img"))))
	if m := b.bitmap(c, "disk0", "m"); m.State != bitmapRecording {
		t.Errorf("%v", m)
	}
	b.stop(d)
}

// directory gives an image another directory of bitmaps.
func (b *bed) directory(path string, count int, dir []byte) {
	b.Helper()
	img, err := os.ReadFile(path)
	b.must(err)
	be := binary.BigEndian
	at := bytes.Index(img[:4096], be.AppendUint64(nil, 0x23852875<<32|24)) + 8
	be.PutUint32(img[at:], uint32(count))
	be.PutUint64(img[at+8:], uint64(len(dir)))
	be.PutUint64(img[at+16:], uint64((len(img)+0xffff)&^0xffff))
	img = append(img, make([]byte, -len(img)&0xffff)...)
	b.must(os.WriteFile(path, append(img, dir...), 0o600))
}

// An image with very many bitmaps, or with very long names, cannot keep the daemon from answering.
func TestBitmapsTooMany(t *testing.T) {
	entry := make([]byte, 24)
	entry[15], entry[16], entry[17] = 2, 1, 16 // records writes; of dirty blocks; 64 KiB
	name := func(n int) []byte {
		binary.BigEndian.PutUint16(entry[18:], uint16(n))
		return append(bytes.Clone(entry), bytes.Repeat([]byte{'n'}, n)...)
	}
	for _, long := range []bool{false, true} {
		b := newBed(t)
		path := b.qcow2("a.qcow2", "", "")
		b.qemu("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
		b.qemu("qemu-img", "bitmap", "--add", path, "m")
		if long {
			b.directory(path, 70, bytes.Repeat(name(0xfff8), 70))
		} else {
			b.directory(path, 8000, bytes.Repeat(name(600), 8000))
		}
		f := b.load("", b.qcow2Disk("disk0", path, ""))
		if long {
			b.refused(f, "bitmap directory: entry 0")
			continue
		}
		d, c := b.start(f)
		b.writeAt("disk0", 0)
		_, err := c.DiskList(t.Context(), &control.DiskListRequest{})
		b.must(err)
		_, err = c.BitmapList(t.Context(), &control.BitmapListRequest{})
		b.must(err)
		b.stop(d)
	}
}

// Who has found the disk before it was removed or the daemon was stopped may still ask for its bitmaps.
func TestBitmapsOfStoppedDisk(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.qcow2Disk("disk0", b.qcow2("a.qcow2", "", ""), "")))
	b.addBitmap(c, "disk0", "m", 4096)
	k, err := d.find("disk0")
	b.must(err)
	b.stop(d)
	if w := k.warning(); w != "" {
		t.Errorf("warning: %s", w)
	}
	for _, m := range k.bitmaps.list() {
		k.bitmaps.message(m)
	}
	k.bitmaps.strangers()
	_, err = k.bitmaps.clear(t.Context(), "m")
	b.wants(err, control.ErrPrecondition)
}
