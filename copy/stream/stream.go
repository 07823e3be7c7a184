// SPDX-License-Identifier: Apache-2.0

// Package stream makes a running disk's top image independent of the images behind it, or of those in front of a base
// that stays.
//
// The stages, in order:
//
//	stream  copy on read is put over the top image, and all clusters are copied that it does not hold and the images
//	        in front of the base do, in passes until one finds nothing; what the guest reads meanwhile is copied, too
//	drop    with the guest paused and everything durable, the header is changed to name the base or nothing, durably;
//	        the images that are not in the chain any more are closed
//
// A crash at any point leaves the old chain or the new one, and both read the same. Nothing is kept apart from what the
// top image holds: a job that is started again skips that.
package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/cor"
	"github.com/blkstream/blkstream/copy/job"
)

// Setup is what a job works on.
type Setup struct {
	Graph   *blk.Graph // its root is the top image or a *cor.Node over it
	Cluster int64      // of the top image, bytes
	// Base is the first image that stays behind the top one, counted from that. 0: none stays. The number of images: none
	// stays, and zeros are stored, too.
	Base uint16
	// Drop takes the images in front of the base out of the chain, durably, and returns what the top image is from then
	// on. The guest is paused meanwhile. After an error the chain is as it was.
	Drop func(t *blk.Task) (blk.Node, error)
	// Close closes what Drop took out, with the guest running again.
	Close func() error
	// Keep: a copy on read that was there before the job stays after Drop.
	Keep bool
	// Failed is told what could not be copied for the guest's reads.
	Failed func(error)
}

const (
	pauseWait = 10 * time.Second // for requests in flight
	maxRange  = 64 << 20         // bytes of zeros that are stored at a time
)

// streamer is one run.
type streamer struct {
	Setup
	job    *job.Job
	opts   job.Options
	pacer  *job.Pacer
	filter *cor.Node
	own    bool // the filter is the job's
	size   int64

	again bool         // not the first pass: what is skipped has been counted
	done  atomic.Int64 // bytes copied or skipped
}

// Run streams until the end, an error or the end of ctx. If it returns nil the top image is on its own, or on the base;
// otherwise the chain is as it was.
func Run(ctx context.Context, j *job.Job, s Setup) error {
	m := &streamer{Setup: s, job: j, opts: j.Record().Options, pacer: job.NewPacer(s.Graph)}
	if err := m.insert(ctx); err != nil {
		return err
	}
	watch, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		m.job.Report(watch, func() (int64, int64) {
			done := m.done.Load()
			return done, max(m.size-done, 0)
		})
	})
	err := m.stages(ctx)
	stop()
	wg.Wait()
	if err != nil {
		return errors.Join(err, m.remove(ctx))
	}
	return nil
}

// insert puts the filter over the top, unless there is one.
func (m *streamer) insert(ctx context.Context) error {
	return m.Graph.Change(ctx, func(tx *blk.Tx) error {
		m.size = tx.Root().Info().Size
		if f, ok := tx.Root().(*cor.Node); ok {
			m.filter = f
			return nil
		}
		m.filter, m.own = cor.New(tx.Root(), m.Cluster, m.Failed), true
		tx.SetRoot(m.filter)
		return nil
	})
}

// remove takes the job's own filter away.
func (m *streamer) remove(ctx context.Context) error {
	m.job.Update(func(r *job.Record) {
		r.Message = "the images behind the disk's are still needed; what was copied of them is kept"
	})
	if !m.own {
		return nil
	}
	return m.Graph.Change(context.WithoutCancel(ctx), func(tx *blk.Tx) error {
		tx.SetRoot(m.filter.Top())
		return nil
	})
}

func (m *streamer) stages(ctx context.Context) error {
	for {
		if err := m.copyAll(ctx); err != nil {
			return err
		}
		err := m.drop(ctx)
		var werr *cor.WriteError
		if !errors.As(err, &werr) {
			return err
		}
		if err := m.onError(ctx, err); err != nil {
			return err
		}
	}
}

