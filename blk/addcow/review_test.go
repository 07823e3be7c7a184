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
