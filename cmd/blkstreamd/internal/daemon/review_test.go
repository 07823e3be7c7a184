// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// A stream on an add-cow image copies into that, though its target is the image file.
func TestChainAddCowJob(t *testing.T) {
	b := newBed(t)
	b.holey()
	_, c := b.start(b.load("", b.disk("a", b.path("base.raw"))))
	r := toAddCow(b.path("target.raw"))
	r.Speed = 1
	_, err := c.Copy(b.Context(), r)
	b.must(err)
	k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	for i, want := range []string{roleTarget, roleSource} {
		if l := k.Chain[i].Jobs; len(l) != 1 || l[0].Role != want {
			t.Errorf("image %d is %v, want %s", i, l, want)
		}
	}
}

// What the daemon says to write into the configuration is accepted: a bitmap of a device is in the state directory, which
// is outside the image roots.
func TestBitmapOfDeviceConfigured(t *testing.T) {
	b := newBed(t)
	b.must(os.MkdirAll(b.path("state/add-cow"), 0o700))
	b.must(os.Mkdir(b.path("images"), 0o700))
	b.must(os.WriteFile(b.path("images/base"), bytes.Repeat([]byte{7}, diskSize), 0o600))
	b.must(image.Create(b.Context(), b.path("state/add-cow/j.add-cow"), image.CreateOptions{
		Format: image.AddCow, ImageFile: b.path("images/raw"),
		CreateOptions: qcow2.CreateOptions{Size: -1, BackingFile: b.path("images/base"), BackingFormat: image.Raw},
	}))
	disk := fmt.Sprintf("[[disk]]\nid = \"a\"\nsocket = %q\nimage = %q\nformat = \"add-cow\"\n", b.path("a.sock"), b.path("state/add-cow/j.add-cow"))
	f := b.load(fmt.Sprintf("image_roots = [%q]", b.path("images")), disk)
	b.must(Check(f))
	d, _ := b.start(f)
	b.holds("a", 7)
	b.stop(d)
}

// The daemon dies between the last two steps of a copy by stream: the bitmap says that it is not needed, the record does
// not say so yet. The source may be gone by then.
func TestCopyByStreamToAddCowDiesBeforeRecord(t *testing.T) {
	b := newBed(t)
	data := b.holey()
	target := b.stale("target.raw", diskSize+96<<10)
	data = append(data, make([]byte, 96<<10)...)
	f := b.load("", b.disk("a", b.path("base.raw")))
	d, c := b.start(f)
	b.addBitmap(c, "a", "m", 4096)
	req := toAddCow(target)
	req.Speed = 1 << 20
	_, err := c.Copy(b.Context(), req)
	b.must(err)
	b.write("a", 9)
	b.writeAt("a", diskSize+64<<10) // in the part that is new
	running, err := os.ReadFile(b.path("state/jobs/j.json"))
	b.must(err)
	disk, err := os.ReadFile(b.path("state/disks/a.json"))
	b.must(err)
	_, err = c.JobPause(b.Context(), &control.JobPauseRequest{Id: "j"})
	b.must(err)
	bitmap, err := os.ReadFile(target + ".add-cow")
	b.must(err)
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j", Speed: 0})
	b.must(err)
	_, err = c.JobResume(b.Context(), &control.JobResumeRequest{Id: "j"})
	b.must(err)
	b.wait(c, "j", job.StateCompleted)
	b.stop(d)
	bitmap[32] |= 1 // all allocated; the bits do not count then
	clear(bitmap[65536:])
	b.must(os.WriteFile(target+".add-cow", bitmap, 0o600))
	b.must(os.WriteFile(b.path("state/jobs/j.json"), running, 0o600))
	b.must(os.WriteFile(b.path("state/disks/a.json"), disk, 0o600))
	b.must(os.Remove(b.path("base.raw")))
	d, c = b.start(f)
	if j := b.wait(c, "j", job.StateCompleted); j.Error != "" || exists(target+".add-cow") {
		t.Errorf("%v, or the bitmap is still there", j)
	}
	b.holds("a", 9)
	b.stop(d)
	if r := b.record("a"); r.Image != target || r.Format != image.Raw {
		t.Errorf("the record is %+v", r)
	}
	b.isFile(target, data, 9)
}

// Targets that somebody needs, by another name.
func TestCopyByStreamToAddCowInUse(t *testing.T) {
	b := newBed(t)
	b.holey()
	_, c := b.start(b.load("", b.disk("a", b.path("base.raw")), b.disk("b", b.image("b.raw")), b.disk("c", b.image("c.raw"))))
	req := toAddCow(b.path("target.raw"))
	req.Speed = 1
	_, err := c.Copy(b.Context(), req)
	b.must(err)
	req = toAddCow(b.path("b2.raw"))
	req.Disk, req.Id = "b", "k"
	_, err = c.Copy(b.Context(), req)
	b.must(err)
	b.wait(c, "k", job.StateCompleted)
	for _, name := range []string{"target.raw", "target.raw.add-cow", "base.raw", "b2.raw", "c.raw"} {
		for _, link := range []func(from, to string) error{os.Link, os.Symlink} {
			to := b.path("link")
			b.must(link(b.path(name), to))
			before, err := os.ReadFile(to)
			b.must(err)
			req := toAddCow(to)
			req.Disk, req.Id = "c", ""
			if _, err := c.Copy(b.Context(), req); err == nil {
				t.Errorf("copied onto %s", name)
			}
			after, err := os.ReadFile(to)
			b.must(err)
			if !bytes.Equal(before, after) || exists(to+".add-cow") {
				t.Errorf("%s has changed, or a bitmap is left", name)
			}
			b.must(os.Remove(to))
		}
	}
}
