// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/blkstream/blkstream/blk"
)

var errRefTable = fmt.Errorf("qcow2: rebuild the reference counts: a table of more than %d bytes: %w", maxRefTableBytes, ErrTooLarge)

// rebuildRefcounts writes a new refcount table with new blocks behind the end of the file, and makes the header point
// there when all of it is on stable storage. A crash before leaves the old ones in use, and the file longer. The old
// ones are free space afterwards.
func rebuildRefcounts(t *blk.Task, storage blk.Node, window int64, watch Watch) error {
	c, err := newChecker(t, storage, RepairAll, window, watch)
	if err != nil {
		return err
	}
	defer c.table.Free()
	c.noRefs = true
	per := int64(1) << c.h.refBlockBits()
	if 8*(c.end/per) >= maxRefTableBytes {
		return errRefTable
	}
	var (
		table []byte
		next  = c.end       // the cluster for the next block
		last  = c.end / per // the first block that the new ones themselves are counted in
	)
	entry := func(block int64) {
		for int64(len(table)) <= 8*block {
			table = append(table, make([]byte, 8)...)
		}
		binary.BigEndian.PutUint64(table[8*block:], uint64(next)<<c.h.ClusterBits)
		next++
	}
	write := func(block int64) error {
		if err := growTo(c.t, c.storage, (next+1)<<c.h.ClusterBits); err != nil {
			return err
		}
		if err := c.write(c.table.B, next<<c.h.ClusterBits); err != nil {
			return err
		}
		entry(block)
		return nil
	}
	for lo := int64(0); lo < c.end; lo += c.window {
		if err := c.countAll(lo); err != nil {
			return err
		}
		for block := lo / per; block < min((lo+c.window)/per, last); block++ {
			first := block * per
			if c.refs.next(first) >= first+per {
				continue
			}
			if err := c.fillBlock(first, 0, 0); err != nil {
				return err
			}
			if err := write(block); err != nil {
				return fmt.Errorf("qcow2: write a refcount block: %w", err)
			}
		}
	}
	// From here on what is written counts itself: blocks from last on, then the table.
	end, blocks, tableClusters := next, int64(0), int64(0)
	for {
		blocks = (end-1)/per - last + 1
		tableClusters = roundUp(8*(last+blocks), c.h.ClusterSize()) >> c.h.ClusterBits
		if more := next + blocks + tableClusters; more > end {
			end = more
			continue
		}
		break
	}
	if tableClusters<<c.h.ClusterBits > maxRefTableBytes {
		return errRefTable
	}
	from := c.end
	for block := last; block < last+blocks; block++ {
		if err := c.fillBlock(block*per, from, end); err != nil {
			return err
		}
		if err := write(block); err != nil {
			return fmt.Errorf("qcow2: write a refcount block: %w", err)
		}
	}
	at := next << c.h.ClusterBits
	table = append(table, make([]byte, tableClusters<<c.h.ClusterBits-int64(len(table)))...)
	if err := growTo(c.t, c.storage, end<<c.h.ClusterBits); err != nil {
		return fmt.Errorf("qcow2: write the refcount table: %w", err)
	}
	if err := c.write(table, at); err != nil {
		return fmt.Errorf("qcow2: write the refcount table: %w", err)
	}
	return changeHeader(c.t, c.storage, func(b []byte) {
		binary.BigEndian.PutUint64(b[48:], uint64(at))
		binary.BigEndian.PutUint32(b[56:], uint32(tableClusters))
	})
}

// fillBlock puts into c.table the references to the clusters from first on, and 1 for those in [from, to).
func (c *checker) fillBlock(first, from, to int64) error {
	b := c.table.B
	clear(b)
	per := int64(1) << c.h.refBlockBits()
	for cl := c.refs.next(first); cl < first+per && c.refs.has(cl); cl = c.refs.next(cl + 1) {
		n := c.refs.get(cl)
		if n > c.h.maxRefcount() {
			return fmt.Errorf("qcow2: rebuild the reference counts: %d references to the cluster at %#x, and reference counts of %d bits: %w",
				n, cl<<c.h.ClusterBits, c.h.RefcountBits(), ErrTooLarge)
		}
		putCount(b, c.h.RefcountOrder, cl-first, n)
	}
	for cl := max(first, from); cl < min(first+per, to); cl++ {
		putCount(b, c.h.RefcountOrder, cl-first, 1)
	}
	return nil
}

// clearBits clears the dirty and the corrupt bit of an image without errors.
func clearBits(t *blk.Task, storage blk.Node) error {
	h, err := ReadHeader(t, storage)
	if err != nil {
		return err
	}
	clean := h.Incompatible &^ (IncompatDirty | IncompatCorrupt)
	if clean == h.Incompatible {
		return nil
	}
	return changeHeader(t, storage, func(b []byte) { binary.BigEndian.PutUint64(b[72:], clean) })
}

// growTo makes the storage at least size bytes long.
func growTo(t *blk.Task, storage blk.Node, size int64) error {
	in := storage.Info()
	if in.Size >= size {
		return nil
	}
	r, ok := storage.(resizer)
	if !ok {
		return fmt.Errorf("%s has %d bytes and cannot grow to %d: %w", in.Name, in.Size, size, syscall.ENOSPC)
	}
	err := r.Resize(t, roundUp(size, max(in.Align, blk.SectorSize)), false)
	if errors.Is(err, blk.ErrNotSupported) { // a block device
		return fmt.Errorf("%s has %d bytes and cannot grow to %d: %w", in.Name, in.Size, size, syscall.ENOSPC)
	}
	return err
}

// changeHeader changes fixed fields of the header, at once and durably, after everything before is durable.
func changeHeader(t *blk.Task, storage blk.Node, fn func(b []byte)) error {
	if err := blk.Do(t, storage, &blk.Request{Op: blk.OpFlush}); err != nil {
		return err
	}
	buf := blk.GetBuffer(blk.SectorSize)
	defer buf.Free()
	if err := readFull(t, storage, buf.B, 0); err != nil {
		return fmt.Errorf("qcow2: read header: %w", err)
	}
	fn(buf.B)
	if err := writeFull(t, storage, buf.B, 0); err != nil {
		return fmt.Errorf("qcow2: write header: %w", err)
	}
	return blk.Do(t, storage, &blk.Request{Op: blk.OpFlush})
}
