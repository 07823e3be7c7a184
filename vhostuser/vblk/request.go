// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/virtq"
)

// Request types and status values (virtio 1.2, section 5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13

	statusOK     = 0
	statusIOErr  = 1
	statusUnsupp = 2

	headerBytes = 16
	rangeBytes  = 16
	rangeUnmap  = 1 // flag of a write-zeroes range
)

// status is the one place that turns an error into what the guest sees.
func status(err error) byte {
	switch {
	case err == nil:
		return statusOK
	case errors.Is(err, blk.ErrNotSupported), errors.Is(err, syscall.EOPNOTSUPP):
		return statusUnsupp
	default:
		return statusIOErr
	}
}

// Errors of parsing; their text is only for the log of a curious developer, the guest gets the status.
var (
	errMisaligned = errors.New("not a multiple of the block size")
	errTooMany    = fmt.Errorf("too many ranges: %w", blk.ErrNotSupported)
	errFlags      = fmt.Errorf("reserved flags: %w", blk.ErrNotSupported)
	errFeature    = fmt.Errorf("not negotiated: %w", blk.ErrNotSupported)
	errType       = fmt.Errorf("unknown type: %w", blk.ErrNotSupported)
	errHeader     = errors.New("short header")
	errFault      = errors.New("fault in guest memory")
)

// maxSegs is how many extents a request of the fast path may have.
const maxSegs = 4

// request is one guest request. It is reused; nothing is allocated for one that takes the fast path.
type request struct {
	q     *queue
	chain virtq.Chain

	req     blk.Request
	status  blk.Vec // one byte
	reply   blk.Vec // GET_ID: where it goes
	ranges  [maxRangeSegs]blk.Request
	nranges int
	written uint32

	ios     [maxSegs]blk.IO
	pending int
	epoch   int
	err     error
	log     *blk.Bitmap // of the extents
	tracked *blk.Bitmap // likewise
	start   time.Time

	data    blk.Vec          // storage for req.Data where it is not a part of the chain
	vecs    [maxSegs]blk.Vec // storage for the parts of a split request
	slow    func(*blk.Task)
	head    [headerBytes]byte
	scratch [rangeBytes * maxRangeSegs]byte
}

func newRequest(q *queue) *request {
	r := &request{q: q}
	r.slow = r.runSlow
	return r
}

// begin carries out what the chain asks.
func (r *request) begin() {
	defer func() {
		// Guest memory went away while it was read, before any I/O was started.
		if e := recover(); e != nil {
			r.q.breakRing(fmt.Errorf("fault in guest memory: %v", e))
			r.q.give(r, 0)
		}
	}()
	if r.q.meter.Timed.Load() {
		r.start = time.Now()
	} else if !r.start.IsZero() {
		r.start = time.Time{}
	}
	r.log, r.tracked, r.err, r.nranges, r.reply = nil, nil, nil, 0, r.reply[:0]
	in := blk.Vec(r.chain.In)
	n := in.Len()
	if n == 0 {
		r.q.count.errors.Add(1)
		r.q.give(r, 0) // there is no place for a status
		return
	}
	r.status = in.AppendSlice(r.status[:0], n-1, 1)
	r.written = uint32(n)
	if err := r.parse(in, n-1); err != nil {
		r.finish(err)
		return
	}
	r.run()
}

// parse reads the request into private memory and checks it. Header and data may lie in any descriptors; the
// status is the last writable byte.
func (r *request) parse(in blk.Vec, inBytes int64) error {
	out := blk.Vec(r.chain.Out)
	if out.CopyTo(r.head[:]) < headerBytes {
		return errHeader
	}
	typ := binary.LittleEndian.Uint32(r.head[0:])
	sector := binary.LittleEndian.Uint64(r.head[8:])
	r.req = blk.Request{}
	switch typ {
	case typeIn:
		r.req.Op = blk.OpRead
		r.req.Data = r.slice(in, 0, inBytes)
		return r.place(sector, inBytes)
	case typeOut:
		r.req.Op = blk.OpWrite
		n := out.Len() - headerBytes
		r.req.Data = r.slice(out, headerBytes, n)
		if r.q.dev.writeThrough() {
			r.req.Flags = blk.FUA
		}
		return r.place(sector, n)
	case typeFlush:
		r.req.Op = blk.OpFlush
		return nil
	case typeGetID:
		r.reply = in.AppendSlice(r.reply[:0], 0, min(inBytes, idBytes))
		return nil
	case typeDiscard:
		if !r.q.dev.negotiated(featDiscard) {
			return errFeature
		}
		return r.parseRanges(out, blk.OpDiscard)
	case typeWriteZeroes:
		if !r.q.dev.negotiated(featWriteZeroes) {
			return errFeature
		}
		return r.parseRanges(out, blk.OpWriteZeroes)
	default:
		return errType
	}
}

