// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

const diskSize = 4 << 20

func TestMain(m *testing.M) {
	if socket := os.Getenv("BLKSTREAM_TEST_STRANGER"); socket != "" {
		os.Exit(stranger(socket))
	}
	os.Exit(m.Run())
}

// bed is a folder with images, a configuration and its state.
type bed struct {
	*testing.T
	dir string
	log logBuffer
}

func newBed(t *testing.T) *bed {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "bsd") // short: a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(dir)
		os.RemoveAll(copyPath(filepath.Join(dir, "state"), "j")) // what a test leaves in memory
	})
	return &bed{T: t, dir: dir}
}

func (b *bed) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bed) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// image makes an empty image.
func (b *bed) image(name string) string {
	b.Helper()
	b.must(file.Create(b.path(name), diskSize))
	return b.path(name)
}

// disk is a [[disk]] table.
func (b *bed) disk(id, image string) string {
	return fmt.Sprintf("[[disk]]\nid = %q\nsocket = %q\nimage = %q\nformat = \"raw\"\ncache = \"writeback\"\n",
		id, b.path(id+".sock"), image)
}

// load writes a configuration and reads it. daemon are further keys of the table [daemon].
func (b *bed) load(daemon string, disks ...string) *config.File {
	b.Helper()
	text := fmt.Sprintf("[daemon]\ncontrol = %q\nstate_dir = %q\n%s\n%s",
		b.path("control"), b.path("state"), daemon, strings.Join(disks, ""))
	b.must(os.WriteFile(b.path("b.toml"), []byte(text), 0o600))
	f, err := config.Load(b.path("b.toml"))
	b.must(err)
	return f
}

func (b *bed) try(f *config.File) (*Daemon, error) {
	return Start(f, Options{Version: "test", Log: slog.New(slog.NewTextHandler(&b.log, nil))})
}

// start returns a daemon, and a client of it.
func (b *bed) start(f *config.File) (*Daemon, *control.Client) {
	b.Helper()
	d, err := b.try(f)
	b.must(err)
	b.Cleanup(func() { d.Stop() }) // again, after a test that stops it
	return d, b.dial(f)
}

func (b *bed) dial(f *config.File) *control.Client {
	b.Helper()
	c, err := control.Dial(f.Daemon.Control)
	b.must(err)
	b.Cleanup(func() { c.Close() })
	return c
}

func (b *bed) stop(d *Daemon) {
	b.Helper()
	b.must(d.Stop())
}

// refused wants a start to fail with an error that has all of these in it, and nothing to be left behind.
func (b *bed) refused(f *config.File, want ...string) {
	b.Helper()
	d, err := b.try(f)
	if err == nil {
		b.stop(d)
		b.Fatalf("started; want an error with %q", want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			b.Errorf("the error has no %q: %v", w, err)
		}
	}
}

// guest is a driver on the disk.
func (b *bed) guest(id string) *frontend.Disk {
	b.Helper()
	g, err := frontend.Dial(b.Context(), b.path(id+".sock"), frontend.Options{})
	b.must(err)
	return g
}

func (b *bed) write(id string, fill byte) {
	b.Helper()
	g := b.guest(id)
	defer g.Close()
	_, err := g.WriteAt(bytes.Repeat([]byte{fill}, 4096), 8192)
	b.must(err)
	b.must(g.Flush())
}

func (b *bed) holds(id string, fill byte) {
	b.Helper()
	g := b.guest(id)
	defer g.Close()
	got := make([]byte, 4096)
	_, err := g.ReadAt(got, 8192)
	b.must(err)
	if !bytes.Equal(got, bytes.Repeat([]byte{fill}, 4096)) {
		b.Errorf("disk %s holds %#x, want %#x", id, got[0], fill)
	}
}

// copyTo copies the disk and waits until the job is ready.
func (b *bed) copyTo(c *control.Client, disk, target string) *control.Job {
	b.Helper()
	j, err := c.Copy(b.Context(), &control.CopyRequest{Disk: disk, Target: target, Existing: exists(target)})
	b.must(err)
	return b.wait(c, j.Id, job.StateReady)
}

