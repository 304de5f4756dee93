"""Notices: how soon an instance hears of one, how many are acknowledged a second, and what another instance notices."""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks.contenders import INSTANCE, TOML, service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, pin
from benchmarks.scale import committed
from benchmarks.waiting import many_instances
from guestapi.store import notices
from guestapi.store.doorbell import Doorbell
from guestapi.store.engine import database_file
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from tests.harness.service import Service
from tests.server.inside import Talk, asking, talk, talks

NOTICES = "/1.0/guestapi/notices"
#: Clients connect long before they ask.
_TOML = f"{TOML}head_seconds = 600\nidle_seconds = 600\n"
_UNLIMITED = f"{TOML}writes_per_second = 1000000\nwrites_burst = 1000000\n"
INSTANCES = 130
#: After how many seconds what is announced here would be due.
_LATER = 3600.0


def measure() -> Iterator[Figure]:
    """Measure all of it."""
    yield from latency()
    yield from acknowledgements()


def latency(times: int = 200) -> Iterator[Figure]:
    """Measure the time from a commit to the notice's receipt, and until the operator knows that it is acknowledged."""
    with service(toml=_UNLIMITED) as (running, container), talks(container, 2) as (stream, guest):
        stream.send(asking("/1.0/events?type=notice"))
        _receive_until(stream, b"\r\n\r\n")
        doorbell = Doorbell(database_file(running.settings.store.url))
        received, known = [], []
        for _time in range(times):
            with committed() as at, running.writer.change() as change:
                sent = notices.send(change, get_instance(change, "default", INSTANCE), "stop", _LATER)
            _receive_until(stream, sent.id.encode())
            received.append(time.monotonic() - at[0])
            _acknowledge(guest, sent.id)
            while not _is_acknowledged(running, sent.id):
                doorbell.wait(1.0)
            known.append(time.monotonic() - at[0])
            if guest.receive(1, "POST")[0].status != 204:
                raise RuntimeError("not acknowledged")
            _receive_until(stream, b'"acknowledged"')
            with running.writer.change() as change:
                notices.cancel(change, get_instance(change, "default", INSTANCE), sent.id)
            _receive_until(stream, b'"cancelled"')
        received.sort()
        yield Figure(f"commit of a notice to its receipt, p50 of {times}", median(received) * 1000, "ms", 2.0)
        yield Figure("  p99", received[len(received) * 99 // 100] * 1000, "ms")
        yield Figure("  until its acknowledgement is known to the operator, p50", median(known) * 1000, "ms")


def acknowledgements() -> Iterator[Figure]:
    """Have many instances acknowledge all that they may have, while another one changes its state."""
    # Two workers: their transactions exclude each other.
    with (
        service(workers=2, toml=_TOML) as (running, container),
        many_instances(running, INSTANCES) as guests,
        talk(container) as quiet,
    ):
        waiting: list[list[str]] = []
        with running.writer.change() as change:
            for number in range(INSTANCES):
                instance = get_instance(change, "default", f"waiting{number}")
                waiting.append(
                    [notices.send(change, instance, "stop", _LATER).id for _one in range(notices.MOST_NOTICES)]
                )
        pin([running.pid, *running.workers], SERVER_CORE)
        taken: list[float] = []
        thread = threading.Thread(target=lambda: taken.append(_acknowledge_all(guests, waiting)))
        thread.start()
        changes: list[float] = []
        while thread.is_alive():
            body = b'{"state":"Ready"}' if len(changes) % 2 else b'{"state":"Started"}'
            began = time.perf_counter()
            status = quiet.ask("/1.0", method="PATCH", body=body).status
            if status == 200:
                changes.append((time.perf_counter() - began) * 1000)
            else:
                # It has a limit.
                time.sleep(0.2)
        thread.join()
        (seconds,) = taken
        number = INSTANCES * notices.MOST_NOTICES
        yield Figure(f"acknowledgements a second by {INSTANCES} instances, {number:,} in all", number / seconds, "/s")
        yield Figure("  p50 of another instance's change of state meanwhile", median(changes), "ms", 50)
        yield Figure("  of how many changes", len(changes), "")


def _acknowledge_all(guests: Sequence[Talk], waiting: list[list[str]]) -> float:
    """Have each acknowledge its notices, the next as soon as one is answered; return the seconds that it takes."""
    began = time.monotonic()
    left = len(guests)
    with selectors.DefaultSelector() as selector:
        for guest, ids in zip(guests, waiting, strict=True):
            selector.register(guest.socket, selectors.EVENT_READ, (guest, ids))
            _acknowledge(guest, ids.pop())
        while left:
            for key, _events in selector.select():
                guest, ids = key.data
                if (status := guest.receive(1, "POST")[0].status) != 204:
                    raise RuntimeError(f"status {status}")
                if ids:
                    _acknowledge(guest, ids.pop())
                else:
                    selector.unregister(guest.socket)
                    left -= 1
    return time.monotonic() - began


def _acknowledge(guest: Talk, number: str) -> None:
    guest.send(asking(f"{NOTICES}/{number}/ack", method="POST"))


def _is_acknowledged(running: Service, number: str) -> bool:
    """As `guestapi notice --wait` looks."""
    with view(running.settings.store.url) as store:
        found = notices.find(store, number)
    return found is not None and found.status == notices.ACKNOWLEDGED


def _receive_until(stream: Talk, text: bytes) -> None:
    data = b""
    while text not in data:
        more = stream.socket.recv(1 << 16)
        if not more:
            raise RuntimeError(f"the stream has ended: {data!r}")
        data += more
