// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// seeded gives a test its random numbers. QCOW2_SEED repeats them.
// kind is a way to change a disk.
type kind int

const (
	write kind = iota
	zero
	unmap
	discard
)

// change makes up a request that changes a disk of the given size, and the bytes that it writes: mostly at the edges
// of clusters, often in the same places, and often where the last one ended, which is noted in next.
func change(rng *rand.Rand, next *int64, size, cluster int64, kinds []kind) (*blk.Request, []byte) {
	const sector = blk.SectorSize
	off := rng.Int64N(size/sector) * sector
	if rng.IntN(3) == 0 {
		off = rng.Int64N(min(size, 4*cluster)/sector) * sector
	}
	n := (1 + rng.Int64N(min(3*cluster, 24<<10)/sector)) * sector
	if rng.IntN(3) == 0 {
		off = off / cluster * cluster
	}
	if rng.IntN(3) == 0 {
		n = (n + cluster - 1) / cluster * cluster
	}
	if rng.IntN(3) == 0 && *next < size {
		off = *next
	}
	n = min(n, size-off)
	*next = off + n
	r := &blk.Request{Off: off, Len: n}
	if rng.IntN(8) == 0 {
		r.Flags = blk.FUA
	}
	b := make([]byte, n)
	switch kinds[rng.IntN(len(kinds))] {
	case write:
		r.Op = blk.OpWrite
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		r.Data = blk.BytesVec(nil, b)
	case zero:
		r.Op = blk.OpWriteZeroes
	case unmap:
		r.Op, r.Flags = blk.OpWriteZeroes, r.Flags|blk.Unmap
	case discard:
		r.Op = blk.OpDiscard
	}
	return r, b
}

func do(t *testing.T, n blk.Node, r *blk.Request) {
	t.Helper()
	if err := blk.Do(blk.NewTask(), n, r); err != nil {
		t.Fatal(err)
	}
}

func contents(t *testing.T, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	do(t, n, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	return b
}

func check(t *testing.T, n blk.Node, repair qcow2.Repair) qcow2.CheckResult {
	t.Helper()
	r, err := qcow2.Check(blk.NewTask(), n, repair)
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	r.Findings = r.Findings[:min(len(r.Findings), 5)]
	return r
}

// memoryOf is a disk in memory with these contents.
func memoryOf(t *testing.T, b []byte) *blktest.Memory {
	t.Helper()
	m := blktest.NewMemory(int64(len(b)))
	do(t, m, &blk.Request{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	return m
}

func open(t *testing.T, storage blk.Node, o qcow2.Options) *qcow2.Node {
	t.Helper()
	o.Name, o.Ahead = "image", true
	n, err := qcow2.Open(blk.NewTask(), storage, o)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// takeSnapshot gives a closed image an internal snapshot of what it holds: a copy of the L1 table and an entry in the
// snapshot table, behind the end. A repair then counts what they refer to.
func takeSnapshot(t *testing.T, storage *blktest.Memory) {
	t.Helper()
	be := binary.BigEndian
	b := storage.Bytes()
	cluster := int64(1) << be.Uint32(b[20:])
	l1, entries := int64(be.Uint64(b[40:])), int64(be.Uint32(b[36:]))
	pad := func() int64 {
		b = append(b, make([]byte, -int64(len(b))&(cluster-1))...)
		return int64(len(b))
	}
	at := pad()
	for i := range entries {
		b = be.AppendUint64(b, be.Uint64(b[l1+8*i:])&^(1<<63))
	}
	table := pad()
	b = be.AppendUint64(b, uint64(at))
	b = be.AppendUint32(b, uint32(entries))
	b = be.AppendUint16(b, 1)
	b = be.AppendUint16(b, 3)
	b = append(b, make([]byte, 20)...)
	b = be.AppendUint32(b, 16) // of extra data: no machine state, and the size
	b = be.AppendUint64(b, 0)
	b = be.AppendUint64(b, be.Uint64(b[24:]))
	b = append(b, "1one"...)
	pad()
	be.PutUint32(b[60:], 1)
	be.PutUint64(b[64:], uint64(table))

	if err := storage.Resize(blk.NewTask(), int64(len(b)), false); err != nil {
		t.Fatal(err)
	}
	do(t, storage, &blk.Request{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
	if r := check(t, storage, qcow2.RepairAll); r.Errors+r.Leaks > 0 {
		t.Fatalf("the snapshot could not be counted: %+v", r)
	}
}

// snapshotOf is what the only snapshot of an image holds.
func snapshotOf(t *testing.T, b []byte, base blk.Node) []byte {
	t.Helper()
	be := binary.BigEndian
	b = slices.Clone(b)
	table := be.Uint64(b[64:])
	copy(b[40:48], b[table:table+8])
	copy(b[36:40], b[table+8:table+12])
	copy(b[24:32], b[table+48:table+56])
	return contents(t, open(t, memoryOf(t, b), qcow2.Options{ReadOnly: true, Backing: base}))
}

// checkWithQEMU has qemu-img look at an image, if it is there; in CI it is. The image may have leaks.
func checkWithQEMU(t *testing.T, b []byte) {
	t.Helper()
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		return
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	// qemu-img opens the backing file, too. What it holds does not matter.
	for _, p := range []string{path, filepath.Join(dir, "base")} {
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(tool, "check", "-f", "qcow2", path).CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) {
		t.Fatalf("qemu-img check: %v\n%s", err, out)
	}
	os.RemoveAll(dir)
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
