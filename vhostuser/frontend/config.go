// SPDX-License-Identifier: Apache-2.0

package frontend

import (
	"encoding/binary"
	"fmt"
)

// Virtio feature bits (virtio 1.2, sections 5.2.3 and 6; vhost-user specification).
const (
	FeatureSizeMax     = 1 << 1
	FeatureSegMax      = 1 << 2
	FeatureRO          = 1 << 5
	FeatureBlkSize     = 1 << 6
	FeatureFlush       = 1 << 9
	FeatureTopology    = 1 << 10
	FeatureConfigWCE   = 1 << 11
	FeatureMQ          = 1 << 12
	FeatureDiscard     = 1 << 13
	FeatureWriteZeroes = 1 << 14
	FeatureLogAll      = 1 << 26 // acknowledged by StartLog only
	FeatureIndirect    = 1 << 28
	FeatureEventIdx    = 1 << 29
	FeatureProtocol    = 1 << 30
	FeatureVersion1    = 1 << 32

	// AllFeatures are those that a Disk can use; Options.Features narrows them.
	AllFeatures = FeatureSizeMax | FeatureSegMax | FeatureRO | FeatureBlkSize | FeatureFlush | FeatureTopology |
		FeatureConfigWCE | FeatureMQ | FeatureDiscard | FeatureWriteZeroes | FeatureIndirect | FeatureEventIdx |
		FeatureProtocol | FeatureVersion1
)

// Vhost-user protocol feature bits.
const (
	ProtocolMQ          = 1 << 0
	ProtocolLogShmFD    = 1 << 1
	ProtocolReplyAck    = 1 << 3
	ProtocolBackendReq  = 1 << 5
	ProtocolConfig      = 1 << 9
	ProtocolInflight    = 1 << 12
	ProtocolResetDevice = 1 << 13
	ProtocolMemSlots    = 1 << 15
	ProtocolStatus      = 1 << 16

	// AllProtocolFeatures are those that a Disk can use; Options.ProtocolFeatures narrows them.
	AllProtocolFeatures = ProtocolMQ | ProtocolLogShmFD | ProtocolReplyAck | ProtocolBackendReq | ProtocolConfig |
		ProtocolInflight | ProtocolResetDevice | ProtocolMemSlots | ProtocolStatus
)

// SectorSize is the unit of Request.Sector and of Config.Capacity, whatever the block size is.
const SectorSize = 512

// configSize is how much of the virtio-blk configuration is asked for: up to write_zeroes_may_unmap and its padding.
const configSize = 60

// configWCE is the offset of the write-cache byte, the only one that a driver may write.
const configWCE = 32

// Config is the device's configuration (virtio 1.2, section 5.2.4). A field counts only with its feature bit.
type Config struct {
	Capacity              uint64 // sectors of 512 bytes
	SizeMax               uint32 // largest segment in bytes
	SegMax                uint32 // most data segments in a request
	BlkSize               uint32 // logical block in bytes
	WCE                   bool   // write-back cache is on
	NumQueues             uint16
	MaxDiscardSectors     uint32
	MaxDiscardSeg         uint32
	DiscardAlignment      uint32 // sectors
	MaxWriteZeroesSectors uint32
	MaxWriteZeroesSeg     uint32
	WriteZeroesMayUnmap   bool
}

// Size returns the capacity in bytes.
func (c Config) Size() int64 { return int64(c.Capacity) * SectorSize }

func parseConfig(b []byte) (Config, error) {
	if len(b) < configSize {
		return Config{}, fmt.Errorf("frontend: configuration of %d bytes, want %d", len(b), configSize)
	}
	le := binary.LittleEndian
	c := Config{
		Capacity:              le.Uint64(b[0:]),
		SizeMax:               le.Uint32(b[8:]),
		SegMax:                le.Uint32(b[12:]),
		BlkSize:               le.Uint32(b[20:]),
		WCE:                   b[configWCE] != 0,
		NumQueues:             le.Uint16(b[34:]),
		MaxDiscardSectors:     le.Uint32(b[36:]),
		MaxDiscardSeg:         le.Uint32(b[40:]),
		DiscardAlignment:      le.Uint32(b[44:]),
		MaxWriteZeroesSectors: le.Uint32(b[48:]),
		MaxWriteZeroesSeg:     le.Uint32(b[52:]),
		WriteZeroesMayUnmap:   b[56] != 0,
	}
	if c.Capacity > 1<<54 {
		return c, fmt.Errorf("frontend: capacity of %d sectors is not possible", c.Capacity)
	}
	return c, nil
}
