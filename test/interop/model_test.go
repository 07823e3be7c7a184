// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/blkstream/blkstream/blk"
)

// kind is one way to change a disk.
type kind int

const (
	write kind = iota
	writeCompressed
	zero
	zeroUnmap
	discard
)

// op changes sectors [off, off+n). What it writes is one byte again and again, which compresses well, or the noise
// of the model, which does not.
type op struct {
	kind   kind
	off, n int64
	fill   byte // 0: noise
}

// model is what a disk must read as. A sector that was discarded may read as before or as zeros, and from the first
// look on as it did then.
type model struct {
	data    []byte
	loose   []bool // sectors that were discarded and not looked at since
	cluster int64
	noise   []byte
	file    string // holds noise
}

func newModel(t *testing.T, rng *rand.Rand, size, cluster int64) *model {
	m := &model{data: make([]byte, size), loose: make([]bool, size/blk.SectorSize), cluster: cluster}
	m.noise = make([]byte, 48<<10)
	for i := range m.noise {
		m.noise[i] = byte(rng.Uint32())
	}
	m.file = filepath.Join(t.TempDir(), "noise")
	if err := os.WriteFile(m.file, m.noise, 0o600); err != nil {
		t.Fatal(err)
	}
	return m
}

// random makes up an operation. Most begin or end near the edge of a cluster, and some places are visited often.
func (m *model) random(rng *rand.Rand, kinds []kind) op {
	size := int64(len(m.data))
	o := op{kind: kinds[rng.IntN(len(kinds))], fill: byte(rng.IntN(256))}
	if rng.IntN(2) == 0 {
		o.fill = 0
	}
	sectors := func(n int64) int64 { return n / blk.SectorSize * blk.SectorSize }
	o.off = sectors(rng.Int64N(size))
	if rng.IntN(3) == 0 {
		o.off = sectors(rng.Int64N(min(size, 4*m.cluster)))
	}
	o.n = blk.SectorSize * (1 + rng.Int64N(max(1, min(3*m.cluster, 1<<20)/blk.SectorSize)))
	if rng.IntN(3) == 0 {
		o.off -= o.off % m.cluster
	}
	if rng.IntN(3) == 0 {
		o.n = (o.n + m.cluster - 1) / m.cluster * m.cluster
	}
	if o.kind == writeCompressed { // one cluster, or the short one at the end
		o.off -= o.off % m.cluster
		o.n = m.cluster
	}
	o.n = min(o.n, size-o.off)
	return o
}

func (m *model) bytes(o op) []byte {
	b := make([]byte, o.n)
	if o.fill != 0 {
		for i := range b {
			b[i] = o.fill
		}
		return b
	}
	for at := 0; at < len(b); {
		at += copy(b[at:], m.noise)
	}
	return b
}

func (m *model) apply(o op) {
	part := m.data[o.off : o.off+o.n]
	switch o.kind {
	case write, writeCompressed:
		copy(part, m.bytes(o))
	case zero, zeroUnmap:
		clear(part)
	default: // a discard may keep what was there
	}
	for s := o.off / blk.SectorSize; s < (o.off+o.n)/blk.SectorSize; s++ {
		m.loose[s] = o.kind == discard
	}
}

// command is the operation in the language of qemu-io.
func (m *model) command(o op) string {
	switch o.kind {
	case writeCompressed:
		return m.fillCommand("write -c", o)
	case zero:
		return fmt.Sprintf("write -q -z %d %d", o.off, o.n)
	case zeroUnmap:
		return fmt.Sprintf("write -q -z -u %d %d", o.off, o.n)
	case discard:
		return fmt.Sprintf("discard -q %d %d", o.off, o.n)
	default:
		return m.fillCommand("write", o)
	}
}

func (m *model) fillCommand(what string, o op) string {
	if o.fill == 0 {
		return fmt.Sprintf("%s -q -s %s %d %d", what, m.file, o.off, o.n)
	}
	return fmt.Sprintf("%s -q -P %d %d %d", what, o.fill, o.off, o.n)
}

// onQEMU lets qemu-io change the image and the model with it. QEMU compresses only into clusters that are not
// allocated; and it gives out space that it has freed in the same run for compressed data and for something else too.
// So there are three runs: discards of what will be compressed, compressed writes, all others.
func (m *model) onQEMU(t *testing.T, rng *rand.Rand, path string, n int, kinds []kind) {
	t.Helper()
	var free, packed, commands []string
	var later []op
	seen := map[int64]bool{}
	for range n {
		switch o := m.random(rng, kinds); {
		case o.kind != writeCompressed:
			later = append(later, o)
			commands = append(commands, m.command(o))
		case !seen[o.off]:
			seen[o.off] = true
			free = append(free, m.command(op{kind: discard, off: o.off, n: o.n}))
			packed = append(packed, m.command(o))
			m.apply(o)
		}
	}
	for _, o := range later {
		m.apply(o)
	}
	if len(packed) > 0 {
		modify(t, path, free)
		modify(t, path, packed)
	}
	modify(t, path, commands)
	m.see(t, "after qemu-io, as QEMU reads it", readWithQEMU(t, path, ""))
}

// onOurs changes the node and the model with it, and looks at some of what it did.
func (m *model) onOurs(t *testing.T, rng *rand.Rand, n blk.Node, count int) {
	t.Helper()
	task := blk.NewTask()
	for i := range count {
		o := m.random(rng, []kind{write, write, write, zero, zeroUnmap, discard})
		if err := do(task, n, m, o); err != nil {
			t.Fatalf("operation %d, %+v: %v", i, o, err)
		}
		m.apply(o)
		if i%8 == 0 {
			if err := blk.Do(task, n, &blk.Request{Op: blk.OpFlush}); err != nil {
				t.Fatalf("flush: %v", err)
			}
		}
	}
	m.see(t, "after our changes, as we read it", readNode(t, n))
}

func do(task *blk.Task, n blk.Node, m *model, o op) error {
	r := &blk.Request{Off: o.off, Len: o.n}
	switch o.kind {
	case write:
		r.Op, r.Data = blk.OpWrite, blk.BytesVec(nil, m.bytes(o))
	case zeroUnmap:
		r.Op, r.Flags = blk.OpWriteZeroes, blk.Unmap
	case zero:
		r.Op = blk.OpWriteZeroes
	case discard:
		r.Op = blk.OpDiscard
	default:
		return blk.ErrNotSupported
	}
	return blk.Do(task, n, r)
}

// see compares what a disk reads as with the model, and takes over what became of discarded sectors.
func (m *model) see(t *testing.T, what string, got []byte) {
	t.Helper()
	if len(got) != len(m.data) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(m.data))
	}
	var zeros [blk.SectorSize]byte
	for s, loose := range m.loose {
		if !loose {
			continue
		}
		off := s * blk.SectorSize
		if bytes.Equal(got[off:off+blk.SectorSize], zeros[:]) {
			clear(m.data[off : off+blk.SectorSize])
		}
	}
	clear(m.loose)
	mustEqual(t, what, got, m.data)
}
