// SPDX-License-Identifier: Apache-2.0

package addcow_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/file"
)

// A bitmap that ends with its last bit counts as a whole, as another program may have left it.
func TestBitmapEndsInAWord(t *testing.T) {
	const cluster, clusters = 4096, 77
	base := bytes.Repeat([]byte{7}, cluster*clusters)
	data := bytes.Repeat([]byte{9}, cluster*clusters)
	for _, readOnly := range []bool{true, false} {
		m := blktest.NewMemory(0)
		create(t, m, cluster*clusters, cluster)
		path := filepath.Join(t.TempDir(), "a")
		must(t, os.WriteFile(path, append(contents(t, m)[:4096], bytes.Repeat([]byte{0xff}, (clusters+7)/8)...), 0o600))
		f, err := file.Open(path, file.Options{ReadOnly: readOnly, Grows: true})
		must(t, err)
		r, err := addcow.Check(blk.NewTask(), f, cluster*clusters, false)
		must(t, err)
		if r.Allocated != clusters {
			t.Errorf("a check finds %d clusters of %d", r.Allocated, clusters)
		}
		n := open(t, f, addcow.Options{Name: "a", Image: memory(t, data), Backing: memory(t, base), ReadOnly: readOnly})
		if got := contents(t, n); !bytes.Equal(got, data) {
			t.Errorf("read-only %v: what the image file holds does not show", readOnly)
		}
		must(t, n.Close())
	}
}

// full is a file whose storage has no room.
type full struct {
	*blktest.Memory
	on bool
}

func (f *full) Do(t *blk.Task, r *blk.Request) error {
	if f.on && r.Op == blk.OpWrite {
		return syscall.ENOSPC
	}
	return f.Memory.Do(t, r)
}

// A copy that could not be stored is not the guest's business, nor is its bit: the guest's flush covers what the guest
// was promised, and that is stored.
func TestFlushAfterFailedCopy(t *testing.T) {
	const size, cluster = 1 << 20, 64 << 10
	storage := &full{Memory: blktest.NewMemory(0)}
	create(t, storage, size, cluster)
	n := open(t, storage, addcow.Options{Name: "a", Image: memory(t, stale(size)), Backing: memory(t, bytes.Repeat([]byte{7}, size))})
	write(t, n, 0, bytes.Repeat([]byte{9}, cluster))
	storage.on = true
	f := cor.New(n, cluster, func(error) {})
	if err := f.Pull(blk.NewTask(), cluster, cluster, 2); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("copied: %v", err)
	}
	write(t, f, 0, bytes.Repeat([]byte{10}, 4096))
	flush(t, f)
	storage.on = false
	must(t, f.Pull(blk.NewTask(), 0, size, 2))
	flush(t, f)
	must(t, n.Finish(blk.NewTask()))
}

// The process dies without a flush after each of its requests: what was acknowledged is there. Requests fail, of each of
// the files; what a failed one has changed is what it was to write, or nothing.
func TestDiesAtAnyTime(t *testing.T) {
	const size, cluster = 40*4096 + 1536, 4096
	for range 20 {
		rng := blktest.Rand(t)
		base := random(rng, size-5*4096-512)
		storage, img, backing := blktest.NewMemory(0), memory(t, stale(size)), blktest.NewFault(memory(t, base))
		create(t, storage, size, cluster)
		fs, fi := blktest.NewFault(storage), blktest.NewFault(img)
		n := open(t, fs, addcow.Options{Image: fi, Backing: backing})
		f := cor.New(n, cluster, func(error) {})
		want := shown(base, size)
		may := make([][4]uint64, size) // the values that may be there after the death
		allow := func(i int, v byte) { may[i][v>>6] |= 1 << (v & 63) }
		for i, v := range want {
			allow(i, v)
		}
		for range 60 {
			target := []*blktest.Fault{fs, fi, backing}[rng.IntN(3)]
			op := []blk.Op{blk.OpWrite, blk.OpFlush, blk.OpRead, blk.OpWriteZeroes}[rng.IntN(4)]
			var rule *blktest.Trap
			if rng.IntN(2) == 0 {
				rule = target.Add(blktest.Rule{Ops: []blk.Op{op}, Err: syscall.EIO})
			}
			off := rng.Int64N(size/512) * 512
			l := min(512*(1+rng.Int64N(30)), size-off)
			data := random(rng, l)
			r := writeOf(off, data)
			if rng.IntN(3) == 0 {
				r.Flags = blk.FUA
			}
			after := bytes.Clone(want)
			copy(after[off:], data)
			switch rng.IntN(4) {
			case 0:
				r = &blk.Request{Op: blk.OpWriteZeroes, Flags: r.Flags, Off: off, Len: l}
				clear(after[off : off+l])
			case 1:
				r = &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, make([]byte, l))}
				copy(after, want)
			}
			err := blk.Do(blk.NewTask(), f, r)
			if rule != nil {
				rule.Remove()
			}
			for i := off; i < off+l; i++ {
				if err == nil && r.Op != blk.OpRead {
					may[i] = [4]uint64{}
				}
				allow(int(i), after[i])
			}
			got := contents(t, f)
			for i := range got {
				in := int64(i) >= off && int64(i) < off+l
				if got[i] != after[i] && (!in || err == nil || got[i] != want[i]) {
					t.Fatalf("%v at %d+%d, %v: byte %d is %#x, want %#x", r.Op, off, l, err, i, got[i], after[i])
				}
			}
			want = got // from now on
			for i, v := range contents(t, open(t, storage, addcow.Options{Image: img, Backing: memory(t, base), ReadOnly: true})) {
				if may[i][v>>6]&(1<<(v&63)) == 0 {
					t.Fatalf("after %v at %d+%d, %v: byte %d is %#x, want %#x", r.Op, off, l, err, i, v, want[i])
				}
			}
		}
	}
}
