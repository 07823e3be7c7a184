// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/blkstream/blkstream/blk/image"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// The image commands that only look. Where qemu-img prints the same as JSON the keys are the same.

func (a *app) imageInfoCmd() *cobra.Command {
	var format choice
	whole, share := true, false
	cmd := &cobra.Command{
		Use:   "info -f FORMAT FILE",
		Short: "Describe an image and the images behind it",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := needFormat(&format, "format", "f", args[0]); err != nil {
				return err
			}
			a.started = true
			// What could be found out is shown in any case.
			all, err := image.Describe(args[0], format.value, whole, image.Options{Unlocked: share})
			if err = hint(err); !share && errors.Is(err, image.ErrInUse) {
				err = fmt.Errorf("%w; or look all the same, with -U", err)
			}
			switch {
			case len(all) == 0:
				return err
			case !a.json:
				return errors.Join(a.printImages(all), err)
			case whole:
				return errors.Join(a.printJSON(all), err)
			default:
				return errors.Join(a.printJSON(all[0]), err)
			}
		},
	}
	formatFlag(cmd, &format, "format", "f", "format of the image")
	cmd.Flags().BoolVar(&whole, "chain", true, "describe the images behind it too; JSON is an array then")
	cmd.Flags().BoolVarP(&share, "force-share", "U", false, "look though a program may be writing to the image, such as a running disk's")
	return cmd
}

