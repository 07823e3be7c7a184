// SPDX-License-Identifier: Apache-2.0

// Package cor is the filter that copies on read: what is read from the images behind the top one is written into the
// top one on its way, so that it is there the next time.
//
// A read goes like this. What the top image holds, and zeros, are read as ever, mostly by the caller itself through
// TryMap. For the rest the clusters are locked; it is looked again what the top does not hold of them, and that is read
// into a buffer, given to the guest, and written into the top.
//
// Every change that passes Do holds the same lock, and only by passing Do can a change come to a cluster that the top
// does not hold: it gives no extents there. So no copy lands on a newer write, and readers of one cluster fetch it once.
// Writes through extents go to clusters that the top holds, which are never copied.
package cor

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// maxPiece bounds what is copied at a time, in bytes, unless one cluster is larger.
const maxPiece = 4 << 20

// Node is the filter.
type Node struct {
	top     blk.Node
	cluster int64
	failed  func(error)
	info    atomic.Pointer[blk.Info]

	lock blk.RangeLock // whole clusters: by who copies them and who changes them
	// zeroing counts the copies of zeros under way. Where zeros showed before, the top may give extents for writing
	// before it has stored them; meanwhile nobody gets any.
	zeroing  atomic.Int64
	failures atomic.Int64
}

// New puts the filter over top, which reports what the images behind it hold with a depth of at least 1, and allocates
// by clusters of this many bytes, a power of two. failed is told, from any thread and perhaps many times, that a cluster
// could not be copied of which the guest read something.
func New(top blk.Node, cluster int64, failed func(error)) *Node {
	n := &Node{top: top, cluster: cluster, failed: failed}
	n.setInfo()
	return n
}

func (n *Node) setInfo() {
	in := *n.top.Info()
	in.Kind = "copy-on-read"
	n.info.Store(&in)
}

// Top is the image that the filter is over.
func (n *Node) Top() blk.Node { return n.top }

// Failures is how many copies for the guest have failed so far.
func (n *Node) Failures() int64 { return n.failures.Load() }

// Info implements blk.Node.
func (n *Node) Info() *blk.Info { return n.info.Load() }

// Children implements blk.Node.
func (n *Node) Children() []blk.Node { return []blk.Node{n.top} }

// TryMap implements blk.Node: no extents for what is to be copied.
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	e, ok := n.top.TryMap(op, off, l)
	switch {
	case op == blk.OpRead && toCopy(e):
		return blk.Extent{}, false
	case op == blk.OpWrite && n.zeroing.Load() > 0: // after the extent was asked for: it is older than the count
		return blk.Extent{}, false
	}
	return e, ok
}

// toCopy reports whether a read of the extent brings it into the top. To store zeros that show anyway would only cost.
func toCopy(e blk.Extent) bool {
	return e.Depth > 0 && e.State != blk.Zero && e.State != blk.Unallocated
}

// Map implements blk.Node.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) { return n.top.Map(t, off, l) }

// Do implements blk.Node.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead:
		return n.read(t, r)
	case blk.OpFlush:
		return blk.Do(t, n.top, r)
	case blk.OpWrite, blk.OpWriteZeroes, blk.OpDiscard:
		lo, hi := n.clusters(r.Off, r.Off+r.Len)
		defer n.lock.Unlock(n.lock.Lock(t, lo, hi-lo))
		return blk.Do(t, n.top, r)
	default:
		return blk.ErrNotSupported
	}
}

// clusters rounds a range up to whole clusters, as far as the disk goes.
func (n *Node) clusters(off, end int64) (lo, hi int64) {
	return off &^ (n.cluster - 1), min((end+n.cluster-1)&^(n.cluster-1), n.Info().Size)
}

// read serves the guest: stretches that the top can serve, and others in pieces.
func (n *Node) read(t *blk.Task, r *blk.Request) error {
	for done := int64(0); done < r.Len; {
		l, copies, err := n.stretch(t, r.Off+done, r.Len-done)
		if err != nil {
			return err
		}
		if copies {
			l, err = n.readThrough(t, r.Data, done, r.Off+done, min(l, max(maxPiece, n.cluster)))
		} else {
			err = n.readTop(t, r.Data, done, r.Off+done, l)
		}
		if err != nil {
			return err
		}
		done += l
	}
	return nil
}

