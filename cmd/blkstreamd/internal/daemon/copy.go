// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/backup"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

const (
	kindCopy = "copy"

	methodMirror = "mirror"
	methodStream = "stream"
)

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
		Method: req.Method, Existing: req.Existing, Base: req.Base, SwitchMode: req.SwitchMode, Verify: req.Verify, Speed: req.Speed,
		Granularity: req.Granularity, OnSourceError: req.OnSourceError, OnTargetError: req.OnTargetError,
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&r.Method, methodMirror)
	if r.Method == methodStream {
		def(&r.Format, image.Qcow2)
		r.SwitchMode = "auto" // at once, and nothing is left for a command
	}
	def(&r.Format, now.Format)
	def(&r.SwitchMode, "manual")
	def(&r.OnSourceError, job.OnErrorReport)
	def(&r.OnTargetError, job.OnErrorEnospc)
	if r.Granularity == 0 {
		r.Granularity = blockcopy.DefaultGranularity
	}
	if req.Id != "" && !job.ValidID(req.Id) {
		return fail("job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", req.Id)
	}
	if r.Method != methodMirror && r.Method != methodStream {
		return fail("method %q: it is mirror or stream", r.Method)
	}
	if r.Method == methodStream {
		if err := checkMethodStream(k, req, r); err != nil {
			return nil, r, err
		}
	}
	switch {
	case r.Format == image.Raw || r.Format == image.Qcow2:
	case r.Format != image.AddCow:
		return nil, job.Record{}, control.Errorf(control.ErrUnsupported, "format %q: it is raw, qcow2 or add-cow", r.Format)
	case r.Method != methodStream:
		return fail("format add-cow goes with method stream; for method mirror the target is raw or qcow2")
	}
	if k.spec.Lock == lockRunning && r.Format != image.Raw {
		return nil, r, control.Errorf(control.ErrPrecondition, "disk %q has lock = %q, which is for raw images", req.Disk, lockRunning)
	}
	if why := unfit(req, r); why != "" {
		return fail("%s", why)
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
	if err := d.unused(r.Target); err != nil || !r.Existing {
		return k, r, err
	}
	return k, r, d.behindNone(r.Target)
}

// unfit says what does not go with the rest of what the user asks for, and what does.
func unfit(req *control.CopyRequest, r job.Record) string {
	var chosen []string
	for _, p := range []struct {
		set  bool
		name string
	}{
		{req.ClusterSize != 0, "a cluster size"},
		{req.LazyRefcounts, "lazy reference counts"},
		{req.Compression != "", "compression"},
		{r.Base != "", "a base"},
	} {
		if p.set {
			chosen = append(chosen, p.name)
		}
	}
	given := req.Preallocation
	if given == "off" {
		given = ""
	}
	made := req.ClusterSize != 0 || req.LazyRefcounts || req.Compression != "" || req.Preallocation != ""
	switch {
	case r.Base != "" && !filepath.IsAbs(r.Base):
		return fmt.Sprintf("base %q: give an absolute path", r.Base)
	case req.Existing && made:
		return "the properties of an existing target cannot be chosen: leave them out, or let the copy make another target"
	case r.Format == image.Raw && len(chosen) > 0:
		return fmt.Sprintf("a raw target cannot have %s: take format qcow2, or leave that out", strings.Join(chosen, ", "))
	case r.Format == image.Raw && given == "metadata":
		return "a raw target has no metadata to preallocate: take preallocation falloc or full, or format qcow2"
	case req.Compression != "" && given != "":
		return fmt.Sprintf("preallocation %s of what is to be compressed: take one of the two", given)
	case r.Base != "" && given != "":
		return fmt.Sprintf("preallocation %s would hide the base: leave out one of the two", given)
	}
	return ""
}