func (b *bed) move(c *control.Client, disk, target string) *control.SwitchResponse {
	b.Helper()
	b.copyTo(c, disk, target)
	r, err := c.Switch(b.Context(), &control.SwitchRequest{Target: disk})
	b.must(err)
	return r
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// wait waits for a job's state.
func (b *bed) wait(c *control.Client, id, state string) *control.Job {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	watch, err := c.JobWatch(ctx, &control.JobWatchRequest{Id: id})
	b.must(err)
	for {
		ev, err := watch.Recv()
		if err != nil {
			b.Fatalf("job %s does not become %s: %v", id, state, err)
		}
		if ev.Job.State == state {
			return ev.Job
		}
	}
}

func (b *bed) record(id string) (r record) {
	b.Helper()
	text, err := os.ReadFile(b.path("state/disks/" + id + ".json"))
	b.must(err)
	b.must(json.Unmarshal(text, &r))
	return r
}

// wants an error of this kind that has all of these in it.
func (b *bed) wants(err, kind error, want ...string) {
	b.Helper()
	if !errors.Is(err, kind) {
		b.Errorf("the error is %v, want the kind %q", err, kind)
		return
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			b.Errorf("the error has no %q: %v", w, err)
		}
	}
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// The switch is recorded, and the record wins over a configuration that was not changed, with a warning that says
// which line to change. Then the configuration is changed, and all is as if the disk had always been there.
func TestRestartAfterSwitch(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.img")
	f := b.load("", b.disk("disk0", old))
	d, c := b.start(f)
	b.write("disk0", 1)
	where := fmt.Sprintf("line %d of %s", f.ImageLine("disk0"), f.Path)
	if r := b.move(c, "disk0", target); !strings.Contains(r.Message, where) || !strings.Contains(r.Message, target) {
		t.Errorf("the switch does not say what to change (%s, %s): %s", where, target, r.Message)
	}
	b.write("disk0", 2)
	b.stop(d)

	d, c = b.start(f)
	if log := b.log.String(); !strings.Contains(log, "level=WARN") || !strings.Contains(log, where) {
		t.Errorf("started with the old configuration, without a warning that says %q:\n%s", where, log)
	}
	k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk0"})
	b.must(err)
	if k.Image != target || k.ConfiguredImage != old || !strings.Contains(k.Warning, where) || !strings.Contains(k.Warning, target) {
		t.Errorf("disk show: %v", k)
	}
	b.holds("disk0", 2)
	b.stop(d)

	d, c = b.start(b.load("", b.disk("disk0", target)))
	k, err = c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk0"})
	b.must(err)
	if k.Warning != "" || k.Image != target {
		t.Errorf("with the new configuration: %v", k)
	}
	b.holds("disk0", 2)
	b.stop(d)
	if r := b.record("disk0"); r.Image != target || len(r.Moved) != 0 {
		t.Errorf("the record remembers the move: %+v", r)
	}
}

// A disk that moved twice is served from the last image, whichever of the earlier ones the configuration names.
func TestMovedTwice(t *testing.T) {
	b := newBed(t)
	first, second, third := b.image("1.img"), b.path("2.img"), b.path("3.img")
	d, c := b.start(b.load("", b.disk("disk0", first)))
	for i, target := range []string{second, third} {
		b.write("disk0", byte(i))
		b.move(c, "disk0", target)
	}
	b.write("disk0", 9)
	b.stop(d)
	for _, image := range []string{first, second} {
		d, _ = b.start(b.load("", b.disk("disk0", image)))
		b.holds("disk0", 9)
		b.stop(d)
		if r := b.record("disk0"); r.Image != third {
			t.Errorf("with %s configured: %+v", image, r)
		}
	}
}

// A configuration that names an image which the disk was never on is one or the other mistake: the user is asked.
func TestThirdImage(t *testing.T) {
	b := newBed(t)
	old, target, third := b.image("old.img"), b.path("new.img"), b.image("third.img")
	d, c := b.start(b.load("", b.disk("disk0", old)))
	b.move(c, "disk0", target)
	b.stop(d)

	f := b.load("", b.disk("disk0", third))
	b.refused(f, target, third, fmt.Sprintf("%s:%d: ", f.Path, f.ImageLine("disk0")), "state/disks/disk0.json")
	if r := b.record("disk0"); r.Image != target {
		t.Errorf("the refusal changed the record: %+v", r)
	}
	// As it says, the record may be removed.
	b.must(os.Remove(b.path("state/disks/disk0.json")))
	d, _ = b.start(f)
	b.stop(d)
	if r := b.record("disk0"); r.Image != third {
		t.Errorf("without a record: %+v", r)
	}
	// A disk that was not moved may be given any image.
	d, _ = b.start(b.load("", b.disk("disk0", old)))
	b.stop(d)
}

// The right image under a wrong format would show the guest the format's metadata, and let it write there.
func TestMovedToAnotherFormat(t *testing.T) {
	b := newBed(t)
	image := b.image("new.qcow2")
	s, err := job.OpenStore(b.path("state"))
	b.must(err)
	b.must(s.Save(recordKind, "disk0", &record{Image: image, Format: "qcow2", Moved: []string{"/old.img"}}))
	f := b.load("", b.disk("disk0", image))
	b.refused(f, image, "raw", `format = "qcow2"`, fmt.Sprintf("%s:%d: ", f.Path, f.ImageLine("disk0")))
	if r := b.record("disk0"); r.Format != "qcow2" {
		t.Errorf("the refusal changed the record: %+v", r)
	}
}

// The record of the switch replaces the old one as a whole. If it cannot be written the guest stays where it is, and
// so does a restart.
func TestSwitchRecord(t *testing.T) {
	b := newBed(t)
	old, target := b.image("old.img"), b.path("new.img")
	f := b.load("", b.disk("disk0", old))
	d, c := b.start(f)
	b.copyTo(c, "disk0", target)

	kept := b.path("kept")
	b.must(os.Link(b.path("state/disks/disk0.json"), kept))
	b.must(os.Mkdir(b.path("state/disks/disk0.json.new"), 0o700)) // in the way
	if _, err := c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"}); err == nil {
		t.Fatal("switched without a record")
	}
	b.write("disk0", 3)
	k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk0"})
	b.must(err)
	if r := b.record("disk0"); k.Image != old || r.Image != old {
		t.Errorf("after a switch that could not be recorded: on %s, recorded %+v", k.Image, r)
	}
	b.must(os.Remove(b.path("state/disks/disk0.json.new")))

	_, err = c.Switch(t.Context(), &control.SwitchRequest{Target: "disk0"})
	b.must(err)
	if r := b.record("disk0"); r.Image != target || len(r.Moved) != 1 || r.Moved[0] != old {
		t.Errorf("after the switch: %+v", r)
	}
	text, err := os.ReadFile(kept)
	b.must(err)
	if !bytes.Contains(text, []byte(old)) || bytes.Contains(text, []byte(target)) {
		t.Errorf("the record was written over, not replaced: %s", text)
	}
	b.holds("disk0", 3)
	b.stop(d)
}

