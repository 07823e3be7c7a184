// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/blockcopy"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
)

const copyBlock = blockcopy.DefaultGranularity

// full makes an image without zeros, which can be compressed.
func (b *bed) full(name string) string {
	b.Helper()
	text := bytes.Repeat([]byte{1}, diskSize)
	for i := 0; i < len(text); i += 4096 {
		binary.LittleEndian.PutUint64(text[i:], rand.Uint64())
	}
	b.must(os.WriteFile(b.path(name), text, 0o600))
	return b.path(name)
}

func (b *bed) slack(d time.Duration) {
	old := stampSlack
	stampSlack = d
	b.Cleanup(func() { stampSlack = old })
}

func (b *bed) bits() string { return copyPath(b.path("state"), "j") }

// copied are the blocks that a dead daemon's copy has done.
func (b *bed) copied() (all []int64) {
	b.Helper()
	text, err := os.ReadFile(b.bits())
	b.must(err)
	mem := make([]byte, len(text)+8)
	words := wordsOf(mem)[:len(text)/8]
	if len(words) < stampWords { // the daemon has just made the file
		return nil
	}
	for i := range words {
		words[i].Store(binary.LittleEndian.Uint64(text[8*i:]))
	}
	s, err := mirror.OpenState(words[stampWords:], diskSize, copyBlock)
	b.must(err)
	for off := int64(0); off < min(s.Bulk(), diskSize); off += copyBlock {
		if !s.Dirty.Any(off, 1) {
			all = append(all, off)
		}
	}
	return all
}

// spoil writes into blocks of the target, so that one can see which of them are copied again.
func (b *bed) spoil(path, format string, blocks []int64) {
	b.Helper()
	b.mark(path, format, blocks, 0xee)
}

// mark writes the first sector of blocks of an image that nobody uses.
func (b *bed) mark(path, format string, blocks []int64, x byte) {
	b.Helper()
	t := blk.NewTask()
	img, err := image.Open(t, path, format, image.Options{})
	b.must(err)
	for _, off := range blocks {
		b.must(blk.Do(t, img.Root, &blk.Request{Op: blk.OpWrite, Off: off, Len: 512, Data: blk.BytesVec(nil, bytes.Repeat([]byte{x}, 512))}))
	}
	b.must(img.Close())
}

// differ are the blocks in which two images differ.
func (b *bed) differ(source, sourceFormat, target, targetFormat string) (all []int64) {
	b.Helper()
	read := func(path, format string) []byte {
		t := blk.NewTask()
		img, err := image.Open(t, path, format, image.Options{ReadOnly: true})
		b.must(err)
		defer img.Close()
		text := make([]byte, diskSize)
		b.must(blk.Do(t, img.Root, &blk.Request{Op: blk.OpRead, Len: diskSize, Data: blk.BytesVec(nil, text)}))
		return text
	}
	s, d := read(source, sourceFormat), read(target, targetFormat)
	for off := int64(0); off < diskSize; off += copyBlock {
		if !bytes.Equal(s[off:off+copyBlock], d[off:off+copyBlock]) {
			all = append(all, off)
		}
	}
	return all
}

// die ends the daemon and leaves of its copy what there would be had it been killed.
func (b *bed) die(d *Daemon) {
	b.Helper()
	kept, err := os.ReadFile(b.bits())
	b.must(err)
	b.stop(d)
	b.must(os.WriteFile(b.bits(), kept, 0o600))
}

// resumeAndSwitch brings a copy to its end.
func (b *bed) resumeAndSwitch(c *control.Client) {
	b.Helper()
	_, err := c.JobSpeed(b.Context(), &control.JobSpeedRequest{Id: "j"})
	b.must(err)
	if b.job(c).State == job.StatePaused {
		_, err = c.JobResume(b.Context(), &control.JobResumeRequest{Id: "j"})
		b.must(err)
	}
	b.wait(c, "j", job.StateReady)
	_, err = c.Switch(b.Context(), &control.SwitchRequest{Target: "j"})
	b.must(err)
	if left, err := filepath.Glob(b.path("state/copies/*")); err != nil || len(left) > 0 {
		b.Errorf("left behind: %v, %v", left, err)
	}
}

