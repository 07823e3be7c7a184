// SPDX-License-Identifier: Apache-2.0

package image

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/blkstream/blkstream/blk/qcow2"
)

// An existing file that is to become the image is not emptied before it is known to be none of the others.
func TestCreateOverItself(t *testing.T) {
	data := bytes.Repeat([]byte{7}, 1<<20)
	for _, c := range []struct {
		name string
		o    CreateOptions
	}{
		{"image file", CreateOptions{Format: AddCow, ImageFile: "x"}},
		{"image file by a link", CreateOptions{Format: AddCow, ImageFile: "link"}},
		{"backing file", CreateOptions{Format: AddCow, ImageFile: "new", CreateOptions: qcow2.CreateOptions{BackingFile: "link"}}},
		{"backing file of qcow2", CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: "link"}}},
		{"backing file of qcow2, unopened", CreateOptions{Format: Qcow2, Unopened: true, CreateOptions: qcow2.CreateOptions{Size: 1 << 20, BackingFile: "link"}}},
		{"data file of qcow2", CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: "base", DataFile: "link"}}},
		{"data file is the backing file", CreateOptions{Format: Qcow2, CreateOptions: qcow2.CreateOptions{BackingFile: "link", DataFile: "x"}}},
	} {
		d := newDir(t)
		for _, f := range []string{"x", "base", "y"} {
			if err := os.WriteFile(d.at(f), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Link(d.at("x"), d.at("link")); err != nil {
			t.Fatal(err)
		}
		path := "x"
		if c.name == "data file is the backing file" {
			path = "y"
		}
		c.o.Existing = true
		if c.o.BackingFile == "" {
			c.o.BackingFile = "base"
		}
		if c.o.BackingFormat = Raw; !c.o.Unopened {
			c.o.Size = -1
		}
		if err := Create(t.Context(), d.at(path), c.o); !errors.Is(err, ErrLoop) {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, f := range []string{"x", "base", "y"} {
			if got, err := os.ReadFile(d.at(f)); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s: %s is gone, %v", c.name, f, err)
			}
		}
	}
}
