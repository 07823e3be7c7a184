// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
)

// qcow2 makes an empty qcow2 image.
func (b *bed) qcow2(name, backing, format string) string {
	b.Helper()
	b.must(image.Create(b.Context(), b.path(name), image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{
		Size: diskSize, BackingFile: backing, BackingFormat: format,
	}}))
	return b.path(name)
}

// qcow2Disk is a [[disk]] table; more are further lines.
func (b *bed) qcow2Disk(id, image, more string) string {
	return strings.Replace(b.disk(id, image), `"raw"`, `"qcow2"`, 1) + more
}

func (b *bed) snapshot(c *control.Client, disks ...string) (*control.SnapshotResponse, error) {
	r := &control.SnapshotRequest{}
	for i := 0; i < len(disks); i += 2 {
		r.Disks = append(r.Disks, &control.SnapshotDisk{Disk: disks[i], Overlay: disks[i+1]})
		r.Existing = r.Existing || exists(disks[i+1])
	}
	return c.Snapshot(b.Context(), r)
}

// imageHolds reads an image that no daemon uses.
func (b *bed) imageHolds(path, format string, fill byte) {
	b.Helper()
	g, err := image.Open(blk.NewTask(), path, format, image.Options{ReadOnly: true})
	b.must(err)
	defer g.Close()
	got := make([]byte, 4096)
	b.must(blk.Do(blk.NewTask(), g.Root, &blk.Request{Op: blk.OpRead, Off: 8192, Len: 4096, Data: blk.BytesVec(nil, got)}))
	if !bytes.Equal(got, bytes.Repeat([]byte{fill}, 4096)) {
		b.Errorf("%s holds %#x, want %#x", path, got[0], fill)
	}
}

// sound wants a qcow2 image without errors and without leaks.
func (b *bed) sound(path string) {
	b.Helper()
	r, err := image.Check(b.Context(), path, image.Qcow2, qcow2.RepairNone, nil, nil)
	b.must(err)
	if r.Errors != 0 || r.Leaks != 0 {
		b.Errorf("%s: %+v", path, r)
	}
}

// Two disks, raw and qcow2, twice. What they held is in the old images, which others may read and not write.
func TestSnapshot(t *testing.T) {
	b := newBed(t)
	one, two := b.image("1.img"), b.qcow2("2.qcow2", "", "")
	f := b.load("", b.disk("disk1", one), b.qcow2Disk("disk2", two, ""))
	d, c := b.start(f)
	b.write("disk1", 1)
	b.write("disk2", 2)
	before := time.Now()
	res, err := b.snapshot(c, "disk2", b.path("2a"), "disk1", b.path("1a"))
	b.must(err)
	if at, err := time.Parse(time.RFC3339Nano, res.TakenAt); err != nil || at.Before(before.Round(0)) || at.After(time.Now()) {
		t.Errorf("taken at %q, %v", res.TakenAt, err)
	}
	if res.PausedMs <= 0 || len(res.Taken) != 2 {
		t.Fatalf("the answer: %v", res)
	}
	for i, want := range []struct{ disk, overlay, backing, format string }{{"disk1", b.path("1a"), one, ` and format = "qcow2"`}, {"disk2", b.path("2a"), two, ""}} {
		got := res.Taken[i]
		hint := fmt.Sprintf("change line %d of %s to image = %q%s", f.ImageLine(want.disk), f.Path, want.overlay, want.format)
		if got.Disk != want.disk || got.Overlay != want.overlay || got.Backing != want.backing || !strings.HasSuffix(got.Message, hint) {
			t.Errorf("the answer has %v, want %+v and %s", got, want, hint)
		}
	}
	b.holds("disk1", 1)
	b.holds("disk2", 2)
	b.write("disk1", 3)
	b.write("disk2", 4)
	_, err = b.snapshot(c, "disk2", b.path("2b"))
	b.must(err)
	b.write("disk2", 5)
	for _, path := range []string{one, two, b.path("2a")} {
		n, err := file.Open(path, file.Options{ReadOnly: true})
		b.must(err)
		b.must(n.Close())
		if n, err := file.Open(path, file.Options{}); !errors.Is(err, file.ErrInUse) {
			t.Errorf("%s is behind a disk and can be opened for writing: %v", path, err)
			n.Close()
		}
	}
	k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk2"})
	b.must(err)
	at := 0
	for _, path := range []string{b.path("2b"), b.path("2a"), two} {
		i := strings.Index(k.Graph[at:], "qcow2 "+path)
		if i < 0 {
			t.Fatalf("the stack has no %s below the others:\n%s", path, k.Graph)
		}
		at += i
	}
	if k.Image != b.path("2b") || k.Format != "qcow2" || k.ConfiguredImage != two || !strings.Contains(k.Warning, b.path("2b")) {
		t.Errorf("disk show: %v", k)
	}
	b.stop(d)

	// It is served from there on, also with the new configuration.
	d, _ = b.start(f)
	b.holds("disk1", 3)
	b.holds("disk2", 5)
	b.stop(d)
	d, c = b.start(b.load("", b.qcow2Disk("disk1", b.path("1a"), ""), b.qcow2Disk("disk2", b.path("2b"), "")))
	b.holds("disk1", 3)
	if k, err = c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk2"}); err != nil || k.Warning != "" {
		t.Errorf("with the new configuration: %v %v", k, err)
	}
	b.stop(d)
	b.imageHolds(one, "raw", 1)
	b.imageHolds(two, "qcow2", 2)
	b.imageHolds(b.path("2a"), "qcow2", 4)
	for _, path := range []string{two, b.path("2a"), b.path("2b"), b.path("1a")} {
		b.sound(path)
	}
	if ids, err := d.store.IDs(snapshotKind); err != nil || len(ids) != 0 {
		t.Errorf("left over: %v %v", ids, err)
	}
}

