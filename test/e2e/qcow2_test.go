// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

// overlay makes a chain with the project's own tool: an empty qcow2 image over an empty qcow2 image over base.
func overlay(t *testing.T, base string) (top, middle string) {
	t.Helper()
	dir := t.TempDir()
	top, middle = filepath.Join(dir, "top.qcow2"), filepath.Join(dir, "middle.qcow2")
	tool(t, "image", "create", "-f", "qcow2", "-b", base, "-F", "raw", middle)
	tool(t, "image", "create", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)
	return top, middle
}

func tool(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(filepath.Join(bin, "blkstream"), args...).CombinedOutput(); err != nil {
		t.Fatalf("blkstream %v: %v: %s", args, err, out)
	}
}

// allocated is the space that a file takes, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	must(t, syscall.Stat(path, &st))
	return st.Blocks * 512
}

// checkQcow2 wants an image without errors, and without leaks if it was closed in order.
func checkQcow2(t *testing.T, image string, leaks bool) {
	t.Helper()
	var (
		out []byte
		err error
	)
	// A process that was killed has its locks until its last I/O is done.
	eventually(t, "the image's locks", func() (bool, error) {
		out, err = exec.Command("qemu-img", "check", "-f", "qcow2", image).CombinedOutput()
		return !strings.Contains(string(out), "Failed to get"), nil
	})
	var exit *exec.ExitError
	if leaks && errors.As(err, &exit) && exit.ExitCode() == 3 {
		err = nil
	}
	if err != nil {
		t.Errorf("qemu-img check %s: %v: %s", image, err, out)
	}
}

// verifyQcow2 checks what QEMU reads from an image.
func verifyQcow2(t *testing.T, image string, table *load.Table) {
	t.Helper()
	flat := filepath.Join(t.TempDir(), "flat.raw")
	qemuImg(t, "convert", "-f", "qcow2", "-O", "raw", image, flat)
	verifyImage(t, flat, table)
}

// backingOf is what QEMU says of an image's backing file.
func backingOf(t *testing.T, image string) (name, format string) {
	t.Helper()
	out, err := exec.Command("qemu-img", "info", "--output=json", "-U", image).Output()
	must(t, err)
	var info struct {
		Name   string `json:"full-backing-filename"`
		Format string `json:"backing-filename-format"`
	}
	must(t, json.Unmarshal(out, &info))
	return info.Name, info.Format
}

// alone wants an image to have none behind it.
func alone(t *testing.T, image string) {
	t.Helper()
	if name, _ := backingOf(t, image); name != "" {
		t.Errorf("behind %s is still %s", image, name)
	}
}

// The daemon is killed at random moments while the guest writes, for the first time and again, to a qcow2 image over a
// chain: what was acknowledged is there, and the image has no errors.
func TestQcow2KillUnderLoad(t *testing.T) {
	base, filled := filledImage(t, 64*mib)
	top, middle := overlay(t, base)
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	opts := mixed
	opts.Depth = 8
	must(t, g.StartWriter(0, opts, filled))
	for range 5 {
		progress(t, g, 0, uint64(1+rand.IntN(300)))
		must(t, d.Kill())
		checkQcow2(t, top, true)
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
		must(t, d.Start())
	}
	progress(t, g, 0, 200)
	table := finish(t, d, g)
	checkQcow2(t, top, true)
	verifyQcow2(t, top, table)
	tool(t, "image", "check", "-f", "qcow2", "--repair", "leaks", top)
	checkQcow2(t, top, false)
	verifyQcow2(t, top, table)
	checkQcow2(t, middle, false)
	verifyImage(t, base, filled) // nobody wrote there
}

