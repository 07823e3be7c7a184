// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"sync"

	"github.com/blkstream/blkstream/virtq"
)

const (
	vhostFeatures   = featureLogAll | featureProtocolFeatures
	memRegionSize   = 32       // a memory region description in a message
	maxTableRegions = 32       // of SET_MEM_TABLE: QEMU and SPDK send up to 8, crosvm and Cloud Hypervisor up to 32
	maxMemSlots     = 509      // what vhost in the kernel has, and front-ends count on
	maxMemory       = 16 << 40 // bytes of a guest's memory: a share of what virtq maps for all
	configHeader    = 12
)

var errTooMuchMemory = fmt.Errorf("guest memory of more than %#x bytes", uint64(maxMemory))

// request says what a message must look like and who handles it.
type request struct {
	name             string
	minSize, maxSize int // of the payload
	minFDs, maxFDs   int
	replies          bool // the front-end waits for a reply, whatever it set in the header
	handle           func(*session, *message) error
}

var requests = map[uint32]request{
	reqGetFeatures:         {"GET_FEATURES", 0, 0, 0, 0, true, (*session).getFeatures},
	reqSetFeatures:         {"SET_FEATURES", 8, 8, 0, 0, false, (*session).setFeatures},
	reqSetOwner:            {"SET_OWNER", 0, 0, 0, 0, false, (*session).ignore},
	reqResetOwner:          {"RESET_OWNER", 0, 0, 0, 0, false, (*session).ignore}, // deprecated; what the specification advises
	reqSetMemTable:         {"SET_MEM_TABLE", 8, 8 + maxTableRegions*memRegionSize, 1, maxTableRegions, false, (*session).setMemTable},
	reqSetLogBase:          {"SET_LOG_BASE", 16, 16, 1, 1, true, (*session).setLogBase},
	reqSetLogFD:            {"SET_LOG_FD", 0, 8, 0, 1, false, (*session).ignore}, // the front-end need not be told of each change
	reqSetVringNum:         {"SET_VRING_NUM", 8, 8, 0, 0, false, (*session).setVringNum},
	reqSetVringAddr:        {"SET_VRING_ADDR", 40, 40, 0, 0, false, (*session).setVringAddr},
	reqSetVringBase:        {"SET_VRING_BASE", 8, 8, 0, 0, false, (*session).setVringBase},
	reqGetVringBase:        {"GET_VRING_BASE", 8, 8, 0, 0, true, (*session).getVringBase},
	reqSetVringKick:        {"SET_VRING_KICK", 8, 8, 0, 1, false, (*session).setVringKick},
	reqSetVringCall:        {"SET_VRING_CALL", 8, 8, 0, 1, false, (*session).setVringCall},
	reqSetVringErr:         {"SET_VRING_ERR", 8, 8, 0, 1, false, (*session).setVringErr},
	reqGetProtocolFeatures: {"GET_PROTOCOL_FEATURES", 0, 0, 0, 0, true, (*session).getProtocolFeatures},
	reqSetProtocolFeatures: {"SET_PROTOCOL_FEATURES", 8, 8, 0, 0, false, (*session).setProtocolFeatures},
	reqGetQueueNum:         {"GET_QUEUE_NUM", 0, 0, 0, 0, true, (*session).getQueueNum},
	reqSetVringEnable:      {"SET_VRING_ENABLE", 8, 8, 0, 0, false, (*session).setVringEnable},
	reqSetBackendReqFD:     {"SET_BACKEND_REQ_FD", 0, 8, 1, 1, false, (*session).setBackendReqFD},
	reqGetConfig:           {"GET_CONFIG", configHeader, maxPayload, 0, 0, true, (*session).getConfig},
	reqSetConfig:           {"SET_CONFIG", configHeader, maxPayload, 0, 0, false, (*session).setConfig},
	// The inflight description has 20 bytes, 24 with the padding that QEMU sends.
	reqGetInflightFD:  {"GET_INFLIGHT_FD", 20, 24, 0, 0, true, (*session).getInflightFD},
	reqSetInflightFD:  {"SET_INFLIGHT_FD", 20, 24, 1, 1, false, (*session).setInflightFD},
	reqResetDevice:    {"RESET_DEVICE", 0, 0, 0, 0, false, (*session).resetDevice},
	reqGetMaxMemSlots: {"GET_MAX_MEM_SLOTS", 0, 0, 0, 0, true, (*session).getMaxMemSlots},
	reqAddMemReg:      {"ADD_MEM_REG", 8 + memRegionSize, 8 + memRegionSize, 1, 1, false, (*session).addMemReg},
	reqRemMemReg:      {"REM_MEM_REG", 8 + memRegionSize, 8 + memRegionSize, 0, 1, false, (*session).remMemReg},
	reqSetStatus:      {"SET_STATUS", 8, 8, 0, 0, false, (*session).setStatus},
	reqGetStatus:      {"GET_STATUS", 0, 0, 0, 0, true, (*session).getStatus},

	reqSetDeviceStateFD: {"SET_DEVICE_STATE_FD", 8, 8, 1, 1, true, (*session).setDeviceStateFD},
	reqCheckDeviceState: {"CHECK_DEVICE_STATE", 0, 0, 0, 0, true, (*session).checkDeviceState},
}

