// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const (
	maxQueues    = 64
	maxQueueSize = 1024
	maxSerial    = 20 // VIRTIO_BLK_ID_BYTES, virtio 1.2 section 5.2.6
	maxPollUS    = 1_000_000
	maxID        = 64

	minMetadataCache = 1 << 20
	maxSocketPath    = 107 // sun_path without its terminating zero, unix(7)
)

var (
	formats    = []string{"raw", "qcow2", "add-cow"}
	caches     = []string{"none", "writeback", "writethrough", "unsafe"}
	locks      = []string{"always", "running"}
	blockSizes = []int{512, 4096}
)

// notYet lists what the configuration knows but the daemon cannot do yet. An
// entry goes away with the work that implements it.
// A function returns what is unsupported in a table, "" if nothing is.
var notYet = []struct {
	key    string
	daemon func(*Daemon) string
	disk   func(*Disk) string
}{
	{key: "metrics", daemon: func(d *Daemon) string { return when(d.Metrics != "", "metrics") }},
	{key: "image", disk: func(d *Disk) string { return when(isURL(d.Image), "an image that is not a file") }},
	{key: "throttle.iops", disk: func(d *Disk) string { return when(d.Throttle.IOPS > 0, "throttle") }},
	{key: "throttle.bytes_per_second", disk: func(d *Disk) string { return when(d.Throttle.BytesPerSecond > 0, "throttle") }},
}

func when(cond bool, what string) string {
	if cond {
		return what
	}
	return ""
}

// problem is one thing that is wrong with a table.
type problem struct{ key, what string }

type problems []problem

func (p *problems) addf(key, format string, args ...any) {
	*p = append(*p, problem{key, fmt.Sprintf(format, args...)})
}

func (d *Daemon) problems() []problem {
	var p problems
	checkSocketPath(&p, "control", d.Control)
	if !filepath.IsAbs(d.StateDir) {
		p.addf("state_dir", "%q is not an absolute path", d.StateDir)
	}
	for _, root := range d.ImageRoots {
		if !filepath.IsAbs(root) {
			p.addf("image_roots", "%q is not an absolute path", root)
		}
	}
	if d.Metrics != "" {
		if _, _, err := net.SplitHostPort(d.Metrics); err != nil {
			p.addf("metrics", "%q: want HOST:PORT", d.Metrics)
		}
	}
	for _, n := range notYet {
		if n.daemon == nil {
			continue
		}
		if what := n.daemon(d); what != "" {
			p.addf(n.key, "%s is not supported yet", what)
		}
	}
	return p
}

// Validate checks a disk that did not come from a file. It does not look at
// image_roots: see CheckRoots.
func (d *Disk) Validate() error {
	var errs []error
	for _, p := range d.problems() {
		errs = append(errs, fmt.Errorf("disk %q: %s: %s", d.ID, p.key, p.what))
	}
	return errors.Join(errs...)
}

func (d *Disk) problems() []problem {
	var p problems
	if d.ID == "" {
		p.addf("id", "missing")
	} else if !validID(d.ID) {
		// Ids become file names in the state directory.
		p.addf("id", "%q: want a letter or digit, then letters, digits, '.', '_' and '-', at most %d", d.ID, maxID)
	}
	if fd, ok := strings.CutPrefix(d.Socket, "fd:"); ok {
		// One spelling only, so that duplicates are found; 0 to 2 are standard streams.
		if n, err := strconv.Atoi(fd); err != nil || n < 3 || strconv.Itoa(n) != fd {
			p.addf("socket", "%q: want fd:N with N at least 3", d.Socket)
		}
	} else {
		checkSocketPath(&p, "socket", d.Socket)
	}
	switch {
	case d.Image == "":
		p.addf("image", "missing")
	case strings.ContainsRune(d.Image, 0):
		p.addf("image", "holds a zero byte")
	case !filepath.IsAbs(d.Image) && !isURL(d.Image):
		p.addf("image", "%q is not an absolute path", d.Image)
	}
	if d.Format == "" {
		p.addf("format", "missing; it is never guessed: give one of %s", strings.Join(formats, ", "))
	} else if !slices.Contains(formats, d.Format) {
		p.addf("format", "%q: want one of %s", d.Format, strings.Join(formats, ", "))
	}
	if len(d.Backing) > 0 && d.Format == "raw" {
		p.addf("backing", "a raw image has none")
	}
	switch {
	case !d.CopyOnRead:
	case d.Format == "raw":
		p.addf("copy_on_read", "a raw image has no backing image to copy from")
	case d.ReadOnly:
		p.addf("copy_on_read", "the disk is read-only: nothing can be copied into its image")
	}
	if d.MetadataCache < minMetadataCache {
		p.addf("metadata_cache", "%d: want at least %d", d.MetadataCache, minMetadataCache)
	}
	if d.Queues < 1 || d.Queues > maxQueues {
		p.addf("queues", "%d: want 1 to %d", d.Queues, maxQueues)
	}
	if d.QueueSize < 2 || d.QueueSize > maxQueueSize || d.QueueSize&(d.QueueSize-1) != 0 {
		p.addf("queue_size", "%d: want a power of two, 2 to %d", d.QueueSize, maxQueueSize)
	}
	if !slices.Contains(caches, d.Cache) {
		p.addf("cache", "%q: want one of %s", d.Cache, strings.Join(caches, ", "))
	}
	switch {
	case !slices.Contains(locks, d.Lock):
		p.addf("lock", "%q: want one of %s", d.Lock, strings.Join(locks, ", "))
	case d.Lock == "running" && d.Format != "raw":
		p.addf("lock", "\"running\" is for raw images: what is kept in memory of others would be out of date")
	case d.Lock == "running" && d.Cache != "none" && !d.ReadOnly:
		p.addf("lock", "\"running\" needs cache = \"none\": another host does not see this one's page cache")
	}
	if !slices.Contains(blockSizes, d.BlockSize) {
		p.addf("block_size", "%d: want 512 or 4096", d.BlockSize)
	}
	if len(d.Serial) > maxSerial || strings.ContainsFunc(d.Serial, func(r rune) bool { return r < ' ' || r > '~' }) {
		p.addf("serial", "%q: want at most %d printable ASCII characters", d.Serial, maxSerial)
	}
	if d.PollUS < 0 || d.PollUS > maxPollUS {
		p.addf("poll_us", "%d: want 0 to %d", d.PollUS, maxPollUS)
	}
	if d.Throttle.IOPS < 0 {
		p.addf("throttle.iops", "%d: want 0 or more", d.Throttle.IOPS)
	}
	if d.Throttle.BytesPerSecond < 0 {
		p.addf("throttle.bytes_per_second", "%d: want 0 or more", d.Throttle.BytesPerSecond)
	}
	for _, n := range notYet {
		if n.disk == nil {
			continue
		}
		if what := n.disk(d); what != "" {
			p.addf(n.key, "%s is not supported yet", what)
		}
	}
	return p
}

