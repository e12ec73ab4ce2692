set -eu
# A misspelt name would otherwise show only after everything else is installed. An empty answer is an unknown name; one
# that is provided by other packages has an answer.
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
for package in $ICEBOX_INCLUDE; do
    if [ -z "$(apt-cache showpkg "$package" 2>/dev/null)" ]; then
        echo "E: Unable to locate package $package" >&2
        exit 1
    fi
done
