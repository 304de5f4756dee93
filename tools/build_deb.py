#!/usr/bin/env python3
"""Builds the Debian package of this checkout for the running release of Debian, into a directory.

    tools/build_deb.py DIRECTORY [--environment ENVIRONMENT] [--compression TYPE]

`make deb` runs it in a root of each release (tools/debian_root.py), with the packages of `tools/packages list deb`. The
package has the locked environment in /usr/lib/guestapi, without files that only builds and tests need, and the files of
tools/installation.py. It depends on the minor version of Python that it was built with.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
DEBIAN = CHECKOUT / "debian"
PREFIX = "usr/lib/guestapi"

#: Files of an environment that are not read at run time: sources of extensions, and type hints.
BUILD_ONLY = frozenset({".c", ".cc", ".cpp", ".h", ".hpp", ".pxd", ".pyx", ".pxi", ".pyi", ".typed", ".rst"})
#: Directories of tests, and of code for tests.
TESTS = frozenset({"tests", "testing", "__pycache__"})
#: Parts of packages that guestapi does not use, as patterns below site-packages.
UNUSED = (
    # rich uses these to highlight source code and to show Markdown.
    "pygments*",
    "markdown_it*",
    "mdurl*",
    # Its benchmarks and commands.
    "falcon/bench",
    "falcon/cmd",
    "pip*",
    "*.dist-info/RECORD",
    "*.dist-info/INSTALLER",
    "*.dist-info/REQUESTED",
    "*.dist-info/direct_url.json",
)
#: Programs of the environment that stay; the others belong to packages that guestapi only imports.
PROGRAMS = frozenset({"guestapi", "guestapi-hook", "python", "python3"})

#: A unit that runs only for a moment, and must not be restarted after an upgrade.
MOMENTARY = "guestapi-rebind@.service"


def build(directory: Path, environment: Path | None = None, compression: str = "xz") -> Path:
    """Build the package.

    Args:
        directory: the directory of the package file.
        environment: an environment that `tools/venv` has made for "run" already; it is copied.
        compression: as dpkg-deb(1) names it.

    Returns:
        the package file.
    """
    version = read_version()
    release = read_release()
    with tempfile.TemporaryDirectory(prefix="guestapi-deb-") as name:
        stage = Path(name) / "stage"
        if environment is None:
            run("tools/venv", stage / PREFIX, "run", environment={"PYTHON": "/usr/bin/python3"})
        else:
            shutil.copytree(environment, stage / PREFIX, symlinks=True)
        manuals = Path(name) / "manuals"
        run(stage / PREFIX / "bin/python", "tools/manual.py", manuals)
        run("/usr/bin/python3", "tools/installation.py", "stage", stage, "--manuals", manuals)
        (site,) = (stage / PREFIX / "lib").glob("python3.*/site-packages")
        trim(stage / PREFIX, site)
        licences = list(find_licences(site))
        relocate(stage)
        document(stage, licences, release)
        architecture = run("dpkg", "--print-architecture").strip()
        full = f"{version}+deb{release}"
        write_control(stage, Path(name), full, version, architecture)
        directory.mkdir(parents=True, exist_ok=True)
        package = directory / f"guestapi_{full}_{architecture}.deb"
        run("dpkg-deb", "--root-owner-group", f"-Z{compression}", "--build", stage, package)
    return package


def run(*words: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a command in the checkout; a failure ends the build.

    Args:
        words: the program and its arguments.
        environment: variables in addition to those of this process.

    Returns:
        its standard output.
    """
    done = subprocess.run(
        list(map(str, words)),
        cwd=CHECKOUT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout}")
    return done.stdout


def read_version() -> str:
    """Return guestapi's version."""
    found = re.search(r'^__version__ = "(.*)"$', (CHECKOUT / "guestapi/__init__.py").read_text(), re.MULTILINE)
    assert found, "guestapi/__init__.py has the version"
    return found[1]


