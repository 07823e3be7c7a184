// SPDX-License-Identifier: Apache-2.0

// Package daemon builds and runs the real blkstreamd and blkstream, for tests
// and the demo.
package daemon

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/blkstream/blkstream/test/guest"
)

// Disk is a [[disk]] table of the configuration.
type Disk struct {
	ID       string
	Image    string
	Format   string // default "raw"
	Queues   int    // default 1
	ReadOnly bool
	Lock     string // default "always"
	Cache    string // default "none"

	CopyOnRead bool
}

// Daemon is one blkstreamd with a folder of its own: configuration, sockets,
// state and log.
type Daemon struct {
	bin    string
	dir    string
	cmd    *exec.Cmd
	exited chan struct{} // the process started last has ended
}

const (
	readyTimeout   = 20 * time.Second
	stopTimeout    = 30 * time.Second
	commandTimeout = 90 * time.Second // a copy of a small image, waited for
)

// Build builds both programs into dir, static as they are shipped.
func Build(dir string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", dir+"/",
		"github.com/blkstream/blkstream/cmd/blkstreamd", "github.com/blkstream/blkstream/cmd/blkstream")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("daemon: build: %w: %s", err, out)
	}
	return nil
}

// New writes the configuration for disks. bin is where Build put the programs.
func New(bin string, disks ...Disk) (*Daemon, error) {
	dir, err := os.MkdirTemp("/tmp", "bsd") // short: socket paths are limited to 107 bytes
	if err != nil {
		return nil, err
	}
	d := &Daemon{bin: bin, dir: dir}
	var b strings.Builder
	fmt.Fprintf(&b, "[daemon]\ncontrol = %q\nstate_dir = %q\n", d.path("control"), d.path("state"))
	for _, k := range disks {
		fmt.Fprintf(&b, "\n[[disk]]\nid = %q\nsocket = %q\nimage = %q\nformat = %q\nread_only = %v\nqueues = %d\nlock = %q\ncache = %q\ncopy_on_read = %v\n",
			k.ID, d.Socket(k.ID), k.Image, cmp.Or(k.Format, "raw"), k.ReadOnly, max(1, k.Queues), cmp.Or(k.Lock, "always"),
			cmp.Or(k.Cache, "none"), k.CopyOnRead)
	}
	return d, errors.Join(
		os.Mkdir(d.path("state"), 0o700),
		os.WriteFile(d.path("config.toml"), []byte(b.String()), 0o600),
	)
}

func (d *Daemon) path(name string) string { return filepath.Join(d.dir, name) }

// Socket is where the disk is served.
func (d *Daemon) Socket(id string) string { return d.path(id + ".sock") }

// Control is the path of the control socket.
func (d *Daemon) Control() string { return d.path("control") }

// Start starts the process and waits until it says by sd_notify that it is ready.
func (d *Daemon) Start() error {
	notify := d.path("notify")
	os.Remove(notify)
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer ready.Close()
	log, err := os.OpenFile(d.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(d.bin, "blkstreamd"), "--config", d.path("config.toml"))
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	cmd.Stdout, cmd.Stderr = log, log
	if err := guest.StartChild(cmd); err != nil {
		return err
	}
	exited := make(chan struct{})
	d.cmd, d.exited = cmd, exited
	go func() {
		cmd.Wait()
		close(exited)
		ready.Close() // ends the wait below
	}()
	if err := ready.SetReadDeadline(time.Now().Add(readyTimeout)); err != nil {
		return err
	}
	for msg := make([]byte, 4096); ; {
		n, err := ready.Read(msg)
		if err != nil {
			return fmt.Errorf("daemon: not ready: %w", err)
		}
		if bytes.Contains(msg[:n], []byte("READY=1")) {
			return nil
		}
	}
}

// Kill ends the process as a crash does.
func (d *Daemon) Kill() error {
	if d.cmd == nil {
		return nil
	}
	d.cmd.Process.Kill()
	<-d.exited
	if s, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !s.Signaled() {
		return fmt.Errorf("daemon: was gone already: %v", d.cmd.ProcessState)
	}
	return nil
}

// Abort ends the process, which writes the stacks of all its goroutines into the log.
func (d *Daemon) Abort() error {
	if err := d.cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		return fmt.Errorf("daemon: was gone already: %w", err)
	}
	<-d.exited
	return nil
}

// Stop asks the process to end, and wants it to exit with status 0.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("daemon: was gone already: %w", err)
	}
	select {
	case <-d.exited:
	case <-time.After(stopTimeout):
		return fmt.Errorf("daemon: still there %v after SIGTERM", stopTimeout)
	}
	if code := d.cmd.ProcessState.ExitCode(); code != 0 {
		return fmt.Errorf("daemon: SIGTERM: %v", d.cmd.ProcessState)
	}
	return nil
}

// Remove ends what still runs and removes the folder.
func (d *Daemon) Remove() {
	if d.cmd != nil {
		d.cmd.Process.Kill()
		<-d.exited
	}
	os.RemoveAll(d.dir)
}

// Log is what the daemon logged so far, over all its lives.
func (d *Daemon) Log() string {
	log, err := os.ReadFile(d.path("log"))
	if err != nil {
		return err.Error()
	}
	return string(log)
}

// Command prepares a run of the command line against this daemon.
func (d *Daemon) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, filepath.Join(d.bin, "blkstream"), append([]string{"--socket", d.path("control")}, args...)...)
}

// CLI runs the command line and returns its exit status and what it printed on
// both outputs.
func (d *Daemon) CLI(args ...string) (int, string) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	out, err := d.Command(ctx, args...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return -1, fmt.Sprintf("not done after %v: %s", commandTimeout, out)
	case errors.As(err, &exit):
		return exit.ExitCode(), string(out)
	case err != nil:
		return -1, err.Error()
	}
	return 0, string(out)
}

// DiskInfo and JobInfo are the parts of the command line's JSON that are looked at.
type DiskInfo struct {
	Image           string `json:"image"`
	Format          string `json:"format"`
	ConfiguredImage string `json:"configured_image"`
	Size            int64  `json:"size"`
	State           string `json:"state"`
	Warning         string `json:"warning"`
}

// JobInfo: see DiskInfo.
type JobInfo struct {
	State            string `json:"state"`
	Stage            string `json:"stage"`
	Error            string `json:"error"`
	TargetConsistent bool   `json:"target_consistent"`
	Message          string `json:"message"`
	BytesDone        int64  `json:"bytes_done"`
	BytesTotal       int64  `json:"bytes_total"`
}

// Disk shows a disk.
func (d *Daemon) Disk(id string) (info DiskInfo, err error) {
	err = d.show(&info, "disk", "show", id)
	return info, err
}

// Job shows a job.
func (d *Daemon) Job(id string) (info JobInfo, err error) {
	err = d.show(&info, "job", "show", id)
	return info, err
}

func (d *Daemon) show(into any, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	out, err := d.Command(ctx, append([]string{"--json"}, args...)...).Output()
	if ctx.Err() != nil {
		return fmt.Errorf("blkstream %s: not done after %v", strings.Join(args, " "), commandTimeout)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("blkstream %s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, into); err != nil {
		return fmt.Errorf("blkstream %s: %w in %s", strings.Join(args, " "), err, out)
	}
	return nil
}
