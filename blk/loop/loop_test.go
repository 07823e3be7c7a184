// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/raw"
)

// driver has no requests. It counts how often the loop looks at it.
type driver struct {
	turns   atomic.Int64
	publish func()      // if not nil
	call    atomic.Bool // Publish wants the other side to be called
}

func (d *driver) Work() bool { d.turns.Add(1); return false }
func (d *driver) Publish() bool {
	if d.publish != nil {
		d.publish()
	}
	return d.call.Swap(false)
}
func (d *driver) Poll() bool { return false }
func (d *driver) Arm() bool  { return false }
func (d *driver) Disarm()    {}

// start runs a loop until the test ends or stop is called.
func start(t *testing.T, opts Options, drv Driver) (l *Loop, stop func()) {
	t.Helper()
	return startAfter(t, nil, opts, drv)
}

// startAfter is start with a thread on which first was called before. The thread ends with the loop.
func startAfter(t *testing.T, first func(), opts Options, drv Driver) (l *Loop, stop func()) {
	t.Helper()
	if opts.Depth == 0 {
		opts.Depth = 64
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	ready, end := make(chan *Loop, 1), make(chan error, 1)
	go func() {
		if first != nil {
			runtime.LockOSThread()
			first()
		}
		end <- Run(opts, func(l *Loop) Driver { ready <- l; return drv })
	}()
	select {
	case l = <-ready:
	case err := <-end:
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		l.Post(l.Stop)
		if err := <-end; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return l, stop
}

// run runs fn as a task of the loop and waits for its end.
func run(l *Loop, fn func(*blk.Task)) {
	done := make(chan struct{})
	l.Post(func() {
		l.Spawn(func(t *blk.Task) {
			defer close(done)
			fn(t)
		})
	})
	<-done
}

// noURing ends a test that needs io_uring; in CI it is there.
func noURing(t *testing.T, err error) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("no io_uring: %v", err)
	}
	t.Skipf("no io_uring here: %v", err)
}

// engines runs a test with io_uring and with the pool.
func engines(t *testing.T, fn func(t *testing.T, opts Options)) {
	t.Run("uring", func(t *testing.T) {
		be, err := newRingBackend(8)
		if err != nil {
			noURing(t, err)
		}
		be.close()
		fn(t, Options{})
	})
	t.Run("pool", func(t *testing.T) { fn(t, Options{NoURing: true}) })
}

// storages names directories with and without inline I/O.
func storages(t *testing.T) map[string]string {
	dirs := map[string]string{"disk": t.TempDir()}
	if dir, err := os.MkdirTemp("/dev/shm", "loop"); err == nil {
		t.Cleanup(func() { os.RemoveAll(dir) })
		dirs["tmpfs"] = dir
	}
	return dirs
}

