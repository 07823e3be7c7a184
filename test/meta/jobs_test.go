// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// TestJobs runs one random list of operations on disks that begin as different things: requests of a guest, jobs with
// all that can be done to them, snapshots, and crashes. The guest sees the same in all of them. A failure prints
// META_SEED; META_OPS=n then takes the first n operations only.

// task is one operation of the list. What it needs to know of the disk's images, which are others in each setting, it
// finds out when it is done, by the random numbers from seed.
type task struct {
	kind string
	seed uint64
	load [][]request // what the guest does meanwhile
	grow int64       // the disk, by so many bytes
}

// kinds are the operations, and how often they come.
//
// A further job gets a line here and a function beside mirror, stream and commit that makes the command; kill and the
// others then work on it as on any job.
var kinds = []struct {
	name   string
	weight int
	do     func(w *world, t task, rng *rand.Rand)
}{
	{"io", 20, func(w *world, t task, _ *rand.Rand) { w.during(t.load, func() {}) }},
	{"check", 3, func(w *world, _ task, _ *rand.Rand) { w.check() }},
	{"snapshot", 6, begin(snapshot)},
	{"mirror", 6, begin(mirror)},
	{"copy by stream", 3, begin(copyByStream)},
	{"copy to add-cow", 3, begin(copyToAddCow)},
	{"stream", 6, begin(stream)},
	{"commit", 6, begin(commit)},
	{"bitmap", 6, changeBitmap},
	{"backup", 9, begin(backup)},
	{"pause", 3, pause},
	{"resume", 3, resume},
	{"cancel", 3, cancel},
	{"finish", 5, finish},
	{"dismiss", 1, dismiss},
	{"grow", 1, grow},
	{"kill", 4, kill},
	{"kill in a command", 4, killInCommand},
	{"lose the guest, too", 2, lose},
	{"restart", 2, restart},
}

// command starts a job, or takes a snapshot.
type command struct {
	what    string
	id      string // of the job; "": it is done when it is answered
	call    func(ctx context.Context, c *control.Client) error
	moves   string               // the image that the disk is on when the command is carried out; "": no other one
	lands   string               // the one that it is on in the end, if that is yet another one
	bitmap  string               // that a backup uses, or that begins with nothing in it
	begin   func(s contents)     // what is so from then on, when the disk held s
	end     func(j *control.Job) // and when the job has ended, and has not failed
	unsure  func(s contents)     // what is so after a crash of which it is not known whether it came before
	manual  bool                 // it waits for the switch
	mayFail bool                 // a crash came in between
	mortal  bool                 // it ends with the daemon
	over    bool                 // and that has ended
}

// begin carries out a command while the guest goes on. A job that is at work is finished first, now and then.
func begin(prepare func(w *world, rng *rand.Rand) *command) func(*world, task, *rand.Rand) {
	return func(w *world, t task, rng *rand.Rand) {
		c := w.prepared(prepare, rng)
		s := w.during(t.load, func() {
			if c != nil {
				w.Logf("    %s", c.what)
				w.must(w.call(c.what, c.call))
			}
		})
		if c != nil {
			w.begun(c, s)
		}
	}
}

// prepared is the command if it is possible now, else nil.
func (w *world) prepared(prepare func(w *world, rng *rand.Rand) *command, rng *rand.Rand) *command {
	often := rng.IntN(3) > 0
	seed := rng.Uint64()
	if w.job != nil {
		if often {
			return nil
		}
		if w.finish() {
			w.switchOver(nil)
		}
	}
	return prepare(w, rand.New(rand.NewPCG(seed, 0)))
}

func (w *world) begun(c *command, s contents) {
	if c.begin != nil {
		c.begin(s)
	}
	if c.id != "" {
		w.job = c
		w.poll()
	} else if w.job == nil {
		w.checkChain()
	}
	w.checkBitmaps()
}

// The commands.

var clusters = []int64{512, 4096, 64 << 10, 1 << 20}

func pick[T any](rng *rand.Rand, from ...T) T { return from[rng.IntN(len(from))] }

