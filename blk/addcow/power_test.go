// SPDX-License-Identifier: Apache-2.0

package addcow_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/blktest"
)

// twoDisks lose their power together. moments are the points of both after each step of either.
type twoDisks struct {
	mu      sync.Mutex
	disks   [2]*blktest.CrashDisk
	moments [][2]int
}

type half struct {
	*blktest.CrashDisk
	of *twoDisks
}

func (h *half) Do(t *blk.Task, r *blk.Request) error {
	h.of.mu.Lock()
	defer h.of.mu.Unlock()
	err := h.CrashDisk.Do(t, r)
	h.of.moments = append(h.of.moments, [2]int{h.of.disks[0].Points(), h.of.disks[1].Points()})
	return err
}

func (d *twoDisks) now() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.moments)
}

// version is what a sector was given: it may be there from begin on, and what came before is gone from durable on.
type version struct {
	begin   int
	durable int // 0: not yet
	data    []byte
}

// TestPowerCuts cuts the power after every I/O of both files. Each sector then holds what was durable, or something
// newer; what was in the image file before it was the disk's never shows.
func TestPowerCuts(t *testing.T) {
	for _, workers := range []int{1, 3} {
		rng := blktest.Rand(t)
		const cluster, size = 4096, 24*4096 + 1024
		base := random(rng, size-3000)
		d := &twoDisks{}
		d.disks = [2]*blktest.CrashDisk{blktest.NewCrashDisk(0), blktest.NewCrashDisk(size)}
		create(t, d.disks[0], size, cluster)
		write(t, d.disks[1], 0, stale(size))
		flush(t, d.disks[0])
		flush(t, d.disks[1])
		d.moments = [][2]int{{d.disks[0].Points(), d.disks[1].Points()}}
		n := open(t, &half{d.disks[0], d}, addcow.Options{Image: &half{d.disks[1], d}, Backing: memory(t, base)})

		first := shown(base, size)
		history := make([][]version, size/blk.SectorSize)
		for i := range history {
			history[i] = []version{{durable: 1, data: first[i*blk.SectorSize:][:blk.SectorSize]}}
		}
		var failed atomic.Bool
		play := func(w int, rng *rand.Rand) {
			task := blk.NewTask()
			for range 40 {
				if rng.IntN(5) == 0 { // of this worker's writes
					if blk.Do(task, n, &blk.Request{Op: blk.OpFlush}) != nil {
						failed.Store(true)
					}
					for i := w; i < len(history); i += workers {
						v := &history[i][len(history[i])-1]
						if v.durable == 0 {
							v.durable = d.now()
						}
					}
					continue
				}
				i := rng.IntN(len(history)/workers)*workers + w
				v := version{begin: d.now(), data: random(rng, blk.SectorSize)}
				r := writeOf(int64(i)*blk.SectorSize, v.data)
				if rng.IntN(3) == 0 {
					clear(v.data)
					r = &blk.Request{Op: blk.OpWriteZeroes, Off: r.Off, Len: r.Len}
				}
				if rng.IntN(6) == 0 {
					r.Flags = blk.FUA
				}
				if blk.Do(task, n, r) != nil {
					failed.Store(true)
				}
				if r.Flags&blk.FUA != 0 {
					v.durable = d.now()
				}
				history[i] = append(history[i], v)
			}
		}
		var wg sync.WaitGroup
		for w := range workers {
			rng := rand.New(rand.NewPCG(rng.Uint64(), 1))
			wg.Go(func() { play(w, rng) })
		}
		wg.Wait()
		if failed.Load() {
			t.Fatal("a request failed")
		}
		for at := range len(d.moments) {
			for range 3 {
				m := d.moments[at]
				after := open(t, d.disks[0].CrashAt(m[0], rng), addcow.Options{Image: d.disks[1].CrashAt(m[1], rng), Backing: memory(t, base)})
				got := contents(t, after)
				for i, vs := range history {
					b := got[i*blk.SectorSize:][:blk.SectorSize]
					ok := false
					for k := len(vs) - 1; k >= 0 && !ok; k-- {
						ok = vs[k].begin <= at+1 && bytes.Equal(vs[k].data, b)
						if vs[k].durable > 0 && vs[k].durable <= at+1 {
							break
						}
					}
					if !ok {
						t.Fatalf("%d workers, cut at %d of %d: sector %d holds %x…", workers, at, len(d.moments), i, b[:8])
					}
				}
			}
		}
	}
}

// TestFlushAfterDeath: a flush makes durable what another process has written and not flushed, bits included: it died, and
// the power goes later.
func TestFlushAfterDeath(t *testing.T) {
	const size, cluster = 1 << 20, 64 << 10
	rng := blktest.Rand(t)
	storage, img := blktest.NewCrashDisk(0), blktest.NewCrashDisk(size)
	create(t, storage, size, cluster)
	flush(t, storage)
	base := memory(t, bytes.Repeat([]byte{7}, size))
	want := bytes.Repeat([]byte{9}, cluster)
	write(t, open(t, storage, addcow.Options{Image: img, Backing: base}), 0, want)
	flush(t, open(t, storage, addcow.Options{Image: img, Backing: base}))
	for range 20 {
		after := open(t, storage.Crash(rng), addcow.Options{Image: img.Crash(rng), Backing: base})
		if !bytes.Equal(contents(t, after)[:cluster], want) {
			t.Fatal("what was flushed is gone")
		}
	}
}
