"""The contenders: each is started on its socket, in the directory that the container sees as /dev/incus."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import LOAD_CORE, SERVER_CORE, Inside, pin, threads
from tests.harness.containers import Container
from tests.harness.service import Service

CHECKOUT = Path(__file__).parents[1]
INSTANCE = "c1"
CONFIG = {"user.foo": "bar", "user.meta-data": "role: web\n"}
DEVICES = {
    f"eth{number}": {"type": "nic", "nictype": "bridged", "parent": "br0", "hwaddr": f"00:16:3e:00:00:{number:02x}"}
    for number in range(20)
}

#: Logging is switched off for all contenders, and the limits permit one instance to be the whole load.
TOML = """
[log]
requests = "none"
[limits]
connections_per_instance = 65536
streams_per_instance = 65536
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that is ready.

    Attributes:
        name: its name in the tables.
        socket: its socket, as the container sees it.
        pids: the processes that answer.
        inside: the source of its load.
    """

    name: str
    socket: str
    pids: tuple[int, ...]
    inside: Inside


@contextmanager
def service(
    container_name: str = INSTANCE, *, workers: int = 1, toml: str = TOML
) -> Iterator[tuple[Service, Container]]:
    """Run guestapi unprivileged, as in tests, and a container as an instance with 20 devices."""
    with (
        Service(workers=workers, dialects=["incus"], toml=toml) as running,
        running.container(container_name, CONFIG, DEVICES) as container,
    ):
        yield running, container


@contextmanager
def all_of_them() -> Iterator[list[Contender]]:
    """Start all contenders; those with one process run on one core, their load on the other."""
    with ExitStack() as stack:
        one, container = stack.enter_context(service())
        two, second = stack.enter_context(service(workers=2))
        pin([one.pid, *one.workers], SERVER_CORE)
        directory = one.socket.parent
        fair = stack.enter_context(_floor(directory, "fair"))
        greedy = stack.enter_context(_floor(directory, "greedy"))
        stock = stack.enter_context(_stock(directory, one.config))
        inside = Inside(container.pid, LOAD_CORE)
        yield [
            Contender("(a) gevent loop, fair", "/dev/incus/fair", (fair,), inside),
            Contender("    gevent loop, greedy", "/dev/incus/greedy", (greedy,), inside),
            Contender("(b) stock gunicorn gevent", "/dev/incus/stock", (stock,), inside),
            Contender("(c) guestapi, 1 worker", "/dev/incus/sock", tuple(one.workers), inside),
            Contender("(d) guestapi, 2 workers", "/dev/incus/sock", tuple(two.workers), Inside(second.pid, None)),
        ]


@contextmanager
def running(words: Sequence[str], socket: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run a server until its socket is there, and to the end of the block; yield its PID."""
    process = subprocess.Popen(words, cwd=CHECKOUT, env={**os.environ, **environment}, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 20
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(words)} did not start")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def _floor(directory: Path, manner: str) -> Iterator[int]:
    socket = directory / manner
    with running([sys.executable, "-m", "benchmarks.floor", str(socket), manner], socket, {}) as pid:
        pin([pid], SERVER_CORE)
        yield pid


@contextmanager
def _stock(directory: Path, config: Path) -> Iterator[int]:
    socket = directory / "stock"
    words = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-w", "1", "-b", f"unix:{socket}", "--keep-alive", "30"]
    environment = {"GUESTAPI_CONFIG": str(config), "BENCHMARK_INSTANCE": INSTANCE}
    with running([*words, "--no-control-socket", "benchmarks.stock:application"], socket, environment) as master:
        worker = _only_child(master)
        pin([master, worker], SERVER_CORE)
        yield worker


def _only_child(pid: int) -> int:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for thread in threads(pid):
            children = Path(f"/proc/{pid}/task/{thread}/children").read_text().split()
            if children:
                return int(children[0])
        time.sleep(0.05)
    raise RuntimeError("the stock worker did not start")
