// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"sync"
)

// cacheDir is where scripts/setup-test.sh puts kernel, modules and programs.
func cacheDir() (string, error) {
	if dir := os.Getenv("BLKSTREAM_CACHE"); dir != "" {
		return filepath.Join(dir, "guest"), nil
	}
	root, err := repoRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, ".cache", "guest"), nil
}

func repoRoot() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, e := os.Stat(filepath.Join(dir, "go.mod")); e == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			err = errors.New("guest: no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}

// initramfs builds the guest's root file system once a process and returns its
// path. Its name holds the hash of its contents, so test binaries that run at
// the same time share it or leave each other alone.
var initramfs = sync.OnceValues(func() (string, error) {
	dir, err := cacheDir()
	if err != nil {
		return "", err
	}
	agent, err := buildAgent(dir)
	if err != nil {
		return "", err
	}
	var a cpio
	for _, d := range []string{"dev", "proc", "sys", "tmp", "mnt", "etc", "bin"} {
		a.dir(d)
	}
	// The kernel opens /dev/console for process 1, and Go's runtime wants
	// /dev/null, both before anything is mounted.
	a.device("dev/console", 5, 1)
	a.device("dev/null", 1, 3)
	a.file("init", agent)
	a.link("bin/sh", "busybox")
	a.link("bin/mkfs.ext4", "mke2fs")
	a.link("bin/fsck.ext4", "e2fsck")
	a.link("etc/mtab", "/proc/mounts")
	if err := a.tree(filepath.Join(dir, "root"), ""); err != nil {
		return "", err
	}
	if err := a.tree(filepath.Join(dir, "modules"), "modules"); err != nil {
		return "", err
	}
	image := a.finish()
	sum := sha256.Sum256(image)
	path := filepath.Join(dir, fmt.Sprintf("initramfs-%x.cpio", sum[:6]))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	old, _ := filepath.Glob(filepath.Join(dir, "initramfs-*.cpio"))
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	if err := os.WriteFile(tmp, image, 0o644); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, path); err != nil {
		return "", err
	}
	// Older agents are of no use. A guest that is just starting has its file
	// open, or belongs to a build of other sources, which this cache is not for.
	for _, o := range old {
		os.Remove(o)
	}
	return path, nil
})

func buildAgent(dir string) ([]byte, error) {
	out := filepath.Join(dir, fmt.Sprintf("agent.%d", os.Getpid()))
	defer os.Remove(out)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out,
		"github.com/blkstream/blkstream/test/guest/agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("guest: build the agent: %w: %s", err, msg)
	}
	return os.ReadFile(out)
}

// cpio writes a "newc" archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
// Unlike the cpio program it needs no root to put a device node into it.
type cpio struct {
	buf   bytes.Buffer
	inode int
}

const (
	modeDir, modeFile, modeLink, modeChar = 0o040755, 0o100755, 0o120777, 0o020666
)

func (a *cpio) entry(name string, mode, major, minor int, data []byte) {
	a.inode++
	links := 1
	if mode == modeDir {
		links = 2
	}
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(data)
	a.pad()
}

func (a *cpio) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *cpio) dir(name string)                      { a.entry(name, modeDir, 0, 0, nil) }
func (a *cpio) file(name string, data []byte)        { a.entry(name, modeFile, 0, 0, data) }
func (a *cpio) link(name, target string)             { a.entry(name, modeLink, 0, 0, []byte(target)) }
func (a *cpio) device(name string, major, minor int) { a.entry(name, modeChar, major, minor, nil) }

// tree adds everything below dir under the name prefix, parents first.
func (a *cpio) tree(dir, prefix string) error {
	var paths []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		return fmt.Errorf("guest: initramfs: %w", err)
	}
	sort.Strings(paths)
	for _, path := range paths {
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		name := filepath.Join(prefix, rel)
		st, err := os.Stat(path)
		switch {
		case err != nil:
			return err
		case name == ".":
		case st.IsDir():
			a.dir(name)
		default:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			a.file(name, data)
		}
	}
	return nil
}

func (a *cpio) finish() []byte {
	a.entry("TRAILER!!!", 0, 0, 0, nil)
	return a.buf.Bytes()
}
