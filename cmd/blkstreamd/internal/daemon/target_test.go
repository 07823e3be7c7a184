// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
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
