// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// Source is whoever issues guest I/O to a graph: a running queue.
type Source interface {
	// Pause stops issuing and waits until nothing is in flight. On an error the source goes on.
	Pause(ctx context.Context) error
	Resume()
	// Barrier returns when every host I/O that the source itself began before, on extents that TryMap gave it, has
	// ended. It may block, and is never called by a task of the source itself.
	Barrier()
	Meter() *Meter
}

// Meter counts what a source does. The source alone writes, and anyone reads.
type Meter struct {
	Ops     atomic.Uint64 // requests completed
	Bytes   atomic.Uint64 // bytes read and written
	Nanos   atomic.Uint64 // sum of the requests' times, only counted while Timed
	Slowest atomic.Uint64 // longest request since the last reader set it to 0, only while Timed
	Timed   atomic.Bool   // somebody wants times
}

// Head is a filter that stays over whatever the root is. It does not own what it is over.
type Head interface {
	Node
	// Over puts the head over n, or tells it that n has another size now. Nothing is in flight.
	Over(n Node)
}

// Graph is the stack of nodes under one disk, and the only way to change it. Sources read Root without a lock: it
// changes only while they are all paused, and pausing and resuming order the accesses.
type Graph struct {
	mu    sync.Mutex // serialises changes, and Attach and Detach against them
	root  Node
	head  Head // over root; nil: none
	enter Node // head or root: what sources see
	timed int

	sourcesMu sync.Mutex // after mu; changing sources needs both
	sources   map[Source]struct{}
}

// NewGraph returns a graph with the given root.
func NewGraph(root Node) *Graph {
	return &Graph{root: root, enter: root, sources: map[Source]struct{}{}}
}

// Root is the node that the guest's requests enter: the head, if there is one. It is for sources that run, and within
// Change.
func (g *Graph) Root() Node { return g.enter }

// View calls fn with the root, which the head is over, while no change can happen.
func (g *Graph) View(fn func(root Node)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	fn(g.root)
}

// Attach makes src a source of the graph. It must not issue requests before Attach returns.
func (g *Graph) Attach(src Source) {
	g.mu.Lock()
	defer g.mu.Unlock()
	src.Meter().Timed.Store(g.timed > 0)
	g.sourcesMu.Lock()
	defer g.sourcesMu.Unlock()
	g.sources[src] = struct{}{}
}

// Detach removes a source that issues nothing any more.
func (g *Graph) Detach(src Source) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sourcesMu.Lock()
	defer g.sourcesMu.Unlock()
	delete(g.sources, src)
}

// Barrier waits until every host I/O has ended that a source began, before now, on an extent that TryMap gave it: what
// such an extent pointed to may then be used for something else. It does not need mu, since the request that waits may
// be one that a Change waits for.
func (g *Graph) Barrier(t *Task) error {
	return t.Off(func() error {
		g.sourcesMu.Lock()
		sources := slices.Collect(maps.Keys(g.sources))
		g.sourcesMu.Unlock()
		for _, s := range sources {
			s.Barrier()
		}
		return nil
	})
}

// Time switches the sources' request times on or off; calls nest.
func (g *Graph) Time(on bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if on {
		g.timed++
	} else {
		g.timed--
	}
	for s := range g.sources {
		s.Meter().Timed.Store(g.timed > 0)
	}
}

// Activity is the sum of the meters of the sources attached now. Slowest is the longest request since the last
// call.
type Activity struct{ Ops, Bytes, Nanos, Slowest uint64 }

// Activity reads the meters.
func (g *Graph) Activity() Activity {
	g.mu.Lock()
	defer g.mu.Unlock()
	var a Activity
	for s := range g.sources {
		m := s.Meter()
		a.Ops += m.Ops.Load()
		a.Bytes += m.Bytes.Load()
		a.Nanos += m.Nanos.Load()
		a.Slowest = max(a.Slowest, m.Slowest.Swap(0))
	}
	return a
}

// Tx is a change in progress: every source is paused and nothing is in flight.
type Tx struct{ g *Graph }

// Root is the current root, below the head.
func (tx *Tx) Root() Node { return tx.g.root }

// SetRoot makes n the node that the guest's requests enter from now on, below the head. Closing what it replaces is the
// caller's. It is also to be called with the same node when that has another size.
func (tx *Tx) SetRoot(n Node) {
	tx.g.root = n
	tx.SetHead(tx.g.head)
}

// SetHead puts h over the root, now and after each change of it; nil: nothing. Closing what it replaces is the caller's.
func (tx *Tx) SetHead(h Head) {
	tx.g.head, tx.g.enter = h, tx.g.root
	if h != nil {
		h.Over(tx.g.root)
		tx.g.enter = h
	}
}

// Change runs fn while every source is paused with nothing in flight, then lets them go on. If a source cannot be
// paused before ctx ends, fn is not run and all go on as before.
func (g *Graph) Change(ctx context.Context, fn func(*Tx) error) error {
	return ChangeAll(ctx, []*Graph{g}, func(txs []*Tx) error { return fn(txs[0]) })
}

// ChangeAll is Change for several graphs, whose sources are all paused at the same time. All callers must name graphs
// in one and the same order, or they wait for each other forever.
func ChangeAll(ctx context.Context, graphs []*Graph, fn func([]*Tx) error) error {
	var (
		all []Source
		txs []*Tx
	)
	for _, g := range graphs {
		g.mu.Lock()
		defer g.mu.Unlock()
		all = slices.AppendSeq(all, maps.Keys(g.sources))
		txs = append(txs, &Tx{g})
	}
	var (
		wg     sync.WaitGroup
		emu    sync.Mutex
		errs   []error
		paused []Source
	)
	for _, s := range all {
		wg.Go(func() {
			err := s.Pause(ctx)
			emu.Lock()
			defer emu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				paused = append(paused, s)
			}
		})
	}
	wg.Wait()
	defer func() {
		for _, s := range paused {
			s.Resume()
		}
	}()
	if len(errs) > 0 {
		return fmt.Errorf("the disk's queues did not come to rest: %w", errors.Join(errs...))
	}
	return fn(txs)
}

// String draws the stack, one node a line, the root first.
func (g *Graph) String() string {
	var b strings.Builder
	g.View(func(Node) { draw(&b, g.enter, 0) })
	return b.String()
}

func draw(b *strings.Builder, n Node, depth int) {
	in := n.Info()
	fmt.Fprintf(b, "%*s%s %s\n", 2*depth, "", in.Kind, in.Name)
	for _, c := range n.Children() {
		draw(b, c, depth+1)
	}
}