func open(t *testing.T, dir string, size int64, o file.Options) *file.Node {
	t.Helper()
	f, err := os.CreateTemp(dir, "img")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.Truncate(f.Name(), size); err != nil {
		t.Fatal(err)
	}
	n, err := file.Open(f.Name(), o)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// host gives the file under a node.
func host(t *testing.T, n *file.Node) *blk.HostFile {
	t.Helper()
	e, ok := n.TryMap(blk.OpFlush, 0, 0)
	if !ok {
		t.Fatal("not mapped")
	}
	return e.Host
}

func TestConformance(t *testing.T) {
	dirs := storages(t)
	engines(t, func(t *testing.T, opts Options) {
		for _, c := range []struct {
			name, dir string
			depth     int
			file      file.Options
			align     int64
		}{
			{"buffered", "disk", 64, file.Options{NoSync: true}, 0},
			{"direct", "disk", 64, file.Options{Direct: true, Align: 4096}, 4096},
			{"direct unaligned", "disk", 3, file.Options{Direct: true, NoSync: true}, 0},
			{"tmpfs", "tmpfs", 2, file.Options{}, 0},
		} {
			if dirs[c.dir] == "" {
				continue
			}
			t.Run(c.name, func(t *testing.T) {
				opts := opts
				opts.Depth = c.depth
				blktest.Run(t, func(t *testing.T, size int64) blk.Node {
					return raw.Open(open(t, dirs[c.dir], size, c.file))
				}, blktest.Options{Align: c.align, Task: func(t *testing.T) func(func(*blk.Task)) {
					l, _ := start(t, opts, &driver{})
					return func(fn func(*blk.Task)) { run(l, fn) }
				}})
			})
		}
	})
}

// Tasks of two loops and goroutines share a lock, wait for helpers and for each other.
func TestWaits(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		a, _ := start(t, opts, &driver{})
		b, _ := start(t, opts, &driver{})
		var (
			lock  blk.RangeLock
			owner [4]int // plain: the race detector and the sum tell whether the lock holds
			wg    sync.WaitGroup
		)
		work := func(task *blk.Task) {
			for i := range 50 {
				slot := int64(i % len(owner))
				r := lock.Lock(task, slot*10, 10)
				v := owner[slot]
				switch i % 3 {
				case 0:
					if err := task.Off(func() error { runtime.Gosched(); return io.EOF }); !errors.Is(err, io.EOF) {
						t.Errorf("Off: %v", err)
					}
				case 1:
					sum := [2]int{}
					e1, e2 := task.Par(
						func(u *blk.Task) error { sum[0]++; return u.Off(func() error { return io.ErrNoProgress }) },
						func(u *blk.Task) error { sum[1]++; return u.Off(func() error { return io.ErrClosedPipe }) })
					if sum != [2]int{1, 1} || !errors.Is(e1, io.ErrNoProgress) || !errors.Is(e2, io.ErrClosedPipe) {
						t.Errorf("Par: %v %v %v", sum, e1, e2)
					}
				}
				owner[slot] = v + 1
				lock.Unlock(r)
			}
		}
		const each = 8
		for range each {
			wg.Go(func() { run(a, work) })
			wg.Go(func() { run(b, work) })
			wg.Go(func() { work(blk.NewTask()) })
		}
		wg.Wait()
		if sum := owner[0] + owner[1] + owner[2] + owner[3]; sum != 3*each*50 {
			t.Errorf("%d turns, want %d: two had the lock at once", sum, 3*each*50)
		}
	})
}

// A task spawned by a task begins, runs beside it, and counts.
func TestSpawnInTask(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		l, _ := start(t, opts, &driver{})
		var depth func(task *blk.Task, n int) (int, error)
		depth = func(task *blk.Task, n int) (total int, err error) {
			if n == 0 {
				return 1, task.Off(func() error { return nil })
			}
			var left, right int
			e1, e2 := task.Par(
				func(u *blk.Task) (err error) { left, err = depth(u, n-1); return err },
				func(u *blk.Task) (err error) { right, err = depth(u, n-1); return err })
			return left + right, errors.Join(e1, e2)
		}
		run(l, func(task *blk.Task) {
			if n, err := depth(task, 6); n != 64 || err != nil {
				t.Errorf("%d leaves, error %v", n, err)
			}
		})
		tasks := make(chan int)
		l.Post(func() { tasks <- l.Tasks() })
		if n := <-tasks; n != 0 {
			t.Errorf("%d tasks are left", n)
		}
	})
}

func TestManyParked(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		l, _ := start(t, opts, &driver{})
		const n = 500
		var (
			lock  blk.RangeLock
			order []int
			wg    sync.WaitGroup
		)
		held := lock.Lock(blk.NewTask(), 0, 1<<20)
		wg.Add(n)
		l.Post(func() {
			for i := range n {
				l.Spawn(func(task *blk.Task) {
					defer wg.Done()
					r := lock.Lock(task, int64(i), n)
					order = append(order, i) // the loop's thread alone
					lock.Unlock(r)
				})
			}
		})
		// All are parked, and the loop serves others meanwhile.
		tasks := make(chan int)
		l.Post(func() { tasks <- l.Tasks() })
		if got := <-tasks; got != n {
			t.Errorf("%d tasks, want %d", got, n)
		}
		run(l, func(task *blk.Task) {
			if err := task.Off(func() error { return nil }); err != nil {
				t.Error(err)
			}
		})
		lock.Unlock(held)
		wg.Wait()
		if len(order) != n || !slices.IsSorted(order) {
			t.Errorf("%d came through, in order %v: not first come, first served", len(order), order)
		}
	})
}

