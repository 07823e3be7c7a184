// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
)

// An image with tables must not be open in two places, so a disk that is only locked while it runs stays raw.
func TestLockRunningStaysRaw(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.qcow2")
	conf := strings.Replace(b.disk("disk0", old), "writeback", "none", 1) + "lock = \"running\"\n"
	d, c := b.start(b.load("", conf))
	_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Format: image.Qcow2})
	b.wants(err, control.ErrPrecondition, "running", "raw")
	if exists(target) {
		t.Error("a copy that was refused left a target")
	}
	b.stop(d)
}

// A target whose last block is not whole could be switched to, but not be served by the next daemon.
func TestTargetOfPartBlocks(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.img")
	b.must(file.Create(target, diskSize+512))
	d, c := b.start(b.load("", b.disk("disk0", old)+"block_size = 4096\n"))
	_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Existing: true})
	b.wants(err, control.ErrInvalid, target, "block_size")
	b.stop(d)
}
