// SPDX-License-Identifier: Apache-2.0

// Command bench puts load on a vhost-user-blk back-end as a guest's driver would, and measures it. With -verify it
// also checks every byte that it reads.
//
//	go run ./test/bench --socket /run/blkstream/disk0.sock --rw randread --bs 4k --depth 32 --time 5s
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/blkstream/blkstream/vhostuser/frontend"
)

// job is what the command line asks for.
type job struct {
	socket       string
	rw           string
	bs           size
	depth        int
	queues       int
	duration     time.Duration
	ops          int64
	offset, size size
	rate         int64
	seed         uint64
	verify       bool
	reconnect    bool
	json         bool
	serverPID    int

	reads, writes, random bool // from rw
}

// mode is what a name for --rw means.
type mode struct{ reads, writes, random bool }

var modes = map[string]mode{
	"read": {reads: true}, "write": {writes: true}, "randread": {reads: true, random: true},
	"randwrite": {writes: true, random: true}, "randrw": {reads: true, writes: true, random: true},
}

// errUsage makes the exit status 2.
var errUsage = errors.New("usage")

func main() {
	err := run(os.Args[1:], os.Stdout)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	j, err := parse(args)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal kills
	opts := frontend.Options{Queues: j.queues, QueueSize: ringSize(j.depth), MemSize: uint64(j.queues*j.depth) * (uint64(j.bs) + 4096)}
	if j.reconnect {
		opts.Reconnect = 20 * time.Millisecond
	}
	d, err := frontend.Dial(ctx, j.socket, opts)
	if err != nil {
		return err
	}
	defer d.Close()
	res, err := load(ctx, d, j)
	if err != nil {
		return err
	}
	if j.json {
		err = json.NewEncoder(out).Encode(res)
	} else {
		err = res.print(out)
	}
	if res.firstErr != nil {
		err = fmt.Errorf("%d requests failed, the first: %w", res.Errors, res.firstErr)
	}
	return err
}

func parse(args []string) (*job, error) {
	j := &job{bs: 4096}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&j.socket, "socket", "", "the back-end's `path`")
	fs.StringVar(&j.rw, "rw", "randread", "read, write, randread, randwrite or randrw (half of each)")
	fs.Var(&j.bs, "bs", "bytes a request")
	fs.IntVar(&j.depth, "depth", 1, "requests in flight on each queue")
	fs.IntVar(&j.queues, "queues", 1, "virtqueues, with a share of the range each")
	fs.DurationVar(&j.duration, "time", 0, "how long (default 5s, without --ops)")
	fs.Int64Var(&j.ops, "ops", 0, "how many requests over all queues")
	fs.Var(&j.offset, "offset", "where the range starts")
	fs.Var(&j.size, "size", "how long the range is (default: to the end of the disk)")
	fs.Int64Var(&j.rate, "rate", 0, "requests a second over all queues; a latency then counts from when the request was due")
	fs.Uint64Var(&j.seed, "seed", rand.Uint64(), "of the random offsets")
	fs.BoolVar(&j.verify, "verify", false, "write blocks that can be told apart, check every read, read all back at the end")
	fs.BoolVar(&j.reconnect, "reconnect", false, "keep going when the back-end dies and comes back")
	fs.BoolVar(&j.json, "json", false, "print one JSON document")
	fs.IntVar(&j.serverPID, "server-pid", 0, "also measure the CPU time of this process")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", errUsage, err)
	}
	m, ok := modes[j.rw]
	j.reads, j.writes, j.random = m.reads, m.writes, m.random
	bad := func(format string, args ...any) (*job, error) {
		return nil, fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...))
	}
	switch {
	case fs.NArg() > 0:
		return bad("unexpected argument %q", fs.Arg(0))
	case j.socket == "":
		return bad("--socket is missing")
	case !ok:
		return bad("--rw %q", j.rw)
	case j.bs < frontend.SectorSize || j.bs%frontend.SectorSize != 0 || j.bs > 64<<20:
		return bad("--bs %d: want a multiple of 512 up to 64M", j.bs)
	case j.offset%j.bs != 0:
		return bad("--offset %d: want a multiple of --bs", j.offset)
	case j.depth < 1 || j.depth > 1024:
		return bad("--depth %d: want 1 to 1024", j.depth)
	case j.queues < 1 || j.queues > 256:
		return bad("--queues %d: want 1 to 256", j.queues)
	case j.ops < 0 || j.rate < 0 || j.duration < 0:
		return bad("--ops, --rate and --time cannot be negative")
	}
	if j.duration == 0 && j.ops == 0 {
		j.duration = 5 * time.Second
	}
	return j, nil
}

// ringSize is the smallest ring, of at least 128 entries, that holds depth indirect requests.
func ringSize(depth int) int {
	n := 128
	for n < depth {
		n *= 2
	}
	return n
}

// load runs the job on all queues and gathers the result.
func load(ctx context.Context, d *frontend.Disk, j *job) (*result, error) {
	c, err := d.Config()
	if err != nil {
		return nil, err
	}
	if j.size == 0 && int64(j.offset) < c.Size() {
		j.size = size(c.Size()) - j.offset
	}
	blocks := int64(j.size / j.bs)
	if int64(j.offset+j.size) > c.Size() || blocks < int64(j.queues) {
		return nil, fmt.Errorf("range of %d bytes at %d: the disk has %d, and each queue needs a block of %d", j.size, j.offset, c.Size(), j.bs)
	}
	if most := d.MaxTransfer(); uint64(j.bs) > uint64(most) {
		return nil, fmt.Errorf("--bs %d: the device takes %d bytes in a request", j.bs, most)
	}
	if j.verify && blocks > 1<<28 {
		return nil, fmt.Errorf("%d blocks are too many to verify: limit them with --size", blocks)
	}
	workers := make([]*worker, j.queues)
	for i := range workers {
		if workers[i], err = newWorker(d, j, i, blocks); err != nil {
			return nil, err
		}
	}
	cpuBefore, err := serverCPU(j.serverPID)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	each(workers, func(w *worker) { w.run(ctx, start) })
	elapsed := time.Since(start)
	res := &result{RW: j.rw, BlockSize: int64(j.bs), Depth: j.depth, Queues: j.queues, Seed: j.seed, Seconds: elapsed.Seconds()}
	if j.serverPID != 0 {
		cpu, err := serverCPU(j.serverPID)
		if err != nil && !j.reconnect {
			return nil, err
		}
		if err == nil {
			res.serverCPU = cpu - cpuBefore
		}
	}
	if j.verify {
		each(workers, func(w *worker) { w.readBack(ctx) })
	}
	res.gather(workers, d.Reconnects())
	return res, nil
}

func each(workers []*worker, fn func(*worker)) {
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(func() { fn(w) })
	}
	wg.Wait()
}