// Whatever goes wrong with one disk, all stay as they are, and what was made is gone.
func TestSnapshotAllOrNone(t *testing.T) {
	b := newBed(t)
	one, two := b.image("1.img"), b.image("2.img")
	d, c := b.start(b.load("", b.disk("disk1", one), b.disk("disk2", two), strings.Replace(b.disk("fixed", b.image("3.img")), "cache", "read_only = true\ncache", 1)))
	b.write("disk1", 1)
	b.must(os.WriteFile(b.path("taken"), nil, 0o600))
	small := b.path("small")
	b.must(image.Create(t.Context(), small, image.CreateOptions{Format: image.Qcow2, Unopened: true, CreateOptions: qcow2.CreateOptions{
		Size: diskSize / 2, BackingFile: two, BackingFormat: "raw",
	}}))
	create := func(name, backing, format string) string {
		b.must(image.Create(t.Context(), b.path(name), image.CreateOptions{Format: image.Qcow2, Unopened: true, CreateOptions: qcow2.CreateOptions{
			Size: diskSize, BackingFile: backing, BackingFormat: format,
		}}))
		return b.path(name)
	}
	first := create("first", one, "raw")
	for _, tc := range []struct {
		disks []string
		kind  error
		want  []string
	}{
		{[]string{"disk1", b.path("new"), "disk2", b.path("no/folder")}, nil, []string{"no/folder"}},
		{[]string{"disk1", b.path("new"), "disk1", b.path("newer")}, control.ErrInvalid, []string{"twice"}},
		{[]string{"disk1", b.path("new"), "disk2", b.path("new")}, control.ErrInvalid, []string{b.path("new"), "disk1", "disk2"}},
		{[]string{"disk1", b.path("new"), "nope", b.path("newer")}, control.ErrNotFound, []string{"nope"}},
		{[]string{"disk1", b.path("new"), "fixed", b.path("newer")}, control.ErrPrecondition, []string{"read-only"}},
		{[]string{"disk1", first, "disk2", one}, control.ErrPrecondition, []string{one, "disk1"}},
		{[]string{"disk1", first, "disk2", small}, control.ErrInvalid, []string{small, fmt.Sprint(diskSize / 2)}},
		{[]string{"disk1", first, "disk2", create("other", one, "raw")}, control.ErrInvalid, []string{b.path("other"), one, two}},
		{[]string{"disk1", first, "disk2", create("format", two, "qcow2")}, control.ErrInvalid, []string{b.path("format"), `"qcow2"`, `"raw"`}},
		{[]string{"disk1", first, "disk2", create("alone", "", "")}, control.ErrInvalid, []string{b.path("alone"), two}},
		{nil, control.ErrInvalid, nil},
	} {
		_, err := b.snapshot(c, tc.disks...)
		if tc.kind == nil && err == nil {
			t.Errorf("%v: taken", tc.disks)
		} else if tc.kind != nil {
			b.wants(err, tc.kind, tc.want...)
		}
		b.unmoved(c, one, two)
	}
	_, err := c.Snapshot(t.Context(), &control.SnapshotRequest{Disks: []*control.SnapshotDisk{{Disk: "disk1", Overlay: b.path("new")}, {Disk: "disk2", Overlay: b.path("taken")}}})
	b.wants(err, control.ErrExists, b.path("taken"), "--existing")
	_, err = c.Snapshot(t.Context(), &control.SnapshotRequest{Format: "raw", Disks: []*control.SnapshotDisk{{Disk: "disk1", Overlay: b.path("new")}}})
	b.wants(err, control.ErrUnsupported, "raw")
	b.unmoved(c, one, two)

	// The record of the whole cannot be written.
	b.must(os.MkdirAll(b.path("state/snapshots/disk1.json.new"), 0o700))
	_, err = b.snapshot(c, "disk1", b.path("new"), "disk2", b.path("newer"))
	if err == nil {
		t.Error("taken without a record")
	}
	b.unmoved(c, one, two)
	b.write("disk1", 2) // the image is still open for writing
	b.must(os.Remove(b.path("state/snapshots/disk1.json.new")))

	b.copyTo(c, "disk2", b.path("copy"))
	_, err = b.snapshot(c, "disk1", b.path("new"), "disk2", b.path("newer"))
	b.wants(err, control.ErrPrecondition, "copy-disk2-1", "disk2")
	b.unmoved(c, one, two)
	_, err = c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "copy-disk2-1"})
	b.must(err)

	_, err = b.snapshot(c, "disk1", first, "disk2", create("second", two, "raw"))
	b.must(err)
	b.holds("disk1", 2)
	b.stop(d)
}

