// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/dirty"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/blk/raw"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// What is done with the bitmaps of a disk that is served: by users, by a backup, and at the end.

// add begins a bitmap with the given bits; nil: none.
func (b *bitmaps) add(ctx context.Context, name string, granularity int64) (*diskBitmap, error) {
	k := b.k
	switch {
	case !job.ValidID(name):
		return nil, control.Errorf(control.ErrInvalid, "bitmap name %q: use letters, digits, \"_\", \".\" and \"-\", at most 64", name)
	case granularity < minBitmapGranularity || granularity > maxBitmapGranularity || bits.OnesCount64(uint64(granularity)) != 1:
		return nil, control.Errorf(control.ErrInvalid, "granularity %d: it is a power of two from 4K to 64M", granularity)
	case k.spec.ReadOnly:
		return nil, control.Errorf(control.ErrPrecondition, "disk %q is read-only: it does not change", k.spec.ID)
	case k.spec.Lock == lockRunning:
		return nil, control.Errorf(control.ErrPrecondition, "disk %q has lock = %q: another host may write to it, which a bitmap here would miss",
			k.spec.ID, lockRunning)
	}
	if k.dev.Size()/granularity > 8*maxBitmapBytes {
		return nil, control.Errorf(control.ErrInvalid, "granularity %d: the disk is large, choose a larger one", granularity)
	}
	if _, err := b.find(name); err == nil {
		return nil, control.Errorf(control.ErrExists, "disk %q has a bitmap %q already", k.spec.ID, name)
	}
	if len(b.list()) >= maxDiskBitmaps {
		return nil, control.Errorf(control.ErrNoSpace, "disk %q has %d bitmaps already, which is the limit", k.spec.ID, maxDiskBitmaps)
	}
	if err := b.ready(ctx); err != nil {
		return nil, err
	}
	m := &diskBitmap{bitmapRecord: bitmapRecord{Name: name, Granularity: granularity, File: b.freeName()}}
	f, err := b.create(m.File)
	if err != nil {
		return nil, err
	}
	err = k.graph.Change(ctx, func(tx *blk.Tx) error {
		m.bits, err = b.recorder().Add(blk.NewTask(), f, blk.NewBitmap(tx.Root().Info().Size, granularity))
		return err
	})
	if err != nil {
		b.sweep()
		return nil, errors.Join(err, f.Close())
	}
	b.put(m)
	if err := b.save(nil); err != nil {
		return nil, errors.Join(err, b.remove(context.WithoutCancel(ctx), m))
	}
	return m, nil
}

// recorder is the head; nil: there is none.
func (b *bitmaps) recorder() *dirty.Node {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.head
}

// ready sees to it that there is a head that records.
func (b *bitmaps) ready(ctx context.Context) error {
	lost := b.lost()
	if b.recorder() != nil {
		if lost == nil {
			return nil
		}
		// Before the old log goes, which may be all that says so.
		if err := b.save(nil); err != nil {
			return err
		}
		b.giveUp(lost.Error())
		if err := b.endHead(ctx); err != nil {
			return err
		}
	}
	if err := b.newLog(blk.NewTask()); err != nil {
		return err
	}
	if err := b.startHead(); err != nil {
		return err
	}
	return b.k.graph.Change(ctx, func(tx *blk.Tx) error {
		tx.SetHead(b.recorder())
		return nil
	})
}

// giveUp makes all bitmaps inconsistent that record.
func (b *bitmaps) giveUp(why string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, m := range b.all {
		if m.bits != nil {
			b.all[i] = &diskBitmap{bitmapRecord: m.bitmapRecord}
			b.all[i].Broken = why
		}
	}
}

// endHead takes the head away, of which no bitmap is needed any more.
func (b *bitmaps) endHead(ctx context.Context) error {
	err := b.k.graph.Change(ctx, func(tx *blk.Tx) error {
		tx.SetHead(nil)
		return nil
	})
	if err != nil {
		return err
	}
	b.mu.Lock()
	head := b.head
	b.head = nil
	b.mu.Unlock()
	return head.Close()
}

