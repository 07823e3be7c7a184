// SPDX-License-Identifier: Apache-2.0

// Package load writes blocks that describe themselves, remembers which writes
// were acknowledged, and can say afterwards whether the disk still holds all
// of them. It runs inside test guests (on /dev/vd*) and on the host (on the
// image file), so that the same knowledge checks a disk from both sides.
//
// A Writer owns a Table. Its workers claim a run of blocks, do one operation on
// it (write, write of zeros, or read and compare), note the outcome in the
// table and release the run. As a block has one operation at a time, its
// expected content is always known exactly.
package load

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"time"
)

// Options say what load a Writer makes.
type Options struct {
	Size        int64  `json:"size,omitempty"`         // bytes from the start of the disk; 0: the whole disk
	BlockSize   int    `json:"block_size,omitempty"`   // bytes; default 4096
	MaxBlocks   int    `json:"max_blocks,omitempty"`   // blocks in one operation, at most; default 4
	Depth       int    `json:"depth,omitempty"`        // operations in flight; default 4
	Sequential  bool   `json:"sequential,omitempty"`   // walk over the area instead of jumping
	ReadPercent int    `json:"read_percent,omitempty"` // operations that read back and compare
	ZeroPercent int    `json:"zero_percent,omitempty"` // operations that write zeros
	FlushEvery  int    `json:"flush_every,omitempty"`  // operations of a worker between two flushes; default 64
	Rate        int    `json:"rate,omitempty"`         // operations a second over all workers; 0: as fast as it goes
	Hold        int    `json:"hold,omitempty"`         // reads that a worker keeps in memory before it compares them
	Seed        uint64 `json:"seed,omitempty"`         // of the blocks and of the random choices
}

// Stats are what a Writer has done so far.
type Stats struct {
	Writes     uint64        `json:"writes"`
	Zeros      uint64        `json:"zeros"`
	Reads      uint64        `json:"reads"`
	Flushes    uint64        `json:"flushes"`
	MaxLatency time.Duration `json:"max_latency"` // of the slowest operation, nanoseconds
	Err        string        `json:"err"`         // the first error, or the first wrong block that was read
}

const directIO = syscall.O_DIRECT

func (o *Options) setDefaults() {
	if o.BlockSize == 0 {
		o.BlockSize = 4096
	}
	o.MaxBlocks = max(o.MaxBlocks, 0)
	if o.MaxBlocks == 0 {
		o.MaxBlocks = 4
	}
	if o.Depth == 0 {
		o.Depth = 4
	}
	if o.FlushEvery == 0 {
		o.FlushEvery = 64
	}
}

// Writer makes load on one disk until it is stopped.
type Writer struct {
	opts Options
	file *os.File
	stop chan struct{}
	wg   sync.WaitGroup

	mu     sync.Mutex // guards what follows
	table  *Table
	busy   []bool // blocks with an operation under way
	cursor int    // next block of a sequential walk
	stats  Stats
}

// Start opens path for direct I/O and begins. It goes on from table, or from
// nothing known if table is nil.
func Start(path string, opts Options, table *Table) (*Writer, error) {
	opts.setDefaults()
	flags := os.O_RDWR
	if opts.ReadPercent == 100 {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|directIO, 0)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	if table == nil {
		size := opts.Size
		if size == 0 {
			if size, err = f.Seek(0, io.SeekEnd); err != nil {
				f.Close()
				return nil, fmt.Errorf("load: size of %s: %w", path, err)
			}
		}
		table = &Table{Seed: opts.Seed, BlockSize: opts.BlockSize, Blocks: make([]State, size/int64(opts.BlockSize))}
	}
	opts.BlockSize = table.BlockSize
	opts.MaxBlocks = min(opts.MaxBlocks, len(table.Blocks))
	// Each worker may own a run; half of the blocks stay free, so that a claim always succeeds soon.
	if len(table.Blocks) < 2*opts.Depth*opts.MaxBlocks {
		f.Close()
		return nil, fmt.Errorf("load: %d blocks are too few for %d operations of %d", len(table.Blocks), opts.Depth, opts.MaxBlocks)
	}
	w := &Writer{opts: opts, file: f, stop: make(chan struct{}), table: table, busy: make([]bool, len(table.Blocks))}
	for i := range opts.Depth {
		wk, err := newWorker(w, i)
		if err != nil {
			w.Stop()
			return nil, err
		}
		w.wg.Add(1)
		go wk.run()
	}
	return w, nil
}

// Stop waits for the operations under way, flushes and closes the disk.
func (w *Writer) Stop() Stats {
	close(w.stop)
	w.wg.Wait()
	if w.opts.ReadPercent < 100 {
		w.fail(w.file.Sync())
	}
	w.fail(w.file.Close())
	return w.Stats()
}

