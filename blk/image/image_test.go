// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// QEMU's tools are the peer: what they write we read, and the other way round.

func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

// dir is a directory in which tools run, so that images have short relative names.
type dir struct {
	testing.TB
	path string
}

func newDir(t testing.TB) *dir { return &dir{t, t.TempDir()} }

func (d *dir) at(name string) string { return filepath.Join(d.path, name) }

func (d *dir) tool(args ...string) string {
	d.Helper()
	out, err := d.try(args...)
	if err != nil {
		d.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (d *dir) try(args ...string) (string, error) {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Dir = d.path
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	return string(out) + stderr.String(), err
}

// scribble changes the image at random places with qemu-io.
func (d *dir) scribble(rng *rand.Rand, name, format string, size int64, times int) {
	d.Helper()
	args := []string{"qemu-io", "-f", format}
	for range times {
		off := rng.Int64N(size/512) * 512
		n := min((1+rng.Int64N(300))*512, size-off)
		op := fmt.Sprintf("write -P %d", 1+rng.IntN(255))
		if rng.IntN(4) == 0 {
			op = "write -z"
			if rng.IntN(2) == 0 {
				op = "write -z -u"
			}
		}
		args = append(args, "-c", fmt.Sprintf("%s %d %d", op, off, n))
	}
	d.tool(append(args, name)...)
}

// contents is what QEMU reads.
func (d *dir) contents(name, format string) []byte {
	d.Helper()
	out := d.at("contents")
	d.tool("qemu-img", "convert", "-f", format, "-O", "raw", name, out)
	b, err := os.ReadFile(out)
	if err != nil {
		d.Fatal(err)
	}
	return b
}

func (d *dir) checkClean(name string) {
	d.Helper()
	if out, err := d.try("qemu-img", "check", "-f", "qcow2", name); err != nil {
		d.Fatalf("qemu-img check %s: %v\n%s", name, err, out)
	}
}

var variants = []string{
	"", "compat=0.10", "cluster_size=512", "cluster_size=4k", "cluster_size=2M", "extended_l2=on",
	"extended_l2=on,cluster_size=16k", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=64",
	"compression_type=zstd", "preallocation=metadata",
}

// chain makes a chain of depth images, img0 the one without a backing image, and returns the name of the last. Sizes
// differ, and so does what lies in the images.
func (d *dir) chain(rng *rand.Rand, depth int, size int64) string {
	d.Helper()
	format := Raw
	if rng.IntN(2) == 0 {
		format = Qcow2
	}
	for i := range depth {
		name := fmt.Sprint("img", i)
		s := size
		switch rng.IntN(4) {
		case 0:
			s = size + rng.Int64N(1000)*512
		case 1:
			s = size - rng.Int64N(1000)*512
		}
		args := []string{"qemu-img", "create", "-q", "-f", Qcow2}
		option := variants[rng.IntN(len(variants))]
		if i == 0 {
			args[4] = format
			if format == Raw {
				option = ""
			}
		} else {
			args = append(args, "-b", fmt.Sprint("img", i-1), "-F", format)
			if strings.Contains(option, "preallocation") {
				option = ""
			}
			format = Qcow2
		}
		if option != "" {
			args = append(args, "-o", option)
		}
		d.tool(append(args, name, fmt.Sprint(s))...)
		d.scribble(rng, name, args[4], s, 4+rng.IntN(12))
		if i == depth-1 || rng.IntN(4) > 0 {
			continue
		}
		// Compressed clusters, on the same backing image.
		if args[4] == Qcow2 {
			packed := []string{"qemu-img", "convert", "-c", "-f", Qcow2, "-O", Qcow2}
			if i > 0 {
				f := Qcow2
				if i == 1 && !d.isQcow2("img0") {
					f = Raw
				}
				packed = append(packed, "-B", fmt.Sprint("img", i-1), "-F", f)
			}
			d.tool(append(packed, name, "packed")...)
			if err := os.Rename(d.at("packed"), d.at(name)); err != nil {
				d.Fatal(err)
			}
		}
	}
	return fmt.Sprint("img", depth-1)
}

func (d *dir) isQcow2(name string) bool {
	f, err := os.Open(d.at(name))
	if err != nil {
		d.Fatal(err)
	}
	defer f.Close()
	var b [4]byte
	_, err = io.ReadFull(f, b[:])
	return err == nil && string(b[:]) == "QFI\xfb"
}

// dropFormat makes the header extension with the backing format one that nobody knows, as in images of old.
func (d *dir) dropFormat(name string) {
	d.Helper()
	b, err := os.ReadFile(d.at(name))
	if err != nil {
		d.Fatal(err)
	}
	at := bytes.Index(b[:4096], []byte{0xe2, 0x79, 0x2a, 0xca})
	if at < 0 {
		d.Fatal("no backing format in the header")
	}
	copy(b[at:], "none")
	if err := os.WriteFile(d.at(name), b, 0o600); err != nil {
		d.Fatal(err)
	}
}

func (d *dir) open(name, format string, o Options) *Image {
	d.Helper()
	g, err := Open(blk.NewTask(), d.at(name), format, o)
	if err != nil {
		d.Fatal(err)
	}
	return g
}

func (d *dir) checkContents(g *Image, want []byte) {
	d.Helper()
	if g.Root.Info().Size != int64(len(want)) {
		d.Fatalf("%d bytes, want %d", g.Root.Info().Size, len(want))
	}
	got := make([]byte, len(want))
	if err := read(blk.NewTask(), g.Root, got, 0); err != nil {
		d.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		for i := range got {
			if got[i] != want[i] {
				d.Fatalf("byte %d is %#x, want %#x", i, got[i], want[i])
			}
		}
	}
}

// TestOpenChain reads random chains that QEMU made, and writes into the first image of each.
func TestOpenChain(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	for range 12 {
		d := newDir(t)
		depth := 1 + rng.IntN(6)
		top := d.chain(rng, depth, 3<<20)
		format := Qcow2
		if depth == 1 && !d.isQcow2(top) {
			format = Raw
		}
		data := d.contents(top, format)
		g := d.open(top, format, Options{ReadOnly: true})
		if len(g.Chain) != depth {
			t.Fatalf("%d images, want %d", len(g.Chain), depth)
		}
		d.checkContents(g, data)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}

		g = d.open(top, format, Options{Direct: rng.IntN(2) == 0, Align: 512})
		task := blk.NewTask()
		for range 10 {
			off := rng.Int64N(int64(len(data)) / 512 * 512)
			off -= off % 512
			n := min((1+rng.Int64N(200))*512, int64(len(data))-off)
			for i := range data[off : off+n] {
				data[off+int64(i)] = byte(off>>9) | 1
			}
			if err := write(task, g.Root, data[off:off+n], off); err != nil {
				t.Fatal(err)
			}
		}
		d.checkContents(g, data)
		if err := errors.Join(flush(task, g.Root), g.Close()); err != nil {
			t.Fatal(err)
		}
		if got := d.contents(top, format); !bytes.Equal(got, data) {
			t.Fatal("QEMU reads something else than was written")
		}
		if format == Qcow2 {
			d.checkClean(top)
		}
	}
}

// A chain is as deep as it may be.
func TestDeepChain(t *testing.T) {
	d := newDir(t)
	depth := 1000
	if testing.Short() {
		depth = 100
	}
	ctx := t.Context()
	if err := Create(ctx, d.at("0"), CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{Size: 128 << 20}}); err != nil {
		t.Fatal(err)
	}
	task := blk.NewTask()
	for i := 1; i <= depth+1; i++ {
		f, err := file.Open(mustCreate(t, d.at(fmt.Sprint(i))), file.Options{})
		if err != nil {
			t.Fatal(err)
		}
		format := Qcow2
		if i == 1 {
			format = Raw
		}
		// Not by Create, which would open the chain each time.
		err = qcow2.Create(task, f, qcow2.CreateOptions{Size: 128 << 20, BackingFile: fmt.Sprint(i - 1), BackingFormat: format})
		if err != nil {
			t.Fatal(err)
		}
		n, err := qcow2.Open(task, f, qcow2.Options{Name: "layer"})
		if err != nil {
			t.Fatal(err)
		}
		if err := write(task, n, bytes.Repeat([]byte{byte(i)}, 4096), int64(i)<<16); err != nil {
			t.Fatal(err)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
	g := d.open(fmt.Sprint(depth), Qcow2, Options{ReadOnly: true, Cache: qcow2.NewCache(1 << 20)})
	b := make([]byte, 4096)
	for i := 1; i <= depth; i++ {
		if err := read(task, g.Root, b, int64(i)<<16); err != nil || b[0] != byte(i) || b[4095] != byte(i) {
			t.Fatalf("block %d: %d, error %v", i, b[0], err)
		}
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	o := Options{ReadOnly: true}
	if depth < 1000 {
		o.MaxDepth = depth
	}
	if _, err := Open(task, d.at(fmt.Sprint(depth+1)), Qcow2, o); !errors.Is(err, ErrDepth) {
		t.Errorf("one more: %v", err)
	}
}

func mustCreate(t testing.TB, path string) string {
	t.Helper()
	if err := file.Create(path, 0); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpenRefuses(t *testing.T) {
	need(t, "qemu-img")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "base.img", "1M")
	overlay := func(name, backing, format string) {
		args := []string{"qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", backing}
		if format != "" {
			args = append(args, "-F", format)
		}
		d.tool(append(args, name, "1M")...)
	}
	overlay("good", "base.img", "raw")
	overlay("second", "good", "qcow2")
	overlay("sub-missing", "no/such", "raw")
	overlay("unnamed", "base.img", "raw")
	d.dropFormat("unnamed")
	overlay("json", `json:{"driver":"raw","file":{"driver":"file","filename":"base.img"}}`, "raw")
	overlay("nbd", "nbd:localhost:10809", "raw")
	overlay("url", "http://localhost/x", "raw")
	overlay("colon", "a:b/c", "raw")
	overlay("vmdk", "base.img", "vmdk")
	overlay("loop1", "loop2", "qcow2")
	overlay("loop2", "loop1", "qcow2")
	overlay("self", "./self", "qcow2")
	if err := os.Link(d.at("loop1"), d.at("hardlink")); err != nil {
		t.Fatal(err)
	}
	overlay("wrong", "base.img", "qcow2")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=ext.data", "ext", "1M")

	outside := errors.New("outside image_roots")
	only := func(names ...string) func(string) error {
		return func(path string) error {
			for _, n := range names {
				if filepath.Base(path) == n {
					return nil
				}
			}
			return outside
		}
	}
	for _, c := range []struct {
		name, image, format string
		o                   Options
		want                error
		text                string
	}{
		{name: "good", image: "good", format: Qcow2},
		{name: "no format", image: "good", want: ErrNoFormat, text: "no format is given"},
		{name: "unknown format", image: "good", format: "vdi", want: ErrFormat, text: `"vdi"`},
		{name: "missing", image: "nope", format: Qcow2, want: os.ErrNotExist},
		{name: "not qcow2", image: "base.img", format: Qcow2, want: qcow2.ErrFormat},
		{name: "backing missing", image: "sub-missing", format: Qcow2, want: os.ErrNotExist, text: "/no/such"},
		{
			name: "backing without format", image: "unnamed", format: Qcow2, want: ErrNoFormat,
			text: "blkstream image rebase -f qcow2 -u -F FORMAT",
		},
		{name: "its format given", image: "unnamed", format: Qcow2, o: Options{Backing: []Layer{{Format: Raw}}}},
		{name: "another image given", image: "unnamed", format: Qcow2, o: Options{Backing: []Layer{{d.at("good"), Qcow2}, {}}}},
		{
			name: "more images given than there are", image: "good", format: Qcow2,
			o: Options{Backing: []Layer{{}, {d.at("base.img"), Raw}}}, want: nil, text: "has no backing image",
		},
		{name: "json", image: "json", format: Qcow2, want: ErrName, text: `"json:"`},
		{name: "nbd", image: "nbd", format: Qcow2, want: ErrName, text: `"nbd:"`},
		{name: "url", image: "url", format: Qcow2, want: ErrName, text: `"http:"`},
		{name: "colon", image: "colon", format: Qcow2, want: ErrName},
		{name: "backing format unknown", image: "vmdk", format: Qcow2, want: ErrFormat, text: `"vmdk"`},
		{name: "backing is no qcow2", image: "wrong", format: Qcow2, want: qcow2.ErrFormat, text: "behind image"},
		{name: "loop", image: "loop1", format: Qcow2, want: ErrLoop},
		{name: "loop over a link", image: "hardlink", format: Qcow2, want: ErrLoop},
		{name: "itself", image: "self", format: Qcow2, want: ErrLoop},
		{name: "too deep", image: "second", format: Qcow2, o: Options{MaxDepth: 1}, want: ErrDepth},
		{name: "deep enough", image: "second", format: Qcow2, o: Options{MaxDepth: 2}},
		{name: "image outside", image: "good", format: Qcow2, o: Options{Check: only("base.img")}, want: outside},
		{name: "backing outside", image: "good", format: Qcow2, o: Options{Check: only("good")}, want: outside},
		{name: "all inside", image: "good", format: Qcow2, o: Options{Check: only("good", "base.img")}},
		{name: "data outside", image: "ext", format: Qcow2, o: Options{Check: only("ext")}, want: outside},
		{name: "data inside", image: "ext", format: Qcow2, o: Options{Check: only("ext", "ext.data")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := openFiles(t)
			for _, readOnly := range []bool{true, false} {
				c.o.ReadOnly = readOnly
				g, err := Open(blk.NewTask(), d.at(c.image), c.format, c.o)
				if err == nil {
					err = errors.Join(err, g.Close())
					if c.want != nil || c.text != "" {
						t.Fatal("opened")
					}
				} else if c.want == nil && c.text == "" {
					t.Fatal(err)
				}
				if c.want != nil && !errors.Is(err, c.want) || c.text != "" && !strings.Contains(err.Error(), c.text) {
					t.Fatalf("error %v, want %v with %q", err, c.want, c.text)
				}
			}
			if after := openFiles(t); after != before {
				t.Errorf("%d files are open, %d were before", after, before)
			}
		})
	}
}

// openFiles counts descriptors of images.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if path, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(path, os.TempDir()) {
			n++
		}
	}
	return n
}

