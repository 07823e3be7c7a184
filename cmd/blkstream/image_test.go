// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/vbauerster/mpb/v8"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
)

func needTool(t *testing.T, tools ...string) {
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

func tool(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", args, err, out)
	}
	return string(out)
}

// fields splits a command line; "" stands for an empty argument.
func fields(line string) []string {
	args := strings.Fields(line)
	for i := range args {
		if args[i] == `""` {
			args[i] = ""
		}
	}
	return args
}

// TestImage walks through a session and compares what is printed with the golden file.
func TestImage(t *testing.T) {
	needTool(t, "qemu-io")
	golden, err := filepath.Abs("testdata/image.golden")
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	var all strings.Builder
	for _, line := range []string{
		"create -f raw base.img 4M",
		"create -f raw base.img 4M",
		"$ qemu-io -f raw -c 'write -P 1 1M 64k' base.img",
		"create -f qcow2 -b base.img -F raw mid.qcow2",
		"create -f qcow2 --cluster-size 4K --compression zstd --extended-l2=false -b mid.qcow2 -F qcow2 top.qcow2 5M",
		"$ qemu-io -f qcow2 -c 'write -P 2 2M 128k' mid.qcow2",
		"$ qemu-io -f qcow2 -c 'write -P 3 3M 4k' -c 'write -z 1M 4k' top.qcow2",
		"info -f qcow2 top.qcow2",
		"info -f qcow2 --chain=false --json top.qcow2",
		"info -f qcow2 mid.qcow2 --json",
		"map -f qcow2 top.qcow2",
		"map -f qcow2 top.qcow2 --json",
		"check -f qcow2 top.qcow2",
		"check -f qcow2 top.qcow2 --json",
		"convert -f qcow2 -O raw top.qcow2 flat.img",
		"convert -f qcow2 -O qcow2 -c top.qcow2 packed.qcow2 --json",
		"map -f qcow2 packed.qcow2",
		"compare -f qcow2 -F raw top.qcow2 flat.img",
		"compare -f qcow2 -F raw top.qcow2 flat.img --json",
		"compare -f raw -F qcow2 base.img top.qcow2",
		"compare -f raw -F qcow2 base.img top.qcow2 --json",
		"resize -f raw flat.img +1M",
		"compare -f qcow2 -F raw top.qcow2 flat.img",
		"compare -f qcow2 -F raw -s top.qcow2 flat.img",
		"resize -f raw flat.img -2M",
		"resize -f raw --shrink flat.img -2M",
		"resize -f raw flat.img 1M --shrink --json",
		"rebase -f qcow2 -b base.img -F raw top.qcow2",
		"info -f qcow2 top.qcow2",
		`rebase -f qcow2 -b "" top.qcow2`,
		"info -f qcow2 top.qcow2 --chain",
		"compare -f qcow2 -F qcow2 top.qcow2 packed.qcow2",
		"rebase -f qcow2 -u -b gone.img -F raw top.qcow2",
		"info -f qcow2 top.qcow2",
		"create -f add-cow -b packed.qcow2 -F qcow2 --image-file flat2.img a.add-cow",
		"info -f add-cow a.add-cow",
		"info -f add-cow --chain=false --json a.add-cow",
		"map -f add-cow a.add-cow",
		"check -f add-cow a.add-cow",
		"compare -f add-cow -F qcow2 a.add-cow packed.qcow2",
		"convert -f add-cow -O qcow2 a.add-cow a.qcow2",
		"compare -f add-cow -F qcow2 a.add-cow a.qcow2",
		// Refused.
		"create -f add-cow -b packed.qcow2 -F qcow2 b.add-cow",
		"create -f add-cow -b packed.qcow2 -F qcow2 --image-file flat.img b.add-cow",
		"create -f add-cow --lazy-refcounts -b packed.qcow2 -F qcow2 --image-file x.img b.add-cow",
		"create -f qcow2 --image-file x.img b.qcow2 1M",
		"resize -f add-cow a.add-cow +1M",
		"info top.qcow2",
		"info -f vmdk top.qcow2",
		"create -f qcow2 x.qcow2",
		"create -f qcow2 x.qcow2 5X",
		"create -f qcow2 -b base.img x.qcow2",
		"create -f raw --cluster-size 4K x.img 1M",
		"create -f raw -b base.img -F raw x.img",
		"create -f qcow2 -b nope -F raw x.qcow2",
		"convert -f raw base.img x.img",
		"convert -f raw -O raw -c base.img x.img",
		"check -f raw base.img",
		"resize -f raw base.img x1M",
		"rebase -f qcow2 top.qcow2",
		"rebase -f qcow2 -b base.img top.qcow2",
		"rebase -f raw -b base.img -F raw base.img",
		"map -f qcow2 base.img",
		"frob",
	} {
		if shell, ok := strings.CutPrefix(line, "$ "); ok {
			tool(t, "sh", "-c", shell)
			continue
		}
		status, out, errs := runCLI(t.Context(), append([]string{"image"}, fields(line)...)...)
		all.WriteString("$ blkstream image " + line + "\n" + out + errs)
		if status != 0 {
			fmt.Fprintf(&all, "status %d\n", status)
		}
	}
	// What a file takes depends on the file system.
	got := regexp.MustCompile(`(on the host:  +|"actual-size":)[^\n,]*`).ReplaceAllString(all.String(), "${1}N")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("other output than testdata/image.golden (-update rewrites it):\n%s", diff(t, golden, got))
	}
}

