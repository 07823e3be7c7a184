// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

var errGone = errors.New("guest: QEMU has gone")

// qmp is a client of QEMU's machine protocol: one command at a time, and a
// record of every event seen.
type qmp struct {
	conn net.Conn
	cmd  sync.Mutex // held over one command and its reply

	mu      sync.Mutex // guards what follows
	replies chan qmpMessage
	events  []string
	changed chan struct{} // closed and replaced at each event
	closed  bool
}

type qmpMessage struct {
	QMP    json.RawMessage `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Event  string          `json:"event"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// newQMP takes a fresh connection through the greeting.
func newQMP(conn net.Conn) (*qmp, error) {
	q := &qmp{conn: conn, replies: make(chan qmpMessage, 1), changed: make(chan struct{})}
	dec := json.NewDecoder(conn)
	var greeting qmpMessage
	if err := dec.Decode(&greeting); err != nil || greeting.QMP == nil {
		return nil, fmt.Errorf("guest: QMP greeting: %w", errors.Join(err, errGone))
	}
	go q.read(dec)
	return q, q.execute("qmp_capabilities", nil, nil)
}

func (q *qmp) read(dec *json.Decoder) {
	for {
		var m qmpMessage
		err := dec.Decode(&m)
		if err == nil && m.Event == "" {
			q.replies <- m
			continue
		}
		q.mu.Lock()
		q.closed = err != nil
		q.events = append(q.events, m.Event)
		close(q.changed)
		q.changed = make(chan struct{})
		q.mu.Unlock()
		if err != nil {
			close(q.replies)
			return
		}
	}
}

// execute runs one command. args and out may be nil.
func (q *qmp) execute(name string, args, out any) error {
	q.cmd.Lock()
	defer q.cmd.Unlock()
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{name, args})
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(line); err != nil {
		return fmt.Errorf("guest: QMP %s: %w", name, errors.Join(errGone, err))
	}
	timeout := time.NewTimer(requestTimeout)
	defer timeout.Stop()
	var m qmpMessage
	var ok bool
	select {
	case m, ok = <-q.replies:
	case <-timeout.C:
		q.conn.Close() // a reply that came now would be taken for the next command's
		return fmt.Errorf("guest: QMP %s: no answer in %v", name, requestTimeout)
	}
	if !ok {
		return fmt.Errorf("guest: QMP %s: %w", name, errGone)
	}
	if m.Error != nil {
		return fmt.Errorf("guest: QMP %s: %s: %s", name, m.Error.Class, m.Error.Desc)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(m.Return, out)
}

// wait blocks until an event of this name came after the first from events.
func (q *qmp) wait(ctx context.Context, name string, from int) error {
	for {
		q.mu.Lock()
		changed, closed := q.changed, q.closed
		for _, e := range q.events[min(from, len(q.events)):] {
			if e == name {
				q.mu.Unlock()
				return nil
			}
		}
		q.mu.Unlock()
		if closed {
			return fmt.Errorf("guest: waiting for event %s: %w", name, errGone)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("guest: waiting for event %s: %w", name, ctx.Err())
		}
	}
}
