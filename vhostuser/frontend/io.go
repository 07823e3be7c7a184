// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/blkstream/blkstream/virtq"
)

// Synchronous calls, through bounce buffers in guest memory, on the queues in turn. They end with ErrIO,
// ErrUnsupported, ErrDisconnected, ErrClosed, or what broke the ring. Ranges are the device's to check.

var (
	_ io.ReaderAt = (*Disk)(nil)
	_ io.WriterAt = (*Disk)(nil)
)

// ReadAt reads len(p) bytes at off, both multiples of 512, in requests of at most 1 MiB.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) { return d.transfer(TypeIn, p, off) }

// WriteAt writes p at off, both multiples of 512 bytes, in requests of at most 1 MiB.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) { return d.transfer(TypeOut, p, off) }

func (d *Disk) transfer(kind uint32, p []byte, off int64) (done int, err error) {
	sector, err := sectors(off)
	if err != nil {
		return 0, err
	}
	if _, err := sectors(int64(len(p))); err != nil {
		return 0, err
	}
	most := min(bounceSize, int(d.MaxTransfer()))
	for done < len(p) {
		part := p[done:min(done+most, len(p))]
		err := d.sync(&Request{Type: kind, Sector: sector + uint64(done)/SectorSize}, part)
		if err != nil {
			return done, fmt.Errorf("frontend: %d bytes at %d: %w", len(part), off+int64(done), err)
		}
		done += len(part)
	}
	return done, nil
}

// Flush makes everything that was acknowledged durable.
func (d *Disk) Flush() error { return d.sync(&Request{Type: TypeFlush}, nil) }

// GetID returns the disk's serial number, at most 20 bytes.
func (d *Disk) GetID() (string, error) {
	b := make([]byte, 20)
	err := d.sync(&Request{Type: TypeGetID}, b)
	id, _, _ := bytes.Cut(b, []byte{0})
	return string(id), err
}

// Discard tells the device that n bytes at off, both multiples of 512, are not needed.
func (d *Disk) Discard(off, n int64) error {
	return d.clear(TypeDiscard, off, n, d.config.MaxDiscardSectors, 0)
}

// WriteZeroes zeroes n bytes at off, both multiples of 512; with unmap the device may free their storage.
func (d *Disk) WriteZeroes(off, n int64, unmap bool) error {
	var flags uint32
	if unmap {
		flags = 1
	}
	return d.clear(TypeWriteZeroes, off, n, d.config.MaxWriteZeroesSectors, flags)
}

func (d *Disk) clear(kind uint32, off, n int64, most, flags uint32) error {
	sector, err := sectors(off)
	if err != nil {
		return err
	}
	left, err := sectors(n)
	if err != nil {
		return err
	}
	if most == 0 { // not offered: the device shall say so itself
		most = 1 << 22
	}
	for left > 0 {
		part := min(left, uint64(most))
		segment := binary.LittleEndian.AppendUint64(nil, sector)
		segment = binary.LittleEndian.AppendUint32(segment, uint32(part))
		segment = binary.LittleEndian.AppendUint32(segment, flags)
		if err := d.sync(&Request{Type: kind}, segment); err != nil {
			return fmt.Errorf("frontend: clear %d sectors at %d: %w", part, sector, err)
		}
		sector, left = sector+part, left-part
	}
	return nil
}

// sync runs one request with p, at most bounceSize bytes, as its data.
func (d *Disk) sync(r *Request, p []byte) error {
	gpa, ok := <-d.bounce
	if !ok {
		return ErrClosed
	}
	defer func() { d.bounce <- gpa }()
	var b []byte
	if len(p) > 0 {
		var err error
		if b, err = d.Memory().Bytes(gpa, uint64(len(p))); err != nil {
			return err
		}
		r.Data = d.Segments(nil, gpa, uint32(len(p)))
		if r.Type != TypeIn && r.Type != TypeGetID {
			copy(b, p)
		}
	}
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	if err := d.queues[d.next.Add(1)%uint32(len(d.queues))].Submit(r); err != nil {
		return err
	}
	<-done
	if err := r.Err(); err != nil {
		return err
	}
	if r.Type == TypeIn || r.Type == TypeGetID {
		copy(p, b)
	}
	return nil
}

// Segments appends n bytes at gpa, cut to segments that the device accepts, to dst.
func (d *Disk) Segments(dst []virtq.Buf, gpa uint64, n uint32) []virtq.Buf {
	most := d.segment()
	for n > 0 {
		part := min(n, most)
		dst = append(dst, virtq.Buf{GPA: gpa, Len: part})
		gpa, n = gpa+uint64(part), n-part
	}
	return dst
}

// MaxTransfer is the most bytes that the device, and the ring, take in one request.
func (d *Disk) MaxTransfer() uint32 {
	pieces := uint64(maxPieces - 2)
	if d.features&FeatureIndirect == 0 {
		pieces = min(pieces, uint64(max(d.opts.QueueSize-2, 1)))
	}
	if d.features&FeatureSegMax != 0 && d.config.SegMax > 0 {
		pieces = min(pieces, uint64(d.config.SegMax))
	}
	return uint32(min(pieces*uint64(d.segment()), 1<<30))
}

// segment is the longest data segment, a multiple of 512.
func (d *Disk) segment() uint32 {
	if d.features&FeatureSizeMax != 0 && d.config.SizeMax >= SectorSize {
		return d.config.SizeMax / SectorSize * SectorSize
	}
	return 1 << 30
}

func sectors(n int64) (uint64, error) {
	if n < 0 || n%SectorSize != 0 {
		return 0, fmt.Errorf("frontend: %d is not a multiple of %d", n, SectorSize)
	}
	return uint64(n / SectorSize), nil
}
