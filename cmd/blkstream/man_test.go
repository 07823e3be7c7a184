// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Every command, alias and flag is in the man page, every value of a choice too, and the page names no other flag.
func TestManPage(t *testing.T) {
	text, err := os.ReadFile("blkstream.1")
	if err != nil {
		t.Fatal(err)
	}
	page := string(text)
	has := func(what, pattern string) {
		t.Helper()
		if !regexp.MustCompile(`(?m)` + pattern).MatchString(page) {
			t.Errorf("%s is not in blkstream.1 (looked for %s)", what, pattern)
		}
	}
	root := newApp(io.Discard, io.Discard).root()
	root.InitDefaultCompletionCmd("completion") // what Execute adds
	root.InitDefaultHelpCmd()
	known := map[string]bool{"help": true}
	flags := func(cmd *cobra.Command) {
		add := func(f *pflag.Flag) {
			known[f.Name] = true
			has(cmd.CommandPath()+" --"+f.Name, `^\.It( Fl \w ,)?.* Fl -`+f.Name+`\b`)
			if c, ok := f.Value.(*choice); ok {
				has(cmd.CommandPath()+" --"+f.Name, `^\.It Fl -`+f.Name+` Cm `+regexp.QuoteMeta(strings.Join(c.from, " | "))+`$`)
			}
		}
		cmd.LocalNonPersistentFlags().VisitAll(add)
		cmd.PersistentFlags().VisitAll(add)
	}
	var walk func(cmd *cobra.Command, path string)
	walk = func(cmd *cobra.Command, path string) {
		flags(cmd)
		for _, sub := range cmd.Commands() {
			if sub.HasParent() && cmd.Name() == "completion" {
				has(sub.CommandPath(), `^\.It Cm completion .*\b`+sub.Name()+`\b`)
				flags(sub)
				continue
			}
			if name := sub.Name(); name == "image" {
				imagePage(t, sub)
				has("command "+name, `^\.It Cm `+name+` `)
				continue
			}
			name := path + sub.Name()
			if !sub.HasSubCommands() || sub.Name() == "completion" {
				has("command "+name, `^\.It Cm `+name+`( |$)`)
			}
			for _, alias := range sub.Aliases {
				has("alias "+alias, `^\.Cm `+path+alias+`$`)
			}
			walk(sub, name+" ")
		}
	}
	walk(root, "")
	for _, m := range regexp.MustCompile(`Fl -([a-z-]+)`).FindAllStringSubmatch(page, -1) {
		if !known[m[1]] {
			t.Errorf("blkstream.1 speaks of --%s, which no command has", m[1])
		}
	}
}

// imagePage holds blkstream-image.1, which is written with other macros, against its commands.
func imagePage(t *testing.T, image *cobra.Command) {
	text, err := os.ReadFile("blkstream-image.1")
	if err != nil {
		t.Fatal(err)
	}
	page := strings.ReplaceAll(string(text), `\-`, "-")
	for _, cmd := range image.Commands() {
		if !strings.Contains(page, `\fBblkstream image `+cmd.Name()+`\fR`) || !strings.Contains(page, "\n.B "+cmd.Name()+"\n") {
			t.Errorf("command %s is not in blkstream-image.1", cmd.Name())
		}
		cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
			pattern := `[^-\w]--` + f.Name + `\b`
			if f.Shorthand != "" {
				pattern += `|[^-\w]-` + f.Shorthand + `\b`
			}
			if !regexp.MustCompile(pattern).MatchString(page) {
				t.Errorf("%s --%s is not in blkstream-image.1", cmd.Name(), f.Name)
			}
		})
	}
}
