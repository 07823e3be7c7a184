// SPDX-License-Identifier: Apache-2.0

// Package uring is a small binding to io_uring(7): what a loop needs that owns one ring on one thread. A Ring is
// not safe for concurrent use.
package uring

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Setup flags, features and offsets of the kernel's interface (include/uapi/linux/io_uring.h).
const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupSubmitAll    = 1 << 7
	setupTaskrunFlag  = 1 << 9
	setupSingleIssuer = 1 << 12
	setupDeferTaskrun = 1 << 13
	setupNoSQArray    = 1 << 16

	featSingleMmap = 1 << 0
	featNoDrop     = 1 << 1
	featCQESkip    = 1 << 11

	enterGetEvents      = 1 << 0
	enterRegisteredRing = 1 << 4

	registerFiles       = 2
	registerFilesUpdate = 6
	registerRingFDs     = 20
	unregisterRingFDs   = 21

	sqOverflow = 1 << 1
	sqTaskrun  = 1 << 2

	offSQRing = 0
	offSQEs   = 0x10000000

	pollAddMulti = 1 << 0

	// CQEMore says that the same submission will post further completions.
	CQEMore = 1 << 1
)

// Operation codes.
const (
	opReadv     = 1
	opWritev    = 2
	opFsync     = 3
	opPollAdd   = 6
	opFallocate = 17
	opRead      = 22
	opWrite     = 23

	fsyncDatasync = 1

	sqeFixedFile   = 1 << 0
	sqeAsync       = 1 << 4
	sqeSkipSuccess = 1 << 6
)

type sqringOffsets struct {
	head, tail, ringMask, ringEntries, flags, dropped, array, resv1 uint32
	userAddr                                                        uint64
}

type cqringOffsets struct {
	head, tail, ringMask, ringEntries, overflow, cqes, flags, resv1 uint32
	userAddr                                                        uint64
}

type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	resv                                                                   [3]uint32
	sqOff                                                                  sqringOffsets
	cqOff                                                                  cqringOffsets
}

type sqe struct {
	opcode, flags uint8
	ioprio        uint16
	fd            int32
	off           uint64
	addr          uint64
	len           uint32
	opFlags       uint32
	userData      uint64
	bufIndex      uint16
	personality   uint16
	spliceFd      int32
	addr3, pad    uint64
}

// rsrcUpdate is struct io_uring_rsrc_update.
type rsrcUpdate struct {
	offset, resv uint32
	data         uint64
}

// CQE is one completion.
type CQE struct {
	UserData uint64
	Res      int32
	Flags    uint32
}

// Ring is one io_uring instance.
type Ring struct {
	fd      int
	enterFd int     // what io_uring_enter is called with: fd, or its place in the thread's table
	enter   uintptr // flags that say which
	hasCall bool    // slot 0 of the ring's files is there
	slot    int32   // what SetCall puts there
	ringMem []byte
	sqeMem  []byte

	sqHead, sqTail, sqFlags *atomic.Uint32
	sqMask                  uint32
	sqes                    []sqe
	sqLocal                 uint32 // tail with what was prepared and not submitted
	sqSubmitted             uint32

	cqHead, cqTail *atomic.Uint32
	cqMask         uint32
	cqes           []CQE
}

// New makes a ring that is used by the calling OS thread only. An error means that this kernel, or its policy, does
// not allow what is needed.
func New(entries uint32) (*Ring, error) {
	base := uint32(setupCQSize | setupClamp | setupSubmitAll)
	var err error
	for _, extra := range []uint32{
		setupSingleIssuer | setupDeferTaskrun | setupTaskrunFlag | setupNoSQArray,
		setupSingleIssuer | setupDeferTaskrun | setupTaskrunFlag,
		0,
	} {
		p := params{flags: base | extra, cqEntries: 4 * entries}
		// SAFETY: p lives over the call and has the layout of struct io_uring_params.
		fd, _, e := syscall.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&p)), 0)
		if e != 0 {
			err = fmt.Errorf("io_uring_setup: %w", e)
			if e == unix.EINVAL {
				continue
			}
			return nil, err
		}
		if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
			unix.Close(int(fd))
			return nil, errors.New("io_uring: the kernel is too old")
		}
		return mapRing(int(fd), &p)
	}
	return nil, err
}

