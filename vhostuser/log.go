// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"fmt"
	"sync/atomic"
)

// logPage is the number of bytes of guest memory a bit of the log stands for (VHOST_LOG_PAGE).
const logPage = 4096

// Log is the dirty-page log of a live migration: one bit a page of guest memory, from guest address 0 on, shared with
// the front-end. Its methods may be used from any goroutine.
type Log struct {
	mem   *shm
	words []byte // whole 64-bit words
	pages uint64 // pages that have a bit
}

// newLog maps a log of size bytes at off of fd, which it does not keep. The log must cover guest memory below end.
func newLog(fd int, off, size, end uint64) (*Log, error) {
	mem, err := mapShm(fd, off, size)
	if err != nil {
		return nil, fmt.Errorf("dirty-page log: %w", err)
	}
	// The last word may reach past size. It lies in a page of the mapping all the same, and only bits of size are set.
	l := &Log{mem: mem, words: mem.data[:(size+7)/8*8], pages: size * 8}
	if !l.covers(end) {
		_ = mem.unmap()
		return nil, fmt.Errorf("dirty-page log: %#x bytes do not cover guest memory up to %#x", size, end)
	}
	return l, nil
}

// covers says whether all guest addresses below end have a bit.
func (l *Log) covers(end uint64) bool {
	return end == 0 || (end-1)/logPage < l.pages
}

// Mark notes that n bytes at guest address gpa were written, after they were. Addresses past the log's end are ignored.
// It allocates nothing.
func (l *Log) Mark(gpa, n uint64) {
	if n == 0 || gpa/logPage >= l.pages {
		return
	}
	last := gpa + n - 1
	if last < gpa {
		last = ^uint64(0)
	}
	first, end := gpa/logPage, min(last/logPage+1, l.pages)
	for first < end {
		bits := min(64-first%64, end-first)
		mask := (^uint64(0) >> (64 - bits)) << (first % 64)
		// Always the OR, also if the bits look set: the front-end may be clearing them right now.
		atomic.OrUint64(word64(l.words, int(first/64)*8), mask)
		first += bits
	}
}

// Release unmaps the log, once no queue uses it any more.
func (l *Log) Release() error { return l.mem.unmap() }
