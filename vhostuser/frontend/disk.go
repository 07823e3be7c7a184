// SPDX-License-Identifier: Apache-2.0

// Package frontend is the driver-side twin of a vhost-user-blk back-end: it connects as a virtual machine monitor
// would, and drives the rings as the guest's driver would. Tests, the demo and the load generator are built on it.
//
// It shares no message code with package vhostuser on purpose: an error in one of them shows against the other.
//
// Contexts of execution: each queue has a goroutine that sleeps on the call eventfd and reaps completions; one
// goroutine watches the connection and, if asked, connects again; one serves the back-end's own messages. Locks, in
// their order: Disk.mu (the session), Queue.mu (one ring).
package frontend

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/blkstream/blkstream/virtq"
)

// ErrClosed is returned for requests that a Close cut off.
var ErrClosed = errors.New("frontend: disk is closed")

// Options of Dial. The zero value is a driver with one queue that uses all that the back-end offers.
type Options struct {
	Queues           int           // 0: 1
	QueueSize        int           // entries a ring, a power of two up to 1024; 0: 128
	Features         uint64        // virtio features to accept; 0: AllFeatures
	ProtocolFeatures uint64        // vhost-user features to accept; 0: AllProtocolFeatures
	MemSize          uint64        // bytes of guest memory for Alloc; 0: 16 MiB
	Reconnect        time.Duration // connect again at this interval when the back-end goes; 0: requests fail instead
	Timeout          time.Duration // for the reply to one message; 0: 30 s
	Manual           bool          // no goroutine reaps completions: the caller works with Queue.Driver itself
}

const (
	ringGPA    = 0x10000      // rings and request headers, in a region of their own
	dataGPA    = 1 << 32      // buffers, above the hole that a PC has below 4 GiB
	userDelta  = 0x7e00 << 32 // front-end address minus guest address, so that mixing them up shows
	regionUnit = 1 << 16      // regions start at multiples of this
	bounceSize = 1 << 20      // a buffer of the synchronous calls
	bounces    = 16           // how many of these may be busy at once
	defaultMem = 16 << 20     // Options.MemSize
)

// region is one piece of guest memory: size bytes of a memfd.
type region struct {
	gpa, size, fileOff uint64
	fd                 int
	sent               bool // the connected back-end knows it
}

