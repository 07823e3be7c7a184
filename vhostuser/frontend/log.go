// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"errors"
	"syscall"
)

// DirtyLog is the bitmap in which the back-end marks the guest pages that it writes, as during a live migration.
type DirtyLog struct {
	fd   int
	bits []byte // shared with the back-end: one bit per page of 4096 bytes
}

// Dirty reports whether the page with guest address gpa is marked.
func (l *DirtyLog) Dirty(gpa uint64) bool {
	page := gpa >> logPageBits
	return page/8 < uint64(len(l.bits)) && l.bits[page/8]>>(page%8)&1 != 0
}

// Pages returns the guest addresses of all marked pages.
func (l *DirtyLog) Pages() (gpas []uint64) {
	for i, b := range l.bits {
		for bit := range 8 {
			if b>>bit&1 != 0 {
				gpas = append(gpas, uint64(i*8+bit)<<logPageBits)
			}
		}
	}
	return gpas
}

func (l *DirtyLog) close() {
	unmap(l.bits)
	syscall.Close(l.fd)
}

// StartLog makes a clean bitmap over all guest memory and turns dirty-page logging on, while the rings run. The
// DirtyLog is valid until StopLog. It needs ProtocolLogShmFD.
func (d *Disk) StartLog() (*DirtyLog, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.protocol&ProtocolLogShmFD == 0 {
		return nil, errors.New("frontend: the back-end has no dirty-page log")
	}
	if d.log != nil {
		return nil, errors.New("frontend: the log is on already")
	}
	last := d.regions[len(d.regions)-1]
	size := roundUp((last.gpa+last.size)>>logPageBits/8+1, 4096)
	fd, err := memfd("dirty-log", size)
	if err != nil {
		return nil, err
	}
	bits, err := mapShared(fd, 0, int(size))
	if err != nil {
		syscall.Close(fd)
		return nil, err
	}
	d.log = &DirtyLog{fd: fd, bits: bits}
	if err := d.setLogBaseLocked(); err != nil {
		d.log.close()
		d.log = nil
		return nil, err
	}
	return d.log, d.toggleLogLocked()
}

// StopLog turns logging off and frees the DirtyLog.
func (d *Disk) StopLog() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.log == nil {
		return errors.New("frontend: the log is not on")
	}
	defer d.log.close()
	d.log = nil
	return d.toggleLogLocked()
}

// toggleLogLocked tells the back-end, rings running, whether d.log is in use.
func (d *Disk) toggleLogLocked() error {
	if err := d.setFeaturesLocked(); err != nil {
		return err
	}
	for _, q := range d.queues {
		if err := d.setVringAddrLocked(q); err != nil {
			return err
		}
	}
	return nil
}
