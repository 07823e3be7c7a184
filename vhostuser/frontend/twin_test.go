// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/virtq"
)

// backend is a back-end with what qemu-storage-daemon lacks: an in-flight region, a status, configuration changes. It
// serves one queue and one connection at a time and dies on demand.
type backend struct {
	t        *testing.T
	socket   string
	l        *net.UnixListener
	dieAfter int      // requests that a connection takes before it dies; 0: it lives
	inflight int      // the in-flight region's fd
	open     []uint16 // heads taken and not completed: what a real back-end keeps in that region

	mu       sync.Mutex
	disk     []byte
	protocol uint64   // features offered
	order    []uint32 // messages received
	channel  int      // the front-end's socket for our messages
	taken    int      // requests, by all connections
	deaths   int
}

// session is one connection of a backend.
type session struct {
	b                 *backend
	c                 *net.UnixConn
	features          uint64
	regions           []*virtq.Region
	mem               *virtq.Memory
	size, base        uint32
	desc, avail, used uint64
	kick, call        int
	stop              chan struct{}
	done              sync.WaitGroup
	ring              *virtq.Split
	taken             int
	acks              bool
}

func newBackend(t *testing.T, dieAfter int) *backend {
	t.Helper()
	b := &backend{t: t, socket: filepath.Join(t.TempDir(), "s"), disk: make([]byte, 4<<20), dieAfter: dieAfter, protocol: AllProtocolFeatures, channel: -1}
	var err error
	if b.inflight, err = memfd("inflight", 4096); err != nil {
		t.Fatal(err)
	}
	if b.l, err = net.ListenUnix("unix", &net.UnixAddr{Name: b.socket}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := b.l.AcceptUnix()
			if err != nil {
				return
			}
			s := &session{b: b, c: c, kick: -1, call: -1, stop: make(chan struct{})}
			s.run()
		}
	})
	t.Cleanup(func() {
		b.l.Close()
		wg.Wait()
		syscall.Close(b.inflight)
	})
	return b
}

func (s *session) run() {
	for {
		m, err := readMessage(s.c)
		if err != nil {
			break
		}
		s.b.mu.Lock()
		s.b.order = append(s.b.order, m.Request)
		s.b.mu.Unlock()
		payload, fds, err := s.handle(&m)
		if err != nil {
			s.b.t.Errorf("back-end: message %d: %v", m.Request, err)
			break
		}
		if payload == nil && m.Flags&FlagNeedReply != 0 && s.acks {
			payload = u64(0)
		}
		if payload != nil {
			_ = writeAll(s.c, encode(Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: payload}), fds)
		}
	}
	s.halt()
	s.c.Close()
	for _, r := range s.regions {
		_ = r.Unmap()
	}
	syscall.Close(s.kick)
	syscall.Close(s.call)
	s.b.mu.Lock()
	syscall.Close(s.b.channel)
	s.b.channel = -1
	s.b.mu.Unlock()
}

func (s *session) handle(m *Message) (payload []byte, fds []int, err error) {
	keep := false
	defer func() {
		if !keep {
			m.CloseFDs()
		}
	}()
	ne := binary.NativeEndian
	p := m.Payload
	switch m.Request {
	case MsgGetFeatures:
		return u64(AllFeatures &^ (FeatureRO | FeatureSizeMax | FeatureSegMax)), nil, nil
	case MsgSetFeatures:
		s.features = ne.Uint64(p)
	case MsgGetProtocolFeatures:
		s.b.mu.Lock()
		defer s.b.mu.Unlock()
		return u64(s.b.protocol), nil, nil
	case MsgSetProtocolFeatures:
		defer func() { s.acks = ne.Uint64(p)&ProtocolReplyAck != 0 }()
	case MsgGetQueueNum:
		return u64(1), nil, nil
	case MsgGetMaxMemSlots:
		return u64(509), nil, nil
	case MsgGetStatus:
		return u64(0), nil, nil
	case MsgSetOwner, MsgSetVringErr, MsgSetStatus:
	case MsgSetBackendReqFD:
		keep = true
		s.b.mu.Lock()
		s.b.channel = m.FDs[0]
		s.b.mu.Unlock()
	case MsgGetConfig:
		config := make([]byte, configSize)
		s.b.mu.Lock()
		defer s.b.mu.Unlock()
		binary.LittleEndian.PutUint64(config, uint64(len(s.b.disk))/SectorSize)
		return append(p[:12:12], config...), nil, nil
	case MsgGetInflightFD:
		ne.PutUint64(p, 4096)
		return p, []int{s.b.inflight}, nil
	case MsgSetInflightFD:
		var ours, theirs syscall.Stat_t
		err = errors.Join(syscall.Fstat(s.b.inflight, &ours), syscall.Fstat(m.FDs[0], &theirs))
		if err == nil && (ours.Ino != theirs.Ino || ne.Uint64(p) != 4096) {
			err = errors.New("not the in-flight region that was given out")
		}
		return nil, nil, err
	case MsgAddMemReg:
		r, err := virtq.MapRegion(m.FDs[0], ne.Uint64(p[8:]), ne.Uint64(p[16:]), ne.Uint64(p[24:]), ne.Uint64(p[32:]))
		if err != nil {
			return nil, nil, err
		}
		s.regions = append(s.regions, r)
		s.mem, err = virtq.NewMemory(s.regions...)
		return nil, nil, err
	case MsgSetVringNum:
		s.size = ne.Uint32(p[4:])
	case MsgSetVringBase:
		s.base = ne.Uint32(p[4:])
	case MsgSetVringAddr:
		for i, at := range []*uint64{&s.desc, &s.used, &s.avail} {
			var ok bool
			if *at, ok = s.mem.UserToGPA(ne.Uint64(p[8+8*i:]), 1); !ok {
				return nil, nil, fmt.Errorf("ring address %d is not mapped", i)
			}
		}
	case MsgSetVringKick:
		keep = true
		s.kick = m.FDs[0]
	case MsgSetVringCall:
		keep = true
		syscall.Close(s.call)
		s.call = m.FDs[0]
		signal(s.call)
	case MsgSetVringEnable:
		if ne.Uint32(p[4:]) == 1 {
			return nil, nil, s.start()
		}
	case MsgGetVringBase:
		s.halt()
		return vringState(0, uint32(s.ring.LastAvail())), nil, nil
	default:
		return nil, nil, errors.New("not expected")
	}
	return nil, nil, nil
}

