// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/blkstream/blkstream/copy/control"
)

// The JSON documents. Keys and types are kept stable; protojson would print
// 64-bit numbers as strings.

type jsonVersion struct {
	Client string `json:"client"`
	Daemon string `json:"daemon"`
}

type jsonID struct {
	ID string `json:"id"`
}

type jsonSwitch struct {
	Job     jsonJob `json:"job"`
	Message string  `json:"message"`
}

type jsonStats struct {
	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"`
	BytesRead    uint64 `json:"bytes_read"`
	BytesWritten uint64 `json:"bytes_written"`
	Errors       uint64 `json:"errors"`
}

type jsonDisk struct {
	ID              string    `json:"id"`
	Image           string    `json:"image"`
	Format          string    `json:"format"`
	ConfiguredImage string    `json:"configured_image"`
	Socket          string    `json:"socket"`
	Size            int64     `json:"size"`
	Queues          uint32    `json:"queues"`
	QueueSize       uint32    `json:"queue_size"`
	ReadOnly        bool      `json:"read_only"`
	Cache           string    `json:"cache"`
	BlockSize       uint32    `json:"block_size"`
	Serial          string    `json:"serial"`
	State           string    `json:"state"`
	Warning         string    `json:"warning"`
	Graph           string    `json:"graph"`
	Jobs            []string  `json:"jobs"`
	Stats           jsonStats `json:"stats"`

	CopyOnRead bool             `json:"copy_on_read"`
	Chain      []jsonChainImage `json:"chain"`
}

type jsonChainImage struct {
	Image     string         `json:"image"`
	Format    string         `json:"format"`
	Size      int64          `json:"size"`
	Allocated int64          `json:"allocated"`
	Jobs      []jsonChainJob `json:"jobs"`
}

type jsonChainJob struct {
	ID     string `json:"id"`
	Kind   string `json:"kind"`
	Role   string `json:"role"`
	Target string `json:"target"`
}

type jsonJob struct {
	ID               string `json:"id"`
	Kind             string `json:"kind"`
	Disk             string `json:"disk"`
	Source           string `json:"source"`
	Target           string `json:"target"`
	Format           string `json:"format"`
	Method           string `json:"method"`
	Base             string `json:"base"`
	Stage            string `json:"stage"`
	State            string `json:"state"`
	Error            string `json:"error"`
	Message          string `json:"message"`
	BytesDone        int64  `json:"bytes_done"`
	BytesTotal       int64  `json:"bytes_total"`
	Rate             int64  `json:"rate"`
	DirtyRate        int64  `json:"dirty_rate"`
	EtaSeconds       int64  `json:"eta_seconds"`
	Converging       bool   `json:"converging"`
	Speed            int64  `json:"speed"`
	Granularity      int64  `json:"granularity"`
	TargetConsistent bool   `json:"target_consistent"`
	Verify           bool   `json:"verify"`
	VerifiedBytes    int64  `json:"verified_bytes"`
	StartedMs        int64  `json:"started_ms"`
	EndedMs          int64  `json:"ended_ms"`
	SwitchMode       string `json:"switch_mode"`
	OnSourceError    string `json:"on_source_error"`
	OnTargetError    string `json:"on_target_error"`
	Bitmap           string `json:"bitmap"`
	Full             bool   `json:"full"`
	OnCBWError       string `json:"on_cbw_error"`
}

func toJSONDisk(d *control.Disk) jsonDisk {
	s := d.GetStats()
	chain := each(d.Chain, func(m *control.ChainImage) jsonChainImage {
		return jsonChainImage{Image: m.Image, Format: m.Format, Size: m.Size, Allocated: m.Allocated, Jobs: each(m.Jobs,
			func(j *control.ChainJob) jsonChainJob {
				return jsonChainJob{ID: j.Id, Kind: j.Kind, Role: j.Role, Target: j.Target}
			})}
	})
	return jsonDisk{
		ID: d.Id, Image: d.Image, Format: d.Format, ConfiguredImage: d.ConfiguredImage,
		Socket: d.Socket, Size: d.Size, Queues: d.Queues, QueueSize: d.QueueSize,
		ReadOnly: d.ReadOnly, Cache: d.Cache, BlockSize: d.BlockSize, Serial: d.Serial,
		State: d.State, Warning: d.Warning, Graph: d.Graph,
		Jobs: append([]string{}, d.Jobs...), CopyOnRead: d.CopyOnRead, Chain: chain,
		Stats: jsonStats{
			Reads: s.GetReads(), Writes: s.GetWrites(), Flushes: s.GetFlushes(),
			BytesRead: s.GetBytesRead(), BytesWritten: s.GetBytesWritten(), Errors: s.GetErrors(),
		},
	}
}

