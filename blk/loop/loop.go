// SPDX-License-Identifier: Apache-2.0

// Package loop runs a virtqueue: one loop owns one OS thread, one io_uring (or, where the kernel refuses that, a
// few worker goroutines), the host I/O in flight, and the coroutines in which the queue's slow requests run.
//
// A turn of the loop: reap completions, run what other goroutines posted, resume the coroutines that were woken,
// let the Driver take and start a few requests, submit, publish. A loop that finds nothing to do polls for a
// moment and then sleeps in the kernel.
//
// Everything but Post, Wake and Stop is for the loop's own thread.
package loop

import (
	"fmt"
	"iter"
	"log/slog"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
)

// Driver is what a loop serves.
type Driver interface {
	// Work takes and starts a few requests and reports whether there was anything to do.
	Work() bool
	// Publish hands back what has completed and reports whether the other side wants to be called.
	Publish() bool
	// Poll says, cheaply, whether Work would find something.
	Poll() bool
	// Arm is called before the loop sleeps: it asks for kicks and reports whether there is work after all.
	Arm() bool
	// Disarm is called when the loop has woken.
	Disarm()
}

// Options of a loop.
type Options struct {
	Depth   int           // host I/Os in flight at once; more wait their turn
	PollMax time.Duration // longest busy wait before sleeping; 0: none
	NoURing bool          // use the worker goroutines (tests)
	Log     *slog.Logger
}

// backend does host I/O and sleeps.
type backend interface {
	space() int        // operations that can be started now
	start(o *blk.IO)   // o.Tag tells it from others
	submit() error     // hands over what was started
	reap(l *Loop) bool // calls l.complete for what has ended
	ready() bool       // reap would find something
	sleep() error      // until a completion, a kick or wake
	watchKick(fd int)  // -1: none
	setCall(fd int)    // -1: none
	call() bool        // signals it in the next submit or sleep; false: it cannot
	wake()             // from any goroutine
	close()
}

// inlineMax is the largest transfer, in bytes, that is done on the loop's thread when the storage never waits. A
// larger one goes to a kernel worker so that several copy at once.
const inlineMax = 128 << 10

// yieldEvery is how long a loop runs until it passes through the Go scheduler, at a moment when it would sleep
// anyway. One that never does is taken for a hog: the runtime takes its processor away in the middle of a system call
// every 10 ms, and its monitor thread then polls in short sleeps, which costs a tenth of a queue's CPU time at depth 1.
const yieldEvery = 8 * time.Millisecond

// Loop is one loop. Make it with New, on whatever goroutine calls Run.
type Loop struct {
	opts    Options
	be      backend
	drv     Driver
	stopped bool
	callFd  int

	ios   []*blk.IO // in flight, by Tag
	free  []uint32
	queue []*blk.IO // waiting for a place in ios or the backend

	idle  []*coro // coroutines without work, all started
	tasks int     // coroutines with work

	mu       sync.Mutex
	posted   []func() // by other goroutines
	woken    []*coro
	closed   bool // be must not be woken any more: its descriptor may be another file's by now
	hasMail  atomic.Bool
	sleeping atomic.Bool
	spareP   []func()
	spareW   []*coro

	pollFor time.Duration
	soon    bool      // work came soon the last time
	yielded time.Time // when the Go scheduler last ran this goroutine anew
}

// Run makes a loop and runs it on the calling goroutine, locked to its thread, until Stop. ready is called on the
// loop's thread before the first turn. An error means that the loop could not begin.
func Run(opts Options, ready func(*Loop) Driver) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	l := &Loop{opts: opts, callFd: -1}
	if l.opts.Log == nil {
		l.opts.Log = slog.Default()
	}
	for i := range opts.Depth {
		l.free = append(l.free, uint32(opts.Depth-1-i))
	}
	l.ios = make([]*blk.IO, opts.Depth)
	if err := l.open(); err != nil {
		return err
	}
	defer l.close()
	l.drv = ready(l)
	l.run()
	return nil
}

var warnPool sync.Once

func (l *Loop) open() error {
	if !l.opts.NoURing {
		be, err := newRingBackend(uint32(l.opts.Depth))
		if err == nil {
			l.be = be
			return nil
		}
		warnPool.Do(func() { l.opts.Log.Warn("io_uring cannot be used here, a pool of threads does the I/O", "err", err) })
	}
	be, err := newPoolBackend(l.opts.Depth)
	if err != nil {
		return fmt.Errorf("start a queue: %w", err)
	}
	l.be = be
	return nil
}

func (l *Loop) close() {
	for _, c := range l.idle {
		c.stop()
	}
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.be.close()
}