func (b *bed) job(c *control.Client) *control.Job {
	b.Helper()
	j, err := c.JobShow(b.Context(), &control.JobShowRequest{Id: "j"})
	b.must(err)
	return j
}

// What has been copied when the daemon ends, whatever the target, is not copied again, and what the guest writes
// before and after is not missed.
func TestCopyGoesOn(t *testing.T) {
	for _, c := range []struct {
		name, source, target string
		dies, forgets        bool
		req                  *control.CopyRequest
	}{
		{name: "raw stops", source: image.Raw, target: image.Raw, req: &control.CopyRequest{}},
		{name: "raw dies", source: image.Raw, target: image.Raw, dies: true, req: &control.CopyRequest{}},
		{name: "qcow2 dies", source: image.Raw, target: image.Qcow2, dies: true, req: &control.CopyRequest{Compression: "zstd"}},
		{name: "existing dies", source: image.Qcow2, target: image.Qcow2, dies: true, req: &control.CopyRequest{Existing: true, Verify: true}},
		// Of these, the first blocks and the last ones are held by the base only.
		{name: "over a base stops", source: image.Qcow2, target: image.Qcow2, req: &control.CopyRequest{Base: "base"}},
		{name: "over a base dies", source: image.Qcow2, target: image.Qcow2, dies: true, req: &control.CopyRequest{Base: "base", Compression: "zstd"}},
		{name: "existing over a base dies", source: image.Qcow2, target: image.Qcow2, dies: true, req: &control.CopyRequest{Base: "base", Existing: true}},
		{name: "over a base forgets", source: image.Qcow2, target: image.Qcow2, dies: true, forgets: true, req: &control.CopyRequest{Base: "base"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			b.slack(time.Hour)
			source, target := b.full("source"), b.path("target")
			if c.source == image.Qcow2 {
				b.must(os.Rename(source, b.path("base")))
				b.overlay("source", b.path("base"))
			}
			if c.req.Base != "" {
				c.req.Base = b.path(c.req.Base)
				var above []int64
				for off := int64(4 * copyBlock); off < diskSize-4*copyBlock; off += copyBlock {
					above = append(above, off)
				}
				b.mark(source, c.source, above, 0xaa)
			}
			if c.req.Existing {
				b.must(image.Create(t.Context(), target, image.CreateOptions{Format: c.target, CreateOptions: qcow2.CreateOptions{
					Size: diskSize, BackingFile: c.req.Base, BackingFormat: strings.Repeat(image.Raw, min(len(c.req.Base), 1)),
				}}))
				b.spoil(target, c.target, []int64{0, copyBlock, diskSize - copyBlock})
			}
			f := b.load("", strings.Replace(b.disk("disk0", source), `"raw"`, `"`+c.source+`"`, 1))
			d, client := b.start(f)
			c.req.Id, c.req.Disk, c.req.Target, c.req.Format, c.req.Speed = "j", "disk0", target, c.target, 1<<20
			_, err := client.Copy(t.Context(), c.req)
			b.must(err)
			for deadline := time.Now().Add(time.Minute); !exists(b.bits()) || len(b.copied()) < 8; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("nothing is copied: %v", b.job(client))
				}
			}
			_, err = client.JobPause(t.Context(), &control.JobPauseRequest{Id: "j"})
			b.must(err)
			b.write("disk0", 1)
			if c.dies {
				b.die(d)
			} else {
				b.stop(d)
			}
			copied := b.copied()
			if slices.Contains(copied, 0) {
				t.Error("a block that the guest has written counts as copied")
			}
			b.spoil(target, c.target, copied)
			if c.forgets {
				b.must(os.Remove(b.bits()))
				b.spoil(target, c.target, []int64{diskSize - copyBlock})
				d, client = b.start(f)
				if j := b.job(client); !strings.Contains(j.Message, "started again from the beginning") {
					t.Errorf("after a restart: %v", j)
				}
				b.write("disk0", 2)
				b.resumeAndSwitch(client)
				b.holds("disk0", 2)
				b.stop(d)
				if bad := b.differ(source, c.source, target, c.target); len(bad) > 0 {
					t.Errorf("the images differ in %v", bad)
				}
				return
			}

			d, client = b.start(f)
			j := b.job(client)
			if j.State != job.StatePaused || !strings.Contains(j.Message, "goes on where it was") || !strings.Contains(j.Message, "job resume j") {
				t.Errorf("after a restart: %v", j)
			}
			if left := diskSize - int64(len(copied))*copyBlock; j.BytesDone == 0 || j.BytesTotal-j.BytesDone != left {
				t.Errorf("%d of %d bytes are done, want %d to be left", j.BytesDone, j.BytesTotal, left)
			}
			if k, err := client.DiskShow(t.Context(), &control.DiskShowRequest{Id: "disk0"}); err != nil || !strings.HasPrefix(k.Graph, "mirror") {
				t.Errorf("the graph is %v, %v", k, err)
			}
			b.write("disk0", 2)
			if c.req.Verify {
				// It finds what the test has spoilt.
				_, err = client.JobResume(t.Context(), &control.JobResumeRequest{Id: "j"})
				b.must(err)
				if j := b.wait(client, "j", job.StateFailed); !strings.Contains(j.Error, "differ at offset") {
					t.Errorf("verified: %v", j)
				}
				b.stop(d)
				return
			}
			b.resumeAndSwitch(client)
			b.holds("disk0", 2)
			b.stop(d)
			if again := b.differ(source, c.source, target, c.target); !slices.Equal(again, copied) {
				t.Errorf("these blocks were not copied again: %v, want %v", again, copied)
			}
			if c.req.Compression != "" {
				packed := int64(0)
				b.must(image.Map(t.Context(), target, c.target, image.Options{}, func(s image.Segment) error {
					if s.Compressed && s.Start+s.Length > diskSize/2 {
						packed += s.Length
					}
					return nil
				}))
				if packed == 0 {
					t.Error("nothing was compressed after the restart")
				}
			}
		})
	}
}

