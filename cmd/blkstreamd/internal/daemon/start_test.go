// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/copy/control"
)

// A disk whose image does not open yet holds up no guest of another disk, be that configured or added at run time.
func TestStartSideBySide(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a")), b.disk("disk1", b.image("b")))
	d, c := b.start(f)
	_, err := c.DiskAdd(t.Context(), &control.DiskAddRequest{
		Id: "disk2", Socket: b.path("disk2.sock"), Image: b.image("c"), Format: "raw", Cache: "writeback",
	})
	b.must(err)
	b.stop(d)

	n, err := file.Open(b.path("a"), file.Options{})
	b.must(err)
	type result struct {
		d   *Daemon
		err error
	}
	started := make(chan result, 1)
	go func() {
		d, err := b.try(f)
		started <- result{d, err}
	}()
	for _, id := range []string{"disk1", "disk2"} {
		for served := false; !served; time.Sleep(time.Millisecond) {
			select {
			case r := <-started:
				t.Fatalf("%s waits for another disk's image: %v", id, r.err)
			default:
			}
			if c, err := net.Dial("unix", b.path(id+".sock")); err == nil {
				served = true
				b.must(c.Close())
			}
		}
	}
	b.must(n.Close())
	r := <-started
	b.must(r.err)
	b.must(r.d.Stop())
}
