// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

const overlaySize = 4 << 20

// make makes an image; the backing image, if there is one, is in use.
func (d *dir) make(name string, o CreateOptions) string {
	d.Helper()
	if o.Size == 0 {
		o.Size = overlaySize
	}
	o.Unopened = true
	if err := Create(d.Context(), d.at(name), o); err != nil {
		d.Fatal(err)
	}
	return d.at(name)
}

func (d *dir) overlay(name, backing, format string) string {
	return d.make(name, CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: backing, BackingFormat: format}})
}

// change writes a random place of an image and of the model.
func (d *dir) change(rng *rand.Rand, n blk.Node, model []byte) {
	d.Helper()
	off := rng.Int64N(overlaySize/512) * 512
	l := min((1+rng.Int64N(200))*512, overlaySize-off)
	var err error
	if rng.IntN(4) == 0 {
		clear(model[off : off+l])
		err = writeZeroes(blk.NewTask(), n, off, l)
	} else {
		copy(model[off:], bytes.Repeat([]byte{byte(1 + rng.IntN(255))}, int(l)))
		err = write(blk.NewTask(), n, model[off:off+l], off)
	}
	if err != nil {
		d.Fatal(err)
	}
}

// A chain grows under an image in use. Each image keeps what the disk held when it was covered, with its clusters
// given back, and the chain in use reads as the disk.
func TestOverlays(t *testing.T) {
	for _, format := range []string{Raw, Qcow2} {
		for _, direct := range []bool{false, true} {
			t.Run(fmt.Sprint(format, direct), func(t *testing.T) {
				d, rng, task := newDir(t), blktest.Rand(t), blk.NewTask()
				o := Options{Direct: direct, Align: blk.SectorSize}
				d.make("0", CreateOptions{Format: format})
				g := d.open("0", format, o)
				model := make([]byte, overlaySize)
				var kept [][]byte
				for i := range 6 {
					for range 10 {
						d.change(rng, g.Root, model)
					}
					d.checkContents(g, model)
					first := g.Chain[0]
					v, err := OpenOverlay(task, d.overlay(fmt.Sprint(i+1), first.Path, first.Format), Qcow2, g, o)
					if err != nil {
						t.Fatal(err)
					}
					d.change(rng, g.Root, model) // the guest goes on
					next, err := v.Join(task)
					if err != nil {
						t.Fatal(err)
					}
					if i == 3 { // the snapshot does not come about
						if err := v.Close(); err != nil {
							t.Fatal(err)
						}
						d.change(rng, g.Root, model)
						d.checkContents(g, model)
						if v, err = OpenOverlay(task, d.at(fmt.Sprint(i+1)), Qcow2, g, o); err != nil {
							t.Fatal(err)
						}
						if next, err = v.Join(task); err != nil {
							t.Fatal(err)
						}
					}
					kept = append(kept, bytes.Clone(model))
					d.change(rng, next.Root, model) // before the old image is closed
					d.checkContents(next, model)
					if _, err := file.Open(first.Path, file.Options{}); !errors.Is(err, file.ErrInUse) {
						t.Fatalf("%s may be written before the old image is closed: %v", first.Path, err)
					}
					if err := v.Retire(); err != nil {
						t.Fatal(err)
					}
					if _, err := file.Open(first.Path, file.Options{}); !errors.Is(err, file.ErrInUse) {
						t.Fatalf("%s may be written: %v", first.Path, err)
					}
					g = next
				}
				d.checkContents(g, model)
				if err := g.Close(); err != nil {
					t.Fatal(err)
				}
				kept = append(kept, model)
				for i, want := range kept {
					name, f := fmt.Sprint(i), Qcow2
					if i == 0 {
						f = format
					}
					h := d.open(name, f, Options{ReadOnly: true})
					d.checkContents(h, want)
					if err := h.Close(); err != nil {
						t.Fatal(err)
					}
					if f == Raw {
						continue
					}
					if r, err := Check(t.Context(), d.at(name), Qcow2, qcow2.RepairNone, nil, nil); err != nil || r.Errors != 0 || r.Leaks != 0 {
						t.Errorf("image %s: %+v, %v", name, r, err)
					}
				}
			})
		}
	}
}

