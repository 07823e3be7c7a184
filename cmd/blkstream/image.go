// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/config"
)

// The image commands need no daemon. They lock images as the daemon and QEMU do, and refuse those in use.

func (a *app) imageCmd() *cobra.Command {
	return a.group(&cobra.Command{
		Use:   "image",
		Short: "Create, inspect and convert images that no guest uses",
		Long: `Create, inspect and convert images that no guest uses. No daemon is needed.

The commands are those of qemu-img, with one difference: formats are never
guessed, since a guest can make a raw disk look like anything. Name them.`,
	}, a.imageCreateCmd(), a.imageInfoCmd(), a.imageCheckCmd(), a.imageMapCmd(), a.imageCompareCmd(),
		a.imageConvertCmd(), a.imageResizeCmd(), a.imageRebaseCmd())
}

var imageFormats = []string{image.Raw, image.Qcow2, image.AddCow}

// formatFlag adds a flag that must be given but is checked by needFormat, which can say why.
func formatFlag(cmd *cobra.Command, c *choice, name, short, usage string) {
	c.from = imageFormats
	c.addToP(cmd, name, short, usage+"; never guessed")
}

func needFormat(c *choice, name, short, of string) error {
	if c.value != "" {
		return nil
	}
	return &usageError{fmt.Errorf("what is the format of %s? Say it with -%s (--%s) %s: formats are never guessed",
		of, short, name, strings.Join(c.from, "|"))}
}

// statusError ends the program with a status of its own. Without an error, what it means was printed.
type statusError struct {
	status int
	err    error
}

func (e *statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *statusError) Unwrap() error { return e.err }

// target is what create and convert make.
type target struct {
	format, backingFormat choice
	compat, compression   choice
	preallocation         choice
	clusterSize           size
	opts                  image.CreateOptions
}

// addTo adds the flags. The shorthands are those that qemu-img has in the command.
func (g *target) addTo(cmd *cobra.Command, format, formatShort, backingShort string) {
	f := cmd.Flags()
	g.clusterSize.name = "SIZE"
	g.compat.from = []string{"1.1", "0.10"}
	g.compression.from = []string{"zlib", "zstd"}
	g.preallocation.from = []string{"off", "metadata", "falloc", "full"}
	formatFlag(cmd, &g.format, format, formatShort, "format of the new image")
	f.StringVarP(&g.opts.BackingFile, "backing", backingShort, "",
		"backing image: what shows where the new image holds nothing; a relative name starts from the new image's directory")
	formatFlag(cmd, &g.backingFormat, "backing-format", "F", "format of the backing image")
	f.Var(&g.clusterSize, "cluster-size", "qcow2, add-cow: unit of allocation (default 64K)")
	g.compat.addTo(cmd, "compat", "qcow2: oldest QEMU that must understand the image (default 1.1)")
	f.IntVar(&g.opts.RefcountBits, "refcount-bits", 0, "qcow2: width of reference counts, 1 to 64 (default 16)")
	f.BoolVar(&g.opts.LazyRefcounts, "lazy-refcounts", false, "qcow2: let reference counts lag behind, to be repaired after a crash")
	f.BoolVar(&g.opts.ExtendedL2, "extended-l2", false, "qcow2: divide clusters into 32 subclusters")
	g.compression.addTo(cmd, "compression", "qcow2: how clusters are compressed (default zlib)")
	g.preallocation.addTo(cmd, "preallocation", "take space now: metadata (qcow2), falloc, or full (default off)")
	f.StringVar(&g.opts.DataFile, "data-file", "", "qcow2: keep the guest's data in this file")
	f.BoolVar(&g.opts.DataFileRaw, "data-file-raw", false, "qcow2: the data file is a raw image by itself")
	f.BoolVar(&g.opts.Existing, "existing", false, "take a file or device that exists and drop what it holds; otherwise it must not exist")
}

