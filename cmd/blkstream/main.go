// SPDX-License-Identifier: Apache-2.0

// Command blkstream talks to blkstreamd: it lists, adds and copies the disks
// of running guests, and follows and steers the jobs that do it, through
// nothing but the control socket. It also works on images that no guest uses,
// by itself.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Exit statuses. Scripts rely on them.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	exitJob    = 3 // the job that was waited for failed or was cancelled
)

// version is set by the linker.
var version = "devel"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends what does not listen, as storage that hangs
	os.Exit(newApp(os.Stdout, os.Stderr).run(ctx, os.Args[1:]))
}

// run executes one command line and returns the exit status.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.root()
	root.SetArgs(negativeSize(args))
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	var status *statusError
	if errors.As(err, &status) {
		if status.err != nil {
			fmt.Fprintf(a.err, "blkstream: %v\n", err)
		}
		return status.status
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	fmt.Fprintf(a.err, "blkstream: %v\n", err)
	var job *jobError
	var usage *usageError
	switch {
	case errors.As(err, &job):
		return exitJob
	case !a.started, errors.As(err, &usage):
		if cmd.ValidateArgs(cmd.Flags().Args()) != nil {
			fmt.Fprintf(a.err, "Usage: %s\n", cmd.UseLine())
		}
		fmt.Fprintf(a.err, "See '%s --help'.\n", cmd.CommandPath())
		return exitUsage
	default:
		return exitFailed
	}
}

// usageError is a wrong command line that the flags' parser let through.
type usageError struct{ error }

// jobError is the end of a job that did not do what it was started for.
type jobError struct{ id, state, reason, message string }

func (e *jobError) Error() string {
	s := fmt.Sprintf("job %s: %s", e.id, e.state)
	if e.reason != "" {
		s += ": " + e.reason
	}
	if e.message != "" {
		s += "\n" + e.message
	}
	return s
}
