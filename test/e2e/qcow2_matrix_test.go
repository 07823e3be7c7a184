// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// Images that QEMU made and filled, in every kind, are served and changed through vhost-user on two queues at once; then
// QEMU finds no error in them and reads what the test's own model holds.
func TestQcow2OverVhostUser(t *testing.T) {
	guest.Need(t, "qemu-img", "qemu-io")
	for _, k := range []struct {
		name     string
		options  string
		compress bool
		backing  bool
	}{
		{name: "default"},
		{name: "v2", options: "compat=0.10"},
		{name: "v2 over raw", options: "compat=0.10", backing: true},
		{name: "over raw", backing: true},
		{name: "compressed", compress: true},
		{name: "zstd", options: "compression_type=zstd", compress: true},
		{name: "clusters of 512", options: "cluster_size=512,refcount_bits=64"},
		{name: "clusters of 2M", options: "cluster_size=2M"},
		{name: "refcounts of 1 bit", options: "refcount_bits=1"},
		{name: "lazy", options: "lazy_refcounts=on"},
		{name: "subclusters", options: "extended_l2=on"},
		{name: "subclusters over raw", options: "extended_l2=on,cluster_size=128k", backing: true},
		{name: "data file", options: "data_file=DIR/data"},
		{name: "raw data file", options: "data_file=DIR/data,data_file_raw=on"},
		{name: "metadata", options: "preallocation=metadata"},
		{name: "full", options: "preallocation=full"},
	} {
		t.Run(k.name, func(t *testing.T) {
			const size = 12*mib + 3*4096
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 1))
			dir := t.TempDir()
			model := make([]byte, size)
			for off := 0; off < size; off += 64 << 10 {
				if rng.IntN(3) > 0 { // text compresses, and a third is zeros
					copy(model[off:], bytes.Repeat([]byte{byte(1 + rng.IntN(255)), byte(off >> 16)}, 1+rng.IntN(32<<10)))
				}
			}
			flat, image := filepath.Join(dir, "flat.raw"), filepath.Join(dir, "image.qcow2")
			must(t, os.WriteFile(flat, model, 0o600))
			options := cmp.Or(strings.ReplaceAll(k.options, "DIR", dir), "cluster_size=64k")
			switch {
			case k.backing:
				options += ",backing_fmt=raw,backing_file=" + flat
				qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, fmt.Sprint(size))
			case k.compress:
				qemu(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, flat, image)
			default:
				qemu(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options, flat, image)
			}
			disk := daemon.Disk{ID: "disk0", Image: image, Format: "qcow2", Queues: 2}
			d := start(t, disk)
			f, err := frontend.Dial(context.Background(), d.Socket("disk0"), frontend.Options{Queues: 2, MemSize: 16 << 20})
			must(t, err)
			defer f.Close()
			// Two drivers, each with a half of the disk that is its own but for the clusters at the border.
			var wg sync.WaitGroup
			for w := range int64(2) {
				wg.Go(func() {
					change(t, f, model, w*size/2&^511, (w+1)*size/2&^511, rand.New(rand.NewPCG(seed, uint64(w)+2)))
				})
			}
			wg.Wait()
			got := make([]byte, size)
			if _, err := f.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			same(t, "through vhost-user", got, model)
			must(t, f.Close())
			must(t, d.Stop())
			checkQcow2(t, image, false)
			again := filepath.Join(dir, "again.raw")
			qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, again)
			got, err = os.ReadFile(again)
			must(t, err)
			same(t, "by QEMU", got, model)
		})
	}
}

// change does random operations on [lo, hi) of a disk and its model.
func change(t *testing.T, f *frontend.Disk, model []byte, lo, hi int64, rng *rand.Rand) {
	for range 250 {
		off := lo + rng.Int64N((hi-lo)/512)*512
		n := min((1+rng.Int64N(int64(1)<<rng.IntN(10)))*512, hi-off)
		part := model[off : off+n]
		var err error
		switch rng.IntN(6) {
		case 0, 1:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
			_, err = f.WriteAt(part, off)
		case 2:
			clear(part)
			err = f.WriteZeroes(off, n, rng.IntN(2) == 0)
		case 3:
			got := make([]byte, n)
			if err = f.Discard(off, n); err == nil {
				_, err = f.ReadAt(got, off)
			}
			for i := range got {
				if got[i] != part[i] && got[i] != 0 {
					t.Errorf("discard of %d bytes at %d: byte %d reads as something that it never was", n, off, i)
					return
				}
			}
			copy(part, got)
		case 4:
			got := make([]byte, n)
			if _, err = f.ReadAt(got, off); err == nil && !bytes.Equal(got, part) {
				t.Errorf("read of %d bytes at %d differs", n, off)
				return
			}
		default:
			err = f.Flush()
		}
		if err != nil {
			t.Error(err)
			return
		}
	}
}

func same(t *testing.T, who string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("read %s: %d bytes, want %d", who, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("read %s: the first difference is at %d", who, i)
		}
	}
}

func qemu(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}
