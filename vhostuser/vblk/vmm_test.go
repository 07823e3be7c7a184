// SPDX-License-Identifier: Apache-2.0

package vblk

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/vhostuser/frontend"
	"github.com/blkstream/blkstream/virtq"
)

// What the front-ends that are not QEMU send, message by message, with a guest's requests in between. Each test names the
// version that was looked at. QEMU itself is in test/e2e.

const (
	vmmRegions    = 12 // of 2 MiB; queue i's rings lie in region i
	vmmRegionSize = 2 << 20
	vmmRegionGap  = 1 << 30
	vmmDelta      = 0x7e0000000000 // from a guest address to the front-end's
	vmmBuffers    = 0x100000       // in each region, behind its rings

	msgSetDeviceStateFD = 42
	msgCheckDeviceState = 43

	protocolMQ            = 1 << 0
	protocolLogShmFD      = 1 << 1
	protocolReplyAck      = 1 << 3
	protocolBackendReq    = 1 << 5
	protocolConfig        = 1 << 9
	protocolInflightShmFD = 1 << 12
	protocolMemSlots      = 1 << 15
	protocolDeviceState   = 1 << 19

	featureProtocol = 1 << 30
	featureLogAll   = 1 << 26

	wholeConfig = 60 // bytes of the configuration space that the front-ends ask for
)

// vmm is a monitor with a guest in it. It sends what it is told, and reads replies as these front-ends do: of the length
// that it expects, whatever the header says.
type vmm struct {
	*testing.T
	path      string
	c         *net.UnixConn
	needReply bool // set on each message, whether it has a reply of its own or not
	deltaless bool // the guest's addresses are the front-end's

	memFD    int
	mem      *virtq.Memory
	queues   []*vmmQueue
	inflight []byte // its description
	shm      int    // its descriptor; -1: none
	rng      *rand.Rand
	disk     []byte // what it should hold
}

type vmmQueue struct {
	index      int
	cfg        virtq.SplitConfig
	drv        *virtq.Driver
	kick, call int
}

func newVMM(t *testing.T, path string, queues int, size uint16, diskSize int64) *vmm {
	v := &vmm{T: t, path: path, shm: -1, rng: rand.New(rand.NewPCG(1, 2)), disk: make([]byte, diskSize)}
	fd, err := unix.MemfdCreate("vmm", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	v.memFD = fd
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, vmmRegions*vmmRegionSize); err != nil {
		t.Fatal(err)
	}
	var regions []*virtq.Region
	for i := range uint64(vmmRegions) {
		r, err := virtq.MapRegion(fd, gpaOf(i), vmmRegionSize, gpaOf(i)+vmmDelta, i*vmmRegionSize)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := r.Unmap(); err != nil {
				t.Error(err)
			}
		})
		regions = append(regions, r)
	}
	if v.mem, err = virtq.NewMemory(regions...); err != nil {
		t.Fatal(err)
	}
	for i := range queues {
		q := &vmmQueue{index: i, kick: eventFD(t), call: eventFD(t)}
		at := gpaOf(uint64(i))
		q.cfg = virtq.SplitConfig{Mem: v.mem, Size: size, Desc: at, Avail: at + 0x80000, Used: at + 0xa0000, EventIdx: true}
		v.queues = append(v.queues, q)
	}
	v.drivers()
	return v
}

func gpaOf(region uint64) uint64 { return (1 + region) * vmmRegionGap }

func eventFD(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// drivers has the guest's driver begin anew.
func (v *vmm) drivers() {
	v.Helper()
	for _, q := range v.queues {
		var err error
		if q.drv, err = virtq.NewDriver(virtq.DriverConfig{SplitConfig: q.cfg}); err != nil {
			v.Fatal(err)
		}
	}
}

// The wire.

func (v *vmm) connect() {
	v.Helper()
	c, err := net.Dial("unix", v.path)
	if err != nil {
		v.Fatal(err)
	}
	v.c, v.needReply = c.(*net.UnixConn), false
	v.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		v.Fatal(err)
	}
}

