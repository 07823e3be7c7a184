// SPDX-License-Identifier: Apache-2.0

package control

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What can be wrong with a request. The server wraps these, by Errorf or with
// %w; the client's errors match them with errors.Is. Any other error of the
// server arrives with its text, and matches none of them.
var (
	ErrNotFound     = errors.New("not found")           // no such disk or job
	ErrExists       = errors.New("already exists")      // an id, a socket or a target is taken
	ErrInvalid      = errors.New("invalid argument")    // the request can never succeed as it is
	ErrPrecondition = errors.New("failed precondition") // not in the present state
	ErrUnsupported  = errors.New("not supported")       // this daemon cannot do it
	ErrNoSpace      = errors.New("no space left")       // a disk is full or a limit is reached
)

// statusCodes is the one place that knows which error is which code.
var statusCodes = []struct {
	err  error
	code codes.Code
}{
	{ErrNotFound, codes.NotFound},
	{ErrExists, codes.AlreadyExists},
	{ErrInvalid, codes.InvalidArgument},
	{ErrPrecondition, codes.FailedPrecondition},
	{ErrUnsupported, codes.Unimplemented},
	{ErrNoSpace, codes.ResourceExhausted},
	{context.Canceled, codes.Canceled},
	{context.DeadlineExceeded, codes.DeadlineExceeded},
}

// kindError is an error of one of the kinds above whose text does not name the
// kind.
type kindError struct {
	kind error
	err  error
}

func (e *kindError) Error() string   { return e.err.Error() }
func (e *kindError) Unwrap() []error { return []error{e.kind, e.err} }

// Errorf is fmt.Errorf for an error that errors.Is takes for kind as well,
// without kind in its text.
func Errorf(kind error, format string, args ...any) error {
	return &kindError{kind, fmt.Errorf(format, args...)}
}

// toStatus turns a server's error into the status that ttrpc sends.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	for _, c := range statusCodes {
		if errors.Is(err, c.err) {
			return status.Error(c.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// fromStatus turns a client's error into what the server's error was.
func fromStatus(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("blkstreamd closed the connection; has it stopped, or does it belong to another user? (%w)", err)
	}
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := errors.New(s.Message())
	for _, c := range statusCodes {
		if s.Code() == c.code {
			return &kindError{c.err, text}
		}
	}
	return text
}
