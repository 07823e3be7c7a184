// SPDX-License-Identifier: Apache-2.0

// Package looptest runs tests in the coroutines of queues.
package looptest

import (
	"sync/atomic"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/loop"
)

// Tasks is for blktest.Options.Task: it runs what it is given on two queues, on one thread each. Whoever waits otherwise
// than through its task stops them all.
func Tasks(t *testing.T) func(func(*blk.Task)) {
	var loops []*loop.Loop
	for range 2 {
		ready, ended := make(chan *loop.Loop, 1), make(chan error, 1)
		go func() {
			ended <- loop.Run(loop.Options{Depth: 64}, func(l *loop.Loop) loop.Driver { ready <- l; return idle{} })
		}()
		l := <-ready
		t.Cleanup(func() {
			l.Post(l.Stop)
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
		loops = append(loops, l)
	}
	var next atomic.Int64
	return func(fn func(*blk.Task)) {
		l, done := loops[next.Add(1)%2], make(chan struct{})
		l.Post(func() {
			l.Spawn(func(t *blk.Task) {
				defer close(done)
				fn(t)
			})
		})
		<-done
	}
}

// idle is a queue without requests.
type idle struct{}

func (idle) Work() bool    { return false }
func (idle) Publish() bool { return false }
func (idle) Poll() bool    { return false }
func (idle) Arm() bool     { return false }
func (idle) Disarm()       {}