// Stop ends the loop after the current turn. Nothing may be in flight, and no task may run.
func (l *Loop) Stop() { l.stopped = true }

// WatchKick makes writes to the eventfd wake the loop; -1: none. The fd is not read and must stay open until
// another one is watched.
func (l *Loop) WatchKick(fd int) { l.be.watchKick(fd) }

// SetCall names the eventfd that is signalled when Publish wants it; -1: none. It must stay open until another one is
// named.
func (l *Loop) SetCall(fd int) {
	l.callFd = fd
	l.be.setCall(fd)
}

// Post runs fn on the loop's thread soon. Any goroutine may call it.
func (l *Loop) Post(fn func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.posted = append(l.posted, fn)
	l.mailLocked()
}

func (l *Loop) mailLocked() {
	l.hasMail.Store(true)
	if l.sleeping.Swap(false) && !l.closed {
		l.be.wake()
	}
}

func (l *Loop) run() {
	for !l.stopped {
		busy := l.be.reap(l)
		if l.hasMail.Load() {
			l.readMail()
			busy = true
		}
		l.startQueued()
		if l.drv.Work() {
			busy = true
		}
		// What goes to sleep at once submits, signals and waits in one call.
		sleepy := l.pollFor == 0 && !l.stopped && !l.hasMail.Load() && !l.be.ready() && !l.drv.Poll()
		if !sleepy {
			l.submit()
		}
		if l.drv.Publish() && !(sleepy && l.be.call()) {
			Signal(l.callFd)
		}
		if !sleepy && (busy || l.stopped || l.spin()) {
			continue
		}
		l.doze()
	}
}

func (l *Loop) submit() {
	if err := l.be.submit(); err != nil {
		// Not reachable with valid entries; without a ring no request could ever complete.
		l.opts.Log.Error("the queue cannot submit I/O", "err", err)
		time.Sleep(10 * time.Millisecond)
	}
}

// spin looks for work for a moment. The time adapts: it grows when work came soon after the loop would have
// slept, and falls to nothing when it did not.
func (l *Loop) spin() bool {
	if l.pollFor == 0 {
		return false
	}
	start := time.Now()
	for {
		for range 16 {
			if l.be.ready() || l.hasMail.Load() || l.drv.Poll() {
				return true
			}
		}
		if time.Since(start) >= l.pollFor {
			return false
		}
	}
}

// doze sleeps until there is something to do. Whoever posts after sleeping is set wakes the loop; what was posted
// before is seen here.
func (l *Loop) doze() {
	l.sleeping.Store(true)
	if !l.hasMail.Load() && !l.drv.Arm() && !l.be.ready() {
		start := time.Now()
		if start.Sub(l.yielded) > yieldEvery {
			l.yielded = start
			l.submit()
			runtime.Gosched()
		}
		if err := l.be.sleep(); err != nil {
			l.opts.Log.Error("the queue cannot wait", "err", err)
			time.Sleep(10 * time.Millisecond)
		}
		if l.opts.PollMax > 0 {
			l.adapt(time.Since(start) + l.pollFor)
		}
	} else {
		l.submit() // what sleep would have submitted: a polled ring never sleeps
	}
	l.sleeping.Store(false)
	l.drv.Disarm()
}

// adapt sets how long to poll next time from how long the loop had nothing to do. It begins to poll when work came
// soon twice in a row: a guest at depth 1 on a disk makes the loop wait for the guest, which is short, and for the disk
// in turn, and polling for either costs more than it gains.
func (l *Loop) adapt(idle time.Duration) {
	soon := idle <= l.opts.PollMax
	switch {
	case !soon:
		l.pollFor = 0
	case idle <= l.pollFor || !l.soon:
	case l.pollFor == 0:
		l.pollFor = min(4*time.Microsecond, l.opts.PollMax)
	default:
		l.pollFor = min(2*l.pollFor, l.opts.PollMax)
	}
	l.soon = soon
}

func (l *Loop) readMail() {
	l.hasMail.Store(false)
	l.mu.Lock()
	posted, woken := l.posted, l.woken
	l.posted, l.woken = l.spareP[:0], l.spareW[:0]
	l.mu.Unlock()
	for i, fn := range posted {
		posted[i] = nil
		fn()
	}
	for i, c := range woken {
		woken[i] = nil
		l.resume(c)
	}
	l.spareP, l.spareW = posted, woken
}

// Host I/O.

// Start begins io. It is told of its end on this thread, perhaps at once.
func (l *Loop) Start(o *blk.IO) {
	if o.File.NoSync && o.Kind == blk.IOSync || o.File.Inline && o.Len <= inlineMax && o.Kind <= blk.IOWrite {
		o.Run()
		o.By.IODone(o)
		return
	}
	if len(l.queue) > 0 || !l.begin(o) {
		l.queue = append(l.queue, o)
	}
}

