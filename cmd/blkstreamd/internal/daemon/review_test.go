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
