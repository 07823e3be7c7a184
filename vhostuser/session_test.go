// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"testing"

	"golang.org/x/sys/unix"
)

// qemuStart is what QEMU sends when a guest's driver starts the device.
func (c *client) qemuStart(g *guest, inflight []int, bases ...uint32) {
	c.t.Helper()
	c.set(reqSetFeatures, u64s(testFeatures))
	if inflight != nil {
		c.set(reqSetInflightFD, append(u64s(2*uint64(inflightStride(128)), 0), u32s(2|128<<16, 0)...), inflight...)
	}
	for i := range bases {
		c.set(reqSetVringCall, u64s(uint64(i)), g.call[i])
	}
	c.set(reqSetFeatures, u64s(testFeatures))
	c.qemuMemory(g)
	for i, base := range bases {
		c.set(reqSetVringNum, u32s(uint32(i), 256))
		c.set(reqSetVringBase, u32s(uint32(i), base))
		c.set(reqSetVringAddr, g.addr(uint32(i), 0))
		c.set(reqSetVringKick, u64s(uint64(i)), g.kick[i])
	}
	for i := range uint32(2) {
		c.set(reqSetVringEnable, u32s(i, 1)) // also those that the guest did not configure
	}
}

// qemuMemory adds the region once a connection, as QEMU does.
func (c *client) qemuMemory(g *guest) {
	c.t.Helper()
	if v := c.nack(reqAddMemReg, g.memReg(), g.fd); v != 0 {
		c.t.Fatal("ADD_MEM_REG refused")
	}
}

func (c *client) qemuRealize() (backend int) {
	c.t.Helper()
	if f := c.getU64(reqGetFeatures); f != testFeatures|featureLogAll {
		c.t.Fatalf("features %#x", f)
	}
	if f := c.getU64(reqGetProtocolFeatures); f != protocolFeatures {
		c.t.Fatalf("protocol features %#x", f)
	}
	c.set(reqSetProtocolFeatures, u64s(protocolFeatures))
	if n := c.getU64(reqGetQueueNum); n != 2 {
		c.t.Fatalf("%d queues", n)
	}
	if n := c.getU64(reqGetMaxMemSlots); n < 509 {
		c.t.Fatalf("%d memory slots", n)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.t.Fatal(err)
	}
	if v := c.nack(reqSetBackendReqFD, nil, fds[1]); v != 0 {
		c.t.Fatal("SET_BACKEND_REQ_FD refused")
	}
	closeFD(fds[1])
	c.t.Cleanup(func() { closeFD(fds[0]) })
	c.set(reqSetOwner, nil)
	c.getU64(reqGetFeatures)
	for i := range 2 {
		fd := eventfd(c.t)
		c.set(reqSetVringCall, u64s(uint64(i)), fd)
		c.set(reqSetVringErr, u64s(uint64(i)), fd)
	}
	return fds[0]
}

func (c *client) getInflight() int {
	c.t.Helper()
	// QEMU asks for its queue-size; the rings can be larger.
	c.raw(reqGetInflightFD, flagVersion, append(u64s(0, 0), u32s(2|128<<16, 0)...))
	b, fds := c.reply(reqGetInflightFD)
	if len(b) != 24 || len(fds) != 1 {
		c.t.Fatalf("inflight reply: %d bytes, %d descriptors", len(b), len(fds))
	}
	if size := binary.NativeEndian.Uint64(b); size != 2*uint64(inflightStride(128)) {
		c.t.Fatalf("inflight size %d", size)
	}
	c.t.Cleanup(func() { closeFD(fds[0]) })
	return fds[0]
}

// received counts whole messages on the back-end channel.
func received(t *testing.T, fd int) int {
	t.Helper()
	b := make([]byte, 1<<16)
	n, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
	if err != nil {
		return 0
	}
	msg := u32s(backendConfigChange, flagVersion, 0)
	if !bytes.Equal(b[:n], bytes.Repeat(msg, n/len(msg))) {
		t.Fatalf("back-end channel: %x", b[:n])
	}
	return n / len(msg)
}

