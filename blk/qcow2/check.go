// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// A check counts how often each host cluster is referenced, and holds that against the reference counts in the image
// and the copied bits. In order:
//
//  1. The header, and the lists that it points to: snapshots, bitmaps, the refcount table.
//  2. For each window of host clusters, so that memory is bounded:
//     count the references from all tables; an L2 table is read once, however many L1 tables point to it;
//     compare with the refcount blocks, and repair them in place;
//     compare the copied bits of the active tables with the reference counts, and repair them.
//  3. If the refcount blocks cannot be repaired in place: write new ones behind the end of the image, then the header.
//
// A repair is a check; if it found something, these steps again with repairs; and another check, to see what is left.
// If nothing is, the dirty and the corrupt bit are cleared.
//
// A repair may be cut off anywhere. Reference counts are only ever set to what the references are, which a repair does
// not change, so each one written makes the image better, in whatever order. Copied bits follow when the counts are on
// stable storage, and the header when everything else is.

// Repair says what a check may change.
type Repair int

const (
	RepairNone  Repair = iota
	RepairLeaks        // lower reference counts, and set copied bits where that leaves a count of 1
	RepairAll          // and raise them, rebuild them, correct all copied bits, clear the dirty and the corrupt bit
)

// CheckResult is what a check found. Counts of clusters are of the active image, as qemu-img check has them.
type CheckResult struct {
	Errors, Leaks                         int64 // that are there now, after a repair
	ErrorsFixed, LeaksFixed               int64
	TotalClusters                         int64
	AllocatedClusters, CompressedClusters int64
	FragmentedClusters                    int64     // allocated, and not behind the one before
	ImageEnd                              int64     // bytes: the end of the last cluster in use
	Findings                              []Finding // the first of what there was before a repair
}

// Finding is one error or leak.
type Finding struct {
	Offset int64 // in the image file, bytes
	What   string
	Leak   bool // space is lost; no data is in danger
}

func (f Finding) String() string { return fmt.Sprintf("%#x: %s", f.Offset, f.What) }

const (
	maxFindings = 100
	// checkWindow is the number of clusters counted at once. Counts take 2 bytes a cluster and are kept twice, so a
	// check uses at most 256 MiB for them, and 50 MiB for all else; images with fewer clusters need less. Each window
	// goes once over the tables.
	checkWindow = 64 << 20
	maxWindows  = 256
	// checkPiece is how much of a table is read at once, in bytes.
	checkPiece = 1 << 20
)

// ErrTooLarge is a check's answer to an image that would need more memory than it allows itself.
var ErrTooLarge = errors.New("too much for a check")

// Check looks for errors in the image's metadata, and repairs them if it may. Nobody else may use the image. The error
// says that the check itself failed; what it found is in the result.
//
// It is stricter than qemu-img check, which lets pass: tables that are also used for something else while the counts
// are right, clusters of a data file that are not where they belong, zero clusters in version 2, and snapshots' L1
// tables that overlap. It does not repair entries that point to nowhere: what was there is lost. While there are such
// entries no count is lowered, since what they meant may still be rescued.
func Check(t *blk.Task, storage blk.Node, repair Repair) (CheckResult, error) {
	return CheckWatched(t, storage, repair, nil)
}

// Watch is told how much of a check is done, in a unit of its own. A repair takes several turns, each of which begins
// at 0. Its error ends the check, or the repair, which may be cut off anywhere.
type Watch func(done, total int64) error

// CheckWatched is a check that can be watched and ended.
func CheckWatched(t *blk.Task, storage blk.Node, repair Repair, watch Watch) (CheckResult, error) {
	return check(t, storage, repair, checkWindow, watch)
}

