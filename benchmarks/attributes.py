"""Attributes: how many are written a second, and what an instance notices whose neighbours write all the time."""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from benchmarks.contenders import TOML, service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, pin
from benchmarks.waiting import many_instances
from guestapi.store import permissions
from tests.server.inside import Talk, asking, talk

#: Clients connect long before they ask, and write as often as they can.
_TOML = f"{TOML}head_seconds = 600\nidle_seconds = 600\n"
_UNLIMITED = f"{_TOML}writes_per_second = 1000000\nwrites_burst = 1000000\n"
#: How many instances write, and how many bytes: as of a public host key.
INSTANCES, BYTES = 130, 600
#: How often the state is changed beside them.
_CHANGES = 80


def measure(seconds: float) -> Iterator[Figure]:
    """Measure all of it.

    Args:
        seconds: of each of the two loads.
    """
    for toml, name in ((_UNLIMITED, "without a limit"), (_TOML, "at the default limit")):
        # Two workers: their transactions exclude each other.
        with (
            service(workers=2, toml=toml) as (running, container),
            many_instances(running, INSTANCES) as guests,
            talk(container) as quiet,
        ):
            with running.writer.change() as change:
                permissions.allow(change, "default", None, "attributes")
            pin([running.pid, *running.workers], SERVER_CORE)
            alone = _change_states(quiet)
            with _writing(guests) as written:
                time.sleep(seconds)
                began, before = time.monotonic(), written[0]
                busy = _change_states(quiet)
                rate = (written[0] - before) / (time.monotonic() - began)
            yield Figure(f"attributes written a second by {INSTANCES} instances, {name}", rate, "/s")
            yield Figure("  p50 of another instance's change of state meanwhile", busy, "ms", 50)
            yield Figure("  of that alone", alone, "ms")


def _change_states(guest: Talk) -> float:
    """The median time of a change of state that is written, in milliseconds."""
    times = []
    for number in range(_CHANGES):
        body = b'{"state":"Ready"}' if number % 2 else b'{"state":"Started"}'
        began = time.perf_counter()
        answer = guest.ask("/1.0", method="PATCH", body=body)
        times.append(time.perf_counter() - began)
        if answer.status == 429:
            # It has a limit, too.
            time.sleep(0.25)
            times.pop()
        elif answer.status != 200:
            raise RuntimeError(answer)
    return median(times) * 1000


@contextmanager
def _writing(guests: Sequence[Talk]) -> Iterator[list[int]]:
    """Have each write, again as soon as it is answered, until the end of the block; yield how many were written."""
    over = threading.Event()
    written = [0]
    values = [bytes([65 + number]) * BYTES for number in range(2)]

    def send(guest: Talk, number: int) -> None:
        value = values[number % 2]
        guest.send(asking(f"/1.0/guestapi/attributes/bench/{number % 8}", method="PUT", body=value))

    def write() -> None:
        numbers = dict.fromkeys(guests, 0)
        again: list[tuple[float, Talk]] = []
        with selectors.DefaultSelector() as selector:
            for guest in guests:
                selector.register(guest.socket, selectors.EVENT_READ, guest)
                send(guest, 0)
            while not over.is_set():
                for key, _events in selector.select(0.05):
                    guest = key.data
                    status = guest.receive()[0].status
                    if status not in (201, 204, 429):
                        raise RuntimeError(f"status {status}")
                    written[0] += status != 429
                    numbers[guest] += 1
                    if status == 429:
                        again.append((time.monotonic() + 0.2, guest))
                    else:
                        send(guest, numbers[guest])
                while again and again[0][0] <= time.monotonic():
                    guest = again.pop(0)[1]
                    send(guest, numbers[guest])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield written
    finally:
        over.set()
        thread.join()
