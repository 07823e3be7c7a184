// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

// service is what the control socket offers.
type service struct{ d *Daemon }

var _ control.ControlService = (*service)(nil)

// changeWait bounds how long a command waits for a guest's requests in flight.
const changeWait = 30 * time.Second

// cancelWait is how long a command waits for a job to end.
const cancelWait = 10 * time.Second

// kind makes an error of the jobs one of the control socket's.
func kind(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, job.ErrNotFound):
		return control.Errorf(control.ErrNotFound, "%w", err)
	case errors.Is(err, job.ErrExists):
		return control.Errorf(control.ErrExists, "%w", err)
	case errors.Is(err, job.ErrState):
		return control.Errorf(control.ErrPrecondition, "%w", err)
	default:
		return err
	}
}

// Disks.

func (s *service) DiskList(context.Context, *control.DiskListRequest) (*control.DiskListResponse, error) {
	r := &control.DiskListResponse{}
	for _, k := range s.d.list() {
		r.Disks = append(r.Disks, s.disk(k))
	}
	return r, nil
}

func (s *service) disk(k *disk) *control.Disk {
	rec, st := k.record(), k.dev.Stats()
	o := &control.Disk{
		Id: k.spec.ID, Image: rec.Image, Format: rec.Format, Socket: k.spec.Socket, Size: k.dev.Size(),
		Queues: uint32(k.spec.Queues), QueueSize: uint32(k.spec.QueueSize), ReadOnly: k.spec.ReadOnly, Cache: k.spec.Cache,
		BlockSize: uint32(k.spec.BlockSize), Serial: k.spec.Serial, State: "idle", Warning: k.warning(), CopyOnRead: k.copyOnRead(),
		Stats: &control.DiskStats{
			Reads: st.Reads, Writes: st.Writes, Flushes: st.Flushes,
			BytesRead: st.BytesRead, BytesWritten: st.BytesWritten, Errors: st.Errors,
		},
	}
	if rec.Added == nil {
		o.ConfiguredImage = k.spec.Image
	}
	if k.server.Connected() {
		o.State = "connected"
	}
	if s.d.jobs != nil {
		for _, j := range s.d.jobs.List() {
			if r := j.Record(); r.Disk == k.spec.ID {
				o.Jobs = append(o.Jobs, r.ID)
			}
		}
	}
	return o
}

func (s *service) show(k *disk) *control.Disk {
	o := s.disk(k)
	o.Graph, o.Chain = k.graph.String(), s.chain(k)
	return o
}

func (s *service) DiskShow(_ context.Context, r *control.DiskShowRequest) (*control.Disk, error) {
	k, err := s.d.find(r.Id)
	if err != nil {
		return nil, err
	}
	return s.show(k), nil
}

func (s *service) DiskAdd(_ context.Context, r *control.DiskAddRequest) (*control.Disk, error) {
	s.d.changes.Lock()
	defer s.d.changes.Unlock()
	spec := config.NewDisk()
	spec.ID, spec.Socket, spec.Image, spec.Format = r.Id, r.Socket, r.Image, r.Format
	spec.ReadOnly, spec.Serial, spec.CopyOnRead = r.ReadOnly, r.Serial, r.CopyOnRead
	if r.Queues != 0 {
		spec.Queues = int(r.Queues)
	}
	if r.QueueSize != 0 {
		spec.QueueSize = int(r.QueueSize)
	}
	if r.Cache != "" {
		spec.Cache = r.Cache
	}
	if r.BlockSize != 0 {
		spec.BlockSize = int(r.BlockSize)
	}
	if r.Discard != nil {
		spec.Discard = *r.Discard
	}
	if r.PollUs != nil {
		spec.PollUS = int(*r.PollUs)
	}
	if err := spec.Validate(); err != nil {
		return nil, control.Errorf(control.ErrInvalid, "%w", err)
	}
	if strings.HasPrefix(spec.Socket, "fd:") {
		return nil, control.Errorf(control.ErrInvalid, "socket %q: descriptors are for disks of the configuration, "+
			"which the daemon inherits when it is started", spec.Socket)
	}
	for _, k := range s.d.list() {
		if k.spec.ID == spec.ID {
			return nil, control.Errorf(control.ErrExists, "there is a disk %q already", spec.ID)
		}
		if k.spec.Socket == spec.Socket {
			return nil, control.Errorf(control.ErrExists, "disk %q has the socket %s already", k.spec.ID, spec.Socket)
		}
	}
	if err := s.d.unused(spec.Image); err != nil {
		return nil, err
	}
	// What is known of a disk of this id counts, also when it was removed for now: it may have been moved.
	var old record
	if _, err := s.d.loadRecord(spec.ID, &old); err != nil {
		return nil, err
	}
	if old.Image != "" && old.Image != spec.Image && (len(old.Moved) > 0 || s.d.file.ImageLine(spec.ID) > 0) {
		return nil, control.Errorf(control.ErrPrecondition, "disk %q is on %s, not on %s: add it with that image, or choose another id",
			spec.ID, old.Image, spec.Image)
	}
	rec := record{Image: spec.Image, Format: spec.Format, Moved: old.Moved, Added: &spec}
	k, err := s.d.startDisk(spec, rec)
	if err != nil {
		return nil, err
	}
	rec = k.record() // a guest may have changed it already
	if err := s.d.store.Save(recordKind, spec.ID, &rec); err != nil {
		return nil, errors.Join(err, k.stop())
	}
	return s.show(k), nil
}

