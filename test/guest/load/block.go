// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// A block says of itself which disk it is for (seed), where it belongs
// (offset) and how often that place had been written (generation). The rest is
// a pattern that follows from the three, so that a torn or misplaced block
// cannot pass.
const (
	magic      = 0x626c6b73_74726d31 // "blkstrm1"
	headerSize = 32
)

// fill writes the block for off and gen into b.
func fill(b []byte, seed uint64, off int64, gen uint32) {
	binary.LittleEndian.PutUint64(b[0:], magic)
	binary.LittleEndian.PutUint64(b[8:], seed)
	binary.LittleEndian.PutUint64(b[16:], uint64(off))
	binary.LittleEndian.PutUint64(b[24:], uint64(gen))
	x := mix(seed ^ mix(uint64(off)^mix(uint64(gen))))
	for i := headerSize; i+8 <= len(b); i += 8 {
		x += 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(b[i:], x^x>>29)
	}
}

// mix is the finaliser of splitmix64: neighbouring inputs give unrelated outputs.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// check says what is wrong with the block b found at off, "" if it holds what
// want demands. With newer, a later generation than the acknowledged one is
// right too: the write was under way when the table was taken.
func check(b, scratch []byte, seed uint64, off int64, want State, newer bool) string {
	if want == 0 {
		return ""
	}
	zeros := isZero(b)
	if want.isZero() && zeros {
		return ""
	}
	if zeros {
		return fmt.Sprintf("offset %#x: lost: zeros instead of generation %d", off, want.generation())
	}
	if binary.LittleEndian.Uint64(b) != magic {
		return fmt.Sprintf("offset %#x: corrupt: no block of ours, starts with % x", off, b[:16])
	}
	gotSeed, gotOff := binary.LittleEndian.Uint64(b[8:]), int64(binary.LittleEndian.Uint64(b[16:]))
	if gotSeed != seed || gotOff != off {
		return fmt.Sprintf("offset %#x: misplaced: block of disk %#x, offset %#x", off, gotSeed, gotOff)
	}
	gen := uint32(binary.LittleEndian.Uint64(b[24:]))
	fill(scratch[:len(b)], seed, off, gen)
	if !bytes.Equal(b, scratch[:len(b)]) {
		return fmt.Sprintf("offset %#x: torn: generation %d is not whole", off, gen)
	}
	switch {
	case gen == want.generation() && !want.isZero(), gen > want.generation() && newer:
		return ""
	case gen > want.generation():
		return fmt.Sprintf("offset %#x: generation %d was never issued, newest is %d", off, gen, want.generation())
	}
	return fmt.Sprintf("offset %#x: stale: generation %d, but %d was acknowledged", off, gen, want.generation())
}

func isZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
	}
	return true
}
