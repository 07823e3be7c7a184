// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/blkstream/blkstream/copy/control"
)

func (f *fakeDaemon) BitmapAdd(_ context.Context, r *control.BitmapAddRequest) (*control.Bitmap, error) {
	_, err := f.disk(r, r.Disk)
	return &control.Bitmap{Disk: r.Disk, Name: r.Name, Granularity: r.Granularity, State: "recording"}, err
}

func (f *fakeDaemon) BitmapRemove(_ context.Context, r *control.BitmapRemoveRequest) (*control.BitmapRemoveResponse, error) {
	_, err := f.disk(r, r.Disk)
	return &control.BitmapRemoveResponse{}, err
}

func (f *fakeDaemon) BitmapClear(_ context.Context, r *control.BitmapClearRequest) (*control.Bitmap, error) {
	_, err := f.disk(r, r.Disk)
	return &control.Bitmap{Disk: r.Disk, Name: r.Name, State: "recording"}, err
}

func (f *fakeDaemon) BitmapList(_ context.Context, r *control.BitmapListRequest) (*control.BitmapListResponse, error) {
	f.last = r
	return &control.BitmapListResponse{Bitmaps: []*control.Bitmap{
		{Disk: "disk0", Name: "daily", Granularity: 64 << 10, DirtyBytes: 3 << 20, State: "recording", Stored: "/state"},
		{Disk: "disk0", Name: "old", Granularity: 4096, State: "inconsistent", Reason: "it is damaged", Stored: "/state"},
	}}, nil
}

func TestBitmapCommands(t *testing.T) {
	f := &fakeDaemon{}
	serve(t, f)
	for _, tc := range []struct {
		args, out string
		want      proto.Message
	}{
		{"bitmap add disk0 daily", "bitmap daily of disk disk0 added\n", &control.BitmapAddRequest{Disk: "disk0", Name: "daily"}},
		{"bitmap add --granularity 1M disk0 daily", "", &control.BitmapAddRequest{Disk: "disk0", Name: "daily", Granularity: 1 << 20}},
		{"bitmap clear disk0 daily", "bitmap daily of disk disk0 cleared\n", &control.BitmapClearRequest{Disk: "disk0", Name: "daily"}},
		{"bitmap remove disk0 daily", "bitmap daily of disk disk0 removed\n", &control.BitmapRemoveRequest{Disk: "disk0", Name: "daily"}},
		{"bitmap list", "", &control.BitmapListRequest{}},
		{"bitmap list disk0", "3 MiB", &control.BitmapListRequest{Disk: "disk0"}},
		{"bitmap list disk0", "inconsistent: it is damaged", &control.BitmapListRequest{Disk: "disk0"}},
	} {
		code, out, errOut := runCLI(t.Context(), strings.Fields(tc.args)...)
		if code != 0 || !strings.Contains(out, tc.out) {
			t.Errorf("%s: exit status %d, %q, %q", tc.args, code, out, errOut)
		}
		if !proto.Equal(f.last, tc.want) {
			t.Errorf("%s: the daemon was asked for %v", tc.args, f.last)
		}
	}
	_, out, _ := runCLI(t.Context(), "--json", "bitmap", "list")
	var docs []jsonBitmap
	if err := json.Unmarshal([]byte(out), &docs); err != nil || len(docs) != 2 || docs[0].DirtyBytes != 3<<20 || docs[1].Reason == "" {
		t.Errorf("%v: %s", err, out)
	}
}
