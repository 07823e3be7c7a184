// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/test/guest"
	"github.com/blkstream/blkstream/test/guest/load"
)

// Two disks of one guest are covered at the same instant, again and again, while it writes to both.
func TestSnapshotUnderLoad(t *testing.T) {
	image1, filled1 := filledImage(t, 64*mib)
	base, filled2 := filledImage(t, 48*mib)
	image2, middle := overlay(t, base)
	dir := t.TempDir()
	at := func(disk, n int) string { return filepath.Join(dir, fmt.Sprintf("%d-%d.qcow2", disk, n)) }
	disks := []daemon.Disk{{ID: "disk0", Image: image1, Queues: 2}, {ID: "disk1", Image: image2, Format: "qcow2", Queues: 2}}
	d := start(t, disks...)
	g := boot(t, d, guest.Options{}, disks...)
	must(t, g.StartWriter(0, mixed, filled1))
	must(t, g.StartWriter(1, mixed, filled2))
	const times = 4
	for i := range times {
		progress(t, g, 0, 100)
		progress(t, g, 1, 100)
		out := cli(t, d, 0, "--json", "snapshot", "disk0="+at(0, i), "disk1="+at(1, i))
		var res struct {
			Paused float64 `json:"paused_ms"`
			Taken  []struct{ Overlay, Backing string }
		}
		must(t, json.Unmarshal([]byte(out), &res))
		if res.Paused <= 0 || len(res.Taken) != 2 || res.Taken[1].Overlay != at(1, i) {
			t.Errorf("snapshot says %s", out)
		}
		t.Logf("paused for %.1f ms", res.Paused)
	}
	progress(t, g, 0, 100)
	progress(t, g, 1, 100)
	table1, table2 := stopAndVerify(t, g, 0), stopAndVerify(t, g, 1)
	// What the guest sees now is kept, whatever it writes next.
	cli(t, d, 0, "snapshot", "disk0="+at(0, times), "disk1="+at(1, times))
	must(t, g.StartWriter(0, mixed, table1))
	must(t, g.StartWriter(1, mixed, table2))
	progress(t, g, 0, 200)
	progress(t, g, 1, 200)
	last1, last2 := stopAndVerify(t, g, 0), stopAndVerify(t, g, 1)
	g.Quit()
	must(t, d.Stop())

	verifyQcow2(t, at(0, times), last1)
	verifyQcow2(t, at(1, times), last2)
	verifyQcow2(t, at(0, times-1), table1)
	verifyQcow2(t, at(1, times-1), table2)
	for i := range times + 1 {
		for disk := range 2 {
			want, format := at(disk, i-1), "qcow2"
			if i == 0 {
				want, format = []string{image1, image2}[disk], []string{"raw", "qcow2"}[disk]
			}
			checkQcow2(t, at(disk, i), false)
			if name, f := backingOf(t, at(disk, i)); name != want || f != format {
				t.Errorf("behind %s is %s (%s), want %s (%s)", at(disk, i), name, f, want, format)
			}
		}
	}
	checkQcow2(t, image2, false)
	checkQcow2(t, middle, false)
	verifyImage(t, base, filled2)
}

