"""Greenlets that run one task after another."""

from __future__ import annotations

import gc
import weakref

import gevent
import pytest
from gevent.hub import get_hub
from greenlet import getcurrent, greenlet

from guestapi.server import greenlets
from guestapi.server.greenlets import GreenletPool


class Work:
    """A task that yields to the event loop once."""

    def __init__(self, done: list[greenlet]) -> None:
        self._done = done

    def do(self) -> None:
        """Record the greenlet."""
        gevent.sleep(0)
        # The greenlet itself: its number could be reused after its end.
        self._done.append(getcurrent())


def test_sequential_tasks_share_a_greenlet() -> None:
    """A task that starts after the end of another runs in the same greenlet."""
    pool, done = GreenletPool(), list[greenlet]()
    with gevent.Timeout(10):
        for number in range(1, 6):
            pool.run(Work(done).do)
            while len(done) < number:
                gevent.sleep(0.001)
    assert len(set(done)) == 1


def test_concurrent_tasks_have_a_greenlet_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Concurrent tasks run in a greenlet each; few idle greenlets are kept."""
    monkeypatch.setattr(greenlets, "_MOST_IDLE", 3)
    pool, done = GreenletPool(), list[greenlet]()
    with gevent.Timeout(10):
        for _one in range(20):
            pool.run(Work(done).do)
        while len(done) < 20:
            gevent.sleep(0.001)
        assert len(set(done)) == 20
        for _one in range(20):
            pool.run(Work(done).do)
        while len(done) < 40:
            gevent.sleep(0.001)
    assert len(set(done[20:]) & set(done[:20])) <= 3


def test_task_that_runs_now() -> None:
    """A task that the event loop runs now has run, up to its first wait, when the call returns."""
    pool, seen = GreenletPool(), list[str]()

    def task() -> None:
        seen.append("begun")
        gevent.sleep(0)
        seen.append("over")

    def run() -> None:
        pool.run_now(task)
        seen.append("returned")

    with gevent.Timeout(10):
        for _time in range(2):
            get_hub().loop.run_callback(run)
            while "over" not in seen:
                gevent.sleep(0)
            assert seen == ["begun", "returned", "over"]
            seen.clear()


def test_nothing_is_kept() -> None:
    """An idle greenlet keeps no reference to the task that it ran."""
    pool, done = GreenletPool(), list[greenlet]()
    work = Work(done)
    gone = weakref.ref(work)
    pool.run(work.do)
    del work
    with gevent.Timeout(10):
        while not done:
            gevent.sleep(0.001)
    gc.collect()
    assert gone() is None