func diff(t *testing.T, golden, got string) string {
	t.Helper()
	cmd := exec.Command("diff", "-u", golden, "-")
	cmd.Stdin = strings.NewReader(got)
	out, _ := cmd.Output() // 1: they differ
	return string(out)
}

// The JSON that qemu-img prints, we print with the same meaning.
func TestImageJSONLikeQEMU(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "raw", "base", "3M")
	tool(t, "qemu-io", "-f", "raw", "-c", "write -P 1 0 1M", "base")
	for _, option := range []string{"compat=0.10", "extended_l2=on", "cluster_size=512,compression_type=zstd", "data_file=d,data_file_raw=off"} {
		name := option + ".qcow2"
		args := []string{"qemu-img", "create", "-q", "-f", "qcow2", "-o", option}
		if !strings.Contains(option, "data_file") {
			args = append(args, "-b", "base", "-F", "raw")
		}
		tool(t, append(args, name, "5M")...)
		tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 2 512k 1M", "-c", "write -z 2M 64k", name)
		if !strings.Contains(option, "data_file") {
			tool(t, "qemu-img", "snapshot", "-c", "one", name)
			tool(t, "qemu-img", "snapshot", "-c", "two", name)
		}
		if !strings.Contains(option, "0.10") {
			tool(t, "qemu-img", "bitmap", "--add", "-g", "128k", name, "marks")
			tool(t, "qemu-img", "bitmap", "--add", "--disable", name, "off")
		}
		for _, c := range []struct{ ours, theirs string }{
			{"info -f qcow2 --json", "info -f qcow2 --output=json --backing-chain"},
			{"map -f qcow2 --json", "map -f qcow2 --output=json"},
			{"check -f qcow2 --json", "check -f qcow2 --output=json"},
		} {
			status, out, errs := runCLI(t.Context(), append(append([]string{"image"}, fields(c.ours)...), name)...)
			if status != 0 {
				t.Fatalf("%s: status %d: %s", c.ours, status, errs)
			}
			var got, want any
			theirs := tool(t, append(append([]string{"qemu-img"}, fields(c.theirs)...), name)...)
			for text, v := range map[string]any{out: &got, theirs: &want} {
				if err := json.Unmarshal([]byte(text), v); err != nil {
					t.Fatalf("%s: %v: %s", c.ours, err, text)
				}
			}
			if missing := contains(got, want); missing != "" {
				t.Errorf("%s of %s: %s\nQEMU: %s\nwe: %s", c.ours, name, missing, theirs, out)
			}
		}
	}
}

