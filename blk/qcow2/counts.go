// SPDX-License-Identifier: Apache-2.0

package qcow2

import "fmt"

// counts is how often each host cluster of a window [lo, lo+n) is referenced, as a check finds it. Memory is taken
// for parts of the window that have references: 2 bytes a cluster, and a map of bounded size for the few clusters
// that have more references than that can hold.
type counts struct {
	lo, n int64 // clusters
	pages [][]uint16
	many  map[int64]uint64 // clusters whose page says countMany
}

const (
	countPage = 4096 // clusters
	countMany = 1<<16 - 1
	// maxMany bounds the map. A cluster gets there by 65535 snapshots, or as many compressed clusters in it.
	maxMany = 1 << 16
)

func newCounts(n int64) *counts {
	return &counts{n: n, pages: make([][]uint16, (n+countPage-1)/countPage), many: map[int64]uint64{}}
}

// reset moves the empty window to lo.
func (c *counts) reset(lo int64) {
	c.lo = lo
	for _, p := range c.pages {
		clear(p)
	}
	clear(c.many)
}

func (c *counts) has(cluster int64) bool { return cluster >= c.lo && cluster-c.lo < c.n }

// add counts weight more references, if the cluster is in the window.
func (c *counts) add(cluster int64, weight uint64) error {
	if !c.has(cluster) {
		return nil
	}
	i := cluster - c.lo
	p := c.pages[i/countPage]
	if p == nil {
		p = make([]uint16, countPage)
		c.pages[i/countPage] = p
	}
	at := &p[i%countPage]
	if *at != countMany {
		if sum := uint64(*at) + weight; sum < countMany && sum >= weight {
			*at = uint16(sum)
			return nil
		}
		if len(c.many) >= maxMany {
			return fmt.Errorf("more than %d clusters have %d or more references each: %w", maxMany, countMany, ErrTooLarge)
		}
		c.many[cluster], *at = uint64(*at), countMany
	}
	if sum := c.many[cluster] + weight; sum >= weight {
		c.many[cluster] = sum
	} else {
		c.many[cluster] = 1<<64 - 1
	}
	return nil
}

// get is the number of references.
func (c *counts) get(cluster int64) uint64 {
	if !c.has(cluster) {
		return 0
	}
	i := cluster - c.lo
	p := c.pages[i/countPage]
	switch {
	case p == nil:
		return 0
	case p[i%countPage] == countMany:
		return c.many[cluster]
	}
	return uint64(p[i%countPage])
}

// next is the first cluster at or after this one that has references, or the end of the window.
func (c *counts) next(cluster int64) int64 {
	i := max(cluster-c.lo, 0)
	for i < c.n {
		p := c.pages[i/countPage]
		if p == nil {
			i = (i/countPage + 1) * countPage
			continue
		}
		if p[i%countPage] != 0 {
			return c.lo + i
		}
		i++
	}
	return c.lo + c.n
}

// bitset is a set of small numbers.
type bitset []uint64

func newBitset(n int64) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(i int64)      { b[i/64] |= 1 << (i % 64) }
func (b bitset) has(i int64) bool { return b[i/64]>>(i%64)&1 != 0 }
