// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/test/e2e/daemon"
	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// A disk's tour: it is copied again and again, each time to another kind of image, under a guest that writes, zeroes and
// discards. Nobody touches what lies behind busy; it holds nothing, and no copy may make something of it.
const (
	tourSize = 12<<20 + 7*512 // no whole number of pages or clusters
	busy     = 6 << 20
	free     = 8 << 20 // the largest cluster ends here
)

// stop is where a tour goes next.
type stop struct {
	args     []string // of the command
	existing []string // how qemu-img makes the target; it is then filled with noise, as far as busy
	base     bool     // what the source has behind it stays
	fat      bool     // has storage for what holds nothing
}

func qcow2Target(args ...string) stop { return stop{args: append(args, "--format", "qcow2")} }

var tours = []struct {
	name   string
	source func(t *testing.T, rng *rand.Rand, m *model) (path, format string)
	stops  []stop
}{
	{
		"raw with holes", rawSource, []stop{
			qcow2Target(),
			{args: []string{"--format", "raw"}},
			qcow2Target("--cluster-size", "512"),
			qcow2Target("--compression", "zstd"),
			{args: []string{"--format", "raw", "--preallocation", "falloc"}, fat: true},
			qcow2Target("--verify"),
		},
	},
	{
		"compressed", theirSource(plain(func(v *variant) { v.compression = "zstd" })), []stop{
			qcow2Target("--cluster-size", "2M", "--compression", "zlib"), qcow2Target("--lazy-refcounts", "--cluster-size", "4K"),
			{args: []string{"--format", "qcow2", "--preallocation", "metadata"}, fat: true},
			{args: []string{"--format", "raw"}},
		},
	},
	{
		"subclusters", theirSource(plain(func(v *variant) { v.extended = true; v.cluster = 128 << 10 })), []stop{
			qcow2Target("--granularity", "4K"),
			{args: []string{"--format", "qcow2", "--preallocation", "full"}, fat: true},
			{args: []string{"--format", "raw", "--preallocation", "full"}, fat: true},
			qcow2Target(),
		},
	},
	{
		"subclusters over short", theirSource(plain(func(v *variant) { v.extended = true; v.backing = "short" })), []stop{
			{args: []string{"--cluster-size", "64K"}, base: true}, {args: []string{"--compression", "zstd"}, base: true}, {args: []string{"--format", "raw"}},
		},
	},
	{
		"version 2 over long", theirSource(plain(func(v *variant) { v.version = 2; v.backing = "long"; v.cluster = 4096 })), []stop{
			{args: []string{"--cluster-size", "1M", "--granularity", "1M"}, base: true}, {base: true}, qcow2Target("--compression", "zlib"),
		},
	},
	{
		"short in the middle", middleSource, []stop{
			{base: true}, {args: []string{"--cluster-size", "4K", "--verify"}, base: true}, {args: []string{"--format", "raw"}},
		},
	},
	{
		"data file", theirSource(plain(func(v *variant) { v.data = "cooked" })), []stop{
			{existing: []string{"-f", "raw"}, args: []string{"--format", "raw"}},
			{existing: []string{"-f", "qcow2", "-o", "extended_l2=on"}, args: []string{"--format", "qcow2"}},
			{existing: []string{"-f", "qcow2", "-o", "compat=0.10,cluster_size=512"}, args: []string{"--format", "qcow2", "--verify"}},
			{existing: []string{"-f", "qcow2", "-o", "refcount_bits=1"}, args: []string{"--format", "qcow2"}},
		},
	},
}

func rawSource(t *testing.T, rng *rand.Rand, m *model) (path, format string) {
	for range 12 {
		m.apply(m.busy(rng, []kind{write, write, zero}))
	}
	path = filepath.Join(t.TempDir(), "raw")
	if err := os.WriteFile(path, m.data[:busy], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, tourSize); err != nil {
		t.Fatal(err)
	}
	return path, "raw"
}

