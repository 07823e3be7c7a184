// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"encoding/binary"
	"runtime"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/vhostuser/frontend"
	"github.com/blkstream/blkstream/virtq"
)

// The fast path allocates nothing, whatever the storage.
func TestAllocs(t *testing.T) {
	const size, batch, rounds = 4 << 20, 16, 1000
	for _, c := range []struct {
		name string
		open func(t *testing.T) blk.Node
		opts Options
	}{
		{"tmpfs", func(t *testing.T) blk.Node { return image(t, tmpfs(t), size, file.Options{}) }, Options{}},
		{"direct", func(t *testing.T) blk.Node {
			return image(t, t.TempDir(), size, file.Options{Direct: true, Align: 512, NoSync: true})
		}, Options{}},
		{"write-through", func(t *testing.T) blk.Node { return image(t, tmpfs(t), size, file.Options{}) }, Options{WriteThrough: true}},
		{"pieces", func(t *testing.T) blk.Node {
			p := newPieces(image(t, tmpfs(t), size, file.Options{}), 2048)
			p.used.Set(0, size/2) // the rest is zeros
			return p
		}, Options{}},
		{"timed", func(t *testing.T) blk.Node { return image(t, tmpfs(t), size, file.Options{}) }, Options{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, c.open(t), c.opts)
			if c.name == "timed" {
				s.graph.Time(true)
			}
			d := s.dial(t, frontend.Options{Manual: true})
			r := newRing(t, d, 0)
			gpa, err := d.Alloc(batch * 8192)
			if err != nil {
				t.Fatal(err)
			}
			mem, err := d.Memory().Bytes(gpa, batch*8192)
			if err != nil {
				t.Fatal(err)
			}
			// Reads, writes, flushes and serials in turn; only the first half of the disk is written.
			var out, in [batch][]virtq.Buf
			for i := range batch {
				at := gpa + uint64(i)*8192
				data, status := virtq.Buf{GPA: at + 4096, Len: 4096}, virtq.Buf{GPA: at + 64, Len: 1}
				out[i], in[i] = []virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{status}
				typ, sector := uint32(typeIn), uint64(i)*512
				switch i % 4 {
				case 0, 2:
					in[i] = []virtq.Buf{data, status}
				case 1:
					typ, sector = typeOut, uint64(i)*256
					out[i] = append(out[i], data)
				case 3:
					typ = typeFlush
				}
				if i == batch-2 {
					typ, in[i][0].Len = typeGetID, 20
				}
				binary.LittleEndian.PutUint32(mem[i*8192:], typ)
				binary.LittleEndian.PutUint64(mem[i*8192+8:], sector)
			}
			run := func(rounds int) {
				for range rounds {
					for i := range batch {
						mem[i*8192+64] = 0xff
						if _, err := r.drv.AddChain(out[i], in[i], i%2 == 0); err != nil {
							t.Fatal(err)
						}
					}
					r.publish()
					for n := 0; n < batch; {
						if _, _, ok := r.drv.PopUsed(); ok {
							n++
						} else {
							runtime.Gosched()
						}
					}
					for i := range batch {
						if mem[i*8192+64] != statusOK {
							t.Fatalf("request %d: status %d", i, mem[i*8192+64])
						}
					}
				}
			}
			run(50) // lists grow to their size
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			run(rounds)
			runtime.ReadMemStats(&after)
			if n := after.Mallocs - before.Mallocs; float64(n) > 0.01*batch*rounds {
				t.Errorf("%d allocations in %d requests", n, batch*rounds)
			} else {
				t.Logf("%d allocations in %d requests", n, batch*rounds)
			}
		})
	}
}