// A copy that was ready comes back to that without copying anything again; and once more, and so on.
func TestReadyCopyGoesOn(t *testing.T) {
	b := newBed(t)
	b.slack(time.Hour)
	source, target := b.full("source"), b.path("target")
	f := b.load("", b.disk("disk0", source))
	d, c := b.start(f)
	_, err := c.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target})
	b.must(err)
	b.wait(c, "j", job.StateReady)
	for i := range byte(3) {
		b.write("disk0", i)
		b.stop(d)
		copied := b.copied()
		if len(copied) != diskSize/copyBlock {
			t.Fatalf("%d blocks are the same", len(copied))
		}
		b.spoil(target, image.Raw, copied[1:])
		d, c = b.start(f)
		if j := b.wait(c, "j", job.StateReady); j.BytesDone != diskSize {
			t.Errorf("ready again: %v", j)
		}
	}
	b.resumeAndSwitch(c)
	b.stop(d)
	if same := diskSize/copyBlock - len(b.differ(source, image.Raw, target, image.Raw)); same > 1 {
		t.Errorf("%d blocks were copied again", same)
	}
}

// Whatever does not fit, the copy begins again, says why, and ends right.
func TestCopyBeginsAgain(t *testing.T) {
	var b *bed
	edit := func(change func(r *copyRecord)) {
		b.Helper()
		text, err := os.ReadFile(b.path("state/copies/j.json"))
		b.must(err)
		var r copyRecord
		b.must(json.Unmarshal(text, &r))
		change(&r)
		text, err = json.Marshal(&r)
		b.must(err)
		b.must(os.WriteFile(b.path("state/copies/j.json"), text, 0o600))
	}
	word := func(i int, v uint64) {
		b.Helper()
		f, err := os.OpenFile(b.bits(), os.O_RDWR, 0)
		b.must(err)
		defer f.Close()
		_, err = f.WriteAt(binary.LittleEndian.AppendUint64(nil, v), int64(8*i))
		b.must(err)
	}
	replace := func(name string) {
		b.Helper()
		text, err := os.ReadFile(b.path(name))
		b.must(err)
		b.must(os.WriteFile(b.path("new"), text, 0o600))
		b.must(os.Rename(b.path("new"), b.path(name)))
	}
	later := func(name string) { b.must(os.Chtimes(b.path(name), time.Time{}, time.Now().Add(2*time.Hour))) }
	for _, c := range []struct {
		why    string // in the message
		tamper func()
	}{
		{"started anew", func() { edit(func(r *copyRecord) { r.Boot = "another" }) }},
		{"bytes and has", func() { edit(func(r *copyRecord) { r.Size -= 512 }) }},
		{"bytes and has", func() {
			b.must(os.Truncate(b.path("source"), diskSize+copyBlock))
			b.must(os.Truncate(b.path("target"), diskSize+copyBlock))
		}},
		{"source is another file", func() { replace("source") }},
		{"target is another file", func() { replace("target") }},
		{"source was changed", func() { later("source") }},
		{"target was changed", func() { later("target") }},
		{"source was changed", func() { stampSlack = -time.Hour }},
		{"set back", func() { word(wordStamp, uint64(time.Now().Add(time.Hour).UnixNano())) }},
		{"damaged", func() { word(wordKey, 1) }},
		{"damaged", func() { b.must(os.WriteFile(b.bits(), bytes.Repeat([]byte{0x5a}, 3000), 0o600)) }},
		{"damaged", func() { b.must(os.Truncate(b.bits(), 100)) }},
		{"damaged", func() { b.must(os.Truncate(b.bits(), 0)) }},
		{"damaged", func() { word(stampWords, 12345) }},
		{"a flush of the target", func() { word(stampWords+1, 1) }},
		{"damaged", func() { b.must(os.WriteFile(b.path("state/copies/j.json"), []byte(`{"size":`), 0o600)) }},
		{"damaged", func() { edit(func(r *copyRecord) { r.Target = nil }) }},
		{"nothing is known", func() { b.must(os.Remove(b.path("state/copies/j.json"))) }},
		{"no such file", func() { b.must(os.Remove(b.bits())) }},
		{"others may write to it", func() { b.must(os.Chmod(b.bits(), 0o622)) }},
		{"others may write to it", func() {
			if os.Geteuid() != 0 {
				b.Skip("only root can give a file away")
			}
			b.must(os.Chown(b.bits(), 65534, -1))
		}},
		{"symbolic links", func() {
			elsewhere := b.bits() + ".elsewhere"
			b.must(os.Rename(b.bits(), elsewhere))
			b.Cleanup(func() { os.Remove(elsewhere) })
			b.must(os.Symlink(elsewhere, b.bits()))
		}},
		{"is a directory", func() { b.must(os.Remove(b.bits())); b.must(os.Mkdir(b.bits(), 0o700)) }},
	} {
		t.Run(c.why, func(t *testing.T) {
			b = newBed(t)
			b.slack(time.Hour)
			source, target := b.full("source"), b.path("target")
			f := b.load("", b.disk("disk0", source))
			d, client := b.start(f)
			_, err := client.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target})
			b.must(err)
			b.wait(client, "j", job.StateReady)
			b.stop(d)
			b.spoil(target, image.Raw, b.copied())
			c.tamper()
			d, client = b.start(f)
			j := b.job(client)
			if !strings.Contains(j.Message, "started again from the beginning") && j.State != job.StateReady || !strings.Contains(b.log.String(), c.why) {
				t.Errorf("after a restart: %v\n%s", j, b.log.String())
			}
			b.wait(client, "j", job.StateReady)
			b.write("disk0", 3)
			stampSlack = time.Hour
			b.resumeAndSwitch(client)
			b.holds("disk0", 3)
			b.stop(d)
			if bad := b.differ(source, image.Raw, target, image.Raw); len(bad) > 1 || len(bad) == 1 && bad[0] != 0 {
				t.Errorf("the images differ in %v", bad)
			}
		})
	}
}

