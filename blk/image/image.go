// SPDX-License-Identifier: Apache-2.0

// Package image opens images with all the images behind them, and works on images that no guest uses: it creates,
// describes, checks, maps, compares, converts, resizes and rebases them.
//
// Formats are named, by whoever opens an image or by the image in front of it, and never guessed: a guest can write
// into a raw disk what looks like another format and names a file of the host. Every file is locked as QEMU does it,
// the images behind the first one for reading only, so that many may share them and nobody changes them.
package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/chain"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/blk/raw"
)

// The formats.
const (
	Raw    = "raw"
	Qcow2  = "qcow2"
	AddCow = "add-cow"
)

// Errors of Open, apart from those of the formats and the host.
var (
	ErrFormat   = errors.New("format not supported")
	ErrNoFormat = errors.New("formats are never guessed")
	ErrName     = errors.New("not the name of a file on this host")
	ErrLoop     = errors.New("the chain of images leads back into itself")
	ErrDepth    = errors.New("the chain of images is too deep")
	ErrReplaced = errors.New("another file has taken the place of the one in use")
	ErrInUse    = file.ErrInUse
)

// Options of Open.
type Options struct {
	ReadOnly bool
	Direct   bool  // bypass the host's page cache
	NoSync   bool  // ignore flushes
	Unlocked bool  // the first image without the locks that keep writers out; see file.Options
	Align    int64 // every change is a multiple of this many bytes; see file.Options
	// Backing names the images behind the first one, in place of what the images say: the nearest first. An empty
	// field leaves what the image says. Behind the last of them the images' own names count.
	Backing []Layer
	// Check is asked for the path of each file before it is opened. nil: any will do.
	Check    func(path string) error
	Cache    *qcow2.Cache            // of all images of the chain; nil: one of their own
	Barrier  func(t *blk.Task) error // see qcow2.Options
	Ahead    bool                    // see qcow2.Options; of the first image
	Warn     func(string)            // of qcow2.Options, for the first image
	MaxDepth int                     // images behind the first; 0: chain.MaxDepth
	// Storage is put over each file that is opened, by tests of what a disk may do. nil: nothing is.
	Storage func(*file.Node) blk.Node

	claim bool // see file.Options; of the first image
}

// Layer names an image.
type Layer struct{ Path, Format string }

// Member is one image of a chain.
type Member struct {
	Layer
	Header *qcow2.Header  // of a qcow2 image
	AddCow *addcow.Header // of an add-cow image
	Size   int64          // of the virtual disk, in bytes
	// DataFile is the path of the external data file, or of the image file of an add-cow image, Backing that of the next
	// image, as resolved; empty: none.
	DataFile, Backing string
	Node              blk.Node // of this image alone, except that of the first one, which has the others behind it

	storage, data blk.Node     // until Node owns them
	files         []*file.Node // of both, also afterwards: for their locks
	layer         blk.Node     // what a chain has of it; nil: Node
	image         *raw.Node    // the image file of an add-cow image
}

// backing is what the image says of the one behind it; empty: there is none.
func (m *Member) backing() (l Layer) {
	switch {
	case m.Header != nil:
		l = Layer{m.Header.BackingFile, m.Header.BackingFormat}
	case m.AddCow != nil && !m.AddCow.AllAllocated():
		l = Layer{m.AddCow.BackingFile, m.AddCow.BackingFormat}
	}
	return l
}

// ClusterSize is the unit of allocation in bytes; 0: the image is raw.
func (m *Member) ClusterSize() int64 {
	switch {
	case m.Header != nil:
		return m.Header.ClusterSize()
	case m.AddCow != nil:
		return m.AddCow.ClusterSize()
	default:
		return 0
	}
}

// Image is an open image with what is behind it.
type Image struct {
	Root  blk.Node // *raw.Node, *qcow2.Node or *addcow.Node, over Lower
	Lower *chain.Node
	Chain []*Member // the first is Root's

	cache    *qcow2.Cache
	warnings []string
}

// Open opens the image at path and all images behind it.
func Open(t *blk.Task, path, format string, o Options) (*Image, error) {
	return open(t, path, format, o, func(g *Image) blk.Node {
		if g.Lower == nil { // an interface that holds a nil pointer would not be nil
			return nil
		}
		return g.Lower
	})
}