// unmoved wants the disks where they were and no new files.
func (b *bed) unmoved(c *control.Client, images ...string) {
	b.Helper()
	for i, want := range images {
		id := fmt.Sprintf("disk%d", i+1)
		k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: id})
		b.must(err)
		if k.Image != want || k.Warning != "" || b.record(id).Image != want {
			b.Errorf("%s is on %s (%s), recorded %+v", id, k.Image, k.Warning, b.record(id))
		}
	}
	for _, name := range []string{"new", "newer"} {
		if exists(b.path(name)) {
			b.Errorf("%s was left behind", name)
		}
	}
	if entries, err := os.ReadDir(b.path("state/snapshots")); err == nil {
		for _, e := range entries {
			if strings.HasSuffix(e.Name(), ".json") {
				b.Errorf("a record of the snapshot was left behind: %s", e.Name())
			}
		}
	}
}

// The daemon died between the record of the whole and those of the disks, one of which had been written.
func TestSnapshotFinish(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk1", b.image("1.img")), b.disk("disk2", b.image("2.img")), b.disk("disk3", b.image("3.img")))
	d, c := b.start(f)
	b.write("disk1", 1)
	b.write("disk2", 2)
	b.must(os.MkdirAll(b.path("state/disks/disk2.json.new"), 0o700)) // the second of the records cannot be written
	res, err := b.snapshot(c, "disk1", b.path("1a"), "disk2", b.path("2a"), "disk3", b.path("3a"))
	b.must(err)
	if len(res.Taken) != 3 || b.record("disk1").Image != b.path("1a") || b.record("disk2").Image != b.path("2.img") || !strings.Contains(b.log.String(), "level=ERROR") {
		t.Fatalf("%v; recorded %+v %+v; log:\n%s", res, b.record("disk1"), b.record("disk2"), &b.log)
	}
	b.write("disk2", 3)
	// The next one must not lose what this one left over.
	_, err = b.snapshot(c, "disk1", b.path("1b"))
	if err == nil || exists(b.path("1b")) {
		t.Errorf("a snapshot was taken while the last one is not finished: %v", err)
	}
	b.must(os.Remove(b.path("state/disks/disk2.json.new")))
	// The disk moves on by itself meanwhile; what is recorded then stays.
	b.move(c, "disk3", b.path("3b"))
	b.stop(d)
	d, c = b.start(f)
	for id, want := range map[string]string{"disk1": b.path("1a"), "disk2": b.path("2a"), "disk3": b.path("3b")} {
		k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: id})
		b.must(err)
		if k.Image != want || b.record(id).Image != want {
			t.Errorf("%s is on %s, want %s", id, k.Image, want)
		}
	}
	b.holds("disk1", 1)
	b.holds("disk2", 3)
	b.stop(d)
	if ids, err := d.store.IDs(snapshotKind); err != nil || len(ids) != 0 {
		t.Errorf("left over: %v %v", ids, err)
	}
	b.imageHolds(b.path("2.img"), "raw", 2)
}

