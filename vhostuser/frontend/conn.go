// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// Messages of the front-end (vhost-user specification, "Front-end message types").
const (
	MsgGetFeatures         = 1
	MsgSetFeatures         = 2
	MsgSetOwner            = 3
	MsgResetOwner          = 4
	MsgSetMemTable         = 5
	MsgSetLogBase          = 6
	MsgSetLogFD            = 7
	MsgSetVringNum         = 8
	MsgSetVringAddr        = 9
	MsgSetVringBase        = 10
	MsgGetVringBase        = 11
	MsgSetVringKick        = 12
	MsgSetVringCall        = 13
	MsgSetVringErr         = 14
	MsgGetProtocolFeatures = 15
	MsgSetProtocolFeatures = 16
	MsgGetQueueNum         = 17
	MsgSetVringEnable      = 18
	MsgSetBackendReqFD     = 21
	MsgGetConfig           = 24
	MsgSetConfig           = 25
	MsgGetInflightFD       = 31
	MsgSetInflightFD       = 32
	MsgResetDevice         = 34
	MsgGetMaxMemSlots      = 36
	MsgAddMemReg           = 37
	MsgRemMemReg           = 38
	MsgSetStatus           = 39
	MsgGetStatus           = 40

	backendConfigChange = 2 // VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
)

// Bits of Message.Flags; the two lowest hold the version.
const (
	FlagVersion   = 1
	FlagReply     = 1 << 2
	FlagNeedReply = 1 << 3
)

// VringNoFD in the payload of SET_VRING_KICK, CALL and ERR says that no fd comes with it.
const VringNoFD = 1 << 8

const (
	headerSize = 12
	maxPayload = 1 << 16
	maxFDs     = 32
)

// ErrDisconnected is wrapped by errors that mean that the back-end has gone.
var ErrDisconnected = errors.New("frontend: back-end is gone")

// Message is one vhost-user message in either direction. Whoever receives one owns its FDs.
type Message struct {
	Request uint32
	Flags   uint32 // as on the wire; Send sets version 1 if the version bits are 0
	Payload []byte
	FDs     []int
}

// CloseFDs closes the file descriptors that came with m.
func (m *Message) CloseFDs() {
	for _, fd := range m.FDs {
		syscall.Close(fd)
	}
	m.FDs = nil
}

// U64 returns the payload of a reply that is one 64-bit number.
func (m *Message) U64() (uint64, error) {
	if len(m.Payload) != 8 {
		return 0, fmt.Errorf("frontend: reply to message %d has %d bytes, want 8", m.Request, len(m.Payload))
	}
	return binary.NativeEndian.Uint64(m.Payload), nil
}

// Conn is one connection to a back-end: framing and fd passing, without any idea of a session's state.
// Disk is built on it; hostile tests use it as it is.
type Conn struct {
	c       *net.UnixConn
	wmu     sync.Mutex // one message at a time on the wire
	replies chan Message
	done    chan struct{}
	err     error // why the connection ended; written before done is closed
}

// DialConn connects to the back-end's socket at path and says nothing yet.
func DialConn(ctx context.Context, path string) (*Conn, error) {
	var dialer net.Dialer
	nc, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("frontend: %w", err)
	}
	c := &Conn{c: nc.(*net.UnixConn), replies: make(chan Message, 16), done: make(chan struct{})}
	go c.receive()
	return c, nil
}

// receive reads for as long as the connection lives, so that the end of the back-end is seen at once.
func (c *Conn) receive() {
	defer close(c.done)
	for {
		m, err := readMessage(c.c)
		if err != nil {
			c.err = fmt.Errorf("%w: %w", ErrDisconnected, err)
			c.c.Close()
			return
		}
		select {
		case c.replies <- m:
		default: // nobody asked for so many
			m.CloseFDs()
			c.err = fmt.Errorf("%w: it sent replies that nobody asked for", ErrDisconnected)
			c.c.Close()
			return
		}
	}
}

