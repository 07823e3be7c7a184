// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"testing"

	"golang.org/x/sys/unix"
)

// TestRefused sends one bad message to a session with a running ring: it must be refused, and the session go on
// as if nothing had happened, or end; either way nothing leaks.
func TestRefused(t *testing.T) {
	const noFD = 1 << 8
	g := newGuest(t)
	event := eventfd(t)
	file, err := memfd("file", 4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFD(file) })
	sparse, err := memfd("sparse", 17<<40)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFD(sparse) })
	many := make([]int, 60)
	for i := range many {
		many[i] = event
	}
	region := func(gpa, size, user, off uint64) []byte { return u64s(0, gpa, size, user, off) }
	table := func(n uint32, regions ...[]byte) []byte {
		b := u32s(n, 0)
		for _, r := range regions {
			b = append(b, r...)
		}
		return b
	}
	inflight := func(size, off uint64, queues uint32) []byte {
		return append(u64s(size, off), u32s(queues|128<<16, 0)...)
	}
	const far = 1 << 40
	tests := []struct {
		name    string
		request uint32
		payload []byte
		fds     []int
		ends    bool // the session ends: the front-end waits for a reply that cannot say no
	}{
		{"unknown request", 99, nil, nil, false},
		{"request 0", 0, nil, []int{event}, false},
		{"short payload", reqSetVringNum, u32s(0), nil, false},
		{"long payload", reqSetVringNum, u32s(0, 64, 0), nil, false},
		{"no payload", reqSetVringAddr, nil, nil, false},
		{"payload without need", reqSetOwner, u32s(0), nil, false},
		{"descriptor without need", reqSetVringNum, u32s(0, 64), []int{event}, false},
		{"two descriptors for one", reqSetVringCall, u64s(0), []int{event, event}, false},
		{"60 descriptors", reqSetVringCall, u64s(0), many, false},
		{"GET with a descriptor", reqGetFeatures, nil, []int{event}, true},
		{"GET with a payload", reqGetFeatures, u64s(0), nil, true},
		{"features not offered", reqSetFeatures, u64s(testFeatures | 1<<40), nil, false},
		{"other features while running", reqSetFeatures, u64s(testFeatures &^ (1 << 28)), nil, false},
		{"protocol features not offered", reqSetProtocolFeatures, u64s(protocolFeatures | 1<<14), nil, false},
		{"status", reqSetStatus, u64s(256), nil, false},

		{"ring index of NUM", reqSetVringNum, u32s(2, 64), nil, false},
		{"ring index of BASE", reqSetVringBase, u32s(0xffffffff, 64), nil, false},
		{"ring index of ADDR", reqSetVringAddr, g.addr(2, 0), nil, false},
		{"ring index of ENABLE", reqSetVringEnable, u32s(2, 1), nil, false},
		{"ring index of GET_VRING_BASE", reqGetVringBase, u32s(2, 0), nil, true},
		{"ring index of KICK", reqSetVringKick, u64s(2), []int{event}, false},
		{"ring index of CALL", reqSetVringCall, u64s(255 | noFD), nil, false},
		{"ring index beyond 8 bits", reqSetVringErr, u64s(1 << 32), []int{event}, false},
		{"ring size 0", reqSetVringNum, u32s(1, 0), nil, false},
		{"ring size 65536", reqSetVringNum, u32s(1, 65536), nil, false},
		{"ring size 100", reqSetVringNum, u32s(1, 100), nil, false},
		{"ring size 65536+64", reqSetVringNum, u32s(1, 65536+64), nil, false},
		{"ring size while running", reqSetVringNum, u32s(0, 128), nil, false},
		{"ring base while running", reqSetVringBase, u32s(0, 1), nil, false},
		{"ring base 65536", reqSetVringBase, u32s(1, 65536), nil, false},
		{"ring address while running", reqSetVringAddr, g.addr(0, 0)[:0:0], nil, false},
		{"descriptor table misaligned", reqSetVringAddr, append(u32s(1, 0), u64s(g.user+8, g.user, g.user, 0)...), nil, false},
		{"used ring misaligned", reqSetVringAddr, append(u32s(1, 0), u64s(g.user, g.user+2, g.user, 0)...), nil, false},
		{"avail ring misaligned", reqSetVringAddr, append(u32s(1, 0), u64s(g.user, g.user, g.user+1, 0)...), nil, false},
		{"ring outside memory", reqSetVringAddr, append(u32s(1, 0), u64s(far, far, far, 0)...), nil, false},
		{"ring over the end of memory", reqSetVringAddr, append(u32s(1, 0), u64s(g.user+g.size-16, g.user, g.user, 0)...), nil, false},
		{"ring that wraps", reqSetVringAddr, append(u32s(1, 0), u64s(^uint64(15), g.user, g.user, 0)...), nil, false},
		{"enable 2", reqSetVringEnable, u32s(1, 2), nil, false},
		{"kick without descriptor", reqSetVringKick, u64s(1), nil, false},
		{"kick with surprise descriptor", reqSetVringKick, u64s(1 | noFD), []int{event}, false},
		{"kick is a file", reqSetVringKick, u64s(1), []int{file}, false},
		{"call is a file", reqSetVringCall, u64s(0), []int{file}, false},
		{"back-end channel is a file", reqSetBackendReqFD, nil, []int{file}, false},
		{"back-end channel without descriptor", reqSetBackendReqFD, nil, nil, false},

		{"region of size 0", reqAddMemReg, region(far, 0, far, 0), []int{g.fd}, false},
		{"region beyond the file", reqAddMemReg, region(far, g.size+1, far, 0), []int{g.fd}, false},
		{"region offset beyond the file", reqAddMemReg, region(far, 4096, far, g.size), []int{g.fd}, false},
		{"region offset wraps", reqAddMemReg, region(far, 4096, far, ^uint64(0)-4095), []int{g.fd}, false},
		{"region wraps in the guest", reqAddMemReg, region(^uint64(0)-100, 4096, far, 0), []int{g.fd}, false},
		{"region wraps in the front-end", reqAddMemReg, region(far, 4096, ^uint64(0)-100, 0), []int{g.fd}, false},
		{"region overlaps in the guest", reqAddMemReg, region(g.gpa+4096, 4096, far, 0), []int{g.fd}, false},
		{"region overlaps in the front-end", reqAddMemReg, region(far, 4096, g.user, 0), []int{g.fd}, false},
		{"region again", reqAddMemReg, g.memReg(), []int{g.fd}, false},
		{"region of 17 TiB", reqAddMemReg, region(far, 17<<40, far, 0), []int{sparse}, false},
		{"table of 18 TiB", reqSetMemTable, table(2, u64s(1<<50, 9<<40, 1<<50, 0), u64s(1<<51, 9<<40, 1<<51, 0)), []int{sparse, sparse}, false},
		{"region without descriptor", reqAddMemReg, region(far, 4096, far, 0), nil, false},
		{"region with two descriptors", reqAddMemReg, region(far, 4096, far, 0), []int{g.fd, g.fd}, false},
		{"region is an eventfd", reqAddMemReg, region(far, 4096, far, 0), []int{event}, false},
		{"remove an unknown region", reqRemMemReg, region(g.gpa, g.size-1, g.user, 0), nil, false},
		{"remove with two descriptors", reqRemMemReg, g.memReg(), []int{event, event}, false},
		{"empty table", reqSetMemTable, table(0), nil, false},
		{"table of 33", reqSetMemTable, table(33, make([]byte, 33*32)), many[:33], false},
		{"table of 2^32-1", reqSetMemTable, table(0xffffffff, g.region()), []int{g.fd}, false},
		{"table with fewer descriptors", reqSetMemTable, table(2, g.region(), u64s(far, 4096, far, 0)), []int{g.fd}, false},
		{"table with more descriptors", reqSetMemTable, table(1, g.region()), []int{g.fd, g.fd}, false},
		{"table shorter than it says", reqSetMemTable, table(2, g.region()), []int{g.fd, g.fd}, false},
		{"table that overlaps", reqSetMemTable, table(2, g.region(), g.region()), []int{g.fd, g.fd}, false},
		{"table, second region bad", reqSetMemTable, table(2, g.region(), u64s(far, g.size*2, far, 0)), []int{g.fd, g.fd}, false},

		{"config size lies", reqSetConfig, append(u32s(32, 2, 0), 1), nil, false},
		{"config of size 0", reqSetConfig, append(u32s(32, 0, 0), 1), nil, false},
		{"config header short", reqSetConfig, u32s(32, 1), nil, false},
		{"config header short, GET", reqGetConfig, u32s(32, 1), nil, true},

		{"log without descriptor", reqSetLogBase, u64s(4096, 0), nil, true},
		{"log without size", reqSetLogBase, u64s(0, 0), []int{file}, false},
		{"log beyond the file", reqSetLogBase, u64s(4097, 0), []int{file}, false},
		{"log offset beyond the file", reqSetLogBase, u64s(8, 4096), []int{file}, false},
		{"log offset wraps", reqSetLogBase, u64s(4096, ^uint64(7)), []int{file}, false},
		{"log offset misaligned", reqSetLogBase, u64s(4000, 4), []int{file}, false},
		{"log too small", reqSetLogBase, u64s(63, 0), []int{file}, false},
		{"log enormous", reqSetLogBase, u64s(1<<63, 0), []int{file}, false},
		{"log is an eventfd", reqSetLogBase, u64s(4096, 0), []int{event}, false},

		{"inflight while running", reqSetInflightFD, inflight(4096, 0, 2), []int{file}, false},
		{"state while running", reqSetDeviceStateFD, u32s(0, 0), []int{event}, false},
		{"state without descriptor", reqSetDeviceStateFD, u32s(0, 0), nil, true},
		{"inflight of no queues", reqGetInflightFD, inflight(0, 0, 0), nil, true},
		{"inflight of too many queues", reqGetInflightFD, inflight(0, 0, 3), nil, true},
		{"inflight short", reqGetInflightFD, u64s(0, 0), nil, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			check := noLeaks(t)
			d := newFakeDevice(2)
			c := connect(t, NewServer(d, quiet(t)))
			c.negotiate(testFeatures)
			c.set(reqAddMemReg, g.memReg(), g.fd)
			c.ring(g, 0, 64, 0)
			c.set(reqSetVringEnable, u32s(0, 1))
			// Ring 1 is complete but for its addresses.
			c.set(reqSetVringNum, u32s(1, 64))
			c.set(reqSetVringKick, u64s(1), g.kick[1])
			c.set(reqSetVringEnable, u32s(1, 1))
			c.expect(d, "features 0x130000040", "start 0 size 64 base 0")
			if tt.ends {
				c.raw(tt.request, flagVersion|flagNeedReply, tt.payload, tt.fds...)
				if err := c.wait(); err == nil {
					t.Error("the session ended well")
				}
			} else {
				if v := c.nack(tt.request, tt.payload, tt.fds...); v == 0 {
					t.Error("accepted")
				}
				c.expect(d) // ring 0 was not disturbed
				if err := c.end(); err != nil {
					t.Error(err)
				}
			}
			c.expectDone(d, "stop 0")
			c.c.Close()
			check()
		})
	}
}

