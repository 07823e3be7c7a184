// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/blkstream/blkstream/blk"
)

// Host clusters and their reference counts. Clusters are reserved many at a time: their counts are raised and made
// durable, and then they wait in Node.pool. A crash leaks what is in there.

// Bytes that are reserved at once: the first time, and at most.
const (
	minReserve int64 = 1 << 20
	maxReserve int64 = 16 << 20
)

// maxScan is the number of refcount blocks in which a reservation looks for free clusters before it makes the file
// longer.
const maxScan = 4

// maxLimbo is the number of runs of clusters that may wait for their counts to be dropped.
const maxLimbo = 4096

// maxSnapshotClusters bounds the memory for where the L1 tables of snapshots are.
const maxSnapshotClusters = 1 << 21

// run is neighbouring host clusters.
type run struct {
	host  int64 // byte offset
	count int64 // clusters
	fresh bool  // the storage holds zeros there, durably
}

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

// noteMetadata notes the clusters that hold tables, so that nothing else is ever written there.
func (n *Node) noteMetadata(t *blk.Task) error {
	h := &n.header
	note := func(off, size int64) {
		if size == 0 {
			return // the offset means nothing
		}
		for c := off >> n.clusterBits; c < (off+size+n.clusterSize()-1)>>n.clusterBits; c++ {
			n.metadata[c] = struct{}{}
		}
	}
	note(0, 1)
	note(h.L1Offset, int64(h.L1Size)*8)
	note(h.RefTableOffset, int64(h.RefTableClusters)<<h.ClusterBits)
	note(h.Bitmaps.DirectoryOffset, h.Bitmaps.DirectorySize)
	for _, e := range n.refs.Load().entries {
		if e == 0 {
			continue
		}
		if _, twice := n.metadata[int64(e)>>n.clusterBits]; twice {
			return invalid("the refcount block at %#x overlaps other metadata", e)
		}
		note(int64(e), 1)
	}
	tables := map[int64]struct{}{}
	for i := range n.l1.Load().entries {
		e := n.l1.Load().entry(int64(i))
		if e == 0 || e&damaged != 0 {
			continue
		}
		c := e.offset() >> n.clusterBits
		_, other := n.metadata[c]
		if _, twice := tables[c]; other || twice && e.copied() {
			return invalid("the L2 table at %#x overlaps other metadata", e.offset())
		}
		tables[c] = struct{}{}
	}
	maps.Copy(n.metadata, tables)
	snapshots, size, err := readSnapshots(t, n.storage, h)
	if err != nil {
		return err
	}
	note(h.SnapshotsOffset, size)
	var clusters int64
	for _, s := range snapshots {
		if clusters += int64(s.L1Size)*8>>n.clusterBits + 1; clusters > maxSnapshotClusters {
			return fmt.Errorf("L1 tables of snapshots of more than %d clusters: %w", maxSnapshotClusters, ErrFeature)
		}
		note(s.L1Offset, int64(s.L1Size)*8)
	}
	return nil
}

// allocate takes up to want > 0 neighbouring clusters from the reserve. Their counts are 1, durably.
func (n *Node) allocate(t *blk.Task, want int64) (run, error) {
	for {
		if r, ok := n.take(want); ok {
			return r, nil
		}
		if err := n.reserve(t, want); err != nil {
			return run{}, fmt.Errorf("allocate clusters: %w", err)
		}
	}
}

func (n *Node) take(want int64) (run, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pool) == 0 {
		return run{}, false
	}
	r := &n.pool[0]
	got := run{r.host, min(want, r.count), r.fresh}
	r.host += got.count << n.clusterBits
	if r.count -= got.count; r.count == 0 {
		n.pool = n.pool[1:]
	}
	return got, true
}

// putBack returns clusters to which no metadata points and never did, but which may have been written.
func (n *Node) putBack(r run) {
	r.fresh = false
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pool = append(n.pool, r)
}

// release puts clusters into the limbo from where nothing points to them any more, as soon as what was written of
// the tables is durable.
func (n *Node) release(runs ...refRun) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range runs {
		if l := len(n.limbo); l > 0 && n.limbo[l-1].delta == r.delta && n.limbo[l-1].first+n.limbo[l-1].count == r.first {
			n.limbo[l-1].count += r.count
			continue
		}
		n.limbo = append(n.limbo, r)
		n.unclean.Add(1)
	}
}