func (v *vmm) send(request uint32, payload []byte, fds ...int) {
	v.Helper()
	flags := uint32(frontend.FlagVersion)
	if v.needReply {
		flags |= frontend.FlagNeedReply
	}
	b := append(u32s(request, flags, uint32(len(payload))), payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := v.c.WriteMsgUnix(b, oob, nil); err != nil {
		v.Fatal(err)
	}
}

// recv reads a reply with a payload of n bytes.
func (v *vmm) recv(request uint32, n int) (payload []byte, fds []int) {
	v.Helper()
	b, oob := make([]byte, 12+n), make([]byte, 128)
	got, oobn, _, _, err := v.c.ReadMsgUnix(b, oob)
	if err == nil && got < len(b) {
		_, err = io.ReadFull(v.c, b[got:])
	}
	if err != nil {
		v.Fatalf("reply to message %d: %v", request, err)
	}
	if !bytes.Equal(b[:12], u32s(request, frontend.FlagVersion|frontend.FlagReply, uint32(n))) {
		v.Fatalf("reply to message %d with %d bytes: header %x", request, n, b[:12])
	}
	if oobn > 0 {
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil {
			v.Fatal(err)
		}
		if fds, err = unix.ParseUnixRights(&msgs[0]); err != nil {
			v.Fatal(err)
		}
	}
	return b[12:], fds
}

// set sends what has no reply of its own.
func (v *vmm) set(request uint32, payload []byte, fds ...int) {
	v.Helper()
	v.send(request, payload, fds...)
	if !v.needReply {
		return
	}
	if b, _ := v.recv(request, 8); !bytes.Equal(b, u64s(0)) {
		v.Fatalf("message %d refused", request)
	}
}

func (v *vmm) get(request uint32, payload []byte, n int) []byte {
	v.Helper()
	v.send(request, payload)
	b, _ := v.recv(request, n)
	return b
}

func (v *vmm) getU64(request uint32) uint64 {
	v.Helper()
	return binary.NativeEndian.Uint64(v.get(request, nil, 8))
}

func u32s(vs ...uint32) (b []byte) {
	for _, x := range vs {
		b = binary.NativeEndian.AppendUint32(b, x)
	}
	return b
}

func u64s(vs ...uint64) (b []byte) {
	for _, x := range vs {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	return b
}

// Messages that all send alike.

func (v *vmm) user(gpa uint64) uint64 {
	if v.deltaless {
		return gpa
	}
	return gpa + vmmDelta
}

func (v *vmm) region(i int) []byte {
	r := v.mem.Regions()[i]
	return u64s(r.GPA(), r.Size(), v.user(r.GPA()), uint64(i)*vmmRegionSize)
}

func (v *vmm) memTable(n int) {
	v.Helper()
	b := u32s(uint32(n), 0)
	var fds []int
	for i := range n {
		b = append(b, v.region(i)...)
		fds = append(fds, v.memFD)
	}
	v.set(frontend.MsgSetMemTable, b, fds...)
}

func (v *vmm) vringNum(q *vmmQueue) {
	v.Helper()
	v.set(frontend.MsgSetVringNum, u32s(uint32(q.index), uint32(q.cfg.Size)))
}

func (v *vmm) vringAddr(q *vmmQueue, flags uint32, log uint64) {
	v.Helper()
	v.set(frontend.MsgSetVringAddr, append(u32s(uint32(q.index), flags),
		u64s(v.user(q.cfg.Desc), v.user(q.cfg.Used), v.user(q.cfg.Avail), log)...))
}

func (v *vmm) vringBase(q *vmmQueue, base uint16) {
	v.Helper()
	v.set(frontend.MsgSetVringBase, u32s(uint32(q.index), uint32(base)))
}

func (v *vmm) vringCall(q *vmmQueue) {
	v.Helper()
	v.set(frontend.MsgSetVringCall, u64s(uint64(q.index)), q.call)
}

func (v *vmm) vringKick(q *vmmQueue) {
	v.Helper()
	v.set(frontend.MsgSetVringKick, u64s(uint64(q.index)), q.kick)
}

func (v *vmm) vringEnable(q *vmmQueue, on uint32) {
	v.Helper()
	v.set(frontend.MsgSetVringEnable, u32s(uint32(q.index), on))
}

func (v *vmm) getVringBase(q *vmmQueue) uint16 {
	v.Helper()
	b := v.get(frontend.MsgGetVringBase, u32s(uint32(q.index), 0), 8)
	if i := binary.NativeEndian.Uint32(b); i != uint32(q.index) {
		v.Fatalf("base of queue %d, asked for %d", i, q.index)
	}
	return uint16(binary.NativeEndian.Uint32(b[4:]))
}

// config reads n bytes of the configuration space.
func (v *vmm) config(off, n, flags uint32) []byte {
	v.Helper()
	b := v.get(frontend.MsgGetConfig, append(u32s(off, n, flags), make([]byte, n)...), 12+int(n))
	if !bytes.Equal(b[:12], u32s(off, n, flags)) {
		v.Fatalf("configuration of %x", b[:12])
	}
	return b[12:]
}

func (v *vmm) capacity() int64 { return int64(binary.LittleEndian.Uint64(v.config(0, 8, 0))) * 512 }

// saveState and loadState go over what the pair of descriptors connects.
func (v *vmm) saveState(read, write int) []byte {
	v.Helper()
	v.send(msgSetDeviceStateFD, u32s(0, 0), write)
	if b, fds := v.recv(msgSetDeviceStateFD, 8); !bytes.Equal(b, u64s(0x100)) || len(fds) != 0 {
		v.Fatalf("save: %x, %d descriptors", b, len(fds))
	}
	unix.Close(write)
	f := os.NewFile(uintptr(read), "state")
	defer f.Close()
	state, err := io.ReadAll(f)
	if err != nil {
		v.Fatal(err)
	}
	if r := v.getU64(msgCheckDeviceState); r != 0 {
		v.Fatal("the state was not saved")
	}
	return state
}

func (v *vmm) loadState(read, write int, state []byte) {
	v.Helper()
	v.send(msgSetDeviceStateFD, u32s(1, 0), read)
	if b, fds := v.recv(msgSetDeviceStateFD, 8); !bytes.Equal(b, u64s(0x100)) || len(fds) != 0 {
		v.Fatalf("load: %x, %d descriptors", b, len(fds))
	}
	unix.Close(read)
	if _, err := unix.Write(write, state); err != nil {
		v.Fatal(err)
	}
	unix.Close(write)
	if r := v.getU64(msgCheckDeviceState); r != 0 {
		v.Fatal("the state was not loaded")
	}
}

func pipeFDs(t *testing.T) (read, write int) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

func sockets(t *testing.T) (a, b int) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

// The guest.

// vmmRequest is a write that the driver has made available and waits for.
type vmmRequest struct {
	q      *vmmQueue
	head   uint16
	status []byte
}

// write makes a write available, with its buffers in the given region, and kicks if it says so.
func (v *vmm) write(q *vmmQueue, region int, kick bool) vmmRequest {
	v.Helper()
	at := gpaOf(uint64(region)) + vmmBuffers + uint64(q.index)*0x10000
	b, err := v.mem.Bytes(at, 0x10000)
	if err != nil {
		v.Fatal(err)
	}
	sector := v.rng.Int64N(int64(len(v.disk))/512 - 8)
	copy(b, u32s(typeOut, 0))
	copy(b[8:], le64(uint64(sector)))
	b[16] = 0xff
	data := b[4096:][:4096]
	copy(data, randomBytes(v.rng, 4096))
	copy(v.disk[sector*512:], data)
	out := []virtq.Buf{{GPA: at, Len: 16}, {GPA: at + 4096, Len: 4096}}
	head, err := q.drv.AddChain(out, []virtq.Buf{{GPA: at + 16, Len: 1}}, false)
	if err != nil {
		v.Fatal(err)
	}
	if q.drv.Publish() && kick {
		if _, err := unix.Write(q.kick, u64s(1)); err != nil {
			v.Fatal(err)
		}
	}
	return vmmRequest{q, head, b[16:17]}
}

func (v *vmm) wait(r vmmRequest) {
	v.Helper()
	for end := time.Now().Add(10 * time.Second); ; {
		if head, _, ok := r.q.drv.PopUsed(); ok {
			if head != r.head || r.status[0] != statusOK {
				v.Fatalf("head %d with status %d, want %d", head, r.status[0], r.head)
			}
			return
		}
		if err := r.q.drv.Err(); err != nil {
			v.Fatal(err)
		}
		if !r.q.drv.EnableInterrupts() && !waitFD(r.q.call, time.Until(end)) {
			v.Fatalf("queue %d does not answer", r.q.index)
		}
	}
}

// io has each queue do some writes, with buffers in the given region.
func (v *vmm) io(region int) {
	v.Helper()
	for range 5 {
		for _, q := range v.queues {
			v.wait(v.write(q, region, true))
		}
	}
}

// idle tells, with nothing in flight, that no queue takes what is made available; the requests stay there.
func (v *vmm) idle(region int) (waiting []vmmRequest) {
	v.Helper()
	for _, q := range v.queues {
		waiting = append(waiting, v.write(q, region, true))
	}
	time.Sleep(20 * time.Millisecond)
	for _, r := range waiting {
		if _, _, ok := r.q.drv.PopUsed(); ok {
			v.Fatalf("queue %d is not at rest", r.q.index)
		}
	}
	return waiting
}

// available is the index up to which queue q's driver has made requests available.
func (v *vmm) available(q *vmmQueue) uint16 {
	v.Helper()
	b, err := v.mem.Bytes(q.cfg.Avail, 4)
	if err != nil {
		v.Fatal(err)
	}
	return binary.LittleEndian.Uint16(b[2:])
}

// vmmTest serves a disk and makes a monitor for it; served serves it again after the end of the daemon before.
func vmmTest(t *testing.T, queues int, size uint16, o Options) (v *vmm, s *target, served func() *target) {
	const diskSize = 1 << 20
	dir := t.TempDir()
	n := image(t, dir, diskSize, file.Options{})
	if o.ReadOnly {
		n = readOnly{n}
	}
	v = newVMM(t, filepath.Join(dir, "s"), queues, size, diskSize)
	served = func() *target { return serveAt(t, v.path, n, o) }
	t.Cleanup(func() {
		got, err := os.ReadFile(filepath.Join(dir, "img"))
		if err != nil || !bytes.Equal(got, v.disk) {
			t.Errorf("the disk does not hold what was written; %v", err)
		}
	})
	return v, served(), served
}

// Cloud Hypervisor: virtio-devices/src/vhost_user of v51.0 (with vhost 0.14 of rust-vmm) and v53.0 (with vhost 0.16).
func TestCloudHypervisor(t *testing.T) {
	for _, c := range []struct {
		name  string
		state bool // it knows DEVICE_STATE
	}{
		{"v51", false},
		{"v53", true},
	} {
		t.Run(c.name, func(t *testing.T) { testCloudHypervisor(t, c.state) })
	}
}

func testCloudHypervisor(t *testing.T, state bool) {
	const (
		features = featureProtocol | featSizeMax | featSegMax | featRO | featBlkSize | featFlush | featTopology |
			featConfigWCE | featDiscard | featWriteZeroes | featMQ | featIndirect | featEventIdx | featVersion1
		zones = 10 // memory zones, each a region of the table; more than QEMU ever sends
	)
	v, s, served := vmmTest(t, 2, 128, Options{Queues: 4, Discard: true})
	protocol := uint64(protocolConfig | protocolMQ | protocolMemSlots | protocolReplyAck | protocolInflightShmFD | protocolLogShmFD)
	if state {
		protocol |= protocolDeviceState
	}
	var acked, ackedProtocol uint64
	// attach is a connection, new or again.
	attach := func() {
		t.Helper()
		v.connect()
		v.set(frontend.MsgSetOwner, nil)
		offered := v.getU64(frontend.MsgGetFeatures)
		first := acked == 0
		if first {
			acked = features & offered
			ackedProtocol = protocol & v.getU64(frontend.MsgGetProtocolFeatures)
			if ackedProtocol != protocol {
				t.Fatalf("protocol features %#x of %#x", ackedProtocol, protocol)
			}
		}
		v.set(frontend.MsgSetProtocolFeatures, u64s(ackedProtocol))
		v.needReply = true
		if first {
			if n := v.getU64(frontend.MsgGetQueueNum); n != 4 {
				t.Fatalf("%d queues", n)
			}
			v.config(0, wholeConfig, 1)
		}
	}
	// setup is what follows the driver's DRIVER_OK. Where nobody knows better, a queue is said to go on at the index up to
	// which there are requests.
	regions := zones
	setup := func(bases []uint16) {
		t.Helper()
		v.set(frontend.MsgSetFeatures, u64s(acked))
		v.memTable(regions)
		for _, q := range v.queues {
			v.vringNum(q)
		}
		if v.shm < 0 {
			v.send(frontend.MsgGetInflightFD, append(u64s(0, 0), u32s(2|128<<16)...))
			b, fds := v.recv(frontend.MsgGetInflightFD, 20)
			if len(fds) != 1 {
				t.Fatalf("%d descriptors", len(fds))
			}
			v.inflight, v.shm = b, fds[0]
			t.Cleanup(func() { unix.Close(fds[0]) })
		}
		v.set(frontend.MsgSetInflightFD, v.inflight, v.shm)
		for i, q := range v.queues {
			v.vringAddr(q, 0, 0)
			base := v.available(q)
			if bases != nil {
				base = bases[i]
			}
			v.vringBase(q, base)
			v.vringCall(q)
			v.vringKick(q)
		}
		for _, q := range v.queues {
			v.vringEnable(q, 1)
		}
	}
	enable := func(on uint32) {
		t.Helper()
		for _, q := range v.queues {
			v.vringEnable(q, on)
		}
	}
	waitAll := func(rs []vmmRequest) {
		t.Helper()
		for _, r := range rs {
			v.wait(r)
		}
	}

	attach()
	setup(nil)
	v.io(zones - 1)

	// The guest switches the write cache off and on.
	for _, on := range []byte{0, 1, 0} {
		v.set(frontend.MsgSetConfig, append(u32s(cfgWriteback, 1, 1), on))
		if s.dev.writeback.Load() != (on == 1) {
			t.Fatal("the write cache is not as the guest wants it")
		}
	}

	// Memory is added.
	v.set(frontend.MsgAddMemReg, append(u64s(0), v.region(regions)...), v.memFD)
	regions++
	v.io(regions - 1)

	// Pause and resume.
	enable(0)
	waiting := v.idle(0)
	enable(1)
	waitAll(waiting)

	// A live migration that is given up: the log changes while requests run. The crate reads replies of different length.
	logBase := func() (log int) {
		t.Helper()
		last := gpaOf(vmmRegions-1) + vmmRegionSize - 1
		size := last/(4096*8) + 1
		log, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(log) })
		if err := unix.Ftruncate(log, int64(size)); err != nil {
			t.Fatal(err)
		}
		v.send(frontend.MsgSetLogBase, u64s(size, 0), log)
		if state {
			if b, _ := v.recv(frontend.MsgSetLogBase, 16); !bytes.Equal(b, u64s(size, 0)) {
				t.Fatalf("log %x", b)
			}
		} else if b, _ := v.recv(frontend.MsgSetLogBase, 8); !bytes.Equal(b, u64s(0)) {
			t.Fatal("log refused")
		}
		return log
	}
	dirty := func(log int, gpa uint64) bool {
		t.Helper()
		var b [1]byte
		if _, err := unix.Pread(log, b[:], int64(gpa/4096/8)); err != nil {
			t.Fatal(err)
		}
		return b[0]>>(gpa/4096%8)&1 == 1
	}
	status := gpaOf(0) + vmmBuffers
	log := logBase()
	v.set(frontend.MsgSetFeatures, u64s(acked|featureLogAll))
	for _, q := range v.queues {
		v.vringAddr(q, 1, q.cfg.Used)
	}
	v.io(0)
	if !dirty(log, status) || !dirty(log, v.queues[0].cfg.Used) {
		t.Error("writes to guest memory are missing in the log")
	}
	if dirty(log, status+4096) {
		t.Error("a buffer that was only read is in the log")
	}
	next := logBase()
	if dirty(next, status) {
		t.Error("the second log begins dirty")
	}
	v.io(0)
	if !dirty(next, status) {
		t.Error("writes to guest memory are missing in the second log")
	}
	for _, q := range v.queues {
		v.vringAddr(q, 0, 0)
	}
	v.set(frontend.MsgSetFeatures, u64s(acked))

	// The driver is reset and begins anew, in the same session.
	reset := func() {
		t.Helper()
		for _, q := range v.queues {
			v.vringEnable(q, 0)
			v.getVringBase(q)
		}
		v.drivers()
		v.shm = -1
	}
	reset()
	setup(nil)
	v.io(2)

	// The daemon dies and another one takes over, while requests wait in the rings.
	s.cancel()
	waiting = v.idle(3)
	s = served()
	attach()
	setup(nil)
	waitAll(waiting)
	v.io(3)

	// A snapshot, or the last step of a migration, with requests in the rings that nobody has taken: the guest stands
	// before the back-end does.
	v.set(frontend.MsgSetConfig, append(u32s(cfgWriteback, 1, 1), 0))
	enable(0)
	waiting = v.idle(4)
	var bases []uint16
	var saved []byte
	if state {
		for _, q := range v.queues {
			bases = append(bases, v.getVringBase(q))
		}
		ours, theirs := sockets(t)
		first := v.saveState(ours, theirs)
		// It may be decided that the guest goes on here.
		setup(bases)
		waitAll(waiting)
		v.io(4)
		enable(0)
		waiting = v.idle(4)
		bases = bases[:0]
		for _, q := range v.queues {
			bases = append(bases, v.getVringBase(q))
		}
		ours, theirs = sockets(t)
		if saved = v.saveState(ours, theirs); !bytes.Equal(saved, first) {
			t.Errorf("state %x, then %x", first, saved)
		}
	}
	v.c.Close()
	s.cancel()
	s = served() // another host's, say, which has not seen that the guest switched the write cache off
	if !s.dev.writeback.Load() {
		t.Fatal("the new daemon should begin with the default")
	}
	attach()
	if state {
		theirs, ours := sockets(t)
		v.loadState(theirs, ours, saved)
		if s.dev.writeback.Load() {
			t.Error("the guest's choice of the write cache was not loaded")
		}
	}
	v.shm = -1
	setup(bases)
	waitAll(waiting)
	v.io(5)
}

