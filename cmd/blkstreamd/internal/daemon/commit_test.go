// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// stack makes a disk of n images by snapshots: each wrote its number, counted from 1, to a place of its own and to one
// of all. They are called 1 (raw) to n, which the guest is on.
func (b *bed) stack(c *control.Client, n int) {
	b.Helper()
	for i := 1; ; i++ {
		b.fill("disk0", i, byte(i))
		b.fill("disk0", 0, byte(i))
		if i == n {
			return
		}
		_, err := b.snapshot(c, "disk0", b.path(fmt.Sprint(i+1)))
		b.must(err)
	}
}

const placeSize = 96 << 10 // more than a cluster, not a multiple

func (b *bed) fill(id string, place int, fill byte) {
	b.Helper()
	g := b.guest(id)
	defer g.Close()
	_, err := g.WriteAt(bytes.Repeat([]byte{fill}, placeSize), int64(place)*placeSize)
	b.must(err)
	b.must(g.Flush())
}

// shows wants these numbers in the places.
func (b *bed) shows(id string, want ...byte) {
	b.Helper()
	g := b.guest(id)
	defer g.Close()
	got := make([]byte, placeSize)
	for i, w := range want {
		_, err := g.ReadAt(got, int64(i)*placeSize)
		b.must(err)
		if !bytes.Equal(got, bytes.Repeat([]byte{w}, placeSize)) {
			b.Errorf("place %d holds %d, want %d", i, got[0], w)
		}
	}
}

// chain wants the disk to be made of these images.
func (b *bed) chain(d *Daemon, names ...string) {
	b.Helper()
	k, err := d.find("disk0")
	b.must(err)
	var got []string
	for _, m := range k.image().Chain {
		got = append(got, strings.TrimPrefix(m.Path, b.dir+"/"))
	}
	if fmt.Sprint(got) != fmt.Sprint(names) {
		b.Errorf("the chain is %v, want %v", got, names)
	}
}

func (b *bed) commit(c *control.Client, top, base string) *control.Job {
	b.Helper()
	path := func(name string) string {
		if name == "" {
			return ""
		}
		return b.path(name)
	}
	j, err := c.Commit(b.Context(), &control.CommitRequest{Disk: "disk0", Top: path(top), Base: path(base)})
	b.must(err)
	return b.wait(c, j.Id, job.StateCompleted)
}

// writable wants images that nobody uses.
func (b *bed) writable(names ...string) {
	b.Helper()
	for _, name := range names {
		n, err := file.Open(b.path(name), file.Options{})
		if err != nil {
			b.Errorf("%s is still in use: %v", name, err)
			continue
		}
		b.must(n.Close())
	}
}

// readable wants images that others may read and not write.
func (b *bed) readable(names ...string) {
	b.Helper()
	for _, name := range names {
		n, err := file.Open(b.path(name), file.Options{ReadOnly: true})
		b.must(err)
		b.must(n.Close())
		if n, err := file.Open(b.path(name), file.Options{}); !errors.Is(err, file.ErrInUse) {
			b.Errorf("%s may be written: %v", name, err)
			n.Close()
		}
	}
}

func TestCommit(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("1")))
	d, c := b.start(f)
	b.stack(c, 6)
	contents := []byte{6, 1, 2, 3, 4, 5, 6, 0}
	b.shows("disk0", contents...)

	// In the middle, behind the image that the guest is on, and behind one that nobody writes.
	j := b.commit(c, "5", "4")
	if !strings.Contains(j.Message, b.path("5")) || !strings.Contains(j.Message, b.path("4")) || j.Kind != kindCommit || j.Stage != job.StageSwitch {
		t.Errorf("the job: %v", j)
	}
	b.chain(d, "6", "4", "3", "2", "1")
	b.shows("disk0", contents...)
	b.writable("5")
	b.readable("4", "3", "2", "1")
	b.commit(c, "3", "1")
	b.chain(d, "6", "4", "1")
	b.shows("disk0", contents...)
	b.writable("2", "3", "5")
	b.readable("4", "1")
	b.stop(d)
	d, c = b.start(f)
	b.chain(d, "6", "4", "1")
	b.shows("disk0", contents...)

	// A snapshot goes on top, and the rest comes down to the first image, which the configuration still names.
	_, err := b.snapshot(c, "disk0", b.path("7"))
	b.must(err)
	b.fill("disk0", 7, 7)
	contents[7] = 7
	j = b.commit(c, "", "")
	if !strings.Contains(j.Message, "change line") || !strings.Contains(j.Message, b.path("6")) {
		t.Errorf("the job does not say what to change: %v", j)
	}
	b.chain(d, "6", "4", "1")
	b.shows("disk0", contents...)
	if r := b.record("disk0"); r.Image != b.path("6") {
		t.Errorf("recorded: %+v", r)
	}
	b.writable("7")
	b.fill("disk0", 3, 9)
	contents[3] = 9
	j = b.commit(c, "", "1")
	if strings.Contains(j.Message, "change line") {
		t.Errorf("the job wants something changed that is right: %v", j)
	}
	b.chain(d, "1")
	b.shows("disk0", contents...)
	b.fill("disk0", 2, 8)
	contents[2] = 8
	b.stop(d)
	d, c = b.start(f)
	b.chain(d, "1")
	b.shows("disk0", contents...)
	if k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk0"}); err != nil || k.Warning != "" {
		t.Errorf("back on the first image: %v %v", k, err)
	}
	b.stop(d)
	for _, name := range []string{"2", "3", "4", "5", "6", "7"} {
		b.sound(b.path(name))
	}
}