// tidy reclaims if much is waiting for it. If that fails, the next allocation tries again.
func (n *Node) tidy(t *blk.Task) {
	if n.unclean.Load() <= maxLimbo || n.corrupt.Load() {
		return
	}
	defer n.alloc.lock(t)()
	_ = n.reclaim(t)
}

// reclaim drops the counts of what is in the limbo. Under Node.alloc.
func (n *Node) reclaim(t *blk.Task) error {
	if err := n.settle(t); err != nil {
		return err
	}
	n.mu.Lock()
	runs := n.limbo
	n.limbo = nil
	n.mu.Unlock()
	if len(runs) == 0 {
		return nil
	}
	n.unclean.Add(int32(-len(runs)))
	if err := n.drop(t, &runs); err != nil {
		n.release(runs...)
		return fmt.Errorf("free clusters: %w", err)
	}
	return nil
}

// drop leaves in runs what is not done.
func (n *Node) drop(t *blk.Task, runs *[]refRun) error {
	// The tables without these clusters first: the other order could give a cluster to two owners.
	if err := n.syncStorage(t); err != nil {
		return err
	}
	if err := n.quiesce(t); err != nil {
		return err
	}
	n.unpacked.purge()
	free, _, rest, err := n.changeRefs(t, *runs)
	*runs = rest
	for _, r := range free {
		n.scan = min(n.scan, r.first)
		// The space is the host's again; if not, nothing is wrong.
		if off := r.first << n.clusterBits; off < n.storage.Info().Size {
			l := min(r.count<<n.clusterBits, n.storage.Info().Size-off)
			_ = blk.Do(t, n.storage, &blk.Request{Op: blk.OpDiscard, Off: off, Len: l})
		}
	}
	return err
}

// reserve fills the pool. want is what the caller could use.
func (n *Node) reserve(t *blk.Task, want int64) error {
	defer n.alloc.lock(t)()
	n.mu.Lock()
	filled := len(n.pool) > 0
	n.mu.Unlock()
	if filled {
		return nil // by someone else meanwhile
	}
	if n.corrupt.Load() {
		return ErrCorrupt
	}
	if n.unclean.Load() > 0 {
		if err := n.reclaim(t); err != nil {
			return err
		}
	}
	batch := min(max(want, n.batch), n.maxBatch)
	runs, err := n.find(t, batch)
	if batch > 1 && blk.IsNoSpace(err) {
		runs, err = n.find(t, 1)
	}
	if err != nil {
		return err
	}
	n.batch = min(2*n.batch, n.maxBatch)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pool = append(n.pool, runs...)
	return nil
}

// find reserves clusters in the file, or behind its end. Under Node.alloc.
func (n *Node) find(t *blk.Task, batch int64) ([]run, error) {
	have := n.storage.Info().Size >> n.clusterBits
	for blocks := 0; n.scan < have && (blocks < maxScan || !n.canGrow()); blocks++ {
		runs, err := n.findInside(t, batch, have)
		if err != nil || len(runs) > 0 {
			return runs, err
		}
	}
	if !n.canGrow() {
		return nil, syscall.ENOSPC
	}
	// A batch fills up the block of counts that it begins in.
	end := (have>>n.refBits + 1) << n.refBits
	if have&(1<<n.refBits-1) != 0 {
		batch = min(batch, end-have)
	}
	r, err := n.claim(t, have, batch, math.MaxInt64)
	return []run{r}, err
}

// findInside looks at the counts of one refcount block from Node.scan on.
func (n *Node) findInside(t *blk.Task, batch, have int64) ([]run, error) {
	index := n.scan >> n.refBits
	end := min((index+1)<<n.refBits, have)
	b, err := n.refBlock(t, index)
	if err != nil {
		return nil, err
	}
	if b == nil {
		// Nothing there is counted. The first cluster is for the counts.
		room := end - n.scan - 1
		if room < 1 {
			n.scan = end
			return nil, nil
		}
		r, err := n.claim(t, n.scan, min(batch, room), have)
		if err == nil {
			n.scan = r.host>>n.clusterBits + r.count
		} else if blk.IsNoSpace(err) {
			n.scan, err = end, nil
		}
		if r.count == 0 {
			return nil, err
		}
		return []run{r}, err
	}
	defer n.cache.unpin(b)
	var (
		runs []run
		refs []refRun
		at   = n.scan
	)
	for ; at < end && batch > 0; at++ {
		if getCount(b.b, n.refOrder, at&(1<<n.refBits-1)) != 0 {
			continue
		}
		batch--
		if l := len(refs); l > 0 && refs[l-1].first+refs[l-1].count == at {
			refs[l-1].count++
			runs[l-1].count++
			continue
		}
		refs = append(refs, refRun{at, 1, 1})
		runs = append(runs, run{host: at << n.clusterBits, count: 1})
	}
	if len(refs) > 0 {
		if err := n.countNew(t, refs); err != nil {
			return nil, err
		}
	}
	n.scan = at
	return runs, nil
}

