// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/mirror"
	"github.com/blkstream/blkstream/copy/job"
)

// How a block copy goes on after the death of the daemon, in order:
//
//  1. While it runs, what it has to know of its images (mirror.State) lies in a file in memory (tmpfs) that is mapped
//     shared: storing a bit there is a store to memory and nothing else, and it survives the process, not the host. On a
//     disk, a store to a page that is just being written back would hold up the guest. A record in the state directory
//     says what the file is about, and is there whenever the file is.
//  2. When a disk is started and a copy of it has not ended, record and file are looked at before its image is opened. If
//     all is as the dead daemon left it, the filter is over the image before the guest is there.
//  3. Then the job is started with that filter. If the target is not as it was, the copy begins at its beginning.
//
// In every doubt it does that, which is always right: without this file nothing on the target can be relied on.

const copyKind = "copies"

const (
	// maxCopyState bounds a file, and so the memory that it takes, in bytes: enough for 32 TiB in blocks of 64 KiB.
	maxCopyState = 256 << 20

	stampEvery = 250 * time.Millisecond
)

// memory is where the files are. Tests change it.
var memory = "/dev/shm"

// stampSlack is how much younger than the last stamp a file may be that the dead daemon wrote. Tests change it.
var stampSlack = 3 * time.Second

// copyRecord says what a copy's file is about.
type copyRecord struct {
	Boot   string     `json:"boot"` // the kernel's id of its run: memory does not survive another one
	Key    uint64     `json:"key"`  // of the file
	Size   int64      `json:"size"` // of the disk, in bytes
	Source []copyFile `json:"source"`
	Target []copyFile `json:"target"`
	Blank  bool       `json:"blank"` // the target was new
	Pack   bool       `json:"pack"`  // the bulk stage compresses
}

// copyFile is a file that an image, or one behind it, is made of.
type copyFile struct {
	Path   string `json:"path"`
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
	Number uint64 `json:"number,omitempty"` // of a block device
}

// The words of the file before those of mirror.State.
const (
	wordKey   = iota // written last
	wordStamp        // when the daemon was alive, ns since the epoch
	stampWords
)

// copyState is the state of a copy that outlives the daemon.
type copyState struct {
	rec   copyRecord
	path  string
	mem   []byte
	words []atomic.Uint64
	state *mirror.State
	used  bool // by a job of this daemon
}

func (d *Daemon) copyPath(id string) string { return copyPath(d.file.Daemon.StateDir, id) }

// copyPath is the file of a job of the daemon with this state directory.
func copyPath(stateDir, id string) string {
	sum := sha256.Sum256([]byte(stateDir))
	return filepath.Join(memory, fmt.Sprintf("blkstream-%x-%s", sum[:8], id))
}

// newCopyState is for a copy that begins.
func (d *Daemon) newCopyState(r job.Record, source, target *image.Image, blank, pack bool) (_ *copyState, err error) {
	s := &copyState{path: d.copyPath(r.ID), rec: copyRecord{
		Key: rand.Uint64() | 1, Size: source.Root.Info().Size, Blank: blank, Pack: pack,
	}}
	if s.rec.Boot, err = bootID(); err != nil {
		return nil, err
	}
	if s.rec.Source, err = filesOf(source); err != nil {
		return nil, err
	}
	if s.rec.Target, err = filesOf(target); err != nil {
		return nil, err
	}
	if err := s.remove(d.store, r.ID); err != nil { // of an earlier one that could not go on
		return nil, err
	}
	if err := d.store.Save(copyKind, r.ID, &s.rec); err != nil {
		return nil, err
	}
	if err := s.mapFile(r.Granularity, true); err != nil {
		return nil, errors.Join(err, s.remove(d.store, r.ID))
	}
	s.state = mirror.NewState(s.words[stampWords:], s.rec.Size, r.Granularity)
	s.stamp()
	s.words[wordKey].Store(s.rec.Key)
	return s, nil
}

