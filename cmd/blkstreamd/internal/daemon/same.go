// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Whether two names stand for one storage, in part or whole. The locks of images do not know that a file is also a block
// device, nor that a device has several nodes, and a copy of a disk onto itself would put old blocks over new ones.

// storage tells files and block devices from each other.
type storage struct{ device, inode, number uint64 } // number is a block device's, which is known by that alone

// sameFile reports whether two paths name one file or device, by whatever links and nodes.
func sameFile(a, b string) bool {
	if a == b {
		return true
	}
	sa, oka := storageOf(a)
	sb, okb := storageOf(b)
	return oka && okb && sa == sb
}

// overlaps is sameFile, or one lies on the other: a loop device on its file, a partition on its disk, a mapped device on
// those that it is made of.
func overlaps(a, b string) bool {
	if a == b {
		return true
	}
	sa, oka := storageOf(a)
	sb, okb := storageOf(b)
	return oka && okb && (sa == sb || slices.Contains(below(b, sb), sa) || slices.Contains(below(a, sa), sb))
}

func storageOf(path string) (storage, bool) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return storage{}, false
	}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return storage{number: st.Rdev}, true
	}
	return storage{device: st.Dev, inode: st.Ino}, true
}

// below is what a device lies on, as far as the system tells.
func below(path string, s storage) []storage {
	if s.number == 0 {
		return nil
	}
	return append(backing(path), parts(s.number, 0)...)
}

// backing is the file of a loop device.
func backing(path string) []storage {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	loop, err := unix.IoctlLoopGetStatus64(fd)
	switch {
	case err != nil:
		return nil // another kind of device
	case loop.Rdevice != 0:
		return []storage{{number: loop.Rdevice}}
	default:
		return []storage{{device: loop.Device, inode: loop.Inode}}
	}
}

const maxBelow = 16 // devices on each other

// parts are the devices that a device is made of or is a part of.
func parts(number uint64, depth int) (all []storage) {
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(number), unix.Minor(number)))
	if err != nil || depth == maxBelow {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(dir, "slaves", "*", "dev")) // the pattern is good
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		files = append(files, filepath.Join(filepath.Dir(dir), "dev"))
	}
	for _, p := range files {
		var major, minor uint32
		text, err := os.ReadFile(p)
		if _, serr := fmt.Sscanf(strings.TrimSpace(string(text)), "%d:%d", &major, &minor); err != nil || serr != nil {
			continue
		}
		n := unix.Mkdev(major, minor)
		all = append(append(all, storage{number: n}), parts(n, depth+1)...)
	}
	return all
}
