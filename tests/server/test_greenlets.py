"""Greenlets that run one task after another."""

from __future__ import annotations

import gc
import weakref

import gevent
import pytest
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