// Only what lies above the shared base is copied; the new image has the base behind it.
func TestCopyOverSharedBase(t *testing.T) {
	base, filled := filledImage(t, 128*mib)
	top, middle := overlay(t, base)
	target := filepath.Join(t.TempDir(), "target.qcow2")
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d, g := busy(t, disk, filled)
	progress(t, g, 0, 100)
	_, table, err := g.StopWriter(0)
	must(t, err)
	if out := cli(t, d, 1, "copy", "disk0", target, "--base", top); !strings.Contains(out, middle) {
		t.Errorf("a base that is none: the error does not name those that are: %s", out)
	}
	cli(t, d, 0, "copy", "disk0", target, "--base", base, "--verify", "--wait")
	if have, want := allocated(t, target), allocated(t, top); have > want+want/8 {
		t.Errorf("the target has %d bytes, the image above the base %d", have, want)
	}
	must(t, g.StartWriter(0, mixed, table))
	progress(t, g, 0, 100)
	cli(t, d, 0, "switch", "disk0")
	progress(t, g, 0, 100)
	table = finish(t, d, g)
	checkQcow2(t, target, false)
	verifyQcow2(t, target, table)
	if name, format := backingOf(t, target); name != base || format != "raw" {
		t.Errorf("behind the target is %s (%s), want %s (raw)", name, format, base)
	}
	verifyImage(t, base, filled)
}

// A file system is installed on a chain, converted to raw and back to qcow2 while the guest goes on writing files.
func TestConvertLive(t *testing.T) {
	guest.Need(t, "e2fsck")
	top, _ := overlay(t, emptyImage(t, 256*mib))
	dir := t.TempDir()
	flat, packed := filepath.Join(dir, "flat.raw"), filepath.Join(dir, "packed.qcow2")
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)

	run(t, g, "mkfs.ext4 -q /dev/vda && mount -t ext4 -o discard /dev/vda /mnt && cp -r /bin /mnt/bin && head -c 20000000 /dev/urandom >/mnt/file")
	sum := strings.Fields(run(t, g, "sha256sum /mnt/file"))[0]
	run(t, g, "(while [ ! -e /mnt/stop ]; do dd if=/dev/urandom of=/mnt/noise bs=64k count=40 conv=fsync; rm /mnt/noise; done) >/dev/null 2>&1 &")
	cli(t, d, 0, "copy", "disk0", flat, "--format", "raw", "--id", "a", "--verify", "--switch", "auto", "--wait")
	if out := cli(t, d, 0, "copy", "disk0", packed, "--format", "qcow2", "--compression", "zstd", "--cluster-size", "32K", "--id", "b", "--wait"); !strings.Contains(out, "switch") {
		t.Errorf("copy --wait does not say how to go on: %s", out)
	}
	cli(t, d, 0, "switch", "disk0")
	if info, err := d.Disk("disk0"); err != nil || info.Image != packed || info.Format != "qcow2" {
		t.Errorf("after both: %+v, %v", info, err)
	}
	// A new daemon serves what was recorded, in the format that was recorded.
	must(t, d.Kill())
	must(t, d.Start())
	if info, err := d.Disk("disk0"); err != nil || info.Image != packed || info.Format != "qcow2" {
		t.Errorf("after a crash: %+v, %v", info, err)
	}
	run(t, g, "touch /mnt/stop; while [ -e /mnt/noise ]; do sleep 0.1; done; sleep 0.5; umount /mnt && fsck.ext4 -fn /dev/vda")
	run(t, g, "echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 -o ro /dev/vda /mnt && cmp /bin/busybox /mnt/bin/busybox")
	if again := strings.Fields(run(t, g, "sha256sum /mnt/file"))[0]; again != sum {
		t.Errorf("the guest reads back %s, wrote %s", again, sum)
	}
	g.Quit()
	must(t, d.Stop())
	checkQcow2(t, packed, true)

	// QEMU reads the same file system, and the guest's writes after the first switch are not on what it left.
	again := filepath.Join(dir, "again.raw")
	qemuImg(t, "convert", "-f", "qcow2", "-O", "raw", packed, again)
	if out, err := exec.Command("e2fsck", "-fn", again).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
}