func check(t *blk.Task, storage blk.Node, repair Repair, window int64, watch Watch) (CheckResult, error) {
	if watch == nil {
		watch = func(int64, int64) error { return nil }
	}
	if repair != RepairNone && storage.Info().ReadOnly {
		return CheckResult{}, blk.ErrReadOnly
	}
	found, trouble, err := scan(t, storage, RepairNone, window, trouble{}, watch)
	if err != nil || repair == RepairNone {
		return found, err
	}
	left := found
	if found.Errors+found.Leaks > 0 {
		if err := repairWith(t, storage, repair, window, trouble, watch); err != nil {
			return found, err
		}
		if left, _, err = scan(t, storage, RepairNone, window, trouble, watch); err != nil {
			return found, err
		}
	}
	if repair == RepairAll && left.Errors == 0 {
		if err := clearBits(t, storage); err != nil {
			return found, err
		}
	}
	left.ErrorsFixed = max(0, found.Errors-left.Errors)
	left.LeaksFixed = max(0, found.Leaks-left.Leaks)
	left.Findings = found.Findings
	return left, nil
}

// repairDirty makes an image usable that was not closed, and returns its new header. It fails if errors are left.
func repairDirty(t *blk.Task, storage blk.Node) (*Header, error) {
	r, err := Check(t, storage, RepairAll)
	if err != nil {
		return nil, err
	}
	if r.Errors > 0 {
		return nil, invalid("%d errors are left; the first one found: %v", r.Errors, r.Findings[0])
	}
	return ReadHeader(t, storage)
}

// repairWith does what can be done, given the trouble that was found.
func repairWith(t *blk.Task, storage blk.Node, repair Repair, window int64, known trouble, watch Watch) error {
	// The tables that the counts are to agree with: who wrote them may have died without a flush.
	if err := blk.Do(t, storage, &blk.Request{Op: blk.OpFlush}); err != nil {
		return err
	}
	_, now, err := scan(t, storage, repair, window, known, watch)
	// What is not seen now would not be counted, and what points behind the end would point into the new blocks.
	if err != nil || repair != RepairAll || !now.rebuild || now.blind || now.beyond {
		return err
	}
	if err := rebuildRefcounts(t, storage, window, watch); err != nil {
		return err
	}
	// The copied bits, against the new counts.
	_, _, err = scan(t, storage, repair, window, trouble{}, watch)
	return err
}

// scan goes through the image once. With repairs its counts of errors and leaks mean little: one may cure another.
func scan(t *blk.Task, storage blk.Node, repair Repair, window int64, known trouble, watch Watch) (CheckResult, trouble, error) {
	c, err := newChecker(t, storage, repair, window, watch)
	if err != nil {
		return CheckResult{}, known, err
	}
	defer c.table.Free()
	c.trouble = known
	for lo := int64(0); lo < c.end; lo += c.window {
		if err := c.checkWindow(lo); err != nil {
			return c.res, c.trouble, err
		}
	}
	return c.res, c.trouble, nil
}

// newChecker reads what a check knows from the beginning. Its table is the caller's to free.
func newChecker(t *blk.Task, storage blk.Node, repair Repair, window int64, watch Watch) (*checker, error) {
	h, err := ReadHeader(t, storage)
	if err != nil {
		return nil, err
	}
	c := &checker{t: t, storage: storage, h: h, lay: h.layout(), repair: repair, watch: watch}
	c.end = roundUp(storage.Info().Size, h.ClusterSize()) >> h.ClusterBits
	if c.end > maxWindows*checkWindow {
		return nil, fmt.Errorf("qcow2: check a file of %d bytes in clusters of %d: more than %d of them: %w",
			storage.Info().Size, h.ClusterSize(), int64(maxWindows*checkWindow), ErrTooLarge)
	}
	c.res.TotalClusters = roundUp(h.Size, h.ClusterSize()) >> h.ClusterBits
	if err := c.load(); err != nil {
		return nil, err
	}
	// Whole refcount blocks, so that a new one can be written when its window has been counted.
	c.window = min(roundUp(window, 1<<h.refBlockBits()), roundUp(c.end, 1<<h.refBlockBits()))
	c.refs, c.l2s = newCounts(c.window), newCounts(c.window)
	c.active, c.single = newBitset(c.window), newBitset(c.window)
	c.table = blk.GetBuffer(int(h.ClusterSize()))
	return c, nil
}

