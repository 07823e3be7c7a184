// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"syscall"

	"github.com/blkstream/blkstream/blk"
)

// L1 and L2 tables. Memory holds what is on the storage, never more: an entry is published when it has been written.
// Anyone reads without locks. Who changes an L2 entry holds the guest's cluster in Node.clusters.

// l1Table is the active L1 table, and the L2 tables in memory. Pointers to tables change under Cache.mu.
type l1Table struct {
	host    int64
	entries []atomic.Uint64
	tables  []atomic.Pointer[table]
}

func (l *l1Table) entry(i int64) l1Entry { return l1Entry(l.entries[i].Load()) }

// table is an L2 table in memory.
type table struct {
	cached
	layout  *layout
	l1Index int64
	host    int64
	words   []atomic.Uint64
	seq     atomic.Uint32 // odd while an entry of two words changes
	bad     bool          // has damaged entries, of which the image's are not kept: never written

	blocks  blk.RangeLock // by byte in the table: blocks that are being written
	pending []*update     // under Node.mu
}

func (tab *table) evict() { tab.node.l1.Load().tables[tab.l1Index].CompareAndSwap(tab, nil) }

// entries is the number of entries.
func (tab *table) entries() int { return len(tab.words) / tab.layout.words }

// at is the i-th entry. ok is false if it is changing right now.
func (tab *table) at(i int) (c cluster, ok bool) {
	if tab.layout.words == 1 {
		return tab.layout.decode(l2Entry(tab.words[i].Load()), 0), true
	}
	seq := tab.seq.Load()
	e, sub := tab.words[2*i].Load(), tab.words[2*i+1].Load()
	return tab.layout.decode(l2Entry(e), sub), seq&1 == 0 && tab.seq.Load() == seq
}

// stableAt is at for who may wait a moment.
func (tab *table) stableAt(i int) cluster {
	c, ok := tab.at(i)
	if !ok {
		tab.node.mu.Lock()
		c, _ = tab.at(i)
		tab.node.mu.Unlock()
	}
	return c
}

// loadL1 reads the L1 table. Entries that cannot be are marked and refused when they are used.
func (n *Node) loadL1(t *blk.Task) error {
	h := &n.header
	l := &l1Table{
		host:    h.L1Offset,
		entries: make([]atomic.Uint64, h.L1Size),
		tables:  make([]atomic.Pointer[table], h.L1Size),
	}
	err := n.readWords(t, h.L1Offset, int64(h.L1Size), func(i int64, w uint64) {
		if w&^uint64(offsetMask|copied) != 0 || w&offsetMask&uint64(n.clusterSize()-1) != 0 || w == copied {
			w |= damaged
		}
		l.entries[i].Store(w)
	})
	if err != nil {
		return fmt.Errorf("read L1 table: %w", err)
	}
	n.l1.Store(l)
	return nil
}

// readWords reads a table of count words, in pieces.
func (n *Node) readWords(t *blk.Task, off, count int64, fn func(i int64, w uint64)) error {
	const piece = 128 << 10
	buf := blk.GetBuffer(piece)
	defer buf.Free()
	for i := int64(0); i < count; {
		b := buf.B[:min(piece, (count-i)*8)]
		if err := readClipped(t, n.storage, blk.BytesVec(nil, b), off+i*8); err != nil {
			return err
		}
		for ; len(b) > 0; b = b[8:] {
			fn(i, binary.BigEndian.Uint64(b))
			i++
		}
	}
	return nil
}

// readClipped reads from a file that may end before the range does: zeros follow.
func readClipped(t *blk.Task, from blk.Node, v blk.Vec, off int64) error {
	l := v.Len()
	have := max(min(from.Info().Size-off, l), 0)
	if have < l {
		v.AppendSlice(nil, have, l-have).Zero()
		v = v.AppendSlice(nil, 0, have)
	}
	if have == 0 {
		return nil
	}
	return blk.Do(t, from, &blk.Request{Op: blk.OpRead, Off: off, Len: have, Data: v})
}

// loaded is the table in memory, pinned, or nil.
func (n *Node) loaded(i int64) *table {
	return pin(n.cache, func() *table { return n.l1.Load().tables[i].Load() })
}

// table returns the table of an L1 index, pinned. It is nil if there is none.
func (n *Node) table(t *blk.Task, i int64) (*table, error) {
	if tab := n.loaded(i); tab != nil || n.l1.Load().entry(i) == 0 {
		return tab, nil
	}
	defer n.loads.Unlock(n.loads.Lock(t, i, 1))
	return n.loadTable(t, i)
}

