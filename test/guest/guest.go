// SPDX-License-Identifier: Apache-2.0

// Package guest boots small Linux guests under QEMU with vhost-user-blk disks,
// for tests that want a real driver at the other end. A guest is a kernel from
// Debian's package, an initramfs with busybox, and an agent (process 1) that
// the host talks to over a serial port.
//
//	g := guest.Boot(t, guest.Options{Disks: []guest.Disk{{Socket: path}}})
//	out, err := g.Run("cat /sys/block/vda/size")
//
// scripts/setup-test.sh fetches what this needs.
package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/blkstream/blkstream/test/guest/wire"
)

// Disk is one vhost-user-blk device; the first is /dev/vda in the guest.
type Disk struct {
	Socket    string // of the back-end
	Queues    int    // default 1; no more than the back-end offers
	Reconnect bool   // try again each second when the back-end dies
}

// Options describe a guest. The zero value is a diskless one.
type Options struct {
	Disks        []Disk
	MemMB        int  // default 256
	SMP          int  // virtual CPUs, default 2
	HotplugSlots int  // memory modules that HotplugMemory may add
	Incoming     bool // do not boot: wait for another guest to be migrated here
	Paused       bool // with Incoming: stay stopped after the migration, until Resume
}

// Timeouts are generous: without KVM the guest is emulated, and other tests may
// have the machine's cores.
const (
	bootTimeout    = 2 * time.Minute
	requestTimeout = 2 * time.Minute
	migrateTimeout = 3 * time.Minute
)

// Guest is a running virtual machine.
type Guest struct {
	opts Options
	dir  string // sockets, logs; short, as socket paths are limited to 107 bytes
	cmd  *exec.Cmd
	qmp  *qmp
	port net.Conn // the agent's serial port

	exited chan struct{} // QEMU has ended

	mu      sync.Mutex // guards what follows
	nextID  uint64
	pending map[uint64]chan *wire.Reply
	hello   chan struct{} // closed when the agent comes up; replaced when a boot begins
	booting bool          // a hello is due
	failed  error         // why no request can succeed any more
	modules int           // memory modules plugged so far
}

// Boot starts a guest for a test and waits until it answers. It is shut down
// when the test ends; if the test failed, the console's log is shown.
func Boot(tb testing.TB, opts Options) *Guest {
	tb.Helper()
	Need(tb)
	g, err := Start(tb.Context(), opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("guest %s", g.log())
		}
		g.Quit()
	})
	return g
}

// Missing says what this machine lacks to run guests, nil if nothing.
func Missing() error {
	for _, tool := range []string{"qemu-system-x86_64", "go"} {
		if _, err := exec.LookPath(tool); err != nil {
			return err
		}
	}
	dir, err := cacheDir()
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, "complete"))
	return err
}

// Need skips the test if guests or one of the named programs cannot be run
// here; in CI it fails instead, as a check that silently does not happen is none.
func Need(tb testing.TB, tools ...string) {
	tb.Helper()
	err := Missing()
	for _, tool := range tools {
		_, e := exec.LookPath(tool)
		err = errors.Join(err, e)
	}
	switch {
	case err == nil:
	case os.Getenv("CI") != "":
		tb.Fatalf("run scripts/setup-test.sh first: %v", err)
	default:
		tb.Skipf("run scripts/setup-test.sh first: %v", err)
	}
}

