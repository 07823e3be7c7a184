// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"runtime/debug"
	"syscall"
	"testing"

	"github.com/blkstream/blkstream/blk"
)

// A fault in guest memory does not keep the table that was read with in memory for ever.
func TestFaultUnpins(t *testing.T) {
	n := mustOpen(t, openFile(t, diskImage(t, 1<<20, "cluster_size=4k"), false, false), Options{})
	task := blk.NewTask()
	if err := blk.Do(task, n, &blk.Request{Op: blk.OpWrite, Len: 4096, Data: blk.BytesVec(nil, pattern(1, 4096))}); err != nil {
		t.Fatal(err)
	}
	gone, err := syscall.Mmap(-1, 0, 4096, syscall.PROT_NONE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Munmap(gone) //nolint:errcheck // the test is over
	func() {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if recover() == nil {
				t.Error("no fault")
			}
		}()
		_ = blk.Do(task, n, &blk.Request{Op: blk.OpRead, Off: 8192, Len: 4096, Data: blk.BytesVec(nil, gone)})
	}()
	if tab := n.l1.Load().tables[0].Load(); tab.pins != 0 {
		t.Errorf("%d pins are left", tab.pins)
	}
	mustClose(t, n)
}
