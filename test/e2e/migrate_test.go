// SPDX-License-Identifier: Apache-2.0

package e2e

import (
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
