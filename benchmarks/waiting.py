"""The tree and requests that wait: what a crawl costs, how soon a change is told, and what others notice of it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contenders import INSTANCE, TOML, service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, Inside, pin, processor_seconds, resident_kb
from benchmarks.scale import SOCKET, committed, listening
from guestapi.callers.namespaces import examine
from guestapi.store import profiles, steps
from guestapi.store.lookup import get_instance
from tests.harness.service import Service
from tests.proof import node
from tests.server.inside import Talk, asking, talks

TREE = "/1.0/guestapi/tree"
#: As cloud-init's data source asks at each boot.
CRAWL = [
    "/1.0",
    "/1.0/meta-data",
    "/1.0/config",
    "/1.0/config/cloud-init.user-data",
    "/1.0/config/cloud-init.vendor-data",
    "/1.0/config/cloud-init.network-config",
    "/1.0/config/user.foo",
    "/1.0/config/user.meta-data",
    "/1.0/devices",
    "/1.0/config",
]
#: Clients connect long before they ask.
_TOML = TOML + "head_seconds = 600\n"
WAITING = 5_000
_BATCH = 500
INSTANCES = 1_000


def measure(rounds: int, seconds: float) -> Iterator[Figure]:
    """Measure all of it."""
    yield from crawl(rounds, seconds)
    yield from wake_up()
    yield from memory()
    yield from mass_change()


def crawl(rounds: int, seconds: float) -> Iterator[Figure]:
    """Compare the processor time of one request for the tree with that of a crawl; each has a new connection."""
    with service() as (running, container):
        data = {f"cloud-init.{name}": "#cloud-config\n" for name in ("user-data", "vendor-data", "network-config")}
        with running.writer.change() as change:
            steps.configure(change, get_instance(change, "default", INSTANCE), data)
        pin([running.pid, *running.workers], SERVER_CORE)
        inside = Inside(container.pid)
        ratios = []
        for _round in range(rounds):
            ten, one = (_cost(running, inside, seconds, paths) for paths in (CRAWL, [TREE]))
            ratios.append(one / (len(CRAWL) * ten))
        yield Figure("processor time of the tree, of that of a crawl of ten requests", median(ratios), "", 1 / 3)


def _cost(running: Service, inside: Inside, seconds: float, paths: list[str]) -> float:
    before = processor_seconds(running.workers)
    result = inside.load(SOCKET, "new", 1, seconds, paths)
    if result["errors"]:
        raise RuntimeError(f"errors: {result}")
    requests: int = max(1, result["requests"])
    return (processor_seconds(running.workers) - before) / requests


def wake_up(times: int = 200) -> Iterator[Figure]:
    """Measure the time from a commit to the answer of a waiting request, beside that to an event's receipt."""
    with service() as (running, container), listening(Inside(container.pid), 1) as listeners:
        with talks(container, 1) as (guest,):
            waits, events = [], []
            tag = '""'
            for number in range(times):
                guest.send(asking(f"{TREE}/config/user.number?wait=60", f"If-None-Match: {tag}"))
                guest.wait_read()
                time.sleep(0.005)
                with committed() as at:
                    running.configure(INSTANCE, user_number=str(number))
                answer = guest.receive()[0]
                waits.append(time.monotonic() - at[0])
                tag = answer.headers["etag"]
                events.append(listeners.last(at[0]))
        yield Figure(f"commit to the answer of a waiting request, p50 of {times}", median(waits) * 1000, "ms", 2.0)
        yield Figure("  of that to an event's receipt", median(waits) / median(events), "")


def memory() -> Iterator[Figure]:
    """Measure the memory of waiting requests."""
    with service(toml=_TOML) as (running, container):
        worker = running.workers[0]
        with talks(container, 16) as first:
            _wait_all(first)
        time.sleep(0.5)
        before = resident_kb(worker)
        with ExitStack() as stack:
            # Of a process, only so many connections may be there that nobody has identified yet.
            for _batch in range(WAITING // _BATCH):
                _wait_all(stack.enter_context(talks(container, _BATCH)))
            each = (resident_kb(worker) - before) / WAITING
        yield Figure(f"memory of each of {WAITING:,} waiting requests", each, "kB", 16)


def mass_change(times: int = 5) -> Iterator[Figure]:
    """Measure what a bystander notices of a change for which 1,000 instances wait."""
    with service(toml=_TOML) as (running, container), many_instances(running, INSTANCES) as guests:
        pin([running.pid, *running.workers], SERVER_CORE)
        inside = Inside(container.pid)
        quiet = [_load(inside)["p99"] / 1000 for _time in range(times)]
        busy, longest, taken = [], [], []
        for number in range(times):
            _wait_all(guests)
            process = inside.start("load", SOCKET, "keep", 1, 1.0, "/1.0/config/user.foo")
            time.sleep(0.3)
            with committed() as at, running.writer.change() as change:
                profile = profiles.get_profile(change, "default", "shared")
                profiles.edit(change, profile, config={"user.x": str(number)})
            for guest in guests:
                assert guest.receive()[0].text == str(number)
            taken.append(time.monotonic() - at[0])
            with running.writer.change() as change:
                profiles.edit(change, profiles.get_profile(change, "default", "shared"), config={})
            result: dict[str, Any] = json.loads(process.communicate()[0])
            busy.append(result["p99"] / 1000)
            longest.append(result["max"] / 1000)
        yield Figure(f"a bystander's p99 while {INSTANCES:,} instances are woken", median(busy), "ms", 10)
        yield Figure("  of that while nobody is", median(busy) / median(quiet), "")
        yield Figure("  and the slowest request", max(longest), "ms")
        yield Figure("  until the last instance has its answer", median(taken), "s")


def _load(inside: Inside) -> dict[str, Any]:
    return inside.load(SOCKET, "keep", 1, 1.0, ["/1.0/config/user.foo"])


def _wait_all(guests: list[Talk]) -> None:
    """Have all wait for a key, and wait until the worker has read all of it."""
    for guest in guests:
        guest.send(asking(f"{TREE}/config/user.x?wait=60"))
    for guest in guests:
        guest.wait_read()
    time.sleep(0.2)


@contextmanager
def many_instances(running: Service, number: int) -> Iterator[list[Talk]]:
    """Make this many instances, each with an init that has a connection; all have a profile."""
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.callback(ours.close)
        host = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", str(Path(node.__file__)), str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        stack.callback(host.wait)
        theirs.close()
        with running.writer.change() as change:
            shared = profiles.create(change, "default", "shared")
        guests = []
        for one in range(number):
            made, control = _command(ours, do="make", container=True, privileged=True, base=0, count=1, uid=0)
            init = stack.enter_context(socket.socket(fileno=control))
            with running.writer.change() as change:
                instance = steps.assign(change, steps.add(change, "default", f"waiting{one}"), (shared,))
                steps.start(change, instance, examine(made["pid"]))
            _made, connection = _command(init, do="connect", path=str(running.socket))
            guests.append(Talk(stack.enter_context(socket.socket(fileno=connection))))
        # The host's process ends when its socket is closed, before it is waited for.
        stack.callback(ours.close)
        yield guests


def _command(control: socket.socket, **command: Any) -> tuple[dict[str, Any], int]:
    socket.send_fds(control, [json.dumps(command).encode()], [])
    said, found, _flags, _address = socket.recv_fds(control, 65536, 1)
    answer: dict[str, Any] = json.loads(said)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer, found[0]
