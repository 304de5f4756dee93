"""Processes that are measured: where they run, what they have used, and the load that is put on them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUILD = HERE / "build"

#: What is measured runs on one core, the load on the other.
SERVER_CORE, LOAD_CORE = 0, 1


def build() -> None:
    """Compile the C programs that are older than their sources."""
    BUILD.mkdir(exist_ok=True)
    compiler = shutil.which("cc") or "gcc"
    for source in HERE.glob("*.c"):
        program = BUILD / source.stem
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)


def go_first() -> None:
    """Let what else the machine does disturb this process, and those that it starts, as little as possible."""
    os.setpriority(os.PRIO_PROCESS, 0, -15)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def threads(pid: int) -> list[int]:
    """The threads of a process."""
    return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]


def pin(pids: Iterable[int], core: int) -> None:
    """Let processes run on one core only."""
    if cores() > 1:
        for pid in pids:
            for thread in threads(pid):
                os.sched_setaffinity(thread, {core})


def processor_seconds(pids: Iterable[int]) -> float:
    """How long processes have been on a processor, of all their threads that live.

    /proc/PID/task/TID/schedstat has it in nanoseconds (Documentation/scheduler/sched-stats.rst); ``utime`` and
    ``stime`` are counted in hundredths of a second, too coarse for short rounds.
    """
    total = 0
    for pid in pids:
        for thread in threads(pid):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def resident_kb(pid: int) -> int:
    """Memory of a process that is nobody else's, in kB (smaps_rollup in proc(5))."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in fields)}
    return values["Private_Clean"] + values["Private_Dirty"]


@dataclass(frozen=True, slots=True)
class Inside:
    """A way to run programs inside the container with this init, on a core."""

    pid: int
    core: int | None = LOAD_CORE

    def words(self, program: str, *words: object) -> list[str]:
        """The command that runs one of our C programs as the container's root."""
        pinned = ["taskset", "-c", str(self.core)] if self.core is not None and cores() > 1 else []
        enter = ["nsenter", "-t", str(self.pid), "-a", "--setuid", "0", "--setgid", "0"]
        return [*enter, *pinned, str(BUILD / program), *map(str, words)]

    def start(self, program: str, *words: object) -> subprocess.Popen[str]:
        """Start it."""
        return subprocess.Popen(
            self.words(program, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def load(self, socket: str, manner: str, connections: int, seconds: float, paths: Sequence[str]) -> dict[str, Any]:
        """Run load.c, and what it says."""
        done = subprocess.run(
            self.words("load", socket, manner, connections, seconds, *paths),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"requests": 0, "errors": 1, "seconds": seconds, "p50": 0.0, "p99": 0.0, "max": 0.0}
        result: dict[str, Any] = json.loads(done.stdout)
        return result