func (b *bitmaps) put(m *diskBitmap) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = append(b.all, m)
	slices.SortFunc(b.all, func(x, y *diskBitmap) int { return strings.Compare(x.Name, y.Name) })
}

func (b *bitmaps) take(m *diskBitmap) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.all = slices.DeleteFunc(b.all, func(o *diskBitmap) bool { return o == m })
}

// remove forgets a bitmap. The record comes first: it must not name one that misses writes.
func (b *bitmaps) remove(ctx context.Context, m *diskBitmap) (err error) {
	if m.bits != nil {
		if _, frozen := m.bits.State(); frozen {
			return busy(dirty.ErrFrozen, m.Name)
		}
	}
	b.take(m)
	if err := b.save(nil); err != nil {
		b.put(m)
		return errors.Join(err, b.save(nil))
	}
	if m.bits == nil {
		return b.removeFromImage(m.Name)
	}
	if err := b.k.graph.Change(ctx, func(*blk.Tx) error { return m.bits.Remove() }); err != nil {
		b.put(m)
		return errors.Join(busy(err, m.Name), b.save(nil))
	}
	if err := b.removeFromImage(m.Name); err != nil {
		return err
	}
	if slices.ContainsFunc(b.list(), func(m *diskBitmap) bool { return m.bits != nil }) {
		return nil
	}
	return b.endHead(ctx)
}

// inImage calls fn with the image that the guest is on, if that is one that can have bitmaps, and with what it has. It
// stays open meanwhile.
func (b *bitmaps) inImage(fn func(t *blk.Task, n *qcow2.Node, list []qcow2.Bitmap) error) (err error) {
	b.k.graph.View(func(root blk.Node) {
		for {
			if n, ok := root.(*qcow2.Node); ok {
				t := blk.NewTask()
				var list []qcow2.Bitmap
				if list, err = n.Bitmaps(t); err == nil {
					err = fn(t, n, list)
				}
				return
			}
			below := root.Children()
			if _, ok := root.(*raw.Node); ok || len(below) == 0 {
				return
			}
			root = below[0]
		}
	})
	return err
}

func (b *bitmaps) removeFromImage(name string) error {
	return b.inImage(func(t *blk.Task, n *qcow2.Node, list []qcow2.Bitmap) error {
		if !slices.ContainsFunc(list, func(m qcow2.Bitmap) bool { return m.Name == name }) {
			return nil
		}
		return n.StoreBitmaps(t, []string{name}, nil)
	})
}

// strangers are the image's bitmaps that are not the disk's, or some of them: an image may have more than fit an answer.
func (b *bitmaps) strangers() (all []*control.Bitmap) {
	err := b.inImage(func(_ *blk.Task, _ *qcow2.Node, list []qcow2.Bitmap) error {
		for _, m := range list {
			if _, err := b.find(m.Name); err == nil {
				continue
			}
			if len(all) == maxDiskBitmaps {
				break
			}
			o := &control.Bitmap{
				Disk: b.k.spec.ID, Name: strings.ToValidUTF8(m.Name, "\uFFFD"), Granularity: m.Granularity,
				Stored: b.k.record().Image, State: bitmapDisabled,
			}
			if m.InUse || m.Enabled {
				o.State, o.Reason = bitmapInconsistent, "whoever wrote to the image last has not stored it"
			}
			all = append(all, o)
		}
		return nil
	})
	if err != nil {
		b.k.d.opts.Log.Warn("the image's bitmaps cannot be listed", "disk", b.k.spec.ID, "err", err)
	}
	return all
}

func busy(err error, name string) error {
	if errors.Is(err, dirty.ErrFrozen) {
		return control.Errorf(control.ErrPrecondition, "bitmap %q is in use by a backup", name)
	}
	return err
}

