// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// openLog makes a log of size bytes at off of a file that is one page larger.
func openLog(t *testing.T, off, size uint64) (l *Log, read func() []byte) {
	t.Helper()
	const file = 3 * 4096
	fd, err := memfd("log", file)
	if err != nil {
		t.Fatal(err)
	}
	if l, err = newLog(fd, off, size, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		closeFD(fd)
		if err := l.Release(); err != nil {
			t.Error(err)
		}
	})
	return l, func() []byte {
		b := make([]byte, file)
		if _, err := unix.Pread(fd, b, 0); err != nil {
			t.Fatal(err)
		}
		return b
	}
}

func TestLogMark(t *testing.T) {
	for _, tt := range []struct {
		name   string
		off    uint64
		size   uint64
		gpa, n uint64
		pages  []int // the bits that are set
	}{
		{"nothing", 0, 4096, 5, 0, nil},
		{"one byte", 0, 4096, 0, 1, []int{0}},
		{"last byte of a page", 0, 4096, 4095, 1, []int{0}},
		{"two pages", 0, 4096, 4095, 2, []int{0, 1}},
		{"offset", 8, 64, 7 * 4096, 4096, []int{64 + 7}},
		{"second page of the file", 4096 + 8, 64, 4096, 1, []int{(4096+8)*8 + 1}},
		{"past the end", 0, 1, 8 * 4096, 1, nil},
		{"over the end", 0, 1, 7 * 4096, 1 << 40, []int{7}},
		{"partial last word", 0, 9, 71 * 4096, 2 * 4096, []int{71}},
		{"wraps", 0, 9, 71 * 4096, math.MaxUint64, []int{71}},
		{"highest address", 0, 4096, math.MaxUint64, 1, nil},
		{"highest addresses", 0, 4096, math.MaxUint64, math.MaxUint64, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, read := openLog(t, tt.off, tt.size)
			l.Mark(tt.gpa, tt.n)
			var got []int
			for i, b := range read() {
				for bit := range 8 {
					if b>>bit&1 != 0 {
						got = append(got, i*8+bit)
					}
				}
			}
			if !slices.Equal(got, tt.pages) {
				t.Errorf("bits %v, want %v", got, tt.pages)
			}
		})
	}
}

// TestLogModel compares random marks from several goroutines with a simple model.
func TestLogModel(t *testing.T) {
	const pages = 1000
	l, read := openLog(t, 16, pages/8)
	want := make([]byte, 3*4096)
	var wg sync.WaitGroup
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		gpa, n := rnd.Uint64N(pages*logPage), 1+rnd.Uint64N(3*logPage)
		for p := gpa / logPage; p <= (gpa+n-1)/logPage && p < pages; p++ {
			want[16+p/8] |= 1 << (p % 8)
		}
		wg.Go(func() { l.Mark(gpa, n) })
	}
	wg.Wait()
	if got := read(); !slices.Equal(got, want) {
		t.Error("the log differs from the model")
	}
	if n := testing.AllocsPerRun(100, func() { l.Mark(12345, 1<<20) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
