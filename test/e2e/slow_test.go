// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
)

// slow makes a file that reads as another one, at most so many bytes a second: QEMU's throttle filter over FUSE.
func slow(t *testing.T, path string, rate string) string {
	t.Helper()
	guest.Need(t, "qemu-storage-daemon")
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skip(err)
	}
	f.Close()
	mount := filepath.Join(t.TempDir(), "slow.raw")
	must(t, os.WriteFile(mount, nil, 0o600))
	cmd := exec.Command("qemu-storage-daemon", "--object", "throttle-group,id=g,x-bps-read="+rate,
		"--blockdev", "driver=file,read-only=on,node-name=f,filename="+path, "--blockdev", "driver=throttle,read-only=on,throttle-group=g,file=f,node-name=t",
		"--export", "type=fuse,id=e,node-name=t,mountpoint="+mount)
	must(t, guest.StartChild(cmd))
	exited := make(chan struct{})
	go func() {
		cmd.Wait() //nolint:errcheck // whatever it says
		close(exited)
	}()
	t.Cleanup(func() { // in order, which takes the mount away
		cmd.Process.Signal(syscall.SIGTERM) //nolint:errcheck // it may have gone
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
	return mount
}

// A guest that writes is streamed away from a base that is slow to read, with a crash on the way, and in the end needs it
// no more.
func TestStreamFromSlowBase(t *testing.T) {
	raw, filled := filledImage(t, 24*mib)
	base := slow(t, raw, "6000000")
	top := filepath.Join(t.TempDir(), "top.qcow2")
	tool(t, "image", "create", "-f", "qcow2", "-b", base, "-F", "raw", top)
	disk := daemon.Disk{ID: "disk0", Image: top, Format: "qcow2", Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	must(t, g.StartWriter(0, mixed, filled))
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
	table := stopAndVerify(t, g, 0)
	g.Quit()
	must(t, d.Stop())
	if name, _ := backingOf(t, top); name != "" {
		t.Errorf("behind the image is still %s", name)
	}
	checkQcow2(t, top, true)
	verifyQcow2(t, top, table)
	verifyImage(t, raw, filled)
}