// It was not known whether a snapshot was recorded, and it was not taken. It must not come between the disk and the next
// one: a restart would find the disk on an overlay that the guest was never on.
func TestSnapshotNotTaken(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk1", b.image("1.img")))
	d, c := b.start(f)
	b.write("disk1", 1)
	k, err := d.find("disk1")
	b.must(err)
	// What errUnsure leaves.
	from := k.record()
	unsure := snapshotRecord{[]moveRecord{{"disk1", from, from.move(b.qcow2("unsure", "", ""), "qcow2")}}}
	b.must(d.store.Save(snapshotKind, "disk1", &unsure))
	_, err = b.snapshot(c, "disk1", b.path("no/folder"))
	if err == nil || b.record("disk1").Image != b.path("1.img") {
		t.Errorf("a snapshot that failed: %v; recorded: %+v", err, b.record("disk1"))
	}
	b.must(d.store.Save(snapshotKind, "disk1", &unsure))
	_, err = b.snapshot(c, "disk1", b.path("taken"))
	b.must(err)
	b.write("disk1", 2)
	b.stop(d)
	d, _ = b.start(f)
	b.holds("disk1", 2)
	if got := b.record("disk1").Image; got != b.path("taken") {
		t.Errorf("the disk is on %s", got)
	}
	b.stop(d)
}

// What the configuration says of the images behind the old one still counts behind the overlay.
func TestSnapshotKeepsBackingOfConfiguration(t *testing.T) {
	b := newBed(t)
	base := b.image("base.img")
	top := b.qcow2("top.qcow2", base, "raw")
	moved := b.path("moved.img")
	b.must(os.Rename(base, moved))
	f := b.load("", b.qcow2Disk("disk0", top, fmt.Sprintf("backing = [{ image = %q, format = \"raw\" }]\n", moved)))
	d, c := b.start(f)
	b.write("disk0", 1)
	_, err := b.snapshot(c, "disk0", b.path("a"))
	b.must(err)
	res, err := b.snapshot(c, "disk0", b.path("b"))
	b.must(err)
	want := fmt.Sprintf("backing = [{ image = %q, format = \"qcow2\" }, { image = %q, format = \"qcow2\" }, { image = %q, format = \"raw\" }]", b.path("a"), top, moved)
	if !strings.Contains(res.Taken[0].Message, want) {
		t.Errorf("the hint has no %s: %s", want, res.Taken[0].Message)
	}
	b.stop(d)
	d, _ = b.start(f)
	b.holds("disk0", 1)
	b.stop(d)
	d, _ = b.start(b.load("", b.qcow2Disk("disk0", b.path("b"), want+"\n")))
	b.holds("disk0", 1)
	b.stop(d)
}

// Two that name the same disks in different orders do not wait for each other.
func TestSnapshotsAtOnce(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.disk("disk1", b.image("1.img")), b.disk("disk2", b.image("2.img"))))
	done := make(chan error)
	for i, order := range [][2]string{{"disk1", "disk2"}, {"disk2", "disk1"}} {
		go func() {
			for n := range 5 {
				_, err := b.snapshot(c, order[0], b.path(fmt.Sprint(i, n, "x")), order[1], b.path(fmt.Sprint(i, n, "y")))
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	for range 2 {
		b.must(<-done)
	}
	k, err := d.find("disk1")
	b.must(err)
	if n := len(k.image().Chain); n != 11 {
		t.Errorf("%d images in the chain", n)
	}
	b.write("disk1", 7)
	b.stop(d)
	d, _ = b.start(b.load("", b.disk("disk1", b.path("1.img")), b.disk("disk2", b.path("2.img"))))
	b.holds("disk1", 7)
	b.stop(d)
}
