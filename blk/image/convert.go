// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// ConvertOptions of Convert.
type ConvertOptions struct {
	Target   CreateOptions // Size negative: that of the source
	Compress bool          // qcow2 only
	Progress Progress
}

// ErrPartial: a conversion into what was there already ended too early.
var ErrPartial = errors.New("the target is not complete, and what it held before is gone")

// Convert makes an image at path that reads as src does. What reads as zeros takes no space there; of a target with a
// backing image, what that reads as already. If it fails, the target is gone again, or if it existed before the
// error is an ErrPartial as well.
func Convert(ctx context.Context, src blk.Node, path string, o ConvertOptions) (err error) {
	c := &o.Target
	if c.Size < 0 {
		c.Size = src.Info().Size
	}
	if c.Size < src.Info().Size {
		return fmt.Errorf("a target of %d bytes for a source of %d: %w", c.Size, src.Info().Size, blk.ErrInvalid)
	}
	if c.Format == AddCow {
		return fmt.Errorf("an add-cow image as a target: convert to its image file, which is raw: %w", blk.ErrInvalid)
	}
	if o.Compress && c.Format != Qcow2 {
		return fmt.Errorf("a compressed %s image: %w", c.Format, blk.ErrInvalid)
	}
	if o.Compress {
		if err := c.CheckCompression(); err != nil {
			return err
		}
	}
	if err := Create(ctx, path, *c); err != nil {
		return err
	}
	defer func() {
		switch {
		case err == nil:
			return
		case c.Existing:
			err = fmt.Errorf("%w; %w: %s", err, ErrPartial, path)
			return
		}
		err = errors.Join(err, os.Remove(path))
		if c.DataFile != "" {
			data, _ := Resolve(path, c.DataFile) // Create has resolved it
			err = errors.Join(err, os.Remove(data))
		}
	}()
	t := blk.NewTask()
	g, err := Open(t, path, c.Format, Options{Check: c.Check})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	k := converter{src: src, dst: g.Root, step: sweepStep, piece: 4096}
	if h := g.Chain[0].Header; h != nil {
		k.piece = max(k.piece, h.ClusterSize())
		if o.Compress {
			k.packed, _ = g.Root.(*qcow2.Node)
			k.piece = h.ClusterSize()
		}
	}
	k.fresh = g.Lower == nil && !isDevice(path)
	if err := sweep(ctx, src.Info().Size, k.step, o.Progress, k.skip, k.copy); err != nil {
		return err
	}
	if !k.fresh {
		// The rest of a longer target is zeros too.
		if err := k.zero(t, src.Info().Size, g.Root.Info().Size); err != nil {
			return err
		}
	}
	return flush(t, g.Root)
}

func isDevice(path string) bool {
	fi, err := os.Stat(path)
	return err != nil || !fi.Mode().IsRegular()
}

type converter struct {
	src, dst blk.Node
	fresh    bool        // the target reads as zeros
	packed   *qcow2.Node // dst, if its clusters are to be compressed
	step     int64
	piece    int64 // what is zeros, or like the backing image, is left out in whole pieces of this many bytes
}

// skip leaves out what is known to be zeros in a target that has zeros.
func (k *converter) skip(t *blk.Task, off int64) (int64, error) {
	if !k.fresh {
		return 0, nil
	}
	return zeroRun(t, k.src, off, k.src.Info().Size-off)
}

// copy copies [off, off+n), the work of one worker: runs of pieces that need the same.
func (k *converter) copy(t *blk.Task, off, n int64) error {
	buf := blk.GetBuffer(int(n))
	defer buf.Free()
	if err := k.read(t, buf.B, off); err != nil {
		return err
	}
	var old []byte
	if !k.fresh {
		o := blk.GetBuffer(int(n))
		defer o.Free()
		old = o.B
		if err := read(t, k.dst, old, off); err != nil {
			return err
		}
	}
	need := func(at, l int64) bool {
		if k.fresh {
			return !blk.IsZero(buf.B[at : at+l])
		}
		return !bytes.Equal(buf.B[at:at+l], old[at:at+l])
	}
	for at := int64(0); at < n; {
		from, l := at, min(k.piece, n-at)
		at += l
		if !need(from, l) {
			continue
		}
		for k.packed == nil && at < n && need(at, min(k.piece, n-at)) {
			at += min(k.piece, n-at)
		}
		if err := k.write(t, buf.B[from:at], off+from); err != nil {
			return err
		}
	}
	return nil
}

// read does not read the holes of the source.
func (k *converter) read(t *blk.Task, b []byte, off int64) error {
	for len(b) > 0 {
		x, err := k.src.Map(t, off, int64(len(b)))
		if err != nil {
			return err
		}
		if x.State == blk.Zero || x.State == blk.Unallocated {
			clear(b[:x.Len])
		} else if err := read(t, k.src, b[:x.Len], off); err != nil {
			return err
		}
		b, off = b[x.Len:], off+x.Len
	}
	return nil
}

func (k *converter) write(t *blk.Task, b []byte, off int64) error {
	switch {
	case blk.IsZero(b):
		return writeZeroes(t, k.dst, off, int64(len(b)))
	case k.packed != nil:
		return k.packed.WriteCompressed(t, off, b)
	default:
		return write(t, k.dst, b, off)
	}
}

func (k *converter) zero(t *blk.Task, off, end int64) error {
	for off < end {
		n := min(end-off, 1<<30)
		if err := writeZeroes(t, k.dst, off, n); err != nil {
			return err
		}
		off += n
	}
	return nil
}
