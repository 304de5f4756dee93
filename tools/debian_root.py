#!/usr/bin/env python3
"""Debian root file systems of any suite: built once, kept in a cache, used through a temporary overlay.

    tools/debian_root.py build trixie --package gcc
    tools/debian_root.py run trixie --package make --checkout -- make help

`build` prints the directory of a root with these packages. `run` runs a command in such a root, as root, with the
privileges to make containers: its mounts, PIDs and IPC are private, its network is the host's, and everything that it
writes is removed when it ends. `--checkout` puts the files of the checkout into /srv/guestapi and runs the command
there; `--bind HOST:ROOT` lets the command read and write a directory of the host.

Needs root, mmdebstrap and a Debian mirror: $DEBIAN_MIRROR, or the one of the host's apt. The cache is $GUESTAPI_CACHE
(~/.cache/guestapi); it can be removed at any time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("GUESTAPI_CACHE", Path.home() / ".cache" / "guestapi"))
CHECKOUT = Path(__file__).resolve().parents[1]

#: The place of the checkout for `--checkout`: a directory that every user can enter.
INSIDE = "/srv/guestapi"

#: Seconds after which a root is built again, so that updates of Debian reach the tests: two weeks.
MAX_AGE = 14 * 24 * 3600.0

#: To be raised when `build_root` makes a different root from the same packages.
VERSION = 1

#: The keys that verify Debian's sources, and the certificates for TLS connections.
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

#: Variables that are passed to the command unchanged.
PASSED = (
    "CI",
    "TERM",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "PIP_INDEX_URL",
    "PIP_DEFAULT_TIMEOUT",
    "DEBIAN_MIRROR",
)

#: Run by the host's shell in new namespaces. $1: root of the cache, $2: scratch directory; then pairs of directories to
#: bind until "--", then the command. Container runtimes get directories outside of the overlay for their own overlays.
_ENTER = """
set -e
mount --make-rprivate /
lower=$1; scratch=$2; root=$2/root; shift 2
mkdir "$scratch/upper" "$scratch/work" "$root"
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=0755 tmpfs "$root/run"
for each in tmp var/tmp var/lib/containers var/lib/lxc; do
    mkdir -p "$scratch/plain/$each" "$root/$each"
    mount --bind "$scratch/plain/$each" "$root/$each"
done
chmod 1777 "$root/tmp" "$root/var/tmp"
while [ "$1" != -- ]; do
    mkdir -p "$root/$2"
    mount --bind "$1" "$root/$2"
    shift 2
done
shift
cp --remove-destination /etc/resolv.conf "$root/etc/resolv.conf"
cd "$root"
mkdir -p .old
pivot_root . .old
umount -l /.old
rmdir /.old
cd "$WORKING_DIRECTORY"
# The shell stays as PID 1, which has to reap orphans.
"$@" && code=0 || code=$?
exit $code
"""


class RootError(Exception):
    """A root cannot be built or entered; the message has the reason and a hint."""


@dataclass(frozen=True)
class BoundDirectory:
    """A directory of the host, and its path for the command."""

    host: Path
    inside: str

    @classmethod
    def parse(cls, text: str) -> BoundDirectory:
        """Parse "HOST:ROOT", or "DIRECTORY" for the same path in both.

        Args:
            text: the argument of `--bind`.

        Returns:
            the two paths, both absolute.

        Raises:
            argparse.ArgumentTypeError: the host has no such directory.
        """
        host, _, inside = text.partition(":")
        path = Path(host).resolve()
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"{host} is not a directory")
        return cls(path, inside or str(path))


def find_mirror() -> str:
    """Return the URL of a Debian mirror: $DEBIAN_MIRROR, or that of the host's apt."""
    if mirror := os.environ.get("DEBIAN_MIRROR"):
        return mirror
    for name in ("sources.list.d/debian.sources", "sources.list"):
        file = Path("/etc/apt") / name
        text = file.read_text() if file.exists() else ""
        if found := re.search(r"^(?:URIs:|deb(?: \[[^]]*\])?) *(http\S+)", text, re.MULTILINE):
            return found.group(1)
    sys.exit("no Debian mirror is known; set DEBIAN_MIRROR to the URL of one")


