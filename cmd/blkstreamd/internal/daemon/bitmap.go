// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/dirty"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// The dirty bitmaps of a disk. While the disk is served they are the head of its graph (blk/dirty) and have files in
// the state directory. In order:
//
//  1. When the disk is started, each bitmap comes from a qcow2 image that has it in order, and from its file, with the
//     regions of the intent log; what either says counts. It is inconsistent, and records nothing, if somebody has written to the image since the
//     disk was stopped, or if its file was damaged.
//  2. The files and the record, which now says that the disk is being served, are made durable; bitmaps in the image are
//     marked as in use there. Then the guest may write.
//  3. When the disk is stopped the bitmaps are stored in the image if it can have any. Else their files are completed,
//     and the record says what the image looks like.
//
// After a crash between any two of these the files are at least what was written, and the image's bitmaps are marked, or
// both are the same. The record is the list of the bitmaps: a file that it does not name is of no use and is removed.
// Bitmaps of the image that are not on the list are shown and left alone.

const (
	bitmapKind = "bitmaps"

	defaultBitmapGranularity = 64 << 10
	minBitmapGranularity     = 4 << 10
	maxBitmapGranularity     = 64 << 20
	// maxDiskBitmaps bounds the memory and the work of each write's marks.
	maxDiskBitmaps = 64
	maxBitmapBytes = 64 << 20 // of memory for each; some more are needed for all together
)

// maxImageBitmapBytes bounds what an image makes us keep: a few bytes of it can stand for all the bits of a bitmap.
var maxImageBitmapBytes int64 = 256 << 20

// bitmapsRecord is what the state directory keeps of a disk's bitmaps.
type bitmapsRecord struct {
	Bitmaps []bitmapRecord `json:"bitmaps"`
	// Image is what the disk was on when this was written. It may have moved since; its own record knows that.
	Image string `json:"image"`
	// Stopped is the image, and its data file, when the disk was stopped; none: the disk is served, or was when the daemon died.
	Stopped []imageState `json:"stopped,omitempty"`
}

type bitmapRecord struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"`
	File        string `json:"file,omitempty"` // none: the bitmap is in the image, or broken
	// Broken says why the bitmap does not hold everything.
	Broken string `json:"broken,omitempty"`
}

// imageState tells whether somebody has written to an image.
type imageState struct {
	Path     string `json:"path"`
	Size     int64  `json:"size"`
	Inode    uint64 `json:"inode"`
	Modified int64  `json:"modified"` // nanoseconds since the epoch
}

// files are what the disk is on, while it is open: its image, and the data file if it has one.
func (b *bitmaps) files() []string {
	all := []string{b.k.record().Image}
	if data := b.k.image().Chain[0].DataFile; data != "" {
		all = append(all, data)
	}
	return all
}

func statesOf(paths []string) (all []imageState, err error) {
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("image %q: %w", path, err)
		}
		all = append(all, imageState{Path: path, Size: st.Size, Inode: st.Ino, Modified: st.Mtim.Nano()})
	}
	return all, nil
}

// bitmaps are those of one disk.
type bitmaps struct {
	k *disk

	// saving keeps an older record from replacing a newer one: the keeper saves, too. mu comes after it.
	saving sync.Mutex

	// Commands that change the list hold Daemon.changes. mu is taken after the graph's lock.
	mu   sync.Mutex
	head *dirty.Node // nil: nothing was ever recorded
	all  []*diskBitmap
}

type diskBitmap struct {
	bitmapRecord
	bits *dirty.Bitmap // nil: it does not record
}

func (b *bitmaps) store() *job.Store { return b.k.d.store }

// dir is for the files. A record's name ends in .json, so no other disk has that folder.
func (b *bitmaps) dir() string {
	return filepath.Join(b.k.d.file.Daemon.StateDir, bitmapKind, b.k.spec.ID+".d")
}

func (b *bitmaps) find(name string) (*diskBitmap, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, m := range b.all {
		if m.Name == name {
			return m, nil
		}
	}
	return nil, control.Errorf(control.ErrNotFound, "disk %q has no bitmap %q", b.k.spec.ID, name)
}

// list is a copy.
func (b *bitmaps) list() []*diskBitmap {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.all)
}

// save makes the record durable.
func (b *bitmaps) save(stopped []imageState) error {
	b.saving.Lock()
	defer b.saving.Unlock()
	r := bitmapsRecord{Image: b.k.record().Image, Stopped: stopped}
	broken := b.lost()
	for _, m := range b.list() {
		rec := m.bitmapRecord
		if rec.Broken == "" && broken != nil {
			rec.Broken = broken.Error()
		}
		r.Bitmaps = append(r.Bitmaps, rec)
	}
	if len(r.Bitmaps) == 0 {
		return b.store().Delete(bitmapKind, b.k.spec.ID)
	}
	return b.store().Save(bitmapKind, b.k.spec.ID, &r)
}

// lost says why the bitmaps that record do not hold everything; nil: they do.
func (b *bitmaps) lost() error {
	head := b.recorder()
	if head == nil {
		return nil
	}
	if err := head.Err(); err != nil {
		return missed(err)
	}
	return nil
}

