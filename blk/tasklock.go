// SPDX-License-Identifier: Apache-2.0

package blk

import "sync/atomic"

// TaskLock is a mutex for which a task waits. It may be held over I/O.
type TaskLock struct{ l RangeLock }

// Lock takes the lock; the caller gives it up with unlock.
func (m *TaskLock) Lock(t *Task) (unlock func()) {
	r := m.l.Lock(t, 0, 1)
	return func() { m.l.Unlock(r) }
}

// Syncer flushes a node for many at once: whoever waits while a flush runs is served by the next one.
type Syncer struct {
	lock  TaskLock
	asked atomic.Int64
	done  int64 // those who asked up to this one are served; under lock
}

// Sync flushes n, which is always the same node. What was written before the call is durable when it returns nil.
func (s *Syncer) Sync(t *Task, n Node) error {
	me := s.asked.Add(1)
	defer s.lock.Lock(t)()
	if s.done >= me {
		return nil
	}
	all := s.asked.Load()
	if err := Do(t, n, &Request{Op: OpFlush}); err != nil {
		return err
	}
	s.done = all
	return nil
}