// A copy whose state finds no room in memory, or no memory to lie in, is made without it.
func TestCopyWithoutState(t *testing.T) {
	for _, c := range []struct {
		name, why string
		prepare   func(b *bed, dir string)
	}{
		{"full", "no space left", func(b *bed, dir string) {
			b.mount(dir, "size=4k")
			b.must(os.WriteFile(filepath.Join(dir, "other"), make([]byte, 4096), 0o600))
		}},
		{"on a disk", "not on tmpfs", func(b *bed, dir string) { b.must(os.Mkdir(dir, 0o700)) }},
		{"missing", "no such file", func(*bed, string) {}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t)
			old := memory
			memory = b.path("memory")
			t.Cleanup(func() { memory = old })
			c.prepare(b, memory)
			source, target := b.full("source"), b.path("target")
			f := b.load("", b.disk("disk0", source))
			d, client := b.start(f)
			_, err := client.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target, Speed: 1 << 20})
			b.must(err)
			for b.job(client).BytesDone == 0 {
				time.Sleep(5 * time.Millisecond)
			}
			if log := b.log.String(); !strings.Contains(log, "begins again if the daemon dies") || !strings.Contains(log, c.why) {
				t.Errorf("the log has no %q: %s", c.why, log)
			}
			b.write("disk0", 1)
			for _, pattern := range []string{filepath.Join(memory, "blkstream-*"), b.path("state/copies/*")} {
				if left, err := filepath.Glob(pattern); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v, %v", left, err)
				}
			}
			b.stop(d)
			d, client = b.start(f)
			if j := b.job(client); !strings.Contains(j.Message, "started again from the beginning") || !strings.Contains(j.Message, "nothing is known") {
				t.Errorf("after a restart: %v", j)
			}
			b.write("disk0", 2)
			b.resumeAndSwitch(client)
			b.holds("disk0", 2)
			b.stop(d)
			if bad := b.differ(source, image.Raw, target, image.Raw); len(bad) > 0 {
				t.Errorf("the images differ in %v", bad)
			}
		})
	}
}

