// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"encoding/json"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// qemu runs one of QEMU's tools.
func (b *bed) qemu(args ...string) []byte {
	b.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		b.Fatalf("%s: %v: %s%s", strings.Join(args, " "), err, out, errs.String())
	}
	return out
}

// stored wants the bitmap in the image, with flags as QEMU names them, and the image sound, by QEMU and by us, if nobody
// uses it.
func (b *bed) stored(path, name string, flags ...string) {
	b.Helper()
	if !slices.Contains(flags, "in-use") && name != "off" {
		b.qemu("qemu-img", "check", "-q", path)
		b.sound(path)
	}
	var info struct {
		Format struct {
			Data struct {
				Bitmaps []struct {
					Name  string
					Flags []string
				}
			}
		} `json:"format-specific"`
	}
	b.must(json.Unmarshal(b.qemu("qemu-img", "info", "-U", "--output=json", path), &info))
	for _, m := range info.Format.Data.Bitmaps {
		if m.Name == name {
			slices.Sort(m.Flags)
			if !slices.Equal(m.Flags, flags) {
				b.Errorf("bitmap %q has the flags %v, want %v", name, m.Flags, flags)
			}
			return
		}
	}
	b.Errorf("%s has no bitmap %q: %+v", path, name, info)
}

// qemuDirty is what QEMU reads of a bitmap, as offsets and lengths.
func (b *bed) qemuDirty(path, name string) (all [][2]int64) {
	b.Helper()
	sock := b.path("nbd")
	os.Remove(sock)
	cmd := exec.Command("qemu-nbd", "-r", "-f", "qcow2", "-B", name, "-k", sock, path)
	b.must(cmd.Start())
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	for deadline := time.Now().Add(10 * time.Second); !exists(sock) && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	out := b.qemu("qemu-img", "map", "--output=json", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+sock+",x-dirty-bitmap=qemu:dirty-bitmap:"+name)
	var extents []struct {
		Start, Length int64
		Data          bool
	}
	b.must(json.Unmarshal(out, &extents))
	for _, e := range extents {
		if !e.Data { // that is how it shows what is dirty
			all = append(all, [2]int64{e.Start, e.Length})
		}
	}
	return all
}

// What we store is what QEMU reads, and the other way round; a crash in between loses nothing.
func TestBitmapInImage(t *testing.T) {
	b := newBed(t)
	path := b.qcow2("a.qcow2", "", "")
	f := b.load("", b.qcow2Disk("disk0", path, ""))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "ours", 64<<10)
	b.addBitmap(c, "disk0", "more", 4096)
	b.writeAt("disk0", 0, 1<<20, 1<<20+64<<10, diskSize-4096)
	if m := b.bitmap(c, "disk0", "ours"); m.Stored != path {
		t.Errorf("it says that it is kept in %s", m.Stored)
	}
	b.stop(d)
	b.stored(path, "ours", "auto")
	b.stored(path, "more", "auto")
	if exists(b.path("state/bitmaps/disk0.d")) {
		t.Error("the files are still there")
	}
	if got, want := b.qemuDirty(path, "ours"), [][2]int64{{0, 64 << 10}, {1 << 20, 128 << 10}, {diskSize - 64<<10, 64 << 10}}; !slices.Equal(got, want) {
		t.Errorf("QEMU reads %v, want %v", got, want)
	}
	if got, want := b.qemuDirty(path, "more"), [][2]int64{
		{0, 4096}, {1 << 20, 4096}, {1<<20 + 64<<10, 4096}, {diskSize - 4096, 4096},
	}; !slices.Equal(got, want) {
		t.Errorf("QEMU reads %v, want %v", got, want)
	}

	// QEMU records, adds one, and one that is disabled.
	b.qemu("qemu-io", "-f", "qcow2", "-c", "write 2M 4k", path)
	b.qemu("qemu-img", "bitmap", "--add", "-g", "8k", path, "their own")
	b.qemu("qemu-img", "bitmap", "--add", "--disable", path, "off")
	b.qemu("qemu-io", "-f", "qcow2", "-c", "write 3M 4k", path)
	d, c = b.start(f)
	b.dirty(c, "disk0", "ours", 6*64<<10)
	b.dirty(c, "disk0", "more", 6*4096)
	b.dirty(c, "disk0", "their own", 8192)
	if m := b.bitmap(c, "disk0", "off"); m == nil || m.State != bitmapDisabled {
		t.Errorf("a disabled one: %v", m)
	}
	b.stored(path, "ours", "auto", "in-use")
	b.stored(path, "off")
	b.writeAt("disk0", 8192)
	b.dirty(c, "disk0", "their own", 2*8192)

	// A crash: QEMU takes them as inconsistent, we go on.
	b.crash(d)
	b.qemu("qemu-img", "check", "-q", "-r", "leaks", path)
	b.stored(path, "their own", "auto", "in-use")
	d, c = b.start(f)
	b.dirty(c, "disk0", "their own", diskSize)
	_, err := c.BitmapClear(t.Context(), &control.BitmapClearRequest{Disk: "disk0", Name: "their own"})
	b.must(err)
	for _, name := range []string{"more", "off"} {
		_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: name})
		b.must(err)
		if b.bitmap(c, "disk0", name) != nil {
			t.Errorf("bitmap %q is still there", name)
		}
	}
	b.stop(d)
	b.stored(path, "their own", "auto")
	if got := b.qemuDirty(path, "their own"); len(got) != 0 {
		t.Errorf("QEMU reads %v of a bitmap that was cleared", got)
	}

	// Somebody else has crashed with the image.
	markInUse(t, path, "their own")
	d, c = b.start(f)
	b.inconsistent(c, "disk0", "their own", "has not stored it")
	b.dirty(c, "disk0", "ours", diskSize)
	_, err = c.BitmapRemove(t.Context(), &control.BitmapRemoveRequest{Disk: "disk0", Name: "their own"})
	b.must(err)
	b.stop(d)
	b.stored(path, "ours", "auto")
	if got := b.qemuDirty(path, "ours"); !slices.Equal(got, [][2]int64{{0, diskSize}}) {
		t.Errorf("QEMU reads %v of a bitmap that is all set", got)
	}
}

