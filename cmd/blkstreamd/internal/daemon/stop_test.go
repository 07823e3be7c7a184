// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// hang puts a filter under the disk that catches requests for ever.
func (b *bed) hang(d *Daemon, disk string, op blk.Op) *blktest.Trap {
	b.Helper()
	k, err := d.find(disk)
	b.must(err)
	k.mu.Lock()
	fault := blktest.NewFault(k.img.Root)
	k.img.Root = fault
	k.mu.Unlock()
	b.must(k.graph.Change(b.Context(), func(tx *blk.Tx) error { tx.SetRoot(fault); return nil }))
	return fault.Add(blktest.Rule{Ops: []blk.Op{op}, Hold: true})
}

// Storage that does not answer does not keep the daemon from its end: it says what hangs, stops the other disks in order,
// and the next daemon goes on.
func TestStopWhileStorageHangs(t *testing.T) {
	was := stopWait
	stopWait = 2 * time.Second
	t.Cleanup(func() { stopWait = was })
	hangs := func(op blk.Op, begin func(*bed, *control.Client)) func(*bed, *Daemon, *control.Client) func() {
		return func(b *bed, d *Daemon, c *control.Client) func() {
			trap := b.hang(d, "disk0", op)
			begin(b, c)
			if op != blk.OpFlush { // which the end brings
				trap.Wait(b.T, 1)
			}
			return trap.Release
		}
	}
	startCopy := func(b *bed, c *control.Client) {
		_, err := c.Copy(b.Context(), &control.CopyRequest{Disk: "disk0", Target: b.path("new.img"), Id: "j"})
		b.must(err)
	}
	for name, c := range map[string]struct {
		begin func(*bed, *Daemon, *control.Client) (release func())
		want  string
	}{
		"job": {hangs(blk.OpRead, startCopy), "job j, from DIR/hung.img to DIR/new.img"},
		"guest": {hangs(blk.OpWrite, func(b *bed, _ *control.Client) {
			g := b.guest("disk0")
			b.Cleanup(func() { g.Close() })
			go g.WriteAt(make([]byte, 4096), 0) //nolint:errcheck // it never ends
		}), "requests of the guest to DIR/hung.img"},
		"image": {hangs(blk.OpFlush, func(*bed, *control.Client) {}), "closing DIR/hung.img"},
		"state": {func(b *bed, d *Daemon, c *control.Client) func() {
			b.must(os.MkdirAll(b.path("state/jobs"), 0o700))
			fifo := b.path("state/jobs/j.json.new")
			b.must(syscall.Mkfifo(fifo, 0o600)) // whose opening waits for a reader
			copied := make(chan struct{})
			go func() {
				defer close(copied)
				d.copy(&control.CopyRequest{Disk: "disk0", Target: b.path("new.img"), Id: "j"}) //nolint:errcheck // it fails at last
			}()
			for !exists(b.path("new.img")) {
				time.Sleep(time.Millisecond)
			}
			time.Sleep(100 * time.Millisecond) // it saves the record soon after that
			return func() {
				f, err := os.Open(fifo)
				b.must(err)
				<-copied
				f.Close()
				b.must(os.Remove(fifo))
			}
		}, "state directory DIR/state"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			hung, other := b.image("hung.img"), b.image("other.img")
			conf := b.load("", b.disk("disk0", hung), b.disk("disk1", other))
			d, client := b.start(conf)
			k, err := d.find("disk0")
			b.must(err)
			b.write("disk0", 7)
			release := c.begin(b, d, client)
			stopped := make(chan error, 1)
			go func() { stopped <- d.Stop() }()
			select {
			case err = <-stopped:
			case <-time.After(30 * time.Second):
				release()
				t.Fatal("does not end")
			}
			want := `disk "disk0" is left as a crash would leave it: its storage does not answer (` +
				strings.ReplaceAll(c.want, "DIR", b.dir) + ")"
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Fatalf("%v\nwant %s", err, want)
			}
			if name != "state" { // which both disks wait for
				if err.Error() != want {
					t.Error(err)
				}
				f, err := file.Open(other, file.Options{})
				b.must(err)
				b.must(f.Close())
			}
			release()
			if err := k.drained(); err != nil {
				t.Error(err)
			}
			b.must(d.lock.Close()) // as the end of the process does
			_, client = b.start(conf)
			b.holds("disk0", 7)
			if name == "job" {
				b.wait(client, "j", job.StateReady)
			}
		})
	}
}

// A disk that is still being added when the daemon is told to end does not keep it from that: it is not served any more.
func TestStopWhileAdding(t *testing.T) {
	b := newBed(t)
	conf := b.load("", b.disk("disk0", b.image("a.img")), b.disk("late", b.image("late.img")))
	late := conf.Disks[1]
	conf.Disks = conf.Disks[:1]
	d, _ := b.start(conf)
	b.stop(d)
	if _, err := d.startDisk(late, record{Image: late.Image, Format: late.Format}); err == nil {
		t.Error("it is served")
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		d.Stop() //nolint:errcheck // it was stopped before
	}()
	select {
	case <-stopped:
	case <-time.After(5 * time.Second):
		t.Fatal("the daemon does not end")
	}
	if exists(late.Socket) {
		t.Error("its socket is left")
	}
}
