// SPDX-License-Identifier: Apache-2.0

package blktest

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// Fault is a filter that lets tests fail requests and hold them up. By default it gives no extents, so that every
// request passes Do and can be caught; Map keeps to itself where the bytes are.
type Fault struct {
	child blk.Node
	// Transparent lets TryMap and Map through: requests on extents are then not seen. It is set before use.
	Transparent bool

	mu    sync.Mutex
	rules []*Trap
	count [blk.OpWriteZeroes + 1]int
}

// Rule says which requests a trap catches and what happens to them.
type Rule struct {
	Ops      []blk.Op // nil: all
	Off, Len int64    // requests that touch this range; Len 0: all
	After    int      // this many matching requests are let through first
	Count    int      // then this many are caught; 0: all until Remove
	Hold     bool     // a caught request waits for Release (or Remove) before it goes on
	Err      error    // a caught request fails with this; nil: it is carried out
}

// Trap is a rule at work.
type Trap struct {
	f       *Fault
	rule    Rule
	seen    int
	caught  int
	changed chan struct{} // closed and replaced when caught or released changes
	free    bool
}

// NewFault puts a filter without rules over child and owns it.
func NewFault(child blk.Node) *Fault { return &Fault{child: child} }

// Add sets a trap. A request is caught by the first trap that matches it.
func (f *Fault) Add(r Rule) *Trap {
	tr := &Trap{f: f, rule: r, changed: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, tr)
	return tr
}

// Count is the number of requests of this kind that have arrived so far.
func (f *Fault) Count(op blk.Op) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.count[op]
}

// Caught is the number of requests that were caught so far.
func (tr *Trap) Caught() int {
	tr.f.mu.Lock()
	defer tr.f.mu.Unlock()
	return tr.caught
}

// Wait waits until n requests have been caught. It fails the test after ten seconds.
func (tr *Trap) Wait(t *testing.T, n int) {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		tr.f.mu.Lock()
		caught, changed := tr.caught, tr.changed
		tr.f.mu.Unlock()
		if caught >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("waited for %d requests, caught %d", n, caught)
		}
	}
}

// Release lets the requests go on that wait, and those that will be caught later.
func (tr *Trap) Release() {
	tr.f.mu.Lock()
	defer tr.f.mu.Unlock()
	tr.free = true
	tr.wakeLocked()
}

// Remove takes the trap away and releases what it holds; that still ends with the rule's error.
func (tr *Trap) Remove() {
	tr.Release()
	tr.f.mu.Lock()
	defer tr.f.mu.Unlock()
	tr.f.rules = slices.DeleteFunc(tr.f.rules, func(o *Trap) bool { return o == tr })
}

func (tr *Trap) wakeLocked() {
	close(tr.changed)
	tr.changed = make(chan struct{})
}

func (tr *Trap) matches(r *blk.Request) bool {
	if tr.rule.Ops != nil && !slices.Contains(tr.rule.Ops, r.Op) {
		return false
	}
	return tr.rule.Len == 0 || r.Off < tr.rule.Off+tr.rule.Len && tr.rule.Off < r.Off+r.Len
}

func (f *Fault) catch(r *blk.Request) *Trap {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count[r.Op]++
	for _, tr := range f.rules {
		if !tr.matches(r) {
			continue
		}
		tr.seen++
		if n := tr.seen - tr.rule.After; n <= 0 || tr.rule.Count > 0 && n > tr.rule.Count {
			continue
		}
		tr.caught++
		tr.wakeLocked()
		return tr
	}
	return nil
}

// hold waits until the trap is released. A queue's thread must not stand still for that.
func (tr *Trap) hold(t *blk.Task) {
	_ = t.Off(func() error { // never fails
		for {
			tr.f.mu.Lock()
			free, changed := tr.free, tr.changed
			tr.f.mu.Unlock()
			if free {
				return nil
			}
			<-changed
		}
	})
}

// Info is the child's, under a name of its own.
func (f *Fault) Info() *blk.Info {
	in := *f.child.Info()
	in.Kind = "fault"
	return &in
}

// TryMap is the child's if the filter is transparent.
func (f *Fault) TryMap(op blk.Op, off, l int64) (blk.Extent, bool) {
	if !f.Transparent {
		return blk.Extent{}, false
	}
	return f.child.TryMap(op, off, l)
}

// Map is the child's, without the place unless the filter is transparent.
func (f *Fault) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	e, err := f.child.Map(t, off, l)
	if !f.Transparent {
		e.Host, e.HostOff, e.Writable, e.Log, e.Tracked = nil, 0, false, nil, nil
	}
	return e, err
}

// Do does what the rules say.
func (f *Fault) Do(t *blk.Task, r *blk.Request) error {
	switch r.Op {
	case blk.OpRead, blk.OpWrite, blk.OpFlush, blk.OpDiscard, blk.OpWriteZeroes:
	default:
		return blk.ErrNotSupported
	}
	if tr := f.catch(r); tr != nil {
		if tr.rule.Hold {
			tr.hold(t)
		}
		if tr.rule.Err != nil {
			return tr.rule.Err
		}
	}
	return blk.Do(t, f.child, r)
}

// Resize passes on.
func (f *Fault) Resize(t *blk.Task, size int64, shrink bool) error {
	c, ok := f.child.(interface {
		Resize(t *blk.Task, size int64, shrink bool) error
	})
	if !ok {
		return blk.ErrNotSupported
	}
	return c.Resize(t, size, shrink)
}

// Children is the child.
func (f *Fault) Children() []blk.Node { return []blk.Node{f.child} }

// Close closes the child.
func (f *Fault) Close() error { return f.child.Close() }
