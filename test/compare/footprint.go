// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// footprint says how much memory the daemon has resident with one idle disk, and how long it takes from the start of
// the program until a sparse disk of 16 TiB is served.
func (b *bench) footprint() error {
	if !b.only.MatchString("footprint") {
		return nil
	}
	image := b.path("huge")
	size, err := huge(image)
	if err != nil {
		return err
	}
	defer os.Remove(image)
	var starts, rss []float64
	for range b.runs {
		begin := time.Now()
		s, err := b.blkstreamd(image, "raw", "none")
		if err != nil {
			return err
		}
		starts = append(starts, time.Since(begin).Seconds()*1000)
		time.Sleep(200 * time.Millisecond)
		kib, err := resident(s.Process.Pid)
		s.stop()
		if err != nil {
			return err
		}
		rss = append(rss, float64(kib)/1024)
	}
	fmt.Printf("\na disk of %.1f TiB is served %.0f ms after the start; %.1f MiB resident when idle\n",
		float64(size)/(1<<40), median(starts), median(rss))
	return nil
}

// huge makes a sparse file of 16 TiB, or as near as the file system allows.
func huge(path string) (size int64, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	size = 16 << 40
	if f.Truncate(size) != nil { // ext4's limit is a block below
		size -= 1 << 20
		err = f.Truncate(size)
	}
	return size, errors.Join(err, f.Close())
}

// resident is a process's resident memory, KiB.
func resident(pid int) (kib int64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kib); n == 1 {
			return kib, nil
		}
	}
	return 0, fmt.Errorf("process %d: no VmRSS", pid)
}
