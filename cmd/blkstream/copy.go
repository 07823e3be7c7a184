// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

func (a *app) copyCmd() *cobra.Command {
	var req control.CopyRequest
	var wait bool
	onError := []string{"stop", "report", "enospc"}
	method := choice{value: "mirror", from: []string{"mirror", "stream"}}
	switchMode := choice{value: "manual", from: []string{"manual", "auto"}}
	onSource, onTarget := choice{from: onError}, choice{from: onError}
	speed, granularity, cluster := size{name: "RATE"}, size{name: "SIZE"}, size{name: "SIZE"}
	compression := choice{from: []string{"zlib", "zstd"}}
	preallocation := choice{from: []string{"off", "metadata", "falloc", "full"}}
	cmd := &cobra.Command{
		Use:     "copy DISK TARGET",
		Aliases: []string{"block_copy"},
		Short:   "Copy a disk's image while its guest runs",
		Long: `Copy a disk's image to TARGET while its guest runs.

All blocks are copied once (stage bulk), then those that the guest wrote in the
meantime (dirty), until every write goes to both images (mirror). The guest goes
on with TARGET only after 'blkstream switch', or by itself with --switch auto.`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			req.Disk, req.Method, req.SwitchMode = args[0], method.value, switchMode.value
			req.OnSourceError, req.OnTargetError = onSource.value, onTarget.value
			req.Speed, req.Granularity = speed.value, granularity.value
			req.ClusterSize, req.Compression, req.Preallocation = cluster.value, compression.value, preallocation.value
			var err error
			if req.Target, err = absPath(args[1]); err != nil {
				return err
			}
			if req.Base, err = absPath(req.Base); err != nil {
				return err
			}
			job, err := c.Copy(ctx, &req)
			if err != nil {
				return err
			}
			return a.jobStarted(ctx, c, job, wait, func(j *control.Job) bool {
				return j.State == stateReady && j.SwitchMode != "auto"
			})
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Format, "format", "", "`format` of TARGET: raw, qcow2, or with --method stream qcow2 or add-cow (default: the source's)")
	f.BoolVar(&req.Existing, "existing", false, "TARGET exists already and is overwritten; otherwise it must not exist")
	method.addTo(cmd, "method", "mirror: copy, then switch; stream: switch at once, then copy on read")
	f.StringVar(&req.Base, "base", "", "shared base: copy only what the chain holds above this `image`")
	switchMode.addTo(cmd, "switch", "stay mirrored until 'blkstream switch', or switch when ready")
	f.BoolVar(&req.Verify, "verify", false, "read both sides back and compare before the job may switch")
	f.Var(&speed, "speed", "limit in bytes per second (default: none)")
	f.Var(&granularity, "granularity", "unit in which guest writes are tracked (default: 64K)")
	onSource.addTo(cmd, "on-source-error", "stop: pause the job; report: fail it; enospc: pause if the disk is full, else fail (default: report)")
	onTarget.addTo(cmd, "on-target-error", "likewise, for errors of TARGET (default: enospc)")
	f.Var(&cluster, "cluster-size", "of a new qcow2 TARGET (default: 64K)")
	f.BoolVar(&req.LazyRefcounts, "lazy-refcounts", false, "of a new qcow2 TARGET: allow lazy reference counts")
	compression.addTo(cmd, "compression", "compress what is copied in the stage bulk into a new qcow2 TARGET")
	preallocation.addTo(cmd, "preallocation", "of a new TARGET; raw: off, falloc or full (default: off)")
	f.StringVar(&req.Id, "id", "", "`ID` of the job (default: the daemon's choice)")
	f.BoolVar(&wait, "wait", false, "wait until the job is ready to switch, or with --switch auto, completed")
	return cmd
}

// onlyTheEnd is for jobs that nobody has to do anything about.
func onlyTheEnd(*control.Job) bool { return false }

// jobStarted says that a job was started or, with wait, follows it until it is over or enough says so.
func (a *app) jobStarted(ctx context.Context, c *control.Client, job *control.Job, wait bool, enough func(*control.Job) bool) error {
	if !wait {
		err := a.say(toJSONJob(job), "job %s started; follow it with: blkstream job watch %s", job.Id, job.Id)
		if job.Message != "" && !a.json {
			fmt.Fprintln(a.out, job.Message)
		}
		return err
	}
	job, err := a.follow(ctx, c, job.Id, a.progress(a.err), enough)
	if a.json && job != nil {
		return errors.Join(a.printJSON(toJSONJob(job)), err)
	}
	if err == nil {
		a.printOutcome(job)
	}
	return err
}

// printOutcome says what a job that went well came to.
func (a *app) printOutcome(job *control.Job) {
	if job.State == stateReady {
		fmt.Fprintf(a.out, "job %s is ready: %s is mirrored to %s\n%s\n", job.Id, job.Disk, job.Target, job.Message)
		return
	}
	if job.Kind == "commit" || job.Kind == kindBackup {
		fmt.Fprintf(a.out, "job %s is %s\n", job.Id, job.State)
	} else {
		fmt.Fprintf(a.out, "job %s is %s: %s uses %s\n", job.Id, job.State, job.Disk, job.Target)
	}
	if job.Message != "" {
		fmt.Fprintln(a.out, job.Message)
	}
}

func (a *app) switchCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "switch JOB|DISK",
		Short:             "Finish a mirrored copy: the guest uses the target only",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.complete(diskIDs, jobIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			resp, err := c.Switch(ctx, &control.SwitchRequest{Target: args[0]})
			if ctx.Err() != nil {
				return errors.New("interrupted; the switch may still take place: see 'blkstream job list'")
			}
			if err != nil {
				return err
			}
			job := resp.GetJob()
			if err := failure(job); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(jsonSwitch{Job: toJSONJob(job), Message: resp.Message})
			}
			fmt.Fprintf(a.out, "%s uses %s now\n", job.GetDisk(), job.GetTarget())
			if resp.Message != "" {
				fmt.Fprintln(a.out, resp.Message)
			}
			return nil
		}),
	}
}
