// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

func (a *app) streamCmd() *cobra.Command {
	var req control.StreamRequest
	var wait bool
	onError := []string{"stop", "report", "enospc"}
	onSource, onTarget := choice{from: onError}, choice{from: onError}
	speed := size{name: "RATE"}
	cmd := &cobra.Command{
		Use:   "stream DISK",
		Short: "Make a disk's image independent of the images behind it",
		Long: `Copy into a disk's image what the images behind it hold, while its guest runs,
and leave them then. With --base, that image stays behind the disk's, and only
those in front of it are copied and left.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			req.Disk, req.Speed = args[0], speed.value
			req.OnSourceError, req.OnTargetError = onSource.value, onTarget.value
			var err error
			if req.Base, err = absPath(req.Base); err != nil {
				return err
			}
			job, err := c.Stream(ctx, &req)
			if err != nil {
				return err
			}
			return a.started(ctx, c, job, wait)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Base, "base", "", "the `image` that stays behind the disk's")
	f.Var(&speed, "speed", "limit in bytes per second (default: none)")
	onSource.addTo(cmd, "on-source-error", "stop: pause the job; report: fail it; enospc: pause if the disk is full, else fail (default: report)")
	onTarget.addTo(cmd, "on-target-error", "likewise, for errors of the disk's image (default: enospc)")
	f.StringVar(&req.Id, "id", "", "`ID` of the job (default: the daemon's choice)")
	f.BoolVar(&wait, "wait", false, "wait until the job is completed")
	return cmd
}
