// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// server answers with the error its fields say.
type server struct {
	ControlService
	err error
}

func (s *server) JobShow(_ context.Context, req *JobShowRequest) (*Job, error) {
	if s.err != nil {
		return nil, s.err
	}
	return &Job{Id: req.Id}, nil
}

func (s *server) JobWatch(_ context.Context, req *JobWatchRequest, stream Control_JobWatchServer) error {
	for i := range 3 {
		if err := stream.Send(&JobEvent{Job: &Job{Id: req.Id, BytesDone: int64(i)}}); err != nil {
			return err
		}
	}
	return s.err
}

func start(t *testing.T, svc ControlService) *Client {
	t.Helper()
	srv, err := NewServer(svc)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- srv.Serve(t.Context(), l) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, ttrpc.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	c, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestErrorsCross(t *testing.T) {
	kinds := []error{ErrNotFound, ErrExists, ErrInvalid, ErrPrecondition, ErrUnsupported, ErrNoSpace}
	other := errors.New("disk on fire")
	for _, tc := range []struct {
		sent error
		kind error
		text string
	}{
		{Errorf(ErrNotFound, "no disk %q", "a"), ErrNotFound, `no disk "a"`},
		{Errorf(ErrExists, "taken"), ErrExists, "taken"},
		{Errorf(ErrInvalid, "odd: %w", other), ErrInvalid, "odd: disk on fire"},
		{fmt.Errorf("job: %w", ErrPrecondition), ErrPrecondition, "job: failed precondition"},
		{fmt.Errorf("wrapped: %w", Errorf(ErrUnsupported, "no")), ErrUnsupported, "wrapped: no"},
		{Errorf(ErrNoSpace, "full"), ErrNoSpace, "full"},
		{fmt.Errorf("stop: %w", context.Canceled), context.Canceled, "stop: context canceled"},
		{other, nil, "disk on fire"},
	} {
		t.Run(tc.text, func(t *testing.T) {
			c := start(t, &server{err: tc.sent})
			_, unary := c.JobShow(t.Context(), &JobShowRequest{Id: "x"})
			w, err := c.JobWatch(t.Context(), &JobWatchRequest{Id: "x"})
			if err != nil {
				t.Fatal(err)
			}
			var stream error
			for stream == nil {
				_, stream = w.Recv()
			}
			for name, got := range map[string]error{"unary": unary, "stream": stream} {
				if got == nil || got.Error() != tc.text {
					t.Fatalf("%s: got %v, want %s", name, got, tc.text)
				}
				for _, k := range append(kinds, context.Canceled) {
					if errors.Is(got, k) != (k == tc.kind) { //nolint:errorlint // identity is what is tested
						t.Errorf("%s: is it %v? %v", name, k, errors.Is(got, k))
					}
				}
			}
		})
	}
}

func TestWatch(t *testing.T) {
	c := start(t, &server{})
	w, err := c.JobWatch(t.Context(), &JobWatchRequest{Id: "x"})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		ev, err := w.Recv()
		if err != nil || ev.Job.BytesDone != int64(i) {
			t.Fatalf("event %d: %v, %v", i, ev, err)
		}
	}
	if _, err := w.Recv(); err != io.EOF { //nolint:errorlint // documented to be io.EOF
		t.Errorf("at the end: %v", err)
	}
}

// Every kind has its own code, and no other answer looks like one.
func TestCodes(t *testing.T) {
	seen := map[codes.Code]bool{codes.OK: true, codes.Unknown: true}
	for _, c := range statusCodes {
		if seen[c.code] {
			t.Errorf("%v twice", c.code)
		}
		seen[c.code] = true
	}
	if got := status.Code(toStatus(errors.New("x"))); got != codes.Unknown {
		t.Errorf("other errors: %v", got)
	}
	if toStatus(nil) != nil || fromStatus(nil) != nil {
		t.Error("no error became one")
	}
}

func TestDial(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, path := range []string{filepath.Join(dir, "none"), stale} {
		_, err := Dial(path)
		if err == nil || !strings.Contains(err.Error(), "is blkstreamd running? looked for "+path+"; use --socket or $BLKSTREAM_SOCKET") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if os.Geteuid() != 0 {
		if err := os.Chmod(dir, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := Dial(stale); err == nil || !strings.Contains(err.Error(), "not allowed") {
			t.Errorf("no permission: %v", err)
		}
	}
}

func TestServerGone(t *testing.T) {
	c := start(t, &server{})
	c.conn.Close()
	if _, err := c.JobShow(t.Context(), &JobShowRequest{}); err == nil || !strings.Contains(err.Error(), "closed the connection") {
		t.Errorf("after close: %v", err)
	}
}