// unused refuses a target that is a disk's image or another job's target.
func (d *Daemon) unused(target string) error {
	for _, k := range d.list() {
		if overlaps(k.record().Image, target) || k.isOn(target) {
			return control.Errorf(control.ErrPrecondition, "%s is the image of disk %q", target, k.spec.ID)
		}
	}
	for _, j := range d.jobs.List() {
		if r := j.Record(); !job.Ended(r.State) && overlaps(r.Target, target) {
			return control.Errorf(control.ErrPrecondition, "job %s writes to %s already", r.ID, target)
		}
	}
	return nil
}

// copy starts a block copy.
func (d *Daemon) copy(req *control.CopyRequest) (*job.Job, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	k, r, err := d.copyRecord(req)
	if err != nil {
		return nil, err
	}
	if err := k.free(); err != nil {
		return nil, err
	}
	if r.Method == methodStream {
		return d.copyByStream(k, r)
	}
	if !r.Existing {
		if err := d.createTarget(k, req, r); err != nil {
			return nil, err
		}
	}
	j, err := d.startCopy(k, r, !r.Existing, req.Compression != "")
	if err != nil && !r.Existing {
		err = errors.Join(err, os.Remove(r.Target))
	}
	return j, err
}

// createTarget makes the image that the disk is copied to.
func (d *Daemon) createTarget(k *disk, req *control.CopyRequest, r job.Record) error {
	img := k.image()
	o := image.CreateOptions{Format: r.Format, CreateOptions: qcow2.CreateOptions{
		Size: img.Root.Info().Size, ClusterSize: req.ClusterSize, LazyRefcounts: req.LazyRefcounts,
		Compression: req.Compression, Preallocation: req.Preallocation,
	}}
	if r.Base != "" {
		i, err := findBase(img, r.Base)
		if err != nil {
			return err
		}
		o.BackingFile, o.BackingFormat = img.Chain[i].Path, img.Chain[i].Format
	}
	return create(r.Target, o)
}

// create makes a job's target.
func create(target string, o image.CreateOptions) error {
	err := image.Create(context.Background(), target, o)
	switch {
	case errors.Is(err, os.ErrExist):
		return control.Errorf(control.ErrExists, "%s exists; use --existing to overwrite what it holds", target)
	case errors.Is(err, blk.ErrInvalid):
		return control.Errorf(control.ErrInvalid, "%w", err)
	}
	return imageError(err)
}

// findBase is the place of the shared base in the chain of images, at least 1.
func findBase(img *image.Image, base string) (int, error) {
	var names []string
	for i, m := range img.Chain {
		switch {
		case i == 0:
		case sameFile(m.Path, base):
			return i, nil
		default:
			names = append(names, m.Path)
		}
	}
	if len(names) == 0 {
		return 0, control.Errorf(control.ErrInvalid, "base %s: %s has no backing image", base, img.Chain[0].Path)
	}
	return 0, control.Errorf(control.ErrInvalid, "base %s: it is not behind %s; what is: %s", base, img.Chain[0].Path, strings.Join(names, ", "))
}

