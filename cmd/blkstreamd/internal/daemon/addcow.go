// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/copy/job"
)

// A copy by stream to a raw file or device goes through an add-cow image, whose bitmap is a file of the daemon's own:
//
//  1. The bitmap is made, for the target as its image file and the disk's image as its backing file.
//  2. The disk is moved to it, as in a snapshot. From then on the guest writes to the target.
//  3. All clusters are streamed into the target.
//  4. The bitmap says durably that it is not needed any more, and the disk's record names the target, as a raw image.
//  5. The bitmap is removed.
//
// A crash leaves the disk on the source up to 2, on the add-cow image up to 4, and on the target afterwards. A job that
// goes on after that, or is done, is told by which of them the disk is on.

// bitmapDir is where the bitmaps of devices are.
func (d *Daemon) bitmapDir() string { return d.file.Daemon.BitmapDir() }

// bitmapName is where the bitmap of a job's target is: beside a file. Beside a device it would not outlive the host.
func (d *Daemon) bitmapName(r job.Record) string {
	if fi, err := os.Stat(r.Target); err == nil && !fi.Mode().IsRegular() {
		return filepath.Join(d.bitmapDir(), r.ID+bitmapExt)
	}
	return r.Target + bitmapExt
}

const bitmapExt = ".add-cow"

// bitmapPath is bitmapName, and sees to its folder.
func (d *Daemon) bitmapPath(r job.Record) (string, error) {
	path := d.bitmapName(r)
	if filepath.Dir(path) == d.bitmapDir() {
		if err := os.MkdirAll(d.bitmapDir(), 0o700); err != nil {
			return path, err
		}
		return path, file.SyncDir(d.bitmapDir())
	}
	return path, d.checkRoots(path)
}

// removeBitmap removes a bitmap that is not needed any more if a job has made it, for this image file, and the
// configuration does not name it.
func (k *disk) removeBitmap(path, imageFile string) error {
	if path == k.spec.Image || path != imageFile+bitmapExt && filepath.Dir(path) != k.d.bitmapDir() {
		return nil
	}
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// isOn reports whether the disk is on this file, which may be the image file of an add-cow image.
func (k *disk) isOn(path string) bool {
	first := k.image().Chain[0]
	return first.Path == path || first.AddCow != nil && first.DataFile == path
}

// isPartOf reports whether path is the image file of an add-cow image that needs more than that.
func isPartOf(path, addCow string) bool {
	all, err := image.Describe(addCow, image.AddCow, false, image.Options{Unlocked: true})
	if err != nil {
		return false // it is gone
	}
	a, ok := all[0].Specific.Data.(*image.AddCowInfo)
	if !ok || a.AllAllocated {
		return false
	}
	file, err := image.Resolve(addCow, a.ImageFile)
	return err == nil && sameFile(file, path)
}