func (s *service) DiskSet(ctx context.Context, r *control.DiskSetRequest) (*control.Disk, error) {
	s.d.changes.Lock()
	defer s.d.changes.Unlock()
	k, err := s.d.find(r.Id)
	if err != nil {
		return nil, err
	}
	if r.CopyOnRead != nil && *r.CopyOnRead != k.copyOnRead() {
		ctx, cancel := context.WithTimeout(ctx, changeWait)
		defer cancel()
		if err := k.setCopyOnRead(ctx, *r.CopyOnRead); err != nil {
			return nil, err
		}
	}
	return s.show(k), nil
}

func (s *service) DiskRemove(_ context.Context, r *control.DiskRemoveRequest) (*control.DiskRemoveResponse, error) {
	s.d.changes.Lock()
	defer s.d.changes.Unlock()
	k, err := s.d.find(r.Id)
	if err != nil {
		return nil, err
	}
	if err := k.free(); err != nil {
		return nil, err
	}
	if k.server.Connected() {
		return nil, control.Errorf(control.ErrPrecondition, "a guest uses disk %q: unplug it there first", r.Id)
	}
	added := k.record().Added != nil
	if added {
		if err := s.d.store.Delete(recordKind, r.Id); err != nil {
			return nil, err
		}
	}
	err = k.stop()
	if added {
		err = errors.Join(err, k.bitmaps.forget())
	}
	return &control.DiskRemoveResponse{}, err
}

func (s *service) DiskResize(ctx context.Context, r *control.DiskResizeRequest) (*control.Disk, error) {
	s.d.changes.Lock()
	defer s.d.changes.Unlock()
	k, err := s.d.find(r.Id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, changeWait)
	defer cancel()
	if err := k.resize(ctx, r.Size); err != nil {
		return nil, err
	}
	return s.show(k), nil
}

// Jobs.

func (s *service) Copy(_ context.Context, r *control.CopyRequest) (*control.Job, error) {
	j, err := s.d.copy(r)
	if err != nil {
		return nil, kind(err)
	}
	return message(j.Record()), nil
}

// find takes the name of a job or of a disk that one works on.
func (s *service) find(name string) (*job.Job, error) {
	if j, err := s.d.jobs.Get(name); err == nil {
		return j, nil
	}
	if j := s.d.jobs.OnDisk(name); j != nil {
		return j, nil
	}
	if _, err := s.d.find(name); err == nil {
		return nil, control.Errorf(control.ErrPrecondition, "no job works on disk %q", name)
	}
	return nil, control.Errorf(control.ErrNotFound, "there is no job or disk %q; `blkstream job list` and `blkstream disk list` name them", name)
}

func (s *service) Switch(ctx context.Context, r *control.SwitchRequest) (*control.SwitchResponse, error) {
	j, err := s.find(r.Target)
	if err != nil {
		return nil, err
	}
	if err := j.AskSwitch(); err != nil {
		return nil, kind(err)
	}
	for {
		changed := j.Changed()
		select {
		case <-j.Done():
			rec := j.Record()
			if rec.State != job.StateCompleted {
				return nil, control.Errorf(control.ErrPrecondition, "job %s is %s: %s", rec.ID, rec.State, rec.Error)
			}
			return &control.SwitchResponse{Job: message(rec), Message: rec.Message}, nil
		default:
		}
		// A switch that did not happen clears the request and says why.
		if rec := j.Record(); rec.Error != "" && !j.Switching() {
			return nil, control.Errorf(control.ErrPrecondition, "%s", rec.Error)
		}
		select {
		case <-changed:
		case <-j.Done():
		case <-ctx.Done():
			return nil, fmt.Errorf("the switch goes on: %w", ctx.Err())
		}
	}
}

