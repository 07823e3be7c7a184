// SPDX-License-Identifier: Apache-2.0

package qcow2

import "encoding/binary"

// refcounts is a refcount block: counts of 1<<order bits. Those of less than a byte begin at its least significant bit.
type refcounts struct {
	b     []byte
	order uint
}

func (r refcounts) get(i int) uint64 {
	switch r.order {
	case 3:
		return uint64(r.b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(r.b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(r.b[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(r.b[8*i:])
	}
	bit := uint(i) << r.order
	return uint64(r.b[bit/8]>>(bit%8)) & (1<<(1<<r.order) - 1)
}

// set needs a value that fits.
func (r refcounts) set(i int, v uint64) {
	switch r.order {
	case 3:
		r.b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(r.b[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(r.b[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(r.b[8*i:], v)
	default:
		bit := uint(i) << r.order
		mask := byte(1<<(1<<r.order)-1) << (bit % 8)
		r.b[bit/8] = r.b[bit/8]&^mask | byte(v)<<(bit%8)
	}
}
