// SPDX-License-Identifier: Apache-2.0

package qcow2

import "sync/atomic"

// Who writes one cluster behind the other gets places for the next ones too, in the same change of the table. These
// hold zeros, as before, so nobody sees a difference but the writer: its next writes are done in place. The rest of
// them stays allocated when the writer stops.
//
// Only images without a backing image do it. Over one, a cluster that the image does not hold gets its place from a
// change to that very cluster and from nothing else: copy on read counts on that. KeepHoles makes it so elsewhere.

// maxAhead bounds what is given beforehand, in bytes.
const maxAhead int64 = 1 << 20

// stream remembers where the last change ended that gave places. Of several writers it may lose sight.
type stream struct {
	next atomic.Int64 // guest offset
	size atomic.Int64 // clusters that the last one asked for beforehand
	off  atomic.Bool  // nobody is given any: see KeepHoles, and WriteCompressed, which goes only where there is no place yet
}

// KeepHoles is for an image behind which another one may be put later, which is to show wherever nothing was written:
// from now on a cluster gets its place from a change to it alone.
func (n *Node) KeepHoles() { n.stream.off.Store(true) }

// ahead is for how many clusters behind [off, off+l) a write there asks.
func (s *stream) ahead(n *Node, off, l int64) int {
	b := n.backing.Load()
	if off == 0 || off != s.next.Load() || s.off.Load() || n.dataFile || b.node != nil || b.named || l >= maxAhead {
		return 0
	}
	return int(min(max(2*s.size.Load(), 1), maxAhead>>n.clusterBits))
}

// gave notes that places were given up to the guest offset end, to who asked for so many clusters beforehand.
func (s *stream) gave(end int64, ahead int) {
	s.size.Store(int64(ahead))
	s.next.Store(end)
}

// spare is how many of the clusters behind the chunk can be given beforehand, of those asked for: what has a place
// already, and what the disk or the table does not reach, cannot.
func (n *Node) spare(c *chunk, ahead int) int64 {
	if c.base+int64(len(c.old))<<n.clusterBits < c.off+c.l {
		return 0 // the chunk ends before the write does
	}
	first := c.first + len(c.old)
	i := first
	for ; i < min(first+ahead, c.tab.entries()); i++ {
		o := c.tab.stableAt(i)
		guest := c.base + int64(i-c.first)<<n.clusterBits
		if o.present || o.packed != 0 || o.bad || guest >= n.info.Load().Size {
			break
		}
	}
	return int64(i - first)
}