func speed(rng *rand.Rand) int64 { return pick[int64](rng, 0, 1<<20, 4<<20, 16<<20) }

// overlay is a new image over the disk's.
func (w *world) overlay(path, format string) func(contents) {
	return func(s contents) {
		old := w.chain[0].path
		w.keep(old, s)
		w.behind[path] = old
		w.chain = append([]layer{{path, format}}, w.chain...)
		w.files = append(w.files, w.chain[0])
	}
}

func snapshot(w *world, rng *rand.Rand) *command {
	if len(w.chain) > 8 {
		return nil
	}
	path := filepath.Join(w.dir, w.name("overlay"))
	existing := rng.IntN(2) == 0 && w.chain[0].format != image.AddCow // which qemu-img does not know
	if existing {
		cluster := pick(rng, clusters...)
		o := fmt.Sprintf("cluster_size=%d,extended_l2=%v", cluster, cluster >= 64<<10 && rng.IntN(2) == 0)
		w.qemuImg("create", "-q", "-u", "-f", "qcow2", "-o", o, "-b", w.chain[0].path, "-F", w.chain[0].format, path, fmt.Sprint(len(w.model)))
	}
	return &command{
		what: fmt.Sprintf("snapshot %s, existing %v", path, existing), moves: path,
		call: func(ctx context.Context, c *control.Client) error {
			_, err := c.Snapshot(ctx, &control.SnapshotRequest{Disks: []*control.SnapshotDisk{{Disk: diskID, Overlay: path}}, Existing: existing})
			return err
		},
		begin: w.overlay(path, image.Qcow2),
	}
}

func mirror(w *world, rng *rand.Rand) *command {
	r := &control.CopyRequest{
		Disk: diskID, Id: w.name("mirror"), Target: filepath.Join(w.dir, w.name("target")), Format: pick(rng, image.Raw, image.Qcow2),
		SwitchMode: pick(rng, "manual", "manual", "auto"), Verify: rng.IntN(3) == 0, Speed: speed(rng), Granularity: pick[int64](rng, 0, 4096, 64<<10),
	}
	base := len(w.chain)
	if r.Format == image.Qcow2 {
		r.ClusterSize, r.Compression = pick(rng, clusters...), pick(rng, "", "", "zlib", "zstd")
		if base > 1 && rng.IntN(2) == 0 {
			base = 1 + rng.IntN(base-1)
			r.Base = w.chain[base].path
		}
	}
	return &command{
		what: fmt.Sprint("copy ", r), id: r.Id, manual: r.SwitchMode == "manual",
		call: func(ctx context.Context, c *control.Client) error { _, err := c.Copy(ctx, r); return err },
		end: func(j *control.Job) {
			w.files = append(w.files, layer{r.Target, r.Format})
			if base < len(w.chain) {
				w.behind[r.Target] = w.chain[base].path
			}
			if j.State == job.StateCompleted {
				w.chain = append([]layer{{r.Target, r.Format}}, w.chain[base:]...)
			}
		},
	}
}

func copyByStream(w *world, rng *rand.Rand) *command {
	if len(w.chain) > 8 {
		return nil
	}
	r := &control.CopyRequest{Disk: diskID, Id: w.name("by-stream"), Target: filepath.Join(w.dir, w.name("target")), Method: "stream", Speed: speed(rng)}
	base := len(w.chain)
	if base > 1 && rng.IntN(2) == 0 {
		base = 1 + rng.IntN(base-1)
		r.Base = w.chain[base].path
	}
	return &command{
		what: fmt.Sprint("copy ", r), id: r.Id, moves: r.Target,
		call:  func(ctx context.Context, c *control.Client) error { _, err := c.Copy(ctx, r); return err },
		begin: w.overlay(r.Target, image.Qcow2),
		end:   func(j *control.Job) { w.left(j, base+1) },
	}
}