func (r *region) encode() []byte {
	var b []byte
	for _, v := range []uint64{r.gpa, r.size, r.gpa + userDelta, r.fileOff} {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return b
}

// inflight is the in-flight region: the back-end's, kept by us for the next one.
type inflight struct {
	fd      int // -1: none yet
	payload []byte
}

// Disk is a connected virtual disk. Its methods are safe for concurrent use.
type Disk struct {
	path       string
	opts       Options
	queues     []*Queue
	next       atomic.Uint32 // queue of the next synchronous request
	mem        atomic.Pointer[virtq.Memory]
	bounce     chan uint64 // guest addresses of free bounce buffers
	changed    chan struct{}
	cancel     context.CancelFunc
	wg         sync.WaitGroup
	reconnects atomic.Int64

	mu                 sync.Mutex // guards the session, everything below
	conn               *Conn
	channel            *net.UnixConn // our end of the back-end's own channel
	resumed            chan struct{} // closed, and replaced, when a new connection is up
	err                error         // why the last attempt to connect again failed
	features, protocol uint64        // acknowledged; fixed after Dial
	slots              uint64        // memory slots of the back-end
	acks               bool          // REPLY_ACK is in force on this connection
	running            bool          // the rings are with the back-end
	config             Config        // as read by Dial
	regions            []*region
	alloc, allocEnd    uint64 // free guest memory for Alloc
	inflight           inflight
	log                *DirtyLog
	closed             bool
}

// Dial connects to the back-end that listens at path, negotiates and starts the rings. ctx bounds the connecting only.
func Dial(ctx context.Context, path string, opts Options) (*Disk, error) {
	if opts.Queues == 0 {
		opts.Queues = 1
	}
	if opts.QueueSize == 0 {
		opts.QueueSize = 128
	}
	if opts.Features == 0 {
		opts.Features = AllFeatures
	}
	if opts.ProtocolFeatures == 0 {
		opts.ProtocolFeatures = AllProtocolFeatures
	}
	if opts.MemSize == 0 {
		opts.MemSize = defaultMem
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	if opts.Queues < 1 || opts.Queues > 256 {
		return nil, fmt.Errorf("frontend: %d queues", opts.Queues)
	}
	background, cancel := context.WithCancel(context.Background())
	d := &Disk{
		path: path, opts: opts, cancel: cancel,
		bounce:   make(chan uint64, bounces),
		changed:  make(chan struct{}, 1),
		resumed:  make(chan struct{}),
		inflight: inflight{fd: -1},
	}
	conn, err := d.setUp(ctx)
	if err != nil {
		d.Close()
		return nil, err
	}
	d.wg.Go(func() { d.supervise(background, conn) })
	if !opts.Manual {
		for _, q := range d.queues {
			d.wg.Go(q.loop)
		}
	}
	return d, nil
}

// setUp makes guest memory and rings and connects. What it leaves behind on an error is for Close.
func (d *Disk) setUp(ctx context.Context) (*Conn, error) {
	for i := range uint64(bounces) {
		d.bounce <- dataGPA + i*bounceSize
	}
	stride := ringStride(d.opts.QueueSize)
	ringSize := roundUp(stride*uint64(d.opts.Queues), regionUnit)
	dataSize := roundUp(bounces*bounceSize+d.opts.MemSize, regionUnit)
	fd, err := memfd("guest-memory", ringSize+dataSize)
	if err != nil {
		return nil, err
	}
	d.regions = []*region{
		{gpa: ringGPA, size: ringSize, fd: fd},
		{gpa: dataGPA, size: dataSize, fileOff: ringSize, fd: fd},
	}
	var mapped []*virtq.Region
	for _, r := range d.regions {
		m, err := virtq.MapRegion(r.fd, r.gpa, r.size, r.gpa+userDelta, r.fileOff)
		if err != nil {
			return nil, fmt.Errorf("frontend: %w", err)
		}
		mapped = append(mapped, m)
	}
	mem, err := virtq.NewMemory(mapped...)
	if err != nil {
		return nil, fmt.Errorf("frontend: %w", err)
	}
	d.mem.Store(mem)
	d.alloc, d.allocEnd = dataGPA+bounces*bounceSize, dataGPA+dataSize
	for i := range d.opts.Queues {
		q, err := newQueue(d, i)
		if err != nil {
			return nil, err
		}
		d.queues = append(d.queues, q)
	}
	conn, err := d.connect(ctx, true)
	if err != nil {
		return nil, err
	}
	for _, q := range d.queues {
		if err := q.makeRing(ringGPA+uint64(q.index)*stride, mem, d.features); err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return conn, d.startLocked()
}

// connect makes a connection and negotiates on it. Not at first, it also resumes the rings.
func (d *Disk) connect(ctx context.Context, first bool) (*Conn, error) {
	conn, err := DialConn(ctx, d.path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn, d.acks = conn, false
	for _, r := range d.regions {
		r.sent = false
	}
	err = d.negotiateLocked(first)
	if err == nil && d.running { // or Start does it later
		err = d.resumeLocked()
	}
	if err != nil {
		conn.Close()
		d.conn = nil
		d.closeChannelLocked()
		return nil, err
	}
	return conn, nil
}

// resumeLocked starts the rings from where the used rings say that the lost back-end was.
func (d *Disk) resumeLocked() (err error) {
	for _, q := range d.queues {
		if q.base, err = q.usedIdx(); err != nil {
			return err
		}
	}
	return d.startLocked()
}

// supervise waits for the end of each connection. Without reconnection it fails what is in flight; with it, memory,
// rings and in-flight region stay as they are and the next back-end resumes from them.
func (d *Disk) supervise(ctx context.Context, conn *Conn) {
	for {
		<-conn.Done()
		if ctx.Err() != nil {
			return // Close sees to the rest
		}
		d.mu.Lock()
		d.closeChannelLocked()
		d.conn = nil
		err := conn.err
		if d.opts.Reconnect != 0 && d.protocol&ProtocolInflight == 0 && d.pending() > 0 {
			err = fmt.Errorf("%w: requests were in flight, and it has no in-flight region to resume them from", err)
		} else if d.opts.Reconnect != 0 {
			err = nil
		}
		d.mu.Unlock()
		if err != nil {
			for _, q := range d.queues {
				q.fail(err)
			}
			return
		}
		for conn = nil; conn == nil; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(d.opts.Reconnect):
			}
			conn, err = d.connect(ctx, false)
			d.mu.Lock()
			d.err = err
			if err == nil {
				d.reconnects.Add(1)
				close(d.resumed)
				d.resumed = make(chan struct{})
			}
			d.mu.Unlock()
		}
	}
}

// Close stops the rings, which drains them, ends the connection and frees the guest memory. Requests that the
// back-end did not complete get ErrClosed.
func (d *Disk) Close() error {
	d.cancel() // a reconnection under way gives up
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	var err error
	if conn := d.conn; conn != nil {
		if d.running {
			err = d.stopLocked()
		}
		conn.Close()
		d.conn = nil
	}
	d.closeChannelLocked()
	d.mu.Unlock()
	for _, q := range d.queues {
		q.end()
	}
	d.wg.Wait()
	for range bounces { // the synchronous calls that were cut off still look at their buffers
		<-d.bounce
	}
	close(d.bounce)
	for _, q := range d.queues {
		q.closeFDs()
	}
	if d.log != nil {
		d.log.close()
	}
	if d.inflight.fd >= 0 {
		syscall.Close(d.inflight.fd)
	}
	return errors.Join(err, d.freeMemory())
}

func (d *Disk) freeMemory() error {
	var errs []error
	if mem := d.mem.Swap(nil); mem != nil {
		for _, r := range mem.Regions() {
			errs = append(errs, r.Unmap())
		}
	}
	for i, r := range d.regions {
		if i != 1 { // the first two are one memfd
			errs = append(errs, syscall.Close(r.fd))
		}
	}
	return errors.Join(errs...)
}

func (d *Disk) closeChannelLocked() {
	if d.channel != nil {
		d.channel.Close()
		d.channel = nil
	}
}

// pending counts the requests in flight.
func (d *Disk) pending() (n int) {
	for _, q := range d.queues {
		q.mu.Lock()
		n += q.inflight
		q.mu.Unlock()
	}
	return n
}

// Features returns the virtio and the vhost-user protocol features that both sides agreed on.
func (d *Disk) Features() (virtio, protocol uint64) { return d.features, d.protocol }

// Config asks the back-end for the configuration.
func (d *Disk) Config() (Config, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.configLocked()
}

// SetWriteCache turns the device's write-back cache on or off; it needs FeatureConfigWCE.
func (d *Disk) SetWriteCache(on bool) error {
	b := binary.NativeEndian.AppendUint32(nil, configWCE)
	b = binary.NativeEndian.AppendUint32(b, 1)
	b = append(b, 0, 0, 0, 0, 0)
	if on {
		b[12] = 1
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.setLocked(MsgSetConfig, b)
}

// ConfigChanged gets a value when the back-end says that its configuration has changed; read Config then.
func (d *Disk) ConfigChanged() <-chan struct{} { return d.changed }

// Stop takes the rings back, drained, as a pause of the virtual machine does. It returns, for each queue, the index
// at which the back-end stopped. Requests submitted meanwhile wait for Start.
func (d *Disk) Stop() ([]uint16, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.running {
		return nil, errors.New("frontend: the rings are stopped already")
	}
	if err := d.stopLocked(); err != nil {
		return nil, err
	}
	var bases []uint16
	for _, q := range d.queues {
		bases = append(bases, q.base)
	}
	return bases, nil
}

// Start gives the rings back to the back-end after a Stop.
func (d *Disk) Start() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running {
		return errors.New("frontend: the rings are running already")
	}
	return d.startLocked()
}

// Reconnect drops the connection and waits until the session has resumed on a new one. It needs Options.Reconnect.
func (d *Disk) Reconnect(ctx context.Context) error {
	if d.opts.Reconnect == 0 {
		return errors.New("frontend: this disk was opened without Options.Reconnect")
	}
	d.mu.Lock()
	resumed, conn := d.resumed, d.conn
	d.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
	select {
	case <-resumed:
		return nil
	case <-ctx.Done():
		d.mu.Lock()
		defer d.mu.Unlock()
		return errors.Join(ctx.Err(), d.err)
	}
}

// Reconnects counts the connections that were lost and resumed.
func (d *Disk) Reconnects() int { return int(d.reconnects.Load()) }

// Conn returns the current connection, nil while there is none, for messages that a well-behaved front-end would not
// send. Its replies are shared with the Disk: do not call other methods meanwhile.
func (d *Disk) Conn() *Conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn
}

// InflightFD returns the in-flight region's descriptor, which stays the Disk's; -1: there is none.
func (d *Disk) InflightFD() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.inflight.fd
}

