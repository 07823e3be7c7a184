// SPDX-License-Identifier: Apache-2.0

package blockcopy_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/copy/job"
)

// Random guests, over random disks and options, with random commands and errors: in the end the target is what the
// guests wrote.
func TestRandom(t *testing.T) {
	s := seed(t)
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	for i := range rounds {
		s := s + uint64(i)
		t.Run(fmt.Sprint(s), func(t *testing.T) { randomRun(t, s) })
	}
}

const stripe = 16 << 10 // each belongs to one of the guests, so that the model is certain

func randomRun(t *testing.T, seed uint64) {
	t.Logf("BLOCKCOPY_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 7))
	names := []string{"memory", "tmpfs", "direct"}
	size := int64(1+rng.IntN(4))<<20 + int64(rng.IntN(3))*8*512
	kind := [2]string{names[rng.IntN(3)], names[rng.IntN(3)]}
	source, inner := kinds[kind[0]](t, size), kinds[kind[1]](t, size+int64(rng.IntN(2))*4096)
	target := blktest.NewFault(inner)
	target.Transparent = rng.IntN(2) == 0

	model := make([]byte, size)
	for off := int64(0); off < size; off += 128 << 10 {
		if rng.IntN(2) == 0 {
			n := min(int64(1+rng.IntN(32))*4096, size-off)
			copy(model[off:], pattern(rng.Uint64(), int(n)))
			put(t, source, off, model[off:off+n])
		}
	}
	r := newRig(t, source, target)
	if r.setup.Blank = rng.IntN(2) == 0; !r.setup.Blank {
		put(t, inner, 0, fill(int(inner.Info().Size), 0xaa))
	}

	var stop atomic.Bool
	var wg sync.WaitGroup
	for k := range 4 {
		rng := rand.New(rand.NewPCG(seed, 100+uint64(k)))
		wg.Go(func() {
			for n := 0; !stop.Load() && !t.Failed(); n++ {
				randomRequest(r, rng, model, int64(k))
				if n%8 == 0 {
					time.Sleep(time.Duration(rng.IntN(300)) * time.Microsecond)
				}
			}
		})
	}

	j := r.start(func(rec *job.Record) {
		rec.Granularity = []int64{4096, 64 << 10, 1 << 20}[rng.IntN(3)]
		rec.Verify = rng.IntN(2) == 0
		rec.OnTargetError, rec.OnSourceError = job.OnErrorStop, job.OnErrorStop
		rec.Speed = []int64{0, 4 << 20, 32 << 20}[rng.IntN(3)]
	})
	// A command may come at the wrong moment, and is then refused.
	refused := func(err error) {
		if err != nil && !errors.Is(err, job.ErrState) {
			t.Errorf("seed %d: %v", seed, err)
		}
	}
	var traps []*blktest.Trap
	for range 20 {
		time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
		switch rng.IntN(6) {
		case 0:
			refused(j.Pause())
		case 1, 2:
			refused(j.Resume())
		case 3:
			refused(j.SetSpeed([]int64{0, 8 << 20, 64 << 20}[rng.IntN(3)]))
		case 4:
			traps = append(traps, target.Add(blktest.Rule{Ops: []blk.Op{blk.OpWrite, blk.OpWriteZeroes}, Count: 1, Err: syscall.ENOSPC}))
		case 5:
			if rng.IntN(3) == 0 {
				traps = append(traps, target.Add(blktest.Rule{Ops: []blk.Op{blk.OpFlush}, Count: 1, Err: syscall.EIO}))
			}
		}
	}
	refused(j.SetSpeed(0))
	for end := time.Now().Add(20 * time.Second); ; {
		rec := j.Record()
		if rec.State == job.StateCompleted {
			break
		}
		if job.Ended(rec.State) || time.Now().After(end) {
			t.Fatalf("seed %d: %+v", seed, rec)
		}
		if rec.State == job.StatePaused {
			refused(j.Resume())
		}
		if rec.State == job.StateReady {
			// An error that is still to come would hit the guest on the target, as is right.
			for _, trap := range traps {
				trap.Remove()
			}
			refused(j.AskSwitch())
		}
		time.Sleep(time.Millisecond)
	}
	<-j.Done()
	time.Sleep(time.Millisecond) // the guests go on upon the target
	stop.Store(true)
	wg.Wait()
	r.equal(fmt.Sprintf("seed %d, %v", seed, kind), get(t, inner, size), model)
}

// randomRequest does something within one of guest k's stripes.
func randomRequest(r *rig, rng *rand.Rand, model []byte, k int64) {
	size := int64(len(model))
	stripes := size / stripe / 4
	lo := (rng.Int64N(stripes)*4 + k) * stripe
	off := lo + rng.Int64N(stripe/512)*512
	n := min((1+rng.Int64N(16))*512, lo+stripe-off)
	q := &blk.Request{Off: off, Len: n}
	switch rng.IntN(10) {
	case 0:
		q.Op = blk.OpFlush
		q.Off, q.Len = 0, 0
	case 1:
		// Whole blocks: of a part of one a disk may keep the old bytes.
		q.Op, q.Off, q.Len = blk.OpDiscard, lo+rng.Int64N(4)*4096, 4096
	case 2:
		q.Op = blk.OpWriteZeroes
		if rng.IntN(2) == 0 {
			q.Flags = blk.Unmap
		}
	case 3, 4:
		q.Op = blk.OpRead
	default:
		q.Op = blk.OpWrite
		if rng.IntN(8) == 0 {
			q.Flags = blk.FUA
		}
	}
	var b []byte
	if q.Op == blk.OpRead || q.Op == blk.OpWrite {
		buf := blk.GetBuffer(int(q.Len))
		defer buf.Free()
		b = buf.B
		q.Data = blk.BytesVec(nil, b)
	}
	if q.Op == blk.OpWrite {
		v := byte(rng.Uint32())
		for i := range b {
			b[i] = v + byte(i>>9)
		}
		if rng.IntN(6) == 0 {
			clear(b)
		}
		copy(model[q.Off:], b)
	}
	if q.Op == blk.OpDiscard || q.Op == blk.OpWriteZeroes {
		clear(model[q.Off : q.Off+q.Len])
	}
	if err := r.q.do(q); err != nil {
		r.Errorf("the guest's %v of %d at %d: %v", q.Op, q.Len, q.Off, err)
	}
	if q.Op == blk.OpRead && !bytes.Equal(b, model[q.Off:q.Off+q.Len]) {
		r.Errorf("the guest read something else at %d than it had written", q.Off)
	}
}
