// SPDX-License-Identifier: Apache-2.0

package image

import "github.com/blkstream/blkstream/blk"

// padded is a disk with zeros behind its end, so that the image in front of it never has to make any up there. It
// does not own the disk; nil: all of it is zeros.
type padded struct {
	disk blk.Node
	info blk.Info
}

// newPadded makes the disk at least size bytes long.
func newPadded(disk blk.Node, size int64) *padded {
	if disk == nil {
		return &padded{info: blk.Info{Kind: "padded", Size: roundUp(size, blk.SectorSize), Align: 1, ReadOnly: true}}
	}
	in := *disk.Info()
	in.Kind, in.ReadOnly, in.Discard = "padded", true, false
	in.Size = max(in.Size, roundUp(size, blk.SectorSize))
	return &padded{disk, in}
}

// Info implements blk.Node.
func (p *padded) Info() *blk.Info { return &p.info }

// size is how much of it is the disk's.
func (p *padded) size() int64 {
	if p.disk == nil {
		return 0
	}
	return p.disk.Info().Size
}

// TryMap never knows. The header of the image in front names another disk until all is done: where that is not zeros,
// data must be durable before its table is, though there are zeros here.
func (p *padded) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

// Map implements blk.Node.
func (p *padded) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	size := p.size()
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
	have := max(0, min(r.Len, p.size()-r.Off))
	r.Data.AppendSlice(nil, have, r.Len-have).Zero()
	if have == 0 {
		return nil
	}
	v := r.Data.AppendSlice(nil, 0, have)
	return blk.Do(t, p.disk, &blk.Request{Op: blk.OpRead, Off: r.Off, Len: have, Data: v})
}

// Children implements blk.Node.
func (p *padded) Children() []blk.Node {
	if p.disk == nil {
		return nil
	}
	return []blk.Node{p.disk}
}

// Close implements blk.Node.
func (p *padded) Close() error { return nil }
