// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

// Every flag is in the man page, and the page names no other.
func TestManPage(t *testing.T) {
	text, err := os.ReadFile("blkstreamd.8")
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(&flags{})
	known := map[string]bool{"help": true, "version": true} // which Execute adds
	cmd.Flags().VisitAll(func(f *pflag.Flag) { known[f.Name] = true })
	for name := range known {
		if !regexp.MustCompile(`(?m)^\.It Fl (\w , )?-` + name + `\b`).Match(text) {
			t.Errorf("--%s is not in blkstreamd.8", name)
		}
	}
	for _, m := range regexp.MustCompile(`Fl -([a-z-]+)`).FindAllStringSubmatch(string(text), -1) {
		if !known[m[1]] {
			t.Errorf("blkstreamd.8 speaks of --%s, which there is not", m[1])
		}
	}
}

func TestCommandLine(t *testing.T) {
	for args, want := range map[string]string{
		"":                           "--config is missing",
		"--frob":                     "unknown flag",
		"--config /c --blk-file /i":  "exclude each other",
		"--check":                    "--config is missing",
		"--socket-path /s":           "--blk-file is missing",
		"--blk-file /i":              "--format is missing",
		"--blk-file /i --format raw": "one of --socket-path and --fd",
		"--blk-file /i --format what --socket-path /s":       `"what": want one of`,
		"--blk-file /i --format raw --socket-path /s --fd 3": "one of --socket-path and --fd",
		"--blk-file /i --format raw --fd 3 --num-queues 0":   "queues",
	} {
		cmd := command(&flags{})
		cmd.SetArgs(strings.Fields(args))
		if err := cmd.Execute(); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want a usage error with %q", args, err, want)
		}
	}
	// Messages name the file to people who are in another folder.
	t.Chdir(t.TempDir())
	if err := os.WriteFile("b.toml", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := specs(&flags{config: "b.toml", fd: -1}); err != nil || !filepath.IsAbs(f.Path) {
		t.Errorf("%+v, %v", f, err)
	}
	// For management software.
	var out bytes.Buffer
	cmd := command(&flags{})
	cmd.SetOut(&out)
	cmd.SetArgs([]string{"--print-capabilities"})
	if err := cmd.Execute(); err != nil || out.String() != `{"features":["read-only","blk-file"],"type":"block"}`+"\n" {
		t.Errorf("capabilities: %s, %v", &out, err)
	}
}
