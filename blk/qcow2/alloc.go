// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"errors"
	"fmt"
	"math"
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

// run is neighbouring host clusters.
type run struct {
	host  int64 // byte offset
	count int64 // clusters
	fresh bool  // the storage holds zeros there, durably
}

// allocate takes up to want > 0 neighbouring clusters from the reserve, and up to more on top if they hold zeros. Their
// counts are 1, durably.
func (n *Node) allocate(t *blk.Task, want, more int64) (run, error) {
	for {
		if r, ok := n.take(want, more); ok {
			return r, nil
		}
		if err := n.reserve(t, want); err != nil {
			return run{}, fmt.Errorf("allocate clusters: %w", err)
		}
	}
}

func (n *Node) take(want, more int64) (run, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.pool) == 0 {
		return run{}, false
	}
	r := &n.pool[0]
	if r.fresh {
		want += more
	}
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
	defer n.alloc.Lock(t)()
	_ = n.reclaim(t)
}

// reclaim drops the counts of what is in the limbo. Under Node.alloc.
func (n *Node) reclaim(t *blk.Task) error {
	n.mu.Lock()
	runs := n.limbo
	n.limbo = nil
	n.mu.Unlock()
	n.unclean.Add(int32(-len(runs)))
	// Not before they are taken: a change of the tables that fails meanwhile gives up what they may point to.
	err := n.settle(t)
	if err == nil && len(runs) > 0 {
		if err = n.drop(t, &runs); err != nil {
			err = fmt.Errorf("free clusters: %w", err)
		}
	}
	if err != nil {
		n.release(runs...)
	}
	return err
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
	defer n.alloc.Lock(t)()
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
		// What has failed first: who settles it meanwhile writes a table over what is added to it here.
		if err = n.settle(t); err == nil {
			runs, err = n.find(t, 1)
		}
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
	if start < old {
		if err := n.notInUse(t, start<<n.clusterBits, end-start); err != nil {
			return run{}, err
		}
	}
	if err := n.growStorage(t, end<<n.clusterBits); err != nil {
		return run{}, err
	}
	got := run{(end - count) << n.clusterBits, count, end-count >= old}
	if r, ok := n.storage.(reserver); ok && got.fresh {
		// The host need not look for room with each first write then. It is a help only: without it, that is when it does.
		_ = r.Reserve(t, got.host, got.count<<n.clusterBits)
	}

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

// resizer is a storage that can change its size.
type resizer interface {
	Resize(t *blk.Task, size int64, shrink bool) error
}

// reserver is a storage that can find room for a part of itself beforehand; what it holds stays as it is.
type reserver interface {
	Reserve(t *blk.Task, off, l int64) error
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

func growNode(t *blk.Task, lock *blk.TaskLock, node blk.Node, size int64) error {
	defer lock.Lock(t)()
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
	defer n.alloc.Lock(t)()
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
