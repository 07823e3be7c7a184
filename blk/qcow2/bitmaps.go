// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"github.com/blkstream/blkstream/blk"
)

// Persistent bitmaps (section "Bitmaps" of the specification). The header has an extension that names a directory; an
// entry of the directory names a table; an entry of the table names a cluster of bits, or says that all of them are
// alike. They count if the feature bit AutoclearBitmaps is set, which a program that does not know them clears.
//
// While an image is in use its bitmaps are not kept up to date in it. Those that should record writes are marked as in
// use before the first one, and whoever records in their place stores them in the end: new clusters, a new table and a
// new directory, and then the header, which is the one point at which all of them change.

// Flags of a bitmap.
const (
	bitmapInUse       = 1 << 0
	bitmapAuto        = 1 << 1
	bitmapExtraCompat = 1 << 2

	bitmapTypeDirty = 1
	bitmapEntryLen  = 24
	maxBitmapName   = 1023

	maxBitmapWarnings = 8 // that name one: an image may have thousands

	minBitmapGranularity = 9 // log2, as QEMU has them
	maxBitmapGranularity = 31
	// maxBitmapBytes bounds the memory for a bitmap that an image makes us load.
	maxBitmapBytes = 64 << 20
)

// Bitmap is a persistent bitmap.
type Bitmap struct {
	Name        string
	Granularity int64 // bytes
	InUse       bool  // not saved after the last use: its contents mean nothing
	Enabled     bool  // records writes
	at          int64 // of its entry in the directory
	flags       uint32
	kind        uint8
	extra       int64
	table       int64  // offset
	entries     int64  // of the table
	raw         []byte // the entry in the directory
}

// BitmapData is a bitmap to be stored. It will be one that records writes.
type BitmapData struct {
	Name string
	Bits *blk.Bitmap
}

// ReadBitmaps lists the persistent bitmaps. If the feature bit AutoclearBitmaps is not set, none of them is up to
// date.
func ReadBitmaps(t *blk.Task, storage blk.Node, h *Header) ([]Bitmap, error) {
	if h.Bitmaps.Count == 0 {
		return nil, nil
	}
	be := binary.BigEndian
	dir := make([]byte, h.Bitmaps.DirectorySize)
	if err := readClipped(t, storage, blk.BytesVec(nil, dir), h.Bitmaps.DirectoryOffset); err != nil {
		return nil, fmt.Errorf("read bitmap directory: %w", err)
	}
	var list []Bitmap
	at := h.Bitmaps.DirectoryOffset
	for i := range h.Bitmaps.Count {
		if len(dir) < bitmapEntryLen {
			return nil, invalid("bitmap directory: entry %d is cut off", i)
		}
		nameLen, extra := int64(be.Uint16(dir[18:])), int64(be.Uint32(dir[20:]))
		size := roundUp(bitmapEntryLen+extra+nameLen, 8)
		if size > int64(len(dir)) || dir[17] > 62 || nameLen > maxBitmapName {
			return nil, invalid("bitmap directory: entry %d", i)
		}
		flags := be.Uint32(dir[12:])
		list = append(list, Bitmap{
			Name:        string(dir[bitmapEntryLen+extra : bitmapEntryLen+extra+nameLen]),
			Granularity: 1 << dir[17],
			InUse:       flags&bitmapInUse != 0,
			Enabled:     flags&bitmapAuto != 0,
			at:          at,
			flags:       flags,
			kind:        dir[16],
			extra:       extra,
			table:       int64(be.Uint64(dir)),
			entries:     int64(be.Uint32(dir[8:])),
			raw:         dir[:size],
		})
		at += size
		dir = dir[size:]
	}
	return list, nil
}

// Bitmaps lists the persistent bitmaps that count.
func (n *Node) Bitmaps(t *blk.Task) ([]Bitmap, error) {
	h := n.Header()
	if h.Autoclear&AutoclearBitmaps == 0 {
		return nil, nil
	}
	return ReadBitmaps(t, n.storage, h)
}

// maxDataName is how long the name of a data file may be, in bytes, for the extension of bitmaps to have room with it in
// the header's first sector. While something behind that changes, the header does without what is there, and without the
// name of its data file nothing opens the image.
const maxDataName = 256

// CanStoreBitmaps reports whether StoreBitmaps has a place for any.
func (n *Node) CanStoreBitmaps() bool {
	return !n.v2 && !n.readOnly && !n.corrupt.Load() && len(n.Header().DataFile) <= maxDataName
}

