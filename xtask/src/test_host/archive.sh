# Where the test host's packages come from. Sourced by kernel.sh and root.sh.
#
# The mirror and the way to it are those of this machine's own apt; only the archive's keys decide what is accepted.
# shellcheck shell=bash

readonly SUITE=bookworm
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

say() { printf 'test host: %s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# URI from which this machine takes a release, or one like it, of the archive whose releases end in $1.
mirror() {
    local release found
    for release in "$SUITE$1" "$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release | tr -d '"')$1" "stable$1"; do
        found=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
            awk -v release="$release" '$2 == release && $3 == "main" && !found { found = 1; print $1 }')
        if [ -n "$found" ]; then
            printf '%s\n' "${found%/}"
            return
        fi
    done
    die "this machine's apt sources name no Debian archive to take $SUITE$1 from"
}

# Runs mmdebstrap with our suite, mirror and network options: bootstrap TARGET OPTIONS…
bootstrap() {
    local target=$1 main security work
    shift
    main=$(mirror '')
    security=$(mirror -security)
    work=$(mktemp -d)
    # A file and not an argument: a proxy may have a password.
    apt-config dump --format '%F "%v";%n' |
        grep -E '^Acquire::(https?::|Check-Valid-Until |Check-Date |ForceIP)' >"$work/apt.conf" || true
    printf 'Acquire::Retries "5";\n' >>"$work/apt.conf"
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    mmdebstrap --mode=root --variant=minbase \
        --aptopt="$work/apt.conf" --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        "$@" "$SUITE" "$target" \
        "deb [signed-by=$KEYRING] $main $SUITE main contrib" \
        "deb [signed-by=$KEYRING] $main $SUITE-updates main contrib" \
        "deb [signed-by=$KEYRING] $security $SUITE-security main contrib" \
        "deb [signed-by=$KEYRING] $main $SUITE-backports main contrib"
}
