// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"bytes"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/copy/job"
)

// cached is storage behind a cache that loses all it holds when a flush fails.
type cached struct {
	*blktest.Memory
	mu   sync.Mutex
	fail int
	kept []byte // what is durable
}

// fails lets the flush fail that is the nth from now.
func (c *cached) fails(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail = n
}

func (c *cached) Do(t *blk.Task, r *blk.Request) error {
	if r.Op != blk.OpFlush {
		return c.Memory.Do(t, r)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fail--; c.fail != 0 {
		c.kept = c.Bytes()
		return nil
	}
	now := bytes.Repeat([]byte{0}, int(c.Info().Size))
	copy(now, c.kept)
	if err := c.Memory.Do(t, write(0, now)); err != nil {
		return err
	}
	return syscall.ENOSPC
}

// A flush that fails, whoever asks for it, may have lost tables of the target. That no copy repairs, since they are right in
// memory and show there what they should: the job ends, whatever is to be done about errors, and does not go on in
// another process, which might go by what memory said.
func TestTargetWithTablesFlushFails(t *testing.T) {
	contents := pattern(1, size)
	for _, policy := range []string{job.OnErrorStop, job.OnErrorEnospc} {
		for _, when := range []string{"before", "bulk", "the guest's", "unnoticed", "switch"} {
			source := blktest.NewMemory(size)
			put(t, source, 0, contents)
			storage := &cached{Memory: blktest.NewMemory(0)}
			task := blk.NewTask()
			if err := qcow2.Create(task, storage, qcow2.CreateOptions{Size: size}); err != nil {
				t.Fatal(err)
			}
			target, err := qcow2.Open(task, storage, qcow2.Options{Name: "target", Ahead: true})
			if err != nil {
				t.Fatal(err)
			}
			r := newRig(t, source, target)
			words := make([]atomic.Uint64, mirror.StateWords(size, gran))
			r.setup.State = mirror.NewState(words, size, gran)
			var failed atomic.Bool
			r.setup.Release = func(n blk.Node) error {
				words[2].Store(0) // that the filter is gone
				_, err := mirror.OpenState(words, size, gran)
				failed.Store(err != nil)
				return n.Close()
			}
			unnoticed := func() {
				if err := target.Do(task, &blk.Request{Op: blk.OpFlush}); err == nil {
					t.Fatal("the flush did not fail")
				}
			}
			storage.fails(1)
			if when == "before" {
				unnoticed()
			}
			early := when == "before" || when == "bulk" // there the flush makes counts durable
			if !early {
				storage.fails(0)
			}
			j := r.start(onTarget(policy))
			if !early {
				r.state(j, job.StateReady)
				storage.fails(1)
			}
			switch when {
			case "the guest's":
				r.guest(&blk.Request{Op: blk.OpFlush})
			case "unnoticed":
				unnoticed()
				if err := j.AskSwitch(); err != nil {
					t.Fatal(err)
				}
			case "switch":
				if err := j.AskSwitch(); err != nil {
					t.Fatal(err)
				}
			}
			if rec := r.state(j, job.StateFailed); rec.TargetConsistent || !strings.Contains(rec.Error, "tables") || !strings.Contains(rec.Error, "no space") {
				t.Errorf("%s, %s: %+v", policy, when, rec)
			}
			r.stays(source)
			if r.moved.Load() || !failed.Load() {
				t.Errorf("%s, %s: switched %v, another process goes on: %v", policy, when, r.moved.Load(), !failed.Load())
			}
		}
	}
}