type notASocket struct{ path string }

func (n notASocket) File() (*os.File, error) { return os.Open(n.path) }

// Sockets that were inherited: one that listens is served for ever, one that is connected until its front-end goes, which
// is the end of a daemon for one disk.
func TestInheritedSocket(t *testing.T) {
	b := newBed(t)
	inherit := func(s interface{ File() (*os.File, error) }) string {
		f, err := s.File()
		b.must(err)
		defer f.Close()
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		b.must(err)
		return fmt.Sprintf("fd:%d", fd)
	}
	listen := func(id string) *net.UnixListener {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: b.path(id + ".sock"), Net: "unix"})
		b.must(err)
		t.Cleanup(func() { l.Close() })
		return l
	}
	// connected returns a guest and the daemon's end of its connection; dialling ends when somebody serves that.
	connected := func(id string) (guest chan *frontend.Disk, socket string) {
		l := listen(id)
		guest = make(chan *frontend.Disk, 1)
		go func() { guest <- b.guest(id) }()
		c, err := l.AcceptUnix()
		b.must(err)
		defer c.Close()
		return guest, inherit(c)
	}
	one := func(socket string, readOnly bool) *config.File {
		k := config.NewDisk()
		k.ID, k.Image, k.Format, k.Socket, k.Cache, k.ReadOnly = "disk0", b.path("a.img"), "raw", socket, "writeback", readOnly
		b.must(k.Validate())
		return &config.File{Disks: []config.Disk{k}}
	}
	b.image("a.img")

	d, err := b.try(one(inherit(listen("disk0")), false))
	b.must(err)
	for i := range byte(3) {
		b.write("disk0", i)
		b.holds("disk0", i)
	}
	b.stop(d)

	guest, socket := connected("disk1")
	d, err = b.try(one(socket, true))
	b.must(err)
	g := <-guest
	if _, err := g.WriteAt(make([]byte, 512), 0); !errors.Is(err, frontend.ErrIO) {
		t.Errorf("a write to a read-only disk: %v", err)
	}
	select {
	case <-d.Done():
		t.Error("done while there is a front-end")
	default:
	}
	b.must(g.Close())
	<-d.Done()
	b.stop(d)

	// Several disks, each with a connection: the end of one is not the end of the others.
	guest2, socket2 := connected("disk2")
	guest3, socket3 := connected("disk3")
	disk := func(id, socket string) string {
		return strings.Replace(b.disk(id, b.image(id+".img")), b.path(id+".sock"), socket, 1)
	}
	d, _ = b.start(b.load("", disk("disk2", socket2), disk("disk3", socket3)))
	b.must((<-guest2).Close())
	k, err := d.find("disk2")
	b.must(err)
	<-k.served
	select {
	case <-d.Done():
		t.Error("one disk's end is the daemon's")
	default:
	}
	g = <-guest3
	_, err = g.WriteAt(make([]byte, 512), 0)
	b.must(err)
	b.must(g.Close())
	b.stop(d)

	for _, socket := range []string{"fd:999", inherit(notASocket{b.path("a.img")})} {
		if d, err := b.try(one(socket, false)); err == nil || !strings.Contains(err.Error(), socket) {
			t.Errorf("%s, which is no socket: %v", socket, err)
			b.stop(d)
		}
	}
}

