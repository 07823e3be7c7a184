// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk/qcow2"
)

// variant is one point of the option matrix.
type variant struct {
	version     int
	cluster     int64
	refcounts   int // bits
	lazy        bool
	extended    bool // L2
	compression string
	prealloc    string
	data        string // "", "cooked" or "raw": an external data file
	backing     string // "", "short" or "long"
}

func (v variant) name() string {
	s := fmt.Sprintf("v%d,cluster=%d,refcount=%d", v.version, v.cluster, v.refcounts)
	for _, x := range []struct {
		on   bool
		name string
	}{
		{v.lazy, "lazy"},
		{v.extended, "extended"},
		{v.compression == "zstd", "zstd"},
		{v.prealloc != "off", v.prealloc},
		{v.data != "", "data-" + v.data},
		{v.backing != "", "backing-" + v.backing},
	} {
		if x.on {
			s += "," + x.name
		}
	}
	return s
}

func (v variant) snapshots() bool { return v.data == "" && v.refcounts > 1 }

// compresses: QEMU writes compressed clusters where nothing is, and does not discard where a backing file of a version
// 2 image would show. Small counts are left to snapshots: many compressed clusters count in one host cluster.
func (v variant) compresses() bool {
	return v.data == "" && (v.version > 2 || v.backing == "") && (v.refcounts == 1 || v.refcounts > 8)
}

// size has some clusters, several tables where clusters are small, and a last cluster that is not whole.
func (v variant) size() int64 {
	switch {
	case v.cluster <= 1024:
		return 1<<20 + 3*512
	case v.cluster <= 4096:
		return 5<<20 + 512
	case v.cluster <= 64<<10:
		return 9<<20 + 7*512
	default:
		return 11*v.cluster + 5*512
	}
}

// possible says whether QEMU makes such an image.
func (v variant) possible() bool {
	switch {
	case v.version == 2 && (v.refcounts != 16 || v.lazy || v.extended || v.compression == "zstd" || v.data != ""):
	case v.extended && v.cluster < 16<<10:
	case v.backing != "" && v.data == "raw":
	case v.backing != "" && v.prealloc != "off" && !v.extended:
	default:
		return true
	}
	return false
}

func plain(set ...func(*variant)) variant {
	v := variant{version: 3, cluster: 64 << 10, refcounts: 16, compression: "zlib", prealloc: "off"}
	for _, s := range set {
		s(&v)
	}
	return v
}

// quick has every value of every option, each in few company.
func quick() []variant {
	return []variant{
		plain(),
		plain(func(v *variant) { v.version = 2 }),
		plain(func(v *variant) { v.version = 2; v.cluster = 512; v.backing = "long" }),
		plain(func(v *variant) { v.version = 2; v.cluster = 4096; v.backing = "short"; v.prealloc = "off" }),
		plain(func(v *variant) { v.cluster = 512; v.refcounts = 64 }),
		plain(func(v *variant) { v.cluster = 512; v.refcounts = 1; v.lazy = true }),
		plain(func(v *variant) { v.cluster = 1024; v.refcounts = 32; v.compression = "zstd" }),
		plain(func(v *variant) { v.cluster = 4096; v.refcounts = 2; v.backing = "short" }),
		plain(func(v *variant) { v.cluster = 4096; v.refcounts = 4; v.lazy = true }),
		plain(func(v *variant) { v.cluster = 16 << 10; v.refcounts = 8; v.extended = true; v.backing = "long" }),
		plain(func(v *variant) {
			v.cluster = 128 << 10
			v.extended = true
			v.compression = "zstd"
			v.backing = "short"
		}),
		plain(func(v *variant) { v.cluster = 2 << 20; v.extended = true }),
		plain(func(v *variant) { v.cluster = 2 << 20; v.compression = "zstd"; v.lazy = true }),
		plain(func(v *variant) { v.prealloc = "metadata" }),
		plain(func(v *variant) { v.cluster = 16 << 10; v.prealloc = "metadata"; v.extended = true; v.backing = "long" }),
		plain(func(v *variant) { v.cluster = 4096; v.prealloc = "falloc" }),
		plain(func(v *variant) { v.version = 2; v.prealloc = "full" }),
		plain(func(v *variant) { v.data = "cooked" }),
		plain(func(v *variant) { v.data = "cooked"; v.extended = true; v.backing = "short" }),
		plain(func(v *variant) { v.data = "raw"; v.cluster = 4096 }),
		plain(func(v *variant) { v.data = "raw"; v.extended = true; v.prealloc = "falloc" }),
	}
}

// whole is the whole matrix, about 2000 points.
func whole() []variant {
	var all []variant
	for _, version := range []int{2, 3} {
		for _, cluster := range []int64{512, 4096, 16 << 10, 64 << 10, 2 << 20} {
			for _, refcounts := range []int{1, 2, 4, 8, 16, 32, 64} {
				for _, flags := range []int{0, 1, 2, 3} {
					for _, compression := range []string{"zlib", "zstd"} {
						for _, more := range [][3]string{
							{"off", "", ""},
							{"off", "", "short"},
							{"off", "", "long"},
							{"metadata", "", ""},
							{"falloc", "", ""},
							{"full", "", ""},
							{"off", "cooked", ""},
							{"off", "raw", ""},
							{"metadata", "cooked", ""},
						} {
							v := variant{
								version: version, cluster: cluster, refcounts: refcounts, lazy: flags&1 != 0, extended: flags&2 != 0,
								compression: compression, prealloc: more[0], data: more[1], backing: more[2],
							}
							if v.possible() {
								all = append(all, v)
							}
						}
					}
				}
			}
		}
	}
	return all
}

