// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// Internal snapshots and persistent bitmaps: what the image lists. Nothing here makes or changes one, except that a
// bitmap which should record our writes is marked as not up to date.

// Snapshot is an internal snapshot.
type Snapshot struct {
	ID, Name    string
	L1Offset    int64
	L1Size      uint32 // entries
	Seconds     uint32 // since the epoch
	Nanoseconds uint32
	VMClock     uint64 // nanoseconds
	VMStateSize int64  // bytes
	DiskSize    int64  // bytes; 0: not recorded
}

// ReadSnapshots lists the internal snapshots.
func ReadSnapshots(t *blk.Task, storage blk.Node, h *Header) ([]Snapshot, error) {
	s, _, err := readSnapshots(t, storage, h)
	return s, err
}

// readSnapshots returns the size of the table in bytes, too.
func readSnapshots(t *blk.Task, storage blk.Node, h *Header) (list []Snapshot, size int64, err error) {
	be := binary.BigEndian
	var b [56]byte
	at := h.SnapshotsOffset
	for i := range h.SnapshotCount {
		if err := readClipped(t, storage, blk.BytesVec(nil, b[:40]), at); err != nil {
			return nil, 0, fmt.Errorf("read snapshot table: %w", err)
		}
		s := Snapshot{
			L1Offset: int64(be.Uint64(b[:])), L1Size: be.Uint32(b[8:]),
			Seconds: be.Uint32(b[16:]), Nanoseconds: be.Uint32(b[20:]), VMClock: be.Uint64(b[24:]),
			VMStateSize: int64(be.Uint32(b[32:])),
		}
		idLen, nameLen, extra := int64(be.Uint16(b[12:])), int64(be.Uint16(b[14:])), int64(be.Uint32(b[36:]))
		if extra > 1<<20 || at-h.SnapshotsOffset > maxDirectory ||
			s.L1Offset < 0 || s.L1Offset&(h.ClusterSize()-1) != 0 || int64(s.L1Size)*8 > maxL1Bytes ||
			s.L1Offset > roundUp(storage.Info().Size, h.ClusterSize())-int64(s.L1Size)*8 {
			return nil, 0, invalid("snapshot %d", i)
		}
		rest := make([]byte, extra+idLen+nameLen)
		if err := readClipped(t, storage, blk.BytesVec(nil, rest), at+40); err != nil {
			return nil, 0, fmt.Errorf("read snapshot table: %w", err)
		}
		if extra >= 8 {
			s.VMStateSize = int64(be.Uint64(rest))
		}
		if extra >= 16 {
			s.DiskSize = int64(be.Uint64(rest[8:]))
		}
		s.ID, s.Name = string(rest[extra:extra+idLen]), string(rest[extra+idLen:])
		list = append(list, s)
		at += roundUp(40+int64(len(rest)), 8)
	}
	return list, at - h.SnapshotsOffset, nil
}

// Flags of a bitmap.
const (
	bitmapInUse = 1 << 0
	bitmapAuto  = 1 << 1
)

// Bitmap is a persistent bitmap.
type Bitmap struct {
	Name        string
	Granularity int64 // bytes
	InUse       bool  // not saved after the last use: its contents mean nothing
	Enabled     bool  // records writes
	at          int64 // of its entry in the directory
	flags       uint32
}

// ReadBitmaps lists the persistent bitmaps. If the feature bit AutoclearBitmaps is not set, none of them is up to
// date.
func ReadBitmaps(t *blk.Task, storage blk.Node, h *Header) ([]Bitmap, error) {
	if h.Bitmaps.Count == 0 {
		return nil, nil
	}
	be := binary.BigEndian
	dir := make([]byte, h.Bitmaps.DirectorySize)
	if err := readClipped(t, storage, blk.BytesVec(nil, dir), h.Bitmaps.DirectoryOffset); err != nil {
		return nil, fmt.Errorf("read bitmap directory: %w", err)
	}
	var list []Bitmap
	at := h.Bitmaps.DirectoryOffset
	for i := range h.Bitmaps.Count {
		if len(dir) < 24 {
			return nil, invalid("bitmap directory: entry %d is cut off", i)
		}
		nameLen, extra := int64(be.Uint16(dir[18:])), int64(be.Uint32(dir[20:]))
		size := roundUp(24+extra+nameLen, 8)
		if size > int64(len(dir)) || dir[17] > 62 {
			return nil, invalid("bitmap directory: entry %d", i)
		}
		flags := be.Uint32(dir[12:])
		list = append(list, Bitmap{
			Name:        string(dir[24+extra : 24+extra+nameLen]),
			Granularity: 1 << dir[17],
			InUse:       flags&bitmapInUse != 0,
			Enabled:     flags&bitmapAuto != 0,
			at:          at,
			flags:       flags,
		})
		at += size
		dir = dir[size:]
	}
	return list, nil
}

// tracksBitmaps reports whether bitmaps may have to be marked before the first write.
func (n *Node) tracksBitmaps() bool {
	return n.header.Bitmaps.Count > 0 && n.header.Autoclear&AutoclearBitmaps != 0
}

// useBitmaps marks each bitmap that should record the writes of this session as in use, durably: we do not keep it up
// to date. Bitmaps that record nothing stay valid. QEMU shows marked ones as inconsistent and lets the user remove
// them; to clear the feature bit instead would lose them all.
func (n *Node) useBitmaps(t *blk.Task) error {
	list, err := ReadBitmaps(t, n.storage, n.Header())
	if err != nil {
		return err
	}
	marked := false
	buf := blk.GetBuffer(int(n.block))
	defer buf.Free()
	for _, b := range list {
		if !b.Enabled || b.InUse {
			continue
		}
		// Entries begin at multiples of 8, so the flags lie in one block.
		block := roundDown(b.at+12, n.block)
		if err := readClipped(t, n.storage, blk.BytesVec(nil, buf.B), block); err != nil {
			return fmt.Errorf("mark bitmap %q as in use: %w", b.Name, err)
		}
		binary.BigEndian.PutUint32(buf.B[b.at+12-block:], b.flags|bitmapInUse)
		if err := n.writeMeta(t, buf.B, block); err != nil {
			return fmt.Errorf("mark bitmap %q as in use: %w", b.Name, err)
		}
		marked = true
		n.warn("image %q: bitmap %q does not record what is written now and is marked as inconsistent", n.name, b.Name)
	}
	if !marked {
		return nil
	}
	return n.syncStorage(t)
}
