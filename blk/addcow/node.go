// SPDX-License-Identifier: Apache-2.0

// Package addcow gives copy on write to an image file that knows none, a raw file or a block device. A file of its own,
// the add-cow file, names the image file and the backing file, and has a bitmap with a bit for each cluster: set, the
// image file holds it; not set, the backing file shows. Once all bits are set the add-cow file and the backing file are
// not needed any more, and the image file is used by itself.
//
// The format is that of "docs: document for add-cow file format", which Dong Xu Wang sent to the QEMU mailing list, in
// the version V19 of May 2013, read from its author's repository; V20 names no change of it. It never became a part of
// QEMU, and no images of others were found. The text says nothing of the order of writes. Image files are raw here, and
// both formats must be named. Header sizes other than the default are taken if they are multiples of 4 KiB up to 2 MiB,
// and format names without a NUL, as up to V18.
//
// What happens to a write, in order:
//
//  1. Where bits are set it goes to the image file, most of the time by the caller itself, through TryMap.
//  2. Elsewhere the clusters are locked, and written whole: the data, with what the backing file shows around it.
//  3. The image file is flushed, so that a power cut cannot keep the bits and lose the data.
//  4. The bits are written to the add-cow file (bitmap.go), and only then count. So whatever is acknowledged survives the
//     death of this process; the guest's flush makes it durable.
//
// Bits are never taken back while they count. So an extent that was handed out stays right, and whoever finds a bit set
// needs no lock.
//
// Locks, in the order in which they may be taken, all of them task locks that may be held over I/O: ranges of
// Node.clusters, bitmap.storing, the flushes.
package addcow

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// Options of Open.
type Options struct {
	Name     string   // the path of the add-cow file, for messages
	Image    blk.Node // the image file; closed with the node
	Backing  blk.Node // what shows where a bit is not set; nil: zeros. Not closed by the node, never written
	ReadOnly bool
}

// Node is an open image.
type Node struct {
	storage blk.Node // the add-cow file
	image   blk.Node
	backing atomic.Pointer[blk.Node] // nil: none
	info    blk.Info
	header  Header
	shift   uint // log2 of the cluster size

	bits     *bitmap       // nil: all clusters are in the image file
	clusters blk.RangeLock // that are being brought into the image file
	syncs    blk.Syncer    // of the image file
}

// Open opens the add-cow file in storage, and owns storage and Options.Image from then on, if it succeeds.
func Open(t *blk.Task, storage blk.Node, o Options) (*Node, error) {
	n, err := open(t, storage, o)
	if err != nil {
		return nil, fmt.Errorf("open add-cow image %q: %w", o.Name, err)
	}
	return n, nil
}

func open(t *blk.Task, storage blk.Node, o Options) (*Node, error) {
	h, err := ReadHeader(t, storage)
	if err != nil {
		return nil, err
	}
	in := o.Image.Info()
	n := &Node{storage: storage, image: o.Image, header: *h, shift: h.ClusterBits}
	n.info = blk.Info{
		Name: o.Name, Kind: "add-cow", Size: in.Size, ReadOnly: o.ReadOnly, Align: max(in.Align, 1), Discard: !o.ReadOnly && in.Discard,
	}
	if h.AllAllocated() {
		return n, nil
	}
	if o.Backing != nil {
		n.backing.Store(&o.Backing)
	}
	size, err := h.bitmapSize(in.Size)
	if err != nil {
		return nil, err
	}
	n.bits = newBitmap(storage, h, up(in.Size, h.ClusterSize())>>n.shift)
	if err := n.bits.load(t); err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		// Who wrote before may have died without a flush. The bits that count from here on are what a power cut leaves, too.
		if err := blk.Do(t, storage, &blk.Request{Op: blk.OpFlush}); err != nil {
			return nil, err
		}
		// The image file may have become longer.
		if err := grow(t, storage, h.Size+size); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// Info implements blk.Node: the size is that of the image file.
func (n *Node) Info() *blk.Info { return &n.info }

// Header is what the file says.
func (n *Node) Header() *Header {
	h := n.header
	return &h
}

// Children implements blk.Node: the image file, the add-cow file, the backing image.
func (n *Node) Children() []blk.Node {
	c := []blk.Node{n.image, n.storage}
	if b := n.behind(); b != nil {
		c = append(c, b)
	}
	return c
}

func (n *Node) behind() blk.Node {
	if b := n.backing.Load(); b != nil && n.bits != nil {
		return *b
	}
	return nil
}

// Over puts the image over another backing node, which reads the same. Nothing may be in flight.
func (n *Node) Over(backing blk.Node) {
	if backing == nil {
		n.backing.Store(nil)
		return
	}
	n.backing.Store(&backing)
}

func (n *Node) clusterSize() int64 { return 1 << n.shift }

// run says whether the image file holds what is at off, and for how many of l bytes that is so.
func (n *Node) run(off, l int64) (held bool, got int64) {
	if n.bits == nil {
		return true, l
	}
	first := off >> n.shift
	held, k := n.bits.known.run(first, (off+l-1)>>n.shift-first+1)
	return held, min((first+k)<<n.shift-off, l)
}

// TryMap implements blk.Node.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	switch op {
	case blk.OpFlush:
		if n.bits != nil && !n.bits.clean() { // two files
			return blk.Extent{}, false
		}
		return n.image.TryMap(op, 0, 0)
	case blk.OpRead, blk.OpWrite:
	default:
		return blk.Extent{}, false
	}
	if off < 0 || l <= 0 || off >= n.info.Size {
		return blk.Extent{}, false
	}
	held, l := n.run(off, min(l, n.info.Size-off))
	switch {
	case held:
		e, ok := n.image.TryMap(op, off, l)
		if op == blk.OpWrite && n.bits != nil {
			e.Unsynced = e.Unsynced || n.bits.written.Load() != n.bits.synced.Load()
		}
		return e, ok
	case op == blk.OpWrite:
		return blk.Extent{}, false
	}
	b := n.behind()
	if e, ok := n.nothing(b, off, l); ok {
		return e, true
	}
	e, ok := b.TryMap(op, off, min(l, b.Info().Size-off))
	return below(e), ok
}

