// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/addcow"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
	"github.com/blkstream/blkstream/blk/raw"
	"github.com/blkstream/blkstream/config"
	"github.com/blkstream/blkstream/copy/control"
	"github.com/blkstream/blkstream/copy/job"
	"github.com/blkstream/blkstream/vhostuser"
	"github.com/blkstream/blkstream/vhostuser/vblk"
)

// record is what the state directory keeps of a disk: the one truth about which image it is on. Replacing it is the
// switch: before, a restart finds the disk on the old image, afterwards on the new one.
type record struct {
	Image  string `json:"image"`
	Format string `json:"format"`
	// Moved are the images that the disk was on before, oldest first. A configuration that still names one of them
	// is out of date.
	Moved []string `json:"moved,omitempty"`
	// Backing names the images behind Image in place of what the images say. It comes from the configuration, which said
	// so of an image that is behind this one since a snapshot.
	Backing []config.Layer `json:"backing,omitempty"`
	// CacheOff: the guest has switched the write cache off. It does not flush then, and its front-end does not tell a
	// daemon that comes back.
	CacheOff bool `json:"cache_off,omitempty"`
	// CopyOnRead is what was chosen at run time. It counts until the specification says the same.
	CopyOnRead *bool `json:"copy_on_read,omitempty"`
	// Added is the whole specification of a disk that was added at run time.
	Added *config.Disk `json:"added,omitempty"`
}

const recordKind = "disks"

// disk is one disk that is served.
type disk struct {
	d      *Daemon
	spec   config.Disk // as configured or added
	graph  *blk.Graph
	dev    *vblk.Device
	server *vhostuser.Server
	cancel context.CancelFunc
	served chan struct{} // closed when the socket is served no more

	drained func() error // drain, once
	waits   atomic.Value // string: what that waits for

	holdMu sync.Mutex // held over locking and unlocking the image
	holds  int        // who needs the image's locks: the guest's queues, a job, a resize

	notCopied *copyErrors // of copy on read
	bitmaps   *bitmaps

	copying  *copyState // of the block copy that runs; nil: it will not go on after the daemon's end
	notGoing error      // why that of an earlier daemon does not

	mu     sync.Mutex
	rec    record
	unsure bool         // the state directory may say something else
	img    *image.Image // what the guest is on
}

func (d *Daemon) ctx() context.Context { return context.Background() }

// loadRecord loads the record of a disk; false: it has none.
func (d *Daemon) loadRecord(id string, r *record) (bool, error) {
	found, err := d.store.Load(recordKind, id, r)
	if err == nil && found && !r.valid() {
		err = fmt.Errorf("state directory: %s is damaged: it names no image", d.store.Path(recordKind, id))
	}
	return found, err
}

// valid: else what the record says is not what a daemon has written.
func (r record) valid() bool { return r.Image != "" && r.Format != "" }

// startPatience is how long a disk may take to start before the log names it.
const startPatience = 10 * time.Second

