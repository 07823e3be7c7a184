// SPDX-License-Identifier: Apache-2.0

package chain

import (
	"sync"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// entry says where one unit of the disk lies: 3 bits of kind, 10 bits of layer, counted from the bottom, and for
// kindHost 51 bits of offset in the host file, in sectors.
type entry uint64

type kind uint8

const (
	kindNone    kind = iota // not decided yet: only while a page is made
	kindHost                // in the layer's host file
	kindZero                // the layer reads as zeros, perhaps past its end
	kindLayer               // the layer holds all of it, ask there: compressed, or without a place in a host file
	kindMixed               // the layer holds a part of it, ask there first and then on
	kindNothing             // no layer holds anything
)

const (
	kindBits  = 3
	layerBits = 10
	hostShift = kindBits + layerBits
)

func newEntry(k kind, layer int) entry { return entry(k) | entry(layer)<<kindBits }

// hostEntry is for offsets that are multiples of a sector and less than 2^60.
func hostEntry(layer int, off int64) entry {
	return newEntry(kindHost, layer) | entry(off/blk.SectorSize)<<hostShift
}

func fitsEntry(off int64) bool { return off >= 0 && off%blk.SectorSize == 0 && off < 1<<60 }

func (e entry) kind() kind     { return kind(e & (1<<kindBits - 1)) }
func (e entry) layer() int     { return int(e >> kindBits & (1<<layerBits - 1)) }
func (e entry) hostOff() int64 { return int64(e>>hostShift) * blk.SectorSize }

// following is the entry that the next unit has if it continues this one.
func (e entry) following(unit int64) entry {
	if e.kind() != kindHost {
		return e
	}
	return e + entry(unit/blk.SectorSize)<<hostShift
}

// pageUnits is the number of units that a page describes.
const pageUnits = 512

// pageMemory is what a page takes, in bytes.
const pageMemory = 8*pageUnits + 64

// page is the map of one stretch of the disk. It does not change once it is in pages, apart from used.
type page struct {
	index   int64
	layers  int         // how many layers it considers, from the bottom
	used    atomic.Bool // since the clock's hand passed
	entries [pageUnits]entry
}

// ways is how many places there are for a page. A disk whose pages all fit never needs more than one.
const ways = 4

// pages is the map: a bounded table of pages, in sets. Anyone reads without a lock; a page that is replaced lives on
// for those who look at it.
type pages struct {
	layers int
	// hosts are the host files of the layers, counted from the bottom. Each is set before an entry names it.
	hosts []atomic.Pointer[blk.HostFile]
	sets  int64
	slots []atomic.Pointer[page] // ways for each set

	mu   sync.Mutex // guards changes of slots
	hand int
}

// newPages makes room for all pages of a disk, or for as many as memory allows, at least one set.
func newPages(layers int, all, memory int64) *pages {
	sets := max(1, min((all+ways-1)/ways, memory/(pageMemory*ways)))
	return &pages{
		layers: layers,
		hosts:  make([]atomic.Pointer[blk.HostFile], layers),
		sets:   sets,
		slots:  make([]atomic.Pointer[page], sets*ways),
	}
}

func (m *pages) set(index int64) []atomic.Pointer[page] {
	at := index % m.sets * ways
	return m.slots[at : at+ways]
}

// get returns the page if it is there and up to date.
func (m *pages) get(index int64) *page {
	p := m.find(index)
	if p == nil || p.layers != m.layers {
		return nil
	}
	if !p.used.Load() { // a line that all share is not written needlessly
		p.used.Store(true)
	}
	return p
}

// find returns the page in any state.
func (m *pages) find(index int64) *page {
	set := m.set(index)
	for i := range set {
		if p := set[i].Load(); p != nil && p.index == index {
			return p
		}
	}
	return nil
}

// put puts a page in, for an older one of the same stretch, into a free slot, or for the first one that was not used
// since the hand came by.
func (m *pages) put(p *page) {
	m.mu.Lock()
	defer m.mu.Unlock()
	set := m.set(p.index)
	free := -1
	for i := range set {
		old := set[i].Load()
		if old == nil {
			free = i
		} else if old.index == p.index {
			set[i].Store(p)
			return
		}
	}
	for free < 0 {
		m.hand++
		if i := m.hand % ways; !set[i].Load().used.Swap(false) {
			free = i
		}
	}
	set[free].Store(p)
}

// adopt takes over the pages of a chain of fewer layers, of which all are here. Pages do not change, so both may have
// them.
func (m *pages) adopt(from *pages) {
	for i := range from.hosts {
		m.hosts[i].Store(from.hosts[i].Load())
	}
	for i := range from.slots {
		if p := from.slots[i].Load(); p != nil {
			m.put(p)
		}
	}
}

// host records the host file of a layer and reports whether it is that one: an entry has no room for a second.
func (m *pages) host(layer int, f *blk.HostFile) bool {
	return m.hosts[layer].Load() == f || m.hosts[layer].CompareAndSwap(nil, f)
}