// TestHostile opens images with damaged bytes. Whatever they say, nothing panics, hangs or stays open.
func TestHostile(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	d := newDir(t)
	top := d.chain(rng, 3, 1<<20)
	good := map[string][]byte{}
	for i := range 3 {
		name := fmt.Sprint("img", i)
		b, err := os.ReadFile(d.at(name))
		if err != nil {
			t.Fatal(err)
		}
		good[name] = b
	}
	rounds := 300
	if testing.Short() {
		rounds = 60
	}
	opened := 0
	before := openFiles(t)
	for range rounds {
		name := fmt.Sprint("img", rng.IntN(3))
		bad := bytes.Clone(good[name])
		// Half of the time in the header, else in a table or in data.
		for range 1 + rng.IntN(3) {
			at := rng.IntN(112)
			if rng.IntN(2) == 0 {
				at = rng.IntN(len(bad))
			}
			bad[at] ^= 1 << rng.IntN(8)
		}
		if err := os.WriteFile(d.at(name), bad, 0o600); err != nil {
			t.Fatal(err)
		}
		_, _ = Describe(d.at(top), Qcow2, true, Options{})
		_, _ = Check(t.Context(), d.at(top), Qcow2, qcow2.RepairNone, nil, nil)
		g, err := Open(blk.NewTask(), d.at(top), Qcow2, Options{ReadOnly: true})
		if err == nil {
			opened++
			size := min(g.Root.Info().Size, 2<<20)
			_ = read(blk.NewTask(), g.Root, make([]byte, size), 0)
			_, _ = g.Root.Map(blk.NewTask(), 0, size)
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := os.WriteFile(d.at(name), good[name], 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if opened == 0 || opened == rounds {
		t.Errorf("%d of %d damaged images could be opened", opened, rounds)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files are open, %d were before", after, before)
	}
}

// hold keeps an image open with qemu-io.
func (d *dir) hold(args ...string) (release func()) {
	d.Helper()
	cmd := exec.Command("qemu-io", args...)
	cmd.Dir = d.path
	in, err := cmd.StdinPipe()
	if err != nil {
		d.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		d.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		d.Fatal(err)
	}
	// Its answer shows that the image is open.
	if _, err := io.WriteString(in, "read 0 512\n"); err != nil {
		d.Fatal(err)
	}
	var seen []byte
	for buf := make([]byte, 256); !bytes.Contains(seen, []byte("read 512/512")); {
		n, err := out.Read(buf)
		if err != nil {
			d.Fatalf("qemu-io: %v: %s", err, seen)
		}
		seen = append(seen, buf[:n]...)
	}
	return func() {
		in.Close()
		_, _ = io.Copy(io.Discard, out)
		if err := cmd.Wait(); err != nil {
			d.Error(err)
		}
	}
}

func TestInUse(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "base", "1M")
	for _, name := range []string{"a", "b"} {
		d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", name)
	}
	open := func(name string, readOnly bool) error {
		g, err := Open(blk.NewTask(), d.at(name), Qcow2, Options{ReadOnly: readOnly})
		if err != nil {
			return err
		}
		return g.Close()
	}
	inUse := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, file.ErrInUse) {
			t.Errorf("%s: %v, want %v", what, err, file.ErrInUse)
		}
	}
	fine := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}

	release := d.hold("-f", "qcow2", "a") // QEMU writes a, and reads its base
	inUse("the same image", open("a", false))
	inUse("the same image, reading", open("a", true))
	inUse("its base, writing", open("base", false))
	fine("its base, reading", open("base", true))
	fine("another overlay", open("b", false))
	_, err := Describe(d.at("a"), Qcow2, true, Options{})
	inUse("info", err)
	_, err = Check(t.Context(), d.at("a"), Qcow2, qcow2.RepairNone, nil, nil)
	inUse("check", err)
	inUse("rebase", Rebase(t.Context(), d.at("a"), RebaseOptions{Unsafe: true}))
	inUse("resize", Resize(blk.NewTask(), d.at("a"), Qcow2, "+", 512, false))
	inUse("resize of the base", Resize(blk.NewTask(), d.at("base"), Qcow2, "+", 512, false))
	release()

	release = d.hold("-f", "qcow2", "base")
	inUse("an overlay of a base that somebody writes", open("a", false))
	inUse("the same, reading", open("a", true))
	release()
	fine("afterwards", open("a", false))

	g := d.open("a", Qcow2, Options{})
	if out, err := d.try("qemu-io", "-f", "qcow2", "-c", "read 0 512", "a"); err == nil {
		t.Errorf("QEMU opens an image that we write: %s", out)
	}
	if out, err := d.try("qemu-io", "-f", "qcow2", "-c", "write 0 512", "base"); err == nil {
		t.Errorf("QEMU writes a base that we use: %s", out)
	}
	d.tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", "b")
	fine("close", g.Close())
}

