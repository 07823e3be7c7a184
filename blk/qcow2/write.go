// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// write is OpWrite: piece by piece, in place or into new clusters.
func (n *Node) write(t *blk.Task, v blk.Vec, off int64) error {
	l := v.Len()
	for done := int64(0); done < l; {
		// Neither does anything if the other one's turn has come meanwhile.
		got, err := n.writeInPlace(t, v, done, off+done, l-done)
		if got == 0 && err == nil {
			got, err = n.writeNew(t, v, done, off+done, l-done)
		}
		if err != nil {
			return err
		}
		done += got
	}
	return nil
}

// writeInPlace writes the beginning of [off, off+l), as far as it lies in clusters of our own.
func (n *Node) writeInPlace(t *blk.Task, v blk.Vec, at, off, l int64) (int64, error) {
	tab, err := n.table(t, off>>n.l1Shift)
	if tab == nil || err != nil {
		return 0, err
	}
	defer n.cache.unpin(tab)
	defer n.leave(n.enter(t))
	if !n.current(tab, off>>n.l1Shift) {
		return 0, nil
	}
	p, err := n.spanOf(t, tab, off, l)
	if err != nil || p.kind != kindData || !p.own {
		return 0, err
	}
	return p.len, n.writeData(t, v.AppendSlice(nil, at, p.len), p.host)
}

// writeData writes guest data. The file may end before the cluster does.
func (n *Node) writeData(t *blk.Task, v blk.Vec, host int64) error {
	l := v.Len()
	var err error
	if n.dataFile {
		err = growNode(t, &n.growData, n.data, host+l)
	} else {
		err = n.growStorage(t, host+l)
	}
	if err != nil {
		return fmt.Errorf("make the file longer: %w", err)
	}
	return blk.Do(t, n.data, &blk.Request{Op: blk.OpWrite, Off: host, Len: l, Data: v})
}

// chunk is a write to clusters that are host neighbours, whose entries change.
type chunk struct {
	tab    *table
	first  int       // entry
	base   int64     // guest offset of the first cluster
	old    []cluster // what they were
	host   int64     // where they will be
	ahead  int       // clusters behind these that get their places too, and keep their zeros
	run    run       // what was allocated for it; none if count is 0
	fresh  bool      // host holds zeros, durably
	off, l int64     // the guest's range
	lo, hi int64     // that with what has to be copied: off >= lo, off+l <= hi
}

// writeNew writes the beginning of [off, off+l) to where the tables do not point yet.
func (n *Node) writeNew(t *blk.Task, v blk.Vec, at, off, l int64) (int64, error) {
	l = min(l, (off>>n.l1Shift+1)<<n.l1Shift-off)
	first, last := off>>n.clusterBits, (off+l-1)>>n.clusterBits
	ahead := n.stream.ahead(n, off, l)
	defer n.clusters.Unlock(n.clusters.Lock(t, first, last-first+1+int64(ahead)))
	tab, err := n.ownTable(t, off>>n.l1Shift)
	if err != nil {
		return 0, err
	}
	defer n.cache.unpin(tab)
	c := &chunk{tab: tab, base: first << n.clusterBits, off: off, l: l}
	c.first = int(first) & (tab.entries() - 1)
	if ok, err := n.plan(t, c, ahead); !ok || err != nil {
		return 0, err
	}
	v = v.AppendSlice(nil, at, c.l)
	var errData, errLink error
	if n.harmless(c) {
		// Both at once. The place has an owner then even if writing the data fails: it holds zeros, as before.
		errData, errLink = t.Par(
			func(t *blk.Task) error { return n.writeData(t, v, c.host+c.off-c.base) },
			func(t *blk.Task) error { return n.link(t, c) },
		)
	} else {
		if err := n.fill(t, c, v); err != nil {
			if c.run.count > 0 {
				n.putBack(c.run)
			}
			return 0, err
		}
		errLink = n.link(t, c)
	}
	if errLink == nil {
		return c.l, errData
	}
	if c.run.count > 0 {
		// The storage may point there: only free when that is settled. Nor before now, when no data is on its way there.
		n.release(refRun{c.run.host >> n.clusterBits, c.run.count, -1})
	}
	return c.l, errLink
}

// harmless reports whether the tables may point to the chunk before it holds the data: if the data is lost then, zeros
// show where zeros were.
func (n *Node) harmless(c *chunk) bool { return c.fresh && n.readsZero(c.tab, c.lo, c.hi-c.lo) }

// own reports whether the cluster's place can be kept: it is nobody else's.
func (c cluster) own() bool { return c.present && c.copied }

// subsIn are the subclusters of the cluster at base that [lo, hi) touches.
func (n *Node) subsIn(base, lo, hi int64) uint32 {
	a := max(lo-base, 0) >> n.subShift
	b := (min(hi-base, n.clusterSize()) + 1<<n.subShift - 1) >> n.subShift
	return uint32(1<<b - 1<<a)
}

