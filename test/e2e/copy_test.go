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

// sameImages wants two raw images to hold the same guest data while the daemon
// has them open.
func sameImages(t *testing.T, a, b string) {
	t.Helper()
	qemuImg(t, "compare", "-U", "-f", "raw", "-F", "raw", a, b)
}

// guestUsesOnly wants the target to hold everything in table, and the source
// to have been left behind.
func guestUsesOnly(t *testing.T, target, source string, table *load.Table) {
	t.Helper()
	verifyImage(t, target, table)
	if r, err := load.Verify(source, table, false); err != nil || r.Wrong == 0 {
		t.Errorf("the source is as new as the target: the guest still writes to it (%v)", err)
	}
}

func TestCopyAndSwitch(t *testing.T) {
	image, filled := filledImage(t, 128*mib)
	target := filepath.Join(t.TempDir(), "target.raw")
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2}
	d, g := busy(t, disk, filled)
	progress(t, g, 0, 100)

	if out := cli(t, d, 0, "copy", "disk0", target, "--id", "j", "--verify", "--wait"); !strings.Contains(out, "blkstream switch disk0") {
		t.Errorf("copy --wait does not say how to go on: %s", out)
	}
	job, err := d.Job("j")
	must(t, err)
	if job.State != "ready" || job.Stage != "mirror" || !job.TargetConsistent {
		t.Errorf("after copy --wait: %+v", job)
	}
	cli(t, d, 1, "copy", "disk0", target+"2") // one job a disk

	// Both sides are the same when the guest is quiet, and it goes on.
	progress(t, g, 0, 300)
	table := stopAndVerify(t, g, 0)
	sameImages(t, image, target)
	must(t, g.StartWriter(0, mixed, table))
	progress(t, g, 0, 100)

	if out := cli(t, d, 0, "switch", "disk0"); !strings.Contains(out, target) {
		t.Errorf("switch does not name the image in use: %s", out)
	}
	if job, err = d.Job("j"); err != nil || job.State != "completed" {
		t.Errorf("after the switch: %+v, %v", job, err)
	}
	progress(t, g, 0, 300)
	table = finish(t, d, g)
	guestUsesOnly(t, target, image, table)

	// The configuration still names the source: the switch was recorded, and wins.
	must(t, d.Start())
	info, err := d.Disk("disk0")
	must(t, err)
	if info.Image != target || info.ConfiguredImage != image || !strings.Contains(info.Warning, target) {
		t.Errorf("restarted with the old configuration: %+v", info)
	}
	g = boot(t, d, guest.Options{}, disk)
	must(t, g.Verify(0, table, false))
}

func TestCopySwitchesByItself(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	target := emptyImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image}
	d, g := busy(t, disk, filled)
	cli(t, d, 1, "copy", "disk0", target) // it exists, and nobody said that this is meant
	cli(t, d, 0, "block_copy", "disk0", target, "--existing", "--switch", "auto", "--wait")
	progress(t, g, 0, 300)
	table := finish(t, d, g)
	guestUsesOnly(t, target, image, table)
}

func TestCopyCancelled(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image}
	d, g := busy(t, disk, filled)
	waiting := d.Command(t.Context(), "copy", "disk0", filepath.Join(t.TempDir(), "t"), "--id", "j", "--speed", "1M", "--wait")
	must(t, waiting.Start())
	eventually(t, "the copy's first bytes", func() (bool, error) {
		if status, _ := d.CLI("job", "show", "j"); status != 0 {
			return false, nil // not started yet
		}
		job, err := d.Job("j")
		return job.BytesDone > 0, err
	})
	cli(t, d, 0, "job", "cancel", "j")
	waiting.Wait()
	if status := waiting.ProcessState.ExitCode(); status != 3 {
		t.Errorf("copy --wait of a cancelled job exits with %d, want 3", status)
	}
	progress(t, g, 0, 100)
	table := stopAndVerify(t, g, 0)
	cli(t, d, 0, "job", "dismiss", "j")
	cli(t, d, 1, "job", "show", "j")
	g.Quit()
	must(t, d.Stop())
	verifyImage(t, image, table)
}

// The daemon dies in each stage of a copy; the job goes on where it was, and
// nothing that the guest was told is lost.
func TestCopySurvivesKill(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	target := filepath.Join(t.TempDir(), "target.raw")
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2}
	d, g := busy(t, disk, filled)
	progress(t, g, 0, 100)
	cli(t, d, 0, "copy", "disk0", target, "--id", "j", "--speed", "8M")
	for _, share := range []int64{8, 2} { // an eighth, half
		eventually(t, "the bulk stage's progress", func() (bool, error) {
			job, err := d.Job("j")
			return job.BytesDone > 64*mib/share, err
		})
		must(t, d.Kill())
		must(t, d.Start())
		job, err := d.Job("j")
		must(t, err)
		if job.State != "running" || !strings.Contains(job.Message, "goes on where it was") || job.BytesDone < 64*mib/share {
			t.Fatalf("after a crash in the bulk stage: %+v", job)
		}
		progress(t, g, 0, 100)
	}
	cli(t, d, 0, "job", "speed", "j", "0")
	ready := func() (bool, error) {
		job, err := d.Job("j")
		return job.State == "ready", err
	}
	eventually(t, "a mirrored copy", ready)
	must(t, d.Kill())
	must(t, d.Start())
	eventually(t, "a mirrored copy after a crash", ready)
	progress(t, g, 0, 100)
	cli(t, d, 0, "switch", "j")
	must(t, d.Kill())
	must(t, d.Start())
	progress(t, g, 0, 100)
	table := stopAndVerify(t, g, 0)
	if info, err := d.Disk("disk0"); err != nil || info.Image != target {
		t.Errorf("after a crash behind the switch: %+v, %v", info, err)
	}
	g.Quit()
	must(t, d.Stop())
	guestUsesOnly(t, target, image, table)
	if _, err := os.Stat(image); err != nil {
		t.Errorf("the source is gone: %v", err)
	}
}
