// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// State is what a disk owes for one block: 0 when nothing was ever
// acknowledged (the block is then not checked), else the generation of the
// newest acknowledged write and whether that write was a write of zeros.
type State uint32

const zeroed State = 1

func written(gen uint32) State     { return State(gen << 1) }
func (s State) generation() uint32 { return uint32(s >> 1) }
func (s State) isZero() bool       { return s&zeroed != 0 }

// Table is what was acknowledged for the first len(Blocks)*BlockSize bytes of
// one disk.
type Table struct {
	Seed      uint64  // tells the blocks of two disks apart
	BlockSize int     // bytes, a multiple of 512
	Blocks    []State // by block number
}

// Bytes is the length of the area that the table describes.
func (t *Table) Bytes() int64 { return int64(len(t.Blocks)) * int64(t.BlockSize) }

// Clone returns a copy that shares nothing with t.
func (t *Table) Clone() *Table {
	c := *t
	c.Blocks = append([]State(nil), t.Blocks...)
	return &c
}

// tableJSON carries a table over the guest's serial line, where each byte is
// dear: the states are deflated.
type tableJSON struct {
	Seed      uint64 `json:"seed"`
	BlockSize int    `json:"block_size"`
	Deflated  []byte `json:"deflated"`
}

// MarshalJSON packs the table.
func (t *Table) MarshalJSON() ([]byte, error) {
	var packed bytes.Buffer
	w, err := flate.NewWriter(&packed, flate.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := binary.Write(w, binary.LittleEndian, t.Blocks); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return json.Marshal(tableJSON{t.Seed, t.BlockSize, packed.Bytes()})
}

// UnmarshalJSON unpacks what MarshalJSON wrote.
func (t *Table) UnmarshalJSON(data []byte) error {
	var j tableJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	raw, err := io.ReadAll(flate.NewReader(bytes.NewReader(j.Deflated)))
	if err != nil {
		return fmt.Errorf("load: table: %w", err)
	}
	*t = Table{Seed: j.Seed, BlockSize: j.BlockSize, Blocks: make([]State, len(raw)/4)}
	for i := range t.Blocks {
		t.Blocks[i] = State(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return nil
}