// stretch is how many bytes from off on are to be copied, or are not.
func (n *Node) stretch(t *blk.Task, off, l int64) (got int64, copies bool, err error) {
	for got < l {
		e, err := n.look(t, off+got, l-got)
		if err != nil {
			return 0, false, err
		}
		if got > 0 && toCopy(e) != copies {
			break
		}
		copies = toCopy(e)
		got += e.Len
	}
	return got, copies, nil
}

// look says how a range is stored. A file is not asked for its holes: that takes another thread. They look like data, and
// fetch finds out.
func (n *Node) look(t *blk.Task, off, l int64) (blk.Extent, error) {
	if e, ok := n.top.TryMap(blk.OpRead, off, l); ok {
		return e, nil
	}
	return n.top.Map(t, off, l)
}

// readTop reads [off, off+l) into v from at on.
func (n *Node) readTop(t *blk.Task, v blk.Vec, at, off, l int64) error {
	return blk.Do(t, n.top, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: v.AppendSlice(nil, at, l)})
}

// readThrough reads [off, off+l) into v from at on, and copies the clusters around it. An error of that is not the
// guest's.
func (n *Node) readThrough(t *blk.Task, v blk.Vec, at, off, l int64) (int64, error) {
	lo, hi := n.clusters(off, off+l)
	defer n.lock.Unlock(n.lock.Lock(t, lo, hi-lo))
	spans, err := n.absent(t, lo, hi, 0)
	if err != nil {
		return 0, err
	}
	end := off + l
	read := off // up to here the guest has its data
	for _, s := range spans {
		if read < s.lo && read < end {
			if err := n.readTop(t, v, at+read-off, read, min(s.lo, end)-read); err != nil {
				return 0, err
			}
			read = min(s.lo, end)
		}
		err := n.fetch(t, s, func(b []byte, pos int64) {
			from, to := max(pos, off), min(pos+int64(len(b)), end)
			if from < to {
				v.AppendSlice(nil, at+from-off, to-from).CopyFrom(b[from-pos : to-pos])
				read = to
			}
		}, 0)
		if err == nil {
			continue
		}
		n.failures.Add(1)
		n.failed(err)
		var werr *WriteError
		if !errors.As(err, &werr) {
			// What cannot be read may be another part of the cluster.
			return l, n.readTop(t, v, at, off, l)
		}
	}
	if read < end {
		if err := n.readTop(t, v, at+read-off, read, end-read); err != nil {
			return 0, err
		}
	}
	return l, nil
}

// Pull copies what the top does not hold of the clusters around [off, off+l), with nobody reading it. depth is where the
// images begin that stay behind the top, counted from the top, and what they hold is left there; 0: none stays, so that
// zeros need not be stored. A *WriteError says that the top could not take it, any other error that it could not be read.
func (n *Node) Pull(t *blk.Task, off, l int64, depth uint16) error {
	lo, end := n.clusters(off, off+l)
	for lo < end {
		hi := min(lo+max(maxPiece, n.cluster), end)
		if err := n.pull(t, lo, hi, depth); err != nil {
			return err
		}
		lo = hi
	}
	return nil
}

func (n *Node) pull(t *blk.Task, lo, hi int64, depth uint16) error {
	defer n.lock.Unlock(n.lock.Lock(t, lo, hi-lo))
	spans, err := n.absent(t, lo, hi, depth)
	if err != nil {
		return err
	}
	for _, s := range spans {
		if err := n.fetch(t, s, func([]byte, int64) {}, depth); err != nil {
			return err
		}
	}
	return nil
}

// Wanted reports whether Pull would store an extent.
func Wanted(e blk.Extent, depth uint16) bool {
	if depth == 0 {
		return toCopy(e)
	}
	// Zeros too: what stays behind may hold something there.
	return e.Depth > 0 && e.Depth < depth
}

// span is a range that the top does not hold.
type span struct{ lo, hi int64 }

