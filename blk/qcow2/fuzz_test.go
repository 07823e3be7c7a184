// SPDX-License-Identifier: Apache-2.0

package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Whatever is in an image, using it neither panics nor takes long nor much memory.
const (
	fuzzTime   = 5 * time.Second // on a machine that does much else
	fuzzMemory = 256 << 20       // allocated, not held
)

func bounded(t *testing.T, what string, fn func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	fn()
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	if took > fuzzTime {
		t.Errorf("%s took %v", what, took)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > fuzzMemory {
		t.Errorf("%s allocated %d MiB", what, n>>20)
	}
}

// fuzzImages are sound images with something of everything. Each is of a few clusters.
var fuzzImages = sync.OnceValue(func() [][]byte {
	var all [][]byte
	t := &testing.T{}
	rng := rand.New(rand.NewPCG(11, 12))
	for _, s := range []scene{
		{o: qcow2.CreateOptions{Size: 40 << 10, ClusterSize: 512}, fill: true, packed: true, snapshot: true},
		{o: qcow2.CreateOptions{Size: 30 << 10, ClusterSize: 1024, RefcountBits: 2, Compression: "zstd"}, packed: true},
		{o: qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 512, Version: 2}, fill: true, snapshot: true},
		{o: qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 16 << 10, ExtendedL2: true, RefcountBits: 64}, fill: true},
		{o: qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 512, RefcountBits: 1, LazyRefcounts: true, Preallocation: "metadata"}},
	} {
		disk, _ := s.prepare(t, rng)
		all = append(all, disk.Bytes())
	}
	return append(all, withBitmap(t, all[0]))
})

// withBitmap gives an image a persistent bitmap with one cluster of data.
func withBitmap(t *testing.T, b []byte) []byte {
	be := binary.BigEndian
	b = slices.Clone(b)
	at := len(b)
	b = append(b, make([]byte, 3*512)...)
	dir, table, data := b[at:], b[at+512:], at+1024
	be.PutUint64(dir, uint64(at+512))
	be.PutUint32(dir[8:], 1)
	be.PutUint32(dir[12:], 2) // auto
	dir[16], dir[17] = 1, 16
	be.PutUint16(dir[18:], 4)
	copy(dir[24:], "name")
	be.PutUint64(table, uint64(data))
	head := be.Uint32(b[100:])
	ext := be.AppendUint32(nil, 0x23852875)
	ext = be.AppendUint32(ext, 24)
	ext = be.AppendUint64(ext, 1<<32)
	ext = be.AppendUint64(ext, 32)
	ext = be.AppendUint64(ext, uint64(at))
	copy(b[head:], append(ext, make([]byte, 8)...))
	b[95] |= 1
	m := memoryOf(t, b)
	check(t, m, qcow2.RepairAll)
	return m.Bytes()
}

func TestFuzzImages(t *testing.T) {
	for i, b := range fuzzImages() {
		if r := check(t, memoryOf(t, b), qcow2.RepairNone); r.Errors+r.Leaks > 0 || len(b) > 1<<20 {
			t.Errorf("image %d, of %d bytes: %+v", i, len(b), r)
		}
		checkWithQEMU(t, b)
	}
}

// patch changes words of an image: each 12 bytes of the input are an offset and a value, or another word to copy.
func patch(b, input []byte) {
	be := binary.BigEndian
	for ; len(input) >= 12; input = input[12:] {
		at := int(be.Uint32(input)&0xffffff) % (len(b) - 8)
		if input[0]&1 == 0 {
			at &^= 7
		}
		if input[0]&2 != 0 {
			from := int(be.Uint64(input[4:]) % uint64(len(b)-8))
			copy(b[at:at+8], b[from&^7:])
			continue
		}
		copy(b[at:], input[4:12])
	}
}

func patchOf(at uint32, v uint64) []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, at), v)
}

// FuzzImage changes words anywhere in an image: the header, tables, counts, data.
func FuzzImage(f *testing.F) {
	for i := range fuzzImages() {
		f.Add(byte(i), []byte{})
		for _, at := range []uint32{20, 24, 36, 40, 48, 56, 60, 64, 72, 88, 96, 104, 112, 120, 512, 520, 1024, 1536, 1544, 2048, 4096, 32768, 49152, 65536} {
			for _, v := range []uint64{0, 1<<9 | 1<<63, 1<<40 | 1<<63, 1<<64 - 1, 3<<32 | 1} {
				f.Add(byte(i), patchOf(at, v))
			}
		}
	}
	f.Fuzz(func(t *testing.T, which byte, input []byte) {
		images := fuzzImages()
		b := slices.Clone(images[int(which)%len(images)])
		patch(b, input[:min(len(input), 40*12)])
		var (
			found qcow2.CheckResult
			err   error
		)
		bounded(t, "a check", func() {
			found, err = qcow2.Check(blk.NewTask(), memoryOf(t, b), qcow2.RepairNone)
		})
		sound := err == nil && found.Errors == 0
		var before []byte
		bounded(t, "reading", func() { before = readSome(memoryOf(t, b)) })
		m := memoryOf(t, b)
		bounded(t, "writing", func() { writeSome(t, m, sound) })
		if sound {
			if r, err := qcow2.Check(blk.NewTask(), m, qcow2.RepairNone); err != nil || r.Errors > 0 {
				t.Errorf("a sound image, written to: %+v, %v", r, err)
			}
		}
		m = memoryOf(t, b)
		bounded(t, "a repair", func() { found, err = qcow2.Check(blk.NewTask(), m, qcow2.RepairAll) })
		if err != nil || found.Errors > 0 {
			return
		}
		if r, err := qcow2.Check(blk.NewTask(), m, qcow2.RepairNone); err != nil || r.Errors+r.Leaks > 0 {
			t.Errorf("repaired, and not sound: %+v, %v", r, err)
		}
		if after := readSome(m); before != nil && !bytes.Equal(before, after) {
			t.Errorf("a repair changed the contents")
		}
	})
}