// loadTable is table under Node.loads.
func (n *Node) loadTable(t *blk.Task, i int64) (*table, error) {
	if tab := n.loaded(i); tab != nil {
		return tab, nil
	}
	e := n.l1.Load().entry(i)
	if e == 0 {
		return nil, nil
	}
	if e&damaged != 0 || e.offset() >= roundUp(n.storage.Info().Size, n.clusterSize()) {
		return nil, n.damage(t, "L1 entry %d is %#x", i, uint64(e&^damaged))
	}
	tab := n.newTable(i, e.offset())
	buf := blk.GetBuffer(int(n.clusterSize()))
	defer buf.Free()
	if err := readClipped(t, n.storage, blk.BytesVec(nil, buf.B), tab.host); err != nil {
		return nil, fmt.Errorf("read L2 table at %#x: %w", tab.host, err)
	}
	for j := range tab.words {
		tab.words[j].Store(binary.BigEndian.Uint64(buf.B[8*j:]))
	}
	bad := n.checkTable(tab)
	tab.bad = bad >= 0
	n.install(tab)
	if bad >= 0 && !n.readOnly {
		// Reported by whoever uses the entry; but nothing is written any more.
		_ = n.damage(t, "entry %d of the L2 table at %#x", bad, tab.host)
	}
	return tab, nil
}

func (n *Node) newTable(i, host int64) *table {
	return &table{
		cached:  cached{node: n, bytes: n.clusterSize() + 256},
		layout:  &n.layout,
		l1Index: i,
		host:    host,
		words:   make([]atomic.Uint64, n.clusterSize()/8),
	}
}

// install makes tab the table of its L1 index, pinned.
func (n *Node) install(tab *table) {
	n.cache.add(tab, func() { n.l1.Load().tables[tab.l1Index].Store(tab) })
}

// checkTable marks entries that point to where no guest data can be, and returns one of them, or -1.
func (n *Node) checkTable(tab *table) (found int) {
	found = -1
	w := tab.layout.words
	n.mu.Lock()
	defer n.mu.Unlock()
	for j := range tab.entries() {
		c, _ := tab.at(j)
		guest := tab.l1Index<<n.l1Shift + int64(j)<<n.clusterBits
		bad := c.bad
		switch {
		case c.packed != 0:
			off, l := c.packed.compressedRange(n.clusterBits)
			bad = off < n.clusterSize() || off > maxHostOff-l
			for at := off; !n.readOnly && !bad && at < roundUp(off+l, n.clusterSize()); at += n.clusterSize() {
				bad = n.isMetadataLocked(at) // which would be freed with the data
			}
		case c.present && n.dataFile:
			bad = bad || c.host != guest
		case c.present && !n.readOnly:
			bad = bad || n.isMetadataLocked(c.host)
		}
		if bad {
			tab.words[j*w].Store(damaged)
			found = j
		}
	}
	return found
}

func (n *Node) isMetadataLocked(host int64) bool {
	_, is := n.metadata[host>>n.clusterBits]
	return is
}

// ownTable returns the table of an L1 index, pinned, as one whose entries may be changed: it makes one if there is
// none, and copies one that a snapshot shares.
func (n *Node) ownTable(t *blk.Task, i int64) (*table, error) {
	if n.l1.Load().entry(i).copied() {
		return n.unlessBad(n.table(t, i))
	}
	defer n.loads.Unlock(n.loads.Lock(t, i, 1))
	e := n.l1.Load().entry(i)
	if e.copied() {
		return n.unlessBad(n.loadTable(t, i))
	}
	old, err := n.unlessBad(n.loadTable(t, i))
	if err != nil {
		return nil, err
	}
	if old != nil {
		defer n.cache.unpin(old)
	}
	r, err := n.allocate(t, 1, 0)
	if err != nil {
		return nil, err
	}
	if !r.fresh {
		if err := n.notInUse(t, r.host, 1); err != nil {
			return nil, err
		}
	}
	tab := n.newTable(i, r.host)
	if err := n.writeNewTable(t, tab, old, r.fresh); err != nil {
		n.putBack(r)
		return nil, err
	}
	publish := func() {
		if old != nil {
			n.cache.drop(old)
		}
		n.install(tab)
	}
	if err := n.setL1(t, i, l1Entry(r.host)|copied, publish); err != nil {
		n.release(refRun{r.host >> n.clusterBits, 1, -1})
		return nil, err
	}
	n.mu.Lock()
	n.metadata[r.host>>n.clusterBits] = struct{}{}
	if old != nil {
		delete(n.metadata, old.host>>n.clusterBits)
	}
	n.mu.Unlock()
	if old != nil {
		n.release(refRun{old.host >> n.clusterBits, 1, -1})
	}
	return tab, nil
}

// unlessBad keeps a table with damaged entries from being written: the request that found them goes on.
func (n *Node) unlessBad(tab *table, err error) (*table, error) {
	if err != nil || tab == nil || !tab.bad {
		return tab, err
	}
	n.cache.unpin(tab)
	return nil, ErrCorrupt
}

// writeNewTable fills a new table with the entries of old, if any. It is durable before anything points to it, unless
// it is empty and what the cluster holds is zeros anyway.
func (n *Node) writeNewTable(t *blk.Task, tab, old *table, fresh bool) error {
	if old == nil && fresh {
		return nil
	}
	buf := blk.GetBuffer(int(n.clusterSize()))
	defer buf.Free()
	clear(buf.B)
	if old != nil {
		for j := range old.words {
			w := old.words[j].Load()
			if j%n.words == 0 {
				w &^= copied // what a shared table points to is shared too
			}
			tab.words[j].Store(w)
			binary.BigEndian.PutUint64(buf.B[8*j:], w)
		}
	}
	if err := n.writeMeta(t, buf.B, tab.host); err != nil {
		return fmt.Errorf("write new L2 table at %#x: %w", tab.host, err)
	}
	return n.syncStorage(t)
}

