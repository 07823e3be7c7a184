// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// An image with tables must not be open in two places, so a disk that is only locked while it runs stays raw.
func TestLockRunningStaysRaw(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.qcow2")
	conf := strings.Replace(b.disk("disk0", old), "writeback", "none", 1) + "lock = \"running\"\n"
	d, c := b.start(b.load("", conf))
	_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Format: image.Qcow2})
	b.wants(err, control.ErrPrecondition, "running", "raw")
	if exists(target) {
		t.Error("a copy that was refused left a target")
	}
	b.stop(d)
}

// A target whose last block is not whole could be switched to, but not be served by the next daemon.
func TestTargetOfPartBlocks(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.img")
	b.must(file.Create(target, diskSize+512))
	d, c := b.start(b.load("", b.disk("disk0", old)+"block_size = 4096\n"))
	_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Existing: true})
	b.wants(err, control.ErrInvalid, target, "block_size")
	b.stop(d)
}

// A disk is not copied onto itself, whatever the target is called. As a device its image has no locks that anyone sees.
func TestCopyOntoItself(t *testing.T) {
	b := newBed(t)
	source := b.full("source")
	hard, soft, node, bound := b.path("hard"), b.path("soft"), b.path("node"), b.path("bound")
	b.must(os.Link(source, hard))
	b.must(os.Symlink(source, soft))
	b.must(os.WriteFile(bound, nil, 0o600))
	if err := unix.Mount(source, bound, "", unix.MS_BIND, ""); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatalf("bind mount: %v", err)
		}
		t.Skipf("nothing can be mounted here: %v", err)
	}
	t.Cleanup(func() { b.must(unix.Unmount(bound, unix.MNT_DETACH)) })
	loop := b.loop(source)
	var st unix.Stat_t
	b.must(unix.Stat(loop, &st))
	b.must(unix.Mknod(node, unix.S_IFBLK|0o600, int(st.Rdev)))
	f, err := os.Open(source)
	b.must(err)
	defer f.Close()
	names := []string{source, hard, soft, bound, loop, node, fmt.Sprintf("/proc/self/fd/%d", f.Fd())}
	for _, on := range []string{source, loop} {
		d, c := b.start(b.load("", b.disk("disk0", on)))
		for _, target := range names {
			if target == node && on == source {
				continue // where there are no devices, it cannot be asked what it lies on, nor be used
			}
			_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Format: image.Raw, Existing: true})
			b.wants(err, control.ErrPrecondition, target, "disk0")
		}
		b.stop(d)
	}
}

// What the source's images hold besides the disk is named before the switch and after it.
func TestCopySaysWhatItLeaves(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	b := newBed(t)
	source := b.qcow2("a.qcow2", "", "")
	for _, args := range [][]string{{"snapshot", "-c", "one", source}, {"bitmap", "--add", "--disable", source, "off"}} {
		if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img: %v: %s", err, out)
		}
	}
	d, c := b.start(b.load("", b.qcow2Disk("disk0", source, "")))
	_, err := c.Copy(t.Context(), &control.CopyRequest{
		Disk: "disk0", Target: b.path("b.qcow2"), Format: image.Qcow2, Compression: "zstd", Preallocation: "metadata",
	})
	b.wants(err, control.ErrInvalid, "preallocation metadata")
	const left = "not copied: 1 internal snapshots of %s, 1 dirty bitmaps of %s"
	want := fmt.Sprintf(left, source, source)
	if j := b.copyTo(c, "disk0", b.path("b.qcow2")); !strings.Contains(j.Message, want) {
		t.Errorf("before the switch: %q", j.Message)
	}
	r, err := c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"})
	b.must(err)
	if !strings.Contains(r.Message, want) {
		t.Errorf("after the switch: %q", r.Message)
	}
	b.stop(d)
}

