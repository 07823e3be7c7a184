// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

const (
	diskID   = "disk0"
	patience = 60 * time.Second // for whatever takes a moment when nothing else runs
)

// layer is an image by its path and format.
type layer struct{ path, format string }

// world is a real daemon with one disk and its guest, and what must be so of them.
type world struct {
	*testing.T
	dir  string
	disk daemon.Disk
	d    *daemon.Daemon
	c    *control.Client
	g    *frontend.Disk

	model []byte  // what the disk holds
	chain []layer // what it is made of, the first one first
	files []layer // all images that are to be valid, also those that the disk is not made of any more
	// killed: the daemon was, so clusters may be leaked.
	killed bool

	// kept is what images hold that nobody writes to: behind an overlay, left by a job, or the target of one that was
	// cancelled. behind is what each image has behind it.
	kept   map[string]contents
	behind map[string]string

	bitmaps map[string]*bitmap // by name

	made  int               // files and jobs, for their names
	job   *command          // the one at work
	ended map[string]string // the states of jobs that are listed still
}

// bitmap is one of the disk's dirty bitmaps.
type bitmap struct {
	// since holds what the disk held when the bitmap began, and with what the bitmap names all that it holds now. Its path
	// is empty if that was not known. behind is what that image has behind it.
	since, behind layer
}

// contents are those of one instant while the guest wrote: each sector is as in one of these states of the disk, which
// followed each other, or anything where a discard was on the way.
type contents struct {
	states [][]byte
	any    map[int64]bool // by the sector's offset
}

func (s *contents) discarded(batch []request) {
	for _, r := range batch {
		for off := r.off; r.op == blk.OpDiscard && off < r.off+r.n; off += blk.SectorSize {
			s.any[off] = true
		}
	}
}

func (s *contents) allows(got []byte) error {
	last := s.states[len(s.states)-1]
	if len(got) != len(last) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(last))
	}
	for off := 0; off < len(got); off += blk.SectorSize {
		b := got[off : off+blk.SectorSize]
		if !slices.ContainsFunc(s.states, func(state []byte) bool { return bytes.Equal(b, state[off:off+blk.SectorSize]) }) && !s.any[int64(off)] {
			return fmt.Errorf("the sector at %#x holds %x…, want %x…", off, b[:8], last[off:off+8])
		}
	}
	return nil
}

// setting is how a disk begins.
type setting struct {
	name   string
	cache  string
	cor    bool
	layers []image.CreateOptions // the last one is the first in the chain
}

func qcow2Layer(o qcow2.CreateOptions) image.CreateOptions {
	return image.CreateOptions{Format: image.Qcow2, CreateOptions: o}
}

var settings = []setting{
	{name: "raw", layers: []image.CreateOptions{{Format: image.Raw}}},
	{name: "qcow2", cache: "writeback", layers: []image.CreateOptions{qcow2Layer(qcow2.CreateOptions{})}},
	{name: "small", layers: []image.CreateOptions{qcow2Layer(qcow2.CreateOptions{ClusterSize: 1024, RefcountBits: 1})}},
	{name: "chain", cache: "writeback", layers: []image.CreateOptions{
		{Format: image.Raw},
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 4096}),
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 16 << 10, ExtendedL2: true}),
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 2048, Version: 2}),
	}},
	{name: "copy-on-read", cache: "writeback", cor: true, layers: []image.CreateOptions{
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 512}),
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 128 << 10}),
		qcow2Layer(qcow2.CreateOptions{}),
	}},
	{name: "copy-on-read,direct", cor: true, layers: []image.CreateOptions{
		{Format: image.Raw},
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 2048, LazyRefcounts: true}),
	}},
	{name: "add-cow", cor: true, layers: []image.CreateOptions{
		{Format: image.Raw},
		qcow2Layer(qcow2.CreateOptions{ClusterSize: 4096}),
		{Format: image.AddCow},
	}},
}

// addCowExt is after the name of its image file in the name of an add-cow image.
const addCowExt = ".add-cow"

var bin string // the folder of the programs, if they were built