// LoadBitmap reads the bits of a bitmap that is not in use.
func (n *Node) LoadBitmap(t *blk.Task, b Bitmap) (*blk.Bitmap, error) {
	m, err := n.loadBitmap(t, b)
	if err != nil {
		return nil, fmt.Errorf("%s: bitmap %q: %w", n.name, b.Name, err)
	}
	return m, nil
}

func (n *Node) loadBitmap(t *blk.Task, b Bitmap) (*blk.Bitmap, error) {
	size := n.Info().Size
	switch {
	case b.InUse:
		return nil, invalid("it is in use")
	case b.kind != bitmapTypeDirty:
		return nil, fmt.Errorf("type %d: %w", b.kind, ErrFeature)
	case b.flags&^(bitmapInUse|bitmapAuto|bitmapExtraCompat) != 0, b.extra > 0 && b.flags&bitmapExtraCompat == 0:
		return nil, fmt.Errorf("flags %#x with %d bytes of extra data: %w", b.flags, b.extra, ErrFeature)
	case b.Granularity < 1<<minBitmapGranularity || b.Granularity > 1<<maxBitmapGranularity:
		return nil, invalid("granularity %d", b.Granularity)
	case size/b.Granularity/8 > maxBitmapBytes:
		return nil, fmt.Errorf("more than %d bytes: %w", maxBitmapBytes, ErrFeature)
	case b.entries != n.bitmapTable(size, b.Granularity):
		return nil, invalid("a table of %d entries", b.entries)
	}
	table, err := n.readBitmapTable(t, b)
	if err != nil {
		return nil, err
	}
	m := blk.NewBitmap(size, b.Granularity)
	buf := blk.GetBuffer(int(n.clusterSize()))
	defer buf.Free()
	per := n.clusterSize() / 8 // words
	for i, e := range table {
		first := int64(i) * per
		off := int64(e & offsetMask)
		switch {
		case e == 0:
			continue
		case e == 1:
			for w := first; w < min(first+per, m.Words()); w++ {
				m.OrWord(w, ^uint64(0))
			}
			continue
		case e != uint64(off) || !n.bitmapCluster(off):
			return nil, invalid("entry %d of its table is %#x", i, e)
		}
		if err := readClipped(t, n.storage, blk.BytesVec(nil, buf.B), off); err != nil {
			return nil, fmt.Errorf("read its bits at %#x: %w", off, err)
		}
		for w := first; w < min(first+per, m.Words()); w++ {
			m.OrWord(w, binary.LittleEndian.Uint64(buf.B[8*(w-first):]))
		}
	}
	return m, nil
}

// bitmapTable is the number of clusters of a bitmap, and of the entries of its table.
func (n *Node) bitmapTable(size, granularity int64) int64 {
	return roundUp(((size+granularity-1)/granularity+7)/8, n.clusterSize()) >> n.clusterBits
}

// bitmapCluster reports whether a table may point to the offset.
func (n *Node) bitmapCluster(off int64) bool {
	return off >= n.clusterSize() && off&(n.clusterSize()-1) == 0 && off < n.storage.Info().Size
}

func (n *Node) readBitmapTable(t *blk.Task, b Bitmap) ([]uint64, error) {
	if !n.bitmapCluster(b.table) || b.entries*8 > n.storage.Info().Size-b.table {
		return nil, invalid("a table of %d entries at %#x", b.entries, b.table)
	}
	table := make([]uint64, b.entries)
	if err := n.readWords(t, b.table, b.entries, func(i int64, w uint64) { table[i] = w }); err != nil {
		return nil, fmt.Errorf("read its table: %w", err)
	}
	return table, nil
}

// UseBitmaps marks bitmaps as in use, durably. The caller keeps them, and stores them when the image is closed.
func (n *Node) UseBitmaps(t *blk.Task, names []string) error {
	list, err := n.Bitmaps(t)
	if err != nil {
		return err
	}
	return n.markInUse(t, slices.DeleteFunc(list, func(b Bitmap) bool { return b.InUse || !slices.Contains(names, b.Name) }))
}

// tracksBitmaps reports whether bitmaps may have to be marked before the first write.
func (n *Node) tracksBitmaps() bool {
	return n.header.Bitmaps.Count > 0 && n.header.Autoclear&AutoclearBitmaps != 0
}

