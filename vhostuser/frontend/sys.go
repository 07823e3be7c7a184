// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// memfd makes an anonymous shared file of size bytes (sparse, close-on-exec).
func memfd(name string, size uint64) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("frontend: memfd_create %s: %w", name, err)
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("frontend: size %s to %d bytes: %w", name, size, err)
	}
	return fd, nil
}

func eventfd() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("frontend: eventfd: %w", err)
	}
	return fd, nil
}

var eventOne = binary.NativeEndian.AppendUint64(nil, 1)

// signal adds one to an eventfd. It cannot fail short of a closed fd, which the caller excludes.
func signal(fd int) { _, _ = syscall.Write(fd, eventOne) }

// newWaiter makes an epoll descriptor that reports each signal to the eventfd. The trigger is the edge, so that nobody
// has to read the eventfd: sleeping and waking is one system call. A blocking read would be one as well, but QEMU
// makes the eventfds it gets non-blocking, for both sides.
func newWaiter(event int) (int, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("frontend: epoll: %w", err)
	}
	if err := unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, event, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("frontend: epoll: %w", err)
	}
	return fd, nil
}

// epollEvents is where await has its result put.
type epollEvents [1]unix.EpollEvent

// await sleeps until there was a signal since the last await. It may also return without one.
func await(waiter int, events *epollEvents) { _, _ = unix.EpollWait(waiter, events[:], -1) }

// socketPair makes a connected pair: a connection to keep and a bare fd to give away.
func socketPair() (*net.UnixConn, int, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, -1, fmt.Errorf("frontend: socketpair: %w", err)
	}
	f := os.NewFile(uintptr(p[0]), "backend-req")
	defer f.Close() // FileConn duplicates it
	c, err := net.FileConn(f)
	if err != nil {
		unix.Close(p[1])
		return nil, -1, fmt.Errorf("frontend: back-end channel: %w", err)
	}
	return c.(*net.UnixConn), p[1], nil
}

func mapShared(fd int, off int64, size int) ([]byte, error) {
	b, err := unix.Mmap(fd, off, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("frontend: map %d bytes: %w", size, err)
	}
	return b, nil
}

func unmap(b []byte) { _ = unix.Munmap(b) }