// Start boots a guest and waits until it answers (with Incoming: until QEMU
// does). Quit must be called on it.
func Start(ctx context.Context, opts Options) (*Guest, error) {
	if opts.MemMB == 0 {
		opts.MemMB = 256
	}
	if opts.SMP == 0 {
		opts.SMP = 2
	}
	initrd, err := initramfs()
	if err != nil {
		return nil, err
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("/tmp", "bsg")
	if err != nil {
		return nil, err
	}
	g := &Guest{
		opts: opts, dir: dir, exited: make(chan struct{}),
		pending: map[uint64]chan *wire.Reply{}, hello: make(chan struct{}), booting: !opts.Incoming,
	}
	if err := g.launch(ctx, filepath.Join(cache, "vmlinuz"), initrd); err != nil {
		err = fmt.Errorf("%w\n%s", err, g.log())
		g.Quit()
		return nil, err
	}
	return g, nil
}

func (g *Guest) launch(ctx context.Context, kernel, initrd string) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	qmpSock, err := net.Listen("unix", g.path("qmp"))
	if err != nil {
		return err
	}
	defer qmpSock.Close()
	agentSock, err := net.Listen("unix", g.path("agent"))
	if err != nil {
		return err
	}
	defer agentSock.Close()

	g.cmd = exec.Command("qemu-system-x86_64", g.args(kernel, initrd)...)
	stderr, err := os.Create(g.path("stderr"))
	if err != nil {
		return err
	}
	defer stderr.Close()
	g.cmd.Stderr = stderr
	if err := StartChild(g.cmd); err != nil {
		g.cmd = nil
		return err
	}
	go func() {
		g.cmd.Wait()
		g.fail(errGone)
		qmpSock.Close()
		agentSock.Close()
		close(g.exited)
	}()
	// QEMU may hang where it answers nobody, in the hands of a silent back-end: its end ends every wait below.
	stop := context.AfterFunc(ctx, func() { g.cmd.Process.Kill() })
	defer stop()
	if g.port, err = agentSock.Accept(); err != nil {
		return fmt.Errorf("guest: QEMU did not open its serial port: %w", err)
	}
	conn, err := qmpSock.Accept()
	if err != nil {
		return fmt.Errorf("guest: QEMU did not open its monitor: %w", err)
	}
	go g.receive()
	if g.qmp, err = newQMP(conn); err != nil {
		return err
	}
	if g.opts.Incoming {
		return nil
	}
	return g.awaitHello(ctx)
}

func (g *Guest) args(kernel, initrd string) []string {
	o := g.opts
	// The 8 KiB work around QEMU before 9.0 (fixed by its commit 03bfc2188f): if memory is a multiple of 256 KiB, the
	// migration of an emulated guest clears dirty bits in a way that misses later writes of the CPUs.
	mem := fmt.Sprintf("%dK", o.MemMB<<10+8)
	size := mem
	if o.HotplugSlots > 0 {
		size = fmt.Sprintf("%s,slots=%d,maxmem=%dM", mem, o.HotplugSlots, o.MemMB+4096)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "pc,memory-backend=m", "-smp", fmt.Sprint(o.SMP), "-m", size,
		"-object", "memory-backend-memfd,id=m,share=on,size=" + mem,
		"-kernel", kernel, "-initrd", initrd,
		"-append", "console=ttyS0 panic=-1 quiet rdinit=/init memhp_default_state=online",
		// A reboot that no test asked for, a panic's too, ends the machine.
		"-action", "reboot=shutdown",
		"-chardev", "file,id=console,path=" + g.path("console"), "-serial", "chardev:console",
		"-chardev", "socket,id=agent,path=" + g.path("agent"), "-serial", "chardev:agent",
		"-chardev", "socket,id=qmp,path=" + g.path("qmp"), "-mon", "chardev=qmp,mode=control",
	}
	if kvmUsable() {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", "tcg,thread=multi")
	}
	for i, d := range o.Disks {
		chardev := fmt.Sprintf("socket,id=disk%d,path=%s", i, d.Socket)
		if d.Reconnect {
			chardev += ",reconnect=1"
		}
		args = append(args, "-chardev", chardev,
			"-device", fmt.Sprintf("vhost-user-blk-pci,id=vd%d,chardev=disk%d,num-queues=%d", i, i, max(1, d.Queues)))
	}
	if o.Incoming {
		args = append(args, "-incoming", "unix:"+g.path("migrate"))
	}
	if o.Paused {
		args = append(args, "-S")
	}
	return args
}

func (g *Guest) path(name string) string { return filepath.Join(g.dir, name) }

// receive takes the agent's replies to those who wait for them.
func (g *Guest) receive() {
	lines := bufio.NewReader(g.port)
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			g.fail(fmt.Errorf("guest: serial port: %w", err))
			return
		}
		var r wire.Reply
		if json.Unmarshal(line, &r) != nil {
			continue // the firmware's chatter, or a line cut short by a reset
		}
		g.mu.Lock()
		switch waiting := g.pending[r.ID]; {
		case r.Hello && g.booting:
			g.booting = false
			close(g.hello)
		case r.Hello:
			defer g.fail(errors.New("guest: rebooted without being asked to"))
		case waiting != nil:
			delete(g.pending, r.ID)
			waiting <- &r
		}
		g.mu.Unlock()
	}
}

// fail ends all requests under way and to come.
func (g *Guest) fail(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failed == nil {
		g.failed = err
	}
	for id, waiting := range g.pending {
		delete(g.pending, id)
		close(waiting)
	}
	if g.booting {
		g.booting = false
		close(g.hello)
	}
}

