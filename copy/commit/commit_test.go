// SPDX-License-Identifier: Apache-2.0

package commit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/copy/job/jobtest"
)

const (
	stretch = 80 << 10 // of one depth
	shown   = 33*stretch + 512
)

// view shows stretches: held by the first image, zero in the second, held by the base, in turn.
type view struct{ *blktest.Fault }

func (v view) Map(t *blk.Task, off, l int64) (blk.Extent, error) {
	x := blk.Extent{Len: min(l, stretch-off%stretch), State: blk.Data}
	switch off / stretch % 3 {
	case 1:
		x.State, x.Depth = blk.Zero, 1
	case 2:
		x.Depth = 2
	}
	return x, nil
}

type rig struct {
	*testing.T
	base       *blktest.Memory
	onBase     *blktest.Fault
	view       view
	finished   int
	finishWith error
	want       []byte
	jobs       *job.Manager
}

func newRig(t *testing.T) *rig {
	const longer = 4 * stretch
	r := &rig{T: t, base: blktest.NewMemory(shown + longer), want: make([]byte, shown+longer)}
	above := blktest.NewMemory(shown)
	held := make([]byte, shown)
	for i := range int64(len(r.want)) {
		if i < shown {
			held[i] = byte(1 + i/stretch)
		}
		switch {
		case i >= shown || i/stretch%3 == 1: // zeros
		case i/stretch%3 == 0:
			r.want[i] = byte(1 + i/stretch)
		default:
			r.want[i] = 0xbb
		}
	}
	for n, b := range map[*blktest.Memory][]byte{above: held, r.base: bytes.Repeat([]byte{0xbb}, len(r.want))} {
		if err := blk.Do(blk.NewTask(), n, &blk.Request{Op: blk.OpWrite, Len: int64(len(b)), Data: blk.BytesVec(nil, b)}); err != nil {
			t.Fatal(err)
		}
	}
	r.onBase, r.view = blktest.NewFault(r.base), view{blktest.NewFault(above)}
	store, err := job.OpenStore(t.TempDir())
	if err == nil {
		r.jobs, _, err = job.NewManager(store)
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) start() *job.Job {
	r.Helper()
	j, err := r.jobs.Start(job.Record{ID: "j", Kind: "commit"}, func(ctx context.Context, j *job.Job) error {
		return Run(ctx, j, Setup{
			Graph: blk.NewGraph(r.base), View: r.view, Depth: 2, Base: r.onBase,
			Finish: func(context.Context) error {
				r.finished++
				if r.onBase.Count(blk.OpFlush) == 0 {
					r.Error("finished without a flush before")
				}
				return r.finishWith
			},
		})
	})
	if err != nil {
		r.Fatal(err)
	}
	return j
}

func (r *rig) state(j *job.Job, want string) job.Record {
	r.Helper()
	return jobtest.State(r, j, want)
}

// What is above the base is copied, no more and no less, and nothing shows behind the end of the images.
func TestRun(t *testing.T) {
	r := newRig(t)
	rec := r.state(r.start(), job.StateCompleted)
	if r.finished != 1 || rec.BytesDone != int64(len(r.want)) || rec.BytesTotal != rec.BytesDone || rec.Stage != job.StageSwitch {
		t.Errorf("finished %d times: %+v", r.finished, rec)
	}
	if !bytes.Equal(r.base.Bytes(), r.want) {
		t.Error("the base holds something else than what the images showed")
	}
}

// A full base pauses the job, which loses nothing; any other error, of whatever is involved, ends it unfinished.
func TestErrors(t *testing.T) {
	broken := errors.New("broken")
	for _, tc := range []struct {
		name   string
		fail   func(*rig) *blktest.Trap
		pauses bool
	}{
		{"base is full", func(r *rig) *blktest.Trap {
			return r.onBase.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, After: 3, Err: syscall.ENOSPC})
		}, true},
		{"no room for zeros", func(r *rig) *blktest.Trap {
			return r.onBase.Add(blktest.Rule{Ops: []blk.Op{blk.OpWriteZeroes}, Count: 1, Err: fmt.Errorf("x: %w", syscall.ENOSPC)})
		}, true},
		{"base fails", func(r *rig) *blktest.Trap {
			return r.onBase.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite}, After: 5, Count: 1, Err: broken})
		}, false},
		{"images fail", func(r *rig) *blktest.Trap {
			return r.view.Add(blktest.Rule{Ops: []blk.Op{blk.OpRead}, After: 2, Count: 1, Err: broken})
		}, false},
		{"flush fails", func(r *rig) *blktest.Trap {
			return r.onBase.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Err: broken})
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := newRig(t)
			trap := tc.fail(r)
			j := r.start()
			if !tc.pauses {
				rec := r.state(j, job.StateFailed)
				if r.finished != 0 || rec.Error == "" {
					t.Errorf("finished %d times: %+v", r.finished, rec)
				}
				return
			}
			r.state(j, job.StatePaused)
			if r.finished != 0 {
				t.Error("finished while it is paused")
			}
			trap.Remove()
			// A piece that had failed by then may pause the job again.
			for deadline := time.Now().Add(time.Minute); !job.Ended(j.Record().State) && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if j.Record().State == job.StatePaused {
					if err := j.Resume(); err != nil {
						t.Fatal(err)
					}
				}
			}
			r.state(j, job.StateCompleted)
			if r.finished != 1 || !bytes.Equal(r.base.Bytes(), r.want) {
				t.Errorf("finished %d times; after a pause the base holds something else than the images showed", r.finished)
			}
		})
	}
}

func TestFinishFails(t *testing.T) {
	r := newRig(t)
	r.finishWith = errors.New("no")
	r.state(r.start(), job.StateFailed)
}