// startDisks serves all disks, each beside the others: the guests of one whose storage hangs wait, and no others.
func (d *Daemon) startDisks() error {
	starts := map[string]func() error{}
	for _, spec := range d.file.Disks {
		starts[spec.ID] = func() error { return d.startConfigured(spec) }
	}
	ids, err := d.store.IDs(recordKind)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if starts[id] != nil {
			continue
		}
		var r record
		if _, err := d.loadRecord(id, &r); err != nil {
			return err
		}
		if r.Added != nil {
			starts[id] = func() error { return d.startAdded(r) }
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, len(starts))
	for i, id := range slices.Sorted(maps.Keys(starts)) {
		wg.Go(func() {
			slow := time.AfterFunc(startPatience, func() {
				d.opts.Log.Warn("the disk's image does not open; jobs and commands wait for it, other disks do not", "disk", id)
			})
			defer slow.Stop()
			errs[i] = starts[id]()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// startConfigured serves a disk of the configuration from the image that it is on, which is another one than
// configured after a switch.
func (d *Daemon) startConfigured(spec config.Disk) error {
	var r record
	found, err := d.loadRecord(spec.ID, &r)
	if err != nil {
		return err
	}
	added := r.Added != nil
	changed := added
	r.Added = nil
	if r.CopyOnRead != nil && *r.CopyOnRead == spec.CopyOnRead {
		r.CopyOnRead, changed = nil, true
	}
	switch {
	case found && spec.Image != r.Image && slices.Contains(r.Moved, spec.Image):
		// Served from where it was moved to; warning says so.
		if changed {
			if err := d.store.Save(recordKind, spec.ID, &r); err != nil {
				return err
			}
		}
	case found && spec.Image != r.Image && (added || len(r.Moved) > 0):
		return fmt.Errorf("%s:%d: disk %q is on %s, but the configuration names %s, which it has never been on: "+
			"write image = %q, or, if you are sure that %s holds the disk, remove %s/%s/%s.json",
			d.file.Path, d.file.ImageLine(spec.ID), spec.ID, r.Image, spec.Image, r.Image, spec.Image,
			d.file.Daemon.StateDir, recordKind, spec.ID)
	case found && spec.Format != r.Format && len(r.Moved) > 0:
		// Under the wrong format the guest would read the right one's metadata, and overwrite it.
		return fmt.Errorf("%s:%d: disk %q was moved to %s, which is %s, but the configuration says %s: write format = %q",
			d.file.Path, d.file.ImageLine(spec.ID), spec.ID, r.Image, r.Format, spec.Format, r.Format)
	case found && r.Format == image.AddCow && isPartOf(spec.Image, r.Image):
		// Nobody has streamed it yet. As a raw image it shows old contents where the rest would have come.
		return fmt.Errorf("%s:%d: disk %q is on %s, and %s does not hold all of it yet: write image = %q and format = %q, and stream the disk first",
			d.file.Path, d.file.ImageLine(spec.ID), spec.ID, r.Image, spec.Image, r.Image, r.Format)
	default:
		if found && spec.Image == r.Image {
			if err := d.keepBitmaps(spec.ID, r); err != nil {
				return err
			}
		}
		r = record{Image: spec.Image, Format: spec.Format, CacheOff: r.CacheOff, CopyOnRead: r.CopyOnRead}
		if err := d.store.Save(recordKind, spec.ID, &r); err != nil {
			return err
		}
	}
	k, err := d.startDisk(spec, r)
	if err != nil {
		return fmt.Errorf("%s:%d: disk %q: %w", d.file.Path, d.file.ImageLine(spec.ID), spec.ID, err)
	}
	if w := k.warning(); w != "" {
		d.opts.Log.Warn(w, "disk", spec.ID)
	}
	return nil
}

// startAdded serves a disk that was added to an earlier daemon at run time.
func (d *Daemon) startAdded(r record) error {
	if _, err := d.startDisk(*r.Added, r); err != nil {
		return fmt.Errorf("disk %q, which was added at run time: %w; to forget it remove %s",
			r.Added.ID, err, d.store.Path(recordKind, r.Added.ID))
	}
	return nil
}

// lockRunning is the value of a disk's lock key with which its image is locked only while somebody uses it.
const lockRunning = "running"

// lockPatience is how long a daemon that starts waits for the locks of images.
const lockPatience = 5 * time.Second

// patiently opens an image. While the daemon starts it waits for the image's locks: a daemon that was killed has them
// until the kernel has finished its I/O.
func (d *Daemon) patiently(open func() error) error {
	err := open()
	for deadline := time.Now().Add(lockPatience); d.starting.Load() && errors.Is(err, file.ErrInUse) && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
		err = open()
	}
	return err
}

// hold takes the image's locks for one more user of the disk, or gives them up for one less. With lock = "running" an
// image without users is not locked: in a live migration the other host's daemon opens it before the guest stops here,
// and locks it when the guest goes on there.
func (k *disk) hold(on bool) error {
	if k.spec.Lock != lockRunning {
		return nil
	}
	k.holdMu.Lock()
	defer k.holdMu.Unlock()
	users := k.holds
	if on {
		users++
	} else {
		users--
	}
	if min(users, k.holds) == 0 {
		var root blk.Node
		k.graph.View(func(n blk.Node) { root = n })
		// A filter is only there while a job runs, or if it could not be removed: the image then stays locked.
		if image, ok := root.(*raw.Node); ok {
			lock := image.Unlock
			if on {
				lock = image.Lock
			}
			if err := lock(); err != nil {
				return err
			}
		}
	}
	k.holds = users
	return nil
}

// openImage opens an image with all that is behind it. g is the graph that it will be in, backing names images behind
// it; unlocked: without the locks that keep writers out.
func (d *Daemon) openImage(path, format string, spec *config.Disk, g *blk.Graph, backing []config.Layer, unlocked bool) (*image.Image, error) {
	o := d.imageOptions(spec, g)
	o.Unlocked, o.Backing, o.Ahead = unlocked, layers(backing), true // it is the whole disk, or will be
	var img *image.Image
	err := d.patiently(func() (err error) {
		img, err = image.Open(blk.NewTask(), path, format, o)
		return err
	})
	if err != nil {
		return nil, imageError(err)
	}
	d.warn(img)
	return img, nil
}

// imageOptions is how the images of a disk are opened.
func (d *Daemon) imageOptions(spec *config.Disk, g *blk.Graph) image.Options {
	return image.Options{
		ReadOnly: spec.ReadOnly,
		Direct:   spec.Cache == "none",
		NoSync:   spec.Cache == "unsafe",
		Align:    int64(spec.BlockSize),
		Check:    d.checkRoots,
		Cache:    qcow2.NewCache(spec.MetadataCache),
		Barrier:  g.Barrier,
		Warn:     func(w string) { d.opts.Log.Warn(w) },
	}
}

// imageError makes an error of the images one of the control socket's.
func imageError(err error) error {
	switch {
	case errors.Is(err, file.ErrInUse), errors.Is(err, image.ErrReplaced), errors.Is(err, qcow2.ErrCorrupt):
		return control.Errorf(control.ErrPrecondition, "%w", err)
	case errors.Is(err, image.ErrFormat), errors.Is(err, qcow2.ErrFeature), errors.Is(err, addcow.ErrFeature):
		return control.Errorf(control.ErrUnsupported, "%w", err)
	case errors.Is(err, image.ErrNoFormat), errors.Is(err, image.ErrName), errors.Is(err, image.ErrLoop),
		errors.Is(err, image.ErrDepth), errors.Is(err, image.ErrOverlay), errors.Is(err, image.ErrMerge), errors.Is(err, qcow2.ErrFormat),
		errors.Is(err, addcow.ErrFormat):
		return control.Errorf(control.ErrInvalid, "%w", err)
	default:
		return err
	}
}

func (d *Daemon) warn(img *image.Image) {
	for _, w := range img.Warnings() {
		d.opts.Log.Warn(w, "image", img.Chain[0].Path)
	}
}

func layers(backing []config.Layer) (all []image.Layer) {
	for _, l := range backing {
		all = append(all, image.Layer{Path: l.Image, Format: l.Format})
	}
	return all
}

func (d *Daemon) checkRoots(path string) error {
	if err := d.file.Daemon.CheckRoots(path); err != nil {
		return control.Errorf(control.ErrInvalid, "%w", err)
	}
	return nil
}

// startDisk opens the image and serves the socket.
func (d *Daemon) startDisk(spec config.Disk, r record) (*disk, error) {
	k := &disk{d: d, spec: spec, rec: r, graph: blk.NewGraph(nil), served: make(chan struct{}), notCopied: newCopyErrors()}
	k.bitmaps, k.drained = &bitmaps{k: k}, sync.OnceValue(k.drain)
	backing := k.backing()
	unlocked := spec.Lock == lockRunning && r.Format == image.Raw // hold locks no other
	unfinished, resumes := k.unfinished()
	if resumes {
		k.copying, k.notGoing = d.findCopyState(unfinished, r, spec.Lock)
	}
	img, err := d.openImage(r.Image, r.Format, &spec, k.graph, backing, unlocked)
	if err != nil {
		return nil, err
	}
	size := img.Root.Info().Size
	if size%int64(spec.BlockSize) != 0 {
		return nil, errors.Join(control.Errorf(control.ErrInvalid, "%s: its size, %d bytes, is not a multiple of block_size %d",
			r.Image, size, spec.BlockSize), img.Close())
	}
	k.img = img
	root := k.over(img)
	if k.copying != nil {
		if root, err = k.copying.open(unfinished, img); err != nil {
			root, k.copying, k.notGoing = k.over(img), nil, err
		}
	}
	if resumes && k.copying == nil {
		d.neverGoesOn(unfinished.ID)
	}
	if err := k.graph.Change(context.Background(), func(tx *blk.Tx) error { tx.SetRoot(root); return nil }); err != nil {
		return nil, errors.Join(err, img.Close())
	}
	if err := k.bitmaps.load(); err != nil {
		return nil, errors.Join(err, k.bitmaps.sync(), img.Close())
	}
	k.dev = vblk.New(k.graph, size, vblk.Options{
		ID: spec.ID, Serial: spec.Serial, Queues: spec.Queues, Depth: spec.QueueSize, BlockSize: spec.BlockSize,
		ReadOnly: spec.ReadOnly, Discard: spec.Discard, WriteThrough: spec.Cache == "writethrough", CacheOff: r.CacheOff,
		Use: k.hold, Cache: k.keepCache, PollMax: time.Duration(spec.PollUS) * time.Microsecond, NoURing: os.Getenv("BLKSTREAM_NO_URING") != "", Log: d.opts.Log,
	})
	k.server = vhostuser.NewServer(k.dev, vhostuser.Options{Logger: d.opts.Log.With("disk", spec.ID)})
	if err := k.serve(); err != nil {
		return nil, errors.Join(err, k.bitmaps.sync(), img.Close())
	}
	d.mu.Lock()
	over := d.over
	if !over {
		d.disks[spec.ID] = k
	}
	d.mu.Unlock()
	if over { // a disk that was being added: who stops the others does not know of it
		return nil, errors.Join(errors.New("the daemon stops"), k.stop())
	}
	return k, nil
}

// serve listens on the disk's socket, or takes the one that was inherited.
func (k *disk) serve() error {
	var ctx context.Context
	ctx, k.cancel = context.WithCancel(k.d.ctx())
	var serve func() error
	if n, ok := strings.CutPrefix(k.spec.Socket, "fd:"); ok {
		fd, err := strconv.Atoi(n)
		if err != nil {
			return control.Errorf(control.ErrInvalid, "socket %q: not a number", k.spec.Socket)
		}
		listens, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err != nil {
			return fmt.Errorf("socket %q: %w", k.spec.Socket, err)
		}
		f := os.NewFile(uintptr(fd), k.spec.Socket)
		defer f.Close()
		if listens == 0 {
			c, err := net.FileConn(f)
			if err != nil {
				return fmt.Errorf("socket %q: %w", k.spec.Socket, err)
			}
			u, ok := c.(*net.UnixConn)
			if !ok {
				return fmt.Errorf("socket %q: not a Unix socket", k.spec.Socket)
			}
			serve = func() error {
				if k.d.store == nil { // nobody can add a disk
					defer close(k.d.end)
				}
				return k.server.ServeConn(ctx, u)
			}
		} else {
			l, err := net.FileListener(f)
			if err != nil {
				return fmt.Errorf("socket %q: %w", k.spec.Socket, err)
			}
			u, ok := l.(*net.UnixListener)
			if !ok {
				return fmt.Errorf("socket %q: not a Unix socket", k.spec.Socket)
			}
			serve = func() error { return k.server.ServeListener(ctx, u) }
		}
	} else {
		l, err := vhostuser.Listen(k.spec.Socket)
		if err != nil {
			return err
		}
		serve = func() error { return k.server.ServeListener(ctx, l) }
	}
	k.d.wg.Go(func() {
		defer close(k.served)
		if err := serve(); err != nil && ctx.Err() == nil {
			k.d.opts.Log.Error("the disk's socket failed", "disk", k.spec.ID, "err", err)
		}
	})
	return nil
}

// stopWait is how long a disk may take to stop. While one waits for its storage, the guests of all the others wait for the
// next daemon.
var stopWait = 10 * time.Second

var errLeft = errors.New("left as a crash would leave it: its storage does not answer")

// stop ends the disk, or gives up with errLeft after stopWait. It may be called again.
func (k *disk) stop() error {
	ended := make(chan error, 1)
	go func() { ended <- k.drained() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(stopWait):
		return fmt.Errorf("disk %q is %w (%v)", k.spec.ID, errLeft, k.waits.Load())
	}
}

// drain ends what the guest and a job have in flight, and closes the image. The job has been told to end.
func (k *disk) drain() error {
	k.cancel() // the guest's queues take nothing more from now on
	k.waits.Store("state directory " + k.d.file.Daemon.StateDir)
	image := k.record().Image
	if k.d.jobs != nil {
		if j := k.d.jobs.OnDisk(k.spec.ID); j != nil {
			r := j.Record()
			k.waits.Store(fmt.Sprintf("job %s, from %s to %s", r.ID, cmp.Or(r.Source, "the images behind it"), r.Target))
			<-j.Done()
			image = k.record().Image
		}
	}
	k.waits.Store("requests of the guest to " + image)
	err := k.server.Close()
	<-k.served
	k.d.mu.Lock()
	delete(k.d.disks, k.spec.ID)
	k.d.mu.Unlock()
	if k.dev.Running() > 0 {
		return errors.Join(err, fmt.Errorf("disk %q: requests are still in flight, its image stays open", k.spec.ID))
	}
	k.waits.Store("closing " + image)
	var root blk.Node
	k.graph.View(func(n blk.Node) { root = n })
	// Whatever the guest was promised is durable by its own flushes; this is for those who never flush.
	if !root.Info().ReadOnly {
		err = errors.Join(err, blk.Do(blk.NewTask(), root, &blk.Request{Op: blk.OpFlush}))
	}
	if f := k.logged(); f != nil && k.copying != nil {
		root = f.Source() // the next daemon puts it there again
	}
	if withoutCopyOnRead(root) != k.image().Root {
		return errors.Join(err, fmt.Errorf("disk %q: a job's filter could not be removed, its images stay open", k.spec.ID))
	}
	files := k.bitmaps.files()
	err = errors.Join(err, k.bitmaps.sync(), k.closeImage())
	if k.copying != nil {
		err = errors.Join(err, k.copying.rest())
	}
	return errors.Join(err, k.bitmaps.stopped(files))
}

// closeImage closes what the disk is on. Somebody may still be drawing its chain.
func (k *disk) closeImage() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.img.Close()
}

func (k *disk) image() *image.Image {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.img
}

// backing names images behind the one that the disk is on.
func (k *disk) backing() []config.Layer {
	r := k.record()
	if r.Image == k.spec.Image {
		return k.spec.Backing
	}
	return r.Backing // of another image the configuration says nothing
}

func (k *disk) record() record {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rec
}

// move is the record of the disk on another image.
func (r record) move(image, format string) record {
	r.Moved = append(slices.DeleteFunc(slices.Clone(r.Moved), func(s string) bool { return s == image || s == r.Image }), r.Image)
	r.Image, r.Format, r.Backing = image, format, nil
	return r
}

// moveTo records durably that the disk is on another image.
func (k *disk) moveTo(image, format string) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saveLocked(k.rec.move(image, format))
}

// saveLocked replaces the record. If the journal fails half-way the old one is written again, so that there is no doubt.
func (k *disk) saveLocked(r record) error {
	if err := k.d.store.Save(recordKind, k.spec.ID, &r); err != nil {
		k.unsure = k.unsure || errors.Is(err, job.ErrUnsure)
		return errors.Join(err, k.settleLocked())
	}
	k.rec, k.unsure = r, false
	return nil
}

// settle sees to it that the record says where the disk is, if that is in doubt.
func (k *disk) settle() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.settleLocked()
}