// recording finds a bitmap that can be relied on.
func (b *bitmaps) recording(name string) (*diskBitmap, error) {
	m, err := b.find(name)
	if err != nil {
		return nil, err
	}
	switch state, reason := b.state(m); {
	case state == bitmapDisabled:
		return nil, control.Errorf(control.ErrPrecondition, "disk %q is being stopped", b.k.spec.ID)
	case reason != "":
		return nil, control.Errorf(control.ErrPrecondition, "bitmap %q of disk %q is inconsistent (%s): remove it and add it again", name, b.k.spec.ID, reason)
	}
	return m, nil
}

func (b *bitmaps) clear(ctx context.Context, name string) (*diskBitmap, error) {
	m, err := b.recording(name)
	if err != nil {
		return nil, err
	}
	err = b.k.graph.Change(ctx, func(*blk.Tx) error { return m.bits.Clear(blk.NewTask()) })
	return m, busy(err, name)
}

// freeze returns what the bitmap says up to now, as a copy, for a backup of this moment. What is written from now on is
// kept apart until thaw. It is to be called within Graph.Change. After a crash everything counts.
func (b *bitmaps) freeze(name string) (*blk.Bitmap, error) {
	m, err := b.recording(name)
	if err != nil {
		return nil, err
	}
	bits, err := m.bits.Freeze()
	return bits, busy(err, name)
}

// thaw ends the use of a bitmap: with done it forgets, durably, what freeze returned, which the backup has; else it says
// all of it again. A crash on the way may leave anything between. It must not be called within Graph.Change.
func (b *bitmaps) thaw(name string, done bool) error {
	m, err := b.find(name)
	if err != nil {
		return err
	}
	if m.bits == nil {
		return nil // it was given up meanwhile
	}
	ctx, cancel := context.WithTimeout(context.Background(), changeWait)
	defer cancel()
	return b.k.graph.Change(ctx, func(*blk.Tx) error { return m.bits.Thaw(blk.NewTask(), done) })
}

// States of a bitmap.
const (
	bitmapRecording    = "recording"
	bitmapBusy         = "busy"
	bitmapInconsistent = "inconsistent"
	bitmapDisabled     = "disabled" // of the image, and records nothing
)

func (b *bitmaps) state(m *diskBitmap) (state, reason string) {
	if m.Broken != "" {
		return bitmapInconsistent, m.Broken
	}
	if m.bits == nil { // it was stored in the image: the disk has just been stopped
		return bitmapDisabled, ""
	}
	if err := m.bits.Err(); err != nil {
		return bitmapInconsistent, missed(err).Error()
	}
	return bitmapRecording, ""
}

func (b *bitmaps) message(m *diskBitmap) *control.Bitmap {
	o := &control.Bitmap{Disk: b.k.spec.ID, Name: m.Name, Granularity: m.Granularity, Stored: b.dir()}
	if n, ok := b.k.image().Root.(*qcow2.Node); ok && n.CanStoreBitmaps() {
		o.Stored = b.k.record().Image
	}
	o.State, o.Reason = b.state(m)
	if o.State != bitmapRecording {
		return o
	}
	var frozen bool
	if o.DirtyBytes, frozen = m.bits.State(); frozen {
		o.State = bitmapBusy
	}
	return o
}

// warning names those that are inconsistent.
func (b *bitmaps) warning() string {
	var all []string
	for _, m := range b.list() {
		if _, reason := b.state(m); reason != "" {
			all = append(all, fmt.Sprintf("bitmap %q is inconsistent: %s", m.Name, reason))
		}
	}
	return strings.Join(all, "; ")
}

// sync completes the files, or stores the bitmaps in the image. Nothing is in flight any more, for good.
func (b *bitmaps) sync() error {
	head := b.recorder()
	if head == nil {
		return nil
	}
	t := blk.NewTask()
	err := head.Sync(t)
	if err == nil {
		b.toImage(t)
	}
	return errors.Join(err, head.Close())
}

