// SPDX-License-Identifier: Apache-2.0

// Package daemon wires everything together: the disks of the configuration, their images, graphs and sockets, the
// jobs, the state directory and the control service.
package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/vhostuser"
)

// Options of a daemon.
type Options struct {
	Version string
	Log     *slog.Logger
}

// Daemon is a running daemon.
type Daemon struct {
	opts  Options
	file  *config.File
	store *job.Store   // nil in the mode for one disk
	jobs  *job.Manager // likewise
	lock  *os.File     // of the state directory

	unfinished []job.Record // jobs of an earlier daemon, while this one starts

	starting atomic.Bool // images may still be locked by a daemon that was killed

	rpc *ttrpc.Server
	wg  sync.WaitGroup
	end chan struct{} // closed when the mode for one disk has served it on a connected socket

	// Lock order: changes, mu. The graph's and the jobs' locks come after.
	changes sync.Mutex // one change of disks and jobs at a time: add, remove, resize, copy
	mu      sync.Mutex
	disks   map[string]*disk
	over    bool // Stop was called
}

// Check says whether the images that the configuration names can be served, with all that is behind them. It opens
// nothing for writing and takes no locks that would be in the way of a running daemon.
func Check(file *config.File) error {
	var errs []error
	for i := range file.Disks {
		if err := checkDisk(file, &file.Disks[i]); err != nil {
			errs = append(errs, fmt.Errorf("%s:%d: disk %q: image: %w", file.Path, file.ImageLine(file.Disks[i].ID), file.Disks[i].ID, err))
		}
	}
	return errors.Join(errs...)
}

func checkDisk(file *config.File, d *config.Disk) error {
	img, err := image.Open(blk.NewTask(), d.Image, d.Format, image.Options{
		ReadOnly: true, Unlocked: true, Backing: layers(d.Backing),
		Check: file.Daemon.CheckRoots,
	})
	if err != nil {
		return err
	}
	return img.Close()
}

// Start opens all images, listens on all sockets, and goes on with the jobs of an earlier daemon. A file without a
// path is the mode for one disk: no state, no jobs, no control socket.
func Start(file *config.File, o Options) (d *Daemon, err error) {
	d = &Daemon{opts: o, file: file, disks: map[string]*disk{}, end: make(chan struct{})}
	d.starting.Store(true)
	defer d.starting.Store(false)
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Stop())
		}
	}()
	if file.Path == "" {
		_, err := d.startDisk(file.Disks[0], record{Image: file.Disks[0].Image, Format: file.Disks[0].Format})
		return d, err
	}
	if d.store, err = job.OpenStore(file.Daemon.StateDir); err != nil {
		return d, err
	}
	if err := d.lockState(); err != nil {
		return d, err
	}
	if d.jobs, d.unfinished, err = job.NewManager(d.store); err != nil {
		return d, err
	}
	if err := d.finishSnapshots(); err != nil {
		return d, err
	}
	if err := d.startDisks(); err != nil {
		return d, err
	}
	d.resumeJobs(d.unfinished)
	d.unfinished = nil
	d.sweepCopies()
	return d, d.startControl()
}

// lockState keeps a second daemon off the state directory.
func (d *Daemon) lockState() error {
	f, err := os.OpenFile(filepath.Join(d.file.Daemon.StateDir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close() //nolint:errcheck // on the way out
		return fmt.Errorf("state directory: %s is in use by another blkstreamd", d.file.Daemon.StateDir)
	}
	d.lock = f
	return nil
}

func (d *Daemon) startControl() error {
	l, err := vhostuser.Listen(d.file.Daemon.Control)
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	d.rpc, err = control.NewServer(&service{d}, ttrpc.WithServerHandshaker(ttrpc.UnixCredentialsFunc(func(u *unix.Ucred) error {
		if u.Uid != 0 && int(u.Uid) != os.Geteuid() {
			return fmt.Errorf("user %d may not control this daemon", u.Uid)
		}
		return nil
	})))
	if err != nil {
		l.Close() //nolint:errcheck // on the way out
		return fmt.Errorf("control socket: %w", err)
	}
	d.wg.Go(func() {
		if err := d.rpc.Serve(d.ctx(), l); err != nil && !errors.Is(err, ttrpc.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			d.opts.Log.Error("the control socket failed", "err", err)
		}
	})
	return nil
}

// Done is closed when there is nothing left to serve.
func (d *Daemon) Done() <-chan struct{} { return d.end }

// Stop drains the disks, all at the same time, and closes everything. Jobs stay in the journal as they are. A disk whose
// storage hangs is left as it is, and the error says so: for the next daemon that is a crash, which loses nothing.
func (d *Daemon) Stop() error {
	var errs []error
	if d.rpc != nil {
		errs = append(errs, d.rpc.Close())
	}
	if d.jobs != nil {
		go d.jobs.Shutdown() // which takes locks that are held while the state directory is written
	}
	d.mu.Lock()
	d.over = true
	d.mu.Unlock()
	var ended []chan error
	for _, k := range d.list() {
		e := make(chan error, 1)
		go func() { e <- k.stop() }()
		ended = append(ended, e)
	}
	for _, e := range ended {
		errs = append(errs, <-e)
	}
	if err := errors.Join(errs...); errors.Is(err, errLeft) {
		return err // the state directory stays locked against who might start in this process
	}
	d.wg.Wait()
	if d.lock != nil {
		errs = append(errs, d.lock.Close())
	}
	return errors.Join(errs...)
}

func (d *Daemon) list() []*disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	var l []*disk
	for _, k := range d.disks {
		l = append(l, k)
	}
	slices.SortFunc(l, func(a, b *disk) int { return strings.Compare(a.spec.ID, b.spec.ID) })
	return l
}

func (d *Daemon) find(id string) (*disk, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if k := d.disks[id]; k != nil {
		return k, nil
	}
	return nil, control.Errorf(control.ErrNotFound, "there is no disk %q; `blkstream disk list` names them", id)
}
