// SPDX-License-Identifier: Apache-2.0

// Package crash cuts the power under the jobs that change what a disk is made of. All images of the chain are on disks
// that lose what was not flushed. Whenever the power goes, the chain that the disk's record and the headers name then is
// whole: no image of it has an error, and it holds what the guest was told is durable, or what it wrote later.
//
// A failure prints CRASH_SEED; set it to begin with the same numbers. The guest and the job still meet differently.
package crash

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/commit"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/copy/stream"
)

const diskSize = 160<<10 + 3*512

// layer is an image by its path and format.
type layer struct{ path, format string }

// power are the disks under all images, one step of one of them at a time.
type power struct {
	mu    sync.Mutex
	disks map[string]*blktest.CrashDisk // by the image's path; what is in the file itself is how it began
	names []string                      // in the order in which they came
	steps [][]int                       // how far each disk was after each step
}

// storage is the disk under an image. The file is there for its locks.
func (p *power) storage(f *file.Node) blk.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	path := f.Info().Name
	d := p.disks[path]
	if d == nil {
		b, err := os.ReadFile(path)
		if err != nil {
			panic(err) // it is open
		}
		d = diskOf(b)
		p.disks[path], p.names = d, append(p.names, path)
	}
	return &plugged{CrashDisk: d, p: p, file: f}
}

func diskOf(b []byte) *blktest.CrashDisk {
	b = append(b, make([]byte, -len(b)&(blk.SectorSize-1))...)
	d := blktest.NewCrashDisk(int64(len(b)))
	for _, r := range []*blk.Request{{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}, {Op: blk.OpFlush}} {
		if err := d.Do(blk.NewTask(), r); err != nil {
			panic(err) // memory
		}
	}
	return d
}

// now is the number of steps so far.
func (p *power) now() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.steps)
}

// cut is what is left on the disks if the power goes after so many steps.
func (p *power) cut(at int, rng *rand.Rand) map[string]*blktest.CrashDisk {
	left := map[string]*blktest.CrashDisk{}
	for i, name := range p.names {
		points := 2 // those of diskOf
		if at > 0 && i < len(p.steps[at-1]) {
			points = p.steps[at-1][i]
		}
		left[name] = p.disks[name].CrashAt(points, rng)
	}
	return left
}

// plugged is one of the disks. Without p it is one that is looked at after a cut.
type plugged struct {
	*blktest.CrashDisk
	p    *power
	file *file.Node
}

func (d *plugged) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpRead || d.p == nil {
		return d.CrashDisk.Do(t, r)
	}
	return d.step(func() error { return d.CrashDisk.Do(t, r) })
}

func (d *plugged) Resize(t *blk.Task, size int64, shrink bool) error {
	return d.step(func() error { return d.CrashDisk.Resize(t, size, shrink) })
}

func (d *plugged) step(fn func() error) error {
	d.p.mu.Lock()
	defer d.p.mu.Unlock()
	err := fn()
	var points []int
	for _, name := range d.p.names {
		points = append(points, d.p.disks[name].Points())
	}
	d.p.steps = append(d.p.steps, points)
	return err
}

func (d *plugged) Close() error { return d.file.Close() }

// machine is a disk with a guest that writes one request after the other.
type machine struct {
	*testing.T
	rng   *rand.Rand
	dir   string
	p     *power
	g     *blk.Graph
	img   *image.Image
	queue blktest.Guest
	jobs  *job.Manager

	records []record
	fixed   []fixed
	model   []byte // what the guest has written
	seq     int
	sectors [][]version
	flushes []flush
}

// record says that the disk is on another image. It may be durable after step, and is from step+1 on.
type record struct {
	step int
	top  layer
}

// fixed is what an image holds that nobody writes to, from a step on.
type fixed struct {
	step int
	top  layer
	data []byte
}

// version is what was written to a sector, from the step begin on.
type version struct {
	seq, begin int
	data       []byte
}

// flush made what came before seq durable, from step end on.
type flush struct{ seq, end int }