func (k *disk) settleLocked() error {
	if !k.unsure {
		return nil
	}
	err := k.d.store.Save(recordKind, k.spec.ID, &k.rec)
	k.unsure = err != nil
	return err
}

// keepCache records whether the guest wants a write cache.
func (k *disk) keepCache(on bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.d.store == nil || k.rec.CacheOff == !on {
		return nil
	}
	r := k.rec
	r.CacheOff = !on
	return k.saveLocked(r)
}

// warning says what the operator should know or do: what to change after a switch, and what is wrong with the image.
func (k *disk) warning() string {
	var all []string
	if r := k.record(); r.Added == nil && r.Image != k.spec.Image {
		w := k.hint(r.Image, r.Format)
		if len(r.Backing) > 0 {
			var l []string
			for _, b := range r.Backing {
				l = append(l, fmt.Sprintf("{ image = %q, format = %q }", b.Image, b.Format))
			}
			w += fmt.Sprintf(" and backing = [%s]", strings.Join(l, ", "))
		}
		all = append(all, w)
	}
	if r := k.record(); r.Added == nil && r.CopyOnRead != nil && r.Format != image.Raw {
		all = append(all, fmt.Sprintf("copy on read was switched at run time: write copy_on_read = %v for the disk at line %d of %s",
			*r.CopyOnRead, k.d.file.ImageLine(k.spec.ID), k.d.file.Path))
	}
	if w := k.notCopied.warning(); w != "" {
		all = append(all, w)
	}
	if w := k.bitmaps.warning(); w != "" {
		all = append(all, w)
	}
	if n, ok := k.image().Root.(*qcow2.Node); ok {
		all = append(all, n.Warnings()...)
	}
	return strings.Join(all, "; ")
}

