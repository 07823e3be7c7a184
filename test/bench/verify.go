// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// A verified block says what it is: magic, its offset on the disk, the run's seed, its generation there, and a checksum
// over everything but itself; the rest is noise made of these.
const (
	magic       = 0x7665726966696564
	blockHeader = 32
)

var (
	errVerify  = errors.New("verification failed")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// checker knows what the blocks of one worker's share should hold.
type checker struct {
	seed   uint64
	offset int64    // of the share on the disk
	bs     int64    // bytes a block
	gens   []uint32 // by block: the generation on disk; 0: not known
	latest []uint32 // the last generation that was given out
	busy   []bool   // in flight: overlapping requests have no order, so there are none
}

func newChecker(j *job, first, blocks int64) *checker {
	return &checker{
		seed: j.seed, offset: int64(j.offset) + first*int64(j.bs), bs: int64(j.bs),
		gens: make([]uint32, blocks), latest: make([]uint32, blocks), busy: make([]bool, blocks),
	}
}

// claim takes block, or the next one that is not in flight.
func (c *checker) claim(block int64) (int64, bool) {
	for range c.busy {
		if !c.busy[block] {
			c.busy[block] = true
			return block, true
		}
		block = (block + 1) % int64(len(c.busy))
	}
	return 0, false
}

func (c *checker) written(block int64) bool { return c.gens[block] != 0 }

func (c *checker) place(block int64) uint64 { return uint64(c.offset + block*c.bs) }

// fill makes the next generation of block in b.
func (c *checker) fill(b []byte, block int64) (gen uint32) {
	c.latest[block]++
	gen = c.latest[block]
	le := binary.LittleEndian
	le.PutUint64(b, magic)
	le.PutUint64(b[8:], c.place(block))
	le.PutUint64(b[16:], c.seed)
	le.PutUint32(b[24:], gen)
	x := c.seed ^ c.place(block)<<20 ^ uint64(gen)
	for p := b[blockHeader:]; len(p) > 0; p = p[8:] {
		x += 0x9e3779b97f4a7c15
		le.PutUint64(p, (x^x>>30)*0xbf58476d1ce4e5b9)
	}
	le.PutUint32(b[28:], checksum(b))
	return gen
}

func checksum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:28], castagnoli), castagnoli, b[blockHeader:])
}

// done settles what a finished request means for its block. It returns err, or what is wrong with the data read.
func (c *checker) done(o *op, err error) error {
	c.busy[o.block] = false
	switch {
	case o.Type == frontend.TypeOut && err == nil:
		c.gens[o.block] = o.gen
	case o.Type == frontend.TypeOut:
		c.gens[o.block] = 0 // old, new or a mixture
	case err == nil:
		return c.verify(o.mem, o.block)
	}
	return err
}

// verify compares b with what block should hold. Of a block that this run has not written it only asks that, if it
// looks like one of ours from another run, it is in its place and whole.
func (c *checker) verify(b []byte, block int64) error {
	le := binary.LittleEndian
	want := c.gens[block]
	ours := le.Uint64(b) == magic
	place, seed, gen := le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint32(b[24:])
	switch {
	case want == 0 && !ours:
		return nil
	case !ours:
		return fmt.Errorf("%w: not a block that was ever written here (starts with %x), want generation %d", errVerify, b[:8], want)
	case le.Uint32(b[28:]) != checksum(b):
		return fmt.Errorf("%w: torn or damaged block: wrong checksum, generation %d, want %d", errVerify, gen, want)
	case place != c.place(block):
		return fmt.Errorf("%w: block belongs to offset %d", errVerify, place)
	case want != 0 && seed != c.seed:
		return fmt.Errorf("%w: block is from the run with seed %d, want generation %d of seed %d", errVerify, seed, want, c.seed)
	case want != 0 && gen != want:
		return fmt.Errorf("%w: generation %d, want %d", errVerify, gen, want)
	}
	return nil
}