// copyAll copies in passes until one finds nothing to copy: a piece that failed is looked at again by the next one.
func (m *streamer) copyAll(ctx context.Context) error {
	m.job.Update(func(r *job.Record) { r.Stage = job.StageStream })
	for {
		pieces, err := m.pass(ctx)
		m.again = true
		if err != nil || pieces == 0 {
			return err
		}
	}
}

// piece is a range to be copied: whole clusters, as far as the disk goes.
type piece struct{ off, n int64 }

// pass goes through the disk once and returns how many pieces there were.
func (m *streamer) pass(ctx context.Context) (pieces int, err error) {
	var at int64
	w := job.Work[piece]{
		Job: m.job, Pacer: m.pacer, OnError: m.onError,
		Next: func(ctx context.Context, t *blk.Task, limit int64) (piece, int64, error) {
			p, err := m.next(ctx, t, at, limit)
			if !m.again {
				m.done.Add(p.off - at)
			}
			at = p.off + p.n
			if err == nil {
				pieces++
			}
			return p, p.n, err
		},
		Do: func(_ context.Context, t *blk.Task, p piece) error {
			err := m.filter.Pull(t, p.off, p.n, m.Base)
			if err == nil {
				m.done.Add(p.n)
			}
			return err
		},
	}
	err = w.Run(ctx)
	return pieces, err
}

// next finds the first piece at or after at, which is where a cluster begins. With an error it is the place that was
// reached.
func (m *streamer) next(ctx context.Context, t *blk.Task, at, limit int64) (piece, error) {
	for look := at; look < m.size && ctx.Err() == nil; {
		e, err := m.filter.Map(t, look, m.size-look)
		if err != nil {
			return piece{off: at}, err
		}
		end := look + e.Len
		if cor.Wanted(e, m.Base) { // at is where its cluster begins
			most := limit
			if e.State == blk.Zero || e.State == blk.Unallocated {
				most = maxRange
			}
			end = min((end+m.Cluster-1)&^(m.Cluster-1), at+max(most&^(m.Cluster-1), m.Cluster))
			return piece{at, min(end, m.size) - at}, nil
		}
		look, at = end, end
		if end < m.size {
			at &^= m.Cluster - 1
		}
	}
	if ctx.Err() != nil {
		return piece{off: at}, context.Cause(ctx)
	}
	return piece{off: at}, job.ErrDone
}

// onError does what the user asked for: nil means go on, perhaps after a pause.
func (m *streamer) onError(ctx context.Context, err error) error {
	policy := m.opts.OnSourceError
	var werr *cor.WriteError
	if errors.As(err, &werr) {
		policy, err = m.opts.OnTargetError, werr.Err
	}
	if policy == job.OnErrorStop || policy == job.OnErrorEnospc && blk.IsNoSpace(err) {
		m.job.PauseFor(err)
		return m.job.Gate(ctx)
	}
	return err
}

// drop leaves the images that are not needed any more.
func (m *streamer) drop(ctx context.Context) error {
	m.job.Update(func(r *job.Record) { r.Stage = job.StageDrop })
	t := blk.NewTask()
	err := job.FlushUntilShort(ctx, func() error { return blk.Do(t, m.filter, &blk.Request{Op: blk.OpFlush}) })
	if err != nil {
		return &cor.WriteError{Err: err}
	}
	wait, cancel := context.WithTimeout(ctx, pauseWait)
	defer cancel()
	err = m.Graph.Change(wait, func(tx *blk.Tx) error {
		top, err := m.Drop(t)
		if err != nil {
			return &cor.WriteError{Err: err}
		}
		if m.own || !m.Keep {
			tx.SetRoot(top)
		}
		return nil
	})
	if err != nil {
		return err
	}
	m.job.Update(func(r *job.Record) { r.Error = "" })
	if err := m.Close(); err != nil {
		m.job.Update(func(r *job.Record) {
			r.Error = fmt.Sprintf("%s is complete; closing the images that were behind it: %v", r.Target, err)
		})
	}
	return nil
}
