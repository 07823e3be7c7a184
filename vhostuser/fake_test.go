// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/virtq"
	"golang.org/x/sys/unix"
)

const fakeFeatures = 1<<32 | 1<<28 | 1<<29 | 1<<6 // VERSION_1, INDIRECT, EVENT_IDX, SEG_MAX

// fakeDevice records what a session asks of it.
type fakeDevice struct {
	queues int

	mu       sync.Mutex
	events   []string
	config   []byte
	state    []byte
	live     map[int]*fakeQueue
	startErr error
	stopErr  error
	stopBase uint16
	memErr   error
}

func newFakeDevice(queues int) *fakeDevice {
	d := &fakeDevice{queues: queues, config: make([]byte, 60), live: make(map[int]*fakeQueue)}
	for i := range d.config {
		d.config[i] = byte(i + 1)
	}
	return d
}

func (d *fakeDevice) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.noteLocked(format, args...)
}

func (d *fakeDevice) noteLocked(format string, args ...any) {
	d.events = append(d.events, fmt.Sprintf(format, args...))
}

// take returns the events since the last call.
func (d *fakeDevice) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.events
	d.events = nil
	return e
}

// queue returns queue i as it is now, nil if it is not running.
func (d *fakeDevice) queue(i int) *fakeQueue {
	d.mu.Lock()
	defer d.mu.Unlock()
	if q := d.live[i]; q != nil {
		now := *q
		return &now
	}
	return nil
}

// set changes what the device will do.
func (d *fakeDevice) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *fakeDevice) Features() uint64     { return fakeFeatures }
func (d *fakeDevice) Queues() int          { return d.queues }
func (d *fakeDevice) SetFeatures(f uint64) { d.note("features %#x", f) }
func (d *fakeDevice) Reset()               { d.note("reset") }

func (d *fakeDevice) Config() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.config)
}

func (d *fakeDevice) SetConfig(off uint32, b []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if off != 32 || len(b) != 1 {
		return errors.New("read-only")
	}
	d.config[32] = b[0]
	return nil
}

func (d *fakeDevice) State() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.state)
}

func (d *fakeDevice) SetState(b []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if string(b) == "bad" {
		return errors.New("bad state")
	}
	d.state = slices.Clone(b)
	return nil
}

func (d *fakeDevice) Start(r Ring) (Queue, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.startErr != nil {
		return nil, d.startErr
	}
	if d.live[r.Index] != nil {
		panic("ring started twice")
	}
	q := &fakeQueue{d: d, r: r, log: r.Log, logUsed: r.LogUsed, usedLog: r.UsedLog}
	d.live[r.Index] = q
	d.noteLocked("start %d size %d base %d", r.Index, r.Size, r.Base)
	return q, nil
}

// fakeQueue checks that it is called as Queue's contract says.
type fakeQueue struct {
	d       *fakeDevice
	r       Ring
	paused  bool
	kicks   int
	log     *Log
	logUsed bool
	usedLog uint64
}

func (q *fakeQueue) Stop() (uint16, error) {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if q.d.live[q.r.Index] != q {
		panic("stopped twice")
	}
	// All that the queue borrows is still there.
	for _, fd := range []int{q.r.Kick, q.r.Call, q.r.Err} {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); fd >= 0 && err != nil {
			panic("descriptor closed under a running queue")
		}
	}
	for _, r := range q.r.Mem.Regions() {
		if _, err := q.r.Mem.Bytes(r.GPA(), 1); err != nil {
			panic("memory unmapped under a running queue")
		}
	}
	q.mark()
	delete(q.d.live, q.r.Index)
	q.d.noteLocked("stop %d", q.r.Index)
	base := q.r.Base
	if q.d.stopBase != 0 {
		base = q.d.stopBase
	}
	return base, q.d.stopErr
}

func (q *fakeQueue) Pause() {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if q.paused {
		panic("paused twice")
	}
	q.paused = true
	q.d.noteLocked("pause %d", q.r.Index)
}

func (q *fakeQueue) Resume() {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if !q.paused {
		panic("resumed twice")
	}
	q.paused = false
	q.d.noteLocked("resume %d", q.r.Index)
}

func (q *fakeQueue) SetMemory(m *virtq.Memory) error {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	if !q.paused {
		panic("memory set while running")
	}
	q.d.noteLocked("memory %d", q.r.Index)
	if q.d.memErr != nil {
		return q.d.memErr
	}
	q.r.Mem = m
	return nil
}

func (q *fakeQueue) SetCall(fd int) {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.r.Call = fd
	q.d.noteLocked("call %d", q.r.Index)
}

func (q *fakeQueue) SetErr(fd int) {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.r.Err = fd
	q.d.noteLocked("err %d", q.r.Index)
}

func (q *fakeQueue) SetLog(l *Log, used bool, usedLog uint64) {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.mark()
	q.log, q.logUsed, q.usedLog = l, used, usedLog
	q.d.noteLocked("log %d %t %t %#x", q.r.Index, l != nil, used, usedLog)
}

