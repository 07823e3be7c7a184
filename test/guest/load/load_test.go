// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const blockSize = 4096

// scratchFile is a file of size bytes that can be opened for direct I/O.
func scratchFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|directIO, 0)
	if err != nil {
		t.Skipf("no direct I/O below %s: %v", filepath.Dir(path), err)
	}
	f.Close()
	return path
}

func TestWriterKeepsItsWord(t *testing.T) {
	for name, opts := range map[string]Options{
		"random":     {Depth: 4, ReadPercent: 30, ZeroPercent: 20, FlushEvery: 8},
		"sequential": {Depth: 2, Sequential: true, MaxBlocks: 8, FlushEvery: 1000},
		"held reads": {Depth: 2, ReadPercent: 80, Hold: 16},
	} {
		t.Run(name, func(t *testing.T) {
			path := scratchFile(t, 1<<20)
			w, err := Start(path, opts, nil)
			if err != nil {
				t.Fatal(err)
			}
			for w.Stats().Writes < 50 {
				if s := w.Stats(); s.Err != "" {
					t.Fatal(s.Err)
				}
				time.Sleep(time.Millisecond)
			}
			running := w.Table()
			if s := w.Stop(); s.Err != "" {
				t.Fatal(s.Err)
			}
			for _, c := range []struct {
				table *Table
				newer bool
			}{{w.Table(), false}, {running, true}} {
				r, err := Verify(path, c.table, c.newer)
				if err != nil {
					t.Fatal(err)
				}
				if opts.ZeroPercent > 0 && c.newer {
					continue // zeros do not tell their generation: a later one looks like a loss
				}
				if err := r.Err(); err != nil || r.Checked == 0 {
					t.Errorf("newer=%v: %d checked: %v", c.newer, r.Checked, err)
				}
			}
		})
	}
}

func TestCheck(t *testing.T) {
	block := func(seed uint64, off int64, gen uint32) []byte {
		b := make([]byte, blockSize)
		fill(b, seed, off, gen)
		return b
	}
	torn := block(1, 8192, 5)
	copy(torn[2048:], block(1, 8192, 4)[2048:])
	for name, c := range map[string]struct {
		b     []byte
		want  State
		newer bool
		wrong string // the first word of the complaint, "" if it is right
	}{
		"as acknowledged":       {block(1, 8192, 5), written(5), false, ""},
		"nothing owed":          {[]byte(strings.Repeat("x", blockSize)), 0, false, ""},
		"zeros as acknowledged": {make([]byte, blockSize), written(5) | zeroed, false, ""},
		"stale":                 {block(1, 8192, 4), written(5), true, "stale"},
		"data under zeros":      {block(1, 8192, 5), written(5) | zeroed, true, "stale"},
		"zeros over data":       {make([]byte, blockSize), written(5), true, "lost"},
		"newer, running":        {block(1, 8192, 6), written(5), true, ""},
		"newer, stopped":        {block(1, 8192, 6), written(5), false, "generation 6 was never"},
		"other offset":          {block(1, 4096, 5), written(5), false, "misplaced"},
		"other disk":            {block(2, 8192, 5), written(5), false, "misplaced"},
		"torn":                  {torn, written(5), false, "torn"},
		"garbage":               {[]byte(strings.Repeat("x", blockSize)), written(5), false, "corrupt"},
	} {
		t.Run(name, func(t *testing.T) {
			got := check(c.b, make([]byte, blockSize), 1, 8192, c.want, c.newer)
			if c.wrong == "" && got != "" || c.wrong != "" && !strings.Contains(got, c.wrong) {
				t.Errorf("got %q, want %q", got, c.wrong)
			}
		})
	}
}

func TestVerifyFindsOneBadBlock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	table, err := Fill(path, 3<<20, 9)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Verify(path, table, false)
	if err != nil || r.Err() != nil || r.Checked != 768 {
		t.Fatalf("fresh: %+v, %v", r, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 2<<20+4095); err != nil {
		t.Fatal(err)
	}
	if r, err = Verify(path, table, false); err != nil || r.Wrong != 1 || r.Err() == nil {
		t.Errorf("one byte changed: %+v, %v", r, err)
	}
}

func TestTableJSON(t *testing.T) {
	in := &Table{Seed: 3, BlockSize: 512, Blocks: []State{0, written(7), written(9) | zeroed}}
	data, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	var out Table
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	if out.Seed != in.Seed || out.BlockSize != in.BlockSize || !slices.Equal(out.Blocks, in.Blocks) {
		t.Errorf("got %+v, want %+v", out, in)
	}
}
