// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// qsd runs qemu-storage-daemon, an implementation of the protocol that nobody here wrote, on a raw file of size bytes.
// It returns the socket's path and the function that kills the program.
func qsd(t *testing.T, socket string, size int64, export string) (kill func()) {
	t.Helper()
	program, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("qemu-storage-daemon is missing, and CI must have it")
		}
		t.Skip("qemu-storage-daemon is not installed")
	}
	file := socket + ".raw"
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program,
		"--blockdev", "driver=file,node-name=f,discard=unmap,filename="+file,
		"--blockdev", "driver=raw,node-name=d,discard=unmap,file=f",
		"--export", "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path="+socket+","+export)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // nothing survives a test that times out
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("qemu-storage-daemon said: %s", &out)
			}
		})
	}
	t.Cleanup(kill)
	awaitSocket(t, socket)
	return kill
}

// awaitSocket waits until somebody listens at path. To the back-end it is a front-end that goes at once.
func awaitSocket(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func dial(t *testing.T, socket string, opts Options) *Disk {
	t.Helper()
	d, err := Dial(context.Background(), socket, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestAgainstQEMU(t *testing.T) {
	const size = 64 << 20
	for _, tc := range []struct {
		name   string
		export string
		opts   Options
	}{
		{"everything", "writable=on", Options{}},
		{"two queues", "writable=on,num-queues=2", Options{Queues: 2}},
		{"no event index", "writable=on", Options{Features: AllFeatures &^ FeatureEventIdx}},
		{"direct descriptors", "writable=on", Options{Features: AllFeatures &^ FeatureIndirect, QueueSize: 16}},
		{"memory table", "writable=on", Options{ProtocolFeatures: AllProtocolFeatures &^ ProtocolMemSlots}},
		{"no acknowledgements", "writable=on", Options{ProtocolFeatures: AllProtocolFeatures &^ ProtocolReplyAck}},
		{"small ring", "writable=on", Options{QueueSize: 4}},
		{"large ring", "writable=on", Options{QueueSize: 256}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "s")
			qsd(t, socket, size, tc.export)
			d := dial(t, socket, tc.opts)
			c, err := d.Config()
			if err != nil || c.Size() != size || c.BlkSize != 512 {
				t.Fatalf("configuration %+v, %v", c, err)
			}
			exercise(t, d, size)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			if err := d.Flush(); !errors.Is(err, ErrClosed) {
				t.Errorf("flush after Close: %v", err)
			}
		})
	}
}

// exercise checks every operation against a model, with several callers, and over a stop and a start.
func exercise(t *testing.T, d *Disk, size int) {
	t.Helper()
	const callers = 4
	model := make([]byte, size)
	part := size / callers
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			mine := model[i*part:][:part]
			buf := make([]byte, 1536<<10)
			for range 60 {
				n := SectorSize * (1 + rng.IntN(256))
				if rng.IntN(8) == 0 {
					n = SectorSize * (1 + rng.IntN(len(buf)/SectorSize)) // more than one request
				}
				at := SectorSize * rng.IntN((part-n)/SectorSize)
				off := int64(i*part + at)
				var err error
				switch rng.IntN(5) {
				case 0, 1:
					for j := range mine[at : at+n] {
						mine[at+j] = byte(rng.Uint32())
					}
					_, err = d.WriteAt(mine[at:at+n], off)
				case 2:
					clear(mine[at : at+n])
					err = d.WriteZeroes(off, int64(n), rng.IntN(2) == 0)
				case 3:
					_, err = d.ReadAt(buf[:n], off)
					if err == nil && !bytes.Equal(buf[:n], mine[at:at+n]) {
						err = fmt.Errorf("%d bytes at %d differ", n, off)
					}
				case 4:
					err = d.Flush()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if bases, err := d.Stop(); err != nil || len(bases) != d.Queues() {
		t.Fatalf("stop: %v, %v", bases, err)
	}
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := d.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Error("the disk differs from the model")
	}
	if err := d.Discard(0, 1<<20); err != nil {
		t.Error(err)
	}
	if id, err := d.GetID(); err != nil || id == "" {
		t.Errorf("id %q, %v", id, err)
	}
	if _, err := d.ReadAt(got[:512], int64(size)); !errors.Is(err, ErrIO) {
		t.Errorf("read past the end: %v", err)
	}
	if _, err := d.ReadAt(got[:512], 1); err == nil {
		t.Error("misaligned read")
	}
	r := &Request{Type: 99}
	if err := wait(d.Queue(0), r); !errors.Is(err, ErrUnsupported) {
		t.Errorf("request type 99: %v", err)
	}
}

// wait runs one request.
func wait(q *Queue, r *Request) error {
	done := make(chan struct{})
	r.Done = func(*Request) { close(done) }
	if err := q.Submit(r); err != nil {
		return err
	}
	<-done
	return r.Err()
}

func TestQEMUReadOnly(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	qsd(t, socket, 1<<20, "writable=off")
	d := dial(t, socket, Options{})
	if f, _ := d.Features(); f&FeatureRO == 0 {
		t.Error("not read-only")
	}
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrIO) {
		t.Errorf("write: %v", err)
	}
}

// TestQEMULost: without reconnection the requests in flight and the later ones fail, and nothing hangs.
func TestQEMULost(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	kill := qsd(t, socket, 1<<20, "writable=on")
	d := dial(t, socket, Options{})
	kill()
	for range 2 {
		if err := d.Flush(); !errors.Is(err, ErrDisconnected) {
			t.Errorf("flush: %v", err)
		}
	}
	if _, err := d.Config(); !errors.Is(err, ErrDisconnected) {
		t.Errorf("configuration: %v", err)
	}
}

// TestQEMUReconnect: qemu-storage-daemon keeps no in-flight region, so only an idle session survives it.
func TestQEMUReconnect(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	kill := qsd(t, socket, 1<<20, "writable=on")
	d := dial(t, socket, Options{Reconnect: 5 * time.Millisecond})
	want := bytes.Repeat([]byte("blkstream"), 512)
	if _, err := d.WriteAt(want, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Reconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	lost := d.Conn().Done()
	kill()
	<-lost
	for d.Conn() != nil {
		time.Sleep(time.Millisecond)
	}
	qsd(t, socket, 1<<20, "writable=on")
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("after the restart: %v", err)
	}
	// A reconnect is counted when all is set up again; the read may be through a moment before.
	for deadline := time.Now().Add(5 * time.Second); d.Reconnects() < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d reconnects", d.Reconnects())
		}
	}
}

