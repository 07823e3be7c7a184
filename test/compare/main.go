// SPDX-License-Identifier: Apache-2.0

// Command compare measures blkstreamd beside qemu-storage-daemon: the same file, the same client, in turn, again and
// again, and prints medians and their ratio. The machine should be idle; even so only the ratios mean something.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

type cell struct {
	place, rw, bs string
	depth         int
}

type result struct {
	IOPS float64 `json:"iops"`
	CPU  float64 `json:"server_cpu_us_per_op"`
}

type peer struct {
	name  string
	start func(image string, direct bool, socket string) *exec.Cmd
}

func main() {
	runs := flag.Int("runs", 5, "repetitions of each measurement")
	seconds := flag.Duration("time", 2*time.Second, "length of one")
	size := flag.Int64("size", 1<<30, "bytes of the test file")
	flag.Parse()
	if err := run(*runs, *seconds, *size); err != nil {
		fmt.Fprintf(os.Stderr, "compare: %v\n", err)
		os.Exit(1)
	}
}

func run(runs int, length time.Duration, size int64) (err error) {
	dir, err := os.MkdirTemp("/var/tmp", "blkstream-bench")
	if err != nil {
		return err
	}
	shm, err := os.MkdirTemp("/dev/shm", "blkstream-bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir), os.RemoveAll(shm)) }()
	for _, p := range []string{"cmd/blkstreamd", "test/bench"} {
		cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/blkstream/blkstream/"+p)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", p, err, out)
		}
	}
	peers := []peer{
		{"blkstreamd", func(image string, direct bool, socket string) *exec.Cmd {
			conf := filepath.Join(dir, "c.toml")
			cache := "writeback"
			if direct {
				cache = "none"
			}
			text := fmt.Sprintf("[daemon]\ncontrol = %q\nstate_dir = %q\n[[disk]]\nid = \"d\"\nsocket = %q\nimage = %q\nformat = \"raw\"\ncache = %q\n",
				dir+"/control", dir+"/state", socket, image, cache)
			if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
				panic(err)
			}
			return exec.Command(filepath.Join(dir, "blkstreamd"), "--config", conf)
		}},
		{"qemu-storage-daemon", func(image string, direct bool, socket string) *exec.Cmd {
			cache, aio := "off", "threads"
			if direct {
				cache, aio = "on", "io_uring"
			}
			return exec.Command("qemu-storage-daemon", "--object", "iothread,id=t",
				"--blockdev", fmt.Sprintf("driver=file,node-name=f,filename=%s,cache.direct=%s,aio=%s", image, cache, aio),
				"--blockdev", "driver=raw,node-name=d,file=f",
				"--export", "type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=t,addr.type=unix,addr.path="+socket)
		}},
	}
	images := map[string]string{"disk, direct": filepath.Join(dir, "image"), "tmpfs": filepath.Join(shm, "image")}
	for _, image := range images {
		if err := fill(image, size); err != nil {
			return err
		}
	}
	fmt.Printf("medians of %d runs of %v in turn; peer: qemu-storage-daemon with one iothread\n\n", runs, length)
	fmt.Printf("%-13s %-10s %-4s %5s %12s %12s %7s %10s %10s %7s\n",
		"storage", "", "", "depth", "IOPS", "peer", "ratio", "CPU us/op", "peer", "ratio")
	for _, place := range []string{"disk, direct", "tmpfs"} {
		for _, c := range []cell{
			{place, "randread", "4k", 1}, {place, "randwrite", "4k", 1}, {place, "randread", "4k", 32},
			{place, "randwrite", "4k", 32}, {place, "read", "1M", 8}, {place, "write", "1M", 8},
		} {
			var iops, cpu [2][]float64
			for range runs {
				for i, p := range peers {
					r, err := measure(dir, p, images[place], c, length)
					if err != nil {
						return fmt.Errorf("%s: %w", p.name, err)
					}
					iops[i], cpu[i] = append(iops[i], r.IOPS), append(cpu[i], r.CPU)
				}
			}
			a, b, ca, cb := median(iops[0]), median(iops[1]), median(cpu[0]), median(cpu[1])
			fmt.Printf("%-13s %-10s %-4s %5d %12.0f %12.0f %7.2f %10.1f %10.1f %7.2f\n", c.place, c.rw, c.bs, c.depth, a, b, a/b, ca, cb, ca/cb)
		}
	}
	return nil
}

// fill writes the whole file, so that no run pays for allocation.
func fill(path string, size int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(i*7 + 1)
	}
	for off := int64(0); off < size; off += int64(len(b)) {
		if _, err := f.WriteAt(b, off); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	return errors.Join(f.Sync(), f.Close())
}

func measure(dir string, p peer, image string, c cell, length time.Duration) (r result, err error) {
	socket := filepath.Join(dir, "s")
	os.Remove(socket) //nolint:errcheck // of the last run
	server := p.start(image, c.place != "tmpfs", socket)
	if err := server.Start(); err != nil {
		return r, err
	}
	defer func() {
		server.Process.Signal(os.Interrupt) //nolint:errcheck // it may have ended
		server.Wait()                       //nolint:errcheck // a signal ends it
	}()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return r, errors.New("it does not serve")
		}
	}
	out, err := exec.Command(filepath.Join(dir, "bench"), "--socket", socket, "--rw", c.rw, "--bs", c.bs, "--depth", fmt.Sprint(c.depth),
		"--time", length.String(), "--server-pid", fmt.Sprint(server.Process.Pid), "--json").Output()
	if err != nil {
		return r, fmt.Errorf("load generator: %w: %s", err, out)
	}
	return r, json.Unmarshal(out, &r)
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}
