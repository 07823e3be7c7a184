// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

type jsonBitmap struct {
	Disk        string `json:"disk"`
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"`
	DirtyBytes  int64  `json:"dirty_bytes"`
	State       string `json:"state"`
	Reason      string `json:"reason,omitempty"`
	Stored      string `json:"stored"`
}

func toJSONBitmap(b *control.Bitmap) jsonBitmap {
	return jsonBitmap{b.Disk, b.Name, b.Granularity, b.DirtyBytes, b.State, b.Reason, b.Stored}
}

func (a *app) bitmapCmd() *cobra.Command {
	return a.group(&cobra.Command{Use: "bitmap", Short: "Record which blocks of a disk its guest changes"},
		a.bitmapAddCmd(),
		&cobra.Command{
			Use:               "remove DISK NAME",
			Short:             "Forget a dirty bitmap",
			Args:              cobra.ExactArgs(2),
			ValidArgsFunction: a.completeBitmap,
			RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
				if _, err := c.BitmapRemove(ctx, &control.BitmapRemoveRequest{Disk: args[0], Name: args[1]}); err != nil {
					return err
				}
				return a.say(jsonBitmapName{args[0], args[1]}, "bitmap %s of disk %s removed", args[1], args[0])
			}),
		},
		&cobra.Command{
			Use:               "clear DISK NAME",
			Short:             "Forget what was changed up to now",
			Args:              cobra.ExactArgs(2),
			ValidArgsFunction: a.completeBitmap,
			RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
				b, err := c.BitmapClear(ctx, &control.BitmapClearRequest{Disk: args[0], Name: args[1]})
				if err != nil {
					return err
				}
				return a.say(toJSONBitmap(b), "bitmap %s of disk %s cleared", b.Name, b.Disk)
			}),
		},
		&cobra.Command{
			Use:               "list [DISK]",
			Short:             "List the dirty bitmaps of a disk, or of all",
			Args:              cobra.MaximumNArgs(1),
			ValidArgsFunction: a.complete(diskIDs),
			RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
				var req control.BitmapListRequest
				if len(args) > 0 {
					req.Disk = args[0]
				}
				resp, err := c.BitmapList(ctx, &req)
				if err != nil {
					return err
				}
				return a.printBitmaps(resp.Bitmaps)
			}),
		},
	)
}

type jsonBitmapName struct {
	Disk string `json:"disk"`
	Name string `json:"name"`
}

func (a *app) bitmapAddCmd() *cobra.Command {
	granularity := size{name: "SIZE"}
	cmd := &cobra.Command{
		Use:   "add DISK NAME",
		Short: "Begin to record which blocks of a disk change",
		Long: `Begin to record which blocks of a disk its guest changes. The bitmap lives on over
restarts and crashes, switches to other images and snapshots, until it is removed.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			b, err := c.BitmapAdd(ctx, &control.BitmapAddRequest{Disk: args[0], Name: args[1], Granularity: granularity.value})
			if err != nil {
				return err
			}
			return a.say(toJSONBitmap(b), "bitmap %s of disk %s added", b.Name, b.Disk)
		}),
	}
	cmd.Flags().Var(&granularity, "granularity", "bytes a bit stands for, a power of two from 4K to 64M (default: 64K)")
	return cmd
}

// completeBitmap completes a disk, and then one of its bitmaps.
func (a *app) completeBitmap(cmd *cobra.Command, args []string, text string) ([]cobra.Completion, cobra.ShellCompDirective) {
	list := diskIDs
	if len(args) == 1 {
		list = func(ctx context.Context, c *control.Client) []cobra.Completion {
			resp, err := c.BitmapList(ctx, &control.BitmapListRequest{Disk: args[0]})
			if err != nil {
				return nil
			}
			var names []cobra.Completion
			for _, b := range resp.Bitmaps {
				names = append(names, cobra.CompletionWithDesc(b.Name, b.State))
			}
			return names
		}
		args = nil
	}
	return a.complete(list)(cmd, args, text)
}

func (a *app) printBitmaps(bitmaps []*control.Bitmap) error {
	if a.json {
		return a.printJSON(each(bitmaps, toJSONBitmap))
	}
	t := newTable(a.out, "DISK", "NAME", "GRANULARITY", "DIRTY", "STATE", "STORED")
	for _, b := range bitmaps {
		state := b.State
		if b.Reason != "" {
			state += ": " + b.Reason
		}
		t.row(b.Disk, b.Name, humanSize(b.Granularity), humanSize(b.DirtyBytes), state, b.Stored)
	}
	return t.Flush()
}
