// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/copy/stream"
)

const (
	kindStream = "stream"

	// stillNeeded is what a user should know of a stream that did not come to its end.
	stillNeeded = "the images behind the disk's are still needed; what was copied of them is kept"
)

// streamRecord checks what the user asks for and fills in the defaults.
func (d *Daemon) streamRecord(req *control.StreamRequest) (*disk, job.Record, error) {
	fail := func(kind error, format string, args ...any) (*disk, job.Record, error) {
		return nil, job.Record{}, control.Errorf(kind, format, args...)
	}
	k, err := d.find(req.Disk)
	if err != nil {
		return nil, job.Record{}, err
	}
	now, img := k.record(), k.image()
	first := img.Chain[0]
	r := job.Record{ID: req.Id, Kind: kindStream, Disk: req.Disk, Target: now.Image, Format: now.Format}
	if first.AddCow != nil {
		r.Target = first.DataFile
	}
	r.Options = job.Options{Base: req.Base, Speed: req.Speed, OnSourceError: req.OnSourceError, OnTargetError: req.OnTargetError}
	if r.OnSourceError == "" {
		r.OnSourceError = job.OnErrorReport
	}
	if r.OnTargetError == "" {
		r.OnTargetError = job.OnErrorEnospc
	}
	switch {
	case req.Id != "" && !job.ValidID(req.Id):
		return fail(control.ErrInvalid, "job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", req.Id)
	case req.Speed < 0:
		return fail(control.ErrInvalid, "speed %d: it cannot be negative", req.Speed)
	case req.Base != "" && !filepath.IsAbs(req.Base):
		return fail(control.ErrInvalid, "base %q: give an absolute path", req.Base)
	case k.spec.ReadOnly:
		return fail(control.ErrPrecondition, "disk %q is read-only: nothing can be copied into its image", req.Disk)
	case first.AddCow != nil && req.Base != "":
		return fail(control.ErrInvalid, "the disk will be on %s alone, behind which no base can stay", first.DataFile)
	case len(img.Chain) < 2 && (first.AddCow == nil || !first.AddCow.AllAllocated()):
		return fail(control.ErrPrecondition, "%s has no backing image: there is nothing to stream from", now.Image)
	case len(k.backing()) > 0:
		// What stays behind the image would not fit the list any more, and the next daemon could not open it.
		return fail(control.ErrPrecondition, "the configuration of disk %q names the images behind %s: let that name them itself, "+
			"with `blkstream image rebase -f qcow2 -u`, and take them out of the configuration", req.Disk, now.Image)
	case first.Header != nil && first.Header.SnapshotCount > 0:
		return fail(control.ErrPrecondition, "%s has internal snapshots, which need the images behind it", now.Image)
	}
	for _, p := range []string{r.OnSourceError, r.OnTargetError} {
		if p != job.OnErrorReport && p != job.OnErrorStop && p != job.OnErrorEnospc {
			return fail(control.ErrInvalid, "error policy %q: it is report, stop or enospc", p)
		}
	}
	if req.Base != "" {
		base, err := findBase(img, req.Base)
		if err != nil {
			return nil, r, err
		}
		if base == 1 {
			return fail(control.ErrPrecondition, "%s is right behind %s: there is nothing to stream from", req.Base, now.Image)
		}
	}
	return k, r, nil
}

// stream starts a stream.
func (d *Daemon) stream(req *control.StreamRequest) (*job.Job, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	k, err := d.find(req.Disk)
	if err != nil {
		return nil, err
	}
	if err := k.free(); err != nil {
		return nil, err
	}
	k, r, err := d.streamRecord(req)
	if err != nil {
		return nil, err
	}
	return d.startStream(k, r)
}

// startStream starts the job on a chain with something to leave.
func (d *Daemon) startStream(k *disk, r job.Record) (*job.Job, error) {
	if c := k.image().Chain; r.Kind == kindStream && len(c) > 1 {
		r.Source = c[1].Path
	}
	s, err := streamSetup(k, r.Base)
	if err != nil {
		return nil, err
	}
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error { return d.runStream(ctx, k, j, s) })
	if err != nil {
		return nil, err
	}
	d.opts.Log.Info("stream started", "job", j.Record().ID, "disk", k.spec.ID, "base", r.Base)
	return j, nil
}

