// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/dirty"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// The daemon dies again and again under a guest that writes all over the disk: its bitmap has every write that was
// acknowledged, and not much more.
func TestBitmapSurvivesKill(t *testing.T) {
	const (
		size  = int64(8192 * mib)
		gran  = 64 << 10
		kills = 4
	)
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			path := filepath.Join(t.TempDir(), "disk")
			must(t, image.Create(t.Context(), path, image.CreateOptions{Format: format, CreateOptions: qcow2.CreateOptions{Size: size}}))
			d := start(t, daemon.Disk{ID: "disk0", Image: path, Format: format, Queues: 2})
			cli(t, d, 0, "bitmap", "add", "disk0", "m")
			g, err := frontend.Dial(t.Context(), d.Socket("disk0"), frontend.Options{Queues: 2, Reconnect: 5 * time.Millisecond})
			must(t, err)
			var (
				mu    sync.Mutex
				acked = blk.NewBitmap(size, gran)
				wg    sync.WaitGroup
				end   = make(chan struct{})
			)
			for w := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(seed, uint64(w)))
					b := make([]byte, 16<<10)
					for home := rng.Int64N(size / 2); ; home += 1 << 20 {
						select {
						case <-end:
							return
						default:
						}
						off := (home + rng.Int64N(4<<20)) &^ 4095
						if rng.IntN(8) == 0 {
							off = rng.Int64N(size-1<<20) &^ 4095
						}
						off %= size - 1<<20
						if _, err := g.WriteAt(b[:4096*(1+rng.IntN(4))], off); err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						acked.Set(off, 1)
						mu.Unlock()
					}
				})
			}
			rng := rand.New(rand.NewPCG(seed, 100))
			for range kills {
				time.Sleep(time.Duration(100+rng.IntN(300)) * time.Millisecond)
				must(t, d.Kill())
				must(t, d.Start())
			}
			time.Sleep(100 * time.Millisecond)
			close(end)
			wg.Wait()
			must(t, g.Close())
			must(t, d.Stop())

			task := blk.NewTask()
			var bits *blk.Bitmap
			if format == "raw" {
				names, err := filepath.Glob(filepath.Join(filepath.Dir(d.Socket("disk0")), "state/bitmaps/disk0.d/*.bits"))
				must(t, err)
				if len(names) != 1 {
					t.Fatalf("files of bitmaps: %v", names)
				}
				f, err := file.Open(names[0], file.Options{ReadOnly: true})
				must(t, err)
				defer f.Close()
				bits, err = dirty.ReadBits(task, f, size)
				must(t, err)
			} else {
				img, err := image.Open(task, path, format, image.Options{ReadOnly: true})
				must(t, err)
				defer img.Close()
				n := img.Root.(*qcow2.Node)
				list, err := n.Bitmaps(task)
				must(t, err)
				if len(list) != 1 || list[0].InUse || list[0].Name != "m" {
					t.Fatalf("bitmaps in the image: %+v", list)
				}
				bits, err = n.LoadBitmap(task, list[0])
				must(t, err)
			}
			for off, n := int64(0), int64(0); ; off += n {
				var ok bool
				if off, n, ok = acked.Next(off, size); !ok {
					break
				}
				if !bits.All(off, n) {
					t.Errorf("writes in %d bytes at %d are not in the bitmap", n, off)
				}
			}
			// Blocks that a write touches at its end, and what was not acknowledged, are few.
			if most := 2*acked.Bytes() + kills*128<<22; bits.Bytes() > most || acked.Count() < 100 {
				t.Errorf("%d blocks were written, the bitmap has %d", acked.Count(), bits.Count())
			}
			t.Logf("%d blocks were written, the bitmap has %d", acked.Count(), bits.Count())
		})
	}
}