// TestMapInfoCheck compares with what QEMU says of the same images.
func TestMapInfoCheck(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	for range 8 {
		d := newDir(t)
		depth := 1 + rng.IntN(4)
		top := d.chain(rng, depth, 2<<20)
		format := Qcow2
		if depth == 1 && !d.isQcow2(top) {
			format = Raw
		}

		var want []Segment
		unmarshal(t, d.tool("qemu-img", "map", "-f", format, "--output=json", top), &want)
		var got []Segment
		err := Map(t.Context(), d.at(top), format, Options{}, func(s Segment) error {
			got = append(got, s)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if w, g := flatten(want), flatten(got); !reflect.DeepEqual(w, g) {
			for i := range w {
				if i >= len(g) || w[i] != g[i] {
					t.Fatalf("block %d: QEMU says %+v, we %+v", i, w[i], g[min(i, len(g)-1)])
				}
			}
			t.Fatalf("%d blocks, QEMU has %d", len(g), len(w))
		}

		var wantInfo, gotInfo []map[string]any
		unmarshal(t, d.tool("qemu-img", "info", "-f", format, "--backing-chain", "--output=json", top), &wantInfo)
		infos, err := Describe(d.at(top), format, true, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range infos {
			infos[i].Filename = filepath.Base(infos[i].Filename)
			infos[i].FullBacking = strings.TrimPrefix(infos[i].FullBacking, d.path+"/")
		}
		b, err := json.Marshal(infos)
		if err != nil {
			t.Fatal(err)
		}
		unmarshal(t, string(b), &gotInfo)
		for _, w := range wantInfo {
			delete(w, "children") // QEMU's own nodes, since version 8
		}
		if !reflect.DeepEqual(wantInfo, gotInfo) {
			t.Fatalf("QEMU says\n%v\nwe\n%v", wantInfo, gotInfo)
		}

		if format == Raw {
			continue
		}
		var wantCheck map[string]any
		unmarshal(t, d.tool("qemu-img", "check", "-f", format, "--output=json", top), &wantCheck)
		r, err := Check(t.Context(), d.at(top), format, qcow2.RepairNone, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		for key, v := range map[string]int64{
			"corruptions": r.Errors, "leaks": r.Leaks, "image-end-offset": r.ImageEnd, "total-clusters": r.TotalClusters,
			"allocated-clusters": r.AllocatedClusters, "compressed-clusters": r.CompressedClusters,
			"fragmented-clusters": r.FragmentedClusters,
		} {
			w, _ := wantCheck[key].(float64) // left out if 0
			if int64(w) != v {
				t.Errorf("check: %s is %d, QEMU says %v", key, v, w)
			}
		}
	}
}

func unmarshal(t *testing.T, text string, v any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
}

// block is what both say about 512 bytes. QEMU 7.2 does not tell what is compressed. It may look for holes in the file
// behind data, and says then that it is zeros as well. Where zeros are is of no use.
type block struct {
	depth               int
	present, zero, data bool
	at                  int64
}

func flatten(all []Segment) []block {
	var blocks []block
	for _, s := range all {
		for off := int64(0); off < s.Length; off += 512 {
			b := block{s.Depth, s.Present, s.Zero && !s.Data, s.Data, -1}
			if s.Offset != nil && s.Data {
				b.at = *s.Offset + off
			}
			blocks = append(blocks, b)
		}
	}
	return blocks
}

func TestCreateConvert(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	d := newDir(t)
	const size = 5<<20 + 3*512
	d.tool("qemu-img", "create", "-q", "-f", "raw", "src", fmt.Sprint(size))
	d.scribble(rng, "src", "raw", size, 40)
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "base", fmt.Sprint(size-1<<20))
	d.scribble(rng, "base", "qcow2", size-1<<20, 20)
	data := d.contents("src", "raw")
	for i, c := range []struct {
		o        CreateOptions
		compress bool
	}{
		{o: CreateOptions{Format: Raw}},
		{o: CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{Preallocation: "falloc"}}},
		{o: CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{Preallocation: "full"}}},
		{o: CreateOptions{Format: Qcow2}},
		{o: CreateOptions{Format: Qcow2}, compress: true},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Compression: "zstd", ClusterSize: 4096}}, compress: true},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{ClusterSize: 2 << 20}}, compress: true},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{ClusterSize: 512}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Version: 2}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{ExtendedL2: true, LazyRefcounts: true}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{RefcountBits: 1}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Preallocation: "metadata"}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Preallocation: "full"}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: "base", BackingFormat: Qcow2}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: "base", BackingFormat: Qcow2}}, compress: true},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{DataFile: "data1"}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{DataFile: "data2", DataFileRaw: true}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{DataFile: "data3", Preallocation: "falloc"}}},
		{o: CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{DataFile: "data4", DataFileRaw: true, Preallocation: "full"}}},
	} {
		t.Run(fmt.Sprintf("%+v compress=%v", c.o, c.compress), func(t *testing.T) {
			c.o.Size = -1
			name := fmt.Sprint("out", i)
			src := d.open("src", Raw, Options{ReadOnly: true})
			var seen int64
			err := Convert(t.Context(), src.Root, d.at(name), ConvertOptions{
				Target: c.o, Compress: c.compress,
				Progress: func(done, total int64) {
					if done < seen || total != size || done > total {
						t.Errorf("progress %d of %d after %d", done, total, seen)
					}
					seen = done
				},
			})
			if err := errors.Join(err, src.Close()); err != nil {
				t.Fatal(err)
			}
			if seen != size {
				t.Errorf("progress ended at %d", seen)
			}
			if c.o.Format == Qcow2 {
				d.checkClean(name)
			}
			if got := d.contents(name, c.o.Format); !bytes.Equal(got, data) {
				t.Error("QEMU reads something else")
			}
			g := d.open(name, c.o.Format, Options{ReadOnly: true})
			d.checkContents(g, data)
			// And back.
			back := d.at("back")
			err = Convert(t.Context(), g.Root, back, ConvertOptions{Target: CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{Size: -1}}})
			if err := errors.Join(err, g.Close()); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
				t.Errorf("converted back it is something else, error %v", err)
			}
			if err := os.Remove(back); err != nil {
				t.Error(err)
			}
			if c.o.Preallocation == "" && c.o.ClusterSize < 1<<20 {
				if a, err := Allocated(d.at(name)); err != nil || a > size {
					t.Errorf("a sparse image takes %d bytes, error %v", a, err)
				}
			}
		})
	}
}