// Options that do not go together are refused with what to do instead, and make nothing.
func TestCopyOptionsRefused(t *testing.T) {
	b := newBed(t)
	base := b.image("base.img")
	middle := b.qcow2("middle.qcow2", base, image.Raw)
	top := b.qcow2("top.qcow2", middle, image.Qcow2)
	alone := b.qcow2("alone.qcow2", "", "")
	d, c := b.start(b.load("", b.qcow2Disk("disk0", top, "")))
	target := b.path("target")
	for _, r := range []struct {
		req  *control.CopyRequest
		kind error
		want string
	}{
		{&control.CopyRequest{Format: image.Raw, Base: base}, control.ErrInvalid, "a base: take format qcow2"},
		{&control.CopyRequest{Format: image.Raw, ClusterSize: 4096}, control.ErrInvalid, "a cluster size: take format qcow2"},
		{&control.CopyRequest{Format: image.Raw, LazyRefcounts: true, Compression: "zstd"}, control.ErrInvalid, "lazy reference counts, compression: take format qcow2"},
		{&control.CopyRequest{Format: image.Raw, Preallocation: "metadata"}, control.ErrInvalid, "take preallocation falloc or full, or format qcow2"},
		{&control.CopyRequest{Base: base, Preallocation: "metadata"}, control.ErrInvalid, "leave out one of the two"},
		{&control.CopyRequest{Base: "base.img"}, control.ErrInvalid, "give an absolute path"},
		{&control.CopyRequest{Base: alone}, control.ErrInvalid, "what is: " + middle + ", " + base},
		{&control.CopyRequest{Base: top}, control.ErrInvalid, "what is: " + middle + ", " + base},
		{&control.CopyRequest{Target: alone, Existing: true, ClusterSize: 4096}, control.ErrInvalid, "let the copy make another target"},
		{&control.CopyRequest{Target: alone, Existing: true, Base: middle}, control.ErrInvalid, "create -b " + middle + " -F qcow2"},
		{&control.CopyRequest{Target: middle, Existing: true}, control.ErrPrecondition, `disk "disk0" reads from ` + middle},
		{&control.CopyRequest{Target: base, Existing: true, Format: image.Raw}, control.ErrPrecondition, `disk "disk0" reads from ` + base},
	} {
		r.req.Disk = "disk0"
		if r.req.Target == "" {
			r.req.Target = target
		}
		_, err := c.Copy(t.Context(), r.req)
		b.wants(err, r.kind, r.want)
		if exists(target) {
			t.Fatalf("%v left a target", r.req)
		}
	}
	b.stop(d)
}

// A target that is full pauses the copy, in whichever stage, and is not the guest's business. When there is room the copy
// goes on to its end.
func TestCopyFullTarget(t *testing.T) {
	for _, c := range []struct {
		name string
		size string // of the target's file system: room for nothing like half of the disk, or for a little more
		req  *control.CopyRequest
	}{
		{"raw, bulk", "size=1m", &control.CopyRequest{Format: image.Raw}},
		{"qcow2, bulk", "size=1m", &control.CopyRequest{Format: image.Qcow2}},
		{"small clusters, bulk", "size=1m", &control.CopyRequest{Format: image.Qcow2, ClusterSize: 512}},
		{"compressed, bulk", "size=1m", &control.CopyRequest{Format: image.Qcow2, Compression: "zlib"}},
		{"raw, mirror", "size=2560k", &control.CopyRequest{Format: image.Raw}},
		{"qcow2, mirror", "size=3m", &control.CopyRequest{Format: image.Qcow2}},
		{"compressed, mirror", "size=3m", &control.CopyRequest{Format: image.Qcow2, Compression: "zstd"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			dir := b.path("small")
			b.mount(dir, c.size)
			noise := make([]byte, diskSize/2)
			for i := range noise {
				noise[i] = byte(rand.Uint32())
			}
			source := b.image("source")
			f, err := os.OpenFile(source, os.O_WRONLY, 0)
			b.must(err)
			_, err = f.WriteAt(noise, 0)
			b.must(errors.Join(err, f.Close()))
			target := filepath.Join(dir, "target")
			d, client := b.start(b.load("", b.disk("disk0", source)))
			c.req.Id, c.req.Disk, c.req.Target = "j", "disk0", target
			_, err = client.Copy(t.Context(), c.req)
			b.must(err)
			g := b.guest("disk0")
			defer g.Close()
			if c.size != "size=1m" {
				b.wait(client, "j", job.StateReady)
			}
			for off := int64(0); off < diskSize/2; off += 64 << 10 {
				_, err := g.WriteAt(noise[off:off+64<<10], diskSize/2+off)
				b.must(err)
			}
			b.must(g.Flush())
			if j := b.wait(client, "j", job.StatePaused); !strings.Contains(j.Error, "no space left") {
				t.Errorf("a full target: %v", j)
			}
			_, err = g.WriteAt(noise[:4096], 4096)
			b.must(err)
			b.must(unix.Mount("none", dir, "tmpfs", unix.MS_REMOUNT, "size=16m"))
			for j := b.job(client); j.State != job.StateReady; j = b.job(client) {
				if j.State == job.StatePaused { // also by a piece that failed late
					_, _ = client.JobResume(t.Context(), &control.JobResumeRequest{Id: "j"})
				}
				time.Sleep(5 * time.Millisecond)
			}
			_, err = client.Switch(t.Context(), &control.SwitchRequest{Target: "j"})
			b.must(err)
			b.stop(d)
			if bad := b.differ(source, image.Raw, target, c.req.Format); len(bad) > 0 {
				t.Errorf("the images differ in %v", bad)
			}
			if c.req.Format == image.Qcow2 {
				r, err := image.Check(t.Context(), target, image.Qcow2, qcow2.RepairNone, nil, nil)
				if err != nil || r.Errors+r.Leaks > 0 {
					t.Errorf("the target: %+v, %v", r, err)
				}
			}
		})
	}
}
