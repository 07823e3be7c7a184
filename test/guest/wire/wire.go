// SPDX-License-Identifier: Apache-2.0

// Package wire is what the host and the agent in a test guest say to each
// other: one JSON document a line over the guest's second serial port.
package wire

import "github.com/blkstream/blkstream/test/guest/load"

// Op names what the agent is asked to do.
type Op string

// What an agent can do.
const (
	Run    Op = "run"    // Cmd in the shell; Out is what it printed
	Start  Op = "start"  // a load.Writer on Disk
	Stats  Op = "stats"  // of the writer on Disk
	Table  Op = "table"  // what the writer on Disk had acknowledged so far
	Stop   Op = "stop"   // the writer on Disk; returns Stats and Table
	Verify Op = "verify" // Disk against Table
)

// Request goes to the guest.
type Request struct {
	ID      uint64       `json:"id"`
	Op      Op           `json:"op"`
	Cmd     string       `json:"cmd,omitempty"`
	Disk    string       `json:"disk,omitempty"` // a device, /dev/vda
	Options load.Options `json:"options,omitzero"`
	Table   *load.Table  `json:"table,omitempty"`
	Newer   bool         `json:"newer,omitempty"` // see load.Verify
}

// Reply comes from the guest. The agent sends one with ID 0 and Hello when it
// has come up, so a reboot that nobody asked for shows.
type Reply struct {
	ID     uint64       `json:"id"`
	Hello  bool         `json:"hello,omitempty"`
	Err    string       `json:"err,omitempty"`
	Out    string       `json:"out,omitempty"`
	Stats  load.Stats   `json:"stats,omitzero"`
	Table  *load.Table  `json:"table,omitempty"`
	Report *load.Report `json:"report,omitempty"`
}
