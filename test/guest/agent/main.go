// SPDX-License-Identifier: Apache-2.0

// Agent is process 1 of a test guest: it mounts what a shell expects, loads the
// virtio drivers and then serves the host over the second serial port.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"

	"github.com/blkstream/blkstream/test/guest/load"
	"github.com/blkstream/blkstream/test/guest/wire"
)

const port = "/dev/ttyS1"

func main() {
	// Returning from process 1 panics the kernel, which ends the virtual machine with its log kept.
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
	}
}

func run() error {
	for _, m := range []struct{ kind, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"},
	} {
		if err := syscall.Mount(m.kind, m.dir, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	if err := os.Setenv("PATH", "/bin:/sbin"); err != nil {
		return err
	}
	modules, err := os.ReadFile("/modules/list")
	if err != nil {
		return err
	}
	for _, m := range strings.Fields(string(modules)) {
		// Not fatal: a module for hardware that this machine lacks refuses to load.
		if out, err := shell("insmod /modules/" + m); err != nil {
			fmt.Fprintf(os.Stderr, "agent: insmod %s: %v: %s\n", m, err, out)
		}
	}
	if out, err := shell("stty -F " + port + " raw -echo"); err != nil {
		return fmt.Errorf("%s: %w: %s", port, err, out)
	}
	tty, err := os.OpenFile(port, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer tty.Close()
	return (&agent{out: tty, writers: map[string]*load.Writer{}}).serve(tty)
}

// agent answers requests, each in a goroutine of its own: a command that hangs
// on a disk does not keep the host from asking others.
type agent struct {
	outMu sync.Mutex // one reply at a time
	out   io.Writer

	mu      sync.Mutex              // guards what follows; may be held while a disk is opened
	writers map[string]*load.Writer // by device
}

func (a *agent) serve(in io.Reader) error {
	if err := a.send(&wire.Reply{Hello: true}); err != nil {
		return err
	}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("%s: %w", port, err)
		}
		var req wire.Request
		if err := json.Unmarshal(line, &req); err != nil {
			fmt.Fprintf(os.Stderr, "agent: request %q: %v\n", line, err)
			continue
		}
		go func() {
			reply := &wire.Reply{ID: req.ID}
			if err := a.handle(&req, reply); err != nil {
				reply.Err = err.Error()
			}
			if err := a.send(reply); err != nil {
				fmt.Fprintln(os.Stderr, "agent: reply:", err)
			}
		}()
	}
}

func (a *agent) send(r *wire.Reply) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	a.outMu.Lock()
	defer a.outMu.Unlock()
	_, err = a.out.Write(append(line, '\n'))
	return err
}

func (a *agent) handle(req *wire.Request, reply *wire.Reply) (err error) {
	switch req.Op {
	case wire.Run:
		reply.Out, err = shell(req.Cmd)
		return err
	case wire.Verify:
		reply.Report, err = load.Verify(req.Disk, req.Table, req.Newer)
		return err
	case wire.Start:
		return a.start(req)
	default: // about a writer that runs
	}
	a.mu.Lock()
	w := a.writers[req.Disk]
	if req.Op == wire.Stop {
		delete(a.writers, req.Disk)
	}
	a.mu.Unlock()
	if w == nil {
		return fmt.Errorf("no writer on %s", req.Disk)
	}
	switch req.Op {
	case wire.Stats:
		reply.Stats = w.Stats()
	case wire.Table:
		reply.Table = w.Table()
	case wire.Stop:
		reply.Stats = w.Stop()
		reply.Table = w.Table()
	default:
		return fmt.Errorf("unknown operation %q", req.Op)
	}
	return nil
}

func (a *agent) start(req *wire.Request) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.writers[req.Disk] != nil {
		return errors.New("there is a writer already")
	}
	w, err := load.Start(req.Disk, req.Options, req.Table)
	if err == nil {
		a.writers[req.Disk] = w
	}
	return err
}

func shell(cmd string) (string, error) {
	out, err := exec.Command("/bin/busybox", "sh", "-c", cmd).CombinedOutput()
	return string(out), err
}
