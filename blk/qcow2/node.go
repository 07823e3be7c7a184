// SPDX-License-Identifier: Apache-2.0

// Package qcow2 is QEMU's image format, versions 2 and 3.
//
// What happens to a write, in order (write.go):
//
//  1. Clusters that are ours alone are written in place, most of them by the caller itself, through TryMap.
//  2. For others, the guest's range is locked by clusters. Host clusters come from a reserve whose reference
//     counts were made durable beforehand (alloc.go), so that a crash leaks clusters and never shares them.
//  3. The data is written, with what has to be copied around it.
//  4. The storage is flushed, if losing the data and keeping the table would show something that was never there.
//  5. The L2 entry is written (table.go), and only then published in memory. So whatever is acknowledged survives
//     the death of this process; nothing that a flush would have to write is kept in memory. A sequential writer gets
//     entries for its next clusters at the same time (ahead.go).
//  6. Clusters that this made superfluous go to the limbo: their counts are dropped only after the new table is
//     durable and nobody can still be using what the old one said.
//
// A write of metadata that failed may have happened or not. It is noted (Node.suspects) and done again with what
// memory holds, before any other metadata is changed.
//
// Locks, in the order in which they may be taken; all but the last two are task locks and may be held over I/O:
// Node.resizing, Node.prepares, guest ranges (Node.clusters), loading or making a table (Node.loads), the packer,
// reference counts (Node.alloc), settling, one of {L1, blocks of an L2 table, a refcount block, header}, making a file
// longer, flushing; Cache.mu, Node.mu.
// Whoever is counted in Node.users waits for none of them.
package qcow2

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// Options of Open.
type Options struct {
	Name     string   // the path, for messages
	Backing  blk.Node // what shows where the image holds nothing; nil: zeros. Not closed by the node, never written
	Data     blk.Node // the external data file, if the header names one; closed with the node
	ReadOnly bool
	Cache    *Cache // bounds the memory for tables; nil: a cache of the node's own with DefaultCacheBytes
	// Ahead gives a sequential writer places beforehand (ahead.go). Not for an image without a backing image that will be
	// put over one: what was not written would hide what is behind it.
	Ahead bool
	// Warn is told what the user should know, as it comes up; Node.Warnings repeats it. It must not block. May be nil.
	Warn func(string)
	// Barrier returns when all I/O has ended that was begun before on extents from TryMap; nil: there never is any.
	// It must not wait for requests in Do: those wait for it.
	Barrier func(t *blk.Task) error
}

// Node is an open image.
type Node struct {
	layout
	name     string
	storage  blk.Node
	data     blk.Node // where guest clusters are: the storage or the data file
	readOnly bool
	cache    *Cache
	barrier  func(t *blk.Task) error
	onWarn   func(string)
	info     atomic.Pointer[blk.Info]
	backing  atomic.Pointer[backing]
	l1Shift  uint
	subShift uint
	refBits  uint // log2 of the counts in a refcount block
	refOrder uint // log2 of the bits of a count
	maxRef   uint64
	block    int64 // unit in which metadata is written, bytes

	// inPlace: clusters of our own may be written. Not before the first write was prepared for, nor when damaged.
	inPlace  atomic.Bool
	corrupt  atomic.Bool // damage was found, or the image came with the mark
	prepares blk.TaskLock

	l1     atomic.Pointer[l1Table] // replaced by Resize
	loads  blk.RangeLock           // by L1 index
	l1Lock blk.TaskLock

	clusters blk.RangeLock // guest clusters whose entries are being changed
	users    blk.RangeLock // see enter
	lastUser atomic.Int64

	headerLock blk.TaskLock
	headerBad  atomic.Bool // a write of it is suspect
	syncs      blk.Syncer  // of the storage
	dataSyncs  blk.Syncer  // of the data file
	metaSeq    atomic.Int64
	syncedSeq  atomic.Int64          // metadata writes up to this one are durable
	lost       atomic.Pointer[error] // see Lost

	settling  blk.TaskLock
	resizing  blk.TaskLock
	growing   blk.TaskLock // the storage
	growData  blk.TaskLock // the data file
	refWrites blk.TaskLock // a refcount block is changed and written
	fixed     atomic.Bool  // the storage has one size
	alloc     blk.TaskLock // refs, scan, batch, and whoever changes counts: all down to maxBatch
	refs      atomic.Pointer[refTable]
	stream    stream
	scan      int64 // no cluster below is free, as far as we know
	batch     int64 // clusters to reserve next time
	maxBatch  int64 // bounds batch
	packer    packer
	unpacked  unpackCache

	mu       sync.Mutex
	header   Header
	metadata map[int64]struct{} // clusters of tables and other metadata
	pool     []run              // counted but not used
	limbo    []refRun           // not used any more but counted
	suspects []suspect
	unclean  atomic.Int32 // len(limbo) + len(suspects)
	doubts   atomic.Int32 // len(suspects)
	warnings []string
}