// setL1 writes an L1 entry, and publishes it together with what publish does.
func (n *Node) setL1(t *blk.Task, i int64, e l1Entry, publish func()) error {
	defer n.l1Lock.Lock(t)()
	if n.headerBad.Load() {
		return fmt.Errorf("write L1 entry %d: the header may point to another table: %w", i, syscall.EIO)
	}
	first := roundDown(i*8, n.block) / 8
	if err := n.writeL1(t, first, i, e); err != nil {
		n.suspect(suspect{what: "L1 table", again: func(t *blk.Task) error {
			defer n.l1Lock.Lock(t)()
			return n.writeL1(t, first, -1, 0)
		}})
		return fmt.Errorf("write L1 entry %d: %w", i, err)
	}
	n.l1.Load().entries[i].Store(uint64(e))
	publish()
	return nil
}

// writeL1 writes the block of L1 entries that begins at first, with entry i, if it is one, replaced by e.
func (n *Node) writeL1(t *blk.Task, first, i int64, e l1Entry) error {
	l1 := n.l1.Load()
	buf := blk.GetBuffer(int(n.block))
	defer buf.Free()
	clear(buf.B)
	for j := range min(n.block/8, int64(len(l1.entries))-first) {
		w := l1.entries[first+j].Load()
		if first+j == i {
			w = uint64(e)
		}
		binary.BigEndian.PutUint64(buf.B[8*j:], w&^damaged)
	}
	return n.writeMeta(t, buf.B, l1.host+first*8)
}

// update is a change of neighbouring entries that waits to be written.
type update struct {
	first int // word
	words []uint64
	done  bool
	err   error
}

// set changes entries of a table, from the given one on: it writes them, then publishes them. Changes of the same
// blocks that wait at the same time are written at once. The caller has the table pinned.
func (n *Node) set(t *blk.Task, tab *table, first int, clusters []cluster) error {
	u := &update{first: first * n.words, words: make([]uint64, 0, len(clusters)*n.words)}
	for _, c := range clusters {
		e, sub := n.encode(c)
		u.words = append(u.words, uint64(e))
		if n.words == 2 {
			u.words = append(u.words, sub)
		}
	}
	n.mu.Lock()
	tab.pending = append(tab.pending, u)
	n.mu.Unlock()

	lo := roundDown(int64(u.first)*8, n.block)
	hi := roundUp(int64(u.first+len(u.words))*8, n.block)
	defer tab.blocks.Unlock(tab.blocks.Lock(t, lo, hi-lo))
	if u.done {
		return u.err // whoever had the blocks before wrote it too
	}
	batch := n.takeUpdates(tab, lo, hi)
	err := n.writeTable(t, tab, lo, hi, batch)
	if err != nil {
		err = fmt.Errorf("write L2 table at %#x: %w", tab.host, err)
		n.suspectTable(tab, lo, hi)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil && n.words == 2 {
		tab.seq.Add(1)
		defer tab.seq.Add(1)
	}
	for _, u := range batch {
		u.done, u.err = true, err
		for j, w := range u.words {
			if err == nil {
				tab.words[u.first+j].Store(w)
			}
		}
	}
	return err
}

// takeUpdates takes the waiting changes that lie in the blocks.
func (n *Node) takeUpdates(tab *table, lo, hi int64) (batch []*update) {
	n.mu.Lock()
	defer n.mu.Unlock()
	rest := tab.pending[:0]
	for _, u := range tab.pending {
		if int64(u.first)*8 >= lo && int64(u.first+len(u.words))*8 <= hi {
			batch = append(batch, u)
		} else {
			rest = append(rest, u)
		}
	}
	clear(tab.pending[len(rest):])
	tab.pending = rest
	return batch
}

// writeTable writes the bytes [lo, hi) of a table with the changes. The caller has these blocks locked.
func (n *Node) writeTable(t *blk.Task, tab *table, lo, hi int64, batch []*update) error {
	buf := blk.GetBuffer(int(hi - lo))
	defer buf.Free()
	for j := lo / 8; j < hi/8; j++ {
		binary.BigEndian.PutUint64(buf.B[8*j-lo:], tab.words[j].Load())
	}
	for _, u := range batch {
		for j, w := range u.words {
			binary.BigEndian.PutUint64(buf.B[int64(u.first+j)*8-lo:], w)
		}
	}
	return n.writeMeta(t, buf.B, tab.host+lo)
}

// suspectTable notes that a write of a part of a table failed. The table stays in memory until it has been repeated.
func (n *Node) suspectTable(tab *table, lo, hi int64) {
	pin(n.cache, func() *table { return tab })
	n.suspect(suspect{
		what: "L2 table",
		again: func(t *blk.Task) error {
			defer tab.blocks.Unlock(tab.blocks.Lock(t, lo, hi-lo))
			return n.writeTable(t, tab, lo, hi, nil)
		},
		done: func() { n.cache.unpin(tab) },
	})
}
