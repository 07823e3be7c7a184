// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

func (b *bed) eventually(what string, ok func() bool) {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.Fatalf("%s does not come\n%s", what, b.log.String())
		}
	}
}

// A record that is damaged, however little, keeps the daemon from starting, and is named: a disk may have moved.
func TestDamagedRecords(t *testing.T) {
	for _, name := range []string{"disks/disk0", "disks/added", "jobs/j", "snapshots/disk0"} {
		for _, text := range []string{"{}", "null", `{"format":"raw"}`, "", "\x00\x00", `{"image":"/x"`, `{"image":7}`, `{"id":"k"}`, `{"moves":[{"disk":"disk0"}]}`} {
			b := newBed(t)
			f := b.load("", b.disk("disk0", b.image("a.img")))
			d, _ := b.start(f)
			b.stop(d)
			path := b.path("state/" + name + ".json")
			b.must(os.MkdirAll(filepath.Dir(path), 0o700))
			b.must(os.WriteFile(path, []byte(text), 0o600))
			b.refused(f, path, "damaged")
		}
	}
}

// Disks and jobs that come and go leave neither descriptors nor goroutines.
func TestNothingLeaks(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.disk("disk0", b.image("a.img"))))
	added := b.image("b.img")
	cycle := func(i int) {
		_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{
			Id: "k", Image: added, Format: image.Raw, Socket: b.path("k.sock"), Cache: "writeback",
		})
		b.must(err)
		b.write("k", byte(i))
		_, err = c.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "k", Target: b.path("target")})
		b.must(err)
		if i%2 == 0 {
			b.wait(c, "j", job.StateReady)
		}
		_, err = c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "j"})
		b.must(err)
		_, err = c.JobDismiss(t.Context(), &control.JobDismissRequest{Id: "j"})
		b.must(err)
		b.must(os.Remove(b.path("target")))
		b.eventually("the guest's end", func() bool {
			k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "k"})
			b.must(err)
			return k.State == "idle"
		})
		_, err = c.DiskRemove(t.Context(), &control.DiskRemoveRequest{Id: "k"})
		b.must(err)
	}
	count := func() (fds, goroutines int) {
		all, err := os.ReadDir("/proc/self/fd")
		b.must(err)
		return len(all), runtime.NumGoroutine()
	}
	for i := range 4 {
		cycle(i)
	}
	fds, goroutines := count()
	for i := range 20 {
		cycle(i)
	}
	b.eventually("the end of what a cycle begins", func() bool {
		f, g := count()
		return f < fds+10 && g < goroutines+10
	})
	b.stop(d)
}

// While the state directory may name the target, though the switch has failed and the old record cannot be written again, the
// job does not end: what the guest writes goes to both images, whichever of them the next daemon takes.
func TestSwitchUnsure(t *testing.T) {
	b := newBed(t)
	source, target := b.full("source"), b.path("target")
	d, c := b.start(b.load("", b.disk("disk0", source)))
	_, err := c.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target})
	b.must(err)
	b.wait(c, "j", job.StateReady)
	k, err := d.find("disk0")
	b.must(err)
	k.mu.Lock()
	k.unsure = true // as after a folder's fsync that failed
	k.mu.Unlock()
	disks := b.path("state/disks")
	b.must(os.Rename(disks, disks+".away"))
	b.must(os.WriteFile(disks, nil, 0o600))
	_, err = c.Switch(t.Context(), &control.SwitchRequest{Target: "j"})
	if err == nil {
		t.Fatal("the switch did not fail")
	}
	ended := make(chan error, 1)
	go func() {
		_, err := c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "j"})
		ended <- err
	}()
	b.eventually("the reason", func() bool { return strings.Contains(b.job(c).Message, "cannot end") })
	b.write("disk0", 5)
	for _, path := range []string{source, target} {
		if got, err := os.ReadFile(path); err != nil || got[8192] != 5 {
			b.Errorf("%s does not have the guest's write: %v", path, err)
		}
	}
	b.must(os.Remove(disks))
	b.must(os.Rename(disks+".away", disks))
	b.must(<-ended)
	if r := b.record("disk0"); r.Image != source {
		t.Errorf("the record names %s", r.Image)
	}
	b.write("disk0", 6)
	b.stop(d)
	b.imageHolds(source, image.Raw, 6)
}
