// SPDX-License-Identifier: Apache-2.0

// Package file is the storage of an image on this host: a regular file or a block device.
//
// Reads and writes mostly do not come through here: TryMap gives the whole file as one extent, and whoever asked
// does the I/O. Do is for what does not fit. With direct I/O that is a buffer or an offset that is not aligned; it
// goes through an aligned buffer of our own. A write whose range is not aligned would have to read, change and write
// whole blocks, and bring back to life what a neighbour writes meanwhile. Therefore the user of the node promises an
// alignment (Options.Align). If the storage needs no more than that, no request needs a neighbour's bytes. If it
// needs more, every change comes through Do and holds a lock on the blocks that it touches, the
// aligned ones too, since they may share a block with an unaligned one.
package file

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/blkstream/blkstream/blk"
)

// Options of Open.
type Options struct {
	ReadOnly bool
	Direct   bool // bypass the host's page cache, if the storage can; see Node.Warnings
	NoSync   bool // ignore flushes: the data is lost when the host dies
	Unlocked bool // no locks that keep writers out until Lock
	// Claim is for who has the image open already and changes between reading and writing: all locks are taken, but
	// those of others are not looked for until Lock. So there is no moment at which a third one could come in.
	Claim bool
	Align int64 // every write and zeroing is a multiple of this many bytes, a power of two; 0 is 1
	// Grows: the file belongs to a format that makes it longer as it needs, so its length means nothing: it is filled
	// up to whole blocks for direct I/O (of a file that is only read, zeros show there).
	Grows bool
}

// Node is an open file or block device, locked against other writers as QEMU does it.
type Node struct {
	host     blk.HostFile
	info     atomic.Pointer[blk.Info] // replaced by Resize and Refresh while requests run
	warnings []string
	closed   atomic.Bool

	device bool
	// sector is the unit of fallocate, bytes: a block device's sector, 1 for a regular file. With direct I/O it is the file
	// system's block: it zeroes parts of blocks through the page cache, and a direct write that meets such a page makes the
	// kernel say EIO to the next flush.
	sector  int64
	promise int64 // Options.Align
	grows   bool  // Options.Grows

	// blocks is taken, if shared, for the aligned envelope of every change: blocks of the storage are larger than
	// what users write, so two of them may meet in one.
	shared bool
	blocks blk.RangeLock

	sizes     blk.RangeLock // one Resize at a time
	noPunch   atomic.Bool   // the storage cannot punch holes
	noZero    atomic.Bool   // the storage cannot zero ranges
	noReserve atomic.Bool   // the storage cannot allocate room beforehand
}

// maxPiece bounds the memory that a request needs here, and the size of its host operations then, in bytes.
const maxPiece = 1 << 20

var (
	errPromise = fmt.Errorf("not a multiple of the alignment that was promised: %w", blk.ErrInvalid)
	zeros      = sync.OnceValue(func() []byte {
		b := blk.GetBuffer(maxPiece).B
		clear(b)
		return b
	})
)

// Open opens an existing image file or device and locks it. It fails with ErrInUse if another process, or another
// node of this one, uses it in a way that conflicts.
func Open(path string, o Options) (*Node, error) {
	fd, err := openHost(path, o.ReadOnly)
	if err != nil {
		return nil, fmt.Errorf("open image %q: %w", path, err)
	}
	n := &Node{
		host:    blk.HostFile{Fd: fd, Path: path, MemAlign: 1, OffAlign: 1, NoSync: o.NoSync},
		sector:  1,
		promise: max(o.Align, 1),
		grows:   o.Grows,
	}
	if err := n.setup(o); err != nil {
		return nil, errors.Join(err, closeHost(fd))
	}
	return n, nil
}

