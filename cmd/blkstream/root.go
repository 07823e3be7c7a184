// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
)

// app is one run of the program: where it writes, and what the flags of all
// commands say.
type app struct {
	out, err   io.Writer
	isTerminal func(io.Writer) bool
	now        func() time.Time

	socket  string
	json    bool
	started bool // the command line was accepted
}

func newApp(out, err io.Writer) *app {
	return &app{out: out, err: err, now: time.Now, isTerminal: isTerminal}
}

// isTerminal says whether w is a terminal that one can draw on: serial
// consoles and CI runners have terminals without a size.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	width, height, err := term.GetSize(int(f.Fd()))
	return err == nil && width > 0 && height > 0
}

func (a *app) root() *cobra.Command {
	root := a.group(&cobra.Command{
		Use:   "blkstream",
		Short: "Copy, move and convert the disks of running guests",
	}, a.diskCmd(), a.copyCmd(), a.switchCmd(), a.streamCmd(), a.snapshotCmd(), a.commitCmd(), a.backupCmd(), a.bitmapCmd(), a.jobCmd(), a.imageCmd(), a.versionCmd())
	// Flags belong to the command they follow: disk add has another --socket.
	root.TraverseChildren = true
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.PersistentFlags().StringVar(&a.socket, "socket", "",
		"`path` of the control socket of blkstreamd (default $BLKSTREAM_SOCKET or "+config.DefaultControl+")")
	root.PersistentFlags().BoolVar(&a.json, "json", false, "print JSON, one document a line")
	return root
}

// group makes cmd a command that only holds others.
func (a *app) group(cmd *cobra.Command, sub ...*cobra.Command) *cobra.Command {
	cmd.AddCommand(sub...)
	cmd.Args = cobra.ArbitraryArgs // else cobra prints its help and calls it success
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return &usageError{fmt.Errorf("unknown command %q", args[0])}
		}
		return &usageError{errors.New("which command?")}
	}
	return cmd
}

// with wraps the work of a command that needs the daemon.
func (a *app) with(fn func(ctx context.Context, c *control.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		c, err := a.dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return fn(cmd.Context(), c, args)
	}
}

func (a *app) dial() (*control.Client, error) {
	socket := a.socket
	if socket == "" {
		socket = os.Getenv("BLKSTREAM_SOCKET")
	}
	if socket == "" {
		socket = config.DefaultControl
	}
	return control.Dial(socket)
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the versions of this program and of the daemon",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			a.started = true
			v := jsonVersion{Client: version}
			c, err := a.dial()
			if err == nil {
				defer c.Close()
				var resp *control.VersionResponse
				if resp, err = c.Version(cmd.Context(), &control.VersionRequest{}); err == nil {
					v.Daemon = resp.Version
				}
			}
			// The client's version is known in any case.
			if a.json {
				return errors.Join(a.printJSON(v), err)
			}
			fmt.Fprintf(a.out, "blkstream %s\n", v.Client)
			if err == nil {
				fmt.Fprintf(a.out, "blkstreamd %s\n", v.Daemon)
			}
			return err
		},
	}
}

type completion = func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective)

// complete completes the first argument from what the daemon has.
func (a *app) complete(lists ...func(context.Context, *control.Client) []cobra.Completion) completion {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		c, err := a.dial()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		var all []cobra.Completion
		for _, list := range lists {
			all = append(all, list(ctx, c)...)
		}
		return all, cobra.ShellCompDirectiveNoFileComp
	}
}

func diskIDs(ctx context.Context, c *control.Client) []cobra.Completion {
	resp, err := c.DiskList(ctx, &control.DiskListRequest{})
	if err != nil {
		return nil
	}
	var ids []cobra.Completion
	for _, d := range resp.Disks {
		ids = append(ids, cobra.CompletionWithDesc(d.Id, d.Image))
	}
	return ids
}

func jobIDs(ctx context.Context, c *control.Client) []cobra.Completion {
	resp, err := c.JobList(ctx, &control.JobListRequest{})
	if err != nil {
		return nil
	}
	var ids []cobra.Completion
	for _, j := range resp.Jobs {
		ids = append(ids, cobra.CompletionWithDesc(j.Id, j.Disk+" "+j.State))
	}
	return ids
}

// choice is a flag with a few possible values.
type choice struct {
	value string
	from  []string
}

func (c *choice) String() string { return c.value }
func (c *choice) Type() string   { return strings.Join(c.from, "|") }

func (c *choice) Set(s string) error {
	if !slices.Contains(c.from, s) {
		return fmt.Errorf("want one of %s", strings.Join(c.from, ", "))
	}
	c.value = s
	return nil
}

func (c *choice) addTo(cmd *cobra.Command, name, usage string) { c.addToP(cmd, name, "", usage) }

// addToP adds the flag with a shorthand.
func (c *choice) addToP(cmd *cobra.Command, name, short, usage string) {
	cmd.Flags().VarP(c, name, short, usage)
	// It fails only for flags that do not exist.
	_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(c.from, cobra.ShellCompDirectiveNoFileComp))
}

// size is a flag in bytes, or bytes per second.
type size struct {
	value int64
	name  string // of the type, in the help
}

func (s *size) String() string {
	if s.value == 0 {
		return ""
	}
	return fmt.Sprint(s.value)
}

func (s *size) Type() string { return s.name }

func (s *size) Set(text string) (err error) {
	s.value, err = config.ParseSize(text)
	return err
}

// absPath makes a path mean the same to the daemon as to the user. Addresses
// (nbd://…, fd:N) stay as they are.
func absPath(path string) (string, error) {
	if path == "" || strings.Contains(path, "://") || strings.HasPrefix(path, "fd:") {
		return path, nil
	}
	return filepath.Abs(path)
}
