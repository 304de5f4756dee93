"""Other processes that use a store, and short steps of tests."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from guestapi.model import Init, Instance
from guestapi.settings import Settings
from guestapi.store import steps
from guestapi.store.engine import database_file
from guestapi.store.lookup import get_instance, list_instances
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.harness.waiting import TIMEOUT

_PROLOGUE = """
import sys
from guestapi.settings import Settings, StoreSettings
from guestapi.store.reading import Reader
from guestapi.store.view import view
from guestapi.store import steps
from guestapi.store.lookup import find_instance, get_instance, list_instances
from guestapi.errors import GuestapiError
from guestapi.store.errors import StoreError
from guestapi.store.writing import Writer

settings = Settings(store=StoreSettings(url=sys.argv[1], lock_seconds=20.0))
def send(word):
    print(word, flush=True)
def receive():
    return sys.stdin.readline().strip()
"""


def init(number: int, start_time: int = 1) -> Init:
    """Return an init that belongs to no process."""
    return Init(number, start_time, "boot", 4_026_531_000 + number)


def log_entries(settings: Settings) -> list[tuple[str, str, bool]]:
    """Return the entries of the change log in order: type, metadata and whether guests receive it."""
    reader = Reader(settings.store.url)
    found = reader.entries(0, 1_000_000).found
    reader.close()
    return [(one.type, one.metadata, one.for_guest) for one in found]


def config_of(settings: Settings, name: str = "c1", project: str = "default") -> dict[str, str]:
    """Return an instance's configuration, read over a new connection."""
    with view(settings.store.url) as store:
        return dict(get_instance(store, project, name).config)


def add(writer: Writer, name: str = "c1", **options: str) -> Instance:
    """Add an instance in a transaction of its own."""
    with writer.change() as change:
        return steps.add(change, "default", name, config=options)


def start(writer: Writer, instance: Instance, pid: int = 100) -> Instance:
    """Start an instance in a transaction of its own."""
    with writer.change() as change:
        return steps.start(change, instance, init(pid))


def known(settings: Settings) -> list[Instance]:
    """Return all instances of the store."""
    with view(settings.store.url) as store:
        return list_instances(store)


class Other:
    """Another process that runs Python code with `settings`, `send` and `receive`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def read_line(self) -> str:
        """Return the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def write_line(self, word: str) -> None:
        """Send a line to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Kill it at once, as by a power cut."""
        self._process.kill()
        self._process.wait(TIMEOUT)

    def end(self) -> int:
        """Wait for its end; return its exit code."""
        self._process.communicate(timeout=TIMEOUT)
        return self._process.returncode

    def done(self) -> str:
        """Wait for its end, which must be successful; return the rest of its output."""
        out, _ = self._process.communicate(timeout=TIMEOUT)
        assert self._process.returncode == 0, out
        return out


@contextmanager
def other_process(settings: Settings, code: str, user: int | None = None) -> Iterator[Other]:
    """Run `code` in another process, as another user if one is given; it is killed at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROLOGUE + code, settings.store.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
        cwd="/",
    ) as process:
        try:
            yield Other(process)
        finally:
            process.kill()


def database(settings: Settings) -> Path:
    """Return the path of the store's file."""
    return database_file(settings.store.url)


def restore(settings: Settings, version: int) -> None:
    """Put a store of an older version in place."""
    with closing(sqlite3.connect(database(settings))) as connection:
        connection.executescript(Path(__file__).with_name(f"version-{version}.sql").read_text())
