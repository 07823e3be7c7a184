// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/control"
)

// Copy on read: a filter over the disk's image as long as there are images behind it, if the configuration or, at run
// time, somebody asks for it.

// over is what the guest's requests enter of an image.
func (k *disk) over(img *image.Image) blk.Node {
	if !k.copyOnRead() || img.Lower == nil {
		return img.Root
	}
	return cor.New(img.Root, img.Chain[0].ClusterSize(), k.corFailed)
}

func (k *disk) copyOnRead() bool {
	if on := k.record().CopyOnRead; on != nil {
		return *on
	}
	return k.spec.CopyOnRead
}

// setCopyOnRead switches copy on read of a running disk. It is recorded, so that it stays after a restart.
func (k *disk) setCopyOnRead(ctx context.Context, on bool) error {
	if err := k.free(); err != nil {
		return err
	}
	if on {
		spec := k.spec
		spec.Format, spec.CopyOnRead = k.record().Format, true
		if err := spec.Validate(); err != nil {
			return control.Errorf(control.ErrPrecondition, "%w", err)
		}
	}
	return k.graph.Change(ctx, func(tx *blk.Tx) error {
		if withoutCopyOnRead(tx.Root()) != k.image().Root {
			return control.Errorf(control.ErrPrecondition, "disk %q: a job's filter could not be removed", k.spec.ID)
		}
		if err := k.recordCopyOnRead(on); err != nil {
			return err
		}
		tx.SetRoot(k.over(k.image()))
		return nil
	})
}

func (k *disk) recordCopyOnRead(on bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	r := k.rec
	r.CopyOnRead = nil
	if on != k.spec.CopyOnRead {
		r.CopyOnRead = &on
	}
	return k.saveLocked(r)
}

func withoutCopyOnRead(root blk.Node) blk.Node {
	if f, ok := root.(*cor.Node); ok {
		return f.Top()
	}
	return root
}

// pauseCopyOnRead runs a job that reads all of the disk, which is not to fill the image that it copies. Afterwards copy
// on read is over the image that the disk is on then.
func (k *disk) pauseCopyOnRead(ctx context.Context, run func() error) error {
	if !k.copyOnRead() {
		return run()
	}
	err := k.graph.Change(ctx, func(tx *blk.Tx) error {
		tx.SetRoot(withoutCopyOnRead(tx.Root()))
		return nil
	})
	if err != nil {
		return run() // ctx is over: the job ends, too, and gives back what it was to work on
	}
	runErr := run()
	err = k.graph.Change(context.WithoutCancel(ctx), func(tx *blk.Tx) error {
		if img := k.image(); tx.Root() == img.Root { // else the job's filter could not be removed
			tx.SetRoot(k.over(img))
		}
		return nil
	})
	if err != nil {
		k.d.opts.Log.Error("copy on read stays off", "disk", k.spec.ID, "err", err)
	}
	return runErr
}

// corFailed is called on a queue's thread, which must not wait for a log.
func (k *disk) corFailed(err error) {
	if k.notCopied.add(err) {
		k.d.wg.Go(func() {
			k.d.opts.Log.Warn("copy on read: what the guest read was not copied", "disk", k.spec.ID, "err", err)
		})
	}
}

// copyErrors are copies for the guest's reads that failed, which the guest does not notice.
type copyErrors struct {
	logs rate.Sometimes

	mu    sync.Mutex
	count int64
	last  error
}

func newCopyErrors() *copyErrors {
	return &copyErrors{logs: rate.Sometimes{First: 1, Interval: 10 * time.Second}}
}

// add counts an error and reports whether it is to be logged: some are.
func (c *copyErrors) add(err error) (log bool) {
	c.logs.Do(func() { log = true })
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	c.last = err
	return log
}

func (c *copyErrors) warning() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == 0 {
		return ""
	}
	last := c.last
	for inner := errors.Unwrap(last); inner != nil; inner = errors.Unwrap(last) {
		last = inner
	}
	return fmt.Sprintf("copy on read: %d reads could not be copied into the image, the last one: %v", c.count, last)
}
