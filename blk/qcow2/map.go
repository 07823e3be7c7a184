// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"math/bits"

	"github.com/blkstream/blkstream/blk"
)

// Where guest bytes are.

// kind is how a piece of the disk is stored.
type kind uint8

const (
	kindData    kind = iota // at a host offset
	kindZero                // reads as zeros
	kindBacking             // not here: the backing image shows
	kindPacked              // compressed
	kindDamaged
)

// piece is the beginning of a range, stored in one way.
type piece struct {
	kind  kind
	own   bool    // kindData: may be written in place
	len   int64   // bytes
	host  int64   // kindData: where the first byte is
	entry l2Entry // kindPacked
	skip  int64   // kindPacked: bytes of the cluster before the piece
}

// span finds out how [off, off+l) is stored, as far as it is the same way and the table reaches. ok is false if an
// entry is changing right now. tab may be nil. It waits for nothing and allocates nothing.
func (n *Node) span(tab *table, off, l int64) (p piece, ok bool) {
	in := off & (1<<n.l1Shift - 1)
	l = min(l, 1<<n.l1Shift-in)
	if tab == nil {
		return piece{kind: kindBacking, len: l}, true
	}
	tab.touch()
	i := int(in >> n.clusterBits)
	skip := in & (1<<n.clusterBits - 1)
	c, ok := tab.at(i)
	if !ok {
		return piece{}, false
	}
	k, subs := n.kindAt(c, uint(skip>>n.subShift))
	p = piece{kind: k, own: c.copied}
	switch k {
	case kindData:
		p.host = c.host + skip
	case kindPacked:
		p.entry, p.skip = c.packed, skip
	default: // nothing to find
	}
	// end is where the piece ends, in the table.
	end := int64(i)<<n.clusterBits + (skip>>n.subShift+int64(subs))<<n.subShift
	for end-in < l && end&(1<<n.clusterBits-1) == 0 && k != kindPacked && k != kindDamaged {
		i++
		next, ok := tab.at(i)
		if !ok {
			break
		}
		nk, subs := n.kindAt(next, 0)
		if nk != k || k == kindData && (next.host != p.host+end-in || next.copied != p.own) {
			break
		}
		end += int64(subs) << n.subShift
	}
	p.len = min(end-in, l)
	return p, true
}

// kindAt is the kind of a subcluster, and how many there are of it from there on.
func (n *Node) kindAt(c cluster, sub uint) (kind, int) {
	left := bits.OnesCount32(n.all) - int(sub)
	switch a, z := c.alloc>>sub, c.zero>>sub; {
	case c.bad:
		return kindDamaged, left
	case c.packed != 0:
		return kindPacked, left
	case a&1 != 0:
		return kindData, bits.TrailingZeros32(^a)
	case z&1 != 0:
		return kindZero, bits.TrailingZeros32(^z)
	default:
		return kindBacking, min(bits.TrailingZeros32(a|z), left)
	}
}

// TryMap implements blk.Node.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	switch op {
	case blk.OpFlush:
		// Nothing to write is kept in memory. What waits to be repaired or freed is done by Do.
		if n.dataFile || n.unclean.Load() > 0 {
			return blk.Extent{}, false
		}
		return n.storage.TryMap(blk.OpFlush, 0, 0)
	case blk.OpRead, blk.OpWrite:
	default:
		return blk.Extent{}, false
	}
	size := n.info.Load().Size
	if off < 0 || l <= 0 || off >= size {
		return blk.Extent{}, false
	}
	// While the storage may hold another entry than memory, a write is not safe where memory says.
	if op == blk.OpWrite && (!n.inPlace.Load() || n.doubts.Load() > 0) {
		return blk.Extent{}, false
	}
	l = min(l, size-off)
	l1 := n.l1.Load()
	i := off >> n.l1Shift
	tab := l1.tables[i].Load()
	if tab == nil && l1.entries[i].Load() != 0 {
		return blk.Extent{}, false
	}
	p, ok := n.span(tab, off, l)
	if !ok || op == blk.OpWrite && (p.kind != kindData || !p.own) {
		return blk.Extent{}, false
	}
	switch p.kind {
	case kindData:
		e, ok := n.data.TryMap(op, p.host, p.len)
		e.Writable = e.Writable && p.own && n.inPlace.Load()
		e.Unsynced = op == blk.OpWrite && n.syncedSeq.Load() != n.metaSeq.Load()
		return e, ok
	case kindZero:
		return blk.Extent{Len: p.len, State: blk.Zero}, true
	case kindBacking:
		return n.tryBacking(off, p.len)
	default:
		return blk.Extent{}, false
	}
}