func (a *app) printImages(all []image.Info) error {
	for i := range all {
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		if err := a.printImage(&all[i]); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) printImage(i *image.Info) error {
	t := newTable(a.out)
	t.row("image:", i.Filename)
	t.row("format:", i.Format)
	t.row("virtual size:", fmt.Sprintf("%s (%d bytes)", humanSize(i.VirtualSize), i.VirtualSize))
	t.row("on the host:", humanSize(i.ActualSize))
	if i.Specific == nil {
		return t.Flush()
	}
	if i.BackingFilename != "" {
		name := i.BackingFilename
		if i.FullBacking != name && i.FullBacking != "" {
			name += " (" + i.FullBacking + ")"
		}
		t.row("backing image:", name)
		format := i.BackingFormat
		if format == "" {
			format = "not recorded"
		}
		t.row("backing format:", format)
	}
	t.row("cluster size:", humanSize(i.ClusterSize))
	switch specific := i.Specific.Data.(type) {
	case *image.AddCowInfo:
		t.row("image file:", specific.ImageFile)
		t.row("image file's format:", specific.ImageFormat)
		t.row("all allocated:", yesNo(specific.AllAllocated))
	case *image.Qcow2Info:
		printQcow2(t, i, specific)
	}
	return t.Flush()
}

func printQcow2(t table, i *image.Info, q *image.Qcow2Info) {
	t.row("compat:", q.Compat)
	t.row("compression:", q.Compression)
	t.row("refcount bits:", fmt.Sprint(q.RefcountBits))
	for _, f := range []struct {
		name string
		set  *bool
	}{{"lazy refcounts:", q.LazyRefcounts}, {"extended L2:", q.ExtendedL2}} {
		if f.set != nil {
			t.row(f.name, yesNo(*f.set))
		}
	}
	if q.DataFile != "" {
		t.row("data file:", q.DataFile)
		t.row("data file is raw:", yesNo(*q.DataFileRaw))
	}
	for _, s := range i.Snapshots {
		t.row("snapshot:", fmt.Sprintf("%s %q, %s, %s of state",
			s.ID, s.Name, time.Unix(int64(s.Seconds), 0).Format(time.DateTime), humanSize(s.VMStateSize)))
	}
	for _, b := range q.Bitmaps {
		t.row("bitmap:", fmt.Sprintf("%q, %s a bit, %s", b.Name, humanSize(b.Granularity), strings.Join(b.Flags, ", ")))
	}
	if i.Dirty {
		t.row("dirty:", "yes: it was not closed, its reference counts are repaired when it is opened for writing")
	}
	if q.Corrupt != nil && *q.Corrupt {
		t.row("corrupt:", "yes: it takes no writes until it is repaired")
	}
}

// jsonCheck has qemu-img's keys.
type jsonCheck struct {
	Filename           string   `json:"filename"`
	Format             string   `json:"format"`
	CheckErrors        int64    `json:"check-errors"`
	Corruptions        int64    `json:"corruptions"`
	Leaks              int64    `json:"leaks"`
	CorruptionsFixed   int64    `json:"corruptions-fixed"`
	LeaksFixed         int64    `json:"leaks-fixed"`
	TotalClusters      int64    `json:"total-clusters"`
	AllocatedClusters  int64    `json:"allocated-clusters"`
	FragmentedClusters int64    `json:"fragmented-clusters"`
	CompressedClusters int64    `json:"compressed-clusters"`
	ImageEndOffset     int64    `json:"image-end-offset"`
	Findings           []string `json:"findings"`
}

// Statuses of check and compare beside those of all commands: qemu-img's, where those leave room.
const (
	exitLeaks   = 3 // check: and nothing worse
	exitNoCheck = 63
	exitUnread  = 4 // compare: who takes images for different must not do so because one could not be read
)

func (a *app) imageCheckCmd() *cobra.Command {
	var format choice
	repair := choice{from: []string{"leaks", "all"}}
	cmd := &cobra.Command{
		Use:   "check -f FORMAT FILE",
		Short: "Look for errors in an image's tables, and repair them",
		Long: `Look for errors in an image's tables, and repair them.

Exit status: 0 the image is clean, or is after the repair; 1 there are errors,
or it could not be checked; 3 there are leaks: space is lost, no data; 63 images
of this format have nothing to check.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&format, "format", "f", args[0]); err != nil {
				return err
			}
			a.started = true
			mode := map[string]qcow2.Repair{"leaks": qcow2.RepairLeaks, "all": qcow2.RepairAll}[repair.value]
			progress, stop := a.imageProgress("check", false)
			r, err := image.Check(cmd.Context(), args[0], format.value, mode, nil, progress)
			stop()
			switch {
			case errors.Is(err, image.ErrNoCheck):
				return &statusError{exitNoCheck, err}
			case err != nil:
				return hint(err)
			}
			return errors.Join(a.printCheck(args[0], format.value, &r), checkStatus(&r))
		},
	}
	formatFlag(cmd, &format, "format", "f", "format of the image")
	repair.addToP(cmd, "repair", "r", "leaks: give lost space back; all: correct errors too, with the risk of repairing them wrongly")
	return cmd
}

func checkStatus(r *qcow2.CheckResult) error {
	switch {
	case r.Errors > 0:
		return &statusError{status: exitFailed}
	case r.Leaks > 0:
		return &statusError{status: exitLeaks}
	default:
		return nil
	}
}

func count(n int64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func (a *app) printCheck(path, format string, r *qcow2.CheckResult) error {
	if a.json {
		j := jsonCheck{
			Filename: path, Format: format, Corruptions: r.Errors, Leaks: r.Leaks,
			CorruptionsFixed: r.ErrorsFixed, LeaksFixed: r.LeaksFixed,
			TotalClusters: r.TotalClusters, AllocatedClusters: r.AllocatedClusters,
			FragmentedClusters: r.FragmentedClusters, CompressedClusters: r.CompressedClusters,
			ImageEndOffset: r.ImageEnd, Findings: []string{},
		}
		for _, f := range r.Findings {
			j.Findings = append(j.Findings, f.String())
		}
		return a.printJSON(j)
	}
	for _, f := range r.Findings {
		kind := "error"
		if f.Leak {
			kind = "leak"
		}
		fmt.Fprintf(a.out, "%s at %v\n", kind, f)
	}
	if all := r.Errors + r.Leaks + r.ErrorsFixed + r.LeaksFixed; int64(len(r.Findings)) < all {
		fmt.Fprintf(a.out, "… and %d more\n", all-int64(len(r.Findings)))
	}
	if r.ErrorsFixed+r.LeaksFixed > 0 {
		fmt.Fprintf(a.out, "repaired: %s, %s\n", count(r.ErrorsFixed, "error"), count(r.LeaksFixed, "leak"))
	}
	if r.Errors > 0 {
		fmt.Fprintf(a.out, "%s: data may be damaged, or become so by further writes\n", count(r.Errors, "error"))
	}
	if r.Leaks > 0 {
		fmt.Fprintf(a.out, "%s: space is lost, no data\n", count(r.Leaks, "leaked cluster"))
	}
	if r.Errors+r.Leaks == 0 {
		fmt.Fprintln(a.out, "no errors")
	}
	share := func(n, of int64) string { return fmt.Sprintf("%d (%.2f%%)", n, 100*float64(n)/float64(max(of, 1))) }
	fmt.Fprintf(a.out, "clusters: %s of %d allocated, %s of them fragmented, %s compressed\n",
		share(r.AllocatedClusters, r.TotalClusters), r.TotalClusters,
		share(r.FragmentedClusters, r.AllocatedClusters), share(r.CompressedClusters, r.AllocatedClusters))
	_, err := fmt.Fprintf(a.out, "image end: %d\n", r.ImageEnd)
	return err
}

func (a *app) imageMapCmd() *cobra.Command {
	var format choice
	cmd := &cobra.Command{
		Use:   "map -f FORMAT FILE",
		Short: "Show which image of the chain, and which place in it, holds what",
		Long: `Show which image of the chain, and which place in it, holds what. Without --json
only data is listed, not what reads as zeros.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&format, "format", "f", args[0]); err != nil {
				return err
			}
			a.started = true
			show := a.mapTable
			if a.json {
				show = mapJSON
			}
			return hint(show(a.out, func(fn func(image.Segment) error) error {
				return image.Map(cmd.Context(), args[0], format.value, image.Options{}, fn)
			}))
		},
	}
	formatFlag(cmd, &format, "format", "f", "format of the image")
	return cmd
}

