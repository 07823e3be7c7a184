// SPDX-License-Identifier: Apache-2.0

package job

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
)

func open(t *testing.T, dir string) (*Manager, []Record) {
	t.Helper()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, rest, err := NewManager(s)
	if err != nil {
		t.Fatal(err)
	}
	return m, rest
}

// start begins a job that waits for stop or the end of its context.
func start(t *testing.T, m *Manager, r Record) (j *Job, stop chan error) {
	t.Helper()
	stop = make(chan error, 1)
	j, err := m.Start(r, func(ctx context.Context, _ *Job) error {
		select {
		case err := <-stop:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return j, stop
}

func TestStore(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	type rec struct{ A int }
	if ok, err := s.Load("kind", "x", &rec{}); ok || err != nil {
		t.Errorf("a record that is not there: %v %v", ok, err)
	}
	if ids, err := s.IDs("kind"); len(ids) != 0 || err != nil {
		t.Errorf("no records: %v %v", ids, err)
	}
	for i := range 3 {
		if err := s.Save("kind", "x", rec{i}); err != nil {
			t.Fatal(err)
		}
	}
	var got rec
	if ok, err := s.Load("kind", "x", &got); !ok || err != nil || got.A != 2 {
		t.Errorf("loaded %+v %v %v", got, ok, err)
	}
	// What a crash in the middle of Save leaves is not a record.
	if err := os.WriteFile(s.Path("kind", "x")+".new", []byte(`{"A`), 0o600); err != nil {
		t.Fatal(err)
	}
	if ids, err := s.IDs("kind"); len(ids) != 1 || ids[0] != "x" || err != nil {
		t.Errorf("records: %v %v", ids, err)
	}
	if err := s.Save("kind", "x", rec{7}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load("kind", "x", &got); err != nil || got.A != 7 {
		t.Errorf("loaded %+v %v", got, err)
	}
	for _, id := range []string{"", ".", "..", "../x", "a/b", "-a", strings.Repeat("a", 65), "a\n"} {
		if err := s.Save("kind", id, rec{}); err == nil {
			t.Errorf("%q names a record", id)
		}
	}
	for range 2 {
		if err := s.Delete("kind", "x"); err != nil {
			t.Error(err)
		}
	}
	if ok, _ := s.Load("kind", "x", &got); ok {
		t.Error("deleted, and still there")
	}
}

// Readers see the old or the new record, never a part.
func TestStoreAtomic(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	texts := []string{strings.Repeat("a", 30000), strings.Repeat("b", 100)}
	if err := s.Save("kind", "x", texts[0]); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop.Store(true)
		for i := range 50 {
			if err := s.Save("kind", "x", texts[i%2]); err != nil {
				t.Error(err)
			}
		}
	})
	for !stop.Load() {
		var got string
		if ok, err := s.Load("kind", "x", &got); !ok || err != nil || got != texts[0] && got != texts[1] {
			t.Fatalf("read %d bytes: %v %v", len(got), ok, err)
		}
	}
	wg.Wait()
}

// A save that fails leaves the old record.
func TestStoreFails(t *testing.T) {
	dir := t.TempDir()
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Save("kind", "x", "old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.Path("kind", "x")+".new", 0o700); err != nil { // in the way
		t.Fatal(err)
	}
	if err := s.Save("kind", "x", "new"); err == nil {
		t.Error("saved")
	}
	var got string
	if _, err := s.Load("kind", "x", &got); err != nil || got != "old" {
		t.Errorf("loaded %q %v", got, err)
	}
}

// A record of which it is not known whether it was replaced is told from one that was not.
func TestStoreUnsure(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Save("k", "a", 1); err != nil {
		t.Fatal(err)
	}
	was := syncDir
	syncDir = func(string) error { return syscall.EIO }
	err = s.Save("k", "a", 2)
	syncDir = was
	if !errors.Is(err, ErrUnsure) || !errors.Is(err, syscall.EIO) {
		t.Errorf("a folder that cannot be made durable: %v", err)
	}
	if err := os.Mkdir(s.Path("k", "a")+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.Save("k", "a", 3); err == nil || errors.Is(err, ErrUnsure) {
		t.Errorf("a record that cannot be written: %v", err)
	}
}

func TestDamagedRecord(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	j, stop := start(t, m, Record{ID: "broken", Kind: "copy", Disk: "d"})
	stop <- nil
	<-j.Done()
	path := filepath.Join(dir, "jobs", "broken.json")
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := OpenStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := NewManager(s); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("the error does not name %s: %v", path, err)
	}
}

func TestManager(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	a, stopA := start(t, m, Record{Kind: "copy", Disk: "d"})
	if r := a.Record(); r.ID != "copy-d-1" || r.State != StateRunning || r.StartedMS == 0 || r.ETASeconds != -1 {
		t.Errorf("started as %+v", r)
	}
	never := func(context.Context, *Job) error { t.Error("runs"); return nil }
	if _, err := m.Start(Record{Kind: "copy", Disk: "d"}, never); !errors.Is(err, ErrState) {
		t.Errorf("a second job on the disk: %v", err)
	}
	if _, err := m.Start(Record{ID: "copy-d-1", Kind: "copy", Disk: "e"}, never); !errors.Is(err, ErrExists) {
		t.Errorf("an id twice: %v", err)
	}
	if _, err := m.Start(Record{ID: "../x", Kind: "copy", Disk: "e"}, never); err == nil {
		t.Error("a bad id")
	}
	if err := m.Dismiss("copy-d-1"); !errors.Is(err, ErrState) {
		t.Errorf("dismiss a running job: %v", err)
	}
	if m.OnDisk("d") != a || m.OnDisk("e") != nil {
		t.Error("OnDisk")
	}
	stopA <- errors.New("broken pipe")
	<-a.Done()
	if r := a.Record(); r.State != StateFailed || r.Error != "broken pipe" || r.EndedMS == 0 {
		t.Errorf("failed as %+v", r)
	}
	b, stopB := start(t, m, Record{Kind: "copy", Disk: "d"})
	if id := b.Record().ID; id != "copy-d-2" {
		t.Errorf("the second id is %s", id)
	}
	stopB <- nil
	<-b.Done()
	c, _ := start(t, m, Record{ID: "c", Kind: "copy", Disk: "e"})
	if err := c.Cancel(context.Background()); err != nil || c.Record().State != StateCancelled {
		t.Errorf("cancel: %v, %s", err, c.Record().State)
	}
	if err := c.Cancel(context.Background()); !errors.Is(err, ErrState) {
		t.Errorf("cancel twice: %v", err)
	}

	// All of it survives.
	m, rest := open(t, dir)
	var ids []string
	for _, j := range m.List() {
		ids = append(ids, j.Record().ID+" "+j.Record().State)
		<-j.Done()
	}
	if got := strings.Join(ids, ", "); len(rest) != 0 || got != "copy-d-1 failed, copy-d-2 completed, c cancelled" {
		t.Errorf("after a restart: %s; open %v", got, rest)
	}
	j, err := m.Get("copy-d-1")
	if err != nil || j.Record().Error != "broken pipe" {
		t.Errorf("get: %v", err)
	}
	for _, err := range []error{j.Pause(), j.Resume(), j.SetSpeed(1), j.AskSwitch(), j.Cancel(context.Background())} {
		if !errors.Is(err, ErrState) {
			t.Errorf("a command to an ended job: %v", err)
		}
	}
	if err := m.Dismiss("copy-d-1"); err != nil {
		t.Error(err)
	}
	for _, err := range []error{m.Dismiss("copy-d-1"), func() error { _, err := m.Get("copy-d-1"); return err }()} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("a dismissed job: %v", err)
		}
	}
	if m, _ := open(t, dir); len(m.List()) != 2 {
		t.Error("a dismissed job is back after a restart")
	}
}

