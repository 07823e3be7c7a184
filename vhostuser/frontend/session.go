// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
)

// This file is the session in the order in which QEMU speaks: negotiate once a connection, start and stop the
// rings, log dirty pages. Every function needs d.mu.

// ErrRefused is wrapped when the back-end answers a message with an error.
var ErrRefused = errors.New("frontend: back-end refused")

const (
	vringLog    = 1 // VHOST_VRING_F_LOG
	statusAll   = 1 | 2 | 4 | 8
	maxTable    = 8 // regions in one SET_MEM_TABLE
	logPageBits = 12
)

func (d *Disk) negotiateLocked(first bool) error {
	offered, err := d.getU64Locked(MsgGetFeatures)
	if err != nil {
		return err
	}
	if err := agree(&d.features, offered, d.opts.Features, first); err != nil {
		return fmt.Errorf("frontend: virtio features: %w", err)
	}
	if d.features&FeatureProtocol != 0 {
		if err := d.negotiateProtocolLocked(first); err != nil {
			return err
		}
	} else if len(d.queues) > 1 {
		return errors.New("frontend: several queues need protocol features")
	}
	if err := d.setLocked(MsgSetOwner, nil); err != nil {
		return err
	}
	for _, q := range d.queues {
		if err := d.setVringFDLocked(MsgSetVringCall, q.index, q.call); err != nil {
			return err
		}
		if err := d.setVringFDLocked(MsgSetVringErr, q.index, q.errFD); err != nil {
			return err
		}
	}
	if first && d.protocol&ProtocolConfig != 0 {
		d.config, err = d.configLocked()
	}
	return err
}

func (d *Disk) negotiateProtocolLocked(first bool) error {
	offered, err := d.getU64Locked(MsgGetProtocolFeatures)
	if err != nil {
		return err
	}
	if err := agree(&d.protocol, offered, d.opts.ProtocolFeatures, first); err != nil {
		return fmt.Errorf("frontend: protocol features: %w", err)
	}
	if err := d.setLocked(MsgSetProtocolFeatures, u64(d.protocol)); err != nil {
		return err
	}
	d.acks = d.protocol&ProtocolReplyAck != 0
	most := uint64(1)
	if d.protocol&ProtocolMQ != 0 {
		if most, err = d.getU64Locked(MsgGetQueueNum); err != nil {
			return err
		}
	}
	if uint64(len(d.queues)) > most {
		return fmt.Errorf("frontend: %d queues wanted, the back-end has %d", len(d.queues), most)
	}
	if d.protocol&ProtocolMemSlots != 0 {
		slots, err := d.getU64Locked(MsgGetMaxMemSlots)
		if err != nil {
			return err
		}
		if slots < d.slots || slots < uint64(len(d.regions)) {
			return fmt.Errorf("frontend: the back-end has %d memory slots, it had %d and %d are used", slots, d.slots, len(d.regions))
		}
		d.slots = slots
	}
	if d.protocol&ProtocolBackendReq != 0 {
		return d.openChannelLocked()
	}
	return nil
}

// agree settles a feature set: at first what both sides know, after a reconnect exactly what it was, since the
// driver has built on it.
func agree(set *uint64, offered, wanted uint64, first bool) error {
	if first {
		*set = offered & wanted
	} else if gone := *set &^ offered; gone != 0 {
		return fmt.Errorf("the back-end no longer offers %#x", gone)
	}
	return nil
}

// openChannelLocked gives the back-end a socket for its own messages and serves our end of it until the back-end goes.
func (d *Disk) openChannelLocked() error {
	ours, theirs, err := socketPair()
	if err != nil {
		return err
	}
	d.channel = ours // closed with the connection
	defer syscall.Close(theirs)
	d.wg.Go(func() {
		defer ours.Close()
		for {
			m, err := readMessage(ours)
			if err != nil {
				return
			}
			m.CloseFDs()
			refused := uint64(1)
			if m.Request == backendConfigChange {
				refused = 0
				select {
				case d.changed <- struct{}{}:
				default: // one is waiting to be seen already
				}
			}
			if m.Flags&FlagNeedReply != 0 {
				reply := Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: u64(refused)}
				if writeAll(ours, encode(reply), nil) != nil {
					return
				}
			}
		}
	})
	return d.setLocked(MsgSetBackendReqFD, nil, theirs)
}

