// SPDX-License-Identifier: Apache-2.0

package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"github.com/blkstream/blkstream/blk"
)

// Compressed clusters.

// inlinePack is the size of clusters, in bytes, up to which (un)compressing does not leave the queue's thread.
const inlinePack = 8 << 10

// deflateWindow is QEMU's: it cannot read data that was made with a larger one.
const deflateWindow = 4 << 10

// readPacked reads a part of a compressed cluster.
func (n *Node) readPacked(t *blk.Task, p piece, v blk.Vec) error {
	b := n.unpacked.get(p.entry)
	if b == nil {
		var err error
		if b, err = n.unpack(t, p.entry); err != nil {
			return err
		}
		n.unpacked.put(p.entry, b, n.clusterSize())
	}
	v.CopyFrom(b[p.skip:])
	return nil
}

func (n *Node) unpack(t *blk.Task, e l2Entry) ([]byte, error) {
	off, l := e.compressedRange(n.clusterBits)
	in := blk.GetBuffer(int(l))
	defer in.Free()
	if err := readClipped(t, n.storage, blk.BytesVec(nil, in.B), off); err != nil {
		return nil, fmt.Errorf("read compressed cluster at %#x: %w", off, err)
	}
	out := make([]byte, n.clusterSize())
	kind := n.compression
	err := n.heavy(t, func() error { return unpackInto(kind, out, in.B) })
	if err != nil {
		return nil, fmt.Errorf("compressed cluster at %#x: %w", off, err)
	}
	return out, nil
}

// heavy runs fn, which computes for long if clusters are large, where it holds nobody up.
func (n *Node) heavy(t *blk.Task, fn func() error) error {
	if n.clusterSize() <= inlinePack {
		return fn()
	}
	return t.Off(fn)
}

// What compresses and decompresses is costly to make and may be used again.
var (
	inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}
	deflaters = sync.Pool{New: func() any {
		w, err := flate.NewWriterWindow(nil, deflateWindow)
		if err != nil {
			panic(err) // a constant is wrong
		}
		return w
	}}
	// Windows are as large as a cluster, at most; QEMU's may be larger by a power of two.
	unzstds = sync.Pool{New: func() any {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(8<<20))
		if err != nil {
			panic(err)
		}
		return d
	}}
	zstds = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil)
		if err != nil {
			panic(err)
		}
		return e
	})
)

// unpackInto fills out. What follows in the input is others'.
func unpackInto(kind uint8, out, in []byte) error {
	var err error
	switch kind {
	case CompressionDeflate:
		f := inflaters.Get().(io.Reader)
		defer inflaters.Put(f)
		if err = f.(flate.Resetter).Reset(bytes.NewReader(in), nil); err == nil {
			_, err = io.ReadFull(f, out)
		}
	case CompressionZstd:
		d := unzstds.Get().(*zstd.Decoder)
		defer unzstds.Put(d)
		if err = d.Reset(bytes.NewReader(in)); err == nil {
			_, err = io.ReadFull(d, out)
		}
	default:
		return fmt.Errorf("compression type %d: %w", kind, ErrFeature)
	}
	if err != nil {
		return fmt.Errorf("unpack: %w", errors.Join(ErrFormat, err))
	}
	return nil
}

// pack returns nil if the data does not get smaller.
func pack(kind uint8, data []byte) ([]byte, error) {
	var packed []byte
	switch kind {
	case CompressionDeflate:
		var out bytes.Buffer
		w := deflaters.Get().(*flate.Writer)
		defer deflaters.Put(w)
		w.Reset(&out)
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		packed = out.Bytes()
	case CompressionZstd:
		packed = zstds().EncodeAll(data, nil)
	default:
		return nil, fmt.Errorf("compression type %d: %w", kind, ErrFeature)
	}
	if len(packed) >= len(data) {
		return nil, nil
	}
	return packed, nil
}

// unpackCache keeps the clusters that were unpacked last, as readers go through them in small steps.
type unpackCache struct {
	mu   sync.Mutex
	list []unpackedCluster // newest last
}