def read_release() -> str:
    """Return the number of the running Debian release, such as "12"."""
    found = re.search(r'^VERSION_ID="?(\d+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit("/etc/os-release has no VERSION_ID: build the package in a Debian release, by 'make deb'")
    return found[1]


def find_licences(site: Path) -> Iterator[tuple[str, str]]:
    """Yield the name of each package in the environment, and its licence according to its metadata."""
    for metadata in sorted([*site.glob("*.dist-info/METADATA"), *site.glob("*.egg-info/PKG-INFO")]):
        text = metadata.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
        name = re.search(r"^Name: (.*)$", text, re.MULTILINE)
        told = re.search(r"^License-Expression: (.*)$", text, re.MULTILINE) or re.search(
            r"^Classifier: License :: (?:OSI Approved :: )?(.*)$|^License: (.+)$", text, re.MULTILINE
        )
        if name and name[1] not in ("guestapi", "pip"):
            yield name[1], next((each for each in (told.groups() if told else ()) if each), "see its files")


def trim(prefix: Path, site: Path) -> None:
    """Remove files that are not needed at run time, and the symbols of extensions.

    Args:
        prefix: the environment.
        site: its site-packages.
    """
    for pattern in UNUSED:
        for path in site.glob(pattern):
            remove(path)
    for path in sorted(site.rglob("*")):
        if path.is_dir() and path.name in TESTS:
            remove(path)
    for path in sorted(site.rglob("*")):
        if path.suffix in BUILD_ONLY or path.name in ("pico_utils.h", "Makefile"):
            path.unlink()
        elif re.search(r"\.so(\.\d+)*$", path.name):
            run("strip", "--strip-unneeded", path)
            path.chmod(0o644)
    for program in (prefix / "bin").iterdir():
        if program.name not in PROGRAMS:
            remove(program)
    for unused in ("include", "share", "lib64", ".gitignore"):
        remove(prefix / unused)
    for path in sorted(site.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def remove(path: Path) -> None:
    """Remove a file, link or directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def relocate(stage: Path) -> None:
    """Set the environment's paths to its final place, and its interpreter to Debian's of its minor version."""
    binaries = stage / PREFIX / "bin"
    made = re.match(r"#!(/.*)/bin/python", (binaries / "guestapi").read_text())
    assert made, "the program names the environment's interpreter"
    for file in (binaries / "guestapi", stage / PREFIX / "pyvenv.cfg"):
        text = file.read_text().replace(made[1], f"/{PREFIX}")
        # The command that created it is of no use on the target.
        file.write_text(re.sub(r"^command = .*\n", "", text, flags=re.MULTILINE))
    for name in ("python", "python3"):
        remove(binaries / name)
        (binaries / name).symlink_to(f"/usr/bin/python3.{sys.version_info.minor}")
    command = stage / "usr/bin/guestapi"
    command.parent.mkdir(parents=True)
    command.symlink_to("../lib/guestapi/bin/guestapi")


def debian_changelog(release: str) -> str:
    """Return the releases of docs/changelog.md in Debian's form; each has midnight of its day as its time."""
    sections = re.split(r"^## ", (CHECKOUT / "docs/changelog.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        head, _, body = section.partition("\n")
        if head == "[Unreleased]":
            continue
        version = re.match(r"\[([^]]+)\] - (\d{4}-\d\d-\d\d)$", head)
        if version is None:
            raise SystemExit(f"docs/changelog.md: '## {head}' is not: ## [VERSION] - YEAR-MONTH-DAY")
        day = datetime.strptime(version[2], "%Y-%m-%d").replace(tzinfo=UTC)
        entries = [
            " ".join(each.split()) for each in re.split(r"^- ", body.partition("\n[")[0], flags=re.MULTILINE)[1:]
        ]
        entries = [re.sub(r" ### \w+$", "", each) for each in entries]
        wrapped = [
            textwrap.fill(each, 78, initial_indent="  * ", subsequent_indent="    ", break_long_words=False)
            for each in entries
        ]
        found += [
            f"guestapi ({version[1]}+deb{release}) stable; urgency=medium",
            "\n".join(wrapped),
            f" -- {read_maintainer()}  {format_datetime(day)}",
        ]
    return "\n\n".join(found) + "\n"


def read_maintainer() -> str:
    """Return the maintainer of the package: $DEBFULLNAME and $DEBEMAIL, as in Debian's tools."""
    name = os.environ.get("DEBFULLNAME", "The guestapi maintainers")
    return f"{name} <{os.environ.get('DEBEMAIL', 'guestapi@localhost')}>"


def document(stage: Path, licences: Sequence[tuple[str, str]], release: str) -> None:
    """Write /usr/share/doc/guestapi, and compress manual pages as Debian requires.

    Args:
        stage: the package's root.
        licences: names and licences of the Python packages in it.
        release: the number of the Debian release.
    """
    documents = stage / "usr/share/doc/guestapi"
    documents.mkdir(parents=True)
    for source in sorted((CHECKOUT / "docs").glob("*.md")):
        shutil.copyfile(source, documents / source.name)
    compress(debian_changelog(release).encode(), documents / "changelog.gz")
    names = "\n".join(f"  {name}: {licence}" for name, licence in licences)
    (documents / "copyright").write_text(
        "guestapi is licensed under the Apache License, version 2.0: /usr/share/common-licenses/Apache-2.0.\n"
        f"Copyright: {read_copyright()}\n\n"
        "/usr/lib/guestapi has these Python packages, unchanged but for parts that are left out. Their licences, as\n"
        "they state them; the texts lie beside each in *.dist-info:\n\n"
        f"{names}\n"
    )
    overrides = stage / "usr/share/lintian/overrides/guestapi"
    overrides.parent.mkdir(parents=True)
    shutil.copyfile(DEBIAN / "lintian-overrides", overrides)
    for page in (stage / "usr/share/man").rglob("*.[157]"):
        compress(page.read_bytes(), page.with_name(f"{page.name}.gz"))
        page.unlink()


def compress(content: bytes, target: Path) -> None:
    """Write a .gz file whose bytes depend only on the content."""
    with target.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(content)


def read_copyright() -> str:
    """Return the copyright holder from LICENSE, or the project's maintainers."""
    found = re.search(r"^\s*Copyright (\d{4}.*)$", (CHECKOUT / "LICENSE").read_text(), re.MULTILINE)
    return found[1] if found else "the guestapi maintainers"


def write_control(stage: Path, scratch: Path, full: str, version: str, architecture: str) -> None:
    """Write DEBIAN: control, conffiles, checksums, and the maintainer scripts.

    Args:
        stage: the package's root.
        scratch: a directory for temporary files.
        full: the package's version.
        version: guestapi's version.
        architecture: dpkg's name of the architecture.
    """
    control = stage / "DEBIAN"
    control.mkdir()
    files = sorted(path for path in stage.rglob("*") if path.is_file() and not path.is_symlink())
    files = [path for path in files if control not in path.parents]
    size = sum((path.lstat().st_size + 1023) // 1024 for path in stage.rglob("*"))
    units = sorted(path.name for path in (stage / "usr/lib/systemd/system").iterdir())
    plain = [unit for unit in units if "@." not in unit]
    patterns = [unit.replace("@.", "@*.") for unit in units if unit != MOMENTARY]
    minor = sys.version_info.minor
    values = {
        "VERSION": full,
        "UPSTREAM": version,
        "ARCHITECTURE": architecture,
        "SIZE": str(size),
        "MAINTAINER": read_maintainer(),
        "DEPENDS": f"python3 (>= 3.{minor}~), python3 (<< 3.{minor + 1}), {find_libraries(stage, scratch)}",
        "SERVICES": " ".join(f"'{unit}'" for unit in patterns if unit.endswith(".service")),
        # Sockets first, because they start their services.
        "ENABLED": " ".join(sorted(plain, key=lambda unit: not unit.endswith(".socket"))),
        "UNITS": " ".join(f"'{unit}'" for unit in patterns),
    }
    for name in ("control", "preinst", "postinst", "prerm", "postrm"):
        text = (DEBIAN / name).read_text()
        filled = re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], text)
        (control / name).write_text(filled)
        (control / name).chmod(0o644 if name == "control" else 0o755)
    configuration = [path for path in files if path.is_relative_to(stage / "etc")]
    (control / "conffiles").write_text("".join(f"/{path.relative_to(stage)}\n" for path in configuration))
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(stage)}\n"
        for path in files
        if path not in configuration
    )
    (control / "md5sums").write_text("".join(sums))
    for path in [stage, *stage.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
        elif not path.is_symlink() and control not in path.parents:
            # Installers of Python packages make files executable that nobody runs; tools/installation.py does not.
            ours = not path.is_relative_to(stage / PREFIX) or path.parent == stage / PREFIX / "bin"
            path.chmod(0o755 if ours and path.stat().st_mode & 0o100 else 0o644)


def find_libraries(stage: Path, scratch: Path) -> str:
    """Return the packages of the C libraries that the extensions need, as dpkg-shlibdeps finds them."""
    (scratch / "debian").mkdir()
    (scratch / "debian/control").write_text("Source: guestapi\n\nPackage: guestapi\nArchitecture: any\n")
    extensions = [f"-e{path}" for path in sorted(stage.rglob("*")) if re.search(r"\.so(\.\d+)*$", path.name)]
    done = subprocess.run(
        ["dpkg-shlibdeps", "-O", "--ignore-missing-info", *extensions],
        cwd=scratch,
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^shlibs:Depends=(.*)$", done.stdout, re.MULTILINE)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"dpkg-shlibdeps failed:\n{done.stderr}")
    return found[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and build the package.

    Args:
        arguments: the command line without the program's name; default: this process's own.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the package is written to")
    parser.add_argument("--environment", type=Path, help="an environment of tools/venv to copy, instead of a new one")
    parser.add_argument("--compression", default="xz", help="of the package, as dpkg-deb names it; default: xz")
    given = parser.parse_args(arguments)
    print(build(given.directory.absolute(), given.environment, given.compression))
    return 0


if __name__ == "__main__":
    sys.exit(main())