func (s *service) JobList(context.Context, *control.JobListRequest) (*control.JobListResponse, error) {
	r := &control.JobListResponse{}
	for _, j := range s.d.jobs.List() {
		r.Jobs = append(r.Jobs, message(j.Record()))
	}
	return r, nil
}

func (s *service) JobShow(_ context.Context, r *control.JobShowRequest) (*control.Job, error) {
	return s.command(r.Id, func(*job.Job) error { return nil })
}

// command runs fn on a job and returns the job as it is then.
func (s *service) command(id string, fn func(*job.Job) error) (*control.Job, error) {
	j, err := s.d.jobs.Get(id)
	if err == nil {
		err = fn(j)
	}
	if err != nil {
		return nil, kind(err)
	}
	return message(j.Record()), nil
}

func (s *service) JobPause(_ context.Context, r *control.JobPauseRequest) (*control.Job, error) {
	return s.command(r.Id, (*job.Job).Pause)
}

func (s *service) JobResume(_ context.Context, r *control.JobResumeRequest) (*control.Job, error) {
	return s.command(r.Id, (*job.Job).Resume)
}

func (s *service) JobCancel(ctx context.Context, r *control.JobCancelRequest) (*control.Job, error) {
	ctx, cancel := context.WithTimeout(ctx, cancelWait)
	defer cancel()
	return s.command(r.Id, func(j *job.Job) error {
		err := j.Cancel(ctx)
		if errors.Is(err, context.DeadlineExceeded) {
			return control.Errorf(err, "job %s is being cancelled, but its storage has not answered yet: "+
				"it ends when that does; follow it with: blkstream job watch %s", r.Id, r.Id)
		}
		return err
	})
}

func (s *service) JobSpeed(_ context.Context, r *control.JobSpeedRequest) (*control.Job, error) {
	if r.Speed < 0 {
		return nil, control.Errorf(control.ErrInvalid, "speed %d: it cannot be negative", r.Speed)
	}
	return s.command(r.Id, func(j *job.Job) error { return j.SetSpeed(r.Speed) })
}

func (s *service) JobDismiss(_ context.Context, r *control.JobDismissRequest) (*control.JobDismissResponse, error) {
	if err := s.d.jobs.Dismiss(r.Id); err != nil {
		return nil, kind(err)
	}
	return &control.JobDismissResponse{}, nil
}

// JobWatch sends each change of stage or state at once and the progress about once a second.
func (s *service) JobWatch(ctx context.Context, r *control.JobWatchRequest, stream control.Control_JobWatchServer) error {
	j, err := s.d.jobs.Get(r.Id)
	if err != nil {
		return kind(err)
	}
	var last job.Record
	var sent time.Time
	for {
		changed, rec := j.Changed(), j.Record()
		if rec.Stage != last.Stage || rec.State != last.State || rec.Error != last.Error || time.Since(sent) >= 500*time.Millisecond {
			if err := stream.Send(&control.JobEvent{Job: message(rec)}); err != nil {
				return err
			}
			last, sent = rec, time.Now()
		}
		if job.Ended(rec.State) {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s *service) Version(context.Context, *control.VersionRequest) (*control.VersionResponse, error) {
	return &control.VersionResponse{Version: s.d.opts.Version}, nil
}

func message(r job.Record) *control.Job {
	return &control.Job{
		Id: r.ID, Kind: r.Kind, Disk: r.Disk, Source: r.Source, Target: r.Target, Format: r.Format, Stage: r.Stage, State: r.State,
		Error: r.Error, Message: r.Message, BytesDone: r.BytesDone, BytesTotal: r.BytesTotal, Rate: r.Rate, DirtyRate: r.DirtyRate,
		EtaSeconds: r.ETASeconds, Converging: r.Converging, Speed: r.Speed, Granularity: r.Granularity,
		TargetConsistent: r.TargetConsistent, Verify: r.Verify, VerifiedBytes: r.VerifiedBytes, StartedMs: r.StartedMS, EndedMs: r.EndedMS,
		SwitchMode: r.SwitchMode, OnSourceError: r.OnSourceError, OnTargetError: r.OnTargetError, Method: r.Method, Base: r.Base,
		Bitmap: r.Bitmap, Full: r.Full, OnCbwError: r.OnCBWError,
	}
}
