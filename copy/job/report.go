// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"time"
)

// Report writes the progress into the job's record, a few times a second, until ctx ends. figures are bytes.
func (j *Job) Report(ctx context.Context, figures func() (done, left int64)) {
	const every = 250 * time.Millisecond
	tick := time.NewTicker(every)
	defer tick.Stop()
	var rate float64
	lastDone, _ := figures()
	last := time.Now()
	for {
		over := ctx.Err() != nil // asked first: the last figures are told
		done, left := figures()
		if dt := time.Since(last).Seconds(); dt > 0.01 && done >= lastDone {
			if now := float64(done-lastDone) / dt; rate == 0 {
				rate = now
			} else {
				rate += (now - rate) / 8
			}
		}
		last, lastDone = time.Now(), done
		j.Update(func(r *Record) {
			r.BytesDone, r.BytesTotal, r.Rate, r.ETASeconds = done, done+left, int64(rate), -1
			if left == 0 {
				r.ETASeconds = 0
			} else if rate > 1 {
				r.ETASeconds = int64(float64(left) / rate)
			}
		})
		if over {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}