// Stats returns what was done so far.
func (w *Writer) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// Table returns a copy of what is acknowledged now. While the writer runs, the
// disk may be ahead of it.
func (w *Writer) Table() *Table {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.table.Clone()
}

func (w *Writer) fail(err error) {
	if err == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stats.Err == "" {
		w.stats.Err = err.Error()
	}
}

// worker is one operation in flight.
type worker struct {
	w       *Writer
	rng     *rand.Rand
	out     []byte   // page-aligned, for writes
	slots   [][]byte // the same for reads, each in use until its read is compared
	scratch []byte
	held    []heldRead
}

// heldRead is a read whose comparison waits: memory that the back-end wrote
// must survive what happens to the guest meanwhile (a migration, say).
type heldRead struct {
	first int
	want  []State
}

func newWorker(w *Writer, i int) (*worker, error) {
	wk := &worker{
		w:       w,
		rng:     rand.New(rand.NewPCG(w.opts.Seed, uint64(i))),
		scratch: make([]byte, w.opts.BlockSize),
	}
	size := w.opts.BlockSize * w.opts.MaxBlocks
	for range 1 + max(1, w.opts.Hold) {
		b, err := alignedBuffer(size)
		if err != nil {
			return nil, err
		}
		wk.slots = append(wk.slots, b)
	}
	wk.out, wk.slots = wk.slots[0], wk.slots[1:]
	return wk, nil
}

// alignedBuffer returns pages of their own, as direct I/O wants them.
func alignedBuffer(size int) ([]byte, error) {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("load: buffer: %w", err)
	}
	return b, nil
}

func (wk *worker) run() {
	w := wk.w
	defer w.wg.Done()
	defer func() {
		for _, b := range append(wk.slots, wk.out) {
			w.fail(syscall.Munmap(b))
		}
	}()
	started := time.Now()
	for n := 1; ; n++ {
		select {
		case <-w.stop:
			w.fail(wk.compareHeld())
			return
		default:
		}
		if w.opts.Rate > 0 {
			time.Sleep(time.Until(started.Add(time.Duration(n) * time.Second * time.Duration(w.opts.Depth) / time.Duration(w.opts.Rate))))
		}
		if err := wk.step(n); err != nil {
			w.fail(err)
			return
		}
	}
}

// step does one operation and, now and then, a flush.
func (wk *worker) step(n int) error {
	w := wk.w
	first, states := wk.claim()
	began := time.Now()
	var err error
	var counter *uint64
	switch p := wk.rng.IntN(100); {
	case p < w.opts.ReadPercent:
		counter = &w.stats.Reads
		err = wk.read(first, states)
	case p < w.opts.ReadPercent+w.opts.ZeroPercent:
		counter = &w.stats.Zeros
		err = wk.zero(first, states)
	default:
		counter = &w.stats.Writes
		err = wk.write(first, states)
	}
	if err != nil {
		clear(states) // either content may be there now: nothing is owed
	}
	w.mu.Lock()
	*counter++
	w.stats.MaxLatency = max(w.stats.MaxLatency, time.Since(began))
	copy(w.table.Blocks[first:], states)
	clear(w.busy[first : first+len(states)])
	w.mu.Unlock()

	if err != nil || n%w.opts.FlushEvery != 0 || w.opts.ReadPercent == 100 {
		return err
	}
	if err := w.file.Sync(); err != nil {
		return fmt.Errorf("load: flush: %w", err)
	}
	w.mu.Lock()
	w.stats.Flushes++
	w.mu.Unlock()
	return nil
}

// claim takes a run of blocks that no other worker has, and a copy of their states.
func (wk *worker) claim() (first int, states []State) {
	w := wk.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		n := 1 + wk.rng.IntN(w.opts.MaxBlocks)
		if w.opts.Sequential {
			if w.cursor+n > len(w.busy) {
				w.cursor = 0
			}
			first = w.cursor
			w.cursor += n
		} else {
			first = wk.rng.IntN(len(w.busy) - n + 1)
		}
		free := true
		for _, b := range w.busy[first : first+n] {
			free = free && !b
		}
		if !free {
			continue
		}
		for i := range n {
			w.busy[first+i] = true
		}
		return first, append([]State(nil), w.table.Blocks[first:first+n]...)
	}
}

func (wk *worker) offset(block int) int64 { return int64(block) * int64(wk.w.opts.BlockSize) }