// findCopyState is for a copy of an earlier daemon, before the disk's image is opened. An error says why the copy cannot
// go on where it was.
func (d *Daemon) findCopyState(r job.Record, now record, lock string) (_ *copyState, err error) {
	s := &copyState{path: d.copyPath(r.ID)}
	found, err := d.store.Load(copyKind, r.ID, &s.rec)
	if err != nil {
		return nil, err
	}
	boot, err := bootID()
	switch {
	case err != nil:
		return nil, err
	case !found:
		return nil, errors.New("nothing is known of how far it was")
	case s.rec.Boot != boot:
		return nil, errors.New("the host has been started anew")
	case lock == lockRunning:
		return nil, fmt.Errorf("with lock = %q another host may have written to the image", lockRunning)
	case len(s.rec.Source) == 0 || s.rec.Source[0].Path != now.Image:
		return nil, fmt.Errorf("the disk is on %s now", now.Image)
	case len(s.rec.Target) == 0 || s.rec.Target[0].Path != r.Target:
		return nil, errDamaged
	}
	if err := s.mapFile(r.Granularity, false); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmap()) // s is no result then
		}
	}()
	if s.words[wordKey].Load() != s.rec.Key {
		return nil, errDamaged
	}
	if err := s.untouched(s.rec.Source); err != nil {
		return nil, err
	}
	return s, nil
}

var errDamaged = errors.New("what is known of how far it was is damaged")

// open is the second half of findCopyState, when the image is open: it returns the filter over it. Without one the file
// is not used any more.
func (s *copyState) open(r job.Record, img *image.Image) (_ blk.Node, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmap())
		}
	}()
	if size := img.Root.Info().Size; size != s.rec.Size {
		return nil, fmt.Errorf("the disk had %d bytes and has %d", s.rec.Size, size)
	}
	files, err := filesOf(img)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(files, s.rec.Source) {
		return nil, errors.New("the disk's chain of images is another one")
	}
	if s.state, err = mirror.OpenState(s.words[stampWords:], s.rec.Size, r.Granularity); err != nil {
		return nil, err
	}
	return mirror.New(img.Root, s.state), nil
}

// again lets the copy begin at its beginning. That the target is not blank any more is durable before the bulk stage begins:
// the next daemon would leave out what is a hole in the source, and whatever the target holds there would stay.
func (s *copyState) again(store *job.Store, id string) error {
	s.rec.Blank, s.rec.Pack = false, false
	if err := store.Save(copyKind, id, &s.rec); err != nil {
		return err
	}
	s.state.SetBulk(0)
	return nil
}

// mapFile makes the file, or takes the one that is there.
func (s *copyState) mapFile(granularity int64, create bool) error {
	if granularity <= 0 || s.rec.Size <= 0 {
		return errDamaged
	}
	size := 8 * (stampWords + mirror.StateWords(s.rec.Size, granularity))
	flags := os.O_RDWR | unix.O_NOFOLLOW
	if create {
		flags |= os.O_CREATE | os.O_EXCL
	}
	if size > maxCopyState {
		return fmt.Errorf("it takes more than %d bytes of memory: choose a larger granularity", maxCopyState)
	}
	f, err := os.OpenFile(s.path, flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || !create && st.Size != size {
		return errors.Join(errDamaged, err)
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o77 != 0 { // anyone may put a file there
		return fmt.Errorf("%s: %w: others may write to it", s.path, errDamaged)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
		return errors.Join(fmt.Errorf("%s: not on tmpfs", s.path), err)
	}
	// A store to a page for which there is no memory would be a SIGBUS on a queue's thread.
	if err := unix.Fallocate(int(f.Fd()), 0, 0, size); err != nil {
		return fmt.Errorf("%s: allocate %d bytes: %w", s.path, size, err)
	}
	if s.mem, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return fmt.Errorf("%s: mmap: %w", s.path, err)
	}
	s.words = wordsOf(s.mem)
	return nil
}

// unmap must come after the last use.
func (s *copyState) unmap() error {
	if s.mem == nil {
		return nil
	}
	err := unix.Munmap(s.mem)
	s.mem, s.words, s.state = nil, nil, nil
	return err
}

// remove forgets all of it.
func (s *copyState) remove(store *job.Store, id string) error {
	err := s.unmap()
	if rerr := os.Remove(s.path); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return errors.Join(err, rerr)
	}
	return errors.Join(err, store.Delete(copyKind, id))
}

// stamp says that the daemon is alive: what is younger is not its work.
func (s *copyState) stamp() { s.words[wordStamp].Store(uint64(time.Now().UnixNano())) }

