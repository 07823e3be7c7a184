// SPDX-License-Identifier: Apache-2.0

// Package blk is the block layer: what a disk's stack is made of (Node), what travels through it (Request),
// where its bytes lie (Extent), who runs its code (Task), and how it is changed under a running guest (Graph).
//
// A request takes one of two ways. On the fast way the caller asks TryMap where the bytes lie and does the host
// I/O itself, straight between guest memory and host file. On the slow way it calls Do, which is straight-line
// code that may wait; it runs in a Task. Formats and filters are packages of their own below this one and meet
// only through Node.
//
// Locks, in the order in which they may be taken: Graph.mu, Graph.sourcesMu, RangeLock ranges, RangeLock.mu. A mutex is never held
// over I/O; a range may be.
package blk

import (
	"errors"
	"fmt"
	"syscall"
)

// SectorSize is the unit of every disk's size, in bytes.
const SectorSize = 512

// Op is what a request asks for.
type Op uint8

// The operations. OpWriteZeroes and OpDiscard change the disk: they are logged, mirrored and ordered as writes.
const (
	OpRead        Op = iota
	OpWrite          // Data holds the bytes
	OpFlush          // everything acknowledged before is on stable storage afterwards; Off and Len are 0
	OpDiscard        // the contents are no longer needed; they may read as anything that was there or zeros
	OpWriteZeroes    // the range reads as zeros afterwards
)

var opNames = [...]string{"read", "write", "flush", "discard", "write-zeroes"}

func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Changes reports whether the operation changes what the disk holds.
func (o Op) Changes() bool { return o == OpWrite || o == OpDiscard || o == OpWriteZeroes }

// Flags refine a request.
type Flags uint8

const (
	// FUA: on stable storage before the request is complete.
	FUA Flags = 1 << iota
	// Unmap: write-zeroes may give the space back to the host.
	Unmap
)

// Request is one operation on [Off, Off+Len) of a node, in bytes. It has one owner at a time.
type Request struct {
	Op    Op
	Flags Flags
	Off   int64
	Len   int64
	Data  Vec // OpRead, OpWrite: memory of exactly Len bytes
}

// State says how a range is stored.
type State uint8

// The states of an extent.
const (
	Data        State = iota
	Zero              // reads as zeros
	Unallocated       // this node and the ones below hold nothing: reads as zeros
	Encoded           // compressed: only Do can read it
)

// Extent describes the first Len bytes of a range that was asked for.
type Extent struct {
	Len      int64
	State    State
	Depth    uint16    // backing layers below the node that was asked
	Writable bool      // the bytes may be overwritten in place at Host, HostOff
	Host     *HostFile // nil: not directly addressable
	HostOff  int64
	// Log, if not nil, must be marked with the guest's range when a write through this extent has ended, well or
	// not, and before it is acknowledged.
	Log *Bitmap
	// Tracked is a second one, of the graph's head.
	Tracked *Bitmap
	// Unsynced: metadata that leads to this extent may not be durable yet. A write with FUA must go through Do.
	Unsynced bool
}

// Info describes a node. It does not change while the graph runs.
type Info struct {
	Name     string // file name or what tells this node from others
	Kind     string // format or filter: "raw", "mirror", …
	Size     int64  // bytes, a multiple of SectorSize
	ReadOnly bool
	Align    int64 // requests at multiples of this many bytes avoid read-modify-write; at least 1
	Discard  bool  // OpDiscard has an effect
}

// Node is one element of a disk's stack: a format over its storage, or a filter over another node. Callers use Do
// (the function), which checks a request before the node sees it.
type Node interface {
	Info() *Info
	// TryMap says where a part of [off, off+n) lies, beginning at off, if it knows without waiting. It does no
	// I/O and allocates nothing. For OpFlush (n = 0) the extent's Host is the one file to sync. false: use Do.
	TryMap(op Op, off, n int64) (Extent, bool)
	// Map is TryMap(OpRead) that may read metadata. It answers for at least one byte; n > 0.
	Map(t *Task, off, n int64) (Extent, error)
	// Do carries out the whole request. It may wait.
	Do(t *Task, r *Request) error
	// Children are the nodes below, the one that holds the data first.
	Children() []Node
	// Close releases what the node holds, its children included.
	Close() error
}

// The errors of the block layer. Errors from the host are syscall.Errno values, wrapped.
var (
	ErrNotSupported = errors.New("operation not supported")
	ErrReadOnly     = errors.New("the disk is read-only")
	ErrRange        = errors.New("request outside the disk")
	ErrInvalid      = errors.New("invalid request")
	ErrClosed       = errors.New("closed")
)

// IsNoSpace reports whether err says that the storage is full.
func IsNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// Check says whether a node with this Info may be given the request. It is the one place where range, flags and
// capability are checked; the fast path calls it too.
func Check(in *Info, r *Request) error {
	switch r.Op {
	case OpFlush:
		if r.Off != 0 || r.Len != 0 {
			return ErrInvalid
		}
		return nil
	case OpRead:
		if r.Flags != 0 {
			return ErrInvalid
		}
	case OpWrite, OpDiscard, OpWriteZeroes:
		if in.ReadOnly {
			return ErrReadOnly
		}
		if r.Flags&Unmap != 0 && r.Op != OpWriteZeroes {
			return ErrInvalid
		}
	default:
		return ErrNotSupported
	}
	if r.Off < 0 || r.Len <= 0 || r.Off > in.Size || r.Len > in.Size-r.Off {
		return ErrRange
	}
	return nil
}

// Do gives a request to a node: the one choke point that every request of the slow path passes, at each edge of
// the graph. An error names the node.
func Do(t *Task, n Node, r *Request) error {
	in := n.Info()
	if err := Check(in, r); err != nil {
		return err
	}
	if (r.Op == OpRead || r.Op == OpWrite) && r.Data.Len() != r.Len {
		return ErrInvalid
	}
	if err := n.Do(t, r); err != nil {
		return &OpError{Op: r.Op, Node: in.Name, Off: r.Off, Len: r.Len, Err: err}
	}
	return nil
}

// OpError says which request failed at which node.
type OpError struct {
	Op       Op
	Node     string
	Off, Len int64
	Err      error
}

func (e *OpError) Error() string {
	if inner, ok := e.Err.(*OpError); ok { //nolint:errorlint // only the direct child repeats the story
		return inner.Error()
	}
	if e.Op == OpFlush {
		return fmt.Sprintf("%s: flush: %v", e.Node, e.Err)
	}
	return fmt.Sprintf("%s: %v of %d bytes at offset %d: %v", e.Node, e.Op, e.Len, e.Off, e.Err)
}

func (e *OpError) Unwrap() error { return e.Err }
