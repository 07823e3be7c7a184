// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/chain"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Drop takes the images between the first one and base out of the chain, which are those from 1 to base-1; base may be
// the chain's length: then nothing stays behind the first. Nothing may be in flight, and the first image must hold what
// the others show, apart from what base and those behind it do. All of that is made durable before the header says so,
// and Drop returns when the header is durable, too: a crash leaves the old chain or the new one, which read the same.
//
// An add-cow image can only leave all that is behind it. Its bitmap is not needed then either, and its image file, a raw
// image, takes its place. The file with the bitmap stays valid, and is closed with the others.
//
// What stays is in the image that is returned, and what went is the caller's, to be closed with CloseMembers; the old
// image is not used any more. After an error it is what counts, whatever the header says.
func (g *Image) Drop(t *blk.Task, base int) (*Image, []*Member, error) {
	if base < 2 && base != len(g.Chain) || base > len(g.Chain) {
		return nil, nil, fmt.Errorf("drop images of the chain down to %d of %d: %w", base, len(g.Chain), blk.ErrInvalid)
	}
	var (
		l     Layer
		lower *chain.Node
		node  blk.Node // an interface that holds a nil pointer would not be nil
	)
	if g.Chain[0].AddCow != nil {
		return g.finish(t, base)
	}
	kept := append([]*Member{g.Chain[0]}, g.Chain[base:]...)
	if base < len(g.Chain) {
		l = Layer{g.nameOf(base), g.Chain[base].Format}
		var nodes []blk.Node
		for _, m := range kept[1:] {
			nodes = append(nodes, m.Node)
		}
		var err error
		if lower, err = chain.New(nodes, chain.Options{Unit: unit(kept)}); err != nil {
			return nil, nil, fmt.Errorf("image %q: %w", g.Chain[0].Path, err)
		}
		node = lower
	}
	if err := flush(t, g.Root); err != nil {
		return nil, nil, err
	}
	if err := g.setBacking(t, node, l); err != nil {
		return nil, nil, err
	}
	first := *g.Chain[0]
	first.Backing, first.Header = "", g.Chain[0].Node.(*qcow2.Node).Header() //nolint:errcheck // setBacking took no other
	if lower != nil {
		first.Backing = kept[1].Path
	}
	kept[0] = &first
	return &Image{Root: g.Root, Lower: lower, Chain: kept, cache: g.cache, warnings: g.warnings}, g.Chain[1:base], nil
}

// finish is Drop for an add-cow image.
func (g *Image) finish(t *blk.Task, base int) (*Image, []*Member, error) {
	m := g.Chain[0]
	n, ok := m.Node.(*addcow.Node)
	if !ok || base < len(g.Chain) {
		return nil, nil, fmt.Errorf("image %q: of what is behind an add-cow image nothing can stay: %w", m.Path, blk.ErrInvalid)
	}
	if err := n.Finish(t); err != nil {
		return nil, nil, fmt.Errorf("image %q: %w", m.Path, err)
	}
	kept := &Member{Layer: Layer{m.DataFile, Raw}, Size: m.Size, Node: m.image, files: m.files[1:]}
	gone := append([]*Member{{Layer: m.Layer, Node: m.files[0]}}, g.Chain[1:]...)
	return &Image{Root: kept.Node, Chain: []*Member{kept}, cache: g.cache, warnings: g.warnings}, gone, nil
}

// nameOf is what the first image's header is to call image i: what the image in front of that says, if it is in the same
// directory, so that a chain with relative names can still be moved; else the path.
func (g *Image) nameOf(i int) string {
	by, path := g.Chain[i-1], g.Chain[i].Path
	if says := by.backing(); says.Path != "" && folder(by.Path) == folder(g.Chain[0].Path) {
		if p, err := Resolve(by.Path, says.Path); err == nil && p == path {
			return says.Path
		}
	}
	return path
}

// CloseMembers closes images that are out of their chain.
func CloseMembers(ms []*Member) error {
	var errs []error
	for _, m := range ms {
		errs = append(errs, m.Node.Close())
	}
	return errors.Join(errs...)
}
