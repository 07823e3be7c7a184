// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// addCow makes sub/a over base, which holds random bytes, with a raw file beside base. Its names are relative.
func (d *dir) addCow(rng *rand.Rand, existing int) (name string, data []byte) {
	d.Helper()
	data = make([]byte, overlaySize-3*512)
	for i := range data {
		data[i] = byte(1 + rng.IntN(255))
	}
	must := func(err error) {
		d.Helper()
		if err != nil {
			d.Fatal(err)
		}
	}
	must(os.WriteFile(d.at("base"), data, 0o600))
	must(os.Mkdir(d.at("sub"), 0o700))
	if existing > 0 {
		must(os.WriteFile(d.at("raw"), bytes.Repeat([]byte{0xee}, existing), 0o600))
		data = append(data, make([]byte, existing-len(data))...)
	}
	must(Create(d.Context(), d.at("sub/a"), CreateOptions{Format: AddCow, ImageFile: "../raw", CreateOptions: qcow2.CreateOptions{
		Size: -1, BackingFile: "../base", BackingFormat: Raw,
	}}))
	return "sub/a", data
}

// An add-cow image is put over a raw one in use, is covered itself, and in the end its image file is all that is needed.
func TestAddCow(t *testing.T) {
	for _, existing := range []int{0, overlaySize} {
		for _, direct := range []bool{false, true} {
			d, rng, task := newDir(t), blktest.Rand(t), blk.NewTask()
			name, data := d.addCow(rng, existing)
			o := Options{Direct: direct, Align: blk.SectorSize}
			old := d.open("base", Raw, o)
			v, err := OpenOverlay(task, d.at(name), AddCow, old, o)
			if err != nil {
				t.Fatal(err)
			}
			g, err := v.Join(task)
			if err != nil {
				t.Fatal(err)
			}
			if err := v.Retire(); err != nil {
				t.Fatal(err)
			}
			model := append(data, make([]byte, overlaySize-len(data))...) // for change
			for range 20 {
				off := rng.Int64N(int64(len(data))/512-8) * 512
				copy(model[off:], bytes.Repeat([]byte{byte(rng.IntN(256))}, 2048))
				if err := write(task, g.Root, model[off:off+2048], off); err != nil {
					t.Fatal(err)
				}
			}
			d.checkContents(g, model[:len(data)])
			for _, f := range []string{"raw", name, "base"} {
				if _, err := file.Open(d.at(f), file.Options{}); !errors.Is(err, file.ErrInUse) {
					t.Errorf("%s may be written by others: %v", f, err)
				}
			}
			f := cor.New(g.Root, g.Chain[0].ClusterSize(), func(err error) { t.Error(err) })
			if _, _, err := g.Drop(task, 2); !errors.Is(err, addcow.ErrPartial) {
				t.Errorf("dropped too early: %v", err)
			}
			if err := f.Pull(task, 0, g.Root.Info().Size, 2); err != nil {
				t.Fatal(err)
			}
			next, gone, err := g.Drop(task, 2)
			if err != nil {
				t.Fatal(err)
			}
			if next.Chain[0].Path != d.path+"/sub/../raw" || next.Chain[0].Format != Raw || next.Lower != nil {
				t.Errorf("what stays is %+v", next.Chain[0])
			}
			if err := CloseMembers(gone); err != nil {
				t.Fatal(err)
			}
			d.lockable(d.at(name))
			d.lockable(d.at("base"))
			d.checkContents(next, model[:len(data)])
			if err := next.Close(); err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(d.at("raw")); err != nil || !bytes.Equal(b, model[:len(data)]) {
				t.Errorf("the image file is not the disk: %v", err)
			}
		}
	}
}

// Chains with add-cow images in any place read as they should, and a finished one needs nothing behind it.
func TestAddCowInChain(t *testing.T) {
	d, rng, task := newDir(t), blktest.Rand(t), blk.NewTask()
	name, data := d.addCow(rng, 0)
	d.make("over", CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{Size: int64(len(data)), BackingFile: name, BackingFormat: AddCow}})
	g := d.open(name, AddCow, Options{})
	copy(data[70000:], "in the add-cow image")
	if err := write(task, g.Root, data[65536:131072], 65536); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g = d.open("over", Qcow2, Options{})
	if len(g.Chain) != 3 || g.Chain[1].Format != AddCow {
		t.Fatalf("the chain has %d images", len(g.Chain))
	}
	copy(data[200000:], "in front")
	if err := write(task, g.Root, []byte("in front"), 200000); err != nil {
		t.Fatal(err)
	}
	d.checkContents(g, data)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	var have []Segment
	if err := Map(t.Context(), d.at(name), AddCow, Options{}, func(s Segment) error { have = append(have, s); return nil }); err != nil {
		t.Fatal(err)
	}
	zero, first, second := int64(0), int64(65536), int64(131072)
	want := []Segment{
		{Length: first, Depth: 1, Present: true, Data: true, Offset: &zero, File: d.path + "/sub/../base"},
		{Start: first, Length: first, Present: true, Data: true, Offset: &first, File: d.path + "/sub/../raw"},
		{Start: second, Length: int64(len(data)) - second, Depth: 1, Present: true, Data: true, Offset: &second, File: d.path + "/sub/../base"},
	}
	if !reflect.DeepEqual(have, want) {
		t.Errorf("the map is %+v", have)
	}
	all, err := Describe(d.at(name), AddCow, true, Options{})
	if err != nil || len(all) != 2 || all[0].VirtualSize != int64(len(data)) || all[0].FullBacking != d.path+"/sub/../base" {
		t.Errorf("%+v, %v", all, err)
	}
	if i, ok := all[0].Specific.Data.(*AddCowInfo); !ok || i.ImageFile != "../raw" || i.ImageFormat != Raw || i.AllAllocated {
		t.Errorf("%+v", all[0].Specific)
	}
}

