"""Three Incus daemons in a cluster, with a guestapi beside each: what a member's mirror has to do with the others."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from benchmarks.beside import PAUSE_SECONDS
from benchmarks.contenders import TOML
from benchmarks.figures import Figure
from benchmarks.processes import BUILD, Inside, processor_seconds
from benchmarks.scale import listening
from tests.cluster.side import Side, beside_each
from tests.harness.daemon import PACKAGES

#: Changes a second of another member's instances, and for how many seconds.
_RATE, _SECONDS = 10, 20
#: Changes while a member hangs.
_CHANGES = 43


def measure() -> Iterator[Figure]:
    """Measure what the mirrors do while a member hangs, then the cost of other members' changes."""
    if not (PACKAGES / "incus").is_dir():
        print(f"the cluster is left out: 'make bench' could not unpack Incus to {PACKAGES / 'incus'}")
        return
    with beside_each(toml=TOML) as sides, ExitStack() as stack:
        stack.enter_context(sides[0].launched("here"))
        stack.enter_context(sides[2].launched("there"))
        sides[0].wait_for("here")
        sides[2].wait_for("there")
        yield from _hang(sides)
        yield from _cost(sides)


def _cost(sides: list[Side]) -> Iterator[Figure]:
    first, _second, third = sides
    idle, _daemon = _used(first, 0.0, third)
    busy, with_mirror = _used(first, _RATE, third)
    first.mirror.kill()
    _none, without = _used(first, _RATE, third)
    first.mirror.start()
    text = f"{_RATE} changes/s of another member's instance: the mirror takes more of a core"
    yield Figure(text, (busy - idle) * 100, "%", 0.5)
    yield Figure("  the member's daemon without a mirror, of a core", without * 100, "%")
    yield Figure("  and with it", with_mirror * 100, "%")


def _used(side: Side, rate: float, other: Side) -> tuple[float, float]:
    """Return the parts of a core that a member's mirror and daemon need while another's instance is changed."""
    pids = [pid for pid in (side.mirror.pid, side.member.pid) if Path(f"/proc/{pid}/task").exists()]
    began, before = time.monotonic(), [processor_seconds([pid]) for pid in pids]
    number = 0
    while (passed := time.monotonic() - began) < _SECONDS:
        if number < passed * rate:
            number += 1
            other.member.query("/1.0/instances/there", "PATCH", {"config": {"user.number": str(number)}})
        else:
            time.sleep(0.01)
    used = [(processor_seconds([pid]) - one) / passed for pid, one in zip(pids, before, strict=True)]
    # A mirror that was killed used nothing.
    return (used[0] if len(used) > 1 else 0.0), used[-1]


def _hang(sides: list[Side]) -> Iterator[Figure]:
    first, second, third = sides
    first.member.client("config", "device", "add", "here", "programs", "disk", f"source={BUILD}", f"path={BUILD}")
    first.member.client("config", "device", "add", "here", "guestapi", "disk", *first.device)
    with listening(Inside(first.member.init("here"), None), 1, first.socket) as listener:
        first.member.client("config", "set", "there", "user.number=0")
        third.member.send(signal.SIGSTOP)
        try:
            lags = []
            for number in range(1, _CHANGES + 1):
                first.member.query("/1.0/instances/here", "PATCH", {"config": {"user.number": str(number)}})
                answered = time.monotonic()
                # The devices that were added before may be told of only now.
                while (event := listener.next())["value"] != number:
                    pass
                lags.append(event["last"] - answered)
                time.sleep(PAUSE_SECONDS)
            began = time.monotonic()
            with second.launched("new"):
                launched = time.monotonic()
                second.wait_for("new")
                registered = time.monotonic()
        finally:
            third.member.send(signal.SIGCONT)
    text = f"while a member hangs: of {_CHANGES} changes at another, from the API's answer to the event, p50"
    yield Figure(text, median(lags) * 1000, "ms")
    yield Figure("  and the slowest", max(lags) * 1000, "ms", 1000)
    yield Figure("  a container that is launched meanwhile: the launch takes", launched - began, "s")
    yield Figure("  and then, until its member's guestapi has it", registered - launched, "s", 1)
