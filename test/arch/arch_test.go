// SPDX-License-Identifier: Apache-2.0

// Package arch keeps the shape of the project: which package may import which,
// and where the sharp tools lie.
package arch

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/blkstream/blkstream"

// mayImport lists, for a package of this project, which others it may import
// besides the standard library and foreign modules. "x/..." means x and all
// below it. The first pattern that matches a package counts; a package that
// matches none may not exist.
var mayImport = []struct {
	pkg     string
	imports []string
}{
	{"virtq", nil},
	{"config", nil},
	{"blk", nil},
	{"blk/uring", nil},
	{"blk/loop", []string{"blk", "blk/uring"}},
	{"blk/loop/looptest", []string{"blk", "blk/loop"}},
	{"blk/image", []string{"blk/..."}}, // puts the drivers together
	{"blk/...", []string{"blk"}},       // drivers meet through graph edges only
	{"vhostuser", []string{"virtq"}},
	{"vhostuser/vblk", []string{"vhostuser", "virtq", "blk", "blk/loop"}},
	{"vhostuser/frontend", []string{"vhostuser", "virtq"}},
	{"copy/control", nil},
	{"copy/job", []string{"blk"}},
	{"copy/...", []string{"blk/...", "copy/job"}},
	{"cmd/blkstream", []string{"config", "copy/control", "blk", "blk/image", "blk/qcow2"}},
	{"cmd/...", []string{"virtq", "config", "blk/...", "vhostuser/...", "copy/...", "cmd/blkstreamd/..."}},
	{"test/...", []string{"..."}},
}

// Packages that may use golang.org/x/sys/unix; the others ask them.
var unixPackages = []string{
	"virtq", "vhostuser", "vhostuser/vblk", "vhostuser/frontend",
	"blk", "blk/uring", "blk/loop", "blk/file",
	"cmd/blkstreamd/internal/...", "test/...",
}

// Packages that tests alone may import.
var testOnly = []string{"blk/blktest", "blk/loop/looptest", "copy/job/jobtest", "vhostuser/frontend", "test/..."}

type goPackage struct {
	Dir, ImportPath, Name              string
	Imports, TestImports, XTestImports []string
	GoFiles, IgnoredGoFiles            []string
	TestGoFiles, XTestGoFiles          []string
	Error                              *struct{ Err string }
}

func (p *goPackage) path() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

func packages(t *testing.T) []*goPackage {
	t.Helper()
	var stderr bytes.Buffer
	// -e: a package that does not build now still has imports to look at.
	cmd := exec.Command("go", "list", "-e", "-json", "./...")
	cmd.Dir, cmd.Stderr = filepath.Join("..", ".."), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, &stderr)
	}
	var all []*goPackage
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(goPackage)
		err := dec.Decode(p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	if len(all) < 10 {
		t.Fatalf("go list found only %d packages", len(all))
	}
	return all
}

func matches(pattern, pkg string) bool {
	prefix, below := strings.CutSuffix(pattern, "...")
	return pattern == pkg || below && (strings.HasPrefix(pkg, prefix) || pkg == strings.TrimSuffix(prefix, "/"))
}

func matchesAny(patterns []string, pkg string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, pkg) })
}

func TestImports(t *testing.T) {
	for _, p := range packages(t) {
		pkg := p.path()
		i := slices.IndexFunc(mayImport, func(r struct {
			pkg     string
			imports []string
		},
		) bool {
			return matches(r.pkg, pkg)
		})
		if i < 0 {
			t.Errorf("%s: no rule says what this package may import", pkg)
			continue
		}
		for _, imp := range p.Imports {
			own, isOwn := strings.CutPrefix(imp, module+"/")
			switch {
			case isOwn && !matchesAny(mayImport[i].imports, own):
				t.Errorf("%s must not import %s (allowed: %v)", pkg, own, mayImport[i].imports)
			case isOwn && matchesAny(testOnly, own) && !matchesAny(testOnly, pkg):
				t.Errorf("%s imports %s, which is for tests", pkg, own)
			case imp == "golang.org/x/sys/unix" && !matchesAny(unixPackages, pkg):
				t.Errorf("%s must not import golang.org/x/sys/unix", pkg)
			case imp == "C":
				t.Errorf("%s uses cgo", pkg)
			}
		}
	}
}

func TestFiles(t *testing.T) {
	for _, p := range packages(t) {
		if p.Name == "copy" {
			t.Errorf("%s: a package named copy hides the builtin", p.path())
		}
		for _, name := range slices.Concat(p.GoFiles, p.IgnoredGoFiles, p.TestGoFiles, p.XTestGoFiles) {
			file := filepath.Join(p.path(), name)
			text, err := os.ReadFile(filepath.Join(p.Dir, name))
			if err != nil {
				t.Error(err)
				continue
			}
			generated := strings.HasSuffix(name, ".pb.go")
			if first, _, _ := bytes.Cut(text, []byte("\n")); !generated && string(first) != "// SPDX-License-Identifier: Apache-2.0" {
				t.Errorf("%s: the first line is not the SPDX line", file)
			}
			sharp := strings.HasSuffix(strings.TrimSuffix(name, "_test.go"), "_unsafe") || strings.HasSuffix(name, "_unsafe.go")
			if uses := bytes.Contains(text, []byte("\n\t\"unsafe\"\n")) || bytes.Contains(text, []byte("import \"unsafe\"")); uses && !sharp && !generated {
				t.Errorf("%s: unsafe belongs into a file named *_unsafe.go", file)
			} else if uses && sharp && !bytes.Contains(text, []byte("// SAFETY:")) {
				t.Errorf("%s: unsafe without a // SAFETY: comment", file)
			}
		}
	}
}

// The rules themselves must be able to fail.
func TestMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, pkg string
		want         bool
	}{
		{"blk", "blk", true},
		{"blk", "blk/raw", false},
		{"blk/...", "blk/raw", true},
		{"blk/...", "blk", true},
		{"blk/...", "blkx", false},
		{"...", "virtq", true},
		{"cmd/blkstream", "cmd/blkstreamd", false},
	} {
		if got := matches(c.pattern, c.pkg); got != c.want {
			t.Errorf("matches(%q, %q) = %v", c.pattern, c.pkg, got)
		}
	}
}
