// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"

	"github.com/blkstream/blkstream/blk"
)

// Difference of two disks.
type Difference struct {
	Same   bool
	Offset int64 // the first byte that differs, if not Same
}

// Compare compares what two disks read as. The longer one must have zeros where the shorter one has ended.
func Compare(ctx context.Context, a, b blk.Node, progress Progress) (Difference, error) {
	t := blk.NewTask()
	size := max(a.Info().Size, b.Info().Size)
	bufA, bufB := make([]byte, sweepStep), make([]byte, sweepStep)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return Difference{}, err
		}
		if progress != nil {
			progress(off, size)
		}
		zeroA, err := zeroRun(t, a, off, size-off)
		if err != nil {
			return Difference{}, err
		}
		zeroB, err := zeroRun(t, b, off, size-off)
		if err != nil {
			return Difference{}, err
		}
		if n := min(zeroA, zeroB); n > 0 {
			off += n
			continue
		}
		n := min(sweepStep-off%sweepStep, size-off)
		errA, errB := t.Par(
			func(t *blk.Task) error { return read(t, a, bufA[:n], off) },
			func(t *blk.Task) error { return read(t, b, bufB[:n], off) })
		if errA != nil {
			return Difference{}, errA
		}
		if errB != nil {
			return Difference{}, errB
		}
		if !bytes.Equal(bufA[:n], bufB[:n]) {
			for i := range n {
				if bufA[i] != bufB[i] {
					return Difference{Offset: off + i}, nil
				}
			}
		}
		off += n
	}
	if progress != nil {
		progress(size, size)
	}
	return Difference{Same: true}, nil
}
