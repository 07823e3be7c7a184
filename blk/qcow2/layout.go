// SPDX-License-Identifier: Apache-2.0

package qcow2

import "math/bits"

// The entries of the tables, as the specification's section "Cluster mapping" has them.

const (
	offsetMask = 1<<56 - 1<<9 // of a table or a cluster, in L1 and L2 entries
	copied     = 1 << 63      // the reference count is exactly 1: may be written in place
	compressed = 1 << 62      // in an L2 entry
	zeroFlag   = 1 << 0       // in an L2 entry without subclusters, version 3
	maxHostOff = 1 << 56      // host offsets are below

	// In memory only: an entry that was found to be damaged. The bit is reserved, so no sound entry has it.
	damaged = 1 << 56
)

// l1Entry points to an L2 table.
type l1Entry uint64

func (e l1Entry) offset() int64 { return int64(e & offsetMask) }
func (e l1Entry) copied() bool  { return e&copied != 0 }

// l2Entry is the (first) word of an L2 entry.
type l2Entry uint64

// compressedRange is where a compressed cluster's data lies; up to 511 bytes at its end may be others'.
func (e l2Entry) compressedRange(clusterBits uint) (off, n int64) {
	x := 62 - (clusterBits - 8)
	off = int64(e & (1<<x - 1))
	sectors := int64(e>>x)&(1<<(clusterBits-8)-1) + 1
	return off, sectors*512 - off&511
}

// compressedEntry is the entry for data of n > 0 bytes at off. ok is false if that cannot be expressed.
func compressedEntry(off, n int64, clusterBits uint) (e l2Entry, ok bool) {
	x := 62 - (clusterBits - 8)
	more := (off+n-1)/512 - off/512
	if off >= 1<<min(x, 56) || more >= 1<<(clusterBits-8) {
		return 0, false
	}
	return l2Entry(uint64(off) | uint64(more)<<x | compressed), true
}

// cluster is an L2 entry taken apart. An image without subclusters is handled as one with a single subcluster to a
// cluster. Neither bit set: the subcluster is unallocated, the backing image shows through.
type cluster struct {
	host    int64   // host offset; only if present
	present bool    // there is a host cluster
	copied  bool    // and it is nobody else's
	alloc   uint32  // subclusters whose data is at host
	zero    uint32  // subclusters that read as zeros
	packed  l2Entry // compressed data; the other fields are zero
	bad     bool    // damaged
}

// layout is what one has to know of an image to read its L2 entries.
type layout struct {
	clusterBits uint
	words       int    // 64-bit words of an entry
	all         uint32 // bits of all subclusters
	dataFile    bool
	v2          bool
	raw         bool // the data file is a raw image by itself
	compression uint8
}

func (h *Header) layout() layout {
	l := layout{
		clusterBits: h.ClusterBits, words: h.l2EntryWords(), all: 1, dataFile: h.hasDataFile(), v2: h.Version < 3,
		raw: h.dataFileRaw(), compression: h.Compression,
	}
	if h.ExtendedL2() {
		l.all = 1<<32 - 1
	}
	return l
}

// decode takes an entry apart; sub is the subcluster bitmap, or 0.
func (l *layout) decode(e l2Entry, sub uint64) cluster {
	if e&compressed != 0 {
		if l.dataFile || e&copied != 0 {
			return cluster{bad: true}
		}
		return cluster{packed: e}
	}
	c := cluster{host: int64(e & offsetMask), copied: e&copied != 0}
	// A host offset of 0 is the header, except in a data file, where the copied bit tells it from none.
	c.present = c.host != 0 || l.dataFile && c.copied
	reserved := ^uint64(offsetMask | copied)
	if l.words == 1 {
		switch {
		case e&zeroFlag != 0:
			c.zero = 1
		case c.present:
			c.alloc = 1
		}
		if !l.v2 {
			reserved &^= zeroFlag
		}
	} else {
		c.alloc, c.zero = uint32(sub), uint32(sub>>32)
	}
	if uint64(e)&reserved != 0 || c.host&(1<<l.clusterBits-1) != 0 || c.copied && !c.present ||
		c.alloc&c.zero != 0 || c.alloc != 0 && !c.present {
		return cluster{bad: true}
	}
	return c
}

// encode is the reverse of decode.
func (l *layout) encode(c cluster) (e l2Entry, sub uint64) {
	if c.packed != 0 {
		return c.packed, 0
	}
	if c.present {
		e = l2Entry(c.host)
		if c.copied {
			e |= copied
		}
	}
	if l.words == 1 {
		if c.zero != 0 {
			e |= zeroFlag
		}
		return e, 0
	}
	return e, uint64(c.alloc) | uint64(c.zero)<<32
}

// subBits is log2 of the bytes of a subcluster.
func (l *layout) subBits() uint {
	return l.clusterBits - uint(bits.TrailingZeros(uint(bits.OnesCount32(l.all))))
}
