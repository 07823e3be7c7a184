// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
)

// A snapshot of several disks happens in this order:
//
//  1. The overlays are created and opened, while the guests go on.
//  2. The queues of all disks are paused. What the disks are on is flushed, and opened once more for reading.
//  3. One record that lists all moves is made durable. Before it a restart finds every disk on its old image,
//     afterwards every disk on its overlay: finishSnapshots, which comes before any disk is served, sees to that.
//  4. The guests go on with the overlays. The old images are closed for writing.
//  5. Each disk's own record is written; then the list is not needed any more.
//
// Whatever fails up to 3 undoes all of it. A crash before 3 leaves overlays that nobody uses.

const snapshotKind = "snapshots"

// snapshotRecord is the list of step 3.
type snapshotRecord struct {
	Moves []moveRecord `json:"moves"`
}

type moveRecord struct {
	Disk string `json:"disk"`
	From record `json:"from"`
	To   record `json:"to"`
}

// cover is one disk's part of a snapshot.
type cover struct {
	k       *disk
	path    string
	format  string
	made    bool // the overlay's file is ours to remove
	from    record
	to      record
	old     *image.Image
	overlay *image.Overlay
	now     *image.Image
	at      time.Time // of the first disk: when all guests were paused

	imageFile string // of an add-cow overlay
	madeImage bool   // likewise
}

// errUnsure: the list may have become durable or not, and it could not be taken back.
var errUnsure = errors.New("it is not known whether the snapshot was recorded: a restart may finish it, so its overlays stay")

func (d *Daemon) snapshot(ctx context.Context, req *control.SnapshotRequest) (*control.SnapshotResponse, error) {
	d.changes.Lock()
	defer d.changes.Unlock()
	covers, err := d.snapshotCovers(req)
	if err != nil {
		return nil, err
	}
	paused, err := d.cover(ctx, covers, req.Existing)
	if err != nil {
		return nil, err
	}
	res := &control.SnapshotResponse{PausedMs: float64(paused.Microseconds()) / 1000, TakenAt: covers[0].at.Format(time.RFC3339Nano)}
	for _, c := range covers {
		d.opts.Log.Info("snapshot taken", "disk", c.k.spec.ID, "overlay", c.path, "backing", c.from.Image)
		res.Taken = append(res.Taken, &control.SnapshotTaken{
			Disk: c.k.spec.ID, Overlay: c.path, Backing: c.from.Image, Message: c.k.warning(),
		})
	}
	return res, nil
}

// cover puts the overlays over their disks' images, all or none, and says how long the guests were held up.
func (d *Daemon) cover(ctx context.Context, covers []*cover, existing bool) (time.Duration, error) {
	// What an earlier one left over must not be mixed up with this one.
	if err := d.finishSnapshots(); err != nil {
		return 0, err
	}
	paused, err := d.takeSnapshot(ctx, covers, existing)
	if err != nil {
		return 0, errors.Join(err, undo(covers, !errors.Is(err, errUnsure)))
	}
	for _, c := range covers {
		if err := c.overlay.Retire(); err != nil {
			d.opts.Log.Error("the image behind the overlay was not closed in order", "disk", c.k.spec.ID, "image", c.from.Image, "err", err)
		}
		d.warn(c.now)
	}
	if err := d.finishSnapshots(); err != nil {
		d.opts.Log.Error("the disks' records could not be written; the next snapshot or restart does it again", "err", err)
	}
	return paused, nil
}

