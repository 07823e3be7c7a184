// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"sync"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// Pacer leaves the guest room while a job copies. While the guest does I/O, the job works in windows with rests
// between them; the guest's latency in both tells how much the copying costs it, and the rests are made long enough
// that the guest keeps its share of the throughput. While the guest is idle, nothing is held up.
type Pacer struct {
	graph *blk.Graph

	mu      sync.Mutex
	changed chan struct{} // closed and replaced when one of these changes
	open    bool
	active  bool // the guest does I/O
	running int  // pieces being copied
	most    int  // pieces at a time
	piece   int64

	quiet, loaded float64 // smoothed latency of a guest request without and with copying, ns
}

const (
	// guestShare is the part of its throughput that the guest keeps at least, going by its latency.
	guestShare = 0.75
	// slowest is the longest guest request that is accepted before the copier takes smaller bites.
	slowest = 20 * time.Millisecond

	window   = 20 * time.Millisecond // of copying
	minRest  = 5 * time.Millisecond
	fullMost = 8       // pieces at a time while the guest is idle
	fullSize = 1 << 20 // and their size when it has just become so, or does not mind, bytes
	idleSize = 4 << 20 // what that grows to: the first request after a pause waits for them
	minPiece = 64 << 10
	idleFor  = 10 // windows without guest I/O until it counts as idle
)

// NewPacer returns a pacer that watches the guest of the graph. Run does the watching.
func NewPacer(g *blk.Graph) *Pacer {
	return &Pacer{graph: g, changed: make(chan struct{}), open: true, most: fullMost, piece: fullSize}
}

// Workers is the most pieces that are ever copied at a time.
func (p *Pacer) Workers() int { return fullMost }

// Size is how large a piece should be now, in bytes.
func (p *Pacer) Size() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.piece
}

// Begin waits until a piece may be copied. Each Begin without error needs an End.
func (p *Pacer) Begin(ctx context.Context) error {
	for {
		p.mu.Lock()
		if p.open && p.running < p.most {
			p.running++
			p.mu.Unlock()
			return nil
		}
		changed := p.changed
		p.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// End says that a piece is done.
func (p *Pacer) End() { p.change(func() { p.running-- }) }

func (p *Pacer) setOpen(open bool) { p.change(func() { p.open = open }) }

// change changes the state and lets everyone in Begin look at it again.
func (p *Pacer) change(fn func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fn()
	close(p.changed)
	p.changed = make(chan struct{})
}

// Run watches the guest and opens and closes the window until ctx ends.
func (p *Pacer) Run(ctx context.Context) {
	p.graph.Time(true)
	defer p.graph.Time(false)
	defer p.setOpen(true)
	last := p.graph.Activity()
	calm := idleFor
	for ctx.Err() == nil {
		// A window of copying.
		sleep(ctx, window)
		now := p.graph.Activity()
		ops := now.Ops - last.Ops
		p.observe(&p.loaded, last, now)
		worst := time.Duration(now.Slowest)
		last = now
		if ops == 0 {
			if calm++; calm >= idleFor {
				p.setActive(false, 0)
				continue
			}
		} else {
			calm = 0
			p.setActive(true, worst)
		}
		// A rest: what runs is let finish first, so that the guest's latency is its own.
		p.setOpen(false)
		sleep(ctx, minRest)
		last = p.graph.Activity()
		sleep(ctx, p.rest())
		now = p.graph.Activity()
		p.observe(&p.quiet, last, now)
		last = now
		p.setOpen(true)
	}
}

// observe adds the mean latency of the requests between two readings.
func (p *Pacer) observe(mean *float64, a, b blk.Activity) {
	if b.Ops <= a.Ops || b.Nanos < a.Nanos {
		return
	}
	lat := float64(b.Nanos-a.Nanos) / float64(b.Ops-a.Ops)
	if *mean == 0 {
		*mean = lat
	}
	*mean += (lat - *mean) / 4
}

// setActive chooses how much is copied at a time.
func (p *Pacer) setActive(active bool, worst time.Duration) {
	p.change(func() {
		switch {
		case !active:
			p.most, p.piece = fullMost, min(max(p.piece+fullSize/4, fullSize), idleSize)
		case !p.active:
			p.most, p.piece = 2, 4*minPiece
		case worst > slowest:
			p.most, p.piece = max(p.most/2, 1), max(p.piece/2, minPiece)
		case worst > slowest/4:
		case p.piece < fullSize:
			p.piece *= 2
		default:
			p.most = min(p.most+1, fullMost/2)
		}
		p.active = active
	})
}

// rest is how long the guest is left alone after a window, besides minRest. If a window costs the guest the part
// 1-quiet/loaded of its throughput, a share d of the time spent copying costs it d times that. d is never less than
// 1-guestShare, so that each copy goes on, however busy the guest is.
func (p *Pacer) rest() time.Duration {
	if p.quiet == 0 || p.loaded <= p.quiet {
		return minRest
	}
	d := (1 - guestShare) / (1 - p.quiet/p.loaded)
	if d >= 1 {
		return minRest
	}
	return max(time.Duration(float64(window)*(1-d)/d), minRest)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
