"""Attacks: how long another instance's requests take beside each, of what they take beside as many usual connections.

The victim opens a new connection for each request. It asks in turns beside the attack (attack.c) and beside the same
number of connections of the same instance that ask for one key (load.c). Nobody is bound to a core.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

from benchmarks.contenders import service
from benchmarks.figures import Figure
from benchmarks.processes import Inside
from benchmarks.requests import PATHS
from benchmarks.scale import SOCKET
from guestapi.settings import LimitSettings
from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.hostile.arena import KEPT, descriptors, forget_peak, memory

MIB = 1 << 20
#: How much slower the victim may be beside an attack than beside as many usual connections: p99 of p99.
MOST_SLOWER = 10
#: Seconds that others do it before the victim begins, if they do not say when they have begun.
_LEAD_SECONDS = 0.3

_ASK = "GET %s HTTP/1.1\nHost: x\n\n"
_EVENTS = "GET /1.0/events HTTP/1.1\nHost: x\n%s\n"
_READY = 'PATCH /1.0 HTTP/1.1\nHost: x\nContent-Length: 17\n\n{"state":"Ready"}'


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Attributes:
        name: what it is.
        manner, connections, request: as attack.c takes them.
        usual: the manner of the connections beside which it stands, as load.c takes it.
        user: who does it in the container.
        attackers: how many instances do it.
        stranger: the container is not registered.
        change: what the operator does again and again meanwhile; it gets the service and a number.
    """

    name: str
    manner: str
    connections: int
    request: str
    usual: str = "keep"
    user: int = 0
    attackers: int = 1
    stranger: bool = False
    change: Callable[[Service, int], None] | None = None


def _change_largest(running: Service, number: int) -> None:
    """JSON writes a control character as six bytes, so the event has 24 MiB."""
    running.configure("attacker0", user_controls=chr(1 + number % 2) * (1 << 21))


ATTACKS = (
    Attack("60 connections, an instance of 6 keys of 2 MiB", "keep", 60, _ASK % "/1.0/config/user.foo"),
    Attack("60 connections that ask for keys of 2 MiB", "head", 60, _ASK % "/1.0/config/user.large1"),
    Attack(
        "queries of 16 KB for events, 100 connections", "head", 100, _ASK % f"/1.0/events?type={'x,' * 8000}", "new"
    ),
    Attack("128 streams that resume over entries of 4 MiB", "stuck", 128, _EVENTS % "Last-Event-ID: 0\n"),
    Attack("16 listeners, events of 24 MiB", "drain", 16, _EVENTS % "", change=_change_largest),
    Attack("1,000 processes that connect", "fork", 1000, _ASK % "/1.0", "new"),
    Attack("150 chains of 31 PID namespaces", "nest", 150, _ASK % "/1.0", "new"),
    Attack("12 instances that change their state", "keep", 4, _READY, attackers=12),
    Attack("256 connections of an unregistered container", "head", 256, _ASK % "/1.0", "new", stranger=True),
    Attack("a prober of unknown paths", "keep", 16, _ASK % "/1.0/\xc2\x9bunknown"),
    Attack("user 1000 takes connections", "idle", 300, "", user=1000),
)


def measure(rounds: int, seconds: float) -> Iterator[Figure]:
    """Each attack, beside what it is compared with; then what the service has become of all of them."""
    most_instances = max(attack.attackers for attack in ATTACKS)
    with ExitStack() as stack:
        running, victim = stack.enter_context(service("victim", workers=2, toml=""))
        stranger = stack.enter_context(Container(running.binds, hostname="stranger"))
        large = {f"user.large{number}": "x" * (2 * MIB) for number in range(1, 6)}
        attackers = [
            stack.enter_context(
                running.container(f"attacker{number}", {"user.foo": "bar"} | (large if not number else {}))
            )
            for number in range(most_instances)
        ]
        for number in range(4):
            running.configure("attacker0", user_logged=str(number) * (2 * MIB))
        for attack in ATTACKS:
            those = [stranger] if attack.stranger else attackers[: attack.attackers]
            yield from _measure(running, attack, victim, those, rounds, seconds)


