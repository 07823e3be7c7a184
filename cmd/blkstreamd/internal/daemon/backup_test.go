// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

const (
	histBlock = 4096
	histRoom  = diskSize / histBlock
)

// history is all that a guest wrote, in blocks that carry the number of their write, with when each write was issued and
// when it was acknowledged.
type history struct {
	clock  atomic.Int64
	blocks [histRoom][]stamp
	over   chan struct{}
	wg     sync.WaitGroup
}

type stamp struct{ issued, acked int64 }

func fill(block, n int) []byte {
	b := make([]byte, histBlock)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], uint64(block)<<32|uint64(n))
	}
	return b
}

// writes lets a guest write to a disk until stop. What a block holds at first is write number 0.
func (b *bed) writes(id string) *history {
	b.Helper()
	h := &history{over: make(chan struct{})}
	g, err := frontend.Dial(b.Context(), b.path(id+".sock"), frontend.Options{})
	b.must(err)
	for k := range histRoom {
		_, err := g.WriteAt(fill(k, 0), int64(k)*histBlock)
		b.must(err)
		h.blocks[k] = []stamp{{h.clock.Add(1), h.clock.Add(1)}}
	}
	const workers = 4
	seed := uint64(time.Now().UnixNano())
	b.Logf("seed %d", seed)
	for w := range workers {
		h.wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for {
				select {
				case <-h.over:
					return
				default:
				}
				k := rng.IntN(histRoom/workers)*workers + w
				issued := h.clock.Add(1)
				if _, err := g.WriteAt(fill(k, len(h.blocks[k])), int64(k)*histBlock); err != nil {
					b.Error(err)
					return
				}
				h.blocks[k] = append(h.blocks[k], stamp{issued, h.clock.Add(1)})
			}
		})
	}
	b.Cleanup(func() { h.stop(); g.Close() })
	return h
}

func (h *history) stop() {
	select {
	case <-h.over:
	default:
		close(h.over)
	}
	h.wg.Wait()
}

// at wants an image to hold what the disk held at one instant, after one event and before another: everything acknowledged before it, and
// nothing issued after it. The guest has stopped.
func (b *bed) at(h *history, path, format string, from, to int64) {
	b.Helper()
	g, err := image.Open(blk.NewTask(), path, format, image.Options{ReadOnly: true})
	b.must(err)
	defer g.Close()
	all := make([]byte, diskSize)
	b.must(blk.Do(blk.NewTask(), g.Root, &blk.Request{Op: blk.OpRead, Len: diskSize, Data: blk.BytesVec(nil, all)}))
	for k, writes := range h.blocks {
		got := all[k*histBlock:][:histBlock]
		v := binary.LittleEndian.Uint64(got)
		n := int(v & (1<<32 - 1))
		if v>>32 != uint64(k) || n >= len(writes) || !bytes.Equal(got, fill(k, n)) {
			b.Fatalf("%s: block %d is none of the %d writes to it", path, k, len(writes))
		}
		// The instant is after this was issued, and before the next one was acknowledged.
		from = max(from, writes[n].issued)
		if n+1 < len(writes) {
			to = min(to, writes[n+1].acked)
		}
	}
	if from >= to {
		b.Errorf("%s: some blocks are of %d, others of %d", path, from, to)
	}
}

func (b *bed) backup(c *control.Client, r *control.BackupRequest) *control.Job {
	b.Helper()
	r.Disk = "a"
	j, err := c.Backup(b.Context(), r)
	b.must(err)
	return j
}

