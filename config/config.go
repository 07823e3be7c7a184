// SPDX-License-Identifier: Apache-2.0

// Package config turns the daemon's TOML file into checked specifications.
//
// A file goes through four steps, in the order of the files' functions: the
// TOML library checks the syntax and yields tables; lines.go finds out on
// which line each key stands; decode.go moves the tables into the types below
// and refuses what it does not know; validate.go checks the values. Whatever
// is wrong is reported as
//
//	FILE:LINE: disk "ID": KEY: what is wrong
//
// and all of it at once.
package config

import (
	"fmt"
	"io"
	"os"
)

// Defaults of the keys that have one.
const (
	DefaultControl   = "/run/blkstream/control.sock"
	DefaultStateDir  = "/var/lib/blkstream"
	DefaultQueues    = 1
	DefaultQueueSize = 256
	DefaultCache     = "none"
	DefaultLock      = "always"
	DefaultBlockSize = 512
	DefaultPollUS    = 32 // as QEMU's iothreads
	// DefaultMetadataCache holds the L2 tables of 1 TiB in clusters of 64 KiB, and more than a few refcount blocks.
	DefaultMetadataCache = 144 << 20
)

// maxFileSize bounds the memory that a file can make the TOML library use.
// A disk takes about 300 bytes.
const maxFileSize = 1 << 20

// File is a parsed and valid configuration.
type File struct {
	Path   string // as given to Load or Parse
	Daemon Daemon
	Disks  []Disk // in the order of the file

	imageLines map[string]int // by disk id
}

// Daemon is the [daemon] table.
type Daemon struct {
	Control    string   // path of the control socket
	StateDir   string   // directory of journals, bitmaps and switch records
	ImageRoots []string // images outside are refused; empty: any
	Metrics    string   // HOST:PORT of the Prometheus endpoint; empty: none
}

// Disk is a [[disk]] table. A disk that is made elsewhere (from flags, or at
// run time) starts from NewDisk, which knows the defaults.
type Disk struct {
	ID     string
	Socket string // absolute path, or "fd:N"
	Image  string // absolute path
	Format string // never probed
	// Backing names the images behind the first one, the nearest first, in place of what the images say. Behind the
	// last one that is given their own names count.
	Backing    []Layer
	ReadOnly   bool
	Queues     int    // 1 to 64
	QueueSize  int    // power of two, 2 to 1024
	Cache      string // none, writeback, writethrough, unsafe
	Lock       string // always, running
	BlockSize  int    // 512 or 4096
	Serial     string // at most 20 printable ASCII characters
	Discard    bool
	CopyOnRead bool
	PollUS     int // most microseconds that a queue without work busy-polls before it sleeps, up to a second; 0: none
	Throttle   Throttle

	MetadataCache int64 // most bytes of memory for the tables of the disk's images
}

// Layer names an image of a chain. An empty field leaves what the image in front says.
type Layer struct {
	Image  string // absolute path
	Format string
}

// Throttle limits a disk; zero means no limit.
type Throttle struct {
	IOPS           int64
	BytesPerSecond int64
}

// NewDisk returns a disk with the defaults of all keys that have one.
func NewDisk() Disk {
	return Disk{
		Queues:    DefaultQueues,
		QueueSize: DefaultQueueSize,
		Cache:     DefaultCache,
		Lock:      DefaultLock,
		BlockSize: DefaultBlockSize,
		Discard:   true,
		PollUS:    DefaultPollUS,

		MetadataCache: DefaultMetadataCache,
	}
}

// Load reads and parses the file at path.
func Load(path string) (*File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxFileSize+1))
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	return Parse(path, data)
}

// ImageLine returns the line of the image key of the disk with that id, 0 if
// there is none: for messages that tell the operator what to edit.
func (f *File) ImageLine(id string) int { return f.imageLines[id] }
