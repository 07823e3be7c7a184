// SPDX-License-Identifier: Apache-2.0

package file

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrInUse: someone else has the image open in a way that does not go with ours.
var ErrInUse = errors.New("in use by another process")

// The locks are those of QEMU's file driver, so that QEMU, its tools and we keep each other out. Each permission on
// an image is a number i. Who uses it holds a shared lock on byte 100+i; who does not let others use it holds a
// shared lock on byte 200+i. All take their locks first and then look for those of others that forbid what they
// do: of two that come at once, both may fail, but never both succeed. The locks belong to the open file
// description: they end with it, and a second one of the same process conflicts as anyone's.
const (
	usedBase     = 100
	unsharedBase = 200

	permRead   = 0
	permWrite  = 1
	permResize = 3
)

// permissions are what a reader or a writer uses, and what both do not let others use.
func permissions(write bool) (used, unshared []int64) {
	used = []int64{permRead}
	if write {
		used = append(used, permWrite, permResize)
	}
	return used, []int64{permWrite, permResize}
}

// lockImage takes the locks of a reader or a writer. Both let others read and do not let them write or resize.
func lockImage(fd int, path string, write bool) error {
	if err := claimImage(fd, path, write); err != nil {
		return err
	}
	used, unshared := permissions(write)
	for _, p := range used {
		why := "it lets nobody else write"
		if p == permRead {
			why = "it lets nobody else read"
		}
		if err := checkLock(fd, path, unsharedBase+p, why); err != nil {
			return err
		}
	}
	for _, p := range unshared {
		if err := checkLock(fd, path, usedBase+p, "it may write there"); err != nil {
			return err
		}
	}
	return nil
}

// claimImage takes the locks and does not look for those of others. Who looks for ours gets out of the way from then on.
func claimImage(fd int, path string, write bool) error {
	used, unshared := permissions(write)
	for _, p := range used {
		if err := takeLock(fd, usedBase+p); err != nil {
			return fmt.Errorf("lock image %q: %w", path, err)
		}
	}
	for _, p := range unshared {
		if err := takeLock(fd, unsharedBase+p); err != nil {
			return fmt.Errorf("lock image %q: %w", path, err)
		}
	}
	return nil
}

func takeLock(fd int, at int64) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Start: at, Len: 1}
	return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l)
}

// unlockImage gives up all that lockImage takes, but for the right to read.
func unlockImage(fd int, path string) error {
	for _, at := range []int64{usedBase + permWrite, usedBase + permResize, unsharedBase + permWrite, unsharedBase + permResize} {
		l := unix.Flock_t{Type: unix.F_UNLCK, Start: at, Len: 1}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err != nil {
			return fmt.Errorf("unlock image %q: %w", path, err)
		}
	}
	return nil
}

// checkLock fails if anyone else has a lock on the byte: an exclusive one of ours could not be had.
func checkLock(fd int, path string, at int64, why string) error {
	l := unix.Flock_t{Type: unix.F_WRLCK, Start: at, Len: 1}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &l); err != nil {
		return fmt.Errorf("lock image %q: %w", path, err)
	}
	if l.Type != unix.F_UNLCK {
		return fmt.Errorf("image %q is %w (%s): is a virtual machine or another qemu or blkstream program using it?",
			path, ErrInUse, why)
	}
	return nil
}