// TestInflightRefused: a ring that is not running, so that only the region is wrong.
func TestInflightRefused(t *testing.T) {
	file, err := memfd("file", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeFD(file) })
	for _, tt := range []struct {
		name      string
		size, off uint64
		queues    uint32
	}{
		{"no queues", 4096, 0, 0},
		{"size 0", 0, 0, 2},
		{"too small for its queues", 4096, 0, 0xffff},
		{"beyond the file", 1<<20 + 64, 0, 2},
		{"offset beyond the file", 4096, 1 << 20, 2},
		{"offset wraps", 4096, ^uint64(0) - 7, 2},
		{"offset misaligned", 4096, 4, 2},
		{"enormous", 1 << 62, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := noLeaks(t)
			c := connect(t, NewServer(newFakeDevice(2), quiet(t)))
			c.negotiate(testFeatures)
			if v := c.nack(reqSetInflightFD, append(u64s(tt.size, tt.off), u32s(tt.queues|64<<16)...), file); v == 0 {
				t.Error("accepted")
			}
			if err := c.end(); err != nil {
				t.Error(err)
			}
			check()
		})
	}
}

// TestBrokenFraming ends the session.
func TestBrokenFraming(t *testing.T) {
	event := eventfd(t)
	for _, tt := range []struct {
		name  string
		bytes []byte
	}{
		{"version 0", u32s(reqGetFeatures, 0, 0)},
		{"version 2", u32s(reqGetFeatures, 2, 0)},
		{"reply", u32s(reqGetFeatures, flagVersion|flagReply, 0)},
		{"oversize", u32s(reqSetConfig, flagVersion, maxPayload+1)},
		{"size -1", u32s(reqSetConfig, flagVersion, 0xffffffff)},
		{"header cut", u32s(reqGetFeatures, flagVersion)},
		{"payload cut", u32s(reqSetVringNum, flagVersion, 8, 0)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := noLeaks(t)
			c := connect(t, NewServer(newFakeDevice(1), quiet(t)))
			c.bytes(tt.bytes, event)
			if err := c.c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if err := c.wait(); err == nil {
				t.Error("the session ended well")
			}
			c.c.Close()
			check()
		})
	}
}

