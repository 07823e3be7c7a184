// SPDX-License-Identifier: Apache-2.0

package file

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
)

// What the package asks of the host, apart from I/O.

const (
	modePunch   = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	modeZero    = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
	modeReserve = unix.FALLOC_FL_KEEP_SIZE
)

// openHost opens a regular file or a block device and nothing else.
func openHost(path string, readOnly bool) (fd int, err error) {
	mode := unix.O_RDWR
	if readOnly {
		mode = unix.O_RDONLY
	}
	// O_NONBLOCK: a FIFO must not hold us up before we see what it is. It goes again below, for io_uring would
	// take it as a wish for EAGAIN.
	fd, err = retry(func() (int, error) {
		return unix.Open(path, mode|unix.O_CLOEXEC|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	})
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err != nil {
		return -1, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		if ro, err := unix.IoctlGetUint32(fd, unix.BLKROGET); !readOnly && err == nil && ro != 0 {
			return -1, unix.EROFS
		}
	default:
		return -1, errors.New("neither a regular file nor a block device")
	}
	return fd, setFlag(fd, unix.O_NONBLOCK, false)
}

func setFlag(fd, flag int, on bool) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	flags &^= flag
	if on {
		flags |= flag
	}
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
	return err
}

// sameHost reports whether two descriptors are of one file or block device.
func sameHost(a, b int) (bool, error) {
	var sa, sb unix.Stat_t
	if err := errors.Join(unix.Fstat(a, &sa), unix.Fstat(b, &sb)); err != nil {
		return false, err
	}
	if sa.Mode&unix.S_IFMT == unix.S_IFBLK && sb.Mode&unix.S_IFMT == unix.S_IFBLK {
		return sa.Rdev == sb.Rdev, nil // by whatever names
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino, nil
}

// hostSize is the size in bytes, and for a block device that of its sectors (0 for a regular file).
func hostSize(fd int) (size, sector int64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, 0, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		return st.Size, 0, nil
	}
	bytes, err := unix.IoctlGetInt(fd, unix.BLKGETSIZE64)
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the device's size: %w", err)
	}
	s, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET)
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the device's sector size: %w", err)
	}
	return int64(bytes), int64(s), nil
}

// inMemory reports whether the file lives in a file system that never waits for a device.
func inMemory(fd int) bool {
	var fs unix.Statfs_t
	err := unix.Fstatfs(fd, &fs)
	return err == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC)
}

// blockSize is the file system's, in bytes; one that is unlikely to be too small if it does not say.
func blockSize(fd int) int64 {
	const usual = 4096
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil || fs.Bsize < usual || fs.Bsize > maxPiece || fs.Bsize&(fs.Bsize-1) != 0 {
		return usual
	}
	return fs.Bsize
}

// errNoDirect says why there is no direct I/O.
type errNoDirect string

func (e errNoDirect) Error() string { return string(e) }

// setDirect switches direct I/O on and finds the alignment that it needs, in bytes. An errNoDirect leaves the file
// buffered. anySize: the file's last block need not be whole.
func setDirect(fd int, size, sector int64, anySize bool) (mem, off int64, err error) {
	if err := setFlag(fd, unix.O_DIRECT, true); err != nil {
		return 1, 1, errNoDirect("the file system does not support it")
	}
	mem, off, err = directAlign(fd, sector)
	switch {
	case err != nil:
	case mem <= 0 || off <= 0 || mem&(mem-1) != 0 || off&(off-1) != 0 || mem > blk.BufferAlign || off > maxPiece:
		err = errNoDirect(fmt.Sprintf("it would need an alignment of %d bytes in memory and %d in the file", mem, off))
	case size%off != 0 && !anySize:
		// The last block could only be written by making the file longer, and a raw disk with it.
		err = errNoDirect(fmt.Sprintf("the file's size is not a multiple of %d bytes", off))
	default:
		return mem, off, nil
	}
	if ferr := setFlag(fd, unix.O_DIRECT, false); ferr != nil {
		return 1, 1, ferr
	}
	return 1, 1, err
}

