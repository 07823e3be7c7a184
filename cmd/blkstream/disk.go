// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
)

func (a *app) diskCmd() *cobra.Command {
	return a.group(&cobra.Command{Use: "disk", Short: "List, show, add, remove, resize and change disks"},
		&cobra.Command{
			Use:   "list",
			Short: "List the disks",
			Args:  cobra.NoArgs,
			RunE: a.with(func(ctx context.Context, c *control.Client, _ []string) error {
				resp, err := c.DiskList(ctx, &control.DiskListRequest{})
				if err != nil {
					return err
				}
				return a.printDisks(resp.Disks)
			}),
		},
		&cobra.Command{
			Use:               "show DISK",
			Short:             "Show a disk, its chain of images and its stack",
			Args:              cobra.ExactArgs(1),
			ValidArgsFunction: a.complete(diskIDs),
			RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
				disk, err := c.DiskShow(ctx, &control.DiskShowRequest{Id: args[0]})
				if err != nil {
					return err
				}
				return a.printDisk(disk)
			}),
		},
		a.diskAddCmd(),
		&cobra.Command{
			Use:               "remove DISK",
			Short:             "Stop serving a disk; its image stays",
			Args:              cobra.ExactArgs(1),
			ValidArgsFunction: a.complete(diskIDs),
			RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
				if _, err := c.DiskRemove(ctx, &control.DiskRemoveRequest{Id: args[0]}); err != nil {
					return err
				}
				return a.say(jsonID{args[0]}, "disk %s removed", args[0])
			}),
		},
		a.diskResizeCmd(),
		a.diskSetCmd(),
	)
}

// diskAddCmd has a --socket of its own, the disk's: the control socket's goes
// before the command.
func (a *app) diskAddCmd() *cobra.Command {
	var req control.DiskAddRequest
	discard, poll := true, uint32(config.DefaultPollUS)
	cache := choice{value: config.DefaultCache, from: []string{"none", "writeback", "writethrough", "unsafe"}}
	blockSize := size{value: config.DefaultBlockSize, name: "SIZE"}
	cmd := &cobra.Command{
		Use:     "add --id ID --image IMAGE --format FORMAT --socket PATH",
		Short:   "Serve another disk, also after restarts, until it is removed",
		Example: "  blkstream --socket CONTROL disk add --id disk1 --image /images/a.img --format raw --socket /run/disk1.sock",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if blockSize.value > math.MaxUint32 {
				return &usageError{fmt.Errorf("--block-size %d is too large", blockSize.value)}
			}
			req.Cache, req.BlockSize, req.Discard, req.PollUs = cache.value, uint32(blockSize.value), &discard, &poll
			return a.with(func(ctx context.Context, c *control.Client, _ []string) error {
				var err error
				if req.Image, err = absPath(req.Image); err != nil {
					return err
				}
				if req.Socket, err = absPath(req.Socket); err != nil {
					return err
				}
				disk, err := c.DiskAdd(ctx, &req)
				if err != nil {
					return err
				}
				return a.say(toJSONDisk(disk), "disk %s added", disk.Id)
			})(cmd, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.Id, "id", "", "`ID` of the disk")
	f.StringVar(&req.Image, "image", "", "`path` of the image")
	f.StringVar(&req.Format, "format", "", "`format` of the image; never guessed")
	f.StringVar(&req.Socket, "socket", "", "`path` of the vhost-user socket to create for the disk")
	for _, name := range []string{"id", "image", "format", "socket"} {
		_ = cmd.MarkFlagRequired(name) // fails only for flags that do not exist
	}
	f.BoolVar(&req.ReadOnly, "read-only", false, "refuse writes")
	f.Uint32Var(&req.Queues, "queues", config.DefaultQueues, "offer `N` request queues")
	f.Uint32Var(&req.QueueSize, "queue-size", config.DefaultQueueSize, "at most `N` requests of a queue in flight, a power of two")
	cache.addTo(cmd, "cache", "cache mode, as in QEMU")
	f.Var(&blockSize, "block-size", "logical block size, 512 or 4096")
	f.StringVar(&req.Serial, "serial", "", "`text` that the guest sees as serial number")
	f.BoolVar(&req.CopyOnRead, "copy-on-read", false, "keep in a qcow2 image what the guest reads from those behind it")
	f.BoolVar(&discard, "discard", true, "pass the guest's discards on to the image")
	f.Uint32Var(&poll, "poll-us", poll, "at most `N` microseconds of busy-polling before a queue without work sleeps; 0: none")
	return cmd
}

func (a *app) diskResizeCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "resize DISK SIZE",
		Short:             "Make a disk larger; the guest is told",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			n, err := config.ParseSize(args[1])
			if err != nil {
				return &usageError{err}
			}
			return a.with(func(ctx context.Context, c *control.Client, args []string) error {
				disk, err := c.DiskResize(ctx, &control.DiskResizeRequest{Id: args[0], Size: n})
				if err != nil {
					return err
				}
				return a.say(toJSONDisk(disk), "disk %s has %s now", disk.Id, humanSize(disk.Size))
			})(cmd, args)
		},
	}
}

func (a *app) diskSetCmd() *cobra.Command {
	copyOnRead := choice{from: []string{"on", "off"}}
	cmd := &cobra.Command{
		Use:               "set DISK --copy-on-read on|off",
		Short:             "Change a disk while its guest runs, also for after restarts",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			on := copyOnRead.value == "on"
			disk, err := c.DiskSet(ctx, &control.DiskSetRequest{Id: args[0], CopyOnRead: &on})
			if err != nil {
				return err
			}
			return a.say(toJSONDisk(disk), "disk %s: copy on read is %s", disk.Id, onOff(disk.CopyOnRead))
		}),
	}
	copyOnRead.addTo(cmd, "copy-on-read", "keep in a qcow2 image what the guest reads from those behind it")
	_ = cmd.MarkFlagRequired("copy-on-read") // fails only for flags that do not exist
	return cmd
}