// countNew raises the counts of free clusters, durably.
func (n *Node) countNew(t *blk.Task, refs []refRun) error {
	for _, r := range refs {
		if err := n.notMetadata(t, r.first, r.count); err != nil {
			return err
		}
	}
	_, done, _, err := n.changeRefs(t, refs)
	if err == nil {
		if err = n.syncStorage(t); err == nil {
			return nil
		}
	}
	n.takeBack(done)
	return err
}

// takeBack undoes changes of counts, at the next opportunity.
func (n *Node) takeBack(done []refRun) {
	for _, r := range done {
		n.release(refRun{r.first, r.count, -r.delta})
	}
}

// notMetadata is the last look before clusters are used for something new.
func (n *Node) notMetadata(t *blk.Task, first, count int64) error {
	bad := int64(-1)
	n.mu.Lock()
	for c := first; c < first+count; c++ {
		if n.isMetadataLocked(c << n.clusterBits) {
			bad = c << n.clusterBits
		}
	}
	n.mu.Unlock()
	if bad >= 0 {
		return n.damage(t, "the cluster at %#x holds a table and is not counted", bad)
	}
	return nil
}

// claim reserves count neighbouring clusters and before them what it takes to count them: refcount blocks, and a
// longer refcount table if the present one does not reach that far. None of them may be counted; those that are, from
// start on, are passed over. The last one lies before limit. Under Node.alloc.
func (n *Node) claim(t *blk.Task, start, count, limit int64) (run, error) {
	refs := n.refs.Load()
	var blocks, table, end int64
	for {
		end = start + blocks + table + count
		if end > limit || end > maxHostOff>>n.clusterBits {
			return run{}, syscall.ENOSPC
		}
		c, err := n.lastCounted(t, start, end)
		if err != nil {
			return run{}, err
		}
		if c >= 0 {
			start, blocks, table = c+1, 0, 0
			continue
		}
		b, tab, err := n.missing(start, end)
		if err != nil {
			return run{}, err
		}
		if b == blocks && tab == table {
			break
		}
		blocks, table = max(b, blocks), max(tab, table)
	}
	if err := n.notMetadata(t, start, end-start); err != nil {
		return run{}, err
	}
	old := roundUp(n.storage.Info().Size, n.clusterSize()) >> n.clusterBits
	if err := n.growStorage(t, end<<n.clusterBits); err != nil {
		return run{}, err
	}
	got := run{(end - count) << n.clusterBits, count, end-count >= old}

	// Counts in blocks that exist.
	var known []refRun
	var made []*refBlock
	for i := start >> n.refBits; i <= (end-1)>>n.refBits; i++ {
		lo, hi := max(start, i<<n.refBits), min(end, (i+1)<<n.refBits)
		if i < int64(len(refs.entries)) && refs.entries[i] != 0 {
			known = append(known, refRun{lo, hi - lo, 1})
			continue
		}
		b := n.newRefBlock(i, (start+int64(len(made)))<<n.clusterBits)
		for c := lo; c < hi; c++ {
			putCount(b.b, n.refOrder, c&(1<<n.refBits-1), 1)
		}
		made = append(made, b)
	}
	if len(known) > 0 {
		if err := n.countNew(t, known); err != nil {
			return run{}, err
		}
	}
	if len(made) == 0 {
		return got, nil
	}
	if err := n.addBlocks(t, made, (start+blocks)<<n.clusterBits, table); err != nil {
		n.takeBack(known)
		return run{}, err
	}
	return got, nil
}