// backing is the node that shows through; nil: none.
type backing struct {
	node  blk.Node
	named bool // the header names one: what is unallocated may show something even if node is nil
}

// Open opens the image in storage and owns storage and Options.Data from then on, if it succeeds.
func Open(t *blk.Task, storage blk.Node, o Options) (*Node, error) {
	n, err := open(t, storage, o)
	if err != nil {
		return nil, fmt.Errorf("open qcow2 image %q: %w", o.Name, err)
	}
	return n, nil
}

func open(t *blk.Task, storage blk.Node, o Options) (*Node, error) {
	h, err := ReadHeader(t, storage)
	if err != nil {
		return nil, err
	}
	if !o.ReadOnly && h.Incompatible&IncompatCorrupt != 0 {
		return nil, ErrCorrupt
	}
	if !o.ReadOnly {
		// Who wrote before may have died without a flush. What counts from here on is what a power cut leaves, too.
		if err := blk.Do(t, storage, &blk.Request{Op: blk.OpFlush}); err != nil {
			return nil, err
		}
	}
	if !o.ReadOnly && h.Incompatible&IncompatDirty != 0 {
		if h, err = repairDirty(t, storage); err != nil {
			return nil, fmt.Errorf("repair the reference counts: %w", err)
		}
	}
	if h.hasDataFile() != (o.Data != nil) {
		return nil, invalid("the header and the caller disagree on an external data file")
	}
	n := &Node{
		layout:   h.layout(),
		name:     o.Name,
		storage:  storage,
		data:     storage,
		readOnly: o.ReadOnly,
		cache:    o.Cache,
		barrier:  o.Barrier,
		onWarn:   o.Warn,
		l1Shift:  h.l1Shift(),
		refBits:  h.refBlockBits(),
		refOrder: h.RefcountOrder,
		maxRef:   h.maxRefcount(),
		block:    min(4096, h.ClusterSize()),
		header:   *h,
		metadata: map[int64]struct{}{},
	}
	n.subShift = n.subBits()
	n.corrupt.Store(h.Incompatible&IncompatCorrupt != 0)
	if o.Data != nil {
		n.data = o.Data
	}
	if n.cache == nil {
		n.cache = NewCache(DefaultCacheBytes)
	}
	n.backing.Store(&backing{o.Backing, h.BackingFile != ""})
	n.setInfo(h.Size)
	if err := n.loadL1(t); err != nil {
		return nil, err
	}
	n.stream.off.Store(!o.Ahead)
	if o.ReadOnly {
		return n, nil
	}
	if err := n.loadRefTable(t); err != nil {
		return nil, err
	}
	if err := n.noteMetadata(t); err != nil {
		return nil, err
	}
	if h.Autoclear&^autoclearKnown != 0 {
		if err := n.writeHeader(t, func(h *Header) { h.Autoclear &= autoclearKnown }); err != nil {
			return nil, err
		}
	}
	n.inPlace.Store(!n.tracksBitmaps())
	return n, nil
}

