// SPDX-License-Identifier: Apache-2.0

package image

import "github.com/blkstream/blkstream/blk"

// padded is a disk with zeros behind its end, so that the image in front of it never has to make any up there. It
// does not own the disk.
type padded struct {
	disk blk.Node
	info blk.Info
}

// newPadded makes the disk at least size bytes long.
func newPadded(disk blk.Node, size int64) *padded {
	in := *disk.Info()
	in.Kind, in.ReadOnly, in.Discard = "padded", true, false
	in.Size = max(in.Size, roundUp(size, blk.SectorSize))
	return &padded{disk, in}
}

// Info implements blk.Node.
func (p *padded) Info() *blk.Info { return &p.info }

// TryMap implements blk.Node.
func (p *padded) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	size := p.disk.Info().Size
	switch {
	case op != blk.OpRead || off < 0 || l <= 0 || off >= p.info.Size:
		return blk.Extent{}, false
	case off >= size:
		return blk.Extent{Len: min(l, p.info.Size-off), State: blk.Zero}, true
	default:
		return p.disk.TryMap(op, off, min(l, size-off))
	}
}

// Map implements blk.Node.
func (p *padded) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	size := p.disk.Info().Size
	if off >= size && off < p.info.Size && l > 0 {
		return blk.Extent{Len: min(l, p.info.Size-off), State: blk.Zero}, nil
	}
	return p.disk.Map(t, off, min(l, size-off))
}

// Do implements blk.Node.
func (p *padded) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
	case blk.OpFlush:
		return nil
	default:
		return blk.ErrNotSupported
	}
	have := max(0, min(r.Len, p.disk.Info().Size-r.Off))
	r.Data.AppendSlice(nil, have, r.Len-have).Zero()
	if have == 0 {
		return nil
	}
	v := r.Data.AppendSlice(nil, 0, have)
	return blk.Do(t, p.disk, &blk.Request{Op: blk.OpRead, Off: r.Off, Len: have, Data: v})
}

// Children implements blk.Node.
func (p *padded) Children() []blk.Node { return []blk.Node{p.disk} }

// Close implements blk.Node.
func (p *padded) Close() error { return nil }
