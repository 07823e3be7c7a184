// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/virtq"
)

// closeFD closes fd unless it is -1. There is nothing to be done about an error: the descriptor is gone anyway.
func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// dupFD duplicates fd; -1: there is none, or no room for another one.
func dupFD(fd int) int {
	if fd < 0 {
		return -1
	}
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return n
}

// memfd creates shared memory of size bytes, all zero.
func memfd(name string, size int64) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("create memfd: %w", err)
	}
	if err := unix.Ftruncate(fd, size); err != nil {
		closeFD(fd)
		return -1, fmt.Errorf("size memfd to %d: %w", size, err)
	}
	return fd, nil
}

// checkFileSize says whether fd is a file (or a memfd) that has the bytes [off, off+size). The file can still be
// truncated later: touching the mapping then raises SIGBUS, which debug.SetPanicOnFault makes recoverable.
func checkFileSize(fd int, off, size uint64) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return errors.New("not a regular file")
	}
	if err := virtq.CheckFile(fd); err != nil {
		return err
	}
	if have := uint64(st.Size); off > have || size > have-off {
		return fmt.Errorf("[%#x, +%#x) is not within the file's %#x bytes", off, size, have)
	}
	return nil
}

// checkEvent refuses what cannot be a kick, call or error descriptor. The specification allows eventfds, whose mode
// has no file type, and pipes. A regular file would always be readable and have a queue spin on it.
func checkEvent(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if t := st.Mode & unix.S_IFMT; t != 0 && t != unix.S_IFIFO {
		return errors.New("neither an eventfd nor a pipe")
	}
	return nil
}

// checkStream refuses what is not a stream socket.
func checkStream(fd int) error {
	t, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return fmt.Errorf("not a socket: %w", err)
	}
	if t != unix.SOCK_STREAM {
		return errors.New("not a stream socket")
	}
	return nil
}

// maxState bounds the state of a device, below what any pipe holds.
const maxState = 4096

// prepareState makes a pipe or socket, over which a device's state goes, never wait. The front-end has the other end, so
// that the flag is of no consequence to it.
func prepareState(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("fstat: %w", err)
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFIFO && t != unix.S_IFSOCK {
		return errors.New("neither a pipe nor a socket")
	}
	return unix.SetNonblock(fd, true)
}

// writeState writes b, all at once or not.
func writeState(fd int, b []byte) error {
	n, err := unix.Write(fd, b)
	if err != nil {
		return fmt.Errorf("write the state: %w", err)
	}
	if n < len(b) {
		return errors.New("no room for the state")
	}
	return nil
}

// readState reads until the other end is closed, which it must be.
func readState(fd int) ([]byte, error) {
	b := make([]byte, 0, maxState+1)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case err == unix.EINTR:
		case err != nil:
			return nil, fmt.Errorf("read the state: %w", err)
		case n == 0:
			return b, nil
		case len(b)+n > maxState:
			return nil, fmt.Errorf("a state of more than %d bytes", maxState)
		default:
			b = b[:len(b)+n]
		}
	}
}

// signal adds one to an eventfd. It is skipped when the write would block: the other side then has a signal pending.
func signal(fd int) {
	if fd < 0 {
		return
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p, 0); n != 1 || err != nil || p[0].Revents&unix.POLLOUT == 0 {
		return
	}
	_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// sendNoWait sends b on a socket of whatever mode, without waiting for a peer that does not read.
func sendNoWait(fd int, b []byte) error {
	_, err := syscall.SendmsgN(fd, b, nil, nil, syscall.MSG_DONTWAIT|syscall.MSG_NOSIGNAL)
	return err
}
