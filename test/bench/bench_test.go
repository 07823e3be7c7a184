// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// qsd serves a raw file of 8 MiB with two queues and returns the socket, the file and the process.
func qsd(t *testing.T) (socket, file string, pid int) {
	t.Helper()
	program, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("qemu-storage-daemon is missing, and CI must have it")
		}
		t.Skip("qemu-storage-daemon is not installed")
	}
	socket = filepath.Join(t.TempDir(), "s")
	file = socket + ".raw"
	if err := os.WriteFile(file, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program,
		"--blockdev", "driver=file,node-name=f,filename="+file, "--blockdev", "driver=raw,node-name=d,file=f",
		"--export", "type=vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path="+socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			_ = c.Close()
			return socket, file, cmd.Process.Pid
		}
		if time.Now().After(deadline) {
			t.Fatal("qemu-storage-daemon does not listen")
		}
	}
}

func bench(t *testing.T, args string, more ...any) (result, error) {
	t.Helper()
	var out bytes.Buffer
	err := run(strings.Fields(fmt.Sprintf(args, more...)+" --json"), &out)
	var res result
	if jerr := json.Unmarshal(out.Bytes(), &res); jerr != nil && err == nil {
		t.Fatalf("%q: %v", &out, jerr)
	}
	return res, err
}

func TestLoad(t *testing.T) {
	socket, file, pid := qsd(t)
	for _, args := range []string{
		"--rw read --ops 500",
		"--rw write --bs 64k --depth 8 --ops 500",
		"--rw randrw --depth 16 --queues 2 --ops 500 --server-pid " + fmt.Sprint(pid),
		"--rw randread --ops 500 --rate 20000 --depth 4",
		"--rw randrw --verify --depth 16 --queues 2 --ops 500 --size 1M --offset 2M",
		"--rw randwrite --verify --depth 8 --ops 500 --size 16k --bs 4k", // fewer blocks than depth
	} {
		res, err := bench(t, "--socket %s %s", socket, args)
		if err != nil || res.Ops != 500 || res.Errors != 0 || res.P50 <= 0 || res.Max < res.P999 || res.P999 < res.P50 {
			t.Errorf("%s: %+v, %v", args, res, err)
		}
		if strings.Contains(args, "verify") != (res.Verified > 0) || strings.Contains(args, "pid") != (res.CPUPerOp > 0) {
			t.Errorf("%s: %+v", args, res)
		}
	}

	// Damage one block behind the server's back: the next run must find it and say where it is.
	if _, err := bench(t, "--socket %s --rw write --verify --ops 2048", socket); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damage"), 5<<20+100); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	res, err := bench(t, "--socket %s --rw read --verify --ops 2048 --depth 4", socket)
	if !errors.Is(err, errVerify) || !strings.Contains(err.Error(), "offset 5242880:") || res.Errors != 1 {
		t.Errorf("damaged block: %+v, %v", res, err)
	}
}

func TestTime(t *testing.T) {
	socket, _, _ := qsd(t)
	res, err := bench(t, "--socket %s --time 100ms --depth 4", socket)
	if err != nil || res.Seconds < 0.1 || res.Seconds > 5 || res.Ops == 0 {
		t.Errorf("%+v, %v", res, err)
	}
}

func TestVerify(t *testing.T) {
	j := &job{bs: 4096, offset: 8192, seed: 7}
	for _, tc := range []struct {
		name   string
		change func(b []byte, c, other *checker)
		want   string // of the error; empty: none
	}{
		{"good", func([]byte, *checker, *checker) {}, ""},
		{"zeros", func(b []byte, _, _ *checker) { clear(b) }, "not a block"},
		{"one bit", func(b []byte, _, _ *checker) { b[4095] ^= 1 }, "checksum"},
		{"torn", func(b []byte, _, _ *checker) { clear(b[512:1024]) }, "checksum"},
		{"older", func(_ []byte, c, _ *checker) { c.gens[3] = 2 }, "generation 1, want 2"},
		{"another place", func(b []byte, c, _ *checker) { c.fill(b, 4) }, "belongs to offset"},
		{"another run", func(b []byte, _, other *checker) { other.fill(b, 3) }, "seed 8"},
		{"not ours", func(b []byte, c, _ *checker) { clear(b); c.gens[3] = 0 }, ""},
		{"another run, whole", func(b []byte, c, other *checker) { other.fill(b, 3); c.gens[3] = 0 }, ""},
		{"another run, torn", func(b []byte, c, other *checker) { other.fill(b, 3); b[99]++; c.gens[3] = 0 }, "checksum"},
	} {
		c := newChecker(j, 1, 8)
		other := newChecker(&job{bs: 4096, offset: 8192, seed: 8}, 1, 8)
		b := make([]byte, 4096)
		c.gens[3] = c.fill(b, 3)
		tc.change(b, c, other)
		err := c.verify(b, 3)
		if (tc.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestHistogram(t *testing.T) {
	for _, ns := range []int64{0, 1, 127, 128, 129, 1000, 123456, 1 << 40, 1<<62 + 12345} {
		if h := highest(bucket(ns)); h < ns || h-ns > ns/64 {
			t.Errorf("%d counts as %d", ns, h)
		}
		if bucket(highest(bucket(ns))) != bucket(ns) || bucket(highest(bucket(ns))+1) == bucket(ns) {
			t.Errorf("%d: the end of its bucket is wrong", ns)
		}
	}
	var h, sum histogram
	for i := range int64(1000) {
		h.add((i + 1) * 1000)
	}
	sum.merge(&h)
	for q, want := range map[float64]int64{0.5: 501_000, 0.99: 991_000, 1: 1_000_000} {
		if got := sum.quantile(q); got < want || got > want+want/60 {
			t.Errorf("quantile %v: %d, want about %d", q, got, want)
		}
	}
}

func TestUsage(t *testing.T) {
	for _, args := range []string{
		"", "--socket x --rw no", "--socket x --bs 100", "--socket x --bs 0", "--socket x --depth 0", "--socket x --queues 0",
		"--socket x --offset 512", "--socket x --size x", "--socket x --size 99999999999T", "--socket x --ops -1", "--socket x more", "--no",
	} {
		if _, err := parse(strings.Fields(args)); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v", args, err)
		}
	}
	var s size
	for text, want := range map[string]size{"0": 0, "512": 512, "4k": 4096, "4K": 4096, "3M": 3 << 20, "2g": 2 << 30, "1T": 1 << 40} {
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
	}
}

func TestServerCPU(t *testing.T) {
	if d, err := serverCPU(os.Getpid()); err != nil || d <= 0 {
		t.Errorf("%v, %v", d, err)
	}
	if _, err := serverCPU(1 << 30); err == nil {
		t.Error("no such process, and no error")
	}
}