func (s *session) start() (err error) {
	cfg := virtq.SplitConfig{
		Mem: s.mem, Size: uint16(s.size), Desc: s.desc, Avail: s.avail, Used: s.used, Base: uint16(s.base),
		EventIdx: s.features&FeatureEventIdx != 0, Indirect: s.features&FeatureIndirect != 0,
	}
	if s.ring, err = virtq.NewSplit(cfg); err != nil {
		return err
	}
	if s.ring.UsedIdx() != uint16(s.base) {
		return fmt.Errorf("base %d, used.idx %d", s.base, s.ring.UsedIdx())
	}
	s.ring.SetLastAvail(uint16(s.base) + uint16(len(s.b.open)))
	s.stop = make(chan struct{})
	s.done.Go(s.serve)
	return nil
}

func (s *session) halt() {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	s.done.Wait()
}

// serve takes requests in batches, and completes some of each later than those that follow. It dies in between.
func (s *session) serve() {
	var later []*virtq.Chain
	for _, head := range s.b.open {
		c := new(virtq.Chain)
		if err := s.ring.Chain(head, c); err != nil {
			s.b.t.Error(err)
			return
		}
		later = append(later, c)
	}
	for {
		for _, c := range later {
			s.finish(c)
		}
		later = nil
		for {
			c := new(virtq.Chain)
			ok, err := s.ring.Pop(c)
			if err != nil {
				s.b.t.Error(err)
				return
			}
			if !ok {
				break
			}
			s.b.open = append(s.b.open, c.Head)
			s.taken++
			s.b.mu.Lock()
			s.b.taken++
			if s.taken == s.b.dieAfter {
				s.b.deaths++
			}
			s.b.mu.Unlock()
			if s.taken == s.b.dieAfter {
				s.ring.Publish() // and no interrupt
				s.c.Close()
				return
			}
			if s.taken%3 == 0 {
				later = append(later, c)
			} else {
				s.finish(c)
			}
		}
		if s.ring.Publish() {
			signal(s.call)
		}
		if s.ring.EnableNotify() || len(later) > 0 {
			continue
		}
		select {
		case <-s.stop:
			return
		default:
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.kick), Events: unix.POLLIN}}, 1)
		_, _ = syscall.Read(s.kick, make([]byte, 8)) // non-blocking
	}
}

// finish does a request, stages its completion and forgets its head.
func (s *session) finish(c *virtq.Chain) {
	header, _ := s.mem.Bytes(c.OutGPA[0], headerLen)
	at := binary.LittleEndian.Uint64(header[8:]) * SectorSize
	status, _ := s.mem.Bytes(c.InGPA[len(c.In)-1], 1)
	written := 1
	switch binary.LittleEndian.Uint32(header) {
	case TypeIn:
		data, _ := s.mem.Bytes(c.InGPA[0], uint64(c.In[0].Len))
		written += copy(data, s.b.disk[at:])
	case TypeOut:
		data, _ := s.mem.Bytes(c.OutGPA[1], uint64(c.Out[1].Len))
		copy(s.b.disk[at:], data)
	}
	status[0] = StatusOK
	s.ring.Push(c.Head, uint32(written))
	for i, head := range s.b.open {
		if head == c.Head {
			s.b.open = append(s.b.open[:i], s.b.open[i+1:]...)
			break
		}
	}
}