// contains says what of want, a JSON value, is missing in got, which may have more keys.
func contains(got, want any) string {
	switch w := want.(type) {
	case map[string]any:
		g, ok := got.(map[string]any)
		if !ok {
			return "no object"
		}
		delete(w, "children") // QEMU's own nodes, since version 8
		for key, v := range w {
			if m := contains(g[key], v); m != "" {
				return key + ": " + m
			}
		}
		return ""
	case []any:
		g, ok := got.([]any)
		if !ok || len(g) != len(w) {
			return "another number of elements"
		}
		for i := range w {
			if m := contains(g[i], w[i]); m != "" {
				return m
			}
		}
		return ""
	default:
		if !reflect.DeepEqual(got, want) {
			b, _ := json.Marshal([]any{got, want})
			return "not the same: " + string(b)
		}
		return ""
	}
}

// Leaks and errors have statuses of their own, and are repaired.
func TestImageCheckStatus(t *testing.T) {
	needTool(t, "qemu-img", "qemu-io")
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a", "4M")
	tool(t, "qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", "a")
	check := func(want int, contains string, flags ...string) {
		t.Helper()
		status, out, errs := runCLI(t.Context(), append([]string{"image", "check", "-f", "qcow2", "a"}, flags...)...)
		if status != want || !strings.Contains(out, contains) {
			t.Errorf("status %d, want %d with %q: %s%s", status, want, contains, out, errs)
		}
	}
	check(0, "no errors")
	// The first cluster after the metadata gets an L2 entry of zeros: its cluster leaks.
	patch(t, "a", 0x40000, make([]byte, 8))
	check(exitLeaks, "1 leaked cluster:")
	check(exitLeaks, `"leaks":1,`, "--json")
	check(0, "repaired: 0 errors, 1 leak\n", "-r", "leaks")
	check(0, "no errors")
	// A reference count of zero for a cluster in use.
	patch(t, "a", 0x20000+2*6, make([]byte, 2))
	check(exitFailed, "2 errors")
	check(0, "repaired: ", "-r", "all")
	check(0, "no errors")
	tool(t, "qemu-img", "check", "-q", "-f", "qcow2", "a")
	// Of what could not be checked nothing is printed.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx    context.Context
		line   string
		status int
		errs   string
	}{
		{t.Context(), "image check -f raw a", exitNoCheck, "nothing to check"},
		{t.Context(), "image check -f qcow2 b", exitFailed, "no such file"},
		{ctx, "image check -f qcow2 a", exitFailed, "interrupted"},
	} {
		if status, out, errs := runCLI(c.ctx, fields(c.line)...); status != c.status || out != "" || !strings.Contains(errs, c.errs) {
			t.Errorf("%s: status %d, want %d with %q: %s%s", c.line, status, c.status, c.errs, out, errs)
		}
	}
}

