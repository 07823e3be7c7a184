// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/blkstream/blkstream/blk"
)

// Flushes, and metadata writes whose outcome is unknown.

// syncStorage makes all metadata durable that has been written, and guest data unless it is in a data file.
func (n *Node) syncStorage(t *blk.Task) error {
	seq := n.metaSeq.Load()
	if err := n.syncs.Sync(t, n.storage); err != nil {
		n.lost.CompareAndSwap(nil, &err)
		return err
	}
	for {
		old := n.syncedSeq.Load()
		if old >= seq || n.syncedSeq.CompareAndSwap(old, seq) {
			return nil
		}
	}
}

// Lost is the first error of a flush of the storage, if there has been one: metadata that was written since the flush before
// it may be gone from the storage, and what memory says of it is not written again. Only who opens the image anew knows
// what it holds.
func (n *Node) Lost() error {
	if err := n.lost.Load(); err != nil {
		return *err
	}
	return nil
}

// syncData makes guest data durable that has been written.
func (n *Node) syncData(t *blk.Task) error {
	if n.dataFile {
		return n.dataSyncs.Sync(t, n.data)
	}
	return n.syncStorage(t)
}

// sync makes everything durable that has been written.
func (n *Node) sync(t *blk.Task) error {
	if n.dataFile {
		if err := n.syncData(t); err != nil {
			return err
		}
	}
	return n.syncStorage(t)
}

// flush is OpFlush.
func (n *Node) flush(t *blk.Task) error {
	if n.readOnly {
		return nil
	}
	if err := n.settle(t); err != nil {
		return err
	}
	if err := n.sync(t); err != nil {
		return err
	}
	if n.unclean.Load() > 0 && !n.corrupt.Load() {
		// Everything is durable already: an error here is the next allocation's.
		defer n.alloc.Lock(t)()
		_ = n.reclaim(t)
	}
	return nil
}

// writeMeta writes metadata. It counts as not durable until the next flush.
func (n *Node) writeMeta(t *blk.Task, b []byte, off int64) error {
	// Tables are written in whole blocks, and the file may end before the last one does.
	if err := n.growStorage(t, off+int64(len(b))); err != nil {
		return err
	}
	err := blk.Do(t, n.storage, &blk.Request{
		Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b),
	})
	if err == nil {
		n.metaSeq.Add(1)
	}
	return err
}

// suspect is a write that failed, so that nobody knows what the storage holds there.
type suspect struct {
	what  string
	again func(t *blk.Task) error // writes what memory holds
	done  func()                  // nil: nothing
}

func (n *Node) suspect(s suspect) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.suspects = append(n.suspects, s)
	n.unclean.Add(1)
	n.doubts.Add(1)
}

// settle repeats what is suspect and makes it durable. Until it succeeds no metadata may be changed.
func (n *Node) settle(t *blk.Task) error {
	if n.doubts.Load() == 0 {
		return nil
	}
	defer n.settling.Lock(t)()
	n.mu.Lock()
	todo := n.suspects
	n.suspects = nil
	n.mu.Unlock()
	if len(todo) == 0 {
		return nil
	}
	var err error
	for _, s := range todo {
		if err = s.again(t); err != nil {
			err = fmt.Errorf("repeat a failed write of the %s: %w", s.what, err)
			break
		}
	}
	if err == nil {
		err = n.syncStorage(t)
	}
	if err != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.suspects = slices.Concat(todo, n.suspects)
		return err
	}
	for _, s := range todo {
		if s.done != nil {
			s.done()
		}
	}
	n.unclean.Add(int32(-len(todo)))
	n.doubts.Add(int32(-len(todo)))
	return nil
}

// enter counts the caller among those who use what the tables say at this moment, until leave. It then waits for
// nobody who might wait for quiesce.
func (n *Node) enter(t *blk.Task) *blk.Range { return n.users.Lock(t, n.lastUser.Add(1), 1) }

func (n *Node) leave(r *blk.Range) { n.users.Unlock(r) }

// quiesce waits until everyone has left who entered before, and until I/O on extents has ended that began before.
func (n *Node) quiesce(t *blk.Task) error {
	n.users.Unlock(n.users.Lock(t, 0, n.lastUser.Load()+1))
	if n.barrier == nil {
		return nil
	}
	return n.barrier(t)
}

// writeHeader changes the header, durably. The first sector, which holds all numbers, goes last and at once. While
// extensions behind it change it does without them: half of them would not be an image.
func (n *Node) writeHeader(t *blk.Task, change func(*Header)) error {
	defer n.headerLock.Lock(t)()
	n.mu.Lock()
	h := n.header
	n.mu.Unlock()
	change(&h)
	if _, _, _, err := h.encode(); err != nil {
		return err
	}
	if err := n.storeHeader(t, &h); err != nil {
		n.suspect(suspect{what: "header", again: func(t *blk.Task) error {
			defer n.headerLock.Lock(t)()
			h := n.Header()
			err := n.storeHeader(t, h)
			n.headerBad.Store(err != nil)
			return err
		}})
		n.headerBad.Store(true)
		return fmt.Errorf("write header: %w", err)
	}
	n.mu.Lock()
	n.header = h
	n.mu.Unlock()
	return nil
}

func (n *Node) storeHeader(t *blk.Task, h *Header) error {
	head, name, at, err := h.encode()
	if err != nil {
		return err
	}
	buf := blk.GetBuffer(int(roundUp(max(int64(len(head)), at+int64(len(name))), n.block)))
	defer buf.Free()
	if err := readClipped(t, n.storage, blk.BytesVec(nil, buf.B), 0); err != nil {
		return err
	}
	put := func(b []byte, off int64) error {
		copy(buf.B[off:], b)
		if err := n.writeMeta(t, buf.B, 0); err != nil {
			return err
		}
		return n.syncStorage(t)
	}
	if at >= blk.SectorSize && string(buf.B[at:at+int64(len(name))]) != string(name) {
		if err := put(name, at); err != nil {
			return err
		}
	}
	const sector = blk.SectorSize
	if len(head) > sector && !bytes.Equal(buf.B[sector:len(head)], head[sector:]) {
		if err := put(firstSector(head), 0); err != nil {
			return err
		}
		if err := put(head[sector:], sector); err != nil {
			return err
		}
	}
	copy(buf.B[at:], name)
	if err := put(head, 0); err != nil {
		return err
	}
	h.backingOff, h.storedName, h.storedEnd = at, h.BackingFile, int64(len(head))
	if len(name) == 0 {
		h.backingOff = 0
	}
	return nil
}
