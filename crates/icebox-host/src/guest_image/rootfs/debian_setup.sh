set -eu
root="$1"
# Take packages from this machine's own mirror; the list as mmdebstrap wrote it comes back at the end.
mkdir -p "$root/run/icebox-apt"
cp -a "$root/etc/apt/sources.list" "$root/etc/apt/sources.list.d" "$root/run/icebox-apt/" 2>/dev/null || true
for list in "$root/etc/apt/sources.list" "$root"/etc/apt/sources.list.d/*.list; do
    [ -f "$list" ] || continue
    perl -i -pe '
        my $to = / \S+-security / ? $ENV{ICEBOX_SECURITY_MIRROR} : $ENV{ICEBOX_MIRROR};
        s{^(deb\s+(?:\[[^\]]*\]\s+)?)\S+}{$1$to} if $to' "$list"
done
for list in "$root"/etc/apt/sources.list.d/*.sources; do
    [ -f "$list" ] || continue
    perl -i -00 -pe '
        my $to = /^Suites:.*-security/m ? $ENV{ICEBOX_SECURITY_MIRROR} : $ENV{ICEBOX_MIRROR};
        s{^URIs:.*$}{URIs: $to}m if $to' "$list"
done
# Link what an earlier build downloaded; apt checks the size and takes what is missing. Another build may be pruning.
mkdir -p "$root/var/cache/apt/archives"
for deb in "$ICEBOX_DEB_CACHE"/*.deb; do
    [ -e "$deb" ] || continue
    ln "$deb" "$root/var/cache/apt/archives/" 2>/dev/null || cp "$deb" "$root/var/cache/apt/archives/" 2>/dev/null || true
done
