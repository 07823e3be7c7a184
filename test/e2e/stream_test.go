// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

// The daemon dies again and again while a chain is streamed under a guest that writes; the job goes on, and in the end
// the image stands alone.
func TestStreamSurvivesKill(t *testing.T) {
	base, filled := filledImage(t, 224*mib) // of which the guest writes only a part
	top, middle := overlay(t, base)
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	opts := mixed
	opts.Depth = 8
	must(t, g.StartWriter(0, opts, filled))
	progress(t, g, 0, 50)
	cli(t, d, 0, "stream", "disk0", "--id", "j", "--speed", "16M")
	killed(t, d, g, func() { checkQcow2(t, top, true) })
	cli(t, d, 0, "job", "speed", "j", "0")
	if out := cli(t, d, 0, "job", "watch", "j"); !strings.Contains(out, "needs no other image") {
		t.Errorf("job watch: %s", out)
	}
	must(t, d.Kill()) // behind the end
	must(t, os.Remove(middle))
	must(t, os.Rename(base, base+".away"))
	must(t, d.Start())
	progress(t, g, 0, 200)
	table := finish(t, d, g)
	alone(t, top)
	checkQcow2(t, top, true)
	verifyQcow2(t, top, table)
	tool(t, "image", "check", "-f", "qcow2", "--repair", "leaks", top)
	checkQcow2(t, top, false)
	verifyQcow2(t, top, table)
	verifyImage(t, base+".away", filled) // nobody wrote there
}

// written lets a guest write to the top of a chain whose middle image holds something, too, and returns a copy of the
// top and what the disk holds.
func written(t *testing.T) (d *daemon.Daemon, g *guest.Guest, disk daemon.Disk, base, theirs string, table *load.Table) {
	t.Helper()
	base, table = filledImage(t, 64*mib)
	top, middle := overlay(t, base)
	opts := mixed
	for _, image := range []string{middle, top} {
		disk = daemon.Disk{ID: "disk0", Image: image, Format: "qcow2", Queues: 2}
		d = start(t, disk)
		g = boot(t, d, guest.Options{}, disk)
		must(t, g.StartWriter(0, opts, table))
		progress(t, g, 0, 150)
		table = stopAndVerify(t, g, 0)
		opts.Seed++
		if image == middle {
			g.Quit()
			must(t, d.Stop())
		}
	}
	theirs = filepath.Join(t.TempDir(), "theirs.qcow2")
	must(t, d.Stop())
	copyFile(t, top, theirs)
	must(t, d.Start())
	return d, g, disk, base, theirs, table
}

// What is streamed to a base is what QEMU's rebase of the same image makes.
func TestStreamToBase(t *testing.T) {
	d, g, disk, base, theirs, table := written(t)
	cli(t, d, 0, "stream", "disk0", "--base", base, "--wait")
	must(t, g.Verify(0, table, false))
	g.Quit()
	must(t, d.Stop())
	if name, format := backingOf(t, disk.Image); name != base || format != "raw" {
		t.Errorf("behind the image is %s (%s), want %s (raw)", name, format, base)
	}
	checkQcow2(t, disk.Image, false)
	verifyQcow2(t, disk.Image, table)
	qemuImg(t, "rebase", "-f", "qcow2", "-b", base, "-F", "raw", theirs)
	qemuImg(t, "compare", "-f", "qcow2", "-F", "qcow2", disk.Image, theirs)
	if have, want := allocated(t, disk.Image), allocated(t, theirs); have > want+want/8+mib {
		t.Errorf("the image takes %d bytes, with qemu-img rebase %d", have, want)
	}
}

// With copy_on_read, what the guest has read is in the image; a stream and the guest's reads share the filter.
func TestCopyOnRead(t *testing.T) {
	base, filled := filledImage(t, 64*mib)
	top, _ := overlay(t, base)
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2, CopyOnRead: true}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	run(t, g, "dd if=/dev/vda of=/dev/null bs=64k count=160 2>/dev/null") // 10 MiB
	if have := allocated(t, top); have < 10*mib || have > 24*mib {
		t.Errorf("the guest read 10 MiB, and the image takes %d bytes", have)
	}
	must(t, g.StartWriter(0, mixed, filled))
	cli(t, d, 0, "stream", "disk0", "--id", "j", "--speed", "16M")
	progress(t, g, 0, 100)
	cli(t, d, 0, "job", "speed", "j", "0")
	cli(t, d, 0, "job", "watch", "j")
	progress(t, g, 0, 100)
	table := finish(t, d, g)
	alone(t, top)
	checkQcow2(t, top, false)
	verifyQcow2(t, top, table)
	verifyImage(t, base, filled)
}

// A copy by stream: the guest is on the target from the beginning, the daemon dies meanwhile, and in the end the source
// is not needed and was not written to.
func TestCopyByStream(t *testing.T) {
	source, filled := filledImage(t, 192*mib)
	target := filepath.Join(t.TempDir(), "target.qcow2")
	disk := daemon.Disk{ID: "disk0", Image: source, Queues: 2}
	d, g := busy(t, disk, filled)
	progress(t, g, 0, 100)
	cli(t, d, 0, "copy", "disk0", target, "--method", "stream", "--id", "j", "--speed", "16M")
	if info, err := d.Disk("disk0"); err != nil || info.Image != target || info.Format != "qcow2" || !strings.Contains(info.Warning, target) {
		t.Errorf("after the copy has begun: %+v, %v", info, err)
	}
	left := filepath.Join(t.TempDir(), "left.raw")
	copyFile(t, source, left)
	progress(t, g, 0, 100)
	must(t, d.Kill())
	must(t, d.Start())
	if job, err := d.Job("j"); err != nil || job.State != "running" {
		t.Fatalf("after a crash: %+v, %v", job, err)
	}
	cli(t, d, 0, "job", "speed", "j", "0")
	if out := cli(t, d, 0, "job", "watch", "j"); !strings.Contains(out, "change line") {
		t.Errorf("job watch does not say what to change: %s", out)
	}
	sameImages(t, source, left)
	must(t, os.Remove(source))
	progress(t, g, 0, 200)
	table := finish(t, d, g)
	alone(t, target)
	tool(t, "image", "check", "-f", "qcow2", "--repair", "leaks", target)
	checkQcow2(t, target, false)
	verifyQcow2(t, target, table)
}
