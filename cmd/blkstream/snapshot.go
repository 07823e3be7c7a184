// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/copy/control"
)

type jsonSnapshot struct {
	PausedMs float64     `json:"paused_ms"`
	Taken    []jsonTaken `json:"taken"`
	TakenAt  string      `json:"taken_at"`
}

type jsonTaken struct {
	Disk    string `json:"disk"`
	Overlay string `json:"overlay"`
	Backing string `json:"backing"`
	Message string `json:"message"`
}

func (a *app) snapshotCmd() *cobra.Command {
	var (
		req  control.SnapshotRequest
		hint bool
	)
	format := choice{value: "qcow2", from: []string{"qcow2"}}
	cmd := &cobra.Command{
		Use:   "snapshot DISK=OVERLAY ...",
		Short: "Keep what disks hold now: their guests go on with overlays",
		Long: `Put a new, empty overlay over the image of each of the disks, all at the same
instant and while the guests run. What the disks held then stays in their old
images, which do not change any more. It happens to all of the disks or to none.`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.complete(diskIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, arg := range args {
				disk, overlay, ok := strings.Cut(arg, "=")
				if !ok || disk == "" || overlay == "" {
					return &usageError{fmt.Errorf("%q: DISK=OVERLAY is wanted", arg)}
				}
				path, err := absPath(overlay)
				if err != nil {
					return err
				}
				req.Disks = append(req.Disks, &control.SnapshotDisk{Disk: disk, Overlay: path})
			}
			req.Format = format.value
			return a.with(func(ctx context.Context, c *control.Client, _ []string) error {
				resp, err := c.Snapshot(ctx, &req)
				if err != nil {
					return err
				}
				return a.printSnapshot(resp, hint)
			})(cmd, args)
		},
	}
	format.addTo(cmd, "format", "format of the overlays")
	cmd.Flags().BoolVar(&req.Existing, "existing", false, "the overlays exist already, empty and over the disks' images; otherwise they must not exist")
	cmd.Flags().BoolVar(&hint, "freeze-hint", false, "say at what point in time the guests were paused, and what that means for file systems")
	return cmd
}

func (a *app) printSnapshot(r *control.SnapshotResponse, hint bool) error {
	if a.json {
		doc := jsonSnapshot{PausedMs: r.PausedMs, Taken: []jsonTaken{}, TakenAt: r.TakenAt}
		for _, t := range r.Taken {
			doc.Taken = append(doc.Taken, jsonTaken{t.Disk, t.Overlay, t.Backing, t.Message})
		}
		return a.printJSON(doc)
	}
	for _, t := range r.Taken {
		fmt.Fprintf(a.out, "%s uses %s now, over %s\n", t.Disk, t.Overlay, t.Backing)
		if t.Message != "" {
			fmt.Fprintln(a.out, t.Message)
		}
	}
	if _, err := fmt.Fprintf(a.out, "the guests were paused for %.1f ms\n", r.PausedMs); err != nil || !hint {
		return err
	}
	_, err := fmt.Fprintf(a.out, "the disks are as they were at %s: file systems inside are as after a crash,\n"+
		"unless the guests had frozen them (guest agent: fsfreeze)\n", r.TakenAt)
	return err
}
