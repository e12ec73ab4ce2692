set -eu
root="$1"
# Keep the downloads, and note which were used: pruning goes by time.
for deb in "$root"/var/cache/apt/archives/*.deb; do
    [ -e "$deb" ] || continue
    touch "$deb"
    ln -f "$deb" "$ICEBOX_DEB_CACHE/" 2>/dev/null || true
done
# Nothing of the build machine stays.
rm -rf "$root/etc/apt/sources.list" "$root/etc/apt/sources.list.d"
cp -a "$root"/run/icebox-apt/* "$root/etc/apt/"
rm -rf "$root/run/icebox-apt"
mkdir -p "$root/etc/apt/sources.list.d"
rm -f "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap" "$root/etc/apt/apt.conf.d/99mmdebstrap"
printf 'sandbox\n' > "$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' > "$root/etc/hosts"
rm -f "$root/etc/resolv.conf"
: > "$root/etc/resolv.conf"
chmod 644 "$root/etc/hostname" "$root/etc/hosts" "$root/etc/resolv.conf"
# Empty means "not set yet": each sandbox gets its own.
: > "$root/etc/machine-id"
# The user that commands run as.
chroot "$root" groupadd --gid 1000 user
chroot "$root" useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash user
if [ -x "$root/usr/bin/sudo" ]; then
    printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' > "$root/etc/sudoers.d/user"
    chmod 440 "$root/etc/sudoers.d/user"
fi