func TestCommitRefused(t *testing.T) {
	b := newBed(t)
	other := b.qcow2("other", "", "")
	one := b.image("1")
	d, c := b.start(b.load("", b.disk("disk0", one), b.qcow2Disk("disk1", other, "")))
	try := func(r *control.CommitRequest) error {
		_, err := c.Commit(t.Context(), r)
		return err
	}
	b.wants(try(&control.CommitRequest{Disk: "nope"}), control.ErrNotFound, "nope")
	b.wants(try(&control.CommitRequest{Disk: "disk0"}), control.ErrInvalid, one, "no backing image")
	b.stack(c, 4)
	at := b.path
	b.wants(try(&control.CommitRequest{Disk: "disk0", Top: at("3"), Base: at("4")}), control.ErrInvalid, at("3"), at("4"))
	b.wants(try(&control.CommitRequest{Disk: "disk0", Top: at("1")}), control.ErrInvalid, at("1"))
	b.wants(try(&control.CommitRequest{Disk: "disk0", Top: other}), control.ErrInvalid, other, at("4"))
	b.wants(try(&control.CommitRequest{Disk: "disk0", Speed: -1}), control.ErrInvalid)
	b.wants(try(&control.CommitRequest{Disk: "disk0", Id: "-"}), control.ErrInvalid)

	// Somebody else has the base, or the image whose header would have to change.
	for _, name := range []string{"1", "3"} {
		n, err := file.Open(at(name), file.Options{ReadOnly: true})
		b.must(err)
		b.wants(try(&control.CommitRequest{Disk: "disk0", Top: at("2"), Base: at("1")}), control.ErrPrecondition, at(name), "in use")
		b.must(n.Close())
		b.readable("3", "2", "1")
	}
	b.chain(d, "4", "3", "2", "1")
	b.shows("disk0", 4, 1, 2, 3, 4)
	b.copyTo(c, "disk0", at("copy"))
	b.wants(try(&control.CommitRequest{Disk: "disk0"}), control.ErrPrecondition, "copy-disk0-1")
	_, err := c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "copy-disk0-1"})
	b.must(err)
	b.stop(d)

	d, c = b.start(b.load("", b.qcow2Disk("disk0", at("4"), fmt.Sprintf("backing = [{ image = %q, format = \"qcow2\" }]\n", at("3")))))
	b.wants(try(&control.CommitRequest{Disk: "disk0"}), control.ErrPrecondition, "rebase -u")
	b.stop(d)
}

// A commit that is cancelled, or cut off by the end of the daemon, leaves the chain as it was, and the next daemon goes
// on with the latter.
func TestCommitEnds(t *testing.T) {
	for _, tc := range []struct{ name, top, base string }{{"middle", "3", "2"}, {"first", "", "2"}} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			f := b.load("", b.disk("disk0", b.image("1")))
			d, c := b.start(f)
			b.stack(c, 4)
			contents := []byte{4, 1, 2, 3, 4}
			slow := func(id string) {
				r := &control.CommitRequest{Disk: "disk0", Base: b.path(tc.base), Speed: 64 << 10, Id: id}
				if tc.top != "" {
					r.Top = b.path(tc.top)
				}
				_, err := c.Commit(t.Context(), r)
				b.must(err)
				for begun := false; !begun; {
					j, err := c.JobShow(t.Context(), &control.JobShowRequest{Id: id})
					b.must(err)
					begun = j.BytesDone > 0
				}
			}
			slow("a")
			b.fill("disk0", 1, 9)
			contents[1] = 9
			b.shows("disk0", contents...)
			_, err := b.snapshot(c, "disk0", b.path("5"))
			b.wants(err, control.ErrPrecondition, "job a")
			j, err := c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "a"})
			b.must(err)
			if !strings.Contains(j.Message, "nothing is merged") {
				t.Errorf("the cancelled job: %v", j)
			}
			b.chain(d, "4", "3", "2", "1")
			b.readable("3", "2", "1")
			b.shows("disk0", contents...)
			slow("b")
			b.stop(d)

			d, c = b.start(f)
			b.chain(d, "4", "3", "2", "1")
			b.fill("disk0", 2, 7)
			contents[2] = 7
			b.shows("disk0", contents...)
			_, err = c.JobSpeed(t.Context(), &control.JobSpeedRequest{Id: "b"})
			b.must(err)
			b.wait(c, "b", job.StateCompleted)
			b.shows("disk0", contents...)
			if tc.top == "" {
				b.chain(d, "2", "1")
			} else {
				b.chain(d, "4", "2", "1")
			}
			b.stop(d)
			d, _ = b.start(f)
			b.shows("disk0", contents...)
			b.stop(d)
			for _, name := range []string{"2", "3", "4"} {
				b.sound(b.path(name))
			}
		})
	}
}

