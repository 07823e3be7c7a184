// SPDX-License-Identifier: Apache-2.0

package blk

import "sync"

// RangeLock lets one task at a time work on a range of bytes. Waiting is first come, first served among
// overlapping ranges, so nobody starves; a waiting task parks and does not hold up its queue.
type RangeLock struct {
	mu   sync.Mutex
	list []*Range // held and waiting, in order of arrival
}

// Range is a range that a task holds or waits for.
type Range struct {
	off, end int64
	before   int // overlapping ranges that came earlier and are not released
	task     *Task
}

func (r *Range) overlaps(o *Range) bool { return r.off < o.end && o.off < r.end }

// Lock waits until [off, off+n) is t's alone.
func (l *RangeLock) Lock(t *Task, off, n int64) *Range {
	r := &Range{off: off, end: off + n, task: t}
	l.mu.Lock()
	for _, o := range l.list {
		if o.overlaps(r) {
			r.before++
		}
	}
	l.list = append(l.list, r)
	free := r.before == 0
	l.mu.Unlock()
	for !free {
		t.park()
		l.mu.Lock()
		free = r.before == 0
		l.mu.Unlock()
	}
	return r
}

// Unlock gives the range back. Any goroutine may call it.
func (l *RangeLock) Unlock(r *Range) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := 0; i < len(l.list); i++ {
		if l.list[i] != r {
			continue
		}
		l.list = append(l.list[:i], l.list[i+1:]...)
		// Only those that came later waited for r.
		for _, o := range l.list[i:] {
			if o.overlaps(r) {
				if o.before--; o.before == 0 {
					o.task.unpark()
				}
			}
		}
		return
	}
}
