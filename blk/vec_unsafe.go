// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"syscall"
	"unsafe"
)

// BytesVec appends b as one piece to dst. b must stay reachable and must not be on a stack that moves: the
// piece's pointer keeps heap memory alive.
func BytesVec(dst Vec, b []byte) Vec {
	if len(b) == 0 {
		return dst
	}
	return append(dst, syscall.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))})
}

func iovecBytes(v syscall.Iovec) []byte {
	// SAFETY: whoever made the piece vouches for Len bytes at Base.
	return unsafe.Slice(v.Base, v.Len)
}

func subIovec(v syscall.Iovec, off, n int64) syscall.Iovec {
	// SAFETY: the caller keeps off+n <= v.Len, so the result lies in the same memory.
	return syscall.Iovec{Base: (*byte)(unsafe.Add(unsafe.Pointer(v.Base), off)), Len: uint64(n)}
}

// Aligned reports whether each piece begins and ends at a multiple of align bytes (a power of two).
func (v Vec) Aligned(align int) bool {
	var bits uintptr
	for i := range v {
		// SAFETY: the address is only looked at.
		bits |= uintptr(unsafe.Pointer(v[i].Base)) | uintptr(v[i].Len)
	}
	return bits&uintptr(align-1) == 0
}

// isAligned reports whether b begins at a multiple of align bytes.
func isAligned(b []byte, align int) bool {
	// SAFETY: the address is only looked at.
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&uintptr(align-1) == 0
}
