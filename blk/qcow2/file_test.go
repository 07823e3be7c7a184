// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/blktest"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/loop/looptest"
)

// Images in host files: the fast path.

func openFile(t testing.TB, path string, direct, readOnly bool) blk.Node {
	t.Helper()
	f, err := file.Open(path, file.Options{Direct: direct, Grows: true, ReadOnly: readOnly, Align: blk.SectorSize})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestConformanceFile(t *testing.T) {
	for _, direct := range []bool{false, true} {
		for _, v := range variants {
			// Without direct I/O, the kernel takes what it is given.
			if v.options != "" && (testing.Short() || !direct) {
				continue
			}
			t.Run(fmt.Sprintf("%s direct=%v", v.name, direct), func(t *testing.T) {
				blktest.Run(t, func(t *testing.T, size int64) blk.Node {
					path := diskImage(t, size, v.options)
					t.Cleanup(func() { qemu(t, "qemu-img", "check", path) })
					return mustOpen(t, openFile(t, path, direct, false), Options{Name: path})
				}, blktest.Options{Align: 512})
			})
		}
	}
}

// diskImage is qemuImage on a real disk.
func diskImage(t testing.TB, size int64, options string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "blkstream-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return qemuImageIn(t, dir, size, options)
}

// TestFastPath checks that a chain of images is read, and the top written in place, by TryMap alone.
func TestFastPath(t *testing.T) {
	const size = 4 << 20
	base := diskImage(t, size, "")
	n := mustOpen(t, openFile(t, base, true, false), Options{Name: base})
	want := pattern(20, size)
	clear(want[1<<20 : 2<<20])
	writeAt(t, n, 0, want[:1<<20])
	mustDo(t, n, &blk.Request{Op: blk.OpWriteZeroes, Off: 1 << 20, Len: 1 << 20})
	writeAt(t, n, 2<<20, want[2<<20:])
	mustClose(t, n)

	path := diskImage(t, size, "backing_fmt=qcow2,backing_file="+base)
	below := mustOpen(t, openFile(t, base, true, true), Options{Name: base, ReadOnly: true})
	defer below.Close()
	n = mustOpen(t, openFile(t, path, true, false), Options{Name: path, Backing: below})
	update := pattern(21, 256<<10)
	writeAt(t, n, 512<<10, update)
	copy(want[512<<10:], update)
	readAll(t, n) // loads the tables

	task := blk.NewTask()
	for off := int64(0); off < size; {
		e, ok := n.TryMap(blk.OpRead, off, size-off)
		if !ok {
			t.Fatalf("offset %d is not mapped", off)
		}
		if top := off >= 512<<10 && off < 768<<10; (e.Depth == 0) != top || e.Writable != (e.Depth == 0) {
			t.Errorf("offset %d: %+v", off, e)
		}
		if e.State == blk.Data {
			buf := blk.GetBuffer(int(e.Len))
			if err := task.ReadAt(e.Host, blk.BytesVec(nil, buf.B), e.HostOff); err != nil || !bytes.Equal(buf.B, want[off:off+e.Len]) {
				t.Errorf("offset %d: wrong bytes, %v", off, err)
			}
			buf.Free()
		} else if e.State != blk.Zero && e.State != blk.Unallocated || len(bytes.Trim(want[off:off+e.Len], "\x00")) > 0 {
			t.Errorf("offset %d: %+v", off, e)
		}
		off += e.Len
	}
	e, ok := n.TryMap(blk.OpWrite, 600<<10, 128<<10)
	if !ok || e.Len != 128<<10 || !e.Writable || !e.Unsynced {
		t.Errorf("in place: %+v, %v", e, ok)
	}
	if _, ok := n.TryMap(blk.OpWrite, 0, 4096); ok {
		t.Error("the backing image would be written")
	}
	if e, ok := n.TryMap(blk.OpFlush, 0, 0); !ok || e.Host == nil {
		t.Errorf("flush: %+v, %v", e, ok)
	}
	mustDo(t, n, &blk.Request{Op: blk.OpFlush})
	if e, _ := n.TryMap(blk.OpWrite, 600<<10, 4096); e.Unsynced {
		t.Error("still not synced after a flush")
	}
	for _, off := range []int64{0, 600 << 10, 1 << 20} {
		if got := testing.AllocsPerRun(100, func() { n.TryMap(blk.OpRead, off, 1<<20) }); got != 0 {
			t.Errorf("TryMap allocates %v times", got)
		}
	}
	mustClose(t, n)
	qemu(t, "qemu-img", "check", path)
}

// TestConcurrentFastPath has several writers, which use extents where they get them and Do where not, and discard,
// under a cache that holds one table. The barrier is a lock that is held over I/O on extents.
func TestConcurrentFastPath(t *testing.T) {
	const size, slots, workers = 24 << 20, 1536, 4
	for _, options := range []string{"cluster_size=4k", "cluster_size=16k,extended_l2=on"} {
		t.Run(options, func(t *testing.T) {
			path := diskImage(t, size, options)
			var io sync.RWMutex
			n := mustOpen(t, openFile(t, path, false, false), Options{
				Name: path, Cache: NewCache(4 << 10),
				Barrier: func(*blk.Task) error {
					io.Lock()
					defer io.Unlock()
					return nil
				},
			})
			model := make([]byte, size)
			rounds := 600
			if testing.Short() {
				rounds = 150
			}
			var wg sync.WaitGroup
			for w := range int64(workers) {
				wg.Go(func() {
					task, rng := blk.NewTask(), rand.New(rand.NewPCG(uint64(w), 30))
					fast := 0
					for range rounds {
						// Slots of 16 KiB; each worker has every fourth.
						off := (rng.Int64N(slots/workers)*workers + w) * 16 << 10
						if rng.IntN(2) == 0 {
							off = (rng.Int64N(4)*workers + w) * 16 << 10
						}
						off += rng.Int64N(16) * 512
						l := (1 + rng.Int64N(16)) * 512
						switch rng.IntN(8) {
						case 0:
							if err := blk.Do(task, n, &blk.Request{Op: blk.OpWriteZeroes, Flags: blk.Unmap, Off: off, Len: l}); err != nil {
								t.Error(err)
							}
							clear(model[off : off+l])
						case 1:
							if err := blk.Do(task, n, &blk.Request{Op: blk.OpFlush}); err != nil {
								t.Error(err)
							}
						default:
							b := pattern(rng.Uint64(), int(l))
							copy(model[off:], b)
							io.RLock()
							e, ok := n.TryMap(blk.OpWrite, off, l)
							if ok = ok && e.Len == l; ok {
								fast++
								if err := task.WriteAt(e.Host, blk.BytesVec(nil, b), e.HostOff, false); err != nil {
									t.Error(err)
								}
							}
							io.RUnlock()
							if !ok {
								if err := blk.Do(task, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: l, Data: blk.BytesVec(nil, b)}); err != nil {
									t.Error(err)
								}
							}
						}
						got := make([]byte, l)
						io.RLock()
						e, ok := n.TryMap(blk.OpRead, off, l)
						if ok && e.Len == l && e.State == blk.Data {
							if err := task.ReadAt(e.Host, blk.BytesVec(nil, got), e.HostOff); err != nil {
								t.Error(err)
							}
						}
						io.RUnlock()
						if !ok || e.Len != l || e.State != blk.Data {
							if err := blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: off, Len: l, Data: blk.BytesVec(nil, got)}); err != nil {
								t.Error(err)
							}
						}
						if !bytes.Equal(got, model[off:off+l]) {
							t.Errorf("worker %d: wrong bytes at %d", w, off)
							return
						}
					}
					if fast == 0 {
						t.Error("nothing was written through extents")
					}
				})
			}
			wg.Wait()
			if !bytes.Equal(readAll(t, n), model) {
				t.Error("wrong contents")
			}
			mustClose(t, n)
			qemu(t, "qemu-img", "check", path)
		})
	}
}

// TestConformanceLoops runs in the coroutines of two queues, on one thread each: whoever waits otherwise than through
// its task stops them all.
func TestConformanceLoops(t *testing.T) {
	raw := filepath.Join(tempDir(t), "base")
	contents := pattern(22, blktest.DefaultSize)
	if err := os.WriteFile(raw, contents, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, options := range []string{"", "extended_l2=on", "cluster_size=512"} {
		t.Run(options, func(t *testing.T) {
			blktest.Run(t, func(t *testing.T, size int64) blk.Node {
				path := diskImage(t, size, strings.Trim("backing_fmt=raw,backing_file="+raw+","+options, ","))
				t.Cleanup(func() { qemu(t, "qemu-img", "check", path) })
				return mustOpen(t, openFile(t, path, true, false), Options{Name: path, Backing: openFile(t, raw, true, true)})
			}, blktest.Options{Align: 512, Contents: contents, Task: looptest.Tasks})
		})
	}
}