func TestQEMUDirtyLog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	qsd(t, socket, 1<<20, "writable=on")
	d := dial(t, socket, Options{})
	gpa, err := d.Alloc(16 << 10)
	if err != nil {
		t.Fatal(err)
	}
	log, err := d.StartLog()
	if err != nil {
		t.Fatal(err)
	}
	if err := wait(d.Queue(0), &Request{Type: TypeIn, Data: d.Segments(nil, gpa+4096, 8192)}); err != nil {
		t.Fatal(err)
	}
	for _, page := range []struct {
		gpa   uint64
		dirty bool
	}{
		{gpa, false},
		{gpa + 4096, true},
		{gpa + 8192, true},
		{gpa + 12288, false},
		{d.Queue(0).Ring().Used, true},
	} {
		if log.Dirty(page.gpa) != page.dirty {
			t.Errorf("page %#x: dirty is %v", page.gpa, !page.dirty)
		}
	}
	if len(log.Pages()) > 8 {
		t.Errorf("%d pages are dirty", len(log.Pages()))
	}
	if err := d.StopLog(); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestQEMUHotplug(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	qsd(t, socket, 1<<20, "writable=on")
	d := dial(t, socket, Options{})
	for range 3 {
		gpa, err := d.AddMemory(1 << 20)
		if err != nil {
			t.Fatal(err)
		}
		if err := wait(d.Queue(0), &Request{Type: TypeIn, Data: d.Segments(nil, gpa, 65536)}); err != nil {
			t.Fatal(err)
		}
		if err := d.RemoveMemory(gpa); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.RemoveMemory(ringGPA); err == nil {
		t.Error("removed the rings")
	}
}

// TestAllocations: submitting and reaping allocate nothing, or a load generator would measure itself.
func TestAllocations(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	qsd(t, socket, 1<<20, "writable=on")
	d := dial(t, socket, Options{Manual: true}) // the test reaps
	q := d.Queue(0)
	gpa, err := d.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	left := 0
	r := &Request{Type: TypeIn, Data: d.Segments(nil, gpa, 4096)}
	r.Done = func(r *Request) {
		if left--; left > 0 {
			if err := q.Add(r); err != nil {
				t.Error(err)
			}
		}
	}
	allocs := testing.AllocsPerRun(5, func() {
		left = 100
		if err := q.Submit(r); err != nil {
			t.Fatal(err)
		}
		for left > 0 {
			q.mu.Lock()
			q.reap()
			q.mu.Unlock()
		}
	})
	if allocs > 3 { // the runtime's own, now and then
		t.Errorf("%v allocations for 100 requests", allocs)
	}
}

func TestDialErrors(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	qsd(t, socket, 1<<20, "writable=on")
	for _, tc := range []struct {
		name, path string
		opts       Options
		want       string
	}{
		{"nobody there", socket + "x", Options{}, "no such file"},
		{"too many queues", socket, Options{Queues: 9}, "the back-end has 1"},
		{"queue size", socket, Options{QueueSize: 100}, "power of two"},
		{"queues", socket, Options{Queues: -1}, "-1 queues"},
		{"queues without protocol features", socket, Options{Queues: 2, Features: AllFeatures &^ FeatureProtocol}, "need protocol"},
	} {
		d, err := Dial(t.Context(), tc.path, tc.opts)
		if err == nil {
			d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}
