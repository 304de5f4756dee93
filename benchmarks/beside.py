"""guestapi beside a real Incus or LXD: requests of the same containers to both sockets, in one run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

from benchmarks.contenders import TOML, Contender
from benchmarks.figures import Figure
from benchmarks.processes import BUILD, Inside
from benchmarks.scale import listening
from guestapi.dialects import DIALECTS
from tests.harness.daemon import PACKAGES, Daemon
from tests.harness.mirroring import OURS, beside
from tests.harness.service import Service

#: The loads for both: manner, and number of connections at a time. The daemons do not survive more: with many
#: connections that open and close, Incus 6.0.4 and LXD 5.0.2 end with "concurrent map read and map write"; sometimes
#: with these, too.
LOADS = [("keep", 1), ("keep", 16), ("new", 1)]
_NAME = "c1"
#: Seconds between two changes.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """A daemon and guestapi, which answer the same container; neither is bound to a core, as on a host."""

    daemon: Daemon
    service: Service
    inside: Inside

    @property
    def daemon_socket(self) -> str:
        """The daemon's socket in the container."""
        return f"{DIALECTS[self.daemon.kind].directory}/sock"

    @property
    def contenders(self) -> list[Contender]:
        """The contenders; the daemon is the first one, with which guestapi is compared."""
        version = self.daemon.query("/1.0")["environment"]["server_version"]
        return [
            Contender(f"{self.daemon.kind} {version}", self.daemon_socket, (self.daemon.pid,), self.inside),
            Contender("guestapi, 2 workers", OURS, tuple(self.service.workers), self.inside),
        ]

    def revive(self) -> None:
        """Start the daemon again if it has ended."""
        if not self.daemon.running:
            self.daemon.start()

    def events(self, times: int = 200) -> Iterator[Figure]:
        """Measure single changes by the daemon's API: how much later than the daemon's own listener ours hears of each.

        Both listen in the same container. Between two changes is a pause, as between those that people make.
        """
        with listening(self.inside, 1, self.daemon_socket) as at_daemon, listening(self.inside, 1, OURS) as at_guestapi:
            taken, lags = [], []
            for number in range(1, times + 1):
                began = time.monotonic()
                self.daemon.query(f"/1.0/instances/{_NAME}", "PATCH", {"config": {"user.number": str(number)}})
                taken.append(time.monotonic() - began)
                lags.append(at_guestapi.last(0) - at_daemon.last(0))
                time.sleep(PAUSE_SECONDS)
            wrong = at_guestapi.disorder
        lags.sort()
        kind = self.daemon.kind
        yield Figure(f"{kind}: a change by its API takes, median of {times}", median(taken) * 1000, "ms")
        yield Figure(f"{kind}: lag of the mirror, p50 of {times}", median(lags) * 1000, "ms", 5)
        yield Figure(f"{kind}: lag of the mirror, p99", lags[times * 99 // 100] * 1000, "ms", 15)
        yield Figure(f"{kind}: events out of order, or missing", wrong, "", 0)


@contextmanager
def pair(release: str) -> Iterator[Pair]:
    """Run a daemon with one container, and guestapi beside it.

    Args:
        release: ``incus``, ``incus-7`` or ``lxd``.
    """
    with ExitStack() as stack:
        daemon, service, _mirror = stack.enter_context(beside(release, TOML))
        programs = ["disk", f"source={BUILD}", f"path={BUILD}"]
        daemon.client("profile", "device", "add", "default", "programs", *programs)
        daemon.client("launch", "busybox", _NAME, "-c", "user.foo=bar")
        # Waits until the mirror has the instance.
        assert daemon.ask(_NAME, "/1.0/config/user.foo", OURS).text == "bar"
        yield Pair(daemon, service, Inside(daemon.init(_NAME), None))


def kinds() -> Iterator[str]:
    """Yield the daemons whose packages are installed."""
    for kind in ("incus", "incus-7", "lxd"):
        if (PACKAGES / kind).is_dir():
            yield kind
        else:
            print(f"{kind} is left out: 'make bench' could not unpack its packages to {PACKAGES / kind}")