func (d *Daemon) runStream(ctx context.Context, k *disk, j *job.Job, s stream.Setup) error {
	r := j.Record()
	err := stream.Run(ctx, j, s)
	if err != nil {
		d.opts.Log.Warn("stream ended early", "job", r.ID, "disk", r.Disk, "reason", err)
		return err
	}
	j.Update(func(r *job.Record) { r.Message = k.streamed(r) })
	d.opts.Log.Info("stream completed", "job", r.ID, "disk", r.Disk)
	return nil
}

// streamSetup is for the images that the disk is on now.
func streamSetup(k *disk, baseName string) (stream.Setup, error) {
	img := k.image()
	first, base := img.Chain[0], len(img.Chain)
	s := stream.Setup{Graph: k.graph, Cluster: first.ClusterSize(), Failed: k.corFailed}
	if first.AddCow != nil {
		s.Base = uint16(base) // the image file may hold anything where zeros show
	}
	if baseName != "" {
		var err error
		if base, err = findBase(img, baseName); err != nil {
			return s, err
		}
		s.Base, s.Keep = uint16(base), true
	}
	var gone []*image.Member
	s.Drop = func(t *blk.Task) (blk.Node, error) {
		next, dropped, err := img.Drop(t, base)
		if err != nil {
			return nil, err
		}
		if first.AddCow != nil {
			if err := k.moveTo(first.DataFile, image.Raw); err != nil {
				return nil, err
			}
		}
		gone = dropped
		k.mu.Lock()
		defer k.mu.Unlock()
		k.img = next
		return next.Root, nil
	}
	s.Close = func() error {
		err := image.CloseMembers(gone)
		if first.AddCow != nil {
			err = errors.Join(err, k.removeBitmap(first.Path, first.DataFile))
		}
		return err
	}
	return s, nil
}

// checkMethodStream refuses what a copy that switches at once cannot do.
func checkMethodStream(k *disk, req *control.CopyRequest, r job.Record) error {
	switch img := k.image(); {
	case r.Format != image.Qcow2 && r.Format != image.AddCow:
		return control.Errorf(control.ErrInvalid, "method stream: the target is qcow2 or add-cow, which can have the disk's image behind it")
	case r.Format == image.AddCow && r.Base != "":
		return control.Errorf(control.ErrInvalid, "method stream: the disk will be on the target alone, which is raw: no base can stay behind it")
	case req.Existing && r.Format != image.AddCow || req.ClusterSize != 0 || req.LazyRefcounts || req.Compression != "" || req.Preallocation != "":
		return control.Errorf(control.ErrInvalid, "method stream: the target is made by the job, with clusters of 64K")
	case req.Verify:
		return control.Errorf(control.ErrInvalid, "method stream: there are never two copies to compare")
	case k.spec.Lock == lockRunning:
		return control.Errorf(control.ErrPrecondition, "disk %q has lock = %q, which goes with raw images only", req.Disk, lockRunning)
	case len(k.backing()) > 0:
		return control.Errorf(control.ErrPrecondition, "the configuration of disk %q names the images behind %s", req.Disk, img.Chain[0].Path)
	case r.Base != "":
		_, err := findBase(img, r.Base)
		return err
	}
	return nil
}

// copyByStream puts the target over the disk's image and streams that into it. The job is recorded first: whatever
// happens then, the next daemon finds the disk on the target, and goes on, or on the source.
func (d *Daemon) copyByStream(k *disk, r job.Record) (*job.Job, error) {
	if fi, err := os.Stat(r.Target); r.Format == image.AddCow && !r.Existing && err == nil && fi.Mode().IsRegular() {
		return nil, control.Errorf(control.ErrExists, "%s exists; use --existing to overwrite what it holds", r.Target)
	}
	switched := make(chan error, 1)
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error {
		s, err := d.switchFirst(ctx, k, j)
		switched <- err
		if err != nil {
			return err
		}
		return d.runStream(ctx, k, j, s)
	})
	if err != nil {
		return nil, err
	}
	if err := <-switched; err != nil {
		<-j.Done()
		return nil, errors.Join(err, d.jobs.Dismiss(j.Record().ID)) // as if it had not been started
	}
	return j, nil
}

