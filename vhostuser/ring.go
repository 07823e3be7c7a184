// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/blkstream/blkstream/virtq"
)

// A ring's life: the front-end sends its size, addresses, base and descriptors in any order. As soon as size, addresses
// and kick are known, it is enabled, features are set and memory holds it, startRing hands it to the device.
// VRING_ENABLE then pauses and resumes it. stopRing (GET_VRING_BASE, resets, the end of the session) takes it back;
// after that it needs a new SET_VRING_KICK.

const (
	maxRingSize = 32768
	vringLog    = 1 // VHOST_VRING_F_LOG: writes to the used ring are logged
)

// errNotMapped says that a ring does not lie inside guest memory, or not yet.
var errNotMapped = errors.New("ring is not wholly inside a region of guest memory")

// vringAddr is the payload of SET_VRING_ADDR. Addresses are the front-end's, but log is the guest's.
type vringAddr struct {
	flags             uint32
	desc, used, avail uint64
	log               uint64
}

// ring is what a session knows of one ring.
type ring struct {
	index   int
	size    uint16 // 0: not set
	addr    *vringAddr
	base    uint16
	kickSet bool
	enabled bool

	kick, call, err int // -1: none

	q                 Queue         // nil: stopped; paused while the ring is not enabled
	mem               *virtq.Memory // what q has
	desc, avail, used uint64
}

// isEnabled includes that without protocol features there is no VRING_ENABLE, and rings start enabled.
func (s *session) isEnabled(r *ring) bool {
	return r.enabled || s.featuresSet && s.features&featureProtocolFeatures == 0
}

// translate finds a ring's guest-physical addresses.
func (s *session) translate(r *ring) (desc, avail, used uint64, err error) {
	n := uint64(r.size)
	var ok [3]bool
	desc, ok[0] = s.mem.UserToGPA(r.addr.desc, 16*n)
	avail, ok[1] = s.mem.UserToGPA(r.addr.avail, 6+2*n)
	used, ok[2] = s.mem.UserToGPA(r.addr.used, 6+8*n)
	if ok != [3]bool{true, true, true} {
		return 0, 0, 0, errNotMapped
	}
	if desc%16 != 0 || avail%2 != 0 || used%4 != 0 {
		return 0, 0, 0, errors.New("ring is misaligned")
	}
	return desc, avail, used, nil
}

// startRing starts r if it is complete and not running. It is no error if something is missing.
func (s *session) startRing(r *ring) error {
	if r.q != nil || r.size == 0 || r.addr == nil || !r.kickSet || !s.featuresSet || !s.isEnabled(r) || s.memEnd() == 0 {
		return nil
	}
	desc, avail, used, err := s.translate(r)
	if err != nil {
		return fmt.Errorf("ring %d: %w", r.index, err)
	}
	cfg := Ring{
		Index: r.index, Size: r.size,
		Desc: desc, Avail: avail, Used: used,
		Base: r.base, Features: s.features &^ vhostFeatures,
		Kick: r.kick, Call: r.call, Err: r.err,
		Mem: s.mem,
	}
	cfg.Log, cfg.LogUsed, cfg.UsedLog = s.ringLog(r)
	if s.inflight != nil && r.index < s.inflight.queues {
		usedIdx, err := s.usedIdx(used)
		if err != nil {
			return fmt.Errorf("ring %d: %w", r.index, err)
		}
		q, live, resubmit, err := recoverInflight(s.inflight.part(r.index), r.size, usedIdx)
		if err != nil {
			return fmt.Errorf("ring %d: %w", r.index, err)
		}
		cfg.Inflight, cfg.Resubmit = q, resubmit
		if live || cfg.Base-usedIdx <= r.size {
			// What SET_VRING_BASE said is from before the crash, or guessed: Cloud Hypervisor restores a snapshot with the
			// avail index, beyond what was waiting in the ring. Nothing of that is in flight elsewhere, or the region would
			// say so.
			cfg.Base = usedIdx + uint16(len(resubmit))
		}
	}
	q, err := s.dev.Start(cfg)
	if err != nil {
		return fmt.Errorf("ring %d: start: %w", r.index, err)
	}
	r.q, r.mem, r.desc, r.avail, r.used = q, s.mem, desc, avail, used
	s.log.Debug("ring started", "ring", r.index, "size", r.size, "base", cfg.Base, "resubmitted", len(cfg.Resubmit))
	q.Kick()
	if cfg.Inflight != nil {
		signal(r.call) // an earlier back-end may have died between publishing and signalling
	}
	s.ringStarted = true
	return nil
}

// usedIdx reads the published index of the used ring at gpa.
func (s *session) usedIdx(gpa uint64) (uint16, error) {
	b, err := s.mem.Bytes(gpa, 4)
	if err != nil {
		return 0, fmt.Errorf("used ring: %w", err)
	}
	w := word32(b, 0) // flags, idx
	if w == nil {
		return 0, errors.New("used ring is misaligned")
	}
	return uint16(atomic.LoadUint32(w) >> 16), nil
}

// stopRing drains and ends r's queue, if it is running. r.base is then where the ring can go on.
func (s *session) stopRing(r *ring) {
	if r.q == nil {
		return
	}
	base, err := r.q.Stop()
	r.q, r.base = nil, base
	if err != nil {
		s.abandon(r, err)
	}
}

