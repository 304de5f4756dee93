"""Attributes: how many are written a second, and what an instance notices whose neighbours write all the time."""

from __future__ import annotations

import selectors
import threading
import time
from collections import Counter
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
        seconds: of each of the two loads, before the state is changed beside it.
    """
    for toml, name, most in ((_TOML, "with the default limits", 50.0), (_UNLIMITED, "without a limit", None)):
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
            with _writing(guests) as count:
                time.sleep(seconds)
                began, before = time.monotonic(), count.copy()
                busy = _change_states(quiet)
                rates = {kind: (count[kind] - before[kind]) / (time.monotonic() - began) for kind in count}
            yield Figure(f"attributes written a second by {INSTANCES} instances, {name}", rates["written"], "/s")
            yield Figure("  and refused", rates["refused"], "/s")
            yield Figure("  p50 of another instance's change of state meanwhile", busy, "ms", most)
            yield Figure("  of that alone", alone, "ms")


def _change_states(guest: Talk) -> float:
    """The median time of a change of state that is written, in milliseconds."""
    times: list[float] = []
    while len(times) < _CHANGES:
        body = b'{"state":"Ready"}' if len(times) % 2 else b'{"state":"Started"}'
        began = time.perf_counter()
        status = guest.ask("/1.0", method="PATCH", body=body).status
        if status == 200:
            times.append((time.perf_counter() - began) * 1000)
        elif status == 429:
            # It has a limit, too.
            time.sleep(0.2)
        else:
            raise RuntimeError(f"status {status}")
    return median(times)


@contextmanager
def _writing(guests: Sequence[Talk]) -> Iterator[Counter[str]]:
    """Have each write, again as soon as it is answered, until the end of the block; yield what became of that."""
    over = threading.Event()
    count = Counter(written=0, refused=0)

    def send(guest: Talk, number: int) -> None:
        value = (b"%08d" % number) * (BYTES // 8)
        guest.send(asking(f"/1.0/guestapi/attributes/bench/{number % 8}", method="PUT", body=value))

    def write() -> None:
        numbers = dict.fromkeys(guests, 0)
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
                    count["refused" if status == 429 else "written"] += 1
                    numbers[guest] += 1
                    send(guest, numbers[guest])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield count
    finally:
        over.set()
        thread.join()
