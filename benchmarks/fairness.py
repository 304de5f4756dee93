"""Fairness: how much slower the single sequential client of an instance becomes by the load of another instance."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.contenders import service
from benchmarks.figures import Figure
from benchmarks.processes import SERVER_CORE, Inside, pin
from benchmarks.requests import PATHS
from benchmarks.scale import SOCKET, listening
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.containers import Container
from tests.harness.service import Service

_PATH = PATHS["config/KEY"]


def measure(rounds: int, seconds: float) -> Iterator[Figure]:
    """Measure each disturbance, and what it is compared with."""
    with service() as (running, noisy), running.container("quiet", {"user.foo": "bar"}) as quiet:
        pin([running.pid, *running.workers], SERVER_CORE)
        sequential, busy = [], []
        for _round in range(rounds):
            with _load(noisy, 1, seconds):
                sequential.append(_time(quiet, seconds))
            with _load(noisy, 64, seconds):
                busy.append(_time(quiet, seconds))
        yield Figure("p50 beside one other sequential client", median(sequential), "µs")
        yield Figure("  beside 64 busy connections, times as much", median(busy) / median(sequential), "", 4)
        for name, disturb in (
            ("a long export", _export),
            ("a burst of events", _burst),
            ("a stuck listener", _stuck),
        ):
            alone, disturbed = [], []
            for _round in range(rounds):
                alone.append(_time(quiet, seconds))
                with disturb(running, noisy):
                    disturbed.append(_time(quiet, seconds))
            yield Figure(f"  beside {name}, times as much as alone", median(disturbed) / median(alone), "", 2)


def _time(container: Container, seconds: float) -> float:
    """Return the median time of a response to a single sequential client, in microseconds."""
    result = Inside(container.pid).load(SOCKET, "keep", 1, seconds, _PATH)
    return float(result["p50"])


@contextmanager
def _load(container: Container, connections: int, seconds: float) -> Iterator[None]:
    process = Inside(container.pid).start("load", SOCKET, "keep", connections, seconds + 0.5, *_PATH)
    try:
        yield
    finally:
        process.communicate(timeout=30)


@contextmanager
def _export(running: Service, container: Container) -> Iterator[None]:
    """Download an image of 64 MiB repeatedly."""
    with tempfile.TemporaryDirectory(dir=running.root) as directory:
        file = Path(directory) / "image.tar.gz"
        # It begins as a file of gzip does (RFC 1952).
        file.write_bytes(b"\x1f\x8b" + os.urandom(1 << 20) * 64)
        running.command("image", "import", str(file), "--public")
        images = running.command("image", "list", "--format", "json").stdout
        fingerprint = images.partition('"fingerprint"')[2].split('"')[1]
        running.configure("c1", security_guestapi_images="true")
        enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0", "taskset", "-c", "1"]
        url = f"http://x/1.0/images/{fingerprint}/export"
        curl = f"while curl -sf --unix-socket {SOCKET} {url} -o /dev/null; do :; done"
        process = subprocess.Popen([*enter, "sh", "-c", curl])
        try:
            yield
        finally:
            process.kill()
            process.wait()
            running.command("image", "remove", fingerprint)


@contextmanager
def _burst(running: Service, container: Container) -> Iterator[None]:
    """Make a hundred changes a second to an instance with twenty listeners."""
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.wait(0.1):
            with running.writer.change() as step:
                for _one in range(10):
                    number += 1
                    steps.configure(step, get_instance(step, "default", "c1"), {"user.number": str(number)})

    with listening(Inside(container.pid), 20):
        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def _stuck(running: Service, container: Container) -> Iterator[None]:
    """Open an event stream that is never read, of an instance that changes."""
    enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0"]
    ask = f"curl -sN --unix-socket {SOCKET} http://x/1.0/events | sleep 60"
    process = subprocess.Popen([*enter, "sh", "-c", ask], start_new_session=True)
    try:
        with _burst(running, container):
            yield
    finally:
        os.killpg(process.pid, 15)
        process.wait()
