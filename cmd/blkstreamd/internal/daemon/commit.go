// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/commit"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// A commit merges images of a disk's chain into the one behind them, the base. Images in the middle of the chain do not
// change, so what they hold is copied, and then the image before them is pointed to the base (copy/commit). If the
// guest is on the first of them, it is a block copy to the base, which then is the disk (copy/blockcopy). blk/image says
// why the base may be written while it still is behind them.

const kindCommit = "commit"

func (s *service) Commit(_ context.Context, r *control.CommitRequest) (*control.Job, error) {
	j, err := s.d.commit(r)
	if err != nil {
		return nil, kind(err)
	}
	return message(j.Record()), nil
}

func (d *Daemon) commit(req *control.CommitRequest) (*job.Job, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	k, err := d.find(req.Disk)
	if err != nil {
		return nil, err
	}
	switch {
	case req.Id != "" && !job.ValidID(req.Id):
		return nil, control.Errorf(control.ErrInvalid, "job id %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", req.Id)
	case req.Speed < 0:
		return nil, control.Errorf(control.ErrInvalid, "speed %d: it cannot be negative", req.Speed)
	case k.spec.ReadOnly:
		return nil, control.Errorf(control.ErrPrecondition, "disk %q is read-only", req.Disk)
	case len(k.backing()) > 0:
		// What it names would stay behind the disk, whatever the images say.
		return nil, control.Errorf(control.ErrPrecondition, "disk %q: the configuration names the images behind it (backing = …): "+
			"let the images name them, with `blkstream image rebase -u`", req.Disk)
	}
	if err := k.free(); err != nil {
		return nil, err
	}
	chain := k.image().Chain
	top, base := 0, 1
	if req.Top != "" {
		if top, err = findMember(chain, req.Top); err != nil {
			return nil, err
		}
		base = top + 1
	}
	if req.Base != "" {
		if base, err = findMember(chain, req.Base); err != nil {
			return nil, err
		}
	}
	switch {
	case base == len(chain):
		return nil, control.Errorf(control.ErrInvalid, "%s has no backing image to be merged into", chain[top].Path)
	case base <= top:
		return nil, control.Errorf(control.ErrInvalid, "%s is not behind %s", chain[base].Path, chain[top].Path)
	}
	if err := d.unused(chain[base].Path); err != nil {
		return nil, err
	}
	return d.startCommit(k, job.Record{
		ID: req.Id, Kind: kindCommit, Disk: req.Disk, Source: chain[top].Path, Target: chain[base].Path, Format: chain[base].Format,
		Options: job.Options{
			Method: "mirror", SwitchMode: "auto", Speed: req.Speed, Granularity: blockcopy.DefaultGranularity,
			OnSourceError: job.OnErrorReport, OnTargetError: job.OnErrorEnospc,
		},
	}, top, base)
}

// findMember is the place of an image in the chain.
func findMember(chain []*image.Member, path string) (int, error) {
	var names []string
	for i, m := range chain {
		if sameFile(m.Path, path) {
			return i, nil
		}
		names = append(names, m.Path)
	}
	return 0, control.Errorf(control.ErrInvalid, "%s is not in the chain of the disk, which is %s", path, strings.Join(names, ", "))
}

// merge is a commit at work.
type merge struct {
	d      *Daemon
	k      *disk
	j      *job.Job
	m      *image.Merge
	merged string // names of the images
}

// startCommit starts the job that merges the images from place top of the chain into the one at place base.
func (d *Daemon) startCommit(k *disk, r job.Record, top, base int) (*job.Job, error) {
	chain := k.image().Chain
	var names []string
	for _, i := range chain[top:base] {
		names = append(names, i.Path)
	}
	var m *image.Merge
	err := d.patiently(func() (err error) {
		m, err = image.OpenMerge(blk.NewTask(), k.image(), top, base, d.imageOptions(&k.spec, k.graph))
		return err
	})
	if err != nil {
		return nil, imageError(err)
	}
	j, err := d.jobs.Start(r, func(ctx context.Context, j *job.Job) error {
		w := &merge{d: d, k: k, j: j, m: m, merged: strings.Join(names, ", ")}
		err := w.run(ctx, top == 0, base)
		log := d.opts.Log.With("job", j.Record().ID, "disk", k.spec.ID, "images", w.merged, "base", r.Target)
		if err != nil {
			log.Warn("commit ended, nothing is merged", "reason", err)
		} else {
			log.Info("commit completed")
		}
		return err
	})
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	d.opts.Log.Info("commit started", "job", j.Record().ID, "disk", k.spec.ID, "base", r.Target)
	return j, nil
}

