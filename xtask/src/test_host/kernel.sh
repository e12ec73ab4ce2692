#!/usr/bin/env bash
# Makes what the test host boots: kernel.sh DIRECTORY, which is empty. Needs root.
#
#   vmlinuz          Debian's kernel for virtual machines
#   initramfs.cpio   finds the root disk and goes there
#   modules.tar      the kernel's modules and ZFS, built for it
#
# ZFS is the one thing that has to be compiled; so all of this is made in a tree that is thrown away, and the root image
# gets no compiler.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/archive.sh"
readonly OUT=$1

# What is between the kernel's start and the root disk.
readonly BOOT_MODULES=(virtio_pci virtio_blk ext4)

customize() {
    local tree=$1 release initramfs=/tmp/initramfs
    release=$(cd "$tree/lib/modules" && echo *)
    say "ZFS for $release"
    [ -e "$tree/lib/modules/$release/updates/dkms/zfs.ko" ] || chroot "$tree" dkms autoinstall -k "$release" || {
        tail -n 40 "$tree"/var/lib/dkms/zfs/*/build/make.log >&2
        die "zfs-dkms does not build for $release"
    }
    # Unpacked, not installed: installing would make an initramfs that nobody needs.
    (cd "$tree/tmp" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -q -o APT::Sandbox::User=root \
        download "linux-image-$release" >&2)
    dpkg-deb --extract "$tree"/tmp/linux-image-*.deb "$tree/tmp/kernel"
    cp -a "$tree/tmp/kernel/lib/modules/$release/." "$tree/lib/modules/$release/"
    rm -f "$tree/lib/modules/$release/"{build,source}
    chroot "$tree" depmod "$release"

    mkdir -p "$tree$initramfs"/{bin,dev,modules,proc,root}
    cp "$tree/bin/busybox" "$tree$initramfs/bin/"
    cp "$here/initramfs_init.sh" "$tree$initramfs/init"
    chmod 755 "$tree$initramfs/init"
    # In load order; each file once.
    chroot "$tree" modprobe --set-version "$release" --show-depends --all "${BOOT_MODULES[@]}" |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }' |
        while read -r module; do
            cp "$tree$module" "$tree$initramfs/modules/"
            basename "$module"
        done >"$tree$initramfs/modules/order"
    chroot "$tree" sh -c "cd $initramfs && find . | cpio --quiet --create --format=newc" >"$OUT/initramfs.cpio"
    cp "$tree/tmp/kernel/boot/vmlinuz-$release" "$OUT/vmlinuz"
    tar --create --directory "$tree/lib" --transform 's,^,usr/lib/,' --file "$OUT/modules.tar" "modules/$release"
}

if [ "${2:-}" = customize ]; then
    customize "$3"
else
    # With --format=null nothing is left of the tree but what the hook takes out of it.
    bootstrap - --format=null \
        --include=busybox-static,cpio,kmod,linux-headers-cloud-amd64,zfs-dkms \
        --customize-hook="'$here/kernel.sh' '$OUT' customize \"\$1\""
fi
