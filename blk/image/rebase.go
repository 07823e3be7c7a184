// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// RebaseOptions of Rebase.
type RebaseOptions struct {
	// Backing is the new backing image as the image shall name it; empty: none from now on.
	Layer
	// Unsafe changes the name only. What the disk reads as changes, unless the images are the same by contents.
	// With it, and KeepName set, only the format changes.
	Unsafe, KeepName bool
	Check            func(path string) error
	Progress         Progress

	storage func(*file.Node) blk.Node // see Options.Storage
}

// Rebase gives the qcow2 image at path another backing image. Unless it is unsafe, what the old one shows through and
// the new one does not is copied into the image first: the disk reads as before. An image with internal snapshots is
// refused then: what these show is not copied.
func Rebase(ctx context.Context, path string, o RebaseOptions) error {
	if !o.KeepName && o.Path != "" && o.Format == "" {
		return fmt.Errorf("rebase %q: backing file %q has no format given, and %w", path, o.Path, ErrNoFormat)
	}
	t := blk.NewTask()
	if o.Unsafe {
		return rename(t, path, o)
	}
	next, err := openNext(t, path, o)
	if err != nil {
		return err
	}
	if next != nil {
		defer next.Close() //nolint:errcheck // nothing was written
	}
	r := rebaser{}
	g, err := open(t, path, Qcow2, Options{Check: o.Check, Storage: o.storage}, func(g *Image) blk.Node {
		if g.Lower != nil {
			r.old = g.Lower
		}
		var disk blk.Node
		if next != nil {
			disk = next.Root
		}
		r.next = newPadded(disk, g.Chain[0].Header.Size)
		return r.next
	})
	if err != nil {
		return err
	}
	r.top, r.piece = g.Root, g.Chain[0].Header.ClusterSize()
	if g.Chain[0].Header.SnapshotCount > 0 { // what they show would have to be copied, too
		err = fmt.Errorf("rebase %q: it has internal snapshots, which need the images behind it: %w", path, blk.ErrNotSupported)
	} else {
		err = r.rebase(ctx, t, g, o)
	}
	if cerr := g.Close(); err == nil {
		err = cerr
	}
	return err
}

// openNext opens the new backing image; nil: there is none.
func openNext(t *blk.Task, path string, o RebaseOptions) (*Image, error) {
	if o.Path == "" {
		return nil, nil
	}
	resolved, err := o.resolve(path)
	if err != nil {
		return nil, err
	}
	next, err := Open(t, resolved, o.Format, Options{ReadOnly: true, Check: o.Check})
	if err != nil {
		return nil, fmt.Errorf("rebase %q: %w", path, err)
	}
	if next.Uses(path) { // and would be found in use, by us
		err := fmt.Errorf("rebase %q: it is behind %q: %w", path, resolved, ErrLoop)
		return nil, errors.Join(err, next.Close())
	}
	return next, nil
}

func (o *RebaseOptions) resolve(path string) (string, error) {
	resolved, err := Resolve(path, o.Path)
	if err != nil {
		return "", fmt.Errorf("rebase %q: backing file %w", path, err)
	}
	seen := &identities{}
	if err := seen.add(path); err != nil {
		return "", err
	}
	// With -u the file need not be there.
	if err := seen.add(resolved); errors.Is(err, ErrLoop) {
		return "", fmt.Errorf("rebase %q: backing file %w", path, err)
	}
	return resolved, nil
}

// rename does not look behind the image.
func rename(t *blk.Task, path string, o RebaseOptions) (err error) {
	if o.Check != nil {
		if err := o.Check(path); err != nil {
			return err
		}
	}
	g := &Image{}
	defer func() {
		if cerr := g.Close(); err == nil {
			err = cerr
		}
	}()
	if err := g.openFiles(t, Layer{path, Qcow2}, Options{Check: o.Check}, false); err != nil {
		return err
	}
	if o.KeepName {
		o.Path = g.Chain[0].Header.BackingFile
		if o.Path == "" {
			return fmt.Errorf("rebase %q: it has no backing file whose format could be set: %w", path, blk.ErrInvalid)
		}
	}
	if o.Path != "" {
		if _, err := o.resolve(path); err != nil {
			return err
		}
	}
	if err := g.openNode(t, 0, Options{}, nil); err != nil {
		return err
	}
	return g.setBacking(t, nil, o.Layer)
}

