// SPDX-License-Identifier: Apache-2.0

package addcow

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// block is the unit in which the bitmap is written, in bytes.
const block = 4 << 10

// bitset has the bits of the file in the same order: the least significant bit of a word is the first cluster.
type bitset []atomic.Uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(first, n int64) {
	b.each(first, n, func(w *atomic.Uint64, m uint64) { w.Or(m) })
}

func (b bitset) clear(first, n int64) {
	b.each(first, n, func(w *atomic.Uint64, m uint64) { w.And(^m) })
}

func (b bitset) each(first, n int64, fn func(w *atomic.Uint64, mask uint64)) {
	for end := first + n; first < end; {
		to := min(end, first|63+1)
		fn(&b[first/64], ^uint64(0)>>(64-uint(to-first))<<uint(first&63))
		first = to
	}
}

// run says whether bit i is set, and how many of at most most bits from there on are like it; at least one. Others may
// change bits meanwhile.
func (b bitset) run(i, most int64) (set bool, n int64) {
	for n < most {
		at := i + n
		w := b[at/64].Load() >> uint(at&63)
		if n == 0 {
			set = w&1 != 0
		}
		if set {
			w = ^w
		}
		left := 64 - at&63
		same := min(int64(bits.TrailingZeros64(w)), left)
		n += same
		if same < left {
			break
		}
	}
	return set, min(n, most)
}

func (b bitset) count() (n int64) {
	for i := range b {
		n += int64(bits.OnesCount64(b[i].Load()))
	}
	return n
}

// bitmap is the allocation bitmap, in memory and in the file. Bits are only ever set, each by whoever has its cluster
// locked.
type bitmap struct {
	storage  blk.Node
	off      int64 // of the first bit in the file
	clusters int64
	known    bitset // what counts: set when the file says so, too
	wanted   bitset // what the file is to hold: also what is being stored
	dirty    bitset // blocks in which the file may hold something else

	storing blk.TaskLock
	asked   atomic.Int64
	done    int64 // those who asked up to this one are stored; under storing

	written atomic.Int64 // writes to the file
	synced  atomic.Int64 // of those, the ones that are durable
}

func newBitmap(storage blk.Node, h *Header, clusters int64) *bitmap {
	return &bitmap{
		storage: storage, off: h.Size, clusters: clusters,
		known: newBitset(clusters), wanted: newBitset(clusters), dirty: newBitset((clusters + 8*block - 1) / (8 * block)),
	}
}

// load reads the file, which may end early. Bits behind the last cluster mean nothing.
func (b *bitmap) load(t *blk.Task) error {
	buf := blk.GetBuffer(1 << 20)
	defer buf.Free()
	end := min(b.off+int64(len(b.known))*8, b.storage.Info().Size)
	for off := b.off; off < end; {
		p := buf.B[:min(int64(len(buf.B)), end-off)]
		if err := readAt(t, b.storage, p, off); err != nil {
			return fmt.Errorf("read the bitmap: %w", err)
		}
		for w := (off - b.off) / 8; len(p) >= 8; w++ {
			v := binary.LittleEndian.Uint64(p)
			b.known[w].Store(v)
			b.wanted[w].Store(v)
			p = p[8:]
		}
		off += min(int64(len(buf.B)), end-off)
	}
	if over := int64(len(b.known))*64 - b.clusters; over > 0 {
		b.known.clear(b.clusters, over)
		b.wanted.clear(b.clusters, over)
	}
	return nil
}

// set stores the bits and lets them count. What they stand for must be durable in the image file already, for nobody
// can say when the host writes them to its disk. Several at a time share a write.
func (b *bitmap) set(t *blk.Task, first, n int64) error {
	b.wanted.set(first, n)
	b.mark(first, n)
	me := b.asked.Add(1)
	defer b.storing.Lock(t)()
	if b.done < me {
		all := b.asked.Load()
		if err := b.storeLocked(t); err != nil {
			// The file may have them or not. They do not count, and the next write of the block takes them back.
			b.wanted.clear(first, n)
			b.mark(first, n)
			return fmt.Errorf("write the bitmap: %w", err)
		}
		b.done = all
	}
	b.known.set(first, n)
	return nil
}

func (b *bitmap) mark(first, n int64) {
	b.dirty.set(first/(8*block), (first+n-1)/(8*block)-first/(8*block)+1)
}

// storeLocked writes all dirty blocks.
func (b *bitmap) storeLocked(t *blk.Task) error {
	buf := blk.GetBuffer(block)
	defer buf.Free()
	wrote := int64(0)
	for i := int64(0); i < int64(len(b.dirty))*64; i++ {
		set, n := b.dirty.run(i, int64(len(b.dirty))*64-i)
		if !set {
			i += n - 1
			continue
		}
		b.dirty.clear(i, 1) // before the bits are looked at
		const words = block / 8
		part := b.wanted[i*words : min((i+1)*words, int64(len(b.wanted)))]
		clear(buf.B)
		for k := range part {
			binary.LittleEndian.PutUint64(buf.B[k*8:], part[k].Load())
		}
		if err := writeAt(t, b.storage, buf.B, b.off+i*block); err != nil {
			b.dirty.set(i, 1)
			return err
		}
		wrote = 1
	}
	b.written.Add(wrote)
	return nil
}

// clean reports whether a flush has nothing to do for the bitmap.
func (b *bitmap) clean() bool {
	if b.written.Load() != b.synced.Load() {
		return false
	}
	for i := range b.dirty {
		if b.dirty[i].Load() != 0 {
			return false
		}
	}
	return true
}

// sync makes everything durable that has been stored, and stores again what failed. That takes back bits that nobody was
// promised. A file without room has not changed, so they can stay for the next time: the guest's flush does not fail
// because a copy of a job had no room.
func (b *bitmap) sync(t *blk.Task) error {
	if b.clean() {
		return nil
	}
	unlock := b.storing.Lock(t)
	err := b.storeLocked(t)
	unlock()
	if err != nil && !blk.IsNoSpace(err) {
		return fmt.Errorf("write the bitmap: %w", err)
	}
	seq := b.written.Load()
	if err := blk.Do(t, b.storage, &blk.Request{Op: blk.OpFlush}); err != nil {
		return err
	}
	for {
		old := b.synced.Load()
		if old >= seq || b.synced.CompareAndSwap(old, seq) {
			return nil
		}
	}
}
