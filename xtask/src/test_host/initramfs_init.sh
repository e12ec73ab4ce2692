#!/bin/busybox sh
# First program of the test host: loads what the disks need, and goes on with the init that the suite's disk brings.
set -eu
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do
    $bb insmod "/modules/$module"
done </modules/order
$bb mount -t ext4 /dev/vda /root
$bb mount -t ext4 /dev/vdb /root/mnt
$bb mount --move /dev /root/dev
$bb umount /proc
exec $bb switch_root /root /mnt/init
