// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

const kindCopy = "copy"

// copyRecord checks what the user asks for and fills in the defaults.
func (d *Daemon) copyRecord(req *control.CopyRequest) (*disk, job.Record, error) {
	fail := func(format string, args ...any) (*disk, job.Record, error) {
		return nil, job.Record{}, control.Errorf(control.ErrInvalid, format, args...)
	}
	k, err := d.find(req.Disk)
	if err != nil {
		return nil, job.Record{}, err
	}
	now := k.record()
	r := job.Record{ID: req.Id, Kind: kindCopy, Disk: req.Disk, Source: now.Image, Format: req.Format}
	r.Options = job.Options{
		Method: req.Method, Existing: req.Existing, SwitchMode: req.SwitchMode, Verify: req.Verify, Speed: req.Speed,
		Granularity: req.Granularity, OnSourceError: req.OnSourceError, OnTargetError: req.OnTargetError,
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&r.Format, now.Format)
	def(&r.Method, "mirror")
	def(&r.SwitchMode, "manual")
	def(&r.OnSourceError, job.OnErrorReport)
	def(&r.OnTargetError, job.OnErrorEnospc)
	if r.Granularity == 0 {
		r.Granularity = blockcopy.DefaultGranularity
	}
	if req.Id != "" && !job.ValidID(req.Id) {
		return fail("job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", req.Id)
	}
	if r.Method != "mirror" || req.Base != "" {
		return nil, job.Record{}, control.Errorf(control.ErrUnsupported, "only --method mirror without --base is supported yet")
	}
	if r.Format != "raw" {
		return nil, job.Record{}, control.Errorf(control.ErrUnsupported, "format %q is not supported yet; raw is", r.Format)
	}
	if r.SwitchMode != "manual" && r.SwitchMode != "auto" {
		return fail("switch mode %q: it is manual or auto", r.SwitchMode)
	}
	for _, p := range []string{r.OnSourceError, r.OnTargetError} {
		if p != job.OnErrorReport && p != job.OnErrorStop && p != job.OnErrorEnospc {
			return fail("error policy %q: it is report, stop or enospc", p)
		}
	}
	if g := r.Granularity; g < 4096 || g > 16<<20 || bits.OnesCount64(uint64(g)) != 1 {
		return fail("granularity %d: it is a power of two from 4K to 16M", g)
	}
	if r.Speed < 0 {
		return fail("speed %d: it cannot be negative", r.Speed)
	}
	if k.spec.ReadOnly {
		return nil, r, control.Errorf(control.ErrPrecondition, "disk %q is read-only: copy its image with any tool", req.Disk)
	}
	if !filepath.IsAbs(req.Target) {
		return fail("target %q: give an absolute path", req.Target)
	}
	r.Target = filepath.Clean(req.Target)
	if err := config.CheckRoots(r.Target, d.file.Daemon.ImageRoots); err != nil {
		return fail("%w", err)
	}
	return k, r, d.unused(r.Target)
}

// unused refuses a target that is a disk's image or another job's target.
func (d *Daemon) unused(target string) error {
	for _, k := range d.list() {
		if sameFile(k.record().Image, target) {
			return control.Errorf(control.ErrPrecondition, "%s is the image of disk %q", target, k.spec.ID)
		}
	}
	for _, j := range d.jobs.List() {
		if r := j.Record(); !job.Ended(r.State) && sameFile(r.Target, target) {
			return control.Errorf(control.ErrPrecondition, "job %s writes to %s already", r.ID, target)
		}
	}
	return nil
}

// sameFile reports whether two paths name one file, by whatever links.
func sameFile(a, b string) bool {
	if a == b {
		return true
	}
	sa, errA := os.Stat(a)
	sb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(sa, sb)
}

