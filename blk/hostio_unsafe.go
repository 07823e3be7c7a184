// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Run carries out the operation with system calls on the caller's thread, to its end.
func (o *IO) Run() {
	for !o.Finish(o.call()) {
	}
}

func (o *IO) call() int {
	switch o.Kind {
	case IORead:
		return o.rw(unix.SYS_PREADV2, 0)
	case IOWrite:
		flags := 0
		if o.FUA && !o.File.NoSync {
			flags = unix.RWF_DSYNC
		}
		return o.rw(unix.SYS_PWRITEV2, flags)
	case IOSync:
		if o.File.NoSync {
			return 0
		}
		return result(0, unix.Fdatasync(o.File.Fd))
	case IOFallocate:
		return result(0, unix.Fallocate(o.File.Fd, o.Mode, o.Off, o.Len))
	default:
		return -int(unix.EINVAL)
	}
}

// rw uses the raw call: the pieces may lie in guest memory, of which Go knows nothing.
func (o *IO) rw(trap uintptr, flags int) int {
	v, off := o.Next()
	// SAFETY: v is reachable through o during the call, and its pieces' owner keeps them mapped until o ends; a
	// piece that is gone all the same gives EFAULT.
	n, _, e := syscall.Syscall6(trap, uintptr(o.File.Fd), uintptr(unsafe.Pointer(unsafe.SliceData(v))),
		uintptr(len(v)), uintptr(off), 0, uintptr(flags))
	if e != 0 {
		return -int(e)
	}
	return int(n)
}

func result(n int, err error) int {
	if err == nil {
		return n
	}
	if e, ok := err.(syscall.Errno); ok { //nolint:errorlint // unix returns the bare errno
		return -int(e)
	}
	return -int(unix.EIO)
}