// More pieces than a system call takes, and a read over the end of the file.
func TestShortTransfers(t *testing.T) {
	dirs := storages(t)
	engines(t, func(t *testing.T, opts Options) {
		for name, dir := range dirs {
			for _, depth := range []int{1, 8} {
				opts := opts
				opts.Depth = depth
				l, _ := start(t, opts, &driver{})
				for _, piece := range []int{7, 512} {
					const pieces = 2500
					f := host(t, open(t, dir, 512, file.Options{}))
					want := make([]byte, pieces*piece)
					for i := range want {
						want[i] = byte(rand.Uint32())
					}
					got := bytes.Repeat([]byte{0xee}, len(want)+3*piece)
					cut := func(b []byte) (v blk.Vec) {
						for len(b) > 0 {
							v, b = blk.BytesVec(v, b[:piece]), b[piece:]
						}
						return v
					}
					var wg sync.WaitGroup
					for range 3 { // beside each other, so that a rest has to wait for its place
						wg.Go(func() {
							run(l, func(task *blk.Task) {
								if err := task.WriteAt(f, cut(want), 0, true); err != nil {
									t.Errorf("write: %v", err)
								}
							})
						})
					}
					wg.Wait()
					run(l, func(task *blk.Task) {
						if err := task.ReadAt(f, cut(got), 0); err != nil {
							t.Errorf("read: %v", err)
						}
					})
					if !bytes.Equal(got, append(bytes.Clone(want), make([]byte, 3*piece)...)) {
						t.Errorf("%s, depth %d, pieces of %d: wrong bytes", name, depth, piece)
					}
				}
			}
		}
	})
}

// A read past the file's end into guest memory that has gone meanwhile: what fills it up with zeros faults.
func TestTruncatedMemory(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if err := unix.Ftruncate(fd, 4096); err != nil {
			t.Fatal(err)
		}
		mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(mem)
		l, _ := start(t, opts, &driver{})
		f := host(t, open(t, t.TempDir(), 0, file.Options{}))
		if err := unix.Ftruncate(fd, 0); err != nil {
			t.Fatal(err)
		}
		run(l, func(task *blk.Task) {
			if err := task.ReadAt(f, blk.BytesVec(nil, mem), 0); !errors.Is(err, unix.EFAULT) {
				t.Errorf("%v", err)
			}
		})
	})
}

// An I/O that fails says so, and does not take the place of another one.
func TestErrors(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		opts.Depth = 4
		l, _ := start(t, opts, &driver{})
		n := open(t, t.TempDir(), 1<<20, file.Options{})
		good := host(t, n)
		bad := &blk.HostFile{Fd: -1, MemAlign: 1, OffAlign: 1}
		var wg sync.WaitGroup
		for i := range 40 {
			wg.Go(func() {
				run(l, func(task *blk.Task) {
					f := good
					if i%2 == 0 {
						f = bad
					}
					v := blk.BytesVec(nil, make([]byte, 512))
					for _, err := range []error{
						task.WriteAt(f, v, 0, i%4 < 2), task.ReadAt(f, v, 0), task.Sync(f),
						task.Fallocate(f, unix.FALLOC_FL_KEEP_SIZE, 0, 4096),
					} {
						if (err != nil) != (f == bad) || f == bad && !errors.Is(err, unix.EBADF) {
							t.Errorf("file %d: %v", f.Fd, err)
						}
					}
				})
			})
		}
		wg.Wait()
	})
}

// More operations of one task than the loop takes at once.
func TestDepth(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		opts.Depth = 2
		l, _ := start(t, opts, &driver{})
		f := host(t, open(t, t.TempDir(), 1<<20, file.Options{}))
		ios := make([]blk.IO, 100)
		run(l, func(task *blk.Task) {
			for i := range ios {
				v := blk.BytesVec(nil, bytes.Repeat([]byte{byte(i)}, 512))
				ios[i].Reset(blk.IOWrite, f, int64(i)*512, 512, v, nil)
				task.Start(&ios[i])
			}
			task.Wait()
		})
		b, err := os.ReadFile(f.Path)
		if err != nil {
			t.Fatal(err)
		}
		for i := range ios {
			if ios[i].Err != nil || !bytes.Equal(b[i*512:][:512], bytes.Repeat([]byte{byte(i)}, 512)) {
				t.Errorf("operation %d: wrong bytes, error %v", i, ios[i].Err)
			}
		}
	})
}

