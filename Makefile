# SPDX-License-Identifier: Apache-2.0

GO ?= go
# Files that people wrote; generated code keeps its generator's format.
SOURCES = $(shell find . -name '*.go' -not -name '*.pb.go' -not -path './.cache/*')
# Where goroutines and mapped memory meet. The formats' own tests are many and mostly of one task at a time: of them
# those that race.
RACE = ./virtq/... ./vhostuser/... ./copy/... ./cmd/... $$($(GO) list ./blk/... | grep -v -e blk/qcow2 -e blk/chain -e blk/image)
RACE_SOME = -run 'Loops|FastPath|AtOnce|Concurrent|TinyCache|InUse|OpenChain' ./blk/qcow2 ./blk/chain ./blk/image
FUZZTIME ?= 30s
SOAKTIME ?= 10m
# A test that talks to a guest or a disk has no result worth caching.
TESTFLAGS = -count=1 -timeout 15m

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
# Where install puts things; DESTDIR stands before all of it.
PREFIX ?= /usr/local
DESTDIR ?=
# Pinned: another version finds other things.
LINT_VERSION = v2.15.0
LINT = $(or $(BLKSTREAM_CACHE),$(CURDIR)/.cache)/bin/golangci-lint-$(LINT_VERSION)

.DEFAULT_GOAL := help
.PHONY: help build install test setup check fmt unit race e2e interop lint fuzz bench demo soak clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## the two programs, static, into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

install: build ## programs, man pages, shell completions, systemd unit; into $(DESTDIR)$(PREFIX)
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,bin sbin share/man/man1 share/man/man5 share/man/man8 lib/systemd/system \
	  share/bash-completion/completions share/zsh/site-functions share/fish/vendor_completions.d)
	install -m 755 bin/blkstream $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/blkstreamd $(DESTDIR)$(PREFIX)/sbin/
	install -m 644 cmd/blkstream/*.1 $(DESTDIR)$(PREFIX)/share/man/man1/
	install -m 644 config/blkstream.toml.5 $(DESTDIR)$(PREFIX)/share/man/man5/
	install -m 644 cmd/blkstreamd/blkstreamd.8 $(DESTDIR)$(PREFIX)/share/man/man8/
	sed 's|@sbindir@|$(PREFIX)/sbin|' dist/blkstreamd.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/blkstreamd.service
	bin/blkstream completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/blkstream
	bin/blkstream completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_blkstream
	bin/blkstream completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/blkstream.fish

test: setup ## everything that a change must pass (installs what tests need, by apt)
	$(MAKE) check
	$(MAKE) unit
	$(MAKE) race
	$(MAKE) e2e

setup: ## QEMU, a guest kernel and tools for the tests
	scripts/setup-test.sh

check: lint ## format, go vet, golangci-lint, import rules
	@bad=$$(gofmt -l $(SOURCES)); [ -z "$$bad" ] || { echo "not formatted (gofmt -w): $$bad"; exit 1; }
	$(GO) vet ./...
	$(GO) test -count=1 ./test/arch

unit: ## tests without guests
	$(GO) test $(TESTFLAGS) $$($(GO) list ./... | grep -v -e /test/e2e -e /test/guest$$ -e /test/arch)

race: ## the same under the race detector, where there is concurrency
	CGO_ENABLED=1 $(GO) test $(TESTFLAGS) -short -race $(RACE)
	CGO_ENABLED=1 $(GO) test $(TESTFLAGS) -short -race $(RACE_SOME)

e2e: ## Linux guests under QEMU against the real daemon
	$(GO) test $(TESTFLAGS) -p 1 ./test/guest ./test/e2e

interop: setup ## images against QEMU, the whole option matrix (more than an hour)
	INTEROP=full $(GO) test -count=1 -timeout 2h ./test/interop

lint: $(LINT) ## golangci-lint, built from the Go module proxy when it is missing
	$(LINT) run

fmt: $(LINT) ## format the sources
	$(LINT) fmt

$(LINT):
	mkdir -p $(@D)
	tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	  GOBIN=$$tmp $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION) && \
	  mv "$$tmp/golangci-lint" $@

fuzz: ## every fuzz target for FUZZTIME (default 30s)
	@set -e; for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$pkg/*_test.go | cut -c6-); do \
	    echo "$$pkg $$f"; $(GO) test $$pkg -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME); \
	  done; done

bench: setup ## the table beside qemu-storage-daemon and dd, as ratios (30 minutes of an idle machine)
	$(GO) run ./test/compare

demo: setup build ## copy the disk of a running guest, and switch it
	$(GO) run ./test/demo

soak: setup ## crash the daemon under a guest, and random lists of jobs and crashes, for SOAKTIME (default 10m) each
	BLKSTREAM_SOAK=$(SOAKTIME) $(GO) test -count=1 -timeout 0 -v -run '^TestKillUnderLoad$$' ./test/e2e
	BLKSTREAM_SOAK=$(SOAKTIME) $(GO) test -count=1 -timeout 0 -run '^TestJobs$$' ./test/meta

clean: ## remove what was built and downloaded
	rm -rf bin .cache
