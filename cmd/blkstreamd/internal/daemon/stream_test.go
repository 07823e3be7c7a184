// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// layered makes base.raw, full of fill, and top.qcow2 over middle.qcow2 over it, both empty.
func (b *bed) layered(fill byte) {
	b.Helper()
	b.must(os.WriteFile(b.path("base.raw"), bytes.Repeat([]byte{fill}, diskSize), 0o600))
	b.over("middle.qcow2", "base.raw", image.Raw)
	b.over("top.qcow2", "middle.qcow2", image.Qcow2)
}

func (b *bed) over(name, backing, format string) {
	b.Helper()
	b.must(image.Create(b.Context(), b.path(name), image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{
		Size: diskSize, BackingFile: backing, BackingFormat: format,
	}}))
}

// layeredDisk is a [[disk]] table with further keys.
func (b *bed) layeredDisk(id, image string, keys ...string) string {
	return strings.Replace(b.disk(id, b.path(image)), `"raw"`, `"qcow2"`, 1) + strings.Join(keys, "\n") + "\n"
}

// held is how many bytes an image holds itself.
func (b *bed) held(name string) (n int64) {
	b.Helper()
	b.must(image.Map(context.Background(), b.path(name), image.Qcow2, image.Options{Unlocked: true}, func(s image.Segment) error {
		if s.Depth == 0 && s.Present {
			n += s.Length
		}
		return nil
	}))
	return n
}

// unused wants nobody to have the image open.
func (b *bed) unused(name string) {
	b.Helper()
	f, err := file.Open(b.path(name), file.Options{})
	if err != nil {
		b.Errorf("still open: %v", err)
		return
	}
	b.must(f.Close())
}

func (b *bed) graph(c *control.Client) string {
	b.Helper()
	k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	return k.Graph
}

// What a guest reads is copied into the image of a disk with copy_on_read, and not what a copy of the disk reads.
func TestCopyOnRead(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	f := b.load("", b.layeredDisk("a", "top.qcow2", "copy_on_read = true"))
	d, _ := b.start(f)
	b.holds("a", 7)
	b.must(d.Stop())
	if n := b.held("top.qcow2"); n != 64<<10 {
		t.Errorf("after a read of 4K the image holds %d bytes", n)
	}
	d, c := b.start(f)
	if g := b.graph(c); !strings.HasPrefix(g, "copy-on-read") {
		t.Errorf("the graph is\n%s", g)
	}
	j, err := c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Target: b.path("target.qcow2"), Base: b.path("base.raw")})
	b.must(err)
	b.wait(c, j.Id, job.StateReady)
	_, err = c.Switch(b.Context(), &control.SwitchRequest{Target: "a"})
	b.must(err)
	if g := b.graph(c); !strings.HasPrefix(g, "copy-on-read") || !strings.Contains(g, "target.qcow2") {
		t.Errorf("after a switch the graph is\n%s", g)
	}
	if n := b.held("top.qcow2"); n != 64<<10 {
		t.Errorf("after a copy the source holds %d bytes", n)
	}
	b.holds("a", 7)
	b.must(d.Stop())
}

// restless is a queue that does not come to rest at the nth change of the graph.
type restless struct {
	meter   blk.Meter
	changes atomic.Int64
	nth     int64
	reached chan struct{}
}

func (q *restless) Pause(ctx context.Context) error {
	if q.changes.Add(1) != q.nth {
		return nil
	}
	close(q.reached)
	<-ctx.Done()
	return context.Cause(ctx)
}

func (q *restless) Resume()           {}
func (q *restless) Barrier()          {}
func (q *restless) Meter() *blk.Meter { return &q.meter }

// A job that is cancelled before copy on read could be taken out of its way gives back what it was to work on.
func TestCopyOnReadInTheWay(t *testing.T) {
	for _, tc := range []struct {
		nth   int64
		start func(*control.Client, string) (*control.Job, error)
	}{
		{1, func(c *control.Client, target string) (*control.Job, error) {
			return c.Copy(t.Context(), &control.CopyRequest{Disk: "a", Target: target})
		}},
		{2, func(c *control.Client, _ string) (*control.Job, error) { // the first puts the base that is open for writing in
			return c.Commit(t.Context(), &control.CommitRequest{Disk: "a"})
		}},
	} {
		b := newBed(t)
		b.layered(7)
		d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2", "copy_on_read = true")))
		k, err := d.find("a")
		b.must(err)
		q := &restless{nth: tc.nth, reached: make(chan struct{})}
		k.graph.Attach(q)
		j, err := tc.start(c, b.path("target.qcow2"))
		b.must(err)
		<-q.reached
		_, err = c.JobCancel(t.Context(), &control.JobCancelRequest{Id: j.Id})
		b.must(err)
		b.wait(c, j.Id, job.StateCancelled)
		if tc.nth == 1 {
			b.unused("target.qcow2")
		}
		b.readable("middle.qcow2", "base.raw")
		if g := b.graph(c); !strings.HasPrefix(g, "copy-on-read") || !strings.Contains(g, "top.qcow2") {
			t.Errorf("the graph is\n%s", g)
		}
		b.holds("a", 7)
		k.graph.Detach(q)
		b.stop(d)
	}
}

