// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"bytes"
	"math/bits"
	"sync"
)

// BufferAlign is the alignment of every buffer from GetBuffer, in bytes: enough for direct I/O anywhere.
const BufferAlign = 4096

// Buffer is aligned memory from a pool.
type Buffer struct {
	B     []byte
	class int
	full  []byte
}

// Buffers come in powers of two from 4 KiB to 8 MiB; larger ones are not pooled.
const (
	minBufferBits = 12
	maxBufferBits = 23
)

var bufferPools [maxBufferBits - minBufferBits + 1]sync.Pool

// GetBuffer returns n > 0 bytes of aligned memory with any contents. Free returns it.
func GetBuffer(n int) *Buffer {
	class := max(bits.Len(uint(n-1)), minBufferBits) - minBufferBits
	if class >= len(bufferPools) {
		return &Buffer{B: alignedBytes(n), class: -1}
	}
	b, _ := bufferPools[class].Get().(*Buffer)
	if b == nil {
		b = &Buffer{class: class, full: alignedBytes(1 << (class + minBufferBits))}
	}
	b.B = b.full[:n]
	return b
}

// Free gives the buffer back. It must not be used, by the kernel either, afterwards.
func (b *Buffer) Free() {
	b.B = nil
	if b.class >= 0 {
		bufferPools[b.class].Put(b)
	}
}

func alignedBytes(n int) []byte {
	b := make([]byte, n+BufferAlign)
	for i := 0; ; i += 8 {
		if isAligned(b[i:], BufferAlign) {
			return b[i : i+n : i+n]
		}
	}
}

var zeros [64 << 10]byte

// IsZero reports whether there is nothing but zeros in b.
func IsZero(b []byte) bool {
	for len(b) > 0 {
		k := min(len(b), len(zeros))
		if !bytes.Equal(b[:k], zeros[:k]) {
			return false
		}
		b = b[k:]
	}
	return true
}
