// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/blkstream/blkstream/blk"
	"github.com/blkstream/blkstream/blk/file"
	"github.com/blkstream/blkstream/blk/qcow2"
)

// chainDepths are how many images the disk of the chains section lies in.
var chainDepths = []int{1, 64, 500}

// chains compares random reads of one disk that lies in a single image, and spread over the images of long chains. The
// files are on tmpfs, so that what the chain costs is not hidden behind a device.
func (b *bench) chains() (err error) {
	if !b.only.MatchString("chain") {
		return nil
	}
	const size = 256 << 20
	dir := filepath.Join(b.shm, "chain")
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tops := make([]string, len(chainDepths))
	for i, depth := range chainDepths {
		if tops[i], err = buildChain(filepath.Join(dir, fmt.Sprint(depth)), depth, size); err != nil {
			return err
		}
	}
	for _, depth := range []int{1, 32} {
		iops, cpu := make([][]float64, len(tops)), make([][]float64, len(tops))
		for range b.runs {
			for i, top := range tops {
				s, err := b.blkstreamd(top, "qcow2", "writeback")
				if err != nil {
					return err
				}
				// The first reads make the map, of 500 images for half a second.
				if _, err = b.load(s, "randread", "4k", depth, 2*time.Second); err != nil {
					s.stop()
					return err
				}
				r, err := b.load(s, "randread", "4k", depth, b.length)
				s.stop()
				if err != nil {
					return err
				}
				iops[i], cpu[i] = append(iops[i], r.IOPS), append(cpu[i], r.CPU)
			}
		}
		if depth == 1 {
			fmt.Printf("\nrandom 4k reads of a disk of 256M that is spread over a chain of images on tmpfs\n")
			fmt.Printf("%6s %7s %9s %18s %8s\n", "depth", "images", "IOPS", "ratio to 1 image", "CPU us")
		}
		for i, n := range chainDepths {
			fmt.Printf("%6d %7d %9.0f %18.2f %8.1f\n", depth, n, median(iops[i]), median(iops[i])/median(iops[0]), median(cpu[i]))
		}
	}
	return nil
}

// buildChain spreads the clusters of a disk over so many images and returns the first one's path.
func buildChain(dir string, images int, size int64) (path string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	const cluster = 64 << 10
	of := make([][]int64, images) // offsets
	rng := rand.New(rand.NewPCG(1, 2))
	for off := int64(0); off < size; off += cluster {
		i := rng.IntN(images)
		of[i] = append(of[i], off)
	}
	t, data := blk.NewTask(), make([]byte, cluster)
	for i := range data {
		data[i] = byte(i*7 + 1)
	}
	for i, offsets := range of {
		o := qcow2.CreateOptions{Size: size}
		if i > 0 {
			o.BackingFile, o.BackingFormat = filepath.Base(path), "qcow2"
		}
		path = filepath.Join(dir, fmt.Sprintf("%d.qcow2", i))
		if err := writeLayer(t, path, o, data, offsets); err != nil {
			return "", err
		}
	}
	return path, nil
}

// writeLayer makes an image with data at the offsets.
func writeLayer(t *blk.Task, path string, o qcow2.CreateOptions, data []byte, offsets []int64) (err error) {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	f, err := file.Open(path, file.Options{Grows: true})
	if err != nil {
		return err
	}
	var n io.Closer = f
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := qcow2.Create(t, f, o); err != nil {
		return err
	}
	image, err := qcow2.Open(t, f, qcow2.Options{Name: path})
	if err != nil {
		return err
	}
	n = image
	for _, off := range offsets {
		r := &blk.Request{Op: blk.OpWrite, Off: off, Len: int64(len(data)), Data: blk.BytesVec(nil, data)}
		if err := blk.Do(t, image, r); err != nil {
			return err
		}
	}
	return nil
}