func theirSource(v variant) func(t *testing.T, rng *rand.Rand, m *model) (path, format string) {
	return func(t *testing.T, rng *rand.Rand, m *model) (string, string) {
		m.cluster = v.cluster
		path := createWithQEMU(t, v, m)
		if v.backing != "" { // it holds noise up to three quarters
			o := op{kind: zero, off: busy, n: tourSize - busy}
			base := filepath.Join(filepath.Dir(path), "base")
			modify(t, base, []string{fmt.Sprintf("write -z -u %d %d", busy, baseSize(t, base)-busy)})
			m.apply(o)
		}
		var commands []string
		for range 20 {
			kinds := []kind{write, write, zero, zeroUnmap}
			if v.compresses() {
				kinds = append(kinds, writeCompressed)
			}
			o := m.busy(rng, kinds)
			if o.kind == writeCompressed && len(commands) > 0 { // where nothing is
				o.kind = write
			}
			m.apply(o)
			commands = append(commands, m.command(o))
		}
		modify(t, path, commands)
		mustEqual(t, "the source", readWithQEMU(t, path, ""), m.data)
		return path, "qcow2"
	}
}

// middleSource is a chain whose middle ends where the base has data still: there, zeros show.
func middleSource(t *testing.T, rng *rand.Rand, m *model) (path, format string) {
	dir := t.TempDir()
	base, middle, top := filepath.Join(dir, "base"), filepath.Join(dir, "middle"), filepath.Join(dir, "top")
	const short = busy/2 + 512
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", base, fmt.Sprint(busy))
	modify(t, base, []string{m.command(op{kind: write, n: busy})})
	copy(m.data[:short], m.bytes(op{n: short}))
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", middle, fmt.Sprint(int64(short)))
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", top, fmt.Sprint(int64(tourSize)))
	for _, c := range []struct {
		path string
		op
	}{
		{middle, op{kind: write, off: 1 << 20, n: 100 << 10, fill: 7}},
		{middle, op{kind: zero, off: 2 << 20, n: 300 << 10}},
		{top, op{kind: write, off: 5 << 20, n: 3 << 9, fill: 9}},
		{top, op{kind: zeroUnmap, off: 64 << 10, n: 128 << 10}},
	} {
		modify(t, c.path, []string{m.command(c.op)})
		m.apply(c.op)
	}
	mustEqual(t, "the source", readWithQEMU(t, top, ""), m.data)
	return top, "qcow2"
}

