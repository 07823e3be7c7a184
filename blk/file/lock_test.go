// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLocksBetweenNodes(t *testing.T) {
	path := create(t, diskDir(t), 1<<20)
	for _, c := range []struct {
		name          string
		first, second Options
		ok            bool
	}{
		{"two writers", Options{}, Options{}, false},
		{"writer, reader", Options{}, Options{ReadOnly: true}, false},
		{"reader, writer", Options{ReadOnly: true}, Options{}, false},
		{"two readers", Options{ReadOnly: true}, Options{ReadOnly: true}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := mustOpen(t, path, c.first)
			b, err := Open(path, c.second)
			if c.ok != (err == nil) || err != nil && !errors.Is(err, ErrInUse) {
				t.Errorf("second open: %v", err)
			}
			if err == nil {
				b.Close()
			} else if !strings.Contains(err.Error(), path+`" is in use by another process (`) {
				t.Errorf("message: %v", err)
			}
			a.Close()
			b = mustOpen(t, path, c.second)
			b.Close()
		})
	}
}

// The bytes are those of QEMU's permissions: 0 is to read, 1 to write, 3 to resize; from 100 on for what one does, from 200 on
// for what one does not let others do.
func TestLockBytes(t *testing.T) {
	path := create(t, diskDir(t), 1<<20)
	for _, c := range []struct {
		o    Options
		want []int64
	}{
		{Options{}, []int64{100, 101, 103, 201, 203}},
		{Options{Claim: true}, []int64{100, 101, 103, 201, 203}},
		{Options{ReadOnly: true}, []int64{100, 201, 203}},
		{Options{Unlocked: true}, []int64{100}},
	} {
		n := mustOpen(t, path, c.o)
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var got []int64
		for at := range int64(300) {
			l := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
			if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
				t.Fatal(err)
			}
			switch l.Type {
			case unix.F_UNLCK:
			case unix.F_RDLCK:
				got = append(got, at)
			default:
				t.Errorf("%+v: byte %d is locked for itself alone", c.o, at)
			}
		}
		unix.Close(fd)
		n.Close()
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v: locked %v, want %v", c.o, got, c.want)
		}
	}
}

// A node without locks is there beside a writer, and gets in when the writer has given up its own.
func TestLockLater(t *testing.T) {
	path := create(t, diskDir(t), 1<<20)
	a := mustOpen(t, path, Options{})
	defer a.Close()
	b := mustOpen(t, path, Options{Unlocked: true})
	defer b.Close()
	if err := b.Lock(); !errors.Is(err, ErrInUse) {
		t.Fatalf("lock beside a writer: %v", err)
	}
	// A lock that could not be had leaves nothing behind.
	if err := errors.Join(a.Unlock(), a.Lock()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.Unlock(), b.Lock()); err != nil {
		t.Fatal(err)
	}
	if err := a.Lock(); !errors.Is(err, ErrInUse) {
		t.Fatalf("lock beside a writer: %v", err)
	}
	if c, err := Open(path, Options{}); !errors.Is(err, ErrInUse) {
		c.Close()
		t.Fatalf("open beside a writer: %v", err)
	}
}

// holdWithQEMU has path open in qemu-io until the test ends.
func holdWithQEMU(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("qemu-io", args...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	// An answer means that the image is open and locked.
	if _, err := io.WriteString(in, "length\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, "MiB") {
		t.Fatalf("qemu-io: %q %v", line, err)
	}
}

func TestLocksAgainstQEMU(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip(err)
	}
	dir := diskDir(t)
	rawImg := create(t, dir, 1<<20)
	qcow2 := filepath.Join(dir, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-f", "qcow2", qcow2, "1M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v %s", err, out)
	}

	// qemu-io on a raw image lets others write, on a qcow2 image not; see /proc/locks.
	for _, c := range []struct {
		name, path string
		args       []string
		o          Options
		ok         bool
	}{
		{"qemu writes raw, we write", rawImg, []string{"-f", "raw"}, Options{}, false},
		{"qemu writes raw, we read", rawImg, []string{"-f", "raw"}, Options{ReadOnly: true}, false},
		{"qemu reads raw, we read", rawImg, []string{"-r", "-f", "raw"}, Options{ReadOnly: true}, true},
		{"qemu reads raw, we write", rawImg, []string{"-r", "-f", "raw"}, Options{}, true},
		{"qemu reads qcow2, we write", qcow2, []string{"-r", "-f", "qcow2"}, Options{}, false},
		{"qemu reads qcow2, we read", qcow2, []string{"-r", "-f", "qcow2"}, Options{ReadOnly: true}, true},
		{"qemu writes qcow2, we read", qcow2, []string{"-f", "qcow2"}, Options{ReadOnly: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			holdWithQEMU(t, append(c.args, c.path)...)
			n, err := Open(c.path, c.o)
			if c.ok != (err == nil) || err != nil && !errors.Is(err, ErrInUse) {
				t.Errorf("open: %v", err)
			}
			if err == nil {
				n.Close()
			}
		})
	}

	for _, c := range []struct {
		name, path string
		o          Options
		cmd        []string
		ok         bool
	}{
		{"we write raw, qemu writes", rawImg, Options{}, []string{"qemu-io", "-f", "raw", "-c", "length", rawImg}, false},
		{"we read raw, qemu writes", rawImg, Options{ReadOnly: true}, []string{"qemu-io", "-f", "raw", "-c", "length", rawImg}, false},
		{"we write raw, qemu converts", rawImg, Options{}, []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", rawImg, filepath.Join(dir, "copy")}, false},
		{"we read raw, qemu converts", rawImg, Options{ReadOnly: true}, []string{"qemu-img", "convert", "-f", "raw", "-O", "raw", rawImg, filepath.Join(dir, "copy")}, true},
		{"we write qcow2, qemu reads", qcow2, Options{}, []string{"qemu-io", "-r", "-f", "qcow2", "-c", "length", qcow2}, false},
		{"we write raw, qemu-img info looks", rawImg, Options{}, []string{"qemu-img", "info", "-f", "raw", rawImg}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := mustOpen(t, c.path, c.o)
			out, err := exec.Command(c.cmd[0], c.cmd[1:]...).CombinedOutput()
			if c.ok != (err == nil) || err != nil && !strings.Contains(string(out), "lock") {
				t.Errorf("%v: %v %s", c.cmd, err, out)
			}
			n.Close()
		})
	}
}