func (wk *worker) write(first int, states []State) error {
	bs := wk.w.opts.BlockSize
	buf := wk.out[:bs*len(states)]
	for i := range states {
		states[i] = written(states[i].generation() + 1)
		fill(buf[i*bs:(i+1)*bs], wk.w.table.Seed, wk.offset(first+i), states[i].generation())
	}
	if _, err := wk.w.file.WriteAt(buf, wk.offset(first)); err != nil {
		return fmt.Errorf("load: write: %w", err)
	}
	return nil
}

// FALLOC_FL_KEEP_SIZE and FALLOC_FL_ZERO_RANGE from linux/falloc.h; a block
// device turns them into a write-zeroes request.
const keepSize, zeroRange = 0x1, 0x10

func (wk *worker) zero(first int, states []State) error {
	for i := range states {
		states[i] = written(states[i].generation()+1) | zeroed
	}
	off, n := wk.offset(first), int64(len(states)*wk.w.opts.BlockSize)
	for {
		err := syscall.Fallocate(int(wk.w.file.Fd()), keepSize|zeroRange, off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("load: write zeros at %#x: %w", off, err)
		}
	}
}

func (wk *worker) read(first int, states []State) error {
	slot := wk.slots[len(wk.held)]
	if _, err := wk.w.file.ReadAt(slot[:len(states)*wk.w.opts.BlockSize], wk.offset(first)); err != nil {
		return fmt.Errorf("load: read: %w", err)
	}
	wk.held = append(wk.held, heldRead{first, append([]State(nil), states...)})
	if len(wk.held) < len(wk.slots) {
		return nil
	}
	return wk.compareHeld()
}

// compareHeld compares the reads kept so far and wipes their buffers, so that
// a page which should have been written but was not cannot look right.
func (wk *worker) compareHeld() error {
	bs := wk.w.opts.BlockSize
	defer func() { wk.held = wk.held[:0] }()
	for slot, h := range wk.held {
		for i, want := range h.want {
			b := wk.slots[slot][i*bs : (i+1)*bs]
			if wrong := check(b, wk.scratch, wk.w.table.Seed, wk.offset(h.first+i), want, false); wrong != "" {
				return fmt.Errorf("load: read back: %s", wrong)
			}
			clear(b)
		}
	}
	return nil
}

// Report is the outcome of Verify.
type Report struct {
	Checked int      `json:"checked"` // blocks with something to check
	Wrong   int      `json:"wrong"`
	First   []string `json:"first"` // the first wrong blocks in words
}

// Verify reads the area from path (a device, or a raw image file) and checks it
// against what was acknowledged. With newer, content younger than the table
// passes: for tables taken from a running writer.
func Verify(path string, table *Table, newer bool) (*Report, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|directIO, 0)
	if errors.Is(err, syscall.EINVAL) { // tmpfs has no direct I/O
		f, err = os.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer f.Close()
	bs := table.BlockSize
	chunk := max(1, (1<<20)/bs)
	buf, err := alignedBuffer(chunk * bs)
	if err != nil {
		return nil, err
	}
	defer syscall.Munmap(buf)
	r, scratch := &Report{}, make([]byte, bs)
	for first := 0; first < len(table.Blocks); first += chunk {
		n := min(chunk, len(table.Blocks)-first)
		off := int64(first) * int64(bs)
		if _, err := f.ReadAt(buf[:n*bs], off); err != nil {
			return nil, fmt.Errorf("load: verify: read %d bytes at %#x: %w", n*bs, off, err)
		}
		for i := range n {
			want := table.Blocks[first+i]
			if want == 0 {
				continue
			}
			r.Checked++
			wrong := check(buf[i*bs:(i+1)*bs], scratch, table.Seed, off+int64(i*bs), want, newer)
			if wrong == "" {
				continue
			}
			r.Wrong++
			if len(r.First) < 8 {
				r.First = append(r.First, wrong)
			}
		}
	}
	return r, nil
}

// Err is an error that names the first wrong blocks, nil if all is well.
func (r *Report) Err() error {
	if r.Wrong == 0 {
		return nil
	}
	return fmt.Errorf("load: %d of %d blocks are wrong: %q", r.Wrong, r.Checked, r.First)
}

// Fill writes size bytes of first-generation blocks to the file at path,
// creating it, and returns what it now owes.
func Fill(path string, size int64, seed uint64) (*Table, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	defer f.Close()
	table := &Table{Seed: seed, BlockSize: 4096, Blocks: make([]State, size/4096)}
	b := make([]byte, table.BlockSize)
	for i := range table.Blocks {
		table.Blocks[i] = written(1)
		off := int64(i) * int64(len(b))
		fill(b, seed, off, 1)
		if _, err := f.WriteAt(b, off); err != nil {
			return nil, fmt.Errorf("load: fill: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return nil, fmt.Errorf("load: fill: %w", err)
	}
	return table, nil
}
