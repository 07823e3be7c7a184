// SPDX-License-Identifier: Apache-2.0

// Command compare measures blkstreamd beside its peers: the same files, the same client, in turn, again and again, and
// prints medians and their ratios. The machine should be idle; even so only the ratios mean something.
//
//   - table.go: requests against qemu-storage-daemon
//   - chain.go: reads of long chains against those of one image
//   - copy.go: the bulk copy against dd, and what a guest notices of a copy
//   - stream.go: streaming and copy on read against qemu-storage-daemon, and the copy that switches first
//   - footprint.go: memory, and the start with a huge disk
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// bench is what all sections share.
type bench struct {
	runs   int           // repetitions of each measurement
	length time.Duration // of one with a fixed length
	size   int64         // of a test file, bytes
	only   *regexp.Regexp
	dir    string // on a disk
	shm    string // on tmpfs
}

func main() {
	b := &bench{}
	flag.IntVar(&b.runs, "runs", 5, "repetitions of each measurement")
	flag.DurationVar(&b.length, "time", 2*time.Second, "length of one")
	flag.Int64Var(&b.size, "size", 1<<30, "bytes of a test file")
	only := flag.String("only", "", "measure only what matches this `regexp`, such as 'qcow2.*randread' or 'copy'")
	flag.Parse()
	var err error
	if b.only, err = regexp.Compile(*only); err == nil {
		err = b.run()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "compare: %v\n", err)
		os.Exit(1)
	}
}

func (b *bench) run() (err error) {
	if b.dir, err = os.MkdirTemp("/var/tmp", "blkstream-bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.shm, err = os.MkdirTemp("/dev/shm", "blkstream-bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.shm)) }()
	cmd := exec.Command("go", "build", "-o", b.dir+"/", "github.com/blkstream/blkstream/cmd/blkstreamd",
		"github.com/blkstream/blkstream/cmd/blkstream", "github.com/blkstream/blkstream/test/bench")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	fmt.Printf("medians of %d runs in turn\n", b.runs)
	return errors.Join(b.table(), b.chains(), b.copies(), b.streams(), b.footprint())
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

// server is a running back-end.
type server struct {
	*exec.Cmd
	socket string
}

// start runs a back-end and waits for its socket.
func (b *bench) start(cmd *exec.Cmd, socket string) (*server, error) {
	os.Remove(socket) //nolint:errcheck // of the last run
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{cmd, socket}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return s, nil
		}
		if time.Now().After(deadline) {
			s.stop()
			return nil, fmt.Errorf("%s does not serve", cmd)
		}
	}
}

func (s *server) stop() {
	s.Process.Signal(os.Interrupt)                                      //nolint:errcheck // it may have ended
	hung := time.AfterFunc(10*time.Second, func() { s.Process.Kill() }) //nolint:errcheck // likewise
	defer hung.Stop()
	s.Wait() //nolint:errcheck // a signal ends it
}

// blkstreamd serves one image. keys are further ones of the disk.
func (b *bench) blkstreamd(image, format, cache string, keys ...string) (*server, error) {
	text := fmt.Sprintf("[daemon]\ncontrol = %q\nstate_dir = %q\n[[disk]]\nid = \"d\"\nsocket = %q\nimage = %q\nformat = %q\ncache = %q\n%s\n",
		b.path("control"), b.path("state"), b.path("s"), image, format, cache, strings.Join(keys, "\n"))
	if err := errors.Join(os.WriteFile(b.path("c.toml"), []byte(text), 0o600), os.RemoveAll(b.path("state"))); err != nil {
		return nil, err
	}
	return b.start(exec.Command(b.path("blkstreamd"), "--config", b.path("c.toml")), b.path("s"))
}

// fill writes the whole file, so that no run pays for allocation.
func fill(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i*7 + 1)
	}
	for off := int64(0); off < size; off += int64(len(b)) {
		if _, err := f.WriteAt(b, off); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}
