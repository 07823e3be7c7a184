// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/vbauerster/mpb/v8"

	"github.com/blkstream/blkstream/copy/control"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// fakeDaemon has one disk and one job, records the last request, and plays
// events to whoever watches.
type fakeDaemon struct {
	last    proto.Message
	events  []*control.Job
	hang    chan struct{} // JobWatch closes it after the events, then waits for the client to go
	swState string        // state of the job after a switch
}

func fakeDisk() *control.Disk {
	return &control.Disk{
		Id: "disk0", Image: "/images/new.img", Format: "raw", ConfiguredImage: "/images/a.img",
		Socket: "/run/disk0.sock", Size: 10 << 30, Queues: 2, QueueSize: 256, Cache: "none", BlockSize: 512,
		Serial: "s0", State: "connected", Warning: "change line 4", Graph: "raw\n  file /images/new.img\n",
		Jobs: []string{"copy-1"},
		Chain: []*control.ChainImage{
			{
				Image: "/images/new.img", Format: "qcow2", Size: 10 << 30, Allocated: 5 << 20,
				Jobs: []*control.ChainJob{{Id: "copy-1", Kind: "copy", Role: "source", Target: "/images/b.img"}},
			},
			{Image: "/images/base.img", Format: "raw", Size: 1 << 30, Allocated: -1},
		},
		Stats: &control.DiskStats{Reads: 1, Writes: 2, Flushes: 3, BytesRead: 4096, BytesWritten: 8192, Errors: 4},
	}
}

func fakeJob(change func(*control.Job)) *control.Job {
	j := &control.Job{
		Id: "copy-1", Kind: "copy", Disk: "disk0", Source: "/images/a.img", Target: "/images/b.img", Format: "raw",
		Method: "mirror", Stage: "bulk", State: "running", BytesDone: 3 << 30, BytesTotal: 10 << 30,
		Rate: 512 << 20, DirtyRate: 20 << 20, EtaSeconds: 14, Converging: true, Granularity: 65536,
		StartedMs: 1700000000000, SwitchMode: "manual", OnSourceError: "stop", OnTargetError: "enospc",
	}
	if change != nil {
		change(j)
	}
	return j
}

func (f *fakeDaemon) disk(req proto.Message, id string) (*control.Disk, error) {
	f.last = req
	if id != "disk0" {
		return nil, control.Errorf(control.ErrNotFound, "no disk %q", id)
	}
	return fakeDisk(), nil
}

func (f *fakeDaemon) job(req proto.Message, id, state string) (*control.Job, error) {
	f.last = req
	if id != "copy-1" {
		return nil, control.Errorf(control.ErrNotFound, "no job %q", id)
	}
	return fakeJob(func(j *control.Job) { j.State = state }), nil
}

func (f *fakeDaemon) DiskList(context.Context, *control.DiskListRequest) (*control.DiskListResponse, error) {
	return &control.DiskListResponse{Disks: []*control.Disk{fakeDisk(), {Id: "disk1", State: "idle", Size: 1}}}, nil
}

func (f *fakeDaemon) DiskShow(_ context.Context, r *control.DiskShowRequest) (*control.Disk, error) {
	return f.disk(r, r.Id)
}

func (f *fakeDaemon) DiskAdd(_ context.Context, r *control.DiskAddRequest) (*control.Disk, error) {
	f.last = r
	return fakeDisk(), nil
}

func (f *fakeDaemon) DiskRemove(_ context.Context, r *control.DiskRemoveRequest) (*control.DiskRemoveResponse, error) {
	_, err := f.disk(r, r.Id)
	return &control.DiskRemoveResponse{}, err
}

func (f *fakeDaemon) DiskResize(_ context.Context, r *control.DiskResizeRequest) (*control.Disk, error) {
	d, err := f.disk(r, r.Id)
	if err == nil {
		d.Size = r.Size
	}
	return d, err
}

func (f *fakeDaemon) DiskSet(_ context.Context, r *control.DiskSetRequest) (*control.Disk, error) {
	d, err := f.disk(r, r.Id)
	if err == nil {
		d.CopyOnRead = *r.CopyOnRead
	}
	return d, err
}

func (f *fakeDaemon) Copy(_ context.Context, r *control.CopyRequest) (*control.Job, error) {
	if _, err := f.disk(r, r.Disk); err != nil {
		return nil, err
	}
	return fakeJob(func(j *control.Job) {
		if r.Target == "/c.img" {
			j.Message = "not copied: 1 internal snapshots"
		}
	}), nil
}

