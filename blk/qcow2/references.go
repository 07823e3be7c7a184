// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// What refers to the clusters of an image: the walk through all tables, for Check.

func (c *checker) countRefcounts() error {
	h := c.h
	if err := c.addRange(h.RefTableOffset, int64(h.RefTableClusters)<<h.ClusterBits, 1); err != nil {
		return err
	}
	for i, off := range c.refTable {
		if off == 0 {
			continue
		}
		if bad := c.badOffset(off); bad != "" {
			c.fault(h.RefTableOffset+8*int64(i), "entry %d of the refcount table: %#x is %s", i, off, bad)
			c.trouble.rebuild = true
			continue
		}
		if err := c.addRange(off, h.ClusterSize(), 1); err != nil {
			return err
		}
	}
	return nil
}

// pieces calls fn with the contents of a table, a piece at a time. If fn changes a piece it says so, and it is
// written back.
func (c *checker) pieces(a area, fn func(b []byte, off int64) (changed bool, err error)) error {
	// A table whose last sector is not full shares it with nobody.
	n := min(roundUp(a.n, blk.SectorSize), max(0, c.storage.Info().Size-a.off))
	buf := blk.GetBuffer(checkPiece)
	defer buf.Free()
	for at := int64(0); at < n; at += checkPiece {
		b := buf.B[:min(checkPiece, n-at)]
		if err := c.read(b, a.off+at); err != nil {
			return fmt.Errorf("qcow2: read %s: %w", a.what, err)
		}
		changed, err := fn(b[:min(int64(len(b)), a.n-at)], a.off+at)
		if err != nil {
			return err
		}
		if changed {
			if err := c.write(b, a.off+at); err != nil {
				return fmt.Errorf("qcow2: write %s: %w", a.what, err)
			}
		}
	}
	return nil
}

func (c *checker) countBitmap(a area) error {
	return c.pieces(a, func(b []byte, at int64) (bool, error) {
		for i := 0; i+8 <= len(b); i += 8 {
			e := binary.BigEndian.Uint64(b[i:])
			off := int64(e & offsetMask)
			if reserved := e &^ offsetMask; reserved > 1 || reserved == 1 && off != 0 {
				c.fault(at+int64(i), "%s: entry %#x has reserved bits", a.what, e)
			}
			if off == 0 {
				continue
			}
			if bad := c.badOffset(off); bad != "" {
				c.fault(at+int64(i), "%s: %#x is %s", a.what, off, bad)
				c.trouble.blind = true
				continue
			}
			if err := c.addRange(off, c.h.ClusterSize(), 1); err != nil {
				return false, err
			}
		}
		return false, nil
	})
}

// eachL2 calls fn for each L2 table that any L1 table, or the active one, points to, with the table in c.table: at is its offset, weight
// the number of L1 entries that point to it. Tables in the window of c.refs come last, so that c.l2s and c.active
// are about that window afterwards.
func (c *checker) eachL2(onlyActive bool, fn func(at int64, weight uint64, active bool) error) error {
	own := c.refs.lo
	for lo := int64(0); lo < c.end; lo += c.window {
		if lo != own {
			if err := c.eachL2In(lo, onlyActive, fn); err != nil {
				return err
			}
		}
	}
	return c.eachL2In(own, onlyActive, fn)
}

func (c *checker) eachL2In(lo int64, onlyActive bool, fn func(at int64, weight uint64, active bool) error) error {
	c.l2s.reset(lo)
	clear(c.active)
	for i, l1 := range c.l1s {
		if err := c.countL1(l1, i == 0); err != nil {
			return err
		}
	}
	c.l1Seen = true
	for cl := c.l2s.next(lo); cl < lo+c.window; cl = c.l2s.next(cl + 1) {
		active := c.active.has(cl - lo)
		if onlyActive && !active {
			continue
		}
		if err := c.watch(c.passed+cl-lo, c.walks()); err != nil {
			return err
		}
		at := cl << c.h.ClusterBits
		if err := c.read(c.table.B, at); err != nil {
			return fmt.Errorf("qcow2: read the L2 table at %#x: %w", at, err)
		}
		if err := fn(at, c.l2s.get(cl), active); err != nil {
			return err
		}
	}
	c.passed += min(c.window, c.end-lo)
	return c.watch(c.passed, c.walks())
}

// walks is how many clusters all walks of a scan pass: for each window two walks through the whole file.
func (c *checker) walks() int64 { return (c.end + c.window - 1) / c.window * 2 * c.end }

func (c *checker) countL1(l1 area, active bool) error {
	return c.pieces(l1, func(b []byte, at int64) (bool, error) {
		for i := 0; i+8 <= len(b); i += 8 {
			e := l1Entry(binary.BigEndian.Uint64(b[i:]))
			if e == 0 {
				continue
			}
			if bad := uint64(e) &^ (offsetMask | copied); bad != 0 && !c.l1Seen {
				c.found(false, at+int64(i), "%s: entry %#x has reserved bits", l1.what, uint64(e))
			}
			off := e.offset()
			if off == 0 {
				continue
			}
			if bad := c.badOffset(off); bad != "" {
				if !c.l1Seen {
					c.found(false, at+int64(i), "%s: L2 table at %#x, %s", l1.what, off, bad)
				}
				c.trouble.blind = true
				continue
			}
			cl := off >> c.h.ClusterBits
			if err := c.l2s.add(cl, 1); err != nil {
				return false, err
			}
			if active && c.l2s.has(cl) {
				c.active.set(cl - c.l2s.lo)
			}
		}
		return false, nil
	})
}