// A full backup and two incremental ones of a disk whose guest writes all the time, each of its own instant: a chain of
// images, one image that is kept up to date, and one that is left to itself.
func TestBackupUnderLoad(t *testing.T) {
	for _, source := range []string{"raw", "chain"} {
		t.Run(source, func(t *testing.T) {
			b := newBed(t)
			table := b.disk("a", b.path("a.img"))
			if source == "raw" {
				b.image("a.img")
			} else {
				b.layered(7)
				table = b.layeredDisk("a", "top.qcow2", "copy_on_read = true")
			}
			d, c := b.start(b.load("", table))
			b.addBitmap(c, "a", "chain", 4096)
			b.addBitmap(c, "a", "place", 1<<20)
			h := b.writes("a")
			type instant struct{ from, to int64 }
			at := map[string]instant{}
			back := func(r *control.BackupRequest) {
				t.Helper()
				from := h.clock.Load()
				name := r.Target
				r.Target, r.Speed, r.Id = b.path(name), 16<<20, name
				if r.Base != "" {
					r.Base = b.path(r.Base)
				}
				j := b.backup(c, r)
				at[name] = instant{from, h.clock.Load() + 1}
				if j.Kind != kindBackup || j.Target != r.Target || j.Stage != job.StageBackup && j.State == job.StateRunning {
					t.Errorf("the job is %v", j)
				}
				if j = b.wait(c, j.Id, job.StateCompleted); !j.TargetConsistent || !strings.Contains(j.Message, "holds disk a as of") {
					t.Errorf("completed: %v", j)
				}
			}
			back(&control.BackupRequest{Target: "plain.qcow2", ClusterSize: 2 << 20})
			back(&control.BackupRequest{Target: "full.qcow2", Bitmap: "chain", Full: true})
			back(&control.BackupRequest{Target: "one.qcow2", Bitmap: "chain", Base: "full.qcow2"})
			back(&control.BackupRequest{Target: "two.qcow2", Bitmap: "chain", Base: "one.qcow2", ClusterSize: 4096})
			back(&control.BackupRequest{Target: "raw", Bitmap: "place", Full: true, Format: image.Raw})
			back(&control.BackupRequest{Target: "place", Bitmap: "place", Full: true, Format: image.Raw})
			at["place"] = instant{}
			j := b.backup(c, &control.BackupRequest{Target: b.path("place"), Bitmap: "place", Existing: true, Format: image.Raw, OnCbwError: job.OnCBWErrorHold})
			b.wait(c, j.Id, job.StateCompleted)
			h.stop()
			from := h.clock.Load()
			j = b.backup(c, &control.BackupRequest{Target: b.path("place"), Bitmap: "place", Existing: true, Format: image.Raw})
			b.wait(c, j.Id, job.StateCompleted)
			at["place"] = instant{from, from + 1}
			if g := b.graph(c); strings.Contains(g, "copy-before-write") || strings.Contains(g, "copy-on-read") != (source == "chain") {
				t.Errorf("afterwards the graph is\n%s", g)
			}
			b.dirty(c, "a", "place", 0)
			b.stop(d)
			for name, i := range at {
				format := image.Qcow2
				if name == "raw" || name == "place" {
					format = image.Raw
				} else {
					b.sound(b.path(name))
				}
				b.at(h, b.path(name), format, i.from, i.to)
			}
		})
	}
}

// What changed alone is an image that can be put over the backup before later on, zeros included.
func TestBackupAlone(t *testing.T) {
	b := newBed(t)
	b.must(os.WriteFile(b.path("a.img"), bytes.Repeat([]byte{5}, diskSize), 0o600))
	f := b.load("", b.disk("a", b.path("a.img")))
	d, c := b.start(f)
	b.addBitmap(c, "a", "b", 0)
	b.wait(c, b.backup(c, &control.BackupRequest{Target: b.path("full"), Bitmap: "b", Full: true}).Id, job.StateCompleted)
	b.writeAt("a", 8192, 1<<20) // zeros
	g := b.guest("a")
	b.must(g.WriteZeroes(2<<20, 128<<10, true))
	_, err := g.WriteAt(bytes.Repeat([]byte{6}, 256<<10), 3<<20) // copied in several pieces, what follows is not
	b.must(err)
	b.must(g.Close())
	j := b.wait(c, b.backup(c, &control.BackupRequest{Target: b.path("alone"), Bitmap: "b", Speed: 1 << 20}).Id, job.StateCompleted)
	if j.BytesTotal != 512<<10 || !strings.Contains(j.Message, "nothing else") {
		t.Errorf("completed: %v", j)
	}
	b.dirty(c, "a", "b", 0)
	b.stop(d)
	b.must(image.Rebase(b.Context(), b.path("alone"), image.RebaseOptions{Layer: image.Layer{Path: "full", Format: image.Qcow2}, Unsafe: true}))
	r, err := os.ReadFile(b.path("a.img"))
	b.must(err)
	i, err := image.Open(blk.NewTask(), b.path("alone"), image.Qcow2, image.Options{ReadOnly: true})
	b.must(err)
	defer i.Close()
	got := make([]byte, diskSize)
	b.must(blk.Do(blk.NewTask(), i.Root, &blk.Request{Op: blk.OpRead, Len: diskSize, Data: blk.BytesVec(nil, got)}))
	if !bytes.Equal(got, r) {
		t.Error("over the full backup it is not what the disk was")
	}
}

