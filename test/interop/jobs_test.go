// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/e2e/daemon"
)

// chainDir makes a folder with a random chain of images: 0 is raw or not, the last one is the top. They name each other
// relative to the folder, so that it can be copied.
func chainDir(t *testing.T, rng *rand.Rand, depth int) string {
	t.Helper()
	dir := t.TempDir()
	for i := range depth {
		// All of one size, in whole clusters: QEMU 7.2's block-stream aborts, or fills in other bytes than the chain showed,
		// where an image behind is shorter or its last cluster is not whole.
		const size = int64(4<<20 + 64<<10)
		args := []string{"create", "-q", "-f", formatOf(i)}
		if i > 0 {
			args = append(args, "-b", fmt.Sprint(i-1), "-F", formatOf(i-1), "-o", []string{
				"cluster_size=4k", "cluster_size=64k", "compat=0.10", "cluster_size=16k,extended_l2=on",
			}[rng.IntN(4)])
		}
		runIn(t, dir, "", "qemu-img", append(args, fmt.Sprint(i), fmt.Sprint(size))...)
		var commands []string
		for range 12 {
			off := rng.Int64N(size/512) * 512
			n := min(512*(1+rng.Int64N(400)), size-off)
			if rng.IntN(4) == 0 {
				commands = append(commands, fmt.Sprintf("write -z %d %d", off, n))
			} else {
				commands = append(commands, fmt.Sprintf("write -P %d %d %d", 1+rng.IntN(255), off, n))
			}
		}
		out := runIn(t, dir, strings.Join(commands, "\n")+"\nquit\n", "qemu-io", "-f", formatOf(i), "-t", "unsafe", fmt.Sprint(i))
		if strings.Contains(out, "failed") {
			t.Fatalf("qemu-io: %s", out)
		}
	}
	return dir
}

func formatOf(i int) string {
	if i == 0 {
		return "raw"
	}
	return "qcow2"
}

func copyDir(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	run(t, "", "cp", "-r", dir+"/.", to)
	return to
}

// backing is what an image has behind it, as the place in the folder and the format.
func backing(t *testing.T, dir string, top int) string {
	t.Helper()
	if top == 0 {
		return ""
	}
	var info struct {
		File   string `json:"full-backing-filename"`
		Format string `json:"backing-filename-format"`
	}
	out := runIn(t, dir, "", "qemu-img", "info", "--output=json", "-f", formatOf(top), fmt.Sprint(top))
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	if info.File == "" {
		return ""
	}
	return filepath.Base(info.File) + " " + info.Format
}

// storageDaemon runs one job of qemu-storage-daemon on the chain of a folder. false: it aborted, as 7.2's block-stream
// does now and then.
func storageDaemon(t *testing.T, dir string, depth int, job string, args map[string]any) bool {
	t.Helper()
	cmd := exec.Command("qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m")
	for i := range depth {
		spec := map[string]any{"driver": formatOf(i), "node-name": fmt.Sprint("n", i), "file": map[string]any{"driver": "file", "filename": fmt.Sprint(i)}}
		if i > 0 {
			spec["backing"] = fmt.Sprint("n", i-1)
		}
		b, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Args = append(cmd.Args, "--blockdev", string(b))
	}
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := start(cmd); err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() }) //nolint:errcheck // it may have gone
	defer stop.Stop()
	send := func(name string, args map[string]any) {
		line, err := json.Marshal(map[string]any{"execute": name, "arguments": args})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(in, "%s\n", line) //nolint:errcheck // then there is no answer
	}
	args["job-id"], args["device"] = "j", fmt.Sprint("n", depth-1)
	send("qmp_capabilities", map[string]any{})
	send(job, args)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		var m struct {
			Event string `json:"event"`
			Error any    `json:"error"`
			Data  struct {
				Error string `json:"error"`
			} `json:"data"`
		}
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		switch {
		case m.Error != nil || m.Data.Error != "":
			t.Errorf("qemu-storage-daemon: %s", lines.Text())
			send("quit", map[string]any{})
		case m.Event == "BLOCK_JOB_READY":
			send("job-complete", map[string]any{"id": "j"})
		case m.Event == "BLOCK_JOB_COMPLETED":
			send("quit", map[string]any{})
		}
	}
	err = cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		if s, ok := exit.Sys().(syscall.WaitStatus); ok && s.Signal() == syscall.SIGABRT {
			t.Logf("qemu-storage-daemon: %v", err)
			return false
		}
	}
	if err != nil {
		t.Fatalf("qemu-storage-daemon: %v", err)
	}
	return true
}