func (g *Guest) failure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failed
}

func (g *Guest) awaitHello(ctx context.Context) error {
	g.mu.Lock()
	hello := g.hello
	g.mu.Unlock()
	select {
	case <-hello:
		return g.failure()
	case <-ctx.Done():
		return fmt.Errorf("guest: did not come up: %w", ctx.Err())
	}
}

// call sends a request to the agent and waits for its reply.
func (g *Guest) call(req *wire.Request) (*wire.Reply, error) {
	waiting := make(chan *wire.Reply, 1)
	g.mu.Lock()
	if g.failed != nil {
		g.mu.Unlock()
		return nil, g.failed
	}
	g.nextID++
	req.ID = g.nextID
	g.pending[req.ID] = waiting
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.pending, req.ID)
	}()
	line, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(requestTimeout)
	defer timeout.Stop()
	if err := g.port.SetWriteDeadline(time.Now().Add(requestTimeout)); err != nil {
		return nil, fmt.Errorf("guest: %s: %w", req.Op, err)
	}
	if _, err := g.port.Write(append(line, '\n')); err != nil {
		return nil, fmt.Errorf("guest: %s: %w", req.Op, err)
	}
	select {
	case r, ok := <-waiting:
		if !ok {
			return nil, fmt.Errorf("guest: %s: %w", req.Op, g.failure())
		}
		if r.Err != "" {
			return r, fmt.Errorf("guest: %s: %s", req.Op, strings.TrimSpace(r.Err+" "+r.Out))
		}
		return r, nil
	case <-timeout.C:
		return nil, fmt.Errorf("guest: %s %s%s: no answer in %v", req.Op, req.Cmd, req.Disk, requestTimeout)
	}
}

// Run runs cmd in the guest's shell and returns what it printed on both outputs.
// A status other than 0 is an error.
func (g *Guest) Run(cmd string) (string, error) {
	r, err := g.call(&wire.Request{Op: wire.Run, Cmd: cmd})
	if r == nil {
		return "", err
	}
	return r.Out, err
}

// QMP executes a command of QEMU's machine protocol. args and out may be nil.
func (g *Guest) QMP(cmd string, args, out any) error { return g.qmp.execute(cmd, args, out) }

// Reset presses the reset button: whatever the guest has in flight is cut off,
// its writers and their tables are gone. Reset returns when the guest is up again.
func (g *Guest) Reset() error {
	return g.restart(func() error { return g.QMP("system_reset", nil, nil) })
}

// Reboot lets the guest's kernel shut its devices down and start anew.
func (g *Guest) Reboot() error {
	return g.restart(func() error {
		// In the background, so that the shell's answer still gets out.
		_, err := g.Run("(sleep 0.2; reboot -f) >/dev/null 2>&1 &")
		return err
	})
}

func (g *Guest) restart(trigger func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	if err := g.QMP("set-action", map[string]string{"reboot": "reset"}, nil); err != nil {
		return err
	}
	g.mu.Lock()
	g.hello, g.booting = make(chan struct{}), true
	g.mu.Unlock()
	if err := trigger(); err != nil {
		return err
	}
	if err := g.awaitHello(ctx); err != nil {
		return err
	}
	return g.QMP("set-action", map[string]string{"reboot": "shutdown"}, nil)
}

// HotplugMemory adds a memory module of mb MiB and waits until the guest's
// kernel uses it. mb must be a multiple of 128.
func (g *Guest) HotplugMemory(mb int) error {
	g.modules++
	id := fmt.Sprintf("dimm%d", g.modules)
	const total = "awk '/MemTotal/ {print $2}' /proc/meminfo"
	before, err := g.Run(total)
	if err != nil {
		return err
	}
	err = g.QMP("object-add", map[string]any{
		"qom-type": "memory-backend-memfd", "id": "m" + id, "size": mb << 20, "share": true,
	}, nil)
	if err != nil {
		return err
	}
	if err := g.QMP("device_add", map[string]any{"driver": "pc-dimm", "id": id, "memdev": "m" + id}, nil); err != nil {
		return err
	}
	_, err = g.Run(fmt.Sprintf("for i in $(seq 100); do [ $(%s) -gt %s ] && exit 0; sleep 0.1; done; echo no new memory; exit 1",
		total, strings.TrimSpace(before)))
	return err
}