func TestQEMU(t *testing.T) {
	check := noLeaks(t)
	t.Run("session", func(t *testing.T) {
		d := newFakeDevice(2)
		srv := NewServer(d, quiet(t))
		g := newGuest(t)
		c := connect(t, srv)
		backend := c.qemuRealize()
		cfg := c.get(reqGetConfig, append(u32s(0, 57, 0), make([]byte, 57)...))
		if !bytes.Equal(cfg, append(u32s(0, 57, 0), d.Config()[:57]...)) {
			t.Fatalf("config %x", cfg)
		}
		inflight := c.getInflight()

		// Start: one of two queues configured.
		c.qemuStart(g, []int{inflight}, 0)
		c.expect(d, "features 0x130000040", "start 0 size 256 base 0")
		q := d.queue(0)
		if q.r.Desc != g.gpa || q.r.Avail != g.gpa+0x4000 || q.r.Used != g.gpa+0x8000 || q.r.Features != fakeFeatures {
			t.Fatalf("ring %+v", q.r)
		}
		if q.r.Inflight == nil || q.kicks != 1 {
			t.Fatalf("in-flight %v, %d kicks", q.r.Inflight, q.kicks)
		}
		for _, fd := range []int{q.r.Kick, q.r.Call} {
			if fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || fl&unix.FD_CLOEXEC == 0 {
				t.Fatalf("descriptor flags %#x, %v", fl, err)
			}
		}
		// QEMU unmasks the interrupt once the device runs.
		signals(g.call[0])
		c.set(reqSetVringCall, u64s(0), g.call[0])
		c.expect(d, "call 0")
		if signals(g.call[0]) != 1 {
			t.Fatal("SET_VRING_CALL did not signal")
		}

		// Resize.
		srv.ConfigChanged()
		if n := received(t, backend); n != 1 {
			t.Fatalf("%d messages", n)
		}

		// Hot-plug.
		more := *g
		more.gpa, more.user = 0x40000000, g.user+0x40000000
		if v := c.nack(reqAddMemReg, more.memReg(), g.fd); v != 0 {
			t.Fatal("refused")
		}
		c.expect(d, "pause 0", "memory 0", "resume 0")
		if len(d.queue(0).r.Mem.Regions()) != 2 {
			t.Fatal("the queue does not have the new region")
		}
		if v := c.nack(reqRemMemReg, more.memReg(), g.fd); v != 0 {
			t.Fatal("refused")
		}
		c.expect(d, "pause 0", "memory 0", "resume 0")

		// Migration, first on, then off again.
		logFD, err := memfd("log", 4096)
		if err != nil {
			t.Fatal(err)
		}
		defer closeFD(logFD)
		c.raw(reqSetLogBase, flagVersion, u64s(4096, 0), logFD)
		if b, _ := c.reply(reqSetLogBase); !bytes.Equal(b, u64s(4096, 0)) {
			t.Fatal("SET_LOG_BASE refused")
		}
		c.expect(d, "log 0 false false 0x0")
		c.set(reqSetFeatures, u64s(testFeatures|featureLogAll))
		c.set(reqSetVringAddr, g.addr(0, vringLog))
		c.expect(d, "log 0 true false 0x5000", "log 0 true true 0x5000")
		d.queue(0).log.Mark(0x3000, 1)
		b := make([]byte, 8)
		if _, err := unix.Pread(logFD, b, 0); err != nil || b[0] != 8|1 {
			t.Fatalf("log %x, %v", b, err) // bit 0 is the fake's own
		}
		c.set(reqSetFeatures, u64s(testFeatures))
		c.set(reqSetVringAddr, g.addr(0, 0))
		c.expect(d, "log 0 false false 0x0", "log 0 false false 0x0")

		// Stop and go on: drained, then restarted by the in-flight region, whatever base is sent.
		d.set(func() { d.stopBase = 7 })
		c.set(reqSetVringEnable, u32s(0, 0))
		c.set(reqSetVringEnable, u32s(1, 0))
		c.expect(d, "pause 0")
		if got := c.get(reqGetVringBase, u32s(0, 0)); !bytes.Equal(got, u32s(0, 7)) {
			t.Fatalf("base %x", got)
		}
		c.set(reqSetStatus, u64s(0))
		c.expect(d, "stop 0")
		received(t, backend)
		g.setUsedIdx(0, 7)
		c.set(reqSetInflightFD, append(u64s(2*uint64(inflightStride(128)), 0), u32s(2|128<<16, 0)...), inflight)
		c.set(reqSetFeatures, u64s(testFeatures))
		c.ring(g, 0, 256, 99)
		c.set(reqSetVringEnable, u32s(0, 1))
		c.expect(d, "start 0 size 256 base 7")
		if n := received(t, backend); n != 1 {
			t.Fatalf("%d messages", n) // the change before is repeated by the first start after it
		}

		// Guest reset.
		c.set(reqResetDevice, nil)
		c.expect(d, "stop 0", "reset")
		c.set(reqSetFeatures, u64s(testFeatures))
		c.ring(g, 0, 1024, 0)
		c.set(reqSetVringEnable, u32s(0, 1))
		c.expect(d, "features 0x130000040", "start 0 size 1024 base 0")
		if n := received(t, backend); n != 0 {
			t.Fatalf("%d messages", n)
		}

		// Killed front-end.
		if err := c.end(); err != nil {
			t.Fatal(err)
		}
		c.expectDone(d, "stop 0")
	})
	check()
}

