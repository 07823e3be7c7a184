// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strings"

	"github.com/BurntSushi/toml"
)

// keyLines finds the line of every table header and key of a TOML document
// that is known to be valid. The TOML library knows lines too, but only the
// last one of keys that occur in several elements of an array of tables.
//
// Paths name the elements: "daemon.control", "disk[1]", "disk[1].image". What
// stands inside a value (inline tables) has no entry of its own.
func keyLines(doc string) map[string]int {
	s := lineScanner{doc: strings.TrimPrefix(doc, "\ufeff"), line: 1}
	lines := map[string]int{}
	elements := map[string]int{} // array of tables -> elements so far
	table := ""
	for s.skipBlank() {
		line := s.line
		if s.doc[s.pos] != '[' {
			path := table
			for _, k := range s.key('=') {
				path = join(path, k)
				// Dotted keys create their tables on the way.
				if lines[path] == 0 {
					lines[path] = line
				}
			}
			s.until('\n') // the value
			continue
		}
		isArray := strings.HasPrefix(s.doc[s.pos:], "[[")
		s.pos++
		if isArray {
			s.pos++
		}
		table = ""
		key := s.key(']')
		if isArray {
			s.pos++
		}
		for i, k := range key {
			table = join(table, k)
			if isArray && i == len(key)-1 {
				elements[table]++
			}
			if n := elements[table]; n > 0 { // a prefix means the latest element
				table = element(table, n-1)
			}
			if lines[table] == 0 {
				lines[table] = line
			}
		}
		s.until('\n')
	}
	return lines
}

// maxNesting is far more than a configuration needs. The TOML library takes
// time in the cube of the depth.
const maxNesting = 16

// tooNested returns the line on which brackets, or dotted keys, nest deeper
// than maxNesting, 0 if none do. The document need not be valid: up to its
// first error, where the TOML library stops, it is read as the library does.
func tooNested(doc string) int {
	s := lineScanner{doc: doc, line: 1}
	depth, dots := 0, 0
	for s.pos < len(s.doc) {
		switch s.doc[s.pos] {
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '.':
			dots++
		case '\n':
			dots = 0
		}
		if depth > maxNesting || dots > maxNesting {
			return s.line
		}
		s.token()
	}
	return 0
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

func element(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// lineScanner walks over a valid document and counts lines.
type lineScanner struct {
	doc  string
	pos  int
	line int
}

// skipBlank moves to the next header or key and says whether there is one.
func (s *lineScanner) skipBlank() bool {
	for s.pos < len(s.doc) {
		switch s.doc[s.pos] {
		case '\n', '#':
			s.until('\n')
		case ' ', '\t', '\r':
			s.pos++
		default:
			return true
		}
	}
	return false
}

// key reads a possibly dotted and quoted key and moves past end.
func (s *lineScanner) key(end byte) []string {
	start := s.pos
	s.until(end)
	key := strings.TrimSpace(s.doc[start : s.pos-1])
	if !strings.ContainsAny(key, `."'`) {
		return []string{key}
	}
	var v map[string]any
	meta, err := toml.Decode(key+" = 0", &v)
	if err != nil || len(meta.Keys()) == 0 {
		return nil // not reached: the document is valid
	}
	keys := meta.Keys()
	return keys[len(keys)-1]
}

// until moves past the next end that is not inside a string, a comment or
// brackets.
func (s *lineScanner) until(end byte) {
	depth := 0
	for s.pos < len(s.doc) {
		c := s.doc[s.pos]
		if c == end && depth == 0 {
			s.advance(1)
			return
		}
		switch c {
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		}
		s.token()
	}
}

// token moves past a string, a comment or a single byte.
func (s *lineScanner) token() {
	switch s.doc[s.pos] {
	case '"', '\'':
		s.advance(stringLen(s.doc[s.pos:]))
	case '#':
		n := strings.IndexByte(s.doc[s.pos:], '\n')
		if n < 0 {
			n = len(s.doc) - s.pos
		}
		s.advance(n)
	default:
		s.advance(1)
	}
}

func (s *lineScanner) advance(n int) {
	s.line += strings.Count(s.doc[s.pos:s.pos+n], "\n")
	s.pos += n
}

// stringLen returns the length of the TOML string that s begins with.
func stringLen(s string) int {
	quote := s[:1]
	escapes := quote == `"`
	multi := strings.Repeat(quote, 3)
	isMulti := strings.HasPrefix(s, multi)
	end, i := quote, 1
	if isMulti {
		end, i = multi, 3
	}
	for ; i < len(s); i++ {
		if escapes && s[i] == '\\' {
			i++
			continue
		}
		if strings.HasPrefix(s[i:], end) {
			i += len(end)
			// Up to two quotes may precede the closing three.
			for n := 0; isMulti && n < 2 && strings.HasPrefix(s[i:], quote); n++ {
				i++
			}
			return i
		}
	}
	return len(s)
}
