// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// Damage that is found while a disk is served stops its writes, marks the image and is told; what is good can be read,
// and the other disk goes on.
func TestDamagedQcow2(t *testing.T) {
	dir := t.TempDir()
	bad, good := filepath.Join(dir, "bad.qcow2"), filepath.Join(dir, "good.raw")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", bad, "2G")
	qemu(t, "qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", "-c", "write -q -P 8 1G 1M", bad)
	must(t, os.WriteFile(good, make([]byte, mib), 0o600))
	// The second L2 table points into the header.
	f, err := os.OpenFile(bad, os.O_RDWR, 0)
	must(t, err)
	word := func(off int64) int64 {
		var b [8]byte
		_, err := f.ReadAt(b[:], off)
		must(t, err)
		return int64(binary.BigEndian.Uint64(b[:]))
	}
	table := word(word(40)+2*8) & 0x00fffffffffffe00
	_, err = f.WriteAt(binary.BigEndian.AppendUint64(nil, 1<<63), table)
	must(t, err)
	must(t, f.Close())

	disks := []daemon.Disk{{ID: "bad", Image: bad, Format: "qcow2"}, {ID: "good", Image: good}}
	d := start(t, disks...)
	dial := func(id string) *frontend.Disk {
		f, err := frontend.Dial(context.Background(), d.Socket(id), frontend.Options{MemSize: 16 << 20})
		must(t, err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	guest, other := dial("bad"), dial("good")
	b := make([]byte, mib)
	_, err = guest.WriteAt(b[:4096], 0) // nothing is known yet
	must(t, err)
	if _, err := guest.ReadAt(b[:4096], 1<<30); err == nil {
		t.Error("a damaged entry was read through")
	}
	for _, off := range []int64{0, 1 << 30, 512 * mib} {
		if _, err := guest.WriteAt(b[:4096], off); err == nil {
			t.Errorf("a damaged image takes a write at %d", off)
		}
	}
	if _, err := guest.ReadAt(b[:4096], 8192); err != nil || !bytes.Equal(b[:4096], bytes.Repeat([]byte{7}, 4096)) {
		t.Errorf("what is good cannot be read: %v", err)
	}
	if _, err := other.WriteAt(b, 0); err != nil {
		t.Errorf("the other disk: %v", err)
	}
	info, err := d.Disk("bad")
	must(t, err)
	if !strings.Contains(info.Warning, "damaged") || !strings.Contains(d.Log(), "damaged") {
		t.Errorf("nobody is told of the damage: warning %q", info.Warning)
	}
	must(t, d.Stop())
	if status, out := d.CLI("image", "info", "-f", "qcow2", "--json", bad); status != 0 || !strings.Contains(out, `"corrupt":true`) {
		t.Errorf("the image is not marked: %s", out)
	}
	// A disk that needs repair is refused with its name.
	if err := d.Start(); err == nil || !strings.Contains(d.Log(), bad) {
		t.Errorf("a damaged image is served again: %v", err)
	}
}
