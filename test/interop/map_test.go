// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
)

// TestMap: chains of images with random options, made and written by QEMU, are mapped as qemu-img maps them: each
// segment with all that it says.
func TestMap(t *testing.T) {
	needQEMU(t)
	rounds := 40
	if full() {
		rounds = 400
	}
	rng := seeded(t)
	for i := range rounds {
		one := rand.New(rand.NewPCG(rng.Uint64(), 1))
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var made []string
			name, format := "", ""
			for depth := range 1 + one.IntN(4) {
				name, format = makeLayer(t, one, dir, depth, name, format, &made)
			}
			// What a file takes, and where its holes are, must not change between the two.
			for _, path := range made {
				syncFile(t, path)
			}
			compareMaps(t, dir, name, format, made)
		})
	}
}

// Zeros whose place is the start of the data file have none for QEMU, but with subclusters.
func TestMapZerosAtStart(t *testing.T) {
	needQEMU(t)
	for _, options := range []string{"cluster_size=512", "cluster_size=64k", "cluster_size=64k,extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			dir := t.TempDir()
			runIn(t, dir, "", "qemu-img", "create", "-q", "-f", "qcow2", "-o", options+",data_file=data", "image", "1M")
			changeWithQEMU(t, dir, "qcow2", "image", []string{"write 0 128k", "write -z 0 96k"})
			made := []string{filepath.Join(dir, "image"), filepath.Join(dir, "data")}
			for _, path := range made {
				syncFile(t, path)
			}
			compareMaps(t, dir, "image", "qcow2", made)
		})
	}
}

// makeLayer makes an image over another one, or over none, and writes to it. It notes the files.
func makeLayer(t *testing.T, rng *rand.Rand, dir string, depth int, backing, backingFormat string, made *[]string) (name, format string) {
	t.Helper()
	name = fmt.Sprintf("layer%d", depth)
	size := int64(1+rng.IntN(8192)) * blk.SectorSize
	*made = append(*made, filepath.Join(dir, name))
	if backing == "" && rng.IntN(3) == 0 {
		runIn(t, dir, "", "qemu-img", "create", "-q", "-f", "raw", name, fmt.Sprint(size))
		changeWithQEMU(t, dir, "raw", name, randomCommands(rng, size, 4096, "write", "write -z -u"))
		return name, "raw"
	}
	one := func(values ...string) string { return values[rng.IntN(len(values))] }
	v2 := rng.IntN(5) == 0
	extended := !v2 && rng.IntN(3) == 0
	cluster := int64(512) << rng.IntN(9)
	if extended {
		cluster = 16 << 10 << rng.IntN(3)
	}
	options := []string{"cluster_size=" + fmt.Sprint(cluster), "compat=" + map[bool]string{true: "0.10", false: "1.1"}[v2]}
	compresses := true
	if extended {
		options = append(options, "extended_l2=on")
	}
	// QEMU preallocates over a backing image with subclusters only.
	if backing == "" || extended {
		if mode := one("off", "metadata", "metadata", "falloc", "full"); mode != "off" {
			options = append(options, "preallocation="+mode)
			compresses = false
		}
	}
	if !v2 && rng.IntN(4) == 0 {
		data := name + ".data"
		options = append(options, "data_file="+data)
		if backing == "" {
			options = append(options, "data_file_raw="+one("on", "off"))
		}
		*made = append(*made, filepath.Join(dir, data))
		compresses = false
	}
	args := []string{"create", "-q", "-f", "qcow2", "-o", strings.Join(options, ",")}
	if backing != "" {
		args = append(args, "-b", backing, "-F", backingFormat)
	}
	runIn(t, dir, "", "qemu-img", append(args, name, fmt.Sprint(size))...)
	kinds := []string{"write", "write", "discard"}
	if !v2 {
		kinds = append(kinds, "write -z", "write -z -u")
	}
	if compresses {
		changeWithQEMU(t, dir, "qcow2", name, randomCommands(rng, size, cluster, "write -c"))
	}
	changeWithQEMU(t, dir, "qcow2", name, randomCommands(rng, size, cluster, kinds...))
	if !strings.Contains(strings.Join(options, ","), "data_file") && rng.IntN(3) == 0 {
		runIn(t, dir, "", "qemu-img", "snapshot", "-c", "one", name)
		changeWithQEMU(t, dir, "qcow2", name, randomCommands(rng, size, cluster, kinds...))
	}
	return name, "qcow2"
}

