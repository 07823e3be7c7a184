// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Info describes one image. The JSON keys are qemu-img's. Sizes are in bytes.
type Info struct {
	Filename        string         `json:"filename"`
	Format          string         `json:"format"`
	VirtualSize     int64          `json:"virtual-size"`
	ActualSize      int64          `json:"actual-size"` // what the file takes on the host
	ClusterSize     int64          `json:"cluster-size,omitempty"`
	Dirty           bool           `json:"dirty-flag"`
	BackingFilename string         `json:"backing-filename,omitempty"`      // as the image has it
	FullBacking     string         `json:"full-backing-filename,omitempty"` // resolved
	BackingFormat   string         `json:"backing-filename-format,omitempty"`
	Snapshots       []SnapshotInfo `json:"snapshots,omitempty"`
	Specific        *SpecificInfo  `json:"format-specific,omitempty"`
}

// SnapshotInfo describes an internal snapshot.
type SnapshotInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	VMStateSize int64  `json:"vm-state-size"`
	Seconds     uint32 `json:"date-sec"` // since the epoch
	Nanoseconds uint32 `json:"date-nsec"`
	ClockSec    uint64 `json:"vm-clock-sec"`
	ClockNsec   uint64 `json:"vm-clock-nsec"`
	ICount      *int64 `json:"icount,omitempty"` // of record and replay
}

// BitmapInfo describes a persistent bitmap.
type BitmapInfo struct {
	Name        string   `json:"name"`
	Granularity int64    `json:"granularity"`
	Flags       []string `json:"flags"` // in-use: not saved, of no value; auto: records writes
}

// SpecificInfo is what only some formats have.
type SpecificInfo struct {
	Type string `json:"type"`
	Data any    `json:"data"` // *Qcow2Info or *AddCowInfo
}

// AddCowInfo describes an add-cow image.
type AddCowInfo struct {
	ImageFile    string `json:"image-file"`
	ImageFormat  string `json:"image-file-format"`
	AllAllocated bool   `json:"all-allocated"` // the image file is all that is needed
}

// Qcow2Info describes a qcow2 image.
type Qcow2Info struct {
	Compat        string       `json:"compat"`
	Compression   string       `json:"compression-type"`
	RefcountBits  int          `json:"refcount-bits"`
	LazyRefcounts *bool        `json:"lazy-refcounts,omitempty"` // not before version 3, as the next ones
	Corrupt       *bool        `json:"corrupt,omitempty"`
	ExtendedL2    *bool        `json:"extended-l2,omitempty"`
	DataFile      string       `json:"data-file,omitempty"`
	DataFileRaw   *bool        `json:"data-file-raw,omitempty"`
	Bitmaps       []BitmapInfo `json:"bitmaps,omitempty"`
}

// Describe describes the image, and all behind it if whole is set, the nearest first. It reads headers only, so it
// works with damaged images too. With an error come the images up to where it happened.
func Describe(path, format string, whole bool, o Options) (_ []Info, err error) {
	o.ReadOnly = true
	g, t := &Image{}, blk.NewTask()
	defer func() { err = errors.Join(err, g.Close()) }()
	err = g.openFiles(t, Layer{path, format}, o, whole)
	var all []Info
	for _, m := range g.Chain {
		i, ierr := m.info(t)
		err = errors.Join(err, ierr)
		all = append(all, i)
	}
	return all, err
}

func (m *Member) info(t *blk.Task) (Info, error) {
	i := Info{Filename: m.Path, Format: m.Format, VirtualSize: m.storage.Info().Size}
	var err error
	if i.ActualSize, err = Allocated(m.Path); err != nil {
		return i, err
	}
	i.ClusterSize = m.ClusterSize()
	says := m.backing()
	i.BackingFilename, i.BackingFormat = says.Path, says.Format
	if i.FullBacking = m.Backing; i.FullBacking == "" && says.Path != "" {
		i.FullBacking, _ = Resolve(m.Path, says.Path) // a name that is none is shown as it is, above
	}
	if a := m.AddCow; a != nil {
		if m.data != nil {
			i.VirtualSize = m.data.Info().Size
		}
		i.Specific = &SpecificInfo{Type: AddCow, Data: &AddCowInfo{a.ImageFile, a.ImageFormat, a.AllAllocated()}}
	}
	h := m.Header
	if h == nil {
		return i, nil
	}
	i.VirtualSize = roundUp(h.Size, blk.SectorSize)
	i.Dirty = h.Incompatible&qcow2.IncompatDirty != 0
	q := Qcow2Info{Compat: "0.10", Compression: "zlib", RefcountBits: int(h.RefcountBits())}
	if h.Compression == qcow2.CompressionZstd {
		q.Compression = "zstd"
	}
	flag := func(field, bit uint64) *bool {
		set := field&bit != 0
		return &set
	}
	if h.Version >= 3 {
		q.Compat = "1.1"
		q.LazyRefcounts = flag(h.Compatible, qcow2.CompatLazyRefcounts)
		q.Corrupt = flag(h.Incompatible, qcow2.IncompatCorrupt)
		q.ExtendedL2 = flag(h.Incompatible, qcow2.IncompatExtendedL2)
	}
	if h.Incompatible&qcow2.IncompatDataFile != 0 {
		q.DataFile, q.DataFileRaw = h.DataFile, flag(h.Autoclear, qcow2.AutoclearDataRaw)
	}
	err = m.lists(t, &i, &q)
	i.Specific = &SpecificInfo{Type: Qcow2, Data: &q}
	return i, err
}

func (m *Member) lists(t *blk.Task, i *Info, q *Qcow2Info) error {
	snapshots, err := qcow2.ReadSnapshots(t, m.storage, m.Header)
	if err != nil {
		return fmt.Errorf("image %q: %w", m.Path, err)
	}
	for _, s := range snapshots {
		d := SnapshotInfo{
			ID: s.ID, Name: s.Name, VMStateSize: s.VMStateSize, Seconds: s.Seconds, Nanoseconds: s.Nanoseconds,
			ClockSec: s.VMClock / 1e9, ClockNsec: s.VMClock % 1e9,
		}
		if s.ICount != -1 {
			d.ICount = &s.ICount
		}
		i.Snapshots = append(i.Snapshots, d)
	}
	bitmaps, err := qcow2.ReadBitmaps(t, m.storage, m.Header)
	if err != nil {
		return fmt.Errorf("image %q: %w", m.Path, err)
	}
	for _, b := range bitmaps {
		flags := []string{}
		if b.InUse {
			flags = append(flags, "in-use")
		}
		if b.Enabled {
			flags = append(flags, "auto")
		}
		q.Bitmaps = append(q.Bitmaps, BitmapInfo{Name: b.Name, Granularity: b.Granularity, Flags: flags})
	}
	return nil
}

// Allocated is how much a file takes on its storage, in bytes.
func Allocated(path string) (int64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("%s: no block count", path)
	}
	return st.Blocks * 512, nil // the unit of st_blocks, whatever the file system's is
}
