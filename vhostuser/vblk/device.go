// SPDX-License-Identifier: Apache-2.0

// Package vblk is the virtio-blk device (virtio 1.2, section 5.2) over a block graph.
//
// A guest request takes this way: queue.Work pops its chain from the ring and parses it (parse); run asks the
// graph's root where the bytes lie and starts the host I/O, or hands the request to a coroutine; finish writes the
// status and stages the used element; Publish shows it to the guest.
package vblk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/vhostuser"
)

// Feature bits (virtio 1.2, sections 5.2.3 and 6).
const (
	featSizeMax     = 1 << 1
	featSegMax      = 1 << 2
	featRO          = 1 << 5
	featBlkSize     = 1 << 6
	featFlush       = 1 << 9
	featTopology    = 1 << 10
	featConfigWCE   = 1 << 11
	featMQ          = 1 << 12
	featDiscard     = 1 << 13
	featWriteZeroes = 1 << 14
	featIndirect    = 1 << 28
	featEventIdx    = 1 << 29
	featVersion1    = 1 << 32
)

// Limits told to the driver.
const (
	sizeMax       = 4 << 20 // bytes a segment
	segMax        = 126     // segments a request
	maxRangeSegs  = 16      // ranges of one discard or write-zeroes request
	maxRangeBytes = 1 << 30 // bytes of one such range
	idBytes       = 20      // length of the serial number
)

// Config space (section 5.2.4).
const (
	cfgCapacity     = 0
	cfgSizeMax      = 8
	cfgSegMax       = 12
	cfgBlkSize      = 20
	cfgMinIOSize    = 26
	cfgOptIOSize    = 28
	cfgWriteback    = 32
	cfgNumQueues    = 34
	cfgDiscardMax   = 36
	cfgDiscardSegs  = 40
	cfgDiscardAlign = 44
	cfgZeroesMax    = 48
	cfgZeroesSegs   = 52
	cfgZeroesUnmap  = 56
	cfgLen          = 60
)

// Options of a device.
type Options struct {
	ID           string
	Serial       string // at most 20 bytes
	Queues       int
	Depth        int // host I/Os in flight a queue
	BlockSize    int // bytes, 512 or 4096
	ReadOnly     bool
	Discard      bool
	WriteThrough bool          // no write cache: each write is durable when it is acknowledged
	CacheOff     bool          // the driver has switched the write cache off, with an earlier device
	PollMax      time.Duration // longest busy wait of a queue; 0: none
	NoURing      bool
	// Use, if not nil, is told before the first queue of a driver starts (true; an error keeps it from starting) and
	// after the last one has ended (false).
	Use func(bool) error
	// Cache, if not nil, keeps for CacheOff of the next device whether the driver wants a write cache.
	Cache func(on bool) error
	Log   *slog.Logger
}

// Device is one virtio-blk device. It implements vhostuser.Device.
type Device struct {
	opts  Options
	graph *blk.Graph
	size  atomic.Int64
	drain time.Duration // drainFor, but in tests

	acked     atomic.Uint64 // features the driver took
	writeback atomic.Bool   // what the driver chose in the config space

	useMu sync.Mutex // held over Options.Use; before mu
	users int        // queues that run or are being started

	mu     sync.Mutex
	queues map[*queue]bool // true: lost, Stop could not drain it
	past   Stats           // of queues that have ended
}

// New returns a device over the graph, whose root is size bytes long.
func New(g *blk.Graph, size int64, o Options) *Device {
	d := &Device{opts: o, graph: g, drain: drainFor, queues: map[*queue]bool{}}
	if d.opts.Log == nil {
		d.opts.Log = slog.Default()
	}
	d.size.Store(size)
	d.writeback.Store(!o.WriteThrough && !o.ReadOnly && !o.CacheOff)
	return d
}

// SetSize changes the capacity. Telling the driver is the caller's (vhostuser.Server.ConfigChanged).
func (d *Device) SetSize(size int64) { d.size.Store(size) }

// Size is the capacity in bytes.
func (d *Device) Size() int64 { return d.size.Load() }

// Features implements vhostuser.Device.
func (d *Device) Features() uint64 {
	f := uint64(featSizeMax | featSegMax | featBlkSize | featFlush | featTopology | featMQ | featIndirect | featEventIdx | featVersion1)
	if d.opts.ReadOnly {
		return f | featRO
	}
	f |= featWriteZeroes
	if !d.opts.WriteThrough {
		f |= featConfigWCE
	}
	if d.opts.Discard {
		f |= featDiscard
	}
	return f
}

// Queues implements vhostuser.Device.
func (d *Device) Queues() int { return d.opts.Queues }

// SetFeatures implements vhostuser.Device.
func (d *Device) SetFeatures(acked uint64) { d.acked.Store(acked) }

func (d *Device) negotiated(f uint64) bool { return d.acked.Load()&f == f }

