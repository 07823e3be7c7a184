// SPDX-License-Identifier: Apache-2.0

package addcow

import (
	"fmt"

	"github.com/blkstream/blkstream/blk"
)

// CheckResult is what a check found.
type CheckResult struct {
	Clusters, Allocated int64
	End                 int64 // of the bitmap, bytes
	Findings            []Finding
	Fixed               bool // all findings are repaired
}

// Finding is one error.
type Finding struct {
	Offset int64 // in the add-cow file, bytes
	What   string
}

func (f Finding) String() string { return fmt.Sprintf("%#x: %s", f.Offset, f.What) }

// Check holds the bitmap against the size of the image file, which is disk bytes long. Nobody else may use the image.
// The repair makes a bitmap that is too short longer, so that the backing file shows there, as it does without; and takes
// bits back that are behind the image file's end.
func Check(t *blk.Task, storage blk.Node, disk int64, repair bool) (CheckResult, error) {
	h, err := ReadHeader(t, storage)
	if err != nil {
		return CheckResult{}, err
	}
	size, err := h.bitmapSize(disk)
	if err != nil {
		return CheckResult{}, err
	}
	clusters := up(disk, h.ClusterSize()) >> h.ClusterBits
	r := CheckResult{Clusters: clusters, Allocated: clusters, End: h.Size + size}
	if h.AllAllocated() {
		return r, nil
	}
	found := func(off int64, format string, args ...any) {
		r.Findings = append(r.Findings, Finding{off, fmt.Sprintf(format, args...)})
	}
	have := storage.Info().Size
	if have < r.End {
		found(have, "the bitmap ends, %d bytes early", r.End-have)
	}
	// With all that is behind the last cluster: it would count if the image file became longer.
	size = max(size, min(have-h.Size, maxBitmap)&^7)
	b := newBitmap(storage, h, size*8)
	if err := b.load(t); err != nil {
		return r, err
	}
	behind := size*8 - clusters
	over := b.known.count()
	b.known.clear(clusters, behind)
	r.Allocated = b.known.count()
	if over -= r.Allocated; over > 0 {
		found(h.Size+clusters/8, "%d bits are set for clusters behind the end of the image file, which has %d bytes", over, disk)
	}
	if !repair || len(r.Findings) == 0 {
		return r, nil
	}
	if err := grow(t, storage, h.Size+up(size, block)); err != nil {
		return r, err
	}
	if over > 0 {
		b.wanted.clear(clusters, behind)
		b.mark(clusters, behind)
	}
	if err := b.sync(t); err != nil {
		return r, err
	}
	if err := blk.Do(t, storage, &blk.Request{Op: blk.OpFlush}); err != nil {
		return r, err
	}
	r.Fixed = true
	return r, nil
}
