// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// drawn is what the jobs do with the images of disk a.
func (b *bed) drawn(c *control.Client) (roles string) {
	b.Helper()
	k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	for _, m := range k.Chain {
		if len(m.Jobs) == 0 {
			roles += " -"
		}
		for _, j := range m.Jobs {
			roles += fmt.Sprintf(" %s:%s", j.Id, j.Role)
		}
	}
	return strings.TrimSpace(roles)
}

// The chain has the images in order, with what their files take, and the jobs that work on them.
func TestChainShown(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	f := b.load("", b.layeredDisk("a", "top.qcow2"))
	_, c := b.start(f)
	k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	if len(k.Chain) != 3 {
		t.Fatalf("the chain is %v", k.Chain)
	}
	for i, name := range []string{"top.qcow2", "middle.qcow2", "base.raw"} {
		m, format := k.Chain[i], image.Qcow2
		if i == 2 {
			format = image.Raw
		}
		held, err := image.Allocated(b.path(name))
		b.must(err)
		if m.Image != b.path(name) || m.Format != format || m.Size != diskSize || m.Allocated != held || len(m.Jobs) != 0 {
			t.Errorf("image %d is %v, and takes %d bytes", i, m, held)
		}
	}
	check := func(what, want string) {
		t.Helper()
		if got := b.drawn(c); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	end := func(id string) {
		t.Helper()
		_, err := c.JobCancel(b.Context(), &control.JobCancelRequest{Id: id})
		b.must(err)
		check(id+" has ended", "- - -")
	}
	_, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Id: "s", Speed: 1})
	b.must(err)
	check("a stream", "s:target s:source s:source")
	end("s")
	_, err = c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Id: "c", Target: b.path("t.raw"), Format: image.Raw, Speed: 1})
	b.must(err)
	check("a copy", "c:source c:source c:source")
	end("c")
	_, err = c.Copy(b.Context(), &control.CopyRequest{Disk: "a", Id: "b", Target: b.path("t.qcow2"), Base: b.path("base.raw"), Speed: 1})
	b.must(err)
	check("a copy with a base", "b:source b:source b:base")
	end("b")
}

// What a job does with the images: all kinds, on a chain of six.
func TestChainJobs(t *testing.T) {
	for _, c := range []struct {
		r    job.Record
		want string
	}{
		{job.Record{Kind: kindStream, Target: "0"}, "t s s s s s"},
		{job.Record{Kind: kindStream, Target: "0", Options: job.Options{Base: "3"}}, "t s s b - -"},
		{job.Record{Kind: kindCopy, Source: "0", Target: "x"}, "s s s s s s"},
		{job.Record{Kind: kindCopy, Source: "0", Target: "x", Options: job.Options{Base: "5"}}, "s s s s s b"},
		{job.Record{Kind: kindCopy, Source: "1", Target: "0", Options: job.Options{Method: methodStream}}, "t s s s s s"},
		{job.Record{Kind: kindCopy, Source: "0", Target: "x", Options: job.Options{Method: methodStream}}, "s s s s s s"}, // not switched yet
		{job.Record{Kind: kindCommit, Source: "0", Target: "1"}, "s t - - - -"},
		{job.Record{Kind: kindCommit, Source: "2", Target: "4"}, "- - s s t -"},
		{job.Record{Kind: kindCommit, Source: "x", Target: "4"}, "- - - - t -"}, // merged
	} {
		var chain []*control.ChainImage
		for i := range 6 {
			chain = append(chain, &control.ChainImage{Image: fmt.Sprint(i)})
		}
		addJob(chain, c.r, c.r.Target)
		got := ""
		for _, m := range chain {
			role := "-"
			if len(m.Jobs) > 0 {
				role = m.Jobs[0].Role[:1]
			}
			got += " " + role
		}
		if got[1:] != c.want {
			t.Errorf("%+v: %s, want %s", c.r, got[1:], c.want)
		}
	}
}

// The data of an image in a file of its own counts; an image whose file is gone says that it does not know.
func TestChainAllocated(t *testing.T) {
	b := newBed(t)
	b.must(image.Create(b.Context(), b.path("a.qcow2"), image.CreateOptions{Format: image.Qcow2, CreateOptions: qcow2.CreateOptions{
		Size: diskSize, DataFile: "data",
	}}))
	b.put(b.path("a.qcow2"), image.Qcow2, 1)
	_, c := b.start(b.load("", b.layeredDisk("a", "a.qcow2")))
	show := func() int64 {
		k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
		b.must(err)
		return k.Chain[0].Allocated
	}
	header, err := image.Allocated(b.path("a.qcow2"))
	b.must(err)
	data, err := image.Allocated(b.path("data"))
	b.must(err)
	if n := show(); data == 0 || n != header+data {
		t.Errorf("%d bytes allocated; the image has %d and its data file %d", n, header, data)
	}
	b.must(os.Remove(b.path("data")))
	if n := show(); n != -1 {
		t.Errorf("%d bytes allocated without the file", n)
	}
}

// Who looks at the chain is not in the way of what changes it, and the other way round.
func TestChainWhileItChanges(t *testing.T) {
	b := newBed(t)
	b.layered(7)
	d, c := b.start(b.load("", b.layeredDisk("a", "top.qcow2")))
	stop, stopped := make(chan struct{}), make(chan int)
	watcher := b.dial(d.file)
	go func() {
		n := 0
		defer func() { stopped <- n }()
		for {
			k, err := watcher.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
			if err == nil && !slices.ContainsFunc(k.Chain, func(m *control.ChainImage) bool { return m.Image == b.path("base.raw") }) {
				t.Errorf("the chain is %v", k.Chain)
			}
			n++
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	for i := range 5 {
		_, err := b.snapshot(c, "a", b.path(fmt.Sprint(i)))
		b.must(err)
	}
	j, err := c.Commit(b.Context(), &control.CommitRequest{Disk: "a", Top: b.path("3"), Base: b.path("1")})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	j, err = c.Stream(b.Context(), &control.StreamRequest{Disk: "a", Base: b.path("base.raw")})
	b.must(err)
	b.wait(c, j.Id, job.StateCompleted)
	_, err = c.DiskRemove(b.Context(), &control.DiskRemoveRequest{Id: "a"})
	b.must(err)
	close(stop)
	t.Logf("looked %d times", <-stopped)
}

// A chain as deep as they may be is drawn.
func TestChainDeep(t *testing.T) {
	b := newBed(t)
	b.image("0")
	format := image.Raw
	const depth = 500
	for i := range depth {
		b.must(image.Create(b.Context(), b.path(fmt.Sprint(i+1)), image.CreateOptions{
			Format: image.Qcow2, Unopened: true,
			CreateOptions: qcow2.CreateOptions{Size: diskSize, BackingFile: fmt.Sprint(i), BackingFormat: format},
		}))
		format = image.Qcow2
	}
	_, c := b.start(b.load("", b.layeredDisk("a", fmt.Sprint(depth))))
	k, err := c.DiskShow(b.Context(), &control.DiskShowRequest{Id: "a"})
	b.must(err)
	if len(k.Chain) != depth+1 || k.Chain[depth].Image != b.path("0") {
		t.Errorf("%d images, the last is %v", len(k.Chain), k.Chain[len(k.Chain)-1])
	}
}
