// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/blkstream/blkstream/copy/control"
)

func (f *fakeDaemon) Snapshot(_ context.Context, r *control.SnapshotRequest) (*control.SnapshotResponse, error) {
	f.last = r
	res := &control.SnapshotResponse{PausedMs: 1.25, TakenAt: "2026-11-24T12:00:00.123456789Z"}
	for _, d := range r.Disks {
		if d.Disk != "disk0" && d.Disk != "disk1" {
			return nil, control.Errorf(control.ErrNotFound, "no disk %q", d.Disk)
		}
		res.Taken = append(res.Taken, &control.SnapshotTaken{Disk: d.Disk, Overlay: d.Overlay, Backing: "/images/a.img", Message: "change line 4"})
	}
	return res, nil
}

func TestSnapshotCommand(t *testing.T) {
	f := &fakeDaemon{}
	serve(t, f)
	for _, tc := range []struct {
		args           []string
		status         int
		stdout, stderr string // contained
	}{
		{
			args: []string{"snapshot", "disk0=/o0", "disk1=/o=1", "--existing"},
			stdout: "disk0 uses /o0 now, over /images/a.img\nchange line 4\n" +
				"disk1 uses /o=1 now, over /images/a.img\nchange line 4\nthe guests were paused for 1.2 ms\n",
		},
		{
			args: []string{"--json", "snapshot", "disk0=/o0"},
			stdout: `{"paused_ms":1.25,"taken":[{"disk":"disk0","overlay":"/o0","backing":"/images/a.img","message":"change line 4"}],"taken_at":"2026-11-24T12:00:00.123456789Z"}` +
				"\n",
		},
		{
			args: []string{"snapshot", "disk0=/o0", "--freeze-hint"},
			stdout: "disk0 uses /o0 now, over /images/a.img\nchange line 4\nthe guests were paused for 1.2 ms\n" +
				"the disks are as they were at 2026-11-24T12:00:00.123456789Z: file systems inside are as after a crash,\n" +
				"unless the guests had frozen them (guest agent: fsfreeze)\n",
		},
		{args: []string{"snapshot", "nope=/o"}, status: 1, stderr: `no disk "nope"`},
		{args: []string{"snapshot", "disk0"}, status: 2, stderr: `"disk0": DISK=OVERLAY is wanted`},
		{args: []string{"snapshot", "disk0="}, status: 2, stderr: "DISK=OVERLAY"},
		{args: []string{"snapshot"}, status: 2},
		{args: []string{"snapshot", "disk0=/o", "--format", "raw"}, status: 2, stderr: "want one of qcow2"},
	} {
		f.last = nil
		status, stdout, stderr := runCLI(t.Context(), tc.args...)
		if status != tc.status || stdout != tc.stdout || !strings.Contains(stderr, tc.stderr) {
			t.Errorf("%q: status %d\n%s%s", tc.args, status, stdout, stderr)
		}
		if tc.status != 2 {
			continue
		}
		if f.last != nil {
			t.Errorf("%q reached the daemon", tc.args)
		}
	}
	runCLI(t.Context(), "snapshot", "disk0=/o0", "disk1=/o=1", "--existing")
	want := &control.SnapshotRequest{Format: "qcow2", Existing: true, Disks: []*control.SnapshotDisk{{Disk: "disk0", Overlay: "/o0"}, {Disk: "disk1", Overlay: "/o=1"}}}
	if !proto.Equal(f.last, want) {
		t.Errorf("asked for %v, want %v", f.last, want)
	}
}

func TestCommitCommand(t *testing.T) {
	completed := fakeJob(func(j *control.Job) {
		j.Kind, j.State, j.Message = "commit", "completed", "/o1: merged into /o0 and not used any more"
	})
	f := &fakeDaemon{}
	serve(t, f)
	for _, tc := range []struct {
		args           []string
		events         []*control.Job
		status         int
		stdout, stderr string // stderr: contained
	}{
		{args: []string{"commit", "disk0"}, stdout: "job copy-1 started; follow it with: blkstream job watch copy-1\n"},
		{
			args: []string{"commit", "disk0", "--wait"}, events: []*control.Job{state("running"), state("ready"), completed},
			stdout: "job copy-1 is completed\n/o1: merged into /o0 and not used any more\n",
		},
		{args: []string{"commit", "disk0", "--wait"}, events: []*control.Job{state("cancelled")}, status: 3, stderr: "job copy-1: cancelled"},
		{args: []string{"commit", "nope"}, status: 1, stderr: `no disk "nope"`},
		{args: []string{"commit"}, status: 2},
		{args: []string{"commit", "disk0", "--speed", "x"}, status: 2, stderr: `bad size "x"`},
	} {
		f.events = tc.events
		status, stdout, stderr := runCLI(t.Context(), tc.args...)
		if status != tc.status || stdout != tc.stdout || !strings.Contains(stderr, tc.stderr) {
			t.Errorf("%q: status %d\n%s%s", tc.args, status, stdout, stderr)
		}
	}
	runCLI(t.Context(), "commit", "disk0", "--top", "/o1", "--base", "/o0", "--speed", "1M", "--id", "j")
	want := &control.CommitRequest{Disk: "disk0", Top: "/o1", Base: "/o0", Speed: 1 << 20, Id: "j"}
	if !proto.Equal(f.last, want) {
		t.Errorf("asked for %v, want %v", f.last, want)
	}
}

func (f *fakeDaemon) Commit(_ context.Context, r *control.CommitRequest) (*control.Job, error) {
	if _, err := f.disk(r, r.Disk); err != nil {
		return nil, err
	}
	return fakeJob(nil), nil
}

func (f *fakeDaemon) Backup(_ context.Context, r *control.BackupRequest) (*control.Job, error) {
	if _, err := f.disk(r, r.Disk); err != nil {
		return nil, err
	}
	return fakeJob(func(j *control.Job) { j.Kind, j.Stage, j.Bitmap, j.OnCbwError = "backup", "backup", "b", "hold" }), nil
}