// copyToAddCow ends on a raw file, which may hold anything when it begins.
func copyToAddCow(w *world, rng *rand.Rand) *command {
	if len(w.chain) > 8 {
		return nil
	}
	r := &control.CopyRequest{
		Disk: diskID, Id: w.name("to-add-cow"), Target: filepath.Join(w.dir, w.name("target")), Method: "stream", Format: image.AddCow,
		Speed: speed(rng), Existing: rng.IntN(2) == 0,
	}
	if r.Existing {
		w.stale(r.Target)
	}
	return &command{
		what: fmt.Sprint("copy ", r), id: r.Id, moves: r.Target + addCowExt, lands: r.Target,
		call:  func(ctx context.Context, c *control.Client) error { _, err := c.Copy(ctx, r); return err },
		begin: w.overlay(r.Target+addCowExt, image.AddCow),
		end:   func(j *control.Job) { w.left(j, len(w.chain)) },
	}
}

// left is the end of a job that leaves the images between the first one and the one at place base.
func (w *world) left(j *control.Job, base int) {
	if j.State != job.StateCompleted {
		return
	}
	if top := w.chain[0]; top.format == image.AddCow { // its image file is the disk from now on
		w.files = slices.DeleteFunc(w.files, func(l layer) bool { return l == top })
		w.chain[0] = layer{strings.TrimSuffix(top.path, addCowExt), image.Raw}
		w.files = append(w.files, w.chain[0])
	}
	w.chain = append([]layer{w.chain[0]}, w.chain[base:]...)
	delete(w.behind, w.chain[0].path)
	if len(w.chain) > 1 {
		w.behind[w.chain[0].path] = w.chain[1].path
	}
}

func stream(w *world, rng *rand.Rand) *command {
	base := len(w.chain)
	if base < 2 {
		return nil
	}
	r := &control.StreamRequest{Disk: diskID, Id: w.name("stream"), Speed: speed(rng)}
	if base > 2 && rng.IntN(2) == 0 && w.chain[0].format != image.AddCow { // behind which no base stays
		base = 2 + rng.IntN(base-2)
		r.Base = w.chain[base].path
	}
	return &command{
		what: fmt.Sprint("stream ", r), id: r.Id,
		call: func(ctx context.Context, c *control.Client) error { _, err := c.Stream(ctx, r); return err },
		end:  func(j *control.Job) { w.left(j, base) },
	}
}

func commit(w *world, rng *rand.Rand) *command {
	n := len(w.chain)
	if n < 2 {
		return nil
	}
	top := rng.IntN(n - 1)
	base := top + 1 + rng.IntN(n-1-top)
	if slices.ContainsFunc(w.chain[max(top-1, 0):base+1], func(l layer) bool { return l.format == image.AddCow }) {
		return nil
	}
	r := &control.CommitRequest{Disk: diskID, Id: w.name("commit"), Top: w.chain[top].path, Base: w.chain[base].path, Speed: speed(rng)}
	return &command{
		what: fmt.Sprint("commit ", r), id: r.Id,
		call: func(ctx context.Context, c *control.Client) error { _, err := c.Commit(ctx, r); return err },
		// In front of the base and what is merged all reads the same, whatever becomes of the job.
		begin: func(contents) { w.written(w.chain[base].path, top+1) },
		end: func(j *control.Job) {
			if j.State != job.StateCompleted {
				return
			}
			if s, ok := w.kept[w.chain[top].path]; ok {
				w.keep(w.chain[base].path, s)
			}
			if top > 0 {
				w.behind[w.chain[top-1].path] = w.chain[base].path
			}
			w.chain = append(w.chain[:top:top], w.chain[base:]...)
		},
	}
}

func backup(w *world, rng *rand.Rand) *command {
	name := ""
	if names := w.bitmapNames(); len(names) > 0 && rng.IntN(5) > 0 {
		name = pick(rng, names...)
	}
	return backupOf(w, rng, name, rng.IntN(4) == 0)
}