// Both disks of a guest hold a counter, and no disk's is ever ahead of the other's by more than one: the guest syncs
// one before it writes the other. So it must be in the images of one snapshot.
func TestSnapshotAtOneInstant(t *testing.T) {
	dir := t.TempDir()
	disks := []daemon.Disk{{ID: "disk0", Image: emptyImage(t, 16*mib)}, {ID: "disk1", Image: emptyImage(t, 16*mib)}}
	d := start(t, disks...)
	g := boot(t, d, guest.Options{}, disks...)
	run(t, g, `(i=1; while [ ! -e /tmp/stop ]; do for k in vda vdb; do printf '%08d' $i | dd of=/dev/$k conv=notrunc,fsync bs=8 count=1 2>/dev/null; done; i=$((i+1)); done; touch /tmp/stopped) >/dev/null 2>&1 &`)
	counter := func(path string) (n int) {
		f, err := os.Open(path)
		must(t, err)
		defer f.Close()
		b := make([]byte, 8)
		_, err = f.Read(b)
		must(t, err)
		fmt.Sscanf(string(b), "%d", &n) //nolint:errcheck // none is 0
		return n
	}
	eventually(t, "the counter", func() (bool, error) { return counter(disks[1].Image) > 2, nil })
	images := [2]string{disks[0].Image, disks[1].Image}
	for i := range 5 {
		time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
		var next [2]string
		args := []string{"snapshot"}
		for k := range next {
			next[k] = filepath.Join(dir, fmt.Sprint(i, "-", k))
			args = append(args, fmt.Sprintf("disk%d=%s", k, next[k]))
		}
		cli(t, d, 0, args...)
		var n [2]int
		for k := range images {
			if i == 0 {
				n[k] = counter(images[k])
				continue
			}
			flat := filepath.Join(dir, fmt.Sprint("flat", k))
			tool(t, "image", "convert", "-f", "qcow2", "-O", "raw", images[k], flat)
			n[k] = counter(flat)
			must(t, os.Remove(flat))
		}
		if n[0] != n[1] && n[0] != n[1]+1 {
			t.Errorf("snapshot %d: the disks hold %d and %d", i, n[0], n[1])
		}
		images = next
	}
	run(t, g, "touch /tmp/stop; while [ ! -e /tmp/stopped ]; do sleep 0.1; done")
}

// The daemon is killed around snapshots: all disks are on their old images then, or all on their overlays, and nothing
// is lost that the guest was told is done.
func TestSnapshotKill(t *testing.T) {
	image1, filled1 := filledImage(t, 32*mib)
	image2, filled2 := filledImage(t, 32*mib)
	dir := t.TempDir()
	disks := []daemon.Disk{{ID: "disk0", Image: image1, Queues: 2}, {ID: "disk1", Image: image2, Queues: 2}}
	d := start(t, disks...)
	g := boot(t, d, guest.Options{}, disks...)
	must(t, g.StartWriter(0, mixed, filled1))
	must(t, g.StartWriter(1, mixed, filled2))
	took := 0
	for i := range 8 {
		progress(t, g, 0, 50)
		progress(t, g, 1, 50)
		overlays := [2]string{filepath.Join(dir, fmt.Sprint(i, "a")), filepath.Join(dir, fmt.Sprint(i, "b"))}
		cmd := d.Command(t.Context(), "snapshot", "disk0="+overlays[0], "disk1="+overlays[1])
		must(t, cmd.Start())
		eventually(t, "the first overlay", func() (bool, error) {
			_, err := os.Stat(overlays[0])
			return err == nil, nil
		})
		time.Sleep(time.Duration(rand.IntN(150)) * time.Millisecond)
		must(t, d.Kill())
		answered := cmd.Wait() == nil
		must(t, d.Start())
		a, err := d.Disk("disk0")
		must(t, err)
		b, err := d.Disk("disk1")
		must(t, err)
		onA, onB := a.Image == overlays[0], b.Image == overlays[1]
		if onA != onB || answered && !onA {
			t.Fatalf("after a crash (answered: %v) disk0 is on %s, disk1 on %s", answered, a.Image, b.Image)
		}
		if onA {
			took++
		}
	}
	t.Logf("%d of 8 snapshots had taken place", took)
	cli(t, d, 0, "snapshot", "disk0="+filepath.Join(dir, "a"), "disk1="+filepath.Join(dir, "b"))
	progress(t, g, 0, 100)
	progress(t, g, 1, 100)
	table1, table2 := stopAndVerify(t, g, 0), stopAndVerify(t, g, 1)
	g.Quit()
	must(t, d.Stop())
	for name, table := range map[string]*load.Table{"a": table1, "b": table2} {
		checkQcow2(t, filepath.Join(dir, name), true)
		verifyQcow2(t, filepath.Join(dir, name), table)
	}
}