// A backup does not live over the end of the daemon, in order or not; it says so, and its bitmap has lost nothing. One
// that was complete is.
func TestBackupRestart(t *testing.T) {
	for _, crash := range []bool{false, true} {
		b := newBed(t)
		b.must(os.WriteFile(b.path("a.img"), bytes.Repeat([]byte{5}, diskSize), 0o600))
		f := b.load("", b.disk("a", b.path("a.img")))
		d, c := b.start(f)
		b.addBitmap(c, "a", "b", 0)
		b.writeAt("a", 0, 1<<20)
		j := b.backup(c, &control.BackupRequest{Target: b.path("t"), Bitmap: "b", Full: true, Speed: 1 << 20, Id: "j"})
		if m := b.bitmap(c, "a", "b"); j.State != job.StateRunning || m.State != bitmapBusy {
			t.Errorf("%v, %v", j, m)
		}
		b.writeAt("a", 2<<20)
		if crash {
			b.crash(d)
		} else {
			b.stop(d)
		}
		d, c = b.start(f)
		j, err := c.JobShow(b.Context(), &control.JobShowRequest{Id: "j"})
		b.must(err)
		if j.State != job.StateFailed || j.TargetConsistent || !strings.Contains(j.Error, "instant") ||
			!strings.Contains(j.Message, "t is incomplete and of no use: remove it") || !strings.Contains(j.Message, "bitmap b has kept") {
			t.Errorf("after a restart: %v", j)
		}
		if m := b.bitmap(c, "a", "b"); m.State != bitmapRecording || m.DirtyBytes < 3*64<<10 {
			t.Errorf("after a restart: %v", m)
		}
		if g := b.graph(c); strings.Contains(g, "copy-before-write") {
			t.Errorf("after a restart the graph is\n%s", g)
		}
		b.stop(d)
		// The daemon died between the last two writes of the journal.
		r := job.Record{ID: "done", Kind: kindBackup, Disk: "a", Target: b.path("t"), State: job.StateRunning, TargetConsistent: true, Message: "m"}
		s, err := job.OpenStore(b.path("state"))
		b.must(err)
		b.must(s.Save("jobs", "done", &r))
		d, c = b.start(f)
		if j, err = c.JobShow(b.Context(), &control.JobShowRequest{Id: "done"}); err != nil || j.State != job.StateCompleted || j.Message != "m" {
			t.Errorf("a backup that was complete: %v, %v", j, err)
		}
		b.stop(d)
	}
}

