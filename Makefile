# SPDX-License-Identifier: Apache-2.0

GO ?= go
# Files that people wrote; generated code keeps its generator's format.
SOURCES = $(shell find . -name '*.go' -not -name '*.pb.go' -not -path './.cache/*')
# Where goroutines and mapped memory meet.
RACE = ./virtq/... ./vhostuser/... ./blk/... ./copy/... ./cmd/...
FUZZTIME ?= 30s
SOAKTIME ?= 10m
# A test that talks to a guest or a disk has no result worth caching.
TESTFLAGS = -count=1 -timeout 15m

.DEFAULT_GOAL := help
.PHONY: help build test setup check unit race e2e interop lint fuzz bench demo soak clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## the two programs, static, into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o bin/ ./cmd/...

test: setup ## everything that a change must pass (installs what tests need, by apt)
	$(MAKE) check
	$(MAKE) unit
	$(MAKE) race
	$(MAKE) e2e

setup: ## QEMU, a guest kernel and tools for the tests
	scripts/setup-test.sh

check: ## format, go vet, import rules
	@bad=$$(gofmt -l $(SOURCES)); [ -z "$$bad" ] || { echo "not formatted (gofmt -w): $$bad"; exit 1; }
	$(GO) vet ./...
	$(GO) test -count=1 ./test/arch

unit: ## tests without guests
	$(GO) test $(TESTFLAGS) $$($(GO) list ./... | grep -v -e /test/e2e -e /test/guest$$ -e /test/arch)

race: ## the same under the race detector, where there is concurrency
	CGO_ENABLED=1 $(GO) test $(TESTFLAGS) -short -race $(RACE)

e2e: ## Linux guests under QEMU against the real daemon
	$(GO) test $(TESTFLAGS) -p 1 ./test/guest ./test/e2e

interop: setup ## images against QEMU, the whole option matrix (30 minutes)
	INTEROP=full $(GO) test -count=1 -timeout 2h ./test/interop

lint: check ## check, and golangci-lint
	golangci-lint run

fuzz: ## every fuzz target for FUZZTIME (default 30s)
	@set -e; for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -ho '^func Fuzz[A-Za-z0-9_]*' $$pkg/*_test.go | cut -c6-); do \
	    echo "$$pkg $$f"; $(GO) test $$pkg -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME); \
	  done; done

bench: setup ## the table beside qemu-storage-daemon, as ratios (15 minutes of an idle machine)
	$(GO) run ./test/compare

demo: setup build ## copy the disk of a running guest, and switch it
	$(GO) run ./test/demo

soak: setup ## crash the daemon under a guest, again and again, for SOAKTIME (default 10m)
	BLKSTREAM_SOAK=$(SOAKTIME) $(GO) test -count=1 -timeout 0 -v -run '^TestKillUnderLoad$$' ./test/e2e

clean: ## remove what was built and downloaded
	rm -rf bin .cache
