// SPDX-License-Identifier: Apache-2.0

package dirty

import (
	"maps"
	"slices"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// The keeper is a goroutine that puts regions on the list for writes that wait, and retires others.

// maxFresh bounds the memory for what the next write of the files makes stable.
const maxFresh = 1 << 16

func (n *Node) keep() {
	defer close(n.ended)
	t := blk.NewTask()
	tick := time.NewTicker(idle)
	defer tick.Stop()
	var (
		told  bool      // that writes were missed is durable
		since time.Time // when it was found that they will be
		retry <-chan time.Time
	)
	for {
		select {
		case <-n.kick:
		case <-retry:
		case <-tick.C:
			n.age(t)
		case <-n.stop:
			n.mu.Lock()
			n.admitAllLocked()
			n.mu.Unlock()
			return
		}
		for n.turn(t) {
		}
		retry = nil
		if err := n.Err(); err != nil && !told {
			if since.IsZero() {
				since = time.Now()
			}
			if told = n.tell(t, err); told || time.Since(since) >= patience {
				n.letGo()
			} else {
				retry = time.After(patience / 10)
			}
		}
	}
}

// letGo lets all writes pass from now on, which nobody records.
func (n *Node) letGo() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.untracked.Store(true)
	n.gone = true
	n.admitAllLocked()
}

// turn serves some of the writes that wait, and reports whether it is worth while to go on.
func (n *Node) turn(t *blk.Task) (more bool) {
	n.files.Lock()
	defer n.files.Unlock()
	var (
		ahead []*admission           // to be marked in the files before they begin
		need  = map[int64]struct{}{} // regions to be put on the list
	)
	n.mu.Lock()
	switch {
	case n.gone || len(n.bitmaps) == 0:
		n.admitAllLocked()
	case n.err != nil: // until it is durable that they are missed
		n.mu.Unlock()
		return false
	}
	rest := n.waiting
	n.waiting = nil
	var now []*admission
	for len(rest) > 0 {
		a := rest[0]
		if a.last-a.first >= maxSpan {
			ahead, rest = append(ahead, a), rest[1:]
			continue
		}
		fits := 0
		for r := a.first; r <= a.last; r++ {
			_, on := n.active[r]
			_, soon := need[r]
			if !on && !soon {
				fits++
			}
		}
		if len(n.active)+len(need)+fits > maxActive {
			break
		}
		for r := a.first; r <= a.last; r++ {
			if _, on := n.active[r]; !on {
				need[r] = struct{}{}
			}
		}
		now, rest = append(now, a), rest[1:]
	}
	n.waiting = slices.Concat(rest, n.waiting)
	list := slices.Collect(maps.Keys(n.active))
	n.mu.Unlock()

	for _, a := range ahead {
		n.mark(a.off, a.n)
	}
	if len(ahead) > 0 && !n.save(t) {
		n.again(ahead, now)
		return false
	}
	n.admit(ahead)
	if len(need) > 0 && !n.writeList(t, slices.AppendSeq(list, maps.Keys(need))) {
		n.again(now)
		return false
	}
	n.mu.Lock()
	for r := range need {
		n.active[r] = 0
		n.regions[r].Store(written)
	}
	for _, a := range now {
		n.takeLocked(a)
	}
	n.mu.Unlock()
	n.admit(now)
	if len(rest) == 0 {
		return false
	}
	return n.retire(t, n.victims(rest))
}

func (n *Node) admit(all []*admission) {
	for _, a := range all {
		close(a.ready)
	}
}

// again lets writes wait further.
func (n *Node) again(all ...[]*admission) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.waiting = append(n.waiting, slices.Concat(all...)...)
}

// admitAllLocked lets everyone go on, since nothing is recorded.
func (n *Node) admitAllLocked() {
	n.admit(n.waiting)
	n.waiting = nil
}