func TestAddedDisk(t *testing.T) {
	b := newBed(t)
	f := b.load("")
	d, c := b.start(f)
	zero := uint32(0)
	add := &control.DiskAddRequest{Id: "extra", Socket: b.path("extra.sock"), Image: b.image("extra.img"), Format: "raw", Cache: "writeback", PollUs: &zero, Queues: 3}
	_, err := c.DiskAdd(t.Context(), add)
	b.must(err)
	b.write("extra", 5)
	b.stop(d)
	d, c = b.start(f)
	b.holds("extra", 5)
	target := b.path("moved.img")
	b.move(c, "extra", target)
	b.write("extra", 6)
	b.stop(d)

	// It is there again, as it was added, where it moved to; the configuration has nothing to say about it.
	d, c = b.start(f)
	k, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "extra"})
	b.must(err)
	if k.Image != target || k.ConfiguredImage != "" || k.Warning != "" || k.Queues != 3 {
		t.Errorf("an added disk after a restart: %v", k)
	}
	if k, err := d.find("extra"); err != nil || k.spec.PollUS != 0 {
		t.Errorf("polling that was switched off is on: %v", err)
	}
	b.holds("extra", 6)
	k.State = "connected"
	for k.State != "idle" { // the daemon has yet to see that the guest is gone
		k, err = c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "extra"})
		b.must(err)
	}
	_, err = c.DiskRemove(t.Context(), &control.DiskRemoveRequest{Id: "extra"})
	b.must(err)
	b.stop(d)

	// It was removed for good, and its socket with it. Its image stays.
	d, c = b.start(f)
	if _, err := c.DiskShow(t.Context(), &control.DiskShowRequest{Id: "extra"}); !errors.Is(err, control.ErrNotFound) {
		t.Errorf("a removed disk after a restart: %v", err)
	}
	if exists(add.Socket) || !exists(target) {
		t.Error("the socket of a removed disk is there, or its image is not")
	}

	add.PollUs = nil
	_, err = c.DiskAdd(t.Context(), add)
	b.must(err)
	if k, err := d.find("extra"); err != nil || k.spec.PollUS != config.DefaultPollUS {
		t.Errorf("polling by default: %v", err)
	}
	// What is added later must not collide with what is there.
	for _, change := range []func(*control.DiskAddRequest){
		func(r *control.DiskAddRequest) { r.Id = "other" }, // socket and image are in use
		func(r *control.DiskAddRequest) { r.Socket, r.Image = b.path("o.sock"), b.image("o.img") },
	} {
		r := &control.DiskAddRequest{Id: add.Id, Socket: add.Socket, Image: add.Image, Format: "raw"}
		change(r)
		_, err := c.DiskAdd(t.Context(), r)
		b.wants(err, control.ErrExists)
	}
	_, err = c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: "other", Socket: b.path("o.sock"), Image: add.Image, Format: "raw"})
	b.wants(err, control.ErrPrecondition, "extra")
	// A descriptor has been inherited by the daemon, not by who asks.
	_, err = c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: "other", Socket: "fd:3", Image: b.path("o.img"), Format: "raw"})
	b.wants(err, control.ErrInvalid, "fd:3")
	b.stop(d)
}

