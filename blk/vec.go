// SPDX-License-Identifier: Apache-2.0

package blk

import "syscall"

// Vec is a list of memory pieces: guest memory or our own buffers. The pieces are not copied and not owned.
type Vec []syscall.Iovec

// Len is the number of bytes.
func (v Vec) Len() int64 {
	var n int64
	for i := range v {
		n += int64(v[i].Len)
	}
	return n
}

// AppendSlice appends to dst the pieces that make up the n bytes of v from off on. The range must lie in v.
func (v Vec) AppendSlice(dst Vec, off, n int64) Vec {
	for i := range v {
		if n == 0 {
			break
		}
		l := int64(v[i].Len)
		if off >= l {
			off -= l
			continue
		}
		take := min(l-off, n)
		dst = append(dst, subIovec(v[i], off, take))
		off, n = 0, n-take
	}
	return dst
}

// CopyTo copies the bytes of v into dst until either ends, and returns their number.
func (v Vec) CopyTo(dst []byte) int {
	n := 0
	for i := range v {
		n += copy(dst[n:], iovecBytes(v[i]))
	}
	return n
}

// CopyFrom copies src into the pieces of v until either ends, and returns the number of bytes.
func (v Vec) CopyFrom(src []byte) int {
	n := 0
	for i := range v {
		n += copy(iovecBytes(v[i]), src[n:])
	}
	return n
}

// Zero fills v with zeros.
func (v Vec) Zero() {
	for i := range v {
		clear(iovecBytes(v[i]))
	}
}