// A shutdown leaves the records of jobs that have not ended as they are, for the next daemon to go on with.
func TestShutdown(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	run, _ := start(t, m, Record{ID: "run", Kind: "copy", Disk: "a", Options: Options{Speed: 5}})
	paused, _ := start(t, m, Record{ID: "paused", Kind: "copy", Disk: "b"})
	if err := paused.Pause(); err != nil {
		t.Fatal(err)
	}
	over, stop := start(t, m, Record{ID: "over", Kind: "copy", Disk: "c"})
	stop <- nil
	<-over.Done()
	m.Shutdown()
	if _, err := m.Start(Record{Kind: "copy", Disk: "late"}, func(context.Context, *Job) error { return nil }); err == nil {
		t.Error("a job began when the others had been told to end")
	}
	<-run.Done()
	m, rest := open(t, dir)
	states := map[string]string{}
	for _, r := range rest {
		states[r.ID] = r.State
		if r.ID == "run" && r.Speed != 5 {
			t.Error("the options are lost")
		}
	}
	if len(rest) != 2 || states["run"] != StateRunning || states["paused"] != StatePaused || len(m.List()) != 1 {
		t.Errorf("open: %v, ended: %d", states, len(m.List()))
	}
	r := rest[0]
	r.State = StateFailed
	if err := m.End(r); err != nil || len(m.List()) != 2 {
		t.Errorf("end: %v", err)
	}
	if _, rest := open(t, dir); len(rest) != 1 {
		t.Error("an ended job is open after a restart")
	}
}