// What fails or is interrupted leaves nothing behind.
func TestConvertFails(t *testing.T) {
	d := newDir(t)
	mem := blktest.NewMemory(40 << 20)
	if err := write(blk.NewTask(), mem, bytes.Repeat([]byte{1}, 40<<20), 0); err != nil {
		t.Fatal(err)
	}
	src := blktest.NewFault(mem)
	before := openFiles(t)
	try := func(ctx context.Context, progress Progress, want error) {
		t.Helper()
		for _, o := range []qcow2.CreateOptions{{Size: -1}, {Size: -1, DataFile: "data"}} {
			err := Convert(ctx, src, d.at("out"), ConvertOptions{
				Target: CreateOptions{Format: Qcow2, CreateOptions: o}, Progress: progress,
			})
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
			if left, err := os.ReadDir(d.path); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		}
		if after := openFiles(t); after != before {
			t.Errorf("%d files are open, %d were before", after, before)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	try(ctx, func(done, _ int64) {
		if done > 10<<20 {
			cancel()
		}
	}, context.Canceled)
	bad := errors.New("bad sector")
	trap := src.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, Off: 30 << 20, Len: 512, Err: bad})
	try(t.Context(), nil, bad)
	trap.Remove()
	if err := Convert(t.Context(), src, d.at("out"), ConvertOptions{Target: CreateOptions{Format: Qcow2}}); !errors.Is(err, blk.ErrInvalid) {
		t.Errorf("a target that is too small: %v", err)
	}
	o := ConvertOptions{Target: CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{Size: -1}}, Compress: true}
	if err := Convert(t.Context(), src, d.at("out"), o); !errors.Is(err, blk.ErrInvalid) {
		t.Errorf("a compressed raw image: %v", err)
	}
	for _, c := range []struct {
		o    qcow2.CreateOptions
		want string
	}{
		{qcow2.CreateOptions{Preallocation: "metadata"}, "compressed image with"},
		{qcow2.CreateOptions{DataFile: "data"}, "compressed image with"},
		{qcow2.CreateOptions{RefcountBits: 1}, "need reference counts of 8 bits"},
		{qcow2.CreateOptions{RefcountBits: 8, ClusterSize: 128 << 10}, "need reference counts of 16 bits"},
		{qcow2.CreateOptions{RefcountBits: 1, ClusterSize: 512}, "need reference counts of 2 bits"},
	} {
		c.o.Size = -1
		o := ConvertOptions{Target: CreateOptions{Format: Qcow2, CreateOptions: c.o}, Compress: true}
		if err := Convert(t.Context(), src, d.at("out"), o); !errors.Is(err, blk.ErrInvalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v, compressed: %v", c.o, err)
		}
	}
}

