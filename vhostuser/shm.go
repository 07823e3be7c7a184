// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// maxShm bounds a mapping. A log of this size covers 2^52 bytes of guest memory, all that there are address bits for.
const maxShm = 1 << 37

// shm is a piece of a file that the front-end shares with us: a dirty-page log or an in-flight region.
// Whatever stands in it may change at any time.
type shm struct {
	raw  []byte // whole pages
	data []byte // the piece, 8-byte aligned; its capacity reaches to the end of raw
	lost bool   // stays mapped for ever: requests that could not be drained may still touch it
}

// mapShm maps [off, off+size) of fd, which it does not keep. off must be a multiple of 8.
func mapShm(fd int, off, size uint64) (*shm, error) {
	if size == 0 || size > maxShm || off%8 != 0 {
		return nil, fmt.Errorf("bad offset %#x or size %#x", off, size)
	}
	if err := checkFileSize(fd, off, size); err != nil {
		return nil, err
	}
	page := uint64(os.Getpagesize())
	lead := off % page
	length := (lead + size + page - 1) / page * page
	raw, err := syscall.Mmap(fd, int64(off-lead), int(length), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mmap: %w", err)
	}
	return &shm{raw: raw, data: raw[lead : lead+size]}, nil
}

// unmap must come after the last use of data.
func (m *shm) unmap() error {
	if m.raw == nil {
		return errors.New("unmapped twice")
	}
	if m.lost {
		return nil
	}
	raw := m.raw
	m.raw, m.data = nil, nil
	return syscall.Munmap(raw)
}
