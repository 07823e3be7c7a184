// SPDX-License-Identifier: Apache-2.0

// Command blkstreamd serves virtual disks over vhost-user.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/cmd/blkstreamd/internal/daemon"
	"github.com/blkstream/blkstream/config"
)

// version is set by the linker.
var version = "devel"

type flags struct {
	config, socket, image, format string
	fd, queues                    int
	check, readOnly, capabilities bool
	verbose                       bool
}

// errUsage marks errors of the command line, which exit with 2.
var errUsage = errors.New("usage")

func main() {
	if err := command(&flags{}).Execute(); err != nil {
		fmt.Fprintf(os.Stderr, "blkstreamd: %v\n", err)
		if errors.Is(err, errUsage) {
			fmt.Fprintln(os.Stderr, "Try 'blkstreamd --help'.")
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// command is the command line, which sets f.
func command(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "blkstreamd --config FILE | --socket-path PATH|--fd N --blk-file IMAGE --format FORMAT",
		Short: "serve virtual disks over vhost-user to any virtual machine monitor",
		Long: `blkstreamd serves virtual disks over vhost-user, and copies and moves them while their guests run.

With --config it serves the disks of a TOML file and listens for the blkstream command on its control socket.
With --blk-file it serves one image without a configuration file, following the conventions for vhost-user back-end
programs; there are no jobs then.`,
		Version:       version,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return run(cmd, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.config, "config", "", "configuration `file` (TOML)")
	fl.BoolVar(&f.check, "check", false, "check the configuration and the images it names, and exit")
	fl.StringVar(&f.socket, "socket-path", "", "one disk: listen on the Unix socket at this `path`")
	fl.IntVar(&f.fd, "fd", -1, "one disk: use the inherited Unix socket `N`, which listens or is connected")
	fl.StringVar(&f.image, "blk-file", "", "one disk: the `image`")
	fl.StringVar(&f.format, "format", "", "one disk: the image's `format` (never probed)")
	fl.BoolVar(&f.readOnly, "read-only", false, "one disk: refuse writes")
	fl.IntVar(&f.queues, "num-queues", config.DefaultQueues, "one disk: offer `N` virtqueues")
	fl.BoolVar(&f.capabilities, "print-capabilities", false, "print what this program can do as JSON, and exit")
	fl.BoolVar(&f.verbose, "verbose", false, "log more")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return fmt.Errorf("%w: %w", errUsage, err) })
	return cmd
}

func usage(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errUsage, fmt.Errorf(format, args...))
}

func run(cmd *cobra.Command, f *flags) error {
	if f.capabilities {
		return json.NewEncoder(cmd.OutOrStdout()).Encode(map[string]any{
			"type": "block", "features": []string{"read-only", "blk-file"},
		})
	}
	level := slog.LevelInfo
	if f.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	file, err := specs(f)
	if err != nil {
		return err
	}
	if f.check {
		if err := daemon.Check(file); err != nil {
			return err
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: no errors, disks: %d\n", f.config, len(file.Disks))
		return nil
	}
	d, err := daemon.Start(file, daemon.Options{Version: version, Log: log})
	if err != nil {
		return err
	}
	// From now on: until then a signal ends the program, whatever image does not open, and a restart is as after a crash.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	sd.SdNotify(false, sd.SdNotifyReady) //nolint:errcheck // without systemd there is nobody to tell
	log.Info("serving", "disks", len(file.Disks), "version", version)
	select {
	case <-ctx.Done():
		log.Info("stopping: draining the disks")
	case <-d.Done():
	}
	sd.SdNotify(false, sd.SdNotifyStopping) //nolint:errcheck // as above
	return d.Stop()
}

// specs reads the configuration, or makes one from the flags of the mode for one disk.
func specs(f *flags) (*config.File, error) {
	one := f.image != "" || f.socket != "" || f.fd >= 0
	switch {
	case f.config != "" && one:
		return nil, usage("--config and the flags for one disk exclude each other")
	case f.config != "":
		file, err := config.Load(f.config)
		if err != nil {
			return nil, err
		}
		// It is named to people who are elsewhere.
		file.Path, err = filepath.Abs(file.Path)
		return file, err
	case !one || f.check:
		return nil, usage("--config is missing")
	case f.image == "":
		return nil, usage("--blk-file is missing")
	case f.format == "":
		return nil, usage("--format is missing: formats are never probed")
	case (f.socket == "") == (f.fd < 0):
		return nil, usage("give one of --socket-path and --fd")
	}
	d := config.NewDisk()
	d.ID, d.Format, d.ReadOnly, d.Queues = "disk0", f.format, f.readOnly, f.queues
	var err error
	if d.Image, err = filepath.Abs(f.image); err != nil {
		return nil, err
	}
	d.Socket = fmt.Sprintf("fd:%d", f.fd)
	if f.socket != "" {
		if d.Socket, err = filepath.Abs(f.socket); err != nil {
			return nil, err
		}
	}
	if err := d.Validate(); err != nil {
		return nil, usage("%w", err)
	}
	return &config.File{Disks: []config.Disk{d}}, nil
}