func (g *Image) setBacking(t *blk.Task, node blk.Node, l Layer) error {
	n, ok := g.Chain[0].Node.(*qcow2.Node)
	if !ok {
		return fmt.Errorf("image %q: a %s image has no backing image: %w", g.Chain[0].Path, g.Chain[0].Format, blk.ErrInvalid)
	}
	if l.Path == "" {
		l.Format = ""
	}
	if err := n.SetBacking(t, node, l.Path, l.Format); err != nil {
		return fmt.Errorf("image %q: %w", g.Chain[0].Path, err)
	}
	return flush(t, n)
}

// rebaser copies from the old backing image, which may be nil, what the new one has not.
//
// While it does, the image is opened over the new one: where that is not zeros, zeros are stored. What is not copied is
// the same in both, so that it does not matter which one fills up a cluster that is written in part, nor which one
// the header names if this is cut off.
type rebaser struct {
	top, old, next blk.Node
	piece          int64 // the image's cluster
}

func (r *rebaser) rebase(ctx context.Context, t *blk.Task, g *Image, o RebaseOptions) error {
	if err := sweep(ctx, r.top.Info().Size, sweepStep, o.Progress, r.skip, r.copy); err != nil {
		return fmt.Errorf("rebase %q: %w", g.Chain[0].Path, err)
	}
	// The copies before the name that makes them needed.
	if err := flush(t, r.top); err != nil {
		return err
	}
	return g.setBacking(t, r.next, o.Layer)
}

// skip leaves out what the image holds itself, and what both backing images have from the same place of a file.
func (r *rebaser) skip(t *blk.Task, off int64) (int64, error) {
	size := r.top.Info().Size
	x, err := r.top.Map(t, off, size-off)
	if err != nil {
		return 0, err
	}
	if held(x) {
		return x.Len, nil
	}
	n := x.Len
	was, lw, err := place(t, r.old, off, n)
	if err != nil {
		return 0, err
	}
	will, ln, err := place(t, r.next, off, n)
	if err != nil || was != will {
		return 0, err
	}
	return min(lw, ln), nil
}

// held says whether the image itself decides what is there: what is behind it is deeper, to its end and beyond.
func held(x blk.Extent) bool { return x.Depth == 0 && x.State != blk.Unallocated }

// at is a place in a file, by path: two openings of a file are two host files.
type at struct {
	zero bool
	path string
	off  int64
}

// place says where the data is, and for how many bytes that counts: none if it cannot be said.
func place(t *blk.Task, n blk.Node, off, l int64) (at, int64, error) {
	if n == nil || off >= n.Info().Size {
		return at{zero: true}, l, nil
	}
	x, err := n.Map(t, off, min(l, n.Info().Size-off))
	switch {
	case err != nil:
		return at{}, 0, err
	case x.State == blk.Zero || x.State == blk.Unallocated:
		return at{zero: true}, x.Len, nil
	case x.State == blk.Data && x.Host != nil:
		return at{path: x.Host.Path, off: x.HostOff}, x.Len, nil
	default:
		return at{}, 0, nil
	}
}

func (r *rebaser) copy(t *blk.Task, off, n int64) error {
	was, will := blk.GetBuffer(int(n)), blk.GetBuffer(int(n))
	defer was.Free()
	defer will.Free()
	if err := read(t, r.old, was.B, off); err != nil {
		return err
	}
	if err := read(t, r.next, will.B, off); err != nil {
		return err
	}
	for from := int64(0); from < n; {
		l, held, err := r.run(t, off+from, min(r.piece-(off+from)%r.piece, n-from))
		if err != nil {
			return err
		}
		// All of a cluster that the image does not hold: what is written in part is filled up from the new image.
		part := was.B[from : from+l]
		if !held && !bytes.Equal(part, will.B[from:from+l]) {
			if blk.IsZero(part) {
				err = writeZeroes(t, r.top, off+from, l)
			} else {
				err = write(t, r.top, part, off+from)
			}
			if err != nil {
				return err
			}
		}
		from += l
	}
	return nil
}

// run says for how many of l bytes the image holds all or nothing.
func (r *rebaser) run(t *blk.Task, off, l int64) (n int64, has bool, err error) {
	for n < l {
		x, err := r.top.Map(t, off+n, l-n)
		if err != nil {
			return 0, false, err
		}
		if n > 0 && held(x) != has {
			break
		}
		has = held(x)
		n += x.Len
	}
	return n, has, nil
}