// Config implements vhostuser.Device.
func (d *Device) Config() []byte {
	b := make([]byte, cfgLen)
	le := binary.LittleEndian
	le.PutUint64(b[cfgCapacity:], uint64(d.size.Load()/blk.SectorSize))
	le.PutUint32(b[cfgSizeMax:], sizeMax)
	le.PutUint32(b[cfgSegMax:], segMax)
	le.PutUint32(b[cfgBlkSize:], uint32(d.opts.BlockSize))
	le.PutUint16(b[cfgMinIOSize:], 1)
	le.PutUint32(b[cfgOptIOSize:], 0)
	if d.writeback.Load() {
		b[cfgWriteback] = 1
	}
	le.PutUint16(b[cfgNumQueues:], uint16(d.opts.Queues))
	if d.opts.Discard {
		le.PutUint32(b[cfgDiscardMax:], maxRangeBytes/blk.SectorSize)
		le.PutUint32(b[cfgDiscardSegs:], maxRangeSegs)
		le.PutUint32(b[cfgDiscardAlign:], uint32(d.opts.BlockSize/blk.SectorSize))
	}
	le.PutUint32(b[cfgZeroesMax:], maxRangeBytes/blk.SectorSize)
	le.PutUint32(b[cfgZeroesSegs:], maxRangeSegs)
	b[cfgZeroesUnmap] = 1
	return b
}

var errConfig = errors.New("only the writeback byte can be written, with 0 or 1, when CONFIG_WCE was negotiated")

// SetConfig implements vhostuser.Device.
func (d *Device) SetConfig(off uint32, b []byte) error {
	if off != cfgWriteback || len(b) != 1 || b[0] > 1 || d.opts.WriteThrough || d.opts.ReadOnly {
		return errConfig
	}
	on := b[0] == 1
	if d.opts.Cache != nil {
		if err := d.opts.Cache(on); err != nil {
			return fmt.Errorf("keep the write cache's state: %w", err)
		}
	}
	if on || !d.writeback.Load() {
		d.writeback.Store(on)
		return nil
	}
	// The driver never flushes from now on: what it was told before must become durable too, and nothing be in flight
	// that began with the cache.
	ctx, cancel := context.WithTimeout(context.Background(), d.drain)
	defer cancel()
	return d.graph.Change(ctx, func(tx *blk.Tx) error {
		d.writeback.Store(false)
		return blk.Do(blk.NewTask(), tx.Root(), &blk.Request{Op: blk.OpFlush})
	})
}

// writeThrough reports whether a write must be durable before it is acknowledged: the driver switched the cache
// off, or it cannot flush (section 5.2.5.1).
func (d *Device) writeThrough() bool {
	return !d.writeback.Load() || !d.negotiated(featFlush)
}

// Reset implements vhostuser.Device. The write cache stays as the driver chose: front-ends answer the next driver, who
// asks for it, with what the last one wrote, and do not write it again.
func (d *Device) Reset() { d.acked.Store(0) }

// The state: the letters vblk, the version 1, then whether the driver wants a write cache. A guest that has switched it off
// goes on without flushes behind another daemon, which has not seen it do so.
const (
	stateMagic = "vblk\x01"
	stateLen   = len(stateMagic) + 1
)

// State implements vhostuser.Device.
func (d *Device) State() []byte {
	b := append(make([]byte, 0, stateLen), stateMagic...)
	if d.writeback.Load() {
		return append(b, 1)
	}
	return append(b, 0)
}

// SetState implements vhostuser.Device. A device that offers no choice of the cache has none, or takes no writes.
func (d *Device) SetState(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	if len(b) != stateLen || string(b[:len(stateMagic)]) != stateMagic || b[len(stateMagic)] > 1 {
		return fmt.Errorf("not the state of a disk: %x", b)
	}
	cache := b[len(stateMagic):]
	if d.Features()&featConfigWCE == 0 || (cache[0] == 1) == d.writeback.Load() {
		return nil
	}
	return d.SetConfig(cfgWriteback, cache)
}

// Start implements vhostuser.Device.
func (d *Device) Start(r vhostuser.Ring) (vhostuser.Queue, error) {
	if err := d.use(); err != nil {
		return nil, fmt.Errorf("queue %d: %w", r.Index, err)
	}
	q, err := startQueue(d, r)
	if err != nil {
		d.unuse()
		return nil, fmt.Errorf("queue %d: %w", r.Index, err)
	}
	return q, nil
}

func (d *Device) use() error {
	d.useMu.Lock()
	defer d.useMu.Unlock()
	if d.users == 0 && d.opts.Use != nil {
		if err := d.opts.Use(true); err != nil {
			return err
		}
	}
	d.users++
	return nil
}

func (d *Device) unuse() {
	d.useMu.Lock()
	defer d.useMu.Unlock()
	if d.users--; d.users == 0 && d.opts.Use != nil {
		if err := d.opts.Use(false); err != nil {
			d.opts.Log.Error("after the last queue", "disk", d.opts.ID, "err", err)
		}
	}
}

// Stats counts requests since the device was made.
type Stats struct {
	Reads, Writes, Flushes, Others uint64
	BytesRead, BytesWritten        uint64
	Errors                         uint64 // requests that ended with a status other than OK
}

func (s *Stats) add(o Stats) {
	s.Reads += o.Reads
	s.Writes += o.Writes
	s.Flushes += o.Flushes
	s.Others += o.Others
	s.BytesRead += o.BytesRead
	s.BytesWritten += o.BytesWritten
	s.Errors += o.Errors
}

// Stats sums up all queues.
func (d *Device) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.past
	for q := range d.queues {
		s.add(q.count.load())
	}
	return s
}

// lost are the queues that were stopped and have requests in flight all the same.
func (d *Device) lost() (all []*queue) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for q, lost := range d.queues {
		if lost {
			all = append(all, q)
		}
	}
	return all
}

// Running is the number of queues that a driver uses now, or that have requests in flight.
func (d *Device) Running() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queues)
}
