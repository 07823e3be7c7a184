// SPDX-License-Identifier: Apache-2.0

package image

import (
	"context"
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// ErrNoCheck: images of the format have nothing to check.
var ErrNoCheck = errors.New("this format has nothing to check")

// Check checks the tables of a qcow2 image, or the bitmap of an add-cow image, and repairs them if asked to. Nobody else
// may use the image. A repair begins anew several times, and so does its progress.
func Check(ctx context.Context, path, format string, repair qcow2.Repair, check func(path string) error, progress Progress,
) (res qcow2.CheckResult, err error) {
	switch format {
	case Qcow2:
	case AddCow:
		return checkAddCow(path, repair, check)
	case Raw:
		return res, fmt.Errorf("image %q: %s: %w", path, format, ErrNoCheck)
	default:
		return res, fmt.Errorf("image %q: %q: %w", path, format, ErrFormat)
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
	res, err = qcow2.CheckWatched(blk.NewTask(), f, repair, func(done, total int64) error {
		if progress != nil {
			progress(done, total)
		}
		return ctx.Err()
	})
	if err != nil {
		err = fmt.Errorf("image %q: %w", path, err)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return res, err
}

// checkAddCow opens both files, and what is behind them: a name that leads nowhere is an error, too. What is wrong with a
// bitmap is only put right with RepairAll.
func checkAddCow(path string, repair qcow2.Repair, check func(path string) error) (res qcow2.CheckResult, err error) {
	t, g := blk.NewTask(), &Image{}
	defer func() {
		if cerr := g.Close(); err == nil {
			err = cerr
		}
	}()
	if err := g.openFiles(t, Layer{path, AddCow}, Options{ReadOnly: repair == qcow2.RepairNone, Check: check}, true); err != nil {
		return res, err
	}
	m := g.Chain[0]
	r, err := addcow.Check(t, m.storage, m.data.Info().Size, repair == qcow2.RepairAll)
	if err != nil {
		return res, fmt.Errorf("image %q: %w", path, err)
	}
	res.TotalClusters, res.AllocatedClusters, res.ImageEnd = r.Clusters, r.Allocated, r.End
	res.Errors = int64(len(r.Findings))
	if r.Fixed {
		res.Errors, res.ErrorsFixed = 0, res.Errors
	}
	for _, f := range r.Findings {
		res.Findings = append(res.Findings, qcow2.Finding{Offset: f.Offset, What: f.What})
	}
	return res, nil
}
