// SPDX-License-Identifier: Apache-2.0

package addcow

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"strings"

	"github.com/blkstream/blkstream/blk"
)

// Errors of images that cannot be opened.
var (
	ErrFormat  = errors.New("not a valid add-cow file")
	ErrFeature = errors.New("feature not supported")
)

// Bounds of clusters. The largest is that of QEMU's implementation.
const (
	MinClusterSize     = 4 << 10
	MaxClusterSize     = 2 << 20
	DefaultClusterSize = 64 << 10
)

// CompatAllAllocated is the compatible feature bit 0: the image file holds everything. Bitmap and backing file are not
// looked at any more.
const CompatAllAllocated = 1

const (
	magic     = "ACOW"
	fixedSize = 76      // of the fields; the names come somewhere after them
	minHeader = 4 << 10 // the header is as long as a cluster, and at least this
	maxHeader = MaxClusterSize
	maxName   = 4095 // what Linux takes as a path
	maxFormat = 15   // a NUL comes behind it

	compatibleAt = 32 // offset of Header.Compatible
	// maxBitmap bounds the memory that an image may ask for: 32 TiB in clusters of 64 KiB, 1 PiB in the largest ones.
	maxBitmap = 64 << 20
)

// Header is the head of an add-cow file.
type Header struct {
	BackingFile   string // as it is in the file; empty: none
	BackingFormat string
	ImageFile     string
	ImageFormat   string
	ClusterBits   uint
	Features      uint64 // incompatible ones: none are known
	Compatible    uint64
	Size          int64 // bytes; the bitmap is behind it
}

// ClusterSize is what a bit stands for, in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// AllAllocated reports whether neither the bitmap nor the backing file is needed.
func (h *Header) AllAllocated() bool { return h.Compatible&CompatAllAllocated != 0 }

// ReadHeader reads the header and checks it, except that it does not look at what it names.
func ReadHeader(t *blk.Task, storage blk.Node) (*Header, error) {
	b := make([]byte, min(storage.Info().Size, maxHeader))
	if len(b) < fixedSize {
		return nil, invalid("%d bytes are less than a header", len(b))
	}
	// All of it at once: the first sector alone may be all that there is.
	if err := readAt(t, storage, b[:min(minHeader, len(b))], 0); err != nil {
		return nil, fmt.Errorf("read the header: %w", err)
	}
	size, err := checkFixed(b)
	if err != nil {
		return nil, err
	}
	if size > int64(len(b)) {
		return nil, invalid("a header of %d bytes in a file of %d", size, storage.Info().Size)
	}
	if size > minHeader {
		if err := readAt(t, storage, b[:size], 0); err != nil {
			return nil, fmt.Errorf("read the header: %w", err)
		}
	}
	return decode(b[:size])
}