// randomCommands are up to 11 of qemu-io's, some of them of whole clusters. Compressed writes are of whole clusters that
// nothing was written to before.
func randomCommands(rng *rand.Rand, size, cluster int64, kinds ...string) []string {
	var all []string
	seen := map[int64]bool{}
	for range rng.IntN(12) {
		kind := kinds[rng.IntN(len(kinds))]
		off := rng.Int64N(size/blk.SectorSize) * blk.SectorSize
		n := min((1+rng.Int64N(max(2*cluster, 64<<10)/blk.SectorSize))*blk.SectorSize, size-off)
		if rng.IntN(2) == 0 || kind == "write -c" {
			off -= off % cluster
			n = min((n+cluster-1)/cluster*cluster, size-off)
		}
		if kind == "write -c" {
			n = min(cluster, n)
			if seen[off] {
				continue
			}
			seen[off] = true
		}
		if strings.HasPrefix(kind, "write") && !strings.Contains(kind, "-z") {
			kind += fmt.Sprintf(" -P %d", 1+rng.IntN(255))
		}
		all = append(all, fmt.Sprintf("%s %d %d", kind, off, n))
	}
	return all
}

func changeWithQEMU(t *testing.T, dir, format, name string, commands []string) {
	t.Helper()
	out := runIn(t, dir, strings.Join(commands, "\n")+"\nquit\n", "qemu-io", "-f", format, "-t", "unsafe", "-d", "unmap", name)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io: %s", out)
	}
}

func syncFile(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// segment is an element of qemu-img's array. Versions before 8.2 do not say what is compressed.
type segment struct {
	Start, Length, Depth int64
	Present, Zero, Data  bool
	Compressed           *bool
	Offset               *int64
}

func (s segment) String() string {
	b, _ := json.Marshal(s)
	return string(b)
}

func compareMaps(t *testing.T, dir, name, format string, files []string) {
	t.Helper()
	var got, want []segment
	out := runIn(t, dir, "", "qemu-img", "map", "--output=json", "-f", format, name)
	if err := json.Unmarshal([]byte(out), &want); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	err := image.Map(t.Context(), filepath.Join(dir, name), format, image.Options{}, func(s image.Segment) error {
		got = append(got, segment{s.Start, s.Length, int64(s.Depth), s.Present, s.Zero, s.Data, &s.Compressed, s.Offset})
		if s.Offset != nil && !slices.Contains(files, s.File) {
			t.Errorf("a segment lies in %q: %v", s.File, got[len(got)-1])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got = likeOlder(got, want)
	for i := range max(len(got), len(want)) {
		if i == len(got) || i == len(want) || got[i].String() != want[i].String() {
			t.Fatalf("segment %d is another one than QEMU's\nwe:   %v\nQEMU: %v", i, got[min(i, len(got)):], want[min(i, len(want)):])
		}
	}
}

// likeOlder leaves out what is compressed if QEMU does, and puts together what only differed in that.
func likeOlder(got, want []segment) []segment {
	if len(want) > 0 && want[0].Compressed != nil {
		return got
	}
	var all []segment
	for _, s := range got {
		s.Compressed = nil
		if n := len(all); n > 0 {
			last := all[n-1]
			last.Start, last.Length = s.Start, s.Length
			if s.Offset == nil && last.String() == s.String() {
				all[n-1].Length += s.Length
				continue
			}
		}
		all = append(all, s)
	}
	return all
}