func (m *machine) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// newMachine makes a disk of so many images, the last one raw or not. Each piece is held by one of them.
func newMachine(t *testing.T, depth int, base string) *machine {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("CRASH_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("CRASH_SEED=%d", seed)
	m := &machine{
		T: t, rng: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), g: blk.NewGraph(nil),
		p: &power{disks: map[string]*blktest.CrashDisk{}},
	}
	store, err := job.OpenStore(t.TempDir())
	m.must(err)
	m.jobs, _, err = job.NewManager(store)
	m.must(err)
	t.Cleanup(m.jobs.Shutdown)
	var behind layer
	for i := range depth {
		l := layer{filepath.Join(m.dir, fmt.Sprint("img", i)), image.Qcow2}
		if i == 0 {
			l.format = base
		}
		m.make(l, behind, int64(diskSize-max(depth-2-i, 0)*9*512)) // the deeper ones are shorter
		img, err := image.Open(blk.NewTask(), l.path, l.format, image.Options{})
		m.must(err)
		const piece = 5 << 10
		for off := int64(0); off < img.Root.Info().Size; off += piece {
			if m.rng.IntN(depth) > 0 {
				continue
			}
			b := m.random(min(piece, img.Root.Info().Size-off))
			m.must(blk.Do(blk.NewTask(), img.Root, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}))
		}
		m.must(img.Close())
		behind = l
	}
	m.img, err = image.Open(blk.NewTask(), behind.path, behind.format, m.options())
	m.must(err)
	m.must(m.g.Change(t.Context(), func(tx *blk.Tx) error { tx.SetRoot(m.img.Root); return nil }))
	m.g.Attach(&m.queue)
	m.model = read(t, m.img.Root)
	for i := 0; i < len(m.model); i += blk.SectorSize {
		m.sectors = append(m.sectors, []version{{data: bytes.Clone(m.model[i : i+blk.SectorSize])}})
	}
	m.record(behind)
	return m
}

func (m *machine) make(l, behind layer, size int64) {
	m.Helper()
	o := image.CreateOptions{Format: l.format, Unopened: true, CreateOptions: qcow2.CreateOptions{Size: size}}
	if l.format == image.Qcow2 {
		o.ClusterSize = 2048 << m.rng.IntN(3)
		o.BackingFile, o.BackingFormat = behind.path, behind.format
	}
	m.must(image.Create(m.Context(), l.path, o))
}

func (m *machine) options() image.Options {
	return image.Options{Storage: m.p.storage, Barrier: m.g.Barrier}
}

// random makes up data in which no two sectors are the same, and which can be compressed.
func (m *machine) random(n int64) []byte {
	var b []byte
	for ; n > 0; n -= blk.SectorSize {
		word := binary.LittleEndian.AppendUint64(nil, m.rng.Uint64())
		b = append(b, bytes.Repeat(word, int(min(n, blk.SectorSize)/8))...)
	}
	return b
}

func (m *machine) record(top layer) { m.records = append(m.records, record{m.p.now(), top}) }

func read(t testing.TB, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	r := &blk.Request{Op: blk.OpRead, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}
	if err := blk.Do(blk.NewTask(), n, r); err != nil {
		t.Fatal(err)
	}
	return b
}

// guest does n requests.
func (m *machine) guest(n int) {
	for range n {
		m.queue.Mu.RLock()
		err := m.request()
		m.queue.Mu.RUnlock()
		if err != nil {
			m.Errorf("the guest: %v", err)
			return
		}
		time.Sleep(200 * time.Microsecond)
	}
}

