"""Scale: many instances, many streams, many events. Each figure has its target."""

from __future__ import annotations

import json
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

from benchmarks.contenders import INSTANCE, service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, Inside, pin, resident_kb
from benchmarks.requests import PATHS
from guestapi.callers import namespaces
from guestapi.model import Init
from guestapi.store import bell, steps
from guestapi.store.lookup import get_instance
from tests.harness.service import Service

INSTANCES = 10_000
STREAMS = 5_000
LISTENERS = 1_000
SOCKET = "/dev/incus/sock"
_PATHS = [path for paths in PATHS.values() for path in paths]


def allow_many_descriptors() -> None:
    """Raise the limit of descriptors for this process and its children, as systemd does by LimitNOFILE=."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def instances(rounds: int, seconds: float) -> Iterator[Figure]:
    """Compare a service with 10,000 registered instances with a service with one."""
    with service() as (few, container), service() as (many, other):
        _register(many, INSTANCES)
        many.stop()
        began = time.monotonic()
        many.start()
        yield Figure(f"start to first answer with {INSTANCES:,} instances", time.monotonic() - began, "s", 1.5)
        found: dict[str, list[float]] = {"few": [], "many": []}
        for one in (few, many):
            pin([one.pid, *one.workers], SERVER_CORE)
        for _round in range(rounds):
            for name, inside in (("few", Inside(container.pid)), ("many", Inside(other.pid))):
                found[name].append(inside.load(SOCKET, "keep", 16, seconds, _PATHS)["p50"])
        ratio = median(found["many"]) / median(found["few"])
        yield Figure(f"p50 with {INSTANCES:,} instances, of that with one", ratio, "", 1.1)
        more = (resident_kb(many.workers[0]) - resident_kb(few.workers[0])) / 1024
        yield Figure(f"memory of a worker with {INSTANCES:,} instances more than with one", more, "MiB", 20)


def streams() -> Iterator[Figure]:
    """Measure the memory of idle event streams."""
    with service() as (running, container):
        worker = running.workers[0]
        with listening(Inside(container.pid), 16):
            pass
        before = resident_kb(worker)
        with listening(Inside(container.pid), STREAMS):
            yield Figure(
                f"memory of each of {STREAMS:,} idle streams", (resident_kb(worker) - before) / STREAMS, "kB", 16
            )


def fan_out(times: int = 20) -> Iterator[Figure]:
    """Measure one event to many listeners of one instance."""
    with service() as (running, container):
        pin([running.pid, *running.workers], SERVER_CORE)
        with listening(Inside(container.pid), LISTENERS) as listeners:
            taken = [listeners.last(_change(running, number)) for number in range(1, times + 1)]
        yield Figure(f"one event to {LISTENERS:,} listeners, median of {times}", median(taken) * 1000, "ms", 60)
        yield Figure("  and the slowest", max(taken) * 1000, "ms")


def latency(times: int = 200) -> Iterator[Figure]:
    """Measure the time from a commit to the event's receipt, with one listener and no other load."""
    with service() as (running, container), listening(Inside(container.pid), 1) as listeners:
        taken = []
        for number in range(1, times + 1):
            taken.append(listeners.last(_change(running, number)))
            time.sleep(0.005)
        taken.sort()
        yield Figure(f"commit to receipt, p50 of {times}", median(taken) * 1000, "ms", 1.0)
        yield Figure("  p99", taken[len(taken) * 99 // 100] * 1000, "ms")


def sustained(rate: int = 1000, seconds: int = 10, each: int = 10) -> Iterator[Figure]:
    """Change many keys a second, `each` (at most ten) in one transaction; all events must come in order and in time."""
    with service() as (running, container), listening(Inside(container.pid), 1) as listeners:
        commits: dict[int, float] = {}
        number = 0
        received: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: received.extend(listeners.next() for _one in range(rate * seconds)))
        reader.start()
        start = time.monotonic()
        while number < rate * seconds:
            changed = {f"user.number{one}": str(number + one + 1) for one in range(each)}
            with committed() as at, running.writer.change() as change:
                steps.configure(change, get_instance(change, "default", INSTANCE), changed)
            number += each
            commits[number] = at[0]
            time.sleep(max(0.0, start + number / rate - time.monotonic()))
        taken = time.monotonic() - start
        reader.join()
        at_receipt = {event["value"]: event["last"] for event in received}
        delays = [at_receipt[value] - at for value, at in sorted(commits.items())]
        tenth = len(delays) // 10
        yield Figure(f"{number:,} changes took", taken, "s", seconds * 1.05)
        yield Figure("  commit to receipt, p50 in the first tenth", median(delays[:tenth]) * 1000, "ms")
        yield Figure("  commit to receipt, p50 in the last tenth", median(delays[-tenth:]) * 1000, "ms", 10)
        yield Figure("  events out of order, or missing", listeners.disorder, "", 0)


class Listeners:
    """A running listen.c."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.disorder = 0

    def next(self) -> dict[str, Any]:
        """Return the next document that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the listeners have ended")
        document: dict[str, Any] = json.loads(line)
        self.disorder = document.get("disorder", 0)
        return document

    def last(self, committed: float) -> float:
        """Return the seconds from a commit until all listeners had its event."""
        seconds: float = self.next()["last"] - committed
        return seconds


@contextmanager
def listening(inside: Inside, number: int, socket: str = SOCKET) -> Iterator[Listeners]:
    """Open this many streams."""
    process = inside.start("listen", socket, number)
    try:
        listeners = Listeners(process)
        listeners.next()
        yield listeners
    finally:
        process.communicate(timeout=20)


@contextmanager
def committed() -> Iterator[list[float]]:
    """Yield the time of the transaction's commit, just before its doorbell rings."""
    at: list[float] = []

    def note(database: str) -> None:
        at.append(time.monotonic())
        bell.ring(database)

    with patch("guestapi.store.writing.ring", note):
        yield at


def _change(running: Service, number: int) -> float:
    """Make a change with an event for listeners; return the time of its commit."""
    with committed() as at:
        running.configure(INSTANCE, user_number=str(number))
    return at[0]


def _register(running: Service, number: int) -> None:
    """Register this many instances with some configuration, a device, and an init that does not exist."""
    device = {"eth0": {"type": "nic", "nictype": "bridged", "parent": "br0"}}
    with running.writer.change() as change:
        for one in range(number):
            instance = steps.add(change, "default", f"other{one}", config={"user.foo": "bar"}, devices=device)
            steps.start(change, instance, Init(1 << 22, one, namespaces.boot_id(), one + 1))
