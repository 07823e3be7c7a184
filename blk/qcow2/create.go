// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/blkstream/blkstream/blk"
)

// A new image lies in the file like this, each part in clusters of its own:
//
//	header | refcount table | refcount blocks | L1 table | L2 tables | data
//
// L2 tables and data only if space is to be allocated at once. All is written in this order, but the header last, so
// that a crash leaves no image that looks whole.

// CreateOptions says what image Create makes. The zero value of each option but Size is its default.
type CreateOptions struct {
	Size          int64 // of the virtual disk, bytes, a multiple of blk.SectorSize
	Version       int   // 2 or 3 (default), which qemu-img calls compat 0.10 and 1.1
	ClusterSize   int64 // 512 bytes to 2 MiB, a power of two; default 64 KiB
	RefcountBits  int   // 1 to 64, a power of two; default 16, and version 2 has no other
	LazyRefcounts bool
	ExtendedL2    bool   // subclusters
	Compression   string // "zlib" (default) or "zstd": how clusters are compressed if any are
	// Preallocation is "off" (default), "metadata": tables for the whole disk, "falloc": and the host reserves the
	// space, or "full": and zeros are written.
	Preallocation string
	BackingFile   string
	BackingFormat string // demanded with BackingFile: formats are never guessed
	DataFile      string // name of an external data file
	DataFileRaw   bool   // that file is to be a raw image by itself
	// Data is the data file, opened; Create gives it its size. It is needed to preallocate more than metadata; without
	// it the caller makes the file, all zeros.
	Data blk.Node
}

// Create makes an image of the storage and loses what is in it. The storage grows if it can, else it must be large
// enough. The image is durable when Create returns. Memory does not depend on the image's size.
func Create(t *blk.Task, storage blk.Node, o CreateOptions) error {
	c, err := planImage(o)
	if err != nil {
		return fmt.Errorf("qcow2: create %s: %w", storage.Info().Name, err)
	}
	c.t, c.storage = t, storage
	if err := c.write(); err != nil {
		return fmt.Errorf("qcow2: create %s: %w", storage.Info().Name, err)
	}
	return nil
}

// creation is an image to be. Places are in clusters.
type creation struct {
	t       *blk.Task
	storage blk.Node
	o       CreateOptions
	h       *Header
	head    []byte

	refBlocks, refBlockCount int64
	l2s, l2Count             int64
	data, dataCount          int64
	end                      int64
}

const defaultClusterSize = 64 << 10

func planImage(o CreateOptions) (*creation, error) {
	if o.Version == 0 {
		o.Version = 3
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = defaultClusterSize
	}
	if o.RefcountBits == 0 {
		o.RefcountBits = 16
	}
	if o.Preallocation == "" {
		o.Preallocation = "off"
	}
	// The raw file is valid without the tables. With them it is only if they lead to all of it.
	if o.DataFileRaw && o.Preallocation == "off" {
		o.Preallocation = "metadata"
	}
	if err := o.check(); err != nil {
		return nil, err
	}
	c := &creation{o: o, h: o.header()}
	if err := c.place(); err != nil {
		return nil, err
	}
	head, err := c.h.Encode()
	if err != nil {
		return nil, err
	}
	c.head = append(head, make([]byte, roundUp(int64(len(head)), blk.SectorSize)-int64(len(head)))...)
	return c, nil
}

