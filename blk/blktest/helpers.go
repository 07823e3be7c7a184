// SPDX-License-Identifier: Apache-2.0

package blktest

import (
	"context"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
)

// Rand is a source of random numbers. It prints its seed; the environment variable BLKTEST_SEED repeats one.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("BLKTEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("BLKTEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// Guest is a source of a graph whose requests are held up while the graph is changed: each is made with Mu held for
// reading.
type Guest struct {
	Mu    sync.RWMutex
	meter blk.Meter
}

// Pause implements blk.Source.
func (q *Guest) Pause(context.Context) error { q.Mu.Lock(); return nil }

// Resume implements blk.Source.
func (q *Guest) Resume() { q.Mu.Unlock() }

// Barrier implements blk.Source.
func (q *Guest) Barrier() {}

// Meter implements blk.Source.
func (q *Guest) Meter() *blk.Meter { return &q.meter }

// NoLeaks wants once to give back all descriptors and goroutines, soon after it has returned, when it has run before.
func NoLeaks(t *testing.T, once func()) {
	t.Helper()
	count := func() (fds, goroutines int) {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names), runtime.NumGoroutine()
	}
	once()
	fds, goroutines := count()
	for range 20 {
		once()
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		f, g := count()
		if f <= fds && g <= goroutines {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%d descriptors and %d goroutines, before %d and %d", f, g, fds, goroutines)
		}
	}
}