// snapshotCovers checks what the user asks for. The disks come in the order of their ids, which is the order in which
// graphs are paused.
func (d *Daemon) snapshotCovers(req *control.SnapshotRequest) ([]*cover, error) {
	invalid := func(format string, args ...any) ([]*cover, error) {
		return nil, control.Errorf(control.ErrInvalid, format, args...)
	}
	if req.Format != "" && req.Format != image.Qcow2 {
		return nil, control.Errorf(control.ErrUnsupported, "format %q: an overlay is qcow2", req.Format)
	}
	if len(req.Disks) == 0 {
		return invalid("which disks?")
	}
	var covers []*cover
	for _, s := range req.Disks {
		k, err := d.find(s.Disk)
		if err != nil {
			return nil, err
		}
		if !filepath.IsAbs(s.Overlay) {
			return invalid("overlay %q: give an absolute path", s.Overlay)
		}
		c := newCover(k, filepath.Clean(s.Overlay), image.Qcow2)
		for _, o := range covers {
			if o.k == k {
				return invalid("disk %q is named twice", s.Disk)
			}
			if sameFile(o.path, c.path) {
				return invalid("%s is the overlay of disk %q and of disk %q", c.path, o.k.spec.ID, s.Disk)
			}
		}
		switch {
		case k.spec.ReadOnly:
			return nil, control.Errorf(control.ErrPrecondition, "disk %q is read-only: its image does not change", s.Disk)
		case k.spec.Lock == lockRunning:
			return nil, control.Errorf(control.ErrPrecondition, "disk %q has lock = %q, which goes with raw images only, and an overlay is qcow2",
				s.Disk, lockRunning)
		}
		if err := k.free(); err != nil {
			return nil, err
		}
		if err := d.checkRoots(c.path); err != nil {
			return nil, err
		}
		if err := d.unused(c.path); err != nil {
			return nil, err
		}
		covers = append(covers, c)
	}
	slices.SortFunc(covers, func(a, b *cover) int { return strings.Compare(a.k.spec.ID, b.k.spec.ID) })
	return covers, nil
}

func newCover(k *disk, path, format string) *cover {
	c := &cover{k: k, path: path, format: format, from: k.record(), old: k.image()}
	c.to = c.from.move(path, format)
	if behind := k.backing(); len(behind) > 0 {
		c.to.Backing = append([]config.Layer{{Image: c.from.Image, Format: c.from.Format}}, behind...)
	}
	return c
}