func (n *Node) tryBacking(off, l int64) (blk.Extent, bool) {
	b := n.backing.Load().node
	if b == nil {
		return blk.Extent{Len: l, State: blk.Unallocated}, true
	}
	size := b.Info().Size
	if off >= size {
		// Not ours: behind another backing image there may be something else.
		return blk.Extent{Len: l, State: blk.Zero, Depth: 1}, true
	}
	e, ok := b.TryMap(blk.OpRead, off, min(l, size-off))
	return below(e), ok
}

// below is an extent of the backing image as seen from here.
func below(e blk.Extent) blk.Extent {
	e.Depth++
	e.Writable, e.Log, e.Unsynced = false, nil, false
	return e
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	size := n.info.Load().Size
	if off < 0 || l <= 0 || off >= size {
		return blk.Extent{}, blk.ErrRange
	}
	p, err := n.lookup(t, off, min(l, size-off))
	if err != nil {
		return blk.Extent{}, err
	}
	switch p.kind {
	case kindData:
		if e, ok := n.data.TryMap(blk.OpRead, p.host, p.len); ok {
			e.Writable = e.Writable && p.own && n.inPlace.Load()
			return e, nil
		}
		return blk.Extent{Len: p.len, State: blk.Data}, nil
	case kindZero:
		return blk.Extent{Len: p.len, State: blk.Zero}, nil
	case kindPacked:
		return blk.Extent{Len: p.len, State: blk.Encoded}, nil
	default: // the backing image shows; damage was an error
	}
	b := n.backing.Load().node
	if b == nil || off >= b.Info().Size {
		e, _ := n.tryBacking(off, p.len)
		return e, nil
	}
	e, err := b.Map(t, off, min(p.len, b.Info().Size-off))
	return below(e), err
}

// Placement is how the beginning of a range is stored in the image itself, for who shows that.
type Placement struct {
	Len   int64
	State blk.State // Unallocated: the image does not say
	// Host is where, in the data file or else the image. Zeros have a place too, if they were preallocated, and so has
	// what is unallocated within a cluster. -1: none.
	Host int64
}

// Locate says how the first bytes of [off, off+l) are stored, as far as they have one place.
func (n *Node) Locate(t *blk.Task, off, l int64) (Placement, error) {
	size := n.info.Load().Size
	if off < 0 || l <= 0 || off >= size {
		return Placement{}, blk.ErrRange
	}
	tab, err := n.table(t, off>>n.l1Shift)
	if err != nil {
		return Placement{}, err
	}
	if tab != nil {
		defer n.cache.unpin(tab)
	}
	p, err := n.spanOf(t, tab, off, min(l, size-off))
	if err != nil {
		return Placement{}, err
	}
	at := Placement{Len: p.len, Host: -1}
	switch p.kind {
	case kindData:
		at.Host = p.host
		return at, nil
	case kindPacked:
		at.State = blk.Encoded
		return at, nil
	case kindZero:
		at.State = blk.Zero
	default: // damage was an error
		at.State = blk.Unallocated
	}
	if tab != nil {
		at.Host, at.Len = n.behind(tab, off, p.len)
	}
	return at, nil
}

// behind is the host offset behind [off, off+l), which is not data and lies in the table; -1: there is none. It
// returns for how much that is so.
func (n *Node) behind(tab *table, off, l int64) (host, got int64) {
	in := off & (1<<n.l1Shift - 1)
	host = -1
	for got < l {
		skip := (in + got) & (n.clusterSize() - 1)
		c := tab.stableAt(int((in + got) >> n.clusterBits))
		at := int64(-1)
		// Without subclusters nothing tells zeros at the start of the data file from zeros without a place, which is what
		// QEMU takes them for.
		if c.present && (c.host > 0 || n.words > 1) {
			at = c.host + skip
		}
		switch {
		case got == 0:
			host = at
		case host < 0 && at >= 0, host >= 0 && at != host+got:
			return host, got
		}
		got += min(n.clusterSize()-skip, l-got)
	}
	return host, got
}

// lookup is span with the table read from the storage, if need be.
func (n *Node) lookup(t *blk.Task, off, l int64) (piece, error) {
	tab, err := n.table(t, off>>n.l1Shift)
	if err != nil {
		return piece{}, err
	}
	if tab != nil {
		defer n.cache.unpin(tab)
	}
	return n.spanOf(t, tab, off, l)
}

// spanOf is span for who may wait a moment. Damage is an error.
func (n *Node) spanOf(t *blk.Task, tab *table, off, l int64) (piece, error) {
	p, ok := n.span(tab, off, l)
	if !ok {
		n.mu.Lock() // entries change under it
		p, _ = n.span(tab, off, l)
		n.mu.Unlock()
	}
	if p.kind == kindDamaged {
		return p, n.damage(t, "the L2 entry for the guest's offset %#x", off)
	}
	return p, nil
}