func TestPanic(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		var log bytes.Buffer
		opts.Log = slog.New(slog.NewTextHandler(&log, nil))
		l, stop := start(t, opts, &driver{})
		for range 3 {
			run(l, func(*blk.Task) { panic("on purpose") })
			run(l, func(task *blk.Task) {
				if err := task.Off(func() error { return nil }); err != nil {
					t.Error(err)
				}
			})
		}
		stop()
		if n := bytes.Count(log.Bytes(), []byte("on purpose")); n != 3 {
			t.Errorf("%d panics were logged, want 3:\n%s", n, log.String())
		}
	})
}

// Every post wakes a loop that sleeps, whoever comes first.
func TestPost(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		for _, opts.PollMax = range []time.Duration{0, 20 * time.Microsecond} {
			l, _ := start(t, opts, &driver{})
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					done := make(chan struct{})
					for range 1000 {
						l.Post(func() { done <- struct{}{} })
						<-done
					}
				})
			}
			wg.Wait()
		}
	})
}

// A post that comes after the loop has looked at its mail, and before it sleeps, keeps it awake.
func TestPostBeforeSleep(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		var (
			l    *Loop
			ask  bool // the loop's thread alone
			done = make(chan struct{})
		)
		d := &driver{}
		d.publish = func() {
			// The turn has read its mail and goes to sleep next.
			if ask {
				ask = false
				l.Post(func() { done <- struct{}{} })
			}
		}
		l, _ = start(t, opts, d)
		for range 20 {
			l.Post(func() { ask = true })
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				l.Post(func() {})
				<-done
				t.Fatal("the loop slept over a post")
			}
		}
	})
}

// kicked is a driver that is woken by an eventfd.
type kicked struct {
	driver
	want atomic.Int64 // requests made
	got  atomic.Int64 // requests taken
	seen chan struct{}
}

func (k *kicked) Work() bool {
	k.turns.Add(1)
	w := k.want.Load()
	if k.got.Load() == w {
		return false
	}
	k.got.Store(w)
	k.seen <- struct{}{}
	return true
}
func (k *kicked) Poll() bool { return k.got.Load() != k.want.Load() }
func (k *kicked) Arm() bool  { return k.Poll() }

// Each write to the eventfd wakes the loop, though nobody reads it; only the fd that is watched does; and a loop
// without work sleeps.
func TestKick(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		k := &kicked{seen: make(chan struct{}, 1)}
		opts.PollMax = 50 * time.Microsecond
		l, stop := start(t, opts, k)
		var fds []int
		for range 3 {
			fd, err := newEventfd()
			if err != nil {
				t.Fatal(err)
			}
			fds = append(fds, fd)
			watching := make(chan struct{})
			l.Post(func() { l.WatchKick(fd); close(watching) })
			<-watching
			for range 300 {
				k.want.Add(1)
				wake(fd)
				<-k.seen
			}
		}
		time.Sleep(20 * time.Millisecond)
		before := k.turns.Load()
		time.Sleep(50 * time.Millisecond)
		if n := k.turns.Load() - before; n > 3 {
			t.Errorf("%d turns in 50 ms without work", n)
		}
		stop()
		for _, fd := range fds {
			unix.Close(fd)
		}
	})
}

// What a loop had is given back: descriptors, threads and coroutines.
func TestStop(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		n := open(t, t.TempDir(), 1<<20, file.Options{})
		defer n.Close()
		blktest.NoLeaks(t, func() {
			l, stop := start(t, opts, &driver{})
			run(l, func(task *blk.Task) {
				_, _ = task.Par(func(u *blk.Task) error {
					return blk.Do(u, n, &blk.Request{Op: blk.OpWrite, Len: 512, Data: blk.BytesVec(nil, make([]byte, 512))})
				}, func(u *blk.Task) error { return u.Off(func() error { return nil }) })
			})
			stop()
		})
	})
}

// A helper that is late may wake a loop that has ended. The descriptor that it would write to can be an image by then.
func TestLatePost(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		l, stop := start(t, opts, &driver{})
		var fd int
		switch be := l.be.(type) {
		case *ringBackend:
			fd = be.wakeFd
		case *poolBackend:
			fd = be.wakeFd
		}
		stop()
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if int(f.Fd()) != fd {
			if err := unix.Dup3(int(f.Fd()), fd, unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
		}
		l.sleeping.Store(true) // as if the loop had been about to sleep when the helper looked
		l.Post(func() {})
		if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
			t.Errorf("%d bytes were written into another file, error %v", fi.Size(), err)
		}
	})
}

