// SPDX-License-Identifier: Apache-2.0

package blk

import (
	"math/bits"
	"sync/atomic"
)

// Bitmap has one bit for each granularity bytes of a disk. Any number of goroutines may use it at once, without
// locks: queue loops set bits, a copier clears them.
type Bitmap struct {
	shift uint
	bits  int64
	set   atomic.Int64
	words []atomic.Uint64
}

// NewBitmap returns an empty bitmap for size bytes; granularity is a power of two.
func NewBitmap(size, granularity int64) *Bitmap {
	return BitmapOver(make([]atomic.Uint64, BitmapWords(size, granularity)), size, granularity)
}

// BitmapWords is how many words a bitmap takes.
func BitmapWords(size, granularity int64) int64 {
	return ((size+granularity-1)/granularity + 63) / 64
}

// BitmapOver returns the bitmap that lies in words, BitmapWords of them, with the bits that are set there.
func BitmapOver(words []atomic.Uint64, size, granularity int64) *Bitmap {
	b := &Bitmap{shift: uint(bits.TrailingZeros64(uint64(granularity))), words: words}
	b.bits = (size + granularity - 1) >> b.shift
	if rest := b.bits % 64; rest != 0 && words[b.bits/64].Load()>>uint(rest) != 0 {
		words[b.bits/64].And(1<<uint(rest) - 1)
	}
	n := 0
	for i := range words {
		n += bits.OnesCount64(words[i].Load())
	}
	b.set.Store(int64(n))
	return b
}

// Granularity is the number of bytes a bit stands for.
func (b *Bitmap) Granularity() int64 { return 1 << b.shift }

// Count is the number of bits set.
func (b *Bitmap) Count() int64 { return b.set.Load() }

// Bytes is what the set bits stand for, the last one counted whole.
func (b *Bitmap) Bytes() int64 { return b.Count() << b.shift }

// Set sets each bit that [off, off+n) touches; n > 0. What lies past the end is ignored.
func (b *Bitmap) Set(off, n int64) { b.change(off>>b.shift, (off+n-1)>>b.shift, true) }

// Clear clears each bit that [off, off+n) touches; n > 0.
func (b *Bitmap) Clear(off, n int64) { b.change(off>>b.shift, (off+n-1)>>b.shift, false) }

func (b *Bitmap) change(first, last int64, set bool) {
	last = min(last, b.bits-1)
	for first <= last {
		w := &b.words[first/64]
		end := min(last, first|63)
		mask := wordMask(first, end)
		if set {
			if old := w.Load(); old&mask != mask {
				old = w.Or(mask)
				b.set.Add(int64(bits.OnesCount64(mask &^ old)))
			}
		} else if w.Load()&mask != 0 { // memory that a file is mapped to is not to be written for nothing
			old := w.And(^mask)
			b.set.Add(-int64(bits.OnesCount64(mask & old)))
		}
		first = end + 1
	}
}

// wordMask has the bits from first to last, both in the same word.
func wordMask(first, last int64) uint64 {
	return (^uint64(0) >> (63 - uint(last-first))) << uint(first&63)
}

// Any reports whether a bit is set that [off, off+n) touches; n > 0.
func (b *Bitmap) Any(off, n int64) bool {
	first, last := off>>b.shift, min((off+n-1)>>b.shift, b.bits-1)
	for first <= last {
		end := min(last, first|63)
		if b.words[first/64].Load()&wordMask(first, end) != 0 {
			return true
		}
		first = end + 1
	}
	return false
}

// All reports whether all bits are set that [off, off+n) touches; n > 0.
func (b *Bitmap) All(off, n int64) bool {
	first, last := off>>b.shift, min((off+n-1)>>b.shift, b.bits-1)
	for first <= last {
		end := min(last, first|63)
		if mask := wordMask(first, end); b.words[first/64].Load()&mask != mask {
			return false
		}
		first = end + 1
	}
	return true
}

// Merge sets each bit that o's set bits touch.
func (b *Bitmap) Merge(o *Bitmap) {
	for off := int64(0); ; {
		at, n, ok := o.Next(off, 1<<62)
		if !ok {
			return
		}
		b.Set(at, n)
		off = at + n
	}
}

// Words is the number of words that Word and OrWord know.
func (b *Bitmap) Words() int64 { return int64(len(b.words)) }

// Word returns 64 bits, the first of them lowest.
func (b *Bitmap) Word(i int64) uint64 { return b.words[i].Load() }

// OrWord sets bits of a word. Those past the end are ignored.
func (b *Bitmap) OrWord(i int64, w uint64) {
	if left := b.bits - i*64; left < 64 {
		w &= 1<<uint(left) - 1
	}
	b.set.Add(int64(bits.OnesCount64(w &^ b.words[i].Or(w))))
}

// Next finds the first set bit at or after off and returns the run of set bits from there, as a byte range of at
// most limit bytes (at least one bit) that may end past the disk. false: there is none.
func (b *Bitmap) Next(off, limit int64) (at, n int64, ok bool) {
	i := off >> b.shift
	for i < b.bits {
		w := b.words[i/64].Load() >> uint(i&63)
		if w == 0 {
			i = (i | 63) + 1
			continue
		}
		i += int64(bits.TrailingZeros64(w))
		break
	}
	if i >= b.bits {
		return 0, 0, false
	}
	end := i + 1
	for most := i + limit>>b.shift; end < min(most, b.bits); end++ {
		if b.words[end/64].Load()>>uint(end&63)&1 == 0 {
			break
		}
	}
	return i << b.shift, (end - i) << b.shift, true
}