func missed(err error) error { return fmt.Errorf("writes were missed: %w", err) }

// load finds the disk's bitmaps before it is served. The graph has its root.
func (b *bitmaps) load() error {
	if b.store() == nil || b.k.spec.ReadOnly {
		return nil // a disk that does not change leaves everything as it is
	}
	var r bitmapsRecord
	if _, err := b.store().Load(bitmapKind, b.k.spec.ID, &r); err != nil {
		return err
	}
	t := blk.NewTask()
	bits, inImage, err := b.fromImage(t, &r)
	if err != nil {
		return err
	}
	if err := b.fromFiles(t, &r, bits); err != nil {
		return err
	}
	if len(r.Bitmaps) == 0 {
		return nil
	}
	for _, rec := range r.Bitmaps {
		b.all = append(b.all, &diskBitmap{bitmapRecord: rec})
	}
	if err := b.begin(t, bits, r.Stopped); err != nil {
		return err
	}
	if err := b.save(nil); err != nil {
		return err
	}
	if len(inImage) > 0 {
		if err := b.k.image().Root.(*qcow2.Node).UseBitmaps(t, inImage); err != nil { //nolint:errcheck // fromImage has seen it
			return err
		}
	}
	b.sweep()
	for _, m := range b.all {
		if m.Broken != "" {
			b.k.d.opts.Log.Warn("a bitmap is inconsistent", "disk", b.k.spec.ID, "bitmap", m.Name, "reason", m.Broken)
		}
	}
	return nil
}

// fromImage gets the bitmaps that are in order in the image and puts them on the list. It names them. One that has a file
// as well keeps it, since it may be of another time: the disk may have come to an image that had one of this name. What
// the record says to be in the image and is not there, is forgotten.
func (b *bitmaps) fromImage(t *blk.Task, r *bitmapsRecord) (bits map[string]*blk.Bitmap, names []string, err error) {
	bits = map[string]*blk.Bitmap{}
	var (
		list  []qcow2.Bitmap
		bytes int64
	)
	node, ok := b.k.image().Root.(*qcow2.Node)
	if ok && node.CanStoreBitmaps() {
		if list, err = node.Bitmaps(t); err != nil {
			return nil, nil, err
		}
	}
	r.Bitmaps = slices.DeleteFunc(r.Bitmaps, func(m bitmapRecord) bool { return m.File == "" && m.Broken == "" })
	for _, m := range list {
		if !m.Enabled || m.InUse || !utf8.ValidString(m.Name) || len(r.Bitmaps) >= maxDiskBitmaps {
			continue
		}
		rec := bitmapRecord{Name: m.Name, Granularity: m.Granularity}
		bytes += node.Info().Size / m.Granularity / 8
		i := slices.IndexFunc(r.Bitmaps, func(o bitmapRecord) bool { return o.Name == m.Name })
		if i < 0 {
			i = len(r.Bitmaps)
			r.Bitmaps = append(r.Bitmaps, rec)
		}
		if was := r.Bitmaps[i]; was.File != "" && b.own(r.Image) {
			if was.Broken != "" && r.Stopped == nil {
				continue
			}
			if was.Broken == "" {
				rec = was
			}
		}
		if bytes > maxImageBitmapBytes {
			rec.Broken = fmt.Sprintf("the image's bitmaps take more than %d bytes", maxImageBitmapBytes)
		} else if got, err := node.LoadBitmap(t, m); err != nil {
			rec.Broken = err.Error()
		} else {
			bits[m.Name], names = got, append(names, m.Name)
		}
		r.Bitmaps[i] = rec
	}
	return bits, names, nil
}

// fromFiles gets the others, and says of those that are not good why they are not.
func (b *bitmaps) fromFiles(t *blk.Task, r *bitmapsRecord, bits map[string]*blk.Bitmap) error {
	why := ""
	switch {
	case b.k.spec.Lock == lockRunning:
		why = fmt.Sprintf("with lock = %q another host may have written to the image", lockRunning)
	case !b.own(r.Image):
		why = fmt.Sprintf("it is of another image, %s", r.Image)
	case r.Stopped != nil:
		is, err := statesOf(b.files())
		if err != nil {
			return err
		}
		if !slices.Equal(is, r.Stopped) {
			why = "the image was changed while the disk was not served"
		}
	}
	var (
		good []*bitmapRecord
		read []*blk.Bitmap
	)
	for i := range r.Bitmaps {
		m := &r.Bitmaps[i]
		image := bits[m.Name]
		if image != nil && m.File == "" || m.Broken != "" {
			continue
		}
		if m.Broken = why; why != "" && image == nil {
			continue
		}
		m.Broken = ""
		got, err := b.readFile(t, m.File)
		if err != nil {
			m.Broken = err.Error()
			delete(bits, m.Name)
			continue
		}
		if image != nil {
			got.Merge(image)
		}
		bits[m.Name], good, read = got, append(good, m), append(read, got)
	}
	if len(good) == 0 {
		return nil
	}
	if err := b.readLog(t, read); err != nil {
		for _, m := range good {
			m.Broken = err.Error()
			delete(bits, m.Name)
		}
	}
	return nil
}