// An image is not put over one that it is behind itself.
func TestRebaseLoop(t *testing.T) {
	d := newDir(t)
	a := CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: 1 << 20}}
	b := CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: -1, BackingFile: "a", BackingFormat: Qcow2}}
	if err := errors.Join(Create(t.Context(), d.at("a"), a), Create(t.Context(), d.at("b"), b)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if err := Rebase(t.Context(), d.at("a"), RebaseOptions{Layer: Layer{name, Qcow2}}); !errors.Is(err, ErrLoop) {
			t.Errorf("a over %s: %v", name, err)
		}
	}
	if err := Rebase(t.Context(), d.at("b"), RebaseOptions{Layer: Layer{"a", Qcow2}}); err != nil {
		t.Error(err)
	}
}

func TestCreateRefuses(t *testing.T) {
	need(t, "qemu-img")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	q := func(o qcow2.CreateOptions) CreateOptions { return CreateOptions{Format: Qcow2, CreateOptions: o} }
	for _, c := range []struct {
		name string
		o    CreateOptions
		want error
	}{
		{"no format", CreateOptions{}, ErrFormat},
		{"raw with a cluster size", CreateOptions{Format: Raw, CreateOptions: qcow2.CreateOptions{ClusterSize: 4096}}, blk.ErrInvalid},
		{"no size", q(qcow2.CreateOptions{Size: -1}), blk.ErrInvalid},
		{"huge", q(qcow2.CreateOptions{Size: 1<<63 - 1}), blk.ErrInvalid},
		{"bad cluster size", q(qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 5000}), blk.ErrInvalid},
		{"backing without format", q(qcow2.CreateOptions{Size: -1, BackingFile: "base"}), ErrNoFormat},
		{"backing missing", q(qcow2.CreateOptions{Size: -1, BackingFile: "nope", BackingFormat: Raw}), os.ErrNotExist},
		{"backing of another format", q(qcow2.CreateOptions{Size: -1, BackingFile: "base", BackingFormat: Qcow2}), qcow2.ErrFormat},
		{"backing by protocol", q(qcow2.CreateOptions{Size: -1, BackingFile: "nbd:x", BackingFormat: Raw}), ErrName},
		{"itself as data", q(qcow2.CreateOptions{Size: 1 << 20, DataFile: "new"}), os.ErrExist},
	} {
		if err := Create(t.Context(), d.at("new"), c.o); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if _, err := os.Stat(d.at("new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: the image is there: %v", c.name, err)
			os.Remove(d.at("new"))
		}
	}
	if err := Create(t.Context(), d.at("base"), q(qcow2.CreateOptions{Size: 1 << 20})); !errors.Is(err, os.ErrExist) {
		t.Errorf("an image that is there: %v", err)
	}
	o := q(qcow2.CreateOptions{Size: 1 << 20})
	o.Existing = true
	if err := Create(t.Context(), d.at("base"), o); err != nil {
		t.Error(err)
	}
	d.checkClean("base")
}

