// SPDX-License-Identifier: Apache-2.0

// Package chain puts the lower layers of a chain of images together as one read-only node, so that a read costs the
// same however many there are.
//
// A read takes three steps. The first finds the page of the map (pages.go) that says where each unit of a stretch of
// the disk lies: in which layer, and if it can be said, in which place of which host file. If there is no page, the
// second makes it, by asking the layers from the top to the bottom for the whole stretch (fill.go). The third reads
// from the place itself, or from the one layer that holds the unit; the layers above it are not asked again.
//
// The contents of the layers do not change, so neither do pages. What changes is the chain: another one is then made
// inside blk.Graph.Change, and takes over the pages of this one if layers were only added on top (Options.From).
package chain

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/blkstream/blkstream/blk"
)

// MaxDepth is the largest number of layers.
const MaxDepth = 1000

// Options of New. The zero value is good for clusters of 64 KiB.
type Options struct {
	// Unit is the granularity of the map in bytes, a power of two from 512 bytes on: best the size of the smallest
	// cluster in the layers. 0 is DefaultUnit.
	Unit int64
	// Memory bounds what the map takes, in bytes. 0 is DefaultMemory. It is used as far as the disk is read.
	Memory int64
	// From is a chain whose layers are the last ones of the new chain, which shares its pages. From must be at rest,
	// and is dropped, not closed, afterwards: the layers belong to the new chain.
	From *Node
}

// Defaults of the options. 8 bytes a unit: the default memory holds the places of 256 GiB in units of 64 KiB.
const (
	DefaultUnit   = 64 << 10
	DefaultMemory = 32 << 20
)

// What keeps sums of offsets and groups of pages below 2^63.
const (
	maxSize = 1 << 62
	maxUnit = 1 << 30
)

// Node is the chain. The layers behind the first show through where the layers before them hold nothing.
type Node struct {
	info   blk.Info
	layers []layer
	unit   int64
	pages  *pages
	making blk.RangeLock // over the disk's bytes: one task at a time makes a page
}

type layer struct {
	blk.Node
	// end is where this layer and those below stop to show through: the smallest size down to here. A short layer
	// reads as zeros past its end, it does not open the view on a longer one below.
	end int64
}

// New makes a chain of layers, the nearest to the guest first, which report as unallocated what they do not hold. It
// owns them from then on, unless it fails.
func New(layers []blk.Node, o Options) (*Node, error) {
	unit := o.Unit
	if unit == 0 {
		unit = DefaultUnit
	}
	memory := o.Memory
	if memory == 0 {
		memory = DefaultMemory
	}
	switch {
	case len(layers) == 0:
		return nil, fmt.Errorf("chain without layers: %w", blk.ErrInvalid)
	case len(layers) > MaxDepth:
		return nil, fmt.Errorf("chain of %d layers, more than %d: %w", len(layers), MaxDepth, blk.ErrInvalid)
	case layers[0].Info().Size > maxSize:
		return nil, fmt.Errorf("chain of %d bytes: %w", layers[0].Info().Size, blk.ErrInvalid)
	case unit < blk.SectorSize || unit > maxUnit || bits.OnesCount64(uint64(unit)) != 1 || memory < 0:
		return nil, fmt.Errorf("chain with a unit of %d bytes and %d bytes of memory: %w", unit, memory, blk.ErrInvalid)
	}
	n := &Node{unit: unit, layers: make([]layer, len(layers))}
	end := layers[0].Info().Size
	for i, l := range layers {
		end = min(end, l.Info().Size)
		n.layers[i] = layer{l, end}
	}
	top := layers[0].Info()
	n.info = blk.Info{Name: top.Name, Kind: "chain", Size: top.Size, ReadOnly: true, Align: 1}
	n.pages = newPages(len(layers), (top.Size+n.span()-1)/n.span(), memory)
	if o.From != nil {
		if err := n.takeOver(o.From); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// takeOver shares the pages of a chain that is the lower part of this one. They are out of date by the layers above;
// fill brings each up to date when it is needed.
func (n *Node) takeOver(from *Node) error {
	above := len(n.layers) - len(from.layers)
	for i := range from.layers {
		if above < 0 || n.layers[above+i].Node != from.layers[i].Node {
			return fmt.Errorf("chain: the layers to take over are not the lowest ones: %w", blk.ErrInvalid)
		}
	}
	if n.unit != from.unit {
		return nil // another map: nothing fits
	}
	n.pages.adopt(from.pages)
	return nil
}

// Info describes the chain: the size is that of the first layer.
func (n *Node) Info() *blk.Info { return &n.info }

// TryMap looks into the map. It does not say more than the rest of one page: 32 MiB in units of 64 KiB.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	if op != blk.OpRead || off < 0 || l <= 0 || off >= n.info.Size {
		return blk.Extent{}, false
	}
	p := n.pages.get(off / n.span())
	if p == nil {
		return blk.Extent{}, false
	}
	e, l := n.look(p, off, min(l, n.info.Size-off))
	switch e.kind() {
	case kindHost:
		i := n.index(e)
		return blk.Extent{
			Len: l, State: blk.Data, Depth: uint16(i),
			Host: n.pages.hosts[e.layer()].Load(), HostOff: e.hostOff() + off%n.unit,
		}, true
	case kindZero:
		return blk.Extent{Len: l, State: blk.Zero, Depth: uint16(n.index(e))}, true
	case kindNothing:
		return blk.Extent{Len: l, State: blk.Unallocated, Depth: uint16(len(n.layers) - 1)}, true
	case kindLayer:
		i := n.index(e)
		x, ok := n.layers[i].TryMap(blk.OpRead, off, l)
		return below(x, i), ok
	default: // kindMixed
		for i := n.index(e); ; i++ {
			if i == len(n.layers) {
				return blk.Extent{Len: l, State: blk.Unallocated, Depth: uint16(i - 1)}, true
			}
			if off >= n.layers[i].end {
				return blk.Extent{Len: l, State: blk.Zero, Depth: uint16(i)}, true
			}
			x, ok := n.layers[i].TryMap(blk.OpRead, off, min(l, n.layers[i].end-off))
			if !ok {
				return blk.Extent{}, false
			}
			if x.State != blk.Unallocated {
				return below(x, i), true
			}
			l = x.Len
		}
	}
}

