#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Brings a Debian machine (bookworm or trixie) to the point where every test
# runs: QEMU and its tools, and a kernel, modules and e2fsprogs for the test
# guest in $BLKSTREAM_CACHE (default: .cache in the repository). Safe to run
# again: what is there already is left alone.
set -Eeuo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
guest=${BLKSTREAM_CACHE:-$root/.cache}/guest

say() { echo "setup-test: $*" >&2; }
die() { say "$*"; exit 1; }
trap 'say "failed at line $LINENO: $BASH_COMMAND"' ERR

# command:package. qemu-storage-daemon moved from qemu-system-common to
# qemu-utils after bookworm, so both are named.
needed=(
  qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils
  qemu-storage-daemon:"qemu-utils qemu-system-common"
  busybox:busybox-static nbdkit:nbdkit fio:fio modprobe:kmod xz:xz-utils
  e2fsck:e2fsprogs mke2fs:e2fsprogs losetup:mount mount:mount
  strace:strace mandoc:mandoc systemd-analyze:systemd
  cc:"gcc libc6-dev" # the race detector
)
export PATH=$PATH:/usr/sbin:/sbin
# apt downloads as its own user, who cannot write to our folder, and warns that it then does so as root.
apt=(-qq -o APT::Sandbox::User=root)

missing_packages() {
  local entry
  for entry in "${needed[@]}"; do
    command -v "${entry%%:*}" >/dev/null || echo "${entry#*:}"
  done
  # The guest has no shared libraries: a dynamic busybox does not count.
  if command -v busybox >/dev/null && ldd "$(command -v busybox)" >/dev/null 2>&1; then
    echo busybox-static
  fi
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "must run '$*', but is neither root nor has sudo"
  fi
}

updated=
apt_update() {
  [ -n "$updated" ] && return
  command -v apt-get >/dev/null || die "needs apt-get (Debian bookworm or trixie); on another system install: $(missing_packages | xargs)"
  as_root apt-get "${apt[@]}" update >&2 || die "apt-get update failed: is a Debian mirror reachable?"
  updated=yes
}

install_packages() {
  local packages
  packages=$(missing_packages | xargs)
  [ -n "$packages" ] || return 0
  apt_update
  say "installing $packages"
  # shellcheck disable=SC2086 # a list of words
  as_root env DEBIAN_FRONTEND=noninteractive apt-get "${apt[@]}" install -y --no-install-recommends $packages >&2 ||
    die "apt-get install $packages failed"
  packages=$(missing_packages | xargs)
  [ -z "$packages" ] || die "still missing after the installation: $packages"
}

# The guest's kernel, its modules in loading order, and e2fsprogs with its libraries.
fetch_guest() {
  local work package version list module name kind path n=0
  [ -e "$guest/complete" ] && return
  apt_update
  package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*-cloud-amd64\).*/\1/p' | head -n1)
  [ -n "$package" ] || die "apt-cache knows no kernel behind linux-image-cloud-amd64: is this Debian with amd64 in its sources?"
  say "fetching $package"
  mkdir -p "$(dirname "$guest")"
  work=$(mktemp -d "$guest.XXXXXX")
  # shellcheck disable=SC2064 # expanded now: work is local
  trap "rm -rf '$work'" EXIT
  (cd "$work" && apt-get "${apt[@]}" download "$package:amd64" >&2) || die "apt-get download $package failed"
  dpkg -x "$work"/linux-image-*.deb "$work/kernel"
  version=${package#linux-image-}
  # Where / and /usr are merged the modules may sit in either.
  [ -d "$work/kernel/lib/modules" ] || ln -s usr/lib "$work/kernel/lib"
  depmod -b "$work/kernel" "$version"

  mkdir -p "$work/out/modules" "$work/out/root"
  cp "$work/kernel/boot/vmlinuz-$version" "$work/out/vmlinuz"
  list=$work/out/modules/list
  : >"$list"
  for module in virtio_pci virtio_blk ext4; do
    # Lines "insmod PATH" in the order of loading; "builtin NAME" needs nothing.
    modprobe -d "$work/kernel" -S "$version" --show-depends "$module" |
      while read -r kind path _; do
        [ "$kind" = insmod ] || continue
        name=$(basename "$path")
        name=${name%%.*}.ko
        grep -qx "$name" "$list" && continue
        case $path in
        *.xz) xz -dc "$path" >"$work/out/modules/$name" ;;
        *) cp "$path" "$work/out/modules/$name" ;;
        esac
        echo "$name" >>"$list"
      done
  done
  grep -qx virtio_blk.ko "$list" || die "$package has no virtio_blk module"

  for name in busybox e2fsck mke2fs; do
    path=$(command -v "$name")
    install -D "$path" "$work/out/root/bin/$name"
    { ldd "$path" 2>/dev/null || true; } | sed -n 's|^[^/]*\(/[^ ]*\).*|\1|p' | while read -r path; do
      install -D "$path" "$work/out/root$path"
    done
  done
  touch "$work/out/complete"
  rm -rf "$guest"
  mv "$work/out" "$guest"
}

install_packages
fetch_guest