def build_root(suite: str, packages: Sequence[str]) -> Path:
    """Return a root of `suite` with `packages` installed; build it if the cache has none.

    Args:
        suite: Debian's name of it, such as "trixie".
        packages: names of Debian packages, in addition to minbase, ca-certificates and Python.

    Returns:
        its directory. Other processes use it, too; it must not be written.

    Raises:
        RootError: it cannot be built here.
    """
    wanted = sorted({"ca-certificates", "python3", *packages})
    key = hashlib.sha256(repr((VERSION, suite, wanted)).encode()).hexdigest()[:12]
    roots = CACHE / "roots"
    root = roots / f"{suite}-{key}"
    roots.mkdir(parents=True, exist_ok=True)
    with (roots / f"{root.name}.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if root.is_dir() and time.time() - root.stat().st_mtime < MAX_AGE:
            return root
        if os.geteuid() != 0:
            raise RootError("a Debian root is built as root")
        if shutil.which("mmdebstrap") is None:
            raise RootError("mmdebstrap is missing; install it: apt-get install mmdebstrap")
        building = roots / f"{root.name}.building"
        shutil.rmtree(building, ignore_errors=True)
        print(f"building a root of Debian {suite} in {root}", file=sys.stderr)
        _bootstrap(suite, wanted, building)
        # The root trusts the same certificates as the host, which may be behind a proxy.
        if CERTIFICATES.exists():
            shutil.copyfile(CERTIFICATES, building / "etc/ssl/certs/ca-certificates.crt")
        shutil.rmtree(root, ignore_errors=True)
        building.rename(root)
        os.utime(root)
    return root


def _bootstrap(suite: str, packages: Sequence[str], directory: Path) -> None:
    """Install the packages into a new directory; a failure shows the end of mmdebstrap's output."""
    done = subprocess.run(
        [
            *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--format=directory"),
            *(f"--include={','.join(packages)}", f"--keyring={KEYRING}"),
            *(f"--aptopt={option}" for option in _host_options()),
            *('--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"'),
            *("--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*"),
            *(suite, str(directory), find_mirror()),
        ],
        # A root is not booted; an image that is made from it gets its own initrd.
        env={**os.environ, "INITRD": "No"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(directory, ignore_errors=True)
        raise RootError(f"mmdebstrap could not build Debian {suite}:\n{done.stderr[-3000:]}")


def _host_options() -> list[str]:
    """Return how the host's apt checks the age of a mirror's suites: those of a mirror that stands still expire."""
    if shutil.which("apt-config") is None:
        return []
    dumped = subprocess.run(
        ["apt-config", "dump", "Acquire::Check-Valid-Until"], capture_output=True, text=True, check=False
    )
    return [line.rstrip(";") for line in dumped.stdout.splitlines()]


def copy_checkout(target: Path) -> None:
    """Copy the checkout's files, tracked or new, except those that git ignores.

    Args:
        target: a directory, which is created.
    """
    listed = subprocess.run(
        ["git", "-C", CHECKOUT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    # The list includes deleted files that are still tracked.
    names = [
        name for name in listed.stdout.split(b"\0") if name and os.path.lexists(os.fsencode(CHECKOUT) + b"/" + name)
    ]
    target.mkdir(parents=True)
    packed = subprocess.run(
        ["tar", "--create", "--directory", CHECKOUT, "--null", "--files-from=-"],
        input=b"\0".join(names),
        stdout=subprocess.PIPE,
        check=True,
    )
    subprocess.run(
        ["tar", "--extract", "--no-same-owner", "--directory", target],
        input=packed.stdout,
        stdout=subprocess.PIPE,
        check=True,
    )


def run(root: Path, command: Sequence[str], *, binds: Sequence[BoundDirectory] = (), checkout: bool = False) -> int:
    """Run a command over a root; everything that it writes is removed when it ends, except in `binds`.

    Args:
        root: the result of `build_root`.
        command: the program, as the root's PATH finds it, and its arguments.
        binds: directories of the host.
        checkout: whether the command runs in a copy of the checkout.

    Returns:
        its exit status.

    Raises:
        RootError: this process is not root.
    """
    if os.geteuid() != 0:
        raise RootError("a Debian root is entered as root")
    scratch = Path(tempfile.mkdtemp(prefix="guestapi-root-", dir="/var/tmp"))
    # Programs of other users run in it, too.
    scratch.chmod(0o755)
    try:
        mounted = list(binds)
        if checkout:
            copy_checkout(scratch / "checkout")
            mounted.insert(0, BoundDirectory(scratch / "checkout", INSIDE))
        pip = Path.home() / ".cache/pip"
        pip.mkdir(parents=True, exist_ok=True)
        mounted.append(BoundDirectory(pip, "/root/.cache/pip"))
        environment = {name: os.environ[name] for name in PASSED if name in os.environ}
        environment |= {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "WORKING_DIRECTORY": INSIDE if checkout else "/root",
        }
        if CERTIFICATES.exists():
            environment["PIP_CERT"] = str(CERTIFICATES)
        pairs = [word for bind in mounted for word in (str(bind.host), bind.inside)]
        enter = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        done = subprocess.run(
            [*enter, "/bin/bash", "-c", _ENTER, "enter", str(root), str(scratch), *pairs, "--", *command],
            env=environment,
            check=False,
        )
        return done.returncode
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and build or run.

    Args:
        arguments: the command line without the program's name; default: this process's own.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    build = verbs.add_parser("build", help="print the directory of a root, which is built where the cache has none")
    enter = verbs.add_parser("run", help="run a command in a root; what it writes is gone when it ends")
    for verb in (build, enter):
        verb.add_argument("suite", help="a suite of Debian: bookworm, trixie")
        verb.add_argument("--package", dest="packages", action="extend", nargs="+", default=[], metavar="PACKAGE")
    enter.add_argument("--checkout", action="store_true", help=f"run it in {INSIDE}, a copy of the checkout")
    enter.add_argument(
        "--bind", dest="binds", action="append", type=BoundDirectory.parse, default=[], metavar="HOST:ROOT"
    )
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    given, command = parser.parse_args(words[:cut]), words[cut + 1 :]
    try:
        root = build_root(given.suite, given.packages)
        if given.verb == "build":
            print(root)
            return 0
        if not command:
            parser.error("the command is missing: ... -- COMMAND")
        return run(root, command, binds=given.binds, checkout=given.checkout)
    except RootError as error:
        print(f"debian_root.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
