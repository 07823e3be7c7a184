// SPDX-License-Identifier: Apache-2.0

package dirty

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"maps"
	"math/bits"
	"slices"

	"github.com/blkstream/blkstream/blk"
)

// A bitmap's file has a sector that describes it, and then the bits, 63 words of them a sector, each sector with its
// number and a checksum. Sectors are written in place: bits are only added, and where a bitmap is cleared the old bits
// are more than the new ones, so whatever a crash leaves of a write is not less than what must be there. A sector that
// is damaged counts as all set. What the file does not reach to, since the disk has grown, counts as set, too.
//
// The first sector, little endian: magic, 8 bytes; size of the disk, 8; granularity, 8; CRC-32C at 508. The others:
// words at 0, the sector's number at 504, CRC-32C at 508.

const (
	bitsMagic   = "BLKSBIT1"
	sector      = 512
	sectorWords = 63
	maxBatch    = 2048 // sectors written at once
)

// Granularities of a bitmap, in bytes; those of qcow2.
const (
	MinGranularity = 512
	MaxGranularity = 1 << 31
)

// bitsFile is the durable copy of a bitmap. Owned by the keeper.
type bitsFile struct {
	storage blk.Node
	size    int64              // of the disk, as the file says
	changed map[int64]struct{} // sectors to be written, from 0 for the first words
}

// BitsSize is the size of the file of a bitmap, in bytes.
func BitsSize(size, granularity int64) int64 {
	words := ((size+granularity-1)/granularity + 63) / 64
	return sector + (words+sectorWords-1)/sectorWords*sector
}

// ReadBits reads a bitmap from its file, for a disk of size bytes.
func ReadBits(t *blk.Task, storage blk.Node, size int64) (*blk.Bitmap, error) {
	le := binary.LittleEndian
	head := make([]byte, sector)
	if err := readAt(t, storage, head, 0); err != nil {
		return nil, fmt.Errorf("read bitmap: %w", err)
	}
	had, gran := int64(le.Uint64(head[8:])), int64(le.Uint64(head[16:]))
	if string(head[:8]) != bitsMagic || !sumIsRight(head) || had < 0 || had > size ||
		gran < MinGranularity || gran > MaxGranularity || bits.OnesCount64(uint64(gran)) != 1 ||
		storage.Info().Size < BitsSize(had, gran) {
		return nil, fmt.Errorf("bitmap: %w", ErrDamaged)
	}
	m := blk.NewBitmap(size, gran)
	count := BitsSize(had, gran)/sector - 1
	buf := make([]byte, maxBatch*sector)
	for first := int64(0); first < count; first += maxBatch {
		b := buf[:min(maxBatch, count-first)*sector]
		if err := readAt(t, storage, b, sector*(1+first)); err != nil {
			return nil, fmt.Errorf("read bitmap: %w", err)
		}
		for s := first; len(b) > 0; s, b = s+1, b[sector:] {
			good := sumIsRight(b[:sector]) && le.Uint32(b[504:]) == uint32(s)
			for i := int64(0); i < sectorWords && s*sectorWords+i < m.Words(); i++ {
				w := le.Uint64(b[8*i:])
				if !good {
					w = ^uint64(0)
				}
				m.OrWord(s*sectorWords+i, w)
			}
		}
	}
	if had < size {
		m.Set(had, size-had)
	}
	return m, nil
}

func sumIsRight(b []byte) bool {
	return binary.LittleEndian.Uint32(b[sector-4:]) == crc32.Checksum(b[:sector-4], castagnoli)
}

func sum(b []byte) {
	binary.LittleEndian.PutUint32(b[sector-4:], crc32.Checksum(b[:sector-4], castagnoli))
}

// all marks every sector as changed.
func (f *bitsFile) all(m *blk.Bitmap) {
	for s := range (m.Words() + sectorWords - 1) / sectorWords {
		f.changed[s] = struct{}{}
	}
}

// touch marks the sectors of [off, off+n).
func (f *bitsFile) touch(m *blk.Bitmap, off, n int64) {
	per := m.Granularity() * 64 * sectorWords
	last := (m.Words()+sectorWords-1)/sectorWords - 1
	for s := off / per; s <= min((off+n-1)/per, last); s++ {
		f.changed[s] = struct{}{}
	}
}

// write makes what has changed durable: the bits of all of the bitmaps, which are of one disk of size bytes. After an
// error everything that should have been written still counts as changed.
func (f *bitsFile) write(t *blk.Task, size int64, of ...*blk.Bitmap) error {
	if len(f.changed) == 0 && size == f.size {
		return nil
	}
	if err := f.writeSectors(t, of); err != nil {
		return fmt.Errorf("write bitmap: %w", err)
	}
	if size != f.size {
		// Only now, for it says how much of the file counts.
		if err := f.writeHead(t, size, of[0].Granularity()); err != nil {
			return fmt.Errorf("write bitmap: %w", err)
		}
	}
	clear(f.changed)
	return nil
}

func (f *bitsFile) writeSectors(t *blk.Task, of []*blk.Bitmap) error {
	le := binary.LittleEndian
	todo := slices.Sorted(maps.Keys(f.changed))
	if len(todo) == 0 {
		return nil
	}
	if need := BitsSize(of[0].Words()*64*of[0].Granularity(), of[0].Granularity()); f.storage.Info().Size < need {
		r, ok := f.storage.(interface {
			Resize(t *blk.Task, size int64, shrink bool) error
		})
		if !ok {
			return blk.ErrNotSupported
		}
		if err := r.Resize(t, need, false); err != nil {
			return err
		}
	}
	buf := make([]byte, min(len(todo), maxBatch)*sector)
	for len(todo) > 0 {
		n := 1
		for n < min(len(todo), maxBatch) && todo[n] == todo[n-1]+1 {
			n++
		}
		b := buf[:n*sector]
		clear(b)
		for k, s := range todo[:n] {
			p := b[k*sector : (k+1)*sector]
			for i := int64(0); i < sectorWords && s*sectorWords+i < of[0].Words(); i++ {
				var w uint64
				for _, m := range of {
					w |= m.Word(s*sectorWords + i)
				}
				le.PutUint64(p[8*i:], w)
			}
			le.PutUint32(p[504:], uint32(s))
			sum(p)
		}
		if err := writeAt(t, f.storage, b, sector*(1+todo[0])); err != nil {
			return err
		}
		todo = todo[n:]
	}
	return flush(t, f.storage)
}

func (f *bitsFile) writeHead(t *blk.Task, size, granularity int64) error {
	b := make([]byte, sector)
	copy(b, bitsMagic)
	binary.LittleEndian.PutUint64(b[8:], uint64(size))
	binary.LittleEndian.PutUint64(b[16:], uint64(granularity))
	sum(b)
	if err := writeAt(t, f.storage, b, 0); err != nil {
		return err
	}
	if err := flush(t, f.storage); err != nil {
		return err
	}
	f.size = size
	return nil
}