// What belongs to no job that goes on is gone when the daemon has started, and nothing else.
func TestCopyLeftovers(t *testing.T) {
	b := newBed(t)
	source, target := b.full("source"), b.path("target")
	f := b.load("", b.disk("disk0", source))
	d, c := b.start(f)
	b.move(c, "disk0", b.path("first")) // copy-disk0-1 is completed
	_, err := c.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target})
	b.must(err)
	b.wait(c, "j", job.StateReady)
	b.stop(d)

	state := b.path("state")
	gone := []string{
		filepath.Join(state, copyKind, "dismissed.json"), copyPath(state, "dismissed"),
		filepath.Join(state, copyKind, "copy-disk0-1.json"), copyPath(state, "copy-disk0-1"),
		filepath.Join(state, copyKind, "half.json.new"),
	}
	stay := []string{
		filepath.Join(state, copyKind, "j.json"), b.bits(),
		copyPath(b.path("another"), "dismissed"), // of a daemon with another state directory
	}
	for _, path := range append(slices.Clone(gone), stay[2:]...) {
		b.must(os.WriteFile(path, []byte("x"), 0o600))
		t.Cleanup(func() { os.Remove(path) })
	}
	d, c = b.start(f)
	for _, path := range gone {
		if exists(path) {
			t.Errorf("%s is still there", path)
		}
	}
	for _, path := range stay {
		if !exists(path) {
			t.Errorf("%s is gone", path)
		}
	}
	if j := b.wait(c, "j", job.StateReady); !strings.Contains(j.Message, "goes on where it was") && j.BytesDone != diskSize {
		t.Errorf("after a restart: %v", j)
	}
	b.resumeAndSwitch(c)
	if exists(b.bits()) {
		t.Error("a copy that is over left its state in memory")
	}
	b.stop(d)
}

// A copy that began again because of what somebody has done to its new target knows that this is not blank any more, also
// in the daemon after the next.
func TestCopyBeginsAgainTwice(t *testing.T) {
	b := newBed(t)
	b.slack(time.Second)
	source, target := b.full("source"), b.path("target")
	b.must(os.Truncate(source, diskSize/2))
	b.must(os.Truncate(source, diskSize)) // a hole
	f := b.load("", b.disk("disk0", source))
	d, c := b.start(f)
	_, err := c.Copy(t.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: target, Speed: 256 << 10})
	b.must(err)
	_, err = c.JobPause(t.Context(), &control.JobPauseRequest{Id: "j"})
	b.must(err)
	b.stop(d)
	time.Sleep(2 * stampSlack)
	b.spoil(target, image.Raw, []int64{diskSize - copyBlock})
	d, c = b.start(f)
	if j := b.job(c); j.State != job.StatePaused || !strings.Contains(j.Message, "target was changed") {
		t.Errorf("after a restart: %v", j)
	}
	b.stop(d)
	d, c = b.start(f)
	if j := b.job(c); !strings.Contains(j.Message, "goes on where it was") {
		t.Errorf("after another restart: %v", j)
	}
	_, err = c.JobSpeed(t.Context(), &control.JobSpeedRequest{Id: "j"})
	b.must(err)
	b.resumeAndSwitch(c)
	b.stop(d)
	if bad := b.differ(source, image.Raw, target, image.Raw); len(bad) > 0 {
		t.Errorf("the images differ in %v", bad)
	}
}