func (n *Node) setup(o Options) error {
	path := n.host.Path
	if o.Align < 0 || bits.OnesCount64(uint64(n.promise)) != 1 {
		return fmt.Errorf("open image %q: alignment %d: %w", path, o.Align, blk.ErrInvalid)
	}
	switch {
	case o.Claim:
		if err := claimImage(n.host.Fd, path, !o.ReadOnly); err != nil {
			return err
		}
	case o.Unlocked:
		if err := takeLock(n.host.Fd, usedBase+permRead); err != nil {
			return fmt.Errorf("lock image %q: %w", path, err)
		}
	default:
		if err := lockImage(n.host.Fd, path, !o.ReadOnly); err != nil {
			return err
		}
	}
	size, sector, err := hostSize(n.host.Fd)
	if err != nil {
		return fmt.Errorf("open image %q: %w", path, err)
	}
	if sector > 0 {
		n.device, n.sector = true, sector
	} else {
		n.host.Inline = inMemory(n.host.Fd)
	}
	if o.Direct {
		mem, off, err := setDirect(n.host.Fd, size, sector, o.Grows)
		var no errNoDirect
		switch {
		case errors.As(err, &no):
			n.warnings = append(n.warnings, fmt.Sprintf("image %q: no direct I/O, using the page cache: %v", path, no))
		case err != nil:
			return fmt.Errorf("open image %q for direct I/O: %w", path, err)
		default:
			n.host.Direct, n.host.MemAlign, n.host.OffAlign = true, int(mem), int(off)
			if !n.device {
				n.sector = blockSize(n.host.Fd)
			}
		}
	}
	if o.Grows && !n.device {
		whole := up(size, max(blk.SectorSize, int64(n.host.OffAlign), n.sector))
		if whole != size && !o.ReadOnly {
			if err := truncate(n.host.Fd, whole); err != nil {
				return fmt.Errorf("make image %q %d bytes long: %w", path, whole, err)
			}
		}
		size = whole
	}
	if size%blk.SectorSize != 0 {
		n.warnings = append(n.warnings, fmt.Sprintf(
			"image %q: its size of %d bytes is not a multiple of %d; the last sector is filled up with zeros",
			path, size, blk.SectorSize))
	}
	n.shared = int64(n.host.OffAlign) > n.promise
	n.info.Store(&blk.Info{
		Name:     path,
		Kind:     "file",
		Size:     up(size, blk.SectorSize),
		ReadOnly: o.ReadOnly,
		Align:    int64(n.host.OffAlign),
		Discard:  !o.ReadOnly,
	})
	return nil
}

// Lock takes the locks that Unlock gave up, or that Options.Unlocked or Options.Claim left out. After an error (ErrInUse:
// somebody else has them) there are none, and nobody may write through the node.
func (n *Node) Lock() error {
	err := lockImage(n.host.Fd, n.host.Path, !n.Info().ReadOnly)
	if err != nil {
		err = errors.Join(err, n.Unlock())
	}
	return err
}

// Claim takes the locks and does not look for those of others: see Options.Claim.
func (n *Node) Claim() error { return claimImage(n.host.Fd, n.host.Path, !n.Info().ReadOnly) }

// Unlock lets others open the image for writing. Nobody may write through the node until Lock.
func (n *Node) Unlock() error { return unlockImage(n.host.Fd, n.host.Path) }

// Same reports whether both are open on one file or device, whatever their paths lead to now.
func (n *Node) Same(o *Node) (bool, error) { return sameHost(n.host.Fd, o.host.Fd) }

// Warnings says what the user should know about the image that is not an error.
func (n *Node) Warnings() []string { return n.warnings }

// Info describes the file. Its size is rounded up to whole sectors; what the file lacks of the last one reads as
// zeros, and a write there makes the file longer.
func (n *Node) Info() *blk.Info { return n.info.Load() }

// TryMap gives the range in the file itself. The caller checks that its buffers fit the file (HostFile.Fits).
func (n *Node) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	switch op {
	case blk.OpFlush:
		return blk.Extent{Host: &n.host}, true
	case blk.OpRead, blk.OpWrite:
	default:
		return blk.Extent{}, false
	}
	in := n.info.Load()
	if off < 0 || l <= 0 || off >= in.Size || op == blk.OpWrite && !n.inPlace(in) {
		return blk.Extent{}, false
	}
	return n.extent(in, off, min(l, in.Size-off)), true
}

// inPlace reports whether others may write into the file by themselves.
func (n *Node) inPlace(in *blk.Info) bool { return !in.ReadOnly && !n.shared }

func (n *Node) extent(in *blk.Info, off, l int64) blk.Extent {
	return blk.Extent{Len: l, State: blk.Data, Writable: n.inPlace(in), Host: &n.host, HostOff: off}
}

// Map finds the holes of a regular file. That can take long in a fragmented one, so it never happens on a queue's
// thread. What is written meanwhile may or may not show.
func (n *Node) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	in := n.info.Load()
	if off < 0 || l <= 0 || off >= in.Size {
		return blk.Extent{}, blk.ErrRange
	}
	l = min(l, in.Size-off)
	if n.device {
		return n.extent(in, off, l), nil
	}
	var (
		data bool
		next int64
	)
	err := t.Off(func() (err error) {
		data, next, err = seekMap(n.host.Fd, off, off+l)
		return err
	})
	if err != nil {
		return blk.Extent{}, fmt.Errorf("image %q: look for holes at offset %d: %w", n.host.Path, off, err)
	}
	if !data {
		return blk.Extent{Len: next - off, State: blk.Zero}, nil
	}
	return n.extent(in, off, next-off), nil
}

