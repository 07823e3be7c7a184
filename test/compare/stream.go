// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"
)

// streams measures streaming, copy on read, and the copy that switches first.
func (b *bench) streams() error {
	for _, format := range []string{"qcow2", "add-cow"} {
		if b.only.MatchString("stream " + format) {
			if err := b.streamBesideQSD(format); err != nil {
				return err
			}
		}
	}
	if b.only.MatchString("copy-on-read") {
		if err := b.copyOnRead(); err != nil {
			return err
		}
	}
	for _, format := range []string{"qcow2", "add-cow"} {
		if b.only.MatchString("copy stream " + format) {
			if err := b.switchFirst(format); err != nil {
				return err
			}
		}
	}
	return nil
}

// overlay makes an empty image of this format over base, which is raw.
func (b *bench) overlay(format, base string) (string, error) {
	top, file := b.path("top"), b.path("top.img")
	for _, old := range []string{top, file} { // of the last run
		if err := os.RemoveAll(old); err != nil {
			return "", err
		}
	}
	cmd := exec.Command("qemu-img", "create", "-q", "-f", format, "-b", base, "-F", "raw", top)
	if format == "add-cow" { // which QEMU does not know
		cmd = b.command("image", "create", "--format", format, "--backing", base, "--backing-format", "raw", "--image-file", file, top)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", cmd, err, out)
	}
	return top, nil
}

// qsdOver serves top over base, both with direct I/O, under the node that the arguments make of node d.
func (b *bench) qsdOver(top, base, node string, args ...string) (*server, error) {
	return b.start(exec.Command("qemu-storage-daemon", append([]string{
		"--object", "iothread,id=t",
		"--chardev", "socket,id=m,server=on,wait=off,path=" + b.path("qmp"), "--monitor", "chardev=m",
		"--blockdev", "driver=file,node-name=bf,read-only=on,cache.direct=on,aio=io_uring,filename=" + base,
		"--blockdev", "driver=raw,node-name=b,read-only=on,file=bf",
		"--blockdev", "driver=file,node-name=f,cache.direct=on,aio=io_uring,filename=" + top,
		"--blockdev", "driver=qcow2,node-name=d,file=f,backing=b",
	}, append(args,
		"--export", "type=vhost-user-blk,id=e,writable=on,iothread=t,node-name="+node+",addr.type=unix,addr.path="+b.path("s"))...)...),
		b.path("s"))
}

// streamBesideQSD compares the time from the command to the end of the job. Base and top are fresh for each run, and
// direct I/O leaves the page cache out.
func (b *bench) streamBesideQSD(format string) error {
	base := b.path("image")
	if err := fill(base, b.size); err != nil {
		return err
	}
	var speed [2][]float64
	for range b.runs {
		for i, run := range []struct {
			format string
			stream func(top, base string) (time.Duration, error)
		}{
			{format, func(top, _ string) (time.Duration, error) { return b.stream(top, format) }},
			{"qcow2", b.streamQSD}, // it knows no add-cow
		} {
			took, err := b.streamOnce(run.format, base, run.stream)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				fmt.Fprintln(os.Stderr, "qemu-storage-daemon hung, as 7.2 does now and then at the end of a block-stream: once more")
				took, err = b.streamOnce(run.format, base, run.stream)
			}
			if err != nil {
				return err
			}
			speed[i] = append(speed[i], float64(b.size)/(1<<20)/took.Seconds())
		}
	}
	x, y := median(speed[0]), median(speed[1])
	fmt.Printf("\nstream of %d MiB into an empty %s image, direct: %.0f MiB/s, qemu-storage-daemon into a qcow2 one: %.0f MiB/s, ratio %.2f\n",
		b.size>>20, format, x, y, x/y)
	return nil
}

func (b *bench) streamOnce(format, base string, stream func(top, base string) (time.Duration, error)) (time.Duration, error) {
	top, err := b.overlay(format, base)
	if err != nil {
		return 0, err
	}
	return stream(top, base)
}

func (b *bench) stream(top, format string) (time.Duration, error) {
	s, err := b.blkstreamd(top, format, "none")
	if err != nil {
		return 0, err
	}
	defer s.stop()
	begin := time.Now()
	out, err := b.command("stream", "d", "--id", "j", "--wait").CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("stream: %w: %s", err, out)
	}
	return time.Since(begin), nil
}