// check refuses what does not go, and says what does.
func (o *CreateOptions) check() error {
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), blk.ErrInvalid)
	}
	switch {
	case o.Version != 2 && o.Version != 3:
		return refuse("version %d: there are 2 and 3", o.Version)
	case o.ClusterSize < 1<<MinClusterBits || o.ClusterSize > 1<<MaxClusterBits || bits.OnesCount64(uint64(o.ClusterSize)) != 1:
		return refuse("clusters of %d bytes: a power of two from %d to %d is needed", o.ClusterSize, 1<<MinClusterBits, 1<<MaxClusterBits)
	case o.RefcountBits < 1 || o.RefcountBits > 64 || bits.OnesCount(uint(o.RefcountBits)) != 1:
		return refuse("reference counts of %d bits: a power of two from 1 to 64 is needed", o.RefcountBits)
	case o.Size < 0 || o.Size%blk.SectorSize != 0:
		return refuse("a size of %d bytes: a multiple of %d is needed", o.Size, blk.SectorSize)
	case o.Compression != "" && o.Compression != "zlib" && o.Compression != "zstd":
		return refuse("compression %q: there are zlib and zstd", o.Compression)
	}
	switch o.Preallocation {
	case "off", "metadata", "falloc", "full":
	default:
		return refuse("preallocation %q: there are off, metadata, falloc and full", o.Preallocation)
	}
	if o.Version == 2 {
		for _, x := range []struct {
			asked bool
			what  string
		}{
			{o.RefcountBits != 16, fmt.Sprintf("reference counts of %d bits", o.RefcountBits)},
			{o.LazyRefcounts, "lazy reference counts"},
			{o.ExtendedL2, "extended L2 entries"},
			{o.Compression == "zstd", "zstd compression"},
			{o.DataFile != "", "an external data file"},
		} {
			if x.asked {
				return refuse("version 2 has not %s: version 3 is needed", x.what)
			}
		}
	}
	switch {
	case o.ExtendedL2 && o.ClusterSize < 16<<10:
		return refuse("extended L2 entries with clusters of %d bytes: at least %d are needed", o.ClusterSize, 16<<10)
	case len(o.BackingFile) > maxBackingName:
		return refuse("a backing file name of %d bytes: at most %d go", len(o.BackingFile), maxBackingName)
	case o.BackingFile != "" && o.BackingFormat == "":
		return refuse("the backing file %q: its format must be named", o.BackingFile)
	case o.BackingFile == "" && o.BackingFormat != "":
		return refuse("a backing format without a backing file")
	case o.DataFileRaw && o.DataFile == "":
		return refuse("a raw data file is asked for, and no data file is named")
	case o.DataFileRaw && o.BackingFile != "":
		return refuse("a raw data file cannot have a backing file behind it")
	case o.BackingFile != "" && o.Preallocation != "off" && !o.ExtendedL2:
		return refuse("preallocation %s with a backing file would hide it: extended L2 entries are needed", o.Preallocation)
	case o.Data != nil && o.DataFile == "":
		return refuse("a data file is given, and not named")
	case o.DataFile != "" && o.Data == nil && (o.Preallocation == "falloc" || o.Preallocation == "full"):
		return refuse("preallocation %s of a data file that is not opened", o.Preallocation)
	}
	return nil
}

// header is the header but for the places of things.
func (o *CreateOptions) header() *Header {
	h := &Header{
		Version:       uint32(o.Version),
		ClusterBits:   uint(bits.TrailingZeros64(uint64(o.ClusterSize))),
		Size:          o.Size,
		RefcountOrder: uint(bits.TrailingZeros(uint(o.RefcountBits))),
		BackingFile:   o.BackingFile,
		BackingFormat: o.BackingFormat,
		DataFile:      o.DataFile,
	}
	if o.LazyRefcounts {
		h.Compatible |= CompatLazyRefcounts
	}
	if o.ExtendedL2 {
		h.Incompatible |= IncompatExtendedL2
	}
	if o.Compression == "zstd" {
		h.Incompatible |= IncompatCompression
		h.Compression = CompressionZstd
	}
	if o.DataFile != "" {
		h.Incompatible |= IncompatDataFile
	}
	if o.DataFileRaw {
		h.Autoclear |= AutoclearDataRaw
	}
	if o.Version >= 3 {
		h.more = make([]byte, 7) // up to the next multiple of 8 that holds the compression type, as QEMU has it
	}
	// As QEMU: only where the table does not fill much of the header's cluster.
	if o.Version >= 3 && o.ClusterSize >= 8192 {
		h.Extensions = append(h.Extensions, FeatureNames())
	}
	return h
}