// run leaves the disk with the old chain if it returns an error, and with the new one otherwise.
func (w *merge) run(ctx context.Context, active bool, base int) error {
	if err := w.step(ctx, w.m.Insert); err != nil {
		return errors.Join(err, w.m.Close())
	}
	if err := w.grow(ctx); err != nil {
		return errors.Join(err, w.remove(ctx))
	}
	if active {
		return w.runActive(ctx, base)
	}
	view, err := w.m.View()
	if err == nil {
		err = commit.Run(ctx, w.j, commit.Setup{
			Graph: w.k.graph, View: view, Depth: w.m.Depth(), Base: w.m.Base(), Finish: w.finish,
		})
	}
	if err != nil {
		return errors.Join(err, w.remove(ctx))
	}
	return nil
}

// step changes the chain with nothing in flight, and closes then what is not in it any more.
func (w *merge) step(ctx context.Context, change func() (*image.Image, error)) error {
	wait, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	err := w.k.graph.Change(wait, func(*blk.Tx) error {
		img, err := change()
		if err != nil {
			return err
		}
		w.use(img)
		return nil
	})
	if err != nil {
		return err
	}
	w.settle()
	return nil
}

// grow makes the base as large as need be, with nothing in flight to it.
func (w *merge) grow(ctx context.Context) error {
	wait, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	return w.k.graph.Change(wait, func(*blk.Tx) error { return w.m.Grow(blk.NewTask()) })
}

func (w *merge) use(img *image.Image) {
	w.k.mu.Lock()
	defer w.k.mu.Unlock()
	w.k.img = img
}

func (w *merge) settle() {
	if err := w.m.Settle(); err != nil {
		w.d.opts.Log.Error("images of the chain were not closed in order", "disk", w.k.spec.ID, "err", err)
	}
}

// finish takes the images out of the middle of the chain.
func (w *merge) finish(ctx context.Context) error {
	err := w.step(ctx, func() (*image.Image, error) { return w.m.Drop(blk.NewTask()) })
	if err == nil {
		w.done("")
	}
	return err
}

func (w *merge) done(hint string) {
	w.j.Update(func(r *job.Record) { r.Message = committed(w.merged, r.Target, hint) })
}

func committed(merged, base, hint string) string {
	s := fmt.Sprintf("%s: merged into %s and not used any more", merged, base)
	if hint != "" {
		s += "; " + hint
	}
	return s
}

// remove leaves the chain as it was. What the base has got does not show.
func (w *merge) remove(ctx context.Context) error {
	w.j.Update(func(r *job.Record) { r.Message = "nothing is merged; the chain is as it was" })
	return w.step(context.WithoutCancel(ctx), func() (*image.Image, error) { return w.m.Remove(blk.NewTask()) })
}

// runActive copies what lies above the base to it, and lets the guest go on there.
func (w *merge) runActive(ctx context.Context, base int) error {
	r := w.j.Record()
	hint := w.k.commitHint(r)
	s := blockcopy.Setup{
		Graph: w.k.graph, Target: w.m.Base(), Blank: true, Base: uint16(base), Hint: committed(w.merged, r.Target, hint),
		Commit: func() error { return w.k.moveTo(r.Target, r.Format) },
		Settle: w.k.settle,
		Release: func(n blk.Node) error {
			if n == w.m.Base() {
				return w.remove(ctx)
			}
			w.use(w.m.Turn())
			w.settle()
			return nil
		},
	}
	return w.k.pauseCopyOnRead(ctx, func() error { return blockcopy.Run(ctx, w.j, s) })
}

// commitHint says what to change in the configuration, which may name the base still.
func (k *disk) commitHint(r job.Record) string {
	if r.Target == k.spec.Image && r.Format == k.spec.Format {
		return ""
	}
	return k.hint(r.Target, r.Format)
}

// resumeCommit goes on with a commit of an earlier daemon, from the beginning, or finds it complete.
func (d *Daemon) resumeCommit(k *disk, r job.Record) error {
	chain := k.image().Chain
	at := func(path string) int {
		return slices.IndexFunc(chain, func(m *image.Member) bool { return sameFile(m.Path, path) })
	}
	top, base := at(r.Source), at(r.Target)
	if top < 0 && base >= 0 {
		hint := ""
		if base == 0 {
			hint = k.commitHint(r)
		}
		r.State, r.Error, r.Message = job.StateCompleted, "", committed(r.Source, r.Target, hint)
		return d.jobs.End(r)
	}
	if top < 0 || base <= top {
		return errors.New("the disk's chain is another one")
	}
	r.Stage, r.Error, r.TargetConsistent = "", "", false
	r.Message = "started again from the beginning after a restart of the daemon"
	r.BytesDone, r.BytesTotal = 0, 0
	_, err := d.startCommit(k, r, top, base)
	return err
}