func (f *fakeDaemon) Stream(_ context.Context, r *control.StreamRequest) (*control.Job, error) {
	if _, err := f.disk(r, r.Disk); err != nil {
		return nil, err
	}
	return fakeJob(func(j *control.Job) { j.Kind, j.Stage = "stream", "stream" }), nil
}

func (f *fakeDaemon) Switch(_ context.Context, r *control.SwitchRequest) (*control.SwitchResponse, error) {
	f.last = r
	if r.Target != "disk0" && r.Target != "copy-1" {
		return nil, control.Errorf(control.ErrNotFound, "no disk or job %q", r.Target)
	}
	return &control.SwitchResponse{
		Job:     fakeJob(func(j *control.Job) { j.State, j.Stage, j.Error = f.swState, "switch", "oops" }),
		Message: `b.toml:4: change image to "/images/b.img"`,
	}, nil
}

func (f *fakeDaemon) JobList(context.Context, *control.JobListRequest) (*control.JobListResponse, error) {
	return &control.JobListResponse{Jobs: []*control.Job{fakeJob(nil), fakeJob(func(j *control.Job) {
		j.Id, j.State, j.Error = "copy-2", "failed", "disk on fire"
	})}}, nil
}

func (f *fakeDaemon) JobShow(_ context.Context, r *control.JobShowRequest) (*control.Job, error) {
	return f.job(r, r.Id, "running")
}

func (f *fakeDaemon) JobWatch(ctx context.Context, r *control.JobWatchRequest, s control.Control_JobWatchServer) error {
	if _, err := f.job(r, r.Id, ""); err != nil {
		return err
	}
	for _, j := range f.events {
		if err := s.Send(&control.JobEvent{Job: j}); err != nil {
			return err
		}
	}
	if f.hang != nil {
		close(f.hang)
		<-ctx.Done()
	}
	return nil
}

func (f *fakeDaemon) JobPause(_ context.Context, r *control.JobPauseRequest) (*control.Job, error) {
	return f.job(r, r.Id, "paused")
}

func (f *fakeDaemon) JobResume(_ context.Context, r *control.JobResumeRequest) (*control.Job, error) {
	return f.job(r, r.Id, "running")
}

func (f *fakeDaemon) JobCancel(_ context.Context, r *control.JobCancelRequest) (*control.Job, error) {
	return f.job(r, r.Id, "cancelled")
}

func (f *fakeDaemon) JobSpeed(_ context.Context, r *control.JobSpeedRequest) (*control.Job, error) {
	j, err := f.job(r, r.Id, "running")
	if err == nil {
		j.Speed = r.Speed
	}
	return j, err
}

func (f *fakeDaemon) JobDismiss(_ context.Context, r *control.JobDismissRequest) (*control.JobDismissResponse, error) {
	_, err := f.job(r, r.Id, "")
	return &control.JobDismissResponse{}, err
}

func (f *fakeDaemon) Version(context.Context, *control.VersionRequest) (*control.VersionResponse, error) {
	return &control.VersionResponse{Version: "1.2"}, nil
}

// serve starts a fake daemon and points $BLKSTREAM_SOCKET to it.
func serve(t *testing.T, f *fakeDaemon) string {
	t.Helper()
	srv, err := control.NewServer(f)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(context.Background(), l) // always ErrServerClosed
	}()
	t.Cleanup(func() { srv.Close(); <-done })
	t.Setenv("BLKSTREAM_SOCKET", path)
	return path
}

func runCLI(ctx context.Context, args ...string) (status int, stdout, stderr string) {
	var out, err bytes.Buffer
	status = newApp(&out, &err).run(ctx, args)
	return status, out.String(), err.String()
}

func state(s string) *control.Job { return fakeJob(func(j *control.Job) { j.State = s }) }