// place finds room for the parts.
func (c *creation) place() error {
	h, size := c.h, c.h.ClusterSize()
	clusters := func(n int64) int64 { return roundUp(n, size) >> h.ClusterBits }
	if most := int64(maxL1Bytes/8) << h.l1Shift(); h.Size > most {
		return fmt.Errorf("a size of %d bytes: with clusters of %d it can be %d at most: %w", h.Size, size, most, blk.ErrInvalid)
	}
	h.L1Size = uint32(roundUp(h.Size, 1<<h.l1Shift()) >> h.l1Shift())
	l1Clusters := clusters(int64(h.L1Size) * 8)
	if c.o.Preallocation != "off" {
		c.l2Count = int64(h.L1Size)
		if !h.hasDataFile() {
			c.dataCount = clusters(h.Size)
		}
	}
	// The reference counts count themselves.
	var table int64
	for end := int64(0); end != c.end || end == 0; {
		end = c.end
		c.refBlockCount = max(1, (end+1<<h.refBlockBits()-1)>>h.refBlockBits())
		table = clusters(8 * c.refBlockCount)
		c.end = 1 + table + c.refBlockCount + l1Clusters + c.l2Count + c.dataCount
	}
	if table<<h.ClusterBits > maxRefTableBytes {
		return fmt.Errorf("%d bytes to allocate: with clusters of %d and reference counts of %d bits the refcount table can count %d at most: %w",
			c.end<<h.ClusterBits, size, c.o.RefcountBits, int64(maxRefTableBytes/8)<<(h.refBlockBits()+h.ClusterBits), blk.ErrInvalid)
	}
	h.RefTableOffset, h.RefTableClusters = size, uint32(table)
	c.refBlocks = 1 + table
	c.l2s = c.refBlocks + c.refBlockCount + l1Clusters
	c.data = c.l2s + c.l2Count
	if l1Clusters > 0 {
		h.L1Offset = (c.refBlocks + c.refBlockCount) << h.ClusterBits
	}
	return nil
}

func (c *creation) write() error {
	if err := c.wipe(); err != nil {
		return err
	}
	if c.o.Data != nil {
		if err := c.sizeData(); err != nil {
			return fmt.Errorf("data file %s: %w", c.o.Data.Info().Name, err)
		}
	}
	h := c.h
	if err := c.table("refcount table", h.RefTableOffset, c.refBlockCount, int64(h.RefTableClusters), func(i int64) uint64 {
		return uint64(c.refBlocks+i) << h.ClusterBits
	}); err != nil {
		return err
	}
	if err := c.writeRefBlocks(); err != nil {
		return err
	}
	l1Clusters := c.l2s - c.refBlocks - c.refBlockCount
	if err := c.table("L1 table", h.L1Offset, c.l2Count, l1Clusters, func(i int64) uint64 {
		return copied | uint64(c.l2s+i)<<h.ClusterBits
	}); err != nil {
		return err
	}
	// With extended entries the second word stays 0: space without contents, through which a backing file is seen.
	words := int64(h.l2EntryWords())
	inUse := roundUp(h.Size, h.ClusterSize()) >> h.ClusterBits * words
	if c.l2Count == 0 {
		inUse = 0
	}
	if err := c.table("L2 tables", c.l2s<<h.ClusterBits, inUse, c.l2Count, func(i int64) uint64 {
		switch {
		case i%words != 0:
			return 0
		case h.hasDataFile():
			return copied | uint64(i/words)<<h.ClusterBits
		}
		return copied | uint64(c.data+i/words)<<h.ClusterBits
	}); err != nil {
		return err
	}
	if err := c.preallocate(c.storage, c.data<<h.ClusterBits, c.dataCount<<h.ClusterBits); err != nil {
		return fmt.Errorf("preallocate: %w", err)
	}
	return c.writeHeader()
}

// wipe makes the storage one that is no image, large enough, and all zeros if it can.
func (c *creation) wipe() error {
	if r, ok := c.storage.(resizer); ok {
		err := r.Resize(c.t, 0, true)
		if err == nil {
			return growTo(c.t, c.storage, c.end<<c.h.ClusterBits)
		}
		if !errors.Is(err, blk.ErrNotSupported) { // a block device
			return err
		}
	}
	if err := growTo(c.t, c.storage, c.end<<c.h.ClusterBits); err != nil {
		return err
	}
	if err := c.zero(c.storage, 0, c.h.ClusterSize(), 0); err != nil {
		return err
	}
	if err := c.zero(c.storage, c.data<<c.h.ClusterBits, c.dataCount<<c.h.ClusterBits, blk.Unmap); err != nil {
		return err
	}
	return c.flush(c.storage)
}