// startCopy opens the target and starts the job. blank: the target is new; pack: it is compressed in the bulk stage.
func (d *Daemon) startCopy(k *disk, r job.Record, blank, pack bool) (*job.Job, error) {
	source := k.image()
	target, err := d.openImage(r.Target, r.Format, &k.spec, k.graph, nil, false)
	if err != nil {
		return nil, err
	}
	s := blockcopy.Setup{
		Graph:  k.graph,
		Target: target.Root,
		Blank:  blank,
		Commit: func() error { return k.moveTo(r.Target, r.Format) },
		Settle: k.settle,
		Hint:   k.hint(r.Target, r.Format),
	}
	if err := checkTarget(k, source, target, r, &s); err != nil {
		return nil, errors.Join(err, target.Close())
	}
	if q, ok := target.Root.(*qcow2.Node); ok && pack {
		s.Pack, s.PackUnit = q.WriteCompressed, target.Chain[0].Header.ClusterSize()
	}
	if left := notCopied(source, int(s.Base)); left != "" {
		r.Message, s.Left = strings.TrimPrefix(r.Message+"; "+left, "; "), left
		s.Hint += "; " + left
		d.opts.Log.Warn(left, "disk", k.spec.ID)
	}
	s.Release = func(n blk.Node) error {
		if n == target.Root {
			return target.Close()
		}
		k.mu.Lock()
		k.img = target
		k.mu.Unlock()
		return source.Close()
	}
	if err := k.hold(true); err != nil {
		return nil, errors.Join(err, target.Close())
	}
	size := source.Root.Info().Size
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error {
		defer k.hold(false) //nolint:errcheck // what is locked too long harms nobody
		begin := func() (*copyState, error) { return d.newCopyState(j.Record(), source, target, blank, pack) }
		err := k.outlive(ctx, j, begin, func(state *mirror.State) error {
			s.State = state
			return k.pauseCopyOnRead(ctx, func() error { return blockcopy.Run(ctx, j, s) })
		})
		if now := target.Root.Info().Size; err == nil && now != size {
			k.dev.SetSize(now)
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

// checkTarget refuses a target that does not fit, and finds the shared base.
func checkTarget(k *disk, source, target *image.Image, r job.Record, s *blockcopy.Setup) error {
	if have, need := target.Root.Info().Size, source.Root.Info().Size; have < need {
		return control.Errorf(control.ErrInvalid, "%s has %d bytes, disk %q has %d: make the target larger", r.Target, have, k.spec.ID, need)
	}
	if have := target.Root.Info().Size; have%int64(k.spec.BlockSize) != 0 {
		return control.Errorf(control.ErrInvalid, "%s has %d bytes, which is not a multiple of the disk's block_size %d", r.Target, have, k.spec.BlockSize)
	}
	for _, m := range target.Chain {
		if overlaps(m.Path, source.Chain[0].Path) {
			return control.Errorf(control.ErrInvalid, "%s lies over %s, the image of disk %q, which would change under it", r.Target, m.Path, k.spec.ID)
		}
	}
	if r.Base == "" {
		return nil
	}
	base, err := findBase(source, r.Base)
	if err != nil {
		return err
	}
	if len(target.Chain) < 2 || !sameFile(target.Chain[1].Path, source.Chain[base].Path) {
		return control.Errorf(control.ErrInvalid, "%s does not lie over the base %s: let the copy make the target, or make it with "+
			"`blkstream image create -b %[2]s -F %s`", r.Target, r.Base, source.Chain[base].Format)
	}
	if err := sameBehind(source, target, base); err != nil {
		return err
	}
	s.Base = uint16(base)
	return nil
}

// sameBehind wants the target to have the images behind the base that the source has there, which the configuration may
// name in place of what the base says.
func sameBehind(source, target *image.Image, base int) error {
	names := func(ms []*image.Member) (all []string) {
		for _, m := range ms {
			all = append(all, m.Path)
		}
		return all
	}
	behind, would := source.Chain[base:], target.Chain[1:]
	if !slices.EqualFunc(behind, would, func(a, b *image.Member) bool { return a.Format == b.Format && sameFile(a.Path, b.Path) }) {
		return control.Errorf(control.ErrInvalid, "behind %s there would be %s, behind the disk there is %s: let the images name those, "+
			"with `blkstream image rebase -f qcow2 -u`", target.Chain[0].Path, strings.Join(names(would), ", "), strings.Join(names(behind), ", "))
	}
	return nil
}

// notCopied names what the images hold besides the disk's contents, and what a copy therefore leaves behind.
func notCopied(source *image.Image, base int) string {
	var left []string
	for i, m := range source.Chain {
		if base > 0 && i >= base || m.Header == nil {
			continue
		}
		if n := m.Header.SnapshotCount; n > 0 {
			left = append(left, fmt.Sprintf("%d internal snapshots of %s", n, m.Path))
		}
		if n := bitmapsLeft(m); n > 0 {
			left = append(left, fmt.Sprintf("%d dirty bitmaps of %s", n, m.Path))
		}
	}
	if len(left) == 0 {
		return ""
	}
	return "not copied: " + strings.Join(left, ", ")
}

// bitmapsLeft counts the bitmaps that hold something and do not go with the disk: those that go are marked as in use in
// the image, and others that are so hold nothing.
func bitmapsLeft(m *image.Member) (n int) {
	node, ok := m.Node.(*qcow2.Node)
	if !ok {
		return 0
	}
	list, err := node.Bitmaps(blk.NewTask())
	if err != nil {
		return int(m.Header.Bitmaps.Count)
	}
	for _, b := range list {
		if !b.InUse {
			n++
		}
	}
	return n
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
// by its record: a copy whose switch was recorded is complete. Any other one goes on where it was, or is started again
// from the beginning (resume.go).
func (d *Daemon) resumeJobs(open []job.Record) {
	for _, r := range open {
		err := d.resumeJob(r)
		if err == nil {
			continue
		}
		r.State, r.Error, r.TargetConsistent = job.StateFailed, fmt.Sprintf("the daemon was restarted, and the job cannot go on: %v", err), false
		r.Message = fmt.Sprintf("%s is incomplete; the guest stays on %s", r.Target, r.Source)
		if streams(r) {
			r.Message = d.notStreamed(r)
		}
		if r.Kind == kindCommit {
			r.Message = "nothing is merged; the chain is as it was"
		}
		if r.Kind == kindBackup {
			r.Message = backup.Incomplete(&r)
		}
		if k, ferr := d.find(r.Disk); ferr == nil && r.Kind == kindCopy {
			if derr := k.dropCopyState(r.ID); derr != nil {
				d.opts.Log.Warn("a copy leaves something behind", "job", r.ID, "err", derr)
			}
		}
		if err := d.jobs.End(r); err != nil {
			d.opts.Log.Error("the journal cannot be written", "err", err)
		}
		d.opts.Log.Warn("a job of the last run has failed", "job", r.ID, "err", r.Error)
	}
}

func (d *Daemon) resumeJob(r job.Record) error {
	if r.Kind == kindBackup {
		return d.resumeBackup(r)
	}
	k, err := d.find(r.Disk)
	if err != nil {
		return err
	}
	if streams(r) {
		return d.resumeStream(k, r)
	}
	if r.Kind == kindCommit {
		return d.resumeCommit(k, r)
	}
	if k.record().Image == r.Target {
		r.State, r.Error, r.Message = job.StateCompleted, "", k.hint(r.Target, r.Format)
		return d.jobs.End(r)
	}
	if err := config.CheckRoots(r.Target, d.file.Daemon.ImageRoots); err != nil {
		return err
	}
	r.Source, r.TargetConsistent, r.Stage, r.Error = k.record().Image, false, "", ""
	r.BytesDone, r.BytesTotal, r.VerifiedBytes = 0, 0, 0
	c, why := k.copying, k.notGoing
	if c != nil {
		if why = c.untouched(c.rec.Target); why != nil {
			if err := c.again(d.store, r.ID); err != nil {
				return err
			}
		}
	}
	if why != nil {
		r.Message = fmt.Sprintf("started again from the beginning after a restart of the daemon: %v", why)
		d.opts.Log.Warn("a copy of the last run begins again", "job", r.ID, "disk", r.Disk, "reason", why)
		_, err = d.startCopy(k, r, false, false)
		return err
	}
	r.Message = "goes on where it was after a restart of the daemon"
	r.BytesDone = min(c.state.Bulk(), c.rec.Size)
	r.BytesTotal = r.BytesDone + c.state.Left()
	_, err = d.startCopy(k, r, c.rec.Blank, c.rec.Pack)
	return err
}
