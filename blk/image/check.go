// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// Check checks the tables of a qcow2 image and repairs them if asked to. Nobody else may use the image.
func Check(path, format string, repair qcow2.Repair, check func(path string) error) (res qcow2.CheckResult, err error) {
	if format != Qcow2 {
		return res, fmt.Errorf("image %q: a %s image has nothing to check: %w", path, format, ErrFormat)
	}
	if check != nil {
		if err := check(path); err != nil {
			return res, err
		}
	}
	f, err := file.Open(path, file.Options{ReadOnly: repair == qcow2.RepairNone, Grows: true})
	if err != nil {
		return res, err
	}
	res, err = qcow2.Check(blk.NewTask(), f, repair)
	if err != nil {
		err = fmt.Errorf("image %q: %w", path, err)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return res, err
}