// open lets behind say what is behind the first image, when all but that is open.
func open(t *blk.Task, path, format string, o Options, behind func(*Image) blk.Node) (_ *Image, err error) {
	if o.Cache == nil {
		o.Cache = qcow2.NewCache(qcow2.DefaultCacheBytes)
	}
	g := &Image{cache: o.Cache}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.Close())
		}
	}()
	// Files from the first to the last: each names the next, and is locked before anything in it is believed.
	if err := g.openFiles(t, Layer{path, format}, o, true); err != nil {
		return nil, err
	}
	// Nodes from the last to the first: each is over the ones behind it.
	var lower []blk.Node
	for i := len(g.Chain) - 1; i > 0; i-- {
		if err := g.openNode(t, i, o, nil); err != nil {
			return nil, err
		}
		lower = append(lower, g.Chain[i].Node)
	}
	if len(lower) > 0 {
		slices.Reverse(lower)
		if g.Lower, err = chain.New(lower, chain.Options{Unit: unit(g.Chain)}); err != nil {
			return nil, fmt.Errorf("image %q: %w", path, err)
		}
	}
	if err := g.openNode(t, 0, o, behind(g)); err != nil {
		return nil, err
	}
	g.Root = g.Chain[0].Node
	return g, nil
}

// openFiles opens the files of the first image, and of those behind it if whole is set.
func (g *Image) openFiles(t *blk.Task, l Layer, o Options, whole bool) error {
	limit := o.MaxDepth
	if limit == 0 {
		limit = chain.MaxDepth
	}
	seen := &identities{}
	for by := ""; ; {
		if len(g.Chain) > limit {
			return fmt.Errorf("image %q: more than %d images behind it: %w", g.Chain[0].Path, limit, ErrDepth)
		}
		m := &Member{Layer: l}
		err := g.openFile(t, m, seen, o)
		if err != nil && by != "" {
			err = fmt.Errorf("behind image %q: %w", by, err)
		}
		if err != nil {
			return err
		}
		if !whole {
			return nil
		}
		next, err := g.next(m, o.Backing)
		if err != nil || next == nil {
			return err
		}
		m.Backing = next.Path
		by, l = m.Path, *next
	}
}

// openFile opens the file of one image, and that of its data if there is one, and reads the header. The member is in
// the chain as soon as it holds anything.
func (g *Image) openFile(t *blk.Task, m *Member, seen *identities, o Options) error {
	switch m.Format {
	case Raw, Qcow2, AddCow:
	case "":
		return fmt.Errorf("image %q: no format is given, and %w", m.Path, ErrNoFormat)
	default:
		return fmt.Errorf("image %q: %q: %w (there are raw, qcow2 and add-cow)", m.Path, m.Format, ErrFormat)
	}
	fo := file.Options{ReadOnly: true, Direct: o.Direct, NoSync: o.NoSync}
	if len(g.Chain) == 0 {
		fo.ReadOnly, fo.Align, fo.Unlocked, fo.Claim = o.ReadOnly, o.Align, o.Unlocked, o.claim
	}
	var err error
	so := fo
	if m.Format != Raw {
		// Tables and compressed clusters are written in whole sectors at least.
		so.Align, so.Grows = min(fo.Align, blk.SectorSize), true
	}
	if m.storage, err = g.openStorage(m, m.Path, seen, so, o); err != nil {
		return err
	}
	g.Chain = append(g.Chain, m)
	switch m.Format {
	case Raw:
		return nil
	case AddCow:
		return g.openImageFile(t, m, seen, fo, o)
	}
	if m.Header, err = qcow2.ReadHeader(t, m.storage); err != nil {
		return fmt.Errorf("image %q: %w", m.Path, err)
	}
	if m.Header.Incompatible&qcow2.IncompatDataFile == 0 {
		return nil
	}
	if m.Header.DataFile == "" {
		return fmt.Errorf("image %q has an external data file and does not name it: %w", m.Path, qcow2.ErrFeature)
	}
	if m.DataFile, err = Resolve(m.Path, m.Header.DataFile); err != nil {
		return fmt.Errorf("image %q: data file %w", m.Path, err)
	}
	if m.data, err = g.openStorage(m, m.DataFile, seen, fo, o); err != nil {
		return fmt.Errorf("image %q: data file: %w", m.Path, err)
	}
	return nil
}

// openImageFile opens what an add-cow image keeps its data in.
func (g *Image) openImageFile(t *blk.Task, m *Member, seen *identities, fo file.Options, o Options) (err error) {
	if m.AddCow, err = addcow.ReadHeader(t, m.storage); err != nil {
		return fmt.Errorf("image %q: %w", m.Path, err)
	}
	if f := m.AddCow.ImageFormat; f != Raw {
		return fmt.Errorf("image %q has an image file with format %q: %w (it is raw)", m.Path, f, ErrFormat)
	}
	if m.DataFile, err = Resolve(m.Path, m.AddCow.ImageFile); err != nil {
		return fmt.Errorf("image %q: image file %w", m.Path, err)
	}
	if m.data, err = g.openStorage(m, m.DataFile, seen, fo, o); err != nil {
		return fmt.Errorf("image %q: image file: %w", m.Path, err)
	}
	return nil
}

