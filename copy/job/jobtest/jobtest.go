// SPDX-License-Identifier: Apache-2.0

// Package jobtest is for tests of the jobs.
package jobtest

import (
	"testing"
	"time"

	"github.com/blkstream/blkstream/copy/job"
)

// State waits until the job is in a state, and returns its record. It fails the test after a minute, and when the job
// ends in another state.
func State(t testing.TB, j *job.Job, want string) job.Record {
	t.Helper()
	timeout := time.After(time.Minute)
	for {
		changed, rec := j.Changed(), j.Record()
		if rec.State == want {
			if job.Ended(want) {
				<-j.Done()
			}
			return j.Record()
		}
		if job.Ended(rec.State) {
			t.Fatalf("the job is %s (%s), want %s", rec.State, rec.Error, want)
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("the job stays %s in stage %s, want %s", rec.State, rec.Stage, want)
		}
	}
}