type checker struct {
	t       *blk.Task
	storage blk.Node
	h       *Header
	lay     layout
	repair  Repair
	watch   Watch
	passed  int64 // clusters of the file that the walks over the L2 tables have behind them, for watch
	res     CheckResult
	end     int64 // clusters of the file
	window  int64 // clusters

	areas    []area  // of the tables that cannot be shared; refcount blocks are not among them
	l1s      []area  // the active one first
	bitmaps  []area  // bitmap tables
	refTable []int64 // its entries, as they are

	table  *blk.Buffer // one L2 table or refcount block
	refs   *counts     // references into the window
	l2s    *counts     // references from L1 tables
	active bitset      // clusters of l2s that are of the active L1 table
	single bitset      // clusters of refs whose reference count in the image is 1

	quiet   bool // over the L2 tables for another time: what is wrong with them was reported
	l1Seen  bool // likewise of the L1 tables
	trouble trouble
	noRefs  bool // refcount table and blocks do not count: they are to be replaced
	sets    bool // copied bits may be set

	copiedErrors int64 // those of res.Errors that are about copied bits
}

// trouble is what keeps a repair from doing its work the simple way, or at all.
type trouble struct {
	blind   bool // references could not be followed: what looks lost may be in use
	beyond  bool // something points behind the end of the file
	rebuild bool // the refcount blocks cannot be repaired in place
	shared  bool // nor written: what they are is something else, too
}

// area is a contiguous part of the file, in bytes.
type area struct {
	off, n int64
	what   string
}

func (c *checker) found(leak bool, off int64, format string, args ...any) {
	if leak {
		c.res.Leaks++
	} else {
		c.res.Errors++
	}
	if len(c.res.Findings) < maxFindings {
		c.res.Findings = append(c.res.Findings, Finding{off, fmt.Sprintf(format, args...), leak})
	}
}

// fault reports an error in a table, the first time over it.
func (c *checker) fault(off int64, format string, args ...any) {
	if !c.quiet {
		c.found(false, off, format, args...)
	}
}

// load reads the lists that fit into memory.
func (c *checker) load() error {
	h := c.h
	c.areas = append(c.areas, area{0, h.ClusterSize(), "the header"})
	l1 := area{h.L1Offset, int64(h.L1Size) * 8, "the L1 table"}
	if l1.n > 0 {
		c.areas = append(c.areas, l1)
	}
	c.l1s = append(c.l1s, l1)

	table := make([]byte, int64(h.RefTableClusters)<<h.ClusterBits)
	if err := c.read(table, h.RefTableOffset); err != nil {
		return fmt.Errorf("qcow2: read the refcount table: %w", err)
	}
	c.refTable = make([]int64, len(table)/8)
	for i := range c.refTable {
		c.refTable[i] = int64(binary.BigEndian.Uint64(table[8*i:]))
	}
	if err := c.loadSnapshots(); err != nil {
		return fmt.Errorf("qcow2: read the snapshot table: %w", err)
	}
	if err := c.loadBitmaps(); err != nil {
		return fmt.Errorf("qcow2: read the bitmap directory: %w", err)
	}
	return nil
}

// read is readFull with zeros for what lies past the end of the file.
func (c *checker) read(b []byte, off int64) error {
	n := min(int64(len(b)), max(0, c.storage.Info().Size-off))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	return readFull(c.t, c.storage, b[:n], off)
}

// loadSnapshots adds the snapshots' L1 tables (section "Snapshots" of the specification).
func (c *checker) loadSnapshots() error {
	if c.h.SnapshotCount == 0 {
		return nil
	}
	var (
		be   = binary.BigEndian
		base = c.h.SnapshotsOffset
		at   = base
		room = c.fileEnd()
	)
	for i := range c.h.SnapshotCount {
		var e [40]byte
		if err := c.read(e[:], at); err != nil {
			return err
		}
		extra := int64(be.Uint32(e[36:]))
		n := roundUp(40+extra+int64(be.Uint16(e[12:]))+int64(be.Uint16(e[14:])), 8)
		if at+n > c.fileEnd() || at+n-base > maxDirectory {
			c.found(false, at, "entry %d of the snapshot table is cut off", i)
			c.trouble.blind = true
			break
		}
		if c.h.Version >= 3 && extra < 16 {
			c.found(false, at, "snapshot %d has no disk size", i)
		}
		l1 := area{int64(be.Uint64(e[:])), int64(be.Uint32(e[8:])) * 8, fmt.Sprintf("the L1 table of snapshot %d", i)}
		if l1.n > 0 {
			ok, err := c.addArea(l1, maxL1Bytes, &room)
			if err != nil {
				return err
			}
			if ok {
				c.l1s = append(c.l1s, l1)
			}
		}
		at += n
	}
	c.areas = append(c.areas, area{base, at - base, "the snapshot table"})
	return nil
}

