// SPDX-License-Identifier: Apache-2.0

// Command demo shows the main job: a guest runs on a blkstream disk and writes, its disk is copied to another image
// under that load, the guest is switched to it, and every write that the guest was told is done is looked for.
// Without QEMU, or with --frontend, the driver-side twin of the daemon's protocol takes the guest's place.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

const size = 512 << 20 // of the disk, bytes

func main() {
	twin := flag.Bool("frontend", false, "do without QEMU")
	flag.Parse()
	if err := run(*twin); err != nil {
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

func say(format string, args ...any) { fmt.Printf("\n== "+format+"\n", args...) }

func run(twin bool) (err error) {
	dir, err := os.MkdirTemp("/var/tmp", "blkstream-demo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	source, target := filepath.Join(dir, "source.img"), filepath.Join(dir, "target.img")

	say("making a disk of %d MiB, filled with blocks that can be checked", size>>20)
	table, err := load.Fill(source, size, 1)
	if err != nil {
		return err
	}
	if err := daemon.Build(dir); err != nil {
		return err
	}
	d, err := daemon.New(dir, daemon.Disk{ID: "disk0", Image: source, Queues: 2})
	if err != nil {
		return err
	}
	defer d.Remove()
	if err := d.Start(); err != nil {
		return err
	}
	say("blkstreamd serves it")
	if err := show(d, "disk", "list"); err != nil {
		return err
	}
	move := func() error { return moveDisk(d, target) }
	if missing := guest.Missing(); twin || missing != nil {
		if missing != nil {
			fmt.Printf("(no guest: %v)\n", missing)
		}
		err = withTwin(d, dir, move)
	} else {
		err = withGuest(d, table, target, move)
	}
	if err != nil {
		return fmt.Errorf("%w\n%s", err, d.Log())
	}
	return nil
}

// show runs a blkstream command on this terminal.
func show(d *daemon.Daemon, args ...string) error {
	fmt.Printf("$ blkstream %s\n", strings.Join(args, " "))
	cmd := d.Command(context.Background(), args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

func moveDisk(d *daemon.Daemon, target string) error {
	say("copying the disk while it is written")
	if err := show(d, "copy", "disk0", target, "--verify", "--wait"); err != nil {
		return err
	}
	say("both images are the same, and each write goes to both; now the switch")
	start := time.Now()
	if err := show(d, "switch", "disk0"); err != nil {
		return err
	}
	fmt.Printf("the command took %v\n", time.Since(start).Round(time.Millisecond))
	return nil
}

// withGuest moves the disk under a Linux guest.
func withGuest(d *daemon.Daemon, table *load.Table, target string, move func() error) error {
	say("booting a Linux guest on it, with a program that writes and reads at random")
	g, err := guest.Start(context.Background(), guest.Options{
		Disks: []guest.Disk{{Socket: d.Socket("disk0"), Queues: 2, Reconnect: true}},
	})
	if err != nil {
		return err
	}
	defer g.Quit()
	if err := g.StartWriter(0, load.Options{ReadPercent: 30}, table); err != nil {
		return err
	}
	before, err := writes(g, 0)
	if err != nil {
		return err
	}
	if err := move(); err != nil {
		return err
	}
	after, err := writes(g, before+100)
	if err != nil {
		return err
	}
	stats, table, err := g.StopWriter(0)
	if err != nil {
		return err
	}
	say("looking for every write that the guest was told is done")
	if err := g.Verify(0, table, false); err != nil {
		return err
	}
	fmt.Println("in the guest: all there")
	g.Quit()
	if err := d.Stop(); err != nil {
		return err
	}
	report, err := load.Verify(target, table, false)
	if err == nil {
		err = report.Err()
	}
	if err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	fmt.Printf("in %s, after the daemon has stopped: all there\n", filepath.Base(target))
	say("done: %d writes and %d reads by the guest, %d of the writes during the move; %d blocks checked; none lost",
		stats.Writes, stats.Reads, after-before, report.Checked)
	return nil
}

// writes waits until the guest has done at least n writes, and returns their number.
func writes(g *guest.Guest, n uint64) (uint64, error) {
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		s, err := g.WriterStats(0)
		if err != nil || s.Writes > n {
			return s.Writes, err
		}
		if time.Now().After(deadline) {
			return 0, errors.New("the guest writes no more")
		}
	}
}

// withTwin moves the disk under the load generator, which checks what it has written at its end.
func withTwin(d *daemon.Daemon, dir string, move func() error) error {
	say("the load generator writes at random")
	bench := filepath.Join(dir, "bench")
	if out, err := exec.Command("go", "build", "-o", bench, "github.com/blkstream/blkstream/test/bench").CombinedOutput(); err != nil {
		return fmt.Errorf("build the load generator: %w: %s", err, out)
	}
	cmd := exec.Command(bench, "--socket", d.Socket("disk0"), "--rw", "randwrite", "--bs", "4k", "--depth", "8",
		"--ops", "400000", "--verify")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	moved := move()
	if moved != nil {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
	} else {
		say("waiting for the load generator to finish and to read back what it wrote")
	}
	if err := errors.Join(moved, cmd.Wait()); err != nil {
		return err
	}
	say("done: the load never noticed, and everything it wrote is on the target")
	return d.Stop()
}
