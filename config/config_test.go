// SPDX-License-Identifier: Apache-2.0

package config

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

const full = `# all keys
[daemon]
control = "/run/b/control.sock"
state_dir = "/var/lib/b"
image_roots = []

[[disk]]
id = "disk0"
socket = "/run/b/disk0.sock"
image = "/var/lib/images/vm1.img"
format = "raw"
read_only = true
queues = 2
queue_size = 1024
cache = "writeback"
lock = "running"
block_size = "4K"
serial = "vm1-root"
discard = false
copy_on_read = false
poll_us = 50
metadata_cache = "16M"
[disk.throttle]
iops = 0
bytes_per_second = "0"

[[disk]]
id = "disk1"
socket = "fd:3"
image = "/var/lib/images/vm2.img"
format = "qcow2"
backing = [{ image = "/b", format = "qcow2" }, { format = "raw" }]
`

func TestParse(t *testing.T) {
	f, err := Parse("b.toml", []byte(full))
	if err != nil {
		t.Fatal(err)
	}
	want := []Disk{{
		ID: "disk0", Socket: "/run/b/disk0.sock", Image: "/var/lib/images/vm1.img", Format: "raw",
		ReadOnly: true, Queues: 2, QueueSize: 1024, Cache: "writeback", Lock: "running", BlockSize: 4096,
		Serial: "vm1-root", Discard: false, PollUS: 50, MetadataCache: 16 << 20,
	}, {
		ID: "disk1", Socket: "fd:3", Image: "/var/lib/images/vm2.img", Format: "qcow2",
		Queues: 1, QueueSize: 256, Cache: "none", Lock: "always", BlockSize: 512, Discard: true, PollUS: 32, MetadataCache: DefaultMetadataCache,
		Backing: []Layer{{Image: "/b", Format: "qcow2"}, {Format: "raw"}},
	}}
	if !reflect.DeepEqual(f.Disks, want) {
		t.Errorf("disks:\n got %+v\nwant %+v", f.Disks, want)
	}
	if f.Path != "b.toml" || f.Daemon.Control != "/run/b/control.sock" || f.Daemon.StateDir != "/var/lib/b" {
		t.Errorf("file: %+v", f)
	}
	for id, line := range map[string]int{"disk0": 10, "disk1": 30, "disk2": 0} {
		if got := f.ImageLine(id); got != line {
			t.Errorf("ImageLine(%s) = %d, want %d", id, got, line)
		}
	}
}

func TestParseEmpty(t *testing.T) {
	f, err := Parse("b.toml", nil)
	if err != nil {
		t.Fatal(err)
	}
	if f.Daemon.Control != DefaultControl || f.Daemon.StateDir != DefaultStateDir || len(f.Disks) != 0 {
		t.Errorf("%+v", f)
	}
}

const minimal = `[[disk]]
id = "a"
socket = "/s"
image = "/i"
format = "raw"
`

func TestCopyOnRead(t *testing.T) {
	f, err := Parse("b.toml", []byte(strings.Replace(minimal, "raw", "qcow2", 1)+"copy_on_read = true"))
	if err != nil || !f.Disks[0].CopyOnRead {
		t.Errorf("a qcow2 disk: %v", err)
	}
}

