// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

func dial(t *testing.T, path string) *client {
	t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return &client{t: t, c: c}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	if _, err := Listen(path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a live socket: %v", err)
	}
	l.SetUnlinkOnClose(false) // as if it had been killed
	l.Close()
	if l, err = Listen(path); err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	l.Close()
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path); err == nil {
		t.Error("a file was replaced")
	}
	if _, err := Listen(filepath.Join(path, "x")); err == nil {
		t.Error("not a directory")
	}
}

// TestListenAtOnce: of those who find a stale socket one takes its place, and none removes what another has put there.
func TestListenAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 100 {
		l, err := Listen(path)
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		got := make(chan *net.UnixListener, 4)
		for range cap(got) {
			go func() {
				l, err := Listen(path)
				if err != nil && !errors.Is(err, syscall.EADDRINUSE) {
					t.Error(err)
				}
				got <- l
			}()
		}
		n := 0
		for range cap(got) {
			if l := <-got; l != nil {
				n++
				defer l.Close()
				l.SetUnlinkOnClose(false)
			}
		}
		if n != 1 {
			t.Fatalf("%d listen", n)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
}

// TestListenLocked: who may open the directory cannot keep a daemon from starting.
func TestListenLocked(t *testing.T) {
	t.Parallel()
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := syscall.Flock(int(dir.Fd()), syscall.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(dir.Name(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestListenFull: a socket whose backlog is full is not stale.
func TestListenFull(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	dial(t, path)
	if _, err := Listen(path); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("got %v", err)
	}
}

// TestServe: front-ends are served one after the other, whatever they do, and the next one waits in the backlog.
func TestServe(t *testing.T) {
	check := noLeaks(t)
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	d := newFakeDevice(2)
	srv := NewServer(d, quiet(t))
	done := make(chan error, 1)
	go func() { done <- srv.ServeListener(context.Background(), l) }()
	g := newGuest(t)
	for i := range 20 {
		first, second := dial(t, path), dial(t, path)
		second.raw(reqGetQueueNum, flagVersion, nil)
		first.negotiate(testFeatures)
		first.set(reqAddMemReg, g.memReg(), g.fd)
		first.ring(g, 0, 64, 0)
		first.set(reqSetVringEnable, u32s(0, 1))
		first.sync()
		if d.queue(0) == nil {
			t.Fatal("no queue")
		}
		if err := second.c.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if _, err := second.c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("the second front-end is not waiting: %v", err)
		}
		if i%2 == 0 {
			first.bytes(make([]byte, headerSize)) // broken framing
		} else {
			first.c.Close()
		}
		if b, _ := second.reply(reqGetQueueNum); b[0] != 2 {
			t.Fatalf("reply %x", b)
		}
		if d.queue(0) != nil {
			t.Fatal("the first session's queue still runs")
		}
		first.c.Close()
		second.c.Close()
	}
	// Close ends a running session.
	c := dial(t, path)
	c.negotiate(testFeatures)
	c.set(reqAddMemReg, g.memReg(), g.fd)
	c.ring(g, 0, 64, 0)
	c.set(reqSetVringEnable, u32s(0, 1))
	c.sync()
	if err := srv.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if d.queue(0) != nil {
		t.Error("the queue still runs")
	}
	if err := srv.ServeListener(context.Background(), l); !errors.Is(err, ErrClosed) {
		t.Errorf("closed server: %v", err)
	}
	c.c.Close()
	for i := range g.kick {
		closeFD(g.kick[i])
		closeFD(g.call[i])
	}
	closeFD(g.fd)
	_ = syscall.Munmap(g.mem)
	check()
}

func TestServeContext(t *testing.T) {
	srv := NewServer(newFakeDevice(1), quiet(t))
	ctx, cancel := context.WithCancel(context.Background())
	l, err := Listen(filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 2)
	a, b := socketpair(t)
	defer a.Close()
	go func() { done <- srv.ServeListener(ctx, l) }()
	go func() { done <- srv.ServeConn(ctx, b) }() // waits for the slot, or has it
	cancel()
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
