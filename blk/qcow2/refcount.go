// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// The reference counts of host clusters: the table, its blocks in memory, and how counts change. alloc.go decides which.

// maxSnapshotClusters bounds the memory for where the L1 tables of snapshots are.
const maxSnapshotClusters = 1 << 21

// refRun is a change of the counts of neighbouring clusters.
type refRun struct {
	first, count int64 // clusters
	delta        int64
}

// refTable is the refcount table, and the blocks in memory. Pointers to blocks change under Cache.mu, all else under
// Node.alloc.
type refTable struct {
	host    int64
	entries []uint64
	blocks  []atomic.Pointer[refBlock]
}

// refBlock is a refcount block in memory, as on the storage.
type refBlock struct {
	cached
	index int64
	host  int64
	b     []byte
}

func (b *refBlock) evict() { b.node.refs.Load().blocks[b.index].CompareAndSwap(b, nil) }

func getCount(b []byte, order uint, i int64) uint64 {
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(b[8*i:])
	default:
		shift := i & (8>>order - 1) << order
		return uint64(b[i<<order/8]) >> shift & (1<<(1<<order) - 1)
	}
}

func putCount(b []byte, order uint, i int64, v uint64) {
	switch order {
	case 3:
		b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(b[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(b[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(b[8*i:], v)
	default:
		shift := i & (8>>order - 1) << order
		mask := byte(1<<(1<<order)-1) << shift
		p := &b[i<<order/8]
		*p = *p&^mask | byte(v)<<shift
	}
}

func (n *Node) loadRefTable(t *blk.Task) error {
	h := &n.header
	count := int64(h.RefTableClusters) << h.ClusterBits / 8
	r := &refTable{host: h.RefTableOffset, entries: make([]uint64, count), blocks: make([]atomic.Pointer[refBlock], count)}
	if err := n.readWords(t, r.host, count, func(i int64, w uint64) { r.entries[i] = w }); err != nil {
		return fmt.Errorf("read refcount table: %w", err)
	}
	for i, e := range r.entries {
		if int64(e)&(n.clusterSize()-1) != 0 || int64(e) < 0 || int64(e) >= roundUp(n.storage.Info().Size, n.clusterSize()) {
			return invalid("entry %d of the refcount table is %#x", i, e)
		}
	}
	n.refs.Store(r)
	n.batch = max(minReserve>>n.clusterBits, 1)
	n.maxBatch = max(maxReserve>>n.clusterBits, 1)
	return nil
}

// noteMetadata notes the clusters that hold tables, so that nothing else is ever written there. Only L2 tables may be
// shared, and the L1 tables of snapshots with each other.
func (n *Node) noteMetadata(t *blk.Task) error {
	h := &n.header
	snapshots, size, err := readSnapshots(t, n.storage, h)
	if err != nil {
		return err
	}
	note := func(set map[int64]struct{}, what string, off, size int64) error {
		if size == 0 {
			return nil // the offset means nothing
		}
		for c := off >> n.clusterBits; c < (off+size+n.clusterSize()-1)>>n.clusterBits; c++ {
			if _, twice := n.metadata[c]; twice {
				return invalid("the %s at %#x overlaps other metadata", what, off)
			}
			set[c] = struct{}{}
		}
		return nil
	}
	if err := errors.Join(
		note(n.metadata, "header", 0, 1),
		note(n.metadata, "L1 table", h.L1Offset, int64(h.L1Size)*8),
		note(n.metadata, "refcount table", h.RefTableOffset, int64(h.RefTableClusters)<<h.ClusterBits),
		note(n.metadata, "bitmap directory", h.Bitmaps.DirectoryOffset, h.Bitmaps.DirectorySize),
		note(n.metadata, "snapshot table", h.SnapshotsOffset, size),
	); err != nil {
		return err
	}
	for _, e := range n.refs.Load().entries {
		if e == 0 {
			continue
		}
		if err := note(n.metadata, "refcount block", int64(e), 1); err != nil {
			return err
		}
	}
	var clusters int64
	l1s := map[int64]struct{}{}
	for _, s := range snapshots {
		if clusters += int64(s.L1Size)*8>>n.clusterBits + 1; clusters > maxSnapshotClusters {
			return fmt.Errorf("L1 tables of snapshots of more than %d clusters: %w", maxSnapshotClusters, ErrFeature)
		}
		if err := note(l1s, "L1 table of a snapshot", s.L1Offset, int64(s.L1Size)*8); err != nil {
			return err
		}
	}
	maps.Copy(n.metadata, l1s)
	tables := map[int64]struct{}{}
	for i := range n.l1.Load().entries {
		e := n.l1.Load().entry(int64(i))
		if e == 0 || e&damaged != 0 {
			continue
		}
		c := e.offset() >> n.clusterBits
		if _, twice := tables[c]; twice && e.copied() {
			return invalid("the L2 table at %#x has two owners", e.offset())
		}
		if err := note(tables, "L2 table", e.offset(), 1); err != nil {
			return err
		}
	}
	maps.Copy(n.metadata, tables)
	return nil
}

// addBlocks writes new refcount blocks and then lets the table point to them, or a longer table of so many clusters,
// which is written to tableHost.
func (n *Node) addBlocks(t *blk.Task, made []*refBlock, tableHost, tableClusters int64) error {
	for _, b := range made {
		if err := n.writeMeta(t, b.b, b.host); err != nil {
			return fmt.Errorf("write new refcount block at %#x: %w", b.host, err)
		}
	}
	old := n.refs.Load()
	refs := &refTable{host: old.host, entries: slices.Clone(old.entries)}
	if tableClusters > 0 {
		refs.host = tableHost
		refs.entries = append(refs.entries, make([]uint64, tableClusters<<n.clusterBits/8-int64(len(old.entries)))...)
	}
	for _, b := range made {
		refs.entries[b.index] = uint64(b.host)
	}
	if tableClusters > 0 {
		if err := n.writeRefTable(t, refs, 0, int64(len(refs.entries))); err != nil {
			return err
		}
	}
	// What is pointed to is durable before the pointer.
	if err := n.syncStorage(t); err != nil {
		return err
	}
	if tableClusters > 0 {
		err := n.writeHeader(t, func(h *Header) {
			h.RefTableOffset, h.RefTableClusters = refs.host, uint32(tableClusters)
		})
		if err != nil {
			return err
		}
	} else if err := n.pointToBlocks(t, refs, made); err != nil {
		return err
	}
	n.publishRefTable(old, refs, made, tableClusters)
	return nil
}

// pointToBlocks writes the new entries of the table, durably.
func (n *Node) pointToBlocks(t *blk.Task, refs *refTable, made []*refBlock) error {
	lo, hi := made[0].index, made[len(made)-1].index+1
	err := n.writeRefTable(t, refs, lo, hi)
	if err == nil {
		err = n.syncStorage(t)
	}
	if err != nil {
		n.suspect(suspect{what: "refcount table", again: func(t *blk.Task) error {
			return n.writeRefTable(t, n.refs.Load(), lo, hi)
		}})
	}
	return err
}

func (n *Node) publishRefTable(old, refs *refTable, made []*refBlock, tableClusters int64) {
	n.cache.mu.Lock()
	refs.blocks = make([]atomic.Pointer[refBlock], len(refs.entries))
	for i := range old.blocks {
		refs.blocks[i].Store(old.blocks[i].Load())
	}
	n.refs.Store(refs)
	n.cache.mu.Unlock()
	for _, b := range made {
		n.cache.add(b, func() { refs.blocks[b.index].Store(b) })
		n.cache.unpin(b)
	}
	n.mu.Lock()
	for _, b := range made {
		n.metadata[b.host>>n.clusterBits] = struct{}{}
	}
	oldFirst, oldCount := old.host>>n.clusterBits, int64(len(old.entries))*8>>n.clusterBits
	if tableClusters > 0 {
		for c := range tableClusters {
			n.metadata[refs.host>>n.clusterBits+c] = struct{}{}
		}
		for c := range oldCount {
			delete(n.metadata, oldFirst+c)
		}
	}
	n.mu.Unlock()
	if tableClusters > 0 {
		n.release(refRun{oldFirst, oldCount, -1})
	}
}

// writeRefTable writes the entries [lo, hi) and what is in the same blocks.
func (n *Node) writeRefTable(t *blk.Task, refs *refTable, lo, hi int64) error {
	lo, hi = roundDown(lo*8, n.block)/8, roundUp(hi*8, n.block)/8
	buf := blk.GetBuffer(int(hi-lo) * 8)
	defer buf.Free()
	for i := lo; i < hi; i++ {
		binary.BigEndian.PutUint64(buf.B[(i-lo)*8:], refs.entries[i])
	}
	if err := n.writeMeta(t, buf.B, refs.host+lo*8); err != nil {
		return fmt.Errorf("write refcount table: %w", err)
	}
	return nil
}

func (n *Node) newRefBlock(index, host int64) *refBlock {
	return &refBlock{
		cached: cached{node: n, bytes: n.clusterSize() + 256}, index: index, host: host, b: make([]byte, n.clusterSize()),
	}
}

// refBlock returns a block, pinned; nil if there is none. Under Node.alloc.
func (n *Node) refBlock(t *blk.Task, index int64) (*refBlock, error) {
	refs := n.refs.Load()
	if index >= int64(len(refs.entries)) || refs.entries[index] == 0 {
		return nil, nil
	}
	if b := pin(n.cache, refs.blocks[index].Load); b != nil {
		return b, nil
	}
	b := n.newRefBlock(index, int64(refs.entries[index]))
	if err := readClipped(t, n.storage, blk.BytesVec(nil, b.b), b.host); err != nil {
		return nil, fmt.Errorf("read refcount block at %#x: %w", b.host, err)
	}
	n.cache.add(b, func() { refs.blocks[index].Store(b) })
	return b, nil
}

// changeRefs changes counts, block by block. It returns the clusters whose count has become 0, which changes are done
// and which are not. Under Node.alloc.
func (n *Node) changeRefs(t *blk.Task, runs []refRun) (free, done, rest []refRun, err error) {
	parts := make([]refRun, 0, len(runs))
	for _, r := range runs {
		for r.count > 0 {
			end := (r.first>>n.refBits + 1) << n.refBits
			c := min(r.count, end-r.first)
			parts = append(parts, refRun{r.first, c, r.delta})
			r.first, r.count = r.first+c, r.count-c
		}
	}
	slices.SortStableFunc(parts, func(a, b refRun) int { return cmp.Compare(a.first, b.first) })
	for i := 0; i < len(parts); {
		k := i + 1
		for k < len(parts) && parts[k].first>>n.refBits == parts[i].first>>n.refBits {
			k++
		}
		f, err := n.changeBlock(t, parts[i:k])
		if err != nil {
			return free, parts[:i], parts[i:], err
		}
		free = append(free, f...)
		i = k
	}
	return free, parts, nil, nil
}

// changeBlock changes counts of one block: all of them, or none.
func (n *Node) changeBlock(t *blk.Task, parts []refRun) (free []refRun, err error) {
	index := parts[0].first >> n.refBits
	b, err := n.refBlock(t, index)
	if err != nil {
		return nil, err
	}
	if b == nil {
		return nil, n.damage(t, "no refcount block for the cluster at %#x", parts[0].first<<n.clusterBits)
	}
	defer n.cache.unpin(b)
	defer n.refWrites.Lock(t)()

	base := index << n.refBits
	last := parts[0].first
	for _, p := range parts {
		last = max(last, p.first+p.count-1)
	}
	lo := roundDown((parts[0].first-base)<<n.refOrder/8, n.block)
	hi := roundUp(((last-base+1)<<n.refOrder+7)/8, n.block)
	old := bytes.Clone(b.b[lo:hi])
	for _, p := range parts {
		for c := p.first; c < p.first+p.count; c++ {
			v := getCount(b.b, n.refOrder, c-base)
			if p.delta < 0 && v < uint64(-p.delta) || p.delta > 0 && v > n.maxRef-uint64(p.delta) {
				copy(b.b[lo:], old)
				return nil, n.damage(t, "the cluster at %#x is counted %d times, which should change by %d", c<<n.clusterBits, v, p.delta)
			}
			v += uint64(p.delta)
			putCount(b.b, n.refOrder, c-base, v)
			if v > 0 {
				continue
			}
			if l := len(free); l > 0 && free[l-1].first+free[l-1].count == c {
				free[l-1].count++
			} else {
				free = append(free, refRun{first: c, count: 1})
			}
		}
	}
	if err := n.writeMeta(t, b.b[lo:hi], b.host+lo); err != nil {
		copy(b.b[lo:], old)
		pin(n.cache, func() *refBlock { return b })
		n.suspect(suspect{
			what: "refcount block",
			again: func(t *blk.Task) error {
				defer n.refWrites.Lock(t)()
				return n.writeMeta(t, b.b[lo:hi], b.host+lo)
			},
			done: func() { n.cache.unpin(b) },
		})
		return nil, fmt.Errorf("write refcount block at %#x: %w", b.host, err)
	}
	return free, nil
}

// HasHoles reports whether the image counts clearly more clusters as in use than its file, which takes so many bytes
// on the storage, has room for: clusters of data may be holes then, as after preallocation of metadata alone. The
// margin is QEMU's, so that both show the same.
func HasHoles(t *blk.Task, storage blk.Node, h *Header, allocated int64) (bool, error) {
	table := make([]byte, int64(h.RefTableClusters)<<h.ClusterBits)
	if err := readClipped(t, storage, blk.BytesVec(nil, table), h.RefTableOffset); err != nil {
		return false, fmt.Errorf("qcow2: read refcount table: %w", err)
	}
	size := storage.Info().Size
	room := allocated >> h.ClusterBits
	enough := max(room*10/9, room+2)
	buf := blk.GetBuffer(int(h.ClusterSize()))
	defer buf.Free()
	for left := roundUp(size, h.ClusterSize()) >> h.ClusterBits; left > 0 && len(table) > 0; table = table[8:] {
		n := min(left, 1<<h.refBlockBits())
		left -= n
		off := int64(binary.BigEndian.Uint64(table))
		switch {
		case off == 0:
			continue
		case off < 0 || off&(h.ClusterSize()-1) != 0 || off >= size:
			return false, invalid("a refcount block at %#x", off)
		}
		if err := readClipped(t, storage, blk.BytesVec(nil, buf.B), off); err != nil {
			return false, fmt.Errorf("qcow2: read refcount block at %#x: %w", off, err)
		}
		for i := range n {
			if getCount(buf.B, h.RefcountOrder, i) > 0 {
				enough--
			}
		}
		if enough <= 0 {
			return true, nil
		}
	}
	return false, nil
}
