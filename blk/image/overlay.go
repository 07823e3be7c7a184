// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"slices"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/chain"
	"github.com/blkstream/blkstream/blk/file"
)

// An overlay is put over an image that a guest uses in three steps: OpenOverlay, while the guest goes on; Join, with
// nothing in flight; and, when the guest is on the new image, Retire. Up to Retire, Close undoes everything.

// ErrOverlay: an image cannot be put over another one, because of what it is or holds.
var ErrOverlay = errors.New("not an empty overlay of the image")

// Overlay is an image that is about to be put over another one.
type Overlay struct {
	old   *Image
	top   *Image  // of one image
	base  *Member // the first image of old; nil before Join
	image *Image  // likewise
	o     Options
}

// OpenOverlay opens the empty image at path, qcow2 or add-cow, whose backing image must be the first one of old. It is
// as large as old, or with add-cow perhaps larger.
func OpenOverlay(t *blk.Task, path, format string, old *Image, o Options) (_ *Overlay, err error) {
	o.ReadOnly, o.Backing, o.Cache = false, nil, old.cache
	v := &Overlay{old: old, top: &Image{cache: old.cache}, o: o}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.Close())
		}
	}()
	if len(old.Chain) > chain.MaxDepth {
		return nil, fmt.Errorf("image %q: more than %d images behind it: %w", path, chain.MaxDepth, ErrDepth)
	}
	if err := v.top.openFiles(t, Layer{path, format}, o, false); err != nil {
		return nil, err
	}
	if err := v.fits(v.top.Chain[0]); err != nil {
		return nil, err
	}
	if err := v.top.openNode(t, 0, o, nil); err != nil {
		return nil, err
	}
	m := v.top.Chain[0]
	size := old.Root.Info().Size
	if m.Size < size || m.Size > size && format != AddCow {
		return nil, fmt.Errorf("image %q has %d bytes, %q has %d: %w", path, m.Size, old.Chain[0].Path, size, ErrOverlay)
	}
	// What the guest reads must not change.
	for off := int64(0); off < m.Size; {
		x, err := m.Node.Map(t, off, m.Size-off)
		if err != nil {
			return nil, err
		}
		if x.State != blk.Unallocated {
			return nil, fmt.Errorf("image %q holds data at offset %d: %w", path, off, ErrOverlay)
		}
		off += x.Len
	}
	return v, nil
}

// fits compares what the overlay's header says with the image.
func (v *Overlay) fits(m *Member) error {
	base, says := v.old.Chain[0], m.backing()
	if says.Path == "" {
		return fmt.Errorf("image %q has no backing file, %q is wanted: %w", m.Path, base.Path, ErrOverlay)
	}
	path, err := Resolve(m.Path, says.Path)
	if err != nil {
		return fmt.Errorf("image %q: backing file %w", m.Path, err)
	}
	seen := &identities{}
	if err := seen.add(base.Path); err != nil {
		return err
	}
	switch err := seen.add(path); {
	case err == nil:
		return fmt.Errorf("image %q has the backing file %q, %q is wanted: %w", m.Path, path, base.Path, ErrOverlay)
	case !errors.Is(err, ErrLoop):
		return err
	case says.Format != base.Format:
		return fmt.Errorf("image %q names its backing file's format %q, it is %q: %w", m.Path, says.Format, base.Format, ErrOverlay)
	}
	m.Backing = path
	return nil
}

// Join makes the image that the guest is to go on with. Nothing may be in flight to the old one, which stays as good as
// it was: it is flushed, and its first image is open a second time, for reading.
func (v *Overlay) Join(t *blk.Task) (*Image, error) {
	// From now on the guest's flushes do not come here.
	if err := flush(t, v.old.Root); err != nil {
		return nil, err
	}
	o := v.o
	o.ReadOnly = true
	first := v.old.Chain[0]
	base, err := reopen(t, first, o, nil, nil)
	if err != nil {
		return nil, err
	}
	v.base = base
	base.Backing = first.Backing
	g := &Image{
		Chain: slices.Concat(v.top.Chain, []*Member{base}, v.old.Chain[1:]),
		cache: v.old.cache, warnings: v.top.warnings,
	}
	if err := g.joinLower(v.old.Lower); err != nil {
		return nil, err
	}
	top, ok := g.Chain[0].Node.(interface {
		blk.Node
		Over(backing blk.Node)
	})
	if !ok {
		return nil, fmt.Errorf("image %q: %w", g.Chain[0].Path, ErrOverlay) // not reachable: it was opened as one
	}
	top.Over(g.Lower)
	g.Root, v.image = top, g
	return g, nil
}

