// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// holey makes base.raw: 7 at the beginning, then a hole, then 7 again.
func (b *bed) holey() []byte {
	b.Helper()
	data := bytes.Repeat([]byte{7}, diskSize)
	clear(data[256<<10 : diskSize-128<<10])
	f, err := os.Create(b.path("base.raw"))
	b.must(err)
	defer f.Close()
	_, err = f.Write(data[:256<<10])
	b.must(err)
	_, err = f.WriteAt(data[diskSize-128<<10:], diskSize-128<<10)
	b.must(err)
	return data
}

// stale makes a file that holds what no disk holds.
func (b *bed) stale(name string, size int) string {
	b.Helper()
	b.must(os.WriteFile(b.path(name), bytes.Repeat([]byte{0xee}, size), 0o600))
	return b.path(name)
}

// isFile wants a file to be the disk, with what the guest wrote.
func (b *bed) isFile(path string, data []byte, written byte) {
	b.Helper()
	copy(data[8192:], bytes.Repeat([]byte{written}, 4096))
	got, err := os.ReadFile(path)
	b.must(err)
	if !bytes.Equal(got, data) {
		b.Errorf("%s is not the disk", path)
	}
}

func toAddCow(target string) *control.CopyRequest {
	return &control.CopyRequest{Disk: "a", Target: target, Method: methodStream, Format: image.AddCow, Id: "j", Existing: exists(target)}
}

// A guest goes on at once with the raw file on which it will be alone, whatever that held.
func TestCopyByStreamToAddCow(t *testing.T) {
	for _, size := range []int{0, diskSize, diskSize + 96<<10} {
		b := newBed(t)
		data := b.holey()
		target := b.path("target.raw")
		if size > 0 {
			b.stale("target.raw", size)
			data = append(data, make([]byte, size-diskSize)...)
		}
		f := b.load("", b.disk("a", b.path("base.raw")))
		d, c := b.start(f)
		j, err := c.Copy(b.Context(), toAddCow(target))
		b.must(err)
		if j.Target != target || j.Format != image.AddCow {
			t.Errorf("the job is %v", j)
		}
		b.write("a", 9)
		if j = b.wait(c, "j", job.StateCompleted); j.Error != "" || !strings.Contains(j.Message, "change line") {
			t.Errorf("completed: %v", j)
		}
		b.unused("base.raw")
		b.must(os.Remove(b.path("base.raw")))
		if exists(target + ".add-cow") {
			t.Error("the bitmap is still there")
		}
		b.holds("a", 9)
		if k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"}); err != nil || k.Size != int64(len(data)) || strings.Contains(k.Graph, "add-cow") {
			t.Errorf("the disk is %v, %v", k, err)
		}
		b.stop(d)
		if r := b.record("a"); r.Image != target || r.Format != image.Raw {
			t.Errorf("the record is %+v", r)
		}
		b.isFile(target, data, 9)
		d, _ = b.start(f)
		b.holds("a", 9)
		b.stop(d)
		f = b.load("", b.disk("a", target))
		d, c = b.start(f)
		b.holds("a", 9)
		_, err = c.DiskResize(b.Context(), &control.DiskResizeRequest{Id: "a", Size: 2 * diskSize})
		b.must(err)
		b.stop(d)
	}
}

