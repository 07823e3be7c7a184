// SPDX-License-Identifier: Apache-2.0

// Package control is the daemon's control socket: the service that
// control.proto defines, and how a server offers it and a client reaches it.
package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

//go:generate ./generate.sh

// NewServer returns a ttrpc server that offers svc. The errors svc returns
// reach the client as errors.go describes.
func NewServer(svc ControlService, opts ...ttrpc.ServerOpt) (*ttrpc.Server, error) {
	srv, err := ttrpc.NewServer(append(opts, ttrpc.WithChainUnaryServerInterceptor(serverErrors))...)
	if err != nil {
		return nil, fmt.Errorf("control server: %w", err)
	}
	RegisterControlService(srv, streamErrors{svc})
	return srv, nil
}

func serverErrors(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	return resp, toStatus(err)
}

// streamErrors does for the streaming method what serverErrors does for all
// others: ttrpc has no interceptor for streams.
type streamErrors struct{ ControlService }

func (s streamErrors) JobWatch(ctx context.Context, req *JobWatchRequest, stream Control_JobWatchServer) error {
	return toStatus(s.ControlService.JobWatch(ctx, req, stream))
}

// Client is a connection to a daemon. Its methods may be used from several
// goroutines.
type Client struct {
	ControlClient
	conn *ttrpc.Client
}

// Dial connects to the daemon that listens on socket, a path.
func Dial(socket string) (*Client, error) {
	conn, err := net.Dial("unix", socket)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("is blkstreamd running? looked for %s; use --socket or $BLKSTREAM_SOCKET: %w", socket, err)
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("not allowed to use %s; only the user that runs blkstreamd is: %w", socket, err)
	case err != nil:
		return nil, fmt.Errorf("connect to blkstreamd: %w", err)
	}
	c := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(clientErrors))
	return &Client{ControlClient: NewControlClient(c), conn: c}, nil
}

// Close closes the connection; calls under way fail.
func (c *Client) Close() error { return c.conn.Close() }

func clientErrors(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if err := invoke(ctx, req, resp); err != nil {
		return fromStatus(err)
	}
	if resp.Status != nil && resp.Status.Code != int32(codes.OK) {
		return fromStatus(status.ErrorProto(resp.Status))
	}
	return nil
}

// JobWatch follows a job; Recv returns io.EOF after its last event. Cancelling
// ctx ends Recv, but the daemon sends on until the client is closed.
func (c *Client) JobWatch(ctx context.Context, req *JobWatchRequest) (Control_JobWatchClient, error) {
	stream, err := c.ControlClient.JobWatch(ctx, req)
	if err != nil {
		return nil, fromStatus(err)
	}
	return watchErrors{stream}, nil
}

type watchErrors struct{ Control_JobWatchClient }

func (w watchErrors) Recv() (*JobEvent, error) {
	ev, err := w.Control_JobWatchClient.Recv()
	return ev, fromStatus(err)
}
