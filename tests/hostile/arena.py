"""A service under attack: runs an attacker and a victim, and measures what remains of the attack."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestapi.settings import LimitSettings
from tests.harness.containers import Container
from tests.harness.service import Service
from tests.harness.waiting import until

HERE = Path(__file__).parent


@dataclass(frozen=True)
class ArenaProgram:
    """A program that runs in a container."""

    process: subprocess.Popen[bytes]

    def ended(self, seconds: float = 60) -> Any:
        """Close its standard input, and return the JSON that it prints last."""
        out, _none = self.process.communicate(timeout=seconds)
        assert self.process.returncode == 0
        return json.loads(out)

    def read_line(self) -> str:
        """Return the next line of its output."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()


@contextmanager
def inside(container: Container, program: str, *arguments: str) -> Iterator[ArenaProgram]:
    """Run a program of this directory in a container."""
    enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0"]
    source = (HERE / program).read_text()
    process = subprocess.Popen(
        [*enter, "/usr/bin/python3", "-I", "-S", "-c", source, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # The kernel shares the processors between sessions (sched(7), autogroup), as it does between the control groups
        # of containers on a host. Without a session of their own, a hundred processes would get a hundred shares.
        start_new_session=True,
    )
    try:
        yield ArenaProgram(process)
    finally:
        process.kill()
        process.communicate()


@dataclass
class AttackReport:
    """The result of an attack.

    Attributes:
        name: the attack.
        attacker: the counts that the attacker printed.
        victim: the results and times of another instance during the attack.
        grown: bytes by which a worker's memory grew at the most during the attack.
        left: bytes by which a worker's memory was larger afterwards.
        log: what the service logged during the attack.
    """

    name: str
    attacker: dict[str, int] = field(default_factory=dict)
    victim: dict[str, Any] = field(default_factory=dict)
    grown: int = 0
    left: int = 0
    log: str = ""


def memory(pid: int, name: str = "VmRSS") -> int:
    """Return bytes from /proc/PID/status; VmHWM is the peak since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{pid} has no {name}")


def most_held() -> int:
    """Bytes that one instance makes a worker hold at most, as docs/security.md says."""
    limits = LimitSettings()
    return limits.connections_per_instance * (limits.head + 2 * limits.body) + limits.unsent_per_instance + (2 << 20)


#: Bytes by which a worker's memory may grow during an attack: for most, a few times what was measured; for those that
#: make a worker hold responses, what docs/security.md states of one instance, and what the allocator keeps.
OTHERS = 16 << 20
HOLDING = most_held() + OTHERS


def forget_peak(pid: int) -> None:
    """Reset the memory peak of a process to its present use (proc(5), /proc/PID/clear_refs, value 5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def descriptors(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


#: Descriptors that a worker may keep: pidfds of instances' inits, a few epoll sets, and one of the database for each of
#: the ten threads of gevent's pool. SQLite cannot close those while a connection of the same process has a lock, so it
#: reuses them (os_unix.c, setPendingFd).
KEPT = 8 + 10


@dataclass
class Arena:
    """A service, an instance that sends requests during attacks, and the reports of all attacks."""

    service: Service
    victim: Container
    reports: list[AttackReport] = field(default_factory=list)

    def attack(self, name: str, attacker: Container, seconds: float = 1) -> AttackReport:
        """Run an attack while the victim sends requests; then wait until its descriptors are closed."""
        service = self.service
        report = AttackReport(name)
        self.reports.append(report)
        workers = service.workers
        before = {pid: (memory(pid), descriptors(pid)) for pid in workers}
        logged = service.log.stat().st_size
        for pid in workers:
            forget_peak(pid)
        with inside(self.victim, "victim.py") as victim:
            assert victim.read_line() == "ready"
            with inside(attacker, "attacks.py", name, str(seconds)) as attack:
                report.attacker = attack.ended()
            report.victim = victim.ended()
        assert service.workers == workers, service.log.read_text()[-4000:]
        report.grown = max(memory(pid, "VmHWM") - before[pid][0] for pid in workers)
        until(lambda: all(descriptors(pid) <= before[pid][1] + KEPT for pid in workers), "descriptors are let go of")
        report.left = max(memory(pid) - before[pid][0] for pid in workers)
        report.log = service.log.read_bytes()[logged:].decode(errors="replace")
        return report