// TestTrickledDescriptors attaches descriptors to every byte of a message: few are held at a time, and none is kept.
func TestTrickledDescriptors(t *testing.T) {
	event := eventfd(t)
	check := noLeaks(t)
	c := connect(t, NewServer(newFakeDevice(1), quiet(t)))
	c.negotiate(testFeatures)
	c.sync()
	before, most := len(openFiles(t)), 0
	for i, b := range append(appendHeader(nil, reqSetConfig, flagVersion|flagNeedReply, 2000), make([]byte, 2000)...) {
		c.bytes([]byte{b}, event, event, event, event, event, event, event, event)
		if i%100 == 0 {
			most = max(most, len(openFiles(t)))
		}
	}
	if b, _ := c.reply(reqSetConfig); b[0] == 0 {
		t.Error("accepted")
	}
	// One message's worth, and one that is being received.
	if most > before+2*maxFDs {
		t.Errorf("%d descriptors open, %d before", most, before)
	}
	if err := c.end(); err != nil {
		t.Error(err)
	}
	check()
}

// FuzzMessages: whatever bytes and descriptors come, the session does not panic and nothing leaks.
func FuzzMessages(f *testing.F) {
	seed := func(msgs ...[]byte) {
		var b []byte
		for _, m := range msgs {
			b = append(b, m...)
		}
		f.Add(b)
	}
	g := newGuest(f)
	msg := func(req uint32, fds byte, payload []byte) []byte {
		return append([]byte{fds}, append(appendHeader(nil, req, flagVersion|flagNeedReply, len(payload)), payload...)...)
	}
	seed(msg(reqGetFeatures, 0, nil), msg(reqSetProtocolFeatures, 0, u64s(protocolFeatures)), msg(reqSetFeatures, 0, u64s(testFeatures)),
		msg(reqAddMemReg, 1, g.memReg()), msg(reqSetVringNum, 0, u32s(0, 64)), msg(reqSetVringBase, 0, u32s(0, 0)),
		msg(reqSetVringAddr, 0, g.addr(0, 1)), msg(reqSetVringKick, 2, u64s(0)), msg(reqSetVringEnable, 0, u32s(0, 1)),
		msg(reqSetLogBase, 1, u64s(4096, 0)), msg(reqSetFeatures, 0, u64s(testFeatures|featureLogAll)),
		msg(reqSetVringCall, 2, u64s(0)), msg(reqGetVringBase, 0, u32s(0, 0)), msg(reqResetDevice, 0, nil))
	seed(msg(reqSetMemTable, 1, g.memTable()), msg(reqSetInflightFD, 1, append(u64s(40000, 0), u32s(2|64<<16)...)),
		msg(reqGetInflightFD, 0, append(u64s(0, 0), u32s(2|64<<16)...)), msg(reqGetConfig, 0, u32s(0, 60, 0)))
	seed(msg(reqSetProtocolFeatures, 0, u64s(protocolFeatures)), msg(reqSetDeviceStateFD, 4, u32s(1, 0)),
		msg(reqCheckDeviceState, 0, nil), msg(reqSetDeviceStateFD, 5, u32s(0, 0)), msg(reqCheckDeviceState, 0, nil))
	event := eventfd(f)
	var pipes [2]int
	if err := unix.Pipe2(pipes[:], unix.O_CLOEXEC); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		closeFD(pipes[0])
		closeFD(pipes[1])
	})
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 4<<10 {
			return
		}
		check := noLeaks(t)
		d := newFakeDevice(2)
		d.state = []byte("x")
		c := connect(t, NewServer(d, quiet(t)))
		go func() { // replies are not of interest
			b := make([]byte, 4096)
			for {
				if _, _, _, _, err := c.c.ReadMsgUnix(b, nil); err != nil {
					return
				}
			}
		}()
		// Each message is a byte that says which descriptor goes along, then header and payload.
		for len(in) > headerSize {
			what, rest := in[0], in[1:]
			n := headerSize + int(uint32(rest[8])|uint32(rest[9])<<8)
			n = min(n, len(rest))
			var oob []byte
			switch what % 6 {
			case 1:
				oob = unix.UnixRights(g.fd)
			case 2:
				oob = unix.UnixRights(event)
			case 3:
				oob = unix.UnixRights(event, g.fd, event)
			case 4:
				oob = unix.UnixRights(pipes[0])
			case 5:
				oob = unix.UnixRights(pipes[1])
			}
			if _, _, err := c.c.WriteMsgUnix(rest[:n], oob, nil); err != nil {
				break
			}
			in = rest[n:]
		}
		if err := c.c.CloseWrite(); err != nil {
			t.Log(err)
		}
		_ = c.wait()
		c.c.Close()
		if d.queue(0) != nil || d.queue(1) != nil {
			t.Error("queues still run")
		}
		check()
	})
}