// absent finds what to copy of whole clusters, which are locked: what the top does not hold of each cluster of which
// anything is wanted. An image with subclusters may hold the rest of a cluster, where the guest writes meanwhile.
func (n *Node) absent(t *blk.Task, lo, hi int64, depth uint16) ([]span, error) {
	var (
		all  []span
		e    blk.Extent
		eEnd = lo
	)
	for at := lo; at < hi; {
		var here []span
		end, wanted := min(at+n.cluster, hi), false
		for at < end {
			if at >= eEnd {
				var err error
				if e, err = n.look(t, at, hi-at); err != nil {
					return nil, err
				}
				eEnd = at + e.Len
			}
			to := min(eEnd, end)
			if e.Depth > 0 {
				here = join(here, span{at, to})
				wanted = wanted || Wanted(e, depth)
			}
			at = to
		}
		if wanted {
			for _, s := range here {
				all = join(all, s)
			}
		}
	}
	return all, nil
}

func join(l []span, s span) []span {
	if k := len(l) - 1; k >= 0 && l[k].hi == s.lo {
		l[k].hi = s.hi
		return l
	}
	return append(l, s)
}

// WriteError says that the top could not take a copy.
type WriteError struct{ Err error }

func (e *WriteError) Error() string { return fmt.Sprintf("copy on read: %v", e.Err) }
func (e *WriteError) Unwrap() error { return e.Err }

// fetch reads a span, shows it to use, and writes it into the top. The clusters are locked.
func (n *Node) fetch(t *blk.Task, s span, use func(b []byte, off int64), depth uint16) error {
	buf := blk.GetBuffer(int(s.hi - s.lo))
	defer buf.Free()
	if err := blk.Do(t, n.top, &blk.Request{Op: blk.OpRead, Off: s.lo, Len: s.hi - s.lo, Data: blk.BytesVec(nil, buf.B)}); err != nil {
		return err
	}
	use(buf.B, s.lo)
	for at := s.lo; at < s.hi; {
		end, zero := n.alike(buf.B, s, at)
		var err error
		if zero {
			err = n.copyZeroes(t, at, end, depth)
		} else {
			err = n.write(t, buf.B[at-s.lo:end-s.lo], at)
		}
		if err != nil {
			return &WriteError{err}
		}
		at = end
	}
	return nil
}

// alike is where the clusters end, from at on, that hold nothing but zeros, or hold something each: a run of the latter
// is one write of something to each of them.
func (n *Node) alike(b []byte, s span, at int64) (end int64, zero bool) {
	for end = at; end < s.hi; {
		to := min(end&^(n.cluster-1)+n.cluster, s.hi)
		z := blk.IsZero(b[end-s.lo : to-s.lo])
		if end > at && z != zero {
			break
		}
		end, zero = to, z
	}
	return end, zero
}

func (n *Node) write(t *blk.Task, b []byte, off int64) error {
	return blk.Do(t, n.top, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

// copyZeroes stores zeros that were read, unless they are holes, which show as zeros anyway.
func (n *Node) copyZeroes(t *blk.Task, lo, hi int64, depth uint16) error {
	for at := lo; at < hi && depth == 0; {
		e, err := n.top.Map(t, at, hi-at)
		if err != nil || toCopy(e) {
			break
		}
		if at += e.Len; at >= hi {
			return nil
		}
	}
	return n.storeZeroes(t, lo, hi, depth)
}

// storeZeroes lets the top hold zeros. A format without zero clusters may leave that to the images behind it; if some
// stay there, zeros are written as data.
func (n *Node) storeZeroes(t *blk.Task, lo, hi int64, depth uint16) error {
	n.zeroing.Add(1)
	defer n.zeroing.Add(-1)
	if err := blk.Do(t, n.top, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: lo, Len: hi - lo}); err != nil || depth == 0 {
		return err
	}
	for lo < hi {
		e, err := n.top.Map(t, lo, hi-lo)
		if err != nil {
			return err
		}
		end := lo + min(e.Len, int64(len(zeros)))
		if e.Depth > 0 {
			if err := n.write(t, zeros[:end-lo], lo); err != nil {
				return err
			}
		}
		lo = end
	}
	return nil
}

var zeros [64 << 10]byte

// Resize changes the size of the top. The graph is paused, and nobody pulls.
func (n *Node) Resize(t *blk.Task, size int64, shrink bool) error {
	top, ok := n.top.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return blk.ErrNotSupported
	}
	defer n.setInfo()
	return top.Resize(t, size, shrink)
}

// Close implements blk.Node.
func (n *Node) Close() error { return n.top.Close() }