func (m *machine) request() error {
	const sectors = diskSize / blk.SectorSize
	m.seq++
	begin := m.p.now()
	if m.rng.IntN(8) == 0 {
		err := blk.Do(blk.NewTask(), m.g.Root(), &blk.Request{Op: blk.OpFlush})
		m.flushes = append(m.flushes, flush{m.seq, m.p.now()})
		return err
	}
	at := m.rng.IntN(sectors)
	n := min(1+m.rng.IntN(16), sectors-at)
	r := &blk.Request{Op: blk.OpWrite, Off: int64(at) * blk.SectorSize, Len: int64(n) * blk.SectorSize}
	b := make([]byte, r.Len)
	if m.rng.IntN(4) == 0 {
		r.Op, r.Flags = blk.OpWriteZeroes, blk.Unmap
	} else {
		b = m.random(r.Len)
		r.Data = blk.BytesVec(nil, b)
	}
	for i := range n {
		s := &m.sectors[at+i]
		*s = append(*s, version{m.seq, begin, b[i*blk.SectorSize:][:blk.SectorSize]})
	}
	copy(m.model[r.Off:], b)
	return blk.Do(blk.NewTask(), m.g.Root(), r)
}

// under runs fn while the guest writes.
func (m *machine) under(n int, fn func()) {
	m.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { m.guest(n) })
	fn()
	wg.Wait()
}

// run runs a job to its end.
func (m *machine) run(o job.Options, fn func(ctx context.Context, j *job.Job) error) {
	m.Helper()
	o.OnSourceError, o.OnTargetError, o.SwitchMode = job.OnErrorReport, job.OnErrorReport, "auto"
	o.Granularity = 4096
	j, err := m.jobs.Start(job.Record{Kind: "test", Disk: "d", Options: o}, fn)
	m.must(err)
	select {
	case <-j.Done():
	case <-time.After(time.Minute):
		m.Fatal("the job does not end")
	}
	if r := j.Record(); r.State != job.StateCompleted {
		m.Fatalf("the job is %s: %s", r.State, r.Error)
	}
}

// change changes the image with the guest at rest.
func (m *machine) change(fn func() (*image.Image, error)) error {
	return m.g.Change(context.Background(), func(tx *blk.Tx) error {
		img, err := fn()
		if err == nil {
			m.img = img
		}
		return err
	})
}

// check cuts the power after every step.
func (m *machine) check() {
	m.Helper()
	m.guest(20)
	m.must(blk.Do(blk.NewTask(), m.g.Root(), &blk.Request{Op: blk.OpFlush}))
	m.must(m.img.Close())
	if m.Failed() {
		return
	}
	step := 1
	if testing.Short() {
		step = 9
	}
	tops := map[string]int{}
	for at := 0; at <= len(m.p.steps); at++ {
		near := slices.ContainsFunc(m.records[1:], func(r record) bool { return at > r.step-4 && at < r.step+4 })
		if at%step > 0 && !near {
			continue
		}
		samples := 1
		if near {
			samples = 5
		}
		for range samples {
			left := m.p.cut(at, m.rng)
			for i, r := range m.records {
				// At the very step at which the record was written, it is there or it is not.
				if r.step <= at && (i+1 == len(m.records) || m.records[i+1].step >= at) {
					tops[m.cut(at, left, r.top)]++
				}
			}
			for _, f := range m.fixed {
				if f.step <= at {
					m.holds(at, left, f)
				}
			}
			if m.Failed() {
				return
			}
		}
	}
	m.Logf("%d steps; chains after a cut: %v", len(m.p.steps), tops)
	if len(tops) < 2 {
		m.Error("the chain did not change")
	}
}

// open opens a chain from what is left.
func (m *machine) open(at int, left map[string]*blktest.CrashDisk, top layer) *image.Image {
	m.Helper()
	img, err := image.Open(blk.NewTask(), top.path, top.format, image.Options{ReadOnly: true, Unlocked: true, Storage: func(f *file.Node) blk.Node {
		d := left[f.Info().Name]
		if d == nil {
			m.Fatalf("cut at %d: %s was never opened", at, f.Info().Name)
		}
		return &plugged{CrashDisk: d, file: f}
	}})
	if err != nil {
		m.Fatalf("cut at %d: %v", at, err)
	}
	return img
}

