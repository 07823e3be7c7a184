// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Segment says where a range of the disk comes from. The JSON keys, and what they mean, are those of qemu-img map.
type Segment struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`   // images in front of the one that decides
	Present    bool   `json:"present"` // that image holds it; otherwise none does
	Zero       bool   `json:"zero"`    // reads as zeros
	Data       bool   `json:"data"`    // it is stored as data; with Zero, in a hole of the file
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"` // in File, if it has a place there as it is
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
	m := &mapper{g.Chain, map[*Member]bool{}}
	var have Segment
	for off := int64(0); off < g.Chain[0].Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		s, err := m.segment(t, off)
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
func (m *mapper) segment(t *blk.Task, off int64) (Segment, error) {
	n := m.chain[0].Size - off
	for i := range m.chain {
		s, held, err := m.at(t, i, off, n)
		if err != nil {
			return Segment{}, err
		}
		n = s.Length
		if !held && i+1 < len(m.chain) && off < m.chain[i+1].Size {
			n = min(n, m.chain[i+1].Size-off)
			continue
		}
		s.Start, s.Depth, s.Present = off, i, held
		s.Zero = s.Zero || !held
		return s, nil
	}
	panic("unreachable: the last image has none behind it")
}

// mapper maps a chain.
type mapper struct {
	chain []*Member
	holes map[*Member]bool // whether what is data to a qcow2 image may be holes of the file
}

// at says how image i stores the beginning of a range, and whether it holds it.
func (m *mapper) at(t *blk.Task, i int, off, n int64) (s Segment, held bool, err error) {
	c := m.chain[i]
	if q, ok := c.Node.(*qcow2.Node); ok {
		return m.inQcow2(t, c, q, off, n)
	}
	x, err := c.Node.Map(t, off, n)
	if err != nil {
		return s, false, err
	}
	s = Segment{Length: x.Len, Zero: x.State == blk.Zero, Data: x.State == blk.Data}
	switch {
	case x.Host != nil:
		s.Offset, s.File = &x.HostOff, x.Host.Path
	case c.Format == Raw:
		s.Offset, s.File = &off, c.Path
	}
	return s, x.State != blk.Unallocated, nil
}

func (m *mapper) inQcow2(t *blk.Task, c *Member, q *qcow2.Node, off, n int64) (s Segment, held bool, err error) {
	p, err := q.Locate(t, off, n)
	if err != nil {
		return s, false, err
	}
	f := c.files[len(c.files)-1] // with the data
	s = Segment{Length: p.Len, Zero: p.State == blk.Zero}
	if p.Host >= 0 {
		s.Offset, s.File = &p.Host, f.Info().Name
	}
	switch p.State {
	case blk.Encoded:
		s.Data, s.Compressed, s.File = true, true, c.Path
	case blk.Data:
		s.Data = true
		if m.mayHaveHoles(t, c) {
			s.Zero, s.Length, err = hole(t, f, p.Host, p.Len)
		}
	case blk.Zero, blk.Unallocated:
	}
	return s, p.State != blk.Unallocated, err
}

// mayHaveHoles saves a look at each cluster's place. An image that does not say has none: what follows is not wrong.
func (m *mapper) mayHaveHoles(t *blk.Task, c *Member) bool {
	may, known := m.holes[c]
	if !known {
		if taken, err := Allocated(c.Path); err == nil {
			may, err = qcow2.HasHoles(t, c.files[0], c.Header, taken)
			may = may && err == nil
		}
		m.holes[c] = may
	}
	return may
}

// hole says whether a part of a file is a hole, and how much of it is the same. Behind the end of the file all is.
func hole(t *blk.Task, f *file.Node, off, n int64) (is bool, l int64, err error) {
	size := f.Info().Size
	if off >= size {
		return true, n, nil
	}
	x, err := f.Map(t, off, n)
	if err != nil {
		return false, 0, err
	}
	if is = x.State == blk.Zero; is && off+x.Len == size {
		return true, n, nil
	}
	return is, x.Len, nil
}