// What was written and not flushed must not depend on flushes that go to the overlay from then on. If the flush fails,
// the image stays what it was.
func TestOverlayFlushes(t *testing.T) {
	d, task := newDir(t), blk.NewTask()
	d.make("base", CreateOptions{Format: Raw})
	g := d.open("base", Raw, Options{})
	defer g.Close()
	fault := blktest.NewFault(g.Root)
	g.Root = fault
	v, err := OpenOverlay(task, d.overlay("top", d.at("base"), Raw), Qcow2, g, Options{})
	if err != nil {
		t.Fatal(err)
	}
	trap := fault.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: errors.New("no")})
	if _, err := v.Join(task); err == nil {
		t.Error("joined over an image that could not be flushed")
	}
	trap.Remove()
	before := fault.Count(blk.OpFlush)
	if _, err := v.Join(task); err != nil || fault.Count(blk.OpFlush) == before {
		t.Errorf("joined without a flush: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
}

// There is no moment at which somebody else could open the image for writing that goes behind the overlay.
func TestOverlayLocks(t *testing.T) {
	d, task := newDir(t), blk.NewTask()
	d.make("base", CreateOptions{Format: Raw})
	g := d.open("base", Raw, Options{})
	v, err := OpenOverlay(task, d.overlay("top", "base", Raw), Qcow2, g, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Join(task); err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil { // the first half of Retire
		t.Fatal(err)
	}
	if n, err := file.Open(d.at("base"), file.Options{}); !errors.Is(err, file.ErrInUse) {
		t.Errorf("open for writing: %v", err)
		n.Close()
	}
	if err := errors.Join(v.base.lock(), v.Close()); err != nil {
		t.Fatal(err)
	}
}

// An overlay that holds something would change what the guest reads.
func TestOverlayHoldsNothing(t *testing.T) {
	d, task := newDir(t), blk.NewTask()
	d.make("base", CreateOptions{Format: Raw})
	d.overlay("top", "base", Raw)
	h := d.open("top", Qcow2, Options{})
	if err := errors.Join(writeZeroes(task, h.Root, 1<<20, 64<<10), h.Close()); err != nil {
		t.Fatal(err)
	}
	g := d.open("base", Raw, Options{})
	defer g.Close()
	if _, err := OpenOverlay(task, d.at("top"), Qcow2, g, Options{}); !errors.Is(err, ErrOverlay) {
		t.Errorf("an overlay with data: %v", err)
	}
	if _, err := OpenOverlay(task, d.overlay("empty", "base", Raw), Qcow2, g, Options{Check: func(path string) error {
		return errors.New("not allowed")
	}}); err == nil {
		t.Error("opened what the caller does not allow")
	}
}

// Somebody moved an image that is in use away and put another one there, an older copy perhaps. It must not come into the
// chain in place of the one that is open.
func TestReplaced(t *testing.T) {
	replace := func(b *mergeBed, place int) {
		name := b.at(fmt.Sprint(place))
		old, err := os.ReadFile(name)
		if err == nil {
			err = errors.Join(os.Rename(name, name+".away"), os.WriteFile(name, old, 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	b := chainInUse(t, 4)
	replace(b, 0)
	b.changeSome(b.g.Root, b.model)
	v, err := OpenOverlay(blk.NewTask(), b.overlay("over", b.at("0"), Qcow2), Qcow2, b.g, b.o)
	if err == nil {
		_, err = v.Join(blk.NewTask())
		if cerr := v.Close(); cerr != nil {
			t.Fatal(cerr)
		}
	}
	if !errors.Is(err, ErrReplaced) {
		t.Errorf("an overlay over another file than the one in use: %v", err)
	}
	b.changeSome(b.g.Root, b.model)
	b.checkContents(b.g, b.model)
	// The base, and the image whose header is to name it.
	for _, place := range []int{3, 1} {
		b := chainInUse(t, 4)
		replace(b, place)
		if _, err := OpenMerge(blk.NewTask(), b.g, 2, 3, b.o); !errors.Is(err, ErrReplaced) {
			t.Errorf("a merge with another file than the one in use: %v", err)
		}
		b.changeSome(b.g.Root, b.model)
		b.checkContents(b.g, b.model)
		if err := b.g.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.g.Close(); err != nil {
		t.Fatal(err)
	}
}
