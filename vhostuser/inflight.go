// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/blkstream/blkstream/virtq"
)

// The in-flight region is shared memory that the front-end keeps while a back-end dies and another takes over
// (vhost-user specification, "Inflight I/O tracking"). Each queue has its part, all of one size. A part is, for
// split rings:
//
//	 0  features u64         8  version u16    10  desc_num u16
//	12  last_batch_head u16                    14  used_idx u16
//	16  entries of 16 bytes, one a head:  0 inflight u8   6 next u16   8 counter u64
//
// Every field lies in an aligned 32- or 64-bit word, which is stored whole.
const (
	inflightHeader  = 16
	inflightEntry   = 16
	inflightVersion = 1
	inflightAlign   = 64 // parts do not share a cache line

	// inflightEntries is how many entries a queue gets at least: QEMU asks for its queue-size while the rings that
	// it configures have up to 1024.
	inflightEntries = 1024

	offVersion = 8
	offBatch   = 12
	entryBusy  = 0xff // the mask of entry.inflight
	entryNext  = 48   // the shift of entry.next
)

// inflightStride is the size of a queue's part when the front-end announces rings of size entries.
func inflightStride(size uint16) int {
	n := inflightHeader + min(max(inflightEntries, int(size)), maxRingSize)*inflightEntry
	return (n + inflightAlign - 1) / inflightAlign * inflightAlign
}

// inflightRegion is the mapped region, divided among the queues.
type inflightRegion struct {
	mem    *shm
	queues int
	stride int
}

// newInflightRegion maps size bytes at off of fd, which it does not keep. The size of a queue's part follows from size and
// queues: what the front-end sends as queue size is its own, not what the region was made for.
func newInflightRegion(fd int, off, size uint64, queues int) (*inflightRegion, error) {
	if queues == 0 {
		return nil, errors.New("in-flight region: no queues")
	}
	stride := size / uint64(queues) / inflightAlign * inflightAlign
	if stride < inflightHeader+inflightEntry {
		return nil, fmt.Errorf("in-flight region: %#x bytes are too small for %d queues", size, queues)
	}
	mem, err := mapShm(fd, off, size)
	if err != nil {
		return nil, fmt.Errorf("in-flight region: %w", err)
	}
	return &inflightRegion{mem: mem, queues: queues, stride: int(stride)}, nil
}

// part returns queue i's part, nil if it has none.
func (r *inflightRegion) part(i int) []byte {
	if i >= r.queues {
		return nil
	}
	return r.mem.data[i*r.stride:][:r.stride]
}

// InflightQueue tracks the requests in flight of one queue. All of its methods belong to the goroutine that
// serves the queue, allocate nothing, and ignore heads that the region has no entry for.
//
// A crash at any point leaves a region from which recoverInflight finds exactly the requests that were fetched
// and not published.
type InflightQueue struct {
	mem     []byte
	entries int
	counter uint64   // of the next Fetch
	head    uint16   // last_batch_head
	usedIdx uint16   // the header's used_idx
	batch   []uint16 // completed since the last Commit
}

// Fetch marks head as in flight, before its request is handled.
func (q *InflightQueue) Fetch(head uint16) {
	if int(head) >= q.entries {
		return
	}
	off := inflightHeader + int(head)*inflightEntry
	atomic.StoreUint64(word64(q.mem, off+8), q.counter)
	q.counter++
	// After the counter: a crash in between leaves the entry unmarked, and the head still in the avail ring.
	atomic.StoreUint64(word64(q.mem, off), 1)
}

// Complete puts head into the batch, before its used element is published. Until then a crash has it done again.
func (q *InflightQueue) Complete(head uint16) {
	if int(head) >= q.entries || len(q.batch) == cap(q.batch) {
		return
	}
	atomic.StoreUint64(word64(q.mem, inflightHeader+int(head)*inflightEntry), 1|uint64(q.head)<<entryNext)
	q.head = head
	q.batch = append(q.batch, head)
	q.storeBatch()
}

// Commit ends the batch: used.idx was published as usedIdx, so its requests are no longer in flight.
func (q *InflightQueue) Commit(usedIdx uint16) {
	for _, head := range q.batch {
		// next stays: a crash in this loop has recovery walk the batch once more.
		atomic.AndUint64(word64(q.mem, inflightHeader+int(head)*inflightEntry), ^uint64(entryBusy))
	}
	q.batch = q.batch[:0]
	q.usedIdx = usedIdx
	q.storeBatch()
}

func (q *InflightQueue) storeBatch() {
	atomic.StoreUint32(word32(q.mem, offBatch), uint32(q.head)|uint32(q.usedIdx)<<16)
}

// recoverInflight opens a queue's part for a ring of size entries whose published used index is usedIdx. live says
// that an earlier back-end left the part: resubmit are then the heads that it fetched and did not publish, oldest
// first. Whatever stands in the part, resubmit has each head below size at most once.
func recoverInflight(part []byte, size, usedIdx uint16) (q *InflightQueue, live bool, resubmit []uint16, err error) {
	entries := min((len(part)-inflightHeader)/inflightEntry, maxRingSize)
	if entries < int(size) {
		return nil, false, nil, fmt.Errorf("in-flight region: %d entries a queue for a ring of %d", entries, size)
	}
	q = &InflightQueue{mem: part, entries: entries, usedIdx: usedIdx, batch: make([]uint16, 0, entries)}
	version := word32(part, offVersion)
	switch v := uint16(atomic.LoadUint32(version)); v {
	case 0:
		// Ours to initialise. The version goes last, so that a crash before leaves the part uninitialised; the ring
		// may have been in use before, so used_idx is not 0.
		clear(part[inflightHeader:])
		atomic.StoreUint64(word64(part, 0), 0)
		q.storeBatch()
		atomic.StoreUint32(version, inflightVersion|uint32(entries)<<16)
		return q, false, nil, nil
	case inflightVersion:
	default:
		return nil, false, nil, fmt.Errorf("in-flight region: unknown version %d", v)
	}
	if f := atomic.LoadUint64(word64(part, 0)); f != 0 {
		return nil, false, nil, fmt.Errorf("in-flight region: unknown features %#x", f)
	}

	// The last batch was published, but perhaps not all of it was cleared.
	batch := atomic.LoadUint32(word32(part, offBatch))
	q.head = uint16(batch)
	published := min(usedIdx-uint16(batch>>16), size)
	for head := q.head; published > 0 && int(head) < entries; published-- {
		old := atomic.AndUint64(word64(part, inflightHeader+int(head)*inflightEntry), ^uint64(entryBusy))
		head = uint16(old >> entryNext)
	}
	q.storeBatch()

	counters := make([]uint64, size)
	for head := range size {
		off := inflightHeader + int(head)*inflightEntry
		if atomic.LoadUint64(word64(part, off))&entryBusy == 0 {
			continue
		}
		counters[head] = atomic.LoadUint64(word64(part, off+8))
		q.counter = max(q.counter, counters[head]+1)
		resubmit = append(resubmit, head)
	}
	if n := len(resubmit); n > virtq.MaxInFlight {
		return nil, false, nil, fmt.Errorf("in-flight region: %d requests in flight, more than ever are", n)
	}
	slices.SortStableFunc(resubmit, func(a, b uint16) int { return cmp.Compare(counters[a], counters[b]) })
	return q, true, resubmit, nil
}