func (k *disk) hint(image, format string) string {
	if k.record().Added != nil {
		return fmt.Sprintf("the disk is on %s", image)
	}
	if format != k.spec.Format {
		image += fmt.Sprintf("\" and format = %q", format)
	} else {
		image += `"`
	}
	return fmt.Sprintf(`the disk has moved: change line %d of %s to image = "%s`, k.d.file.ImageLine(k.spec.ID), k.d.file.Path, image)
}

// free refuses what cannot be done while a job works on the disk.
func (k *disk) free() error {
	if j := k.d.jobs.OnDisk(k.spec.ID); j != nil {
		return control.Errorf(control.ErrPrecondition, "job %s works on disk %q: wait for its end or cancel it", j.Record().ID, k.spec.ID)
	}
	return nil
}

// resize changes the image's size and tells the guest.
func (k *disk) resize(ctx context.Context, size int64) error {
	if size <= 0 || size%int64(k.spec.BlockSize) != 0 {
		return control.Errorf(control.ErrInvalid, "a size of %d: it must be a multiple of %d", size, k.spec.BlockSize)
	}
	if k.spec.ReadOnly {
		return control.Errorf(control.ErrPrecondition, "disk %q is read-only", k.spec.ID)
	}
	if err := k.free(); err != nil {
		return err
	}
	if k.record().Format == image.AddCow {
		return control.Errorf(control.ErrPrecondition, "disk %q has the size of its image file: stream it first, so that it is on that alone", k.spec.ID)
	}
	if err := k.hold(true); err != nil {
		return err
	}
	defer k.hold(false) //nolint:errcheck // what is locked too long harms nobody
	err := k.graph.Change(ctx, func(tx *blk.Tx) error {
		root, ok := tx.Root().(interface {
			Resize(t *blk.Task, size int64, shrink bool) error
		})
		if !ok {
			return control.Errorf(control.ErrPrecondition, "disk %q: a job works on it, wait for its end or cancel it", k.spec.ID)
		}
		if old := tx.Root().Info().Size; size < old {
			return control.Errorf(control.ErrInvalid, "disk %q has %d bytes: making it smaller would cut data off", k.spec.ID, old)
		}
		if err := root.Resize(blk.NewTask(), size, false); err != nil {
			return err
		}
		tx.SetRoot(tx.Root())
		return nil
	})
	if err != nil {
		return err
	}
	k.dev.SetSize(size)
	k.server.ConfigChanged()
	return nil
}