// backupOf is of what a bitmap has recorded since the backup before, or of the whole disk.
func backupOf(w *world, rng *rand.Rand, name string, full bool) *command {
	r := &control.BackupRequest{
		Disk: diskID, Id: w.name("backup"), Target: filepath.Join(w.dir, w.name("target")), Format: pick(rng, image.Raw, image.Qcow2),
		Speed: pick[int64](rng, 0, 256<<10, 1<<20, 4<<20), OnCbwError: pick(rng, "", "hold"), Bitmap: name,
	}
	b := w.bitmaps[name]
	var behind layer // in the end
	switch way := rng.IntN(3); {
	case b == nil || b.since.path == "" || full:
		r.Full = b != nil
		if r.Format == image.Raw && rng.IntN(2) == 0 {
			r.Existing = true
			w.stale(r.Target)
		}
	case way == 0: // the backup before is brought up to date
		r.Target, r.Format, r.Existing = b.since.path, b.since.format, true
		w.qemuImg("resize", "-q", "-f", r.Format, r.Target, fmt.Sprint(len(w.model)))
		behind = b.behind
	case way == 1:
		r.Format, r.Base, r.BaseFormat = image.Qcow2, b.since.path, b.since.format
		behind = b.since
	default: // the backup before is put behind it afterwards
		r.Format = image.Qcow2
		behind = b.since
	}
	if r.Format == image.Qcow2 && !r.Existing {
		r.ClusterSize = pick(rng, clusters...)
	}
	later := behind.path != "" && !r.Existing && r.Base == ""
	var held contents
	return &command{
		what: fmt.Sprint("backup ", r), id: r.Id, bitmap: r.Bitmap, mortal: true,
		call:  func(ctx context.Context, c *control.Client) error { _, err := c.Backup(ctx, r); return err },
		begin: func(s contents) { held = s },
		end: func(j *control.Job) {
			if j.State != job.StateCompleted {
				return // and the bitmap says all that has changed since the backup before, still
			}
			l := layer{r.Target, r.Format}
			if later {
				w.qemuImg("rebase", "-u", "-f", l.format, "-b", behind.path, "-F", behind.format, l.path)
			}
			w.checkBackup(l, behind, held)
			if b != nil {
				b.since, b.behind = l, behind
			}
		},
	}
}

// bitmapCommand adds, clears or removes a bitmap.
func bitmapCommand(w *world, rng *rand.Rand) *command {
	names := w.bitmapNames()
	kind := "add"
	if len(names) > 0 {
		kind = pick(rng, "add", "clear", "clear", "remove")
		if len(names) > 3 {
			kind = "remove"
		}
	}
	if kind == "add" {
		r := &control.BitmapAddRequest{Disk: diskID, Name: w.name("bitmap"), Granularity: pick[int64](rng, 0, 4096, 1<<20)}
		begin := func(s contents) { w.bitmaps[r.Name] = &bitmap{since: w.known(s)} }
		return &command{
			what: fmt.Sprint("bitmap add ", r), bitmap: r.Name, begin: begin,
			call: func(ctx context.Context, c *control.Client) error { _, err := c.BitmapAdd(ctx, r); return err },
			unsure: func(s contents) {
				if w.listed()[r.Name] != nil {
					begin(s)
				}
			},
		}
	}
	name := pick(rng, names...)
	if kind == "clear" {
		r := &control.BitmapClearRequest{Disk: diskID, Name: name}
		// If it is not known whether it was done, the bitmap may say more than it must.
		begin := func(s contents) { *w.bitmaps[name] = bitmap{since: w.known(s)} }
		return &command{
			what: fmt.Sprint("bitmap clear ", r), bitmap: name, begin: begin, unsure: begin,
			call: func(ctx context.Context, c *control.Client) error { _, err := c.BitmapClear(ctx, r); return err },
		}
	}
	r := &control.BitmapRemoveRequest{Disk: diskID, Name: name}
	return &command{
		what:  fmt.Sprint("bitmap remove ", r),
		call:  func(ctx context.Context, c *control.Client) error { _, err := c.BitmapRemove(ctx, r); return err },
		begin: func(contents) { delete(w.bitmaps, name) },
		unsure: func(contents) {
			if m := w.listed()[name]; m == nil || m.State != "recording" { // one that is left in the image records nothing
				delete(w.bitmaps, name)
			}
		},
	}
}

