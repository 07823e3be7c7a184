// SPDX-License-Identifier: Apache-2.0

// Package e2e runs Linux guests against the real programs.
package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

const (
	mib      = 1 << 20
	patience = 90 * time.Second // for whatever takes a second when nothing else runs
)

// bin holds the programs, built once.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if bin, err = os.MkdirTemp("", "bsbin"); err == nil {
			defer os.RemoveAll(bin)
			err = daemon.Build(bin)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start starts a daemon; it is gone when the test ends, and its log shown if
// the test failed.
func start(t *testing.T, disks ...daemon.Disk) *daemon.Daemon {
	t.Helper()
	guest.Need(t, "qemu-img")
	d, err := daemon.New(bin, disks...)
	must(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("blkstreamd's log:\n%s", d.Log())
		}
		d.Remove()
	})
	must(t, d.Start())
	return d
}

// emptyImage makes a sparse raw image.
func emptyImage(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	return path
}

// filledImage makes a raw image full of blocks that can be checked.
func filledImage(t *testing.T, size int64) (string, *load.Table) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	table, err := load.Fill(path, size, uint64(size))
	must(t, err)
	return path, table
}

// boot starts a guest on disks of d, with as many queues as each has, that
// waits when the daemon dies.
func boot(t *testing.T, d *daemon.Daemon, opts guest.Options, disks ...daemon.Disk) *guest.Guest {
	t.Helper()
	for _, k := range disks {
		opts.Disks = append(opts.Disks, guest.Disk{Socket: d.Socket(k.ID), Queues: k.Queues, Reconnect: true})
	}
	return guest.Boot(t, opts)
}

// busy starts a daemon and a guest that writes to the disk, which holds the table.
func busy(t *testing.T, disk daemon.Disk, table *load.Table) (*daemon.Daemon, *guest.Guest) {
	t.Helper()
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	must(t, g.StartWriter(0, mixed, table))
	return d, g
}

func run(t *testing.T, g *guest.Guest, cmd string) string {
	t.Helper()
	out, err := g.Run(cmd)
	must(t, err)
	return out
}

// cli runs a command that must exit with status want.
func cli(t *testing.T, d *daemon.Daemon, want int, args ...string) string {
	t.Helper()
	status, out := d.CLI(args...)
	if status != want {
		t.Fatalf("blkstream %v: status %d, want %d: %s", args, status, want, out)
	}
	return out
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() (bool, error)) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		ok, err := cond()
		must(t, err)
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %v", what, patience)
		}
	}
}

// progress waits until the writer of a disk has done n more operations.
func progress(t *testing.T, g *guest.Guest, disk int, n uint64) {
	t.Helper()
	done := func() uint64 {
		s, err := g.WriterStats(disk)
		must(t, err)
		return s.Writes + s.Reads + s.Zeros
	}
	goal := done() + n
	eventually(t, fmt.Sprintf("%d operations on disk %d", n, disk), func() (bool, error) { return done() >= goal, nil })
}

// stopAndVerify stops the writer of a disk and checks in the guest that the
// disk holds what it owes.
func stopAndVerify(t *testing.T, g *guest.Guest, disk int) *load.Table {
	t.Helper()
	_, table, err := g.StopWriter(disk)
	must(t, err)
	must(t, g.Verify(disk, table, false))
	return table
}

// finish stops the writer of the first disk, checks what that disk owes, and ends the guest and the daemon.
func finish(t *testing.T, d *daemon.Daemon, g *guest.Guest) *load.Table {
	t.Helper()
	table := stopAndVerify(t, g, 0)
	g.Quit()
	must(t, d.Stop())
	return table
}

// killed kills the daemon three times while its stream j goes on under a writer. dead looks at what is left each time.
func killed(t *testing.T, d *daemon.Daemon, g *guest.Guest, dead func()) {
	t.Helper()
	done := int64(0)
	for range 3 {
		eventually(t, "the stream's progress", func() (bool, error) {
			job, err := d.Job("j")
			return job.BytesDone > done+4*mib, err
		})
		progress(t, g, 0, uint64(1+rand.IntN(200)))
		job, err := d.Job("j")
		must(t, err)
		done = job.BytesDone
		must(t, d.Kill())
		dead()
		must(t, d.Start())
		if job, err := d.Job("j"); err != nil || job.State != "running" {
			t.Fatalf("after a crash: %+v, %v", job, err)
		}
	}
}

func qemuImg(t *testing.T, args ...string) {
	t.Helper()
	command(t, "qemu-img", args...)
}

// copyFile keeps the holes.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	command(t, "cp", from, to)
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// verifyImage checks the raw image itself.
func verifyImage(t *testing.T, image string, table *load.Table) {
	t.Helper()
	r, err := load.Verify(image, table, false)
	must(t, err)
	must(t, r.Err())
	if r.Checked == 0 {
		t.Fatal("nothing to check: the writer wrote nothing")
	}
}