// crosvm: devices/src/virtio/vhost_user_frontend of August 2026. It does not reconnect: its VM ends with the back-end.
func TestCrosvm(t *testing.T) {
	const (
		features = featureProtocol | 1<<24 - 1 | featEventIdx | featVersion1 // bits 0 to 23 are the device's
		protocol = protocolConfig | protocolMQ | protocolBackendReq | protocolDeviceState | protocolReplyAck
		most     = 32768 // entries of a ring, unless max-queue-size says otherwise; Linux takes all
	)
	v, s, _ := vmmTest(t, 2, most, Options{Queues: 2, Discard: true})
	var acked, sent uint64
	attach := func() (channel int) {
		t.Helper()
		v.connect()
		v.set(frontend.MsgSetOwner, nil)
		acked, sent = features&v.getU64(frontend.MsgGetFeatures), 0
		if got := protocol & v.getU64(frontend.MsgGetProtocolFeatures); got != protocol {
			t.Fatalf("protocol features %#x of %#x", got, protocol)
		}
		v.set(frontend.MsgSetProtocolFeatures, u64s(protocol)) // but it never sets need_reply
		channel, theirs := sockets(t)
		t.Cleanup(func() { unix.Close(channel) })
		v.set(frontend.MsgSetBackendReqFD, nil, theirs)
		unix.Close(theirs)
		if n := v.getU64(frontend.MsgGetQueueNum); n != 2 {
			t.Fatalf("%d queues", n)
		}
		return channel
	}
	setFeatures := func() { // only when they are not what was sent last
		t.Helper()
		if sent != acked {
			v.set(frontend.MsgSetFeatures, u64s(acked))
			sent = acked
		}
	}
	activate := func(bases []uint16) {
		t.Helper()
		setFeatures()
		v.memTable(3)
		for i, q := range v.queues {
			v.vringNum(q)
			v.vringAddr(q, 0, 0)
			v.vringBase(q, bases[i])
			v.vringCall(q)
			v.vringKick(q)
			v.vringEnable(q, 1)
		}
	}
	sleep := func() (bases []uint16) {
		t.Helper()
		for _, q := range v.queues {
			v.vringEnable(q, 0)
			bases = append(bases, v.getVringBase(q))
		}
		return bases
	}

	channel := attach()
	activate([]uint16{0, 0})
	v.io(2)

	// The guest reads and writes the configuration field by field.
	for _, n := range []uint32{1, 2, 4, 8} {
		v.config(cfgWriteback, n, 1)
	}
	v.set(frontend.MsgSetConfig, append(u32s(cfgWriteback, 1, 0), 0))
	if v.config(cfgWriteback, 1, 1)[0] != 0 || s.dev.writeback.Load() {
		t.Error("the write cache is still on")
	}
	s.dev.SetSize(2 << 20)
	if v.capacity() != 2<<20 {
		t.Error("the new size does not show")
	}
	s.dev.SetSize(1 << 20)

	// Sleep and wake, with requests in the rings.
	bases := sleep()
	waiting := v.idle(0)
	activate(bases)
	for _, r := range waiting {
		v.wait(r)
	}

	// More than may be in flight at once.
	q := v.queues[0]
	at := gpaOf(2) + vmmBuffers + 0x80000
	b, err := v.mem.Bytes(at, 16+most/2)
	if err != nil {
		t.Fatal(err)
	}
	copy(b, u32s(typeFlush, 0))
	for i := range uint64(most / 2) {
		b[16+i] = 0xff
		if _, err := q.drv.AddChain([]virtq.Buf{{GPA: at, Len: 16}}, []virtq.Buf{{GPA: at + 16 + i, Len: 1}}, false); err != nil {
			t.Fatal(err)
		}
	}
	q.drv.Publish()
	if _, err := unix.Write(q.kick, u64s(1)); err != nil {
		t.Fatal(err)
	}
	for left := most / 2; left > 0; {
		if _, _, ok := q.drv.PopUsed(); ok {
			left--
		} else if !q.drv.EnableInterrupts() && !waitFD(q.call, 10*time.Second) {
			t.Fatalf("%d requests are not answered", left)
		}
	}
	if i := bytes.IndexByte(b[16:], 0xff); i >= 0 || bytes.ContainsAny(b[16:], "\x01\x02") {
		t.Errorf("request %d failed", i)
	}

	// Reset: the next driver takes the same features, so that they are not sent again.
	sleep()
	v.drivers()
	activate([]uint16{0, 0})
	v.io(1)

	// Snapshot, and restoring it behind another connection.
	bases = sleep()
	waiting = v.idle(2)
	r, w := pipeFDs(t)
	state := v.saveState(r, w)
	v.c.Close()
	unix.Close(channel)
	s.dev.writeback.Store(true)
	attach()
	setFeatures()
	r, w = pipeFDs(t)
	v.loadState(r, w, state)
	if s.dev.writeback.Load() {
		t.Error("the guest's choice of the write cache was not loaded")
	}
	activate(bases)
	for _, r := range waiting {
		v.wait(r)
	}
	v.io(2)
}