// TestCrashes: whatever is in flight when the back-end dies completes after it is back, in every feature set.
func TestCrashes(t *testing.T) {
	for _, tc := range []struct {
		name string
		opts Options
	}{
		{"everything", Options{}},
		{"no event index", Options{Features: AllFeatures &^ FeatureEventIdx}},
		{"direct descriptors, full ring", Options{Features: AllFeatures &^ FeatureIndirect, QueueSize: 8}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBackend(t, 7)
			tc.opts.Reconnect = time.Millisecond
			d := dial(t, b.socket, tc.opts)
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(2, uint64(i)))
					want, got := make([]byte, 4096), make([]byte, 4096)
					for range 25 {
						off := int64(i)<<19 + int64(rng.IntN(100))*4096
						for j := range want {
							want[j] = byte(rng.Uint32())
						}
						if _, err := d.WriteAt(want, off); err != nil {
							t.Error(err)
							return
						}
						if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, want) {
							t.Errorf("read back at %d: equal %v, %v", off, bytes.Equal(got, want), err)
							return
						}
					}
				})
			}
			wg.Wait()
			b.mu.Lock()
			defer b.mu.Unlock()
			// A connection may die before it is complete, which is no reconnect. No request is taken twice from the ring.
			if n := d.Reconnects(); b.taken != 400 || b.deaths != 400/7 || n == 0 || n > b.deaths {
				t.Errorf("%d requests, %d deaths, %d reconnects", b.taken, b.deaths, n)
			}
		})
	}
}

// TestReconnectRefuses: a back-end that comes back as another one is not resumed.
func TestReconnectRefuses(t *testing.T) {
	b := newBackend(t, 0)
	d := dial(t, b.socket, Options{Reconnect: time.Millisecond})
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Stop(); err != nil { // nothing of ours is read meanwhile
		t.Fatal(err)
	}
	b.mu.Lock()
	b.protocol &^= ProtocolInflight
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := d.Reconnect(ctx)
	if err == nil || !strings.Contains(err.Error(), "no longer offers 0x1000") {
		t.Errorf("reconnect: %v", err)
	}
}

// TestStoppedReconnect: a connection that is lost while the rings are stopped comes back with them stopped.
func TestStoppedReconnect(t *testing.T) {
	b := newBackend(t, 0)
	d := dial(t, b.socket, Options{Reconnect: time.Millisecond})
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	if bases, err := d.Stop(); err != nil || bases[0] != 1 {
		t.Fatalf("stop: %v, %v", bases, err)
	}
	if err := d.Reconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
}

// TestSequence: the messages and their order are those that QEMU sends.
func TestSequence(t *testing.T) {
	b := newBackend(t, 0)
	d := dial(t, b.socket, Options{})
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	want := []uint32{
		MsgGetFeatures, MsgGetProtocolFeatures, MsgSetProtocolFeatures, MsgGetQueueNum, MsgGetMaxMemSlots,
		MsgSetBackendReqFD, MsgSetOwner, MsgSetVringCall, MsgSetVringErr, MsgGetConfig,
		MsgSetFeatures, MsgGetInflightFD, MsgSetInflightFD, MsgSetVringCall, MsgSetFeatures, MsgAddMemReg, MsgAddMemReg,
		MsgSetVringNum, MsgSetVringBase, MsgSetVringAddr, MsgSetVringKick, MsgSetVringEnable, MsgGetStatus, MsgSetStatus,
		MsgSetVringEnable, MsgGetVringBase, MsgSetStatus,
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if fmt.Sprint(b.order) != fmt.Sprint(want) {
		t.Errorf("messages\n%v, want\n%v", b.order, want)
	}
}

func TestConfigChanged(t *testing.T) {
	b := newBackend(t, 0)
	d := dial(t, b.socket, Options{})
	b.mu.Lock()
	b.disk = append(b.disk, b.disk...)
	m := encode(Message{Request: backendConfigChange, Flags: FlagVersion | FlagNeedReply})
	_, err := syscall.Write(b.channel, m)
	var reply [20]byte
	if _, rerr := syscall.Read(b.channel, reply[:]); err != nil || rerr != nil || reply[12] != 0 {
		t.Errorf("configuration change: %v, %v, answer %v", err, rerr, reply)
	}
	b.mu.Unlock()
	<-d.ConfigChanged()
	if c, err := d.Config(); err != nil || c.Size() != 8<<20 {
		t.Errorf("configuration %+v, %v", c, err)
	}
}

// TestNoLeaks: neither a good nor a failed Dial leaves descriptors or mappings behind.
func TestNoLeaks(t *testing.T) {
	b := newBackend(t, 0)
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	once := func() {
		for _, opts := range []Options{{}, {Queues: 2}, {QueueSize: 3}, {Reconnect: time.Second}} {
			if d, err := Dial(t.Context(), b.socket, opts); err == nil {
				if err := errors.Join(d.Flush(), d.Close(), d.Close()); err != nil {
					t.Error(err)
				}
			}
		}
	}
	once() // what the runtime opens for itself
	before := count()
	for range 5 {
		once()
	}
	// The back-end's side of the last connection goes a little later.
	for deadline := time.Now().Add(5 * time.Second); count() > before && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}
