// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blkstream/blkstream/blk"
)

// BenchmarkAllocate writes to clusters that are not allocated, with direct I/O.
func BenchmarkAllocate(b *testing.B) {
	for _, c := range []struct {
		name   string
		size   int64
		random bool
		depth  int
	}{{"sequential 64k", 64 << 10, false, 1}, {"random 4k", 4 << 10, true, 1}, {"random 4k depth 16", 4 << 10, true, 16}} {
		b.Run(c.name, func(b *testing.B) {
			b.SetBytes(c.size)
			t := b
			const disk = 64 << 30
			path := diskImage(t, disk, "")
			n := mustOpen(t, openFile(t, path, true, false), Options{Name: path})
			var next atomic.Int64
			var wg sync.WaitGroup
			b.ResetTimer()
			for w := range c.depth {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(w), 1))
					buf := blk.GetBuffer(int(c.size))
					defer buf.Free()
					task := blk.NewTask()
					for {
						i := next.Add(1) - 1
						if i >= int64(b.N) {
							return
						}
						off := i * c.size
						if c.random {
							off = rng.Int64N(disk/c.size) * c.size
						}
						err := blk.Do(task, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: c.size, Data: blk.BytesVec(nil, buf.B)})
						if err != nil {
							panic(fmt.Sprint(err))
						}
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			mustClose(t, n)
		})
	}
}

// BenchmarkTryMap maps random blocks of a disk whose tables are in memory.
func BenchmarkTryMap(b *testing.B) {
	const disk = 1 << 30
	for _, options := range []string{"preallocation=metadata", "preallocation=metadata,extended_l2=on"} {
		b.Run(options, func(b *testing.B) {
			path := diskImage(b, disk, options)
			n := mustOpen(b, openFile(b, path, true, false), Options{Name: path})
			for off := int64(0); off < disk; off += 1 << n.l1Shift {
				if _, err := n.Map(blk.NewTask(), off, 1); err != nil {
					b.Fatal(err)
				}
			}
			rng := rand.New(rand.NewPCG(1, 1))
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := n.TryMap(blk.OpRead, rng.Int64N(disk/4096)*4096, 4096); !ok {
					b.Fatal("not mapped")
				}
			}
			mustClose(b, n)
		})
	}
}
