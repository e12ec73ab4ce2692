#!/bin/bash
# Process 1 of the test host. It comes with the suite's disk, which is mounted on /mnt:
#
#   /mnt/suite       test executables, one path per line
#   /mnt/arguments   what each of them gets, one argument per line
#   /mnt/settings    TARGET: where the host's build directory must be; MODE: run, keep or shell
#   /mnt/target      the files of that directory
#   /mnt/out         what goes back: status (0 or 1; a run without one crashed), skipped
#
# There is no init system and no udev: device nodes are devtmpfs's.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux}
# libdevmapper waits for udev otherwise.
export DM_DISABLE_UDEV=1
export RUST_BACKTRACE=1 ICEBOX_SKIPPED=/mnt/out/skipped

power_off() {
    # The suite's disk has no journal: what is synced is in its place.
    sync
    busybox poweroff -f
}
# Whatever happens to this script; without a status, it is a crash.
trap power_off EXIT

prepare() {
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mkdir -p /dev/pts /dev/shm
    mount -t devpts -o gid=5,mode=620 devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs -o mode=755 tmpfs /run
    # In memory: what is written to a disk of this machine costs its maker seconds.
    mount -t tmpfs -o mode=1777,size=75% tmpfs /tmp
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    ln -sfn /proc/self/fd /dev/fd
    hostname testhost
    ip link set lo up
    # Guests ask for registers of CPUs that the emulator does not have; each time would be a line on the console.
    modprobe kvm ignore_msrs=1 report_ignored_msrs=0
    # The rest is loaded by the kernel when it is asked for.
    modprobe --all loop dm_mod dm_snapshot nbd kvm_amd tun vhost_vsock
    modprobe zfs zfs_arc_max=$((256 << 20))
}

run_suite() {
    local failed=0 executable
    local -a arguments
    mapfile -t arguments </mnt/arguments
    bash /mnt/kernel_check.sh || failed=1
    while read -r executable; do
        printf '\n── %s\n' "${executable##*/}"
        "$executable" --color=never "${arguments[@]}" </dev/null || failed=1
    done </mnt/suite
    printf '%s\n' "$failed" >/mnt/out/status
}

. /mnt/settings
prepare
# Tests know their helpers by the paths that they were built at.
mkdir -p "$TARGET"
mount --bind /mnt/target "$TARGET"
cd /tmp
printf 'test host: Linux %s, %s CPUs, %s s after its start\n' \
    "$(uname -r)" "$(nproc)" "$(cut -d ' ' -f 1 /proc/uptime)"
[ "$MODE" = shell ] || run_suite
if [ "$MODE" != run ]; then
    printf '\nA shell; the machine goes when you leave it. The suite: /mnt/suite\n'
    setsid --ctty --wait bash -i </dev/ttyS0 >/dev/ttyS0 2>&1
fi
