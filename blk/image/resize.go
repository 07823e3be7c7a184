// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// ErrShrink: a resize would make a disk smaller and was not allowed to.
var ErrShrink = errors.New("that would cut data off")

// Resize makes a disk larger or, if shrink is set, smaller: n bytes for sign "", or by n for "+" and "-". New space
// reads as zeros, even over a longer backing image.
func Resize(t *blk.Task, path, format, sign string, n int64, shrink bool) (err error) {
	g, err := Open(t, path, format, Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.Close()) }()
	old := g.Root.Info().Size
	size := n
	switch sign {
	case "+":
		size = old + n
	case "-":
		size = old - n
	}
	if size < 0 || size > maxSize { // overflow too
		return fmt.Errorf("resize %q, which has %d bytes, by %s%d: %w", path, old, sign, n, blk.ErrInvalid)
	}
	size = roundUp(size, blk.SectorSize)
	if size < old && !shrink {
		return fmt.Errorf("resize %q to %d bytes: %w, it has %d", path, size, ErrShrink, old)
	}
	r, ok := g.Root.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return fmt.Errorf("resize %q: an add-cow image has the size of its image file: %w", path, blk.ErrNotSupported)
	}
	if err := r.Resize(t, size, shrink); err != nil {
		return err
	}
	return flush(t, g.Root)
}
