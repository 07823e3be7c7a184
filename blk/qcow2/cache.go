// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"sync"
	"sync/atomic"
)

// DefaultCacheBytes covers 1 TiB of a disk with clusters of 64 KiB. Memory is only used as tables are.
const DefaultCacheBytes = 136 << 20

// Cache bounds the memory for tables, of any number of images. Tables that have not been used for long go first. What
// is just being worked on stays, so that the bound may be exceeded by a few tables for a moment.
type Cache struct {
	mu    sync.Mutex
	limit int64
	used  int64
	ring  []cacheable
	hand  int
}

// NewCache returns a cache for tables of so many bytes.
func NewCache(limit int64) *Cache { return &Cache{limit: limit} }

// cacheable is a table or a refcount block. It is reached through an atomic pointer, without the cache, and its
// memory lives as long as anyone looks at it.
type cacheable interface {
	entry() *cached
	evict() // clears the pointer; under Cache.mu
}

// cached is the cache's part of it.
type cached struct {
	node  *Node
	bytes int64
	used  atomic.Bool // since the hand passed
	pins  int         // under Cache.mu; not evicted while > 0
}

func (c *cached) entry() *cached { return c }

// touch marks a table as used.
func (c *cached) touch() {
	if !c.used.Load() {
		c.used.Store(true)
	}
}

// add takes a table in, pinned once; install sets its pointer.
func (c *Cache) add(x cacheable, install func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := x.entry()
	e.pins = 1
	e.used.Store(true)
	install()
	c.ring = append(c.ring, x)
	c.used += e.bytes
	// Twice around: the first time clears the marks.
	for steps := 2 * len(c.ring); c.used > c.limit && steps > 0; steps-- {
		c.hand %= len(c.ring)
		y := c.ring[c.hand]
		if e := y.entry(); e.pins > 0 || e.used.Swap(false) {
			c.hand++
			continue
		}
		y.evict()
		c.removeLocked(c.hand)
	}
}

func (c *Cache) removeLocked(i int) {
	e := c.ring[i].entry()
	c.used -= e.bytes
	last := len(c.ring) - 1
	c.ring[i], c.ring[last] = c.ring[last], nil
	c.ring = c.ring[:last]
}

// pin keeps what get returns from being evicted, if it is not nil.
func pin[T interface {
	comparable
	cacheable
}](c *Cache, get func() T) T {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := get()
	var none T
	if x != none {
		x.entry().pins++
		x.entry().touch()
	}
	return x
}

func (c *Cache) unpin(x cacheable) {
	c.mu.Lock()
	defer c.mu.Unlock()
	x.entry().pins--
}

// drop takes a table out; its pointer is the caller's.
func (c *Cache) drop(old cacheable) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(func(x cacheable) bool { return x == old })
}

// forget drops everything of a node.
func (c *Cache) forget(n *Node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(func(x cacheable) bool { return x.entry().node == n })
}

func (c *Cache) dropLocked(match func(cacheable) bool) {
	for i := 0; i < len(c.ring); {
		if match(c.ring[i]) {
			c.removeLocked(i)
		} else {
			i++
		}
	}
}