// A hole of the image behind, which shows as zeros anyway, is not stored; zeros that are stored there are, as zeros.
func TestCopyOnReadHole(t *testing.T) {
	b := newBed(t)
	b.layered(0)
	b.must(os.Truncate(b.path("base.raw"), 1<<20)) // what follows is a hole
	b.must(os.Truncate(b.path("base.raw"), diskSize))
	d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2", "copy_on_read = true")))
	g := b.guest("a")
	for _, off := range []int64{0, 2 << 20, 3 << 20} {
		got := bytes.Repeat([]byte{1}, 4096)
		_, err := g.ReadAt(got, off)
		b.must(err)
		if !bytes.Equal(got, make([]byte, 4096)) {
			t.Errorf("offset %d does not read as zeros", off)
		}
	}
	b.must(g.Close())
	if n := b.held("top.qcow2"); n != 64<<10 {
		t.Errorf("the image holds %d bytes, want one cluster", n)
	}
	if k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"}); err != nil || k.Warning != "" {
		t.Errorf("%v, %v", k, err)
	}
	b.stop(d)
}

// Copy on read is switched while the guest runs, and stays as it was chosen until the configuration says the same.
func TestCopyOnReadSwitched(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	b.over("ro.qcow2", "base.raw", image.Raw)
	plain := b.image("plain")
	configured := func(keys ...string) *config.File {
		return b.load("", b.layeredDisk("a", "top.qcow2", keys...), b.disk("plain", plain),
			b.layeredDisk("ro", "ro.qcow2", "read_only = true"))
	}
	off := configured()
	d, c := b.start(off)
	set := func(id string, on bool) (*control.Disk, error) {
		return c.DiskSet(b.Context(), &control.DiskSetRequest{Id: id, CopyOnRead: &on})
	}
	check := func(on bool, warning string) {
		t.Helper()
		k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
		b.must(err)
		if k.CopyOnRead != on || strings.HasPrefix(k.Graph, "copy-on-read") != on || (warning == "") != (k.Warning == "") || !strings.Contains(k.Warning, warning) {
			t.Errorf("copy on read should be %v: %v", on, k)
		}
	}
	g := b.guest("a")
	read := func(cluster int64, held int64) {
		t.Helper()
		_, err := g.ReadAt(make([]byte, 512), cluster<<16)
		b.must(err)
		if n := b.held("top.qcow2"); n != held<<16 {
			t.Errorf("the image holds %d bytes, want %d clusters", n, held)
		}
	}
	check(false, "")
	read(0, 0)
	k, err := set("a", true)
	b.must(err)
	if !k.CopyOnRead {
		t.Errorf("switched on: %v", k)
	}
	check(true, "copy_on_read = true")
	read(1, 1)
	_, err = set("a", false)
	b.must(err)
	check(false, "")
	read(2, 1)
	_, err = set("a", true)
	b.must(err)
	b.must(g.Close())
	_, err = b.snapshot(c, "a", b.path("over.qcow2")) // the record of another image
	b.must(err)
	check(true, "copy_on_read = true")
	b.stop(d)

	d, c = b.start(off)
	check(true, "copy_on_read = true")
	_, err = set("plain", true)
	b.wants(err, control.ErrPrecondition, "raw")
	_, err = set("ro", true)
	b.wants(err, control.ErrPrecondition, "read-only")
	_, err = set("nope", true)
	b.wants(err, control.ErrNotFound, "nope")
	_, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s", Speed: 1})
	b.must(err)
	_, err = set("a", false)
	b.wants(err, control.ErrPrecondition, "job s works")
	_, err = c.JobCancel(b.Context(), &control.JobCancelRequest{Id: "s"})
	b.must(err)
	check(true, "copy_on_read = true")
	b.stop(d)

	// The configuration says so, too: from now on it counts again.
	d, c = b.start(configured("copy_on_read = true"))
	check(true, "over.qcow2")
	b.stop(d)
	d, c = b.start(off)
	check(false, "over.qcow2")
	b.stop(d)
}

