// SPDX-License-Identifier: Apache-2.0

package blktest_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/raw"
)

func TestConformance(t *testing.T) {
	memory := func(_ *testing.T, size int64) blk.Node { return blktest.NewMemory(size) }
	t.Run("memory", func(t *testing.T) { blktest.Run(t, memory) })
	t.Run("raw", func(t *testing.T) {
		blktest.Run(t, func(t *testing.T, size int64) blk.Node { return raw.Open(memory(t, size)) })
	})
	t.Run("fault", func(t *testing.T) {
		blktest.Run(t, func(t *testing.T, size int64) blk.Node { return blktest.NewFault(memory(t, size)) })
	})
	t.Run("crash disk", func(t *testing.T) {
		blktest.Run(t, func(_ *testing.T, size int64) blk.Node { return blktest.NewCrashDisk(size) })
	})
}

func write(t *testing.T, n blk.Node, flags blk.Flags, off int64, b []byte) {
	t.Helper()
	r := &blk.Request{Op: blk.OpWrite, Flags: flags, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
	if err := blk.Do(blk.NewTask(), n, r); err != nil {
		t.Fatal(err)
	}
}

func flush(n blk.Node) error { return blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpFlush}) }

func page(b byte) []byte { return bytes.Repeat([]byte{b}, 4096) }

func TestFault(t *testing.T) {
	f := blktest.NewFault(blktest.NewMemory(1 << 20))
	do := func(op blk.Op, off int64) error {
		r := &blk.Request{Op: op, Off: off, Len: 512}
		if op == blk.OpRead || op == blk.OpWrite {
			r.Data = blk.BytesVec(nil, make([]byte, 512))
		}
		return blk.Do(blk.NewTask(), f, r)
	}

	nth := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, After: 2, Count: 1, Err: syscall.ENOSPC})
	for i, want := range []error{nil, nil, syscall.ENOSPC, nil} {
		if err := do(blk.OpWrite, 0); !errors.Is(err, want) {
			t.Errorf("write %d: %v, want %v", i, err, want)
		}
	}
	if err := do(blk.OpRead, 0); err != nil {
		t.Errorf("read: %v", err)
	}
	if nth.Caught() != 1 || f.Count(blk.OpWrite) != 4 || f.Count(blk.OpRead) != 1 {
		t.Errorf("caught %d, %d writes, %d reads", nth.Caught(), f.Count(blk.OpWrite), f.Count(blk.OpRead))
	}

	at := f.Add(blktest.Rule{Off: 4096, Len: 512, Err: syscall.EIO})
	for off, want := range map[int64]error{4096 - 512: nil, 4096: syscall.EIO, 4096 + 511: syscall.EIO, 4096 + 512: nil} {
		if err := do(blk.OpDiscard, off); !errors.Is(err, want) {
			t.Errorf("discard at %d: %v, want %v", off, err, want)
		}
	}
	at.Remove()
	if err := do(blk.OpDiscard, 4096); err != nil {
		t.Errorf("after Remove: %v", err)
	}

	hold := f.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Hold: true, Err: syscall.EIO})
	done := make(chan error)
	for range 2 {
		go func() { done <- do(blk.OpRead, 0) }()
	}
	hold.Wait(t, 2)
	select {
	case err := <-done:
		t.Fatalf("not held: %v", err)
	default:
	}
	hold.Release()
	for range 2 {
		if err := <-done; !errors.Is(err, syscall.EIO) {
			t.Errorf("held read: %v", err)
		}
	}
}

// TestCrashDisk: what was flushed or forced survives, the rest is old or new sector by sector, and each occurs.
func TestCrashDisk(t *testing.T) {
	d := blktest.NewCrashDisk(16 << 10)
	write(t, d, 0, 0, page(1))
	if err := flush(d); err != nil {
		t.Fatal(err)
	}
	write(t, d, 0, 4096, page(2))       // volatile, then replaced by a forced write
	write(t, d, blk.FUA, 4096, page(3)) // forced
	write(t, d, 0, 0, page(4))          // volatile
	write(t, d, 0, 8192, page(5))       // volatile

	rng := rand.New(rand.NewPCG(1, 2))
	seen := map[string]bool{}
	for range 500 {
		b := d.Crash(rng).Bytes()
		if !bytes.Equal(b[4096:8192], page(3)) {
			t.Fatal("a forced write is gone or overwritten by an older one")
		}
		got := ""
		for _, at := range []struct {
			off      int
			old, new byte
		}{{0, 1, 4}, {8192, 0, 5}} {
			olds := 0
			for s := at.off; s < at.off+4096; s += 512 {
				sector := b[s : s+512]
				if !bytes.Equal(sector, bytes.Repeat(sector[:1], 512)) || sector[0] != at.old && sector[0] != at.new {
					t.Fatalf("sector at %d holds %#x", s, sector[0])
				}
				if sector[0] == at.old {
					olds++
				}
			}
			got += map[bool]string{true: "torn "}[olds != 0 && olds != 8] + map[bool]string{true: "new "}[olds == 0] +
				map[bool]string{true: "old "}[olds == 8]
		}
		seen[got] = true
	}
	for _, want := range []string{"old old ", "new new ", "old new ", "new old ", "torn old ", "old torn "} {
		if !seen[want] {
			t.Errorf("%q never happened", want)
		}
	}

	if err := flush(d); err != nil {
		t.Fatal(err)
	}
	want := d.Bytes()
	if !bytes.Equal(d.Crash(rng).Bytes(), want) {
		t.Error("after a flush something is missing")
	}
	if !bytes.Equal(d.CrashAt(2, rng).Bytes()[:8192], append(page(1), page(0)...)) {
		t.Error("at the first flush the disk holds something else")
	}
	if n := d.Points(); n != 7 {
		t.Errorf("%d points, want 7", n)
	}

	// Growing is durable at once.
	if err := d.Resize(blk.NewTask(), 32<<10, false); err != nil {
		t.Fatal(err)
	}
	if c := d.Crash(rng); c.Info().Size != 32<<10 || !bytes.Equal(c.Bytes()[:16<<10], want) {
		t.Error("wrong after growing")
	}
}