// slice is v[off:off+n], without copying where descriptors end at its bounds.
func (r *request) slice(v blk.Vec, off, n int64) blk.Vec {
	if off > 0 && len(v) > 0 && int64(v[0].Len) == off {
		v, off = v[1:], 0
	}
	if off == 0 && len(v) > 0 && v[len(v)-1].Len == 1 && v.Len() == n+1 {
		v = v[:len(v)-1]
	}
	if off == 0 && v.Len() == n {
		return v
	}
	r.data = v.AppendSlice(r.data[:0], off, n)
	return r.data
}

// place checks and sets the byte range of a read or write.
func (r *request) place(sector uint64, n int64) error {
	if sector > 1<<62/blk.SectorSize {
		return blk.ErrRange
	}
	r.req.Off, r.req.Len = int64(sector)*blk.SectorSize, n
	if (r.req.Off|n)&int64(r.q.dev.opts.BlockSize-1) != 0 {
		return errMisaligned
	}
	return nil
}

// parseRanges reads the ranges of a discard or write-zeroes request (section 5.2.6, struct
// virtio_blk_discard_write_zeroes).
func (r *request) parseRanges(out blk.Vec, op blk.Op) error {
	n := out.Len() - headerBytes
	if n == 0 || n%rangeBytes != 0 {
		return errHeader
	}
	if n > int64(len(r.scratch)) {
		return errTooMany
	}
	r.data = out.AppendSlice(r.data[:0], headerBytes, n)
	r.data.CopyTo(r.scratch[:])
	for b := r.scratch[:n]; len(b) > 0; b = b[rangeBytes:] {
		sector := binary.LittleEndian.Uint64(b[0:])
		sectors := binary.LittleEndian.Uint32(b[8:])
		flags := binary.LittleEndian.Uint32(b[12:])
		if flags&^rangeUnmap != 0 || flags != 0 && op == blk.OpDiscard {
			return errFlags
		}
		if err := r.place(sector, int64(sectors)*blk.SectorSize); err != nil {
			return err
		}
		if r.req.Len > maxRangeBytes {
			return blk.ErrRange
		}
		if r.req.Len == 0 {
			continue
		}
		q := &r.ranges[r.nranges]
		*q = blk.Request{Op: op, Off: r.req.Off, Len: r.req.Len}
		if flags&rangeUnmap != 0 && r.q.dev.opts.Discard {
			q.Flags |= blk.Unmap
		}
		if r.q.dev.writeThrough() {
			q.Flags |= blk.FUA
		}
		if err := blk.Check(r.q.dev.graph.Root().Info(), q); err != nil {
			return err
		}
		r.nranges++
	}
	r.req.Op = op
	return nil
}

// run starts the request on the fast path if it can, else on the slow one.
func (r *request) run() {
	root := r.q.dev.graph.Root()
	switch {
	case len(r.reply) > 0:
		var id [idBytes]byte
		copy(id[:], r.q.dev.opts.Serial)
		r.reply.CopyFrom(id[:])
		r.finish(nil)
		return
	case r.req.Op == blk.OpDiscard || r.req.Op == blk.OpWriteZeroes:
		r.q.loop.Spawn(r.slow)
		return
	case r.req.Op != blk.OpFlush && r.req.Len == 0:
		r.finish(nil)
		return
	}
	if err := blk.Check(root.Info(), &r.req); err != nil {
		r.finish(err)
		return
	}
	n, ok := r.mapAll(root)
	if !ok {
		r.q.loop.Spawn(r.slow)
		return
	}
	r.epoch = r.q.fast.begin()
	r.pending = n + 1 // one for this function: an I/O may end at once
	for i := range n {
		r.q.loop.Start(&r.ios[i])
	}
	r.release()
}

