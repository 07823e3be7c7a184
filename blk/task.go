// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"errors"
	"sync/atomic"
)

var errUnfinished = errors.New("a part of the request did not finish")

// Task is whoever runs node code, and knows how to wait. On a queue loop it is a coroutine that yields to the loop
// until its I/O, lock or helper is done; in jobs, tools and tests it is a goroutine that blocks (NewTask). Node
// code cannot tell, and must not wait in any other way: a channel or a contended mutex would stall a whole queue.
// A Task belongs to one goroutine or coroutine.
type Task struct {
	eng     Engine
	woken   atomic.Bool
	pending int  // I/Os started and not ended; only touched on the engine's thread
	waiting bool // in Wait; likewise
	io      IO
}

// Engine is what a task waits with: a queue loop, or the blocking one of NewTask.
type Engine interface {
	// Start begins io; io.By is told on the engine's thread, perhaps before Start returns.
	Start(io *IO)
	// Suspend gives up the thread until Wake was called for the task. It may return early.
	Suspend(t *Task)
	// Wake makes Suspend return. Any goroutine may call it.
	Wake(t *Task)
	// Spawn runs fn as another task of the same engine.
	Spawn(fn func(*Task))
}

// Init makes t a task of the engine. It is for engines.
func (t *Task) Init(e Engine) { t.eng = e }

// park waits until unpark was called since the last park. The reason to wait may still stand: callers loop.
func (t *Task) park() {
	for !t.woken.Swap(false) {
		t.eng.Suspend(t)
	}
}

func (t *Task) unpark() {
	if !t.woken.Swap(true) {
		t.eng.Wake(t)
	}
}

// Start begins a host operation; Wait waits for all that were begun. The IO must not be on a coroutine's stack.
func (t *Task) Start(o *IO) {
	o.By = t
	t.pending++
	t.eng.Start(o)
}

// Wait waits for every operation begun with Start. Their errors are in them.
func (t *Task) Wait() {
	t.waiting = true
	for t.pending > 0 {
		t.park()
	}
	t.waiting = false
}

// IODone is for engines.
func (t *Task) IODone(*IO) {
	t.pending--
	if t.pending == 0 && t.waiting {
		t.unpark()
	}
}

func (t *Task) run(kind IOKind, fua bool, mode uint32, f *HostFile, off, n int64, v Vec) error {
	t.io.Reset(kind, f, off, n, v, t)
	t.io.FUA, t.io.Mode = fua, mode
	t.Start(&t.io)
	t.Wait()
	t.io.Vec = nil
	return t.io.Err
}

// ReadAt fills v from the file. The vec and the offset must fit the file (HostFile.Fits).
func (t *Task) ReadAt(f *HostFile, v Vec, off int64) error {
	return t.run(IORead, false, 0, f, off, v.Len(), v)
}

// WriteAt writes v to the file; fua: on stable storage when it returns. The vec and the offset must fit the file.
func (t *Task) WriteAt(f *HostFile, v Vec, off int64, fua bool) error {
	return t.run(IOWrite, fua, 0, f, off, v.Len(), v)
}

// Sync makes everything written to the file durable.
func (t *Task) Sync(f *HostFile) error { return t.run(IOSync, false, 0, f, 0, 0, nil) }

// Fallocate calls fallocate(2) with the mode.
func (t *Task) Fallocate(f *HostFile, mode uint32, off, n int64) error {
	return t.run(IOFallocate, false, mode, f, off, n, nil)
}

// Off runs fn, which may block, on another goroutine and waits for it.
func (t *Task) Off(fn func() error) error {
	var (
		err  error
		done atomic.Bool
	)
	go func() {
		err = fn()
		done.Store(true)
		t.unpark()
	}()
	for !done.Load() {
		t.park()
	}
	return err
}

// Par runs both functions at once, the second in a task of its own, and waits for both.
func (t *Task) Par(a, b func(*Task) error) (errA, errB error) {
	var done atomic.Bool
	errB = errUnfinished // stays if b panics
	t.eng.Spawn(func(u *Task) {
		defer func() {
			done.Store(true)
			t.unpark()
		}()
		errB = b(u)
	})
	defer func() { // if a panics too: b works on what a's caller gives back then
		for !done.Load() {
			t.park()
		}
	}()
	errA = a(t)
	return
}

// NewTask returns a task for the calling goroutine. Its waits block the goroutine.
func NewTask() *Task {
	t := &Task{}
	t.Init(&blocking{wake: make(chan struct{}, 1)})
	return t
}

// blocking is the engine of a task that is a goroutine.
type blocking struct{ wake chan struct{} }

func (b *blocking) Start(o *IO) {
	o.Run()
	o.By.IODone(o)
}

func (b *blocking) Suspend(*Task) { <-b.wake }

func (b *blocking) Wake(*Task) {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *blocking) Spawn(fn func(*Task)) { go fn(NewTask()) }
