// SPDX-License-Identifier: Apache-2.0

package vhostuser

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// pipeFDs makes a pipe, whose ends close themselves with the test.
func pipeFDs(t *testing.T) (read, write int) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	return p[0], p[1]
}

// transfer sends SET_DEVICE_STATE_FD and returns the reply.
func (c *client) transfer(direction, phase uint32, fd int) uint64 {
	c.t.Helper()
	c.raw(reqSetDeviceStateFD, flagVersion, u32s(direction, phase), fd)
	b, fds := c.reply(reqSetDeviceStateFD)
	if len(fds) != 0 {
		c.t.Fatal("a descriptor came back")
	}
	return binary.NativeEndian.Uint64(b)
}

func TestDeviceState(t *testing.T) {
	const save, load, noFD = 0, 1, 1 << 8
	check := noLeaks(t)
	t.Run("session", func(t *testing.T) {
		d := newFakeDevice(1)
		d.state = []byte("of the device")
		c := connect(t, NewServer(d, quiet(t)))
		c.negotiate(testFeatures)

		read, write := pipeFDs(t)
		if v := c.transfer(save, 0, write); v != noFD {
			t.Fatalf("save: %#x", v)
		}
		closeFD(write)
		b := make([]byte, 100)
		if n, err := unix.Read(read, b); err != nil || string(b[:n]) != "of the device" {
			t.Fatalf("saved %q, %v", b[:n], err)
		}
		if n, err := unix.Read(read, b); n != 0 || err != nil {
			t.Fatalf("the pipe is still open: %d, %v", n, err)
		}
		closeFD(read)
		if v := c.getU64(reqCheckDeviceState); v != 0 {
			t.Error("not saved")
		}

		for _, tt := range []struct {
			name  string
			state []byte
			open  bool // the front-end's end, when it asks for the result
			want  uint64
		}{
			{"a state", []byte("another"), false, 0},
			{"refused by the device", []byte("bad"), false, 1},
			{"nothing", nil, false, 0},
			{"the largest", bytes.Repeat([]byte{7}, maxState), false, 0},
			{"too large", bytes.Repeat([]byte{7}, maxState+1), false, 1},
			{"not at its end", []byte("half"), true, 1},
		} {
			read, write := pipeFDs(t)
			before := d.State()
			if v := c.transfer(load, 0, read); v != noFD {
				t.Errorf("%s: load: %#x", tt.name, v)
			}
			closeFD(read)
			if _, err := unix.Write(write, tt.state); err != nil {
				t.Fatal(err)
			}
			if !tt.open {
				closeFD(write)
			}
			if v := c.getU64(reqCheckDeviceState); v != tt.want {
				t.Errorf("%s: %d, want %d", tt.name, v, tt.want)
			}
			if tt.open {
				closeFD(write)
			}
			if tt.want == 0 {
				before = tt.state
			}
			if got := d.State(); !bytes.Equal(got, before) {
				t.Errorf("%s: the device has %d bytes, want %d", tt.name, len(got), len(before))
			}
		}

		// What cannot be done says so, and the session goes on.
		read, write = pipeFDs(t)
		full, fill := pipeFDs(t)
		if _, err := unix.FcntlInt(uintptr(fill), unix.F_SETPIPE_SZ, 4096); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(fill, make([]byte, 4096)); err != nil {
			t.Fatal(err)
		}
		file, err := memfd("file", 4096)
		if err != nil {
			t.Fatal(err)
		}
		event := eventfd(t)
		for _, tt := range []struct {
			name             string
			direction, phase uint32
			fd               int
		}{
			{"direction", 2, 0, read},
			{"phase", save, 1, write},
			{"a file", save, 0, file},
			{"an eventfd", load, 0, event},
			{"the wrong end", save, 0, read},
			{"no room", save, 0, fill},
		} {
			if v := c.transfer(tt.direction, tt.phase, tt.fd); v&0xff == 0 {
				t.Errorf("%s: %#x", tt.name, v)
			}
			if v := c.getU64(reqCheckDeviceState); v == 0 {
				t.Errorf("%s: the transfer is said to have succeeded", tt.name)
			}
		}
		for _, fd := range []int{read, write, full, fill, file} {
			closeFD(fd)
		}
		// A front-end that begins to load and goes.
		read, write = pipeFDs(t)
		c.transfer(load, 0, read)
		closeFD(read)
		closeFD(write)
		if err := c.end(); err != nil {
			t.Error(err)
		}
	})
	check()
}
