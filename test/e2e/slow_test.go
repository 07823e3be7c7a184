// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
)

// fuse makes a file that is another one, over FUSE by qemu-storage-daemon. With a rate it is read at most so many bytes a
// second, and not written.
func fuse(t *testing.T, path, rate string) (mount string, server *os.Process) {
	t.Helper()
	guest.Need(t, "qemu-storage-daemon")
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	f.Close()
	mount = filepath.Join(t.TempDir(), "fuse.raw")
	must(t, os.WriteFile(mount, nil, 0o600))
	args := []string{"--blockdev", "driver=file,node-name=e,filename=" + path, "--export", "type=fuse,id=e,node-name=e,writable=on,mountpoint=" + mount}
	if rate != "" {
		args = []string{
			"--object", "throttle-group,id=g,x-bps-read=" + rate,
			"--blockdev", "driver=file,read-only=on,node-name=f,filename=" + path,
			"--blockdev", "driver=throttle,read-only=on,throttle-group=g,file=f,node-name=e",
			"--export", "type=fuse,id=e,node-name=e,mountpoint=" + mount,
		}
	}
	cmd := exec.Command("qemu-storage-daemon", args...)
	must(t, guest.StartChild(cmd))
	exited := make(chan struct{})
	go func() {
		cmd.Wait() //nolint:errcheck // whatever it says
		close(exited)
	}()
	t.Cleanup(func() { // in order, which takes the mount away
		cmd.Process.Signal(syscall.SIGCONT) //nolint:errcheck // it may have gone
		cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // as above
		<-exited
	})
	info, err := os.Stat(path)
	must(t, err)
	eventually(t, "the slow file", func() (bool, error) {
		s, err := os.Stat(mount)
		select {
		case <-exited:
			t.Skip("qemu-storage-daemon cannot export over FUSE here")
		default:
		}
		return err == nil && s.Size() == info.Size(), nil
	})
	return mount, cmd.Process
}

// A guest that writes is streamed away from a base that is slow to read, with a crash on the way, and in the end needs it
// no more.
func TestStreamFromSlowBase(t *testing.T) {
	raw, filled := filledImage(t, 24*mib)
	base, _ := fuse(t, raw, "6000000")
	top := filepath.Join(t.TempDir(), "top.qcow2")
	tool(t, "image", "create", "-f", "qcow2", "-b", base, "-F", "raw", top)
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d, g := busy(t, disk, filled)
	begin := time.Now()
	cli(t, d, 0, "stream", "disk0", "--id", "j")
	if job, err := d.Job("j"); err != nil || job.State != "running" {
		t.Errorf("the base was not slow: %+v, %v", job, err)
	}
	progress(t, g, 0, 5)
	must(t, d.Kill())
	must(t, d.Start())
	cli(t, d, 0, "job", "watch", "j")
	t.Logf("streamed in %v", time.Since(begin))
	progress(t, g, 0, 100)
	table := finish(t, d, g)
	alone(t, top)
	checkQcow2(t, top, true)
	verifyQcow2(t, top, table)
	verifyImage(t, raw, filled)
}

// The storage of a copy's target does not answer when the daemon is told to stop. It gives up all the same, says what it
// left, and ends when the kernel lets it. Its successor goes on with the copy.
func TestStopWhileTargetHangs(t *testing.T) {
	source, filled := filledImage(t, 64*mib)
	target, storage := fuse(t, emptyImage(t, 64*mib), "")
	disk := daemon.Disk{ID: "disk0", Image: source, Queues: 2}
	d, g := busy(t, disk, filled)
	cli(t, d, 0, "copy", "disk0", target, "--existing", "--id", "j", "--speed", "8M")
	copied := func() {
		t.Helper()
		eventually(t, "the copy's progress", func() (bool, error) {
			job, err := d.Job("j")
			return job.BytesDone > 2*mib, err
		})
	}
	copied()
	must(t, storage.Signal(syscall.SIGSTOP))
	progress(t, g, 0, 100) // the guest does not wait for the target
	stopped := make(chan error, 1)
	go func() { stopped <- d.Stop() }()
	want := "job j, from " + source + " to " + target
	eventually(t, "that the daemon gives up", func() (bool, error) { return strings.Contains(d.Log(), want), nil })
	must(t, storage.Signal(syscall.SIGCONT))
	if err := <-stopped; err == nil || !strings.Contains(err.Error(), "exit status 1") {
		t.Errorf("SIGTERM while the target hangs: %v", err)
	}
	must(t, d.Start())
	copied()
	cli(t, d, 0, "job", "cancel", "j") // not the switch: this server mixes up writes that are in flight together, as fio shows, too
	table := finish(t, d, g)
	verifyImage(t, source, table)
}
