// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// Parse parses data; name stands for the file in errors. Images are checked
// against image_roots on the file system; whether they exist is left to who
// opens them.
func Parse(name string, data []byte) (*File, error) {
	if len(data) > maxFileSize {
		return nil, fmt.Errorf("%s: larger than %d bytes: not a configuration file", name, maxFileSize)
	}
	if line := tooNested(string(data)); line > 0 {
		return nil, fmt.Errorf("%s:%d: nested too deeply", name, line)
	}
	var root map[string]any
	if _, err := toml.Decode(string(data), &root); err != nil {
		var syntax toml.ParseError
		if errors.As(err, &syntax) {
			return nil, fmt.Errorf("%s:%d: %s", name, syntax.Position.Line, syntax.Message)
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}

	f := &File{
		Path:       name,
		Daemon:     Daemon{Control: DefaultControl, StateDir: DefaultStateDir},
		imageLines: map[string]int{},
	}
	d := &decoder{name: name, lines: keyLines(string(data))}
	top := table{d: d, keys: root}
	daemon := top.table("daemon", "daemon")
	disks := top.tables("disk")
	top.unknown()

	daemon.string("control", &f.Daemon.Control)
	daemon.string("state_dir", &f.Daemon.StateDir)
	daemon.strings("image_roots", &f.Daemon.ImageRoots)
	daemon.string("metrics", &f.Daemon.Metrics)
	daemon.unknown()
	daemon.report(f.Daemon.problems())

	sockets := map[string]string{f.Daemon.Control: "the control socket"}
	for i := range disks {
		f.Disks = append(f.Disks, disks[i].disk(f, sockets))
	}
	if err := d.err(); err != nil {
		return nil, err
	}
	return f, nil
}

// disk decodes and checks one [[disk]] table. sockets and f.Disks hold what the
// disks before it claimed.
func (t *table) disk(f *File, sockets map[string]string) Disk {
	disk := NewDisk()
	t.string("id", &disk.ID)
	if disk.ID != "" {
		t.label = fmt.Sprintf("disk %q", disk.ID)
	}
	t.string("socket", &disk.Socket)
	t.string("image", &disk.Image)
	t.string("format", &disk.Format)
	for i, b := range t.tables("backing") {
		b.label, b.prefix = t.label, fmt.Sprintf("backing number %d: ", i+1)
		var l Layer
		b.string("image", &l.Image)
		b.string("format", &l.Format)
		b.unknown()
		b.report(l.problems())
		disk.Backing = append(disk.Backing, l)
	}
	t.size("metadata_cache", &disk.MetadataCache)
	t.bool("read_only", &disk.ReadOnly)
	t.int("queues", &disk.Queues)
	t.int("queue_size", &disk.QueueSize)
	t.string("cache", &disk.Cache)
	t.string("lock", &disk.Lock)
	t.intSize("block_size", &disk.BlockSize)
	t.string("serial", &disk.Serial)
	t.bool("discard", &disk.Discard)
	t.bool("copy_on_read", &disk.CopyOnRead)
	t.int("poll_us", &disk.PollUS)
	throttle := t.table("throttle", t.label)
	throttle.prefix = "throttle."
	take(&throttle, "iops", "an integer", &disk.Throttle.IOPS)
	throttle.size("bytes_per_second", &disk.Throttle.BytesPerSecond)
	throttle.unknown()
	t.unknown()
	t.report(disk.problems())

	if _, dup := f.imageLines[disk.ID]; dup {
		t.errorf("id", "used by an earlier disk")
	}
	f.imageLines[disk.ID] = t.line("image")
	if owner, dup := sockets[disk.Socket]; dup {
		t.errorf("socket", "%s is used by %s", disk.Socket, owner)
	}
	sockets[disk.Socket] = t.label
	if len(t.bad) == 0 {
		if err := f.Daemon.CheckRoots(disk.Image); err != nil {
			t.errorf("image", "%v", err)
		}
		for i := range f.Disks {
			if o := &f.Disks[i]; o.Image == disk.Image && !(o.ReadOnly && disk.ReadOnly) && !(o.Lock == "running" && disk.Lock == "running") {
				t.errorf("image", "%s is used by disk %q, and one of the two writes to it", disk.Image, o.ID)
			}
		}
	}
	return disk
}

// decoder collects what is wrong with a file.
type decoder struct {
	name  string
	lines map[string]int
	errs  []lineError
}

type lineError struct {
	line int
	text string
}

func (d *decoder) err() error {
	slices.SortStableFunc(d.errs, func(a, b lineError) int { return a.line - b.line })
	errs := make([]error, len(d.errs))
	for i, e := range d.errs {
		errs[i] = fmt.Errorf("%s:%d: %s", d.name, e.line, e.text)
	}
	return errors.Join(errs...)
}

// table takes the values of one TOML table; unknown reports the keys that
// nobody asked for.
type table struct {
	d      *decoder
	path   string // in the decoder's lines
	label  string // names the table in errors
	prefix string // of its keys in errors
	keys   map[string]any
	taken  []string
	bad    map[string]bool // keys with an error: one is enough
}

// line returns the line of a key, or of what holds it if it has none. An array
// of tables is where its first element is.
func (t *table) line(key string) int {
	for path := join(t.path, key); ; {
		for _, p := range []string{path, element(path, 0)} {
			if line := t.d.lines[p]; line > 0 {
				return line
			}
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			return 1
		}
		path = path[:i]
	}
}

func (t *table) errorf(key, format string, args ...any) {
	if t.bad[key] {
		return
	}
	if t.bad == nil {
		t.bad = map[string]bool{}
	}
	t.bad[key] = true
	text := t.prefix + key + ": " + fmt.Sprintf(format, args...)
	if t.label != "" {
		text = t.label + ": " + text
	}
	t.d.errs = append(t.d.errs, lineError{t.line(key), text})
}

func (t *table) report(problems []problem) {
	for _, p := range problems {
		t.errorf(p.key, "%s", p.what)
	}
}

func (t *table) unknown() {
	for key := range t.keys {
		if !slices.Contains(t.taken, key) {
			t.errorf(key, "unknown key")
		}
	}
}

// take stores the value of key in dst if it has the right type.
func take[T any](t *table, key, want string, dst *T) bool {
	t.taken = append(t.taken, key)
	v, ok := t.keys[key]
	if !ok {
		return false
	}
	x, ok := v.(T)
	if !ok {
		t.errorf(key, "%s, want %s", typeName(v), want)
		return false
	}
	*dst = x
	return true
}

func (t *table) string(key string, dst *string) { take(t, key, "a string", dst) }
func (t *table) bool(key string, dst *bool)     { take(t, key, "true or false", dst) }

func (t *table) int(key string, dst *int) {
	v := int64(*dst)
	if take(t, key, "an integer", &v) {
		*dst = int(v)
	}
}

// size takes an integer or a string such as "50M".
func (t *table) size(key string, dst *int64) {
	if text, ok := t.keys[key].(string); ok {
		v, err := ParseSize(text)
		if err != nil {
			t.errorf(key, "%v", err)
		}
		*dst = v
		t.taken = append(t.taken, key)
		return
	}
	take(t, key, `a number or a string such as "50M"`, dst)
}

func (t *table) intSize(key string, dst *int) {
	v := int64(*dst)
	t.size(key, &v)
	*dst = int(v)
}

func (t *table) strings(key string, dst *[]string) {
	var list []any
	if !take(t, key, "an array of strings", &list) {
		return
	}
	for _, v := range list {
		s, ok := v.(string)
		if !ok {
			t.errorf(key, "holds %s, want strings", typeName(v))
			return
		}
		*dst = append(*dst, s)
	}
}

func (t *table) table(key, label string) table {
	sub := table{d: t.d, path: join(t.path, key), label: label}
	take(t, key, "a table", &sub.keys)
	return sub
}

func (t *table) tables(key string) []table {
	var list []map[string]any
	// An array of inline tables is the same thing, but typed as it may be mixed.
	if mixed, ok := t.keys[key].([]any); ok {
		t.taken = append(t.taken, key)
		for _, v := range mixed {
			m, ok := v.(map[string]any)
			if !ok {
				t.errorf(key, "holds %s, want tables", typeName(v))
				return nil
			}
			list = append(list, m)
		}
	} else {
		take(t, key, "an array of tables, [["+key+"]]", &list)
	}
	subs := make([]table, len(list))
	for i, m := range list {
		path := element(join(t.path, key), i)
		subs[i] = table{d: t.d, path: path, label: fmt.Sprintf("disk number %d", i+1), keys: m}
	}
	return subs
}

func typeName(v any) string {
	switch v.(type) {
	case string:
		return "a string"
	case int64:
		return "an integer"
	case float64:
		return "a float"
	case bool:
		return "a boolean"
	case time.Time:
		return "a date or time"
	case map[string]any:
		return "a table"
	default:
		return "an array"
	}
}

// ParseSize parses a size in bytes or a rate in bytes per second: digits, and
// K, M, G or T for powers of 1024, in either case. Negative numbers and
// fractions are errors.
func ParseSize(s string) (int64, error) {
	digits, shift := s, 0
	if n := len(s) - 1; n >= 0 {
		if unit := strings.IndexByte("KMGT", s[n]&^0x20); unit >= 0 {
			digits, shift = s[:n], 10*(unit+1)
		}
	}
	var v int64
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' {
			return 0, fmt.Errorf("bad size %q: want a number, or one with K, M, G or T", s)
		}
		if v > (math.MaxInt64-int64(c-'0'))/10 {
			return 0, fmt.Errorf("bad size %q: too large", s)
		}
		v = v*10 + int64(c-'0')
	}
	if digits == "" {
		return 0, fmt.Errorf("bad size %q: want a number, or one with K, M, G or T", s)
	}
	if v > math.MaxInt64>>shift {
		return 0, fmt.Errorf("bad size %q: too large", s)
	}
	return v << shift, nil
}
