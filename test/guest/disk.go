// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"

	"github.com/blkstream/blkstream/test/guest/load"
	"github.com/blkstream/blkstream/test/guest/wire"
)

// device is the guest's name for disk number n.
func device(n int) string { return fmt.Sprintf("/dev/vd%c", 'a'+n) }

// StartWriter starts load on a disk (0 is /dev/vda). It goes on from table, the
// result of an earlier writer, or from nothing known if table is nil.
func (g *Guest) StartWriter(disk int, opts load.Options, table *load.Table) error {
	_, err := g.call(&wire.Request{Op: wire.Start, Disk: device(disk), Options: opts, Table: table})
	return err
}

// WriterStats asks a running writer what it did so far. A write or a comparison
// that failed is an error.
func (g *Guest) WriterStats(disk int) (load.Stats, error) {
	r, err := g.call(&wire.Request{Op: wire.Stats, Disk: device(disk)})
	return writerStats(r, err)
}

// WriterTable is what a running writer has had acknowledged so far.
func (g *Guest) WriterTable(disk int) (*load.Table, error) {
	r, err := g.call(&wire.Request{Op: wire.Table, Disk: device(disk)})
	if err != nil {
		return nil, err
	}
	return r.Table, nil
}

// StopWriter stops the load after what is in flight and flushes the disk. The
// table is what the disk owes now.
func (g *Guest) StopWriter(disk int) (load.Stats, *load.Table, error) {
	r, err := g.call(&wire.Request{Op: wire.Stop, Disk: device(disk)})
	stats, err := writerStats(r, err)
	if r == nil {
		return stats, nil, err
	}
	return stats, r.Table, err
}

// Verify reads the disk in the guest and checks it against table; see load.Verify.
func (g *Guest) Verify(disk int, table *load.Table, newer bool) error {
	r, err := g.call(&wire.Request{Op: wire.Verify, Disk: device(disk), Table: table, Newer: newer})
	if err != nil {
		return err
	}
	return r.Report.Err()
}

func writerStats(r *wire.Reply, err error) (load.Stats, error) {
	if err != nil {
		return load.Stats{}, err
	}
	if r.Stats.Err != "" {
		return r.Stats, errors.New(r.Stats.Err)
	}
	return r.Stats, nil
}
