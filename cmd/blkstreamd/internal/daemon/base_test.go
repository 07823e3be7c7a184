// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// put writes 4 KiB at 8192 into an image that nobody uses.
func (b *bed) put(path, format string, fill byte) {
	b.Helper()
	img, err := image.Open(blk.NewTask(), path, format, image.Options{})
	b.must(err)
	buf := blk.GetBuffer(4096)
	defer buf.Free()
	for i := range buf.B {
		buf.B[i] = fill
	}
	b.must(blk.Do(blk.NewTask(), img.Root, &blk.Request{Op: blk.OpWrite, Off: 8192, Len: 4096, Data: blk.BytesVec(nil, buf.B)}))
	b.must(img.Close())
}

// overlay makes an empty overlay of a raw image.
func (b *bed) overlay(name, base string) string {
	b.Helper()
	b.must(image.Create(context.Background(), b.path(name), image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{
		Size: diskSize, BackingFile: base, BackingFormat: image.Raw,
	}}))
	return b.path(name)
}

// Where only the shared base holds something, the target may hold something else: it was used before, or by a copy that
// was killed between the target's half of a guest's write and the source's.
func TestSharedBaseWithLeftovers(t *testing.T) {
	b := newBed(t)
	base := b.image("base.img")
	b.put(base, image.Raw, 1)
	top, target := b.overlay("top.qcow2", base), b.overlay("target.qcow2", base)
	b.put(target, image.Qcow2, 2)
	d, c := b.start(b.load("", strings.Replace(b.disk("disk0", top), `"raw"`, `"qcow2"`, 1)))
	b.holds("disk0", 1)
	j, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Existing: true, Base: base})
	b.must(err)
	b.wait(c, j.Id, job.StateReady)
	_, err = c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"})
	b.must(err)
	b.holds("disk0", 1)
	b.stop(d)
}

// The configuration names other images behind the shared base than that does itself. Behind the target, only the base
// would say what is there.
func TestSharedBaseOverOtherImages(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	b.must(os.WriteFile(b.path("old.raw"), bytes.Repeat([]byte{9}, diskSize), 0o600))
	b.must(image.Rebase(t.Context(), b.path("middle.qcow2"), image.RebaseOptions{
		Layer: image.Layer{Path: "old.raw", Format: image.Raw}, Unsafe: true,
	}))
	d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2", fmt.Sprintf(
		"backing = [{ image = %q, format = \"qcow2\" }, { image = %q, format = \"raw\" }]", b.path("middle.qcow2"), b.path("base.raw")))))
	b.holds("a", 7)
	_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "a", Target: b.path("target"), Base: b.path("middle.qcow2")})
	b.wants(err, control.ErrInvalid, b.path("target"), b.path("old.raw"), b.path("base.raw"))
	if exists(b.path("target")) {
		t.Error("the target was left behind")
	}
	b.holds("a", 7)
	// Behind the last one nothing can be different.
	j, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "a", Target: b.path("target"), Base: b.path("base.raw")})
	b.must(err)
	b.wait(c, j.Id, job.StateReady)
	_, err = c.Switch(t.Context(), &control.SwitchRequest{Target: "a"})
	b.must(err)
	b.holds("a", 7)
	b.stop(d)
}