func TestCommands(t *testing.T) {
	m, _ := open(t, t.TempDir())
	j, stop := start(t, m, Record{Kind: "copy", Disk: "d"})
	for range 2 {
		if err := j.Pause(); err != nil || j.Record().State != StatePaused {
			t.Fatalf("pause: %v", err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := j.Gate(ctx); err == nil {
		t.Error("the gate is open while paused")
	}
	if err := j.AskSwitch(); !errors.Is(err, ErrState) {
		t.Errorf("switch while paused: %v", err)
	}
	for range 2 {
		if err := j.Resume(); err != nil || j.Record().State != StateRunning || j.Record().Message != "" {
			t.Fatalf("resume: %v %+v", err, j.Record())
		}
	}
	j.PauseFor(errors.New("disk full"))
	if r := j.Record(); r.State != StatePaused || r.Error != "disk full" || !strings.Contains(r.Message, "job resume") {
		t.Errorf("paused by an error: %+v", r)
	}
	if err := j.Resume(); err != nil || j.Record().Error != "" {
		t.Errorf("resume: %v", err)
	}
	j.Update(func(r *Record) { r.State = StateReady })
	if err := j.Pause(); !errors.Is(err, ErrState) {
		t.Errorf("pause when ready: %v", err)
	}
	if err := j.AskSwitch(); err != nil || !j.Switching() || !j.SwitchAsked() || j.Switching() || j.SwitchAsked() {
		t.Errorf("switch: %v", err)
	}
	// A job that was ready and is paused by an error runs on afterwards: it is no longer ready.
	j.PauseFor(errors.New("disk full"))
	if err := j.Resume(); err != nil || j.Record().State != StateRunning {
		t.Errorf("resumed into %s: %v", j.Record().State, err)
	}
	if err := j.SetSpeed(-1); err == nil {
		t.Error("a negative speed")
	}
	if err := j.SetSpeed(1 << 20); err != nil || j.Record().Speed != 1<<20 || j.Piece(1<<30) > 1<<20/10 {
		t.Errorf("speed: %v, pieces of %d", err, j.Piece(1<<30))
	}
	stop <- nil
	<-j.Done()
}

// Changed tells of each change.
func TestChanged(t *testing.T) {
	m, _ := open(t, t.TempDir())
	j, stop := start(t, m, Record{Kind: "copy", Disk: "d"})
	c := j.Changed()
	j.Update(func(r *Record) { r.BytesDone = 5 })
	<-c
	select {
	case <-j.Changed():
		t.Error("told of a change before it came")
	default:
	}
	stop <- nil
	<-j.Done()
}

// An error of the journal shows in the record.
func TestJournalError(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	j, stop := start(t, m, Record{ID: "x", Kind: "copy", Disk: "d"})
	if err := os.Mkdir(filepath.Join(dir, "jobs", "x.json.new"), 0o700); err != nil {
		t.Fatal(err)
	}
	j.Update(func(r *Record) { r.Stage = StageBulk })
	if r := j.Record(); !strings.Contains(r.Error, "x.json") {
		t.Errorf("the error is %q", r.Error)
	}
	stop <- nil
	<-j.Done()
}

// A slow limit lets pieces through evenly, whoever comes; a change of the speed takes effect at once.
func TestLimit(t *testing.T) {
	m, _ := open(t, t.TempDir())
	const speed, piece = 1 << 20, 64 << 10
	j, stop := start(t, m, Record{Kind: "copy", Disk: "d", Options: Options{Speed: speed}})
	begin := time.Now()
	var mu sync.Mutex
	var at []time.Duration
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 2 {
				if err := j.Limit(context.Background(), piece); err != nil {
					t.Error(err)
				}
				mu.Lock()
				at = append(at, time.Since(begin))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	// Each piece is worth 62 ms.
	for i, d := range at {
		if least := time.Duration(float64((i+1)*piece-speed/10) / speed * float64(time.Second)); d < least {
			t.Errorf("piece %d came after %v, at this speed it takes %v", i, d, least)
		}
	}
	if err := j.SetSpeed(1); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- j.Limit(context.Background(), 1<<20) }()
	time.Sleep(20 * time.Millisecond)
	if err := j.SetSpeed(0); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("the limit was lifted and is still waited for")
	}
	// What was paid for is not copied while the job is paused.
	if err := j.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if err := j.Limit(ctx, 1); err == nil {
		t.Error("the limit lets a paused job copy")
	}
	stop <- nil
	<-j.Done()
}

// fakeSource is a guest whose figures the test makes up.
type fakeSource struct{ meter blk.Meter }

func (s *fakeSource) Pause(context.Context) error { return nil }
func (s *fakeSource) Resume()                     {}
func (s *fakeSource) Barrier()                    {}
func (s *fakeSource) Meter() *blk.Meter           { return &s.meter }

// Whoever waits in Begin gets in at last, whatever happens to the window, and each Begin is given back.
func TestPacer(t *testing.T) {
	p := NewPacer(blk.NewGraph(blktest.NewMemory(4096)))
	p.setActive(true, 0)
	most := p.most
	if most >= p.Workers() {
		t.Fatal("an active guest has no effect")
	}
	for range most {
		if err := p.Begin(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			if err := p.Begin(context.Background()); err != nil {
				t.Error(err)
			}
			p.End()
		})
	}
	time.Sleep(10 * time.Millisecond) // all wait
	p.setOpen(false)
	for range most {
		p.End()
	}
	p.setOpen(true)
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("somebody waits for ever")
	}
	// A Begin that fails takes no place.
	p.setOpen(false)
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("over"))
	for range 20 {
		if err := p.Begin(ctx); err == nil || err.Error() != "over" {
			t.Fatalf("Begin after the end: %v", err)
		}
	}
	if p.running != 0 {
		t.Errorf("%d places are lost", p.running)
	}
}