type unpackedCluster struct {
	entry l2Entry
	data  []byte
}

// maxUnpacked bounds its memory, in bytes; one cluster is always kept.
const maxUnpacked = 1 << 20

func (c *unpackCache) get(e l2Entry) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, u := range c.list {
		if u.entry == e {
			return u.data
		}
	}
	return nil
}

func (c *unpackCache) put(e l2Entry, data []byte, clusterSize int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if int64(len(c.list)+1)*clusterSize > maxUnpacked && len(c.list) > 0 {
		c.list = append(c.list[:0], c.list[1:]...)
	}
	c.list = append(c.list, unpackedCluster{e, data})
}

// purge is called before the place of compressed data can become another's.
func (c *unpackCache) purge() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.list)
	c.list = c.list[:0]
}

// packer places compressed clusters, at sector boundaries, one behind the other. The clusters it fills are counted
// for as many users as they can have; when it is done with them the counts are lowered to what they have.
type packer struct {
	lock blk.TaskLock
	next int64   // host offset
	end  int64   // host offset
	left []int64 // counts too many, of each cluster up to end
}

// canPack says whether a cluster can be counted for all users that compressed data in it may have: one for each sector.
func canPack(maxRef uint64, clusterSize int64) bool {
	return maxRef > uint64(clusterSize/blk.SectorSize)
}

// CheckCompression says why WriteCompressed would compress nothing in an image with these options.
func (o CreateOptions) CheckCompression() error {
	switch {
	case o.DataFile != "" || o.Preallocation != "" && o.Preallocation != "off":
		return fmt.Errorf("a compressed image with a data file or preallocation: clusters there lie where they belong: %w", blk.ErrInvalid)
	case o.RefcountBits == 0:
		return nil
	}
	if o.ClusterSize == 0 {
		o.ClusterSize = defaultClusterSize
	}
	need := 1
	for !canPack(1<<need-1, o.ClusterSize) {
		need *= 2
	}
	if o.RefcountBits < need {
		return fmt.Errorf("compressed clusters of %d bytes need reference counts of %d bits, not %d: %w",
			o.ClusterSize, need, o.RefcountBits, blk.ErrInvalid)
	}
	return nil
}

// WriteCompressed writes a whole cluster, compressed if that makes it smaller. It is for images that are being made:
// nobody else may write to the cluster, which holds no data yet, and until the next flush a power cut may leave it
// unreadable.
func (n *Node) WriteCompressed(t *blk.Task, off int64, data []byte) error {
	if off < 0 || off&(n.clusterSize()-1) != 0 || int64(len(data)) > n.clusterSize() || len(data) == 0 || off > n.Info().Size-int64(len(data)) {
		return fmt.Errorf("%s: write %d compressed bytes at offset %d: %w", n.name, len(data), off, blk.ErrInvalid)
	}
	n.stream.off.Store(true)
	whole := data
	if int64(len(data)) < n.clusterSize() { // the last one
		whole = append(bytes.Clone(data), make([]byte, n.clusterSize()-int64(len(data)))...)
	}
	var packed []byte
	if !n.dataFile && canPack(n.maxRef, n.clusterSize()) {
		err := n.heavy(t, func() (err error) {
			packed, err = pack(n.compression, whole)
			return err
		})
		if err != nil {
			return err
		}
	}
	if packed == nil {
		return blk.Do(t, n, &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(data)), Data: blk.BytesVec(nil, data)})
	}
	if err := n.beginChange(t); err != nil {
		return err
	}
	defer n.clusters.Unlock(n.clusters.Lock(t, off>>n.clusterBits, 1))
	tab, err := n.ownTable(t, off>>n.l1Shift)
	if err != nil {
		return err
	}
	defer n.cache.unpin(tab)
	i := int(off&(1<<n.l1Shift-1)) >> n.clusterBits
	p, err := n.spanOf(t, tab, off, n.clusterSize())
	switch {
	case err != nil:
		return err
	case p.kind == kindData && p.own && p.len == n.clusterSize():
		// A write before it was given the place for this one too.
		_, err := n.writeInPlace(t, blk.BytesVec(nil, data), 0, off, int64(len(data)))
		return err
	case p.kind == kindData || p.kind == kindPacked || tab.stableAt(i).present:
		return fmt.Errorf("%s: compressed write to the cluster at %d, which is in use: %w", n.name, off, blk.ErrInvalid)
	}
	e, err := n.place(t, packed)
	if err != nil {
		return err
	}
	if err := n.set(t, tab, i, []cluster{{packed: e}}); err != nil {
		n.releasePacked(e)
		return err
	}
	return nil
}

