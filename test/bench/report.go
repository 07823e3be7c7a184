// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// result is the JSON document; its keys are stable. Latencies are microseconds.
type result struct {
	RW         string  `json:"rw"`
	BlockSize  int64   `json:"block_size"`
	Depth      int     `json:"depth"`
	Queues     int     `json:"queues"`
	Seed       uint64  `json:"seed"`
	Seconds    float64 `json:"seconds"`
	Ops        int64   `json:"ops"`
	IOPS       float64 `json:"iops"`
	MiBPerS    float64 `json:"mib_per_s"`
	P50        float64 `json:"p50_us"`
	P90        float64 `json:"p90_us"`
	P99        float64 `json:"p99_us"`
	P999       float64 `json:"p99_9_us"`
	Max        float64 `json:"max_us"`
	CPUPerOp   float64 `json:"server_cpu_us_per_op,omitempty"`
	CPUSeconds float64 `json:"server_cpu_seconds,omitempty"`
	Verified   int64   `json:"verified_blocks,omitempty"` // in the final pass
	Reconnects int     `json:"reconnects"`
	Errors     int64   `json:"errors"`
	FirstError string  `json:"first_error,omitempty"`

	serverCPU time.Duration
	firstErr  error
}

func (r *result) gather(workers []*worker, reconnects int) {
	var lat histogram
	var bytes int64
	for _, w := range workers {
		r.Ops += w.completed
		bytes += w.bytes
		r.Errors += w.errors
		if r.firstErr == nil {
			r.firstErr = w.firstErr
		}
		lat.merge(&w.latency)
		r.Verified += w.verified
	}
	if r.firstErr != nil {
		r.FirstError = r.firstErr.Error()
	}
	r.Reconnects = reconnects
	r.IOPS = float64(r.Ops) / r.Seconds
	r.MiBPerS = float64(bytes) / (1 << 20) / r.Seconds
	us := func(q float64) float64 { return float64(lat.quantile(q)) / 1000 }
	r.P50, r.P90, r.P99, r.P999, r.Max = us(0.5), us(0.9), us(0.99), us(0.999), float64(lat.max)/1000
	r.CPUSeconds = r.serverCPU.Seconds()
	if r.Ops > 0 {
		r.CPUPerOp = float64(r.serverCPU) / 1000 / float64(r.Ops)
	}
}

func (r *result) print(out io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  bs %d  depth %d  queues %d  seed %d\n", r.RW, r.BlockSize, r.Depth, r.Queues, r.Seed)
	fmt.Fprintf(&b, "  throughput  %.0f IOPS  %.1f MiB/s  (%d requests in %.2f s)\n", r.IOPS, r.MiBPerS, r.Ops, r.Seconds)
	fmt.Fprintf(&b, "  latency us  p50 %.1f  p90 %.1f  p99 %.1f  p99.9 %.1f  max %.1f\n", r.P50, r.P90, r.P99, r.P999, r.Max)
	if r.serverCPU > 0 {
		fmt.Fprintf(&b, "  server CPU  %.2f us a request  (%.2f s)\n", r.CPUPerOp, r.CPUSeconds)
	}
	if r.Verified > 0 {
		fmt.Fprintf(&b, "  verified    %d blocks read back\n", r.Verified)
	}
	if r.Reconnects > 0 {
		fmt.Fprintf(&b, "  reconnects  %d\n", r.Reconnects)
	}
	if r.Errors > 0 {
		fmt.Fprintf(&b, "  errors      %d\n", r.Errors)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// histogram counts durations in buckets whose width is at most 1/64 of their value.
type histogram struct {
	buckets [64 * 60]uint64
	count   uint64
	max     int64
}

func (h *histogram) add(ns int64) {
	h.buckets[bucket(ns)]++
	h.count++
	h.max = max(h.max, ns)
}

// bucket: values below 128 have their own; above, each power of two is cut in 64.
func bucket(ns int64) int {
	v := uint64(max(ns, 0))
	shift := max(bits.Len64(v)-7, 0)
	return shift*64 + int(v>>shift)
}

// highest is the largest value in bucket i.
func highest(i int) int64 {
	shift := max(i/64-1, 0)
	return int64(i-shift*64+1)<<shift - 1
}

func (h *histogram) merge(o *histogram) {
	for i, n := range o.buckets {
		h.buckets[i] += n
	}
	h.count += o.count
	h.max = max(h.max, o.max)
}

// quantile returns the value that a share q of all values do not exceed.
func (h *histogram) quantile(q float64) int64 {
	rest := uint64(q * float64(h.count))
	for i, n := range h.buckets {
		if n > rest {
			return min(highest(i), h.max)
		}
		rest -= n
	}
	return h.max
}

// serverCPU is the CPU time of a process so far. The scheduler's own account of each thread is exact; where the kernel
// keeps none, the process's clock ticks have to do. A pid of 0 means nobody.
func serverCPU(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, name := range tasks {
		b, err := os.ReadFile(name)
		if err != nil {
			continue // the thread has ended meanwhile
		}
		ns, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(ns, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", name, err)
		}
		sum += time.Duration(n)
	}
	if sum > 0 {
		return sum, nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("CPU time of the server: %w", err)
	}
	// The program's name, in parentheses, may hold anything; utime and stime are fields 14 and 15 of the whole.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("CPU time of process %d: cannot make sense of its stat file", pid)
	}
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		sum += time.Duration(n) * (time.Second / 100) // USER_HZ is 100 on every architecture that Go knows
	}
	return sum, nil
}

// size is a flag in bytes, with K, M, G or T for powers of 1024.
type size int64

func (s *size) String() string { return strconv.FormatInt(int64(*s), 10) }

func (s *size) Set(text string) error {
	shift := 0
	digits := text
	if n := len(text); n > 0 {
		if i := strings.IndexByte("KMGT", text[n-1]&^0x20); i >= 0 {
			shift, digits = 10*(i+1), text[:n-1]
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n<<shift>>shift != n {
		return fmt.Errorf("%q is not a size", text)
	}
	*s = size(n << shift)
	return nil
}
