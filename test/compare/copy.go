// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// copies measures the block copy.
func (b *bench) copies() error {
	if !b.only.MatchString("copy dd") && !b.only.MatchString("copy guest") {
		return nil
	}
	source := b.path("image")
	if err := fill(source, b.size); err != nil {
		return err
	}
	if b.only.MatchString("copy dd") {
		if err := b.copyBesideDD(source); err != nil {
			return err
		}
	}
	if b.only.MatchString("copy guest") {
		return b.copyUnderGuest(source)
	}
	return nil
}

// copyBesideDD compares the time from the command to the ready job, of a disk without load, with dd's. Both make a new
// file, with direct I/O, and end with its data on the disk.
func (b *bench) copyBesideDD(source string) error {
	s, err := b.blkstreamd(source, "raw", "none")
	if err != nil {
		return err
	}
	defer s.stop()
	var speed [2][]float64
	target := b.path("target")
	for range b.runs {
		for i, cmd := range []*exec.Cmd{
			b.command("copy", "d", target, "--id", "j", "--wait"),
			exec.Command("dd", "if="+source, "of="+target, "bs=8M", "iflag=direct", "oflag=direct", "conv=fsync", "status=none"),
		} {
			begin := time.Now()
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", cmd, err, out)
			}
			speed[i] = append(speed[i], float64(b.size)/(1<<20)/time.Since(begin).Seconds())
			if i == 0 {
				err = b.endJob()
			}
			if err := errors.Join(err, os.Remove(target)); err != nil {
				return err
			}
		}
	}
	x, y := median(speed[0]), median(speed[1])
	fmt.Printf("\ncopy of %d MiB, written throughout, direct: %.0f MiB/s, dd bs=8M: %.0f MiB/s, ratio %.2f\n", b.size>>20, x, y, x/y)
	return nil
}

func (b *bench) command(args ...string) *exec.Cmd {
	return exec.Command(b.path("blkstream"), append([]string{"--socket", b.path("control")}, args...)...)
}

// endJob cancels job j, if it has not ended, and forgets it.
func (b *bench) endJob() error {
	b.command("job", "cancel", "j").Run() //nolint:errcheck // it may have ended
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		out, err := b.command("job", "dismiss", "j").CombinedOutput()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("job dismiss: %w: %s", err, out)
		}
	}
}

type jobInfo struct {
	Stage string `json:"stage"`
	State string `json:"state"`

	Message string `json:"message"`
}

// job shows job j.
func (b *bench) job() (j jobInfo, err error) {
	out, err := b.command("--json", "job", "show", "j").Output()
	if err == nil {
		err = json.Unmarshal(out, &j)
	}
	return j, err
}

// copyUnderGuest says which part of its throughput a guest that writes 4 KiB at random at depth 8 keeps in the bulk
// stage of a copy on the same disk, and what its longest request was.
func (b *bench) copyUnderGuest(source string) error {
	var alone, beside, worst, share, switches []float64
	target := b.path("target")
	for range b.runs {
		err := func() error {
			s, err := b.blkstreamd(source, "raw", "none")
			if err != nil {
				return err
			}
			defer s.stop()
			a, err := b.load(s, "randwrite", "4k", 8, b.length)
			if err != nil {
				return err
			}
			var out bytes.Buffer
			load := b.loader(s, "randwrite", "4k", 8, b.length)
			load.Stdout = &out
			if out, err := b.command("copy", "d", target, "--id", "j").CombinedOutput(); err != nil {
				return fmt.Errorf("copy: %w: %s", err, out)
			}
			if err := load.Run(); err != nil {
				return err
			}
			var r result
			if err := json.Unmarshal(out.Bytes(), &r); err != nil {
				return err
			}
			if j, err := b.job(); err != nil || j.Stage != "bulk" {
				return errors.Join(err, fmt.Errorf("the copy was in stage %q when the load ended: use a larger -size or a shorter -time", j.Stage))
			}
			alone, beside, worst = append(alone, a.IOPS), append(beside, r.IOPS), append(worst, r.Max/1000)
			share = append(share, r.IOPS/a.IOPS)
			// And the switch, under the same load.
			for j, err := b.job(); j.State != "ready"; j, err = b.job() {
				if err != nil || j.State != "running" {
					return errors.Join(err, fmt.Errorf("the copy is %q", j.State))
				}
				time.Sleep(50 * time.Millisecond)
			}
			load = b.loader(s, "randwrite", "4k", 8, b.length)
			out.Reset()
			load.Stdout = &out
			if err := load.Start(); err != nil {
				return err
			}
			time.Sleep(b.length / 2)
			if out, err := b.command("switch", "j").CombinedOutput(); err != nil {
				return fmt.Errorf("switch: %w: %s", err, out)
			}
			if err := load.Wait(); err != nil {
				return err
			}
			if err := json.Unmarshal(out.Bytes(), &r); err != nil {
				return err
			}
			switches = append(switches, r.Max/1000)
			return nil
		}()
		if err := errors.Join(err, os.Remove(target)); err != nil {
			return err
		}
	}
	fmt.Printf("\nguest writing 4k at random at depth 8: %.0f IOPS alone, %.0f in the bulk stage, share %.2f; longest request %.1f ms, over a switch %.1f ms\n",
		median(alone), median(beside), median(share), median(worst), median(switches))
	return nil
}
