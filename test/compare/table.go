// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"time"
)

// place is where an image lies and how it is opened.
type place struct {
	name, format string
	tmpfs        bool
	empty        bool // a new image each time, so that writes allocate
}

var places = []place{
	{name: "disk, direct, raw", format: "raw"},
	{name: "tmpfs, raw", format: "raw", tmpfs: true},
	{name: "disk, direct, qcow2", format: "qcow2"},
	{name: "disk, direct, empty qcow2", format: "qcow2", empty: true},
}

type cell struct {
	rw, bs string
	depth  int
}

var cells = []cell{
	{"randread", "4k", 1}, {"randwrite", "4k", 1}, {"randread", "4k", 32}, {"randwrite", "4k", 32}, {"read", "1M", 8}, {"write", "1M", 8},
}

// firstWrites is what is measured in empty images.
var firstWrites = []cell{{"write", "64k", 1}, {"write", "64k", 8}, {"randwrite", "4k", 1}, {"randwrite", "4k", 32}}

// result is what the load generator says.
type result struct {
	IOPS float64 `json:"iops"`
	CPU  float64 `json:"server_cpu_us_per_op"`
	P99  float64 `json:"p99_us"`
	Max  float64 `json:"max_us"`
}

// table compares requests a second, the 99th percentile of latency, and CPU time a request with qemu-storage-daemon's
// vhost-user-blk export with one iothread.
func (b *bench) table() error {
	header := false
	for _, p := range places {
		use, image := cells, b.path("image")
		if p.empty {
			use = firstWrites
		}
		if p.tmpfs {
			image = b.shm + "/image"
		}
		ready := false
		for _, c := range use {
			if !b.only.MatchString(fmt.Sprintf("%s %s %s %d", p.name, c.rw, c.bs, c.depth)) {
				continue
			}
			if !header {
				fmt.Printf("\nagainst qemu-storage-daemon; runs of %v\n", b.length)
				fmt.Printf("%-26s %-9s %-4s %5s %9s %9s %6s %9s %9s %6s %8s %8s %6s\n", "storage", "", "", "depth",
					"IOPS", "peer", "ratio", "p99 us", "peer", "ratio", "CPU us", "peer", "ratio")
				header = true
			}
			if !ready && !p.empty {
				if err := b.image(p, image); err != nil {
					return err
				}
				ready = true
			}
			if err := b.row(p, image, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) row(p place, image string, c cell) error {
	var iops, p99, cpu [2][]float64
	for range b.runs {
		for i, start := range []func(place, string) (*server, error){b.ours, b.qsd} {
			if p.empty {
				if err := b.image(p, image); err != nil {
					return err
				}
			}
			s, err := start(p, image)
			if err != nil {
				return err
			}
			r, err := b.load(s, c.rw, c.bs, c.depth, b.length)
			s.stop()
			if err != nil {
				return err
			}
			iops[i], p99[i], cpu[i] = append(iops[i], r.IOPS), append(p99[i], r.P99), append(cpu[i], r.CPU)
		}
	}
	fmt.Printf("%-26s %-9s %-4s %5d", p.name, c.rw, c.bs, c.depth)
	for _, v := range []struct {
		of     [2][]float64
		format string
	}{{iops, " %9.0f %9.0f %6.2f"}, {p99, " %9.0f %9.0f %6.2f"}, {cpu, " %8.1f %8.1f %6.2f"}} {
		x, y := median(v.of[0]), median(v.of[1])
		fmt.Printf(v.format, x, y, x/y)
	}
	fmt.Println()
	return nil
}

// image makes the image of a place: written throughout, or empty.
func (b *bench) image(p place, path string) error {
	if p.format == "raw" {
		return fill(path, b.size)
	}
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", p.format, path, fmt.Sprint(b.size)).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	if p.empty {
		return nil
	}
	out, err := exec.Command("qemu-io", "-f", p.format, "-c", fmt.Sprintf("write -q -P 7 0 %d", b.size), path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-io: %w: %s", err, out)
	}
	return nil
}

func (b *bench) ours(p place, image string) (*server, error) {
	cache := "none"
	if p.tmpfs {
		cache = "writeback"
	}
	return b.blkstreamd(image, p.format, cache)
}

func (b *bench) qsd(p place, image string) (*server, error) {
	direct, aio := "on", "io_uring"
	if p.tmpfs {
		direct, aio = "off", "threads"
	}
	return b.start(exec.Command("qemu-storage-daemon", "--object", "iothread,id=t",
		"--blockdev", fmt.Sprintf("driver=file,node-name=f,filename=%s,cache.direct=%s,aio=%s", image, direct, aio),
		"--blockdev", fmt.Sprintf("driver=%s,node-name=d,file=f", p.format),
		"--export", "type=vhost-user-blk,id=e,node-name=d,writable=on,iothread=t,addr.type=unix,addr.path="+b.path("s")), b.path("s"))
}

// load puts load on a server.
func (b *bench) load(s *server, rw, bs string, depth int, length time.Duration) (r result, err error) {
	out, err := b.loader(s, rw, bs, depth, length).Output()
	if err != nil {
		return r, fmt.Errorf("load generator: %w: %s", err, out)
	}
	return r, json.Unmarshal(out, &r)
}

func (b *bench) loader(s *server, rw, bs string, depth int, length time.Duration) *exec.Cmd {
	return exec.Command(b.path("bench"), "--socket", s.socket, "--rw", rw, "--bs", bs, "--depth", fmt.Sprint(depth),
		"--time", length.String(), "--server-pid", fmt.Sprint(s.Process.Pid), "--json")
}