// TestChainJobs holds what our jobs make of a chain against what QEMU's make of copies of it.
func TestChainJobs(t *testing.T) {
	needQEMU(t, "qemu-storage-daemon")
	rng := seeded(t)
	bin := t.TempDir()
	if err := daemon.Build(bin); err != nil {
		t.Fatal(err)
	}
	const depth = 5
	last := fmt.Sprint(depth - 1)
	for _, c := range []struct {
		name  string
		ours  func(at func(int) string) []string
		img   [][]string // what qemu-img does
		job   string     // what qemu-storage-daemon does
		args  map[string]any
		top   int // the disk's image afterwards
		check int // the image whose backing reference changes
	}{
		{
			name: "stream", ours: func(func(int) string) []string { return []string{"stream", "d"} },
			img: [][]string{{"rebase", "-f", "qcow2", "-b", "", last}},
			job: "block-stream", args: map[string]any{}, top: 4, check: 4,
		},
		{
			name: "stream to a base", ours: func(at func(int) string) []string { return []string{"stream", "d", "--base", at(1)} },
			img: [][]string{{"rebase", "-f", "qcow2", "-b", "1", "-F", "qcow2", last}},
			job: "block-stream", args: map[string]any{"base-node": "n1"}, top: 4, check: 4,
		},
		{
			name: "stream to a raw base", ours: func(at func(int) string) []string { return []string{"stream", "d", "--base", at(0)} },
			img: [][]string{{"rebase", "-f", "qcow2", "-b", "0", "-F", "raw", last}},
			job: "block-stream", args: map[string]any{"base-node": "n0"}, top: 4, check: 4,
		},
		{
			name: "commit in the middle",
			ours: func(at func(int) string) []string { return []string{"commit", "d", "--top", at(3), "--base", at(1)} },
			img:  [][]string{{"commit", "-q", "-f", "qcow2", "-b", "1", "-d", "3"}, {"rebase", "-u", "-f", "qcow2", "-b", "1", "-F", "qcow2", "4"}},
			job:  "block-commit", args: map[string]any{"top-node": "n3", "base-node": "n1"}, top: 4, check: 4,
		},
		{
			name: "commit below another image",
			ours: func(at func(int) string) []string { return []string{"commit", "d", "--top", at(2), "--base", at(0)} },
			img:  [][]string{{"commit", "-q", "-f", "qcow2", "-b", "0", "-d", "2"}, {"rebase", "-u", "-f", "qcow2", "-b", "0", "-F", "raw", "3"}},
			job:  "block-commit", args: map[string]any{"top-node": "n2", "base-node": "n0"}, top: 4, check: 3,
		},
		{
			name: "commit of the active image",
			ours: func(at func(int) string) []string { return []string{"commit", "d", "--base", at(2)} },
			img:  [][]string{{"commit", "-q", "-f", "qcow2", "-b", "2", "-d", "4"}},
			job:  "block-commit", args: map[string]any{"base-node": "n2"}, top: 2, check: 2,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := chainDir(t, rng, depth)
			contents := readWithQEMU(t, filepath.Join(dir, last), "")
			theirs, qsd := copyDir(t, dir), copyDir(t, dir)
			at := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }

			d, err := daemon.New(bin, daemon.Disk{ID: "d", Image: at(depth - 1), Format: "qcow2", Cache: "writeback"})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Remove()
			if err := d.Start(); err != nil {
				t.Fatal(err)
			}
			if status, out := d.CLI(append(c.ours(at), "--wait")...); status != 0 {
				t.Fatalf("status %d: %s\n%s", status, out, d.Log())
			}
			info, err := d.Disk("d")
			if err != nil {
				t.Fatal(err)
			}
			if info.Image != at(c.top) {
				t.Errorf("the disk is on %s, want %s", info.Image, at(c.top))
			}
			if err := d.Stop(); err != nil {
				t.Fatal(err)
			}

			mustEqual(t, "the disk", readWithQEMU(t, at(c.top), ""), contents)
			for _, args := range c.img {
				runIn(t, theirs, "", "qemu-img", args...)
			}
			peers := map[string]string{"qemu-img": theirs}
			if storageDaemon(t, qsd, depth, c.job, c.args) {
				peers["qemu-storage-daemon"] = qsd
			}
			for name, peer := range peers {
				runIn(t, "", "", "qemu-img", "compare", "-f", formatOf(c.top), "-F", formatOf(c.top), at(c.top), filepath.Join(peer, fmt.Sprint(c.top)))
				if got, want := backing(t, dir, c.check), backing(t, peer, c.check); got != want {
					t.Errorf("behind image %d is %q, with %s %q", c.check, got, name, want)
				}
			}
			for i := 1; i < depth; i++ {
				if r := checkWithQEMU(t, at(i)); r.Errors+r.Corrupt+r.Leaks != 0 {
					t.Errorf("image %d: %+v", i, r)
				}
			}
		})
	}
}