// Firecracker: src/vmm/src/devices/virtio/block/vhost_user of v1.16.1. One queue of 256, few features, no acknowledgements, no
// reset, no reconnection, no snapshots.
func TestFirecracker(t *testing.T) {
	for _, c := range []struct {
		name  string
		flush uint64 // cache_type Writeback
		ro    bool
	}{
		{"unsafe", 0, false},
		{"writeback", featFlush, false},
		{"read-only", featFlush, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			v, s, _ := vmmTest(t, 1, 256, Options{Queues: 2, ReadOnly: c.ro})
			v.connect()
			v.set(frontend.MsgSetOwner, nil)
			acked := (featVersion1 | featEventIdx | featureProtocol | featRO | c.flush) & v.getU64(frontend.MsgGetFeatures)
			if got := protocolConfig & v.getU64(frontend.MsgGetProtocolFeatures); got == 0 {
				t.Fatal("no configuration space")
			}
			v.set(frontend.MsgSetProtocolFeatures, u64s(protocolConfig))
			v.config(0, wholeConfig, 1)

			// Activation.
			v.set(frontend.MsgSetFeatures, u64s(acked))
			v.memTable(2)
			q := v.queues[0]
			v.vringNum(q)
			v.vringAddr(q, 0, 0)
			v.vringBase(q, v.available(q))
			v.vringCall(q)
			v.vringKick(q)
			v.vringEnable(q, 1)
			if c.ro {
				if acked&featRO == 0 {
					t.Error("the disk should be read-only")
				}
				r := v.write(q, 1, true)
				for end := time.Now().Add(10 * time.Second); r.status[0] == 0xff && time.Now().Before(end); {
					waitFD(q.call, time.Second)
				}
				if r.status[0] != statusIOErr {
					t.Errorf("status %d of a write", r.status[0])
				}
				clear(v.disk)
				return
			}
			v.io(1)
			if r := s.dev.writeThrough(); r != (c.flush == 0) {
				t.Errorf("write-through %v", r) // a guest that cannot flush has only writes that last
			}
			// A PATCH request makes it read the configuration again.
			s.dev.SetSize(4 << 20)
			if n := binary.LittleEndian.Uint64(v.config(0, wholeConfig, 1)); n*512 != 4<<20 {
				t.Errorf("capacity %d", n)
			}
		})
	}
}