func TestAddCowRefused(t *testing.T) {
	d, rng := newDir(t), blktest.Rand(t)
	name, _ := d.addCow(rng, 0)
	base := qcow2.CreateOptions{Size: -1, BackingFile: d.at("base"), BackingFormat: Raw}
	large := base
	large.Size = overlaySize * 2
	lazy := base
	lazy.LazyRefcounts = true
	for _, c := range []struct {
		o    CreateOptions
		want error
		says string
	}{
		{CreateOptions{CreateOptions: base}, blk.ErrInvalid, "needs an image file"},
		{CreateOptions{ImageFile: "x", CreateOptions: qcow2.CreateOptions{Size: 1 << 20}}, blk.ErrInvalid, "without a backing file"},
		{CreateOptions{ImageFile: d.at("raw"), CreateOptions: large}, blk.ErrInvalid, "bytes are needed"},
		{CreateOptions{ImageFile: d.at("raw"), CreateOptions: lazy}, blk.ErrInvalid, "no other properties"},
		{CreateOptions{ImageFile: d.at("base"), CreateOptions: base}, ErrLoop, "same file"},
		{CreateOptions{ImageFile: d.at("new"), CreateOptions: base}, ErrLoop, "same file"},
		{CreateOptions{ImageFile: "nbd:x", CreateOptions: base}, ErrName, "nbd:"},
		{CreateOptions{ImageFile: "/etc/x", CreateOptions: base, Check: func(p string) error {
			if strings.HasPrefix(p, "/etc") {
				return os.ErrPermission
			}
			return nil
		}}, os.ErrPermission, "permission"},
	} {
		c.o.Format = AddCow
		if err := Create(t.Context(), d.at("new"), c.o); !errors.Is(err, c.want) || !strings.Contains(err.Error(), strings.Replace(c.says, "bytes are", "are", 1)) {
			t.Errorf("%+v: %v", c.o, err)
		}
	}
	if err := Create(t.Context(), d.at("q"), CreateOptions{Format: Qcow2, ImageFile: "x", CreateOptions: qcow2.CreateOptions{Size: 1 << 20}}); !errors.Is(err, blk.ErrInvalid) {
		t.Errorf("a qcow2 image with an image file: %v", err)
	}
	list, err := os.ReadDir(d.path)
	if err != nil || len(list) != 3 { // base, raw, sub
		t.Errorf("what was begun is left: %v", list)
	}
	check := func(forbidden string) func(string) error {
		return func(p string) error {
			if filepath.Base(p) == forbidden {
				return os.ErrPermission
			}
			return nil
		}
	}
	for _, f := range []string{"raw", "base", "a"} {
		if _, err := Open(blk.NewTask(), d.at(name), AddCow, Options{Check: check(f)}); !errors.Is(err, os.ErrPermission) {
			t.Errorf("%s is outside the roots: %v", f, err)
		}
	}
	b, err := os.ReadFile(d.at(name))
	if err != nil {
		t.Fatal(err)
	}
	for says, change := range map[string]func(b []byte){
		"format not supported": func(b []byte) { copy(b[60:], "qcow2\x00") },
		"never guessed":        func(b []byte) { clear(b[44:60]) },
		"bit 3":                func(b []byte) { b[24] = 8 },
	} {
		bad := slices.Clone(b)
		change(bad)
		if err := os.WriteFile(d.at("sub/bad"), bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(blk.NewTask(), d.at("sub/bad"), AddCow, Options{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q: %v", says, err)
		}
	}
	if _, err := OpenMerge(blk.NewTask(), d.open(name, AddCow, Options{}), 0, 1, Options{}); !errors.Is(err, ErrMerge) {
		t.Errorf("a merge: %v", err)
	}
}

func TestAddCowCheck(t *testing.T) {
	d, rng := newDir(t), blktest.Rand(t)
	name, _ := d.addCow(rng, 0)
	b, err := os.ReadFile(d.at(name))
	if err != nil {
		t.Fatal(err)
	}
	b[65536+7], b[65536+100] = 0xff, 1 // 64 clusters, of which the last one is not whole
	if err := os.WriteFile(d.at(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		repair       qcow2.Repair
		errors, done int64
	}{{qcow2.RepairNone, 1, 0}, {qcow2.RepairLeaks, 1, 0}, {qcow2.RepairAll, 0, 1}, {qcow2.RepairNone, 0, 0}} {
		r, err := Check(t.Context(), d.at(name), AddCow, c.repair, nil, nil)
		if err != nil || r.Errors != c.errors || r.ErrorsFixed != c.done || r.TotalClusters != 64 || r.AllocatedClusters != 8 {
			t.Errorf("repair %v: %+v, %v", c.repair, r, err)
		}
	}
	if err := os.Remove(d.at("base")); err != nil {
		t.Fatal(err)
	}
	if _, err := Check(t.Context(), d.at(name), AddCow, qcow2.RepairNone, nil, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the backing file: %v", err)
	}
}
