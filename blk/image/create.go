// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// CreateOptions of Create. The qcow2 part is for that format only, except Size and Preallocation, and for add-cow the
// backing file and ClusterSize.
type CreateOptions struct {
	Format string
	// ImageFile is where an add-cow image keeps its data, as it shall name it: a raw file or device. It is made if it is
	// missing; else it gives the disk its size, which must be at least Size, and what it holds is not shown.
	ImageFile string
	// Size in bytes is rounded up to whole sectors. Negative: that of the backing image.
	qcow2.CreateOptions
	// Existing takes a file or device that is there already, and drops what it holds. Otherwise it must not exist.
	Existing bool
	// Unopened: the backing image is not looked at, for it is in use. Size must be given.
	Unopened bool
	Check    func(path string) error
}

// Preallocation modes.
const (
	preallocOff      = "off"
	preallocMetadata = "metadata"
	preallocFalloc   = "falloc"
	preallocFull     = "full"
)

// Create makes an image. If it fails, files that it made are gone again.
func Create(ctx context.Context, path string, o CreateOptions) (err error) {
	t := blk.NewTask()
	if o.Check != nil {
		if err := o.Check(path); err != nil {
			return err
		}
	}
	behind, err := o.complete(t, path)
	if err == nil && o.Existing {
		err = o.distinct(path, behind)
	}
	if err != nil {
		return fmt.Errorf("create image %q: %w", path, err)
	}
	var made []string
	defer func() {
		if err == nil {
			return
		}
		for _, p := range made {
			err = errors.Join(err, os.Remove(p))
		}
	}()
	f, err := o.storage(t, path, o.Format != Raw, &made)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	switch o.Format {
	case Raw:
		return makeRaw(ctx, t, f, o.Size, o.Preallocation)
	case AddCow:
		return o.makeAddCow(ctx, t, path, f, &made)
	}
	if o.DataFile != "" {
		if err := o.makeDataFile(ctx, t, path, &made); err != nil {
			return err
		}
		if o.Preallocation == preallocFalloc || o.Preallocation == preallocFull {
			o.Preallocation = preallocMetadata // the data has its space
		}
	}
	if err := qcow2.Create(t, f, o.CreateOptions); err != nil {
		return fmt.Errorf("create image %q: %w", path, err)
	}
	return flush(t, f)
}

// complete checks the options and finds out the size. It returns the files behind the image, as far as they are looked at.
func (o *CreateOptions) complete(t *blk.Task, path string) (behind []string, err error) {
	if o.ImageFile != "" && o.Format != AddCow {
		return nil, fmt.Errorf("an image file is a property of add-cow images: %w", blk.ErrInvalid)
	}
	switch o.Format {
	case Qcow2:
	case AddCow:
		q := qcow2.CreateOptions{Size: o.Size, BackingFile: o.BackingFile, BackingFormat: o.BackingFormat, ClusterSize: o.ClusterSize}
		switch {
		case q != o.CreateOptions:
			return nil, fmt.Errorf("an add-cow image has no other properties than its files and the size of clusters: %w", blk.ErrInvalid)
		case o.ImageFile == "":
			return nil, fmt.Errorf("an add-cow image needs an image file for its data: %w", blk.ErrInvalid)
		case o.BackingFile == "":
			return nil, fmt.Errorf("an add-cow image without a backing file is of no use: take the raw image by itself: %w", blk.ErrInvalid)
		}
	case Raw:
		q := o.CreateOptions
		q.Size, q.Preallocation = 0, ""
		if q != (qcow2.CreateOptions{}) {
			return nil, fmt.Errorf("a raw image has no other properties than its size and preallocation: %w", blk.ErrInvalid)
		}
	default:
		return nil, fmt.Errorf("%q: %w (there are raw, qcow2 and add-cow)", o.Format, ErrFormat)
	}
	if o.BackingFile == "" && o.BackingFormat != "" {
		return nil, fmt.Errorf("a backing format without a backing file: %w", blk.ErrInvalid)
	}
	if o.BackingFile != "" && !o.Unopened {
		var size int64
		if size, behind, err = o.backing(t, path); err != nil {
			return nil, err
		}
		if o.Size < 0 {
			o.Size = size
		}
	}
	if o.Size < 0 {
		return nil, fmt.Errorf("no size is given: %w", blk.ErrInvalid)
	}
	if o.Size > maxSize {
		return nil, fmt.Errorf("a size of %d bytes, more than %d: %w", o.Size, int64(maxSize), blk.ErrInvalid)
	}
	o.Size = roundUp(o.Size, blk.SectorSize)
	return behind, nil
}

// maxSize is what fits a file's offset, in whole sectors.
const maxSize = 1<<63 - blk.SectorSize