def _measure(
    running: Service, attack: Attack, victim: Container, attackers: Sequence[Container], rounds: int, seconds: float
) -> Iterator[Figure]:
    before = {pid: (memory(pid), descriptors(pid)) for pid in running.workers}
    for pid in before:
        forget_peak(pid)
    logged = running.log.stat().st_size
    found = _rounds(running, attack, victim, attackers, rounds, seconds)
    (attacked_p50, attacked_p99), (usual_p50, usual_p99) = found.attacked, found.usual
    yield Figure(f"{attack.name}: p50 beside it", attacked_p50 / 1000, "ms")
    yield Figure("  p50, times as much as beside usual ones", attacked_p50 / usual_p50, "")
    yield Figure("  p99 beside it", attacked_p99 / 1000, "ms")
    yield Figure(f"  {attack.name}: p99, times as much as beside usual ones", attacked_p99 / usual_p99, "", MOST_SLOWER)
    yield Figure(f"  {attack.name}: wrong answers", found.errors, "", 0)
    alive = [pid for pid in running.workers if pid in before]
    yield Figure(f"  {attack.name}: workers lost", len(before) - len(alive), "", 0)
    grown = max((memory(pid, "VmHWM") - before[pid][0] for pid in alive), default=0)
    yield Figure(
        f"  {attack.name}: memory that a worker took more", grown / MIB, "MiB", len(attackers) * _most_held() / MIB
    )
    until(lambda: all(descriptors(pid) <= before[pid][1] + KEPT for pid in alive), "descriptors are let go of")
    left = max((descriptors(pid) - before[pid][1] for pid in alive), default=0)
    yield Figure(f"  {attack.name}: descriptors that are left of it", left, "", KEPT)
    written = running.log.stat().st_size - logged
    yield Figure("  log", written / (2 * rounds * (seconds + _LEAD_SECONDS)) / 1000, "kB/s")


def _most_held() -> int:
    """Bytes that one instance makes a worker hold at most, as docs/security.md says."""
    limits = LimitSettings()
    return limits.connections_per_instance * (limits.head + 2 * limits.body) + limits.unsent_per_instance + 2 * MIB


@dataclass(frozen=True, slots=True)
class _Found:
    """What the victim saw: p50 and p99 in microseconds, the medians of the rounds, and wrong answers."""

    attacked: tuple[float, float]
    usual: tuple[float, float]
    errors: int


def _rounds(
    running: Service, attack: Attack, victim: Container, attackers: Sequence[Container], rounds: int, seconds: float
) -> _Found:
    inside = Inside(victim.pid, None)
    attacked, usual = [], []
    for _round in range(rounds):
        with ExitStack() as stack:
            for attacker in attackers:
                stack.enter_context(_usual(attack, attacker))
            threading.Event().wait(_LEAD_SECONDS)
            usual.append(inside.load(SOCKET, "new", 1, seconds, PATHS["config/KEY"]))
        with ExitStack() as stack:
            for attacker in attackers:
                stack.enter_context(_attack(attack, attacker))
            stack.enter_context(_changing(running, attack.change) if attack.change else nullcontext())
            threading.Event().wait(_LEAD_SECONDS)
            attacked.append(inside.load(SOCKET, "new", 1, seconds, PATHS["config/KEY"]))
    return _Found(
        (median(one["p50"] for one in attacked), median(one["p99"] for one in attacked)),
        (median(one["p50"] for one in usual), median(one["p99"] for one in usual)),
        sum(one["errors"] for one in (*attacked, *usual)),
    )


@contextmanager
def _attack(attack: Attack, container: Container) -> Iterator[None]:
    words = Inside(container.pid, None).words("attack", SOCKET, attack.manner, attack.connections, attack.request)
    words[words.index("--setuid") + 1] = str(attack.user)
    with _session(words) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{attack.name} did not begin")
        yield


@contextmanager
def _usual(attack: Attack, container: Container) -> Iterator[None]:
    path = PATHS["config/KEY"]
    with _session(Inside(container.pid, None).words("load", SOCKET, attack.usual, attack.connections, 3600, *path)):
        yield


@contextmanager
def _session(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a session of its own, which the scheduler gives as much as others (sched(7), autogroup)."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextmanager
def _changing(running: Service, change: Callable[[Service, int], None]) -> Iterator[None]:
    over = threading.Event()

    def go_on() -> None:
        number = 0
        while not over.wait(0.2):
            number += 1
            change(running, number)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
