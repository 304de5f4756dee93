"""An operator's session at a server whose process is stopped: the kernel goes on answering for it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from guestapi.fleet import engine
from guestapi.fleet.engine import FleetError, UncertainError, commit, session
from tests.fleet.conftest import Fleet
from tests.harness.waiting import until

pytestmark = pytest.mark.root

_WRITE = "UPDATE guestapi.hosts SET revision = revision + 1 WHERE name = 'h1'"


@pytest.fixture(autouse=True)
def _in_doubt_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_DOUBT_SECONDS", 0.3)
    # The shortest that there is.
    monkeypatch.setattr(engine, "_CONNECT_SECONDS", 2)


def test_a_question_ends(fleet: Fleet) -> None:
    """A question to a server that is stopped ends with an error."""
    with pytest.raises(FleetError, match="has stopped answering"):
        _ask(fleet)


def test_a_commit_ends(fleet: Fleet) -> None:
    """A server that is stopped while it commits was lost: the next one is to be asked what became of the change."""
    with pytest.raises(UncertainError) as caught:
        _commit(fleet)
    assert caught.value.lost


def test_a_lock_is_waited_for(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that lives is waited for, as long as it takes."""
    answers = engine._Watch._answers
    found: list[bool] = []

    def note(watch: engine._Watch) -> bool:
        found.append(answers(watch))
        return found[-1]

    monkeypatch.setattr(engine._Watch, "_answers", note)
    with fleet.admin() as other, ThreadPoolExecutor(1) as pool:
        other.execute("BEGIN")
        other.execute(_WRITE)
        waiting = pool.submit(_write, fleet)
        until(lambda: len(found) == 3, "three doubts")
        other.execute("COMMIT")
        waiting.result()
    assert all(found)


def _ask(fleet: Fleet) -> None:
    with session(_url(fleet)) as connection, _frozen(fleet):
        connection.execute("SELECT 1")


def _commit(fleet: Fleet) -> None:
    with session(_url(fleet)) as connection:
        connection.execute("BEGIN")
        connection.execute(_WRITE)
        with _frozen(fleet):
            commit(connection)


@contextmanager
def _frozen(fleet: Fleet) -> Iterator[None]:
    fleet.server.freeze()
    try:
        yield
    finally:
        fleet.server.thaw()


def _write(fleet: Fleet) -> None:
    with session(_url(fleet)) as connection:
        connection.execute(_WRITE)


def _url(fleet: Fleet) -> str:
    return fleet.server.url(fleet.database)
