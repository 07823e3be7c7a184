// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/blkstream/blkstream/blk"
)

// The header lies in the first cluster: fixed fields, extensions, and usually the name of the backing file behind
// them. Names of sections are those of the format's specification.

const magic = 0x514649fb // "QFI\xfb"

// Limits. Those on tables and names are QEMU's, so that it opens every image of ours.
const (
	MinClusterBits   = 9
	MaxClusterBits   = 21
	maxL1Bytes       = 32 << 20
	maxRefTableBytes = 8 << 20
	maxBackingName   = 1023
	maxSnapshots     = 65536
	maxBitmaps       = 65535
	maxDirectory     = 64 << 20 // bytes of the snapshot table, and of the bitmap directory
)

// Incompatible features: who does not know one must not open the image.
const (
	IncompatDirty       = 1 << 0 // reference counts may be wrong
	IncompatCorrupt     = 1 << 1 // any structure may be wrong: not to be written
	IncompatDataFile    = 1 << 2 // guest data is in another file
	IncompatCompression = 1 << 3 // Header.Compression is not 0
	IncompatExtendedL2  = 1 << 4 // subclusters

	incompatKnown = IncompatDirty | IncompatCorrupt | IncompatDataFile | IncompatCompression | IncompatExtendedL2
)

// Compatible features: who does not know one may ignore it.
const CompatLazyRefcounts = 1 << 0

// Autoclear features: who does not know one clears it before writing.
const (
	AutoclearBitmaps = 1 << 0 // the bitmaps extension is consistent
	AutoclearDataRaw = 1 << 1 // the data file is a raw image by itself

	autoclearKnown = AutoclearBitmaps | AutoclearDataRaw
)

// Types of header extensions.
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extBitmaps       = 0x23852875
	extEncryption    = 0x0537be77
	extDataFile      = 0x44415441
)

// Compression types.
const (
	CompressionDeflate = 0
	CompressionZstd    = 1
)

// Lengths of the fixed fields, in bytes.
const (
	headerLenV2 = 72
	headerLenV3 = 104
)

// Header is the parsed first cluster of an image. Offsets and sizes are in bytes.
type Header struct {
	Version              uint32
	ClusterBits          uint
	Size                 int64 // of the virtual disk, as stored: perhaps not whole sectors
	Crypt                uint32
	L1Size               uint32 // entries
	L1Offset             int64
	RefTableOffset       int64
	RefTableClusters     uint32
	SnapshotCount        uint32
	SnapshotsOffset      int64
	Incompatible         uint64
	Compatible           uint64
	Autoclear            uint64
	RefcountOrder        uint // log2 of the bits of a reference count
	Compression          uint8
	BackingFile          string
	BackingFormat        string
	DataFile             string
	Bitmaps              BitmapsExtension // all zero: the image has none
	Extensions           []Extension      // all others, in the image's order, the feature names too
	more                 []byte           // fields behind Compression that we do not know
	backingOff           int64            // where storedName is stored, 0: nowhere
	storedName           string           // the backing file's name in the image
	storedEnd            int64            // where the extensions end in the image
	hasDataFileExtension bool
}

// Extension is a header extension that is kept as it is.
type Extension struct {
	Type uint32
	Data []byte
}

// BitmapsExtension says where the directory of persistent bitmaps lies.
type BitmapsExtension struct {
	Count           uint32
	DirectorySize   int64
	DirectoryOffset int64
}

