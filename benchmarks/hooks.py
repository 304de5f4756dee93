"""Hooks of container runtimes: the cost of one, the time of many that start at once, and a follower's memory."""

from __future__ import annotations

import shutil
import time
import venv
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import guestapi
from benchmarks.figures import Figure
from benchmarks.processes import resident_kb
from tests.harness.following import RunningFollower, install_hook, processor_milliseconds
from tests.harness.lxc_monitors import PlayedLxc
from tests.harness.service import Service
from tests.harness.waiting import until

#: The number of measurements of each command, and of containers that start at once.
ROUNDS, AT_ONCE = 25, 200
#: The limit of a hook's processor time in milliseconds, and that time in version 0.1 on the same kind of machine.
MOST, BEFORE = 25.0, 178.0


def measure() -> Iterator[Figure]:
    """Measure hooks with a real follower and service, and a simulated LXC."""
    with Service(dialects=["incus"]) as service:
        sources = f'[sources.lxc]\npaths = ["{service.root}/lxc"]\n'
        with PlayedLxc(service) as lxc, RunningFollower(service, sources=sources) as follower:
            lxc.start("one")
            yield from _costs(service, lxc.environ("one"))
            yield from _crowd(service, lxc)
            yield Figure("memory that only the follower uses", resident_kb(follower.pid) / 1024, "MiB")


def _costs(service: Service, environ: Mapping[str, str]) -> Iterator[Figure]:
    options: list[str | Path] = ["--config", service.config]
    ways: dict[str, list[str | Path]] = {
        "Python alone (python3 -I -S -c pass)": ["/usr/bin/python3", "-I", "-S", "-c", "pass"],
        "the hook (guestapi-hook lxc)": [install_hook(service.root), *options, "lxc"],
        "the command of 0.1 (guestapi hook lxc)": [install(service.root), *options, "hook", "lxc"],
    }
    for name, command in ways.items():
        found = median(processor_milliseconds(command, environ) for _ in range(ROUNDS))
        most = None if "pass" in name else MOST
        yield Figure(f"processor time of {name}", found, "ms", most)
    yield Figure("processor time of the hook of version 0.1, as measured then", BEFORE, "ms")


def install(directory: Path) -> Path:
    """Return the installed command. The checkout's own is located by a finder, which takes ten milliseconds."""
    environment = directory / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    shutil.copytree(Path(guestapi.__file__).parent, packages / "guestapi")
    command = environment / "bin" / "guestapi"
    # As pip writes it.
    script = (
        "import re\nimport sys\nfrom guestapi.entry import main\nsys.argv[0] = re.sub('x$', '', sys.argv[0])\nmain()\n"
    )
    command.write_text(f"#!{environment}/bin/python3\n{script}")
    command.chmod(0o755)
    return command


def _crowd(service: Service, lxc: PlayedLxc) -> Iterator[Figure]:
    names = [f"c{number}" for number in range(AT_ONCE)]
    for name in names:
        lxc.start(name)
    began = time.monotonic()
    hooks = [lxc.hook(name) for name in names]
    late = sum(bool(hook.communicate()[1]) for hook in hooks)
    yield Figure(
        f"seconds until the hooks of {AT_ONCE} containers that start at once have returned", _since(began), "s"
    )
    yield Figure("  hooks that gave up after two seconds", late, "")
    until(lambda: _running(service) == AT_ONCE + 1, "all of them")
    yield Figure("  until all are registered", _since(began), "s")


def _running(service: Service) -> int:
    return sum(one["status"] == "running" for one in service.listed())


def _since(began: float) -> float:
    return time.monotonic() - began