// TestConfigChanged: the message is repeated once after rings start, and never waits for the front-end.
func TestConfigChanged(t *testing.T) {
	d := newFakeDevice(2)
	srv := NewServer(d, quiet(t))
	g := newGuest(t)
	c := connect(t, srv)
	srv.ConfigChanged() // no channel yet
	backend := c.qemuRealize()
	c.qemuStart(g, nil, 0, 0)
	c.sync()
	if n := received(t, backend); n != 1 {
		t.Fatalf("%d messages after the start", n)
	}
	for range 100000 { // far more than the socket holds
		srv.ConfigChanged()
	}
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	srv.ConfigChanged() // no channel any more
}

// TestReconnect: a back-end dies with requests in flight, and the next one finds them.
func TestReconnect(t *testing.T) {
	check := noLeaks(t)
	t.Run("session", func(t *testing.T) {
		d := newFakeDevice(2)
		srv := NewServer(d, quiet(t))
		g := newGuest(t)
		c := connect(t, srv)
		c.qemuRealize()
		inflight := c.getInflight()
		c.qemuStart(g, []int{inflight}, 0, 0)
		c.sync()
		q := d.queue(0).r.Inflight
		for _, head := range []uint16{9, 3, 200, 4} {
			q.Fetch(head)
		}
		q.Complete(3)
		g.setUsedIdx(0, 1)
		q.Commit(1)
		if err := c.end(); err != nil {
			t.Fatal(err)
		}
		d.take()

		c = connect(t, srv)
		c.qemuRealize()
		c.qemuStart(g, []int{inflight}, 1, 0)
		c.expect(d, "features 0x130000040", "start 0 size 256 base 4", "start 1 size 256 base 0")
		if got := d.queue(0).r.Resubmit; len(got) != 3 || got[0] != 9 || got[1] != 200 || got[2] != 4 {
			t.Fatalf("resubmit %v", got)
		}
		if signals(g.call[0]) == 0 {
			t.Fatal("the interrupt that may have been lost is not repeated")
		}
		if err := c.end(); err != nil {
			t.Fatal(err)
		}
	})
	check()
}

// TestResets: what the two kinds of reset take away, and what they leave.
func TestResets(t *testing.T) {
	d := newFakeDevice(1)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures | featureLogAll)
	c.set(reqAddMemReg, g.memReg(), g.fd)
	logFD, err := memfd("log", 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFD(logFD)
	if c.nack(reqSetLogBase, u64s(4096, 0), logFD) != 0 {
		t.Fatal("SET_LOG_BASE refused")
	}
	start := func() {
		c.ring(g, 0, 64, 5)
		c.set(reqSetVringEnable, u32s(0, 1))
	}
	start()
	c.expect(d, "features 0x130000040", "start 0 size 64 base 5")

	// Status 0 is only a stop: features and log stay, and the ring needs its kick and VRING_ENABLE again.
	c.set(reqSetStatus, u64s(0))
	c.expect(d, "stop 0")
	c.set(reqSetVringKick, u64s(0), g.kick[0])
	c.expect(d)
	c.set(reqSetVringEnable, u32s(0, 1))
	c.expect(d, "start 0 size 64 base 5")
	if d.queue(0).r.Log == nil {
		t.Error("the log is gone")
	}

	c.set(reqResetDevice, nil)
	c.expect(d, "stop 0", "reset")
	if v := c.nack(reqSetFeatures, u64s(testFeatures|1<<40)); v == 0 {
		t.Error("features that were not offered are accepted")
	}
	c.set(reqSetFeatures, u64s(testFeatures|featureLogAll))
	// All but the base is sent again.
	c.set(reqSetVringNum, u32s(0, 64))
	c.set(reqSetVringAddr, g.addr(0, vringLog))
	c.set(reqSetVringKick, u64s(0), g.kick[0])
	c.expect(d, "features 0x130000040")
	c.set(reqSetVringEnable, u32s(0, 1))
	c.expect(d, "start 0 size 64 base 0")
	if d.queue(0).r.Log != nil {
		t.Error("the log of before the reset is still written")
	}
}