// Errors by which an image is refused.
var (
	ErrFormat    = errors.New("not a valid qcow2 image")
	ErrFeature   = errors.New("feature not supported")
	ErrEncrypted = fmt.Errorf("encryption: %w", ErrFeature)
	ErrCorrupt   = errors.New("the image is marked corrupt: it can only be read until it is repaired")
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// ReadHeader reads and checks the header. An image that it returns has nothing in the header that we do not know how
// to handle.
func ReadHeader(t *blk.Task, storage blk.Node) (*Header, error) {
	size := storage.Info().Size
	n := min(size, 1<<MaxClusterBits)
	if n < blk.SectorSize {
		return nil, invalid("the file has %d bytes", size)
	}
	// The first piece says how much there is.
	first := blk.GetBuffer(int(min(n, blk.BufferAlign)))
	defer first.Free()
	if err := readFull(t, storage, first.B, 0); err != nil {
		return nil, fmt.Errorf("qcow2: read header: %w", err)
	}
	if binary.BigEndian.Uint32(first.B) != magic {
		return nil, invalid("it begins with another magic number")
	}
	bits := binary.BigEndian.Uint32(first.B[20:])
	if bits < MinClusterBits || bits > MaxClusterBits {
		return nil, invalid("cluster_bits %d", bits)
	}
	n = min(n, 1<<bits)
	buf := blk.GetBuffer(int(n))
	defer buf.Free()
	if err := readFull(t, storage, buf.B, 0); err != nil {
		return nil, fmt.Errorf("qcow2: read header: %w", err)
	}
	return ParseHeader(buf.B, size)
}

func readFull(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

// ParseHeader parses the first cluster of an image whose file has the given size. It does not keep b.
func ParseHeader(b []byte, fileSize int64) (*Header, error) {
	be := binary.BigEndian
	if len(b) < headerLenV2 || be.Uint32(b) != magic {
		return nil, invalid("no header")
	}
	h := &Header{
		Version:          be.Uint32(b[4:]),
		backingOff:       int64(be.Uint64(b[8:])),
		ClusterBits:      uint(be.Uint32(b[20:])),
		Size:             int64(be.Uint64(b[24:])),
		Crypt:            be.Uint32(b[32:]),
		L1Size:           be.Uint32(b[36:]),
		L1Offset:         int64(be.Uint64(b[40:])),
		RefTableOffset:   int64(be.Uint64(b[48:])),
		RefTableClusters: be.Uint32(b[56:]),
		SnapshotCount:    be.Uint32(b[60:]),
		SnapshotsOffset:  int64(be.Uint64(b[64:])),
		RefcountOrder:    4,
	}
	length := headerLenV2
	switch h.Version {
	case 2:
	case 3:
		if len(b) < headerLenV3 {
			return nil, invalid("the header is cut off")
		}
		h.Incompatible = be.Uint64(b[72:])
		h.Compatible = be.Uint64(b[80:])
		h.Autoclear = be.Uint64(b[88:])
		h.RefcountOrder = uint(be.Uint32(b[96:]))
		l := be.Uint32(b[100:])
		if l < headerLenV3 || l%8 != 0 || int64(l) > int64(len(b)) {
			return nil, invalid("header_length %d", l)
		}
		length = int(l)
		if length > headerLenV3 {
			h.Compression = b[104]
			h.more = bytes.Clone(b[105:length])
		}
	default:
		return nil, fmt.Errorf("qcow2 version %d: %w", h.Version, ErrFeature)
	}
	if h.ClusterBits < MinClusterBits || h.ClusterBits > MaxClusterBits {
		return nil, invalid("cluster_bits %d", h.ClusterBits)
	}
	b = b[:min(int64(len(b)), h.ClusterSize())]
	nameLen := int64(be.Uint32(b[16:]))
	end := int64(len(b))
	if h.backingOff != 0 {
		if nameLen > maxBackingName || h.backingOff < 0 || h.backingOff > int64(len(b))-nameLen {
			return nil, invalid("backing file name of %d bytes at %#x", nameLen, h.backingOff)
		}
		h.BackingFile = string(b[h.backingOff : h.backingOff+nameLen])
		h.storedName = h.BackingFile
		if h.backingOff >= int64(length) {
			end = h.backingOff
		}
	}
	rest, err := h.parseExtensions(b[length:end])
	if err != nil {
		return nil, err
	}
	h.storedEnd = end - int64(len(rest))
	if err := h.check(fileSize); err != nil {
		return nil, err
	}
	return h, nil
}

// parseExtensions returns what is behind them.
func (h *Header) parseExtensions(b []byte) (rest []byte, err error) {
	be := binary.BigEndian
	for len(b) >= 8 {
		kind, n := be.Uint32(b), int64(be.Uint32(b[4:]))
		b = b[8:]
		if kind == extEnd {
			return b, nil
		}
		if n > int64(len(b)) {
			return nil, invalid("header extension %#x of %d bytes", kind, n)
		}
		data := b[:n]
		b = b[min((n+7)&^7, int64(len(b))):]
		switch kind {
		case extBackingFormat:
			h.BackingFormat = string(data)
		case extDataFile:
			h.DataFile, h.hasDataFileExtension = string(data), true
		case extBitmaps:
			if h.Autoclear&AutoclearBitmaps == 0 {
				continue // out of date: what it points to may be anything by now. As QEMU, we forget it.
			}
			if n != 24 {
				return nil, invalid("bitmaps extension of %d bytes", n)
			}
			h.Bitmaps = BitmapsExtension{be.Uint32(data), int64(be.Uint64(data[8:])), int64(be.Uint64(data[16:]))}
			if h.Bitmaps.Count == 0 || h.Bitmaps.Count > maxBitmaps {
				return nil, invalid("bitmaps extension with %d bitmaps", h.Bitmaps.Count)
			}
		default:
			h.Extensions = append(h.Extensions, Extension{kind, bytes.Clone(data)})
		}
	}
	return b, nil
}

// check refuses what we cannot handle or what would make us use unreasonable amounts of memory.
func (h *Header) check(fileSize int64) error {
	if unknown := h.Incompatible &^ incompatKnown; unknown != 0 {
		return fmt.Errorf("the image needs %s: %w", h.featureNames(0, unknown), ErrFeature)
	}
	switch h.Crypt {
	case 0:
	case 1:
		return fmt.Errorf("AES %w", ErrEncrypted)
	case 2:
		return fmt.Errorf("LUKS %w", ErrEncrypted)
	default:
		return fmt.Errorf("method %d of %w", h.Crypt, ErrEncrypted)
	}
	if h.RefcountOrder > 6 {
		return invalid("refcount_order %d", h.RefcountOrder)
	}
	if (h.Compression != 0) != (h.Incompatible&IncompatCompression != 0) {
		return invalid("compression type %d against the feature bit", h.Compression)
	}
	if h.Compression > CompressionZstd {
		return fmt.Errorf("compression type %d: %w", h.Compression, ErrFeature)
	}
	if h.ExtendedL2() && h.ClusterBits < 14 {
		return invalid("subclusters in clusters of %d bytes", h.ClusterSize())
	}
	if h.hasDataFile() && h.SnapshotCount > 0 {
		return invalid("internal snapshots with an external data file")
	}
	if h.dataFileRaw() && !h.hasDataFile() {
		return invalid("a raw external data file without the data file's feature bit")
	}
	if h.dataFileRaw() && h.BackingFile != "" {
		return invalid("a raw external data file and a backing file")
	}
	if h.Autoclear&AutoclearBitmaps != 0 && h.Bitmaps.Count == 0 {
		return invalid("the bitmaps' feature bit without their extension")
	}
	// Whatever is behind a table that lies beyond the end of the file would be made up.
	end := roundUp(fileSize, h.ClusterSize())
	for _, r := range []struct {
		what        string
		off, n, max int64
	}{
		{"L1 table", h.L1Offset, int64(h.L1Size) * 8, maxL1Bytes},
		{"refcount table", h.RefTableOffset, int64(h.RefTableClusters) << h.ClusterBits, maxRefTableBytes},
		{"snapshot table", h.SnapshotsOffset, int64(h.SnapshotCount) * 40, maxDirectory},
		{"bitmap directory", h.Bitmaps.DirectoryOffset, h.Bitmaps.DirectorySize, maxDirectory},
	} {
		if r.n == 0 {
			continue
		}
		if r.n < 0 || r.n > r.max || r.off < h.ClusterSize() || r.off&(h.ClusterSize()-1) != 0 || r.off > end-r.n {
			return invalid("%s of %d bytes at %#x", r.what, r.n, r.off)
		}
	}
	switch {
	case h.SnapshotCount > maxSnapshots:
		return invalid("%d snapshots", h.SnapshotCount)
	case h.RefTableClusters == 0:
		return invalid("no refcount table")
	case h.Size < 0 || h.Size > int64(h.L1Size)<<h.l1Shift():
		return invalid("an L1 table of %d entries for %d bytes", h.L1Size, h.Size)
	}
	return nil
}

// featureNames names the bits of a feature field: kind 0 incompatible, 1 compatible, 2 autoclear.
func (h *Header) featureNames(kind uint8, set uint64) string {
	var s string
	for set != 0 {
		bit := bits.TrailingZeros64(set)
		set &= set - 1
		if s != "" {
			s += ", "
		}
		s += h.featureName(kind, uint8(bit))
	}
	return s
}

func (h *Header) featureName(kind, bit uint8) string {
	for _, e := range h.Extensions {
		if e.Type != extFeatureNames {
			continue
		}
		for d := e.Data; len(d) >= 48; d = d[48:] {
			if d[0] == kind && d[1] == bit {
				return fmt.Sprintf("%q (bit %d)", bytes.TrimRight(d[2:48], "\x00"), bit)
			}
		}
	}
	return fmt.Sprintf("an unnamed feature (bit %d)", bit)
}

// knownFeatures is what goes into the feature name table of images that we make.
var knownFeatures = []struct {
	kind, bit uint8
	name      string
}{
	{0, 0, "dirty bit"},
	{0, 1, "corrupt bit"},
	{0, 2, "external data file"},
	{0, 3, "compression type"},
	{0, 4, "extended L2 entries"},
	{1, 0, "lazy refcounts"},
	{2, 0, "bitmaps"},
	{2, 1, "raw external data"},
}

// FeatureNames is the feature name table for a new image.
func FeatureNames() Extension {
	var d []byte
	for _, f := range knownFeatures {
		var e [48]byte
		e[0], e[1] = f.kind, f.bit
		copy(e[2:], f.name)
		d = append(d, e[:]...)
	}
	return Extension{extFeatureNames, d}
}

// encode returns the fixed fields with the extensions, and the backing file's name, which is to be stored at the
// offset nameOff. The name overlaps nothing that counts before if there is room, nor the first sector unless all fits
// there: writing the name first and the first sector last then changes both at once. What can change and what nobody
// else knows comes first, so that it is usually in that sector; the feature names, which nobody needs, come last.
func (h *Header) encode() (head, name []byte, nameOff int64, err error) {
	be := binary.BigEndian
	length := headerLenV2
	if h.Version >= 3 {
		length = headerLenV3
		if h.Compression != 0 || len(h.more) > 0 {
			length = int(roundUp(int64(105+len(h.more)), 8))
		}
	}
	head = make([]byte, length)
	be.PutUint32(head, magic)
	be.PutUint32(head[4:], h.Version)
	be.PutUint32(head[20:], uint32(h.ClusterBits))
	be.PutUint64(head[24:], uint64(h.Size))
	be.PutUint32(head[32:], h.Crypt)
	be.PutUint32(head[36:], h.L1Size)
	be.PutUint64(head[40:], uint64(h.L1Offset))
	be.PutUint64(head[48:], uint64(h.RefTableOffset))
	be.PutUint32(head[56:], h.RefTableClusters)
	be.PutUint32(head[60:], h.SnapshotCount)
	be.PutUint64(head[64:], uint64(h.SnapshotsOffset))
	if h.Version >= 3 {
		be.PutUint64(head[72:], h.Incompatible)
		be.PutUint64(head[80:], h.Compatible)
		be.PutUint64(head[88:], h.Autoclear)
		be.PutUint32(head[96:], uint32(h.RefcountOrder))
		be.PutUint32(head[100:], uint32(length))
		if length > headerLenV3 {
			head[104] = h.Compression
			copy(head[105:], h.more)
		}
	}
	add := func(kind uint32, data []byte) {
		head = be.AppendUint32(head, kind)
		head = be.AppendUint32(head, uint32(len(data)))
		head = append(head, data...)
		head = append(head, make([]byte, -len(head)&7)...)
	}
	if h.BackingFormat != "" {
		add(extBackingFormat, []byte(h.BackingFormat))
	}
	if h.hasDataFileExtension || h.DataFile != "" {
		add(extDataFile, []byte(h.DataFile))
	}
	if h.Bitmaps.Count > 0 {
		d := be.AppendUint64(nil, uint64(h.Bitmaps.Count)<<32)
		d = be.AppendUint64(d, uint64(h.Bitmaps.DirectorySize))
		add(extBitmaps, be.AppendUint64(d, uint64(h.Bitmaps.DirectoryOffset)))
	}
	for _, last := range []bool{false, true} {
		for _, e := range h.Extensions {
			if last == (e.Type == extFeatureNames) {
				add(e.Type, e.Data)
			}
		}
	}
	add(extEnd, nil)

	name = []byte(h.BackingFile)
	nameOff, err = h.placeName(int64(len(head)), int64(len(name)))
	if err != nil {
		return nil, nil, 0, err
	}
	if len(name) > 0 {
		be.PutUint64(head[8:], uint64(nameOff))
		be.PutUint32(head[16:], uint32(len(name)))
	}
	return head, name, nameOff, nil
}

func (h *Header) placeName(headLen, n int64) (int64, error) {
	const sector = blk.SectorSize
	if n > maxBackingName {
		return 0, fmt.Errorf("qcow2: a backing file name of %d bytes: %w", n, blk.ErrInvalid)
	}
	at := headLen
	switch {
	case h.backingOff >= headLen && h.storedName == h.BackingFile:
		return h.backingOff, nil
	case headLen+n > sector:
		// Not over the old extensions and the old name, which are valid until the first sector is written.
		at = roundUp(max(headLen, h.storedEnd), sector)
		if end := h.backingOff + int64(len(h.storedName)); h.backingOff < at+n && at < end {
			at = roundUp(end, sector)
		}
	}
	for _, at := range []int64{at, headLen} {
		if at+n <= h.ClusterSize() {
			return at, nil
		}
	}
	return 0, fmt.Errorf("qcow2: the header and the backing file's name do not fit into a cluster of %d bytes: %w",
		h.ClusterSize(), blk.ErrInvalid)
}

// firstSector is a header that ends with the first sector: what encode returned, without the extensions that do not fit.
// It is nil if there is no such header.
func firstSector(head []byte) []byte {
	be := binary.BigEndian
	at, bitmaps := int64(headerLenV2), false
	if be.Uint32(head[4:]) >= 3 {
		at = int64(be.Uint32(head[100:]))
	}
	const end = blk.SectorSize - 8 // room for what says that there are no more
	if at > end {
		return nil
	}
	for {
		next := at + 8 + roundUp(int64(be.Uint32(head[at+4:])), 8)
		if next > end {
			break
		}
		bitmaps = bitmaps || be.Uint32(head[at:]) == extBitmaps
		at = next
	}
	b := bytes.Clone(head[:blk.SectorSize])
	clear(b[at:])
	if be.Uint32(head[4:]) >= 3 && !bitmaps {
		be.PutUint64(b[88:], be.Uint64(b[88:])&^AutoclearBitmaps)
	}
	return b
}

// Encode returns the first cluster, or its beginning if the rest is zeros. It is for new images.
func (h *Header) Encode() ([]byte, error) {
	head, name, at, err := h.encode()
	if err != nil {
		return nil, err
	}
	b := make([]byte, max(int64(len(head)), at+int64(len(name))))
	copy(b, head)
	copy(b[at:], name)
	return b, nil
}

// ClusterSize is in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// ExtendedL2 reports whether the image has subclusters.
func (h *Header) ExtendedL2() bool { return h.Incompatible&IncompatExtendedL2 != 0 }

// RefcountBits is the width of a reference count.
func (h *Header) RefcountBits() uint { return 1 << h.RefcountOrder }

func (h *Header) hasDataFile() bool { return h.Incompatible&IncompatDataFile != 0 }
func (h *Header) dataFileRaw() bool { return h.Autoclear&AutoclearDataRaw != 0 }

// l2EntryWords is the number of 64-bit words of an L2 entry.
func (h *Header) l2EntryWords() int {
	if h.ExtendedL2() {
		return 2
	}
	return 1
}

// l2Bits is log2 of the entries of an L2 table.
func (h *Header) l2Bits() uint {
	if h.ExtendedL2() {
		return h.ClusterBits - 4
	}
	return h.ClusterBits - 3
}

// l1Shift is log2 of the guest bytes behind an L1 entry.
func (h *Header) l1Shift() uint { return h.ClusterBits + h.l2Bits() }

// refBlockBits is log2 of the reference counts in a refcount block.
func (h *Header) refBlockBits() uint { return h.ClusterBits + 3 - h.RefcountOrder }

// maxRefcount is the largest value of a reference count.
func (h *Header) maxRefcount() uint64 { return ^uint64(0) >> (64 - h.RefcountBits()) }

func roundUp(x, unit int64) int64   { return (x + unit - 1) &^ (unit - 1) }
func roundDown(x, unit int64) int64 { return x &^ (unit - 1) }
