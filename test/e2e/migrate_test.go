// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os/exec"
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
		to := boot(t, daemons[(hop+1)%2], guest.Options{Incoming: true, Paused: true}, disk)
		must(t, from.Migrate(to))
		must(t, from.CompareMemory(to)) // what the daemon wrote there, too
		must(t, to.Resume())
		from.Quit()
		from = to
	}
	progress(t, from, 0, 500)
	_, _, err := from.StopWriter(0)
	must(t, err)
}

// A disk that is written moves with its guest between two daemons: each locks the image only while its guest runs. No
// write that was acknowledged before, while or after a move is lost, and outside of the moves nobody else gets in.
func TestMigrateWhileWriting(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, Queues: 2, Lock: "running"}
	daemons := []*daemon.Daemon{start(t, disk), start(t, disk)}
	from := boot(t, daemons[0], guest.Options{}, disk)
	must(t, from.StartWriter(0, mixed, filled))
	for hop := range 3 {
		progress(t, from, 0, 300)
		to := boot(t, daemons[(hop+1)%2], guest.Options{Incoming: true}, disk)
		if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", image).CombinedOutput(); err == nil {
			t.Errorf("while the guest runs somebody else may write: %s", out)
		}
		must(t, from.Migrate(to))
		from.Quit()
		from = to
	}
	progress(t, from, 0, 300)
	verifyImage(t, image, stopAndVerify(t, from, 0))
}

// A daemon that dies while its guest waits to be moved in comes back to it.
func TestMigrateAfterCrash(t *testing.T) {
	image, filled := filledImage(t, 64*mib)
	disk := daemon.Disk{ID: "disk0", Image: image, Lock: "running"}
	a, b := start(t, disk), start(t, disk)
	from := boot(t, a, guest.Options{}, disk)
	must(t, from.StartWriter(0, mixed, filled))
	progress(t, from, 0, 300)
	to := boot(t, b, guest.Options{Incoming: true, Paused: true}, disk)
	must(t, from.Migrate(to))
	must(t, b.Kill())
	must(t, b.Start())
	eventually(t, "QEMU comes back", func() (bool, error) {
		info, err := b.Disk("disk0")
		return info.State == "connected", err
	})
	must(t, to.Resume())
	from.Quit()
	progress(t, to, 0, 300)
	verifyImage(t, image, stopAndVerify(t, to, 0))
}