// readyCopy leaves the copy of a disk beside another one, which a daemon that has stopped had made ready.
func (b *bed) readyCopy() *config.File {
	b.Helper()
	f := b.load("", b.disk("disk0", b.full("source")), b.disk("disk1", b.image("other")))
	d, c := b.start(f)
	_, err := c.Copy(b.Context(), &control.CopyRequest{Id: "j", Disk: "disk0", Target: b.path("target")})
	b.must(err)
	b.wait(c, "j", job.StateReady)
	b.stop(d)
	return f
}

// failStart has a start fail for the other disk's sake.
func (b *bed) failStart(f *config.File) {
	b.Helper()
	other := b.path("other")
	b.must(os.Rename(other, other+".away"))
	b.refused(f, "other")
	b.must(os.Rename(other+".away", other))
}

// switchTo ends the copy, which must have made both images the same.
func (b *bed) switchTo(f *config.File) {
	b.Helper()
	d, c := b.start(f)
	b.resumeAndSwitch(c)
	b.stop(d)
	if bad := b.differ(b.path("source"), image.Raw, b.path("target"), image.Raw); len(bad) > 0 {
		b.Errorf("the images differ in %v", bad)
	}
}

// A start that fails for the sake of another disk does not make its own what somebody has done to the target before it.
func TestCopyTargetTouchedBeforeFailedStart(t *testing.T) {
	b := newBed(t)
	b.slack(time.Second)
	f := b.readyCopy()
	time.Sleep(2 * stampSlack)
	b.spoil(b.path("target"), image.Raw, []int64{diskSize - copyBlock})
	b.failStart(f)
	b.switchTo(f)
}

// What one daemon has not relied on the next one does not either, though the reason has gone and the guest has written
// meanwhile.
func TestCopyThatDoesNotGoOnNeverDoes(t *testing.T) {
	b := newBed(t)
	b.slack(time.Hour)
	f := b.readyCopy()
	b.must(os.Chmod(b.bits(), 0o622))
	b.failStart(f)
	if exists(b.bits()) {
		b.must(os.Chmod(b.bits(), 0o600))
	}
	b.spoil(b.path("source"), image.Raw, []int64{copyBlock}) // as the guest of the daemon that failed
	b.switchTo(f)
}

// A start that fails for the sake of another disk loses nothing of what was copied.
func TestCopyGoesOnAfterFailedStart(t *testing.T) {
	b := newBed(t)
	b.slack(time.Second)
	f := b.readyCopy()
	time.Sleep(2 * stampSlack)
	b.failStart(f)
	d, c := b.start(f)
	if j := b.wait(c, "j", job.StateReady); !strings.Contains(b.log.String(), "copy started") || j.BytesDone != diskSize || strings.Contains(b.log.String(), "begins again") {
		t.Errorf("after two starts: %v\n%s", j, b.log.String())
	}
	b.resumeAndSwitch(c)
	b.stop(d)
}

// mount makes a small tmpfs at dir, which only root can.
func (b *bed) mount(dir, size string) {
	b.Helper()
	b.must(os.Mkdir(dir, 0o700))
	if err := unix.Mount("none", dir, "tmpfs", 0, size); err != nil {
		if os.Getenv("CI") != "" {
			b.Fatalf("mount: %v", err)
		}
		b.Skipf("no file system can be mounted here: %v", err)
	}
	b.Cleanup(func() { b.must(unix.Unmount(dir, unix.MNT_DETACH)) })
}
