// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"sync"
	"sync/atomic"

	"github.com/blkstream/blkstream/blk"
)

// Progress is told how much of the work is done. It is called from one goroutine at a time.
type Progress func(done, total int64)

const (
	// sweepWorkers is the number of pieces in work at once: enough to keep a disk busy.
	sweepWorkers = 8
	// sweepStep is the size of a piece in bytes: no less than the largest cluster, so that two workers never meet in
	// one.
	sweepStep = 2 << 20
)

// sweep calls fn for [0, size) in pieces of step bytes, several at once, in an unspecified order, until one fails or
// ctx ends. Before a piece, skip says how many bytes from there on need no work; nil: none.
func sweep(ctx context.Context, size, step int64, progress Progress, skip func(t *blk.Task, off int64) (int64, error),
	fn func(t *blk.Task, off, n int64) error,
) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var (
		wg     sync.WaitGroup
		done   atomic.Int64
		pieces = make(chan [2]int64)
	)
	for range sweepWorkers {
		wg.Go(func() {
			t := blk.NewTask()
			for p := range pieces {
				if ctx.Err() != nil {
					continue
				}
				if err := fn(t, p[0], p[1]); err != nil {
					cancel(err)
				}
				done.Add(p[1])
			}
		})
	}
	t := blk.NewTask()
	for off := int64(0); off < size && ctx.Err() == nil; {
		if skip != nil {
			n, err := skip(t, off)
			if err != nil {
				cancel(err)
				break
			}
			// Only whole pieces: their borders stay where they are.
			if n = min(n, size-off); off+n < size {
				n -= n % step
			}
			if n > 0 {
				off += n
				done.Add(n)
				continue
			}
		}
		n := min(step, size-off)
		pieces <- [2]int64{off, n}
		off += n
		if progress != nil {
			progress(done.Load(), size)
		}
	}
	close(pieces)
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if progress != nil {
		progress(size, size)
	}
	return nil
}

// read reads [off, off+len(b)); what lies past the end of the disk is zeros. A nil disk is all zeros.
func read(t *blk.Task, n blk.Node, b []byte, off int64) error {
	have := int64(0)
	if n != nil {
		have = max(0, min(int64(len(b)), n.Info().Size-off))
	}
	clear(b[have:])
	if have == 0 {
		return nil
	}
	return blk.Do(t, n, &blk.Request{Op: blk.OpRead, Off: off, Len: have, Data: blk.BytesVec(nil, b[:have])})
}

func write(t *blk.Task, n blk.Node, b []byte, off int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(b)), Data: blk.BytesVec(nil, b)})
}

func writeZeroes(t *blk.Task, n blk.Node, off, l int64) error {
	return blk.Do(t, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: off, Len: l})
}

func flush(t *blk.Task, n blk.Node) error { return blk.Do(t, n, &blk.Request{Op: blk.OpFlush}) }

// zeroRun says how many bytes from off on are known to be zeros without reading them; 0: read.
func zeroRun(t *blk.Task, n blk.Node, off, l int64) (int64, error) {
	if n == nil || off >= n.Info().Size {
		return l, nil
	}
	x, err := n.Map(t, off, min(l, n.Info().Size-off))
	if err != nil || x.State != blk.Zero && x.State != blk.Unallocated {
		return 0, err
	}
	return x.Len, nil
}

var zeroBytes = make([]byte, sweepStep)

func zeros(n int64) []byte { return zeroBytes[:n] }

// up to a multiple of align, a power of two.
func roundUp(x, align int64) int64 { return (x + align - 1) &^ (align - 1) }