// place writes compressed data somewhere.
func (n *Node) place(t *blk.Task, packed []byte) (l2Entry, error) {
	sectors := roundUp(int64(len(packed)), blk.SectorSize)
	buf := blk.GetBuffer(int(sectors))
	defer buf.Free()
	clear(buf.B[copy(buf.B, packed):])
	off, err := n.packer.take(t, n, sectors)
	if err != nil {
		return 0, err
	}
	e, ok := compressedEntry(off, int64(len(packed)), n.clusterBits)
	if !ok {
		return 0, fmt.Errorf("compressed data at %#x: %w", off, blk.ErrRange)
	}
	err = blk.Do(t, n.storage, &blk.Request{Op: blk.OpWrite, Off: off, Len: sectors, Data: blk.BytesVec(nil, buf.B)})
	if err != nil {
		n.releasePacked(e) // its place stays unused
		return 0, err
	}
	return e, nil
}

// take gives room for size bytes, counted.
func (p *packer) take(t *blk.Task, n *Node, size int64) (int64, error) {
	defer p.lock.Lock(t)()
	if p.next+size > p.end {
		if err := p.more(t, n, size); err != nil {
			return 0, err
		}
	}
	off := p.next
	p.next += size
	first := p.end>>n.clusterBits - int64(len(p.left))
	for c := off >> n.clusterBits; c <= (off+size-1)>>n.clusterBits; c++ {
		p.left[c-first]--
	}
	return off, nil
}

// more takes new clusters.
func (p *packer) more(t *blk.Task, n *Node, size int64) error {
	r, err := n.allocate(t, maxReserve>>n.clusterBits, 0)
	if err != nil {
		return err
	}
	if r.count<<n.clusterBits < size {
		n.putBack(r)
		return fmt.Errorf("no place for %d bytes: %w", size, blk.ErrNotSupported) // not reachable: size <= a cluster
	}
	defer n.alloc.Lock(t)()
	if err := p.finish(t, n); err != nil {
		n.putBack(r)
		return err
	}
	users := n.clusterSize() / blk.SectorSize
	first := r.host >> n.clusterBits
	if err := n.countNew(t, []refRun{{first, r.count, users - 1}}); err != nil {
		n.putBack(r)
		return err
	}
	p.next, p.end = r.host, r.host+r.count<<n.clusterBits
	p.left = p.left[:0]
	for range r.count {
		p.left = append(p.left, users)
	}
	return nil
}

// finish lowers the counts of the present clusters to what they should be. Under Node.alloc.
func (p *packer) finish(t *blk.Task, n *Node) error {
	var refs []refRun
	first := p.end>>n.clusterBits - int64(len(p.left))
	for i, left := range p.left {
		if left > 0 {
			refs = append(refs, refRun{first + int64(i), 1, -left})
		}
	}
	p.next, p.end, p.left = 0, 0, p.left[:0]
	_, _, rest, err := n.changeRefs(t, refs)
	n.release(rest...)
	return err
}

// releasePacked drops a use of the clusters in which compressed data lies.
func (n *Node) releasePacked(e l2Entry) {
	off, l := e.compressedRange(n.clusterBits)
	first := off >> n.clusterBits
	n.release(refRun{first, (off+l-1)>>n.clusterBits - first + 1, -1})
}