// options are the flags as Create takes them.
func (g *target) options(flags *pflag.FlagSet, formatName, formatShort string) (image.CreateOptions, error) {
	o := g.opts
	if err := needFormat(&g.format, formatName, formatShort, "the new image"); err != nil {
		return o, err
	}
	if o.BackingFile != "" {
		if err := needFormat(&g.backingFormat, "backing-format", "F", "the backing image"); err != nil {
			return o, err
		}
	}
	o.Format, o.BackingFormat, o.Size = g.format.value, g.backingFormat.value, -1
	o.Preallocation = g.preallocation.value
	only := []string{"compat", "refcount-bits", "lazy-refcounts", "extended-l2", "compression", "data-file", "data-file-raw"}
	switch o.Format {
	case image.Raw:
		only = append(only, "backing", "backing-format", "cluster-size")
	case image.Qcow2:
		only = nil
	}
	for _, name := range only {
		if flags.Changed(name) {
			return o, &usageError{fmt.Errorf("--%s is for qcow2 images", name)}
		}
	}
	if o.Format == image.Raw {
		return o, nil
	}
	o.ClusterSize, o.Compression = g.clusterSize.value, g.compression.value
	if g.compat.value != "" {
		o.Version = map[string]int{"0.10": 2, "1.1": 3}[g.compat.value]
	}
	return o, nil
}

func (a *app) imageCreateCmd() *cobra.Command {
	var g target
	imageFormat := choice{value: image.Raw, from: []string{image.Raw}}
	cmd := &cobra.Command{
		Use:   "create -f FORMAT FILE [SIZE]",
		Short: "Create an image",
		Example: `  blkstream image create -f qcow2 disk.qcow2 20G
  blkstream image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  blkstream image create -f add-cow -b base.qcow2 -F qcow2 --image-file /dev/vg/vm1 vm1.add-cow`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := g.options(cmd.Flags(), "format", "f")
			if err != nil {
				return err
			}
			if o.ImageFile != "" && o.Format != image.AddCow {
				return &usageError{errors.New("--image-file is for add-cow images")}
			}
			if len(args) > 1 {
				if o.Size, err = config.ParseSize(args[1]); err != nil {
					return &usageError{err}
				}
			} else if o.BackingFile == "" {
				return &usageError{errors.New("how large? SIZE can only be left out if there is a backing image")}
			}
			a.started = true
			if err := image.Create(cmd.Context(), args[0], o); err != nil {
				return hint(err)
			}
			return a.sayImage(args[0], o.Format, "created")
		},
	}
	g.addTo(cmd, "format", "f", "b")
	cmd.Flags().StringVar(&g.opts.ImageFile, "image-file", "",
		"add-cow: raw file or device for the guest's data, made if it is missing; a relative name starts from the new image's directory")
	imageFormat.addTo(cmd, "image-format", "add-cow: format of the image file")
	return cmd
}

