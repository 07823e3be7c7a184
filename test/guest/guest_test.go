// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/guest/load"
)

// The harness is tried against somebody else's back-end, so that a failure of
// the end-to-end tests speaks of blkstream.

const diskSize = 64 << 20

// peer serves image by QEMU's storage daemon and returns the socket.
func peer(t *testing.T, image string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "bsq")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sock := filepath.Join(dir, "s")
	var stderr bytes.Buffer
	cmd := exec.Command("qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=f,locking=off,filename="+image,
		"--blockdev", "driver=raw,node-name=d,file=f",
		"--export", "type=vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path="+sock)
	cmd.Stderr = &stderr
	if err := StartChild(cmd); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("qemu-storage-daemon: %s", &stderr)
		}
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			return sock
		}
		if time.Now().After(deadline) {
			t.Fatal("qemu-storage-daemon does not listen")
		}
	}
}

func newImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, diskSize); err != nil {
		t.Fatal(err)
	}
	return path
}

func run(t *testing.T, g *Guest, cmd string) string {
	t.Helper()
	out, err := g.Run(cmd)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestGuest(t *testing.T) {
	Need(t, "qemu-storage-daemon")
	images := []string{newImage(t), newImage(t)}
	g := Boot(t, Options{
		Disks:        []Disk{{Socket: peer(t, images[0]), Queues: 2}, {Socket: peer(t, images[1])}},
		HotplugSlots: 1,
	})
	if got := run(t, g, "cat /sys/block/vda/size /sys/block/vdb/size | xargs"); got != "131072 131072" {
		t.Errorf("sizes in sectors: %s", got)
	}
	if got := run(t, g, "ls /sys/block/vda/mq | wc -l"); got != "2" {
		t.Errorf("%s queues, want 2", got)
	}
	if out, err := g.Run("echo some; exit 3"); err == nil || out != "some\n" {
		t.Errorf("a command that fails: %q, %v", out, err)
	}

	// A reset takes a running writer away; what it had been told is still there.
	opts := load.Options{ReadPercent: 20, FlushEvery: 16, Seed: 7}
	must(t, g.StartWriter(0, opts, nil))
	must(t, g.HotplugMemory(128))
	table := awaitWrites(t, g, 0, 200)
	must(t, g.Reset())
	must(t, g.Verify(0, table, true))

	// A table outlives its writer and the guest's kernel.
	opts.ZeroPercent = 10
	must(t, g.StartWriter(1, opts, nil))
	awaitWrites(t, g, 1, 200)
	_, table, err := g.StopWriter(1)
	must(t, err)
	must(t, g.Reboot())
	must(t, g.Verify(1, table, false))
	must(t, g.StartWriter(1, opts, table))
	awaitWrites(t, g, 1, 100)
	_, table, err = g.StopWriter(1)
	must(t, err)

	// The host sees the same blocks, and both notice one that has gone.
	r, err := load.Verify(images[1], table, false)
	must(t, err)
	must(t, r.Err())
	if r.Checked < 100 {
		t.Errorf("only %d blocks checked", r.Checked)
	}
	must(t, os.Truncate(images[1], 0))
	must(t, os.Truncate(images[1], diskSize))
	run(t, g, "echo 3 >/proc/sys/vm/drop_caches")
	if err := g.Verify(1, table, false); err == nil || !strings.Contains(err.Error(), "lost") {
		t.Errorf("verifying an empty disk: %v", err)
	}
}

// awaitWrites waits until the writer has written n times, and returns its table.
func awaitWrites(t *testing.T, g *Guest, disk int, n uint64) *load.Table {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		s, err := g.WriterStats(disk)
		must(t, err)
		if s.Writes >= n {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("only %d writes in a minute", s.Writes)
		}
	}
	table, err := g.WriterTable(disk)
	must(t, err)
	return table
}

func TestMigrate(t *testing.T) {
	Need(t, "qemu-storage-daemon")
	image := newImage(t)
	from := Boot(t, Options{Disks: []Disk{{Socket: peer(t, image)}}})
	must(t, from.StartWriter(0, load.Options{}, nil))
	awaitWrites(t, from, 0, 50)
	to := Boot(t, Options{Disks: []Disk{{Socket: peer(t, image)}}, Incoming: true, Paused: true})
	must(t, from.Migrate(to))
	must(t, from.CompareMemory(to))
	from.Quit()
	must(t, to.Resume())
	moved, err := to.WriterStats(0)
	must(t, err)
	awaitWrites(t, to, 0, moved.Writes+50)
	_, table, err := to.StopWriter(0)
	must(t, err)
	must(t, to.Verify(0, table, false))
}

// A guest that dies under a request must say so at once, with its console.
func TestPanic(t *testing.T) {
	g := Boot(t, Options{})
	if _, err := g.Run("echo c >/proc/sysrq-trigger"); err == nil {
		t.Error("no error from a crashed guest")
	}
	<-g.exited
	if log := g.log(); !strings.Contains(log, "sysrq triggered crash") {
		t.Errorf("no console in the log: %s", log)
	}
	if _, err := g.Run("true"); err == nil {
		t.Error("a dead guest answers")
	}
}

func TestStartFails(t *testing.T) {
	Need(t)
	_, err := Start(t.Context(), Options{Disks: []Disk{{Socket: "/nonexistent"}}})
	if err == nil || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("want QEMU's own words on the socket, got %v", err)
	}
}

// A back-end that accepts nothing leaves QEMU hanging before it has a monitor.
func TestStartTimesOut(t *testing.T) {
	Need(t)
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	must(t, err)
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if _, err = Start(ctx, Options{Disks: []Disk{{Socket: sock}}}); err == nil {
		t.Error("started on a silent back-end")
	}
}
