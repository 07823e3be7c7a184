// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
)

// sameAs wants QEMU to read the same from a raw image and from another one.
func sameAs(t *testing.T, raw, image, format string) {
	t.Helper()
	if out, err := exec.Command("qemu-img", "compare", "-f", "raw", "-F", format, raw, image).CombinedOutput(); err != nil {
		t.Errorf("qemu-img compare: %v: %s", err, out)
	}
}

// A full backup and incremental ones over it of a guest that writes from the instant on, one of which dies with the
// daemon: each is what the disk was then.
func TestBackupChain(t *testing.T) {
	disk0, table := filledImage(t, 32*mib)
	disk := daemon.Disk{ID: "disk0", Image: disk0, Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	dir := t.TempDir()
	cli(t, d, 0, "bitmap", "add", "disk0", "b")
	opts := mixed
	opts.Depth = 4
	back := func(name string, args ...string) (target, was string) {
		t.Helper()
		target, was = filepath.Join(dir, name), filepath.Join(dir, name+".was")
		copyFile(t, disk0, was) // the guest is idle
		cli(t, d, 0, append([]string{"backup", "disk0", target, "--bitmap", "b", "--id", name, "--speed", "32M"}, args...)...)
		must(t, g.StartWriter(0, opts, table))
		opts.Seed++
		return target, was
	}
	images := map[string]string{}
	done := func(name, target, was string) {
		t.Helper()
		if out := cli(t, d, 0, "job", "watch", name); !strings.Contains(out, target+" holds disk disk0 as of") {
			t.Errorf("job watch: %s", out)
		}
		progress(t, g, 0, 50)
		table = stopAndVerify(t, g, 0)
		images[target] = was
	}
	full, was := back("full", "--full")
	done("full", full, was)
	one, was := back("one", "--base", full)
	done("one", one, was)

	dead, _ := back("dead", "--base", one, "--speed", "64K")
	progress(t, g, 0, 50)
	must(t, d.Kill())
	must(t, d.Start())
	if job, err := d.Job("dead"); err != nil || job.State != "failed" || job.TargetConsistent || !strings.Contains(job.Error, "instant") {
		t.Errorf("after a crash: %+v, %v", job, err)
	}
	progress(t, g, 0, 50)
	table = stopAndVerify(t, g, 0)
	must(t, os.Remove(dead))

	two, was := back("two", "--base", one, "--cluster-size", "128K")
	done("two", two, was)
	g.Quit()
	must(t, d.Stop())
	for target, was := range images {
		sameAs(t, was, target, "qcow2")
		checkQcow2(t, target, false)
	}
	for image, base := range map[string]string{two: one, one: full} {
		if name, format := backingOf(t, image); name != base || format != "qcow2" {
			t.Errorf("behind %s is %s (%s)", image, name, format)
		}
	}
	verifyImage(t, disk0, table)
}

// The target is full: the guest is held until there is room, or, without hold, goes on without the backup.
func TestBackupFullTarget(t *testing.T) {
	guest.Need(t, "mount", "umount")
	dir := t.TempDir()
	mount := func(options string) error {
		out, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "none", dir).CombinedOutput()
		if err != nil {
			t.Logf("mount: %v: %s", err, out)
		}
		return err
	}
	if os.Geteuid() != 0 || mount("size=16m") != nil {
		if os.Getenv("CI") != "" {
			t.FailNow()
		}
		t.Skip("no file system can be mounted here")
	}
	t.Cleanup(func() {
		if err := exec.Command("umount", "-l", dir).Run(); err != nil {
			t.Errorf("umount: %v", err)
		}
	})
	disk0, table := filledImage(t, 48*mib)
	disk := daemon.Disk{ID: "disk0", Image: disk0, Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	was := filepath.Join(t.TempDir(), "was")
	copyFile(t, disk0, was)
	cli(t, d, 0, "backup", "disk0", filepath.Join(dir, "held"), "--format", "raw", "--id", "held", "--on-cbw-error", "hold")
	must(t, g.StartWriter(0, mixed, table))
	eventually(t, "a full target", func() (bool, error) {
		job, err := d.Job("held")
		return job.State == "paused" && strings.Contains(job.Error, "no space"), err
	})
	ops := func() uint64 {
		s, err := g.WriterStats(0)
		must(t, err)
		return s.Writes + s.Reads + s.Zeros
	}
	eventually(t, "a guest that waits", func() (bool, error) {
		before := ops()
		time.Sleep(300 * time.Millisecond)
		return ops() == before, nil
	})
	must(t, mount("remount,size=64m"))
	eventually(t, "the backup's end", func() (bool, error) {
		job, err := d.Job("held")
		if job.State == "paused" { // a piece that failed late pauses it again
			_, _ = d.CLI("job", "resume", "held")
		}
		return job.State == "completed" && job.TargetConsistent, err
	})
	progress(t, g, 0, 100)

	// Breaking is the default.
	cli(t, d, 0, "backup", "disk0", filepath.Join(dir, "broken"), "--format", "raw", "--id", "broken")
	if out := cli(t, d, 3, "job", "watch", "broken"); !strings.Contains(out, "no space") || !strings.Contains(out, "could not be copied") {
		t.Errorf("job watch: %s", out)
	}
	progress(t, g, 0, 100)
	table = finish(t, d, g)
	sameAs(t, was, filepath.Join(dir, "held"), "raw")
	verifyImage(t, disk0, table)
}