// A disk that was removed and is added again under its id does not go back to an image that it was moved away from, now or
// after a restart; nor does the configuration take one that was added at run time to another image.
func TestAddedAgain(t *testing.T) {
	b := newBed(t)
	old, target, other := b.image("old.img"), b.path("new.img"), b.image("other.img")
	f := b.load("", b.disk("disk0", old), b.disk("disk1", other))
	d, c := b.start(f)
	add := func(id, image string) error {
		_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: id, Socket: b.path(id + ".sock"), Image: image, Format: "raw"})
		return err
	}
	b.move(c, "disk0", target)
	for _, id := range []string{"disk0", "disk1"} {
		_, err := c.DiskRemove(t.Context(), &control.DiskRemoveRequest{Id: id})
		b.must(err)
	}
	b.wants(add("disk0", old), control.ErrPrecondition, old, target)
	b.wants(add("disk1", b.image("x.img")), control.ErrPrecondition, other)
	b.must(add("disk0", target))
	b.write("disk0", 4)
	b.must(add("extra", b.image("extra.img")))
	b.stop(d)

	d, _ = b.start(f)
	b.holds("disk0", 4)
	b.stop(d)
	b.refused(b.load("", b.disk("disk0", target), b.disk("extra", b.image("y.img"))), b.path("extra.img"), b.path("y.img"))
	d, _ = b.start(b.load("", b.disk("disk0", target), b.disk("extra", b.path("extra.img"))))
	b.stop(d)
}

// The guest is told of a new size, by resize or by a larger target, and its data are not cut off.
func TestResize(t *testing.T) {
	b := newBed(t)
	larger := b.path("larger.img")
	b.must(file.Create(larger, 3*diskSize))
	b.must(file.Create(b.path("odd.img"), diskSize+512))
	disk := b.disk("disk0", b.image("a.img")) + "block_size = 4096\n"
	b.refused(b.load("", strings.Replace(disk, "a.img", "odd.img", 1)), "odd.img", "not a multiple of block_size 4096")
	d, c := b.start(b.load("", disk))
	g := b.guest("disk0")
	defer g.Close()
	b.must(g.WriteZeroes(0, 4096, false))
	told := func(size int64) {
		t.Helper()
		select {
		case <-g.ConfigChanged():
		case <-time.After(10 * time.Second):
			t.Error("the guest is not told")
		}
		if cfg, err := g.Config(); err != nil || cfg.Size() != size {
			t.Errorf("%d bytes, want %d; error %v", cfg.Size(), size, err)
		}
		if _, err := g.WriteAt(make([]byte, 4096), size-4096); err != nil {
			t.Errorf("a write to the end: %v", err)
		}
	}
	resize := func(size int64) error {
		_, err := c.DiskResize(t.Context(), &control.DiskResizeRequest{Id: "disk0", Size: size})
		return err
	}
	for _, size := range []int64{-4096, 0, 4096, diskSize - 4096, 2*diskSize + 512} {
		b.wants(resize(size), control.ErrInvalid)
	}
	if cfg, err := g.Config(); err != nil || cfg.Size() != diskSize {
		t.Errorf("%d bytes after what was refused; error %v", cfg.Size(), err)
	}
	b.must(resize(2 * diskSize))
	told(2 * diskSize)
	_, err := c.DiskRemove(t.Context(), &control.DiskRemoveRequest{Id: "disk0"})
	b.wants(err, control.ErrPrecondition, "a guest uses")
	b.move(c, "disk0", larger)
	told(3 * diskSize)
	b.stop(d)
}

// What cannot be copied is refused, and leaves nothing behind.
func TestCopyRefused(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load("", b.disk("disk0", b.image("a.img")), b.disk("ro", b.image("ro.img"))+"read_only = true\n"))
	target := b.path("t.img")
	b.copyTo(c, "disk0", b.path("first.img"))
	_, err := c.JobCancel(t.Context(), &control.JobCancelRequest{Id: "copy-disk0-1"})
	b.must(err)
	for _, r := range []struct {
		req  *control.CopyRequest
		kind error
	}{
		{&control.CopyRequest{Disk: "nobody"}, control.ErrNotFound},
		{&control.CopyRequest{Disk: "ro"}, control.ErrPrecondition},
		{&control.CopyRequest{Granularity: 2048}, control.ErrInvalid},
		{&control.CopyRequest{Granularity: 32 << 20}, control.ErrInvalid},
		{&control.CopyRequest{Granularity: 65537}, control.ErrInvalid},
		{&control.CopyRequest{Speed: -1}, control.ErrInvalid},
		{&control.CopyRequest{SwitchMode: "now"}, control.ErrInvalid},
		{&control.CopyRequest{Method: "teleport"}, control.ErrInvalid},
		{&control.CopyRequest{OnTargetError: "ignore"}, control.ErrInvalid},
		{&control.CopyRequest{OnSourceError: "ignore"}, control.ErrInvalid},
		{&control.CopyRequest{Format: "vmdk"}, control.ErrUnsupported},
		{&control.CopyRequest{Target: "t.img"}, control.ErrInvalid},
		{&control.CopyRequest{Id: "../x"}, control.ErrInvalid},
		{&control.CopyRequest{Id: "copy-disk0-1"}, control.ErrExists},
		{&control.CopyRequest{Existing: true, Preallocation: "full"}, control.ErrInvalid},
		{&control.CopyRequest{Base: "a.img"}, control.ErrInvalid},
	} {
		if r.req.Disk == "" {
			r.req.Disk = "disk0"
		}
		if r.req.Target == "" {
			r.req.Target = target
		}
		_, err := c.Copy(t.Context(), r.req)
		b.wants(err, r.kind)
		if exists(target) {
			t.Fatalf("%v left a target", r.req)
		}
	}
	for _, g := range []int64{4096, 16 << 20} {
		j, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Granularity: g, SwitchMode: "auto"})
		b.must(err)
		b.wait(c, j.Id, job.StateCompleted)
		target += "2"
	}
	b.stop(d)
}