// victims are up to half of the regions, those in which nobody writes first. Nobody in Do is in them. If there are none,
// the keeper is woken when a write in Do ends.
func (n *Node) victims(waiting []*admission) []int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	wanted := map[int64]struct{}{}
	for _, a := range waiting[:min(len(waiting), maxActive)] {
		for r := a.first; r <= a.last && a.last-a.first < maxSpan; r++ {
			wanted[r] = struct{}{}
		}
	}
	var still, busy []int64
	for r, writes := range n.active {
		_, want := wanted[r]
		switch {
		case writes > 0:
		case n.regions[r].Load() == quiet && !want:
			still = append(still, r)
		default:
			busy = append(busy, r)
		}
	}
	all := slices.Concat(still, busy)
	if len(all) == 0 {
		n.leaves = true
	}
	return all[:min(len(all), maxActive/2)]
}

// age retires what has not been written for a while.
func (n *Node) age(t *blk.Task) {
	n.files.Lock()
	defer n.files.Unlock()
	var old []int64
	n.mu.Lock()
	if n.err == nil {
		for r, writes := range n.active {
			switch s := &n.regions[r]; {
			case writes > 0:
			case s.Load() == quiet:
				old = append(old, r)
			default:
				s.CompareAndSwap(written, quiet)
			}
		}
	}
	n.mu.Unlock()
	if n.retire(t, old) {
		n.writeList(t, n.list())
	}
}

// list is the regions on the list.
func (n *Node) list() []int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Keys(n.active))
}

// retire takes regions off the list in memory, when what was written there is in the files. The list itself may stay as
// it is until it is written for another reason. It reports whether there is room then.
func (n *Node) retire(t *blk.Task, regions []int64) bool {
	n.mu.Lock()
	regions = slices.DeleteFunc(regions, func(r int64) bool { return n.active[r] > 0 }) // somebody came meanwhile
	for _, r := range regions {
		delete(n.active, r)
		n.regions[r].Store(absent)
	}
	n.mu.Unlock()
	if len(regions) == 0 {
		return false
	}
	// Writes that have seen the regions on the list end, and leave their marks.
	if err := n.o.Barrier(t); err != nil {
		n.fail(err)
		return true
	}
	for _, r := range regions {
		n.collect(r<<n.shift, 1<<n.shift)
	}
	return n.save(t)
}

// collect moves what recent says of [off, off+l) into the bitmaps.
func (n *Node) collect(off, l int64) {
	for end := min(off+l, n.size); off < end; {
		at, got, ok := n.recent.Next(off, end-off)
		if !ok || at >= end {
			return
		}
		// Cleared first: a mark that comes meanwhile is either seen here or stays.
		n.recent.Clear(at, got)
		n.mark(at, got)
		off = at + got
	}
}

func (n *Node) mark(off, l int64) {
	for _, b := range n.bitmaps {
		b.bits.Set(off, l)
		b.file.touch(b.bits, off, l)
	}
	if len(n.fresh) < maxFresh {
		n.fresh = append(n.fresh, span{off, l})
	}
}

// save makes the files hold what the bitmaps do.
func (n *Node) save(t *blk.Task) bool {
	for _, b := range n.bitmaps {
		if err := b.file.write(t, n.size, b.all()...); err != nil {
			n.fail(err)
			return false
		}
	}
	for _, s := range n.fresh {
		n.stable.Set(s.off, s.n)
	}
	n.fresh = n.fresh[:0]
	return true
}

// all is what counts of a bitmap for the file: until Thaw, what was frozen, too.
func (b *Bitmap) all() []*blk.Bitmap {
	if b.frozen == nil {
		return []*blk.Bitmap{b.bits}
	}
	return []*blk.Bitmap{b.bits, b.frozen}
}

// writeList replaces the list, durably. What is on the old one and not on the new one is in the files by then.
func (n *Node) writeList(t *blk.Task, list []int64) bool {
	if !n.save(t) {
		return false
	}
	if err := n.log.write(t, n.size, n.shift, list); err != nil {
		n.fail(err)
		return false
	}
	return true
}

// fail: what is written from now on may be missed after a restart, and therefore counts as missed. Writes that are not
// recorded wait until that is durable.
func (n *Node) fail(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.err == nil {
		n.err = err
	}
	n.wake()
}

// tell makes it durable that writes were missed, in the log or elsewhere, and reports whether that is done.
func (n *Node) tell(t *blk.Task, err error) bool {
	n.files.Lock()
	inLog := n.log.put(t, n.size, n.shift, logBroken, nil) == nil
	n.files.Unlock()
	return n.o.Broken(err) == nil || inLog
}
