// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/backup"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

const (
	kindBackup = "backup"

	// defaultCBWTimeout is how long a write of the guest waits for the target, in seconds, before the backup fails. It is
	// less than the minute or two after which guests complain.
	defaultCBWTimeout = 30
	// backupCluster is the least that is copied before a write, in bytes.
	backupCluster = 64 << 10
	// rawGrain is the unit of zeros that stay holes in a raw target, in bytes.
	rawGrain = 4096
)

func (s *service) Backup(_ context.Context, r *control.BackupRequest) (*control.Job, error) {
	j, err := s.d.backup(r)
	if err != nil {
		return nil, kind(err)
	}
	return message(j.Record()), nil
}

// backupRecord checks what the user asks for and fills in the defaults.
func (d *Daemon) backupRecord(req *control.BackupRequest) (*disk, job.Record, error) {
	fail := func(format string, args ...any) (*disk, job.Record, error) {
		return nil, job.Record{}, control.Errorf(control.ErrInvalid, format, args...)
	}
	k, err := d.find(req.Disk)
	if err != nil {
		return nil, job.Record{}, err
	}
	r := job.Record{ID: req.Id, Kind: kindBackup, Disk: req.Disk, Source: k.record().Image, Format: req.Format}
	r.Options = job.Options{
		Existing: req.Existing, Base: req.Base, Bitmap: req.Bitmap, Full: req.Full, Speed: req.Speed, Granularity: backupCluster,
		OnSourceError: req.OnSourceError, OnTargetError: req.OnTargetError, OnCBWError: req.OnCbwError, CBWTimeout: req.CbwTimeout,
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	// Not the disk's: the backups that come after this one have it behind them, and only qcow2 can.
	def(&r.Format, image.Qcow2)
	def(&r.OnSourceError, job.OnErrorReport)
	def(&r.OnTargetError, job.OnErrorEnospc)
	def(&r.OnCBWError, job.OnCBWErrorBreak)
	if r.OnCBWError == job.OnCBWErrorBreak && r.CBWTimeout == 0 {
		r.CBWTimeout = defaultCBWTimeout
	}
	for _, p := range []string{r.OnSourceError, r.OnTargetError} {
		if p != job.OnErrorReport && p != job.OnErrorStop && p != job.OnErrorEnospc {
			return fail("error policy %q: it is report, stop or enospc", p)
		}
	}
	switch {
	case req.Id != "" && !job.ValidID(req.Id):
		return fail("job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", req.Id)
	case r.Format != image.Raw && r.Format != image.Qcow2:
		return nil, r, control.Errorf(control.ErrUnsupported, "format %q is not supported; raw and qcow2 are", r.Format)
	case r.OnCBWError != job.OnCBWErrorBreak && r.OnCBWError != job.OnCBWErrorHold:
		return fail("on_cbw_error %q: it is break or hold", r.OnCBWError)
	case r.Speed < 0 || r.CBWTimeout < 0:
		return fail("speed %d, cbw_timeout %d: they cannot be negative", r.Speed, r.CBWTimeout)
	case r.CBWTimeout > 0 && r.OnCBWError == job.OnCBWErrorHold:
		return fail("with on_cbw_error hold a write waits as long as it takes: there is no timeout")
	case (req.Existing || r.Format == image.Raw) && (req.Base != "" || req.ClusterSize != 0):
		return fail("a base and a cluster size are for a new qcow2 target")
	case req.Base == "" && req.BaseFormat != "":
		return fail("a format of a base, and no base")
	case req.Full && req.Bitmap == "":
		return fail("full goes with a bitmap; without one every backup is full")
	case req.Bitmap != "" && !req.Full && !req.Existing && r.Format == image.Raw:
		return fail("a new raw target cannot hold what has changed only: it is qcow2, over the backup before with base, " +
			"or that backup itself, with existing")
	case req.Base != "" && (req.Bitmap == "" || req.Full):
		return fail("a base goes with a bitmap that says what has changed since; without one all of the disk is copied")
	case !filepath.IsAbs(req.Target):
		return fail("target %q: give an absolute path", req.Target)
	case req.Base != "" && !filepath.IsAbs(req.Base):
		return fail("base %q: give an absolute path", req.Base)
	}
	r.Target = filepath.Clean(req.Target)
	if err := config.CheckRoots(r.Target, d.file.Daemon.ImageRoots); err != nil {
		return fail("%w", err)
	}
	if r.Bitmap != "" {
		if _, err := k.bitmaps.recording(r.Bitmap); err != nil {
			return nil, r, err
		}
	}
	return k, r, errors.Join(d.unused(r.Target), d.behindNone(r.Target))
}

// behindNone refuses a target that a disk reads from.
func (d *Daemon) behindNone(target string) error {
	for _, k := range d.list() {
		for _, m := range k.image().Chain {
			if overlaps(m.Path, target) || m.DataFile != "" && overlaps(m.DataFile, target) {
				return control.Errorf(control.ErrPrecondition, "disk %q reads from %s", k.spec.ID, target)
			}
		}
	}
	return nil
}

// backup starts a backup.
func (d *Daemon) backup(req *control.BackupRequest) (*job.Job, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	k, r, err := d.backupRecord(req)
	if err != nil {
		return nil, err
	}
	if err := k.free(); err != nil {
		return nil, err
	}
	if !r.Existing {
		if err := d.createBackup(k, req, r); err != nil {
			return nil, err
		}
	}
	j, err := d.startBackup(k, r)
	if err != nil && !r.Existing {
		err = errors.Join(err, os.Remove(r.Target))
	}
	return j, err
}

// createBackup makes the target.
func (d *Daemon) createBackup(k *disk, req *control.BackupRequest, r job.Record) error {
	o := image.CreateOptions{Format: r.Format, Check: d.checkRoots, CreateOptions: qcow2.CreateOptions{
		Size: k.image().Root.Info().Size, ClusterSize: req.ClusterSize, BackingFile: r.Base,
	}}
	if r.Base != "" {
		if o.BackingFormat = req.BaseFormat; o.BackingFormat == "" {
			o.BackingFormat = image.Qcow2
		}
	}
	return create(r.Target, o)
}

// startBackup opens the target and starts the job.
func (d *Daemon) startBackup(k *disk, r job.Record) (*job.Job, error) {
	o := d.imageOptions(&k.spec, k.graph)
	o.ReadOnly, o.Barrier = false, nil // no guest has places in the target
	target, err := image.Open(blk.NewTask(), r.Target, r.Format, o)
	if err != nil {
		return nil, imageError(err)
	}
	d.warn(target)
	if have, need := target.Root.Info().Size, k.image().Root.Info().Size; have < need {
		err := control.Errorf(control.ErrInvalid, "%s has %d bytes, disk %q has %d: make it larger, with `blkstream image resize`",
			r.Target, have, k.spec.ID, need)
		return nil, errors.Join(err, target.Close())
	}
	for _, m := range target.Chain[1:] {
		if err := d.unused(m.Path); err != nil { // it would change behind the target
			return nil, errors.Join(err, target.Close())
		}
	}
	incremental := r.Bitmap != "" && !r.Full
	s := backup.Setup{
		Graph: k.graph, Below: withoutCopyOnRead,
		Target: target.Root, Cluster: backupCluster, Grain: rawGrain, Close: target.Close,
		Blank: !r.Existing && !incremental, Explicit: !r.Existing && incremental && r.Base == "",
	}
	if h := target.Chain[0].Header; h != nil {
		s.Cluster, s.Grain = max(s.Cluster, h.ClusterSize()), h.ClusterSize()
	}
	if r.Bitmap != "" {
		s.Freeze = func() (*blk.Bitmap, error) { return k.bitmaps.freeze(r.Bitmap) }
		s.Thaw = func(done bool) error { return k.bitmaps.thaw(r.Bitmap, done) }
	}
	if err := k.hold(true); err != nil {
		return nil, errors.Join(err, target.Close())
	}
	begun := make(chan struct{})
	var ended error
	s.Begun = func() { close(begun) }
	log := d.opts.Log.With("disk", k.spec.ID, "target", r.Target)
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error {
		defer k.hold(false) //nolint:errcheck // what is locked too long harms nobody
		err := backup.Run(ctx, j, s)
		if err != nil {
			log.Warn("backup ended early, the target is incomplete", "job", j.Record().ID, "reason", err)
		} else {
			log.Info("backup completed", "job", j.Record().ID)
		}
		ended = err
		return err
	})
	if err != nil {
		return nil, errors.Join(err, target.Close(), k.hold(false))
	}
	// Whoever asked for the backup may rely on it that the instant is past when there is an answer.
	select {
	case <-begun:
	case <-j.Done():
		select {
		case <-begun:
		default:
			return nil, errors.Join(ended, d.jobs.Dismiss(j.Record().ID)) // as if it had not been started
		}
	}
	log.Info("backup started", "job", j.Record().ID)
	return j, nil
}

// resumeBackup deals with a backup that an earlier daemon did not finish. What the disk held at the instant died with
// that daemon, unless all of it is in the target.
func (d *Daemon) resumeBackup(r job.Record) error {
	if !r.TargetConsistent {
		return errors.New("the instant that it was to be of is past")
	}
	r.State, r.Error = job.StateCompleted, ""
	return d.jobs.End(r)
}
