"""The programs and units of docs/guests.md, run in a real container and checked by a real systemd."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT
from tests.harness.service import Service

pytestmark = [pytest.mark.root]

SECTIONS = (CHECKOUT / "docs/guests.md").read_text().split("\n## ")


def snippets(title: str) -> list[str]:
    """Return the blocks of code in the section with this title."""
    (section,) = (text for text in SECTIONS if text.startswith(f"{title}\n"))
    return re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def guest(service: Service) -> Iterator[Container]:
    """A privileged container, whose root can enter the checkout."""
    with service.container("snippets", {"user.role": "frontend", "user.password": "x"}, base=None) as container:
        yield container


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that is visible in the instance, which has its own /dev and /tmp."""
    with tempfile.TemporaryDirectory(prefix="guestapi-", dir="/var/tmp") as path:
        yield Path(path)


def descendants(pid: int) -> list[int]:
    """Return the PIDs of all descendants of a process."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


@contextmanager
def running(guest: Container, directory: Path, *words: str | Path) -> Iterator[Iterator[str]]:
    """Run a program in the instance, with guestctl in its PATH; yield its lines."""
    shutil.copy(CHECKOUT / "guestapi/guest/guestctl.py", directory / "guestctl")
    (directory / "guestctl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "PYTHONPATH": str(CHECKOUT)}
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "GOCACHE": str(directory / "go"),
        "GO111MODULE": "off",
        "TMPDIR": str(directory),
    }
    enter = ["nsenter", "-t", str(guest.pid), "-a", f"--wdns={directory}", "timeout", "--signal=KILL", "100"]
    with subprocess.Popen([*enter, *words], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            for pid in reversed(descendants(process.pid)):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def changing(service: Service) -> Iterator[None]:
    """Change ``user.now`` repeatedly until the end of the block."""
    ended = threading.Event()

    def change() -> None:
        for number in itertools.count():
            if ended.is_set():
                return
            service.configure("snippets", user_now=str(number))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_python(service: Service, guest: Container, directory: Path) -> None:
    """Both programs print the instance's values and changes."""
    blocking, concurrent = snippets("In Python")
    (directory / "blocking.py").write_text(blocking + "\n")
    (directory / "with_asyncio.py").write_text(concurrent)
    with running(guest, directory, sys.executable, "blocking.py") as lines, changing(service):
        assert re.fullmatch(r"user\.now \d+\n", next(lines))
    assert service.instance("snippets").ready
    with running(guest, directory, sys.executable, "with_asyncio.py") as lines, changing(service):
        assert next(lines) == "frontend\n"
        assert re.fullmatch(r"user\.now \d+\n", next(lines))


def test_shell(service: Service, guest: Container, directory: Path) -> None:
    """The script waits for the key, and reports readiness."""
    (script,) = snippets("In shell scripts")
    with running(guest, directory, "sh", "-ec", script) as lines:
        assert list(lines) == ["role: frontend\n"]
    assert service.instance("snippets").ready


@pytest.mark.parametrize(
    ("title", "file", "command"), [("In Node", "x.js", ["node"]), ("In Go", "x.go", ["go", "run"])]
)
def test_other_languages(
    service: Service, guest: Container, directory: Path, title: str, file: str, command: list[str]
) -> None:
    """The program waits for the key, and prints changes."""
    (program,) = snippets(title)
    (directory / file).write_text(program)
    with running(guest, directory, *command, file) as lines, changing(service):
        assert next(lines) == "role: frontend\n"
        assert re.fullmatch(r"user\.now: \d+\n", next(lines))


def test_units(service: Service, guest: Container, directory: Path) -> None:
    """The units pass systemd-analyze verify, and their commands succeed."""
    waits, reports = snippets("In systemd units")
    program = directory / "guestctl"
    for name, unit in {"guest-key@.service": waits, "guest-ready.service": reports}.items():
        (directory / name).write_text(unit.replace("/usr/local/bin/guestctl", str(program)))
    (lines,) = (re.findall(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE) for unit in [waits])
    with running(guest, directory, program, *lines[0].replace("%i", "user.role").split()) as printed:
        assert list(printed) == ["frontend"]
    for name in ("guest-key@user.role.service", "guest-ready.service"):
        path = directory / name.replace("user.role", "")
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
        assert [line for line in done.stderr.splitlines() if str(directory) in line] == []
    with running(guest, directory, program, *re.findall(r"^ExecStart=\S+ (.*)$", reports, re.MULTILINE)):
        pass