func TestAdapt(t *testing.T) {
	us := time.Microsecond
	l := &Loop{opts: Options{PollMax: 32 * us}}
	for i, c := range []struct{ idle, want time.Duration }{
		{10 * us, 0},
		{10 * us, 4 * us},
		{3 * us, 4 * us},
		{10 * us, 8 * us},
		{20 * us, 16 * us},
		{30 * us, 32 * us},
		{32 * us, 32 * us},
		{33 * us, 0},
		{time.Second, 0},
		{us, 0},
		{33 * us, 0},
		{us, 0},
		{us, 4 * us},
	} {
		if l.adapt(c.idle); l.pollFor != c.want {
			t.Errorf("step %d: idle for %v: polls for %v, want %v", i, c.idle, l.pollFor, c.want)
		}
	}
}

func TestRunFails(t *testing.T) {
	if _, err := os.Stat("/proc/self/fd"); err != nil {
		t.Skip(err)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	none := limit
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	err := Run(Options{Depth: 4, Log: slog.New(slog.DiscardHandler)}, func(*Loop) Driver { t.Error("ready"); return nil })
	if e := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); e != nil {
		t.Fatal(e)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("without descriptors: %v", err)
	}
}

// Each call arrives, whatever the other side made of its eventfd, and none holds the loop up.
func TestCall(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		for _, c := range []struct {
			name  string
			flags int
			full  bool
			later bool // it becomes a blocking one when it is in use
		}{
			{"nonblocking", unix.EFD_NONBLOCK, false, false},
			{"blocking", 0, false, false},
			{"blocking later", unix.EFD_NONBLOCK, false, true},
			{"full", unix.EFD_NONBLOCK, true, false},
			{"full, blocking", 0, true, false},
		} {
			for _, opts.PollMax = range []time.Duration{0, 50 * time.Microsecond} {
				t.Run(c.name+"/"+opts.PollMax.String(), func(t *testing.T) {
					fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|c.flags)
					if err != nil {
						t.Fatal(err)
					}
					defer unix.Close(fd)
					if c.full {
						most := [8]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
						if _, err := unix.Write(fd, most[:]); err != nil {
							t.Fatal(err)
						}
					}
					d := &driver{}
					l, _ := start(t, opts, d)
					do(l, func() { l.SetCall(fd) })
					if c.later {
						if err := unix.SetNonblock(fd, false); err != nil {
							t.Fatal(err)
						}
					}
					for range 100 {
						do(l, func() { d.call.Store(true) })
						p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
						if n, err := unix.Poll(p, 10_000); n != 1 {
							t.Fatalf("no call: %v", err)
						}
						if c.full {
							continue
						}
						var b [8]byte
						if _, err := unix.Read(fd, b[:]); err != nil || b != eventOne {
							t.Fatalf("called %v times: %v", b, err)
						}
					}
					if b, ok := l.be.(*ringBackend); ok {
						do(l, func() {
							if good := c.flags != 0 && !c.full && !c.later; b.ring.SetCall(fd) && b.calls != good {
								t.Errorf("signalled by the ring: %v", b.calls)
							}
						})
					}
					do(l, func() { l.SetCall(-1) })
					do(l, func() { d.call.Store(true) })
					do(l, func() {})
				})
			}
		}
	})
}

// do runs fn on the loop's thread and waits for it.
func do(l *Loop, fn func()) {
	done := make(chan struct{})
	l.Post(func() { fn(); close(done) })
	<-done
}

// callFD makes an eventfd, and tells whether it was signalled since the last time.
func callFD(t *testing.T, flags int) (fd int, called func(timeout time.Duration) bool) {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd, func(timeout time.Duration) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, int(timeout.Milliseconds())); n != 1 {
			return false
		}
		var b [8]byte
		_, err := unix.Read(fd, b[:])
		return err == nil
	}
}