// nothing is what shows if there is no backing image, or behind its end.
func (n *Node) nothing(b blk.Node, off, l int64) (blk.Extent, bool) {
	switch {
	case b == nil:
		return blk.Extent{Len: l, State: blk.Unallocated}, true
	case off >= b.Info().Size:
		// Not ours: behind another backing image there may be something else.
		return blk.Extent{Len: l, State: blk.Zero, Depth: 1}, true
	default:
		return blk.Extent{}, false
	}
}

// below is an extent of the backing image as seen from here.
func below(e blk.Extent) blk.Extent {
	e.Depth++
	e.Writable, e.Log, e.Unsynced = false, nil, false
	return e
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	if off < 0 || l <= 0 || off >= n.info.Size {
		return blk.Extent{}, blk.ErrRange
	}
	held, l := n.run(off, min(l, n.info.Size-off))
	if held {
		e, err := n.image.Map(t, off, l)
		if e.State == blk.Unallocated { // to us it is not
			e.State = blk.Zero
		}
		return e, err
	}
	b := n.behind()
	if e, ok := n.nothing(b, off, l); ok {
		return e, nil
	}
	e, err := b.Map(t, off, min(l, b.Info().Size-off))
	return below(e), err
}

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	var piece func(t *blk.Task, r *blk.Request, held bool, off, l int64) (int64, error)
	switch r.Op {
	case blk.OpFlush:
		return n.flush(t)
	case blk.OpRead:
		piece = n.read
	case blk.OpWrite:
		piece = n.write
	case blk.OpWriteZeroes, blk.OpDiscard:
		piece = n.zero
	default:
		return blk.ErrNotSupported
	}
	for end, off := r.Off+r.Len, r.Off; off < end; {
		held, l := n.run(off, end-off)
		// It does nothing if the cluster has come into the image file meanwhile.
		got, err := piece(t, r, held, off, l)
		if err != nil {
			return err
		}
		off += got
	}
	if r.Flags&blk.FUA != 0 {
		return n.flush(t)
	}
	return nil
}

// inImage passes a piece of a request to the image file.
func (n *Node) inImage(t *blk.Task, r *blk.Request, off, l int64) (int64, error) {
	p := blk.Request{Op: r.Op, Flags: r.Flags &^ blk.FUA, Off: off, Len: l}
	if r.Data != nil {
		p.Data = r.Data.AppendSlice(nil, off-r.Off, l)
	}
	return l, blk.Do(t, n.image, &p)
}

func (n *Node) read(t *blk.Task, r *blk.Request, held bool, off, l int64) (int64, error) {
	if held {
		return n.inImage(t, r, off, l)
	}
	return l, n.readBehind(t, r.Data.AppendSlice(nil, off-r.Off, l), off)
}

// readBehind reads what the backing image shows.
func (n *Node) readBehind(t *blk.Task, v blk.Vec, off int64) error {
	l, have := v.Len(), int64(0)
	b := n.behind()
	if b != nil {
		have = max(0, min(l, b.Info().Size-off))
	}
	v.AppendSlice(nil, have, l-have).Zero()
	if have == 0 {
		return nil
	}
	return blk.Do(t, b, &blk.Request{Op: blk.OpRead, Off: off, Len: have, Data: v.AppendSlice(nil, 0, have)})
}

