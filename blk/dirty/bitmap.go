// SPDX-License-Identifier: Apache-2.0

package dirty

import (
	"errors"
	"slices"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// What is done with the bitmaps. Everything but State, Bits and Sync is to be called with nothing in flight, within
// blk.Graph.Change: then the instant from which a bitmap records is the same for all queues.

// ErrFrozen: the bitmap is frozen.
var ErrFrozen = errors.New("the bitmap is in use by a backup")

// Add begins a bitmap that has the given bits, and takes them over. storage is an empty file, which the node owns from
// then on, and which holds the bits durably when Add returns.
func (n *Node) Add(t *blk.Task, storage blk.Node, bits *blk.Bitmap) (*Bitmap, error) {
	n.files.Lock()
	defer n.files.Unlock()
	if err := n.Err(); err != nil {
		return nil, err
	}
	b := &Bitmap{n: n, bits: bits, file: bitsFile{storage: storage, size: -1, changed: map[int64]struct{}{}}}
	b.file.all(bits)
	if err := b.file.write(t, n.size, bits); err != nil {
		return nil, err
	}
	n.collect(0, n.size) // for those that are there already
	n.bitmaps = append(n.bitmaps, b)
	n.renew()
	return b, nil
}

// renew begins with nothing marked as recent or stable, after everything was collected.
func (n *Node) renew() {
	g := int64(MaxGranularity)
	for _, b := range n.bitmaps {
		g = min(g, b.bits.Granularity())
	}
	n.recent, n.stable = blk.NewBitmap(n.size, g), blk.NewBitmap(n.size, g)
	n.fresh = nil
	n.mu.Lock()
	defer n.mu.Unlock()
	n.untracked.Store(len(n.bitmaps) == 0 || n.gone)
}

// setSize is for Over.
func (n *Node) setSize(size int64) {
	if n.recent != nil {
		n.collect(0, n.size)
	}
	old := n.size
	n.size, n.shift = size, minRegionShift
	for size>>n.shift >= maxRegions {
		n.shift++
	}
	for _, b := range n.bitmaps {
		bits := blk.NewBitmap(size, b.bits.Granularity())
		bits.Merge(b.bits)
		if size > old {
			bits.Set(old, size-old)
		}
		b.bits = bits
		if b.frozen != nil {
			f := blk.NewBitmap(size, b.bits.Granularity())
			f.Merge(b.frozen)
			b.frozen = f
		}
		b.file.all(bits)
	}
	// The regions of the old size count until the list is written the next time; by then the files hold all.
	n.mu.Lock()
	n.active = map[int64]int{}
	n.mu.Unlock()
	n.regions = make([]atomic.Uint32, (size>>n.shift)+1)
	n.renew()
}

// Remove ends a bitmap and closes its file.
func (b *Bitmap) Remove() error {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	if b.frozen != nil {
		return ErrFrozen
	}
	n.collect(0, n.size)
	n.bitmaps = slices.DeleteFunc(n.bitmaps, func(o *Bitmap) bool { return o == b })
	n.renew()
	return b.file.storage.Close()
}

// Clear forgets what was written before, durably.
func (b *Bitmap) Clear(t *blk.Task) error {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	if b.frozen != nil {
		return ErrFrozen
	}
	n.collect(0, n.size)
	return n.reset(t, b, blk.NewBitmap(n.size, b.bits.Granularity()))
}

// reset gives a bitmap fewer bits, durably. The regions on the list stay there, and count after a crash.
func (n *Node) reset(t *blk.Task, b *Bitmap, bits *blk.Bitmap) error {
	if err := n.Err(); err != nil {
		return err
	}
	b.bits = bits
	b.file.all(bits)
	n.renew()
	if !n.save(t) {
		return n.Err()
	}
	return nil
}

// Freeze returns a copy of what was written up to now, and begins anew in memory. After a crash everything counts, until
// Thaw.
func (b *Bitmap) Freeze() (*blk.Bitmap, error) {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	if err := n.Err(); err != nil {
		return nil, err
	}
	if b.frozen != nil {
		return nil, ErrFrozen
	}
	n.collect(0, n.size)
	b.frozen, b.bits = b.bits, blk.NewBitmap(n.size, b.bits.Granularity())
	c := blk.NewBitmap(n.size, b.frozen.Granularity())
	c.Merge(b.frozen)
	return c, nil
}

// Thaw ends what Freeze began: done forgets, durably, what was written before; else that counts again. After an error
// it counts again, too. Forgetting may be half done after a crash, so whatever makes it right must be durable before.
func (b *Bitmap) Thaw(t *blk.Task, done bool) error {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	if b.frozen == nil {
		return nil
	}
	n.collect(0, n.size)
	old := b.frozen
	b.frozen = nil
	if done {
		err := n.reset(t, b, b.bits)
		if err != nil {
			b.bits.Merge(old)
		}
		return err
	}
	b.bits.Merge(old)
	return nil
}

// Err says why the bitmap cannot be relied on any more; nil: it can.
func (b *Bitmap) Err() error { return b.n.Err() }

// Granularity is what a bit stands for, in bytes.
func (b *Bitmap) Granularity() int64 { return b.bits.Granularity() }

// State is what a user may know of a bitmap: how many bytes its bits stand for, and whether it is frozen.
func (b *Bitmap) State() (bytes int64, frozen bool) {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	frozen = b.frozen != nil
	return n.bitsOf(b).Bytes(), frozen
}

// Bits is a copy of a bitmap, with what is frozen.
func (b *Bitmap) Bits() *blk.Bitmap {
	n := b.n
	n.files.Lock()
	defer n.files.Unlock()
	return n.bitsOf(b)
}

func (n *Node) bitsOf(b *Bitmap) *blk.Bitmap {
	n.collect(0, n.size)
	c := blk.NewBitmap(n.size, b.bits.Granularity())
	for _, m := range b.all() {
		c.Merge(m)
	}
	return c
}

// Sync makes the files hold everything and the list empty. With nothing in flight, then and from then on, the files are
// all that a restart needs.
func (n *Node) Sync(t *blk.Task) error {
	n.files.Lock()
	defer n.files.Unlock()
	if err := n.Err(); err != nil {
		return err
	}
	n.retire(t, n.list())
	n.collect(0, n.size)
	if !n.writeList(t, n.list()) {
		return n.Err()
	}
	return nil
}
