// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/blkstream/blkstream/blk"
)

// Changes of the header while the image is in use.

// Resize changes the size of the disk, a multiple of blk.SectorSize. New space reads as zeros. It only makes the disk
// smaller if shrink is set, and then nobody may use the part that goes.
func (n *Node) Resize(t *blk.Task, size int64, shrink bool) error {
	if err := n.resize(t, size, shrink); err != nil {
		return fmt.Errorf("resize %q to %d bytes: %w", n.name, size, err)
	}
	return nil
}

func (n *Node) resize(t *blk.Task, size int64, shrink bool) error {
	defer n.resizing.Lock(t)()
	if size != n.Info().Size {
		if err := n.checkBitmaps(t); err != nil { // before the ones that are up to date are marked
			return err
		}
	}
	if err := n.beginChange(t); err != nil {
		return err
	}
	h := n.Header()
	h.Size = n.Info().Size // all of the last sector is the guest's, whatever the header says
	switch {
	case size < 0 || size%blk.SectorSize != 0:
		return fmt.Errorf("not a multiple of %d: %w", blk.SectorSize, blk.ErrInvalid)
	case size < h.Size && !shrink:
		return fmt.Errorf("less than the %d it has: %w", h.Size, blk.ErrInvalid)
	case h.SnapshotCount > 0 && (size < h.Size || n.v2):
		return fmt.Errorf("the image has internal snapshots: %w", blk.ErrNotSupported)
	case size == h.Size:
		return nil
	case size < h.Size:
		return n.shrink(t, h, size)
	}
	return n.grow(t, h, size)
}

// checkBitmaps refuses to leave bitmaps behind that are of another size. Those in use mean nothing until they are stored
// anew.
func (n *Node) checkBitmaps(t *blk.Task) error {
	list, err := ReadBitmaps(t, n.storage, n.Header())
	if err != nil {
		return err
	}
	if slices.ContainsFunc(list, func(b Bitmap) bool { return !b.InUse }) {
		return fmt.Errorf("the image has persistent bitmaps: %w", blk.ErrNotSupported)
	}
	return nil
}

func (n *Node) grow(t *blk.Task, h *Header, size int64) error {
	if err := n.growL1(t, size); err != nil {
		return err
	}
	if n.dataFile {
		if err := growNode(t, &n.growData, n.data, size); err != nil {
			return err
		}
	}
	// What the last cluster held behind the old end, and the backing image.
	end := min(roundUp(h.Size, n.clusterSize()), size)
	if b := n.backing.Load().node; b != nil {
		end = max(end, min(b.Info().Size, size))
	}
	if h.Size < end {
		if err := n.zero(t, h.Size, end-h.Size, unmap); err != nil {
			return err
		}
	}
	return n.setSize(t, size)
}

func (n *Node) shrink(t *blk.Task, h *Header, size int64) error {
	// Whole clusters, or what is left behind the end would be there again when the disk grows. Nothing is seen there, so
	// a backing image may show.
	end := roundUp(h.Size, n.clusterSize())
	for off := roundUp(size, n.clusterSize()); off < end && !n.raw; {
		next := min(end, (off>>n.l1Shift+1)<<n.l1Shift)
		if err := n.zeroEntries(t, off, next, discard); err != nil {
			return err
		}
		n.tidy(t)
		off = next
	}
	if err := n.setSize(t, size); err != nil || !n.raw {
		return err
	}
	if r, ok := n.data.(resizer); ok {
		return r.Resize(t, roundUp(size, max(n.data.Info().Align, blk.SectorSize)), true)
	}
	return nil
}

func (n *Node) setSize(t *blk.Task, size int64) error {
	if err := n.sync(t); err != nil {
		return err
	}
	if err := n.writeHeader(t, func(h *Header) { h.Size = size }); err != nil {
		return err
	}
	n.setInfo(size)
	return nil
}