// cut looks at the disk after a power cut, and says what it is made of then.
func (m *machine) cut(at int, left map[string]*blktest.CrashDisk, top layer) (made string) {
	m.Helper()
	img := m.open(at, left, top)
	defer img.Close() //nolint:errcheck // only read
	flushed := 0
	for _, f := range m.flushes {
		if f.end <= at {
			flushed = f.seq
		}
	}
	got := read(m, img.Root)
	for i, versions := range m.sectors {
		b := got[i*blk.SectorSize:][:blk.SectorSize]
		ok := false
		for k := len(versions) - 1; k >= 0 && !ok; k-- {
			v := versions[k]
			ok = v.begin <= at && bytes.Equal(v.data, b)
			if v.seq < flushed {
				break // what came before is gone
			}
		}
		if !ok {
			m.Fatalf("cut at %d of %d, records %v: sector %d holds %x…, of %d versions", at, len(m.p.steps), m.records, i, b[:8], len(versions))
		}
	}
	for _, l := range img.Chain {
		made += filepath.Base(l.Path) + " "
		if l.Format != image.Qcow2 {
			continue
		}
		r, err := qcow2.Check(blk.NewTask(), left[l.Path], qcow2.RepairNone)
		if err != nil || r.Errors > 0 {
			m.Fatalf("cut at %d: %s: %v %+v", at, l.Path, err, r)
		}
		if m.rng.IntN(200) == 0 {
			m.checkWithQEMU(left[l.Path].Bytes())
		}
	}
	return made
}

func (m *machine) checkWithQEMU(b []byte) {
	m.Helper()
	path := filepath.Join(m.dir, "left")
	m.must(os.WriteFile(path, b, 0o600))
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound) && os.Getenv("CI") == "":
	case err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 3): // 3: leaks, no errors
		m.Fatalf("qemu-img check: %v: %s", err, out)
	}
}

// holds wants an image that is not written to any more to hold what it held.
func (m *machine) holds(at int, left map[string]*blktest.CrashDisk, f fixed) {
	m.Helper()
	img := m.open(at, left, f.top)
	defer img.Close() //nolint:errcheck // only read
	if !bytes.Equal(read(m, img.Root), f.data) {
		m.Fatalf("cut at %d: %s, which nobody writes to since %d, holds something else", at, f.top.path, f.step)
	}
}

func TestSnapshot(t *testing.T) {
	m := newMachine(t, 2, image.Raw)
	for i := range 2 {
		m.guest(25)
		old := m.img
		behind := layer{old.Chain[0].Path, old.Chain[0].Format}
		top := layer{filepath.Join(m.dir, fmt.Sprint("overlay", i)), image.Qcow2}
		m.make(top, behind, diskSize)
		v, err := image.OpenOverlay(blk.NewTask(), top.path, image.Qcow2, old, m.options())
		m.must(err)
		m.under(15, func() {
			m.must(m.g.Change(t.Context(), func(tx *blk.Tx) error {
				img, err := v.Join(blk.NewTask())
				if err != nil {
					return err
				}
				m.record(top)
				m.fixed = append(m.fixed, fixed{m.p.now(), behind, bytes.Clone(m.model)})
				m.img = img
				tx.SetRoot(img.Root)
				return nil
			}))
			m.must(v.Retire())
		})
	}
	m.check()
}

func TestStream(t *testing.T) {
	for _, c := range []struct {
		name   string
		base   int
		format string
	}{{"whole", 4, image.Raw}, {"base", 2, image.Raw}, {"qcow2 base", 3, image.Qcow2}} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, 4, c.format)
			m.guest(10)
			var gone []*image.Member
			s := stream.Setup{
				Graph: m.g, Cluster: m.img.Chain[0].Header.ClusterSize(),
				Drop: func(t *blk.Task) (blk.Node, error) {
					img, dropped, err := m.img.Drop(t, c.base)
					if err != nil {
						return nil, err
					}
					m.img, gone = img, dropped
					return img.Root, nil
				},
				Close:  func() error { return image.CloseMembers(gone) },
				Failed: func(err error) { t.Error(err) },
			}
			if c.base < 4 {
				s.Base = uint16(c.base)
			}
			m.under(60, func() {
				m.run(job.Options{}, func(ctx context.Context, j *job.Job) error { return stream.Run(ctx, j, s) })
			})
			m.check()
		})
	}
}