func TestExitStatus(t *testing.T) {
	for _, tc := range []struct {
		args   string
		events []*control.Job
		status int
		stdout string // contained
		stderr string // contained
	}{
		{args: "disk list", stdout: "disk0", stderr: "warning: disk0: change line 4"},
		{args: "disk show disk0", stdout: "file /images/new.img"},
		{args: "disk show nope", status: 1, stderr: `blkstream: no disk "nope"`},
		{args: "disk remove disk0", stdout: "disk disk0 removed\n"},
		{args: "disk resize disk0 20G", stdout: "disk disk0 has 20 GiB now\n"},
		{args: "disk set disk0 --copy-on-read on", stdout: "disk disk0: copy on read is on\n"},
		{args: "disk set disk0 --copy-on-read=off", stdout: "disk disk0: copy on read is off\n"},
		{args: "disk set disk0", status: 2, stderr: `required flag(s) "copy-on-read" not set`},
		{args: "disk set disk0 --copy-on-read", status: 2},
		{args: "disk set disk0 --copy-on-read maybe", status: 2, stderr: "want one of on, off"},
		{args: "disk resize disk0 20X", status: 2, stderr: `bad size "20X"`},
		{args: "disk resize disk0", status: 2, stderr: "accepts 2 arg(s)"},
		{args: "disk add --id a", status: 2, stderr: `required flag(s) "format", "image", "socket" not set`},
		{args: "disk add --id a --image /i --format raw --socket /s --cache x", status: 2, stderr: "want one of none, writeback"},
		{args: "disk add --id a --image /i --format raw --socket /s --block-size 8G", status: 2, stderr: "too large"},
		{args: "disk add --id a --image /i --format raw --socket /s", stdout: "disk disk0 added\n"},
		{args: "disk", status: 2, stderr: "See 'blkstream disk --help'"},
		{args: "disk frob", status: 2, stderr: `unknown command "frob"`},
		{args: "frob", status: 2, stderr: `unknown command "frob"`},
		{args: "", status: 2},
		{args: "--frob", status: 2, stderr: "unknown flag: --frob"},
		{args: "--help", stdout: "Copy, move and convert"},
		{args: "job list", stdout: "copy-1", stderr: "copy-2: failed: disk on fire"},
		{args: "job show copy-1", stdout: "30%, 3 GiB of 10 GiB"},
		{args: "job show nope", status: 1, stderr: `no job "nope"`},
		{args: "job pause copy-1", stdout: "job copy-1: paused\n"},
		{args: "job resume copy-1", stdout: "job copy-1: running\n"},
		{args: "job cancel copy-1", stdout: "job copy-1: cancelled\n"},
		{args: "job speed copy-1 50M", stdout: "job copy-1: limit 50 MiB/s\n"},
		{args: "job speed copy-1 0", stdout: "job copy-1: limit none\n"},
		{args: "job speed copy-1 -1", status: 2},
		{args: "job dismiss copy-1", stdout: "job copy-1 dismissed\n"},
		{args: "job watch copy-1", events: []*control.Job{state("running"), state("ready"), state("completed")}, stdout: "job copy-1 is completed: disk0 uses /images/b.img"},
		{args: "job watch copy-1", events: []*control.Job{state("cancelled")}, status: 3, stderr: "job copy-1: cancelled"},
		{args: "job watch copy-1", events: []*control.Job{state("running")}, status: 1, stderr: "stopped reporting"},
		{args: "job watch nope", status: 1, stderr: `no job "nope"`},
		{args: "copy disk0 /b.img", stdout: "job copy-1 started; follow it with: blkstream job watch copy-1\n"},
		{args: "block_copy disk0 /b.img", stdout: "job copy-1 started"},
		{args: "stream disk0", stdout: "job copy-1 started; follow it with: blkstream job watch copy-1\n"},
		{args: "stream nope --wait", status: 1, stderr: `no disk "nope"`},
		{args: "stream disk0 --wait", events: []*control.Job{state("running"), state("completed")}, stdout: "job copy-1 is completed"},
		{args: "stream disk0 --wait", events: []*control.Job{state("failed")}, status: 3, stderr: "blkstream: job copy-1: failed"},
		{args: "copy nope /b.img --wait", status: 1, stderr: `no disk "nope"`},
		{args: "copy disk0", status: 2},
		{args: "copy disk0 /b.img --switch never", status: 2, stderr: "want one of manual, auto"},
		{args: "copy disk0 /b.img --on-target-error ignore", status: 2, stderr: "want one of stop, report, enospc"},
		{args: "copy disk0 /b.img --speed fast", status: 2, stderr: `bad size "fast"`},
		{args: "copy disk0 /c.img", stdout: "job watch copy-1\nnot copied: 1 internal snapshots\n"},
		{args: "copy disk0 /b.img --wait", events: []*control.Job{state("running"), state("paused"), fakeJob(func(j *control.Job) {
			j.State, j.Message = "ready", "finish with: blkstream switch disk0; not copied: 1 internal snapshots"
		})}, stdout: "is mirrored to /images/b.img\nfinish with: blkstream switch disk0; not copied: 1 internal snapshots\n", stderr: "copy-1: bulk 30%"},
		{args: "copy disk0 /b.img --wait", events: []*control.Job{state("failed")}, status: 3, stderr: "blkstream: job copy-1: failed"},
		{args: "copy disk0 /b.img --wait --switch auto", events: []*control.Job{
			fakeJob(func(j *control.Job) { j.State, j.SwitchMode = "ready", "auto" }),
			fakeJob(func(j *control.Job) { j.State, j.SwitchMode, j.Message = "completed", "auto", "change line 4" }),
		}, stdout: "job copy-1 is completed: disk0 uses /images/b.img\nchange line 4\n"},
		{args: "switch disk0", stdout: "disk0 uses /images/b.img now\nb.toml:4: change image"},
		{args: "switch nope", status: 1, stderr: `no disk or job "nope"`},
		{args: "version", stdout: "blkstream devel\nblkstreamd 1.2\n"},
		{args: "completion bash", stdout: "bash completion"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			serve(t, &fakeDaemon{events: tc.events, swState: "completed"})
			status, out, errs := runCLI(t.Context(), strings.Fields(tc.args)...)
			if status != tc.status || !strings.Contains(out, tc.stdout) || !strings.Contains(errs, tc.stderr) {
				t.Errorf("status %d, want %d\nstdout: %s\nstderr: %s", status, tc.status, out, errs)
			}
		})
	}
}