// look finds the entry for off and for how many of the l bytes it, or one that continues it, counts.
func (n *Node) look(p *page, off, l int64) (entry, int64) {
	u := off % n.span() / n.unit
	e := p.entries[u]
	got := n.unit - off%n.unit
	if e.kind() == kindMixed {
		return e, min(got, l)
	}
	for next := e; got < l && u+1 < pageUnits; got += n.unit {
		u++
		next = next.following(n.unit)
		if p.entries[u] != next {
			break
		}
	}
	return e, min(got, l)
}

// span is the number of bytes that a page describes.
func (n *Node) span() int64 { return n.unit * pageUnits }

// Entries count layers from the bottom, so that they stay true when one is put on top.
func (n *Node) index(e entry) int { return len(n.layers) - 1 - e.layer() }

// below makes an extent of layer i one of the chain.
func below(x blk.Extent, i int) blk.Extent {
	x.Depth = uint16(i)
	x.Writable, x.Log, x.Unsynced = false, nil, false
	return x
}

// Map says what the layer says that holds off.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	if off < 0 || l <= 0 || off >= n.info.Size {
		return blk.Extent{}, blk.ErrRange
	}
	f, err := n.find(t, off, min(l, n.info.Size-off))
	if err != nil {
		return blk.Extent{}, err
	}
	if f.kind == kindZero || f.kind == kindNothing {
		state := blk.Zero
		if f.kind == kindNothing {
			state = blk.Unallocated
		}
		return blk.Extent{Len: f.len, State: state, Depth: uint16(f.layer)}, nil
	}
	x, err := n.layers[f.layer].Map(t, off, f.len)
	if err != nil {
		return blk.Extent{}, err
	}
	return below(x, f.layer), nil
}

// found says where the first len bytes of a range are.
type found struct {
	kind  kind // not kindMixed
	layer int
	len   int64
	host  *blk.HostFile // kindHost
	at    int64         // kindHost: offset there
}

// find looks into the map and makes it as needed.
func (n *Node) find(t *blk.Task, off, l int64) (found, error) {
	p := n.pages.get(off / n.span())
	if p == nil {
		p = n.fill(t, off/n.span())
	}
	e, l := n.look(p, off, l)
	switch k := e.kind(); k {
	case kindMixed:
		return n.walk(t, n.index(e), off, l)
	case kindNothing:
		return found{kind: k, layer: len(n.layers) - 1, len: l}, nil
	case kindHost:
		return found{
			kind: k, layer: n.index(e), len: l,
			host: n.pages.hosts[e.layer()].Load(), at: e.hostOff() + off%n.unit,
		}, nil
	default:
		return found{kind: k, layer: n.index(e), len: l}, nil
	}
}

