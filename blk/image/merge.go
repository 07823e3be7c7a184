// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"slices"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/chain"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Images of a chain in use are merged into the one behind them, the base, in these steps. Those marked * need a disk
// with nothing in flight, and give an image that takes the place of the one before; whoever did them calls Settle when
// the guest goes on.
//
//	OpenMerge   the base is opened for writing, with the locks of a writer
//	Insert *    the base that is open for writing takes the place of the one that is open for reading
//	Grow *      the base is made as large as the images need it
//	            (the caller copies into Base what the merged images hold)
//	Drop *      the merged images go: the one before them names the base as its backing image, durably
//	Turn        or, if the guest was on the first of them: it is on the base now
//	Remove *    or nothing happens: the base is read-only again
//
// Until Drop or Turn, the base is written while it is still behind the images that are merged. Only such places may
// be written that these images hold, so that the base does not show there, or that a guest's write goes to in both.
// A crash at any point therefore leaves the old chain, with all that it showed, or the new one.
//
// Only a part of a cluster of the base may be written, and the rest is then filled up from behind it: with what the base
// showed there before. So what anyone reads through the base stays the same. Its tables change, though. That is why the
// chain in use reads through the very node that writes (ownPart), which knows where everything is; it says nothing about
// places in the host's file, which somebody could keep for too long.

// ErrMerge: images cannot be merged as asked.
var ErrMerge = errors.New("these images cannot be merged")

// Merge is a merge in progress.
type Merge struct {
	image     *Image // that is in use now
	top, base int    // places in the chain
	reader    *Member
	writer    *Member
	below     *chain.Node // what is behind the base; nil: nothing
	size      int64       // of what the images show, in bytes
	over      *Member     // the image before top, open for writing; nil if top is the first, or the second
	o         Options
	settle    func() error
}