func TestSwitchFailed(t *testing.T) {
	serve(t, &fakeDaemon{swState: "failed"})
	if status, _, errs := runCLI(t.Context(), "switch", "copy-1"); status != exitJob || !strings.Contains(errs, "failed: oops") {
		t.Errorf("status %d: %s", status, errs)
	}
}

func TestNoDaemon(t *testing.T) {
	t.Setenv("BLKSTREAM_SOCKET", "")
	status, _, errs := runCLI(t.Context(), "--socket", "/nonexistent/s", "disk", "list")
	if status != exitFailed || !strings.Contains(errs, "is blkstreamd running? looked for /nonexistent/s; use --socket or $BLKSTREAM_SOCKET") {
		t.Errorf("status %d: %s", status, errs)
	}
	status, out, errs := runCLI(t.Context(), "--socket", "/nonexistent/s", "version")
	if status != exitFailed || out != "blkstream devel\n" {
		t.Errorf("version: status %d: %s%s", status, out, errs)
	}
}

// What is on the command line arrives in the request.
func TestRequests(t *testing.T) {
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	yes, no := true, false
	poll := func(us uint32) *uint32 { return &us }
	for _, tc := range []struct {
		args string
		want proto.Message
	}{
		{
			"copy disk0 b.img",
			&control.CopyRequest{Disk: "disk0", Target: cwd + "/b.img", SwitchMode: "manual", Method: "mirror"},
		},
		{
			"copy disk0 nbd://h/x --format qcow2 --existing --method stream --base /base --switch auto --verify " +
				"--speed 50M --granularity 64K --on-source-error report --on-target-error enospc --id j " +
				"--cluster-size 128K --lazy-refcounts --compression zstd --preallocation metadata",
			&control.CopyRequest{
				Disk: "disk0", Target: "nbd://h/x", Format: "qcow2", Existing: true, Method: "stream", Base: "/base",
				SwitchMode: "auto", Verify: true, Speed: 50 << 20, Granularity: 65536,
				OnSourceError: "report", OnTargetError: "enospc", Id: "j",
				ClusterSize: 128 << 10, LazyRefcounts: true, Compression: "zstd", Preallocation: "metadata",
			},
		},
		{
			"--socket CONTROL disk add --id a --image a.img --format raw --socket s",
			&control.DiskAddRequest{
				Id: "a", Image: cwd + "/a.img", Format: "raw", Socket: cwd + "/s",
				Queues: 1, QueueSize: 256, Cache: "none", BlockSize: 512, Discard: &yes, PollUs: poll(32),
			},
		},
		{
			"disk add --id a --image /a.img --format raw --socket /run/a.sock --read-only --queues 4 --queue-size 128 " +
				"--cache writeback --block-size 4K --serial x --discard=false --poll-us 0 --copy-on-read",
			&control.DiskAddRequest{
				Id: "a", Image: "/a.img", Format: "raw", Socket: "/run/a.sock", ReadOnly: true, Queues: 4, QueueSize: 128,
				Cache: "writeback", BlockSize: 4096, Serial: "x", Discard: &no, PollUs: poll(0), CopyOnRead: true,
			},
		},
		{"disk resize disk0 3G --socket CONTROL", &control.DiskResizeRequest{Id: "disk0", Size: 3 << 30}},
		{"disk set disk0 --copy-on-read on", &control.DiskSetRequest{Id: "disk0", CopyOnRead: &yes}},
		{"disk set disk0 --copy-on-read off", &control.DiskSetRequest{Id: "disk0", CopyOnRead: &no}},
		{"stream disk0", &control.StreamRequest{Disk: "disk0"}},
		{
			"stream disk0 --base /base --speed 1M --on-source-error stop --on-target-error report --id s",
			&control.StreamRequest{Disk: "disk0", Base: "/base", Speed: 1 << 20, OnSourceError: "stop", OnTargetError: "report", Id: "s"},
		},
		{"backup disk0 /t", &control.BackupRequest{Disk: "disk0", Target: "/t", OnCbwError: "break"}},
		{
			"backup disk0 t --format qcow2 --bitmap b --base base --base-format raw --cluster-size 1M --speed 1M --cbw-timeout 5 " +
				"--on-source-error stop --on-target-error report --id j",
			&control.BackupRequest{
				Disk: "disk0", Target: cwd + "/t", Format: "qcow2", Bitmap: "b", Base: cwd + "/base", BaseFormat: "raw",
				ClusterSize: 1 << 20, Speed: 1 << 20, CbwTimeout: 5, OnCbwError: "break", OnSourceError: "stop", OnTargetError: "report", Id: "j",
			},
		},
		{
			"backup disk0 /t --existing --format raw --bitmap b --full --on-cbw-error hold",
			&control.BackupRequest{Disk: "disk0", Target: "/t", Existing: true, Format: "raw", Bitmap: "b", Full: true, OnCbwError: "hold"},
		},
		{"job speed copy-1 1M", &control.JobSpeedRequest{Id: "copy-1", Speed: 1 << 20}},
		{"job cancel copy-1", &control.JobCancelRequest{Id: "copy-1"}},
		{"switch copy-1", &control.SwitchRequest{Target: "copy-1"}},
	} {
		t.Run(tc.args, func(t *testing.T) {
			f := &fakeDaemon{swState: "completed"}
			path := serve(t, f)
			if strings.Contains(tc.args, "CONTROL") {
				t.Setenv("BLKSTREAM_SOCKET", "/nonexistent/s")
			}
			status, _, errs := runCLI(t.Context(), strings.Fields(strings.ReplaceAll(tc.args, "CONTROL", path))...)
			if status != exitDone || !proto.Equal(f.last, tc.want) {
				t.Errorf("status %d: %s\n got %v\nwant %v", status, errs, f.last, tc.want)
			}
		})
	}
}