var programs = sync.OnceValues(func() (string, error) {
	var err error
	if bin, err = os.MkdirTemp("", "bsbin"); err != nil {
		return "", err
	}
	return bin, daemon.Build(bin)
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin != "" {
		os.RemoveAll(bin)
	}
	os.Exit(code)
}

func newWorld(t *testing.T, s setting, start []byte) *world {
	t.Helper()
	bin, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{
		T: t, dir: t.TempDir(), model: bytes.Clone(start), kept: map[string]contents{}, behind: map[string]string{}, ended: map[string]string{},
		bitmaps: map[string]*bitmap{},
	}
	w.build(s)
	top := w.chain[0]
	w.disk = daemon.Disk{ID: diskID, Image: top.path, Format: top.format, Queues: 2, Cache: s.cache, CopyOnRead: s.cor}
	w.d, err = daemon.New(bin, w.disk)
	w.must(err)
	t.Cleanup(func() {
		if w.g != nil {
			w.g.Close()
		}
		if t.Failed() {
			t.Logf("blkstreamd's log:\n%s", w.d.Log())
		}
		w.d.Remove()
	})
	w.start()
	w.dial()
	return w
}

// build makes the images. Each piece of the contents is in one of them, and those behind hold something else there. The
// images behind are shorter, the deeper the shorter: what is there reads as zeros.
func (w *world) build(s setting) {
	const piece = 24 << 10
	size := int64(len(w.model))
	rng := rand.New(rand.NewPCG(uint64(size), 3)) // the model is made from the seed already
	task := blk.NewTask()
	for i, o := range s.layers {
		l := layer{filepath.Join(w.dir, fmt.Sprint("start", i)), o.Format}
		if o.Format == image.AddCow {
			l.path, o.ImageFile = l.path+addCowExt, filepath.Base(l.path)
		}
		o.Size = size - int64(len(s.layers)-1-i)*piece*4
		if i > 0 {
			o.BackingFile, o.BackingFormat = filepath.Base(w.chain[0].path), w.chain[0].format
			w.behind[l.path] = w.chain[0].path
		}
		w.must(patiently(func() error { return image.Create(w.Context(), l.path, o) }))
		w.chain = append([]layer{l}, w.chain...)
		w.files = append(w.files, l)
	}
	for i := range s.layers {
		l := w.chain[len(w.chain)-1-i]
		var g *image.Image
		w.must(patiently(func() (err error) {
			g, err = image.Open(task, l.path, l.format, image.Options{NoSync: true})
			return err
		}))
		end := g.Root.Info().Size
		for off := int64(0); off < end; off += piece {
			n := min(piece, end-off)
			holder := int(uint64(off/piece)*2654435761%97) % len(s.layers)
			b := w.model[off : off+n]
			switch {
			case i > holder:
				continue
			case i < holder:
				b = make([]byte, n)
				for k := range b {
					b[k] = byte(rng.Uint32())
				}
			}
			w.must(blk.Do(task, g.Root, &blk.Request{Op: blk.OpWrite, Off: off, Len: n, Data: blk.BytesVec(nil, b)}))
		}
		// What no image holds.
		if i == len(s.layers)-1 {
			w.fill(task, g.Root)
		}
		w.must(g.Close())
	}
}

// patiently opens files. A child has ours open until it becomes another program, and with them our locks.
func patiently(open func() error) error {
	for {
		if err := open(); !errors.Is(err, file.ErrInUse) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// fill writes what does not read as it should.
func (w *world) fill(task *blk.Task, n blk.Node) {
	const piece = 4096
	got := make([]byte, piece)
	for off := 0; off < len(w.model); off += piece {
		want := w.model[off : off+piece]
		r := &blk.Request{Op: blk.OpRead, Off: int64(off), Len: piece, Data: blk.BytesVec(nil, got)}
		w.must(blk.Do(task, n, r))
		if !bytes.Equal(got, want) {
			w.must(blk.Do(task, n, &blk.Request{Op: blk.OpWrite, Off: int64(off), Len: piece, Data: blk.BytesVec(nil, want)}))
		}
	}
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// wait fails the test, with the stacks of the daemon's goroutines in its log, if done is not closed in time.
func (w *world) wait(what string, done <-chan struct{}) {
	w.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		w.hangs(what)
	}
}

func (w *world) hangs(what string) {
	w.Helper()
	w.Fatalf("%s: not done after %v: %v", what, patience, w.d.Abort())
}

// start starts the daemon.
func (w *world) start() {
	w.Helper()
	if w.job != nil {
		w.job.over = w.job.mortal
	}
	w.must(w.d.Start())
	var err error
	w.c, err = control.Dial(w.d.Control())
	w.must(err)
}

// dial starts the guest.
func (w *world) dial() {
	w.Helper()
	var err error
	w.g, err = frontend.Dial(w.Context(), w.d.Socket(diskID), frontend.Options{Queues: 2, QueueSize: 64, Reconnect: 2 * time.Millisecond})
	w.must(err)
}

// kill ends the daemon as a crash does.
func (w *world) kill() {
	w.Helper()
	w.killed = true
	w.must(w.d.Kill())
	w.c.Close()
}

// stop ends it in order.
func (w *world) stop() {
	w.Helper()
	w.must(w.d.Stop())
	w.c.Close()
}

// during carries out the batches one after the other while fn runs, and returns what the disk may have held meanwhile.
func (w *world) during(batches [][]request, fn func()) contents {
	w.Helper()
	s := contents{states: [][]byte{bytes.Clone(w.model)}, any: map[int64]bool{}}
	done := make(chan struct{})
	var failed error
	go func() {
		defer close(done)
		for _, b := range batches {
			failed = errors.Join(failed, w.carryOut(b))
			s.discarded(b)
			s.states = append(s.states, bytes.Clone(w.model))
		}
	}()
	fn()
	w.wait("requests of the guest", done)
	w.must(failed)
	return s
}

// carryOut does a batch, all requests at once, and notes what the disk must hold then.
func (w *world) carryOut(batch []request) error {
	var wg sync.WaitGroup
	errs := make([]error, len(batch))
	for i, r := range batch {
		wg.Go(func() { errs[i] = w.request(r) })
	}
	wg.Wait()
	for _, r := range batch {
		r.apply(w.model)
	}
	return errors.Join(errs...)
}

// apply does to the model what the request does to the disk.
func (r request) apply(model []byte) {
	switch r.op {
	case blk.OpWrite:
		copy(model[r.off:], r.data())
	case blk.OpWriteZeroes, blk.OpDiscard:
		clear(model[r.off : r.off+r.n])
	case blk.OpRead, blk.OpFlush:
	}
}

// request does one request as a guest. No other one at the same time may touch what a read reads.
func (w *world) request(r request) (err error) {
	switch r.op {
	case blk.OpRead:
		got := make([]byte, r.n)
		if _, err = w.g.ReadAt(got, r.off); err == nil && !bytes.Equal(got, w.model[r.off:r.off+r.n]) {
			err = fmt.Errorf("a read of %d bytes at %#x: not what the disk holds", r.n, r.off)
		}
	case blk.OpWrite:
		_, err = w.g.WriteAt(r.data(), r.off)
	case blk.OpWriteZeroes:
		err = w.g.WriteZeroes(r.off, r.n, r.flags&blk.Unmap != 0)
	case blk.OpDiscard:
		if err = w.g.Discard(r.off, r.n); err == nil {
			err = w.g.WriteZeroes(r.off, r.n, false)
		}
	case blk.OpFlush:
		err = w.g.Flush()
	}
	return err
}

// check reads the whole disk.
func (w *world) check() {
	w.Helper()
	got := make([]byte, len(w.model))
	done := make(chan struct{})
	var err error
	go func() {
		defer close(done)
		_, err = w.g.ReadAt(got, 0)
	}()
	w.wait("a read of the disk", done)
	w.must(err)
	s := contents{states: [][]byte{w.model}}
	if err := s.allows(got); err != nil {
		w.Fatalf("the disk: %v", err)
	}
}

// lose is a crash of the daemon's and the guest's together, delay after the batch has begun: of what was not
// acknowledged, each sector is as before or as asked for. The next guest writes all of it again.
func (w *world) lose(batch []request, delay time.Duration) {
	w.Helper()
	errs := make([]error, len(batch))
	done := make(chan struct{})
	go func() {
		defer close(done)
		var wg sync.WaitGroup
		for i, r := range batch {
			wg.Go(func() { errs[i] = w.request(r) })
		}
		wg.Wait()
	}()
	time.Sleep(delay)
	w.kill()
	w.g.Close() // with an error if it has not noticed yet that nobody is there to stop the rings
	w.wait("requests of a guest that has gone", done)
	w.start()
	w.dial()
	before := bytes.Clone(w.model)
	unsure := contents{any: map[int64]bool{}}
	var again []request
	for i, r := range batch {
		if errs[i] == nil {
			r.apply(before)
		} else {
			again = append(again, r)
		}
		r.apply(w.model)
	}
	unsure.discarded(again)
	unsure.states = [][]byte{before, w.model}
	got := make([]byte, len(w.model))
	_, err := w.g.ReadAt(got, 0)
	w.must(err)
	if err := unsure.allows(got); err != nil {
		w.Fatalf("after a crash of daemon and guest, with %d of %d requests not acknowledged: %v", len(again), len(batch), err)
	}
	for _, r := range again {
		if r.op != blk.OpRead {
			w.must(w.request(r))
		}
	}
}

// ctx bounds one call of the control socket.
func (w *world) ctx() (context.Context, context.CancelFunc) {
	return context.WithTimeout(w.Context(), patience)
}

// call fails the test if a call of the control socket does not end or has an error of none of these kinds.
func (w *world) call(what string, fn func(ctx context.Context, c *control.Client) error, allowed ...error) error {
	w.Helper()
	ctx, cancel := w.ctx()
	defer cancel()
	err := fn(ctx, w.c)
	if ctx.Err() != nil {
		w.hangs(what)
	}
	if err != nil && !slices.ContainsFunc(allowed, func(a error) bool { return errors.Is(err, a) }) {
		w.Fatalf("%s: %v", what, err)
	}
	return err
}

// poll looks at the jobs, and takes note of one that has ended.
func (w *world) poll() *control.Job {
	w.Helper()
	listed := map[string]*control.Job{}
	w.must(w.call("job list", func(ctx context.Context, c *control.Client) error {
		r, err := c.JobList(ctx, &control.JobListRequest{})
		for _, j := range r.GetJobs() {
			listed[j.Id] = j
		}
		return err
	}))
	for id, state := range w.ended {
		if j := listed[id]; j == nil || j.State != state {
			w.Fatalf("job %s, which was %s, is now %v", id, state, j)
		}
		delete(listed, id)
	}
	if w.job == nil {
		if len(listed) > 0 {
			w.Fatalf("there are jobs that nobody asked for: %v", slices.Collect(maps.Keys(listed)))
		}
		return nil
	}
	j := listed[w.job.id]
	if j == nil {
		w.Fatalf("job %s is not there any more", w.job.id)
	}
	if w.job.over && !job.Ended(j.State) {
		w.Fatalf("job %s goes on in another daemon: %v", j.Id, j)
	}
	if j.State == job.StateFailed && !w.job.mayFail && !w.job.over {
		w.Fatalf("job %s failed: %v", j.Id, j)
	}
	if j.Error != "" && j.State != job.StateFailed {
		w.Fatalf("job %s: an error where nothing is wrong: %v", j.Id, j)
	}
	if job.Ended(j.State) {
		w.Logf("    job %s is %s: %s", j.Id, j.State, j.Message)
		w.ended[j.Id] = j.State
		end := w.job.end
		w.job = nil
		if j.State != job.StateFailed {
			end(j)
		}
		w.checkChain()
		w.checkBitmaps()
	}
	return j
}

// finish lets the job come to its end, or to where it waits for the switch.
func (w *world) finish() (ready bool) {
	w.Helper()
	for deadline := time.Now().Add(patience); w.job != nil; time.Sleep(2 * time.Millisecond) {
		id := w.job.id
		j := w.poll()
		switch {
		case w.job == nil:
			return false
		case j.State == job.StateReady:
			if w.job.manual {
				return true
			}
		case time.Now().After(deadline):
			w.hangs("job " + id)
		}
		_ = w.call("job speed", func(ctx context.Context, c *control.Client) error {
			_, err := c.JobSpeed(ctx, &control.JobSpeedRequest{Id: id})
			return err
		}, control.ErrPrecondition)
		_ = w.call("job resume", func(ctx context.Context, c *control.Client) error {
			_, err := c.JobResume(ctx, &control.JobResumeRequest{Id: id})
			return err
		}, control.ErrPrecondition)
	}
	return false
}

// switchOver finishes a copy that is ready.
func (w *world) switchOver(load [][]request) {
	w.Helper()
	source, id := w.chain[0].path, w.job.id
	s := w.during(load, func() {
		w.must(w.call("switch", func(ctx context.Context, c *control.Client) error {
			_, err := c.Switch(ctx, &control.SwitchRequest{Target: diskID})
			return err
		}))
	})
	w.poll()
	if w.ended[id] != job.StateCompleted {
		w.Fatalf("after the switch job %s is %q", id, w.ended[id])
	}
	w.kept[source] = s
}

// checkChain wants the disk to be made of the images that it should be made of, as QEMU sees them.
func (w *world) checkChain() {
	w.Helper()
	w.must(w.call("disk show", func(ctx context.Context, c *control.Client) error {
		k, err := c.DiskShow(ctx, &control.DiskShowRequest{Id: diskID})
		if err != nil {
			return err
		}
		if k.Image != w.chain[0].path || k.Format != w.chain[0].format || k.Size != int64(len(w.model)) {
			err = fmt.Errorf("the disk is on %s (%s), want %v", k.Image, k.Format, w.chain[0])
		}
		if strings.Contains(k.Warning, "could not be copied") {
			err = errors.New(k.Warning)
		}
		return err
	}))
	// With direct I/O not while the daemon writes: a read through the page cache beside a direct write can make the
	// kernel say EIO to the next flush.
	if w.disk.Cache != "" {
		w.checkFiles()
	}
}

func (w *world) checkFiles() {
	w.Helper()
	if w.throughAddCow(w.chain[0]) {
		for i, l := range w.chain {
			info, err := image.Describe(l.path, l.format, false, image.Options{Unlocked: true})
			w.must(err)
			var behind layer
			if i+1 < len(w.chain) {
				behind = w.chain[i+1]
			}
			if got := (layer{info[0].FullBacking, info[0].BackingFormat}); got != behind {
				w.Fatalf("%v names %v, want %v", l, got, behind)
			}
		}
		return
	}
	out, err := exec.Command("qemu-img", "info", "-U", "--backing-chain", "--output=json", "-f", w.chain[0].format, w.chain[0].path).Output()
	w.must(err)
	var infos []struct {
		Filename string `json:"filename"`
		Format   string `json:"format"`
		Backing  string `json:"full-backing-filename"`
		As       string `json:"backing-filename-format"`
	}
	w.must(json.Unmarshal(out, &infos))
	var got []layer
	for i, in := range infos {
		got = append(got, layer{in.Filename, in.Format})
		// The format of the one behind is what the header says: QEMU was given the first one's only.
		if i > 0 && (infos[i-1].As != in.Format || infos[i-1].Backing != in.Filename) {
			w.Fatalf("%s names %s (%s), and %s is %s", infos[i-1].Filename, infos[i-1].Backing, infos[i-1].As, in.Filename, in.Format)
		}
	}
	if !slices.Equal(got, w.chain) {
		w.Fatalf("the disk is made of %v, want %v", got, w.chain)
	}
}

// end finishes what is at work, stops the daemon and looks at all images.
func (w *world) end() {
	w.Helper()
	w.check()
	if w.job != nil && w.finish() {
		w.switchOver(nil)
	}
	w.check()
	w.lastBackups()
	w.must(w.g.Close())
	w.g = nil
	w.stop()
	w.checkFiles()
	for _, l := range w.files {
		w.checkImage(l)
	}
	w.holds(w.chain[0], contents{states: [][]byte{w.model}})
	for _, l := range w.files {
		if s, ok := w.kept[l.path]; ok {
			w.holds(l, s)
		}
	}
	if log := w.d.Log(); strings.Contains(log, "level=ERROR") || strings.Contains(log, "panic") {
		w.Error("the daemon's log has errors")
	}
}

// lastBackups takes one with each bitmap that goes with an image.
func (w *world) lastBackups() {
	w.Helper()
	for _, name := range w.bitmapNames() {
		if b := w.bitmaps[name]; b.since.path != "" {
			c := backupOf(w, rand.New(rand.NewPCG(uint64(w.made), 4)), name, false)
			w.must(w.call(c.what, c.call))
			w.begun(c, contents{states: [][]byte{w.model}})
			w.finish()
		}
	}
}

// checkImage has QEMU check an image. If the daemon was never killed, not a cluster may be leaked.
func (w *world) checkImage(l layer) {
	w.Helper()
	switch {
	case l.format == image.Raw:
		return
	case w.throughAddCow(l):
		var res qcow2.CheckResult
		err := patiently(func() (err error) {
			res, err = image.Check(context.Background(), l.path, l.format, qcow2.RepairNone, nil, nil)
			return err
		})
		if err != nil || res.Errors > 0 || res.Leaks > 0 && !w.killed {
			w.Errorf("check %s: %v, %v", l.path, res, err)
		}
		return
	}
	out, err := exec.Command("qemu-img", "check", "-f", l.format, l.path).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 && w.killed { // leaks, no errors
		return
	}
	if err != nil {
		w.Errorf("qemu-img check %s: %v: %s", l.path, err, out)
	}
}

// holds compares what QEMU reads.
func (w *world) holds(l layer, s contents) {
	w.Helper()
	if w.throughAddCow(l) {
		if err := s.allows(w.read(l)); err != nil {
			w.Errorf("image %s: %v", l.path, err)
		}
		return
	}
	flat := filepath.Join(w.dir, "flat")
	if out, err := exec.Command("qemu-img", "convert", "-f", l.format, "-O", "raw", l.path, flat).CombinedOutput(); err != nil {
		w.Errorf("qemu-img convert %s: %v: %s", l.path, err, out)
		return
	}
	got, err := os.ReadFile(flat)
	w.must(err)
	if err := s.allows(got); err != nil {
		w.Errorf("image %s: %v", l.path, err)
	}
}

// throughAddCow: QEMU does not know add-cow.
func (w *world) throughAddCow(l layer) bool {
	for p := l.path; p != ""; p = w.behind[p] {
		if strings.HasSuffix(p, addCowExt) {
			return true
		}
	}
	return false
}

// read reads an image without QEMU.
func (w *world) read(l layer) []byte {
	w.Helper()
	task := blk.NewTask()
	var g *image.Image
	w.must(patiently(func() (err error) {
		g, err = image.Open(task, l.path, l.format, image.Options{ReadOnly: true})
		return err
	}))
	b := make([]byte, g.Root.Info().Size)
	w.must(blk.Do(task, g.Root, &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}))
	w.must(g.Close())
	return b
}

func (w *world) qemuImg(args ...string) {
	w.Helper()
	if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil {
		w.Fatalf("qemu-img %v: %v: %s", args, err, out)
	}
}

// stale makes a file as large as the disk that holds something else.
func (w *world) stale(path string) {
	w.Helper()
	w.must(os.WriteFile(path, bytes.Repeat([]byte{0xee}, len(w.model)), 0o600))
}

// checkBackup looks at a backup that is complete.
func (w *world) checkBackup(l, behind layer, s contents) {
	w.Helper()
	info, err := image.Describe(l.path, l.format, false, image.Options{Unlocked: true})
	w.must(err)
	if got := (layer{info[0].FullBacking, info[0].BackingFormat}); got != behind {
		w.Errorf("backup %s names %v, want %v", l.path, got, behind)
	}
	w.checkImage(l)
	w.holds(l, s)
	if w.Failed() {
		w.FailNow()
	}
}

func (w *world) bitmapNames() (names []string) {
	for name := range w.bitmaps {
		if w.job == nil || w.job.bitmap != name {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// known is a file that holds what the disk held, if that is known to the byte.
func (w *world) known(s contents) (l layer) {
	w.Helper()
	if len(s.states) > 1 {
		return l
	}
	l = layer{filepath.Join(w.dir, w.name("known")), image.Raw}
	w.must(os.WriteFile(l.path, s.states[0], 0o600))
	return l
}

// listed are the bitmaps.
func (w *world) listed() map[string]*control.Bitmap {
	w.Helper()
	all := map[string]*control.Bitmap{}
	w.must(w.call("bitmap list", func(ctx context.Context, c *control.Client) error {
		r, err := c.BitmapList(ctx, &control.BitmapListRequest{Disk: diskID})
		for _, m := range r.GetBitmaps() {
			all[m.Name] = m
		}
		return err
	}))
	return all
}

// checkBitmaps wants all bitmaps to be there and to record, and no other ones to.
func (w *world) checkBitmaps() {
	w.Helper()
	listed := w.listed()
	for name := range w.bitmaps {
		m := listed[name]
		busy := w.job != nil && w.job.bitmap == name
		if m.GetState() != "recording" && (!busy || m.GetState() != "busy") {
			w.Fatalf("bitmap %s is %v", name, m)
		}
		delete(listed, name)
	}
	for _, m := range listed {
		if m.State == "recording" || m.State == "busy" {
			w.Fatalf("bitmap %s is there, and should not be: %v", m.Name, m)
		}
	}
}

// keep notes what an image holds that nobody writes to from now on.
func (w *world) keep(path string, s contents) { w.kept[path] = s }

// written forgets what images hold that read through one that is written to now, except the first n of the chain: there
// it does not show.
func (w *world) written(path string, n int) {
	for p := range w.kept {
		inFront := slices.ContainsFunc(w.chain[:n], func(l layer) bool { return l.path == p })
		for q := p; q != "" && !inFront; q = w.behind[q] {
			if q == path {
				delete(w.kept, p)
				break
			}
		}
	}
}

// name is for a new file or job.
func (w *world) name(kind string) string {
	w.made++
	return fmt.Sprintf("%s%d", kind, w.made)
}