// growL1 makes the L1 table long enough for a disk of size bytes.
func (n *Node) growL1(t *blk.Task, size int64) error {
	need := (size-1)>>n.l1Shift + 1
	old := n.l1.Load()
	if need <= int64(len(old.entries)) {
		return nil
	}
	if need*8 > maxL1Bytes {
		return fmt.Errorf("an L1 table of %d bytes: %w", need*8, blk.ErrNotSupported)
	}
	clusters := roundUp(need*8, n.clusterSize()) >> n.clusterBits
	r, err := n.claimTable(t, clusters)
	if err != nil {
		return err
	}
	err = n.moveL1(t, need, r)
	if err != nil {
		n.release(refRun{r.host >> n.clusterBits, r.count, -1}) // the header may point there: only when settled
		return err
	}
	oldFirst, oldCount := old.host>>n.clusterBits, roundUp(int64(len(old.entries))*8, n.clusterSize())>>n.clusterBits
	n.mu.Lock()
	for c := range oldCount {
		delete(n.metadata, oldFirst+c)
	}
	for c := range clusters {
		n.metadata[r.host>>n.clusterBits+c] = struct{}{}
	}
	n.mu.Unlock()
	if oldCount > 0 {
		n.release(refRun{oldFirst, oldCount, -1})
	}
	return nil
}

// claimTable reserves neighbouring clusters.
func (n *Node) claimTable(t *blk.Task, clusters int64) (run, error) {
	if !n.canGrow() {
		r, err := n.allocate(t, clusters, 0)
		if err == nil && r.count < clusters {
			n.putBack(r)
			err = syscall.ENOSPC
		}
		return r, err
	}
	defer n.alloc.Lock(t)()
	if err := n.settle(t); err != nil {
		return run{}, err
	}
	return n.claim(t, n.storage.Info().Size>>n.clusterBits, clusters, math.MaxInt64)
}

// moveL1 writes a table of so many entries to its new place, and switches to it.
func (n *Node) moveL1(t *blk.Task, entries int64, r run) error {
	defer n.l1Lock.Lock(t)()
	old := n.l1.Load()
	buf := blk.GetBuffer(int(r.count << n.clusterBits))
	defer buf.Free()
	clear(buf.B)
	l1 := &l1Table{
		host: r.host, entries: make([]atomic.Uint64, entries), tables: make([]atomic.Pointer[table], entries),
	}
	for i := range old.entries {
		w := old.entries[i].Load()
		l1.entries[i].Store(w)
		binary.BigEndian.PutUint64(buf.B[8*i:], w&^damaged)
	}
	if err := n.writeMeta(t, buf.B, r.host); err != nil {
		return fmt.Errorf("write new L1 table: %w", err)
	}
	if err := n.syncStorage(t); err != nil {
		return err
	}
	if err := n.writeHeader(t, func(h *Header) { h.L1Offset, h.L1Size = r.host, uint32(entries) }); err != nil {
		return err
	}
	n.cache.mu.Lock()
	defer n.cache.mu.Unlock()
	for i := range old.tables {
		l1.tables[i].Store(old.tables[i].Load())
	}
	n.l1.Store(l1)
	return nil
}

// SetBacking makes node, whose name and format go into the header, the backing image; an empty name: none. It is
// durable when it returns. Nothing may be in flight. The old backing image is the caller's.
func (n *Node) SetBacking(t *blk.Task, node blk.Node, name, format string) error {
	if err := n.setBacking(t, node, name, format); err != nil {
		return fmt.Errorf("%s: change the backing file to %q: %w", n.name, name, err)
	}
	return nil
}

// Over puts node behind the image, as what its header names. Nothing may be in flight. The node that was there before is
// the caller's.
func (n *Node) Over(node blk.Node) { n.backing.Store(&backing{node, n.Header().BackingFile != ""}) }

func (n *Node) setBacking(t *blk.Task, node blk.Node, name, format string) error {
	if err := n.beginChange(t); err != nil {
		return err
	}
	if name != "" && n.raw {
		return fmt.Errorf("the data file is a raw image: %w", blk.ErrNotSupported)
	}
	// What the old one is not needed for any more must be durable.
	if err := n.sync(t); err != nil {
		return err
	}
	if err := n.Lost(); err != nil {
		return fmt.Errorf("what is behind the image may be needed: an earlier flush has failed, and parts of its tables may be lost; "+
			"it has to be closed and opened again first (%v)", err) //nolint:errorlint // room on the storage is no remedy
	}
	if err := n.writeHeader(t, func(h *Header) { h.BackingFile, h.BackingFormat = name, format }); err != nil {
		return err
	}
	n.backing.Store(&backing{node, name != ""})
	return nil
}
