// SPDX-License-Identifier: Apache-2.0

package job

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Store keeps records as JSON files, one folder a kind, one file a record. A record is replaced atomically and is
// durable when Save returns: after a crash there is the old one or the new one.
type Store struct{ dir string }

// OpenStore makes the folder if need be.
func OpenStore(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	return &Store{dir: dir}, nil
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)

// ValidID reports whether the id can name a record: letters, digits, "_", "." and "-", at most 64, not beginning
// with a sign.
func ValidID(id string) bool { return idPattern.MatchString(id) }

// Path is the file of a record.
func (s *Store) Path(kind, id string) string { return filepath.Join(s.dir, kind, id+".json") }

// Save writes the record.
func (s *Store) Save(kind, id string, v any) error {
	if !ValidID(id) {
		return fmt.Errorf("state directory: %q cannot name a record", id)
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	path := s.Path(kind, id)
	dir := filepath.Dir(path)
	if err := os.Mkdir(dir, 0o700); err == nil {
		err = syncDir(s.dir)
		if err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("state directory: %w", err)
	}
	tmp := path + ".new"
	if err := writeSynced(tmp, append(b, '\n')); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("state directory: %w: %w", ErrUnsure, err)
	}
	if err := syncDir(dir); err != nil {
		return fmt.Errorf("%w: %w", err, ErrUnsure)
	}
	return nil
}

// ErrUnsure is the kind of an error of Save that may have left the new record, for now or for good. Otherwise the old one is
// there.
var ErrUnsure = errors.New("it is not known whether the record was replaced")

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncDir makes a folder's entries durable. Tests change it.
var syncDir = func(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	err = d.Sync()
	if err := errors.Join(err, d.Close()); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return nil
}

// Load reads a record into v; false: there is none.
func (s *Store) Load(kind, id string, v any) (bool, error) {
	b, err := os.ReadFile(s.Path(kind, id))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("state directory: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return false, fmt.Errorf("state directory: %s is damaged: %w", s.Path(kind, id), err)
	}
	return true, nil
}

// IDs lists the records of a kind.
func (s *Store) IDs(kind string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, kind))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// Delete removes a record durably. One that is not there is no error.
func (s *Store) Delete(kind, id string) error {
	path := s.Path(kind, id)
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return syncDir(filepath.Dir(path))
}
