// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// read is OpRead: piece by piece.
func (n *Node) read(t *blk.Task, v blk.Vec, off int64) error {
	l := v.Len()
	for done := int64(0); done < l; {
		got, err := n.readPiece(t, v, done, off+done, l-done)
		if err != nil {
			return err
		}
		done += got
	}
	return nil
}

// readPiece reads the beginning of [off, off+l) into v from at on, and returns how much.
func (n *Node) readPiece(t *blk.Task, v blk.Vec, at, off, l int64) (int64, error) {
	for i := off >> n.l1Shift; ; {
		tab, err := n.table(t, i)
		if err != nil {
			return 0, err
		}
		got, err := n.readFrom(t, tab, v, at, off, l)
		if got > 0 || err != nil {
			return got, err
		}
	}
}

// readFrom reads a piece with what tab says, and unpins it. It returns 0 if that is not the table any more.
func (n *Node) readFrom(t *blk.Task, tab *table, v blk.Vec, at, off, l int64) (int64, error) {
	if tab != nil {
		defer n.cache.unpin(tab) // guest memory may fault
	}
	// What the table says stays in place until we leave.
	defer n.leave(n.enter(t))
	if !n.current(tab, off>>n.l1Shift) {
		return 0, nil
	}
	p, err := n.spanOf(t, tab, off, l)
	if err != nil {
		return 0, err
	}
	return p.len, n.readAs(t, p, v.AppendSlice(nil, at, p.len), off)
}

// current reports whether tab, which is pinned or nil, is the table of an L1 index.
func (n *Node) current(tab *table, i int64) bool {
	l1 := n.l1.Load()
	return l1.tables[i].Load() == tab && (tab != nil || l1.entry(i) == 0)
}

// readAs reads what lies at off into v, which is as long as p.
func (n *Node) readAs(t *blk.Task, p piece, v blk.Vec, off int64) error {
	switch p.kind {
	case kindData:
		return readClipped(t, n.data, v, p.host)
	case kindPacked:
		return n.readPacked(t, p, v)
	case kindBacking:
		if b := n.backing.Load().node; b != nil {
			return readClipped(t, b, v, off)
		}
		v.Zero()
		return nil
	case kindZero:
		v.Zero()
		return nil
	default:
		return fmt.Errorf("unknown kind of piece %d: %w", p.kind, blk.ErrInvalid) // not reachable
	}
}