// takeSnapshot does steps 1 to 4 and says how long the guests were held up. After an error the disks are where they
// were, and undo has the rest to do.
func (d *Daemon) takeSnapshot(ctx context.Context, covers []*cover, existing bool) (time.Duration, error) {
	t := blk.NewTask()
	var graphs []*blk.Graph
	for _, c := range covers {
		if err := d.openOverlay(ctx, t, c, existing); err != nil {
			return 0, imageError(err)
		}
		graphs = append(graphs, c.k.graph)
	}
	for _, c := range covers {
		// So that little is left to do for the flush that holds the guests up.
		if err := blk.Do(t, c.old.Root, &blk.Request{Op: blk.OpFlush}); err != nil {
			return 0, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	start := time.Now()
	err := blk.ChangeAll(ctx, graphs, func(txs []*blk.Tx) error {
		covers[0].at = time.Now()
		if err := joinAll(covers); err != nil {
			return imageError(err)
		}
		if err := d.recordSnapshot(covers); err != nil {
			return err
		}
		for i, c := range covers {
			txs[i].SetRoot(c.k.over(c.now))
			c.k.mu.Lock()
			c.to.CacheOff = c.k.rec.CacheOff
			c.k.rec, c.k.img = c.to, c.now
			c.k.mu.Unlock()
		}
		return nil
	})
	return time.Since(start), err
}

// openOverlay creates the overlay, unless someone else did, and opens it.
func (d *Daemon) openOverlay(ctx context.Context, t *blk.Task, c *cover, existing bool) error {
	if !existing {
		name, err := c.old.BackingName()
		if err != nil {
			return err
		}
		_, missing := os.Stat(c.imageFile)
		err = image.Create(ctx, c.path, image.CreateOptions{
			Format: c.format, ImageFile: c.imageFile, Unopened: true,
			CreateOptions: qcow2.CreateOptions{Size: c.old.Root.Info().Size, BackingFile: name, BackingFormat: c.from.Format},
		})
		switch {
		case errors.Is(err, os.ErrExist) && c.format == image.AddCow:
			return control.Errorf(control.ErrExists, "%s exists: the bitmap of %s goes there; remove it if no disk needs it", c.path, c.imageFile)
		case errors.Is(err, os.ErrExist):
			return control.Errorf(control.ErrExists, "%s exists; use --existing if it was made to be the overlay", c.path)
		case errors.Is(err, blk.ErrInvalid):
			return control.Errorf(control.ErrInvalid, "%w", err)
		case err != nil:
			return err
		}
		c.made, c.madeImage = true, c.imageFile != "" && missing != nil
	}
	var err error
	if c.overlay, err = image.OpenOverlay(t, c.path, c.format, c.old, d.imageOptions(&c.k.spec, c.k.graph)); err != nil {
		return err
	}
	if n := c.overlay.Size(); n%int64(c.k.spec.BlockSize) != 0 {
		return control.Errorf(control.ErrInvalid, "%s has %d bytes, which is not a multiple of the disk's block_size %d", c.imageFile, n, c.k.spec.BlockSize)
	}
	return nil
}

// joinAll flushes all old images at the same time, for the guests wait.
func joinAll(covers []*cover) error {
	var wg sync.WaitGroup
	errs := make([]error, len(covers))
	for i, c := range covers {
		wg.Go(func() { c.now, errs[i] = c.overlay.Join(blk.NewTask()) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// recordSnapshot is the one point at which the snapshot happens, for all disks.
func (d *Daemon) recordSnapshot(covers []*cover) error {
	var s snapshotRecord
	for _, c := range covers {
		s.Moves = append(s.Moves, moveRecord{c.k.spec.ID, c.from, c.to})
	}
	id := s.Moves[0].Disk
	if err := d.store.Save(snapshotKind, id, &s); err != nil {
		if derr := d.store.Delete(snapshotKind, id); derr != nil {
			return errors.Join(err, derr, errUnsure)
		}
		return err
	}
	return nil
}

// undo closes the overlays, and removes those that were made.
func undo(covers []*cover, remove bool) error {
	var errs []error
	for _, c := range covers {
		if c.overlay != nil {
			errs = append(errs, c.overlay.Close())
		}
		if c.made && remove {
			errs = append(errs, os.Remove(c.path))
		}
		if c.madeImage && remove {
			errs = append(errs, os.Remove(c.imageFile))
		}
	}
	return errors.Join(errs...)
}

// finishSnapshots writes the disks' records of snapshots that are recorded as a whole.
func (d *Daemon) finishSnapshots() error {
	ids, err := d.store.IDs(snapshotKind)
	if err != nil {
		return err
	}
	for _, id := range ids {
		var s snapshotRecord
		if _, err := d.store.Load(snapshotKind, id, &s); err != nil {
			return err
		}
		if len(s.Moves) == 0 || slices.ContainsFunc(s.Moves, func(m moveRecord) bool { return m.Disk == "" || !m.To.valid() }) {
			return fmt.Errorf("state directory: %s is damaged: it does not name disks and images", d.store.Path(snapshotKind, id))
		}
		for _, m := range s.Moves {
			if err := d.finishMove(&m); err != nil {
				return fmt.Errorf("snapshot of disk %q: %w", m.Disk, err)
			}
		}
		if err := d.store.Delete(snapshotKind, id); err != nil {
			return err
		}
	}
	return nil
}

func (d *Daemon) finishMove(m *moveRecord) error {
	if k, err := d.find(m.Disk); err == nil {
		// The guest is on it, or the snapshot was not taken (errUnsure): what it is on counts, whatever the list says.
		k.mu.Lock()
		defer k.mu.Unlock()
		return d.store.Save(recordKind, m.Disk, &k.rec)
	}
	var r record
	found, err := d.loadRecord(m.Disk, &r)
	// Else the disk's own record is newer: this was done before, or the disk has moved on or is gone.
	if err != nil || !found || r.Image != m.From.Image || !slices.Equal(r.Moved, m.From.Moved) {
		return err
	}
	m.To.CacheOff = r.CacheOff // the guest may have said so meanwhile
	return d.store.Save(recordKind, m.Disk, &m.To)
}

func (s *service) Snapshot(ctx context.Context, r *control.SnapshotRequest) (*control.SnapshotResponse, error) {
	return s.d.snapshot(ctx, r)
}
