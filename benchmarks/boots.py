"""Many instances that boot: what the requests of cloud-init cost, when each instance makes them for the first time."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from statistics import median

from benchmarks.contenders import service
from benchmarks.figures import Figure
from benchmarks.processes import BUILD, LOAD_CORE, SERVER_CORE, pin, processor_seconds
from guestapi.callers import namespaces
from guestapi.store import steps
from tests.harness.service import Service

INSTANCES = 2_000
#: How many boot at the same time.
AT_ONCE = 16
#: What cloud-init's data source and its later stages ask for at a boot.
REQUESTS = [
    "/1.0",
    "/1.0/meta-data",
    "/1.0/config",
    "/1.0/config/cloud-init.user-data",
    "/1.0/config/cloud-init.vendor-data",
    "/1.0/config/cloud-init.network-config",
    "/1.0/config/user.meta-data",
    "/1.0/config/user.network-config",
    "/1.0/config/user.user-data",
    "/1.0/config/user.vendor-data",
    "/1.0/devices",
    "/1.0/config/user.foo",
]
_CONFIG = {
    **{f"cloud-init.{name}": "#cloud-config\n{}\n" for name in ("user-data", "vendor-data", "network-config")},
    "user.foo": "bar",
    "user.meta-data": "role: web\n",
}
_DEVICES = {"eth0": {"type": "nic", "nictype": "bridged", "parent": "br0"}, "root": {"type": "disk", "path": "/"}}


def measure(rounds: int = 3) -> Iterator[Figure]:
    """Measure the processor time of a worker for each boot."""
    with service() as (running, _container):
        pin([running.pid, *running.workers], SERVER_CORE)
        taken = [_boot_all(running, number) for number in range(rounds)]
    yield Figure(
        f"processor time of {len(REQUESTS)} first requests of a boot, {INSTANCES:,} boots", median(taken), "ms", 0.6
    )


def _boot_all(running: Service, number: int) -> float:
    """Boot all instances; return milliseconds of processor time for each."""
    command = [str(BUILD / "boots"), str(running.socket), str(INSTANCES), str(AT_ONCE), *REQUESTS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        pin([process.pid], LOAD_CORE)
        pids = [int(process.stdout.readline()) for _one in range(INSTANCES)]
        inits = [namespaces.examine(pid) for pid in pids]
        booted = []
        with running.writer.change() as change:
            for one, init in enumerate(inits):
                instance = steps.add(change, "default", f"boot{number}-{one}", config=_CONFIG, devices=_DEVICES)
                booted.append(steps.start(change, instance, init))
        before = processor_seconds(running.workers)
        failed, _none = process.communicate("go\n")
        taken = processor_seconds(running.workers) - before
    with running.writer.change() as change:
        # The next ones get their numbers of namespaces.
        for instance in booted:
            steps.remove(change, instance)
    if failed.strip() != "0":
        raise RuntimeError(f"{failed.strip()} requests have failed")
    return taken / INSTANCES * 1000