func mapRing(fd int, p *params) (*Ring, error) {
	r := &Ring{fd: fd, enterFd: fd}
	size := max(p.sqOff.array+4*p.sqEntries, p.cqOff.cqes+p.cqEntries*uint32(unsafe.Sizeof(CQE{})))
	var err error
	if r.ringMem, err = unix.Mmap(fd, offSQRing, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("io_uring: map the rings: %w", err)
	}
	if r.sqeMem, err = unix.Mmap(fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE); err != nil {
		unix.Munmap(r.ringMem) //nolint:errcheck // on the way out
		unix.Close(fd)
		return nil, fmt.Errorf("io_uring: map the entries: %w", err)
	}
	// SAFETY: the kernel gave these offsets for the mapping that they are added to, which is page-aligned.
	at := func(off uint32) *atomic.Uint32 { return (*atomic.Uint32)(unsafe.Pointer(&r.ringMem[off])) }
	r.sqHead, r.sqTail, r.sqFlags = at(p.sqOff.head), at(p.sqOff.tail), at(p.sqOff.flags)
	r.cqHead, r.cqTail = at(p.cqOff.head), at(p.cqOff.tail)
	r.sqMask, r.cqMask = at(p.sqOff.ringMask).Load(), at(p.cqOff.ringMask).Load()
	// SAFETY: as above; the kernel's entries hold no Go pointers.
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&r.sqeMem[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*CQE)(unsafe.Pointer(&r.ringMem[p.cqOff.cqes])), p.cqEntries)
	if p.flags&setupNoSQArray == 0 {
		array := unsafe.Slice((*uint32)(unsafe.Pointer(&r.ringMem[p.sqOff.array])), p.sqEntries)
		for i := range array {
			array[i] = uint32(i)
		}
	}
	r.sqLocal = r.sqTail.Load()
	r.sqSubmitted = r.sqLocal
	r.register(p)
	return r, nil
}

// register spares each call the look-up of the ring's file, and makes a slot for SetCall. Older kernels know neither.
func (r *Ring) register(p *params) {
	self := rsrcUpdate{offset: ^uint32(0), data: uint64(r.fd)}
	// SAFETY: self lives over the call and has the layout of struct io_uring_rsrc_update.
	n, _, e := syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerRingFDs, uintptr(unsafe.Pointer(&self)), 1, 0, 0)
	if e == 0 && n == 1 {
		r.enterFd, r.enter = int(self.offset), enterRegisteredRing
	}
	none := int32(-1)
	// SAFETY: none lives over the call, an array of one descriptor.
	_, _, e = syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerFiles, uintptr(unsafe.Pointer(&none)), 1, 0, 0)
	r.hasCall = e == 0 && p.features&featCQESkip != 0
}

// Close ends the ring, on the thread that made it. Nothing may be in flight.
func (r *Ring) Close() error {
	if r.enter != 0 { // the thread's table would keep the ring
		self := rsrcUpdate{offset: uint32(r.enterFd)}
		// SAFETY: as in register.
		syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), unregisterRingFDs, uintptr(unsafe.Pointer(&self)), 1, 0, 0) //nolint:errcheck,dogsled // it is there
	}
	return errors.Join(unix.Munmap(r.sqeMem), unix.Munmap(r.ringMem), unix.Close(r.fd))
}

// next returns a cleared entry, or nil if the queue is full: submit first.
func (r *Ring) next() *sqe {
	if r.sqLocal-r.sqHead.Load() >= uint32(len(r.sqes)) {
		return nil
	}
	e := &r.sqes[r.sqLocal&r.sqMask]
	*e = sqe{}
	r.sqLocal++
	return e
}

// Space is the number of entries that can be prepared before the next Submit.
func (r *Ring) Space() int { return len(r.sqes) - int(r.sqLocal-r.sqHead.Load()) }

// Queued is the number of entries that are prepared and not submitted.
func (r *Ring) Queued() int { return int(r.sqLocal - r.sqSubmitted) }

// RW prepares a vectored read or write. The vec and its memory must stay reachable, in place and unchanged until
// the completion. rwFlags are RWF_ flags; async: hand it to a kernel worker at once. There must be Space.
func (r *Ring) RW(write bool, fd int, v []syscall.Iovec, off int64, rwFlags uint32, async bool, userData uint64) {
	e := r.next()
	e.opcode = opReadv
	if write {
		e.opcode = opWritev
	}
	if async {
		e.flags = sqeAsync
	}
	e.fd, e.off, e.len = int32(fd), uint64(off), uint32(len(v))
	// SAFETY: the caller keeps v reachable until the completion; Go's heap does not move.
	e.addr = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(v))))
	e.opFlags, e.userData = rwFlags, userData
	if len(v) == 1 { // the kernel need not copy the vector
		e.opcode += opRead - opReadv
		// SAFETY: as above, of what v points to.
		e.addr, e.len = uint64(uintptr(unsafe.Pointer(v[0].Base))), uint32(v[0].Len)
	}
}

