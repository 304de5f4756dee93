"""Attacks: how long another instance's requests take beside each, of what they take beside as many usual connections.

The victim opens a new connection for each request, or changes its state, or is a container that starts. It asks in
turns beside the attack (attack.c) and beside the same number of connections of the same instances that ask for one key
(load.c). Nobody is bound to a core. The service has the weight of its unit.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.contenders import CHECKOUT, service
from benchmarks.figures import Figure
from benchmarks.processes import Inside
from benchmarks.requests import PATHS
from benchmarks.scale import SOCKET
from guestapi.names import MOST_ENTRIES
from guestapi.records import SourceStatus
from guestapi.server.log_budget import BURST_SECONDS
from guestapi.server.scheduler import SPARE
from guestapi.settings import LogSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import statuses
from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.hostile.arena import KEPT, descriptors, forget_peak, memory, most_held
from tests.server.inside import talk

MIB = 1 << 20
#: MemoryHigh= of guestapi.service, in bytes.
_MEMORY_HIGH = 1 << 30
#: How much slower the victim may be beside an attack than beside as many usual connections: p99 of p99.
MOST_SLOWER = 10
#: Seconds that others do it before the victim begins, if they do not say when they have begun.
_LEAD_SECONDS = 0.3
#: The same for connections that ask once a second: until each has asked.
_CALM_SECONDS = 1.5

_ASK = "GET %s HTTP/1.1\nHost: x\n\n"
_EVENTS = "GET /1.0/events HTTP/1.1\nHost: x\n%s\n"
#: How often the victim changes its state in a round, and how many containers start.
_CHANGES, _STARTS = 25, 6
#: A source, so that containers which are not registered yet wait.
_SOURCE = "lxc"

_READY = 'PATCH /1.0 HTTP/1.1\nHost: x\nContent-Length: 17\n\n{"state":"Ready"}'


@dataclass(frozen=True, slots=True)
class Answers:
    """What the victim saw: p50 and p99 in microseconds, and how many answers were wrong."""

    p50: float
    p99: float
    errors: int


def _get(_running: Service, victim: Container, seconds: float) -> Answers:
    """Ask for a key, on a new connection each time."""
    found = Inside(victim.pid, None).load(SOCKET, "new", 1, seconds, PATHS["config/KEY"])
    if not found["requests"]:
        # It waits still.
        return Answers(seconds * 1e6, seconds * 1e6, 1)
    return Answers(found["p50"], found["p99"], found["errors"])


def _change_state(_running: Service, victim: Container, _seconds: float) -> Answers:
    """Change the state, as often as the limits permit."""
    taken: list[float] = []
    errors = 0
    with talk(victim) as guest:
        while len(taken) < _CHANGES:
            body = b'{"state":"Ready"}' if len(taken) % 2 else b'{"state":"Started"}'
            began = time.monotonic()
            status = guest.ask("/1.0", method="PATCH", body=body).status
            if status == 429:
                # It has a limit, too.
                time.sleep(0.2)
                continue
            errors += status != 200
            taken.append(time.monotonic() - began)
    return _answers(taken, errors)


def _start_container(running: Service, _victim: Container, _seconds: float) -> Answers:
    """Ask in a container that is registered a moment later; from then on until it is answered."""
    taken: list[float] = []
    errors = 0
    for number in range(_STARTS):
        with Container(running.binds, hostname="fresh") as container:
            found: list[tuple[int, float]] = []

            def ask(container: Container = container, found: list[tuple[int, float]] = found) -> None:
                found.append((container.ask(PATHS["config/KEY"][0]).status, time.monotonic()))

            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(0.1)
            began = time.monotonic()
            running.add(f"fresh{number}", container, {"user.foo": "bar"})
            asking.join()
            running.remove(f"fresh{number}")
        status, answered = found[0]
        errors += status != 200
        taken.append(max(answered - began, 0.0))
    return _answers(taken, errors)


def _answers(taken: list[float], errors: int) -> Answers:
    taken.sort()
    return Answers(median(taken) * 1e6, taken[len(taken) * 99 // 100] * 1e6, errors)


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
        crowded: its instance has as many keys as it may have.
        change: what the operator does again and again meanwhile; it gets the service and a number.
        ask: what the victim does.
    """

    name: str
    manner: str
    connections: int
    request: str
    usual: str = "keep"
    user: int = 0
    attackers: int = 1
    stranger: bool = False
    crowded: bool = False
    change: Callable[[Service, int], None] | None = None
    ask: Callable[[Service, Container, float], Answers] = _get


def _change_largest(running: Service, number: int) -> None:
    """JSON writes a control character as six bytes, so the event has 24 MiB."""
    running.configure("attacker0", user_controls=chr(1 + number % 2) * (1 << 21))


