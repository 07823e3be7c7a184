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
	Filename        string        `json:"filename"`
	Format          string        `json:"format"`
	VirtualSize     int64         `json:"virtual-size"`
	ActualSize      int64         `json:"actual-size"` // what the file takes on the host
	ClusterSize     int64         `json:"cluster-size,omitempty"`
	Dirty           bool          `json:"dirty-flag"`
	BackingFilename string        `json:"backing-filename,omitempty"`      // as the image has it
	FullBacking     string        `json:"full-backing-filename,omitempty"` // resolved
	BackingFormat   string        `json:"backing-filename-format,omitempty"`
	Specific        *SpecificInfo `json:"format-specific,omitempty"`
}

// SpecificInfo is what only some formats have.
type SpecificInfo struct {
	Type string    `json:"type"`
	Data Qcow2Info `json:"data"`
}

// Qcow2Info describes a qcow2 image.
type Qcow2Info struct {
	Compat        string `json:"compat"`
	Compression   string `json:"compression-type"`
	RefcountBits  int    `json:"refcount-bits"`
	LazyRefcounts *bool  `json:"lazy-refcounts,omitempty"` // not before version 3, as the next ones
	Corrupt       *bool  `json:"corrupt,omitempty"`
	ExtendedL2    *bool  `json:"extended-l2,omitempty"`
	DataFile      string `json:"data-file,omitempty"`
	DataFileRaw   *bool  `json:"data-file-raw,omitempty"`
	Snapshots     int    `json:"snapshot-count,omitempty"` // internal ones
	Bitmaps       int    `json:"bitmap-count,omitempty"`   // persistent ones
}

// Describe describes the image, and all behind it if whole is set, the nearest first. It reads headers only, so it
// works with damaged images too. With an error come the images up to where it happened.
func Describe(path, format string, whole bool, o Options) (_ []Info, err error) {
	o.ReadOnly = true
	g := &Image{}
	defer func() { err = errors.Join(err, g.Close()) }()
	err = g.openFiles(blk.NewTask(), Layer{path, format}, o, whole)
	var all []Info
	for _, m := range g.Chain {
		i, ierr := m.info()
		if ierr != nil {
			err = errors.Join(err, ierr)
			break
		}
		all = append(all, i)
	}
	return all, err
}

func (m *Member) info() (Info, error) {
	i := Info{Filename: m.Path, Format: m.Format, VirtualSize: m.storage.Info().Size}
	var err error
	if i.ActualSize, err = allocated(m.Path); err != nil {
		return i, err
	}
	h := m.Header
	if m.Format == Raw || h == nil {
		return i, nil
	}
	i.VirtualSize, i.ClusterSize = roundUp(h.Size, blk.SectorSize), h.ClusterSize()
	i.Dirty = h.Incompatible&qcow2.IncompatDirty != 0
	i.BackingFilename, i.BackingFormat = h.BackingFile, h.BackingFormat
	if i.FullBacking = m.Backing; i.FullBacking == "" && h.BackingFile != "" {
		i.FullBacking, _ = Resolve(m.Path, h.BackingFile) // a name that is none is shown as it is, above
	}
	q := Qcow2Info{
		Compat: "0.10", Compression: "zlib", RefcountBits: int(h.RefcountBits()),
		Snapshots: int(h.SnapshotCount), Bitmaps: int(h.Bitmaps.Count),
	}
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
	i.Specific = &SpecificInfo{Type: Qcow2, Data: q}
	return i, nil
}

func allocated(path string) (int64, error) {
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
