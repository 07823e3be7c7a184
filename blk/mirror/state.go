// SPDX-License-Identifier: Apache-2.0

package mirror

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// State is what a copy has to know of its two images: where they may differ. It can lie in memory that outlives the
// process, a shared mapping of a file, and then another process goes on from it.
//
// The rule: wherever the process dies, a block in which source and target may differ lies behind the point that the bulk
// stage has come to, or has a bit in Dirty or in flight. It holds since
//
//   - a piece of the bulk stage is dirty before the bulk stage passes it;
//   - whoever is about to change a block in one image, or to clear a bit of Dirty, first sets the block's bit in flight:
//     a logged write (Do, or TryMap for the queue that writes by itself), a mirrored one, and the copier;
//   - a logged write sets Dirty when it has ended, and anyone else whose change failed; so what has ended leaves both
//     images the same or a bit in Dirty. A copier that cleared that bit before the write ended has done it before the
//     bit was set, and one that clears it later reads what was written;
//   - a bit in flight stays until all that might have set it has ended. There are two bitmaps, one for what begins now.
//     The other one is emptied when nothing that began with it is left, and then they change places (settle). So two
//     that work on the same block at once do not clear each other's bit;
//   - a flush of the target that fails sets all of Dirty, since it may have lost anything. One that was going on when the
//     process died has failed for all we know (unsure), and so has, after any other error of the target than that it is
//     full, what the host writes to it in the background: the next process is not told;
//   - before the filter goes the state is over (Over).
type State struct {
	// Dirty has a bit for each block in which source and target may differ, not counting what is in flight and what the
	// bulk stage has not come to.
	Dirty *blk.Bitmap

	words  []atomic.Uint64
	size   int64
	flight [2]*blk.Bitmap
	epoch  atomic.Uint32   // which of them is for what begins now
	flying [2]atomic.Int64 // what began with Begin and has not ended
}

// The words before the bitmaps.
const (
	wordBulk   = iota // the bulk stage has passed what lies before, in bytes
	wordUnsure        // flushes of the target that are going on, and its errors
	wordOver          // not 0: what is written from now on is not logged
	headWords  = 8
)

// StateWords is how many words a state takes that is to outlive the process.
func StateWords(size, granularity int64) int64 {
	return headWords + 3*blk.BitmapWords(size, granularity)
}

// NewState returns the state of a copy that begins, for a disk of size bytes. Its words are zero, StateWords of them;
// nil: it does not outlive the process.
func NewState(words []atomic.Uint64, size, granularity int64) *State {
	flightUnit := granularity
	if words == nil {
		flightUnit = 1 << 62 // nobody will look: one bit is enough
		words = make([]atomic.Uint64, headWords+blk.BitmapWords(size, granularity)+2)
	}
	s := &State{words: words, size: size}
	words = words[headWords:]
	take := func(unit int64) *blk.Bitmap {
		n := blk.BitmapWords(size, unit)
		b := blk.BitmapOver(words[:n], size, unit)
		words = words[n:]
		return b
	}
	s.Dirty, s.flight[0], s.flight[1] = take(granularity), take(flightUnit), take(flightUnit)
	return s
}

// The errors of OpenState: its words cannot be relied on.
var (
	errUnsure = errors.New("a flush of the target was going on, or something on it had failed")
	errOver   = errors.New("it was over, and what was written then was not logged")
	errBulk   = errors.New("what is known of it is damaged")
)

// OpenState returns the state that another process left in the words. Nobody else uses them.
func OpenState(words []atomic.Uint64, size, granularity int64) (*State, error) {
	s := NewState(words, size, granularity)
	if words[wordUnsure].Load() != 0 {
		return nil, errUnsure
	}
	if words[wordOver].Load() != 0 {
		return nil, errOver
	}
	if b := s.Bulk(); b < 0 || b >= size+granularity || b%granularity != 0 && b != size {
		return nil, errBulk
	}
	// What was in flight did its work, or a part of it, or nothing.
	for _, f := range s.flight {
		s.Dirty.Merge(f)
	}
	s.Rest()
	return s, nil
}

// Bulk is up to where the bulk stage has come, in bytes. It may be past the disk.
func (s *State) Bulk() int64 { return int64(s.words[wordBulk].Load()) }

// SetBulk says that the bulk stage has passed what lies before at. That is the same in both images, or dirty.
func (s *State) SetBulk(at int64) { s.words[wordBulk].Store(uint64(at)) }

// Left is how much of the disk may differ, in bytes, what is in flight not counted.
func (s *State) Left() int64 { return max(s.size-s.Bulk(), 0) + min(s.Dirty.Bytes(), s.size) }

// Begin says that [off, off+n) is about to be changed in one of the images, or copied. What it returns is for End.
func (s *State) Begin(off, n int64) (epoch uint32) {
	for {
		e := s.epoch.Load()
		s.flying[e].Add(1)
		if s.epoch.Load() == e { // else settle may not have seen us
			s.flight[e].Set(off, n)
			return e
		}
		s.flying[e].Add(-1)
	}
}

// End says that both images are the same there now, or that it is marked in Dirty.
func (s *State) End(epoch uint32) { s.flying[epoch].Add(-1) }

// note is Begin for a write whose end the graph's barrier tells.
func (s *State) note(off, n int64) { s.flight[s.epoch.Load()].Set(off, n) }

// settleEvery bounds what is copied again after the process died: what was written and copied in about twice that time.
// Tests are in more of a hurry.
var settleEvery = 500 * time.Millisecond

// Settle forgets from time to time what is not in flight any more, until ctx ends. barrier waits until all writes have
// ended that began before on extents that TryMap gave (blk.Graph.Barrier).
func (s *State) Settle(ctx context.Context, barrier func(*blk.Task) error) {
	t := blk.NewTask()
	for sleep(ctx, settleEvery) {
		s.settle(ctx, func() error { return barrier(t) })
	}
}

func (s *State) settle(ctx context.Context, barrier func() error) {
	old := s.epoch.Load()
	s.epoch.Store(1 - old)
	if barrier() != nil {
		return
	}
	for s.flying[old].Load() > 0 {
		if !sleep(ctx, time.Millisecond) {
			return // the bits stay
		}
	}
	s.flight[old].Clear(0, s.size)
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Doubt takes an error of the target. What the present process hears of it by later errors, the next one may not.
func (s *State) Doubt(err error) {
	if !blk.IsNoSpace(err) {
		s.words[wordUnsure].Add(1)
	}
}

// Over says that the filter goes: what is written from now on is not logged, though the process may die long before
// anyone has written down that the copy is over.
func (s *State) Over() { s.words[wordOver].Store(1) }

// Rest says that nothing is in flight.
func (s *State) Rest() {
	for _, f := range s.flight {
		f.Clear(0, s.size)
	}
}