func toJSONJob(j *control.Job) jsonJob {
	return jsonJob{
		ID: j.GetId(), Kind: j.GetKind(), Disk: j.GetDisk(), Source: j.GetSource(), Target: j.GetTarget(),
		Format: j.GetFormat(), Method: j.GetMethod(), Base: j.GetBase(), Stage: j.GetStage(), State: j.GetState(),
		Error: j.GetError(), Message: j.GetMessage(), BytesDone: j.GetBytesDone(), BytesTotal: j.GetBytesTotal(),
		Rate: j.GetRate(), DirtyRate: j.GetDirtyRate(), EtaSeconds: j.GetEtaSeconds(), Converging: j.GetConverging(),
		Speed: j.GetSpeed(), Granularity: j.GetGranularity(), TargetConsistent: j.GetTargetConsistent(),
		Verify: j.GetVerify(), VerifiedBytes: j.GetVerifiedBytes(), StartedMs: j.GetStartedMs(), EndedMs: j.GetEndedMs(),
		SwitchMode: j.GetSwitchMode(), OnSourceError: j.GetOnSourceError(), OnTargetError: j.GetOnTargetError(),
		Bitmap: j.GetBitmap(), Full: j.GetFull(), OnCBWError: j.GetOnCbwError(),
	}
}

func (a *app) printJSON(v any) error { return json.NewEncoder(a.out).Encode(v) }

// each is what fn makes of all of them: [] and not null in JSON, if there are none.
func each[T, U any](all []T, fn func(T) U) []U {
	docs := []U{}
	for _, v := range all {
		docs = append(docs, fn(v))
	}
	return docs
}

// say prints the document, or the line for people.
func (a *app) say(doc any, format string, args ...any) error {
	if a.json {
		return a.printJSON(doc)
	}
	_, err := fmt.Fprintf(a.out, format+"\n", args...)
	return err
}

func (a *app) printDisks(disks []*control.Disk) error {
	if a.json {
		return a.printJSON(each(disks, toJSONDisk))
	}
	t := newTable(a.out, "ID", "STATE", "SIZE", "FORMAT", "IMAGE", "JOBS")
	for _, d := range disks {
		t.row(d.Id, d.State, humanSize(d.Size), d.Format, d.Image, strings.Join(d.Jobs, ","))
	}
	err := t.Flush()
	for _, d := range disks {
		if d.Warning != "" {
			fmt.Fprintf(a.err, "warning: %s: %s\n", d.Id, d.Warning)
		}
	}
	return err
}

func (a *app) printDisk(d *control.Disk) error {
	if a.json {
		return a.printJSON(toJSONDisk(d))
	}
	s := d.GetStats()
	t := newTable(a.out)
	t.row("id:", d.Id)
	t.row("state:", d.State)
	if d.Warning != "" {
		t.row("warning:", d.Warning)
	}
	t.row("image:", d.Image)
	if d.ConfiguredImage != "" && d.ConfiguredImage != d.Image {
		t.row("configured image:", d.ConfiguredImage)
	}
	t.row("format:", d.Format)
	t.row("size:", fmt.Sprintf("%s (%d bytes)", humanSize(d.Size), d.Size))
	t.row("socket:", d.Socket)
	t.row("read-only:", yesNo(d.ReadOnly))
	t.row("cache:", d.Cache)
	t.row("copy on read:", onOff(d.CopyOnRead))
	t.row("queues:", fmt.Sprintf("%d of %d entries", d.Queues, d.QueueSize))
	t.row("block size:", fmt.Sprint(d.BlockSize))
	t.row("serial:", d.Serial)
	t.row("jobs:", strings.Join(d.Jobs, ", "))
	t.row("reads:", fmt.Sprintf("%d (%s)", s.GetReads(), humanSize(int64(s.GetBytesRead()))))
	t.row("writes:", fmt.Sprintf("%d (%s)", s.GetWrites(), humanSize(int64(s.GetBytesWritten()))))
	t.row("flushes:", fmt.Sprint(s.GetFlushes()))
	t.row("errors:", fmt.Sprint(s.GetErrors()))
	err := errors.Join(t.Flush(), a.printChain(d.Chain))
	if err != nil || d.Graph == "" {
		return err
	}
	_, err = fmt.Fprintf(a.out, "\n%s\n", strings.TrimRight(d.Graph, "\n"))
	return err
}

// maxIndent bounds how far to the right a deep chain is drawn.
const maxIndent = 8

// printChain draws the chain with the guest's image on top.
func (a *app) printChain(chain []*control.ChainImage) error {
	if len(chain) == 0 {
		return nil
	}
	fmt.Fprintln(a.out)
	places := map[string]int{}
	for i, m := range chain {
		places[m.Image] = i
	}
	t := newTable(a.out, "#", "IMAGE", "FORMAT", "SIZE", "ALLOCATED", "JOBS")
	for i, m := range chain {
		name, jobs := m.Image, []string{}
		if i > 0 {
			name = strings.Repeat("  ", min(i-1, maxIndent)) + "└─" + name
		}
		for _, j := range m.Jobs {
			jobs = append(jobs, chainJob(j, places))
		}
		held := "?"
		if m.Allocated >= 0 {
			held = humanSize(m.Allocated)
		}
		t.row(fmt.Sprint(i), name, m.Format, humanSize(m.Size), held, strings.Join(jobs, "; "))
	}
	return t.Flush()
}

