// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/chain"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/loop"
	"github.com/blkstream/blkstream/vhostuser/frontend"
	"github.com/blkstream/blkstream/virtq"
)

// chainOf is a disk over a chain whose map is made anew by each read: 4 KiB of data on a disk, then 4 KiB of zeros, and
// so on.
func chainOf(t *testing.T, fill byte) blk.Node {
	t.Helper()
	const size = 4 << 20
	p := newPieces(image(t, t.TempDir(), size, file.Options{Direct: true, Align: 512}), 4096)
	task := blk.NewTask()
	b := blk.GetBuffer(4096)
	for i := range b.B {
		b.B[i] = fill
	}
	for off := int64(0); off < size; off += 8192 {
		if err := blk.Do(task, p, &blk.Request{Op: blk.OpWrite, Off: off, Len: 4096, Data: blk.BytesVec(nil, b.B)}); err != nil {
			t.Fatal(err)
		}
	}
	n, err := chain.New([]blk.Node{p}, chain.Options{Unit: 4096})
	if err != nil {
		t.Fatal(err)
	}
	return slowReads{n}
}

// slowReads sends each request to Do.
type slowReads struct{ blk.Node }

func (slowReads) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

// A guest whose memory is truncated while a read from a chain has begun harms neither the process nor another guest.
func TestTruncatedMemoryChain(t *testing.T) {
	bad := serve(t, chainOf(t, 1), Options{ReadOnly: true})
	d := bad.dial(t, frontend.Options{Manual: true, QueueSize: 8, Features: frontend.AllFeatures &^ frontend.FeatureEventIdx})
	at, err := d.Alloc(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	r := newRing(t, d, 0)
	kick, _, errFD := r.q.FDs()
	lo := uint64(1 << 32)
	head, err := r.q.Ring().Mem.Bytes(lo, 64)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(guestMemory(t), 64<<10+int64(at-lo)+4096); err != nil {
		t.Fatal(err)
	}

	good := serve(t, chainOf(t, 2), Options{ReadOnly: true})
	g := good.dial(t, frontend.Options{Queues: 4})
	want := make([]byte, 64<<10)
	for off := 0; off < len(want); off += 8192 {
		copy(want[off:], bytes.Repeat([]byte{2}, 4096))
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			got := make([]byte, len(want))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := g.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
					t.Errorf("another guest: wrong bytes; %v", err)
					return
				}
			}
		})
	}
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		copy(head, le64(typeIn))
		head[32] = 0xee
		r.add([]virtq.Buf{{GPA: lo, Len: 16}}, []virtq.Buf{{GPA: at, Len: 8192}, {GPA: lo + 32, Len: 1}}, false)
		r.drv.Publish()
		loop.Signal(kick)
		if !r.waitOrErr(errFD) {
			t.Error("the ring broke")
			break
		}
		if head[32] != statusIOErr {
			t.Errorf("status %d", head[32])
			break
		}
	}
	close(stop)
	wg.Wait()
}
