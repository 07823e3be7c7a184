// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/copy/job"
)

// When a copy is over, the guest writes with no filter while the images are closed and the journal is written, which takes
// as long as it takes. A daemon that dies meanwhile must not go on with the copy as if it knew of these writes.
func TestStateIsOverWithTheFilter(t *testing.T) {
	for _, end := range []string{"cancelled", "failed", "switched"} {
		r, source, _, _ := memRig(t, pattern(1, size))
		words := make([]atomic.Uint64, mirror.StateWords(size, gran))
		r.setup.State = mirror.NewState(words, size, gran)
		died := errors.New("it is not closed")
		r.setup.Release = func(n blk.Node) error {
			r.guest(write(gran, fill(512, 7)))
			left := make([]atomic.Uint64, len(words))
			for i := range words {
				left[i].Store(words[i].Load())
			}
			_, died = mirror.OpenState(left, size, gran)
			return n.Close()
		}
		j := r.start(nil)
		r.state(j, job.StateReady)
		switch end {
		case "cancelled":
			if err := j.Cancel(context.Background()); err != nil {
				t.Fatal(err)
			}
		case "failed":
			// The guest's write makes a block dirty, which cannot be read when it is copied again.
			r.trap(source, blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpRead}, Count: 2, Err: syscall.EIO})
			if err := r.q.do(write(0, fill(512, 3))); err == nil {
				t.Fatal("the guest's write did not fail")
			}
			if err := j.AskSwitch(); err != nil {
				t.Fatal(err)
			}
			r.state(j, job.StateFailed)
		case "switched":
			r.over(j)
		}
		if died == nil || !strings.Contains(died.Error(), "over") {
			t.Errorf("%s: a daemon that finds what this one leaves goes on with the copy: %v", end, died)
		}
	}
}