// A disk that is added at run time has copy on read from the beginning, if asked to.
func TestCopyOnReadAdded(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	f := b.load("", b.disk("plain", b.image("plain")))
	d, c := b.start(f)
	k, err := c.DiskAdd(b.Context(), &control.DiskAddRequest{
		Id: "a", Socket: b.path("a.sock"), Image: b.path("top.qcow2"), Format: image.Qcow2, Cache: "writeback", CopyOnRead: true,
	})
	b.must(err)
	if !k.CopyOnRead || !strings.HasPrefix(k.Graph, "copy-on-read") {
		t.Errorf("added: %v", k)
	}
	off := false
	_, err = c.DiskSet(b.Context(), &control.DiskSetRequest{Id: "a", CopyOnRead: &off})
	b.must(err)
	b.stop(d)
	d, c = b.start(f)
	k, err = c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	if k.CopyOnRead || strings.HasPrefix(k.Graph, "copy-on-read") || k.Warning != "" {
		t.Errorf("switched off, after a restart: %v", k)
	}
	b.stop(d)
}

// A copy on read that fails is the operator's business and not the guest's.
func TestCopyOnReadFails(t *testing.T) {
	c := newCopyErrors()
	if w := c.warning(); w != "" {
		t.Errorf("a warning from the beginning: %s", w)
	}
	logs := 0
	for range 5 {
		if c.add(fmt.Errorf("wrapped: %w", context.Canceled)) {
			logs++
		}
	}
	if w := c.warning(); !strings.Contains(w, "5 reads") || !strings.Contains(w, context.Canceled.Error()) || logs != 1 {
		t.Errorf("%q, logged %d times", w, logs)
	}
}

func TestStream(t *testing.T) {
	for _, base := range []string{"", "base.raw"} {
		for _, cor := range []bool{false, true} {
			b := newBed(t)
			b.layered(7)
			f := b.load("", b.layeredDisk("a", "top.qcow2", fmt.Sprintf("copy_on_read = %v", cor)))
			d, c := b.start(f)
			b.holds("a", 7)
			req := &control.StreamRequest{Disk: "a"}
			if base != "" {
				req.Base = b.path(base)
			}
			j, err := c.Stream(b.Context(), req)
			b.must(err)
			if j.Kind != kindStream || j.Source != b.path("middle.qcow2") || j.Target != b.path("top.qcow2") {
				t.Errorf("the job is %v", j)
			}
			if j = b.wait(c, j.Id, job.StateCompleted); j.Error != "" || !strings.Contains(j.Message, "top.qcow2 needs") {
				t.Errorf("completed: %v", j)
			}
			g := b.graph(c)
			if strings.Contains(g, "middle") || strings.Contains(g, "base") != (base != "") || strings.Contains(g, "copy-on-read") != (cor && base != "") {
				t.Errorf("base %q, copy on read %v: the graph is\n%s", base, cor, g)
			}
			b.unused("middle.qcow2")
			if base == "" {
				b.unused("base.raw")
				b.must(os.Remove(b.path("base.raw")))
			}
			b.must(os.Remove(b.path("middle.qcow2")))
			b.holds("a", 7)
			_, err = c.DiskResize(b.Context(), &control.DiskResizeRequest{Id: "a", Size: 2 * diskSize})
			b.must(err)
			b.stop(d)
			if r := b.record("a"); r.Image != b.path("top.qcow2") || len(r.Moved) != 0 {
				t.Errorf("the record is %+v", r)
			}
			d, _ = b.start(f)
			b.holds("a", 7)
			b.stop(d)
		}
	}
}

// A stream that the daemon's end or a crash cut off goes on by itself, or is found complete.
func TestStreamResumed(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	f := b.load("", b.layeredDisk("a", "top.qcow2"))
	d, c := b.start(f)
	_, err := c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s", Speed: 1 << 20})
	b.must(err)
	for b.held("top.qcow2") == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	// Between the change of the header and the journal's last entry: the record as it is now.
	running, err := os.ReadFile(b.path("state/jobs/s.json"))
	b.must(err)
	b.stop(d)
	had := b.held("top.qcow2")
	if had >= diskSize {
		t.Fatal("the job was too fast for this test")
	}
	d, c = b.start(f)
	_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "s", Speed: 0})
	b.must(err)
	b.wait(c, "s", job.StateCompleted)
	b.stop(d)
	b.must(os.WriteFile(b.path("state/jobs/s.json"), running, 0o600))
	d, c = b.start(f)
	if j := b.wait(c, "s", job.StateCompleted); j.Error != "" || !strings.Contains(j.Message, "needs no other image") {
		t.Errorf("found complete: %v", j)
	}
	b.holds("a", 7)
	b.stop(d)
}