// useBitmaps marks each bitmap that should record the writes of this session as in use, durably: nobody keeps it up to
// date. Bitmaps that record nothing stay valid. QEMU shows marked ones as inconsistent and lets the user remove
// them; to clear the feature bit instead would lose them all.
func (n *Node) useBitmaps(t *blk.Task) error {
	list, err := ReadBitmaps(t, n.storage, n.Header())
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(b Bitmap) bool { return b.InUse || !b.Enabled })
	if err := n.markInUse(t, list); err != nil {
		return err
	}
	for i, b := range list {
		if i == maxBitmapWarnings {
			n.warn("image %q: so are %d more bitmaps", n.name, len(list)-i)
			break
		}
		n.warn("image %q: bitmap %q does not record what is written now and is marked as inconsistent", n.name, b.Name)
	}
	return nil
}

func (n *Node) markInUse(t *blk.Task, list []Bitmap) error {
	buf := blk.GetBuffer(int(n.block))
	defer buf.Free()
	for _, b := range list {
		// Entries begin at multiples of 8, so the flags lie in one block.
		block := roundDown(b.at+12, n.block)
		if err := readClipped(t, n.storage, blk.BytesVec(nil, buf.B), block); err != nil {
			return fmt.Errorf("mark bitmap %q as in use: %w", b.Name, err)
		}
		binary.BigEndian.PutUint32(buf.B[b.at+12-block:], b.flags|bitmapInUse)
		if err := n.writeMeta(t, buf.B, block); err != nil {
			return fmt.Errorf("mark bitmap %q as in use: %w", b.Name, err)
		}
	}
	return n.syncStorage(t) // even if all are marked: perhaps by an attempt that failed here
}

// StoreBitmaps stores bitmaps of the disk's present size in place of those of the same name, and removes others, all at
// once and durably.
func (n *Node) StoreBitmaps(t *blk.Task, remove []string, store []BitmapData) error {
	if err := n.storeBitmaps(t, remove, store); err != nil {
		return fmt.Errorf("%s: store bitmaps: %w", n.name, err)
	}
	return nil
}

func (n *Node) storeBitmaps(t *blk.Task, remove []string, store []BitmapData) error {
	switch {
	case n.readOnly:
		return blk.ErrReadOnly
	case n.corrupt.Load():
		return ErrCorrupt
	case n.v2:
		return fmt.Errorf("version 2 has none: %w", ErrFeature)
	case !n.CanStoreBitmaps():
		return fmt.Errorf("the name of its data file leaves no room for them in the header: %w", blk.ErrNotSupported)
	}
	defer n.resizing.Lock(t)()
	defer n.prepares.Lock(t)() // the first write of all marks some of them
	if err := n.settle(t); err != nil {
		return err
	}
	old, err := n.Bitmaps(t)
	if err != nil {
		return err
	}
	var (
		kept = store
		dir  []byte
		used []refRun // clusters of what is new
		gone []refRun // and of what goes
		all  int
	)
	for _, b := range old {
		if slices.Contains(remove, b.Name) || slices.ContainsFunc(kept, func(d BitmapData) bool { return d.Name == b.Name }) {
			gone = append(gone, n.bitmapRuns(t, b)...)
			continue
		}
		dir = append(dir, b.raw...)
		all++
	}
	undo := func(err error) error {
		n.release(used...)
		return err
	}
	for _, d := range store {
		entry, runs, err := n.storeBits(t, d)
		for _, r := range runs {
			used = append(used, refRun{r.host >> n.clusterBits, r.count, -1})
		}
		if err != nil {
			return undo(fmt.Errorf("bitmap %q: %w", d.Name, err))
		}
		dir = append(dir, entry...)
		all++
	}
	var ext BitmapsExtension
	if all > 0 {
		if all > maxBitmaps || len(dir) > maxDirectory {
			return undo(fmt.Errorf("%d of them: %w", all, blk.ErrInvalid))
		}
		r, err := n.storeTable(t, dir)
		if err != nil {
			return undo(fmt.Errorf("directory: %w", err))
		}
		used = append(used, refRun{r.host >> n.clusterBits, r.count, -1})
		ext = BitmapsExtension{Count: uint32(all), DirectorySize: int64(len(dir)), DirectoryOffset: r.host}
	}
	// What the header points to is durable before it does.
	if err := n.syncStorage(t); err != nil {
		return undo(err)
	}
	before := n.Header().Bitmaps
	if err := n.writeHeader(t, func(h *Header) {
		h.Bitmaps = ext
		h.Autoclear &^= AutoclearBitmaps
		if all > 0 {
			h.Autoclear |= AutoclearBitmaps
		}
	}); err != nil {
		return undo(err) // the header may point there: only when settled
	}
	if len(old) > 0 {
		first, count := before.DirectoryOffset>>n.clusterBits, roundUp(before.DirectorySize, n.clusterSize())>>n.clusterBits
		gone = append(gone, refRun{first, count, -1})
		n.noteClusters(first, count, false)
	}
	n.noteClusters(ext.DirectoryOffset>>n.clusterBits, roundUp(ext.DirectorySize, n.clusterSize())>>n.clusterBits, true)
	n.release(gone...)
	return nil
}