// TestAcknowledged: who asks for an acknowledgement gets one, also before REPLY_ACK is negotiated; and a log that is refused
// ends a session that did not ask.
func TestAcknowledged(t *testing.T) {
	c := connect(t, NewServer(newFakeDevice(1), quiet(t)))
	if v := c.nack(reqSetOwner, nil); v != 0 {
		t.Error("refused")
	}
	logFD, err := memfd("log", 8)
	if err != nil {
		t.Fatal(err)
	}
	defer closeFD(logFD)
	c.raw(reqSetLogBase, flagVersion, u64s(16, 0), logFD)
	if err := c.wait(); err == nil {
		t.Error("the session goes on without the log")
	}
}

func TestLibblkio(t *testing.T) {
	d := newFakeDevice(2)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.getU64(reqGetFeatures)
	c.set(reqSetFeatures, u64s(testFeatures)) // before the protocol features
	c.getU64(reqGetProtocolFeatures)
	c.set(reqSetProtocolFeatures, u64s(protocolMQ|protocolReplyAck|protocolConfig|protocolConfigureMemSlots))
	c.ack = true
	c.set(reqSetOwner, nil)
	for i := range uint32(2) {
		c.ring(g, i, 128, 0)
		c.set(reqSetVringEnable, u32s(i, 1))
	}
	c.expect(d, "features 0x130000040")
	odd := *g
	odd.size -= 123 // not a page multiple
	c.set(reqAddMemReg, odd.memReg(), g.fd)
	c.expect(d, "start 0 size 128 base 0", "start 1 size 128 base 0")
	// A buffer region is added while the rings run; then the client is gone without stopping anything.
	more := *g
	more.gpa, more.user, more.size = 0x40000000, 0x40000000, 5000
	c.set(reqAddMemReg, more.memReg(), g.fd)
	d.take()
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	if d.queue(0) != nil || d.queue(1) != nil {
		t.Fatal("queues still run")
	}
}

func TestCloudHypervisor(t *testing.T) {
	d := newFakeDevice(2)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures)
	c.ack = true
	c.set(reqSetMemTable, g.memTable(), g.fd)
	setup := func() {
		for i := range uint32(2) {
			c.set(reqSetVringNum, u32s(i, 128))
		}
		for i := range uint32(2) {
			c.set(reqSetVringAddr, g.addr(i, 0))
			c.set(reqSetVringBase, u32s(i, 0))
			c.set(reqSetVringCall, u64s(uint64(i)), g.call[i])
			c.set(reqSetVringKick, u64s(uint64(i)), g.kick[i])
		}
		for i := range uint32(2) {
			c.set(reqSetVringEnable, u32s(i, 1))
		}
	}
	setup()
	c.expect(d, "features 0x130000040", "start 0 size 128 base 0", "start 1 size 128 base 0")
	c.set(reqSetVringEnable, u32s(0, 0)) // pause, acknowledged once drained
	c.expectDone(d, "pause 0")
	c.set(reqSetVringEnable, u32s(0, 0))
	c.set(reqSetVringEnable, u32s(0, 1))
	c.set(reqSetVringEnable, u32s(0, 1))
	c.expect(d, "resume 0")
	// The whole table is replaced while the rings run.
	c.set(reqSetMemTable, append(u32s(1, 0), g.region()...), g.fd)
	if got := d.take(); len(got) != 6 {
		t.Fatalf("device saw %q", got)
	}
	// A device reset that only disables the rings before they are set up again.
	c.set(reqSetVringEnable, u32s(0, 0))
	c.set(reqSetVringEnable, u32s(1, 0))
	d.take()
	setup()
	c.sync()
	if d.queue(0) == nil || d.queue(1) == nil || d.queue(0).paused {
		t.Fatalf("not running again: %q", d.take())
	}
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
}

// TestNoProtocolFeatures: without them rings start enabled.
func TestNoProtocolFeatures(t *testing.T) {
	d := newFakeDevice(1)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.set(reqSetMemTable, g.memTable(), g.fd)
	c.ring(g, 0, 64, 5)
	c.expect(d)
	c.set(reqSetFeatures, u64s(fakeFeatures))
	c.expect(d, "features 0x130000040", "start 0 size 64 base 5")
	if v := binary.NativeEndian.Uint32(c.get(reqGetVringBase, u32s(0, 0))[4:]); v != 5 {
		t.Fatalf("base %d", v)
	}
}

