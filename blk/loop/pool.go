// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"fmt"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
)

// poolBackend does I/O with blocking system calls on worker goroutines and sleeps in epoll, where io_uring is
// refused.
type poolBackend struct {
	epoll  int
	wakeFd int
	kickFd int
	work   chan *blk.IO
	wg     sync.WaitGroup

	mu    sync.Mutex
	done  []uint32 // tags
	spare []uint32
	some  atomic.Bool
}

const poolWorkers = 8

func newPoolBackend(depth int) (*poolBackend, error) {
	wakeFd, err := newEventfd()
	if err != nil {
		return nil, err
	}
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		unix.Close(wakeFd) //nolint:errcheck // on the way out
		return nil, fmt.Errorf("epoll: %w", err)
	}
	b := &poolBackend{epoll: epoll, wakeFd: wakeFd, kickFd: -1, work: make(chan *blk.IO, depth)}
	b.watch(wakeFd)
	for range poolWorkers {
		b.wg.Go(b.worker)
	}
	return b, nil
}

// watch is edge-triggered, so that the eventfds need not be read.
func (b *poolBackend) watch(fd int) {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	unix.EpollCtl(b.epoll, unix.EPOLL_CTL_ADD, fd, &ev) //nolint:errcheck // an fd that cannot be polled never kicks
}

func (b *poolBackend) worker() {
	debug.SetPanicOnFault(true) // as on the loop's own goroutine
	for o := range b.work {
		tag := o.Tag
		o.Run()
		b.mu.Lock()
		b.done = append(b.done, tag)
		b.mu.Unlock()
		b.some.Store(true)
		wake(b.wakeFd)
	}
}

func (b *poolBackend) space() int      { return 1 } // the channel holds as many as there are tags
func (b *poolBackend) start(o *blk.IO) { b.work <- o }
func (b *poolBackend) submit() error   { return nil }
func (b *poolBackend) ready() bool     { return b.some.Load() }

func (b *poolBackend) reap(l *Loop) bool {
	if !b.some.Swap(false) {
		return false
	}
	b.mu.Lock()
	done := b.done
	b.done = b.spare[:0]
	b.mu.Unlock()
	for _, tag := range done {
		l.ended(tag)
	}
	b.spare = done
	return true
}

func (b *poolBackend) sleep() error {
	var ev [4]unix.EpollEvent
	_, err := unix.EpollWait(b.epoll, ev[:], -1)
	if err == unix.EINTR { //nolint:errorlint // unix returns the bare errno
		err = nil
	}
	return err
}

func (b *poolBackend) watchKick(fd int) {
	if b.kickFd >= 0 {
		unix.EpollCtl(b.epoll, unix.EPOLL_CTL_DEL, b.kickFd, nil) //nolint:errcheck // closed meanwhile: gone already
	}
	b.kickFd = fd
	if fd >= 0 {
		b.watch(fd)
	}
}

func (b *poolBackend) setCall(int) {}
func (b *poolBackend) call() bool  { return false }

func (b *poolBackend) wake() { wake(b.wakeFd) }

func (b *poolBackend) close() {
	close(b.work)
	b.wg.Wait()
	unix.Close(b.epoll)  //nolint:errcheck // ours alone
	unix.Close(b.wakeFd) //nolint:errcheck // ours alone
}