// hint adds the flag that allows what was refused.
func hint(err error) error {
	switch {
	case errors.Is(err, context.Canceled) && errors.Is(err, image.ErrPartial):
		return fmt.Errorf("interrupted; %w", image.ErrPartial)
	case errors.Is(err, context.Canceled):
		return errors.New("interrupted")
	case errors.Is(err, image.ErrInUse):
		return fmt.Errorf("%w (stop that first; for a disk of blkstreamd use `blkstream disk`, copy, stream or commit)", err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w (--existing takes it and drops what it holds)", err)
	case errors.Is(err, image.ErrShrink):
		return fmt.Errorf("%w (--shrink allows it)", err)
	default:
		return err
	}
}

// sayImage prints what an image that was worked on is like now.
func (a *app) sayImage(path, format, done string) error {
	all, err := image.Describe(path, format, false, image.Options{})
	if err != nil {
		return err
	}
	return a.say(all[0], "%s %s: %s, %s", path, done, format, humanSize(all[0].VirtualSize))
}

func (a *app) imageConvertCmd() *cobra.Command {
	var (
		g        target
		from     choice
		compress bool
	)
	cmd := &cobra.Command{
		Use:   "convert -f FORMAT -O FORMAT SOURCE TARGET",
		Short: "Copy an image, with all behind it, into a new one",
		Example: `  blkstream image convert -f qcow2 -O raw vm1.qcow2 vm1.img
  blkstream image convert -f raw -O qcow2 -c --compression zstd vm1.img vm1.qcow2`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&from, "format", "f", "the source"); err != nil {
				return err
			}
			o, err := g.options(cmd.Flags(), "target-format", "O")
			if err != nil {
				return err
			}
			if compress && o.Format != image.Qcow2 {
				return &usageError{errors.New("-c (--compress) is for qcow2 images")}
			}
			a.started = true
			src, err := a.openImage(args[0], from.value)
			if err != nil {
				return err
			}
			defer src.Close() //nolint:errcheck // nothing was written
			if err := apart(src, &o, args[1]); err != nil {
				return err
			}
			progress, stop := a.imageProgress("convert", true)
			err = image.Convert(cmd.Context(), src.Root, args[1], image.ConvertOptions{Target: o, Compress: compress, Progress: progress})
			stop()
			if err != nil {
				return hint(err)
			}
			return a.sayImage(args[1], o.Format, "written")
		},
	}
	formatFlag(cmd, &from, "format", "f", "format of the source")
	cmd.Flags().BoolVarP(&compress, "compress", "c", false, "compress the clusters of the target")
	g.addTo(cmd, "target-format", "O", "B")
	g.format.from = []string{image.Raw, image.Qcow2}
	return cmd
}

// apart refuses a target that the source is read from. The locks would, too, but not say why.
func apart(src *image.Image, o *image.CreateOptions, target string) error {
	names := []string{target}
	if o.DataFile != "" {
		data, err := image.Resolve(target, o.DataFile)
		if err != nil {
			return fmt.Errorf("data file %w", err)
		}
		names = append(names, data)
	}
	for _, name := range names {
		if src.Uses(name) {
			return fmt.Errorf("%q is a file of the source: take another target", name)
		}
	}
	return nil
}

// openImage opens an image with all behind it, for reading.
func (a *app) openImage(path, format string) (*image.Image, error) {
	g, err := image.Open(blk.NewTask(), path, format, image.Options{ReadOnly: true})
	if err != nil {
		return nil, hint(err)
	}
	a.warn(g)
	return g, nil
}

func (a *app) warn(g *image.Image) {
	for _, w := range g.Warnings() {
		fmt.Fprintf(a.err, "warning: %s\n", w)
	}
}

