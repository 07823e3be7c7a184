// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/blkstream/blkstream/copy/control"
)

// progress shows a job while somebody waits for it.
type progress interface {
	update(job *control.Job)
	stop()
}

// progress returns what suits w: a bar on a terminal, else a line now and then.
func (a *app) progress(w io.Writer) progress {
	if a.isTerminal(w) {
		return newBar(w)
	}
	return &lines{w: w, now: a.now}
}

// describe is a job's progress in one line, without its name.
func describe(job *control.Job) string {
	if job.Stage == "" && job.State == stateRunning {
		return "starting"
	}
	parts := []string{fmt.Sprintf("%s %d%%", job.Stage, percent(job)), doneOfTotal(job)}
	return strings.Join(append(parts, details(job)...), ", ")
}

func doneOfTotal(job *control.Job) string {
	return humanSize(job.BytesDone) + " of " + humanSize(job.BytesTotal)
}

// details is what there is to say beyond how much is done, the most important
// first: a narrow terminal cuts the end off.
func details(job *control.Job) []string {
	var parts []string
	copying := job.Stage == stageBulk || job.Stage == stageDirty
	switch {
	case job.State != stateRunning:
		parts = append(parts, standing(job))
	case copying && !job.Converging:
		parts = append(parts, neverEnds(job))
	case job.EtaSeconds >= 0:
		parts = append(parts, humanDuration(job.EtaSeconds)+" left")
	}
	if job.State == stateRunning && job.Rate > 0 {
		parts = append(parts, humanSize(job.Rate)+"/s")
	}
	if copying && job.DirtyRate > 0 {
		parts = append(parts, "guest dirties "+humanSize(job.DirtyRate)+"/s")
	}
	if job.Verify && job.VerifiedBytes > 0 {
		parts = append(parts, humanSize(job.VerifiedBytes)+" verified")
	}
	return parts
}

// standing is a job's state, what to do if it waits for somebody, and what went wrong.
func standing(job *control.Job) string {
	s := job.State
	if (job.State == statePaused || job.State == stateReady) && job.Message != "" {
		s += "; " + job.Message
	}
	if job.Error != "" {
		s += ": " + job.Error
	}
	return s
}

func neverEnds(job *control.Job) string {
	s := "WILL NOT FINISH at this rate"
	if job.Speed > 0 {
		s += " (blkstream job speed " + job.Id + " RATE raises the limit)"
	}
	return s
}

// percent is 100 only when nothing remains.
func percent(job *control.Job) int {
	if job.BytesDone >= job.BytesTotal {
		if job.State == stateRunning && job.BytesTotal == 0 {
			return 0 // nothing is known yet
		}
		return 100
	}
	return min(99, max(0, int(100*float64(job.BytesDone)/float64(job.BytesTotal))))
}

// lineInterval is the time between lines when nothing changes but numbers.
const lineInterval = 10 * time.Second

// lines prints progress for logs.
type lines struct {
	w     io.Writer
	now   func() time.Time
	last  time.Time
	state string // stage, state and error of the last line
}

func (l *lines) update(job *control.Job) {
	state := fmt.Sprint(job.Stage, job.State, job.Error, job.Converging)
	now := l.now()
	if state == l.state && now.Sub(l.last) < lineInterval {
		return
	}
	l.state, l.last = state, now
	fmt.Fprintf(l.w, "%s: %s\n", job.Id, describe(job))
}

func (l *lines) stop() {}

// bar draws two lines on a terminal: the bar, and rates and time below it.
type bar struct {
	w         io.Writer
	container *mpb.Progress
	bar       *mpb.Bar
	job       atomic.Pointer[control.Job] // read by the drawing goroutine
}

func newBar(w io.Writer, options ...mpb.ContainerOption) *bar {
	b := &bar{w: w, container: mpb.New(append(options, mpb.WithOutput(w))...)}
	b.job.Store(&control.Job{State: stateRunning})
	text := func(fn func(*control.Job) string) decor.Decorator {
		return decor.Any(func(decor.Statistics) string { return fn(b.job.Load()) })
	}
	below := mpb.BarFillerFunc(func(w io.Writer, stat decor.Statistics) error {
		s := strings.Join(details(b.job.Load()), ", ")
		// A line that wraps would confuse the next drawing.
		if r := []rune(s); stat.AvailableWidth > 3 && len(r) > stat.AvailableWidth {
			s = string(r[:stat.AvailableWidth-1]) + "…"
		}
		_, err := fmt.Fprintln(w, s)
		return err
	})
	b.bar = b.container.AddBar(0, // no total, so that it does not end by itself
		mpb.PrependDecorators(text(func(j *control.Job) string { return fmt.Sprintf("%s %s ", j.Id, j.Stage) })),
		mpb.AppendDecorators(text(func(j *control.Job) string { return fmt.Sprintf(" %d%% %s", percent(j), doneOfTotal(j)) })),
		mpb.BarExtender(below, false))
	return b
}

func (b *bar) update(job *control.Job) {
	b.job.Store(job)
	b.bar.SetTotal(max(job.BytesTotal, 1), false)
	b.bar.SetCurrent(job.BytesDone)
}

func (b *bar) stop() {
	fmt.Fprint(b.w, "\r") // the terminal shows ^C where the last picture would begin
	b.bar.Abort(false)    // leaves the last picture
	b.container.Wait()
}

// jsonProgress prints every event as a line of JSON.
type jsonProgress struct{ a *app }

func (p jsonProgress) update(job *control.Job) { _ = p.a.printJSON(toJSONJob(job)) }
func (p jsonProgress) stop()                   {}
