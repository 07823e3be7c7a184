// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

func (a *app) commitCmd() *cobra.Command {
	var req control.CommitRequest
	var wait bool
	speed := size{name: "RATE"}
	cmd := &cobra.Command{
		Use:   "commit DISK",
		Short: "Merge images of a disk's chain into the one behind them",
		Long: `Merge images of a disk's chain, from --top down to the one before --base, into
the base, while the guest runs. They are not used any more then, and stay as
files. If the guest is on --top, it goes on with the base.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			req.Disk, req.Speed = args[0], speed.value
			for _, path := range []*string{&req.Top, &req.Base} {
				var err error
				if *path, err = absPath(*path); err != nil {
					return err
				}
			}
			job, err := c.Commit(ctx, &req)
			if err != nil {
				return err
			}
			return a.started(ctx, c, job, wait)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Top, "top", "", "first `image` to merge (default: the one that the guest is on)")
	f.StringVar(&req.Base, "base", "", "`image` to merge into (default: the one behind --top)")
	f.Var(&speed, "speed", "limit in bytes per second (default: none)")
	f.StringVar(&req.Id, "id", "", "`ID` of the job (default: the daemon's choice)")
	f.BoolVar(&wait, "wait", false, "wait until the job is completed")
	return cmd
}