// A daemon that died after the switch was recorded, and before the job's end was, leaves a job that is complete. One whose
// target is gone has failed.
func TestUnfinishedJobs(t *testing.T) {
	b := newBed(t)
	now := b.image("now.img")
	s, err := job.OpenStore(b.path("state"))
	b.must(err)
	b.must(s.Save(recordKind, "disk0", &record{Image: now, Format: "raw", Moved: []string{b.image("old.img")}}))
	open := job.Record{Kind: kindCopy, Format: "raw", Source: b.path("old.img"), Stage: job.StageSwitch, State: job.StateReady}
	for id, target := range map[string]string{"disk0": now, "disk1": b.path("gone.img")} {
		r := open
		r.ID, r.Disk, r.Target, r.TargetConsistent = "j-"+id, id, target, true
		b.must(s.Save("jobs", r.ID, &r))
	}
	d, c := b.start(b.load("", b.disk("disk0", b.path("old.img")), b.disk("disk1", b.image("1.img"))))
	j := b.wait(c, "j-disk0", job.StateCompleted)
	if !strings.Contains(j.Message, now) {
		t.Errorf("completed without a word of what to change: %v", j)
	}
	j = b.wait(c, "j-disk1", job.StateFailed)
	if j.TargetConsistent || !strings.Contains(j.Error, "gone.img") {
		t.Errorf("failed as %v", j)
	}
	b.write("disk0", 1)
	b.write("disk1", 1)
	b.stop(d)
}

// No two disks or jobs may write to one image.
func TestOneWriter(t *testing.T) {
	b := newBed(t)
	one, two, target := b.image("1.img"), b.image("2.img"), b.image("t.img")
	link := b.path("link.img")
	b.must(os.Link(target, link))
	f := b.load("", b.disk("disk1", one), b.disk("disk2", two))
	d, c := b.start(f)
	try := func(disk, target string) error {
		_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: disk, Target: target, Existing: exists(target)})
		return err
	}
	b.wants(try("disk1", one), control.ErrPrecondition, `the image of disk "disk1"`)
	b.wants(try("disk1", two), control.ErrPrecondition, `the image of disk "disk2"`)
	b.copyTo(c, "disk1", target)
	b.wants(try("disk1", b.path("other.img")), control.ErrPrecondition, "copy-disk1-1")
	b.wants(try("disk2", target), control.ErrPrecondition, "copy-disk1-1")
	b.wants(try("disk2", link), control.ErrPrecondition, "copy-disk1-1")
	_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: "disk3", Socket: b.path("3.sock"), Image: target, Format: "raw"})
	b.wants(err, control.ErrPrecondition, "copy-disk1-1")
	if exists(b.path("other.img")) {
		t.Error("a copy that was refused left a target")
	}
	_, err = c.DiskRemove(t.Context(), &control.DiskRemoveRequest{Id: "disk1"})
	b.wants(err, control.ErrPrecondition, "copy-disk1-1")

	// The next daemon is told that the target is a disk: the job must not write to it.
	b.stop(d)
	d, c = b.start(b.load("", b.disk("disk1", one), b.disk("disk2", two), b.disk("disk3", target)))
	b.write("disk3", 7)
	j := b.wait(c, "copy-disk1-1", job.StateFailed)
	if !strings.Contains(j.Error, target) || j.TargetConsistent {
		t.Errorf("a job whose target became a disk: %v", j)
	}
	b.holds("disk3", 7)
	b.stop(d)

	alias := b.path("alias.img") // another name, which the configuration lets through
	b.must(os.Symlink(one, alias))
	b.refused(b.load("", b.disk("disk1", one), b.disk("disk2", alias)), "is in use") // by whichever came first
	// Another program, or another daemon, has its own descriptors; the lock is the image's.
	n, err := file.Open(two, file.Options{})
	b.must(err)
	b.refused(f, two, "disk2")
	b.must(n.Close())
	d, _ = b.start(f)
	b.stop(d)
}

