// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

// mixed is the load that most tests use: writes, zeros, and reads that compare.
var mixed = load.Options{Size: 64 * mib, ReadPercent: 20, ZeroPercent: 10, FlushEvery: 32, Seed: 1}

func TestFileSystem(t *testing.T) {
	guest.Need(t, "debugfs", "e2fsck")
	disk := daemon.Disk{ID: "disk0", Image: emptyImage(t, 128*mib)}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)

	run(t, g, "mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt")
	sum := strings.Fields(run(t, g, "head -c 30000000 /dev/urandom >/mnt/file && sha256sum /mnt/file"))[0]
	run(t, g, "umount /mnt && fsck.ext4 -fn /dev/vda")
	run(t, g, "echo 3 >/proc/sys/vm/drop_caches && mount -t ext4 -o ro /dev/vda /mnt")
	if again := strings.Fields(run(t, g, "sha256sum /mnt/file"))[0]; again != sum {
		t.Errorf("the guest reads back %s, wrote %s", again, sum)
	}
	g.Quit()
	must(t, d.Stop())

	// The image itself, without us.
	if out, err := exec.Command("e2fsck", "-fn", disk.Image).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	copied := filepath.Join(t.TempDir(), "file")
	if out, err := exec.Command("debugfs", "-R", "dump /file "+copied, disk.Image).CombinedOutput(); err != nil {
		t.Fatalf("debugfs: %v: %s", err, out)
	}
	data, err := os.ReadFile(copied)
	must(t, err)
	if got := fmt.Sprintf("%x", sha256.Sum256(data)); got != sum {
		t.Errorf("the image holds %s, the guest wrote %s", got, sum)
	}
}

func TestTwoDisksTwoQueues(t *testing.T) {
	disks := []daemon.Disk{
		{ID: "disk0", Image: emptyImage(t, 128*mib), Queues: 2},
		{ID: "disk1", Image: emptyImage(t, 64*mib), Queues: 2},
	}
	d := start(t, disks...)
	g := boot(t, d, guest.Options{}, disks...)
	for i, want := range []string{"262144 2", "131072 2"} {
		name := fmt.Sprintf("/sys/block/vd%c", 'a'+i)
		if got := strings.Join(strings.Fields(run(t, g, "cat "+name+"/size; ls "+name+"/mq | wc -l")), " "); got != want {
			t.Errorf("disk %d: sectors and queues %s, want %s", i, got, want)
		}
	}
	opts := mixed
	for i := range disks {
		opts.Seed, opts.Depth = uint64(i), 8
		must(t, g.StartWriter(i, opts, nil))
	}
	var tables []*load.Table
	for i := range disks {
		progress(t, g, i, 2000)
		tables = append(tables, stopAndVerify(t, g, i))
	}
	g.Quit()
	must(t, d.Stop())
	for i := range disks {
		verifyImage(t, disks[i].Image, tables[i])
	}
}

// The new memory must be used by the very back-end that was told of it while
// its rings ran: a file larger than the first memory is read into it.
func TestMemoryHotplug(t *testing.T) {
	image, _ := filledImage(t, 160*mib)
	data, err := os.ReadFile(image)
	must(t, err)
	disks := []daemon.Disk{{ID: "disk0", Image: emptyImage(t, 64*mib)}, {ID: "disk1", Image: image, ReadOnly: true}}
	d := start(t, disks...)
	g := boot(t, d, guest.Options{MemMB: 128, HotplugSlots: 2}, disks...)
	must(t, g.StartWriter(0, mixed, nil))
	progress(t, g, 0, 200)
	must(t, g.HotplugMemory(128))
	must(t, g.HotplugMemory(128))
	out := run(t, g, "mount -t tmpfs -o size=200m none /mnt && dd if=/dev/vdb of=/mnt/copy bs=1M iflag=direct 2>/dev/null && sha256sum /mnt/copy")
	if want := fmt.Sprintf("%x", sha256.Sum256(data)); !strings.HasPrefix(out, want) {
		t.Errorf("read into new memory: %s, want %s", out, want)
	}
	progress(t, g, 0, 200)
	stopAndVerify(t, g, 0)
}

func TestResetAndReboot(t *testing.T) {
	disk := daemon.Disk{ID: "disk0", Image: emptyImage(t, 64*mib), Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	opts := mixed
	opts.ZeroPercent = 0 // zeros do not tell whether they are newer than a table taken under load
	var table *load.Table
	for i, restart := range []func() error{g.Reset, g.Reboot, g.Reset} {
		must(t, g.StartWriter(0, opts, nil))
		progress(t, g, 0, 200)
		var err error
		table, err = g.WriterTable(0)
		must(t, err)
		must(t, restart())
		if err := g.Verify(0, table, true); err != nil {
			t.Fatalf("restart %d: %v", i, err)
		}
		run(t, g, "dd if=/dev/zero of=/dev/vda bs=1M count=64 oflag=direct")
	}
}

// TestKillUnderLoad kills the daemon at random moments while a guest writes.
// With BLKSTREAM_SOAK (a duration) it goes on for that long.
func TestKillUnderLoad(t *testing.T) {
	disk := daemon.Disk{ID: "disk0", Image: emptyImage(t, 64*mib), Queues: 2}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	opts := mixed
	opts.Depth = 8
	must(t, g.StartWriter(0, opts, nil))
	end := time.Now()
	if soak := os.Getenv("BLKSTREAM_SOAK"); soak != "" {
		length, err := time.ParseDuration(soak)
		must(t, err)
		end = end.Add(length)
	}
	for round := 1; round <= 4 || time.Now().Before(end); round++ {
		progress(t, g, 0, uint64(1+rand.IntN(500)))
		must(t, d.Kill())
		time.Sleep(time.Duration(rand.IntN(300)) * time.Millisecond)
		must(t, d.Start())
	}
	progress(t, g, 0, 200)
	table := finish(t, d, g)
	verifyImage(t, disk.Image, table)
}

func TestResize(t *testing.T) {
	disk := daemon.Disk{ID: "disk0", Image: emptyImage(t, 64*mib)}
	d := start(t, disk)
	g := boot(t, d, guest.Options{}, disk)
	must(t, g.StartWriter(0, mixed, nil))
	cli(t, d, 0, "disk", "resize", "disk0", "96M")
	eventually(t, "the new size in the guest", func() (bool, error) {
		out, err := g.Run("cat /sys/block/vda/size")
		return strings.TrimSpace(out) == "196608", err
	})
	progress(t, g, 0, 100)
	stopAndVerify(t, g, 0)
	// A writer over the whole disk reaches the new end.
	must(t, g.StartWriter(0, load.Options{Sequential: true, MaxBlocks: 64, Seed: 2}, nil))
	progress(t, g, 0, 2000)
	table := stopAndVerify(t, g, 0)
	if table.Bytes() != 96*mib {
		t.Errorf("the guest's disk has %d bytes", table.Bytes())
	}
	g.Quit()
	must(t, d.Stop())
	verifyImage(t, disk.Image, table)
}
