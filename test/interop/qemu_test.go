// SPDX-License-Identifier: Apache-2.0

// Package interop holds images that QEMU writes against ours, and ours against QEMU's: contents are compared with a
// slice of bytes that neither of them keeps, metadata with qemu-img check.
//
// A failure prints INTEROP_SEED; set it to run the same operations again. INTEROP=full runs the whole matrix.
package interop

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

func full() bool { return os.Getenv("INTEROP") == "full" }

// needQEMU skips a test that cannot run. In CI a check that silently does not happen is none.
func needQEMU(t *testing.T, more ...string) {
	t.Helper()
	for _, tool := range append([]string{"qemu-img", "qemu-io"}, more...) {
		_, err := exec.LookPath(tool)
		switch {
		case err == nil:
		case os.Getenv("CI") != "":
			t.Fatal(err)
		default:
			t.Skipf("run scripts/setup-test.sh first: %v", err)
		}
	}
}

// seeded gives a test its random numbers.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("INTEROP_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("INTEROP_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// run runs a program and gives its output. A program that fails, fails the test.
func run(t *testing.T, stdin string, name string, args ...string) string {
	t.Helper()
	return runIn(t, "", stdin, name, args...)
}

// runIn runs it in a folder. QEMU looks for data files from there.
func runIn(t *testing.T, dir, stdin string, name string, args ...string) string {
	t.Helper()
	out, err := try(dir, stdin, name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// A child has our files open until it becomes another program, and with them our locks. No file is closed meanwhile:
// whoever opens it next would find it in use.
var forks sync.RWMutex

func start(cmd *exec.Cmd) error {
	forks.Lock()
	defer forks.Unlock()
	return cmd.Start()
}

func closeNode(t *testing.T, n blk.Node) {
	t.Helper()
	forks.RLock()
	defer forks.RUnlock()
	if err := n.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

func try(dir, stdin string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var stdout, all bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &all
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, &stdout, &all)
	}
	return stdout.String(), err
}

// qemuCheck is what qemu-img check says. The keys that it leaves out are 0.
type qemuCheck struct {
	Errors     int64 `json:"check-errors"`
	Corrupt    int64 `json:"corruptions"`
	Leaks      int64 `json:"leaks"`
	Total      int64 `json:"total-clusters"`
	Allocated  int64 `json:"allocated-clusters"`
	Compressed int64 `json:"compressed-clusters"`
	Fragmented int64 `json:"fragmented-clusters"`
	End        int64 `json:"image-end-offset"`
	text       string
}

func checkWithQEMU(t *testing.T, path string, args ...string) qemuCheck {
	t.Helper()
	cmd := exec.Command("qemu-img", append([]string{"check", "--output=json", "-f", "qcow2", path}, args...)...)
	cmd.Dir = filepath.Dir(path)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	// Findings are in the exit status and on stdout. If there is no document, it could not even begin.
	if exit := (*exec.ExitError)(nil); err != nil && (!errors.As(err, &exit) || stdout.Len() == 0) {
		t.Fatalf("qemu-img check: %v\n%s", err, &stderr)
	}
	var c qemuCheck
	// A repair prints two documents; the second says what is left.
	for dec := json.NewDecoder(&stdout); dec.More(); {
		c = qemuCheck{}
		if err := dec.Decode(&c); err != nil {
			t.Fatalf("qemu-img check: %v", err)
		}
	}
	c.text = stderr.String()
	return c
}

// mustBeClean has QEMU and our own check look at the image, and holds the statistics of both against each other.
func mustBeClean(t *testing.T, path string) {
	t.Helper()
	theirs := checkWithQEMU(t, path)
	if theirs.Errors+theirs.Corrupt+theirs.Leaks != 0 {
		t.Errorf("qemu-img check: %d errors, %d corruptions, %d leaks\n%s", theirs.Errors, theirs.Corrupt, theirs.Leaks, theirs.text)
	}
	ours := checkOurs(t, path, qcow2.RepairNone)
	if ours.Errors+ours.Leaks != 0 {
		t.Errorf("our check: %d errors, %d leaks: %v", ours.Errors, ours.Leaks, ours.Findings)
	}
	compareStatistics(t, theirs, ours)
}

func compareStatistics(t *testing.T, theirs qemuCheck, ours qcow2.CheckResult) {
	t.Helper()
	got := [5]int64{ours.TotalClusters, ours.AllocatedClusters, ours.CompressedClusters, ours.FragmentedClusters, ours.ImageEnd}
	want := [5]int64{theirs.Total, theirs.Allocated, theirs.Compressed, theirs.Fragmented, theirs.End}
	if got != want {
		t.Errorf("clusters in all, allocated, compressed, fragmented, image end:\nour check      %v\nqemu-img check %v", got, want)
	}
}

func checkOurs(t *testing.T, path string, repair qcow2.Repair) qcow2.CheckResult {
	t.Helper()
	f := openFile(t, path, repair == qcow2.RepairNone)
	defer closeNode(t, f)
	r, err := qcow2.Check(blk.NewTask(), f, repair)
	if err != nil {
		t.Fatalf("our check: %v", err)
	}
	return r
}

// modify has qemu-io carry out commands. Nothing needs to survive the host: no flush waits for the disk.
func modify(t *testing.T, path string, commands []string) {
	t.Helper()
	out := runIn(t, filepath.Dir(path), strings.Join(commands, "\n")+"\nquit\n", "qemu-io", "-f", "qcow2", "-t", "unsafe", "-d", "unmap", path)
	if strings.Contains(out, "failed") {
		t.Fatalf("qemu-io: %s", out)
	}
}

// readWithQEMU is the contents as QEMU sees them, or those of an internal snapshot.
func readWithQEMU(t *testing.T, path, snapshot string) []byte {
	t.Helper()
	to := filepath.Join(t.TempDir(), "raw")
	args := []string{"convert", "-f", "qcow2", "-O", "raw"}
	if snapshot != "" {
		args = append(args, "-l", "snapshot.name="+snapshot)
	}
	runIn(t, filepath.Dir(path), "", "qemu-img", append(args, path, to)...)
	b, err := os.ReadFile(to)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(to)
	return b
}

func openFile(t *testing.T, path string, readOnly bool) *file.Node {
	t.Helper()
	f, err := file.Open(path, file.Options{ReadOnly: readOnly, NoSync: true, Grows: true})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// openOurs opens an image, its backing file and its data file, as the header names them.
func openOurs(t *testing.T, path string, readOnly bool) *qcow2.Node {
	t.Helper()
	task := blk.NewTask()
	storage := openFile(t, path, readOnly)
	h, err := qcow2.ReadHeader(task, storage)
	if err != nil {
		t.Fatal(err)
	}
	o := qcow2.Options{Name: path, ReadOnly: readOnly}
	beside := func(name string) string { return filepath.Join(filepath.Dir(path), name) }
	if h.DataFile != "" {
		o.Data = openFile(t, beside(h.DataFile), readOnly)
	}
	if h.BackingFile != "" {
		b := openOurs(t, beside(h.BackingFile), true)
		t.Cleanup(func() { closeNode(t, b) })
		o.Backing = b
	}
	n, err := qcow2.Open(task, storage, o)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// readNode is the whole contents of a node.
func readNode(t *testing.T, n blk.Node) []byte {
	t.Helper()
	b := make([]byte, n.Info().Size)
	task := blk.NewTask()
	const piece = 1<<20 + 512
	for off := 0; off < len(b); off += piece {
		part := b[off:min(off+piece, len(b))]
		r := &blk.Request{Op: blk.OpRead, Off: int64(off), Len: int64(len(part)), Data: blk.BytesVec(nil, part)}
		if err := blk.Do(task, n, r); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// mustEqual says where contents differ first.
func mustEqual(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	for i := range got {
		if got[i] != want[i] {
			j := len(got)
			for j > i && got[j-1] == want[j-1] {
				j--
			}
			t.Fatalf("%s: bytes differ between %#x and %#x: there %#x, want %#x", what, i, j, got[i], want[i])
		}
	}
}