func (n *Node) clusterSize() int64 { return 1 << n.clusterBits }

func (n *Node) setInfo(size int64) {
	n.info.Store(&blk.Info{
		Name:     n.name,
		Kind:     "qcow2",
		Size:     roundUp(size, blk.SectorSize),
		ReadOnly: n.readOnly,
		Align:    max(n.data.Info().Align, 1),
		Discard:  !n.readOnly,
	})
}

// Info implements blk.Node.
func (n *Node) Info() *blk.Info { return n.info.Load() }

// Header is a copy of the image's header.
func (n *Node) Header() *Header {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.header
	return &h
}

func (n *Node) warn(format string, args ...any) {
	w := fmt.Sprintf(format, args...)
	n.mu.Lock()
	n.warnings = append(n.warnings, w)
	n.mu.Unlock()
	if n.onWarn != nil {
		n.onWarn(w)
	}
}

// Warnings says what the user should know about the image that is not an error.
func (n *Node) Warnings() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.warnings...)
}

// Children implements blk.Node: the storage, the data file, the backing image.
func (n *Node) Children() []blk.Node {
	c := []blk.Node{n.storage}
	if n.dataFile {
		c = []blk.Node{n.data, n.storage}
	}
	if b := n.backing.Load().node; b != nil {
		c = append(c, b)
	}
	return c
}

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
		return n.read(t, r.Data, r.Off)
	case blk.OpFlush:
		return n.flush(t)
	case blk.OpWrite, blk.OpDiscard, blk.OpWriteZeroes:
	default:
		return blk.ErrNotSupported
	}
	if err := n.beginChange(t); err != nil {
		return err
	}
	var err error
	switch {
	case r.Op == blk.OpWrite:
		err = n.write(t, r.Data, r.Off)
	case r.Op == blk.OpDiscard:
		err = n.zero(t, r.Off, r.Len, discard)
	case r.Flags&blk.Unmap != 0:
		err = n.zero(t, r.Off, r.Len, unmap)
	default:
		err = n.zero(t, r.Off, r.Len, keep)
	}
	if err == nil && r.Flags&blk.FUA != 0 {
		err = n.sync(t)
	}
	n.tidy(t)
	return err
}

// beginChange is called before each change, outside all locks.
func (n *Node) beginChange(t *blk.Task) error {
	if n.readOnly {
		return blk.ErrReadOnly
	}
	if n.corrupt.Load() {
		return ErrCorrupt
	}
	if err := n.settle(t); err != nil {
		return err
	}
	if n.inPlace.Load() {
		return nil
	}
	defer n.prepares.Lock(t)()
	if n.inPlace.Load() || n.corrupt.Load() {
		return nil
	}
	if err := n.useBitmaps(t); err != nil {
		return err
	}
	n.inPlace.Store(true)
	return nil
}

// damage is called when something in the image cannot be. Nothing is changed any more from then on, and the image is
// marked.
func (n *Node) damage(t *blk.Task, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	err := fmt.Errorf("damaged image: %s: %w", what, ErrCorrupt)
	if n.corrupt.Swap(true) || n.readOnly {
		return err
	}
	n.inPlace.Store(false)
	n.warn("image %q is damaged (%s): it takes no writes until it has been repaired", n.name, what)
	if n.v2 {
		return err // no place for a mark
	}
	if werr := n.writeHeader(t, func(h *Header) { h.Incompatible |= IncompatCorrupt }); werr != nil {
		return errors.Join(err, werr)
	}
	return err
}

// Close gives back what was reserved, and closes the storage and the data file. Nothing may be in flight. Without it
// clusters leak and nothing else.
func (n *Node) Close() error {
	var err error
	if !n.readOnly {
		err = n.giveBack(blk.NewTask())
	}
	n.cache.forget(n)
	err = errors.Join(err, n.storage.Close())
	if n.dataFile {
		err = errors.Join(err, n.data.Close())
	}
	return err
}