// A script can tell images that differ from images that could not be compared.
func TestImageCompareStatus(t *testing.T) {
	t.Chdir(t.TempDir())
	for name, data := range map[string]string{"a": "a", "b": "b"} {
		if err := os.WriteFile(name, bytes.Repeat([]byte(data), 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx    context.Context
		line   string
		status int
		errs   string
	}{
		{t.Context(), "image compare -f raw -F raw a a", exitDone, ""},
		{t.Context(), "image compare -f raw -F raw a b", exitFailed, ""},
		{t.Context(), "image compare -f raw -F raw a c", exitUnread, "no such file"},
		{t.Context(), "image compare -f raw -F qcow2 a b", exitUnread, "not a valid qcow2 image"},
		{ctx, "image compare -f raw -F raw a a", exitUnread, "interrupted"},
	} {
		if status, _, errs := runCLI(c.ctx, fields(c.line)...); status != c.status || !strings.Contains(errs, c.errs) {
			t.Errorf("%s: status %d, want %d with %q: %s", c.line, status, c.status, c.errs, errs)
		}
	}
}

// An image in use is refused by each command, with what to do.
func TestImageInUse(t *testing.T) {
	needTool(t, "qemu-img")
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "a", "4M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", "over")
	n, err := image.Open(blk.NewTask(), "a", image.Qcow2, image.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for _, line := range []string{
		"info -f qcow2 a", "check -f qcow2 a", "map -f qcow2 a", "map -f qcow2 over", "compare -f qcow2 -F qcow2 a a",
		"convert -f qcow2 -O raw a b", "convert -f raw -O raw --existing over a", "resize -f qcow2 a 5M",
		"rebase -f qcow2 -u -b b -F raw a", "create -f qcow2 --existing a 1M", "create -f qcow2 -b a -F qcow2 b",
	} {
		status, _, errs := runCLI(t.Context(), append([]string{"image"}, fields(line)...)...)
		if status == exitDone || !strings.Contains(errs, `"a" is in use by another process`) || !strings.Contains(errs, "stop that first") {
			t.Errorf("%s: status %d: %s", line, status, errs)
		}
		if _, err := os.Stat("b"); err == nil {
			t.Errorf("%s leaves its target", line)
		}
	}
	status, out, errs := runCLI(t.Context(), "image", "info", "-U", "-f", "qcow2", "a")
	if status != exitDone || !strings.Contains(out, "4 MiB") {
		t.Errorf("info -U: status %d: %s%s", status, out, errs)
	}
}

func patch(t *testing.T, path string, off int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// An interrupted conversion leaves nothing behind.
func TestImageConvertInterrupted(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := os.WriteFile("src", bytes.Repeat([]byte{1}, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	status, _, errs := runCLI(ctx, fields("image convert -f raw -O raw src dst")...)
	if status != exitFailed || errs != "blkstream: interrupted\n" {
		t.Errorf("status %d: %s", status, errs)
	}
	if _, err := os.Stat("dst"); !os.IsNotExist(err) {
		t.Errorf("the target is there: %v", err)
	}
	// One that was there before stays, and is said to be of no use.
	if err := os.WriteFile("dst", make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	status, _, errs = runCLI(ctx, fields("image convert -f raw -O raw --existing src dst")...)
	if status != exitFailed || !strings.Contains(errs, "interrupted; the target is not complete") {
		t.Errorf("status %d: %s", status, errs)
	}
	if _, err := os.Stat("dst"); err != nil {
		t.Error(err)
	}
}

// Nothing is written over what is read.
func TestImageConvertOntoSource(t *testing.T) {
	needTool(t, "qemu-img")
	t.Chdir(t.TempDir())
	tool(t, "qemu-img", "create", "-q", "-f", "raw", "base", "1M")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "top")
	if err := os.Link("base", "other"); err != nil {
		t.Fatal(err)
	}
	for _, target := range []string{"top", "base", "other", "--data-file base x"} {
		status, _, errs := runCLI(t.Context(), fields("image convert -f qcow2 -O qcow2 --existing top "+target)...)
		if status != exitFailed || !strings.Contains(errs, "is a file of the source") {
			t.Errorf("onto %s: status %d: %s", target, status, errs)
		}
	}
	tool(t, "qemu-img", "check", "-q", "-f", "qcow2", "top")
}

func TestImageBar(t *testing.T) {
	var out bytes.Buffer
	progress, stop := newImageBar(&out, "convert", true, mpb.WithWidth(80), mpb.WithAutoRefresh())
	progress(512<<20, 1<<30)
	stop()
	if !strings.Contains(out.String(), "convert ") || !strings.Contains(out.String(), "50% 512 MiB of 1 GiB") {
		t.Errorf("%q", out.String())
	}
	// A repair takes several turns, in a unit that says nothing to anyone.
	out.Reset()
	progress, stop = newImageBar(&out, "check", false, mpb.WithWidth(80), mpb.WithAutoRefresh())
	progress(90, 100)
	progress(10, 100)
	stop()
	if !strings.Contains(out.String(), " 10%\n") {
		t.Errorf("%q", out.String())
	}
}

func TestNegativeSize(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"image resize -f raw a -1G", "image resize -f raw a -- -1G"},
		{"image resize a -1G -f raw --shrink", "image resize a -f raw --shrink -- -1G"},
		{"image resize -f raw a -- -1G", "image resize -f raw a -- -1G"},
		{"image resize -f raw a +1G", "image resize -f raw a +1G"},
		{"job speed copy-1 -1", "job speed copy-1 -1"},
	} {
		if got := strings.Join(negativeSize(strings.Fields(c.in)), " "); got != c.want {
			t.Errorf("%q becomes %q, want %q", c.in, got, c.want)
		}
	}
}