// OpenMerge prepares for merging the images from place top of the chain up to the one before place base.
func OpenMerge(t *blk.Task, g *Image, top, base int, o Options) (_ *Merge, err error) {
	if top < 0 || base <= top || base >= len(g.Chain) {
		return nil, fmt.Errorf("images %d to %d of %d: %w", top, base, len(g.Chain), ErrMerge)
	}
	for _, i := range []int{0, max(top-1, 0), base} {
		switch m := g.Chain[i]; {
		case m.AddCow != nil:
			return nil, fmt.Errorf("%q is an add-cow image, which can neither be merged into nor be over what is merged: %w", m.Path, ErrMerge)
		case m.layer != nil: // a second writer would not see the tables of the first, which writes them when it is closed
			return nil, fmt.Errorf("%q is still open for writing, for a merge that could not be taken back: "+
				"the disk must be closed first, as by a restart of the daemon: %w", m.Path, ErrMerge)
		}
	}
	for _, m := range g.Chain[top:base] {
		// They show the base where the image held nothing then and does now, so where the base is written.
		if m.Header != nil && m.Header.SnapshotCount > 0 {
			return nil, fmt.Errorf("%q has internal snapshots, which need the images behind it as they are: %w", m.Path, ErrMerge)
		}
	}
	o.ReadOnly, o.Backing, o.Cache = false, nil, g.cache
	o.Align = blk.SectorSize // images are copied as they are, whatever the guest's blocks are
	m := &Merge{image: g, top: top, base: base, size: g.Chain[top].Node.Info().Size, reader: g.Chain[base], o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	if have := m.reader.Size; top == 0 && have > m.size {
		return nil, fmt.Errorf("%q has %d bytes, the disk has %d: make the disk as large first: %w", m.reader.Path, have, m.size, ErrMerge)
	}
	var behind blk.Node
	if base+1 < len(g.Chain) {
		rest := &Image{Chain: g.Chain[base:]}
		if err := rest.joinLower(nil); err != nil {
			return nil, err
		}
		m.below, behind = rest.Lower, rest.Lower
	}
	if m.writer, err = upgrade(t, m.reader, o, behind); err != nil {
		return nil, err
	}
	m.writer.Backing = m.reader.Backing
	if top > 1 {
		if m.over, err = upgrade(t, g.Chain[top-1], o, nil); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// upgrade opens a member for writing that is open for reading. The image is locked all the time.
func upgrade(t *blk.Task, m *Member, o Options, backing blk.Node) (*Member, error) {
	return reopen(t, m, o, backing, func(w *Member) error {
		err := m.unlock() // its locks forbid ours
		if err == nil {
			err = w.lock()
		}
		return errors.Join(err, m.claim())
	})
}

// downgrade closes w, which is m open for writing.
func downgrade(w, m *Member) error { return errors.Join(w.Node.Close(), m.lock()) }

// Base is where to write.
func (m *Merge) Base() blk.Node { return m.writer.Node }

// Depth is how many images before the base are merged, and so how deep the base is in View.
func (m *Merge) Depth() int { return m.base - m.top }

// View is what the images to be merged show. It is used after Insert and not closed.
func (m *Merge) View() (blk.Node, error) {
	var layers []blk.Node
	for _, l := range m.image.Chain[m.top:] {
		layers = append(layers, l.inChain())
	}
	n, err := chain.New(layers, chain.Options{Unit: unit(m.image.Chain)})
	if err != nil { // an interface that holds a nil pointer would not be nil
		return nil, err
	}
	return n, nil
}

// become makes the image with this chain. Its first one stays where it is, over the others.
func (m *Merge) become(members ...[]*Member) (*Image, *qcow2.Node, error) {
	g := &Image{Root: m.image.Root, Chain: slices.Concat(members...), cache: m.image.cache}
	root, ok := g.Root.(*qcow2.Node)
	if !ok {
		return nil, nil, fmt.Errorf("image %q has no backing image: %w", g.Chain[0].Path, ErrMerge) // not reachable
	}
	return g, root, g.joinLower(nil)
}

// Insert puts the base that can be written into the chain.
func (m *Merge) Insert() (*Image, error) {
	m.writer.layer = &ownPart{m.writer.Node}
	c := m.image.Chain
	g, root, err := m.become(c[:m.base], []*Member{m.writer}, c[m.base+1:])
	if err != nil {
		return nil, err
	}
	root.Over(g.Lower)
	m.image, m.settle = g, m.reader.Node.Close
	m.reader = nil
	return g, nil
}

// Grow makes the base as large as what the images show. It comes after Insert, since it changes the tables that the chain
// reads the base with. After an error the base is to be removed.
func (m *Merge) Grow(t *blk.Task) error {
	if m.writer.Size >= m.size {
		return nil
	}
	// The new part shows zeros, whatever is behind the base.
	r, ok := m.writer.Node.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return fmt.Errorf("image %q: %w", m.writer.Path, blk.ErrNotSupported) // not reachable
	}
	if err := r.Resize(t, m.size, false); err != nil {
		return err
	}
	m.writer.Size = m.size
	return flush(t, m.writer.Node)
}

// reread opens the base for reading again, when all that was written there is durable.
func (m *Merge) reread(t *blk.Task) error {
	if err := flush(t, m.writer.Node); err != nil {
		return err
	}
	o := m.o
	o.ReadOnly = true
	var err error
	if m.reader, err = reopen(t, m.writer, o, nil, nil); err != nil {
		return err
	}
	m.reader.Backing = m.writer.Backing
	return nil
}

// Drop takes the merged images out of the chain.
func (m *Merge) Drop(t *blk.Task) (_ *Image, err error) {
	if err := m.reread(t); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.reader.Node.Close())
			m.reader = nil
		}
	}()
	c := m.image.Chain
	g, root, err := m.become(c[:m.top], []*Member{m.reader}, c[m.base+1:])
	if err != nil {
		return nil, err
	}
	name, err := absolute(m.reader.Path)
	if err != nil {
		return nil, err
	}
	// The one point at which the chain changes for whoever opens it next.
	if m.over == nil {
		if err := root.SetBacking(t, g.Lower, name, m.reader.Format); err != nil {
			return nil, err
		}
		c[0].Header = root.Header()
	} else {
		over, ok := m.over.Node.(*qcow2.Node)
		if !ok {
			return nil, fmt.Errorf("image %q has no backing image: %w", m.over.Path, ErrMerge) // not reachable
		}
		if err := over.SetBacking(t, nil, name, m.reader.Format); err != nil {
			return nil, err
		}
		root.Over(g.Lower)
		c[m.top-1].Header = over.Header()
	}
	c[m.top-1].Backing = name
	m.image = g
	m.settle = func() error {
		var errs []error
		for _, merged := range c[m.top:m.base] {
			errs = append(errs, merged.Node.Close())
		}
		return errors.Join(append(errs, m.readOnly())...)
	}
	return g, nil
}

