// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"io"
	"sync/atomic"
	"syscall"
)

// HostFile is an open file or block device of the host. Its fields do not change while it is in use.
type HostFile struct {
	Fd       int
	Path     string
	Direct   bool // opened for direct I/O: buffers and offsets must be aligned
	MemAlign int  // alignment of buffers and their lengths, bytes; 1 when buffered
	OffAlign int  // alignment of offsets and lengths, bytes; 1 when buffered
	Inline   bool // the storage never waits (tmpfs): small I/O is done on the caller's thread
	NoSync   bool // syncs are ignored (cache=unsafe)

	// A sync of the page cache failed. The kernel then drops the data and calls the next sync good: every later
	// sync must fail, or a flush would be acknowledged for data that is gone.
	lost atomic.Bool
}

// Fits reports whether the pieces may be handed to the file as they are.
func (f *HostFile) Fits(off int64, v Vec) bool {
	align := max(f.MemAlign, f.OffAlign)
	return align <= 1 || off&int64(f.OffAlign-1) == 0 && v.Aligned(align)
}

// IOKind is a host operation.
type IOKind uint8

// The host operations.
const (
	IORead IOKind = iota
	IOWrite
	IOSync      // fdatasync
	IOFallocate // with Mode
)

// IO is one host operation. Short transfers are continued by whoever runs it: it ends whole or with an error. A
// read past the file's end gives zeros.
type IO struct {
	Kind IOKind
	FUA  bool   // IOWrite: RWF_DSYNC
	Mode uint32 // IOFallocate: FALLOC_FL_…
	File *HostFile
	Off  int64
	Len  int64
	Vec  Vec // IORead, IOWrite: Len bytes, alive and unchanged until the end
	By   Completer
	Err  error // valid when By is told

	Tag  uint32 // the engine's
	done int64
	rest Vec
}

// Completer is told, on the thread of the engine, that an IO has ended.
type Completer interface{ IODone(*IO) }

// iovMax is the kernel's limit of pieces a call (UIO_MAXIOV). What is left over is a short transfer.
const iovMax = 1024

// Next is what to submit now: the pieces and the offset that are left.
func (o *IO) Next() (Vec, int64) {
	v := o.Vec
	if o.done > 0 {
		v = o.rest
	}
	return v[:min(len(v), iovMax)], o.Off + o.done
}

// Finish takes the result of a submission, a byte count or a negative errno, and reports whether the operation has
// ended. If not, it is to be submitted again.
func (o *IO) Finish(res int) bool {
	switch {
	case res < 0:
		switch e := syscall.Errno(-res); e {
		case syscall.EINTR, syscall.EAGAIN:
			return false
		default:
			o.Err = e
			// A synced write reports EIO for earlier writes too, and so takes it from the next sync.
			if !o.File.Direct && (o.Kind == IOSync || o.FUA && e == syscall.EIO) {
				o.File.lost.Store(true)
			}
			return true
		}
	case o.Kind == IOSync:
		if o.File.lost.Load() {
			o.Err = syscall.EIO
		}
		return true
	case o.Kind == IOFallocate:
		return true
	case res == 0 && o.Kind == IORead:
		o.zeroRest()
		return true
	case res == 0:
		o.Err = io.ErrShortWrite
		return true
	}
	o.done += int64(res)
	if o.done >= o.Len {
		return true
	}
	if o.Kind == IORead && o.File.Direct && o.done&int64(o.File.OffAlign-1) != 0 {
		o.zeroRest() // direct I/O ends within a block at the file's end only, and could not go on from there
		return true
	}
	o.rest = o.Vec.AppendSlice(o.rest[:0], o.done, o.Len-o.done)
	return false
}

// zeroRest fills what lies past the file's end. Guest memory may have been truncated under us; a goroutine that
// runs guest I/O has debug.SetPanicOnFault set.
func (o *IO) zeroRest() {
	defer func() {
		if recover() != nil {
			o.Err = syscall.EFAULT
		}
	}()
	o.Vec.AppendSlice(nil, o.done, o.Len-o.done).Zero()
}

// Reset prepares the structure for another operation.
func (o *IO) Reset(kind IOKind, f *HostFile, off, n int64, v Vec, by Completer) {
	o.Kind, o.FUA, o.Mode = kind, false, 0
	o.File, o.Off, o.Len, o.Vec, o.By = f, off, n, v, by
	o.Err, o.done = nil, 0
}
