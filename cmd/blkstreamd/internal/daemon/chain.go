// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"slices"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// What a job does with an image of its disk's chain.
const (
	roleSource = "source"
	roleTarget = "target"
	roleBase   = "base"
)

// chain draws the images that the disk is made of, and what the jobs do with them. The files are looked at with no lock
// held: the storage of a deep chain may be slow, and guests and jobs do not wait for it.
func (s *service) chain(k *disk) []*control.ChainImage {
	k.mu.Lock() // an image loses its chain when it is closed, after the disk has left it
	members := slices.Clone(k.img.Chain)
	k.mu.Unlock()
	var all []*control.ChainImage
	for i, m := range members {
		o := &control.ChainImage{Image: m.Path, Format: m.Format, Size: m.Size, Allocated: allocated(m)}
		if i == 0 {
			o.Size = k.dev.Size() // a resize changes it
		}
		all = append(all, o)
	}
	if s.d.jobs == nil {
		return all
	}
	for _, j := range s.d.jobs.List() {
		if r := j.Record(); r.Disk == k.spec.ID && !job.Ended(r.State) {
			into := r.Target
			if len(members) > 0 && members[0].AddCow != nil && members[0].DataFile == into {
				into = members[0].Path
			}
			addJob(all, r, into)
		}
	}
	return all
}

// allocated is what the image's files take; -1: they do not say.
func allocated(m *image.Member) int64 {
	n, err := image.Allocated(m.Path)
	if err != nil {
		return -1
	}
	if m.DataFile != "" {
		data, err := image.Allocated(m.DataFile)
		if err != nil {
			return -1
		}
		n += data
	}
	return n
}

// addJob says what a job does with each image; into is the one that it copies to. It works on those from the first one,
// or that of the middle of the chain where a commit begins, up to its base or target.
func addJob(chain []*control.ChainImage, r job.Record, into string) {
	place := func(path string) int {
		for _, same := range []func(a, b string) bool{func(a, b string) bool { return a == b }, sameFile} {
			if i := slices.IndexFunc(chain, func(c *control.ChainImage) bool { return same(c.Image, path) }); i >= 0 {
				return i
			}
		}
		return len(chain)
	}
	add := func(i int, role string) {
		if i < len(chain) {
			chain[i].Jobs = append(chain[i].Jobs, &control.ChainJob{Id: r.ID, Kind: r.Kind, Role: role, Target: r.Target})
		}
	}
	from, to, target := 0, len(chain), place(into)
	if r.Base != "" {
		to = place(r.Base)
	}
	switch {
	case r.Kind == kindCommit:
		from, to = place(r.Source), target
	case target == 0:
		from = 1 // the rest is copied into the image that the guest is on
	}
	for i := from; i < to; i++ {
		add(i, roleSource)
	}
	add(target, roleTarget)
	if r.Base != "" {
		add(to, roleBase)
	}
}