// The JSON of every command; scripts rely on keys and types.
func TestJSONGolden(t *testing.T) {
	var all bytes.Buffer
	for _, args := range []string{
		"disk list", "disk show disk0", "disk remove disk0", "disk resize disk0 1G", "disk set disk0 --copy-on-read on",
		"disk add --id a --image /i --format raw --socket /s",
		"copy disk0 /b.img", "copy disk0 /b.img --wait", "backup disk0 /b.img", "switch disk0",
		"job list", "job show copy-1", "job watch copy-1", "job pause copy-1", "job resume copy-1",
		"job cancel copy-1", "job speed copy-1 1M", "job dismiss copy-1", "version",
	} {
		serve(t, &fakeDaemon{swState: "completed", events: []*control.Job{state("running"), state("ready"), state("completed")}})
		status, out, errs := runCLI(t.Context(), append([]string{"--json"}, strings.Fields(args)...)...)
		if status != exitDone {
			t.Fatalf("%s: status %d: %s", args, status, errs)
		}
		for line := range strings.Lines(out) {
			if !json.Valid([]byte(line)) {
				t.Errorf("%s: not a document: %s", args, line)
			}
		}
		fmt.Fprintf(&all, "$ blkstream --json %s\n%s", args, out)
	}
	golden := filepath.Join("testdata", "json.golden")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, all.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(all.Bytes(), want) {
		t.Errorf("differs from %s (run with -update if it should):\n%s", golden, all.Bytes())
	}
}