func TestBackupRefused(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	b.image("plain")
	b.image("small")
	b.must(os.Truncate(b.path("small"), diskSize/2))
	b.must(os.Symlink(b.path("middle.qcow2"), b.path("link")))
	d, c := b.start(b.load(fmt.Sprintf("image_roots = [%q]", b.dir), b.layeredDisk("a", "top.qcow2"), b.disk("plain", b.path("plain"))))
	b.addBitmap(c, "a", "b", 0)
	target := b.path("t")
	for _, r := range []struct {
		req  *control.BackupRequest
		kind error
		want string
	}{
		{&control.BackupRequest{Disk: "nope"}, control.ErrNotFound, "nope"},
		{&control.BackupRequest{Target: "t"}, control.ErrInvalid, "absolute"},
		{&control.BackupRequest{Target: "/elsewhere"}, control.ErrInvalid, "/elsewhere"},
		{&control.BackupRequest{Target: target, Id: "/"}, control.ErrInvalid, "job id"},
		{&control.BackupRequest{Target: target, Format: "vmdk"}, control.ErrUnsupported, "vmdk"},
		{&control.BackupRequest{Target: target, Speed: -1}, control.ErrInvalid, "negative"},
		{&control.BackupRequest{Target: target, CbwTimeout: -1}, control.ErrInvalid, "negative"},
		{&control.BackupRequest{Target: target, OnCbwError: "x"}, control.ErrInvalid, "break or hold"},
		{&control.BackupRequest{Target: target, OnCbwError: "hold", CbwTimeout: 1}, control.ErrInvalid, "no timeout"},
		{&control.BackupRequest{Target: target, OnTargetError: "x"}, control.ErrInvalid, "policy"},
		{&control.BackupRequest{Target: target, OnSourceError: "x"}, control.ErrInvalid, "policy"},
		{&control.BackupRequest{Target: target, Bitmap: "nope"}, control.ErrNotFound, "nope"},
		{&control.BackupRequest{Target: target, Bitmap: "b", Format: "raw"}, control.ErrInvalid, "qcow2"},
		{&control.BackupRequest{Target: target, Full: true}, control.ErrInvalid, "bitmap"},
		{&control.BackupRequest{Target: target, Base: b.path("base.raw")}, control.ErrInvalid, "bitmap"},
		{&control.BackupRequest{Target: target, Bitmap: "b", Base: "base.raw"}, control.ErrInvalid, "absolute"},
		{&control.BackupRequest{Target: target, BaseFormat: "raw"}, control.ErrInvalid, "no base"},
		{&control.BackupRequest{Target: target, Format: "raw", ClusterSize: 65536}, control.ErrInvalid, "new qcow2"},
		{&control.BackupRequest{Target: target, Existing: true, Bitmap: "b", Base: b.path("base.raw")}, control.ErrInvalid, "new qcow2"},
		{&control.BackupRequest{Target: target, ClusterSize: 77}, control.ErrInvalid, "77"},
		{&control.BackupRequest{Target: target, Bitmap: "b", Base: b.path("plain"), BaseFormat: "raw"}, control.ErrPrecondition, "plain"},
		{&control.BackupRequest{Target: target, Bitmap: "b", Base: "/elsewhere"}, control.ErrInvalid, "/elsewhere"},
		{&control.BackupRequest{Target: target, Bitmap: "b", Base: b.path("nope")}, nil, "nope"},
		{&control.BackupRequest{Target: b.path("plain"), Existing: true}, control.ErrPrecondition, `image of disk "plain"`},
		{&control.BackupRequest{Target: b.path("link"), Existing: true}, control.ErrPrecondition, `disk "a" reads from`},
		{&control.BackupRequest{Target: b.path("small")}, control.ErrExists, "--existing"},
		{&control.BackupRequest{Target: b.path("small"), Existing: true, Format: "raw"}, control.ErrInvalid, "larger"},
		{&control.BackupRequest{Target: b.path("small"), Existing: true}, control.ErrInvalid, "qcow2"}, // which it is not
	} {
		if r.req.Disk == "" {
			r.req.Disk = "a"
		}
		_, err := c.Backup(b.Context(), r.req)
		if r.kind == nil {
			r.kind = err
		}
		if err == nil {
			t.Errorf("%v: not refused", r.req)
			continue
		}
		b.wants(err, r.kind, r.want)
		if exists(target) {
			t.Fatalf("%v: the target is left", r.req)
		}
	}
	b.backup(c, &control.BackupRequest{Target: target, Id: "j", Speed: 1})
	_, err := c.Backup(b.Context(), &control.BackupRequest{Disk: "a", Target: b.path("t2")})
	b.wants(err, control.ErrPrecondition, "job j works")
	_, err = c.Backup(b.Context(), &control.BackupRequest{Disk: "plain", Target: target, Existing: true})
	b.wants(err, control.ErrPrecondition, "job j writes to")
	_, err = b.snapshot(c, "a", b.path("overlay"))
	b.wants(err, control.ErrPrecondition, "job j")
	if g := b.graph(c); !strings.Contains(g, "copy-before-write") || !strings.Contains(g, target) {
		t.Errorf("the graph is\n%s", g)
	}
	_, err = c.JobCancel(b.Context(), &control.JobCancelRequest{Id: "j"})
	b.must(err)
	if j, err := c.JobShow(b.Context(), &control.JobShowRequest{Id: "j"}); err != nil || j.State != job.StateCancelled || !strings.Contains(j.Message, "incomplete") {
		t.Errorf("cancelled: %v, %v", j, err)
	}
	b.stop(d)
}

// A disk with copy_on_read: the backup does not fill the image.
func TestBackupReadsBelow(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2", "copy_on_read = true")))
	b.wait(c, b.backup(c, &control.BackupRequest{Target: b.path("t")}).Id, job.StateCompleted)
	b.stop(d)
	if n := b.held("top.qcow2"); n != 0 {
		t.Errorf("the image holds %d bytes", n)
	}
	b.imageHolds(b.path("t"), image.Qcow2, 7)
	b.sound(b.path("t"))
}

// A disk whose image is locked while it is used only, and one that is read-only.
func TestBackupOfOtherDisks(t *testing.T) {
	b := newBed(t)
	for _, name := range []string{"a.img", "ro.img"} {
		b.must(os.WriteFile(b.path(name), bytes.Repeat([]byte{5}, diskSize), 0o600))
	}
	d, c := b.start(b.load("", strings.Replace(b.disk("a", b.path("a.img")), "writeback", "none", 1)+"lock = \"running\"\n", b.disk("ro", b.path("ro.img"))+"read_only = true\n"))
	b.wait(c, b.backup(c, &control.BackupRequest{Target: b.path("t")}).Id, job.StateCompleted)
	j, err := c.Backup(b.Context(), &control.BackupRequest{Disk: "ro", Target: b.path("t2")})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	b.unused("a.img")
	b.stop(d)
	for _, name := range []string{"t", "t2"} {
		b.imageHolds(b.path(name), image.Qcow2, 5)
		b.sound(b.path(name))
	}
}