// joinLower puts the images behind the first one together. from, if not nil, may be the lower part of them.
func (g *Image) joinLower(from *chain.Node) (err error) {
	g.Lower = nil
	if len(g.Chain) == 1 {
		return nil
	}
	var lower []blk.Node
	for _, m := range g.Chain[1:] {
		lower = append(lower, m.inChain())
	}
	g.Lower, err = chain.New(lower, chain.Options{Unit: unit(g.Chain), From: from})
	if err != nil {
		return fmt.Errorf("image %q: %w", g.Chain[0].Path, err)
	}
	return nil
}

// inChain is what a chain has of the member.
func (m *Member) inChain() blk.Node {
	if m.layer != nil {
		return m.layer
	}
	return m.Node
}

// Size is that of the disk on the overlay, in bytes.
func (v *Overlay) Size() int64 { return v.top.Chain[0].Size }

// Retire closes what the guest was on, but for the images that the new one has taken over. Those are locked against
// writers by then without a gap.
func (v *Overlay) Retire() error {
	v.old.Chain = v.old.Chain[:1]
	err := v.old.Close()
	return errors.Join(err, v.base.lock())
}

// Close undoes everything. The old image is as it was.
func (v *Overlay) Close() error {
	err := v.top.Close()
	if v.base != nil {
		err = errors.Join(err, v.base.Node.Close())
	}
	return err
}

// BackingName is how an overlay names the first image of g as its backing file, whatever folder it is in.
func (g *Image) BackingName() (string, error) { return absolute(g.Chain[0].Path) }

// reopen opens one image of a chain alone, a second time. Its locks are taken and those of others not looked for: the
// first opening has conflicting ones. between, if not nil, is called with the files open and nothing read yet.
func reopen(t *blk.Task, m *Member, o Options, backing blk.Node, between func(*Member) error) (_ *Member, err error) {
	o.claim = true
	g := &Image{cache: o.Cache}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	if err := g.openFiles(t, m.Layer, o, false); err != nil {
		return nil, err
	}
	again := g.Chain[0]
	if err := again.sameFiles(m); err != nil {
		return nil, err
	}
	if between != nil {
		if err := between(again); err != nil {
			return nil, err
		}
	}
	if err := g.openNode(t, 0, o, backing); err != nil {
		return nil, err
	}
	return again, nil
}

// sameFiles wants both to be open on the same files: the paths may lead to others by now.
func (m *Member) sameFiles(was *Member) error {
	same := len(m.files) == len(was.files)
	for i := 0; same && i < len(m.files); i++ {
		var err error
		if same, err = m.files[i].Same(was.files[i]); err != nil {
			return fmt.Errorf("image %q: %w", m.Path, err)
		}
	}
	if !same {
		return fmt.Errorf("image %q: %w", m.Path, ErrReplaced)
	}
	return nil
}

// lock takes a member's locks. Whoever else has conflicting ones, another opening of our own included, must have given
// them up.
func (m *Member) lock() error { return m.each((*file.Node).Lock) }

// claim takes a member's locks and does not look for those of others.
func (m *Member) claim() error { return m.each((*file.Node).Claim) }

// unlock gives up all locks but the right to read.
func (m *Member) unlock() error { return m.each((*file.Node).Unlock) }

func (m *Member) each(fn func(*file.Node) error) error {
	var errs []error
	for _, f := range m.files {
		errs = append(errs, fn(f))
	}
	return errors.Join(errs...)
}
