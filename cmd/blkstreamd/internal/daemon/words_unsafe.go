// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"sync/atomic"
	"unsafe"
)

// wordsOf is mapped memory as words, without what is left over.
func wordsOf(mem []byte) []atomic.Uint64 {
	// SAFETY: a mapping begins at a page, so it is aligned, and holds no pointers, so any contents are valid.
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/8)
}