// changeBitmap does that whatever job is at work.
func changeBitmap(w *world, t task, rng *rand.Rand) {
	c := bitmapCommand(w, rng)
	s := w.during(t.load, func() {
		w.Logf("    %s", c.what)
		w.must(w.call(c.what, c.call))
	})
	if m := w.listed()[c.bitmap]; len(t.load) == 0 && m.GetDirtyBytes() > 0 {
		w.Fatalf("%s: it says at once that something was written: %v", c.what, m)
	}
	w.begun(c, s)
}

// What is done to jobs and to the daemon.

func pause(w *world, t task, rng *rand.Rand) {
	w.during(t.load, func() {
		if w.job == nil {
			return
		}
		_ = w.call("job pause", func(ctx context.Context, c *control.Client) error {
			_, err := c.JobPause(ctx, &control.JobPauseRequest{Id: w.job.id})
			return err
		}, control.ErrPrecondition)
	})
	w.poll()
}

func resume(w *world, t task, rng *rand.Rand) {
	w.during(t.load, func() {
		if w.job == nil {
			return
		}
		_ = w.call("job resume", func(ctx context.Context, c *control.Client) error {
			_, err := c.JobResume(ctx, &control.JobResumeRequest{Id: w.job.id})
			return err
		}, control.ErrPrecondition)
	})
	w.poll()
}

func cancel(w *world, t task, rng *rand.Rand) {
	j := w.poll()
	if w.job == nil {
		w.during(t.load, func() {})
		return
	}
	s := w.during(t.load, func() {
		_ = w.call("job cancel", func(ctx context.Context, c *control.Client) error {
			var err error
			j, err = c.JobCancel(ctx, &control.JobCancelRequest{Id: w.job.id})
			return err
		}, control.ErrPrecondition)
	})
	w.poll()
	if w.job != nil {
		w.Fatalf("job %s goes on after it was cancelled", w.job.id)
	}
	if j.GetState() == job.StateCancelled && j.TargetConsistent {
		w.keep(j.Target, s)
	}
}

func finish(w *world, t task, _ *rand.Rand) {
	if w.finish() {
		w.switchOver(t.load)
		return
	}
	w.during(t.load, func() {})
}

func dismiss(w *world, t task, _ *rand.Rand) {
	for id := range w.ended {
		w.must(w.call("job dismiss", func(ctx context.Context, c *control.Client) error {
			_, err := c.JobDismiss(ctx, &control.JobDismissRequest{Id: id})
			return err
		}))
		delete(w.ended, id)
		break
	}
	w.poll()
	w.during(t.load, func() {})
}

// grow needs a disk without a job, and one that is not on an add-cow image: that is refused, and the disk goes on to its
// image file first.
func grow(w *world, t task, rng *rand.Rand) {
	if w.finish() {
		w.switchOver(nil)
	}
	size := int64(len(w.model)) + t.grow
	if w.chain[0].format == image.AddCow {
		err := w.call("disk resize", func(ctx context.Context, c *control.Client) error {
			_, err := c.DiskResize(ctx, &control.DiskResizeRequest{Id: diskID, Size: size})
			return err
		}, control.ErrPrecondition)
		if err == nil {
			w.Fatal("a disk on an add-cow image was resized")
		}
		c := stream(w, rng)
		w.must(w.call(c.what, c.call))
		w.begun(c, contents{})
		w.finish()
	}
	w.during(t.load, func() {
		w.must(w.call("disk resize", func(ctx context.Context, c *control.Client) error {
			_, err := c.DiskResize(ctx, &control.DiskResizeRequest{Id: diskID, Size: size})
			return err
		}))
	})
	w.model = append(w.model, make([]byte, t.grow)...)
}

func delay(rng *rand.Rand, most time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(most)))
}

// kill is a crash of the daemon's. The guest waits for the next one, which finishes what was in flight.
func kill(w *world, t task, rng *rand.Rand) {
	if soaking && rng.IntN(8) == 0 {
		time.Sleep(5 * time.Second) // until no region is on the log of the bitmaps, and only their files count
	}
	w.during(t.load, func() {
		time.Sleep(delay(rng, 20*time.Millisecond))
		w.kill()
		w.start()
	})
	w.poll()
	w.checkBitmaps()
}

