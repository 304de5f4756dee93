#!/bin/sh
# unpack-daemon.sh lxd|incus DIRECTORY: Debian's packages of a daemon, with what they need and this machine has not,
# unpacked into a directory. They are not installed, for then they would run as services of this machine.
set -eu
kind=$1 directory=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial"
cat /etc/apt/sources.list >"$work/sources.list" 2>/dev/null || true
if [ "$kind" = incus ] && ! apt-cache show incus-base >/dev/null 2>&1; then
    # Debian 12 has it in its backports, which need not be among this machine's sources; they lie where its own do.
    . /etc/os-release
    place=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $VERSION_CODENAME" | head -n 1)
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$key] $place $VERSION_CODENAME-backports main" >>"$work/sources.list"
fi
get() {
    apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::State::lists="$work/lists" \
        -o Dir::Cache::archives="$work/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}
get update
case $kind in
lxd) packages='lxd lxd-client' ;;
incus) packages='incus-base incus-client' ;;
esac
# shellcheck disable=SC2086 # Words.
get -y --no-install-recommends --reinstall --download-only install $packages >/dev/null
mkdir -p "$directory.new"
for package in "$work"/archives/*.deb; do
    dpkg-deb -x "$package" "$directory.new"
done
mv "$directory.new" "$directory"