// Remove takes the base that can be written out of the chain again, and nothing is merged.
func (m *Merge) Remove(t *blk.Task) (*Image, error) {
	if err := m.reread(t); err != nil {
		return nil, err
	}
	c := m.image.Chain
	g, root, err := m.become(c[:m.base], []*Member{m.reader}, c[m.base+1:])
	if err != nil {
		err = errors.Join(err, m.reader.Node.Close())
		m.reader = nil
		return nil, err
	}
	root.Over(g.Lower)
	m.image, m.settle = g, m.readOnly
	return g, nil
}

// Turn gives the image that begins with the base, which the guest is on.
func (m *Merge) Turn() *Image {
	c := m.image.Chain
	m.writer.layer = nil
	g := &Image{Root: m.writer.Node, Lower: m.below, Chain: slices.Concat([]*Member{m.writer}, c[m.base+1:]), cache: m.image.cache}
	m.image = g
	m.settle = func() error {
		var errs []error
		for _, merged := range c[:m.base] {
			errs = append(errs, merged.Node.Close())
		}
		return errors.Join(errs...)
	}
	return g
}

// Settle closes what the last step made superfluous.
func (m *Merge) Settle() error { return m.settle() }

// readOnly closes what was open for writing.
func (m *Merge) readOnly() error {
	err := downgrade(m.writer, m.reader)
	if m.over != nil {
		err = errors.Join(err, downgrade(m.over, m.image.Chain[m.top-1]))
	}
	return err
}

// Close gives a merge up that was not inserted.
func (m *Merge) Close() error {
	var err error
	if m.writer != nil {
		err = downgrade(m.writer, m.reader)
	}
	if m.over != nil {
		err = errors.Join(err, downgrade(m.over, m.image.Chain[m.top-1]))
	}
	return err
}

// ownPart is an image of a chain that is also written: it shows what the image itself holds.
type ownPart struct{ child blk.Node }

// Info implements blk.Node.
func (h *ownPart) Info() *blk.Info { return h.child.Info() }

func (h *ownPart) only(x blk.Extent) blk.Extent {
	if x.Depth > 0 {
		return blk.Extent{Len: x.Len, State: blk.Unallocated}
	}
	return blk.Extent{Len: x.Len, State: x.State}
}

// TryMap says what is not data. That is read with Do.
func (h *ownPart) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	if op != blk.OpRead {
		return blk.Extent{}, false
	}
	x, ok := h.child.TryMap(op, off, l)
	x = h.only(x)
	return x, ok && x.State != blk.Data
}

// Map implements blk.Node.
func (h *ownPart) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	x, err := h.child.Map(t, off, l)
	return h.only(x), err
}

// Do reads.
func (h *ownPart) Do(t *blk.Task, r *blk.Request) error {
	if r.Op != blk.OpRead {
		return blk.ErrNotSupported
	}
	return blk.Do(t, h.child, r)
}

// Children is the image.
func (h *ownPart) Children() []blk.Node { return []blk.Node{h.child} }

// Close closes the image.
func (h *ownPart) Close() error { return h.child.Close() }