// startLocked hands memory and rings over and enables them.
func (d *Disk) startLocked() error {
	if err := d.setFeaturesLocked(); err != nil {
		return err
	}
	if d.protocol&ProtocolInflight != 0 {
		if err := d.inflightLocked(); err != nil {
			return err
		}
	}
	for _, q := range d.queues {
		if err := d.setVringFDLocked(MsgSetVringCall, q.index, q.call); err != nil {
			return err
		}
	}
	if err := d.setFeaturesLocked(); err != nil { // QEMU does this twice
		return err
	}
	if err := d.sendMemoryLocked(); err != nil {
		return err
	}
	if d.log != nil {
		if err := d.setLogBaseLocked(); err != nil {
			return err
		}
	}
	for _, q := range d.queues {
		if err := d.setLocked(MsgSetVringNum, vringState(q.index, uint32(d.opts.QueueSize))); err != nil {
			return err
		}
		if err := d.setLocked(MsgSetVringBase, vringState(q.index, uint32(q.base))); err != nil {
			return err
		}
		if err := d.setVringAddrLocked(q); err != nil {
			return err
		}
		if err := d.setVringFDLocked(MsgSetVringKick, q.index, q.kick); err != nil {
			return err
		}
	}
	if err := d.enableLocked(1); err != nil {
		return err
	}
	if err := d.setStatusLocked(statusAll); err != nil {
		return err
	}
	for _, q := range d.queues {
		signal(q.kick) // there may be requests from before
	}
	d.running = true
	return nil
}

// stopLocked takes the rings back, drained, and notes where the back-end stopped in each.
func (d *Disk) stopLocked() error {
	d.running = false
	if err := d.enableLocked(0); err != nil {
		return err
	}
	for _, q := range d.queues {
		m, err := d.callLocked(Message{Request: MsgGetVringBase, Payload: vringState(q.index, 0)})
		if err != nil {
			return err
		}
		if len(m.Payload) != 8 || binary.NativeEndian.Uint32(m.Payload) != uint32(q.index) {
			return fmt.Errorf("frontend: GET_VRING_BASE of queue %d answered %x", q.index, m.Payload)
		}
		q.base = uint16(binary.NativeEndian.Uint32(m.Payload[4:]))
	}
	return d.setStatusLocked(0)
}

func (d *Disk) setFeaturesLocked() error {
	f := d.features
	if d.log != nil {
		f |= FeatureLogAll
	}
	return d.setLocked(MsgSetFeatures, u64(f))
}

func (d *Disk) enableLocked(on uint32) error {
	if d.features&FeatureProtocol == 0 {
		return nil // such rings are always enabled
	}
	for _, q := range d.queues {
		if err := d.setLocked(MsgSetVringEnable, vringState(q.index, on)); err != nil {
			return err
		}
	}
	return nil
}

func (d *Disk) setStatusLocked(status uint64) error {
	if d.protocol&ProtocolStatus == 0 {
		return nil
	}
	if status != 0 {
		if _, err := d.getU64Locked(MsgGetStatus); err != nil {
			return err
		}
	}
	return d.setLocked(MsgSetStatus, u64(status))
}

// inflightLocked asks for an in-flight region once, and gives the same back to every later back-end.
func (d *Disk) inflightLocked() error {
	if d.inflight.fd < 0 {
		shape := make([]byte, 24) // mmap size and offset u64, queues and queue size u16, padded as QEMU's structure is
		binary.NativeEndian.PutUint16(shape[16:], uint16(len(d.queues)))
		binary.NativeEndian.PutUint16(shape[18:], uint16(d.opts.QueueSize))
		m, err := d.callLocked(Message{Request: MsgGetInflightFD, Payload: shape})
		if err != nil {
			return err
		}
		if len(m.Payload) != len(shape) || len(m.FDs) != 1 { // QEMU is as strict
			m.CloseFDs()
			return fmt.Errorf("frontend: GET_INFLIGHT_FD answered %d bytes and %d descriptors", len(m.Payload), len(m.FDs))
		}
		d.inflight = inflight{fd: m.FDs[0], payload: m.Payload}
	}
	return d.setLocked(MsgSetInflightFD, d.inflight.payload, d.inflight.fd)
}

