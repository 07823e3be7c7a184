// SPDX-License-Identifier: Apache-2.0

package virtq

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"
)

// The other side changes ring memory at any moment, so each field is loaded once, atomically. Go has no 16-bit atomics:
// a 16-bit field is reached through the aligned 32-bit word that holds it. Go's atomics are sequentially consistent,
// which gives the full barrier between "store mine" and "load theirs" that the notification rules need
// (virtio 1.3, 2.7.7 and 2.7.10).

// word returns the aligned word that holds the 16-bit field at b[off], and the field's place in it.
func word(b []byte, off int) (w *uint32, shift uint) {
	p := unsafe.Pointer(&b[off])
	odd := uintptr(p) & 2
	// SAFETY: fields are 2-aligned (rings are checked when they are resolved), so stepping back by 0 or 2 bytes gives
	// the aligned word. It may reach 2 bytes beyond b on either side, but never beyond the page, and regions are mapped
	// in whole pages.
	return (*uint32)(unsafe.Add(p, -int(odd))), uint(odd) * 8
}

func load16(b []byte, off int) uint16 {
	w, shift := word(b, off)
	return uint16(atomic.LoadUint32(w) >> shift)
}

// store16 leaves the word's other half alone, whoever writes it. Between its two steps the field reads 0: that suits
// only fields which the other side may misread for a moment. Unlike a compare-and-swap loop, it cannot be kept from
// finishing by a guest that keeps changing the other half.
func store16(b []byte, off int, v uint16) {
	w, shift := word(b, off)
	atomic.AndUint32(w, ^(0xffff << shift))
	atomic.OrUint32(w, uint32(v)<<shift)
}

func load32(b []byte, off int) uint32 {
	// SAFETY: off is 4-aligned within a 4-aligned ring, and the ring's size leaves 4 bytes there.
	return atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[off])))
}

func store32(b []byte, off int, v uint32) {
	// SAFETY: as in load32.
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[off])), v)
}

// loadDesc reads descriptor i of a table once. i must be below len(table)/descSize.
func loadDesc(table []byte, i int) desc {
	b := table[i*descSize:][:descSize]
	p := unsafe.Pointer(&b[0])
	if uintptr(p)&7 != 0 { // an indirect table: the specification asks for no alignment
		d := [descSize]byte(b)
		return makeDesc(binary.LittleEndian.Uint64(d[:]), binary.LittleEndian.Uint64(d[8:]))
	}
	// SAFETY: both words are 8-aligned and lie inside b.
	return makeDesc(atomic.LoadUint64((*uint64)(p)), atomic.LoadUint64((*uint64)(unsafe.Add(p, 8))))
}

// storeDesc writes descriptor i of an 8-aligned table.
func storeDesc(table []byte, i int, d desc) {
	b := table[i*descSize:][:descSize]
	p := unsafe.Pointer(&b[0])
	// SAFETY: both words are 8-aligned and lie inside b.
	atomic.StoreUint64((*uint64)(p), d.addr)
	atomic.StoreUint64((*uint64)(unsafe.Add(p, 8)), uint64(d.len)|uint64(d.flags)<<32|uint64(d.next)<<48)
}

// aligned tells whether b starts at a multiple of n in our own address space.
func aligned(b []byte, n uintptr) bool {
	// SAFETY: the address is only looked at.
	return uintptr(unsafe.Pointer(&b[0]))%n == 0
}
