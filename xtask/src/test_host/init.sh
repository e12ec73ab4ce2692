#!/bin/bash
# Process 1 of the test host. It comes with the suite's disk, which is mounted on /mnt:
#
#   /mnt/suite       what to run: calls of `check_kernel` and `run`
#   /mnt/settings    TARGET: where the host's build directory must be; MODE: run, keep or shell;
#                    ICEBOX_TEST_POWER_CUT: before, after or after-all, of tests in two halves;
#                    ICEBOX_TEST_POWER_CUTS: the driver of those whose power is cut again and again
#   /mnt/target      the files of that directory
#   /mnt/cache       the tests' cache, as they know it from the host
#   /mnt/out         what goes back: status (0 or 1; a run without one crashed), skipped,
#                    conformance
#
# There is no init system and no udev: device nodes are devtmpfs's.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=${TERM:-linux}
# libdevmapper waits for udev otherwise.
export DM_DISABLE_UDEV=1
export RUST_BACKTRACE=1 ICEBOX_SKIPPED=/mnt/out/skipped ICEBOX_CONFORMANCE=/mnt/out/conformance
export ICEBOX_TEST_CACHE=/mnt/cache ICEBOX_TEST_AGENT=/mnt/agent
# Everything takes this much longer here: what has to be quick has that much more time.
export ICEBOX_TEST_SLOWNESS=10
# While one test waits, another goes on; guests, who have deadlines, one at a time.
export RUST_TEST_THREADS=2
# The real thing or nothing: a guest emulated in an emulated machine would show little, slowly.
export ICEBOX_TEST_ACCELERATOR=kvm

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

# The machine's QEMU now and then loses the interrupt of the processor's timer, and with it all later ones: each arms the
# next. Any other interrupt brings it back, so the clock chip makes some, 64 a second.
tick() {
    python3 -c '
import fcntl, os
UPDATE_INTERRUPTS_ON = 0x7003  # RTC_UIE_ON, linux/rtc.h
clock = os.open("/dev/rtc0", os.O_RDONLY)
fcntl.ioctl(clock, UPDATE_INTERRUPTS_ON)
while os.read(clock, 8):
    pass
' || printf 'the clock chip does not tick: this machine may stand still\n'
}

check_kernel() {
    bash /mnt/kernel_check.sh || failed=1
}

# run EXECUTABLE ARGUMENT…
run() {
    printf '\n── %s\n' "${1##*/}"
    local start=$SECONDS
    "$@" </dev/null || failed=1
    printf '── %s: %s s\n' "${1##*/}" "$((SECONDS - start))"
}

run_suite() {
    local failed=0
    . /mnt/suite
    printf '%s\n' "$failed" >/mnt/out/status
}

set -a
. /mnt/settings
set +a
prepare
tick &
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