// lastCounted is the last cluster of [start, end) whose count is not 0, or -1.
func (n *Node) lastCounted(t *blk.Task, start, end int64) (int64, error) {
	for i := (end - 1) >> n.refBits; i >= start>>n.refBits; i-- {
		b, err := n.refBlock(t, i)
		if err != nil {
			return 0, err
		}
		if b == nil {
			continue
		}
		for c := min(end, (i+1)<<n.refBits) - 1; c >= max(start, i<<n.refBits); c-- {
			if getCount(b.b, n.refOrder, c&(1<<n.refBits-1)) != 0 {
				n.cache.unpin(b)
				return c, nil
			}
		}
		n.cache.unpin(b)
	}
	return -1, nil
}

// missing is the number of refcount blocks that the clusters lack, and of clusters for a longer refcount table, if
// they need one.
func (n *Node) missing(start, end int64) (blocks, table int64, err error) {
	refs := n.refs.Load()
	have := int64(len(refs.entries))
	last := (end - 1) >> n.refBits
	for i := start >> n.refBits; i <= last; i++ {
		if i >= have || refs.entries[i] == 0 {
			blocks++
		}
	}
	if last < have {
		return blocks, 0, nil
	}
	size := roundUp(max(last+1, have+have/2)*8, n.clusterSize())
	if size > maxRefTableBytes {
		return 0, 0, fmt.Errorf("a refcount table of %d bytes: %w", size, syscall.EFBIG)
	}
	return blocks, size >> n.clusterBits, nil
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
	defer n.refWrites.lock(t)()

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
				defer n.refWrites.lock(t)()
				return n.writeMeta(t, b.b[lo:hi], b.host+lo)
			},
			done: func() { n.cache.unpin(b) },
		})
		return nil, fmt.Errorf("write refcount block at %#x: %w", b.host, err)
	}
	return free, nil
}

// resizer is a storage that can change its size.
type resizer interface {
	Resize(t *blk.Task, size int64, shrink bool) error
}

func (n *Node) canGrow() bool {
	_, ok := n.storage.(resizer)
	return ok && !n.fixed.Load()
}

// growStorage makes the file at least size bytes long.
func (n *Node) growStorage(t *blk.Task, size int64) error {
	if n.storage.Info().Size >= size {
		return nil
	}
	if !n.canGrow() {
		return syscall.ENOSPC
	}
	err := growNode(t, &n.growing, n.storage, size)
	if errors.Is(err, blk.ErrNotSupported) { // a block device
		n.fixed.Store(true)
		return syscall.ENOSPC
	}
	return err
}

func growNode(t *blk.Task, lock *taskLock, node blk.Node, size int64) error {
	defer lock.lock(t)()
	in := node.Info()
	if in.Size >= size {
		return nil
	}
	r, ok := node.(resizer)
	if !ok {
		return syscall.ENOSPC
	}
	return r.Resize(t, roundUp(size, max(in.Align, blk.SectorSize)), false)
}

// giveBack ends the use of the image: what was reserved and not used becomes free again.
func (n *Node) giveBack(t *blk.Task) error {
	if n.corrupt.Load() {
		return n.sync(t)
	}
	n.barrier = nil // its queues may be gone, and nothing is in flight
	if err := n.settle(t); err != nil {
		return err
	}
	if err := n.sync(t); err != nil {
		return err
	}
	defer n.alloc.lock(t)()
	if err := n.packer.finish(t, n); err != nil {
		return err
	}
	n.mu.Lock()
	pool := n.pool
	n.pool = nil
	n.mu.Unlock()
	size := n.storage.Info().Size
	for i := len(pool) - 1; i >= 0; i-- {
		r := pool[i]
		n.release(refRun{r.host >> n.clusterBits, r.count, -1})
		// What this session made the file longer by and did not use goes.
		if r.fresh && r.host+r.count<<n.clusterBits == size {
			size = r.host
		}
	}
	if n.unclean.Load() == 0 {
		return nil
	}
	if err := n.reclaim(t); err != nil {
		return err
	}
	if err := n.syncStorage(t); err != nil {
		return err
	}
	if size < n.storage.Info().Size {
		// Only now: a count must not outlive the cluster.
		_ = n.storage.(resizer).Resize(t, roundUp(size, max(n.storage.Info().Align, blk.SectorSize)), true)
	}
	return nil
}