// toImage stores the bitmaps in the image if it can have any. If that fails, their files are complete all the same.
func (b *bitmaps) toImage(t *blk.Task) {
	n, ok := b.k.image().Root.(*qcow2.Node)
	if !ok || !n.CanStoreBitmaps() {
		return
	}
	var data []qcow2.BitmapData
	for _, m := range b.list() {
		if m.bits != nil {
			data = append(data, qcow2.BitmapData{Name: m.Name, Bits: m.bits.Bits()})
		}
	}
	if err := n.StoreBitmaps(t, nil, data); err != nil {
		b.k.d.opts.Log.Warn("the bitmaps stay in the state directory", "disk", b.k.spec.ID, "err", err)
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for i, m := range b.all {
		if m.bits != nil {
			b.all[i] = &diskBitmap{bitmapRecord: bitmapRecord{Name: m.Name, Granularity: m.Granularity}}
		}
	}
}

// forget removes all that is kept of them.
func (b *bitmaps) forget() error {
	b.mu.Lock()
	b.all = nil
	b.mu.Unlock()
	defer b.sweep()
	return b.store().Delete(bitmapKind, b.k.spec.ID)
}

// stopped records what the disk's files are like when they have been closed.
func (b *bitmaps) stopped(files []string) error {
	if len(b.list()) == 0 {
		return nil
	}
	now, err := statesOf(files)
	if err != nil {
		return err
	}
	if err := b.save(now); err != nil {
		return err
	}
	b.sweep()
	return nil
}

// The control socket.

func (s *service) BitmapAdd(ctx context.Context, r *control.BitmapAddRequest) (*control.Bitmap, error) {
	if r.Granularity == 0 {
		r.Granularity = defaultBitmapGranularity
	}
	return s.bitmap(ctx, r.Disk, func(ctx context.Context, b *bitmaps) (*diskBitmap, error) {
		return b.add(ctx, r.Name, r.Granularity)
	})
}

// bitmap runs a command that changes a disk's bitmaps, and returns the one that it was about.
func (s *service) bitmap(ctx context.Context, disk string, fn func(context.Context, *bitmaps) (*diskBitmap, error)) (*control.Bitmap, error) {
	s.d.changes.Lock()
	defer s.d.changes.Unlock()
	k, err := s.d.find(disk)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	m, err := fn(ctx, k.bitmaps)
	if err != nil || m == nil {
		return nil, err
	}
	return k.bitmaps.message(m), nil
}

func (s *service) BitmapRemove(ctx context.Context, r *control.BitmapRemoveRequest) (*control.BitmapRemoveResponse, error) {
	_, err := s.bitmap(ctx, r.Disk, func(ctx context.Context, b *bitmaps) (*diskBitmap, error) {
		defer b.sweep()
		m, err := b.find(r.Name)
		if err == nil {
			return nil, b.remove(ctx, m)
		}
		for _, o := range b.strangers() {
			if o.Name == r.Name {
				return nil, b.removeFromImage(r.Name)
			}
		}
		return nil, err
	})
	if err != nil {
		return nil, err
	}
	return &control.BitmapRemoveResponse{}, nil
}

func (s *service) BitmapClear(ctx context.Context, r *control.BitmapClearRequest) (*control.Bitmap, error) {
	return s.bitmap(ctx, r.Disk, func(ctx context.Context, b *bitmaps) (*diskBitmap, error) { return b.clear(ctx, r.Name) })
}

func (s *service) BitmapList(_ context.Context, r *control.BitmapListRequest) (*control.BitmapListResponse, error) {
	disks := s.d.list()
	if r.Disk != "" {
		k, err := s.d.find(r.Disk)
		if err != nil {
			return nil, err
		}
		disks = []*disk{k}
	}
	o := &control.BitmapListResponse{}
	for _, k := range disks {
		for _, m := range k.bitmaps.list() {
			o.Bitmaps = append(o.Bitmaps, k.bitmaps.message(m))
		}
		o.Bitmaps = append(o.Bitmaps, k.bitmaps.strangers()...)
	}
	return o, nil
}
