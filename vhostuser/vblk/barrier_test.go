// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// pipe is a disk whose reads through extents last until somebody writes into a pipe.
type pipe struct{ host blk.HostFile }

func (p *pipe) Info() *blk.Info {
	return &blk.Info{Name: "pipe", Kind: "pipe", Size: 1 << 20, Align: 1}
}

func (p *pipe) TryMap(op blk.Op, off, n int64) (blk.Extent, bool) {
	return blk.Extent{Len: n, State: blk.Data, Host: &p.host}, op == blk.OpRead
}
func (p *pipe) Map(_ *blk.Task, off, n int64) (blk.Extent, error) { return blk.Extent{Len: n}, nil }
func (p *pipe) Do(*blk.Task, *blk.Request) error                  { return blk.ErrNotSupported }
func (p *pipe) Children() []blk.Node                              { return nil }
func (p *pipe) Close() error                                      { return nil }

// Rule 9: what an extent points to is not used for something else while a queue's I/O on it is in flight.
func TestBarrier(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	s := serve(t, &pipe{blk.HostFile{Fd: int(r.Fd()), MemAlign: 1, OffAlign: 1}}, Options{Queues: 1})
	d := s.dial(t, frontend.Options{})
	want, got := bytes.Repeat([]byte{7}, 512), make([]byte, 512)
	read := make(chan error, 1)
	go func() {
		_, err := d.ReadAt(got, 0)
		read <- err
	}()
	for begun := false; !begun; time.Sleep(time.Millisecond) {
		s.dev.mu.Lock()
		for q := range s.dev.queues {
			q.do(func() { begun = q.taken > 0 })
		}
		s.dev.mu.Unlock()
	}
	passed := make(chan error, 1)
	go func() { passed <- s.graph.Barrier(blk.NewTask()) }()
	select {
	case err := <-passed:
		t.Fatalf("a barrier is passed with a read in flight (%v)", err)
	case <-time.After(50 * time.Millisecond):
	}
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := <-read; err != nil || !bytes.Equal(got, want) {
		t.Errorf("read: %v", err)
	}
	select {
	case err := <-passed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a barrier waits for a read that has ended")
	}
}