// own reports whether the disk is on an image, or was before it moved.
func (b *bitmaps) own(path string) bool {
	now := b.k.record()
	return path == now.Image || slices.Contains(now.Moved, path)
}

// keepBitmaps says that a disk's bitmaps are of the image that it has moved to, before its record forgets that it has.
func (d *Daemon) keepBitmaps(id string, now record) error {
	var r bitmapsRecord
	if found, err := d.store.Load(bitmapKind, id, &r); !found || err != nil || !slices.Contains(now.Moved, r.Image) {
		return err
	}
	r.Image = now.Image
	return d.store.Save(bitmapKind, id, &r)
}

func (b *bitmaps) readFile(t *blk.Task, name string) (*blk.Bitmap, error) {
	f, err := b.open(name)
	if err != nil {
		return nil, err
	}
	bits, err := dirty.ReadBits(t, f, b.k.image().Root.Info().Size)
	return bits, errors.Join(err, f.Close())
}

const logName = "log"

func (b *bitmaps) readLog(t *blk.Task, bits []*blk.Bitmap) error {
	f, err := b.open(logName)
	if err != nil {
		return err
	}
	return errors.Join(dirty.ReadLog(t, f, bits...), f.Close())
}

func (b *bitmaps) open(name string) (*file.Node, error) {
	var f *file.Node
	err := b.k.d.patiently(func() (err error) {
		f, err = file.Open(filepath.Join(b.dir(), name), file.Options{})
		return err
	})
	return f, err
}

// begin lets those record that have bits. Files and the log that are there already are used further: at any moment they
// hold all that they held before, and more.
func (b *bitmaps) begin(t *blk.Task, bits map[string]*blk.Bitmap, stopped []imageState) error {
	if len(bits) == 0 {
		return nil
	}
	if !slices.ContainsFunc(b.all, func(m *diskBitmap) bool { return bits[m.Name] != nil && m.File != "" }) {
		// Before the old log goes, which may be all that says which bitmaps are broken.
		if err := b.save(stopped); err != nil {
			return err
		}
		if err := b.newLog(t); err != nil {
			return err
		}
	}
	if err := b.startHead(); err != nil {
		return err
	}
	return b.k.graph.Change(context.Background(), func(tx *blk.Tx) error {
		tx.SetHead(b.head)
		for _, m := range b.all {
			if bits[m.Name] == nil {
				continue
			}
			open := b.open
			if m.File == "" {
				m.File, open = b.freeName(), b.create
			}
			f, err := open(m.File)
			if err != nil {
				return err
			}
			if m.bits, err = b.head.Add(t, f, bits[m.Name]); err != nil {
				return errors.Join(err, f.Close())
			}
		}
		return nil
	})
}

// startHead makes the filter over the log as it is.
func (b *bitmaps) startHead() error {
	log, err := b.open(logName)
	if err != nil {
		return err
	}
	head, err := dirty.New(dirty.Options{Log: log, Barrier: b.k.graph.Barrier, Broken: b.broken})
	if err != nil {
		return errors.Join(err, log.Close())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.head = head
	return nil
}

// broken is called when the state directory has failed.
func (b *bitmaps) broken(err error) error {
	b.k.d.opts.Log.Error("the dirty bitmaps are inconsistent from now on: writes are missed", "disk", b.k.spec.ID, "err", err)
	return b.save(nil)
}

// create makes an empty file.
func (b *bitmaps) create(name string) (*file.Node, error) {
	if err := os.MkdirAll(b.dir(), 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	path := filepath.Join(b.dir(), name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	for dir := path; dir != b.k.d.file.Daemon.StateDir; {
		dir = filepath.Dir(dir)
		if err := syncDir(dir); err != nil {
			return nil, err
		}
	}
	return b.open(name)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// newLog makes a log for a disk of which no bitmap records. What the record says of them is durable.
func (b *bitmaps) newLog(t *blk.Task) error {
	f, err := b.create(logName)
	if err != nil {
		return err
	}
	if err = f.Resize(t, dirty.LogSize, false); err == nil {
		err = dirty.FormatLog(t, f)
	}
	return errors.Join(err, f.Close())
}

// freeName is a name that no file has.
func (b *bitmaps) freeName() string {
	for i := 1; ; i++ {
		name := strconv.Itoa(i) + ".bits"
		if _, err := os.Lstat(filepath.Join(b.dir(), name)); errors.Is(err, fs.ErrNotExist) {
			return name
		}
	}
}

// sweep removes files that no bitmap has.
func (b *bitmaps) sweep() {
	entries, err := os.ReadDir(b.dir())
	if err != nil {
		return
	}
	used := map[string]bool{}
	for _, m := range b.list() {
		if m.File != "" && m.Broken == "" {
			used[m.File], used[logName] = true, true
		}
	}
	for _, e := range entries {
		if !used[e.Name()] {
			_ = os.Remove(filepath.Join(b.dir(), e.Name())) // the next one tries again
		}
	}
	if len(used) == 0 {
		_ = os.Remove(b.dir())
	}
}
