// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
)

// States and stages of jobs, as in control.proto.
const (
	stateRunning   = "running"
	stateReady     = "ready"
	statePaused    = "paused"
	stateCompleted = "completed"
	stateFailed    = "failed"
	stateCancelled = "cancelled"

	stageBulk  = "bulk"
	stageDirty = "dirty"
)

func (a *app) jobCmd() *cobra.Command {
	return a.group(&cobra.Command{Use: "job", Short: "List, follow and steer jobs"},
		&cobra.Command{
			Use:   "list",
			Short: "List the jobs, finished ones until they are dismissed",
			Args:  cobra.NoArgs,
			RunE: a.with(func(ctx context.Context, c *control.Client, _ []string) error {
				resp, err := c.JobList(ctx, &control.JobListRequest{})
				if err != nil {
					return err
				}
				return a.printJobs(resp.Jobs)
			}),
		},
		a.oneJob("show", "Show a job", func(ctx context.Context, c *control.Client, id string) error {
			job, err := c.JobShow(ctx, &control.JobShowRequest{Id: id})
			if err != nil {
				return err
			}
			return a.printJob(job)
		}),
		a.oneJob("watch", "Follow a job to its end", func(ctx context.Context, c *control.Client, id string) error {
			show := a.progress(a.out)
			if a.json {
				show = jsonProgress{a}
			}
			job, err := a.follow(ctx, c, id, show, func(*control.Job) bool { return false })
			if err == nil && !a.json {
				a.printOutcome(job)
			}
			return err
		}),
		a.oneJob("pause", "Stop copying for a while", func(ctx context.Context, c *control.Client, id string) error {
			return a.sayState(c.JobPause(ctx, &control.JobPauseRequest{Id: id}))
		}),
		a.oneJob("resume", "Let a paused job go on", func(ctx context.Context, c *control.Client, id string) error {
			return a.sayState(c.JobResume(ctx, &control.JobResumeRequest{Id: id}))
		}),
		a.oneJob("cancel", "Give a job up; the guest stays on its source", func(ctx context.Context, c *control.Client, id string) error {
			return a.sayState(c.JobCancel(ctx, &control.JobCancelRequest{Id: id}))
		}),
		a.jobSpeedCmd(),
		a.oneJob("dismiss", "Forget a job that has ended", func(ctx context.Context, c *control.Client, id string) error {
			if _, err := c.JobDismiss(ctx, &control.JobDismissRequest{Id: id}); err != nil {
				return err
			}
			return a.say(jsonID{id}, "job %s dismissed", id)
		}),
	)
}

func (a *app) oneJob(name, short string, fn func(ctx context.Context, c *control.Client, id string) error) *cobra.Command {
	return &cobra.Command{
		Use:               name + " JOB",
		Short:             short,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.complete(jobIDs),
		RunE: a.with(func(ctx context.Context, c *control.Client, args []string) error {
			return fn(ctx, c, args[0])
		}),
	}
}

func (a *app) jobSpeedCmd() *cobra.Command {
	return &cobra.Command{
		Use:               "speed JOB RATE",
		Short:             "Limit a job to RATE bytes per second; 0 lifts the limit",
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.complete(jobIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			rate, err := config.ParseSize(args[1])
			if err != nil {
				return &usageError{err}
			}
			return a.with(func(ctx context.Context, c *control.Client, args []string) error {
				job, err := c.JobSpeed(ctx, &control.JobSpeedRequest{Id: args[0], Speed: rate})
				if err != nil {
					return err
				}
				return a.say(toJSONJob(job), "job %s: limit %s", job.Id, humanLimit(job.Speed))
			})(cmd, args)
		},
	}
}

func (a *app) sayState(job *control.Job, err error) error {
	if err != nil {
		return err
	}
	return a.say(toJSONJob(job), "job %s: %s", job.Id, job.State)
}

// follow shows a job until it ends, or until enough says so, and returns it as
// it was then. A job that failed or was cancelled is an error as well.
func (a *app) follow(ctx context.Context, c *control.Client, id string, show progress, enough func(*control.Job) bool) (*control.Job, error) {
	defer show.stop()
	watch, err := c.JobWatch(ctx, &control.JobWatchRequest{Id: id})
	for err == nil {
		var ev *control.JobEvent
		if ev, err = watch.Recv(); err != nil {
			break
		}
		job := ev.GetJob()
		if job == nil {
			return nil, errors.New("blkstreamd sent an event without a job")
		}
		show.update(job)
		if err := failure(job); err != nil {
			return job, err
		}
		if job.State == stateCompleted || enough(job) {
			return job, nil
		}
	}
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("interrupted; job %s goes on: 'blkstream job watch %s' follows it, 'blkstream job cancel %s' ends it", id, id, id)
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("blkstreamd stopped reporting on job %s", id)
	default:
		return nil, err
	}
}

// failure turns a job that ended badly into an error.
func failure(job *control.Job) error {
	switch job.GetState() {
	case stateFailed, stateCancelled:
		return &jobError{job.GetId(), job.GetState(), job.GetError(), job.GetMessage()}
	default:
		return nil
	}
}
