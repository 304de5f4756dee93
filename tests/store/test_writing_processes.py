"""Writers that run at the same time, are killed, or find no space."""

from __future__ import annotations

import os
import time

import pytest
from msgspec.structs import replace

from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.errors import StoreBusyError
from guestapi.store.lookup import get_instance
from guestapi.store.writing import Writer
from tests.store.processes import add, config_of, database, log_entries, other_process


def test_busy_store(settings: Settings, writer: Writer) -> None:
    """A writer waits for another's transaction as long as configured, then raises an error; later it can write."""
    add(writer)
    hasty = Writer(replace(settings, store=StoreSettings(url=settings.store.url, lock_seconds=0.3)))
    with writer.change():
        began = time.monotonic()
        with pytest.raises(StoreBusyError, match=r"store\.db: .*try again"), hasty.change():
            pass
        waited = time.monotonic() - began
    assert 0.25 < waited < 3
    with hasty.change() as change:
        steps.remove(change, get_instance(change, "default", "c1"))


def test_writer_waits_for_another(settings: Settings, writer: Writer) -> None:
    """Two processes that change the same instance at the same time lose no change."""
    code = """
for number in range(25):
    with Writer(settings).change() as change:
        one = get_instance(change, "default", "c1")
        steps.configure(change, one, {"user.sum": str(int(one.config.get("user.sum", "0")) + 1)})
"""
    add(writer)
    with other_process(settings, code) as first, other_process(settings, code) as second:
        first.done()
        second.done()
    assert config_of(settings) == {"user.sum": "50"}


@pytest.mark.parametrize("commits", [0, 1, 10])
def test_killed_writer_leaves_nothing_half_done(settings: Settings, writer: Writer, commits: int) -> None:
    """Whenever a writer is killed, its commits remain, and its last transaction remains completely or not at all."""
    code = """
writer = Writer(settings)
for number in range(1, 100_000):
    with writer.change() as change:
        for name in ("c1", "c2"):
            wanted = {"user.n": str(number), "user.pad": str(number) * 9}
            steps.configure(change, get_instance(change, "default", name), wanted)
    send(number)
"""
    add(writer, "c1")
    add(writer, "c2")
    with other_process(settings, code) as other:
        heard = [other.read_line() for _ in range(commits)]
        other.kill()
    first, second = config_of(settings, "c1"), config_of(settings, "c2")
    assert first == second
    number = int(first.get("user.n", "0"))
    assert number >= len(heard)
    assert len(log_entries(settings)) == 2 + 4 * number
    add(writer, "c3")


def test_writer_killed_in_a_transaction(settings: Settings, writer: Writer) -> None:
    """A transaction larger than the memory that is killed before its end leaves nothing, not even its lock."""
    code = """
with Writer(settings).change() as change:
    one = get_instance(change, "default", "c1")
    steps.configure(change, one, {f"user.{number}": "x" * 1_000_000 for number in range(8)})
    steps.add(change, "default", "c2")
    send("within")
    receive()
"""
    add(writer, a="1")
    log = log_entries(settings)
    with other_process(settings, code) as other:
        assert other.read_line() == "within"
        assert os.path.getsize(f"{database(settings)}-wal") > 1_000_000, "nothing was written before the commit"
        other.kill()
    assert config_of(settings) == {"a": "1"}
    assert log_entries(settings) == log
    add(writer, "c2")


def test_failure_to_commit(settings: Settings, writer: Writer) -> None:
    """Without space, a change fails with a sentence that names the file, and nothing of it is written."""
    code = """
import resource
writer = Writer(settings)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with writer.change() as change:
        steps.configure(change, get_instance(change, "default", "c1"), {"user.a": "2", "user.b": "x" * (2 << 20)})
except StoreError as error:
    send(error)
"""
    add(writer, **{"user.a": "1"})
    with other_process(settings, code) as other:
        sentence = other.done().strip()
    assert sentence.startswith(f"{database(settings)}: ")
    assert "\n" not in sentence
    assert config_of(settings) == {"user.a": "1"}