// killInCommand is a crash while a command is carried out: it has been, or it has not.
func killInCommand(w *world, t task, rng *rand.Rand) {
	prepare := pick(rng, snapshot, mirror, copyByStream, copyToAddCow, stream, commit, bitmapCommand, backup)
	c := w.prepared(prepare, rng)
	if ready := c == nil && w.job != nil && w.poll().GetState() == job.StateReady && w.job.manual; ready && rng.IntN(2) == 0 {
		killInSwitch(w, t, rng)
		return
	}
	if c == nil {
		kill(w, t, rng)
		return
	}
	w.Logf("    %s", c.what)
	answered := make(chan error, 1)
	load := t.load
	if c.unsure != nil && rng.IntN(2) == 0 { // what the disk holds then is known
		w.during(load, func() {})
		load = nil
	}
	s := w.during(load, func() {
		client := w.c
		ctx, cancel := w.ctx()
		defer cancel()
		go func() { answered <- c.call(ctx, client) }()
		time.Sleep(delay(rng, 40*time.Millisecond))
		w.kill()
		w.start()
	})
	known := <-answered == nil
	if c.unsure != nil {
		if !known {
			c.begin = c.unsure
		}
		w.Logf("    after the crash: answered %v", known)
		w.begun(c, s)
		return
	}
	c.over = c.mortal
	if c.id != "" && !known {
		_ = w.call("job show", func(ctx context.Context, cl *control.Client) error {
			_, err := cl.JobShow(ctx, &control.JobShowRequest{Id: c.id})
			known = err == nil
			return err
		}, control.ErrNotFound)
		if !known {
			c.begin = nil
		}
	}
	moved := false
	w.must(w.call("disk show", func(ctx context.Context, cl *control.Client) error {
		k, err := cl.DiskShow(ctx, &control.DiskShowRequest{Id: diskID})
		moved = c.moves != "" && (k.GetImage() == c.moves || k.GetImage() == c.lands)
		return err
	}))
	w.Logf("    after the crash: known %v, moved %v", known, moved)
	switch {
	case c.moves == "" && !known:
		w.poll() // nothing has happened
		w.checkChain()
	case c.moves != "" && !moved:
		c.begin, c.end, c.mayFail = nil, nil, true // it had been recorded, and was not carried out
		if known {
			if c.id == "" {
				w.Fatalf("%s: it was answered, and has not happened", c.what)
			}
			w.begun(c, s)
			if w.job != nil {
				w.Fatalf("%s: the disk is not on the target, and the job goes on", c.what)
			}
		}
		w.checkChain()
	case c.id != "" && !known:
		w.Fatalf("%s: the disk is on the target, and there is no job", c.what)
	default:
		w.begun(c, s)
	}
}

// killInSwitch is a crash while a copy is finished.
func killInSwitch(w *world, t task, rng *rand.Rand) {
	source, id := w.chain[0].path, w.job.id
	w.Logf("    switch %s", id)
	answered := make(chan error, 1)
	s := w.during(t.load, func() {
		client := w.c
		ctx, cancel := w.ctx()
		defer cancel()
		go func() {
			_, err := client.Switch(ctx, &control.SwitchRequest{Target: id})
			answered <- err
		}()
		time.Sleep(delay(rng, 10*time.Millisecond))
		w.kill()
		w.start()
	})
	ok := <-answered == nil
	w.poll()
	switch {
	case w.job == nil:
		w.keep(source, s)
	case ok:
		w.Fatalf("the switch of %s was answered, and has not happened", id)
	}
}

func lose(w *world, t task, rng *rand.Rand) {
	for i, b := range t.load {
		if i == len(t.load)-1 {
			w.lose(b, delay(rng, 8*time.Millisecond))
			break
		}
		w.must(w.carryOut(b))
	}
	w.poll()
	w.checkBitmaps()
}

// restart is in order. A job that is at work waits for the next daemon: only without one it is known what the disk is
// made of.
func restart(w *world, t task, _ *rand.Rand) {
	w.during(t.load, func() {
		known := w.job == nil
		w.stop()
		if known {
			w.checkFiles()
		}
		w.start()
	})
	w.poll()
	w.checkBitmaps()
}