// A guest that is slowed down much gets long rests and small pieces; an idle one does not hold the copy up.
func TestPacerWatches(t *testing.T) {
	g := blk.NewGraph(blktest.NewMemory(4096))
	s := &fakeSource{}
	g.Attach(s)
	p := NewPacer(g)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { p.Run(ctx) })
	var rested bool
	for end := time.Now().Add(400 * time.Millisecond); time.Now().Before(end) && !rested; time.Sleep(time.Millisecond) {
		if !s.meter.Timed.Load() {
			continue
		}
		s.meter.Ops.Add(1)
		s.meter.Nanos.Add(1e6)
		p.mu.Lock()
		rested = !p.open && p.most < fullMost
		p.mu.Unlock()
	}
	if !rested {
		t.Error("a busy guest gets no rest")
	}
	cancel()
	wg.Wait()
	if s.meter.Timed.Load() || !p.open {
		t.Error("after the end the window is closed or the guest's requests are timed")
	}

	p.quiet, p.loaded = 1e5, 1e5
	if p.rest() != minRest {
		t.Errorf("a guest that does not suffer gets a rest of %v", p.rest())
	}
	p.loaded = 2e6
	if r := p.rest(); r < window || r > 3*window {
		t.Errorf("a guest that suffers gets a rest of %v", r)
	}
	p.active = true
	for range 20 {
		p.setActive(true, time.Second)
	}
	if p.most != 1 || p.piece != minPiece {
		t.Errorf("after long requests %d pieces of %d", p.most, p.piece)
	}
	p.setActive(false, 0)
	if p.most != fullMost || p.Size() != fullSize {
		t.Error("an idle guest still counts as busy")
	}
}