// The daemon ends in between, and finds its way: while there is something to copy, and after the last step but one.
func TestCopyByStreamToAddCowResumed(t *testing.T) {
	b := newBed(t)
	b.must(os.WriteFile(b.path("base.raw"), bytes.Repeat([]byte{7}, diskSize), 0o600))
	target := b.path("target.raw")
	f := b.load("", b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	req := toAddCow(target)
	req.Speed = 1 << 20
	_, err := c.Copy(b.Context(), req)
	b.must(err)
	b.write("a", 9)
	running, err := os.ReadFile(b.path("state/jobs/j.json"))
	b.must(err)
	bitmap, err := os.ReadFile(target + ".add-cow")
	b.must(err)
	record, err := os.ReadFile(b.path("state/disks/a.json"))
	b.must(err)
	b.stop(d)
	if r := b.record("a"); r.Image != target+".add-cow" || r.Format != image.AddCow {
		t.Errorf("the record is %+v", r)
	}
	d, c = b.start(f)
	if j := b.wait(c, "j", job.StateRunning); !strings.Contains(j.Message, "started again") {
		t.Errorf("after a restart: %v", j)
	}
	b.holds("a", 9)
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j", Speed: 0})
	b.must(err)
	b.wait(c, "j", job.StateCompleted)
	b.stop(d)
	// The journal says that it runs, and the bitmap is there.
	b.must(os.WriteFile(b.path("state/jobs/j.json"), running, 0o600))
	b.must(os.WriteFile(target+".add-cow", bitmap, 0o600))
	d, c = b.start(f)
	if j := b.wait(c, "j", job.StateCompleted); j.Error != "" || exists(target+".add-cow") {
		t.Errorf("found complete: %v, or the bitmap is still there", j)
	}
	b.holds("a", 9)
	b.stop(d)
	// The journal says that it runs, and it has never begun.
	b.must(os.RemoveAll(b.path("state/disks")))
	b.must(os.WriteFile(b.path("state/jobs/j.json"), running, 0o600))
	d, c = b.start(f)
	if j := b.wait(c, "j", job.StateFailed); !strings.Contains(j.Message, target+".add-cow") {
		t.Errorf("found not begun: %v", j)
	}
	b.stop(d)
	// The bitmap says that it is not needed, and the disk's record is still the old one.
	bitmap[32] |= 1
	b.must(os.WriteFile(target+".add-cow", bitmap, 0o600))
	b.must(os.WriteFile(b.path("state/disks/a.json"), record, 0o600))
	b.must(os.WriteFile(b.path("state/jobs/j.json"), running, 0o600))
	b.must(os.Remove(b.path("base.raw")))
	d, c = b.start(f)
	b.wait(c, "j", job.StateCompleted)
	b.holds("a", 9)
	b.stop(d)
	if r := b.record("a"); r.Image != target || exists(target+".add-cow") {
		t.Errorf("the record is %+v, or the bitmap is still there", r)
	}
}

// A copy that was cancelled leaves the disk over its source; streaming it is the rest of the copy.
func TestCopyByStreamToAddCowCancelled(t *testing.T) {
	b := newBed(t)
	data := b.holey()
	target := b.stale("target.raw", diskSize)
	f := b.load("", b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	req := toAddCow(target)
	req.Speed = 64 << 10
	_, err := c.Copy(b.Context(), req)
	b.must(err)
	_, err = c.Snapshot(b.Context(), &control.SnapshotRequest{Disks: []*control.SnapshotDisk{{Disk: "a", Overlay: b.path("o")}}})
	b.wants(err, control.ErrPrecondition, "job j works on disk")
	_, err = c.JobCancel(b.Context(), &control.JobCancelRequest{Id: "j"})
	b.must(err)
	b.wait(c, "j", job.StateCancelled)
	b.write("a", 9)
	b.stop(d)
	d, c = b.start(f)
	b.holds("a", 9)
	_, err = c.DiskResize(b.Context(), &control.DiskResizeRequest{Id: "a", Size: 2 * diskSize})
	b.wants(err, control.ErrPrecondition, "image file")
	_, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Base: b.path("base.raw")})
	b.wants(err, control.ErrInvalid, "no base can stay")
	_, err = c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Target: b.path("x")})
	b.wants(err, control.ErrInvalid, "method mirror")
	_, err = c.Commit(b.Context(), &control.CommitRequest{Disk: "a"})
	b.wants(err, control.ErrInvalid, "add-cow image, which can neither")
	j, err := c.Stream(b.Context(), &control.StreamRequest{Disk: "a"})
	b.must(err)
	if j.Target != target || j.Source != b.path("base.raw") {
		t.Errorf("the stream is %v", j)
	}
	b.wait(c, j.Id, job.StateCompleted)
	if exists(target + ".add-cow") {
		t.Error("the bitmap is still there")
	}
	b.stop(d)
	b.isFile(target, data, 9)
}

// A disk of the configuration: its bitmap stays, and says that it is not needed; without a state directory's memory of
// the move, the disk is served as before.
func TestAddCowDisk(t *testing.T) {
	b := newBed(t)
	data := b.holey()
	b.must(image.Create(b.Context(), b.path("a.add-cow"), image.CreateOptions{Format: image.AddCow, ImageFile: "image.raw", CreateOptions: qcow2.CreateOptions{
		Size: -1, BackingFile: "base.raw", BackingFormat: image.Raw,
	}}))
	f := b.load("", strings.Replace(b.disk("a", b.path("a.add-cow")), `"raw"`, `"add-cow"`, 1)+"copy_on_read = true\n")
	d, c := b.start(f)
	if g := b.graph(c); !strings.HasPrefix(g, "copy-on-read") || !strings.Contains(g, "add-cow") {
		t.Errorf("the graph is\n%s", g)
	}
	b.write("a", 9)
	j, err := c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s"})
	b.must(err)
	if j = b.wait(c, j.Id, job.StateCompleted); !strings.Contains(j.Message, "image.raw needs no other image") || !strings.Contains(j.Message, `format = "raw"`) {
		t.Errorf("completed: %v", j)
	}
	b.stop(d)
	b.isFile(b.path("image.raw"), data, 9)
	b.must(os.Remove(b.path("base.raw")))
	b.must(os.RemoveAll(b.path("state/disks")))
	d, c = b.start(f)
	b.holds("a", 9)
	j, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "again"})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	if r := b.record("a"); r.Image != b.path("image.raw") || !exists(b.path("a.add-cow")) {
		t.Errorf("the record is %+v", r)
	}
	b.holds("a", 9)
	b.stop(d)
}