func TestImageRoots(t *testing.T) {
	b := newBed(t)
	b.must(os.Mkdir(b.path("in"), 0o700))
	inside, outside := b.image("in/a.img"), b.image("a.img")
	b.must(os.Symlink(outside, b.path("in/link.img")))
	b.must(os.Mkdir(b.path("out"), 0o700))
	b.must(os.Symlink(b.path("out"), b.path("in/up")))
	roots := fmt.Sprintf("image_roots = [%q]", b.path("in"))
	f := b.load(roots, b.disk("disk0", inside))
	d, c := b.start(f)
	before, err := os.Stat(b.path("out"))
	b.must(err)
	for _, target := range []string{outside, b.path("out/new.img"), b.path("in/../out/new.img"), b.path("in/link.img"), b.path("in/up/new.img")} {
		_, err := c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: target, Existing: exists(target)})
		b.wants(err, control.ErrInvalid, "outside image_roots")
	}
	if after, err := os.Stat(b.path("out")); err != nil || after.ModTime() != before.ModTime() {
		t.Errorf("a copy that was refused touched a folder outside: %v", err)
	}
	for _, image := range []string{outside, b.path("in/link.img")} {
		_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: "x", Socket: b.path("x.sock"), Image: image, Format: "raw"})
		b.wants(err, control.ErrInvalid, "outside image_roots")
	}
	b.move(c, "disk0", b.path("in/new.img"))
	b.stop(d)
	if err := Check(f); err != nil {
		t.Error(err)
	}

	// The image may have been replaced by a link since the configuration was read, and what a record names may have
	// been allowed earlier.
	b.must(os.Remove(b.path("in/new.img")))
	b.must(os.Symlink(outside, b.path("in/new.img")))
	b.refused(f, "outside image_roots")
	b.must(os.Remove(b.path("in/a.img")))
	b.must(os.Symlink(outside, b.path("in/a.img")))
	if err := Check(f); err == nil || !strings.Contains(err.Error(), "outside image_roots") {
		t.Errorf("--check: %v", err)
	}
}

// The storage of a job that is cancelled does not answer: the user gets his prompt back, and is told.
func TestCancelHangs(t *testing.T) {
	b := newBed(t)
	d, c := b.start(b.load(""))
	answers := make(chan struct{})
	_, err := d.jobs.Start(job.Record{ID: "j", Kind: kindCopy, Disk: "disk0"}, func(ctx context.Context, _ *job.Job) error {
		<-answers
		return context.Cause(ctx)
	})
	b.must(err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond) // instead of cancelWait
	defer cancel()
	_, err = (&service{d}).JobCancel(ctx, &control.JobCancelRequest{Id: "j"})
	b.wants(err, context.DeadlineExceeded, "job j is being cancelled", "blkstream job watch j")
	j, err := c.JobShow(t.Context(), &control.JobShowRequest{Id: "j"})
	b.must(err)
	if j.State != job.StateRunning || !strings.Contains(j.Message, "being cancelled") {
		t.Errorf("meanwhile: %v", j)
	}
	close(answers)
	b.wait(c, "j", job.StateCancelled)
}

// The names in an image's header are the guest's or anyone's: they must not lead out of the roots.
func TestImageRootsOfBackingFiles(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	b := newBed(t)
	b.must(os.Mkdir(b.path("in"), 0o700))
	overlay := func(name, base string) string {
		if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", b.path(name)).CombinedOutput(); err != nil {
			t.Fatalf("qemu-img: %v: %s", err, out)
		}
		return b.path(name)
	}
	disk := func(image string) string { return strings.Replace(b.disk("disk0", image), `"raw"`, `"qcow2"`, 1) }
	roots := fmt.Sprintf("image_roots = [%q]", b.path("in"))
	out := b.image("out.img")
	b.refused(b.load(roots, disk(overlay("in/bad.qcow2", out))), out, "outside image_roots")
	d, c := b.start(b.load(roots, disk(overlay("in/good.qcow2", b.image("in/base.img")))))
	_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{Id: "x", Socket: b.path("x.sock"), Image: b.path("in/bad.qcow2"), Format: "qcow2"})
	b.wants(err, control.ErrInvalid, out, "outside image_roots")
	_, err = c.Copy(t.Context(), &control.CopyRequest{Disk: "disk0", Target: b.path("in/bad.qcow2"), Format: "qcow2", Existing: true})
	b.wants(err, control.ErrInvalid, out, "outside image_roots")
	b.stop(d)
}