// What was published in one turn is signalled when the next turn reads its mail, by which a queue is paused and stopped.
func TestCallBeforeMail(t *testing.T) {
	engines(t, func(t *testing.T, opts Options) {
		for name, flags := range map[string]int{"nonblocking": unix.EFD_NONBLOCK, "blocking": 0} {
			t.Run(name, func(t *testing.T) {
				fd, called := callFD(t, flags)
				var (
					l      *Loop
					ask    bool // the loop's thread alone
					answer = make(chan bool)
				)
				d := &driver{}
				d.publish = func() {
					if ask {
						ask = false
						d.call.Store(true)
						l.Post(func() { answer <- called(0) })
					}
				}
				l, _ = start(t, opts, d)
				for i := range 20 {
					l.Post(func() {
						l.SetCall(fd)
						ask = true
					})
					if !<-answer {
						t.Fatalf("turn %d: not signalled", i)
					}
				}
			})
		}
	})
}

// A signal that the kernel does not take in the submission goes out all the same.
func TestCallNotSubmitted(t *testing.T) {
	for _, errno := range []unix.Errno{unix.EAGAIN, unix.EBUSY, unix.ENOMEM} {
		t.Run(errno.Error(), func(t *testing.T) {
			fd, called := callFD(t, unix.EFD_NONBLOCK)
			d := &driver{}
			l, stop := startAfter(t, func() {}, Options{Log: slog.New(slog.DiscardHandler)}, d) // its thread ends with it
			b, ok := l.be.(*ringBackend)
			if !ok {
				noURing(t, nil)
			}
			do(l, func() { l.SetCall(fd) })
			do(l, func() { // the polls are submitted
				if !b.calls || b.ring.Queued() > 0 {
					t.Errorf("the ring signals: %v, %d entries wait", b.calls, b.ring.Queued())
				}
				refuse(t, refusal{call: unix.SYS_IO_URING_ENTER, errno: errno, arg: 1, other: true}) // with entries to submit
			})
			for i := range 3 {
				if do(l, func() { d.call.Store(true) }); !called(10 * time.Second) {
					t.Fatalf("call %d was lost", i)
				}
			}
			stop()
		})
	}
}

// Kernels and policies that lack one thing or another.
func TestRefused(t *testing.T) {
	const registerFiles, registerFilesUpdate, registerRingFDs = 2, 6, 20
	all := func(call uint32, errno unix.Errno) refusal { return refusal{call: call, errno: errno, arg: -1} }
	register := func(op uint32) refusal {
		return refusal{call: unix.SYS_IO_URING_REGISTER, errno: unix.EINVAL, arg: 1, value: op}
	}
	for _, c := range []struct {
		name        string
		refused     refusal
		ring, calls bool
	}{
		{"io_uring, by policy", all(unix.SYS_IO_URING_SETUP, unix.EPERM), false, false},
		{"io_uring", all(unix.SYS_IO_URING_SETUP, unix.ENOSYS), false, false},
		{"setup flags", all(unix.SYS_IO_URING_SETUP, unix.EINVAL), false, false},
		{"registration", all(unix.SYS_IO_URING_REGISTER, unix.EPERM), true, false},
		{"files", register(registerFiles), true, false},
		{"update of files", register(registerFilesUpdate), true, false},
		{"ring descriptors", register(registerRingFDs), true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			fd, called := callFD(t, unix.EFD_NONBLOCK)
			kick, err := newEventfd()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(kick)
			k := &kicked{seen: make(chan struct{}, 1)}
			l, stop := startAfter(t, func() { refuse(t, c.refused) }, Options{Log: slog.New(slog.DiscardHandler)}, k)
			do(l, func() {
				l.WatchKick(kick)
				l.SetCall(fd)
			})
			b, ring := l.be.(*ringBackend)
			if ring != c.ring || ring && b.calls != c.calls {
				t.Errorf("io_uring: %v, and signals: %v", ring, ring && b.calls)
			}
			for i := range 20 {
				k.want.Add(1)
				wake(kick)
				<-k.seen
				if do(l, func() { k.call.Store(true) }); !called(10 * time.Second) {
					t.Fatalf("call %d was lost", i)
				}
			}
			n := open(t, t.TempDir(), 1<<20, file.Options{})
			run(l, func(task *blk.Task) {
				want, got := bytes.Repeat([]byte{7}, 4096), make([]byte, 4096)
				if err := task.WriteAt(host(t, n), blk.BytesVec(nil, want), 8192, true); err != nil {
					t.Error(err)
				}
				if err := task.ReadAt(host(t, n), blk.BytesVec(nil, got), 8192); err != nil || !bytes.Equal(got, want) {
					t.Errorf("wrong bytes, error %v", err)
				}
			})
			stop()
		})
	}
}