// session is one connection of a front-end. It belongs to the goroutine in run.
type session struct {
	srv  *Server
	dev  Device
	log  *slog.Logger
	conn *conn

	features    uint64 // as acknowledged, with the vhost-user bits
	featuresSet bool
	protocol    uint64
	status      uint8

	mem      *virtq.Memory
	rings    []*ring
	inflight *inflightRegion // nil: none
	dirty    *Log            // nil: none

	stateFD  int   // where the device's state is to be read from; -1: none
	stateErr error // of the transfer that CHECK_DEVICE_STATE asks about

	ringStarted bool // by the current message

	mu   sync.Mutex                 // inside eachRing
	lost map[*virtq.Region]struct{} // never unmapped: requests that could not be drained may still write there
}

func newSession(srv *Server, c *conn) *session {
	mem, _ := virtq.NewMemory() // no regions, nothing to overlap
	s := &session{
		srv: srv, dev: srv.dev, log: srv.log, conn: c, mem: mem,
		rings: make([]*ring, srv.dev.Queues()),
		lost:  make(map[*virtq.Region]struct{}), stateFD: -1,
	}
	for i := range s.rings {
		s.rings[i] = &ring{index: i, kick: -1, call: -1, err: -1}
	}
	return s
}

// run serves the connection until it ends, then gives everything back. nil: the front-end closed it.
func (s *session) run() error {
	// Memory that the front-end truncates raises SIGBUS when it is touched; make it a panic that serveMessage recovers.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer s.close()
	for {
		if err := s.serveMessage(); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

// serveMessage reads a message, handles it and replies. An error ends the session.
func (s *session) serveMessage() (err error) {
	m, err := s.conn.read()
	defer m.close()
	if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("request %d: panic: %v\n%s", m.request, p, debug.Stack())
		}
	}()
	req, known := requests[m.request]
	s.ringStarted = false
	if err := s.check(m, req, known); err != nil {
		return s.refuse(m, req, err)
	}
	if err := req.handle(s, m); err != nil {
		return s.refuse(m, req, fmt.Errorf("%s: %w", req.name, err))
	}
	if err := s.answer(m, 0); err != nil {
		return err
	}
	if s.ringStarted {
		s.srv.repeatConfigChange()
	}
	return nil
}

// check refuses a message whose size or number of descriptors is wrong.
func (s *session) check(m *message, req request, known bool) error {
	switch n := len(m.payload); {
	case !known:
		return fmt.Errorf("unknown request %d", m.request)
	case n < req.minSize || n > req.maxSize:
		return fmt.Errorf("%s: payload of %d bytes", req.name, n)
	case m.lostFDs || len(m.fds) < req.minFDs || len(m.fds) > req.maxFDs:
		return fmt.Errorf("%s: %d descriptors", req.name, len(m.fds))
	}
	return nil
}