func (q *fakeQueue) Kick() {
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.kicks++
}

// mark touches the log, which is mapped as long as the queue has it.
func (q *fakeQueue) mark() {
	if q.log != nil {
		q.log.Mark(0, 1)
	}
}

// client is a front-end that sends exactly what it is told.
type client struct {
	t    testing.TB
	c    *net.UnixConn
	done chan error // the end of the session
	ack  bool       // set need_reply on what has no reply of its own, and expect 0
}

func socketpair(t testing.TB) (a, b *net.UnixConn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

// quiet is a logger for tests in which front-ends may misbehave, but nothing of ours: an error fails the test.
func quiet(t testing.TB) Options {
	return Options{Logger: slog.New(errorsFail{slog.DiscardHandler, t})}
}

type errorsFail struct {
	slog.Handler
	t testing.TB
}

func (h errorsFail) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelError }

func (h errorsFail) Handle(_ context.Context, r slog.Record) error {
	h.t.Error(r.Message)
	r.Attrs(func(a slog.Attr) bool { h.t.Log(a); return true })
	return nil
}

// connect has srv serve a new client.
func connect(t testing.TB, srv *Server) *client {
	a, b := socketpair(t)
	c := &client{t: t, c: a, done: make(chan error, 1)}
	go func() {
		c.done <- srv.ServeConn(context.Background(), b)
		close(c.done)
	}()
	t.Cleanup(func() {
		a.Close()
		for range c.done { // until the session has ended
		}
	})
	return c
}

// end closes the connection and returns how the session ended.
func (c *client) end() error {
	c.t.Helper()
	c.c.Close()
	return c.wait()
}

func (c *client) wait() error {
	c.t.Helper()
	select {
	case err := <-c.done:
		return err
	case <-time.After(20 * time.Second):
		c.t.Fatal("the session does not end")
		return nil
	}
}

func (c *client) raw(req, flags uint32, payload []byte, fds ...int) {
	c.t.Helper()
	b := append(appendHeader(nil, req, flags, len(payload)), payload...)
	c.bytes(b, fds...)
}

func (c *client) bytes(b []byte, fds ...int) {
	c.t.Helper()
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := c.c.WriteMsgUnix(b, oob, nil); err != nil {
		c.t.Fatal(err)
	}
}

// reply reads a reply to req, and the descriptors that came along.
func (c *client) reply(req uint32) ([]byte, []int) {
	c.t.Helper()
	if err := c.c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		c.t.Fatal(err)
	}
	head, oob := make([]byte, headerSize), make([]byte, 128)
	n, oobn, _, _, err := c.c.ReadMsgUnix(head, oob)
	if err != nil || n != headerSize {
		c.t.Fatalf("reply to %d: %d bytes, %v", req, n, err)
	}
	if got := binary.NativeEndian.Uint32(head); got != req {
		c.t.Fatalf("reply to %d, want %d", got, req)
	}
	if flags := binary.NativeEndian.Uint32(head[4:]); flags != flagVersion|flagReply {
		c.t.Fatalf("reply flags %#x", flags)
	}
	body := make([]byte, binary.NativeEndian.Uint32(head[8:]))
	if _, err := io.ReadFull(c.c, body); err != nil {
		c.t.Fatal(err)
	}
	var fds []int
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			c.t.Fatal(err)
		}
		if fds, err = unix.ParseUnixRights(&msgs[0]); err != nil {
			c.t.Fatal(err)
		}
	}
	return body, fds
}

// set sends a message without a reply of its own, acknowledged if c.ack.
func (c *client) set(req uint32, payload []byte, fds ...int) {
	c.t.Helper()
	if !c.ack {
		c.raw(req, flagVersion, payload, fds...)
		return
	}
	if v := c.nack(req, payload, fds...); v != 0 {
		c.t.Fatalf("request %d refused", req)
	}
}

// nack sends a message with need_reply and returns the acknowledgement.
func (c *client) nack(req uint32, payload []byte, fds ...int) uint64 {
	c.t.Helper()
	c.raw(req, flagVersion|flagNeedReply, payload, fds...)
	b, _ := c.reply(req)
	if len(b) == 16 { // SET_LOG_BASE, answered with the log: none, if it is refused
		if bytes.Equal(b, make([]byte, 16)) {
			return 1
		}
		return 0
	}
	return binary.NativeEndian.Uint64(b)
}

func (c *client) get(req uint32, payload []byte) []byte {
	c.t.Helper()
	c.raw(req, flagVersion, payload)
	b, _ := c.reply(req)
	return b
}

func (c *client) getU64(req uint32) uint64 {
	c.t.Helper()
	return binary.NativeEndian.Uint64(c.get(req, nil))
}

