// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// Front-end requests, by the names and numbers of the vhost-user specification, "Front-end message types".
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqResetOwner          = 4
	reqSetMemTable         = 5
	reqSetLogBase          = 6
	reqSetLogFD            = 7
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqSetBackendReqFD     = 21
	reqGetConfig           = 24
	reqSetConfig           = 25
	reqGetInflightFD       = 31
	reqSetInflightFD       = 32
	reqResetDevice         = 34
	reqGetMaxMemSlots      = 36
	reqAddMemReg           = 37
	reqRemMemReg           = 38
	reqSetStatus           = 39
	reqGetStatus           = 40
	reqSetDeviceStateFD    = 42
	reqCheckDeviceState    = 43
)

// backendConfigChange is a back-end request: the configuration space has changed.
const backendConfigChange = 2

// The vhost-user bits among the virtio features.
const (
	featureLogAll           = 1 << 26 // VHOST_F_LOG_ALL
	featureProtocolFeatures = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
)

// Protocol features offered.
const (
	protocolMQ                = 1 << 0
	protocolLogShmFD          = 1 << 1
	protocolReplyAck          = 1 << 3
	protocolBackendReq        = 1 << 5
	protocolConfig            = 1 << 9
	protocolInflightShmFD     = 1 << 12
	protocolResetDevice       = 1 << 13
	protocolConfigureMemSlots = 1 << 15
	protocolStatus            = 1 << 16
	protocolDeviceState       = 1 << 19

	protocolFeatures = protocolMQ | protocolLogShmFD | protocolReplyAck | protocolBackendReq | protocolConfig |
		protocolInflightShmFD | protocolResetDevice | protocolConfigureMemSlots | protocolStatus | protocolDeviceState
)

const (
	headerSize = 12
	maxPayload = 4096 // far more than any message needs; what front-ends themselves use as a limit
	maxFDs     = 32   // SET_MEM_TABLE carries the most

	flagVersionMask = 3
	flagVersion     = 1
	flagReply       = 1 << 2
	flagNeedReply   = 1 << 3
)

// message is one request and what is to be answered. It owns its descriptors until a handler takes them.
type message struct {
	request uint32
	flags   uint32
	payload []byte // valid until the next message is read
	fds     []int
	lostFDs bool // more descriptors came than any message may have; the surplus is closed already

	reply   []byte // nil: no explicit reply
	replyFD int    // sent along with reply; -1: none; closed once it is sent
}

// takeFD hands descriptor i over to the caller.
func (m *message) takeFD(i int) int {
	fd := m.fds[i]
	m.fds[i] = -1
	return fd
}

// close closes the descriptors that no handler took.
func (m *message) close() {
	for _, fd := range m.fds {
		closeFD(fd)
	}
	closeFD(m.replyFD)
	m.fds, m.replyFD = nil, -1
}

func (m *message) u32(off int) uint32 { return binary.NativeEndian.Uint32(m.payload[off:]) }
func (m *message) u64(off int) uint64 { return binary.NativeEndian.Uint64(m.payload[off:]) }

func putU64(b []byte, off int, v uint64) { binary.NativeEndian.PutUint64(b[off:], v) }

// replyU64 makes v the reply.
func (m *message) replyU64(v uint64) {
	m.reply = binary.NativeEndian.AppendUint64(nil, v)
}

// conn frames messages on the front-end's socket, with a bounded buffer however slowly they trickle in.
type conn struct {
	*net.UnixConn
	header  [headerSize]byte
	payload [maxPayload]byte
	oob     []byte
}

func newConn(c *net.UnixConn) *conn {
	return &conn{UnixConn: c, oob: make([]byte, syscall.CmsgSpace(maxFDs*4))}
}

// read returns the next message, which the caller must close also if there is an error. io.EOF says that the front-end closed
// the connection between two messages; after any error the stream cannot be read further.
func (c *conn) read() (*message, error) {
	m := &message{replyFD: -1}
	if err := c.fill(c.header[:], m); err != nil {
		return m, err
	}
	m.request = binary.NativeEndian.Uint32(c.header[0:])
	m.flags = binary.NativeEndian.Uint32(c.header[4:])
	size := binary.NativeEndian.Uint32(c.header[8:])
	if m.flags&flagVersionMask != flagVersion || m.flags&flagReply != 0 {
		return m, fmt.Errorf("malformed header: request %d, flags %#x", m.request, m.flags)
	}
	if size > maxPayload {
		return m, fmt.Errorf("malformed header: request %d has a payload of %d bytes", m.request, size)
	}
	m.payload = c.payload[:size]
	if err := c.fill(m.payload, m); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return m, err
	}
	return m, nil
}

// fill reads len(b) bytes and gathers the descriptors that come with them.
func (c *conn) fill(b []byte, m *message) error {
	for got := 0; got < len(b); {
		n, oobn, flags, _, err := c.ReadMsgUnix(b[got:], c.oob)
		if oobn > 0 {
			if err := m.gather(c.oob[:oobn]); err != nil {
				return err
			}
		}
		if flags&syscall.MSG_CTRUNC != 0 {
			m.lostFDs = true // the kernel closed the surplus
		}
		if err == nil && n == 0 {
			err = io.EOF
		}
		if err != nil {
			if got > 0 && errors.Is(err, io.EOF) {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		got += n
	}
	return nil
}

// gather takes the descriptors of one control message buffer. They are close-on-exec already (ReadMsgUnix asks for that).
// They must stay without O_NONBLOCK: the flag belongs to the file description, which the front-end shares.
func (m *message) gather(oob []byte) error {
	parts, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("malformed control message: %w", err)
	}
	for i := range parts {
		fds, err := syscall.ParseUnixRights(&parts[i])
		if err != nil {
			continue // not SCM_RIGHTS
		}
		for _, fd := range fds {
			if len(m.fds) == maxFDs {
				// A sender can attach more to every byte that it trickles: keep none of these.
				closeFD(fd)
				m.lostFDs = true
				continue
			}
			m.fds = append(m.fds, fd)
		}
	}
	return nil
}

// write sends the reply to m.
func (c *conn) write(m *message, payload []byte) error {
	b := appendHeader(nil, m.request, flagVersion|flagReply, len(payload))
	b = append(b, payload...)
	var oob []byte
	if m.replyFD >= 0 {
		oob = syscall.UnixRights(m.replyFD)
	}
	n, _, err := c.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = c.Write(b[n:])
	}
	if err != nil {
		return fmt.Errorf("reply to request %d: %w", m.request, err)
	}
	return nil
}

func appendHeader(b []byte, request, flags uint32, size int) []byte {
	b = binary.NativeEndian.AppendUint32(b, request)
	b = binary.NativeEndian.AppendUint32(b, flags)
	return binary.NativeEndian.AppendUint32(b, uint32(size))
}