// backing opens the whole chain once: a name or format that does not fit shows now and not when a guest starts. It
// returns the size and the files.
func (o *CreateOptions) backing(t *blk.Task, path string) (size int64, files []string, err error) {
	resolved, err := Resolve(path, o.BackingFile)
	if err != nil {
		return 0, nil, fmt.Errorf("backing file %w", err)
	}
	if o.BackingFormat == "" {
		return 0, nil, fmt.Errorf("backing file %q has no format given, and %w", o.BackingFile, ErrNoFormat)
	}
	b, err := Open(t, resolved, o.BackingFormat, Options{ReadOnly: true, Check: o.Check})
	if err != nil {
		return 0, nil, err
	}
	for _, m := range b.Chain {
		files = append(files, m.Path)
		if m.DataFile != "" {
			files = append(files, m.DataFile)
		}
	}
	size = b.Root.Info().Size
	return size, files, b.Close()
}

// distinct refuses files of which one is another one. What is there already is emptied, so this comes before.
func (o *CreateOptions) distinct(path string, behind []string) error {
	names := []string{o.ImageFile, o.DataFile}
	if o.Unopened {
		names = append(names, o.BackingFile)
	}
	files := append([]string{path}, behind...)
	for _, name := range names {
		if name == "" {
			continue
		}
		f, err := Resolve(path, name)
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	seen := &identities{}
	for _, f := range files {
		if err := seen.add(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// storage opens the empty file that becomes the image, made now or by someone else.
func (o *CreateOptions) storage(t *blk.Task, path string, grows bool, made *[]string) (*file.Node, error) {
	if !o.Existing {
		if err := file.Create(path, 0); err != nil {
			return nil, err
		}
		*made = append(*made, path)
	}
	f, err := file.Open(path, file.Options{Grows: grows})
	if err != nil {
		return nil, err
	}
	if err := f.Resize(t, 0, true); err != nil && !errors.Is(err, blk.ErrNotSupported) { // a device keeps its size
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// makeDataFile makes the external data file, of the disk's size from the start.
func (o *CreateOptions) makeDataFile(ctx context.Context, t *blk.Task, path string, made *[]string) error {
	resolved, err := Resolve(path, o.DataFile)
	if err != nil {
		return fmt.Errorf("create image %q: data file %w", path, err)
	}
	if o.Check != nil {
		if err := o.Check(resolved); err != nil {
			return err
		}
	}
	f, err := o.storage(t, resolved, false, made)
	if err != nil {
		return err
	}
	prealloc := o.Preallocation
	if prealloc == preallocMetadata {
		prealloc = preallocOff
	}
	return errors.Join(makeRaw(ctx, t, f, o.Size, prealloc), f.Close())
}

// makeAddCow makes the image file, unless there is one, and then the bitmap for it.
func (o *CreateOptions) makeAddCow(ctx context.Context, t *blk.Task, path string, f *file.Node, made *[]string) error {
	fail := func(err error) error { return fmt.Errorf("create image %q: %w", path, err) }
	resolved, err := Resolve(path, o.ImageFile)
	if err != nil {
		return fail(fmt.Errorf("image file %w", err))
	}
	behind, err := Resolve(path, o.BackingFile)
	if err != nil {
		return fail(fmt.Errorf("backing file %w", err))
	}
	if o.Check != nil {
		if err := o.Check(resolved); err != nil {
			return err
		}
	}
	err = file.Create(resolved, 0)
	missing := err == nil
	if missing {
		*made = append(*made, resolved)
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	seen := &identities{}
	for _, p := range []string{path, behind, resolved} {
		if err := seen.add(p); err != nil {
			return fail(err)
		}
	}
	img, err := file.Open(resolved, file.Options{})
	if err != nil {
		return err
	}
	if missing {
		err = makeRaw(ctx, t, img, o.Size, preallocOff)
	}
	have := img.Info().Size
	if err = errors.Join(err, img.Close()); err != nil {
		return err
	}
	if have < o.Size {
		return fail(fmt.Errorf("the image file %q has %d bytes, %d are needed: %w", resolved, have, o.Size, blk.ErrInvalid))
	}
	err = addcow.Create(t, f, have, addcow.CreateOptions{
		BackingFile: o.BackingFile, BackingFormat: o.BackingFormat, ImageFile: o.ImageFile, ImageFormat: Raw, ClusterSize: o.ClusterSize,
	})
	if err != nil {
		return fail(err)
	}
	return flush(t, f)
}

// makeRaw gives an empty file its size, and space if that is asked for.
func makeRaw(ctx context.Context, t *blk.Task, f *file.Node, size int64, prealloc string) error {
	err := f.Resize(t, size, false)
	if errors.Is(err, blk.ErrNotSupported) && f.Info().Size >= size {
		err = nil // a device that is large enough
	}
	if err != nil {
		return err
	}
	switch prealloc {
	case "", preallocOff:
	case preallocFalloc:
		if size == 0 {
			break
		}
		x, _ := f.TryMap(blk.OpFlush, 0, 0) // always gives the file
		if err := t.Fallocate(x.Host, 0, 0, size); err != nil {
			return fmt.Errorf("allocate space for %q: %w", f.Info().Name, err)
		}
	case preallocFull:
		err := sweep(ctx, size, sweepStep, nil, nil, func(t *blk.Task, off, n int64) error {
			return write(t, f, zeros(n), off)
		})
		if err != nil {
			return err
		}
	default:
		return fmt.Errorf("preallocation %q of a raw image: %w", prealloc, blk.ErrInvalid)
	}
	return flush(t, f)
}