func markInUse(t *testing.T, path, name string) {
	t.Helper()
	task := blk.NewTask()
	g, err := image.Open(task, path, image.Qcow2, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Root.(*qcow2.Node).UseBitmaps(task, []string{name}); err != nil {
		t.Error(err)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
}

// Bitmaps go with the disk: a snapshot, a copy to a raw image and back, a commit, and a new size.
func TestBitmapMoves(t *testing.T) {
	b := newBed(t)
	path := b.qcow2("a.qcow2", "", "")
	f := b.load("", b.qcow2Disk("disk0", path, ""))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	want := int64(0)
	write := func() {
		t.Helper()
		b.writeAt("disk0", want)
		want += 4096
		b.dirty(c, "disk0", "m", want)
	}
	write()
	_, err := b.snapshot(c, "disk0", b.path("o.qcow2"))
	b.must(err)
	write()
	j := b.copyTo(c, "disk0", b.path("b.qcow2"))
	if strings.Contains(j.Message, "not copied") {
		t.Errorf("the copy says %q", j.Message)
	}
	write()
	_, err = c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"})
	b.must(err)
	write()
	b.stop(d)
	b.stored(b.path("b.qcow2"), "m", "auto")
	if got := b.qemuDirty(b.path("b.qcow2"), "m"); !slices.Equal(got, [][2]int64{{0, want}}) {
		t.Errorf("QEMU reads %v, want %d bytes", got, want)
	}
	d, c = b.start(f)
	b.dirty(c, "disk0", "m", want)
	_, err = b.snapshot(c, "disk0", b.path("p.qcow2"))
	b.must(err)
	write()
	j, err = c.Commit(t.Context(), &control.CommitRequest{Disk: "disk0"})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	write()
	b.crash(d)
	b.qemu("qemu-img", "check", "-q", "-r", "leaks", b.path("b.qcow2"))
	d, c = b.start(f)
	b.dirty(c, "disk0", "m", diskSize)
	_, err = c.BitmapClear(t.Context(), &control.BitmapClearRequest{Disk: "disk0", Name: "m"})
	b.must(err)
	want = 0
	write()
	_, err = c.DiskResize(t.Context(), &control.DiskResizeRequest{Id: "disk0", Size: 2 * diskSize})
	b.must(err)
	b.dirty(c, "disk0", "m", want+diskSize)
	b.stop(d)
	b.stored(b.path("b.qcow2"), "m", "auto")
	if got := b.qemuDirty(b.path("b.qcow2"), "m"); !slices.Equal(got, [][2]int64{{0, want}, {diskSize, diskSize}}) {
		t.Errorf("QEMU reads %v", got)
	}
	d, c = b.start(f)
	b.dirty(c, "disk0", "m", want+diskSize)
	b.stop(d)
}

// Version 2 cannot have bitmaps, and a raw image neither.
func TestBitmapVersion2(t *testing.T) {
	b := newBed(t)
	b.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", b.path("a.qcow2"), "4M")
	f := b.load("", b.qcow2Disk("disk0", b.path("a.qcow2"), ""))
	d, c := b.start(f)
	b.addBitmap(c, "disk0", "m", 4096)
	b.writeAt("disk0", 0)
	b.stop(d)
	d, c = b.start(f)
	b.dirty(c, "disk0", "m", 4096)
	b.stop(d)
	b.qemu("qemu-io", "-f", "qcow2", "-c", "write 0 4k", b.path("a.qcow2"))
	d, c = b.start(f)
	b.inconsistent(c, "disk0", "m", "the image was changed")
	b.stop(d)
}