// A record is durable when Save returns: the new file's contents before its name, and the name.
func TestStoreDurable(t *testing.T) {
	if dir := os.Getenv("BLKSTREAM_TEST_SAVE"); dir != "" {
		s, err := OpenStore(dir)
		if err == nil {
			err = errors.Join(s.Save("kind", "x", 1), s.Save("kind", "x", 2), s.Delete("kind", "x"))
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := exec.Command("strace", "-o", "/dev/null", "true").Run(); err != nil {
		if os.Getenv("CI") != "" && errors.Is(err, exec.ErrNotFound) {
			t.Fatal(err)
		}
		t.Skipf("nothing can be traced here: %v", err)
	}
	dir := t.TempDir()
	out := filepath.Join(t.TempDir(), "trace")
	cmd := exec.Command("strace", "-f", "-qq", "-y", "-e", "trace=fsync,fdatasync,renameat,renameat2,mkdirat,unlinkat,write", "-o", out,
		os.Args[0], "-test.run=^TestStoreDurable$")
	cmd.Env = append(os.Environ(), "BLKSTREAM_TEST_SAVE="+dir)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	trace, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	// The call, and the last file of ours in its arguments.
	ours := regexp.MustCompile(`(\w+)\(.*` + regexp.QuoteMeta(dir) + `([^">]*)`)
	var got []string
	for line := range strings.Lines(string(trace)) {
		if m := ours.FindStringSubmatch(line); m != nil {
			got = append(got, m[1]+" "+m[2])
		}
	}
	save := []string{"mkdirat /kind", "write /kind/x.json.new", "fsync /kind/x.json.new", "renameat /kind/x.json", "fsync /kind"}
	want := slices.Concat(save, save, []string{"unlinkat /kind/x.json", "fsync /kind"})
	want = slices.Insert(want, 1, "fsync ") // the folder is new the first time
	if !slices.Equal(got, want) {
		t.Errorf("the order of the calls:\n got %q\nwant %q\n%s", got, want, trace)
	}
}

// The end of a job that the journal did not take is written when it does: the next daemon must not take the job up.
func TestEndIsSavedLate(t *testing.T) {
	was := saveEvery
	saveEvery = time.Millisecond
	t.Cleanup(func() { saveEvery = was })
	dir := t.TempDir()
	m, _ := open(t, dir)
	j, _ := start(t, m, Record{ID: "j", Kind: "copy", Disk: "d"})
	blocker := filepath.Join(dir, jobs, "j.json.new") // which no file can be written over
	if err := os.Mkdir(blocker, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := j.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r := j.Record(); r.State != StateCancelled || !strings.Contains(r.Error, "state directory") {
		t.Errorf("cancelled, with a journal that cannot be written: %+v", r)
	}
	if _, rest := open(t, dir); len(rest) != 1 {
		t.Fatal("the journal was written")
	}
	if err := os.Remove(blocker); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, rest := open(t, dir); len(rest) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the end is never written")
		}
	}
	if err := m.Dismiss("j"); err != nil {
		t.Error(err)
	}
	time.Sleep(5 * saveEvery)
	if ids, err := m.store.IDs(jobs); len(ids) > 0 || err != nil {
		t.Errorf("dismissed, and still in the journal: %v %v", ids, err)
	}
}