// copy starts a block copy.
func (d *Daemon) copy(req *control.CopyRequest) (*job.Job, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	k, r, err := d.copyRecord(req)
	if err != nil {
		return nil, err
	}
	if j := d.jobs.OnDisk(k.spec.ID); j != nil {
		return nil, control.Errorf(control.ErrPrecondition, "job %s works on disk %q already: wait for its end or cancel it",
			j.Record().ID, k.spec.ID)
	}
	if !r.Existing {
		var size int64
		k.graph.View(func(n blk.Node) { size = n.Info().Size })
		if err := file.Create(r.Target, size); err != nil {
			if errors.Is(err, os.ErrExist) {
				return nil, control.Errorf(control.ErrExists, "%s exists; use --existing to overwrite what it holds", r.Target)
			}
			return nil, err
		}
	}
	j, err := d.startCopy(k, r, !r.Existing)
	if err != nil && !r.Existing {
		err = errors.Join(err, os.Remove(r.Target))
	}
	return j, err
}

// startCopy opens the target and starts the job. blank: the target is new.
func (d *Daemon) startCopy(k *disk, r job.Record, blank bool) (*job.Job, error) {
	target, err := d.openImage(r.Target, r.Format, &k.spec, false)
	if err != nil {
		return nil, err
	}
	var size int64
	k.graph.View(func(n blk.Node) { size = n.Info().Size })
	if t := target.Info().Size; t < size {
		return nil, errors.Join(control.Errorf(control.ErrInvalid, "%s has %d bytes, disk %q has %d: make the target larger",
			r.Target, t, k.spec.ID, size), target.Close())
	}
	if err := k.hold(true); err != nil {
		return nil, errors.Join(err, target.Close())
	}
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error {
		defer k.hold(false) //nolint:errcheck // what is locked too long harms nobody
		err := blockcopy.Run(ctx, j, blockcopy.Setup{
			Graph:  k.graph,
			Target: target,
			Blank:  blank,
			Commit: func() error { return k.moveTo(r.Target, r.Format) },
			Hint:   k.hint(r.Target, r.Format),
		})
		if err == nil && target.Info().Size != size {
			k.dev.SetSize(target.Info().Size)
			k.server.ConfigChanged()
		}
		d.logEnd(j, err)
		return err
	})
	if err != nil {
		return nil, errors.Join(err, target.Close(), k.hold(false))
	}
	d.opts.Log.Info("copy started", "job", j.Record().ID, "disk", k.spec.ID, "target", r.Target)
	return j, nil
}

func (d *Daemon) logEnd(j *job.Job, err error) {
	r := j.Record()
	if err != nil {
		d.opts.Log.Warn("copy ended, the guest stays on the source", "job", r.ID, "disk", r.Disk, "source", r.Source, "reason", err)
		return
	}
	d.opts.Log.Info("copy completed, the guest is on the target", "job", r.ID, "disk", r.Disk, "target", r.Target)
}

// resumeJobs deals with the jobs that an earlier daemon did not finish. Which image a disk is on has been decided
// by its record: a copy whose switch was recorded is complete. Any other one is started again from the beginning:
// without its dirty bitmap nothing on the target can be relied on.
func (d *Daemon) resumeJobs(open []job.Record) {
	for _, r := range open {
		err := d.resumeJob(r)
		if err == nil {
			continue
		}
		r.State, r.Error, r.TargetConsistent = job.StateFailed, fmt.Sprintf("the daemon was restarted, and the job cannot go on: %v", err), false
		r.Message = fmt.Sprintf("%s is incomplete; the guest stays on %s", r.Target, r.Source)
		if err := d.jobs.End(r); err != nil {
			d.opts.Log.Error("the journal cannot be written", "err", err)
		}
		d.opts.Log.Warn("a job of the last run has failed", "job", r.ID, "err", r.Error)
	}
}

func (d *Daemon) resumeJob(r job.Record) error {
	k, err := d.find(r.Disk)
	if err != nil {
		return err
	}
	if k.record().Image == r.Target {
		r.State, r.Error, r.Message = job.StateCompleted, "", k.hint(r.Target, r.Format)
		return d.jobs.End(r)
	}
	if err := config.CheckRoots(r.Target, d.file.Daemon.ImageRoots); err != nil {
		return err
	}
	paused := r.State == job.StatePaused
	r.Source, r.TargetConsistent, r.Stage, r.Error = k.record().Image, false, "", ""
	r.Message = "started again from the beginning after a restart of the daemon"
	r.BytesDone, r.BytesTotal, r.VerifiedBytes = 0, 0, 0
	j, err := d.startCopy(k, r, false)
	if err == nil && paused {
		err = j.Pause()
	}
	return err
}