def _change_crowded(running: Service, number: int) -> None:
    """Workers read the instance anew."""
    running.configure("crowded", user_changed=str(number))


def _restore(running: Service, number: int) -> None:
    """Restore a backup, while a follower writes what a hook has told it, again and again."""
    saved = running.root / "saved.db"
    if not saved.exists():
        running.command("backup", str(saved))
    restored: list[int] = []
    thread = threading.Thread(target=lambda: restored.append(running.command("restore", str(saved)).returncode))
    thread.start()
    while thread.is_alive():
        number += 1
        with running.writer.change() as change:
            reconcile(
                change, _SOURCE, [Observed(key="k", project="default", name="box", config={"user.n": f"{number}"})]
            )
    thread.join()
    if not restored:
        raise RuntimeError("the restore has failed")


_QUERY = _ASK % f"/1.0/events?type={'x,' * 8000}"
ATTACKS = (
    Attack("60 connections, an instance of 6 keys of 2 MiB", "keep", 60, _ASK % "/1.0/config/user.foo"),
    Attack("150 processes, an instance of 6 keys of 2 MiB", "fork", 150, _ASK % "/1.0/config/user.foo", "new"),
    Attack("60 connections that ask for keys of 2 MiB", "head", 60, _ASK % "/1.0/config/user.large1"),
    Attack(f"60 connections that list {MOST_ENTRIES:,} keys", "head", 60, _ASK % "/1.0/config", crowded=True),
    Attack(
        f"60 connections that list {MOST_ENTRIES:,} keys, which the operator changes",
        "head",
        60,
        _ASK % "/1.0/config",
        crowded=True,
        change=_change_crowded,
    ),
    Attack("queries of 16 KB for events, 100 connections", "head", 100, _QUERY, "new"),
    Attack("queries of 16 KB for events, 100 processes", "fork", 100, _QUERY, "new"),
    Attack("queries of 16 KB for events, 100 instances", "head", 1, _QUERY, "new", attackers=100),
    Attack("128 streams that resume over entries of 4 MiB", "stuck", 128, _EVENTS % "Last-Event-ID: 0\n"),
    Attack("16 listeners, events of 24 MiB", "drain", 16, _EVENTS % "", change=_change_largest),
    Attack("1,000 processes that connect", "fork", 1000, _ASK % "/1.0", "new"),
    Attack("3,000 processes that connect", "fork", 3000, _ASK % "/1.0", "new"),
    Attack("150 chains of 31 PID namespaces", "nest", 150, _ASK % "/1.0", "new"),
    Attack("12 instances that change their state", "keep", 4, _READY, attackers=12),
    Attack(
        "60 that change it within limits, a change of state", "pace", 2, _READY, "calm", attackers=60, ask=_change_state
    ),
    Attack(
        "130 that change it within limits, a change of state",
        "pace",
        2,
        _READY,
        "calm",
        attackers=130,
        ask=_change_state,
    ),
    Attack("130 that change it within limits", "pace", 2, _READY, "calm", attackers=130),
    Attack("100 instances of 190 busy connections", "keep", 190, _ASK % "/1.0/config/user.foo", "calm", attackers=100),
    # More than two workers take (worker_connections).
    Attack("100 instances of 256 busy connections", "keep", 256, _ASK % "/1.0/config/user.foo", "calm", attackers=100),
    Attack("256 connections of an unregistered container", "head", 256, _ASK % "/1.0", "new", stranger=True),
    Attack("a prober of unknown paths", "keep", 16, _ASK % "/1.0/\xc2\x9bunknown"),
    Attack("user 1000 takes connections", "idle", 300, "", user=1000),
    Attack("a restore while a hook writes", "keep", 16, _ASK % "/1.0/config/user.foo", change=_restore),
    Attack(
        "256 connections of an unregistered container, a container that starts",
        "head",
        256,
        _ASK % "/1.0",
        "new",
        stranger=True,
        ask=_start_container,
    ),
)


