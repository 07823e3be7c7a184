// SPDX-License-Identifier: Apache-2.0

package daemon

import "testing"

// A guest that has switched the write cache off does not flush. Its front-end remembers that and does not repeat it to a
// daemon that comes back, nor after a reset.
func TestCacheStaysOff(t *testing.T) {
	b := newBed(t)
	f := b.load("", b.disk("disk0", b.image("a.img")))
	d, _ := b.start(f)
	cache := func(want bool) {
		t.Helper()
		g := b.guest("disk0")
		defer g.Close()
		conf, err := g.Config()
		b.must(err)
		if on := conf.WCE; on != want {
			t.Errorf("the write cache is on: %v, want %v", on, want)
		}
	}
	set := func(on bool) {
		t.Helper()
		g := b.guest("disk0")
		defer g.Close()
		b.must(g.SetWriteCache(on))
	}
	cache(true)
	set(false)
	k, err := d.find("disk0")
	b.must(err)
	k.dev.Reset()
	cache(false)
	b.stop(d)
	d, c := b.start(f)
	cache(false)
	b.move(c, "disk0", b.path("b.img"))
	b.stop(d)
	d, _ = b.start(f)
	cache(false)
	set(true)
	b.stop(d)
	d, _ = b.start(f)
	cache(true)
	b.stop(d)
}