// The daemon died after the chain had changed and before the job's record did.
func TestCommitFoundComplete(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("1")))
	d, c := b.start(f)
	b.stack(c, 4)
	b.commit(c, "2", "1")
	b.commit(c, "", "3")
	s := d.store
	b.stop(d)
	for _, id := range []string{"commit-disk0-1", "commit-disk0-2"} {
		var r job.Record
		_, err := s.Load("jobs", id, &r)
		b.must(err)
		r.State, r.Message, r.EndedMS = job.StateRunning, "", 0
		b.must(s.Save("jobs", id, &r))
	}
	d, c = b.start(f)
	for _, id := range []string{"commit-disk0-1", "commit-disk0-2"} {
		if j := b.wait(c, id, job.StateCompleted); !strings.Contains(j.Message, "merged into") || strings.Contains(j.Message, "change line") != (id == "commit-disk0-2") {
			t.Errorf("job: %v", j)
		}
	}
	b.chain(d, "3", "1")
	b.shows("disk0", 4, 1, 2, 3, 4)
	b.stop(d)
}

// Copy on read rests while the disk is merged into another image, and is over that one then.
func TestCommitOfCopyOnRead(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2", "copy_on_read = true")))
	b.write("a", 1)
	j, err := c.Commit(t.Context(), &control.CommitRequest{Disk: "a"})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	if g := b.graph(c); !strings.HasPrefix(g, "copy-on-read") || !strings.Contains(g, "middle.qcow2") {
		t.Errorf("after the commit the graph is\n%s", g)
	}
	b.holds("a", 1)
	b.stop(d)
	for _, name := range []string{"top.qcow2", "middle.qcow2"} {
		if n := b.held(name); n != 64<<10 {
			t.Errorf("%s holds %d bytes, want what the guest wrote", name, n)
		}
	}
}

// The disk was made larger than the base. One that cannot be made larger ends the job, and the chain is as it was.
func TestCommitGrows(t *testing.T) {
	for _, fixed := range []bool{false, true} {
		b := newBed(t)
		f := b.load("", b.qcow2Disk("disk0", b.qcow2("1", "", ""), ""))
		if fixed {
			b.qemu("qemu-img", "bitmap", "--add", "--disable", b.path("1"), "fixed")
		}
		d, c := b.start(f)
		b.stack(c, 2)
		_, err := c.DiskResize(t.Context(), &control.DiskResizeRequest{Id: "disk0", Size: 2 * diskSize})
		b.must(err)
		const last = 2*diskSize/placeSize - 1
		b.fill("disk0", last, 3)
		_, err = b.snapshot(c, "disk0", b.path("3"))
		b.must(err)
		for _, top := range []string{"2", ""} {
			r := &control.CommitRequest{Disk: "disk0", Base: b.path("1")}
			if top != "" {
				r.Top = b.path(top)
			}
			j, err := c.Commit(t.Context(), r)
			b.must(err)
			state := job.StateCompleted
			if fixed {
				state = job.StateFailed
			}
			j = b.wait(c, j.Id, state)
			if fixed && (!strings.Contains(j.Error, "bitmaps") || !strings.Contains(j.Message, "nothing is merged")) {
				t.Errorf("job: %v", j)
			}
			switch {
			case fixed:
				b.chain(d, "3", "2", "1")
				b.readable("2", "1")
			case top != "":
				b.chain(d, "3", "1")
			default:
				b.chain(d, "1")
			}
			contents := make([]byte, last+1)
			copy(contents, []byte{2, 1, 2})
			contents[last] = 3
			b.shows("disk0", contents...)
		}
		b.stop(d)
		if !fixed {
			b.sound(b.path("1"))
		}
	}
}
