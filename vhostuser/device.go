// SPDX-License-Identifier: Apache-2.0

// Package vhostuser is the back-end side of the vhost-user protocol: it takes a front-end's messages and file
// descriptors from a socket, keeps guest memory mapped, and tells a Device which rings to serve and when to
// stop. It never looks into a ring itself, except at used.idx when it recovers an in-flight region.
//
// The way of a message: Server accepts a connection, session.run reads one message at a time (message.go), the
// table in session.go checks its size and descriptors and calls its handler, and the handlers change rings
// (ring.go), memory, the in-flight region (inflight.go) and the dirty-page log (log.go).
//
// Ownership: a session owns every descriptor and mapping that it received. A queue only borrows them, and a
// session takes them back after the queue's method has returned. One goroutine runs a session; it calls the
// methods of different queues in parallel, those of one queue never concurrently.
//
// The front-end is hostile: all that it sends is checked, a message that fails a check is refused and its
// descriptors are closed, and broken framing ends the session.
package vhostuser

import "github.com/blkstream/blkstream/virtq"

// Device is what a session serves. Its methods are called by one session at a time.
type Device interface {
	// Features are the virtio features offered. The session adds the vhost-user ones (bits 26 and 30).
	Features() uint64
	// Queues is the largest number of queues offered, 1 to 256, and must not change.
	Queues() int
	// SetFeatures tells which of Features the driver acknowledged. No queue is running.
	SetFeatures(acked uint64)
	// Config returns the virtio configuration space as it is now.
	Config() []byte
	// SetConfig writes b at byte off of the configuration space; an error refuses the write.
	SetConfig(off uint32, b []byte) error
	// Start serves a ring that is complete and enabled, looking at it at once. If an earlier queue could not
	// be drained (Queue.Stop failed), Start must not let its old requests and new ones overlap.
	Start(r Ring) (Queue, error)
	// Reset is a device reset by the driver. No queue is running.
	Reset()
	// State is what a device that goes on in this one's place must know, at most 4096 bytes, and SetState gives it that.
	// Nothing at all is the state of one that has none to tell. No queue is running.
	State() []byte
	SetState(b []byte) error
}

// Ring is all that a queue needs. The session keeps ownership of the descriptors, the memory, the in-flight
// region and the log, and takes them back after the queue has let go of them.
type Ring struct {
	Index int
	Size  uint16 // a power of two, at most 32768

	Desc, Avail, Used uint64 // guest-physical addresses

	Base     uint16 // last_avail: the avail index to go on from, derived from the in-flight region when there is one
	Features uint64 // virtio features that the driver acknowledged

	Kick, Call, Err int // -1: none (no Kick: poll the ring)

	Mem *virtq.Memory

	Inflight *InflightQueue // nil: the front-end keeps no in-flight region
	Resubmit []uint16       // heads in flight when an earlier back-end died, oldest first; already marked in Inflight

	Log     *Log   // nil: guest memory is not being logged
	LogUsed bool   // writes to the used ring are logged too
	UsedLog uint64 // the guest address to log for the first byte of the used ring
}

// Queue is a running ring. Each method returns when the change is in force and the queue no longer uses what was
// replaced. None is called concurrently with another one of the same queue.
type Queue interface {
	// Stop takes no more requests, drains those in flight and ends the queue. base is last_avail. After an error
	// (requests were still in flight when a bound ran out) base is valid all the same, and the session
	// never unmaps or closes what the lost requests may still touch.
	Stop() (base uint16, err error)
	// Pause takes no more requests and drains those in flight.
	Pause()
	// Resume undoes Pause.
	Resume()
	// SetMemory replaces guest memory; called only while paused. An error means that the ring cannot go on with it.
	SetMemory(m *virtq.Memory) error
	// SetCall replaces the descriptor that interrupts the driver; -1: none.
	SetCall(fd int)
	// SetErr replaces the descriptor that reports a broken ring; -1: none.
	SetErr(fd int)
	// SetLog replaces what Ring.Log, LogUsed and UsedLog said.
	SetLog(l *Log, used bool, usedLog uint64)
	// Kick makes the queue look at the ring now.
	Kick()
}