func TestNoDescriptors(t *testing.T) {
	const noFD = 1 << 8
	d := newFakeDevice(1)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures)
	c.ack = true
	c.set(reqAddMemReg, g.memReg(), g.fd)
	c.ring(g, 0, 64, 0)
	c.set(reqSetVringKick, u64s(noFD))
	c.set(reqSetVringCall, u64s(noFD))
	c.set(reqSetVringErr, u64s(noFD))
	c.set(reqSetVringEnable, u32s(0, 1))
	c.sync()
	if r := d.queue(0).r; r.Kick != -1 || r.Call != -1 || r.Err != -1 {
		t.Fatalf("ring %+v", r)
	}
}

func TestConfigSpace(t *testing.T) {
	d := newFakeDevice(1)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures)
	for _, tt := range []struct{ off, size uint32 }{{0, 36}, {0, 60}, {8, 8}, {59, 1}, {58, 8}, {60, 4}, {1 << 31, 4}, {0, 4084}} {
		got := c.get(reqGetConfig, u32s(tt.off, tt.size, 0))
		want := make([]byte, tt.size)
		if tt.off < 60 {
			copy(want, d.Config()[tt.off:])
		}
		if !bytes.Equal(got, append(u32s(tt.off, tt.size, 0), want...)) {
			t.Errorf("%d bytes at %d: %x", tt.size, tt.off, got)
		}
	}
	for _, size := range []uint32{0, 4085, 1 << 31} {
		if got := c.get(reqGetConfig, u32s(0, size, 0)); len(got) != 0 {
			t.Errorf("%d bytes: %x", size, got)
		}
	}
	for _, flags := range []uint32{0, 1} {
		if v := c.nack(reqSetConfig, append(u32s(32, 1, flags), byte(flags))); v != 0 || d.Config()[32] != byte(flags) {
			t.Errorf("set wce with flags %d: %d", flags, v)
		}
	}
	if v := c.nack(reqSetConfig, append(u32s(0, 1, 0), 1)); v == 0 {
		t.Error("read-only field set")
	}
	c.set(reqSetStatus, u64s(11))
	if v := c.getU64(reqGetStatus); v != 11 {
		t.Errorf("status %d", v)
	}
}

// TestUndrained: what requests that were lost may still touch is never given back.
func TestUndrained(t *testing.T) {
	d := newFakeDevice(1)
	d.stopErr = errors.New("stuck")
	g := newGuest(t)
	c := connect(t, NewServer(d, Options{Logger: slog.New(slog.DiscardHandler)}))
	c.negotiate(testFeatures)
	c.set(reqAddMemReg, g.memReg(), g.fd)
	c.ring(g, 0, 64, 3)
	c.set(reqSetVringEnable, u32s(0, 1))
	c.sync()
	r := d.queue(0).r
	if v := binary.NativeEndian.Uint32(c.get(reqGetVringBase, u32s(0, 0))[4:]); v != 3 {
		t.Fatalf("base %d", v)
	}
	if err := c.end(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Mem.Bytes(g.gpa, 1); err != nil {
		t.Error("memory was unmapped")
	}
	if err := checkEvent(r.Call); err != nil {
		t.Error("the call descriptor was closed")
	}
	closeFD(r.Call)
	closeFD(r.Kick)
	for _, region := range r.Mem.Regions() {
		_ = region.Unmap()
	}
}

// TestUndrainedMemory: a ring that is stopped since its memory goes away may leave requests behind, too. They touch the
// memory that it had, and the ring goes on with descriptors of its own when it comes back.
func TestUndrainedMemory(t *testing.T) {
	for name, change := range map[string]func(*client, *guest){
		"SET_MEM_TABLE": func(c *client, g *guest) {
			g.gpa += g.size // the ring moves with it
			c.set(reqSetMemTable, g.memTable(), g.fd)
		},
		"REM_MEM_REG": func(c *client, g *guest) {
			c.set(reqRemMemReg, g.memReg())
			c.set(reqAddMemReg, g.memReg(), g.fd)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newFakeDevice(1)
			d.stopErr = errors.New("stuck")
			g := newGuest(t)
			c := connect(t, NewServer(d, Options{Logger: slog.New(slog.DiscardHandler)}))
			c.negotiate(testFeatures)
			c.set(reqSetMemTable, g.memTable(), g.fd)
			c.ring(g, 0, 64, 0)
			c.set(reqSetVringEnable, u32s(0, 1))
			more := *g // comes while the ring runs
			more.gpa, more.user = g.gpa+16*g.size, g.user+16*g.size
			c.set(reqAddMemReg, more.memReg(), more.fd)
			c.sync()
			old := d.queue(0).r
			change(c, g)
			c.sync()
			for _, region := range old.Mem.Regions() {
				if _, err := old.Mem.Bytes(region.GPA(), 1); err != nil {
					t.Errorf("the memory at %#x was unmapped", region.GPA())
				}
			}
			q := d.queue(0)
			if q == nil {
				t.Fatal("the ring was not started again")
			}
			for _, fds := range [][2]int{{old.Kick, q.r.Kick}, {old.Call, q.r.Call}} {
				if fds[0] == fds[1] || checkEvent(fds[0]) != nil || checkEvent(fds[1]) != nil {
					t.Errorf("descriptors %v of the lost queue and of the new one", fds)
				}
				closeFD(fds[0])
			}
			signals(g.call[0])
			if signal(q.r.Call); signals(g.call[0]) != 1 {
				t.Error("the new queue cannot call the driver")
			}
			d.set(func() { d.stopErr = nil })
			if err := c.end(); err != nil {
				t.Error(err)
			}
			for _, region := range old.Mem.Regions() {
				if _, err := old.Mem.Bytes(region.GPA(), 1); err != nil {
					t.Errorf("the memory at %#x was unmapped at the end", region.GPA())
				}
				_ = region.Unmap()
			}
		})
	}
}

