// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// ErrClosed is returned by a Server that was closed.
var ErrClosed = errors.New("vhost-user server is closed")

// Options of a Server.
type Options struct {
	Logger *slog.Logger // nil: slog.Default()
}

// Server serves a Device to one front-end at a time, and to the next one when that has gone.
type Server struct {
	dev  Device
	log  *slog.Logger
	slot chan struct{} // holds an element while a session runs or is waited for

	connected atomic.Bool // a session runs

	warnings rate.Sometimes // a hostile front-end must not flood the log, by whatever it repeats

	mu            sync.Mutex // never held while a queue or the device is called
	backend       int        // the session's back-end channel, -1: none
	configPending bool       // the configuration changed since rings were last started
	open          map[io.Closer]struct{}
	closed        bool
	running       sync.WaitGroup // of open
}

// NewServer returns a server for dev.
func NewServer(dev Device, opts Options) *Server {
	log := opts.Logger
	if log == nil {
		log = slog.Default()
	}
	return &Server{
		dev: dev, log: log, backend: -1,
		slot:     make(chan struct{}, 1),
		open:     make(map[io.Closer]struct{}),
		warnings: rate.Sometimes{First: 20, Interval: time.Second},
	}
}

// Connected reports whether a front-end is being served.
func (s *Server) Connected() bool { return s.connected.Load() }

// Listen listens on a Unix socket at path, with mode 0600. A socket that nobody listens on any more is replaced;
// one with a listener, or a file of another kind, is an error.
func Listen(path string) (*net.UnixListener, error) {
	defer lockDir(filepath.Dir(path))()
	switch fi, err := os.Lstat(path); {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("listen: %w", err)
	case fi.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("listen on %s: exists and is not a socket", path)
	default:
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, fmt.Errorf("listen on %s: %w", path, syscall.EADDRINUSE)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen: replace stale socket: %w", err)
		}
	}
	cfg := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// bind gives the file the socket's mode: there is no moment at which others could connect.
		var err error
		if cerr := c.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) }); cerr != nil {
			return cerr
		}
		return err
	}}
	l, err := cfg.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// lockDir keeps others out of Listen in this directory until unlock is called: of two that find the same stale socket, the
// second would remove the one that the first has put in its place. Where there are no such locks, and when somebody has it
// for long, who is not one of us and may be a front-end, it goes without.
func lockDir(path string) (unlock func()) {
	dir, err := os.Open(path)
	if err != nil {
		return func() {}
	}
	for range 100 {
		if !errors.Is(syscall.Flock(int(dir.Fd()), syscall.LOCK_EX|syscall.LOCK_NB), syscall.EWOULDBLOCK) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return func() { dir.Close() }
}

// ServeListener serves front-ends, one after the other, until ctx is done or the server is closed, and closes l. While one
// is served others wait in the socket's backlog. It returns nil if it was told to end.
func (s *Server) ServeListener(ctx context.Context, l *net.UnixListener) error {
	if !s.track(l) {
		return ErrClosed
	}
	defer s.untrack(l)
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		if !s.take(ctx) {
			return nil
		}
		c, err := l.AcceptUnix()
		if err == nil {
			_ = s.serve(ctx, c) // which logged it
			s.release()
			continue
		}
		s.release()
		if ctx.Err() != nil || s.isClosed() {
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("vhost-user: accept: %w", err)
		}
		// Out of descriptors or memory, or a connection that was gone already: this passes.
		s.warn("accept", err)
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ServeConn serves one front-end that is connected already, after the one that is being served, if any, has gone.
// It closes c. It returns nil if the front-end closed the connection or ctx is done, otherwise why the session ended.
func (s *Server) ServeConn(ctx context.Context, c *net.UnixConn) error {
	if !s.take(ctx) {
		return c.Close()
	}
	defer s.release()
	return s.serve(ctx, c)
}

// take waits for the server to be free; false: ctx is done.
func (s *Server) take(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case s.slot <- struct{}{}:
		return true
	}
}

func (s *Server) release() { <-s.slot }

// serve runs a session on c until it ends, ctx is done or the server is closed, and closes c.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) error {
	if !s.track(c) {
		return errors.Join(ErrClosed, c.Close())
	}
	defer s.untrack(c)
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer stop()
	s.connected.Store(true)
	defer s.connected.Store(false)
	s.log.Debug("front-end connected")
	err := newSession(s, newConn(c)).run()
	s.log.Debug("front-end disconnected")
	if err == nil || ctx.Err() != nil || s.isClosed() {
		return nil
	}
	s.warn("session ended", err)
	return fmt.Errorf("vhost-user: %w", err)
}

// Close ends the session and all listening, and returns when queues are drained and nothing runs any more.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for c := range s.open {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.running.Wait()
	return nil
}

// track has Close close c. false: the server is closed.
func (s *Server) track(c io.Closer) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return false
	}
	s.open[c] = struct{}{}
	s.running.Add(1)
	return true
}

// untrack closes c; whatever used it has ended.
func (s *Server) untrack(c io.Closer) {
	_ = c.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, c)
	s.running.Done()
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// warn logs what a front-end did wrong.
func (s *Server) warn(what string, err error) {
	s.warnings.Do(func() { s.log.Warn(what, "err", err) })
}

// ConfigChanged tells the front-end, if it has a channel for that, to read the configuration space again, and
// tells it once more when rings start next: QEMU ignores the message while the guest is stopped. It never waits.
func (s *Server) ConfigChanged() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.configPending = true
	s.sendConfigChangeLocked()
}

// repeatConfigChange follows the start of rings.
func (s *Server) repeatConfigChange() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.configPending && s.backend >= 0 {
		s.configPending = false
		s.sendConfigChangeLocked()
	}
}

func (s *Server) sendConfigChangeLocked() {
	if s.backend < 0 {
		return
	}
	// The error does not matter: a full socket already holds messages of the same meaning, and a closed one has no reader.
	_ = sendNoWait(s.backend, appendHeader(nil, backendConfigChange, flagVersion, 0))
}

// setBackend replaces the session's back-end channel, -1: none.
func (s *Server) setBackend(fd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	closeFD(s.backend)
	s.backend = fd
}