// plan decides how many clusters the chunk has and where they go. ahead is how many behind it are locked too. ok is
// false if the first one is to be written in place.
func (n *Node) plan(t *blk.Task, c *chunk, ahead int) (ok bool, err error) {
	end := c.off + c.l
	for g, i := c.base, c.first; g < end; g, i = g+n.clusterSize(), i+1 {
		o := c.tab.stableAt(i)
		if o.bad {
			return false, n.damage(t, "the L2 entry for the guest's offset %#x", g)
		}
		if k := len(c.old); k > 0 && (o.own() != c.old[0].own() || o.own() && o.host != c.old[0].host+int64(k)<<n.clusterBits) {
			break
		}
		if touched := n.subsIn(g, c.off, end); o.own() && o.alloc&touched == touched {
			break // in place
		}
		c.old = append(c.old, o)
	}
	if len(c.old) == 0 {
		return false, nil
	}
	switch {
	case c.old[0].own():
		c.host = c.old[0].host
	case n.dataFile:
		c.host = c.base
	default:
		if c.run, err = n.allocate(t, int64(len(c.old)), n.spare(c, ahead)); err != nil {
			return false, err
		}
		c.host, c.fresh = c.run.host, c.run.fresh
		c.ahead = max(int(c.run.count)-len(c.old), 0)
		c.old = c.old[:int(c.run.count)-c.ahead]
		n.stream.gave(c.base+c.run.count<<n.clusterBits, ahead)
	}
	c.l = min(end, c.base+int64(len(c.old))<<n.clusterBits) - c.off
	c.lo = c.off - n.copyBefore(c.old[0], c.off&(n.clusterSize()-1))
	c.hi = c.off + c.l + n.copyAfter(c.old[len(c.old)-1], (c.off+c.l-1)&(n.clusterSize()-1)+1)
	if n.dataFile { // which should not become longer than the disk
		c.hi = min(c.hi, max(n.info.Load().Size, c.off+c.l))
	}
	return true, nil
}

// copyBefore is how many bytes before the byte skip of a cluster must be copied when that is written: the rest of the
// unit in which the new entry can tell old from new. A subcluster that is written in place is never copied.
func (n *Node) copyBefore(c cluster, skip int64) int64 {
	if n.copyWhole(c) {
		return skip
	}
	if c.alloc>>(skip>>n.subShift)&1 != 0 {
		return 0
	}
	return skip & (1<<n.subShift - 1)
}

// copyAfter is the same for what follows the byte before end.
func (n *Node) copyAfter(c cluster, end int64) int64 {
	if n.copyWhole(c) {
		return n.clusterSize() - end
	}
	if c.alloc>>((end-1)>>n.subShift)&1 != 0 {
		return 0
	}
	return roundUp(end, 1<<n.subShift) - end
}

// copyWhole: the old place is given up, with all that is in it.
func (n *Node) copyWhole(c cluster) bool { return c.packed != 0 || c.present && !c.own() }

// fill writes the data with what is copied around it, and makes sure that a power cut cannot show anything but the
// old or the new contents once the tables point there.
func (n *Node) fill(t *blk.Task, c *chunk, v blk.Vec) error {
	end := c.off + c.l
	at := c.lo
	all := make(blk.Vec, 0, len(v)+2)
	if c.lo < c.off {
		if c.fresh && n.readsZero(c.tab, c.lo, c.off-c.lo) {
			at = c.off // zeros already
		} else {
			head, err := n.readOld(t, c.tab, c.lo, c.off)
			if err != nil {
				return err
			}
			defer head.Free()
			all = blk.BytesVec(all, head.B)
		}
	}
	all = append(all, v...)
	if end < c.hi && !(c.fresh && n.readsZero(c.tab, end, c.hi-end)) {
		tail, err := n.readOld(t, c.tab, end, c.hi)
		if err != nil {
			return err
		}
		defer tail.Free()
		all = blk.BytesVec(all, tail.B)
	}
	if err := n.writeData(t, all, c.host+at-c.base); err != nil {
		return err
	}
	return n.syncData(t)
}

// readsZero reports whether the range reads as zeros, as far as one knows without waiting.
func (n *Node) readsZero(tab *table, off, l int64) bool {
	for l > 0 {
		p, ok := n.span(tab, off, l)
		if !ok {
			return false
		}
		switch p.kind {
		case kindZero:
		case kindBacking:
			e, ok := n.tryBacking(off, p.len)
			if !ok || e.State != blk.Zero && e.State != blk.Unallocated {
				return false
			}
			p.len = e.Len
		default:
			return false
		}
		off, l = off+p.len, l-p.len
	}
	return true
}

// readOld reads [lo, hi), which nobody can write now.
func (n *Node) readOld(t *blk.Task, tab *table, lo, hi int64) (*blk.Buffer, error) {
	buf := blk.GetBuffer(int(hi - lo))
	for at := lo; at < hi; {
		p, err := n.spanOf(t, tab, at, hi-at)
		if err == nil {
			err = n.readAs(t, p, blk.BytesVec(nil, buf.B[at-lo:at-lo+p.len]), at)
		}
		if err != nil {
			buf.Free()
			return nil, fmt.Errorf("copy on write: %w", err)
		}
		at += p.len
	}
	return buf, nil
}

// link lets the tables point to the chunk, and gives up what they pointed to.
func (n *Node) link(t *blk.Task, c *chunk) error {
	entries := make([]cluster, len(c.old), len(c.old)+c.ahead)
	for i, o := range c.old {
		g := c.base + int64(i)<<n.clusterBits
		touched := n.all
		if !n.copyWhole(o) {
			touched = n.subsIn(g, c.lo, c.hi)
		}
		entries[i] = cluster{
			host: c.host + int64(i)<<n.clusterBits, present: true, copied: true,
			alloc: o.alloc | touched, zero: o.zero &^ touched,
		}
	}
	for i := range int64(c.ahead) {
		host := c.host + (int64(len(c.old))+i)<<n.clusterBits
		entries = append(entries, cluster{host: host, present: true, copied: true, alloc: n.all})
	}
	if err := n.set(t, c.tab, c.first, entries); err != nil {
		return err
	}
	for _, o := range c.old {
		n.forget(o, !o.own())
	}
	return nil
}

// forget gives up what an entry pointed to: compressed data, or the host cluster if place is set.
func (n *Node) forget(o cluster, place bool) {
	switch {
	case o.packed != 0:
		n.releasePacked(o.packed)
	case place && o.present && !n.dataFile:
		n.release(refRun{o.host >> n.clusterBits, 1, -1})
	}
}
