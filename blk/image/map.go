// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"

	"github.com/blkstream/blkstream/blk"
)

// Segment says where a range of the disk comes from. The JSON keys, and what they mean, are those of qemu-img map.
type Segment struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`   // images in front of the one that decides
	Present    bool   `json:"present"` // that image holds it; otherwise none does
	Zero       bool   `json:"zero"`    // reads as zeros
	Data       bool   `json:"data"`    // has to be read
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"` // in File, if it lies there as it is
	File       string `json:"-"`
}

// Map calls fn for the segments of the disk, in order, each as long as possible.
func Map(ctx context.Context, path, format string, o Options, fn func(Segment) error) error {
	o.ReadOnly = true
	t := blk.NewTask()
	g, err := open(t, path, format, o, func(*Image) blk.Node { return nil })
	if err != nil {
		return err
	}
	defer g.Close() //nolint:errcheck // nothing was written
	var have Segment
	for off := int64(0); off < g.Chain[0].Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, err := g.segment(t, off)
		if err != nil {
			return err
		}
		off += s.Length
		switch {
		case have.Length == 0:
			have = s
		case have.continues(&s):
			have.Length += s.Length
		default:
			if err := fn(have); err != nil {
				return err
			}
			have = s
		}
	}
	if have.Length > 0 {
		return fn(have)
	}
	return nil
}

func (s *Segment) continues(next *Segment) bool {
	if (s.Offset == nil) != (next.Offset == nil) || s.Offset != nil && *s.Offset+s.Length != *next.Offset {
		return false
	}
	return s.Depth == next.Depth && s.Present == next.Present && s.Zero == next.Zero && s.Data == next.Data &&
		s.Compressed == next.Compressed && s.File == next.File
}

// segment asks each image by itself: the merged view would not say which one left something open.
func (g *Image) segment(t *blk.Task, off int64) (Segment, error) {
	n := g.Chain[0].Size - off
	for i, m := range g.Chain {
		x, err := m.Node.Map(t, off, n)
		if err != nil {
			return Segment{}, err
		}
		n = x.Len
		s := Segment{Start: off, Length: n, Depth: i, Present: true}
		switch x.State {
		case blk.Unallocated:
			if i+1 < len(g.Chain) && off < g.Chain[i+1].Size {
				n = min(n, g.Chain[i+1].Size-off)
				continue
			}
			s.Present, s.Zero = false, true
			return s, nil
		case blk.Zero:
			s.Zero = true
		case blk.Encoded:
			s.Data, s.Compressed, s.File = true, true, m.Path
			return s, nil
		default:
			s.Data = true
		}
		switch {
		case x.Host != nil:
			s.Offset, s.File = &x.HostOff, x.Host.Path
		case m.Format == Raw:
			s.Offset, s.File = &off, m.Path
		}
		return s, nil
	}
	panic("unreachable: the last image has none behind it")
}
