// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"os"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// plugged is a disk that loses what was not flushed, in the place of a file, which is there for its locks.
type plugged struct {
	*blktest.CrashDisk
	file *file.Node
}

func (p *plugged) Close() error { return p.file.Close() }

// plug puts the disk in the place of the file with this name; others stay what they are.
func (d *dir) plug(name string, disk *blktest.CrashDisk) func(*file.Node) blk.Node {
	return func(f *file.Node) blk.Node {
		if f.Info().Name == d.at(name) {
			return &plugged{disk, f}
		}
		return f
	}
}

// Wherever the power goes in a rebase, the disk reads as before, over whichever image its header names then.
func TestPowerCutsRebase(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rng := blktest.Rand(t)
	const size = 1<<20 + 5*512
	for _, c := range []struct{ options, to string }{
		{"cluster_size=4k", ""},
		{"cluster_size=4k", "other"},
		{"cluster_size=2k", "longer"},
		{"cluster_size=512", "base"}, // which is behind the middle one
		{"cluster_size=16k,extended_l2=on", "other"},
		{"cluster_size=16k,extended_l2=on", ""},
		{"cluster_size=4k,compat=0.10", "zeros"},
		{"cluster_size=4k,lazy_refcounts=on", "other"},
	} {
		t.Run(fmt.Sprintf("%s to %q", c.options, c.to), func(t *testing.T) {
			d := newDir(t)
			for _, l := range []struct {
				name, format string
				size         int64
			}{{"base", Raw, size}, {"middle", Qcow2, size}, {"top", Qcow2, size}, {"other", Qcow2, size / 2 / 512 * 512}, {"longer", Raw, 2 * size}, {"zeros", Raw, size}} {
				args := []string{"qemu-img", "create", "-q", "-f", l.format}
				switch l.name {
				case "middle":
					args = append(args, "-b", "base", "-F", Raw)
				case "top":
					args = append(args, "-b", "middle", "-F", Qcow2, "-o", c.options)
				}
				d.tool(append(args, l.name, fmt.Sprint(l.size))...)
				if l.name != "zeros" {
					d.scribble(rng, l.name, l.format, l.size, 6)
				}
			}
			data := d.contents("top", Qcow2)
			b, err := os.ReadFile(d.at("top"))
			if err != nil {
				t.Fatal(err)
			}
			disk := blktest.NewCrashDisk(roundUp(int64(len(b)), blk.SectorSize))
			task := blk.NewTask()
			if err := write(task, disk, append(b, make([]byte, -len(b)&(blk.SectorSize-1))...), 0); err != nil {
				t.Fatal(err)
			}
			if err := flush(task, disk); err != nil {
				t.Fatal(err)
			}
			o := RebaseOptions{Layer: Layer{Path: c.to}, storage: d.plug("top", disk)}
			if c.to != "" {
				o.Format = map[bool]string{true: Qcow2, false: Raw}[c.to == "other"]
			}
			begin := disk.Points()
			if err := Rebase(t.Context(), d.at("top"), o); err != nil {
				t.Fatal(err)
			}
			over := map[string]int{}
			for at := begin; at <= disk.Points(); at++ {
				left := disk.CrashAt(at, rng)
				g := d.open("top", Qcow2, Options{ReadOnly: true, Storage: d.plug("top", left)})
				over[g.Chain[0].Header.BackingFile]++
				d.checkContents(g, data)
				if err := g.Close(); err != nil {
					t.Fatal(err)
				}
				if r, err := qcow2.Check(task, left, qcow2.RepairNone); err != nil || r.Errors > 0 {
					t.Fatalf("cut at %d of %d: %+v, %v", at, disk.Points(), r, err)
				}
			}
			t.Logf("%d points; over %v", disk.Points()-begin, over)
			if over["middle"] == 0 || over[c.to] == 0 {
				t.Errorf("the backing file does not change: %v", over)
			}
			if err := os.WriteFile(d.at("top"), disk.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
			d.checkClean("top")
		})
	}
}