// Do carries out the request.
func (n *Node) Do(t *blk.Task, r *blk.Request) error {
	fua := r.Flags&blk.FUA != 0
	switch r.Op {
	case blk.OpRead:
		return n.read(t, r.Data, r.Off)
	case blk.OpWrite:
		return n.alone(t, r.Off, r.Len, func() error { return n.write(t, r.Data, r.Off, fua) })
	case blk.OpFlush:
		return t.Sync(&n.host)
	case blk.OpDiscard:
		// Whole blocks only: the rest of a block is a neighbour's, and old contents are fine.
		unit := max(n.sector, int64(n.host.OffAlign))
		lo, hi := up(r.Off, unit), down(r.Off+r.Len, unit)
		if lo >= hi {
			return nil
		}
		return n.alone(t, lo, hi-lo, func() error { return n.synced(t, fua, n.discard(t, lo, hi-lo)) })
	case blk.OpWriteZeroes:
		return n.alone(t, r.Off, r.Len, func() error {
			return n.synced(t, fua, n.zero(t, r.Off, r.Len, r.Flags&blk.Unmap != 0))
		})
	default:
		return blk.ErrNotSupported
	}
}

// synced makes a change durable that went well, if fua asks for it.
func (n *Node) synced(t *blk.Task, fua bool, err error) error {
	if err != nil || !fua {
		return err
	}
	return t.Sync(&n.host)
}

// alone runs fn, which changes [off, off+l), while nobody changes the same blocks of the storage.
func (n *Node) alone(t *blk.Task, off, l int64, fn func() error) error {
	a := int64(n.host.OffAlign)
	if !n.shared {
		if (off|l)&(a-1) != 0 {
			return errPromise
		}
		return fn()
	}
	lo := down(off, a)
	held := n.blocks.Lock(t, lo, up(off+l, a)-lo)
	defer n.blocks.Unlock(held)
	return fn()
}

func (n *Node) read(t *blk.Task, v blk.Vec, off int64) error {
	if n.host.Fits(off, v) {
		return t.ReadAt(&n.host, v, off)
	}
	return n.bounce(off, v.Len(), func(b []byte, lo, from, to int64) error {
		if err := t.ReadAt(&n.host, blk.BytesVec(nil, b), lo); err != nil {
			return err
		}
		v.AppendSlice(nil, from-off, to-from).CopyFrom(b[from-lo:])
		return nil
	})
}

// write needs no alignment if the caller has the blocks to itself.
func (n *Node) write(t *blk.Task, v blk.Vec, off int64, fua bool) error {
	if n.host.Fits(off, v) {
		return t.WriteAt(&n.host, v, off, fua)
	}
	a := int64(n.host.OffAlign)
	return n.bounce(off, v.Len(), func(b []byte, lo, from, to int64) error {
		first, last := b[:a], b[int64(len(b))-a:]
		if from > lo {
			if err := t.ReadAt(&n.host, blk.BytesVec(nil, first), lo); err != nil {
				return err
			}
		}
		if hi := lo + int64(len(b)); to < hi && (from == lo || int64(len(b)) > a) {
			if err := t.ReadAt(&n.host, blk.BytesVec(nil, last), hi-a); err != nil {
				return err
			}
		}
		v.AppendSlice(nil, from-off, to-from).CopyTo(b[from-lo:])
		return t.WriteAt(&n.host, blk.BytesVec(nil, b), lo, fua)
	})
}

// bounce calls fn for the pieces [from, to) of [off, off+l), with a buffer for the aligned blocks around each, which
// begin at lo.
func (n *Node) bounce(off, l int64, fn func(b []byte, lo, from, to int64) error) error {
	a := int64(n.host.OffAlign)
	end := off + l
	buf := blk.GetBuffer(int(min(up(end, a)-down(off, a), maxPiece)))
	defer buf.Free()
	for from := off; from < end; {
		lo := down(from, a)
		hi := min(lo+maxPiece, up(end, a))
		to := min(hi, end)
		if err := fn(buf.B[:hi-lo], lo, from, to); err != nil {
			return err
		}
		from = to
	}
	return nil
}

func (n *Node) discard(t *blk.Task, off, l int64) error {
	_, err := n.fallocate(t, &n.noPunch, modePunch, off, l)
	return err
}

