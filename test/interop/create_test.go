// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// createOurs makes an image of the variant, and its backing file with contents.
func createOurs(t *testing.T, v variant, m *model) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	o := qcow2.CreateOptions{
		Size: int64(len(m.data)), Version: v.version, ClusterSize: v.cluster, RefcountBits: v.refcounts,
		LazyRefcounts: v.lazy, ExtendedL2: v.extended, Compression: v.compression, Preallocation: v.prealloc,
	}
	if v.data != "" {
		data := openNew(t, filepath.Join(dir, "data"))
		defer closeNode(t, data)
		o.DataFile, o.DataFileRaw, o.Data = "data", v.data == "raw", data
	}
	if v.backing != "" {
		makeBacking(t, v, m, filepath.Join(dir, "base"))
		o.BackingFile, o.BackingFormat = "base", "qcow2"
	}
	storage := openNew(t, path)
	defer closeNode(t, storage)
	if err := qcow2.Create(blk.NewTask(), storage, o); err != nil {
		t.Fatal(err)
	}
	return path
}

func openNew(t *testing.T, path string) blk.Node {
	t.Helper()
	if err := os.WriteFile(path, []byte("something that was there before"), 0o600); err != nil {
		t.Fatal(err)
	}
	return openFile(t, path, false)
}

// info is what qemu-img info says of the options of an image.
func info(t *testing.T, path string) any {
	t.Helper()
	var all struct {
		Size        int64          `json:"virtual-size"`
		ClusterSize int64          `json:"cluster-size"`
		Backing     string         `json:"backing-filename"`
		Format      string         `json:"backing-filename-format"`
		Specific    map[string]any `json:"format-specific"`
	}
	if err := json.Unmarshal([]byte(runIn(t, filepath.Dir(path), "", "qemu-img", "info", "--output=json", path)), &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestOurs: we create, QEMU finds what it would have created and fills it, we read and change it.
func TestOurs(t *testing.T) {
	variants(t, func(t *testing.T, v variant) {
		rng := seeded(t)
		m := newModel(t, rng, v.size(), v.cluster)
		path := createOurs(t, v, m)
		mustBeClean(t, path)
		theirs := createWithQEMU(t, v, newModel(t, rng, v.size(), v.cluster))
		if got, want := fmt.Sprint(info(t, path)), fmt.Sprint(info(t, theirs)); got != want {
			t.Errorf("qemu-img info of our image: %s\nof QEMU's: %s", got, want)
		}
		ours, qemus := allocated(t, path, v), allocated(t, theirs, v)
		if v.prealloc == "full" || v.prealloc == "falloc" {
			if size := int64(len(m.data)); ours < size {
				t.Errorf("%d of %d bytes have space", ours, size)
			}
		} else if ours > qemus+64<<10 {
			t.Errorf("our new image takes %d bytes, QEMU's %d", ours, qemus)
		}
		mustEqual(t, "the new image", readWithQEMU(t, path, ""), m.data)

		kinds := []kind{write, write, write, zero, zeroUnmap, discard}
		if v.compresses() {
			kinds = append(kinds, writeCompressed)
		}
		m.onQEMU(t, rng, path, 30, kinds)
		n := openOurs(t, path, false)
		m.see(t, "as we read it", readNode(t, n))
		m.onOurs(t, rng, n, 20)
		closeNode(t, n)
		mustBeClean(t, path)
		mustEqual(t, "as QEMU reads it", readWithQEMU(t, path, ""), m.data)
	})
}

// allocated is the space that an image takes, with its data file.
func allocated(t *testing.T, path string, v variant) int64 {
	t.Helper()
	var sum int64
	for _, p := range []string{path, filepath.Join(filepath.Dir(path), "data")} {
		var st syscall.Stat_t
		if err := syscall.Stat(p, &st); err != nil && (v.data != "" || !errors.Is(err, fs.ErrNotExist)) {
			t.Fatal(err)
		}
		sum += 512 * st.Blocks
	}
	return sum
}

// TestCreateLarge: 64 TiB of disk on a file that stays small.
func TestCreateLarge(t *testing.T) {
	needQEMU(t)
	path := filepath.Join(t.TempDir(), "image")
	storage := openNew(t, path)
	err := qcow2.Create(blk.NewTask(), storage, qcow2.CreateOptions{Size: 64 << 40})
	closeNode(t, storage)
	if err != nil {
		t.Fatal(err)
	}
	mustBeClean(t, path)
	modify(t, path, []string{"write -q -P 7 70368744112128 64k"})
	n := openOurs(t, path, false)
	b := make([]byte, 64<<10)
	if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpRead, Off: 64<<40 - 64<<10, Len: 64 << 10, Data: blk.BytesVec(nil, b)}); err != nil {
		t.Fatal(err)
	}
	closeNode(t, n)
	if b[0] != 7 || b[len(b)-1] != 7 {
		t.Error("other bytes at the end of the disk")
	}
	mustBeClean(t, path)
}