// libblkio: the vhost-user transport of its virtio-driver crate, 0.7. The client's addresses are the guest's, memory is
// added and removed while the queues run, and the features are sent before the protocol's.
func TestLibblkio(t *testing.T) {
	v, _, _ := vmmTest(t, 2, 128, Options{Queues: 2, Discard: true})
	v.deltaless = true
	v.connect()
	v.set(frontend.MsgSetOwner, nil)
	const features = featureProtocol | featSizeMax | featSegMax | featRO | featBlkSize | featFlush | featTopology | featMQ |
		featDiscard | featWriteZeroes | featEventIdx | featIndirect | featVersion1
	v.set(frontend.MsgSetFeatures, u64s(features&v.getU64(frontend.MsgGetFeatures)))
	const protocol = protocolReplyAck | protocolConfig | protocolMemSlots | protocolMQ
	if got := protocol & v.getU64(frontend.MsgGetProtocolFeatures); got != protocol {
		t.Fatalf("protocol features %#x of %#x", got, protocol)
	}
	v.set(frontend.MsgSetProtocolFeatures, u64s(protocol))
	v.needReply = true
	if n := v.getU64(frontend.MsgGetQueueNum); n != 2 {
		t.Fatalf("%d queues", n)
	}
	slots := v.getU64(frontend.MsgGetMaxMemSlots)
	v.config(0, wholeConfig, 0)
	add := func(i int) { t.Helper(); v.set(frontend.MsgAddMemReg, append(u64s(0), v.region(i)...), v.memFD) }
	remove := func(i int) { t.Helper(); v.set(frontend.MsgRemMemReg, append(u64s(0), v.region(i)...)) }
	add(0)
	add(1)
	for _, q := range v.queues {
		v.vringNum(q)
		v.vringBase(q, 0)
		v.vringAddr(q, 0, 0)
		v.vringKick(q)
		v.vringCall(q)
		v.vringEnable(q, 1)
	}
	for i := 2; i < vmmRegions; i++ {
		add(i)
		v.io(i)
		if i%2 == 0 {
			remove(i)
		}
	}
	// As many regions as were promised.
	at := gpaOf(vmmRegions)
	for i := uint64(2 + (vmmRegions-2)/2); i < slots; i++ {
		v.set(frontend.MsgAddMemReg, u64s(0, at+i*8192, 4096, at+i*8192, 0), v.memFD)
	}
	v.io(3)
}