func directAlign(fd int, sector int64) (mem, off int64, err error) {
	var sx unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &sx)
	if err == nil && sx.Mask&unix.STATX_DIOALIGN != 0 {
		if sx.Dio_offset_align == 0 {
			return 0, 0, errNoDirect("the file system does not support it for this file")
		}
		return int64(sx.Dio_mem_align), int64(sx.Dio_offset_align), nil
	}
	if sector > 0 {
		return sector, sector, nil
	}
	return probeAlign(fd) // an older kernel
}

// probeAlign finds the alignment by reads: into memory that is aligned to their length and no more.
func probeAlign(fd int) (mem, off int64, err error) {
	buf := blk.GetBuffer(2 * blk.BufferAlign)
	defer buf.Free()
	for _, align := range []int64{512, 4096} {
		n, err := retry(func() (int, error) { return unix.Pread(fd, buf.B[align:2*align], 0) })
		switch {
		case err == nil && int64(n) == align:
			return align, align, nil
		case err == nil:
			// Too short a file to tell.
			return blk.BufferAlign, blk.BufferAlign, nil
		case !errors.Is(err, unix.EINVAL):
			return 0, 0, err
		}
	}
	return 0, 0, errNoDirect("the file system does not support it for this file")
}

// seekMap says whether off lies in data, and where that ends. Only positions are asked for: reads and writes do
// not use the descriptor's.
func seekMap(fd int, off, end int64) (data bool, next int64, err error) {
	at, err := unix.Seek(fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return false, end, nil // nothing but a hole up to the end
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP):
		return true, end, nil // the file system does not know
	case err != nil:
		return false, 0, err
	}
	// Sectors are the unit above. One that holds data in part is data.
	if at &^= blk.SectorSize - 1; at > off {
		return false, min(at, end), nil
	}
	at, err = unix.Seek(fd, off, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) {
		return true, end, nil // cut off in between
	}
	if err != nil {
		return false, 0, err
	}
	return true, min(up(max(at, off+1), blk.SectorSize), end), nil
}

func truncate(fd int, size int64) error {
	_, err := retry(func() (int, error) { return 0, unix.Ftruncate(fd, size) })
	return err
}

func closeHost(fd int) error { return unix.Close(fd) }

// Create makes an empty sparse file of size bytes. When it returns, the file and its name are on stable storage.
// It fails with fs.ErrExist if the name is taken.
func Create(path string, size int64) (err error) {
	if size < 0 {
		return fmt.Errorf("create image %q: %w", path, blk.ErrInvalid)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("create image %q: %w", path, err)
		}
	}()
	fd, err := retry(func() (int, error) {
		return unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, 0o644)
	})
	if err != nil {
		return err
	}
	err = truncate(fd, size)
	if err == nil {
		err = fsync(fd)
	}
	err = errors.Join(err, unix.Close(fd))
	if err == nil {
		err = SyncDir(path)
	}
	if err != nil {
		// A half-made image must not stay behind under its name.
		err = errors.Join(err, unix.Unlink(path))
	}
	return err
}

// SyncDir makes the entries of path's directory durable: call it after creating, renaming or removing path.
func SyncDir(path string) error {
	dir := filepath.Dir(path)
	fd, err := retry(func() (int, error) { return unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0) })
	if err != nil {
		return fmt.Errorf("open directory %q: %w", dir, err)
	}
	defer unix.Close(fd)
	if err := fsync(fd); err != nil {
		return fmt.Errorf("sync directory %q: %w", dir, err)
	}
	return nil
}

func fsync(fd int) error {
	_, err := retry(func() (int, error) { return 0, unix.Fsync(fd) })
	return err
}

func retry(fn func() (int, error)) (int, error) {
	for {
		n, err := fn()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
