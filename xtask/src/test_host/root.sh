#!/usr/bin/env bash
# Makes the test host's root disk: root.sh FILE KERNEL, where KERNEL is a directory that kernel.sh made. Needs root.
#
# Packages and the kernel's modules, and nothing of ours: what runs in there comes on the suite's disk. There is no udev
# and no init system.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/archive.sh"
readonly OUT=$1 KERNEL=$2

readonly PACKAGES=(
    # What the tests use.
    btrfs-progs busybox-static dosfstools e2fsprogs iproute2 iputils-ping kmod mount nftables procps python3
    qemu-system-x86 qemu-utils util-linux xfsprogs zfsutils-linux
    # For people with a shell in there.
    dmsetup less strace
)
# Debian 12's QEMU is older than what Icebox needs.
readonly FROM_BACKPORTS='Package: src:qemu seabios ipxe-qemu
Pin: release n=bookworm-backports
Pin-Priority: 990'

prepare() {
    mkdir -p "$1/etc/apt/preferences.d"
    printf '%s\n' "$FROM_BACKPORTS" >"$1/etc/apt/preferences.d/backports"
}

customize() {
    local tree=$1
    tar --extract --file "$KERNEL/modules.tar" --directory "$tree"
    rm -rf "$tree"/usr/share/{doc,man,locale,info}/* "$tree"/var/cache/apt/archives/*.deb
    # What a guest must not have to ask a network for.
    printf 'testhost\n' >"$tree/etc/hostname"
    printf '127.0.0.1 localhost testhost\n::1 localhost\n' >"$tree/etc/hosts"
    : >"$tree/etc/resolv.conf"
    printf '%s\n' 2f0d3f0c7d0b4c6e9a50d1c7a8e5b314 >"$tree/etc/machine-id"
    ln -sfn /proc/self/mounts "$tree/etc/mtab"
}

case "${3:-}" in
prepare) prepare "$4" ;;
customize) customize "$4" ;;
*)
    tree=$OUT.tree
    rm -rf --one-file-system "$tree"
    hook() { printf "'%s' '%s' '%s' %s \"\$1\"" "$here/root.sh" "$OUT" "$KERNEL" "$1"; }
    bootstrap "$tree" --format=directory --include="$(IFS=, && echo "${PACKAGES[*]}")" \
        --setup-hook="$(hook prepare)" --customize-hook="$(hook customize)"
    # What is there and a third more, made without mounting anything.
    size_kib=$(du --summarize --block-size=1K "$tree" | cut -f 1)
    mke2fs -q -t ext4 -E root_owner=0:0,lazy_itable_init=0 -d "$tree" "$OUT.new" "$((size_kib * 4 / 3 + 65536))K"
    rm -rf --one-file-system "$tree"
    mv "$OUT.new" "$OUT"
    ;;
esac