// noteClusters notes or forgets clusters that hold metadata.
func (n *Node) noteClusters(first, count int64, are bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := first; c < first+count; c++ {
		if are {
			n.metadata[c] = struct{}{}
		} else {
			delete(n.metadata, c)
		}
	}
}

// storeBits writes a bitmap's clusters and its table, and returns its entry for the directory. What it has taken is
// returned with an error, too.
func (n *Node) storeBits(t *blk.Task, d BitmapData) (entry []byte, runs []run, err error) {
	g, size := d.Bits.Granularity(), n.Info().Size
	if len(d.Name) == 0 || len(d.Name) > maxBitmapName || d.Bits.Words() != ((size+g-1)/g+63)/64 {
		return nil, nil, blk.ErrInvalid
	}
	table := make([]byte, 8*n.bitmapTable(size, g))
	per := n.clusterSize() / 8
	buf := blk.GetBuffer(int(n.clusterSize()))
	defer buf.Free()
	for i := range int64(len(table) / 8) {
		and, or := ^uint64(0), uint64(0)
		for w := range per {
			var word uint64
			if i*per+w < d.Bits.Words() {
				word = d.Bits.Word(i*per + w)
			}
			binary.LittleEndian.PutUint64(buf.B[8*w:], word)
			and, or = and&word, or|word
		}
		e := uint64(0)
		switch {
		case or == 0:
		case and == ^uint64(0):
			e = 1
		default:
			r, err := n.allocate(t, 1, 0)
			if err != nil {
				return nil, runs, err
			}
			runs = append(runs, r)
			if err := n.writeMeta(t, buf.B, r.host); err != nil {
				return nil, runs, fmt.Errorf("write its bits: %w", err)
			}
			e = uint64(r.host)
		}
		binary.BigEndian.PutUint64(table[8*i:], e)
	}
	r, err := n.storeTable(t, table)
	if err != nil {
		return nil, runs, err
	}
	be := binary.BigEndian
	entry = make([]byte, roundUp(int64(bitmapEntryLen+len(d.Name)), 8))
	be.PutUint64(entry, uint64(r.host))
	be.PutUint32(entry[8:], uint32(len(table)/8))
	be.PutUint32(entry[12:], bitmapAuto)
	entry[16], entry[17] = bitmapTypeDirty, byte(bits.TrailingZeros64(uint64(g)))
	be.PutUint16(entry[18:], uint16(len(d.Name)))
	copy(entry[bitmapEntryLen:], d.Name)
	return entry, append(runs, r), nil
}

// storeTable writes b to neighbouring clusters of its own.
func (n *Node) storeTable(t *blk.Task, b []byte) (run, error) {
	clusters := roundUp(int64(len(b)), n.clusterSize()) >> n.clusterBits
	r, err := n.claimTable(t, clusters)
	if err != nil {
		return run{}, err
	}
	buf := blk.GetBuffer(int(clusters << n.clusterBits))
	defer buf.Free()
	clear(buf.B[copy(buf.B, b):])
	if err := n.writeMeta(t, buf.B, r.host); err != nil {
		n.release(refRun{r.host >> n.clusterBits, r.count, -1})
		return run{}, fmt.Errorf("write table: %w", err)
	}
	return r, nil
}

// bitmapRuns is what a bitmap takes. What cannot be its own is left alone, and lost at worst.
func (n *Node) bitmapRuns(t *blk.Task, b Bitmap) (runs []refRun) {
	table, err := n.readBitmapTable(t, b)
	if err != nil {
		n.warn("image %q: the space of bitmap %q is lost: %v", n.name, b.Name, err)
		return nil
	}
	add := func(off, clusters int64) {
		n.mu.Lock()
		defer n.mu.Unlock()
		for c := off; c < off+clusters<<n.clusterBits; c += n.clusterSize() {
			if !n.isMetadataLocked(c) {
				runs = append(runs, refRun{c >> n.clusterBits, 1, -1})
			}
		}
	}
	for _, e := range table {
		if off := int64(e & offsetMask); off != 0 && n.bitmapCluster(off) {
			add(off, 1)
		}
	}
	if b.entries > 0 {
		add(b.table, roundUp(b.entries*8, n.clusterSize())>>n.clusterBits)
	}
	return runs
}