// keepStamped stamps until ctx ends.
func (s *copyState) keepStamped(ctx context.Context) {
	tick := time.NewTicker(stampEvery)
	defer tick.Stop()
	for ctx.Err() == nil {
		s.stamp()
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// rest leaves the state to the next daemon, after the last change of the images' files. If no job has come to it, as in a
// start that failed, what somebody else has done to the target must stay younger than the stamp.
func (s *copyState) rest() error {
	if s.used || s.untouched(s.rec.Target) == nil {
		s.stamp()
	}
	return s.unmap()
}

// untouched says whether nobody has written to the files since the daemon died. Of block devices that is not known.
func (s *copyState) untouched(files []copyFile) error {
	stamp := time.Unix(0, int64(s.words[wordStamp].Load()))
	if stamp.After(time.Now()) {
		return errors.New("the clock was set back")
	}
	for _, f := range files {
		now, changed, err := look(f.Path)
		switch {
		case err != nil:
			return err
		case now != f:
			return fmt.Errorf("%s is another file", f.Path)
		case changed.After(stamp.Add(stampSlack)):
			return fmt.Errorf("%s was changed after the daemon's end", f.Path)
		}
	}
	return nil
}

// look says what a file is, and when it was changed last. The time of its inode's change goes forward with each write,
// too, and cannot be set.
func look(path string) (f copyFile, changed time.Time, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return f, changed, fmt.Errorf("image %q: %w", path, err)
	}
	f = copyFile{Path: path, Device: st.Dev, Inode: st.Ino}
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		f.Number = st.Rdev
		return f, changed, nil
	}
	return f, time.Unix(0, max(st.Mtim.Nano(), st.Ctim.Nano())), nil
}

// filesOf are those of the image and of what is behind it.
func filesOf(img *image.Image) (all []copyFile, err error) {
	for _, m := range img.Chain {
		for _, path := range []string{m.Path, m.DataFile} {
			if path == "" {
				continue
			}
			f, _, err := look(path)
			if err != nil {
				return nil, err
			}
			all = append(all, f)
		}
	}
	return all, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// neverGoesOn removes the state of a copy that begins again, before the guest writes and nobody logs it: what was in the
// way may be gone when the next daemon looks.
func (d *Daemon) neverGoesOn(id string) {
	if err := os.Remove(d.copyPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.opts.Log.Warn("a copy leaves something behind", "job", id, "err", err)
	}
}

// unfinished is the block copy of the disk that an earlier daemon did not finish.
func (k *disk) unfinished() (job.Record, bool) {
	i := slices.IndexFunc(k.d.unfinished, func(r job.Record) bool {
		return r.Disk == k.spec.ID && r.Kind == kindCopy && !streams(r)
	})
	if i < 0 || k.d.unfinished[i].Target == k.record().Image {
		return job.Record{}, false
	}
	return k.d.unfinished[i], true
}

// outlive runs a copy with a state that outlives the daemon: the one of an earlier daemon, or one that begins.
func (k *disk) outlive(ctx context.Context, j *job.Job, begin func() (*copyState, error), run func(*mirror.State) error) error {
	log := k.d.opts.Log.With("job", j.Record().ID, "disk", k.spec.ID)
	if k.copying == nil {
		var err error
		if k.copying, err = begin(); err != nil {
			log.Warn("the copy begins again if the daemon dies", "err", err)
			return run(nil)
		}
	}
	k.copying.used = true
	alive, end := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { k.copying.keepStamped(alive) })
	err := run(k.copying.state)
	end()
	wg.Wait()
	if job.Stopping(ctx) && k.logged() != nil {
		return err // what the guest still writes is logged: the next daemon goes on
	}
	if err := k.dropCopyState(j.Record().ID); err != nil {
		log.Warn("the copy leaves something behind", "err", err)
	}
	return err
}

// dropCopyState forgets how far a copy was, which is over. If it has never come to it, the filter is still there.
func (k *disk) dropCopyState(id string) error {
	s := k.copying
	if s == nil {
		return nil
	}
	k.copying = nil
	if k.logged() != nil {
		err := k.graph.Change(context.Background(), func(tx *blk.Tx) error {
			s.state.Over()
			tx.SetRoot(k.over(k.image()))
			return nil
		})
		if err != nil {
			return err
		}
	}
	return s.remove(k.d.store, id)
}

// logged is the filter of a copy over the disk's image, if there is one.
func (k *disk) logged() (f *mirror.Node) {
	k.graph.View(func(root blk.Node) { f, _ = root.(*mirror.Node) })
	return f
}

// sweepCopies removes what belongs to no job that runs.
func (d *Daemon) sweepCopies() {
	dir := filepath.Join(d.file.Daemon.StateDir, copyKind)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		id := strings.TrimSuffix(e.Name(), ".json")
		if j, err := d.jobs.Get(id); err != nil || job.Ended(j.Record().State) {
			_ = os.Remove(d.copyPath(id)) // the next one tries again
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
}