// variants runs a test for the points of the matrix, several at once.
func variants(t *testing.T, fn func(t *testing.T, v variant)) {
	needQEMU(t)
	list := quick()
	if full() {
		list = append(list, whole()...)
	}
	for _, v := range list {
		if !v.possible() {
			t.Fatalf("%s is not possible", v.name())
		}
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			fn(t, v)
		})
	}
}

// createWithQEMU makes an image, and its backing file with contents, in a folder of its own.
func createWithQEMU(t *testing.T, v variant, m *model) string {
	dir := t.TempDir()
	path := filepath.Join(dir, "image")
	o := []string{
		fmt.Sprintf("compat=%s", map[int]string{2: "0.10", 3: "1.1"}[v.version]),
		fmt.Sprintf("cluster_size=%d", v.cluster), fmt.Sprintf("refcount_bits=%d", v.refcounts),
		"preallocation=" + v.prealloc, "compression_type=" + v.compression,
	}
	if v.lazy {
		o = append(o, "lazy_refcounts=on")
	}
	if v.extended {
		o = append(o, "extended_l2=on")
	}
	if v.data != "" {
		// QEMU keeps the name as it is given, relative to the image.
		o = append(o, "data_file=data", map[string]string{"raw": "data_file_raw=on", "cooked": "data_file_raw=off"}[v.data])
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.Join(o, ",")}
	if v.backing != "" {
		makeBacking(t, v, m, filepath.Join(dir, "base"))
		args = append(args, "-b", "base", "-F", "qcow2")
	}
	runIn(t, dir, "", "qemu-img", append(args, path, fmt.Sprint(len(m.data)))...)
	return path
}

// makeBacking gives the model's noise to a backing file, and the model its contents.
func makeBacking(t *testing.T, v variant, m *model, path string) {
	size := int64(len(m.data))
	size = map[string]int64{"short": size / 2 / 512 * 512, "long": size + 7*512}[v.backing]
	run(t, "", "qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	o := op{kind: write, n: size * 3 / 4 / 512 * 512}
	modify(t, path, []string{m.command(o)})
	copy(m.data, m.bytes(o))
}

// TestTheirs: QEMU creates and fills, we change, QEMU looks at it and changes, we look at it; with snapshots in between.
func TestTheirs(t *testing.T) {
	variants(t, func(t *testing.T, v variant) {
		rng := seeded(t)
		m := newModel(t, rng, v.size(), v.cluster)
		path := createWithQEMU(t, v, m)
		kinds := []kind{write, write, write, zero, zeroUnmap, discard}
		if v.compresses() {
			kinds = append(kinds, writeCompressed, writeCompressed)
		}
		snapshots := map[string][]byte{}
		snapshot := func(name string) {
			if v.snapshots() {
				run(t, "", "qemu-img", "snapshot", "-c", name, path)
				snapshots[name] = slices.Clone(m.data)
			}
		}
		look := func() {
			t.Helper()
			mustBeClean(t, path)
			mustEqual(t, "as QEMU reads it", readWithQEMU(t, path, ""), m.data)
			for name, want := range snapshots {
				mustEqual(t, "snapshot "+name, readWithQEMU(t, path, name), want)
			}
			if t.Failed() {
				t.FailNow()
			}
		}
		change := func() {
			t.Helper()
			n := openOurs(t, path, false)
			m.see(t, "as we read it", readNode(t, n))
			m.onOurs(t, rng, n, 30)
			closeNode(t, n)
			look()
		}

		m.onQEMU(t, rng, path, 30, kinds)
		change()
		snapshot("one")
		m.onQEMU(t, rng, path, 20, kinds)
		change()
		snapshot("two")
		change()
		if v.snapshots() {
			run(t, "", "qemu-img", "snapshot", "-d", "one", path)
			delete(snapshots, "one")
			look()
			run(t, "", "qemu-img", "snapshot", "-a", "two", path)
			copy(m.data, snapshots["two"])
			change()
		}
		if v.data == "raw" {
			raw, err := os.ReadFile(filepath.Join(filepath.Dir(path), "data"))
			if err != nil {
				t.Fatal(err)
			}
			mustEqual(t, "the data file alone", raw[:len(m.data)], m.data)
		}
	})
}

// TestConvertCompressed: all clusters compressed, as qemu-img convert -c writes them, then changed by us.
func TestConvertCompressed(t *testing.T) {
	needQEMU(t)
	for _, v := range []variant{
		plain(),
		plain(func(v *variant) { v.version = 2; v.cluster = 4096 }),
		plain(func(v *variant) { v.cluster = 512 }),
		plain(func(v *variant) { v.compression = "zstd"; v.cluster = 2 << 20 }),
		plain(func(v *variant) { v.compression = "zstd"; v.cluster = 16 << 10; v.extended = true }),
	} {
		t.Run(v.name(), func(t *testing.T) {
			t.Parallel()
			rng := seeded(t)
			m := newModel(t, rng, v.size(), v.cluster)
			source := createWithQEMU(t, plain(), m)
			m.onQEMU(t, rng, source, 40, []kind{write})
			path := filepath.Join(t.TempDir(), "image")
			o := fmt.Sprintf("compat=%s,cluster_size=%d,compression_type=%s", map[int]string{2: "0.10", 3: "1.1"}[v.version], v.cluster, v.compression)
			if v.extended {
				o += ",extended_l2=on"
			}
			run(t, "", "qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", o, source, path)
			if r := checkOurs(t, path, qcow2.RepairNone); r.CompressedClusters == 0 {
				t.Fatal("no cluster is compressed")
			}
			n := openOurs(t, path, false)
			m.see(t, "as we read it", readNode(t, n))
			m.onOurs(t, rng, n, 60)
			closeNode(t, n)
			mustBeClean(t, path)
			mustEqual(t, "as QEMU reads it", readWithQEMU(t, path, ""), m.data)
		})
	}
}