func (l *Loop) begin(o *blk.IO) bool {
	if len(l.free) == 0 || l.be.space() == 0 {
		return false
	}
	o.Tag = l.free[len(l.free)-1]
	l.free = l.free[:len(l.free)-1]
	l.ios[o.Tag] = o
	l.be.start(o)
	return true
}

func (l *Loop) startQueued() {
	n := 0
	for n < len(l.queue) && l.begin(l.queue[n]) {
		n++
	}
	if n > 0 {
		l.queue = append(l.queue[:0], l.queue[n:]...)
	}
}

// complete takes the result of one submission.
func (l *Loop) complete(tag uint32, res int) {
	o := l.ios[tag]
	if !o.Finish(res) {
		l.retake(tag)
		if !l.begin(o) { // a short transfer or EAGAIN goes on
			l.queue = append(l.queue, o)
		}
		return
	}
	l.ended(tag)
}

// ended takes back an operation that is over.
func (l *Loop) ended(tag uint32) {
	o := l.retake(tag)
	o.By.IODone(o)
}

func (l *Loop) retake(tag uint32) *blk.IO {
	o := l.ios[tag]
	l.ios[tag] = nil
	l.free = append(l.free, tag)
	return o
}

// Coroutines.

// coro is a coroutine that runs one task after another.
type coro struct {
	l     *Loop
	task  blk.Task
	fn    func(*blk.Task)
	next  func() (struct{}, bool)
	stop  func()
	yield func(struct{}) bool
}

// Tasks is the number of tasks that run now.
func (l *Loop) Tasks() int { return l.tasks }

// Spawn runs fn as a task, at once, until it ends or waits for the first time.
func (l *Loop) Spawn(fn func(*blk.Task)) {
	var c *coro
	if n := len(l.idle); n > 0 {
		c, l.idle = l.idle[n-1], l.idle[:n-1]
	} else {
		c = l.newCoro()
	}
	l.tasks++
	c.fn = fn
	l.resume(c)
}

func (l *Loop) newCoro() *coro {
	c := &coro{l: l}
	c.task.Init(c)
	c.next, c.stop = iter.Pull(func(yield func(struct{}) bool) {
		// A fault in guest memory whose file was truncated is a panic, which work recovers.
		debug.SetPanicOnFault(true)
		c.yield = yield
		for {
			c.work()
			if !yield(struct{}{}) {
				return
			}
		}
	})
	return c
}

func (c *coro) work() {
	defer func() {
		if e := recover(); e != nil {
			c.l.opts.Log.Error("a request's task panicked", "panic", e, "stack", string(debug.Stack()))
		}
		c.fn = nil
	}()
	c.fn(&c.task)
}

// resume lets the coroutine run until it waits or its work is done.
func (l *Loop) resume(c *coro) {
	if c.fn == nil {
		return // woken late: the work was done by then
	}
	c.next()
	if c.fn == nil {
		l.tasks--
		l.idle = append(l.idle, c)
	}
}

// A coro is the engine of its task.

// Start implements blk.Engine.
func (c *coro) Start(o *blk.IO) { c.l.Start(o) }

// Spawn implements blk.Engine. The new task begins in the next turn: coroutines are only resumed by the loop itself.
func (c *coro) Spawn(fn func(*blk.Task)) { c.l.Post(func() { c.l.Spawn(fn) }) }

// Suspend implements blk.Engine.
func (c *coro) Suspend(*blk.Task) { c.yield(struct{}{}) }

// Wake implements blk.Engine.
func (c *coro) Wake(*blk.Task) {
	l := c.l
	l.mu.Lock()
	defer l.mu.Unlock()
	l.woken = append(l.woken, c)
	l.mailLocked()
}

// eventfd for the wake-ups of both backends.
func newEventfd() (int, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, fmt.Errorf("eventfd: %w", err)
	}
	return fd, nil
}

var eventOne = [8]byte{1} // the value does not matter, only that it is not 0

// wake signals an eventfd of newEventfd.
func wake(fd int) {
	unix.Write(fd, eventOne[:]) //nolint:errcheck // EAGAIN: the counter is full, so the event is pending
}

// Signal adds one to an eventfd of the other side; -1: none. It is skipped when the write would block, which a hostile
// front-end can bring about: the other side then has a signal pending.
func Signal(fd int) {
	if fd < 0 {
		return
	}
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p[:], 0); n != 1 || err != nil || p[0].Revents&unix.POLLOUT == 0 {
		return
	}
	unix.Write(fd, eventOne[:]) //nolint:errcheck // a driver that closed its end misses the event
}
