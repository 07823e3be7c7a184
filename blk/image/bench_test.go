// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// buildChain makes depth images, the first one raw, and spreads the clusters of a disk over them.
func buildChain(t testing.TB, d *dir, depth int, size int64) string {
	t.Helper()
	task := blk.NewTask()
	rng := rand.New(rand.NewPCG(5, 5))
	owner := make([]int, size>>16)
	for c := range owner {
		owner[c] = rng.IntN(depth)
	}
	buf := blk.GetBuffer(64 << 10)
	defer buf.Free()
	for i := range depth {
		o := qcow2.CreateOptions{Size: size}
		if i > 0 {
			o.BackingFile, o.BackingFormat = fmt.Sprint(i-1), Qcow2
		}
		f, err := file.Open(mustCreate(t, d.at(fmt.Sprint(i))), file.Options{Grows: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := qcow2.Create(task, f, o); err != nil {
			t.Fatal(err)
		}
		n, err := qcow2.Open(task, f, qcow2.Options{Name: "layer"})
		if err != nil {
			t.Fatal(err)
		}
		for c, own := range owner {
			if own != i {
				continue
			}
			for j := range buf.B {
				buf.B[j] = byte(c) | 1
			}
			if err := write(task, n, buf.B, int64(c)<<16); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return fmt.Sprint(depth - 1)
}

// BenchmarkChain reads 4 KiB at random places of a disk that lies in 1, 64 or 500 images behind an empty one, as a queue
// does: from the place that TryMap gives.
func BenchmarkChain(b *testing.B) {
	const size = 256 << 20
	for _, depth := range []int{1, 64, 500} {
		b.Run(fmt.Sprint("depth=", depth), func(b *testing.B) {
			d := newDir(b)
			top := buildChain(b, d, depth, size)
			d.empty("top", top)
			g := d.open("top", Qcow2, Options{})
			defer g.Close()
			task := blk.NewTask()
			rng := rand.New(rand.NewPCG(1, 1))
			buf := blk.GetBuffer(4096)
			defer buf.Free()
			v := blk.BytesVec(nil, buf.B)
			slow := 0
			one := func() {
				off := rng.Int64N(size/4096) * 4096
				if x, ok := g.Root.TryMap(blk.OpRead, off, 4096); ok && x.Host != nil {
					if err := task.ReadAt(x.Host, v, x.HostOff); err != nil {
						b.Fatal(err)
					}
				} else {
					slow++
					if err := blk.Do(task, g.Root, &blk.Request{Op: blk.OpRead, Off: off, Len: 4096, Data: v}); err != nil {
						b.Fatal(err)
					}
				}
				if buf.B[0] != byte(off>>16)|1 {
					b.Fatal("wrong bytes")
				}
			}
			for range 1000 {
				one()
			}
			slow = 0
			b.ReportAllocs()
			for b.Loop() {
				one()
			}
			b.ReportMetric(float64(slow)/float64(b.N), "slow/op")
		})
	}
}

// empty makes an image that holds nothing.
func (d *dir) empty(name, backing string) {
	d.Helper()
	f, err := file.Open(mustCreate(d, d.at(name)), file.Options{Grows: true})
	if err != nil {
		d.Fatal(err)
	}
	size := int64(256 << 20)
	err = qcow2.Create(blk.NewTask(), f, qcow2.CreateOptions{Size: size, BackingFile: backing, BackingFormat: Qcow2})
	if err != nil {
		d.Fatal(err)
	}
	if err := f.Close(); err != nil {
		d.Fatal(err)
	}
}
