// SPDX-License-Identifier: Apache-2.0

package image

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Resolve turns a name that an image has in its header into a path: a relative one starts from the directory of the
// image. Only plain file names are taken: to QEMU a name with a colon in its first element is a protocol with an
// address, or a whole description of a device as JSON.
func Resolve(image, name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("%q: %w", name, ErrName)
	}
	if prefix, _, _ := strings.Cut(name, "/"); strings.Contains(prefix, ":") {
		protocol, _, _ := strings.Cut(prefix, ":")
		return "", fmt.Errorf("%q: %q is %w", name, protocol+":", ErrName)
	}
	if filepath.IsAbs(name) {
		return name, nil
	}
	// Not filepath.Join: "link/../name" is not "name" where link is a symbolic link.
	return folder(image) + name, nil
}

// folder is a path up to the last "/", and that.
func folder(path string) string { return path[:strings.LastIndexByte(path, '/')+1] }

// absolute is a name of the file that is the same from everywhere. Unlike filepath.Abs it leaves ".." in, see Resolve.
func absolute(path string) (string, error) {
	if filepath.IsAbs(path) {
		return path, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("image %q: %w", path, err)
	}
	return dir + "/" + path, nil
}