// SetCall names the eventfd that Call signals. The ring holds its file until another is named; -1: none. It reports
// whether Call can be used.
func (r *Ring) SetCall(fd int) bool {
	if !r.hasCall {
		return false
	}
	r.slot = int32(fd)
	// SAFETY: r is on the heap, which does not move: a local variable would with the goroutine's stack, and the kernel would
	// then take any file for the eventfd.
	u := rsrcUpdate{data: uint64(uintptr(unsafe.Pointer(&r.slot)))}
	// SAFETY: u lives over the call; struct io_uring_files_update has the layout of rsrcUpdate.
	_, _, e := syscall.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerFilesUpdate, uintptr(unsafe.Pointer(&u)), 1, 0, 0)
	runtime.KeepAlive(r)
	return e == 0 && fd >= 0
}

// Call prepares a signal of the eventfd that SetCall named. It goes out in the submission, without a system call of its
// own, and posts a completion only if it failed: if it would block, or always where the eventfd is a blocking one. There
// must be Space.
func (r *Ring) Call(userData uint64) {
	e := r.next()
	e.opcode, e.flags, e.userData = opWrite, sqeFixedFile|sqeSkipSuccess, userData
	// SAFETY: a global variable.
	e.addr, e.len, e.opFlags = uint64(uintptr(unsafe.Pointer(&eventOne))), uint32(len(eventOne)), unix.RWF_NOWAIT
}

var eventOne = [8]byte{1} // the value does not matter, only that it is not 0

// Datasync prepares fdatasync(2). There must be Space.
func (r *Ring) Datasync(fd int, userData uint64) {
	e := r.next()
	e.opcode, e.fd, e.opFlags, e.userData = opFsync, int32(fd), fsyncDatasync, userData
}

// Fallocate prepares fallocate(2). There must be Space.
func (r *Ring) Fallocate(fd int, mode uint32, off, n int64, userData uint64) {
	e := r.next()
	e.opcode, e.fd, e.off, e.addr, e.len, e.userData = opFallocate, int32(fd), uint64(off), uint64(n), mode, userData
}

// PollMultishot prepares a poll for input that posts a completion for each event until one comes without CQEMore.
// There must be Space.
func (r *Ring) PollMultishot(fd int, userData uint64) {
	e := r.next()
	e.opcode, e.fd, e.len, e.userData = opPollAdd, int32(fd), pollAddMulti, userData
	e.opFlags = unix.POLLIN
}

// Submit hands over what was prepared and, with wait, sleeps until there is a completion.
func (r *Ring) Submit(wait bool) error {
	for {
		n := r.sqLocal - r.sqSubmitted
		r.sqTail.Store(r.sqLocal)
		var minComplete, flags uintptr
		if wait {
			minComplete, flags = 1, enterGetEvents
		} else if r.sqFlags.Load()&(sqTaskrun|sqOverflow) != 0 {
			flags = enterGetEvents
		} else if n == 0 {
			return nil
		}
		// Syscall6 and not RawSyscall6: a raw call that blocks would hold up every stop-the-world.
		done, _, e := syscall.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.enterFd), uintptr(n), minComplete, flags|r.enter, 0, 0)
		if e == 0 {
			r.sqSubmitted += uint32(done)
		}
		switch {
		case e == unix.EINTR:
			if wait {
				return nil // the caller looks round and sleeps again
			}
		case e == unix.EBUSY || e == unix.EAGAIN:
			return nil // completions must be reaped first; the rest goes with the next call
		case e != 0:
			return fmt.Errorf("io_uring_enter: %w", e)
		case r.sqLocal == r.sqSubmitted || wait:
			return nil
		}
	}
}

// Ready reports whether there is a completion to reap or kernel work that would post one.
func (r *Ring) Ready() bool {
	return r.cqTail.Load() != r.cqHead.Load() || r.sqFlags.Load()&(sqTaskrun|sqOverflow) != 0
}

// Reap takes the next completion.
func (r *Ring) Reap() (CQE, bool) {
	h := r.cqHead.Load()
	if h == r.cqTail.Load() {
		return CQE{}, false
	}
	c := r.cqes[h&r.cqMask]
	r.cqHead.Store(h + 1)
	return c, true
}