func (a *app) imageResizeCmd() *cobra.Command {
	var (
		format choice
		shrink bool
	)
	cmd := &cobra.Command{
		Use:   "resize -f FORMAT FILE [+|-]SIZE",
		Short: "Give an image another size",
		Long: `Give an image another size. New space reads as zeros. With --shrink the size may
become smaller: what lay beyond it is lost.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&format, "format", "f", args[0]); err != nil {
				return err
			}
			sign := strings.TrimRight(args[1][:min(1, len(args[1]))], "0123456789")
			n, err := config.ParseSize(strings.TrimPrefix(args[1], sign))
			if err != nil || sign != "" && sign != "+" && sign != "-" {
				return &usageError{fmt.Errorf("bad size %q: want a number, or one with K, M, G or T, and + or - before it", args[1])}
			}
			a.started = true
			if err := image.Resize(blk.NewTask(), args[0], format.value, sign, n, shrink); err != nil {
				return hint(err)
			}
			return a.sayImage(args[0], format.value, "resized")
		},
	}
	formatFlag(cmd, &format, "format", "f", "format of the image")
	cmd.Flags().BoolVar(&shrink, "shrink", false, "allow a smaller size; what lies beyond it is lost")
	return cmd
}

// negativeSize moves "-1G", which is a size to "image resize" and would be a flag, behind all flags.
func negativeSize(args []string) []string {
	var rest, sizes []string
	words := 0
	for i, arg := range args {
		if arg == "--" {
			return args
		}
		if (arg == "image" || arg == "resize") && words < 2 {
			words++
		}
		if words == 2 && len(arg) > 1 && arg[0] == '-' && arg[1] >= '0' && arg[1] <= '9' {
			sizes = append(sizes, args[i])
			continue
		}
		rest = append(rest, arg)
	}
	if len(sizes) == 0 {
		return args
	}
	return append(append(rest, "--"), sizes...)
}

func (a *app) imageRebaseCmd() *cobra.Command {
	var (
		format, backingFormat choice
		o                     image.RebaseOptions
	)
	cmd := &cobra.Command{
		Use:   "rebase -f qcow2 -b BACKING -F FORMAT FILE",
		Short: "Give an image another backing image; its contents stay",
		Long: `Give an image another backing image. What the old one shows and the new one does
not is copied into FILE first, so that the disk reads as before. -b "" copies all
and leaves no backing image.

With -u (--unsafe) only the name in FILE changes: for a backing image that was
moved or renamed, or, without -b, to record its format.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&format, "format", "f", args[0]); err != nil {
				return err
			}
			o.KeepName = !cmd.Flags().Changed("backing")
			o.Format = backingFormat.value
			switch {
			case format.value != image.Qcow2:
				return &usageError{errors.New("only a qcow2 image can be given another backing image")}
			case o.KeepName && (!o.Unsafe || o.Format == ""):
				return &usageError{errors.New(`which backing image? Say it with -b (--backing) FILE, or -b "" for none`)}
			case o.Path != "":
				if err := needFormat(&backingFormat, "backing-format", "F", "the backing image"); err != nil {
					return err
				}
			}
			a.started = true
			var stop func()
			o.Progress, stop = a.imageProgress("rebase", true)
			err := image.Rebase(cmd.Context(), args[0], o)
			stop()
			if err != nil {
				return hint(err)
			}
			return a.sayImage(args[0], format.value, "rebased")
		},
	}
	formatFlag(cmd, &format, "format", "f", "format of the image")
	f := cmd.Flags()
	f.StringVarP(&o.Path, "backing", "b", "", `the new backing image; "": none`)
	formatFlag(cmd, &backingFormat, "backing-format", "F", "format of the new backing image")
	f.BoolVarP(&o.Unsafe, "unsafe", "u", false, "change the name only and copy nothing")
	return cmd
}

// imageProgress returns a bar on a terminal. Elsewhere there is nothing to see. inBytes says that this is what counts.
func (a *app) imageProgress(name string, inBytes bool) (image.Progress, func()) {
	if !a.isTerminal(a.err) {
		return nil, func() {}
	}
	return newImageBar(a.err, name, inBytes)
}

func newImageBar(w io.Writer, name string, inBytes bool, options ...mpb.ContainerOption) (image.Progress, func()) {
	container := mpb.New(append(options, mpb.WithOutput(w))...)
	bar := container.AddBar(0,
		mpb.PrependDecorators(decor.Name(name+" ")),
		mpb.AppendDecorators(decor.Any(func(s decor.Statistics) string {
			if s.Total <= 0 {
				return ""
			}
			text := fmt.Sprintf(" %d%%", int(100*float64(s.Current)/float64(s.Total)))
			if inBytes {
				text += fmt.Sprintf(" %s of %s", humanSize(s.Current), humanSize(s.Total))
			}
			return text
		})))
	return func(done, total int64) {
			bar.SetTotal(max(total, 1), false)
			bar.SetCurrent(done)
		}, func() {
			fmt.Fprint(w, "\r") // the terminal shows ^C where the last picture would begin
			bar.Abort(false)    // leaves the last picture
			container.Wait()
		}
}