// Images in the middle: behind the first one, which is open for writing anyway, and behind another.
func TestCommit(t *testing.T) {
	for _, c := range []struct {
		name      string
		top, base int
		format    string
	}{{"second", 1, 3, image.Raw}, {"third", 2, 4, image.Qcow2}, {"in the middle", 2, 3, image.Raw}} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, 5, c.format)
			m.guest(10)
			w, err := image.OpenMerge(blk.NewTask(), m.img, c.top, c.base, m.options())
			m.must(err)
			m.must(m.change(w.Insert))
			m.must(w.Settle())
			view, err := w.View()
			m.must(err)
			s := commit.Setup{Graph: m.g, View: view, Depth: w.Depth(), Base: w.Base(), Finish: func(context.Context) error {
				err := m.change(func() (*image.Image, error) { return w.Drop(blk.NewTask()) })
				if err == nil {
					err = w.Settle()
				}
				return err
			}}
			m.under(60, func() {
				m.run(job.Options{}, func(ctx context.Context, j *job.Job) error { return commit.Run(ctx, j, s) })
			})
			m.check()
		})
	}
}

// The image that the guest is on is merged, and others with it.
func TestCommitActive(t *testing.T) {
	for _, c := range []struct {
		name   string
		base   int
		format string
	}{{"raw", 3, image.Raw}, {"qcow2", 1, image.Qcow2}, {"several", 2, image.Raw}} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, 4, c.format)
			m.guest(10)
			base := m.img.Chain[c.base]
			w, err := image.OpenMerge(blk.NewTask(), m.img, 0, c.base, m.options())
			m.must(err)
			m.must(m.change(w.Insert))
			m.must(w.Settle())
			s := blockcopy.Setup{
				Graph: m.g, Target: w.Base(), Blank: true, Base: uint16(c.base),
				Commit:  func() error { m.record(layer{base.Path, base.Format}); return nil },
				Release: func(blk.Node) error { m.img = w.Turn(); return w.Settle() },
			}
			m.under(60, func() {
				m.run(job.Options{}, func(ctx context.Context, j *job.Job) error { return blockcopy.Run(ctx, j, s) })
			})
			m.check()
		})
	}
}

func TestCopy(t *testing.T) {
	for _, c := range []struct {
		name, format string
		pack         bool
		base         int // of the chain
	}{
		{name: "raw", format: image.Raw},
		{name: "qcow2", format: image.Qcow2},
		{name: "compressed", format: image.Qcow2, pack: true},
		{name: "over a base", format: image.Qcow2, base: 2},
		{name: "compressed over a base", format: image.Qcow2, pack: true, base: 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t, 3, image.Raw)
			m.guest(10)
			to, behind := layer{filepath.Join(m.dir, "target"), c.format}, layer{}
			if c.base > 0 {
				b := m.img.Chain[c.base]
				behind = layer{b.Path, b.Format}
			}
			m.make(to, behind, diskSize)
			target, err := image.Open(blk.NewTask(), to.path, to.format, m.options())
			m.must(err)
			s := blockcopy.Setup{
				Graph: m.g, Target: target.Root, Blank: true, Base: uint16(c.base),
				Commit:  func() error { m.record(to); return nil },
				Release: func(blk.Node) error { old := m.img; m.img = target; return old.Close() },
			}
			var packed atomic.Int64
			if n, ok := target.Root.(*qcow2.Node); c.pack && ok {
				s.PackUnit = target.Chain[0].Header.ClusterSize()
				s.Pack = func(t *blk.Task, off int64, data []byte) error {
					packed.Add(1)
					return n.WriteCompressed(t, off, data)
				}
			}
			m.under(60, func() {
				m.run(job.Options{}, func(ctx context.Context, j *job.Job) error { return blockcopy.Run(ctx, j, s) })
			})
			m.check()
			if c.pack && packed.Load() == 0 { // the guest may have written over all of it since
				t.Error("nothing was compressed")
			}
		})
	}
}
