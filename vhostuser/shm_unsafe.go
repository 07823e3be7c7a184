// SPDX-License-Identifier: Apache-2.0

package vhostuser

import "unsafe"

// word64 points to the 64-bit word at byte off of b, nil if that is not wholly inside b or not aligned.
func word64(b []byte, off int) *uint64 {
	if off < 0 || len(b) < 8 || off > len(b)-8 {
		return nil
	}
	p := unsafe.Pointer(&b[off])
	if uintptr(p)%8 != 0 {
		return nil
	}
	// SAFETY: the 8 bytes from off lie inside b, as checked above, and p is aligned. b is mapped memory that
	// holds no Go pointers, so any contents are a valid uint64.
	return (*uint64)(p)
}

// word32 points to the 32-bit word at byte off of b, nil if that is not wholly inside b or not aligned.
func word32(b []byte, off int) *uint32 {
	if off < 0 || len(b) < 4 || off > len(b)-4 {
		return nil
	}
	p := unsafe.Pointer(&b[off])
	if uintptr(p)%4 != 0 {
		return nil
	}
	// SAFETY: as in word64.
	return (*uint32)(p)
}
