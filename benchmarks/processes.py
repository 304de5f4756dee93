"""Measured processes: their cores, their use of resources, and their load."""

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

#: Measured processes run on one core, the load on the other.
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
    """Raise the priority of this process and its children over other processes."""
    os.setpriority(os.PRIO_PROCESS, 0, -15)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def threads(pid: int) -> list[int]:
    """Return the threads of a process."""
    return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]


def pin(pids: Iterable[int], core: int) -> None:
    """Bind processes to one core."""
    if cores() > 1:
        for pid in pids:
            for thread in threads(pid):
                os.sched_setaffinity(thread, {core})


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor time of processes, summed over their living threads.

    /proc/PID/task/TID/schedstat has it in nanoseconds (Documentation/scheduler/sched-stats.rst); ``utime`` and
    ``stime`` are in hundredths of a second, too coarse for short rounds.
    """
    total = 0
    for pid in pids:
        for thread in threads(pid):
            total += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return total / 1e9


def resident_kb(pid: int) -> int:
    """Return the private memory of a process, in kB (smaps_rollup in proc(5))."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in fields)}
    return values["Private_Clean"] + values["Private_Dirty"]


@dataclass(frozen=True, slots=True)
class Inside:
    """A way to run programs in the container with this init, on a core."""

    pid: int
    core: int | None = LOAD_CORE

    def words(self, program: str, *words: object) -> list[str]:
        """Return the command that runs one of the C programs as the container's root."""
        pinned = ["taskset", "-c", str(self.core)] if self.core is not None and cores() > 1 else []
        enter = ["nsenter", "-t", str(self.pid), "-a", "--setuid", "0", "--setgid", "0"]
        return [*enter, *pinned, str(BUILD / program), *map(str, words)]

    def start(self, program: str, *words: object) -> subprocess.Popen[str]:
        """Start one of the C programs."""
        return subprocess.Popen(
            self.words(program, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def load(self, socket: str, manner: str, connections: int, seconds: float, paths: Sequence[str]) -> dict[str, Any]:
        """Run load.c; return its results."""
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