// SPDK's initiator: lib/virtio/virtio_vhost_user.c of August 2026. It enables rings first and describes them afterwards, sends
// the whole configuration buffer with a write of one byte, and its memory is the files of huge pages.
func TestSPDK(t *testing.T) {
	v, s, _ := vmmTest(t, 2, 128, Options{Queues: 2})
	v.deltaless = true
	v.connect()
	start := func() {
		t.Helper()
		const features = featureProtocol | featBlkSize | featTopology | featMQ | featRO | featFlush | featVersion1 | featEventIdx
		v.set(frontend.MsgSetFeatures, u64s(features&v.getU64(frontend.MsgGetFeatures)))
		const protocol = protocolMQ | protocolConfig
		v.set(frontend.MsgSetProtocolFeatures, u64s(protocol&v.getU64(frontend.MsgGetProtocolFeatures)))
		if b := v.config(0, 256, 0); int64(binary.LittleEndian.Uint64(b))*512 != 1<<20 {
			t.Fatalf("configuration %x", b)
		}
		for _, q := range v.queues {
			v.vringEnable(q, 1)
		}
		if n := v.getU64(frontend.MsgGetQueueNum); n != 2 {
			t.Fatalf("%d queues", n)
		}
		for _, q := range v.queues {
			v.vringCall(q)
		}
		v.memTable(8)
		v.getU64(frontend.MsgGetFeatures)
		for _, q := range v.queues {
			v.vringNum(q)
			v.vringBase(q, 0)
			v.vringAddr(q, 0, 0)
			v.vringKick(q)
		}
	}
	start()
	v.io(7)
	v.set(frontend.MsgSetConfig, append(u32s(cfgWriteback, 1, 0), make([]byte, 256)...))
	if v.config(cfgWriteback, 1, 0)[0] != 0 {
		t.Error("the write cache is still on")
	}
	for _, q := range v.queues {
		v.getVringBase(q)
	}
	v.memTable(7)
	v.drivers()
	start()
	v.io(7)
	if n := s.log.count("level=WARN"); n != 0 {
		s.log.mu.Lock()
		defer s.log.mu.Unlock()
		t.Errorf("refused: %s", strings.TrimSpace(s.log.b.String()))
	}
}
