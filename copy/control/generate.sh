#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Regenerates the Go code of control.proto. Needs protoc (Debian:
# protobuf-compiler); the plugins are built in the versions pinned here.
set -eu
cd "$(dirname "$0")"

bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$bin go install github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc@v1.2.10

PATH=$bin:$PATH protoc \
	--go_out=. --go_opt=paths=source_relative \
	--go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative \
	control.proto

# protoc-gen-go carries the licence line over from control.proto, the ttrpc
# plugin does not, and it makes its header the package's documentation.
sed -i -e '1i // SPDX-License-Identifier: Apache-2.0\n' -e 's/^package/\n&/' control_ttrpc.pb.go
