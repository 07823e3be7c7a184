// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
)

// A guest is moved to a raw file that holds something else, and is on it from the beginning. The daemon dies again and
// again meanwhile, once behind the end, and in the end the file alone is the disk.
func TestCopyToAddCowSurvivesKill(t *testing.T) {
	source, filled := filledImage(t, 160*mib)
	target := filepath.Join(t.TempDir(), "target.raw")
	must(t, os.WriteFile(target, bytes.Repeat([]byte{0xee}, 160*mib), 0o600))
	disk := daemon.Disk{ID: "disk0", Image: source, Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	opts := mixed
	opts.Depth = 8
	must(t, g.StartWriter(0, opts, filled))
	progress(t, g, 0, 100)
	cli(t, d, 0, "copy", "disk0", target, "--method", "stream", "--format", "add-cow", "--existing", "--id", "j", "--speed", "16M")
	bitmap := target + ".add-cow"
	if info, err := d.Disk("disk0"); err != nil || info.Image != bitmap || info.Format != "add-cow" || !strings.Contains(info.Warning, bitmap) {
		t.Errorf("after the copy has begun: %+v, %v", info, err)
	}
	left := filepath.Join(t.TempDir(), "left.raw")
	copyFile(t, source, left)
	killed(t, d, g, func() {
		eventually(t, "a sound bitmap", func() (bool, error) { // the kernel may still have the locks
			return exec.Command(filepath.Join(bin, "blkstream"), "image", "check", "-f", "add-cow", bitmap).Run() == nil, nil
		})
	})
	cli(t, d, 0, "job", "speed", "j", "0")
	if out := cli(t, d, 0, "job", "watch", "j"); !strings.Contains(out, "change line") || !strings.Contains(out, target) {
		t.Errorf("job watch: %s", out)
	}
	must(t, d.Kill()) // behind the end
	sameImages(t, source, left)
	must(t, os.Remove(source))
	must(t, d.Start())
	if info, err := d.Disk("disk0"); err != nil || info.Image != target || info.Format != "raw" {
		t.Errorf("after the copy: %+v, %v", info, err)
	}
	if _, err := os.Stat(bitmap); !os.IsNotExist(err) {
		t.Errorf("the bitmap is still there: %v", err)
	}
	progress(t, g, 0, 200)
	table := finish(t, d, g)
	verifyImage(t, target, table)
}