// Memory returns the guest memory, the same pages that the back-end has mapped.
func (d *Disk) Memory() *virtq.Memory { return d.mem.Load() }

// AddMemory plugs in size bytes of memory (rounded up to 64 KiB) while the rings run, and returns their guest address.
func (d *Disk) AddMemory(size uint64) (gpa uint64, err error) {
	size = roundUp(size, regionUnit)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn == nil {
		return 0, ErrDisconnected
	}
	last := d.regions[len(d.regions)-1]
	r := &region{gpa: last.gpa + last.size + regionUnit, size: size}
	if r.fd, err = memfd("guest-memory-hotplug", size); err != nil {
		return 0, err
	}
	mapped, err := virtq.MapRegion(r.fd, r.gpa, r.size, r.gpa+userDelta, 0)
	if err != nil {
		syscall.Close(r.fd)
		return 0, fmt.Errorf("frontend: %w", err)
	}
	mem, err := d.mem.Load().Add(mapped)
	if err != nil {
		syscall.Close(r.fd)
		return 0, errors.Join(fmt.Errorf("frontend: %w", err), mapped.Unmap())
	}
	d.mem.Store(mem)
	d.regions = append(d.regions, r)
	return r.gpa, d.sendMemoryLocked()
}

// RemoveMemory unplugs what AddMemory returned. No request may be using it. It needs ProtocolMemSlots.
func (d *Disk) RemoveMemory(gpa uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, r := range d.regions {
		if i < 2 || r.gpa != gpa {
			continue
		}
		if err := d.setLocked(MsgRemMemReg, append(make([]byte, 8), r.encode()...)); err != nil {
			return err
		}
		mem, mapped, err := d.mem.Load().Remove(r.gpa, r.size, r.gpa+userDelta)
		if err != nil {
			return fmt.Errorf("frontend: %w", err)
		}
		d.mem.Store(mem)
		d.regions = append(d.regions[:i], d.regions[i+1:]...)
		return errors.Join(mapped.Unmap(), syscall.Close(r.fd))
	}
	return fmt.Errorf("frontend: no plugged memory at %#x", gpa)
}

// Alloc takes n bytes of guest memory, aligned to 4096, for the life of the disk.
func (d *Disk) Alloc(n uint64) (gpa uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n > d.allocEnd-d.alloc {
		return 0, fmt.Errorf("frontend: %d bytes of guest memory wanted, %d left: raise Options.MemSize", n, d.allocEnd-d.alloc)
	}
	gpa = d.alloc
	d.alloc = min(roundUp(gpa+n, 4096), d.allocEnd)
	return gpa, nil
}

// Queues returns the number of queues.
func (d *Disk) Queues() int { return len(d.queues) }

// Queue returns queue i, counted from 0.
func (d *Disk) Queue(i int) *Queue { return d.queues[i] }

func roundUp(n, unit uint64) uint64 { return (n + unit - 1) / unit * unit }