func (l *Layer) problems() []problem {
	var p problems
	if l.Image != "" && !filepath.IsAbs(l.Image) {
		p.addf("image", "%q is not an absolute path", l.Image)
	}
	if l.Format != "" && !slices.Contains(formats, l.Format) {
		p.addf("format", "%q: want one of %s", l.Format, strings.Join(formats, ", "))
	}
	if l.Image == "" && l.Format == "" {
		p.addf("image", "missing, and format too")
	}
	return p
}

func validID(id string) bool {
	for i, c := range []byte(id) {
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || !strings.ContainsRune("._-", rune(c))) {
			return false
		}
	}
	return len(id) <= maxID
}

func isURL(image string) bool { return strings.Contains(image, "://") && !filepath.IsAbs(image) }

func checkSocketPath(p *problems, key, path string) {
	switch {
	case path == "":
		p.addf(key, "missing")
	case !filepath.IsAbs(path):
		p.addf(key, "%q is not an absolute path", path)
	case filepath.Clean(path) != path: // one spelling only, so that duplicates are found
		p.addf(key, "%q: write it as %q", path, filepath.Clean(path))
	case len(path) > maxSocketPath:
		p.addf(key, "%d bytes long; a unix socket's path has at most %d", len(path), maxSocketPath)
	case strings.ContainsRune(path, 0):
		p.addf(key, "holds a zero byte")
	}
}

// BitmapDir is where the bitmaps of devices are, which the daemon makes.
func (d *Daemon) BitmapDir() string { return filepath.Join(d.StateDir, "add-cow") }

// CheckRoots says whether the daemon may open the image at path: one under its
// image roots, or a bitmap of its own, which a disk may be on.
func (d *Daemon) CheckRoots(path string) error {
	if filepath.Dir(path) == d.BitmapDir() {
		return nil
	}
	return CheckRoots(path, d.ImageRoots)
}

// CheckRoots says whether the file at path lies under one of roots, with all
// symbolic links resolved on both sides; no roots permit everything. A path
// that does not exist yet is judged by its directory, and a link that leads
// nowhere is refused. Who opens the path afterwards must trust the directories
// on the way not to change in between.
func CheckRoots(path string, roots []string) error {
	if len(roots) == 0 {
		return nil
	}
	resolved, err := filepath.EvalSymlinks(path)
	if errors.Is(err, os.ErrNotExist) {
		if _, lerr := os.Lstat(path); lerr == nil {
			return fmt.Errorf("%s: symbolic link that leads nowhere", path)
		}
		var dir string
		dir, err = filepath.EvalSymlinks(filepath.Dir(path))
		resolved = filepath.Join(dir, filepath.Base(path))
	}
	if err != nil {
		return fmt.Errorf("%s cannot be looked up: %w", path, err)
	}
	for _, root := range roots {
		// A root that cannot be resolved holds nothing.
		root, err := filepath.EvalSymlinks(root)
		if err != nil {
			continue
		}
		rel, err := filepath.Rel(root, resolved)
		if err == nil && filepath.IsLocal(rel) {
			return nil
		}
	}
	if resolved != path {
		return fmt.Errorf("%s (that is %s) is outside image_roots (%s)", path, resolved, strings.Join(roots, ", "))
	}
	return fmt.Errorf("%s is outside image_roots (%s)", path, strings.Join(roots, ", "))
}