func (d *Daemon) switchFirst(ctx context.Context, k *disk, j *job.Job) (stream.Setup, error) {
	r := j.Record()
	j.Update(func(r *job.Record) { r.Stage = job.StageSwitch })
	c := newCover(k, r.Target, r.Format)
	if r.Format == image.AddCow {
		bitmap, err := d.bitmapPath(r)
		if err != nil {
			return stream.Setup{}, err
		}
		c = newCover(k, bitmap, r.Format)
		c.imageFile = r.Target
	}
	size := c.old.Root.Info().Size
	held, err := d.cover(ctx, []*cover{c}, false)
	if err != nil {
		return stream.Setup{}, err
	}
	if now := c.now.Root.Info().Size; now != size { // an add-cow image is as large as its image file
		k.dev.SetSize(now)
		k.server.ConfigChanged()
	}
	j.Update(func(r *job.Record) {
		r.Message = fmt.Sprintf("the guest is on the target; it was held for %.2f ms", float64(held.Microseconds())/1000)
	})
	d.opts.Log.Info("copy by stream: the guest is on the target", "job", r.ID, "disk", r.Disk, "target", r.Target)
	return streamSetup(k, r.Base)
}

// streams reports whether the job makes the image that the disk is on independent.
func streams(r job.Record) bool { return r.Kind == kindStream || r.Method == methodStream }

// streamed says what has been reached, and what to do.
func (k *disk) streamed(r *job.Record) string {
	s := fmt.Sprintf("%s needs no other image any more", r.Target)
	if r.Base != "" {
		s = fmt.Sprintf("%s needs %s and no image in front of it any more", r.Target, r.Base)
	}
	if w := k.warning(); w != "" {
		s += "; " + w
	}
	return s
}

// notStreamed says what a job of an earlier daemon leaves that cannot go on.
func (d *Daemon) notStreamed(r job.Record) string {
	if k, err := d.find(r.Disk); r.Method == methodStream && err == nil && !k.isOn(r.Target) {
		if r.Format == image.AddCow {
			return fmt.Sprintf("the guest is not on %s; remove %s to start again, if it is there", r.Target, d.bitmapName(r))
		}
		return fmt.Sprintf("the guest is not on %s; remove that to start again", r.Target)
	}
	return stillNeeded
}

// resumeStream goes on with a stream that an earlier daemon did not finish. The image itself says whether what is to be
// left has been left, and holds what has been copied.
func (d *Daemon) resumeStream(k *disk, r job.Record) error {
	img, now := k.image(), k.record()
	if !k.isOn(r.Target) {
		return fmt.Errorf("disk %q is on %s", r.Disk, now.Image) // a copy that had not switched yet, or switched by hand since
	}
	done := len(img.Chain) == 1 && img.Chain[0].AddCow == nil
	if done && r.Format == image.AddCow && len(now.Moved) > 0 {
		if err := k.removeBitmap(now.Moved[len(now.Moved)-1], r.Target); err != nil {
			return err
		}
	}
	if r.Base != "" {
		base, err := findBase(img, r.Base)
		if err != nil {
			return err
		}
		done = base == 1
	}
	if done {
		r.State, r.Error, r.Message = job.StateCompleted, "", k.streamed(&r)
		r.BytesDone = r.BytesTotal
		return d.jobs.End(r)
	}
	if k.spec.ReadOnly {
		return errors.New("the disk is read-only now")
	}
	r.Stage, r.Error, r.BytesDone, r.BytesTotal = "", "", 0, 0
	r.Message = "started again after a restart of the daemon; what was copied is skipped"
	_, err := d.startStream(k, r)
	return err
}

func (s *service) Stream(_ context.Context, r *control.StreamRequest) (*control.Job, error) {
	j, err := s.d.stream(r)
	if err != nil {
		return nil, kind(err)
	}
	return message(j.Record()), nil
}