// jobsList makes up the operations.
func jobsList(rng *rand.Rand, size int64, n int) (all []task) {
	total := 0
	for _, k := range kinds {
		total += k.weight
	}
	for range n {
		x := rng.IntN(total)
		i := 0
		for ; x >= kinds[i].weight; i++ {
			x -= kinds[i].weight
		}
		t := task{kind: kinds[i].name, seed: rng.Uint64()}
		batches := rng.IntN(3)
		switch t.kind {
		case "snapshot", "copy by stream", "copy to add-cow", "bitmap", "backup", "finish", "cancel":
			// Of which one instant is kept.
			batches = rng.IntN(2)
		case "kill", "kill in a command", "lose the guest, too", "restart", "io":
			batches = 1 + rng.IntN(4)
		case "grow":
			t.grow = 4096 * (1 + rng.Int64N(80))
		}
		for range batches {
			b := batch(rng, size)
			for k := range b {
				switch rng.IntN(5) {
				case 0:
					b[k] = request{op: blk.OpRead, off: b[k].off, n: b[k].n}
				case 1:
					if k > 0 {
						b[k] = request{op: blk.OpFlush}
					}
				}
			}
			t.load = append(t.load, b)
		}
		size += t.grow
		all = append(all, t)
	}
	return all
}

// playJobs carries out the list on a disk of one setting and returns what it holds in the end.
func playJobs(t *testing.T, s setting, start []byte, tasks []task) []byte {
	w := newWorld(t, s, start)
	for i, task := range tasks {
		w.Logf("%d: %s, %d batches, of %d images", i, task.kind, len(task.load), len(w.chain))
		for _, k := range kinds {
			if k.name == task.kind {
				k.do(w, task, rand.New(rand.NewPCG(task.seed, 1)))
			}
		}
	}
	w.end()
	return w.model
}

// soaking: there is time.
var soaking bool

func TestJobs(t *testing.T) {
	for _, tool := range []string{"qemu-img"} {
		if _, err := exec.LookPath(tool); err != nil && os.Getenv("CI") == "" {
			t.Skipf("run scripts/setup-test.sh first: %v", err)
		}
	}
	if soak, err := time.ParseDuration(os.Getenv("BLKSTREAM_SOAK")); err == nil {
		soaking = true
		for deadline := time.Now().Add(soak); time.Now().Before(deadline) && !t.Failed(); {
			jobsOf(t, anySeed(), 120)
		}
		return
	}
	count := 30
	if os.Getenv("META_SEED") == "" {
		for seed := range uint64(2) {
			jobsOf(t, seed+1, count)
		}
	}
	jobsOf(t, anySeed(), count)
}

// jobsOf runs the list of one seed over all settings.
func jobsOf(t *testing.T, seed uint64, count int) {
	if n, err := strconv.Atoi(os.Getenv("META_OPS")); err == nil {
		count = n
	}
	rng := rand.New(rand.NewPCG(seed, 2))
	const size = 3<<20 + 5*4096 // no multiple of most clusters
	start := make([]byte, size)
	for i := range start[:size/4*3] {
		start[i] = byte(rng.Uint32())
	}
	clear(start[size/4 : size/4+300<<10])
	tasks := jobsList(rng, size, count)
	t.Run(fmt.Sprint("seed=", seed), func(t *testing.T) {
		results := make([][]byte, len(settings))
		t.Run("of", func(t *testing.T) {
			for i, s := range settings {
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					t.Logf("META_SEED=%d META_OPS=%d go test ./test/meta -run 'TestJobs/./of/%s'", seed, count, s.name)
					results[i] = playJobs(t, s, start, tasks)
				})
			}
		})
		for i, r := range results {
			if r != nil && results[0] != nil && !bytes.Equal(r, results[0]) {
				t.Errorf("META_SEED=%d: %s and %s end with other contents", seed, settings[0].name, settings[i].name)
			}
		}
	})
}
