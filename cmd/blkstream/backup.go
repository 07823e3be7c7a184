// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

const kindBackup = "backup"

func (a *app) backupCmd() *cobra.Command {
	var req control.BackupRequest
	var wait bool
	onError := []string{"stop", "report", "enospc"}
	onSource, onTarget := choice{from: onError}, choice{from: onError}
	onCBW := choice{value: "break", from: []string{"break", "hold"}}
	speed, cluster := size{name: "RATE"}, size{name: "SIZE"}
	cmd := &cobra.Command{
		Use:   "backup DISK TARGET",
		Short: "Copy a disk, as it is at this instant, while its guest runs",
		Long: `Copy a disk to TARGET as it is at this instant, while its guest runs and writes:
what the guest is about to overwrite is copied first. With --bitmap only what
that names is copied, and then it begins anew at the instant.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			req.Disk, req.Speed, req.ClusterSize = args[0], speed.value, cluster.value
			req.OnSourceError, req.OnTargetError, req.OnCbwError = onSource.value, onTarget.value, onCBW.value
			var err error
			if req.Target, err = absPath(args[1]); err != nil {
				return err
			}
			if req.Base, err = absPath(req.Base); err != nil {
				return err
			}
			job, err := c.Backup(ctx, &req)
			if err != nil {
				return err
			}
			return a.jobStarted(ctx, c, job, wait, onlyTheEnd)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Format, "format", "", "`format` of TARGET: qcow2 or raw (default: qcow2)")
	f.BoolVar(&req.Existing, "existing", false, "TARGET exists already and is overwritten; otherwise it must not exist")
	f.StringVar(&req.Bitmap, "bitmap", "", "copy only what the bitmap `NAME` says has changed; it begins anew")
	f.BoolVar(&req.Full, "full", false, "copy all of the disk; the bitmap begins anew")
	f.StringVar(&req.Base, "base", "", "the `image` behind a new TARGET: the backup before this one")
	f.StringVar(&req.BaseFormat, "base-format", "", "`format` of the base (default: qcow2)")
	f.Var(&cluster, "cluster-size", "of a new qcow2 TARGET (default: 64K)")
	f.Var(&speed, "speed", "limit in bytes per second (default: none)")
	onSource.addTo(cmd, "on-source-error", "stop: pause the job; report: fail it; enospc: pause if the disk is full, else fail (default: report)")
	onTarget.addTo(cmd, "on-target-error", "likewise, for errors of TARGET (default: enospc)")
	onCBW.addTo(cmd, "on-cbw-error", "what the guest is about to overwrite cannot be copied: fail the job, or let the guest wait")
	f.Int64Var(&req.CbwTimeout, "cbw-timeout", 0, "`seconds` that a write of the guest waits before the job fails (default: 30; with hold: for ever)")
	f.StringVar(&req.Id, "id", "", "`ID` of the job (default: the daemon's choice)")
	f.BoolVar(&wait, "wait", false, "wait until the job is completed")
	return cmd
}