func TestSecondDaemon(t *testing.T) {
	b := newBed(t)
	image := b.image("a.img")
	f := b.load("", b.disk("disk0", image))
	d, c := b.start(f)
	b.write("disk0", 1)

	// Another control socket, other disks: the state is what they would share.
	other := newBed(t)
	second := other.load("")
	second.Daemon.StateDir = f.Daemon.StateDir
	b.refused(second, f.Daemon.StateDir, "in use by another blkstreamd")
	// The same control socket.
	second = other.load("")
	second.Daemon.Control = f.Daemon.Control
	b.refused(second, f.Daemon.Control, "address already in use")
	// The same disk's socket.
	second = other.load("", strings.ReplaceAll(other.disk("disk0", other.image("b.img")), other.path("disk0.sock"), b.path("disk0.sock")))
	b.refused(second, b.path("disk0.sock"), "address already in use")

	// The first one has not noticed.
	if _, err := b.dial(f).Version(t.Context(), &control.VersionRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := c.Version(t.Context(), &control.VersionRequest{}); err != nil {
		t.Error(err)
	}
	b.holds("disk0", 1)
	b.stop(d)
	d, _ = b.start(f)
	b.stop(d)
}

// What a daemon that was killed left is replaced; what is not a socket stays.
func TestStaleSockets(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a.img")))
	for _, path := range []string{f.Daemon.Control, b.path("disk0.sock")} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		b.must(err)
		l.SetUnlinkOnClose(false)
		b.must(l.Close())
	}
	d, _ := b.start(f)
	b.write("disk0", 1)
	for _, path := range []string{f.Daemon.Control, b.path("disk0.sock")} {
		fi, err := os.Stat(path)
		b.must(err)
		if fi.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s: mode %v, want 0600", path, fi.Mode())
		}
	}
	for _, name := range []string{"state", "state/disks"} {
		fi, err := os.Stat(b.path(name))
		b.must(err)
		if fi.Mode().Perm() != 0o700 {
			t.Errorf("%s: mode %v, want 0700", name, fi.Mode())
		}
	}
	b.stop(d)
	for _, path := range []string{f.Daemon.Control, b.path("disk0.sock")} {
		if exists(path) {
			t.Errorf("%s is left behind", path)
		}
	}
	b.must(os.WriteFile(f.Daemon.Control, []byte("x"), 0o600))
	b.refused(f, f.Daemon.Control, "not a socket")
	if text, err := os.ReadFile(f.Daemon.Control); err != nil || string(text) != "x" {
		t.Errorf("a file in the socket's place: %q, %v", text, err)
	}
}

// The socket's mode keeps others away; if that is lost, the peer's uid does.
func TestStranger(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	b := newBed(t)
	f := b.load("")
	b.start(f)
	b.must(os.Chmod(b.dir, 0o755))
	self := b.path("self") // where anyone can run it
	exe, err := os.ReadFile("/proc/self/exe")
	b.must(err)
	b.must(os.WriteFile(self, exe, 0o755))
	run := func(uid uint32) string {
		cmd := exec.Command(self)
		cmd.Env = []string{"BLKSTREAM_TEST_STRANGER=" + f.Daemon.Control}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		b.must(err)
		return string(out)
	}
	const nobody = 65534
	if out := run(nobody); !strings.Contains(out, "not allowed to use") {
		t.Errorf("a stranger, by the socket's mode: %s", out)
	}
	b.must(os.Chmod(f.Daemon.Control, 0o666))
	if out := run(nobody); !strings.Contains(out, "closed the connection") {
		t.Errorf("a stranger, by his uid: %s", out)
	}
	if out := run(0); out != "version test" {
		t.Errorf("root: %s", out)
	}
}

// stranger asks the daemon for its version, and prints what comes back.
func stranger(socket string) int {
	c, err := control.Dial(socket)
	if err == nil {
		var v *control.VersionResponse
		if v, err = c.Version(context.Background(), &control.VersionRequest{}); err == nil {
			fmt.Printf("version %s", v.Version)
		}
	}
	if err != nil {
		fmt.Print(err)
	}
	return 0
}
