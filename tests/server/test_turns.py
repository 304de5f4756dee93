"""Turns: of instances first, of their connections then; nobody waits for more than a few of each other's."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import gevent
import pytest
from gevent.hub import get_hub

from guestapi.server.turns import ALONE, EACH_TURN, LARGE, Places, Turns


class Connections:
    """Connections of some instances, whose turns are noted in order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self._sockets: list[socket.socket] = []
        self._turns: list[Turns] = []

    def turns(self) -> Turns:
        """Those of one more instance."""
        self._turns.append(Turns(lambda: False))
        return self._turns[-1]

    def ready(self, turns: Turns, name: str, *, waited: Callable[[], bool] = lambda: True) -> int:
        """A connection that always has something to read."""
        ours, theirs = socket.socketpair()
        theirs.send(b"x")
        self._sockets += [ours, theirs]

        def resume() -> bool:
            self.order.append(name)
            return waited()

        turns.join(ours.fileno(), resume)
        return ours.fileno()

    def until(self, enough: Callable[[], bool]) -> None:
        """Let the loop run."""
        with gevent.Timeout(10):
            while not enough():
                gevent.sleep(0.0001)

    def close(self) -> None:
        """Away with all."""
        for turns in self._turns:
            turns.close()
        for one in self._sockets:
            one.close()


@pytest.fixture
def connections() -> Iterator[Connections]:
    """None yet."""
    made = Connections()
    yield made
    made.close()


def test_instances_take_turns(connections: Connections) -> None:
    """Between two turns of an instance with one connection, one with a hundred has as many as in a turn, no more."""
    busy, quiet = connections.turns(), connections.turns()
    for _one in range(100):
        connections.ready(busy, "busy")
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert {len(gap) for gap in gaps[1:-1]} == {EACH_TURN}


def test_who_is_alone_has_more(connections: Connections) -> None:
    """As long as only one instance has connections, more of them are served at a time; nobody waits for it."""
    places, order = Places(), connections.order
    turns = places.enter(1)
    for _one in range(100):
        connections.ready(turns, "x")
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    each_round = get_hub().loop.io(ours.fileno(), 1)
    each_round.start(order.append, "|")
    found = []
    for change in (lambda: None, lambda: places.enter(2), lambda: places.leave(2)):
        change()
        order.clear()
        connections.until(lambda: order.count("|") > 20)
        found.append({len(gap) for gap in "".join(order).split("|")[1:-1]})
    assert found == [{EACH_TURN * ALONE}, {EACH_TURN}, {EACH_TURN * ALONE}]
    each_round.close()
    turns.close()
    ours.close()
    theirs.close()


def test_connections_take_turns(connections: Connections) -> None:
    """Of an instance's connections, none is served twice before all others are served once."""
    turns = connections.turns()
    names = [str(number) for number in range(50)]
    for name in names:
        connections.ready(turns, name)
    connections.until(lambda: len(connections.order) >= 200)
    for start in range(0, 200, 50):
        assert sorted(connections.order[start : start + 50]) == sorted(names)


def test_one_that_does_not_wait(connections: Connections) -> None:
    """One that is at work on something else is left alone until it joins again, however much it has to read."""
    turns = connections.turns()
    number = connections.ready(turns, "at work", waited=lambda: False)
    connections.ready(turns, "other")
    connections.until(lambda: connections.order.count("other") > 10)
    assert connections.order.count("at work") == 1

    def back() -> bool:
        connections.order.append("back")
        return True

    turns.join(number, back)
    connections.until(lambda: "back" in connections.order)


def test_one_that_need_not_wait(connections: Connections) -> None:
    """One that has its next request already takes turns with other instances as any other."""
    pipelining, quiet = connections.turns(), connections.turns()

    def again() -> bool:
        connections.order.append("pipelined")
        pipelining.again(again)
        return True

    pipelining.again(again)
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert max(map(len, gaps)) <= EACH_TURN + 1


def test_what_is_large_is_a_turn(connections: Connections) -> None:
    """Between two turns of others, an instance has one large piece of a request looked at, however many it has sent."""
    large, quiet = connections.turns(), connections.turns()

    def again() -> bool:
        connections.order.append("large")
        large.again(again, LARGE)
        return True

    for _one in range(20):
        large.again(again, LARGE)
    connections.ready(quiet, "quiet")
    connections.until(lambda: connections.order.count("quiet") > 10)
    gaps = "".join(name[0] for name in connections.order).split("q")
    assert max(map(len, gaps[1:-1])) == 1


def test_forgotten_socket(connections: Connections) -> None:
    """A socket that is about to be closed has no turn any more."""
    turns = connections.turns()
    number = connections.ready(turns, "gone")
    turns.forget(number)
    connections.ready(turns, "other")
    connections.until(lambda: connections.order.count("other") > 3)
    assert "gone" not in connections.order


def test_places_are_bounded() -> None:
    """Instances without connections keep few descriptors between them, and those that come back have what they need."""
    places = Places()
    before = len(os.listdir("/proc/self/fd"))
    for _time in range(2):
        entered = {number: places.enter(number) for number in range(1, 100)}
        assert len({id(turns) for turns in entered.values()}) == 99
        for number, turns in entered.items():
            assert places.enter(number) is turns
            assert turns.users == 2
            places.leave(number)
            assert turns.users == 1
            places.leave(number)
    assert len(os.listdir("/proc/self/fd")) - before <= 4