// refuse tells the front-end that m failed, if it can be told, and goes on with the next message. A front-end that
// waits for a reply which cannot express failure is told by the end of the session.
func (s *session) refuse(m *message, req request, err error) error {
	if req.replies && m.reply == nil {
		return err
	}
	s.srv.warn("message refused", err)
	return s.answer(m, 1)
}

// answer sends the reply, or the acknowledgement if one was asked for.
func (s *session) answer(m *message, result uint64) error {
	if m.reply == nil {
		// Whoever sets the flag waits, whether REPLY_ACK was negotiated in this session or in one before: QEMU keeps
		// setting it after a reconnect of a device that has not been started yet.
		if m.flags&flagNeedReply == 0 {
			return nil
		}
		m.replyU64(result)
	}
	return s.conn.write(m, m.reply)
}

// close stops all queues, then gives back all that the session owns.
func (s *session) close() {
	s.eachRing(s.retireRing)
	for _, r := range s.rings {
		setFD(&r.call, -1)
		setFD(&r.err, -1)
	}
	s.setLog(nil)
	s.setInflight(nil)
	s.unmap(s.mem.Regions())
	setFD(&s.stateFD, -1)
	s.srv.setBackend(-1)
}

// eachRing calls f for all rings, in parallel for those that run, since draining takes as long as the slowest request.
func (s *session) eachRing(f func(*ring)) {
	var wg sync.WaitGroup
	for _, r := range s.rings {
		if r.q == nil {
			f(r)
			continue
		}
		wg.Go(func() {
			defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // as in run
			defer func() {
				if p := recover(); p != nil {
					s.abandon(r, fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
				}
			}()
			f(r)
		})
	}
	wg.Wait()
}

// abandon gives up r's queue, which has ended with requests in flight. What these may still touch stays mapped and open for
// ever: otherwise they could write into whatever comes to its place. That is the memory which the queue had, and not what
// the front-end may be replacing it with. The ring goes on with duplicates of its descriptors.
func (s *session) abandon(r *ring, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.q = nil
	r.kick, r.call, r.err = dupFD(r.kick), dupFD(r.call), dupFD(r.err)
	for _, region := range r.mem.Regions() {
		s.lost[region] = struct{}{}
	}
	if s.inflight != nil {
		s.inflight.mem.lost = true
	}
	if s.dirty != nil {
		s.dirty.mem.lost = true
	}
	s.log.Error("ring stopped with requests in flight", "ring", r.index, "err", err)
}

// unmap gives memory regions back that no queue uses any more.
func (s *session) unmap(regions []*virtq.Region) {
	for _, r := range regions {
		if _, lost := s.lost[r]; lost {
			continue
		}
		if err := r.Unmap(); err != nil {
			s.log.Error("guest memory", "err", err)
		}
	}
}

// ring returns ring i.
func (s *session) ring(i uint32) (*ring, error) {
	if uint64(i) >= uint64(len(s.rings)) {
		return nil, fmt.Errorf("no ring %d", i)
	}
	return s.rings[i], nil
}

// ringState parses a vring state description.
func (s *session) ringState(m *message) (*ring, uint32, error) {
	r, err := s.ring(m.u32(0))
	return r, m.u32(4), err
}

func (s *session) ignore(*message) error { return nil }

func (s *session) getFeatures(m *message) error {
	m.replyU64(s.dev.Features() | vhostFeatures)
	return nil
}

// setFeatures may come repeatedly. On running rings only logging may change.
func (s *session) setFeatures(m *message) error {
	f := m.u64(0)
	if unknown := f &^ (s.dev.Features() | vhostFeatures); unknown != 0 {
		return fmt.Errorf("features %#x were not offered", unknown)
	}
	if !s.featuresSet || (f^s.features)&^featureLogAll != 0 {
		for _, r := range s.rings {
			if err := s.reconfigure(r); err != nil {
				return err
			}
		}
		s.dev.SetFeatures(f &^ vhostFeatures)
	}
	old := s.features
	s.features, s.featuresSet = f, true
	if old&featureLogAll != 0 && f&featureLogAll == 0 {
		s.setLog(nil) // migration has ended
	} else if (f^old)&featureLogAll != 0 {
		s.eachRing(s.setRingLog)
	}
	return s.startRings()
}

// startRings starts what has become complete.
func (s *session) startRings() error {
	var errs []error
	for _, r := range s.rings {
		errs = append(errs, s.startRing(r))
	}
	return errors.Join(errs...)
}

func (s *session) getProtocolFeatures(m *message) error {
	m.replyU64(protocolFeatures)
	return nil
}

func (s *session) setProtocolFeatures(m *message) error {
	f := m.u64(0)
	if unknown := f &^ protocolFeatures; unknown != 0 {
		return fmt.Errorf("protocol features %#x were not offered", unknown)
	}
	s.protocol = f
	return nil
}

func (s *session) getQueueNum(m *message) error {
	m.replyU64(uint64(len(s.rings)))
	return nil
}

func (s *session) getMaxMemSlots(m *message) error {
	m.replyU64(maxMemSlots)
	return nil
}

// memEnd is the first guest address above all memory, 0 if there is none.
func (s *session) memEnd() uint64 {
	var end uint64
	for _, r := range s.mem.Regions() {
		end = max(end, r.GPA()+r.Size())
	}
	return end
}

// mapRegion maps the region that is described at byte off of the payload.
func (m *message) mapRegion(off, fd int) (*virtq.Region, error) {
	return virtq.MapRegion(fd, m.u64(off), m.u64(off+8), m.u64(off+16), m.u64(off+24))
}

// memSize is the sum of all regions.
func (s *session) memSize() (sum uint64) {
	for _, r := range s.mem.Regions() {
		sum += r.Size()
	}
	return sum
}

// setMemTable replaces all of guest memory.
func (s *session) setMemTable(m *message) error {
	n := int(m.u32(0))
	if n != len(m.fds) || len(m.payload) != 8+n*memRegionSize {
		return fmt.Errorf("%d regions in %d bytes with %d descriptors", n, len(m.payload), len(m.fds))
	}
	room := uint64(maxMemory)
	for i := range n {
		size := m.u64(8 + i*memRegionSize + 8)
		if size > room {
			return errTooMuchMemory
		}
		room -= size
	}
	var regions []*virtq.Region
	drop := func() {
		for _, r := range regions {
			_ = r.Unmap() // never used
		}
	}
	for i := range n {
		r, err := m.mapRegion(8+i*memRegionSize, m.fds[i])
		if err != nil {
			drop()
			return fmt.Errorf("region %d: %w", i, err)
		}
		regions = append(regions, r)
	}
	mem, err := virtq.NewMemory(regions...)
	if err != nil {
		drop()
		return err
	}
	old := s.mem.Regions()
	err = s.setMemory(mem)
	s.unmap(old)
	return err
}

func (s *session) addMemReg(m *message) error {
	if len(s.mem.Regions()) == maxMemSlots {
		return errors.New("no memory slot is free")
	}
	if m.u64(16) > maxMemory-s.memSize() {
		return errTooMuchMemory
	}
	r, err := m.mapRegion(8, m.fds[0])
	if err != nil {
		return err
	}
	mem, err := s.mem.Add(r)
	if err != nil {
		_ = r.Unmap() // never used
		return err
	}
	return s.setMemory(mem)
}

// remMemReg accepts, and closes, the descriptor that some front-ends send along.
func (s *session) remMemReg(m *message) error {
	mem, r, err := s.mem.Remove(m.u64(8), m.u64(16), m.u64(24))
	if err != nil {
		return err
	}
	err = s.setMemory(mem)
	s.unmap([]*virtq.Region{r})
	return err
}

// setMemory gives all queues new memory. When it returns none uses the old one. A ring that the new memory does
// not hold any more at the same place is stopped, and started again if it is held elsewhere, now or later.
func (s *session) setMemory(mem *virtq.Memory) error {
	s.mem = mem
	s.eachRing(func(r *ring) {
		if r.q == nil {
			return
		}
		desc, avail, used, err := s.translate(r)
		if err != nil || desc != r.desc || avail != r.avail || used != r.used {
			s.stopRing(r)
			return
		}
		running := s.isEnabled(r)
		if running {
			r.q.Pause()
		}
		if err := r.q.SetMemory(mem); err != nil {
			s.srv.warn("ring stopped", fmt.Errorf("ring %d: set memory: %w", r.index, err))
			s.stopRing(r)
			return
		}
		r.mem = mem
		if running {
			r.q.Resume()
			r.q.Kick()
		}
	})
	if s.dirty != nil && !s.dirty.covers(s.memEnd()) {
		s.srv.warn("writes will be missing from the dirty-page log", errors.New("guest memory grew beyond it"))
	}
	var errs []error
	for _, r := range s.rings {
		// A ring that is not in memory waits for the region it is in.
		if err := s.startRing(r); !errors.Is(err, errNotMapped) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// getConfig replies with as many bytes as were asked for, zeros where the configuration space has none. A reply without
// payload is an error.
func (s *session) getConfig(m *message) error {
	off, size := m.u32(0), m.u32(4)
	if size == 0 || size > maxPayload-configHeader {
		m.reply = []byte{}
		return fmt.Errorf("%d bytes asked for", size)
	}
	m.reply = make([]byte, configHeader+int(size))
	copy(m.reply, m.payload[:configHeader])
	if cfg := s.dev.Config(); uint64(off) < uint64(len(cfg)) {
		copy(m.reply[configHeader:], cfg[off:])
	}
	return nil
}

// setConfig does not look at the flags: front-ends disagree about them, and the device knows what is writable. SPDK sends
// more bytes than it announces.
func (s *session) setConfig(m *message) error {
	off, size, b := m.u32(0), m.u32(4), m.payload[configHeader:]
	if uint64(size) > uint64(len(b)) {
		return fmt.Errorf("%d bytes announced, %d sent", size, len(b))
	}
	return s.dev.SetConfig(off, b[:size])
}

// setLogBase takes the dirty-page log. QEMU takes any reply for success, so a failure ends the session unless
// the front-end asked for an acknowledgement: a migration without its log would lose guest data.
//
// The specification leaves the reply's payload open. QEMU reads whatever comes. The vhost crate of rust-vmm reads an
// acknowledgement up to 0.15, and the log's description from 0.16 on, without a look at the header; that version is also
// the first one that knows DEVICE_STATE, which Cloud Hypervisor takes where it is offered.
func (s *session) setLogBase(m *message) error {
	described := s.protocol&protocolDeviceState != 0
	l, err := newLog(m.fds[0], m.u64(8), m.u64(0), s.memEnd())
	switch {
	case err == nil:
		s.setLog(l)
		m.replyU64(0)
		if described {
			m.reply = append([]byte(nil), m.payload...)
		}
	case m.flags&flagNeedReply == 0:
	case described:
		m.reply = make([]byte, len(m.payload)) // a log without size, which the crate takes for an error
	default:
		m.replyU64(1)
	}
	return err
}

// setLog replaces the log, nil: none.
func (s *session) setLog(l *Log) {
	old := s.dirty
	s.dirty = l
	s.eachRing(s.setRingLog)
	if old != nil {
		if err := old.Release(); err != nil {
			s.log.Error("dirty-page log", "err", err)
		}
	}
}

// getInflightFD creates an in-flight region for the front-end to keep. It is used once SET_INFLIGHT_FD brings it back.
func (s *session) getInflightFD(m *message) error {
	queues := int(uint16(m.u32(16)))
	if queues == 0 || queues > len(s.rings) {
		return fmt.Errorf("%d queues", queues)
	}
	size := queues * inflightStride(uint16(m.u32(16)>>16))
	fd, err := memfd("blkstream-inflight", int64(size))
	if err != nil {
		return err
	}
	m.replyFD = fd
	m.reply = make([]byte, len(m.payload))
	copy(m.reply, m.payload) // number and size of the queues as asked
	putU64(m.reply, 0, uint64(size))
	putU64(m.reply, 8, 0)
	return nil
}

// setInflightFD takes the in-flight region, which a back-end before us may have left. The queue size in it is QEMU's
// property, not the region's, and is ignored.
func (s *session) setInflightFD(m *message) error {
	for _, r := range s.rings {
		if err := s.reconfigure(r); err != nil {
			return err
		}
	}
	region, err := newInflightRegion(m.fds[0], m.u64(8), m.u64(0), int(uint16(m.u32(16))))
	if err != nil {
		return err
	}
	s.setInflight(region)
	return s.startRings()
}

// setInflight replaces the in-flight region, nil: none. No queue is running.
func (s *session) setInflight(region *inflightRegion) {
	old := s.inflight
	s.inflight = region
	if old != nil {
		if err := old.mem.unmap(); err != nil {
			s.log.Error("in-flight region", "err", err)
		}
	}
}

func (s *session) setBackendReqFD(m *message) error {
	if err := checkStream(m.fds[0]); err != nil {
		return err
	}
	s.srv.setBackend(m.takeFD(0))
	return nil
}

// resetDevice returns rings and features to their initial state. Memory, call and err descriptors and the back-end
// channel stay: QEMU does not send them all again.
func (s *session) resetDevice(*message) error {
	s.stopAll()
	for _, r := range s.rings {
		r.size, r.addr, r.base = 0, nil, 0
	}
	s.features, s.featuresSet, s.status = 0, false, 0
	s.setLog(nil)
	s.setInflight(nil)
	s.dev.Reset()
	return nil
}

// stopAll stops all rings, which then need VRING_ENABLE and SET_VRING_KICK again.
func (s *session) stopAll() {
	s.eachRing(func(r *ring) {
		s.retireRing(r)
		r.enabled = false
	})
}

// setStatus keeps the virtio status. 0 stops the rings, but is no reset of the device: QEMU also sends it when
// it pauses the guest, and then what the guest has set must stay.
func (s *session) setStatus(m *message) error {
	v := m.u64(0)
	if v > 0xff {
		return fmt.Errorf("bad status %#x", v)
	}
	s.status = uint8(v)
	if v == 0 {
		s.stopAll()
	}
	return nil
}

func (s *session) getStatus(m *message) error {
	m.replyU64(uint64(s.status))
	return nil
}

// setDeviceStateFD saves or loads what the device must remember when a front-end goes on with another back-end or later. A
// state fits into any pipe: it is written at once, and read when the front-end, which has closed its end then, asks
// for the result.
func (s *session) setDeviceStateFD(m *message) error {
	const noFD = 1 << 8 // in the reply: what the front-end sent is used
	setFD(&s.stateFD, -1)
	if s.stateErr = s.transferState(m); s.stateErr != nil {
		m.replyU64(noFD | 1)
		return s.stateErr
	}
	m.replyU64(noFD)
	return nil
}

func (s *session) transferState(m *message) error {
	const save, load = 0, 1
	direction, phase := m.u32(0), m.u32(4)
	if phase != 0 {
		return fmt.Errorf("unknown phase %d", phase)
	}
	for _, r := range s.rings {
		if r.q != nil && s.isEnabled(r) {
			return fmt.Errorf("ring %d is running", r.index)
		}
	}
	if err := prepareState(m.fds[0]); err != nil {
		return err
	}
	switch direction {
	case save:
		return writeState(m.fds[0], s.dev.State())
	case load:
		s.stateFD = m.takeFD(0)
		return nil
	default:
		return fmt.Errorf("unknown direction %d", direction)
	}
}

// checkDeviceState says how the last transfer went.
func (s *session) checkDeviceState(m *message) error {
	if s.stateFD >= 0 {
		b, err := readState(s.stateFD)
		setFD(&s.stateFD, -1)
		if err == nil {
			err = s.dev.SetState(b)
		}
		s.stateErr = err
	}
	m.replyU64(0)
	if s.stateErr != nil {
		m.replyU64(1)
	}
	return s.stateErr
}