// zero lets the storage do it as far as it can, and writes zeros otherwise.
func (n *Node) zero(t *blk.Task, off, l int64, unmap bool) error {
	lo, hi := up(off, n.sector), down(off+l, n.sector)
	if lo >= hi {
		return n.writeZeros(t, off, l)
	}
	var (
		done bool
		err  error
	)
	if unmap {
		done, err = n.fallocate(t, &n.noPunch, modePunch, lo, hi-lo)
	}
	if !done && err == nil {
		done, err = n.fallocate(t, &n.noZero, modeZero, lo, hi-lo)
	}
	if err != nil {
		return err
	}
	if !done {
		return n.writeZeros(t, off, l)
	}
	if err := n.writeZeros(t, off, lo-off); err != nil {
		return err
	}
	return n.writeZeros(t, hi, off+l-hi)
}

// Reserve allocates room on the storage for the whole blocks in [off, off+l), which lies within Info.Size, where there
// is none. They hold what they held. What cannot do it is left as it is.
func (n *Node) Reserve(t *blk.Task, off, l int64) error {
	lo, hi := up(off, n.sector), down(off+l, n.sector)
	if lo >= hi || n.device {
		return nil
	}
	_, err := n.fallocate(t, &n.noReserve, modeReserve, lo, hi-lo)
	return err
}

// fallocate reports whether the storage can do it, and remembers if not.
func (n *Node) fallocate(t *blk.Task, cannot *atomic.Bool, mode uint32, off, l int64) (bool, error) {
	if cannot.Load() {
		return false, nil
	}
	err := t.Fallocate(&n.host, mode, off, l)
	if errors.Is(err, syscall.EOPNOTSUPP) || errors.Is(err, syscall.ENOSYS) {
		cannot.Store(true)
		return false, nil
	}
	return err == nil, err
}

func (n *Node) writeZeros(t *blk.Task, off, l int64) error {
	for end := off + l; off < end; {
		// Pieces end at multiples of their size, so that only the first and the last may be unaligned.
		to := min(down(off, maxPiece)+maxPiece, end)
		if err := n.write(t, blk.BytesVec(nil, zeros()[:to-off]), off, false); err != nil {
			return err
		}
		off = to
	}
	return nil
}

// Resize makes a regular file size bytes long, a multiple of blk.SectorSize and, with direct I/O, of Info.Align. New
// space reads as zeros. The next flush makes the new size durable. It only makes the file shorter if shrink is
// set, and then nobody may use the part that goes.
func (n *Node) Resize(t *blk.Task, size int64, shrink bool) error {
	defer n.sizes.Unlock(n.sizes.Lock(t, 0, 1))
	in := *n.info.Load()
	unit := max(blk.SectorSize, int64(n.host.OffAlign))
	switch {
	case n.device:
		return fmt.Errorf("resize %q: a block device: %w", in.Name, blk.ErrNotSupported)
	case in.ReadOnly:
		return fmt.Errorf("resize %q: %w", in.Name, blk.ErrReadOnly)
	case size < 0 || size%unit != 0:
		return fmt.Errorf("resize %q to %d bytes, not a multiple of %d: %w", in.Name, size, unit, blk.ErrInvalid)
	case size < in.Size && !shrink:
		return fmt.Errorf("resize %q to %d bytes, less than the %d it has: %w", in.Name, size, in.Size, blk.ErrInvalid)
	}
	length := size
	if n.grows { // whole blocks: the file system zeroes the rest of one through the page cache; see sector
		length = up(size, n.sector)
	}
	if err := t.Off(func() error { return truncate(n.host.Fd, length) }); err != nil {
		return fmt.Errorf("resize %q to %d bytes: %w", in.Name, size, err)
	}
	in.Size = size
	n.info.Store(&in)
	return nil
}

// Refresh takes over the size that a block device has now. Nobody may use a part that has gone.
func (n *Node) Refresh() error {
	if !n.device {
		return nil
	}
	size, _, err := hostSize(n.host.Fd)
	if err != nil {
		return fmt.Errorf("refresh %q: %w", n.host.Path, err)
	}
	in := *n.info.Load()
	in.Size = size
	n.info.Store(&in)
	return nil
}

// Children: there are none.
func (n *Node) Children() []blk.Node { return nil }

// Close closes the file and gives up its locks. It does not flush.
func (n *Node) Close() error {
	if n.closed.Swap(true) {
		return blk.ErrClosed
	}
	return closeHost(n.host.Fd)
}

// up and down round to a multiple of align, a power of two.
func up(x, align int64) int64   { return (x + align - 1) &^ (align - 1) }
func down(x, align int64) int64 { return x &^ (align - 1) }
