// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The man page has every key that the decoder takes, and no other; every value of a key with a few; every default.
// Its example is a configuration.
func TestManPage(t *testing.T) {
	text, err := os.ReadFile("blkstream.toml.5")
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	code, err := os.ReadFile("decode.go")
	if err != nil {
		t.Fatal(err)
	}
	var keys, documented []string
	for _, m := range regexp.MustCompile(`\t(?:t|b|daemon|throttle)\.(?:string|strings|bool|int|intSize|size)\("(\w+)"|take\(&throttle, "(\w+)"`).FindAllStringSubmatch(string(code), -1) {
		keys = append(keys, m[1]+m[2])
	}
	fields := -2 // Disk.Throttle and Disk.Backing are tables
	for _, table := range []reflect.Type{reflect.TypeFor[Daemon](), reflect.TypeFor[Disk](), reflect.TypeFor[Throttle](), reflect.TypeFor[Layer]()} {
		fields += table.NumField()
	}
	if len(keys) != fields {
		t.Fatalf("found %d keys in decode.go, the types have %d: %q", len(keys), fields, keys)
	}
	entries := map[string]string{} // what is said of each key
	for _, part := range strings.Split(page, "\n.It Ic ")[1:] {
		key, text, _ := strings.Cut(part, "\n")
		if entries[key] == "" { // not that of a table within the disk's
			entries[key] = text
		}
		documented = append(documented, key)
	}
	slices.Sort(keys)
	slices.Sort(documented)
	if !slices.Equal(keys, documented) {
		t.Errorf("keys\n in the code %q\nin the page %q", keys, documented)
	}
	for key, values := range map[string][]string{"format": formats, "cache": caches, "lock": locks} {
		for _, v := range values {
			if !regexp.MustCompile(`(?m)^\.(It )?Cm ` + v + `\b`).MatchString(entries[key]) {
				t.Errorf("%s: the page does not have the value %s", key, v)
			}
		}
	}
	for key, value := range map[string]int{"queues": DefaultQueues, "queue_size": DefaultQueueSize, "block_size": DefaultBlockSize, "poll_us": DefaultPollUS} {
		if !strings.Contains(entries[key], fmt.Sprintf("Default %d.", value)) {
			t.Errorf("%s: the page does not have the default, %d", key, value)
		}
	}
	if !strings.Contains(entries["metadata_cache"], fmt.Sprintf("Default %dM", DefaultMetadataCache>>20)) {
		t.Errorf("metadata_cache: the page does not have the default, %d", DefaultMetadataCache)
	}
	for key, value := range map[string]string{"control": DefaultControl, "state_dir": DefaultStateDir} {
		if !strings.Contains(entries[key], ".Pa "+value) {
			t.Errorf("%s: the page does not have the default, %s", key, value)
		}
	}
	for key, value := range map[string]string{"cache": DefaultCache, "lock": DefaultLock} {
		_, after, _ := strings.Cut(entries[key], ".It Cm "+value+"\n")
		if after, _, _ = strings.Cut(after, ".It "); !strings.Contains(after, "The default.") {
			t.Errorf("%s: the page does not have the default, %s", key, value)
		}
	}
	_, example, _ := strings.Cut(page, ".Bd -literal\n")
	example, _, _ = strings.Cut(example, ".Ed\n")
	// Without the roots, which this machine does not have.
	if _, err := Parse("example", []byte(strings.Replace(example, `"/var/lib/images"]`, `]`, 1))); err != nil {
		t.Errorf("the example: %v", err)
	}
}