// countL2 counts what the entries of an L2 table refer to, and the table itself.
func (c *checker) countL2(at int64, weight uint64, active bool) error {
	if err := c.addRange(at, c.h.ClusterSize(), weight); err != nil {
		return err
	}
	var (
		b    = c.table.B
		step = 8 * c.lay.words
		next int64 // where the next cluster lies if it is not fragmented; 0: any place
	)
	for i := 0; i < len(b); i += step {
		e, sub := c.l2Entry(b[i:])
		if e == 0 && sub == 0 {
			continue
		}
		off, n, bad := c.entryRange(e, sub)
		if bad != "" {
			c.fault(at+int64(i), "L2 entry %#x: %s", uint64(e), bad)
		}
		if active && !c.quiet {
			next = c.countFragments(e, next)
		}
		if n == 0 {
			continue
		}
		if c.lay.dataFile {
			if err := c.checkPlace(at, i/step, off); err != nil {
				return err
			}
			continue
		}
		if off+n-1 >= c.fileEnd() {
			c.fault(at+int64(i), "L2 entry %#x: the cluster at %#x is behind the end of the file", uint64(e), off)
			c.trouble.beyond = true
		}
		if err := c.addRange(off, n, weight); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) l2Entry(b []byte) (e l2Entry, sub uint64) {
	e = l2Entry(binary.BigEndian.Uint64(b))
	if c.lay.words == 2 {
		sub = binary.BigEndian.Uint64(b[8:])
	}
	return e, sub
}

// entryRange is the part of the file that an L2 entry refers to, and what is wrong with the entry.
func (c *checker) entryRange(e l2Entry, sub uint64) (off, n int64, bad string) {
	if e&compressed != 0 {
		off, n = e.compressedRange(c.h.ClusterBits)
		switch {
		case c.lay.dataFile:
			return 0, 0, "compressed, with an external data file"
		case e&copied != 0:
			bad = "compressed, and the copied bit is set"
		case sub != 0:
			bad = fmt.Sprintf("compressed, with the subcluster bitmap %#x", sub)
		}
		return off, n, bad
	}
	off = int64(e & offsetMask)
	if off != 0 || c.lay.dataFile && e&copied != 0 {
		n = c.h.ClusterSize()
	}
	switch {
	case off&(c.h.ClusterSize()-1) != 0:
		// Where the cluster really is, cannot be known.
		c.trouble.blind = true
		bad = "the cluster is not at the beginning of one"
	case c.lay.words == 2 && uint32(sub)&uint32(sub>>32) != 0:
		bad = fmt.Sprintf("subclusters with data that read as zeros: bitmap %#x", sub)
	case c.lay.words == 2 && uint32(sub) != 0 && n == 0:
		bad = fmt.Sprintf("subclusters with data and no cluster: bitmap %#x", sub)
	case c.lay.decode(e, sub).bad:
		bad = "reserved bits are set"
	}
	return off, n, bad
}

// countFragments is for the statistics. It counts as qemu-img check does: within a table.
func (c *checker) countFragments(e l2Entry, next int64) int64 {
	off := int64(e & offsetMask)
	switch {
	case e&compressed != 0:
		c.res.AllocatedClusters++
		c.res.CompressedClusters++
		c.res.FragmentedClusters++
		return next
	case off == 0 && (!c.lay.dataFile || e&copied == 0 || c.lay.words == 1 && e&zeroFlag != 0):
		return next
	}
	c.res.AllocatedClusters++
	if next != 0 && off != next {
		c.res.FragmentedClusters++
	}
	return off + c.h.ClusterSize()
}

// checkPlace holds a cluster in a data file against the guest offset that leads to it: entry i of the L2 table at
// the offset at. From the cluster follows which L1 entry must point to that table.
func (c *checker) checkPlace(at int64, i int, off int64) error {
	if c.quiet {
		return nil
	}
	entries := int64(1) << c.h.l2Bits()
	guest := off >> c.h.ClusterBits
	index := guest / entries
	ok := guest%entries == int64(i) && index < int64(c.h.L1Size)
	if ok {
		var b [8]byte
		if err := c.read(b[:], c.h.L1Offset+8*index); err != nil {
			return fmt.Errorf("qcow2: read the L1 table: %w", err)
		}
		ok = l1Entry(binary.BigEndian.Uint64(b[:])).offset() == at
	}
	if !ok {
		c.found(false, at+int64(i*8*c.lay.words), "the cluster at %#x of the data file belongs to another guest offset", off)
	}
	return nil
}
