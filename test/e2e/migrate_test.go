// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

// Live migration of the guest. What the back-end owes is the log of the guest
// memory that it writes: data read, status bytes, used rings. A page that is
// not logged arrives stale on the other side.

// Two daemons may serve one image to readers. The guest keeps many reads in
// memory before it compares them, so most of them cross over with it.
func TestMigrateWhileReading(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, ReadOnly: true, Queues: 2}
	daemons := []*daemon.Daemon{start(t, disk), start(t, disk)}
	from := boot(t, daemons[0], guest.Options{}, disk)
	must(t, from.StartWriter(0, load.Options{ReadPercent: 100, MaxBlocks: 16, Hold: 200}, filled))
	for hop := range 3 {
		progress(t, from, 0, 500)
		to := boot(t, daemons[(hop+1)%2], guest.Options{Incoming: true}, disk)
		must(t, from.Migrate(to))
		from.Quit()
		from = to
	}
	progress(t, from, 0, 500)
	_, _, err := from.StopWriter(0)
	must(t, err)
}

// A disk that is written has one daemon: image locks keep a second one out. The
// destination QEMU wants a live back-end when it starts, so it is given one
// with an empty stand-in of the same size. It arrives stopped; before it
// resumes, its socket is pointed at the real daemon, to which QEMU reconnects.
func TestMigrateWhileWriting(t *testing.T) {
	disk := daemon.Disk{ID: "disk0", Image: emptyImage(t, 64*mib), Queues: 2}
	standIn := disk
	standIn.Image = emptyImage(t, 64*mib)
	d, other := start(t, disk), start(t, standIn)
	from := boot(t, d, guest.Options{}, disk)
	must(t, from.StartWriter(0, mixed, nil))
	progress(t, from, 0, 500)

	dir, err := os.MkdirTemp("/tmp", "bsl")
	must(t, err)
	defer os.RemoveAll(dir)
	link := filepath.Join(dir, "disk")
	must(t, os.Symlink(other.Socket("disk0"), link))
	to := guest.Boot(t, guest.Options{
		Disks:    []guest.Disk{{Socket: link, Queues: 2, Reconnect: true}},
		Incoming: true, Paused: true,
	})
	must(t, from.Migrate(to))
	from.Quit()
	must(t, os.Symlink(d.Socket("disk0"), link+"2"))
	must(t, os.Rename(link+"2", link))
	must(t, other.Kill())
	eventually(t, "the connection of the second QEMU", func() (bool, error) {
		info, err := d.Disk("disk0")
		return info.State == "connected", err
	})
	must(t, to.Resume())

	progress(t, to, 0, 500)
	table := stopAndVerify(t, to, 0)
	to.Quit()
	must(t, d.Stop())
	verifyImage(t, disk.Image, table)
	if data, err := os.ReadFile(standIn.Image); err != nil || len(data) == 0 || !allZero(data) {
		t.Errorf("the stand-in was written to (%d bytes, %v)", len(data), err)
	}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