// Migrate moves the running guest into to, which was started with Incoming, and
// the same disks and sizes. Afterwards g is stopped and only its Quit is of
// use; to answers in its place, once resumed if it was started with Paused.
func (g *Guest) Migrate(to *Guest) error {
	ctx, cancel := context.WithTimeout(context.Background(), migrateTimeout)
	defer cancel()
	err := g.QMP("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 40, "downtime-limit": 1000}, nil)
	if err != nil {
		return err
	}
	if err := g.QMP("migrate", map[string]string{"uri": "unix:" + to.path("migrate")}, nil); err != nil {
		return err
	}
	var info struct {
		Status string `json:"status"`
		Error  string `json:"error-desc"`
	}
	for info.Status != "completed" {
		if err := g.QMP("query-migrate", nil, &info); err != nil {
			return err
		}
		if info.Status == "failed" || info.Status == "cancelled" {
			return fmt.Errorf("guest: migration %s: %s", info.Status, info.Error)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("guest: migration still %s: %w", info.Status, ctx.Err())
		}
		time.Sleep(20 * time.Millisecond)
	}
	// The agent moved with its memory: it goes on counting where g stopped.
	g.mu.Lock()
	next := g.nextID
	g.mu.Unlock()
	to.mu.Lock()
	to.nextID = next
	to.mu.Unlock()
	if to.opts.Paused {
		return nil
	}
	return to.qmp.wait(ctx, "RESUME", 0)
}

// CompareMemory reports an error unless g, which was migrated to to, left it all of its memory. to was started with
// Paused and has not been resumed.
func (g *Guest) CompareMemory(to *Guest) error {
	ctx, cancel := context.WithTimeout(context.Background(), migrateTimeout)
	defer cancel()
	for { // g is done before to has taken in the last of it
		var s struct{ Status string }
		if err := to.QMP("query-status", nil, &s); err != nil {
			return err
		}
		if s.Status != "inmigrate" {
			break
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("guest: still migrating in: %w", ctx.Err())
		}
	}
	// Below 3.5 GiB, memory is in one piece from address 0.
	size := g.opts.MemMB << 20
	var saved [2][]byte
	for i, one := range []*Guest{g, to} {
		file := one.path("memory")
		err := one.QMP("pmemsave", map[string]any{"val": 0, "size": size, "filename": file}, nil)
		if err == nil {
			saved[i], err = os.ReadFile(file)
		}
		if err := errors.Join(err, os.Remove(file)); err != nil {
			return fmt.Errorf("guest: saving memory: %w", err)
		}
	}
	const page = 4 << 10
	var differ []string
	for off := 0; off < size; off += page {
		if !bytes.Equal(saved[0][off:off+page], saved[1][off:off+page]) {
			differ = append(differ, fmt.Sprintf("%#x", off))
		}
	}
	if len(differ) > 0 {
		return fmt.Errorf("guest: %d pages did not move with the guest, the first at %v", len(differ), differ[:min(8, len(differ))])
	}
	return nil
}

// Resume lets a stopped guest run.
func (g *Guest) Resume() error { return g.QMP("cont", nil, nil) }

// Quit ends QEMU, as pulling the plug does, and removes its files. It may be
// called more than once.
func (g *Guest) Quit() {
	if g.cmd != nil {
		g.cmd.Process.Kill()
		<-g.exited
	}
	for _, c := range []net.Conn{g.port, g.qmpConn()} {
		if c != nil {
			c.Close()
		}
	}
	os.RemoveAll(g.dir)
}

func (g *Guest) qmpConn() net.Conn {
	if g.qmp == nil {
		return nil
	}
	return g.qmp.conn
}

// log is what there is to see when a guest misbehaves.
func (g *Guest) log() string {
	var b strings.Builder
	if g.cmd != nil {
		fmt.Fprintf(&b, "command: %s\n", strings.Join(g.cmd.Args, " "))
		select {
		case <-g.exited:
			fmt.Fprintf(&b, "QEMU ended: %v\n", g.cmd.ProcessState)
		default:
		}
	}
	stderr, err := os.ReadFile(g.path("stderr"))
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	fmt.Fprintf(&b, "QEMU's words:\n%s\n", stderr)
	console, err := os.ReadFile(g.path("console"))
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	if len(console) > 16<<10 {
		console = console[len(console)-16<<10:]
	}
	fmt.Fprintf(&b, "console:\n%s", console)
	return b.String()
}