// addArea takes a table that a list names, if it can be one. room is what the file has for all tables of its kind:
// each lies in clusters of its own, so that many large ones in a small file are not worth reading.
func (c *checker) addArea(a area, most int64, room *int64) (bool, error) {
	size := roundUp(a.n, c.h.ClusterSize())
	switch {
	case a.off <= 0 || a.off&(c.h.ClusterSize()-1) != 0 || a.n > most || a.off > c.fileEnd()-size:
		c.found(false, a.off, "%s, of %d bytes, cannot be here", a.what, a.n)
		c.trouble.blind = true
		return false, nil
	case size > *room:
		return false, fmt.Errorf("%s and the ones before are larger than the file: %w", a.what, ErrTooLarge)
	}
	*room -= size
	c.areas = append(c.areas, a)
	return true, nil
}

func (c *checker) fileEnd() int64 { return c.end << c.h.ClusterBits }

// loadBitmaps adds the bitmaps' tables (section "Bitmaps"). Without the feature bit there are none: a program that
// does not know them has written to the image.
func (c *checker) loadBitmaps() error {
	if c.h.Autoclear&AutoclearBitmaps == 0 {
		return nil
	}
	var (
		be  = binary.BigEndian
		d   = c.h.Bitmaps
		at  = d.DirectoryOffset
		end = at + d.DirectorySize
	)
	c.areas = append(c.areas, area{at, d.DirectorySize, "the bitmap directory"})
	room := c.fileEnd()
	for i := range d.Count {
		var e [24]byte
		if at+int64(len(e)) <= end {
			if err := c.read(e[:], at); err != nil {
				return err
			}
		}
		n := roundUp(24+int64(be.Uint16(e[18:]))+int64(be.Uint32(e[20:])), 8)
		if at+n > end {
			c.found(false, at, "entry %d of the bitmap directory is cut off", i)
			c.trouble.blind = true
			return nil
		}
		a := area{int64(be.Uint64(e[:])), int64(be.Uint32(e[8:])) * 8, fmt.Sprintf("the table of bitmap %d", i)}
		if a.n > 0 {
			ok, err := c.addArea(a, c.fileEnd(), &room)
			if err != nil {
				return err
			}
			if ok {
				c.bitmaps = append(c.bitmaps, a)
			}
		}
		at += n
	}
	return nil
}

// checkWindow does step 2 for the clusters from lo on.
func (c *checker) checkWindow(lo int64) error {
	c.quiet = lo > 0
	if err := c.countAll(lo); err != nil {
		return err
	}
	if err := c.checkShared(); err != nil {
		return err
	}
	if err := c.compare(); err != nil {
		return err
	}
	if err := c.flush(); err != nil {
		return err
	}
	if err := c.checkCopied(); err != nil {
		return err
	}
	return c.flush()
}

func (c *checker) flush() error {
	if c.repair == RepairNone {
		return nil
	}
	return blk.Do(c.t, c.storage, &blk.Request{Op: blk.OpFlush})
}

// countAll counts the references into the window from lo on.
func (c *checker) countAll(lo int64) error {
	c.refs.reset(lo)
	for _, a := range c.areas {
		if err := c.addRange(a.off, a.n, 1); err != nil {
			return err
		}
	}
	if !c.noRefs {
		if err := c.countRefcounts(); err != nil {
			return err
		}
	}
	for _, b := range c.bitmaps {
		if err := c.countBitmap(b); err != nil {
			return err
		}
	}
	return c.eachL2(false, c.countL2)
}

