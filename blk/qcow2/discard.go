// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"sync"

	"github.com/blkstream/blkstream/blk"
)

// Discards and write-zeroes. Both are changes of the tables where they can be; what the tables cannot express is
// written as zeros, or left alone by a discard.

// zeroMode says what becomes of the space.
type zeroMode uint8

const (
	discard zeroMode = iota // given back; the contents may stay
	unmap                   // given back; reads as zeros
	keep                    // kept; reads as zeros
)

const maxZeros = 1 << 20

var zeros = sync.OnceValue(func() []byte {
	b := blk.GetBuffer(maxZeros).B
	clear(b)
	return b
})

// hasBacking reports whether something may show where the image holds nothing.
func (n *Node) hasBacking() bool {
	b := n.backing.Load()
	return b.node != nil || b.named
}

// zero is OpDiscard and OpWriteZeroes.
func (n *Node) zero(t *blk.Task, off, l int64, m zeroMode) error {
	for end := off + l; off < end; {
		next := min(end, (off>>n.l1Shift+1)<<n.l1Shift)
		if err := n.zeroInTable(t, off, next, m); err != nil {
			return err
		}
		n.tidy(t)
		off = next
	}
	return nil
}

// zeroInTable zeroes [off, end), which one table describes.
func (n *Node) zeroInTable(t *blk.Task, off, end int64, m zeroMode) error {
	switch {
	case n.raw:
		return n.zeroRaw(t, off, end, m)
	case n.v2 && m == discard && n.hasBacking():
		return nil // to unallocate would bring the backing image's contents back
	case n.v2 && m != discard && (n.hasBacking() || m == keep):
		return n.zeroData(t, off, end)
	}
	sub := int64(1) << n.subShift
	lo, hi := roundUp(off, sub), roundDown(end, sub)
	if end >= n.info.Load().Size {
		hi = roundUp(end, sub) // what lies behind the end is nobody's
	}
	if lo >= hi {
		lo, hi = end, end
	}
	if m != discard {
		if err := n.zeroData(t, off, lo); err != nil {
			return err
		}
		if hi < end {
			if err := n.zeroData(t, hi, end); err != nil {
				return err
			}
		}
	}
	if lo >= hi {
		return nil
	}
	if m != discard {
		if err := n.zeroPacked(t, lo, hi); err != nil {
			return err
		}
	}
	return n.zeroEntries(t, lo, hi, m)
}

// zeroPacked writes zeros into compressed clusters that the range holds in part: they have no subclusters.
func (n *Node) zeroPacked(t *blk.Task, lo, hi int64) error {
	for _, g := range []int64{roundDown(lo, n.clusterSize()), roundDown(hi-1, n.clusterSize())} {
		from, to := max(lo, g), min(hi, g+n.clusterSize())
		if to-from == n.clusterSize() {
			continue
		}
		p, err := n.lookup(t, from, to-from)
		if err == nil && p.kind == kindPacked {
			err = n.zeroData(t, from, to)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// zeroData writes zeros where something else is.
func (n *Node) zeroData(t *blk.Task, off, end int64) error {
	for off < end {
		p, err := n.lookup(t, off, min(end-off, maxZeros))
		if err != nil {
			return err
		}
		isZero := p.kind == kindZero
		if p.kind == kindBacking {
			if e, ok := n.tryBacking(off, p.len); ok && (e.State == blk.Zero || e.State == blk.Unallocated) {
				isZero, p.len = true, e.Len
			}
		}
		if !isZero {
			if err := n.write(t, blk.BytesVec(nil, zeros()[:p.len]), off); err != nil {
				return err
			}
		}
		off += p.len
	}
	return nil
}

// zeroRaw zeroes a data file that must be a raw image by itself. What its tables do not hold is zeros there too.
func (n *Node) zeroRaw(t *blk.Task, off, end int64, m zeroMode) error {
	first := off >> n.clusterBits
	defer n.clusters.Unlock(n.clusters.Lock(t, first, (end-1)>>n.clusterBits-first+1))
	end = min(end, n.data.Info().Size)
	if off >= end {
		return nil
	}
	r := blk.Request{Op: blk.OpWriteZeroes, Off: off, Len: end - off}
	if m != keep {
		r.Flags = blk.Unmap
	}
	return blk.Do(t, n.data, &r)
}

// zeroEntries zeroes whole subclusters by their entries.
func (n *Node) zeroEntries(t *blk.Task, lo, hi int64, m zeroMode) error {
	first, last := lo>>n.clusterBits, (hi-1)>>n.clusterBits
	defer n.clusters.Unlock(n.clusters.Lock(t, first, last-first+1))
	index := lo >> n.l1Shift
	if n.l1.Load().entry(index) == 0 && (m == discard || !n.hasBacking()) {
		return nil
	}
	tab, err := n.ownTable(t, index)
	if err != nil {
		return err
	}
	defer n.cache.unpin(tab)
	var (
		from    = int(first) & (tab.entries() - 1)
		old     []cluster
		entries []cluster
		changed int // entries up to the last one that changes
	)
	for g := first << n.clusterBits; g < hi; g += n.clusterSize() {
		o := tab.stableAt(from + len(entries))
		if o.bad {
			return n.damage(t, "the L2 entry for the guest's offset %#x", g)
		}
		e := n.zeroed(o, n.subsIn(g, lo, hi), m)
		if e == o && len(entries) == 0 {
			from++
			continue
		}
		old, entries = append(old, o), append(entries, e)
		if e != o {
			changed = len(entries)
		}
	}
	old, entries = old[:changed], entries[:changed]
	if changed > 0 {
		if n.dataFile && m != keep {
			n.discardData(t, lo, hi)
		}
		if err := n.set(t, tab, from, entries); err != nil {
			return err
		}
		for i, o := range old {
			if entries[i] != o {
				n.forget(o, !entries[i].present)
			}
		}
	}
	return nil
}

// zeroed is the entry after its subclusters subs were zeroed.
func (n *Node) zeroed(o cluster, subs uint32, m zeroMode) cluster {
	flag := subs
	if !n.hasBacking() || n.v2 {
		flag = 0 // what is not allocated reads as zeros, or is behind the end
	}
	switch {
	case o.packed != 0 && subs != n.all:
		return o // see zeroPacked
	case o.packed != 0:
		return cluster{zero: flag}
	case !o.present:
		if m != discard {
			o.zero |= flag &^ o.zero
		}
		return o
	}
	o.alloc &^= subs
	if m == keep && o.own() && !n.dataFile {
		o.zero |= subs
		return o
	}
	o.zero = o.zero&^subs | flag
	if o.alloc == 0 {
		o.host, o.present, o.copied = 0, false, false
		if !n.hasBacking() {
			o.zero = 0
		}
	}
	return o
}

// discardData gives space in a data file back before the entries change: afterwards, new data could be there. A discard
// may lose data at once.
func (n *Node) discardData(t *blk.Task, lo, hi int64) {
	if hi = min(hi, n.data.Info().Size); lo < hi {
		_ = blk.Do(t, n.data, &blk.Request{Op: blk.OpDiscard, Off: lo, Len: hi - lo}) // only space is lost if it fails
	}
}
