// SPDX-License-Identifier: Apache-2.0

package dirty

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/blkstream/blkstream/blk"
)

// The intent log says in which regions of the disk writes may be under way or not yet in the bitmaps' files. It has two
// slots that are written in turn, so that one is whole whatever a crash does to the other. A slot, little endian:
//
//	 0  magic, 8 bytes
//	 8  generation: the valid slot with the higher one counts
//	16  size of the disk, bytes
//	24  log2 of a region's bytes, 4 bytes
//	28  number of regions, 4 bytes; logBroken: the bitmaps have missed writes
//	32  the regions, 4 bytes each
//	…   CRC-32C of all before it, in the last 4 bytes

const (
	logMagic  = "BLKSLOG1"
	logSlot   = 4096
	logBroken = ^uint32(0)

	// LogSize is the size of an intent log's storage, in bytes.
	LogSize = 2 * logSlot
)

// Errors of what is stored.
var (
	ErrDamaged = errors.New("damaged")
	ErrMissed  = errors.New("writes were missed, since the state directory could not be written")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// intentLog is owned by the keeper.
type intentLog struct {
	storage blk.Node
	gen     uint64
}

// FormatLog makes a storage of LogSize bytes an intent log without regions.
func FormatLog(t *blk.Task, storage blk.Node) error {
	l := intentLog{storage: storage}
	zero := make([]byte, logSlot)
	if err := writeAt(t, storage, zero, 0); err != nil { // a slot of whatever was there before
		return err
	}
	return l.write(t, 0, 0, nil)
}

// write makes the list of regions durable, in place of the one before.
func (l *intentLog) write(t *blk.Task, size int64, shift uint, regions []int64) error {
	return l.put(t, size, shift, uint32(len(regions)), regions)
}

func (l *intentLog) put(t *blk.Task, size int64, shift uint, count uint32, regions []int64) error {
	le := binary.LittleEndian
	b := make([]byte, logSlot)
	copy(b, logMagic)
	le.PutUint64(b[8:], l.gen+1)
	le.PutUint64(b[16:], uint64(size))
	le.PutUint32(b[24:], uint32(shift))
	le.PutUint32(b[28:], count)
	for i, r := range regions {
		le.PutUint32(b[32+4*i:], uint32(r))
	}
	le.PutUint32(b[logSlot-4:], crc32.Checksum(b[:logSlot-4], castagnoli))
	at := int64((l.gen+1)&1) * logSlot
	if err := writeAt(t, l.storage, b, at); err != nil {
		return fmt.Errorf("write the intent log: %w", err)
	}
	if err := flush(t, l.storage); err != nil {
		return fmt.Errorf("write the intent log: %w", err)
	}
	l.gen++ // not if this fails: the other slot is the one that is known to be good
	return nil
}

// ReadLog marks in each of the bitmaps what the log says may have been written. ErrMissed: the bitmaps do not hold all
// that was written; ErrDamaged: that cannot be known.
func ReadLog(t *blk.Task, storage blk.Node, bitmaps ...*blk.Bitmap) error {
	_, err := readLog(t, storage, bitmaps...)
	return err
}

func readLog(t *blk.Task, storage blk.Node, bitmaps ...*blk.Bitmap) (gen uint64, err error) {
	le := binary.LittleEndian
	if storage.Info().Size < LogSize {
		return 0, fmt.Errorf("intent log of %d bytes: %w", storage.Info().Size, ErrDamaged)
	}
	b := make([]byte, LogSize)
	if err := readAt(t, storage, b, 0); err != nil {
		return 0, fmt.Errorf("read the intent log: %w", err)
	}
	var best []byte
	for _, s := range [][]byte{b[:logSlot], b[logSlot:]} {
		if string(s[:8]) == logMagic && le.Uint32(s[logSlot-4:]) == crc32.Checksum(s[:logSlot-4], castagnoli) &&
			(best == nil || le.Uint64(s[8:]) > le.Uint64(best[8:])) {
			best = s
		}
	}
	if best == nil {
		return 0, fmt.Errorf("intent log: %w", ErrDamaged)
	}
	gen = le.Uint64(best[8:])
	shift, count := le.Uint32(best[24:]), le.Uint32(best[28:])
	switch {
	case count == logBroken:
		return gen, ErrMissed
	case count > maxActive || shift > 62:
		return gen, fmt.Errorf("intent log of %d regions: %w", count, ErrDamaged)
	}
	for i := range count {
		off := int64(le.Uint32(best[32+4*i:])) << shift
		if off < 0 {
			return gen, fmt.Errorf("intent log: %w", ErrDamaged)
		}
		for _, m := range bitmaps {
			m.Set(off, 1<<shift)
		}
	}
	return gen, nil
}

func readAt(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func writeAt(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func flush(t *blk.Task, n blk.Node) error { return blk.Do(t, n, &blk.Request{Op: blk.OpFlush}) }