func (c *creation) flush(n blk.Node) error { return blk.Do(c.t, n, &blk.Request{Op: blk.OpFlush}) }

func (c *creation) zero(n blk.Node, off, l int64, flags blk.Flags) error {
	const piece = 1 << 30
	for end := off + l; off < end; off += piece {
		if err := blk.Do(c.t, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: flags, Off: off, Len: min(piece, end-off)}); err != nil {
			return err
		}
	}
	return nil
}

// sizeData makes the data file zeros as long as the disk.
func (c *creation) sizeData() error {
	d := c.o.Data
	err := error(blk.ErrNotSupported)
	if r, ok := d.(resizer); ok {
		if err = r.Resize(c.t, 0, true); err == nil {
			err = growTo(c.t, d, c.h.Size)
		}
	}
	if errors.Is(err, blk.ErrNotSupported) {
		if err = growTo(c.t, d, c.h.Size); err == nil {
			err = c.zero(d, 0, c.h.Size, blk.Unmap)
		}
	}
	if err != nil {
		return err
	}
	if err := c.preallocate(d, 0, c.h.Size); err != nil {
		return err
	}
	return c.flush(d)
}

// preallocate has the host keep space for a range of zeros.
func (c *creation) preallocate(n blk.Node, off, l int64) error {
	switch c.o.Preallocation {
	case "falloc":
		return c.zero(n, off, l, 0)
	case "full":
		buf := blk.GetBuffer(int(max(1, min(l, checkPiece))))
		defer buf.Free()
		clear(buf.B)
		for end := off + l; off < end; off += int64(len(buf.B)) {
			if err := writeFull(c.t, n, buf.B[:min(int64(len(buf.B)), end-off)], off); err != nil {
				return err
			}
		}
	}
	return nil
}

// table writes a table of clusters clusters at off: entries entries, and zeros.
func (c *creation) table(what string, off, entries, clusters int64, entry func(i int64) uint64) error {
	err := c.stream(off, clusters<<c.h.ClusterBits, func(b []byte, at int64) {
		clear(b)
		for i := at / 8; i < min((at+int64(len(b)))/8, entries); i++ {
			binary.BigEndian.PutUint64(b[8*i-at:], entry(i))
		}
	})
	if err != nil {
		return fmt.Errorf("write the %s: %w", what, err)
	}
	return nil
}

// stream writes n bytes at off, of which fill makes the part from at on.
func (c *creation) stream(off, n int64, fill func(b []byte, at int64)) error {
	buf := blk.GetBuffer(int(max(1, min(n, 1<<MaxClusterBits))))
	defer buf.Free()
	for at := int64(0); at < n; at += int64(len(buf.B)) {
		b := buf.B[:min(int64(len(buf.B)), n-at)]
		fill(b, at)
		if err := writeFull(c.t, c.storage, b, off+at); err != nil {
			return err
		}
	}
	return nil
}

// writeRefBlocks counts 1 for each cluster of the image.
func (c *creation) writeRefBlocks() error {
	per := int64(8) // reference counts that begin and end at bytes
	if c.h.RefcountOrder > 3 {
		per = 1
	}
	width := per << c.h.RefcountOrder / 8 // bytes of these
	err := c.stream(c.refBlocks<<c.h.ClusterBits, c.refBlockCount<<c.h.ClusterBits, func(b []byte, at int64) {
		clear(b)
		first := at / width * per
		for i := range min(int64(len(b))/width*per, max(0, c.end-first)) {
			putCount(b, c.h.RefcountOrder, i, 1)
		}
	})
	if err != nil {
		return fmt.Errorf("write the refcount blocks: %w", err)
	}
	return nil
}

// writeHeader makes an image of it. The sector with the magic number comes last.
func (c *creation) writeHeader() error {
	if rest := c.head[blk.SectorSize:]; len(rest) > 0 {
		if err := writeFull(c.t, c.storage, rest, blk.SectorSize); err != nil {
			return fmt.Errorf("write header: %w", err)
		}
	}
	if err := c.flush(c.storage); err != nil {
		return err
	}
	if err := writeFull(c.t, c.storage, c.head[:blk.SectorSize], 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	return c.flush(c.storage)
}
