// SPDX-License-Identifier: Apache-2.0

// Package dist tests what is installed.
package dist

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// tool skips the test if there is no such program, but in CI that is an error.
func tool(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

func TestManPages(t *testing.T) {
	tool(t, "mandoc")
	pages, err := filepath.Glob("../../*/*.[1-8]")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("../../cmd/*/*.[1-8]")
	if err != nil {
		t.Fatal(err)
	}
	pages = append(pages, more...)
	if len(pages) < 3 {
		t.Errorf("only %q", pages)
	}
	for _, p := range pages {
		out, err := exec.Command("mandoc", "-T", "lint", p).CombinedOutput()
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, "referenced manual not found") && !strings.Contains(line, "outdated mandoc.db") {
				t.Error(line)
			}
		}
		var exit *exec.ExitError // its status is the worst finding
		if err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
	}
}

// A package is made of what is installed in DESTDIR, and nothing else may be touched.
func TestInstall(t *testing.T) {
	tool(t, "make")
	dir := t.TempDir()
	cmd := exec.Command("make", "-C", "../..", "install", "DESTDIR="+dir, "PREFIX=/opt/b")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	prefix := filepath.Join(dir, "opt/b")
	for name, mode := range map[string]os.FileMode{
		"bin/blkstream": 0o755, "sbin/blkstreamd": 0o755,
		"share/man/man1/blkstream.1": 0o644, "share/man/man1/blkstream-image.1": 0o644, "share/man/man5/blkstream.toml.5": 0o644, "share/man/man8/blkstreamd.8": 0o644,
		"lib/systemd/system/blkstreamd.service": 0o644, "share/bash-completion/completions/blkstream": 0o644,
		"share/zsh/site-functions/_blkstream": 0o644, "share/fish/vendor_completions.d/blkstream.fish": 0o644,
	} {
		fi, err := os.Stat(filepath.Join(prefix, name))
		if err != nil {
			t.Error(err)
		} else if fi.Mode() != mode || fi.Size() == 0 {
			t.Errorf("%s: mode %v, %d bytes", name, fi.Mode(), fi.Size())
		}
	}
	if out, err := exec.Command(filepath.Join(prefix, "sbin/blkstreamd"), "--print-capabilities").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := exec.LookPath("bash"); err == nil {
		if out, err := exec.Command("bash", "-n", filepath.Join(prefix, "share/bash-completion/completions/blkstream")).CombinedOutput(); err != nil {
			t.Errorf("completion: %v: %s", err, out)
		}
	}
	checkUnit(t, dir, prefix)
}

// checkUnit wants a unit that systemd understands and that starts what was installed.
func checkUnit(t *testing.T, dir, prefix string) {
	unit := filepath.Join(prefix, "lib/systemd/system/blkstreamd.service")
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "\nExecStart=/opt/b/sbin/blkstreamd --config /etc/blkstream.toml\n") ||
		strings.Contains(string(text), "@sbindir@") {
		t.Errorf("the unit does not start what was installed:\n%s", text)
	}
	tool(t, "systemd-analyze")
	here := filepath.Join(dir, "blkstreamd.service")
	if err := os.WriteFile(here, []byte(strings.ReplaceAll(string(text), "/opt/b", prefix)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", here).CombinedOutput()
	if strings.Contains(string(out), here) || strings.Contains(string(out), "blkstreamd") {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}
