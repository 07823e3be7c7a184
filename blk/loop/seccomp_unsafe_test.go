// SPDX-License-Identifier: Apache-2.0

package loop

import (
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// refusal makes a system call fail where its argument has the value, or has another one; arg -1: always.
type refusal struct {
	call  uint32
	errno unix.Errno
	arg   int
	value uint32
	other bool
}

// refuse has the kernel refuse system calls of the calling thread, for as long as that lives.
func refuse(t *testing.T, rs ...refusal) {
	t.Helper()
	const (
		load, jumpIfEqual, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
		offCall, offArgs       = 0, 16 // of struct seccomp_data
		allow, fail            = 0x7fff0000, 0x00050000
	)
	var prog []unix.SockFilter
	for _, r := range rs {
		check := []unix.SockFilter{{Code: ret, K: fail | uint32(r.errno)}}
		if r.arg >= 0 {
			jump := unix.SockFilter{Code: jumpIfEqual, Jf: 1, K: r.value}
			if r.other {
				jump.Jt, jump.Jf = 1, 0
			}
			check = append([]unix.SockFilter{{Code: load, K: offArgs + 8*uint32(r.arg)}, jump}, check...)
		}
		prog = append(prog, unix.SockFilter{Code: load, K: offCall}, unix.SockFilter{Code: jumpIfEqual, Jf: uint8(len(check)), K: r.call})
		prog = append(prog, check...)
	}
	prog = append(prog, unix.SockFilter{Code: ret, K: allow})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		t.Error(err)
	}
	p := &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	// SAFETY: p has the layout of struct sock_fprog, and lives on the heap with what it points to.
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(p)), 0, 0); err != nil {
		t.Error(err)
	}
	runtime.KeepAlive(p)
}