// sync returns when all that was sent before has been handled.
func (c *client) sync() { c.t.Helper(); c.getU64(reqGetQueueNum) }

func u64s(v ...uint64) []byte {
	var b []byte
	for _, x := range v {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	return b
}

func u32s(v ...uint32) []byte {
	var b []byte
	for _, x := range v {
		b = binary.NativeEndian.AppendUint32(b, x)
	}
	return b
}

// guest is a memory region with two rings in it, and the descriptors that go with them.
type guest struct {
	fd         int
	gpa, user  uint64
	size       uint64
	mem        []byte
	kick, call [2]int
}

func newGuest(t testing.TB) *guest {
	g := &guest{gpa: 0x100000, user: 0x7f0000000000, size: 1 << 20}
	fd, err := memfd("guest", int64(g.size))
	if err != nil {
		t.Fatal(err)
	}
	g.fd = fd
	if g.mem, err = syscall.Mmap(fd, 0, int(g.size), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	for i := range g.kick {
		g.kick[i], g.call[i] = eventfd(t), eventfd(t)
	}
	t.Cleanup(func() {
		closeFD(g.fd)
		_ = syscall.Munmap(g.mem)
	})
	return g
}

func eventfd(t testing.TB) int {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFD(fd) })
	return fd
}

// signals drains an eventfd and returns its count.
func signals(fd int) uint64 {
	b := make([]byte, 8)
	if _, err := unix.Read(fd, b); err != nil {
		return 0
	}
	return binary.NativeEndian.Uint64(b)
}

func (g *guest) region() []byte          { return u64s(g.gpa, g.size, g.user, 0) }
func (g *guest) memReg() []byte          { return append(u64s(0), g.region()...) }
func (g *guest) memTable() []byte        { return append(u32s(1, 0), g.region()...) }
func (g *guest) ringOff(i uint32) uint64 { return uint64(i) * 0x10000 }

func (g *guest) addr(i, flags uint32) []byte {
	base := g.user + g.ringOff(i)
	return append(u32s(i, flags), u64s(base, base+0x8000, base+0x4000, 0x5000)...)
}

// setUsedIdx writes the used index of ring i, as an earlier back-end would have.
func (g *guest) setUsedIdx(i uint32, idx uint16) {
	binary.NativeEndian.PutUint16(g.mem[g.ringOff(i)+0x8000+2:], idx)
}

const testFeatures = fakeFeatures | featureProtocolFeatures

// negotiate is what most front-ends begin with.
func (c *client) negotiate(features uint64) {
	c.t.Helper()
	c.getU64(reqGetFeatures)
	c.getU64(reqGetProtocolFeatures)
	ack := c.ack
	c.ack = false
	c.set(reqSetProtocolFeatures, u64s(protocolFeatures))
	c.ack = ack
	c.set(reqSetOwner, nil)
	c.set(reqSetFeatures, u64s(features))
}

// ring sets up ring i up to its kick.
func (c *client) ring(g *guest, i, size, base uint32) {
	c.t.Helper()
	c.set(reqSetVringNum, u32s(i, size))
	c.set(reqSetVringBase, u32s(i, base))
	c.set(reqSetVringAddr, g.addr(i, 0))
	c.set(reqSetVringKick, u64s(uint64(i)), g.kick[i])
	c.set(reqSetVringCall, u64s(uint64(i)), g.call[i])
}

// expect compares the device's events since the last call, after all that was sent has been handled.
func (c *client) expect(d *fakeDevice, want ...string) {
	c.t.Helper()
	c.sync()
	c.expectDone(d, want...)
}

func (c *client) expectDone(d *fakeDevice, want ...string) {
	c.t.Helper()
	if got := d.take(); !slices.Equal(got, want) {
		c.t.Fatalf("device saw %q, want %q", got, want)
	}
}

// openFiles lists this process's descriptors, but for those that the runtime and the listing itself need.
func openFiles(t testing.TB) []string {
	names, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, name := range names {
		if to, err := os.Readlink(name); err == nil && !strings.Contains(to, "/fd") {
			open = append(open, filepath.Base(name)+" "+to)
		}
	}
	return open
}

// mappings counts this process's mappings of memfds.
func mappings(t testing.TB) int {
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), "/memfd:")
}

// noLeaks fails the test if what runs until the returned function is called leaves descriptors or mappings behind.
func noLeaks(t testing.TB) func() {
	t.Helper()
	// The network poller's descriptors appear with its first use.
	a, b := socketpair(t)
	a.Close()
	b.Close()
	files, maps := openFiles(t), mappings(t)
	return func() {
		t.Helper()
		if got := openFiles(t); !slices.Equal(got, files) {
			t.Errorf("open before:\n%s\nafter:\n%s", strings.Join(files, "\n"), strings.Join(got, "\n"))
		}
		if got := mappings(t); got != maps {
			t.Errorf("%d shared mappings before, %d after", maps, got)
		}
	}
}