func (g *Image) openStorage(m *Member, path string, seen *identities, fo file.Options, o Options) (blk.Node, error) {
	if o.Check != nil {
		if err := o.Check(path); err != nil {
			return nil, err
		}
	}
	if err := seen.add(path); err != nil {
		return nil, err
	}
	f, err := file.Open(path, fo)
	if err != nil {
		return nil, err
	}
	g.warnings = append(g.warnings, f.Warnings()...)
	m.files = append(m.files, f)
	if o.Storage != nil {
		return o.Storage(f), nil
	}
	return f, nil
}

// next is the image behind m, nil if there is none.
func (g *Image) next(m *Member, override []Layer) (*Layer, error) {
	i := len(g.Chain) - 1
	says := m.backing()
	if says.Path == "" {
		if i < len(override) {
			return nil, fmt.Errorf("image %q has no backing image, and %d more are given", m.Path, len(override)-i)
		}
		return nil, nil
	}
	var l Layer
	if i < len(override) {
		l = override[i]
	}
	if l.Path == "" {
		path, err := Resolve(m.Path, says.Path)
		if err != nil {
			return nil, fmt.Errorf("image %q: backing file %w", m.Path, err)
		}
		l.Path = path
	}
	if l.Format == "" {
		l.Format = says.Format
	}
	if l.Format == "" {
		return nil, fmt.Errorf("image %q names its backing file %q without a format, and %w; if you know it, "+
			"record it with `blkstream image rebase -f qcow2 -u -F FORMAT %s`, "+
			"or give it in the configuration with backing = [{ image = %q, format = \"FORMAT\" }]",
			m.Path, says.Path, ErrNoFormat, m.Path, l.Path)
	}
	return &l, nil
}

// openNode makes the node of one member, which owns the files then.
func (g *Image) openNode(t *blk.Task, i int, o Options, backing blk.Node) error {
	m := g.Chain[i]
	switch m.Format {
	case Raw:
		m.Node = raw.Open(m.storage)
	case AddCow:
		m.image = raw.Open(m.data)
		n, err := addcow.Open(t, m.storage, addcow.Options{
			Name: m.Path, Image: m.image, Backing: backing, ReadOnly: i > 0 || o.ReadOnly,
		})
		if err != nil {
			return fmt.Errorf("image %q: %w", m.Path, err)
		}
		m.Node = n
	default:
		qo := qcow2.Options{Name: m.Path, ReadOnly: true, Data: m.data, Backing: backing, Cache: o.Cache}
		if i == 0 {
			qo.ReadOnly, qo.Barrier, qo.Ahead, qo.Warn = o.ReadOnly, o.Barrier, o.Ahead, o.Warn
		}
		n, err := qcow2.Open(t, m.storage, qo)
		if err != nil {
			return fmt.Errorf("image %q: %w", m.Path, err)
		}
		g.warnings = append(g.warnings, n.Warnings()...)
		m.Node, m.Header = n, n.Header()
	}
	m.storage, m.data = nil, nil
	m.Size = m.Node.Info().Size
	return nil
}

// unit is the granularity of the map of what is behind the first image: the smallest cluster, so that most units are in
// one image. A map in finer units than a file system's blocks would be large for nothing.
func unit(members []*Member) int64 {
	const smallest = 4096
	unit := int64(0)
	for _, m := range members[1:] {
		c := m.ClusterSize()
		if c == 0 {
			continue
		}
		if m.Header != nil && m.Header.ExtendedL2() {
			c /= 32
		}
		if unit == 0 || c < unit {
			unit = c
		}
	}
	if unit == 0 {
		return chain.DefaultUnit
	}
	return max(unit, smallest)
}

// Uses says whether path is one of the files that the image and those behind it lie in.
func (g *Image) Uses(path string) bool {
	seen := &identities{}
	if seen.add(path) != nil {
		return false
	}
	for _, m := range g.Chain {
		for _, name := range []string{m.Path, m.DataFile} {
			if name != "" && errors.Is(seen.add(name), ErrLoop) {
				return true
			}
		}
	}
	return false
}

// Warnings says what the user should know about the images that is not an error.
func (g *Image) Warnings() []string { return g.warnings }

// Close closes all images, the first one first: it may write while it closes. It does not flush.
func (g *Image) Close() error {
	var errs []error
	for _, m := range g.Chain {
		if m.Node != nil {
			errs = append(errs, m.Node.Close())
			continue
		}
		for _, f := range []blk.Node{m.storage, m.data} {
			if f != nil {
				errs = append(errs, f.Close())
			}
		}
	}
	g.Chain = nil
	return errors.Join(errs...)
}

// identities are the files of a chain.
type identities struct {
	files []fs.FileInfo
	paths []string
}

func (s *identities) add(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("open image %q: %w", path, errors.Unwrap(err))
	}
	for i, f := range s.files {
		if os.SameFile(f, info) {
			return fmt.Errorf("%q is the same file as %q: %w", path, s.paths[i], ErrLoop)
		}
	}
	s.files, s.paths = append(s.files, info), append(s.paths, path)
	return nil
}
