// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"sync"

	"github.com/blkstream/blkstream/blk"
)

const (
	// inlineLayers is the depth up to which a task makes a page itself. Deeper chains keep a thread busy for longer
	// than a queue's should be, and ask for so many tables that it pays to read several at once.
	inlineLayers = 8
	// groupPages is the number of pages that are then made at once: 512 MiB in units of 64 KiB, what one table of each
	// layer describes. Page by page the tables would be read again if they do not all fit into memory.
	groupPages = 16
	// warmLayers is the number of layers whose tables are read at once.
	warmLayers = 16
)

// fill makes a page, or brings one up to date, and puts it into the map.
func (n *Node) fill(t *blk.Task, index int64) *page {
	deep := len(n.layers) > inlineLayers
	first, count := index, int64(1)
	if deep {
		first -= index % groupPages
		count = min(groupPages, (n.info.Size+n.span()-1)/n.span()-first)
	}
	held := n.making.Lock(t, first*n.span(), count*n.span())
	defer n.making.Unlock(held)
	if p := n.pages.get(index); p != nil {
		return p // made while we waited
	}
	m := &maker{
		n: n, first: first, old: make([]*page, count), entries: make([]entry, count*pageUnits),
		lo: first * n.span(), hi: min((first+count)*n.span(), n.info.Size),
	}
	for i := range m.old {
		m.old[i] = n.pages.find(first + int64(i))
	}
	if deep {
		_ = t.Off(func() error { // never fails
			m.make(blk.NewTask(), true)
			return nil
		})
	} else {
		m.make(t, false)
	}
	return m.publish(index)
}

// maker makes the pages of [lo, hi).
type maker struct {
	n       *Node
	t       *blk.Task
	first   int64
	old     []*page // of fewer layers, or nil
	entries []entry
	lo, hi  int64
}

// make asks the layers from the top to the bottom. A unit is open, kindNone, until one holds something of it.
func (m *maker) make(t *blk.Task, warm bool) {
	m.t = t
	layers := m.n.layers[:len(m.n.layers)-m.known()]
	for i := range layers {
		m.takeOld(i)
		if m.nextOpen(m.lo) >= m.hi {
			return
		}
		if warm && i%warmLayers == 0 {
			m.warm(layers[i:min(i+warmLayers, len(layers))])
		}
		m.layer(i)
	}
	m.takeOld(len(layers))
}

// known is the number of layers, from the bottom, that all old pages consider.
func (m *maker) known() int {
	known := len(m.n.layers)
	for _, old := range m.old {
		if old == nil {
			return 0
		}
		known = min(known, old.layers)
	}
	return known
}

func (m *maker) publish(index int64) (want *page) {
	for i := range m.old {
		p := &page{index: m.first + int64(i), layers: len(m.n.layers)}
		copy(p.entries[:], m.entries[i*pageUnits:])
		for u := range p.entries {
			if p.entries[u].kind() == kindNone {
				p.entries[u] = newEntry(kindNothing, 0)
			}
		}
		m.n.pages.put(p)
		if p.index == index {
			want = p
		}
	}
	return want
}

// warm makes the layers read the tables that will be asked for, all at once. What fails will fail again.
func (m *maker) warm(layers []layer) {
	var wg sync.WaitGroup
	first := m.nextOpen(m.lo)
	for _, l := range layers {
		if first >= l.end {
			continue
		}
		if _, ok := l.TryMap(blk.OpRead, first, 1); ok {
			continue // most likely it knows the rest, too
		}
		wg.Go(func() {
			t := blk.NewTask()
			for off := first; off < min(m.hi, l.end); {
				x, err := extent(t, l.Node, off, min(m.hi, l.end)-off)
				if err != nil {
					return
				}
				off = m.nextOpen(off + x.Len)
			}
		})
	}
	wg.Wait()
}

// layer decides the open units that the layer holds in whole or in part. Its extents are cut at the borders of units,
// and what the pieces of a unit have in common is its entry.
func (m *maker) layer(i int) {
	l := m.n.layers[i]
	for off := m.nextOpen(m.lo); off < m.hi; {
		x := blk.Extent{Len: m.hi - off, State: blk.Zero}
		past := off >= l.end
		if !past {
			var err error
			if x, err = extent(m.t, l.Node, off, min(m.hi, l.end)-off); err != nil {
				// The page does without: who reads there asks the layer again and gets the error.
				m.entries[m.unit(off)] = newEntry(kindMixed, m.id(i))
				for off = m.nextOpen(m.unitEnd(off)); off < m.hi; off = m.nextOpen(off) {
					m.entries[m.unit(off)] = newEntry(kindMixed, m.id(i))
				}
				return
			}
		}
		for from, next := off, off+x.Len; off < next; {
			u := m.unit(off)
			start := m.lo + u*m.n.unit
			e := m.classify(x, i, start-from)
			if off > start {
				e = m.join(i, m.entries[u], e, past)
			}
			m.entries[u] = e
			if end := m.unitEnd(off); end <= next {
				off = m.nextOpen(end)
			} else {
				off = next
			}
		}
	}
}

func (m *maker) id(i int) int { return len(m.n.layers) - 1 - i }

func (m *maker) unit(off int64) int64 { return (off - m.lo) / m.n.unit }

// unitEnd is where the unit around off ends, or the disk.
func (m *maker) unitEnd(off int64) int64 {
	return min(m.lo+(m.unit(off)+1)*m.n.unit, m.hi)
}

// nextOpen is off if it lies in an open unit, or where the next one begins; hi if there is none.
func (m *maker) nextOpen(off int64) int64 {
	for off < m.hi && m.entries[m.unit(off)].kind() != kindNone {
		off = m.unitEnd(off)
	}
	return off
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

// takeOld takes what is open from pages that consider the layers from i on only, and perhaps another size of the disk:
// theirs.
func (m *maker) takeOld(i int) {
	for k, old := range m.old {
		if old == nil || old.layers != len(m.n.layers)-i {
			continue
		}
		end := m.n.layers[i].Info().Size
		for u := range old.entries {
			at := k*pageUnits + u
			off := m.lo + int64(at)*m.n.unit
			switch {
			case m.entries[at].kind() != kindNone || off >= m.hi:
			case off >= end:
				m.entries[at] = newEntry(kindZero, m.id(i))
			case off+m.n.unit > end && m.hi > end:
				m.entries[at] = newEntry(kindMixed, m.id(i)) // known up to the end only
			default:
				m.entries[at] = old.entries[u]
			}
		}
	}
}
