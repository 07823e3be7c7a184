// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"math/rand/v2"
	"testing"
)

// A barrier is passed when all requests that began before it have ended, whatever else begins and ends, and then at once.
func TestEpochs(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var (
			e        epochs
			flying   = map[int]int{}                    // epoch by request
			barriers = map[chan struct{}]map[int]bool{} // which requests each still waits for
			next     int
		)
		check := func() {
			for c, left := range barriers {
				select {
				case <-c:
					if len(left) > 0 {
						t.Fatalf("seed %d: a barrier is passed with %d older requests in flight", seed, len(left))
					}
					delete(barriers, c)
				default:
				}
			}
		}
		end := func(r int) {
			epoch := flying[r]
			delete(flying, r)
			for _, left := range barriers {
				delete(left, r)
			}
			e.end(epoch)
			check()
		}
		for range 300 {
			switch rng.IntN(5) {
			case 0, 1:
				flying[next] = e.begin()
				next++
			case 2, 3:
				for r := range flying {
					end(r)
					break
				}
			default:
				c, left := make(chan struct{}), map[int]bool{}
				for r := range flying {
					left[r] = true
				}
				barriers[c] = left
				e.wait(c)
				check()
			}
		}
		// Requests that never cease to come do not hold a barrier up: it waits at most for those that are there when
		// the barrier before it is passed.
		c := make(chan struct{})
		e.wait(c)
		for range 2 {
			begun := next
			for range len(flying) {
				for r := range flying {
					if r < begun {
						flying[next] = e.begin()
						next++
						end(r)
						break
					}
				}
			}
		}
		select {
		case <-c:
		default:
			t.Fatalf("seed %d: a barrier waits for ever", seed)
		}
	}
}
