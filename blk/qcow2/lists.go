// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// Internal snapshots: what the image lists. Nothing here makes or changes one.

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
	ICount      int64  // instructions that the guest had executed, of record and replay; -1: not recorded
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
			VMStateSize: int64(be.Uint32(b[32:])), ICount: -1,
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
		if extra >= 24 {
			s.ICount = int64(be.Uint64(rest[16:]))
		}
		s.ID, s.Name = string(rest[extra:extra+idLen]), string(rest[extra+idLen:])
		list = append(list, s)
		at += roundUp(40+int64(len(rest)), 8)
	}
	return list, at - h.SnapshotsOffset, nil
}