// An empty list is [] for scripts.
func TestJSONEmpty(t *testing.T) {
	var out bytes.Buffer
	a := newApp(&out, io.Discard)
	a.json = true
	if err := a.printDisks(nil); err != nil || out.String() != "[]\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
	out.Reset()
	if err := a.printJobs(nil); err != nil || out.String() != "[]\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// A failed job is still printed for scripts that wait with --json.
func TestJSONFailed(t *testing.T) {
	serve(t, &fakeDaemon{events: []*control.Job{state("failed")}})
	status, out, _ := runCLI(t.Context(), "--json", "copy", "disk0", "/b.img", "--wait")
	var job jsonJob
	if err := json.Unmarshal([]byte(out), &job); err != nil || status != exitJob || job.State != "failed" {
		t.Errorf("status %d, %v: %s", status, err, out)
	}
}

func TestInterrupted(t *testing.T) {
	f := &fakeDaemon{events: []*control.Job{state("running")}, hang: make(chan struct{})}
	serve(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-f.hang; cancel() }()
	status, _, errs := runCLI(ctx, "copy", "disk0", "/b.img", "--wait")
	if status != exitFailed || !strings.Contains(errs, "interrupted; job copy-1 goes on: 'blkstream job watch copy-1' follows it") {
		t.Errorf("status %d: %s", status, errs)
	}
}

func TestCompletion(t *testing.T) {
	serve(t, &fakeDaemon{})
	for args, want := range map[string]string{
		"disk show ":             "disk0\t/images/new.img\ndisk1\n",
		"copy ":                  "disk0\t/images/new.img\ndisk1\n",
		"job pause ":             "copy-1\tdisk0 running\ncopy-2\tdisk0 failed\n",
		"switch ":                "disk0\t/images/new.img\ndisk1\ncopy-1\tdisk0 running\ncopy-2\tdisk0 failed\n",
		"copy disk0 x --switch ": "manual\nauto\n",
	} {
		parts := strings.Split(args, " ")
		_, out, errs := runCLI(t.Context(), append([]string{"__complete"}, parts...)...)
		if !strings.HasPrefix(out, want+":") {
			t.Errorf("%q: got %q (%s)", args, out, errs)
		}
	}
}

func TestDescribe(t *testing.T) {
	for _, tc := range []struct {
		change func(*control.Job)
		want   string
	}{
		{nil, "bulk 30%, 3 GiB of 10 GiB, 14 s left, 512 MiB/s, guest dirties 20 MiB/s"},
		{func(j *control.Job) { j.EtaSeconds = -1 }, "bulk 30%, 3 GiB of 10 GiB, 512 MiB/s, guest dirties 20 MiB/s"},
		{
			func(j *control.Job) { j.Stage, j.Converging = "dirty", false },
			"dirty 30%, 3 GiB of 10 GiB, WILL NOT FINISH at this rate, 512 MiB/s, guest dirties 20 MiB/s",
		},
		{
			func(j *control.Job) { j.Converging, j.Speed, j.DirtyRate = false, 1, 0 },
			"bulk 30%, 3 GiB of 10 GiB, WILL NOT FINISH at this rate (blkstream job speed copy-1 RATE raises the limit), 512 MiB/s",
		},
		{
			func(j *control.Job) {
				j.State, j.Error, j.Message = "paused", "no space left", "make room, then resume"
			},
			"bulk 30%, 3 GiB of 10 GiB, paused; make room, then resume: no space left, guest dirties 20 MiB/s",
		},
		{
			func(j *control.Job) { j.Stage, j.State, j.BytesDone, j.Converging = "mirror", "ready", 10<<30, false },
			"mirror 100%, 10 GiB of 10 GiB, ready",
		},
		{
			func(j *control.Job) { j.State, j.Message = "ready", "finish with: blkstream switch disk0" },
			"bulk 30%, 3 GiB of 10 GiB, ready; finish with: blkstream switch disk0, guest dirties 20 MiB/s",
		},
		{
			func(j *control.Job) {
				j.Stage, j.Verify, j.VerifiedBytes, j.BytesDone = "mirror", true, 1<<30, 10<<30-1
			},
			"mirror 99%, 10 GiB of 10 GiB, 14 s left, 512 MiB/s, 1 GiB verified",
		},
		{
			func(j *control.Job) { j.BytesDone, j.BytesTotal, j.Rate, j.DirtyRate, j.EtaSeconds = 0, 0, 0, 0, -1 },
			"bulk 0%, 0 B of 0 B",
		},
	} {
		if got := describe(fakeJob(tc.change)); got != tc.want {
			t.Errorf("\n got %s\nwant %s", got, tc.want)
		}
	}
}

func TestLines(t *testing.T) {
	var out bytes.Buffer
	clock := time.Unix(0, 0)
	l := &lines{w: &out, now: func() time.Time { return clock }}
	for _, step := range []struct {
		after time.Duration
		job   *control.Job
		lines int
	}{
		{0, state("running"), 1},
		{time.Second, state("running"), 0},
		{8 * time.Second, state("running"), 0},
		{time.Second, state("running"), 1}, // ten seconds since the last one
		{time.Second, state("paused"), 1},
		{time.Second, state("running"), 1},
		{time.Second, fakeJob(func(j *control.Job) { j.Converging = false }), 1},
	} {
		clock = clock.Add(step.after)
		out.Reset()
		l.update(step.job)
		if got := strings.Count(out.String(), "\n"); got != step.lines {
			t.Errorf("at %v: %d lines: %s", clock.Unix(), got, out.String())
		}
	}
}

func TestBar(t *testing.T) {
	var out bytes.Buffer
	b := newBar(&out, mpb.WithWidth(80), mpb.WithAutoRefresh())
	b.update(fakeJob(nil))
	b.stop()
	picture := out.String()
	for _, want := range []string{"copy-1 bulk", "30% 3 GiB of 10 GiB", "14 s left, 512 MiB/s, guest dirties 20 MiB/s\n", "=>"} {
		if !strings.Contains(picture, want) {
			t.Errorf("%q is missing in:\n%s", want, picture)
		}
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 10 << 20: "10 MiB",
		1 << 40: "1 TiB", 1<<63 - 1: "8 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %s, want %s", n, got, want)
		}
	}
	for s, want := range map[int64]string{
		0: "0 s", 59: "59 s", 60: "1 min 0 s", 3599: "59 min 59 s", 7500: "2 h 5 min", 100 * 3600: "4 d 4 h",
	} {
		if got := humanDuration(s); got != want {
			t.Errorf("humanDuration(%d) = %s, want %s", s, got, want)
		}
	}
}