// Send writes one message with its file descriptors, which stay the caller's.
func (c *Conn) Send(m Message) error {
	if m.Flags&3 == 0 {
		m.Flags |= FlagVersion
	}
	return c.SendRaw(encode(m), m.FDs...)
}

// SendRaw writes bytes as they are, with file descriptors, which stay the caller's.
func (c *Conn) SendRaw(b []byte, fds ...int) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	return writeAll(c.c, b, fds)
}

// Recv waits at most timeout for the next message from the back-end.
func (c *Conn) Recv(timeout time.Duration) (Message, error) {
	t := time.NewTimer(timeout)
	defer t.Stop()
	select {
	case m := <-c.replies:
		return m, nil
	case <-c.done:
		select { // a reply may have come just before the end
		case m := <-c.replies:
			return m, nil
		default:
			return Message{}, c.err
		}
	case <-t.C:
		return Message{}, fmt.Errorf("frontend: no reply in %v", timeout)
	}
}

// Call sends m and waits at most timeout for the reply to it. Calls must not overlap.
func (c *Conn) Call(m Message, timeout time.Duration) (Message, error) {
	if err := c.Send(m); err != nil {
		return Message{}, fmt.Errorf("frontend: send message %d: %w", m.Request, err)
	}
	r, err := c.Recv(timeout)
	if err != nil {
		return Message{}, fmt.Errorf("frontend: message %d: %w", m.Request, err)
	}
	if r.Request != m.Request || r.Flags&3 != FlagVersion || r.Flags&FlagReply == 0 {
		r.CloseFDs()
		return Message{}, fmt.Errorf("frontend: reply to message %d is message %d with flags %#x", m.Request, r.Request, r.Flags)
	}
	return r, nil
}

// Done is closed when the connection has ended, by either side.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Close ends the connection; what was received and not taken is dropped.
func (c *Conn) Close() error {
	err := c.c.Close()
	<-c.done
	for {
		select {
		case m := <-c.replies:
			m.CloseFDs()
		default:
			return err
		}
	}
}

func encode(m Message) []byte {
	b := make([]byte, 0, headerSize+len(m.Payload))
	b = binary.NativeEndian.AppendUint32(b, m.Request)
	b = binary.NativeEndian.AppendUint32(b, m.Flags)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(m.Payload)))
	return append(b, m.Payload...)
}

func writeAll(c *net.UnixConn, b []byte, fds []int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = syscall.UnixRights(fds...)
	}
	n, _, err := c.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) { // the descriptors went with the first byte
		_, err = c.Write(b[n:])
	}
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("%w: %w", ErrDisconnected, err)
	}
	return err
}

// readMessage reads one whole message. A descriptor belongs to the message whose bytes it came with.
func readMessage(c *net.UnixConn) (m Message, err error) {
	defer func() {
		if err != nil {
			m.CloseFDs()
		}
	}()
	var header [headerSize]byte
	oob := make([]byte, syscall.CmsgSpace(maxFDs*4))
	for got := 0; got < headerSize; {
		n, oobn, _, _, err := c.ReadMsgUnix(header[got:], oob)
		if err != nil {
			return m, err
		}
		fds, err := parseFDs(oob[:oobn])
		m.FDs = append(m.FDs, fds...)
		if err != nil {
			return m, err
		}
		if n == 0 {
			return m, io.EOF
		}
		got += n
	}
	m.Request = binary.NativeEndian.Uint32(header[0:])
	m.Flags = binary.NativeEndian.Uint32(header[4:])
	size := binary.NativeEndian.Uint32(header[8:])
	if size > maxPayload {
		return m, fmt.Errorf("frontend: message %d claims a payload of %d bytes", m.Request, size)
	}
	m.Payload = make([]byte, size)
	if _, err := io.ReadFull(c, m.Payload); err != nil {
		return m, err
	}
	return m, nil
}

func parseFDs(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("frontend: control message: %w", err)
	}
	for i := range cmsgs {
		got, err := syscall.ParseUnixRights(&cmsgs[i])
		if err != nil {
			return fds, fmt.Errorf("frontend: control message: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}