// TestSetMemoryFails: a queue that cannot go on with the new memory is stopped before the old is unmapped.
func TestSetMemoryFails(t *testing.T) {
	d := newFakeDevice(1)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.negotiate(testFeatures)
	c.set(reqAddMemReg, g.memReg(), g.fd)
	c.ring(g, 0, 64, 0)
	c.set(reqSetVringEnable, u32s(0, 1))
	c.expect(d, "features 0x130000040", "start 0 size 64 base 0")
	d.set(func() { d.memErr, d.startErr = errors.New("no"), errors.New("no") })
	if v := c.nack(reqSetMemTable, g.memTable(), g.fd); v == 0 {
		t.Error("not refused")
	}
	c.expect(d, "pause 0", "memory 0", "stop 0")
	// Removing the ring's region stops it, adding it again starts it.
	d.set(func() { d.memErr, d.startErr = nil, nil })
	c.set(reqRemMemReg, g.memReg())
	c.set(reqAddMemReg, g.memReg(), g.fd)
	c.expect(d, "start 0 size 64 base 0")
	c.set(reqRemMemReg, g.memReg())
	c.expect(d, "stop 0")
}

// TestTruncatedMemory: used.idx is read from memory that the front-end has taken away.
func TestTruncatedMemory(t *testing.T) {
	d := newFakeDevice(2)
	g := newGuest(t)
	c := connect(t, NewServer(d, quiet(t)))
	c.qemuRealize()
	inflight := c.getInflight()
	c.set(reqSetFeatures, u64s(testFeatures))
	c.set(reqSetInflightFD, append(u64s(2*uint64(inflightStride(128)), 0), u32s(2|128<<16, 0)...), inflight)
	c.qemuMemory(g)
	c.ring(g, 0, 64, 0)
	c.sync()
	if err := unix.Ftruncate(g.fd, 0); err != nil {
		t.Fatal(err)
	}
	c.set(reqSetVringEnable, u32s(0, 1))
	if err := c.wait(); err == nil {
		t.Fatal("the session goes on")
	}
}

// TestTrickle: a message may come byte by byte.
func TestTrickle(t *testing.T) {
	d := newFakeDevice(1)
	c := connect(t, NewServer(d, quiet(t)))
	for _, b := range append(appendHeader(nil, reqGetConfig, flagVersion, 12), u32s(0, 4, 0)...) {
		c.bytes([]byte{b})
	}
	if b, _ := c.reply(reqGetConfig); !bytes.Equal(b[12:], d.Config()[:4]) {
		t.Fatalf("config %x", b)
	}
	c.bytes([]byte{1})
	if err := c.end(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
}