// chainJob says in words what a job does with an image.
func chainJob(j *control.ChainJob, places map[string]int) string {
	verb := "copies"
	if j.Kind == "commit" {
		verb = "merges"
	}
	switch i, in := places[j.Target]; {
	case j.Role == "target":
		return fmt.Sprintf("%s %s into it", j.Id, verb)
	case j.Role == "base":
		return fmt.Sprintf("%s keeps it as the base", j.Id)
	case in:
		return fmt.Sprintf("%s %s it into #%d", j.Id, verb, i)
	default:
		return fmt.Sprintf("%s %s it to %s (not in the chain)", j.Id, verb, j.Target)
	}
}

func (a *app) printJobs(jobs []*control.Job) error {
	if a.json {
		return a.printJSON(each(jobs, toJSONJob))
	}
	t := newTable(a.out, "ID", "DISK", "STATE", "STAGE", "DONE", "RATE", "LEFT", "TARGET")
	for _, j := range jobs {
		rate, left := "", ""
		if j.State == stateRunning {
			rate, left = humanSize(j.Rate)+"/s", humanLeft(j)
		}
		t.row(j.Id, j.Disk, j.State, j.Stage, fmt.Sprintf("%d%%", percent(j)), rate, left, j.Target)
	}
	err := t.Flush()
	for _, j := range jobs {
		if j.Error != "" {
			fmt.Fprintf(a.err, "%s: %s\n", j.Id, standing(j))
		}
	}
	return err
}

func (a *app) printJob(j *control.Job) error {
	if a.json {
		return a.printJSON(toJSONJob(j))
	}
	t := newTable(a.out)
	t.row("id:", j.Id)
	t.row("kind:", j.Kind)
	t.row("disk:", j.Disk)
	t.row("state:", j.State)
	t.row("stage:", j.Stage)
	if j.Error != "" {
		t.row("error:", j.Error)
	}
	if j.Message != "" {
		t.row("message:", j.Message)
	}
	t.row("source:", j.Source)
	t.row("target:", fmt.Sprintf("%s (%s)", j.Target, j.Format))
	t.row("target consistent:", yesNo(j.TargetConsistent))
	t.row("done:", fmt.Sprintf("%d%%, %s", percent(j), doneOfTotal(j)))
	if j.State == stateRunning {
		t.row("rate:", humanSize(j.Rate)+"/s")
		t.row("guest dirties:", humanSize(j.DirtyRate)+"/s")
		t.row("time left:", humanLeft(j))
	}
	t.row("limit:", humanLimit(j.Speed))
	t.row("granularity:", humanSize(j.Granularity))
	t.row("method:", j.Method)
	if j.Base != "" {
		t.row("shared base:", j.Base)
	}
	t.row("switch:", j.SwitchMode)
	verify := yesNo(j.Verify)
	if j.Verify {
		verify = humanSize(j.VerifiedBytes) + " done"
	}
	t.row("verify:", verify)
	t.row("on source error:", j.OnSourceError)
	t.row("on target error:", j.OnTargetError)
	if j.Kind == kindBackup {
		t.row("on copy-before-write error:", j.OnCbwError)
		if j.Bitmap != "" && j.Full {
			t.row("bitmap:", j.Bitmap+", which begins anew")
		} else {
			t.row("bitmap:", j.Bitmap)
		}
	}
	t.row("started:", humanTime(j.StartedMs))
	t.row("ended:", humanTime(j.EndedMs))
	return t.Flush()
}

type table struct{ *tabwriter.Writer }

func newTable(w io.Writer, header ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
	if len(header) > 0 {
		t.row(header...)
	}
	return t
}

// row adds a row; empty cells show as "-".
func (t table) row(cells ...string) {
	for i, c := range cells {
		if c == "" {
			cells[i] = "-"
		}
	}
	fmt.Fprintln(t, strings.Join(cells, "\t")) // an error comes back from Flush
}

func humanSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1024 && unit < 5 {
		v /= 1024
		unit++
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", v), ".0") + " " + []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}[unit]
}

func humanLimit(speed int64) string {
	if speed == 0 {
		return "none"
	}
	return humanSize(speed) + "/s"
}

func humanLeft(j *control.Job) string {
	switch {
	case !j.Converging && (j.Stage == stageBulk || j.Stage == stageDirty):
		return "never"
	case j.EtaSeconds < 0:
		return "?"
	default:
		return humanDuration(j.EtaSeconds)
	}
}

// humanDuration shows seconds in their two largest units.
func humanDuration(s int64) string {
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 24*3600:
		return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
	default:
		return fmt.Sprintf("%d d %d h", s/(24*3600), s/3600%24)
	}
}

func humanTime(ms int64) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).Format(time.DateTime)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