// walk asks the layers from i on. It costs more the deeper the chain is, so it is only for units that more than one
// layer holds, and for those that could not be found out.
func (n *Node) walk(t *blk.Task, i int, off, l int64) (found, error) {
	for ; i < len(n.layers); i++ {
		end := n.layers[i].end
		if off >= end {
			return found{kind: kindZero, layer: i, len: l}, nil
		}
		x, err := extent(t, n.layers[i], off, min(l, end-off))
		if err != nil {
			return found{}, err
		}
		l = x.Len
		switch x.State {
		case blk.Unallocated:
		case blk.Zero:
			return found{kind: kindZero, layer: i, len: l}, nil
		default:
			return found{kind: kindLayer, layer: i, len: l}, nil
		}
	}
	return found{kind: kindNothing, layer: len(n.layers) - 1, len: l}, nil
}

// extent is what a node says about a range. The quick answer is preferred: to look for holes in a file takes long,
// and reading them gives zeros as well.
func extent(t *blk.Task, node blk.Node, off, l int64) (blk.Extent, error) {
	x, ok := node.TryMap(blk.OpRead, off, l)
	if !ok {
		var err error
		if x, err = node.Map(t, off, l); err != nil {
			return blk.Extent{}, err
		}
	}
	if x.Len < 1 || x.Len > l {
		return blk.Extent{}, fmt.Errorf("%s: a mapping of %d bytes for %d: %w", node.Info().Name, x.Len, l, blk.ErrInvalid)
	}
	return x, nil
}

// Do reads. There is nothing to flush in layers that nobody writes.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
		return n.read(t, r)
	case blk.OpFlush:
		return nil
	default:
		return blk.ErrNotSupported
	}
}

// batch is what a read has begun and not yet waited for: pieces of one request may lie in many files.
type batch struct {
	ios  [16]blk.IO
	vecs [16]blk.Vec
	n    int
}

var batches = sync.Pool{New: func() any { return new(batch) }}

func (b *batch) wait(t *blk.Task) error {
	t.Wait()
	var err error
	for i := range b.ios[:b.n] {
		if err == nil && b.ios[i].Err != nil {
			err = fmt.Errorf("read %q at offset %d: %w", b.ios[i].File.Path, b.ios[i].Off, b.ios[i].Err)
		}
		b.ios[i].Reset(blk.IORead, nil, 0, 0, nil, nil)
		clear(b.vecs[i]) // the pool must not keep the memory alive
	}
	b.n = 0
	return err
}

func (n *Node) read(t *blk.Task, r *blk.Request) (err error) {
	b := batches.Get().(*batch) //nolint:errcheck // the pool makes nothing else
	// Whatever went wrong, a fault in guest memory too: the kernel must be done with the batch and the memory.
	defer func() {
		if werr := b.wait(t); err == nil {
			err = werr
		}
		batches.Put(b)
	}()
	return n.readInto(t, b, r)
}

func (n *Node) readInto(t *blk.Task, b *batch, r *blk.Request) error {
	for done := int64(0); done < r.Len; {
		off := r.Off + done
		f, err := n.find(t, off, r.Len-done)
		if err != nil {
			return err
		}
		if b.n == len(b.ios) {
			if err := b.wait(t); err != nil {
				return err
			}
		}
		v := r.Data.AppendSlice(b.vecs[b.n][:0], done, f.len)
		b.vecs[b.n] = v // keep what it grew to
		switch {
		case f.kind == kindZero || f.kind == kindNothing:
			v.Zero()
		case f.kind == kindHost && f.host.Fits(f.at, v):
			o := &b.ios[b.n]
			b.n++
			o.Reset(blk.IORead, f.host, f.at, f.len, v, nil)
			t.Start(o)
		default:
			err := blk.Do(t, n.layers[f.layer].Node, &blk.Request{Op: blk.OpRead, Off: off, Len: f.len, Data: v})
			if err != nil {
				return err
			}
		}
		done += f.len
	}
	return nil
}

// Children are the layers.
func (n *Node) Children() []blk.Node {
	all := make([]blk.Node, len(n.layers))
	for i := range n.layers {
		all[i] = n.layers[i].Node
	}
	return all
}

// Close closes the layers.
func (n *Node) Close() error {
	var errs []error
	for i := range n.layers {
		errs = append(errs, n.layers[i].Close())
	}
	return errors.Join(errs...)
}