// readSome is the beginning and the end of the disk, or nil if it cannot be read.
func readSome(m *blktest.Memory) []byte {
	n, err := qcow2.Open(blk.NewTask(), m, qcow2.Options{Name: "image", ReadOnly: true})
	if err != nil {
		return nil
	}
	const most = 256 << 10
	var all []byte
	size := n.Info().Size
	for _, at := range []int64{0, max(0, size-most)} {
		b := make([]byte, min(most, size-at))
		if len(b) == 0 {
			continue
		}
		r := &blk.Request{Op: blk.OpRead, Off: at, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
		if err := blk.Do(blk.NewTask(), n, r); err != nil {
			return nil
		}
		_, _ = n.Map(blk.NewTask(), at, int64(len(b))) // whatever it says
		all = append(all, b...)
	}
	return all
}

// full is storage that has room for little more.
type full struct{ *blktest.Memory }

func (f full) Resize(t *blk.Task, size int64, shrink bool) error {
	if size > 4<<20 {
		return syscall.ENOSPC
	}
	return f.Memory.Resize(t, size, shrink)
}

// writeSome does this and that.
func writeSome(t *testing.T, m *blktest.Memory, sound bool) {
	n, err := qcow2.Open(blk.NewTask(), full{m}, qcow2.Options{Name: "image"})
	if err != nil {
		return
	}
	n = qcow2.ReserveLittle(n)
	rng := rand.New(rand.NewPCG(1, 2))
	size, next := min(n.Info().Size, 1<<30), int64(0)
	if size >= 2*blk.SectorSize {
		for range 30 {
			r, _ := change(rng, &next, size, 512, []kind{write, write, zero, unmap, discard})
			_ = blk.Do(blk.NewTask(), n, r) // fails if the image is damaged
			_ = blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush})
		}
	}
	_ = n.Resize(blk.NewTask(), n.Info().Size+64<<10, false)
	if err := n.Close(); err != nil && sound {
		t.Errorf("close: %v", err)
	}
}

// FuzzHeader parses anything as a header, and what it parsed, written again.
func FuzzHeader(f *testing.F) {
	for _, b := range fuzzImages() {
		f.Add(b[:512], int64(len(b)))
	}
	storage := blktest.NewMemory(0)
	o := qcow2.CreateOptions{Size: 1 << 20, BackingFile: "base", BackingFormat: "qcow2", DataFile: "data", ClusterSize: 16 << 10, ExtendedL2: true}
	if err := qcow2.Create(blk.NewTask(), storage, o); err != nil {
		f.Fatal(err)
	}
	f.Add(storage.Bytes()[:1024], int64(1<<20))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		h, err := qcow2.ParseHeader(b, size)
		if err != nil {
			return
		}
		again, err := h.Encode()
		if err != nil {
			return // names and extensions may not fit when they are put in order
		}
		h2, err := qcow2.ParseHeader(again, size)
		if err != nil {
			t.Fatalf("%+v, written and parsed: %v", h, err)
		}
		if h.Size != h2.Size || h.BackingFile != h2.BackingFile || h.BackingFormat != h2.BackingFormat || h.DataFile != h2.DataFile ||
			h.Incompatible != h2.Incompatible || h.Compatible != h2.Compatible || h.Autoclear != h2.Autoclear || h.Bitmaps != h2.Bitmaps ||
			h.L1Offset != h2.L1Offset || h.RefTableOffset != h2.RefTableOffset || len(h.Extensions) != len(h2.Extensions) {
			t.Fatalf("%+v, written and parsed: %+v", h, h2)
		}
	})
}

// FuzzCompressed reads anything as compressed data.
func FuzzCompressed(f *testing.F) {
	const cluster = 64 << 10
	images := map[string][]byte{}
	for _, c := range []string{"zlib", "zstd"} {
		s := scene{o: qcow2.CreateOptions{Size: cluster, ClusterSize: cluster, Compression: c}}
		m := blktest.NewMemory(0)
		if err := qcow2.Create(blk.NewTask(), m, s.o); err != nil {
			f.Fatal(err)
		}
		n, err := qcow2.Open(blk.NewTask(), m, qcow2.Options{Name: "image"})
		if err != nil {
			f.Fatal(err)
		}
		if err := n.WriteCompressed(blk.NewTask(), 0, bytes.Repeat([]byte("what compresses well "), cluster/21+1)[:cluster]); err != nil {
			f.Fatal(err)
		}
		if err := n.Close(); err != nil {
			f.Fatal(err)
		}
		images[c] = m.Bytes()
		_, data := packedData(images[c])
		f.Add(c == "zstd", data)
		f.Add(c == "zstd", data[:len(data)/2])
	}
	f.Add(true, []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, zstd bool, data []byte) {
		b := slices.Clone(images[map[bool]string{true: "zstd", false: "zlib"}[zstd]])
		at, old := packedData(b)
		clear(old)
		copy(b[at:at+len(old)], data)
		bounded(t, "reading", func() { readSome(memoryOf(t, b)) })
	})
}

// packedData is where the only compressed cluster of an image with clusters of 64 KiB lies.
func packedData(b []byte) (at int, data []byte) {
	be := binary.BigEndian
	l2 := be.Uint64(b[be.Uint64(b[40:]):]) & (1<<56 - 1<<9)
	e := be.Uint64(b[l2:])
	at = int(e & (1<<54 - 1))
	return at, b[at:min(len(b), at/512*512+int(e>>54&0xff+1)*512)]
}