func TestCompare(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "a", "10M")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "b", "12M")
	a, b := d.open("a", Raw, Options{}), d.open("b", Qcow2, Options{})
	defer a.Close()
	defer b.Close()
	task := blk.NewTask()
	expect := func(want Difference) {
		t.Helper()
		for _, pair := range [][2]blk.Node{{a.Root, b.Root}, {b.Root, a.Root}} {
			if got, err := Compare(t.Context(), pair[0], pair[1], nil); err != nil || got != want {
				t.Errorf("%+v, %v; want %+v", got, err, want)
			}
		}
	}
	put := func(n blk.Node, off int64, x byte) {
		t.Helper()
		if err := write(task, n, bytes.Repeat([]byte{x}, 512), off); err != nil {
			t.Fatal(err)
		}
	}
	expect(Difference{Same: true})
	put(a.Root, 7<<20, 1)
	expect(Difference{Offset: 7 << 20})
	put(b.Root, 7<<20, 1)
	expect(Difference{Same: true})
	put(b.Root, 11<<20, 1)
	expect(Difference{Offset: 11 << 20})
	put(b.Root, 3<<20+512, 1)
	expect(Difference{Offset: 3<<20 + 512})
}

// TestRebase rebases random chains and compares with what they read as before, and with what QEMU's rebase makes.
func TestRebase(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	for round := range 10 {
		d := newDir(t)
		depth := 2 + rng.IntN(3)
		top := d.chain(rng, depth, 3<<20)
		data := d.contents(top, Qcow2)
		o := RebaseOptions{}
		switch rng.IntN(3) {
		case 0: // none
		case 1: // an image further down
			i := rng.IntN(depth - 1)
			o.Path, o.Format = fmt.Sprint("img", i), Qcow2
			if i == 0 && !d.isQcow2("img0") {
				o.Format = Raw
			}
		case 2: // another one, shorter or longer
			size := 2<<20 + rng.Int64N(4096)*512
			o.Layer = Layer{"other", Qcow2}
			d.tool("qemu-img", "create", "-q", "-f", Qcow2, "other", fmt.Sprint(size))
			d.scribble(rng, "other", Qcow2, size, 20)
		}
		t.Logf("round %d: depth %d, to %+v", round, depth, o.Layer)
		d.tool("cp", top, "theirs")
		args := []string{"qemu-img", "rebase", "-f", Qcow2, "-b", o.Path}
		if o.Format != "" {
			args = append(args, "-F", o.Format)
		}
		d.tool(append(args, "theirs")...)

		if err := Rebase(t.Context(), d.at(top), o); err != nil {
			t.Fatal(err)
		}
		d.checkClean(top)
		if at := firstDifference(d.contents(top, Qcow2), data); at >= 0 {
			t.Fatalf("byte %d reads as something else than before", at)
		}
		d.tool("qemu-img", "compare", "-f", Qcow2, "-F", Qcow2, top, "theirs")
		infos, err := Describe(d.at(top), Qcow2, false, Options{})
		if err != nil || infos[0].BackingFilename != o.Path || infos[0].BackingFormat != o.Format {
			t.Fatalf("%+v, %v", infos, err)
		}
		g := d.open(top, Qcow2, Options{})
		d.checkContents(g, data)
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// firstDifference is -1 if there is none.
func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	return -1
}

// A rebase that is cut off changes nothing that a guest could see.
func TestRebaseInterrupted(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "base", "64M")
	d.tool("qemu-io", "-f", "raw", "-c", "write -P 5 0 64M", "base")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "other", "32M")
	d.tool("qemu-io", "-f", "qcow2", "-c", "write -P 6 0 32M", "other")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
	d.tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 512", "-c", "write -z 2M 1M", "top")
	data := d.contents("top", Qcow2)
	o := RebaseOptions{Layer: Layer{"other", Qcow2}}
	for at := int64(4 << 20); ; at += 20 << 20 {
		ctx, cancel := context.WithCancel(t.Context())
		o.Progress = func(done, _ int64) {
			if done >= at {
				cancel()
			}
		}
		err := Rebase(ctx, d.at("top"), o)
		cancel()
		if !bytes.Equal(d.contents("top", Qcow2), data) {
			t.Fatalf("interrupted at %d the disk reads as something else", at)
		}
		d.checkClean("top")
		if err == nil {
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	infos, err := Describe(d.at("top"), Qcow2, true, Options{})
	if err != nil || len(infos) != 2 || infos[0].BackingFilename != "other" {
		t.Errorf("%+v, %v", infos, err)
	}
}

// brimful is a file that takes no data any more where it was not before.
type brimful struct {
	*file.Node
	end int64
}

func (b *brimful) TryMap(blk.Op, int64, int64) (blk.Extent, bool) { return blk.Extent{}, false }

func (b *brimful) Do(t *blk.Task, r *blk.Request) error {
	if r.Op == blk.OpWrite && r.Off >= b.end && r.Len > 4096 { // not tables
		return syscall.ENOSPC
	}
	return b.Node.Do(t, r)
}

// A rebase for which there is no room changes nothing that a guest could see, whatever of it was done before.
func TestRebaseNoSpace(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "base", "8M")
	d.tool("qemu-io", "-f", "raw", "-c", "write -P 5 0 8M", "base")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "zeros", "8M")
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
	data := d.contents("top", Qcow2)
	for _, l := range []Layer{{}, {"zeros", Qcow2}} {
		err := Rebase(t.Context(), d.at("top"), RebaseOptions{Layer: l, storage: func(f *file.Node) blk.Node {
			return &brimful{f, f.Info().Size}
		}})
		if !blk.IsNoSpace(err) {
			t.Fatal(err)
		}
		d.checkClean("top")
		if at := firstDifference(d.contents("top", Qcow2), data); at >= 0 {
			t.Fatalf("to %q: byte %d reads as something else than before", l.Path, at)
		}
	}
}