func (n *Node) write(t *blk.Task, r *blk.Request, held bool, off, l int64) (int64, error) {
	if held {
		return n.inImage(t, r, off, l)
	}
	return n.bring(t, off, l, func(l int64) error { return n.fill(t, r.Data.AppendSlice(nil, off-r.Off, l), off) })
}

// zero is for discards too: what is given up must not show what is behind it later.
func (n *Node) zero(t *blk.Task, r *blk.Request, held bool, off, l int64) (int64, error) {
	if held {
		return n.inImage(t, r, off, l)
	}
	in := off & (n.clusterSize() - 1)
	if whole := min(n.clusterSize()-in, n.info.Size-off); in > 0 || l < whole {
		l = min(l, whole)
		if r.Op == blk.OpDiscard {
			return l, nil // nothing to give up; it reads as before
		}
		zeros := blk.GetBuffer(int(l))
		defer zeros.Free()
		clear(zeros.B)
		return n.bring(t, off, l, func(l int64) error { return n.fill(t, blk.BytesVec(nil, zeros.B[:l]), off) })
	}
	if off+l < n.info.Size {
		l &^= n.clusterSize() - 1
	}
	flags := r.Flags &^ blk.FUA
	if r.Op == blk.OpDiscard {
		flags = blk.Unmap
	}
	return n.bring(t, off, l, func(l int64) error {
		return blk.Do(t, n.image, &blk.Request{Op: blk.OpWriteZeroes, Flags: flags, Off: off, Len: l})
	})
}

// bring brings the clusters that [off, off+l) touches into the image file, as far as the first of them are not there.
// store writes them whole.
func (n *Node) bring(t *blk.Task, off, l int64, store func(l int64) error) (int64, error) {
	first, last := off>>n.shift, (off+l-1)>>n.shift
	defer n.clusters.Unlock(n.clusters.Lock(t, first, last-first+1))
	held, l := n.run(off, l)
	if held {
		return 0, nil
	}
	if err := store(l); err != nil {
		return 0, err
	}
	// The data before the bit: the other order shows what the image file held before it was ours.
	if err := n.syncs.Sync(t, n.image); err != nil {
		return 0, err
	}
	return l, n.bits.set(t, first, (off+l-1)>>n.shift-first+1)
}

// fill writes v with what is around it in its clusters.
func (n *Node) fill(t *blk.Task, v blk.Vec, off int64) error {
	end := off + v.Len()
	lo, hi := off&^(n.clusterSize()-1), min(up(end, n.clusterSize()), n.info.Size)
	var all blk.Vec
	for _, part := range []struct{ from, to int64 }{{lo, off}, {end, hi}} {
		if part.from < part.to {
			buf := blk.GetBuffer(int(part.to - part.from))
			defer buf.Free()
			b := blk.BytesVec(nil, buf.B)
			if err := n.readBehind(t, b, part.from); err != nil {
				return fmt.Errorf("copy on write: %w", err)
			}
			all = append(all, b...)
		}
		if part.to == off {
			all = append(all, v...)
		}
	}
	return blk.Do(t, n.image, &blk.Request{Op: blk.OpWrite, Off: lo, Len: hi - lo, Data: all})
}

// flush makes everything durable: the data of bits that are stored already is.
func (n *Node) flush(t *blk.Task) error {
	if n.info.ReadOnly {
		return nil
	}
	if n.bits == nil || n.bits.clean() {
		return n.syncs.Sync(t, n.image)
	}
	return errors.Join(t.Par(
		func(t *blk.Task) error { return n.syncs.Sync(t, n.image) },
		n.bits.sync,
	))
}

// ErrPartial: not all clusters are in the image file.
var ErrPartial = errors.New("the image file does not hold all clusters yet")

// Finish records durably that the image file holds everything, so that it can be used by itself. The add-cow file then
// reads the same without its backing image, which this node still has. Nothing may be in flight.
func (n *Node) Finish(t *blk.Task) error {
	if n.bits == nil {
		return nil
	}
	if have := n.bits.known.count(); have < n.bits.clusters {
		return fmt.Errorf("%d of %d clusters: %w", have, n.bits.clusters, ErrPartial)
	}
	if err := n.flush(t); err != nil {
		return err
	}
	buf := blk.GetBuffer(block)
	defer buf.Free()
	if err := readAt(t, n.storage, buf.B, 0); err != nil {
		return err
	}
	// One sector, and the names stay where they are.
	binary.LittleEndian.PutUint64(buf.B[compatibleAt:], n.header.Compatible|CompatAllAllocated)
	if err := writeAt(t, n.storage, buf.B, 0); err != nil {
		return err
	}
	return blk.Do(t, n.storage, &blk.Request{Op: blk.OpFlush})
}

// Close closes the add-cow file and the image file.
func (n *Node) Close() error { return errors.Join(n.storage.Close(), n.image.Close()) }