// mapAll turns the request into host I/O, straight between guest memory and host files. false: something is not
// mapped, or the storage cannot take the guest's buffers as they are.
func (r *request) mapAll(root blk.Node) (n int, ok bool) {
	if r.req.Op == blk.OpFlush {
		e, ok := root.TryMap(blk.OpFlush, 0, 0)
		if !ok || e.Host == nil {
			return 0, false
		}
		r.ios[0].Reset(blk.IOSync, e.Host, 0, 0, nil, r)
		return 1, true
	}
	kind := blk.IORead
	if r.req.Op == blk.OpWrite {
		kind = blk.IOWrite
	}
	for done := int64(0); done < r.req.Len; {
		e, ok := root.TryMap(r.req.Op, r.req.Off+done, r.req.Len-done)
		if !ok || n == maxSegs || e.State == blk.Encoded || e.Len <= 0 {
			return 0, false
		}
		l := min(e.Len, r.req.Len-done)
		part := r.req.Data
		if l != r.req.Len {
			r.vecs[n] = part.AppendSlice(r.vecs[n][:0], done, l)
			part = r.vecs[n]
		}
		done += l
		if e.State != blk.Data {
			if kind != blk.IORead {
				return 0, false
			}
			part.Zero()
			continue
		}
		if e.Host == nil || !e.Host.Fits(e.HostOff, part) || kind == blk.IOWrite && !e.Writable {
			return 0, false
		}
		if e.Unsynced && r.req.Flags&blk.FUA != 0 {
			return 0, false
		}
		if n > 0 && (e.Log != r.log || e.Tracked != r.tracked) {
			return 0, false
		}
		r.log, r.tracked = e.Log, e.Tracked
		io := &r.ios[n]
		io.Reset(kind, e.Host, e.HostOff, l, part, r)
		io.FUA = r.req.Flags&blk.FUA != 0
		n++
	}
	return n, true
}

// IODone implements blk.Completer.
func (r *request) IODone(o *blk.IO) {
	if o.Err != nil && r.err == nil {
		r.err = o.Err
	}
	r.release()
}

func (r *request) release() {
	if r.pending--; r.pending > 0 {
		return
	}
	if r.req.Op == blk.OpWrite {
		// Marked when the write has ended and before the guest knows: whoever cleared the bit and read the old
		// bytes meanwhile reads them again. A failed write may have changed some of them.
		if r.log != nil {
			r.log.Set(r.req.Off, r.req.Len)
		}
		if r.tracked != nil {
			r.tracked.Set(r.req.Off, r.req.Len)
		}
	}
	r.q.fast.end(r.epoch) // after the marks: whoever waits for a barrier then looks at them
	r.finish(r.err)
}

// runSlow is the body of the coroutine of a request that has to wait.
func (r *request) runSlow(t *blk.Task) {
	err := error(errFault)
	defer func() {
		if e := recover(); e != nil {
			r.q.dev.opts.Log.Error("a request failed", "disk", r.q.dev.opts.ID, "panic", e)
		}
		r.finish(err)
	}()
	root := r.q.dev.graph.Root()
	if r.nranges == 0 && r.req.Op != blk.OpDiscard && r.req.Op != blk.OpWriteZeroes {
		err = blk.Do(t, root, &r.req)
		return
	}
	var first error
	for i := range r.nranges {
		if e := blk.Do(t, root, &r.ranges[i]); e != nil && first == nil {
			first = e
		}
	}
	err = first
}

// finish writes the status and hands the chain back.
func (r *request) finish(err error) {
	r.account(err)
	r.reportStatus(status(err))
	r.q.give(r, r.written)
}

func (r *request) account(err error) {
	q := r.q
	c := &q.count
	switch {
	case err != nil:
		c.errors.Add(1)
	case r.req.Op == blk.OpRead && r.req.Len > 0:
		c.reads.Add(1)
		c.bytesRead.Add(uint64(r.req.Len))
	case r.req.Op == blk.OpWrite:
		c.writes.Add(1)
		c.bytesWritten.Add(uint64(r.req.Len))
	case r.req.Op == blk.OpFlush:
		c.flushes.Add(1)
	default:
		c.others.Add(1)
	}
	q.meter.Ops.Add(1)
	q.meter.Bytes.Add(uint64(r.req.Len))
	if !r.start.IsZero() {
		d := uint64(time.Since(r.start))
		q.meter.Nanos.Add(d)
		if d > q.meter.Slowest.Load() {
			q.meter.Slowest.Store(d)
		}
	}
}

func (r *request) reportStatus(st byte) {
	defer r.q.recoverFault()
	r.status.CopyFrom([]byte{st})
	if log := r.q.r.Log; log != nil {
		for i := range r.chain.In {
			log.Mark(r.chain.InGPA[i], r.chain.In[i].Len)
		}
	}
}