// sendMemoryLocked tells the back-end about the regions that it does not know yet.
func (d *Disk) sendMemoryLocked() error {
	if d.protocol&ProtocolMemSlots != 0 {
		for _, r := range d.regions {
			if r.sent {
				continue
			}
			if err := d.setLocked(MsgAddMemReg, append(make([]byte, 8), r.encode()...), r.fd); err != nil {
				return err
			}
			r.sent = true
		}
		return nil
	}
	if len(d.regions) > maxTable {
		return fmt.Errorf("frontend: %d memory regions, a table holds %d", len(d.regions), maxTable)
	}
	table := binary.NativeEndian.AppendUint64(nil, uint64(len(d.regions)))
	var fds []int
	for _, r := range d.regions {
		table = append(table, r.encode()...)
		fds = append(fds, r.fd)
	}
	return d.setLocked(MsgSetMemTable, table, fds...)
}

func (d *Disk) setVringAddrLocked(q *Queue) error {
	var flags uint32
	if d.log != nil {
		flags = vringLog
	}
	b := vringState(q.index, flags)
	for _, gpa := range []uint64{q.ring.Desc, q.ring.Used, q.ring.Avail} {
		b = binary.NativeEndian.AppendUint64(b, gpa+userDelta)
	}
	return d.setLocked(MsgSetVringAddr, binary.NativeEndian.AppendUint64(b, q.ring.Used))
}

func (d *Disk) setVringFDLocked(request uint32, index, fd int) error {
	return d.setLocked(request, u64(uint64(index)), fd)
}

func (d *Disk) setLogBaseLocked() error {
	b := binary.NativeEndian.AppendUint64(u64(uint64(len(d.log.bits))), 0)
	// The reply to SET_LOG_BASE needs no asking for.
	_, err := d.callLocked(Message{Request: MsgSetLogBase, Payload: b, FDs: []int{d.log.fd}})
	return err
}

func (d *Disk) configLocked() (Config, error) {
	b := binary.NativeEndian.AppendUint32(nil, 0)
	b = binary.NativeEndian.AppendUint32(b, configSize)
	b = append(b, make([]byte, 4+configSize)...)
	m, err := d.callLocked(Message{Request: MsgGetConfig, Payload: b})
	if err != nil {
		return Config{}, err
	}
	if len(m.Payload) != len(b) {
		return Config{}, fmt.Errorf("frontend: GET_CONFIG answered %d bytes, want %d", len(m.Payload), len(b))
	}
	return parseConfig(m.Payload[12:])
}

// setLocked sends a message that has no reply of its own; with REPLY_ACK it waits for the back-end's verdict.
func (d *Disk) setLocked(request uint32, payload []byte, fds ...int) error {
	m := Message{Request: request, Payload: payload, FDs: fds}
	if !d.acks {
		return d.sendLocked(m)
	}
	m.Flags = FlagVersion | FlagNeedReply
	r, err := d.callLocked(m)
	if err != nil {
		return err
	}
	if v, err := r.U64(); err != nil {
		return err
	} else if v != 0 {
		return fmt.Errorf("%w message %d", ErrRefused, request)
	}
	return nil
}

func (d *Disk) getU64Locked(request uint32) (uint64, error) {
	m, err := d.callLocked(Message{Request: request})
	if err != nil {
		return 0, err
	}
	return m.U64()
}

func (d *Disk) sendLocked(m Message) error {
	if d.conn == nil {
		return ErrDisconnected
	}
	return d.conn.Send(m)
}

// callLocked sends m and returns the reply. After a failure the replies that may still come could not be told apart, so
// the connection ends.
func (d *Disk) callLocked(m Message) (Message, error) {
	if d.conn == nil {
		return Message{}, ErrDisconnected
	}
	r, err := d.conn.Call(m, d.opts.Timeout)
	if err != nil {
		d.conn.Close()
		return Message{}, err
	}
	if m.Request != MsgGetInflightFD { // the only reply that brings a descriptor
		r.CloseFDs()
	}
	return r, nil
}

func u64(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }

func vringState(index int, num uint32) []byte {
	return binary.NativeEndian.AppendUint32(binary.NativeEndian.AppendUint32(nil, uint32(index)), num)
}
