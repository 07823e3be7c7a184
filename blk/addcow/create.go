// SPDX-License-Identifier: Apache-2.0

package addcow

import (
	"fmt"
	"math/bits"

	"github.com/blkstream/blkstream/blk"
)

// CreateOptions of Create. Names are stored as they are.
type CreateOptions struct {
	BackingFile, BackingFormat string // empty: none; what the image file does not hold reads as zeros then
	ImageFile, ImageFormat     string
	ClusterSize                int64 // bytes; 0: DefaultClusterSize
}

// Create makes storage, which is empty, the add-cow file of an image file of size bytes that holds nothing of the disk
// yet. It does not flush.
func Create(t *blk.Task, storage blk.Node, size int64, o CreateOptions) error {
	if o.ClusterSize == 0 {
		o.ClusterSize = DefaultClusterSize
	}
	if o.ClusterSize < MinClusterSize || o.ClusterSize > MaxClusterSize || bits.OnesCount64(uint64(o.ClusterSize)) != 1 {
		return fmt.Errorf("clusters of %d bytes: a power of two from 4K to 2M is wanted: %w", o.ClusterSize, blk.ErrInvalid)
	}
	h := Header{
		BackingFile: o.BackingFile, BackingFormat: o.BackingFormat, ImageFile: o.ImageFile, ImageFormat: o.ImageFormat,
		ClusterBits: uint(bits.TrailingZeros64(uint64(o.ClusterSize))), Size: max(minHeader, o.ClusterSize),
	}
	head, err := h.encode()
	if err != nil {
		return err
	}
	bitmap, err := h.bitmapSize(size)
	if err != nil {
		return err
	}
	if err := grow(t, storage, h.Size+bitmap); err != nil {
		return err
	}
	return writeBlocks(t, storage, head)
}

// grow makes the file at least size bytes long.
func grow(t *blk.Task, storage blk.Node, size int64) error {
	if storage.Info().Size >= size {
		return nil
	}
	r, ok := storage.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return fmt.Errorf("%s has %d bytes, %d are needed: %w", storage.Info().Name, storage.Info().Size, size, blk.ErrNotSupported)
	}
	return r.Resize(t, size, false)
}

// writeBlocks writes the head of the file, filled up to whole blocks with zeros.
func writeBlocks(t *blk.Task, storage blk.Node, head []byte) error {
	buf := blk.GetBuffer(int(up(int64(len(head)), block)))
	defer buf.Free()
	clear(buf.B[copy(buf.B, head):])
	return writeAt(t, storage, buf.B, 0)
}

func writeAt(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}
