// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
)

// snapshots covers a disk n times while its guest writes, and returns the images, the oldest first.
func snapshots(t *testing.T, d *daemon.Daemon, g *guest.Guest, first string, n int) []string {
	t.Helper()
	images := []string{first}
	dir := t.TempDir()
	for i := range n {
		progress(t, g, 0, 100)
		images = append(images, filepath.Join(dir, fmt.Sprintf("%d.qcow2", i+1)))
		cli(t, d, 0, "snapshot", "disk0="+images[i+1])
	}
	progress(t, g, 0, 100)
	return images
}

// Images are merged in the middle of a chain, behind and under a guest that writes, and at last into the raw image with
// which all began.
func TestCommitUnderLoad(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2}
	d, g := busy(t, disk, filled)
	at := snapshots(t, d, g, image, 5)
	cli(t, d, 0, "commit", "disk0", "--top", at[3], "--base", at[1], "--wait")
	progress(t, g, 0, 100)
	if name, format := backingOf(t, at[4]); name != at[1] || format != "qcow2" {
		t.Errorf("behind %s is %s (%s), want %s", at[4], name, format, at[1])
	}
	cli(t, d, 0, "commit", "disk0", "--top", at[4], "--wait")
	progress(t, g, 0, 100)
	if name, format := backingOf(t, at[5]); name != at[1] || format != "qcow2" {
		t.Errorf("behind %s is %s (%s), want %s", at[5], name, format, at[1])
	}
	table := stopAndVerify(t, g, 0)
	must(t, g.StartWriter(0, mixed, table))
	cli(t, d, 0, "commit", "disk0", "--wait")
	progress(t, g, 0, 100)
	if info, err := d.Disk("disk0"); err != nil || info.Image != at[1] {
		t.Errorf("after the commit of the image in use: %+v %v", info, err)
	}
	cli(t, d, 0, "commit", "disk0", "--wait")
	progress(t, g, 0, 200)
	if info, err := d.Disk("disk0"); err != nil || info.Image != image || info.Warning != "" {
		t.Errorf("after the last commit: %+v %v", info, err)
	}
	table = finish(t, d, g)
	verifyImage(t, image, table)
	for _, path := range at[1:] {
		checkQcow2(t, path, false)
	}
}

// What commits leave is what qemu-img makes of copies of the same chain.
func TestCommitAsQEMU(t *testing.T) {
	image, filled := filledImage(t, 32*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2}
	d, g := busy(t, disk, filled)
	ours := snapshots(t, d, g, image, 4)
	finish(t, d, g)

	dir := t.TempDir()
	var theirs []string
	for i, path := range ours {
		theirs = append(theirs, filepath.Join(dir, fmt.Sprint(i)))
		b, err := os.ReadFile(path)
		must(t, err)
		must(t, os.WriteFile(theirs[i], b, 0o600))
		if i > 0 {
			format := "qcow2"
			if i == 1 {
				format = "raw"
			}
			qemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", theirs[i-1], "-F", format, theirs[i])
		}
	}
	same := func(ours, theirs, format string) {
		t.Helper()
		qemuImg(t, "compare", "-U", "-f", format, "-F", format, ours, theirs)
	}

	must(t, d.Start())
	cli(t, d, 0, "commit", "disk0", "--top", ours[3], "--base", ours[1], "--wait")
	qemuImg(t, "commit", "-f", "qcow2", "-b", theirs[1], "-d", theirs[3])
	qemuImg(t, "rebase", "-u", "-f", "qcow2", "-b", theirs[1], "-F", "qcow2", theirs[4])
	must(t, d.Stop())
	same(ours[4], theirs[4], "qcow2")
	same(ours[1], theirs[1], "qcow2")
	must(t, d.Start())
	cli(t, d, 0, "commit", "disk0", "--base", image, "--wait")
	qemuImg(t, "commit", "-f", "qcow2", "-b", theirs[0], "-d", theirs[4])
	must(t, d.Stop())
	same(image, theirs[0], "raw")
}

// The daemon is killed in both kinds of commit. Each goes on, and nothing is lost that the guest was told is done.
func TestCommitKill(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2}
	d, g := busy(t, disk, filled)
	at := snapshots(t, d, g, image, 3)
	completed := func(id string) func() (bool, error) {
		return func() (bool, error) {
			job, err := d.Job(id)
			if err == nil && job.State != "running" && job.State != "ready" && job.State != "completed" {
				err = fmt.Errorf("job %s: %+v", id, job)
			}
			return job.State == "completed", err
		}
	}
	kill := func(id, speed string, args ...string) {
		cli(t, d, 0, append([]string{"commit", "disk0", "--id", id, "--speed", speed}, args...)...)
		for i := range 4 {
			progress(t, g, 0, 20)
			if i == 3 {
				d.CLI("job", "speed", id, "0") // it comes to the end, around which the last one dies
			}
			time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
			must(t, d.Kill())
			must(t, d.Start())
		}
		eventually(t, "the commit after crashes", completed(id))
		progress(t, g, 0, 100)
	}
	kill("middle", "1M", "--top", at[2], "--base", at[1])
	table := stopAndVerify(t, g, 0)
	must(t, g.StartWriter(0, mixed, table))
	if name, _ := backingOf(t, at[3]); name != at[1] {
		t.Errorf("behind %s is %s, want %s", at[3], name, at[1])
	}
	kill("first", "16M", "--base", image)
	table = stopAndVerify(t, g, 0)
	if info, err := d.Disk("disk0"); err != nil || info.Image != image {
		t.Errorf("after the commit of the image in use: %+v %v", info, err)
	}
	g.Quit()
	must(t, d.Stop())
	verifyImage(t, image, table)
	for _, path := range at[1:] {
		checkQcow2(t, path, true)
	}
}
