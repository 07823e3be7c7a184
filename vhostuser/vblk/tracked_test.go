// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"testing"

	"github.com/blkstream/blkstream/blk"
)

// Whoever waits for a barrier looks at the marks of the writes that began before: they are there when it ends.
func TestMarkBeforeBarrier(t *testing.T) {
	log, tracked := blk.NewBitmap(1<<20, 4096), blk.NewBitmap(1<<20, 4096)
	r := newRequest(&queue{})
	r.req = blk.Request{Op: blk.OpWrite, Off: 4096, Len: 4096}
	r.log, r.tracked, r.pending, r.epoch = log, tracked, 1, 7 // there is no such epoch: its end panics
	defer func() {
		if recover() == nil || !log.Any(4096, 1) || !tracked.Any(4096, 1) {
			t.Error("the epoch has ended before the marks")
		}
	}()
	r.release()
}