// A snapshot of a disk on an add-cow image, and its copies to other formats.
func TestAddCowSnapshotAndCopy(t *testing.T) {
	b := newBed(t)
	data := b.holey()
	b.must(image.Create(b.Context(), b.path("a.add-cow"), image.CreateOptions{Format: image.AddCow, ImageFile: b.path("image.raw"), CreateOptions: qcow2.CreateOptions{
		Size: -1, BackingFile: "base.raw", BackingFormat: image.Raw,
	}}))
	f := b.load("", strings.Replace(b.disk("a", b.path("a.add-cow")), `"raw"`, `"add-cow"`, 1))
	d, c := b.start(f)
	b.write("a", 8)
	_, err := b.snapshot(c, "a", b.path("top.qcow2"))
	b.must(err)
	b.holds("a", 8)
	b.write("a", 9)
	b.stop(d)
	b.imageHolds(b.path("a.add-cow"), image.AddCow, 8)
	b.imageHolds(b.path("top.qcow2"), image.Qcow2, 9)
	d, c = b.start(f)
	b.holds("a", 9)
	_, err = c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Target: b.path("flat.raw"), Format: image.Raw, SwitchMode: "auto", Verify: true, Id: "m"})
	b.must(err)
	b.wait(c, "m", job.StateCompleted)
	b.stop(d)
	b.isFile(b.path("flat.raw"), data, 9)
}

func TestAddCowCopyRefused(t *testing.T) {
	b := newBed(t)
	b.holey()
	f := b.load("image_roots = ["+`"`+b.dir+`"]`, b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	refuse := func(change func(*control.CopyRequest), kind error, says string) {
		t.Helper()
		r := toAddCow(b.path("target.raw"))
		change(r)
		_, err := c.Copy(b.Context(), r)
		b.wants(err, kind, says)
		if exists(b.path("target.raw.add-cow")) || exists(b.path("new.raw")) {
			t.Error("something is left")
		}
	}
	refuse(func(r *control.CopyRequest) { r.Method = methodMirror }, control.ErrInvalid, "method stream")
	refuse(func(r *control.CopyRequest) { r.Base = b.path("base.raw") }, control.ErrInvalid, "no base can stay")
	refuse(func(r *control.CopyRequest) { r.ClusterSize = 4096 }, control.ErrInvalid, "made by the job")
	refuse(func(r *control.CopyRequest) { r.Target = "/etc/new" }, control.ErrInvalid, "image_roots")
	b.stale("target.raw", diskSize-4096)
	refuse(func(r *control.CopyRequest) { r.Existing = false }, control.ErrExists, "--existing")
	refuse(func(r *control.CopyRequest) { r.Existing = true }, control.ErrInvalid, "are needed")
	b.must(os.WriteFile(b.path("new.raw.add-cow"), nil, 0o600))
	refuse(func(r *control.CopyRequest) { r.Target = b.path("new.raw") }, control.ErrExists, "new.raw.add-cow exists")
	if k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"}); err != nil || k.Image != b.path("base.raw") {
		t.Errorf("the disk is %v, %v", k, err)
	}
	b.holds("a", 7)
	b.stop(d)
}

// The bitmap of a device is in the state directory, which need not be one of the image roots.
func TestAddCowBitmapName(t *testing.T) {
	b := newBed(t)
	b.holey()
	f := b.load("image_roots = ["+`"`+b.path("images")+`"]`, "")
	d, _ := b.start(f)
	r := job.Record{ID: "j", Target: "/dev/null"}
	path, err := d.bitmapPath(r)
	b.must(err)
	if path != b.path("state/add-cow/j.add-cow") || !exists(filepath.Dir(path)) {
		t.Errorf("it is %s", path)
	}
	b.must(d.checkRoots(path))
	if _, err := d.bitmapPath(job.Record{ID: "j", Target: b.path("base.raw")}); err == nil {
		t.Error("a file outside the roots")
	}
	b.stop(d)
}

// loop makes a block device of a file.
func (b *bed) loop(path string) string {
	b.Helper()
	out, err := exec.Command("losetup", "-f", "--show", path).Output()
	if errors.Is(err, exec.ErrNotFound) && os.Getenv("CI") != "" {
		b.Fatal(err)
	}
	if err != nil {
		b.Skipf("no loop devices here: %v", err)
	}
	device := strings.TrimSpace(string(out))
	b.Cleanup(func() { b.must(exec.Command("losetup", "-d", device).Run()) })
	return device
}

// A block device is the target, with an older disk on it. Its bitmap is in the state directory.
func TestCopyByStreamToDevice(t *testing.T) {
	b := newBed(t)
	data := b.holey()
	device := b.loop(b.stale("backing", diskSize))
	f := b.load("", b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	r := toAddCow(device)
	r.Existing, r.Speed = false, 1<<20
	_, err := c.Copy(b.Context(), r)
	b.must(err)
	if !exists(b.path("state/add-cow/j.add-cow")) {
		t.Error("the bitmap is not in the state directory")
	}
	b.write("a", 9)
	b.stop(d)
	d, c = b.start(f)
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j", Speed: 0})
	b.must(err)
	b.wait(c, "j", job.StateCompleted)
	b.holds("a", 9)
	b.stop(d)
	if rec := b.record("a"); rec.Image != device || exists(b.path("state/add-cow/j.add-cow")) {
		t.Errorf("the record is %+v, or the bitmap is still there", rec)
	}
	b.isFile(device, data, 9)
}