// A paused one stays paused; one whose base is gone from the chain fails.
func TestStreamResumedPausedOrNot(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	b.put(b.path("middle.qcow2"), image.Qcow2, 7) // something to do
	f := b.load("", b.layeredDisk("a", "top.qcow2"))
	d, c := b.start(f)
	_, err := c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s", Speed: 1, Base: b.path("base.raw")})
	b.must(err)
	_, err = c.JobPause(b.Context(), &control.JobPauseRequest{Id: "s"})
	b.must(err)
	b.stop(d)
	d, c = b.start(f)
	b.wait(c, "s", job.StatePaused)
	b.stop(d)
	b.must(image.Rebase(b.Context(), b.path("middle.qcow2"), image.RebaseOptions{}))
	d, c = b.start(f)
	if j := b.wait(c, "s", job.StateFailed); !strings.Contains(j.Error, "base.raw") || j.Message != stillNeeded {
		t.Errorf("without its base: %v", j)
	}
	b.holds("a", 7)
	b.stop(d)
}

func TestStreamRefused(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	b.over("other.qcow2", "base.raw", image.Raw)
	b.over("named.qcow2", "base.raw", image.Raw)
	b.image("plain")
	b.must(image.Create(b.Context(), b.path("alone.qcow2"), image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{Size: diskSize}}))
	f := b.load("", b.layeredDisk("a", "top.qcow2"), b.disk("plain", b.path("plain")), b.layeredDisk("alone", "alone.qcow2"),
		b.layeredDisk("ro", "other.qcow2", "read_only = true"),
		b.layeredDisk("named", "named.qcow2", "[[disk.backing]]", `format = "raw"`))
	d, c := b.start(f)
	for _, r := range []struct {
		req  *control.StreamRequest
		kind error
		want string
	}{
		{&control.StreamRequest{Disk: "nope"}, control.ErrNotFound, "nope"},
		{&control.StreamRequest{Disk: "plain"}, control.ErrPrecondition, "no backing image"},
		{&control.StreamRequest{Disk: "alone"}, control.ErrPrecondition, "no backing image"},
		{&control.StreamRequest{Disk: "ro"}, control.ErrPrecondition, "read-only"},
		{&control.StreamRequest{Disk: "named"}, control.ErrPrecondition, "configuration"},
		{&control.StreamRequest{Disk: "a", Id: "/"}, control.ErrInvalid, "job id"},
		{&control.StreamRequest{Disk: "a", Speed: -1}, control.ErrInvalid, "speed"},
		{&control.StreamRequest{Disk: "a", OnSourceError: "x"}, control.ErrInvalid, "policy"},
		{&control.StreamRequest{Disk: "a", Base: "base.raw"}, control.ErrInvalid, "absolute"},
		{&control.StreamRequest{Disk: "a", Base: b.path("plain")}, control.ErrInvalid, "middle.qcow2"},
		{&control.StreamRequest{Disk: "a", Base: b.path("middle.qcow2")}, control.ErrPrecondition, "right behind"},
	} {
		_, err := c.Stream(b.Context(), r.req)
		b.wants(err, r.kind, r.want)
	}
	_, err := c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s", Speed: 1})
	b.must(err)
	_, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a"})
	b.wants(err, control.ErrPrecondition, "job s works")
	_, err = c.DiskResize(b.Context(), &control.DiskResizeRequest{Id: "a", Size: 2 * diskSize})
	b.wants(err, control.ErrPrecondition, "job s works")
	_, err = c.JobCancel(b.Context(), &control.JobCancelRequest{Id: "s"})
	b.must(err)
	if g := b.graph(c); strings.Contains(g, "copy-on-read") || !strings.Contains(g, "middle") {
		t.Errorf("after a cancelled stream the graph is\n%s", g)
	}
	b.holds("a", 7)
	b.stop(d)
	// The image is a valid one over its chain.
	img, err := image.Open(blk.NewTask(), b.path("top.qcow2"), image.Qcow2, image.Options{ReadOnly: true})
	b.must(err)
	b.must(img.Close())
}

