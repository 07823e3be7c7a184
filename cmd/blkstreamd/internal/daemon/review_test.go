// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

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

// A chain of QEMU's with compressed and zero clusters, of which the last image is short, goes to a larger file with old
// contents while a guest writes and discards; the daemon dies once in between.
func TestCopyByStreamToAddCowOfChain(t *testing.T) {
	b := newBed(t)
	start := uint64(time.Now().UnixNano())
	t.Log("seed", start)
	rng := rand.New(rand.NewPCG(start, 1))
	seed := make([]byte, 3<<20-1536)
	for i := range seed {
		seed[i] = byte(1 + i/700%250)
	}
	b.must(os.WriteFile(b.path("seed"), seed, 0o600))
	b.qemu("qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", b.path("seed"), b.path("base.qcow2"))
	b.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", b.path("base.qcow2"), "-F", "qcow2", b.path("mid.qcow2"), fmt.Sprint(diskSize-512))
	b.qemu("qemu-io", "-f", "qcow2", "-c", "write -z 128k 192k", "-c", "write -P 0xaa 1000k 100k", "-c", "write -P 0xbb 3500k 64k", b.path("mid.qcow2"))
	b.qemu("qemu-img", "dd", "-f", "qcow2", "-O", "raw", "if="+b.path("mid.qcow2"), "of="+b.path("model"), "bs=512")
	want, err := os.ReadFile(b.path("model"))
	b.must(err)
	size := diskSize + 31*512
	want = append(want, make([]byte, size-len(want))...)
	target := b.stale("target.raw", size)
	f := b.load("", b.layeredDisk("a", "mid.qcow2", "copy_on_read = true", "discard = true"))
	d, c := b.start(f)
	req := toAddCow(target)
	req.Speed = 256 << 10
	_, err = c.Copy(b.Context(), req)
	b.must(err)
	play := func() {
		g := b.guest("a")
		defer g.Close()
		for range 60 {
			off := rng.Int64N(int64(size/512)) * 512
			n := min(512*(1+rng.Int64N(200)), int64(size)-off)
			switch rng.IntN(5) {
			case 0, 1:
				p := bytes.Repeat([]byte{byte(rng.IntN(256))}, int(n))
				_, err := g.WriteAt(p, off)
				b.must(err)
				copy(want[off:], p)
			case 2:
				b.must(g.WriteZeroes(off, n, rng.IntN(2) == 0))
				clear(want[off : off+n])
			case 3:
				b.must(g.Discard(off, n))
				_, err := g.ReadAt(want[off:off+n], off) // the old contents or zeros
				b.must(err)
			case 4:
				p := make([]byte, n)
				_, err := g.ReadAt(p, off)
				b.must(err)
				if !bytes.Equal(p, want[off:off+n]) {
					t.Errorf("the guest reads something else at %d+%d", off, n)
				}
			}
		}
	}
	play()
	_, err = c.JobPause(b.Context(), &control.JobPauseRequest{Id: "j"})
	b.must(err)
	play()
	time.Sleep(50 * time.Millisecond)
	b.crash(d)
	d, c = b.start(f)
	play()
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j", Speed: 0})
	b.must(err)
	_, err = c.JobResume(b.Context(), &control.JobResumeRequest{Id: "j"})
	b.must(err)
	play()
	b.wait(c, "j", job.StateCompleted)
	play()
	b.stop(d)
	got, err := os.ReadFile(target)
	b.must(err)
	if !bytes.Equal(got, want) {
		t.Error("the target is not the disk")
	}
}

// The configuration names the image file before that holds the disk: once the daemon has seen the add-cow image there, no
// record of a move warns of it.
func TestAddCowImageFileConfiguredTooEarly(t *testing.T) {
	b := newBed(t)
	b.holey()
	target := b.path("target.raw")
	d, c := b.start(b.load("", b.disk("a", b.path("base.raw"))))
	req := toAddCow(target)
	req.Speed = 1
	_, err := c.Copy(b.Context(), req)
	b.must(err)
	b.write("a", 9)
	b.stop(d)
	both := b.load("", strings.Replace(b.disk("a", target+".add-cow"), `"raw"`, `"add-cow"`, 1))
	d, _ = b.start(both)
	b.stop(d)
	early := b.load("", b.disk("a", target))
	b.refused(early, "does not hold all of it yet", target+".add-cow")
	d, c = b.start(b.load("", strings.Replace(b.disk("a", target+".add-cow"), `"raw"`, `"add-cow"`, 1)))
	b.holds("a", 9)
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j", Speed: 0})
	b.must(err)
	b.wait(c, "j", job.StateCompleted)
	b.stop(d)
	d, _ = b.start(b.load("", b.disk("a", target)))
	b.holds("a", 9)
	b.stop(d)
}