// addRange counts the clusters that the n > 0 bytes at off touch.
func (c *checker) addRange(off, n int64, weight uint64) error {
	first := max(off>>c.h.ClusterBits, c.refs.lo)
	last := min((off+n-1)>>c.h.ClusterBits, c.refs.lo+c.refs.n-1)
	for cl := first; cl <= last; cl++ {
		if err := c.refs.add(cl, weight); err != nil {
			return err
		}
	}
	return nil
}

// badOffset says what is wrong with the offset of a table or cluster. Only 0 < off is asked for.
func (c *checker) badOffset(off int64) string {
	switch {
	case off&(c.h.ClusterSize()-1) != 0:
		return "not at the beginning of a cluster"
	case off < 0 || off>>c.h.ClusterBits >= c.end:
		return "behind the end of the file"
	}
	return ""
}

// refBlock is the offset of a refcount block, or 0 if there is none that can be used.
func (c *checker) refBlock(i int64) int64 {
	if i >= int64(len(c.refTable)) || c.badOffset(c.refTable[i]) != "" {
		return 0
	}
	return c.refTable[i]
}

// write leaves out what lies past the end of the file. There b is still the zeros that were read.
func (c *checker) write(b []byte, off int64) error {
	return writeFull(c.t, c.storage, b[:min(int64(len(b)), c.storage.Info().Size-off)], off)
}

