#!/bin/bash
# What the test host is for: device-mapper, ZFS and KVM, each used once. A suite that ran without one of them would only
# have skipped what it came for.
set -uo pipefail
failed=0
work=$(mktemp -d)

# check NAME FUNCTION: runs it, prints what it says, and remembers that it failed.
check() {
    local said start=$EPOCHREALTIME
    if said=$("$2" 2>&1); then
        printf '%-15s works   %s' "$1" "$said"
    else
        printf '%-15s FAILS   %s' "$1" "$said"
        failed=1
    fi
    awk -v from="$start" -v to="$EPOCHREALTIME" 'BEGIN { printf " (%.1f s)\n", to - from }'
}

device_mapper() (
    set -e
    truncate -s 8M "$work/disk" "$work/cow"
    disk=$(/usr/sbin/losetup --show --find "$work/disk")
    cow=$(/usr/sbin/losetup --show --find "$work/cow")
    trap 'dmsetup remove check; /usr/sbin/losetup --detach "$disk" "$cow"' EXIT
    dmsetup create check --table "0 16384 snapshot $disk $cow P 8"
    printf written | dd of=/dev/mapper/check conv=notrunc,fsync status=none
    [ "$(head -c 7 /dev/mapper/check)" = written ]
    [ "$(head -c 7 "$disk" | tr -d '\0')" = "" ]
    dmsetup version | sed -n 's/^Driver version: */driver /p' | tr -d '\n'
    dmsetup targets | awk '$1 == "snapshot" { printf ", snapshot %s", $2 }'
)

zfs_volume() (
    set -e
    truncate -s 128M "$work/pool"
    zpool create -m none check "$work/pool"
    trap 'zpool destroy check' EXIT
    zfs create -s -V 32M check/volume
    # Nodes are made after the command has returned.
    for _ in $(seq 100); do
        [ -b /dev/zd0 ] && break
        sleep 0.1
    done
    printf written | dd of=/dev/zd0 conv=notrunc,fsync status=none
    zfs snapshot check/volume@now
    zfs clone check/volume@now check/clone
    zfs version | tr '\n' ' '
)

kvm_guest() (
    set -e
    mkdir -p "$work/guest/bin"
    cp /usr/bin/busybox "$work/guest/bin/"
    cat >"$work/guest/init" <<'GUEST'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc 2>/dev/null || /bin/busybox mkdir /proc
/bin/busybox echo "guest: hello"
/bin/busybox reboot -f
GUEST
    mkdir "$work/guest/proc"
    chmod 755 "$work/guest/init"
    (cd "$work/guest" && find . | busybox cpio -o -H newc) >"$work/guest.cpio" 2>/dev/null
    # Without these timers a guest under emulated SVM boots twice as fast.
    timeout 300 qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -accel kvm -cpu host -m 128M \
        -machine microvm,rtc=off,pit=off,pic=off -kernel /mnt/vmlinuz -initrd "$work/guest.cpio" \
        -append 'console=ttyS0 quiet mitigations=off reboot=t panic=-1' -serial stdio </dev/null >"$work/console" 2>&1 || true
    grep -q 'guest: hello' "$work/console" || {
        tail -n 20 "$work/console"
        exit 1
    }
    printf 'a guest booted by %s' "$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/QEMU \1/p')"
)

check device-mapper device_mapper
check zfs zfs_volume
check kvm kvm_guest
rm -rf "$work"
exit "$failed"