func baseSize(t *testing.T, path string) int64 {
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(run(t, "", "qemu-img", "info", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info.Size
}

// busy is a random operation before that point.
func (m *model) busy(rng *rand.Rand, kinds []kind) op {
	for {
		if o := m.random(rng, kinds); o.off+o.n <= busy {
			return o
		}
	}
}

// visitor is a guest that goes on until it is told to rest.
type visitor struct {
	*frontend.Disk
	m    *model
	rng  *rand.Rand
	mu   sync.Mutex // the guest does something
	done int        // operations
	err  error
}

func (g *visitor) operation() error {
	o := g.m.busy(g.rng, []kind{write, write, write, zero, zeroUnmap, discard})
	var err error
	switch o.kind {
	case write:
		_, err = g.WriteAt(g.m.bytes(o), o.off)
	case discard:
		err = g.Discard(o.off, o.n)
	default:
		err = g.WriteZeroes(o.off, o.n, o.kind == zeroUnmap)
	}
	if err != nil {
		return fmt.Errorf("%+v: %w", o, err)
	}
	g.m.apply(o)
	if g.done++; g.done%16 == 0 {
		return g.Flush()
	}
	return nil
}

func (g *visitor) run(quit chan struct{}) {
	for {
		select {
		case <-quit:
			return
		default:
		}
		g.mu.Lock()
		if g.err == nil {
			g.err = g.operation()
		}
		g.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}

// goOn waits for some operations more.
func (g *visitor) goOn(t *testing.T, n int) {
	t.Helper()
	for want := -1; ; time.Sleep(time.Millisecond) {
		g.mu.Lock()
		if want < 0 {
			want = g.done + n
		}
		done, err := g.done, g.err
		g.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		if done >= want {
			return
		}
	}
}

// TestCopies: from every kind of image to every kind, with the guest at work. QEMU finds the same in what the disk left
// as in what it went to, no errors, and nothing where there was nothing.
func TestCopies(t *testing.T) {
	needQEMU(t)
	bin := t.TempDir()
	if err := daemon.Build(bin); err != nil {
		t.Fatal(err)
	}
	for _, c := range tours {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel() // none of them has an image open itself, which a process that another one starts would share
			rng := seeded(t)
			m := newModel(t, rng, tourSize, 64<<10)
			at, format := c.source(t, rng, m)
			base := ""
			if b := filepath.Join(filepath.Dir(at), "base"); format == "qcow2" && exists(b) {
				base = b
			}
			d, err := daemon.New(bin, daemon.Disk{ID: "d", Image: at, Format: format, Cache: "writeback"})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Remove()
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			f, err := frontend.Dial(t.Context(), d.Socket("d"), frontend.Options{MemSize: 16 << 20})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			cli := func(args ...string) string {
				t.Helper()
				status, out := d.CLI(args...)
				if status != 0 {
					t.Fatalf("blkstream %s: status %d: %s\n%s", strings.Join(args, " "), status, out, d.Log())
				}
				return out
			}
			g := &visitor{Disk: f, m: m, rng: rng}
			quit := make(chan struct{})
			var wg sync.WaitGroup
			wg.Go(func() { g.run(quit) })
			defer wg.Wait()
			defer close(quit)

			fat := false
			for i, s := range c.stops {
				target := filepath.Join(t.TempDir(), fmt.Sprint("stop", i))
				args := append([]string{"copy", "d", target, "--id", fmt.Sprint("j", i), "--speed", "16M"}, s.args...)
				if s.base {
					args = append(args, "--base", base)
				}
				if s.existing != nil {
					args = append(args, "--existing")
					run(t, "", "qemu-img", append(append([]string{"create", "-q"}, s.existing...), target, fmt.Sprint(tourSize))...)
					run(t, fmt.Sprintf("write -q -s %s 0 %d\nquit\n", m.file, busy), "qemu-io", "-f", s.existing[1], "-t", "unsafe", target)
				}
				cli(args...)
				g.goOn(t, 40)
				cli("job", "speed", fmt.Sprint("j", i), "0")
				waitFor(t, "a copy that is ready", func() bool {
					j, err := d.Job(fmt.Sprint("j", i))
					if err != nil || j.State == "failed" {
						t.Fatalf("%+v, %v\n%s", j, err, d.Log())
					}
					return j.State == "ready"
				})
				g.goOn(t, 60) // these go to both images

				g.mu.Lock() // the guest rests, so that both images hold the same
				got := make([]byte, tourSize)
				if _, err := f.ReadAt(got, 0); err != nil {
					t.Fatal(err)
				}
				m.see(t, "through the daemon", got)
				cli("switch", "d")
				look(t, at, format, m, fat)
				g.mu.Unlock()
				if s.base != (base != "" && backingFile(t, target) == base) {
					t.Errorf("%v: behind the target is %q", s, backingFile(t, target))
				}
				info, err := d.Disk("d")
				if err != nil || info.Image != target {
					t.Fatalf("%+v, %v", info, err)
				}
				at, format, fat = target, info.Format, s.fat
			}
			g.goOn(t, 50)
			g.mu.Lock()
			defer g.mu.Unlock()
			got := make([]byte, tourSize)
			if _, err := f.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			m.see(t, "at the end", got)
			if err := d.Stop(); err != nil {
				t.Fatal(err)
			}
			look(t, at, format, m, fat)
		})
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("there is not %s", what)
		}
	}
}

func backingFile(t *testing.T, path string) string {
	t.Helper()
	var info struct {
		File string `json:"full-backing-filename"`
	}
	if err := json.Unmarshal([]byte(run(t, "", "qemu-img", "info", "-U", "--output=json", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info.File
}

// look has QEMU look at an image that the disk has left.
func look(t *testing.T, path, format string, m *model, fat bool) {
	t.Helper()
	if format == "qcow2" {
		if r := checkWithQEMU(t, path); r.Errors+r.Corrupt+r.Leaks != 0 {
			t.Errorf("qemu-img check %s: %+v", path, r)
		}
		mustEqual(t, path+", as QEMU reads it", readWithQEMU(t, path, ""), m.data)
	} else {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		mustEqual(t, path, b, m.data)
	}
	if fat {
		return
	}
	var extents []struct {
		Start, Length int64
		Depth         int
		Zero, Data    bool
	}
	if err := json.Unmarshal([]byte(runIn(t, filepath.Dir(path), "", "qemu-img", "map", "--output=json", "-f", format, path)), &extents); err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		if e.Start+e.Length > free && e.Start < tourSize/blk.SectorSize*blk.SectorSize && e.Data {
			t.Errorf("%s: there is something at %d: %+v", path, e.Start, e)
		}
	}
	if !bytes.Equal(m.data[busy:], make([]byte, tourSize-busy)) {
		t.Error("the model holds something there")
	}
}