func (a *app) mapTable(w io.Writer, segments func(func(image.Segment) error) error) error {
	t := newTable(w, "OFFSET", "LENGTH", "MAPPED TO", "FILE")
	err := segments(func(s image.Segment) error {
		if !s.Data || s.Zero {
			return nil
		}
		at := "compressed"
		if s.Offset != nil {
			at = fmt.Sprintf("%#x", *s.Offset)
		}
		t.row(fmt.Sprintf("%#x", s.Start), fmt.Sprintf("%#x", s.Length), at, s.File)
		return nil
	})
	if err != nil {
		return err // half a map must not pass for a whole one
	}
	return t.Flush()
}

// mapJSON prints one array, a line for each element as it is found.
func mapJSON(w io.Writer, segments func(func(image.Segment) error) error) error {
	before := "["
	err := segments(func(s image.Segment) error {
		line, err := json.Marshal(s)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s%s", before, line)
		before = ",\n"
		return err
	})
	if err != nil {
		return err // and no valid document
	}
	if before == "[" {
		_, err = fmt.Fprint(w, before)
	}
	_, perr := fmt.Fprintln(w, "]")
	return errors.Join(err, perr)
}

type jsonCompare struct {
	Identical   bool     `json:"identical"`
	Offset      *int64   `json:"offset,omitempty"` // of the first byte that differs
	VirtualSize [2]int64 `json:"virtual-sizes"`
}

func (a *app) imageCompareCmd() *cobra.Command {
	var (
		formatA, formatB choice
		strict           bool
	)
	cmd := &cobra.Command{
		Use:   "compare -f FORMAT -F FORMAT A B",
		Short: "Compare what two images read as",
		Long: `Compare what two images read as. Where the shorter one has ended the longer one
must have zeros.

Exit status: 0 they are the same; 1 they differ; 4 one could not be read.`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := needFormat(&formatA, "format-a", "f", args[0]); err != nil {
				return err
			}
			if err := needFormat(&formatB, "format-b", "F", args[1]); err != nil {
				return err
			}
			a.started = true
			x, err := a.openImage(args[0], formatA.value)
			if err != nil {
				return &statusError{exitUnread, err}
			}
			defer x.Close() //nolint:errcheck // nothing was written
			y, err := a.openImage(args[1], formatB.value)
			if err != nil {
				return &statusError{exitUnread, err}
			}
			defer y.Close() //nolint:errcheck // nothing was written
			progress, stop := a.imageProgress("compare", true)
			d, err := image.Compare(cmd.Context(), x.Root, y.Root, progress)
			stop()
			if err != nil {
				return &statusError{exitUnread, hint(err)}
			}
			return a.printCompare(d, x.Root.Info().Size, y.Root.Info().Size, strict)
		},
	}
	formatFlag(cmd, &formatA, "format-a", "f", "format of A")
	formatFlag(cmd, &formatB, "format-b", "F", "format of B")
	cmd.Flags().BoolVarP(&strict, "strict", "s", false, "their sizes must be the same too")
	return cmd
}

func (a *app) printCompare(d image.Difference, sizeA, sizeB int64, strict bool) error {
	same := d.Same && (sizeA == sizeB || !strict)
	var err error
	switch {
	case a.json:
		j := jsonCompare{Identical: same, VirtualSize: [2]int64{sizeA, sizeB}}
		if !d.Same {
			j.Offset = &d.Offset
		}
		err = a.printJSON(j)
	case !d.Same:
		_, err = fmt.Fprintf(a.out, "the images differ at offset %d\n", d.Offset)
	case sizeA != sizeB:
		_, err = fmt.Fprintf(a.out, "the sizes differ, %d and %d bytes; the longer image has zeros there\n", sizeA, sizeB)
	default:
		_, err = fmt.Fprintln(a.out, "the images are identical")
	}
	if !same {
		return errors.Join(err, &statusError{status: exitFailed})
	}
	return err
}