func writeFull(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

// checkShared looks for tables in the window that are also something else. A shared refcount block or table can be
// replaced; nothing is done about the others.
func (c *checker) checkShared() error {
	inWindow := func(a area, fn func(cl int64)) {
		for cl := max(a.off>>c.h.ClusterBits, c.refs.lo); cl <= min((a.off+a.n-1)>>c.h.ClusterBits, c.refs.lo+c.refs.n-1); cl++ {
			if c.refs.get(cl) > 1 {
				fn(cl)
			}
		}
	}
	for _, a := range c.areas {
		inWindow(a, func(cl int64) {
			c.found(false, cl<<c.h.ClusterBits, "this cluster of %s is referenced from elsewhere", a.what)
		})
	}
	refcounts := func(a area) {
		inWindow(a, func(cl int64) {
			c.found(false, cl<<c.h.ClusterBits, "this cluster of the reference counts is referenced from elsewhere")
			c.trouble.rebuild, c.trouble.shared = true, true
		})
	}
	refcounts(area{off: c.h.RefTableOffset, n: int64(c.h.RefTableClusters) << c.h.ClusterBits})
	for i := range c.refTable {
		if off := c.refBlock(int64(i)); off != 0 {
			refcounts(area{off: off, n: 1})
		}
	}
	for cl := c.l2s.next(c.l2s.lo); cl < c.l2s.lo+c.window; cl = c.l2s.next(cl + 1) {
		if c.refs.get(cl) != c.l2s.get(cl) {
			c.found(false, cl<<c.h.ClusterBits, "this L2 table is also something else")
		}
	}
	return nil
}

// compare holds the window's references against the reference counts in the image.
func (c *checker) compare() error {
	clear(c.single)
	per := int64(1) << c.h.refBlockBits()
	for first := c.refs.lo; first < min(c.refs.lo+c.window, c.end); first += per {
		off := c.refBlock(first / per)
		if off == 0 {
			c.compareNone(first, min(first+per, c.end))
			continue
		}
		if err := c.read(c.table.B, off); err != nil {
			return fmt.Errorf("qcow2: read the refcount block at %#x: %w", off, err)
		}
		if c.compareBlock(first, min(first+per, c.end), off) {
			if err := c.write(c.table.B, off); err != nil {
				return fmt.Errorf("qcow2: write the refcount block at %#x: %w", off, err)
			}
		}
	}
	return nil
}

// compareNone is about clusters without a refcount block.
func (c *checker) compareNone(first, end int64) {
	for cl := c.refs.next(first); cl < end; cl = c.refs.next(cl + 1) {
		c.found(false, cl<<c.h.ClusterBits, "%d references, and no refcount block", c.refs.get(cl))
		c.used(cl)
		c.trouble.rebuild = true
	}
}

func (c *checker) used(cluster int64) {
	c.res.ImageEnd = max(c.res.ImageEnd, (cluster+1)<<c.h.ClusterBits)
}

// compareBlock corrects the refcount block in c.table, if it may, and reports whether it did.
func (c *checker) compareBlock(first, end, off int64) (changed bool) {
	b, order := c.table.B, c.h.RefcountOrder
	lowers := c.repair != RepairNone && !c.trouble.shared && !c.trouble.blind
	raises := c.repair == RepairAll && !c.trouble.shared
	for cl := first; cl < end; cl++ {
		was, want := getCount(b, order, cl-first), c.refs.get(cl)
		is := was
		if is == 0 && want == 0 {
			continue
		}
		c.used(cl)
		switch {
		case is > want:
			c.found(true, cl<<c.h.ClusterBits, "leaked: reference count %d, %d references", is, want)
			if lowers {
				putCount(b, order, cl-first, want)
				is = want
			}
		case is < want:
			c.found(false, cl<<c.h.ClusterBits, "reference count %d, %d references", is, want)
			if raises && want <= c.h.maxRefcount() {
				putCount(b, order, cl-first, want)
				is = want
			}
		}
		if is == 1 {
			c.single.set(cl - c.refs.lo)
		}
		changed = changed || is != was
	}
	return changed
}

// checkCopied holds the copied bits of the active tables against the reference counts of the window.
func (c *checker) checkCopied() error {
	c.sets = c.repair == RepairAll || c.repair == RepairLeaks && c.res.Errors == c.copiedErrors && !c.trouble.blind
	err := c.pieces(c.l1s[0], func(b []byte, at int64) (changed bool, err error) {
		for i := 0; i+8 <= len(b); i += 8 {
			e := binary.BigEndian.Uint64(b[i:])
			off := l1Entry(e).offset()
			if off == 0 || c.badOffset(off) != "" {
				continue
			}
			if c.copiedBit(&e, at+int64(i), off, false) {
				binary.BigEndian.PutUint64(b[i:], e)
				changed = true
			}
		}
		return changed, nil
	})
	if err != nil {
		return err
	}
	return c.eachL2(true, c.checkCopiedL2)
}

func (c *checker) checkCopiedL2(at int64, _ uint64, _ bool) error {
	var (
		b       = c.table.B
		step    = 8 * c.lay.words
		changed bool
	)
	for i := 0; i < len(b); i += step {
		e, sub := c.l2Entry(b[i:])
		if e == 0 {
			continue
		}
		off, n, bad := c.entryRange(e, sub)
		word := uint64(e)
		switch {
		case n == 0:
			continue
		case e&compressed != 0:
			// What is wrong with it was counted with the references.
			if e&copied == 0 || c.repair != RepairAll {
				continue
			}
			word ^= copied
		case bad != "" || !c.copiedBit(&word, at+int64(i), off, c.lay.dataFile):
			continue
		}
		binary.BigEndian.PutUint64(b[i:], word)
		changed = true
	}
	if !changed {
		return nil
	}
	if err := c.write(b, at); err != nil {
		return fmt.Errorf("qcow2: write the L2 table at %#x: %w", at, err)
	}
	return nil
}

// copiedBit looks at the copied bit of an entry, at the offset at, that points to off, in a data file or not. It
// reports whether it changed it.
func (c *checker) copiedBit(e *uint64, at, off int64, dataFile bool) bool {
	var single bool
	switch cl := off >> c.h.ClusterBits; {
	case dataFile:
		// Clusters of a data file have no reference counts; they are nobody else's.
		if c.quiet {
			return false
		}
		single = true
	case !c.refs.has(cl):
		return false
	default:
		single = c.single.has(cl - c.refs.lo)
	}
	if single == (*e&copied != 0) {
		return false
	}
	c.copiedErrors++
	if single {
		c.found(false, at, "entry %#x: the copied bit is not set, and the reference count is 1", *e)
	} else {
		c.found(false, at, "entry %#x: the copied bit is set, and the reference count is not 1", *e)
	}
	if !c.sets || c.repair == RepairLeaks && !single {
		return false
	}
	*e ^= copied
	return true
}
