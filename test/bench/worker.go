// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// worker loads one queue, in blocks of its own share of the range. All its state is guarded by the queue's lock: it
// works in completion calls and in Queue.Do, so a request costs no channel, no lock of its own and no allocation.
type worker struct {
	q     *frontend.Queue
	j     *job
	rng   *rand.Rand
	start time.Time // all times are nanoseconds since then

	first, blocks int64 // the share
	next          int64 // block of the next sequential request
	left          int64 // requests still to submit
	deadline      int64 // submit none after it
	interval      int64 // between requests with --rate, or 0
	due           int64 // when the next request is due, with interval
	ops           []*op
	free          []*op // waiting for their time, with interval
	busy          int   // in flight
	finished      chan struct{}
	stopped       bool

	check     *checker // with --verify
	reading   bool     // the final pass over what was written
	verified  int64    // blocks read in that pass
	completed int64
	bytes     int64
	latency   histogram
	errors    int64
	firstErr  error
}

// op is a request and its buffer, for ever.
type op struct {
	frontend.Request
	block int64
	since int64 // submitted or due
	mem   []byte
	gen   uint32 // with --verify
}

func newWorker(d *frontend.Disk, j *job, i int, blocks int64) (*worker, error) {
	n, q := int64(i), int64(j.queues)
	w := &worker{
		q: d.Queue(i), j: j, rng: rand.New(rand.NewPCG(j.seed, uint64(i))),
		first: blocks * n / q, blocks: blocks*(n+1)/q - blocks*n/q,
		left: 1 << 62, deadline: 1 << 62,
	}
	if j.ops > 0 {
		w.left = j.ops*(n+1)/q - j.ops*n/q
	}
	if j.duration > 0 {
		w.deadline = int64(j.duration)
	}
	if j.rate > 0 {
		w.interval = max(int64(time.Second)*q/j.rate, 1)
	}
	if j.verify {
		w.check = newChecker(j, w.first, w.blocks)
	}
	for range j.depth {
		gpa, err := d.Alloc(uint64(j.bs))
		if err != nil {
			return nil, err
		}
		o := &op{}
		if o.mem, err = d.Memory().Bytes(gpa, uint64(j.bs)); err != nil {
			return nil, err
		}
		o.Data = d.Segments(nil, gpa, uint32(j.bs))
		o.Done = func(*frontend.Request) { w.done(o) }
		if j.writes && !j.verify { // not zeros: they might be cheaper
			for i := range o.mem {
				o.mem[i] = byte(w.rng.Uint32())
			}
		}
		w.ops = append(w.ops, o)
	}
	return w, nil
}

// run puts the load on and waits for the last completion.
func (w *worker) run(ctx context.Context, start time.Time) {
	w.start = start
	w.finished = make(chan struct{})
	w.q.Do(func() {
		w.free = append(w.free, w.ops...)
		w.submit(w.now())
	})
	w.await(ctx)
}

// readBack reads every block that was written, once.
func (w *worker) readBack(ctx context.Context) {
	w.finished = make(chan struct{})
	w.q.Do(func() {
		w.reading, w.stopped = true, false
		w.next, w.left, w.deadline, w.interval = 0, w.blocks, 1<<62, 0
		w.free = append(w.free[:0], w.ops...)
		w.submit(w.now())
	})
	w.await(ctx)
}

// await waits until nothing is in flight and nothing more will be. It is also the clock of --rate.
func (w *worker) await(ctx context.Context) {
	cancelled := ctx.Done()
	var tick <-chan time.Time
	if w.interval > 0 || w.j.duration > 0 {
		t := time.NewTicker(min(max(time.Duration(w.interval), 50*time.Microsecond), 100*time.Millisecond))
		defer t.Stop()
		tick = t.C
	}
	for {
		select {
		case <-w.finished:
			return
		case <-tick:
			w.q.Do(func() { w.submit(w.now()) })
		case <-cancelled:
			cancelled = nil
			w.q.Do(func() {
				w.left = 0
				w.submit(w.now())
			})
		}
	}
}

func (w *worker) now() int64 { return int64(time.Since(w.start)) }

// submit sends what can be sent now, and notices the end. Queue locked.
func (w *worker) submit(now int64) {
	for len(w.free) > 0 && w.left > 0 && now < w.deadline {
		since := now
		if w.interval > 0 {
			if w.due > now {
				break
			}
			since = w.due
			w.due += w.interval
		}
		o := w.free[len(w.free)-1]
		if !w.prepare(o) {
			break
		}
		w.free = w.free[:len(w.free)-1]
		w.left--
		o.since = since
		if err := w.q.Add(&o.Request); err != nil {
			w.fail(err)
			w.left = 0
			w.free = append(w.free, o)
			break
		}
		w.busy++
	}
	if w.busy == 0 && !w.stopped && (w.left <= 0 || now >= w.deadline) {
		w.stopped = true
		close(w.finished)
	}
}

// prepare chooses what o does; false: there is nothing for it now.
func (w *worker) prepare(o *op) bool {
	o.Type = frontend.TypeIn
	switch {
	case w.reading:
		for w.next < w.blocks && !w.check.written(w.next) {
			w.next++
		}
		if w.next == w.blocks {
			w.left = 0
			return false
		}
		o.block = w.next
		w.next++
	case w.j.random:
		o.block = w.rng.Int64N(w.blocks)
	default:
		o.block = w.next
		w.next = (w.next + 1) % w.blocks
	}
	if !w.reading && w.j.writes && (!w.j.reads || w.rng.Uint32()&1 == 0) {
		o.Type = frontend.TypeOut
	}
	if w.check != nil {
		var ok bool
		if o.block, ok = w.check.claim(o.block); !ok {
			return false // every block is in flight: the share has fewer than --depth
		}
		if o.Type == frontend.TypeOut {
			o.gen = w.check.fill(o.mem, o.block)
		}
	}
	o.Sector = uint64(int64(w.j.offset)+(w.first+o.block)*int64(w.j.bs)) / frontend.SectorSize
	return true
}

// done takes a completion and sends the next request. Queue locked.
func (w *worker) done(o *op) {
	now := w.now()
	w.busy--
	err := o.Err()
	if w.check != nil {
		err = w.check.done(o, err)
	}
	if err != nil {
		w.fail(fmt.Errorf("%s at offset %d: %w", typeName(o.Type), o.Sector*frontend.SectorSize, err))
	}
	if w.reading {
		w.verified++
	} else {
		w.completed++
		w.bytes += int64(w.j.bs)
		w.latency.add(now - o.since)
	}
	w.free = append(w.free, o)
	w.submit(now)
}

func (w *worker) fail(err error) {
	w.errors++
	if w.firstErr == nil {
		w.firstErr = err
	}
}

func typeName(t uint32) string {
	if t == frontend.TypeOut {
		return "write"
	}
	return "read"
}
