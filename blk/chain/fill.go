// SPDX-License-Identifier: Apache-2.0

package chain

import "github.com/blkstream/blkstream/blk"

// fill makes a page, or brings one up to date, and puts it into the map.
func (n *Node) fill(t *blk.Task, index int64) *page {
	lo := index * n.span()
	held := n.making.Lock(t, lo, n.span())
	defer n.making.Unlock(held)
	if p := n.pages.get(index); p != nil {
		return p // made while we waited
	}
	p := &page{index: index, layers: len(n.layers)}
	m := maker{n: n, t: t, p: p, lo: lo, hi: min(lo+n.span(), n.info.Size)}
	old := n.pages.find(index)
	for i := range n.layers {
		if old != nil && len(n.layers)-i == old.layers {
			m.rest(old, i)
			break
		}
		if !m.layer(i) {
			break
		}
	}
	// What nobody held.
	for u := range p.entries {
		if p.entries[u].kind() == kindNone {
			p.entries[u] = newEntry(kindNothing, 0)
		}
	}
	n.pages.put(p)
	return p
}

// maker makes the page of [lo, hi).
type maker struct {
	n      *Node
	t      *blk.Task
	p      *page
	lo, hi int64
}

// layer decides the units that the layer holds in whole or in part, of those that the ones above left open. It
// reports whether any are left.
func (m *maker) layer(i int) bool {
	left := false
	units := (m.hi - m.lo + m.n.unit - 1) / m.n.unit
	for u := int64(0); u < units; {
		if m.p.entries[u].kind() != kindNone {
			u++
			continue
		}
		first := u
		for u < units && m.p.entries[u].kind() == kindNone {
			u++
		}
		if m.run(i, first, u) {
			left = true
		}
	}
	return left
}

// run does so for the open units from first to before last. The layer's extents are cut at the borders of units, and
// what the pieces of a unit have in common is its entry.
func (m *maker) run(i int, first, last int64) bool {
	l := m.n.layers[i]
	left := false
	off, end := m.lo+first*m.n.unit, min(m.lo+last*m.n.unit, m.hi)
	for off < end {
		x := blk.Extent{Len: end - off, State: blk.Zero}
		past := off >= l.end
		if !past {
			var err error
			if x, err = extent(m.t, l.Node, off, min(end, l.end)-off); err != nil {
				// The page does without: who reads there asks the layer again and gets the error.
				for ; off < end; off = m.unitEnd(off) {
					m.p.entries[m.unit(off)] = newEntry(kindMixed, m.id(i))
				}
				return left
			}
		}
		for from, next := off, off+x.Len; off < next; off = min(m.unitEnd(off), next) {
			u := m.unit(off)
			e := m.classify(x, i, m.lo+u*m.n.unit-from)
			if off > m.lo+u*m.n.unit {
				e = m.join(i, m.p.entries[u], e, past)
			}
			m.p.entries[u] = e
			left = left || e.kind() == kindNone && m.unitEnd(off) <= next
		}
	}
	return left
}

func (m *maker) id(i int) int { return len(m.n.layers) - 1 - i }

func (m *maker) unit(off int64) int64 { return (off - m.lo) / m.n.unit }

// unitEnd is where the unit around off ends, or the disk.
func (m *maker) unitEnd(off int64) int64 {
	return min(m.lo+(m.unit(off)+1)*m.n.unit, m.hi)
}

// classify turns an extent of layer i into the entry of a unit that begins rel bytes after it, or before it.
// kindNone: the layer holds nothing there.
func (m *maker) classify(x blk.Extent, i int, rel int64) entry {
	switch x.State {
	case blk.Unallocated:
		return 0
	case blk.Zero:
		return newEntry(kindZero, m.id(i))
	case blk.Data:
		if at := x.HostOff + rel; x.Host != nil && fitsEntry(at) && m.n.pages.host(m.id(i), x.Host) {
			return hostEntry(m.id(i), at)
		}
	default: // only the layer can read it
	}
	return newEntry(kindLayer, m.id(i))
}

// join is the entry of a unit of which the first pieces made a and another, perhaps past the layer's end, makes b.
func (m *maker) join(i int, a, b entry, past bool) entry {
	switch {
	case a == b:
		return a
	case a.kind() == kindNone, b.kind() == kindNone, a.kind() == kindMixed, past:
		return newEntry(kindMixed, m.id(i))
	default:
		return newEntry(kindLayer, m.id(i)) // all of it is there, but not in one place
	}
}

// rest takes what is left open from a page that considers the layers from i on only, and perhaps another size of the
// disk: theirs.
func (m *maker) rest(old *page, i int) {
	end := m.n.layers[i].Info().Size
	for u := range m.p.entries {
		off := m.lo + int64(u)*m.n.unit
		switch {
		case m.p.entries[u].kind() != kindNone || off >= m.hi:
		case off >= end:
			m.p.entries[u] = newEntry(kindZero, m.id(i))
		case off+m.n.unit > end && m.hi > end:
			m.p.entries[u] = newEntry(kindMixed, m.id(i)) // known up to the end only
		default:
			m.p.entries[u] = old.entries[u]
		}
	}
}