func (b *bench) streamQSD(top, base string) (took time.Duration, err error) {
	s, err := b.qsdOver(top, base, "d")
	if err != nil {
		return 0, err
	}
	defer s.stop()
	conn, err := net.Dial("unix", b.path("qmp"))
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	begin := time.Now()
	if err := conn.SetDeadline(begin.Add(time.Minute)); err != nil {
		return 0, err
	}
	_, err = conn.Write([]byte(`{"execute":"qmp_capabilities"}{"execute":"block-stream","arguments":{"job-id":"j","device":"d"}}`))
	if err != nil {
		return 0, err
	}
	for in := json.NewDecoder(conn); ; {
		var m struct {
			Event string                 `json:"event"`
			Data  struct{ Error string } `json:"data"`
			Error json.RawMessage        `json:"error"`
		}
		if err := in.Decode(&m); err != nil {
			return 0, fmt.Errorf("qemu-storage-daemon: %w", err)
		}
		if m.Error != nil || m.Data.Error != "" {
			return 0, fmt.Errorf("block-stream: %s%s", m.Error, m.Data.Error)
		}
		if m.Event == "BLOCK_JOB_COMPLETED" {
			return time.Since(begin), nil
		}
	}
}

// copyOnRead compares the same random reads of 4 KiB at depth 32 over an empty image, as many as the disk has clusters.
func (b *bench) copyOnRead() error {
	base := b.path("image")
	if err := fill(base, b.size); err != nil {
		return err
	}
	ops := fmt.Sprint(b.size >> 16)
	var iops, p99, cpu [2][]float64
	for run := range b.runs {
		for i, start := range []func(top string) (*server, error){
			func(top string) (*server, error) { return b.blkstreamd(top, "qcow2", "none", "copy_on_read = true") },
			func(top string) (*server, error) {
				return b.qsdOver(top, base, "c", "--blockdev", "driver=copy-on-read,node-name=c,file=d")
			},
		} {
			top, err := b.overlay("qcow2", base)
			if err != nil {
				return err
			}
			s, err := start(top)
			if err != nil {
				return err
			}
			load := b.loader(s, "randread", "4k", 32, 0)
			load.Args = append(load.Args, "--ops", ops, "--seed", fmt.Sprint(run))
			out, err := load.Output()
			s.stop()
			var r result
			if err == nil {
				err = json.Unmarshal(out, &r)
			}
			if err != nil {
				return fmt.Errorf("load generator: %w: %s", err, out)
			}
			iops[i], p99[i], cpu[i] = append(iops[i], r.IOPS), append(p99[i], r.P99), append(cpu[i], r.CPU)
		}
	}
	x, y := median(iops[0]), median(iops[1])
	fmt.Printf("\ncopy on read, %s random reads of 4k at depth 32, direct: %.0f IOPS, qemu-storage-daemon: %.0f, ratio %.2f; p99 ratio %.2f, CPU ratio %.2f\n",
		ops, x, y, x/y, median(p99[0])/median(p99[1]), median(cpu[0])/median(cpu[1]))
	return nil
}

// switchFirst says how long the command of a copy takes that switches first, and how long the guest was held for it: of
// a sparse disk of 16 TiB, and of one that is written throughout.
func (b *bench) switchFirst(format string) error {
	for _, sparse := range []bool{true, false} {
		image, target, size := b.path("image"), b.path("target"), b.size
		if sparse {
			image = b.path("huge")
			var err error
			if size, err = huge(image); err != nil {
				return err
			}
			defer os.Remove(image)
		} else if err := fill(image, size); err != nil {
			return err
		}
		var command, held []float64
		for range b.runs {
			s, err := b.blkstreamd(image, "raw", "none")
			if err != nil {
				return err
			}
			begin := time.Now()
			out, err := b.command("--json", "copy", "d", target, "--id", "j", "--method", "stream", "--format", format, "--speed", "1M").Output()
			command = append(command, time.Since(begin).Seconds()*1000)
			var j jobInfo
			if err == nil {
				err = json.Unmarshal(out, &j)
			}
			if err == nil {
				var ms float64
				_, err = fmt.Sscanf(j.Message, "the guest is on the target; it was held for %f ms", &ms)
				held = append(held, ms)
			}
			s.stop()
			if err = errors.Join(err, os.Remove(target), os.RemoveAll(target+".add-cow")); err != nil {
				return fmt.Errorf("copy: %w: %s", err, out)
			}
		}
		fmt.Printf("\ncopy --method stream of %.1f GiB to %s: the guest is on the target after %.1f ms, it was held for %.2f ms\n",
			float64(size)/(1<<30), format, median(command), median(held))
	}
	return nil
}