// Polling that was switched off is something else than polling that nobody spoke of.
func TestPolling(t *testing.T) {
	for doc, want := range map[string]int{minimal: DefaultPollUS, minimal + "poll_us = 0\n": 0, minimal + "poll_us = 1\n": 1} {
		f, err := Parse("b.toml", []byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Disks[0].PollUS; got != want {
			t.Errorf("%s: polls for %d µs, want %d", doc, got, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	long := "/" + strings.Repeat("x", maxSocketPath)
	for _, tc := range []struct{ name, doc, want string }{
		{"syntax", "[daemon]\ncontrol = = 1", `f:2: expected value but found '=' instead`},
		{"duplicate key", "[daemon]\nmetrics = 'a:1'\nmetrics = 'a:1'", `f:3: Key 'daemon.metrics' has already been defined.`},
		{"unknown table", "\n[deamon]\n", `f:2: deamon: unknown key`},
		{"unknown top key", "control = '/x'", `f:1: control: unknown key`},
		{"unknown daemon key", "[daemon]\n\nctl = 1", `f:3: daemon: ctl: unknown key`},
		{"unknown disk key", minimal + "imgae = '/x'\n", `f:6: disk "a": imgae: unknown key`},
		{"case", minimal + "Queues = 1\n", `f:6: disk "a": Queues: unknown key`},
		{"unknown throttle key", minimal + "[disk.throttle]\nbps = 1", `f:7: disk "a": throttle.bps: unknown key`},
		{"daemon not a table", "daemon = 1", `f:1: daemon: an integer, want a table`},
		{"disk not an array", "[disk]\nid = 'a'", `f:1: disk: a table, want an array of tables, [[disk]]`},
		{"disk mixed", "disk = [1]", `f:1: disk: holds an integer, want tables`},
		{"type string", minimal + "serial = 5", `f:6: disk "a": serial: an integer, want a string`},
		{"type int", minimal + "queues = 1.5", `f:6: disk "a": queues: a float, want an integer`},
		{"type bool", minimal + "discard = 'no'", `f:6: disk "a": discard: a string, want true or false`},
		{"type date", minimal + "cache = 2020-01-01", `f:6: disk "a": cache: a date or time, want a string`},
		{"type size", minimal + "block_size = [1]", `f:6: disk "a": block_size: an array, want a number or a string such as "50M"`},
		{"type roots", "[daemon]\nimage_roots = ['/a', 1]", `f:2: daemon: image_roots: holds an integer, want strings`},
		{"bad size", minimal + "block_size = '4X'", `f:6: disk "a": block_size: bad size "4X": want a number, or one with K, M, G or T`},
		{"missing all", "\n[[disk]]\n", `f:2: disk number 1: id: missing
f:2: disk number 1: socket: missing
f:2: disk number 1: image: missing
f:2: disk number 1: format: missing; it is never guessed: give one of raw, qcow2, add-cow`},
		{"duplicate id", minimal + strings.Replace(minimal, "/s", "/t", 1), `f:7: disk "a": id: used by an earlier disk`},
		{"duplicate socket", minimal + strings.Replace(minimal, `"a"`, `"b"`, 1), `f:8: disk "b": socket: /s is used by disk "a"`},
		{"duplicate image", minimal + strings.NewReplacer("/s", "/t", `"a"`, `"b"`).Replace(minimal), `f:9: disk "b": image: /i is used by disk "a", and one of the two writes to it`},
		{"backing of a raw image", minimal + "[[disk.backing]]\nimage = '/x'\n", `f:6: disk "a": backing: a raw image has none`},
		{"control socket", "[daemon]\ncontrol = '/s'\n" + minimal, `f:5: disk "a": socket: /s is used by the control socket`},
		{"bad id", strings.Replace(minimal, `"a"`, `"../a"`, 1), `f:2: disk "../a": id: "../a": want a letter or digit, then letters, digits, '.', '_' and '-', at most 64`},
		{"relative socket", strings.Replace(minimal, "/s", "s", 1), `f:3: disk "a": socket: "s" is not an absolute path`},
		{"unclean socket", strings.Replace(minimal, "/s", "/x/../s", 1), `f:3: disk "a": socket: "/x/../s": write it as "/s"`},
		{"long socket", strings.Replace(minimal, "/s", long, 1), `f:3: disk "a": socket: 108 bytes long; a unix socket's path has at most 107`},
		{"stdin socket", strings.Replace(minimal, "/s", "fd:0", 1), `f:3: disk "a": socket: "fd:0": want fd:N with N at least 3`},
		{"odd fd", strings.Replace(minimal, "/s", "fd:03", 1), `f:3: disk "a": socket: "fd:03": want fd:N with N at least 3`},
		{"relative image", strings.Replace(minimal, "/i", "i", 1), `f:4: disk "a": image: "i" is not an absolute path`},
		{"zero byte", strings.Replace(minimal, "/i", `/i\u0000`, 1), `f:4: disk "a": image: holds a zero byte`},
		{"format", strings.Replace(minimal, "raw", "vmdk", 1), `f:5: disk "a": format: "vmdk": want one of raw, qcow2, add-cow`},
		{"queues", minimal + "queues = 65", `f:6: disk "a": queues: 65: want 1 to 64`},
		{"no queues", minimal + "queues = 0", `f:6: disk "a": queues: 0: want 1 to 64`},
		{"queue size", minimal + "queue_size = 300", `f:6: disk "a": queue_size: 300: want a power of two, 2 to 1024`},
		{"cache", minimal + "cache = 'directsync'", `f:6: disk "a": cache: "directsync": want one of none, writeback, writethrough, unsafe`},
		{"lock", minimal + "lock = 'never'", `f:6: disk "a": lock: "never": want one of always, running`},
		{"lock and cache", minimal + "lock = 'running'\ncache = 'writeback'", `f:6: disk "a": lock: "running" needs cache = "none": another host does not see this one's page cache`},
		{"block size", minimal + "block_size = 1024", `f:6: disk "a": block_size: 1024: want 512 or 4096`},
		{"serial", minimal + "serial = '123456789012345678901'", `f:6: disk "a": serial: "123456789012345678901": want at most 20 printable ASCII characters`},
		{"poll", minimal + "poll_us = -1", `f:6: disk "a": poll_us: -1: want 0 to 1000000`},
		{"negative throttle", minimal + "throttle = {iops = -1}", `f:6: disk "a": throttle.iops: -1: want 0 or more`},
		{"state dir", "[daemon]\nstate_dir = 'x'", `f:2: daemon: state_dir: "x" is not an absolute path`},
		{"roots", "[daemon]\nimage_roots = [\n'x',\n]", `f:2: daemon: image_roots: "x" is not an absolute path`},
		{"metrics form", "[daemon]\nmetrics = '9478'", `f:2: daemon: metrics: "9478": want HOST:PORT`},
		{"two errors in order", "[[disk]]\nid = 'a'\nsocket = '/s'\nimage = 'x'\nformat = 'raw'\nfoo = 1\nqueues = 0", `f:4: disk "a": image: "x" is not an absolute path
f:6: disk "a": foo: unknown key
f:7: disk "a": queues: 0: want 1 to 64`},

		{"metrics", "[daemon]\nmetrics = 'localhost:1'", `f:2: daemon: metrics: metrics is not supported yet`},
		{"copy on read, raw", minimal + "copy_on_read = true", `f:6: disk "a": copy_on_read: a raw image has no backing image to copy from`},
		{"copy on read, read-only", strings.Replace(minimal, "raw", "qcow2", 1) + "read_only = true\ncopy_on_read = true", `f:7: disk "a": copy_on_read: the disk is read-only: nothing can be copied into its image`},
		{"backing of raw", minimal + "backing = [{ image = '/b', format = 'raw' }]", `f:6: disk "a": backing: a raw image has none`},
		{
			"backing", strings.Replace(minimal, "raw", "qcow2", 1) + "backing = [{ image = '/b' }, { image = 'c', format = 'x' }]",
			`f:6: disk "a": backing number 2: image: "c" is not an absolute path
f:6: disk "a": backing number 2: format: "x": want one of raw, qcow2, add-cow`,
		},
		{"backing key", strings.Replace(minimal, "raw", "qcow2", 1) + "backing = [{ file = '/b', image = '/b' }]", `f:6: disk "a": backing number 1: file: unknown key`},
		{"cache size", minimal + "metadata_cache = '4K'", `f:6: disk "a": metadata_cache: 4096: want at least 1048576`},
		{"nbd", strings.Replace(minimal, "/i", "nbd://host/x", 1), `f:4: disk "a": image: an image that is not a file is not supported yet`},
		{"iops", minimal + "[disk.throttle]\niops = 100", `f:7: disk "a": throttle.iops: throttle is not supported yet`},
		{"bytes", minimal + "[disk.throttle]\n\nbytes_per_second = '50M'", `f:8: disk "a": throttle.bytes_per_second: throttle is not supported yet`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Parse("f", []byte(tc.doc))
			if err == nil {
				t.Fatal("no error")
			}
			if err.Error() != tc.want {
				t.Errorf("\n got %s\nwant %s", err, tc.want)
			}
		})
	}
}

func TestKeyLines(t *testing.T) {
	doc := "\ufeff# [x]\r\n" + // 1
		"a.b = \"\"\"\n[no]\nno = 1\n\\\"\"\"\"\"\" # = 1\n" + // 2-5
		"c = [ # [[no]]\n  '[', \"]\",\n]\n" + // 6-8
		"'q.\"' = '''\nx'''\n" + // 9-10
		"e = ''\n" + // 11
		"[t . \"u]\"] # x\n" + // 12
		"k = {a = 1, b = '}'}\n" + // 13
		"\n[[t.d]]\nk = 1\n[t.d.s]\nk = 2\n[[ t.d ]]\nk = 3\n[[t.d.n]]\nk=4" // 15-
	want := map[string]int{
		"a": 2, "a.b": 2, "c": 6, `q."`: 9, "e": 11,
		"t": 12, "t.u]": 12, "t.u].k": 13,
		"t.d[0]": 15, "t.d[0].k": 16, "t.d[0].s": 17, "t.d[0].s.k": 18,
		"t.d[1]": 19, "t.d[1].k": 20, "t.d[1].n[0]": 21, "t.d[1].n[0].k": 22,
	}
	if got := keyLines(doc); !reflect.DeepEqual(got, want) {
		t.Errorf("\n got %v\nwant %v", got, want)
	}
}

func TestInlineDisks(t *testing.T) {
	f, err := Parse("f", []byte("\ndisk = [\n{id = 'a', socket = '/s', image = '/i', format = 'raw'},\n]"))
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Disks) != 1 || f.Disks[0].ID != "a" || f.ImageLine("a") != 2 {
		t.Errorf("%+v, line %d", f.Disks, f.ImageLine("a"))
	}
}

// A file may be silly, but not expensive.
func TestHostileFiles(t *testing.T) {
	n := maxFileSize
	for name, doc := range map[string]string{
		"brackets":     "a = " + strings.Repeat("[", n-4),
		"tables":       "a = " + strings.Repeat("{a=", n/3-2),
		"dotted":       strings.Repeat("a.", n/2-3) + "a = 1",
		"header":       "[" + strings.Repeat("a.", n/2-3) + "a]",
		"many disks":   strings.Repeat("[[disk]]\n", n/90),
		"many headers": strings.Repeat("[[a.b.c]]\n", n/100),
		"lines":        strings.Repeat(strings.Repeat("a.", 16)+"a = [1]\n", n/41),
		"keys":         "a = [\n" + strings.Repeat("{a.b.c.d=1},\n", n/140) + "]",
		"too large":    strings.Repeat("#", n+1),
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			if _, err := Parse("f", []byte(doc)); err == nil {
				t.Error("no error")
			}
			t.Log(time.Since(start))
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "b.toml")
	if _, err := Load(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte(minimal), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if f.Path != path || f.ImageLine("a") != 4 {
		t.Errorf("%+v", f)
	}
	if _, err := Load("/dev/zero"); err == nil {
		t.Error("/dev/zero loaded")
	}
}

func TestValidate(t *testing.T) {
	d := NewDisk()
	d.ID, d.Socket, d.Image, d.Format = "a", "/s", "/i", "raw"
	if err := d.Validate(); err != nil {
		t.Errorf("good disk: %v", err)
	}
	d.Queues, d.Image = 0, "i"
	want := "disk \"a\": image: \"i\" is not an absolute path\ndisk \"a\": queues: 0: want 1 to 64"
	if err := d.Validate(); err == nil || err.Error() != want {
		t.Errorf("bad disk: %v", err)
	}
}

func TestCheckRoots(t *testing.T) {
	// The temporary directory may itself lie behind a link.
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	p := func(name string) string { return filepath.Join(dir, name) }
	for _, d := range []string{"in/sub", "in2", "out"} {
		if err := os.MkdirAll(p(d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"in/a", "in/sub/..b", "in2/a", "out/a"} {
		if err := os.WriteFile(p(f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"in/esc": p("out/a"), "in/dir": p("out"), "in/dangling": p("out/new"),
		"in/ok": "a", "alias": p("in"), "in/loop": "loop",
	} {
		if err := os.Symlink(target, p(link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		path string
		ok   bool
	}{
		{"in/a", true},
		{"in/sub/..b", true},
		{"in/new", true},
		{"in/ok", true},
		{"alias/a", true},
		{"in/../in/a", true},
		{"in2/a", false}, // a common prefix is not enough
		{"out/a", false},
		{"out/new", false},
		{"in/esc", false},
		{"in/dir/a", false},
		{"in/dir/new", false},
		{"in/dangling", false},
		{"in/loop", false},
		{"in/none/new", false},
		{"in/../out/a", false},
	} {
		for _, roots := range [][]string{{p("in")}, {p("none"), p("alias")}} {
			if err := CheckRoots(dir+"/"+tc.path, roots); (err == nil) != tc.ok {
				t.Errorf("%s under %v: %v", tc.path, roots, err)
			}
		}
	}
	if err := CheckRoots("/anything", nil); err != nil {
		t.Errorf("no roots: %v", err)
	}

	doc := "[daemon]\nimage_roots = ['" + p("in") + "']\n" + strings.Replace(minimal, "/i", p("in/esc"), 1)
	want := `f:6: disk "a": image: ` + p("in/esc") + " (that is " + p("out/a") + ") is outside image_roots (" + p("in") + ")"
	if _, err := Parse("f", []byte(doc)); err == nil || err.Error() != want {
		t.Errorf("\n got %v\nwant %s", err, want)
	}
}

func TestParseSize(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want int64
		ok   bool
	}{
		{"0", 0, true},
		{"1", 1, true},
		{"50M", 50 << 20, true},
		{"4k", 4096, true},
		{"3G", 3 << 30, true},
		{"2t", 2 << 40, true},
		{"9223372036854775807", math.MaxInt64, true},
		{"9223372036854775808", 0, false},
		{"99999999999999999999", 0, false},
		{"8388607T", 8388607 << 40, true},
		{"8388608T", 0, false},
		{"", 0, false},
		{"K", 0, false},
		{"-1", 0, false},
		{"1.5G", 0, false},
		{"1 M", 0, false},
		{"1MM", 0, false},
		{"0x10", 0, false},
		{"1\x0b", 0, false}, // 'K' without its case bits
	} {
		got, err := ParseSize(tc.in)
		if (err == nil) != tc.ok || got != tc.want {
			t.Errorf("ParseSize(%q) = %d, %v", tc.in, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte(minimal + "throttle = {iops = 0}\n"))
	f.Add([]byte("disk = [{id = 'a', socket = '/s', image = '/i', format = 'raw'}]"))
	f.Add([]byte("a.\"b\" = \"\"\"x\\\"\"\"\"\"\n[[disk]]\n[disk.throttle]\niops=1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("f", data)
		if err != nil {
			if msg := err.Error(); !strings.HasPrefix(msg, "f:") {
				t.Fatalf("error without file and line: %s", msg)
			}
			return
		}
		lines := strings.Count(string(data), "\n") + 1
		for i := range file.Disks {
			d := &file.Disks[i]
			if err := d.Validate(); err != nil {
				t.Fatalf("parsed, but not valid: %v", err)
			}
			if n := file.ImageLine(d.ID); n < 1 || n > lines {
				t.Fatalf("image of %s on line %d of %d", d.ID, n, lines)
			}
		}
	})
}