// The chain is drawn as a tree, and says in words what the jobs do with each image.
func TestChain(t *testing.T) {
	job := func(kind, role, target string) []*control.ChainJob {
		return []*control.ChainJob{{Id: "j", Kind: kind, Role: role, Target: target}}
	}
	chain := []*control.ChainImage{
		{Image: "/top", Format: "qcow2", Size: 1 << 30, Allocated: 3 << 19, Jobs: job("stream", "target", "/top")},
		{Image: "/a", Format: "qcow2", Size: 1 << 30, Jobs: job("stream", "source", "/top")},
		{Image: "/b", Format: "qcow2", Size: 1 << 30, Allocated: -1, Jobs: job("copy", "source", "/else")},
		{Image: "/c", Format: "qcow2", Size: 1 << 30, Jobs: job("commit", "source", "/d")},
		{Image: "/d", Format: "qcow2", Size: 1 << 30, Jobs: job("commit", "target", "/d")},
		{Image: "/e", Format: "raw", Size: 512, Jobs: job("stream", "base", "/top")},
	}
	want := `
#  IMAGE         FORMAT  SIZE   ALLOCATED  JOBS
0  /top          qcow2   1 GiB  1.5 MiB    j copies into it
1  └─/a          qcow2   1 GiB  0 B        j copies it into #0
2    └─/b        qcow2   1 GiB  ?          j copies it to /else (not in the chain)
3      └─/c      qcow2   1 GiB  0 B        j merges it into #4
4        └─/d    qcow2   1 GiB  0 B        j merges into it
5          └─/e  raw     512 B  0 B        j keeps it as the base
`
	var out bytes.Buffer
	a := newApp(&out, io.Discard)
	if err := a.printChain(chain); err != nil || out.String() != want {
		t.Errorf("%v\n%s", err, out.String())
	}
	for range 500 {
		chain = append(chain, chain[5])
	}
	out.Reset()
	if err := a.printChain(chain); err != nil || !strings.Contains(out.String(), "\n505  "+strings.Repeat("  ", maxIndent)+"└─/e  ") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