// A copy by stream is on the target at once, and in the end the source is not needed.
func TestCopyByStream(t *testing.T) {
	for _, source := range []string{"base.raw", "top.qcow2"} {
		for _, base := range []string{"", "base.raw"} {
			if source == base {
				continue
			}
			b := newBed(t)
			b.layered(7)
			table := b.layeredDisk("a", source)
			if source == "base.raw" {
				table = b.disk("a", b.path(source))
			}
			f := b.load("", table)
			d, c := b.start(f)
			req := &control.CopyRequest{Disk: "a", Target: b.path("target.qcow2"), Method: methodStream, Id: "s", Speed: 1 << 20}
			if base != "" {
				req.Base = b.path(base)
			}
			j, err := c.Copy(b.Context(), req)
			b.must(err)
			if j.Kind != kindCopy || j.Source != b.path(source) || j.Target != req.Target || j.Format != image.Qcow2 {
				t.Errorf("the job is %v", j)
			}
			if r := b.record("a"); r.Image != req.Target {
				t.Errorf("the disk is recorded to be on %s", r.Image)
			}
			b.write("a", 9)
			// The daemon ends; the next one goes on.
			b.stop(d)
			d, c = b.start(f)
			if base == "" { // with it there is next to nothing to do
				_, err = c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "s"})
				b.must(err)
			}
			if j = b.wait(c, "s", job.StateCompleted); j.Error != "" || !strings.Contains(j.Message, `to image = "`+req.Target) {
				t.Errorf("completed: %v", j)
			}
			if g := b.graph(c); strings.Contains(g, "middle") || strings.Contains(g, "top") || strings.Contains(g, "base") != (base != "") {
				t.Errorf("%s, base %q: the graph is\n%s", source, base, g)
			}
			b.unused(source)
			b.holds("a", 9)
			b.stop(d)
			if n := b.held("target.qcow2"); base == "" && n != diskSize || base != "" && n != 64<<10 {
				t.Errorf("%s, base %q: the target holds %d bytes", source, base, n)
			}
			d, _ = b.start(f)
			b.holds("a", 9)
			b.stop(d)
		}
	}
}

// What cannot be is refused, and leaves no job and no target; a job that a crash found before the switch fails.
func TestCopyByStreamRefused(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	f := b.load("", b.layeredDisk("a", "top.qcow2"))
	d, c := b.start(f)
	target := b.path("target.qcow2")
	for _, r := range []struct {
		req  *control.CopyRequest
		kind error
		want string
	}{
		{&control.CopyRequest{Format: image.Raw}, control.ErrInvalid, "qcow2"},
		{&control.CopyRequest{Existing: true}, control.ErrInvalid, "made by the job"},
		{&control.CopyRequest{Compression: "zstd"}, control.ErrInvalid, "made by the job"},
		{&control.CopyRequest{Verify: true}, control.ErrInvalid, "compare"},
		{&control.CopyRequest{Base: b.path("top.qcow2")}, control.ErrInvalid, "middle.qcow2"},
		{&control.CopyRequest{Target: b.path("middle.qcow2")}, control.ErrExists, "exists"},
		{&control.CopyRequest{Target: b.path("top.qcow2")}, control.ErrPrecondition, "image of disk"},
	} {
		r.req.Disk, r.req.Method = "a", methodStream
		if r.req.Target == "" {
			r.req.Target = target
		}
		_, err := c.Copy(b.Context(), r.req)
		b.wants(err, r.kind, r.want)
	}
	if l, err := c.JobList(b.Context(), &control.JobListRequest{}); err != nil || len(l.Jobs) != 0 {
		t.Errorf("jobs %v, %v", l.GetJobs(), err)
	}
	if exists(target) {
		t.Error("the target was made")
	}
	_, err := c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Target: target, Method: methodStream, Id: "s", Speed: 1})
	b.must(err)
	running, err := os.ReadFile(b.path("state/jobs/s.json"))
	b.must(err)
	_, err = c.JobCancel(b.Context(), &control.JobCancelRequest{Id: "s"})
	b.must(err)
	b.holds("a", 7)
	b.stop(d)
	// The disk is on the source: the crash came before the switch.
	b.must(os.Remove(target))
	b.must(os.Remove(b.path("state/disks/a.json")))
	b.must(os.WriteFile(b.path("state/jobs/s.json"), running, 0o600))
	d, c = b.start(f)
	if j := b.wait(c, "s", job.StateFailed); !strings.Contains(j.Error, "is on "+b.path("top.qcow2")) || !strings.Contains(j.Message, target) {
		t.Errorf("a job that had not switched: %v", j)
	}
	b.holds("a", 7)
	b.stop(d)
}
