// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// kvmUsable finds out whether the guest's kernel really runs under KVM: on some
// machines /dev/kvm is there, creates whatever it is asked for, runs a few
// instructions, and then spins. Without a root file system a kernel that runs
// panics within a second or two.
var kvmUsable = sync.OnceValue(func() bool {
	if _, err := os.Stat("/dev/kvm"); err != nil || os.Getenv("BLKSTREAM_TEST_ACCEL") == "tcg" {
		return false
	}
	cache, err := cacheDir()
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Second)
	defer cancel()
	// The error tells nothing: a panic and a success end alike.
	console, _ := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-display", "none", "-no-reboot",
		"-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio",
		"-kernel", filepath.Join(cache, "vmlinuz"), "-append", "console=ttyS0 panic=-1").Output()
	return bytes.Contains(console, []byte("Kernel panic"))
})

// StartChild starts cmd so that the kernel kills it when this process dies: a
// test binary that is killed leaves no guest or daemon behind.
func StartChild(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	f := fork{cmd, make(chan error)}
	forks() <- f
	return <-f.done
}

type fork struct {
	cmd  *exec.Cmd
	done chan error
}

// forks is served by one thread that lives as long as the process: the
// parent-death signal is sent when the thread that forked ends, and Go ends threads.
var forks = sync.OnceValue(func() chan fork {
	c := make(chan fork)
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f.done <- f.cmd.Start()
		}
	}()
	return c
})