func readAt(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

// checkFixed says how long the header is.
func checkFixed(b []byte) (int64, error) {
	if string(b[:4]) != magic {
		return 0, invalid("it does not begin with %q", magic)
	}
	if f := binary.LittleEndian.Uint64(b[24:]); f != 0 {
		var l []string
		for ; f != 0; f &= f - 1 {
			l = append(l, fmt.Sprint(bits.TrailingZeros64(f)))
		}
		return 0, fmt.Errorf("unknown incompatible feature, bit %s: %w", strings.Join(l, ", "), ErrFeature)
	}
	size := int64(binary.LittleEndian.Uint32(b[40:]))
	if size < minHeader || size > maxHeader || size%minHeader != 0 {
		return 0, invalid("a header of %d bytes", size)
	}
	return size, nil
}

// decode takes a whole header.
func decode(b []byte) (*Header, error) {
	le := binary.LittleEndian
	h := &Header{Features: le.Uint64(b[24:]), Compatible: le.Uint64(b[compatibleAt:]), Size: int64(len(b))}
	c := le.Uint32(b[20:])
	if c >= 63 || 1<<c < MinClusterSize || 1<<c > MaxClusterSize {
		return nil, invalid("clusters of %d bits, which is not from 4K to 2M", c)
	}
	h.ClusterBits = uint(c)
	var err error
	if h.BackingFile, err = name(b, "backing", le.Uint32(b[4:]), le.Uint32(b[8:])); err != nil {
		return nil, err
	}
	if h.ImageFile, err = name(b, "image", le.Uint32(b[12:]), le.Uint32(b[16:])); err != nil {
		return nil, err
	}
	if h.ImageFile == "" {
		return nil, invalid("it names no image file")
	}
	if h.ImageFile == h.BackingFile {
		return nil, invalid("%q is the image file and the backing file", h.ImageFile)
	}
	h.BackingFormat, h.ImageFormat = format(b[44:60]), format(b[60:76])
	if h.ImageFormat == "" {
		return nil, invalid("it does not name the image file's format")
	}
	return h, nil
}

// name takes a file name out of the header. Offset 0: there is none.
func name(b []byte, what string, off, l uint32) (string, error) {
	if off == 0 && l == 0 {
		return "", nil
	}
	if off < fixedSize || l == 0 || l > maxName || int64(off)+int64(l) > int64(len(b)) {
		return "", invalid("the %s file's name has %d bytes at offset %d of a header of %d", what, l, off, len(b))
	}
	return string(b[off : off+l]), nil
}

// format takes what comes before the first NUL. Up to V18 of the format a name of 16 bytes had none.
func format(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// encode is the header as far as it is not zeros.
func (h *Header) encode() ([]byte, error) {
	switch {
	case h.ImageFile == "" || h.ImageFormat == "" || (h.BackingFile == "") != (h.BackingFormat == ""):
		return nil, fmt.Errorf("a file without a format, or no image file: %w", blk.ErrInvalid)
	case len(h.ImageFile) > maxName || len(h.BackingFile) > maxName || fixedSize+int64(len(h.ImageFile)+len(h.BackingFile)) > h.Size:
		return nil, fmt.Errorf("file names of %d and %d bytes are too long for the header: %w", len(h.BackingFile), len(h.ImageFile), blk.ErrInvalid)
	case len(h.ImageFormat) > maxFormat || len(h.BackingFormat) > maxFormat:
		return nil, fmt.Errorf("formats %q and %q: at most %d bytes: %w", h.BackingFormat, h.ImageFormat, maxFormat, blk.ErrInvalid)
	case h.ImageFile == h.BackingFile:
		return nil, fmt.Errorf("%q cannot be the image file and the backing file: %w", h.ImageFile, blk.ErrInvalid)
	}
	b := make([]byte, fixedSize, fixedSize+len(h.BackingFile)+len(h.ImageFile))
	le := binary.LittleEndian
	copy(b, magic)
	put := func(at int, s string) {
		if s == "" {
			return
		}
		le.PutUint32(b[at:], uint32(len(b)))
		le.PutUint32(b[at+4:], uint32(len(s)))
		b = append(b, s...)
	}
	put(4, h.BackingFile)
	put(12, h.ImageFile)
	le.PutUint32(b[20:], uint32(h.ClusterBits))
	le.PutUint64(b[24:], h.Features)
	le.PutUint64(b[compatibleAt:], h.Compatible)
	le.PutUint32(b[40:], uint32(h.Size))
	copy(b[44:60], h.BackingFormat)
	copy(b[60:76], h.ImageFormat)
	return b, nil
}

// bitmapSize is how long the bitmap of a disk is in the file, in bytes: whole clusters.
func (h *Header) bitmapSize(disk int64) (int64, error) {
	clusters := up(disk, h.ClusterSize()) >> h.ClusterBits
	n := (clusters + 7) / 8
	if disk > 1<<62 || n > maxBitmap {
		return 0, fmt.Errorf("a bitmap of %d bytes for a disk of %d in clusters of %d: %w; take larger clusters",
			n, disk, h.ClusterSize(), ErrFeature)
	}
	return up(n, h.ClusterSize()), nil
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), ErrFormat)
}

// up rounds up to a multiple of align, a power of two.
func up(x, align int64) int64 { return (x + align - 1) &^ (align - 1) }