def measure(rounds: int, seconds: float, attacks: Sequence[Attack] = ATTACKS) -> Iterator[Figure]:
    """Each attack, beside what it is compared with; then what the service has become of all of them."""
    most_instances = max(attack.attackers for attack in attacks)
    with ExitStack() as stack:
        running, victim = stack.enter_context(service("victim", workers=2, toml=""))
        _weigh(running)
        stranger = stack.enter_context(Container(running.binds, hostname="stranger"))
        # The list of their names is larger than what is kept of an answer.
        many = {f"user.{number:04}{'k' * 30}": "x" for number in range(MOST_ENTRIES - 2)}
        crowded = stack.enter_context(running.container("crowded", {"user.foo": "bar", "user.changed": "0"} | many))
        large = {f"user.large{number}": "x" * (2 * MIB) for number in range(1, 6)}
        attackers = [
            stack.enter_context(
                running.container(f"attacker{number}", {"user.foo": "bar"} | (large if not number else {}))
            )
            for number in range(most_instances)
        ]
        for number in range(4):
            running.configure("attacker0", user_logged=str(number) * (2 * MIB))
        with running.writer.change() as change:
            statuses.record_status(change, SourceStatus(_SOURCE, "", True, 0.0, 0.0, ""))
        for attack in attacks:
            registered = [crowded] if attack.crowded else attackers[: attack.attackers]
            those = [stranger] if attack.stranger else registered
            yield from _measure(running, attack, victim, those, registered, rounds, seconds)


def _weigh(running: Service) -> None:
    """Give the service the weight that its unit has among containers, which have 100 each, as far as the kernel can."""
    unit = (CHECKOUT / "systemd/guestapi.service").read_text()
    found = re.search(r"(?m)^CPUWeight=(\d+)$", unit)
    assert found is not None
    # Its session competes with those of the attackers (sched(7), autogroup). A step of nice is a quarter of weight.
    nice = -round(math.log(int(found[1]) / 100, 1.25))
    group = Path(f"/proc/{running.pid}/autogroup")
    if group.exists():
        group.write_text(str(nice))


def _measure(
    running: Service,
    attack: Attack,
    victim: Container,
    attackers: Sequence[Container],
    usual: Sequence[Container],
    rounds: int,
    seconds: float,
) -> Iterator[Figure]:
    before = {pid: (memory(pid), descriptors(pid)) for pid in running.workers}
    for pid in before:
        forget_peak(pid)
    logged = running.log.stat().st_size
    found = _rounds(running, attack, victim, attackers, usual, rounds, seconds)
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
        f"  {attack.name}: memory that a worker took more",
        grown / MIB,
        "MiB",
        # However many do it, the workers of the unit get no more than its MemoryHigh=.
        min(len(attackers) * most_held(), _MEMORY_HIGH // len(before)) / MIB,
    )
    # A pidfd for each further instance, and the epoll sets that are kept for the next ones.
    kept = KEPT + (len(attackers) - 1) + min(len(attackers) - 1, SPARE)
    until(lambda: all(descriptors(pid) <= before[pid][1] + kept for pid in alive), "descriptors are let go of")
    left = max((descriptors(pid) - before[pid][1] for pid in alive), default=0)
    yield Figure(f"  {attack.name}: descriptors that are left of it", left, "", kept)
    written = running.log.stat().st_size - logged
    # Each worker lets each instance write so much in a second, and more at once. A line for systemd is longer by half.
    each = LogSettings().instance_bytes_per_second * (1 + BURST_SECONDS / found.seconds)
    most = 1.5 * len(before) * (len(attackers) + 1) * each / 1000
    yield Figure(f"  {attack.name}: log", written / found.seconds / 1000, "kB/s", most)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the victim saw: p50 and p99 in microseconds, the medians of the rounds; wrong answers; seconds in all."""

    attacked: tuple[float, float]
    usual: tuple[float, float]
    errors: int
    seconds: float


def _rounds(
    running: Service,
    attack: Attack,
    victim: Container,
    attackers: Sequence[Container],
    usual: Sequence[Container],
    rounds: int,
    seconds: float,
) -> _Found:
    beside_attack, beside_usual = [], []
    began = time.monotonic()
    for _round in range(rounds):
        with ExitStack() as stack:
            for container in usual:
                stack.enter_context(_usual(attack, container))
            threading.Event().wait(_CALM_SECONDS if attack.usual == "calm" else _LEAD_SECONDS)
            beside_usual.append(attack.ask(running, victim, seconds))
        with ExitStack() as stack:
            for attacker in attackers:
                stack.enter_context(_attack(attack, attacker))
            stack.enter_context(_changing(running, attack.change) if attack.change else nullcontext())
            threading.Event().wait(_LEAD_SECONDS)
            beside_attack.append(attack.ask(running, victim, seconds))
    return _Found(
        (median(one.p50 for one in beside_attack), median(one.p99 for one in beside_attack)),
        (median(one.p50 for one in beside_usual), median(one.p99 for one in beside_usual)),
        sum(one.errors for one in (*beside_attack, *beside_usual)),
        time.monotonic() - began,
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
    words = Inside(container.pid, None).words("load", SOCKET, attack.usual, attack.connections, 3600, *path)
    with _session(words) as process:
        if attack.usual == "calm":
            assert process.stdout is not None
            process.stdout.readline()
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
