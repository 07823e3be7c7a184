// SPDX-License-Identifier: Apache-2.0

// Package raw is the format without a format: the disk's bytes are the storage's bytes.
package raw

import (
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// Node is a raw disk over its storage.
type Node struct {
	child blk.Node
	info  atomic.Pointer[blk.Info] // replaced by Resize and Refresh while requests run
}

// Open puts a raw disk over child and owns it from then on. It does no I/O: a guest may write what it likes into a
// raw disk, so nothing in there is ever looked at.
func Open(child blk.Node) *Node {
	n := &Node{child: child}
	n.reload()
	return n
}

func (n *Node) reload() {
	in := *n.child.Info()
	in.Kind = "raw"
	n.info.Store(&in)
}

// Info describes the storage as a raw disk.
func (n *Node) Info() *blk.Info { return n.info.Load() }

// TryMap is the storage's.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	switch op {
	case blk.OpRead, blk.OpWrite, blk.OpFlush, blk.OpDiscard, blk.OpWriteZeroes:
		return n.child.TryMap(op, off, l)
	default:
		return blk.Extent{}, false
	}
}

// Map is the storage's.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return n.child.Map(t, off, l) }

// Do passes the request to the storage.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead, blk.OpWrite, blk.OpFlush, blk.OpDiscard, blk.OpWriteZeroes:
		return blk.Do(t, n.child, r)
	default:
		return blk.ErrNotSupported
	}
}

// Resize changes the size of the storage; see file.Node.Resize. blk.ErrNotSupported: the storage cannot.
func (n *Node) Resize(t *blk.Task, size int64, shrink bool) error {
	c, ok := n.child.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return blk.ErrNotSupported
	}
	err := c.Resize(t, size, shrink)
	n.reload()
	return err
}

// Refresh takes over the size that the storage has now; see file.Node.Refresh.
func (n *Node) Refresh() error {
	c, ok := n.child.(interface{ Refresh() error })
	if !ok {
		return blk.ErrNotSupported
	}
	err := c.Refresh()
	n.reload()
	return err
}

// Lock locks the storage; see file.Node.Lock. blk.ErrNotSupported: it has no locks.
func (n *Node) Lock() error {
	c, ok := n.child.(interface{ Lock() error })
	if !ok {
		return blk.ErrNotSupported
	}
	return c.Lock()
}

// Unlock unlocks the storage; see file.Node.Unlock.
func (n *Node) Unlock() error {
	c, ok := n.child.(interface{ Unlock() error })
	if !ok {
		return blk.ErrNotSupported
	}
	return c.Unlock()
}

// Children is the storage.
func (n *Node) Children() []blk.Node { return []blk.Node{n.child} }

// Close closes the storage.
func (n *Node) Close() error { return n.child.Close() }