func TestRebaseUnsafe(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	d.tool("qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", "base")
	for _, compat := range []string{"0.10", "1.1"} {
		d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat="+compat, "-b", "base", "-F", "raw", "top")
		d.dropFormat("top")
		if _, err := Open(blk.NewTask(), d.at("top"), Qcow2, Options{}); !errors.Is(err, ErrNoFormat) {
			t.Fatal(err)
		}
		if err := Rebase(t.Context(), d.at("top"), RebaseOptions{Unsafe: true, KeepName: true, Layer: Layer{Format: Raw}}); err != nil {
			t.Fatal(err)
		}
		g := d.open("top", Qcow2, Options{ReadOnly: true})
		d.checkContents(g, bytes.Repeat([]byte{5}, 1<<20))
		if err := g.Close(); err != nil {
			t.Fatal(err)
		}
		d.checkClean("top")
		for _, l := range []Layer{{"gone/elsewhere", Qcow2}, {}} {
			if err := Rebase(t.Context(), d.at("top"), RebaseOptions{Unsafe: true, Layer: l}); err != nil {
				t.Fatal(err)
			}
			infos, err := Describe(d.at("top"), Qcow2, false, Options{})
			if err != nil || infos[0].BackingFilename != l.Path || infos[0].BackingFormat != l.Format {
				t.Fatalf("%+v, %v", infos, err)
			}
		}
		d.checkClean("top")
	}
	for _, c := range []struct {
		o    RebaseOptions
		want error
	}{
		{RebaseOptions{Layer: Layer{Path: "base"}}, ErrNoFormat},
		{RebaseOptions{Unsafe: true, Layer: Layer{"nbd:x", Raw}}, ErrName},
		{RebaseOptions{Unsafe: true, KeepName: true, Layer: Layer{Format: Raw}}, blk.ErrInvalid},
	} {
		if err := Rebase(t.Context(), d.at("top"), c.o); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
}

func TestResize(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	d := newDir(t)
	d.tool("qemu-img", "create", "-q", "-f", "qcow2", "base", "8M")
	d.tool("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 8M", "base")
	for _, compat := range []string{"1.1", "0.10"} {
		d.tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat="+compat, "-b", "base", "-F", "qcow2", "top", fmt.Sprint(2<<20+512))
		task := blk.NewTask()
		want := bytes.Repeat([]byte{5}, 2<<20+512)
		for _, s := range []struct {
			sign   string
			n      int64
			shrink bool
			err    error
		}{
			{"", 5 << 20, false, nil}, // the base must not show
			{"-", 3 << 20, false, ErrShrink},
			{"-", 3<<20 + 1024, true, nil},
			{"+", 7 << 20, false, nil},
			{"-", 100 << 20, true, blk.ErrInvalid},
			{"+", 1<<63 - 1, false, blk.ErrInvalid},
		} {
			if err := Resize(task, d.at("top"), Qcow2, s.sign, s.n, s.shrink); !errors.Is(err, s.err) {
				t.Fatalf("%+v: %v", s, err)
			}
			if s.err == nil {
				size := map[string]int64{"": 0, "+": int64(len(want)), "-": int64(len(want))}[s.sign]
				if s.sign == "-" {
					size -= s.n
				} else {
					size += s.n
				}
				want = append(want[:min(int64(len(want)), size)], make([]byte, max(0, size-int64(len(want))))...)
			}
			if !bytes.Equal(d.contents("top", Qcow2), want) {
				t.Fatalf("%+v: QEMU reads something else", s)
			}
			d.checkClean("top")
			g := d.open("top", Qcow2, Options{ReadOnly: true})
			d.checkContents(g, want)
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
		}
		os.Remove(d.at("top"))
	}
}
