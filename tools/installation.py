#!/usr/bin/env python3
"""Installs guestapi's files other than the virtual environment, and removes them.

    tools/installation.py may-install [--destdir DIRECTORY]
    tools/installation.py install [--destdir DIRECTORY] [--prefix /opt/guestapi]
    tools/installation.py uninstall [--destdir DIRECTORY] [--prefix /opt/guestapi]
    tools/installation.py stage DIRECTORY

`may-install` exits with 1 and the reason if a Debian package of guestapi is installed. `install` and `uninstall` are
for `make install` and `make uninstall`; `stage` lays the files out for a Debian package.

All of them share one list of files, `find_files`.

A configuration file that the operator has edited stays, as with dpkg: `install` writes the new one beside it as .new
only if it differs from its predecessor, and `uninstall` removes only unedited files. PREFIX/share/guestapi keeps the
files of the last installation, for comparison.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]

#: The paths of the environment and the command in the files of the checkout, which `install` replaces by the real ones.
PREFIX = "/opt/guestapi"
COMMAND = "/usr/local/bin/guestapi"


class Kind(Enum):
    """The kind of an installed file, on which `uninstall` and upgrades depend."""

    #: Belongs to guestapi: overwritten, and removed.
    OURS = "ours"
    #: Edited by the operator: neither overwritten nor removed after that.
    EDITED = "edited"
    #: Included by containers' configurations: overwritten, but never removed, because they would not start without it.
    INCLUDED = "included"


@dataclass(frozen=True)
class Layout:
    """The places of files on the system.

    Attributes:
        destdir: a prefix of each path; "/" for this system.
        prefix: the virtual environment.
        command: the link to its program.
        units: systemd's units.
        share: manual pages and completions.
        zsh: the directory for zsh's completions in `share`.
    """

    destdir: Path
    prefix: str = PREFIX
    command: str = COMMAND
    units: str = "/etc/systemd/system"
    share: str = "/usr/local/share"
    zsh: str = "zsh/site-functions"

    def place(self, path: str) -> Path:
        """Return the place to which a path of the system is written."""
        return self.destdir / path.lstrip("/")

    @property
    def pristine(self) -> Path:
        """The directory with the files of `Kind.EDITED` from the last installation."""
        return self.place(f"{self.prefix}/share/guestapi")


@dataclass(frozen=True)
class File:
    """A file of the checkout, and its place.

    Attributes:
        source: its path in the checkout.
        path: its path on the system.
        kind: its kind.
        mode: its permissions.
    """

    source: Path
    path: str
    kind: Kind = Kind.OURS
    mode: int = 0o644


def package_layout(destdir: Path) -> Layout:
    """Return the layout of a Debian package: below /usr, except for configuration."""
    return Layout(
        destdir,
        "/usr/lib/guestapi",
        "/usr/bin/guestapi",
        "/usr/lib/systemd/system",
        "/usr/share",
        "zsh/vendor-completions",
    )


def find_files(layout: Layout) -> Iterator[File]:
    """Yield the files other than the virtual environment, manual pages and completions."""
    systemd, conf = CHECKOUT / "systemd", CHECKOUT / "conf"
    for unit in sorted([*systemd.glob("*.service"), *systemd.glob("*.socket")]):
        yield File(unit, f"{layout.units}/{unit.name}")
    # A program of its own: a container waits for it, so it must not load the environment.
    yield File(CHECKOUT / "guestapi/sources/hook.py", f"{layout.prefix}/bin/guestapi-hook", mode=0o755)
    # For operators to copy into instances.
    yield File(CHECKOUT / "guestapi/guest/guestctl.py", f"{layout.share}/guestapi/guestctl", mode=0o755)
    yield File(CHECKOUT / "guestapi/guest/agent.py", f"{layout.share}/guestapi/guestapi-agent", mode=0o755)
    for unit in sorted((systemd / "agent").iterdir()):
        yield File(unit, f"{layout.share}/guestapi/{unit.name}")
    yield File(systemd / "guestapi.sysusers", "/usr/lib/sysusers.d/guestapi.conf")
    yield File(systemd / "guestapi.tmpfiles", "/usr/lib/tmpfiles.d/guestapi.conf")
    for edited in ("guestapi.toml", "gunicorn.conf.py"):
        yield File(conf / edited, f"/etc/guestapi/{edited}", Kind.EDITED)
    # For container runtimes and hosts with a daemon; docs/lxc.md, podman.md, nspawn.md and incus.md describe their use.
    for ours in sorted([*systemd.glob("*.conf"), *conf.glob("*.conf"), *conf.glob("*.json")]):
        kind = Kind.INCLUDED if ours.name == "lxc-guestapi.conf" else Kind.OURS
        yield File(ours, f"/etc/guestapi/{ours.name}", kind)


def find_manuals(layout: Layout, directory: Path) -> Iterator[File]:
    """Yield the manual pages and completions that tools/manual.py has written into `directory`."""
    places = {
        ".1": f"{layout.share}/man/man1",
        ".5": f"{layout.share}/man/man5",
        ".7": f"{layout.share}/man/man7",
        ".bash": f"{layout.share}/bash-completion/completions",
        ".zsh": f"{layout.share}/{layout.zsh}",
        ".fish": f"{layout.share}/fish/vendor_completions.d",
    }
    for source in sorted(directory.iterdir()):
        name = {".bash": source.stem, ".zsh": f"_{source.stem}"}.get(source.suffix, source.name)
        yield File(source, f"{places[source.suffix]}/{name}")


def write(file: File, layout: Layout) -> None:
    """Write a file to its place with its final content; a file with this content is not touched."""
    target = layout.place(file.path)
    content = file.source.read_text(encoding="utf-8")
    content = content.replace(COMMAND, layout.command).replace(PREFIX, layout.prefix)
    if target.is_file() and target.read_text(encoding="utf-8") == content:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    target.chmod(file.mode)


def install_edited(file: File, layout: Layout) -> None:
    """Write a configuration file; if the operator has edited it, write a changed one as .new instead."""
    target, last = layout.place(file.path), layout.pristine / file.source.name
    new = target.with_name(f"{target.name}.new")
    as_before = last.is_file() and filecmp.cmp(last, file.source, shallow=False)
    untouched = target.is_file() and last.is_file() and filecmp.cmp(target, last, shallow=False)
    same = target.is_file() and filecmp.cmp(target, file.source, shallow=False)
    if untouched or not target.exists() or same:
        write(file, layout)
        new.unlink(missing_ok=True)
    elif not as_before:
        write(File(file.source, f"{file.path}.new"), layout)
        print(f"{file.path} was edited and stays; what is new is in {file.path}.new")
    last.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file.source, last)


def find_package(layout: Layout) -> str | None:
    """Return the command of an installed Debian package of guestapi, or None."""
    command = package_layout(layout.destdir).place(package_layout(layout.destdir).command)
    return str(command) if command.is_symlink() else None


def install(layout: Layout, manuals: Path | None) -> None:
    """Install all files."""
    for file in [*find_files(layout), *(find_manuals(layout, manuals) if manuals else ())]:
        if file.kind is Kind.EDITED:
            install_edited(file, layout)
        else:
            write(file, layout)
    command = layout.place(layout.command)
    command.parent.mkdir(parents=True, exist_ok=True)
    command.unlink(missing_ok=True)
    command.symlink_to(f"{layout.prefix}/bin/guestapi")
    layout.place("/var/lib/guestapi").mkdir(mode=0o770, parents=True, exist_ok=True)
    if layout.destdir == Path("/"):
        subprocess.run(["systemd-sysusers", "guestapi.conf"], check=True)
        subprocess.run(["systemd-tmpfiles", "--create", "guestapi.conf"], check=True)
        systemctl("daemon-reload")
        print("installed; now: systemctl enable --now guestapi.socket")


def uninstall(layout: Layout) -> None:
    """Stop the units and remove the files, except edited and included configuration, and the state."""
    if layout.destdir == Path("/"):
        units = [Path(file.path).name for file in find_files(layout) if file.path.startswith(layout.units)]
        running = [unit.replace("@.", "@*.") for unit in units]
        systemctl("stop", *running)
        systemctl("disable", "--quiet", *(unit for unit in units if "@." not in unit), *find_instances(layout))
    stays = [
        "/var/lib/guestapi, the store, and the users guestapi, to whom it belongs, guestapi-mirror and guestapi-fleet",
        "/var/lib/guestapi-signer, keys that sign identities, and the user guestapi-signer, to whom they belong",
    ]
    for pattern in ("man/man?", "bash-completion/completions", layout.zsh, "fish/vendor_completions.d"):
        for program in ("guestapi", "guestctl"):
            for path in layout.place(layout.share).glob(f"{pattern}/*{program}*"):
                path.unlink()
    for file in find_files(layout):
        target = layout.place(file.path)
        if not target.exists():
            continue
        if file.kind is Kind.INCLUDED:
            stays.append(f"{file.path}, without which containers that include it would not start")
            continue
        if file.kind is Kind.EDITED:
            target.with_name(f"{target.name}.new").unlink(missing_ok=True)
            pristine = layout.pristine / file.source.name
            before = pristine if pristine.is_file() else file.source
            if not filecmp.cmp(target, before, shallow=False):
                stays.append(f"{file.path}, which was edited")
                continue
        target.unlink()
    shutil.rmtree(layout.place(f"{layout.share}/guestapi"), ignore_errors=True)
    layout.place(layout.command).unlink(missing_ok=True)
    shutil.rmtree(layout.place(layout.prefix), ignore_errors=True)
    directory = layout.place("/etc/guestapi")
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
    if layout.destdir == Path("/"):
        # What the units have made. Directories that profiles of Incus or LXD mount stay.
        run = Path("/run/guestapi")
        for name in ("metrics", "sources"):
            shutil.rmtree(run / name, ignore_errors=True)
        (run / "metrics.sock").unlink(missing_ok=True)
        if run.is_dir() and not any(run.iterdir()):
            run.rmdir()
        systemctl("daemon-reload")
    print("these stay:", *stays, sep="\n  ")


def find_instances(layout: Layout) -> list[str]:
    """Return the enabled instances of template units, such as guestapi-takeover@incus.service."""
    links = layout.place("/etc/systemd/system").glob("*.wants/guestapi-*@*.service")
    return sorted({link.name for link in links})


def systemctl(*words: str) -> None:
    """Run systemctl if systemd runs; a missing unit is no error."""
    if Path("/run/systemd/system").is_dir():
        subprocess.run(["systemctl", *words], check=False, stderr=subprocess.DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and run its command.

    Args:
        arguments: the command line without the program's name; default: this process's own.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("may-install", "install", "uninstall"):
        each = verbs.add_parser(verb)
        each.add_argument("--destdir", default="", help="what stands before each path")
        each.add_argument("--prefix", default=PREFIX, help="where the virtual environment is")
        if verb == "install":
            each.add_argument("--manuals", type=Path, help="the directory that tools/manual.py has written")
    staged = verbs.add_parser("stage")
    staged.add_argument("destdir")
    staged.add_argument("--manuals", type=Path, required=True)
    given = parser.parse_args(arguments)
    os.umask(0o022)
    if given.verb == "stage":
        layout = package_layout(Path(given.destdir).absolute())
        for file in [*find_files(layout), *find_manuals(layout, given.manuals)]:
            write(file, layout)
        return 0
    layout = Layout(Path(given.destdir).absolute() if given.destdir else Path("/"), given.prefix)
    if given.verb == "may-install":
        if package := find_package(layout):
            print(f"{package} is of a Debian package: run 'apt-get remove guestapi' first, or install a newer package")
            return 1
    elif given.verb == "install":
        install(layout, given.manuals)
    else:
        uninstall(layout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