// retireRing is stopRing for good: it starts again only after a new SET_VRING_KICK.
func (s *session) retireRing(r *ring) {
	s.stopRing(r)
	setFD(&r.kick, -1)
	r.kickSet = false
}

// reconfigure makes r ready for a new size, base or address. It may be running, but not enabled: some front-ends
// only disable a ring before they set it up anew.
func (s *session) reconfigure(r *ring) error {
	if r.q == nil {
		return nil
	}
	if s.isEnabled(r) {
		return fmt.Errorf("ring %d is running", r.index)
	}
	s.stopRing(r)
	return nil
}

// setFD replaces a ring's descriptor after its queue let go of the old one.
func setFD(p *int, fd int) {
	closeFD(*p)
	*p = fd
}

// ringLog says what r's queue has to log.
func (s *session) ringLog(r *ring) (l *Log, used bool, usedLog uint64) {
	if s.features&featureLogAll == 0 || s.dirty == nil {
		return nil, false, 0
	}
	return s.dirty, r.addr.flags&vringLog != 0, r.addr.log
}

// setRingLog puts the session's and r's log settings in force.
func (s *session) setRingLog(r *ring) {
	if r.q != nil {
		r.q.SetLog(s.ringLog(r))
	}
}

func (s *session) setVringNum(m *message) error {
	r, n, err := s.ringState(m)
	if err != nil {
		return err
	}
	if n == 0 || n > maxRingSize || n&(n-1) != 0 {
		return fmt.Errorf("ring %d: bad size %d", r.index, n)
	}
	if r.q != nil && uint32(r.size) == n {
		return nil
	}
	if err := s.reconfigure(r); err != nil {
		return err
	}
	r.size = uint16(n)
	return s.startRing(r)
}

func (s *session) setVringBase(m *message) error {
	r, n, err := s.ringState(m)
	if err != nil {
		return err
	}
	if n > 0xffff {
		return fmt.Errorf("ring %d: bad base %#x", r.index, n)
	}
	if err := s.reconfigure(r); err != nil {
		return err
	}
	r.base = uint16(n)
	return s.startRing(r)
}

func (s *session) setVringAddr(m *message) error {
	r, err := s.ring(m.u32(0))
	if err != nil {
		return err
	}
	a := &vringAddr{flags: m.u32(4), desc: m.u64(8), used: m.u64(16), avail: m.u64(24), log: m.u64(32)}
	if a.desc%16 != 0 || a.avail%2 != 0 || a.used%4 != 0 {
		return fmt.Errorf("ring %d is misaligned", r.index)
	}
	if r.q != nil && a.desc == r.addr.desc && a.used == r.addr.used && a.avail == r.addr.avail {
		// Migration starts or ends: only logging changes.
		r.addr = a
		s.setRingLog(r)
		return nil
	}
	if err := s.reconfigure(r); err != nil {
		return err
	}
	r.addr = a
	return s.startRing(r)
}

// getVringBase stops a ring: drained, so that the reply says that nothing is in flight.
func (s *session) getVringBase(m *message) error {
	r, _, err := s.ringState(m)
	if err != nil {
		return err
	}
	s.retireRing(r)
	m.replyU64(uint64(r.index) | uint64(r.base)<<32)
	return nil
}

func (s *session) setVringEnable(m *message) error {
	r, n, err := s.ringState(m)
	if err != nil {
		return err
	}
	if n > 1 {
		return fmt.Errorf("ring %d: bad enable value %d", r.index, n)
	}
	was := s.isEnabled(r)
	r.enabled = n == 1
	switch now := s.isEnabled(r); {
	case r.q == nil:
		return s.startRing(r)
	case was && !now:
		r.q.Pause()
	case now && !was:
		r.q.Resume()
		r.q.Kick()
	}
	return nil
}

// ringFD takes the descriptor of a SET_VRING_KICK, CALL or ERR message, -1 if there is none.
func (s *session) ringFD(m *message) (*ring, int, error) {
	const noFD = 1 << 8
	v := m.u64(0)
	if v > noFD|0xff {
		return nil, -1, fmt.Errorf("bad ring index %#x", v)
	}
	r, err := s.ring(uint32(v & 0xff))
	if err != nil {
		return nil, -1, err
	}
	if (v&noFD != 0) != (len(m.fds) == 0) {
		return nil, -1, errors.New("descriptor without announcement, or the other way round")
	}
	if len(m.fds) == 0 {
		return r, -1, nil
	}
	if err := checkEvent(m.fds[0]); err != nil {
		return nil, -1, err
	}
	return r, m.takeFD(0), nil
}

func (s *session) setVringKick(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	s.stopRing(r)
	setFD(&r.kick, fd)
	r.kickSet = true
	return s.startRing(r)
}

func (s *session) setVringCall(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	if r.q != nil {
		r.q.SetCall(fd)
		signal(fd) // an interrupt may have gone to the old descriptor after the front-end last looked at it
	}
	setFD(&r.call, fd)
	return nil
}

func (s *session) setVringErr(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	if r.q != nil {
		r.q.SetErr(fd)
	}
	setFD(&r.err, fd)
	return nil
}
