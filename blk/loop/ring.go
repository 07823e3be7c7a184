// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/uring"
)

// user_data of completions that are no blk.IO. The low half tells kicks of different eventfds apart.
const (
	tagWake = 1 << 62
	tagKick = 1 << 61
	tagCall = 1 << 60
)

// ringBackend does I/O with an io_uring.
type ringBackend struct {
	ring    *uring.Ring
	wakeFd  int
	kickFd  int
	kickGen uint64 // which of the kick fds is the current one
	rearm   []uint64
	callFd  int
	calls   bool // the ring can signal the call fd
	called  bool // what is submitted next has the signal
}

func newRingBackend(depth uint32) (*ringBackend, error) {
	wakeFd, err := newEventfd()
	if err != nil {
		return nil, err
	}
	ring, err := uring.New(depth + 8)
	if err != nil {
		unix.Close(wakeFd) //nolint:errcheck // on the way out
		return nil, err
	}
	b := &ringBackend{ring: ring, wakeFd: wakeFd, kickFd: -1, callFd: -1}
	ring.PollMultishot(wakeFd, tagWake)
	return b, nil
}

func (b *ringBackend) space() int { return b.ring.Space() - 3 } // three for the polls and the call

func (b *ringBackend) start(o *blk.IO) {
	tag := uint64(o.Tag)
	switch o.Kind {
	case blk.IORead, blk.IOWrite:
		v, off := o.Next()
		var flags uint32
		if o.FUA && !o.File.NoSync {
			flags = unix.RWF_DSYNC
		}
		// Storage that never waits would do the copy at submission, on this thread: a worker does it beside us.
		b.ring.RW(o.Kind == blk.IOWrite, o.File.Fd, v, off, flags, o.File.Inline, tag)
	case blk.IOSync:
		b.ring.Datasync(o.File.Fd, tag)
	case blk.IOFallocate:
		b.ring.Fallocate(o.File.Fd, o.Mode, o.Off, o.Len, tag)
	}
}

func (b *ringBackend) submit() error { return b.enter(false) }
func (b *ringBackend) sleep() error  { return b.enter(true) }

func (b *ringBackend) enter(wait bool) error {
	b.rearmPolls()
	err := b.ring.Submit(wait)
	if b.called && b.ring.Queued() > 0 {
		Signal(b.callFd) // who knows when the kernel, short of memory, takes it, or whether the ring ends before
	}
	b.called = false
	return err
}

func (b *ringBackend) rearmPolls() {
	for len(b.rearm) > 0 && b.ring.Space() > 0 {
		tag := b.rearm[len(b.rearm)-1]
		b.rearm = b.rearm[:len(b.rearm)-1]
		switch {
		case tag == tagWake:
			b.ring.PollMultishot(b.wakeFd, tagWake)
		case tag == tagKick|b.kickGen && b.kickFd >= 0:
			b.ring.PollMultishot(b.kickFd, tag)
		}
	}
}

func (b *ringBackend) reap(l *Loop) bool {
	any := false
	for range l.opts.Depth {
		c, ok := b.ring.Reap()
		if !ok {
			break
		}
		any = true
		if c.UserData&(tagWake|tagKick|tagCall) == 0 {
			l.complete(uint32(c.UserData), int(c.Res))
			continue
		}
		if c.UserData == tagCall { // it would have blocked
			b.calls = false
			Signal(b.callFd)
			continue
		}
		if c.Flags&uring.CQEMore == 0 && c.Res >= 0 {
			b.rearm = append(b.rearm, c.UserData)
		}
	}
	return any
}

func (b *ringBackend) ready() bool { return b.ring.Ready() }

// watchKick leaves the poll of an earlier fd behind: it holds the kernel's file until the ring closes, and its
// completions only wake us.
func (b *ringBackend) watchKick(fd int) {
	b.kickGen++
	b.kickFd = fd
	if fd >= 0 {
		b.rearm = append(b.rearm, tagKick|b.kickGen)
	}
}

// setCall leaves a blocking eventfd to Signal: the kernel does not write to one in a submission, and says so a turn late.
func (b *ringBackend) setCall(fd int) {
	b.callFd = fd
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	b.calls = b.ring.SetCall(fd) && err == nil && flags&unix.O_NONBLOCK != 0
}

// call does not put the signal behind the start of I/O, which takes tens of microseconds where it is large.
func (b *ringBackend) call() bool {
	if !b.calls || b.ring.Queued() > 0 {
		return false
	}
	b.ring.Call(tagCall)
	b.called = true
	return true
}

func (b *ringBackend) wake() { wake(b.wakeFd) }

func (b *ringBackend) close() {
	b.ring.Close()       //nolint:errcheck // nothing is in flight
	unix.Close(b.wakeFd) //nolint:errcheck // ours alone
}
