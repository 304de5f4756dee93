"""`config get` and `config set`, which scripts call in loops, in multiples of loading sqlite3; and commands in bulk."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure
from benchmarks.hooks import install
from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.writing import Writer
from tests.harness.following import processor_milliseconds

#: Instances that are applied at once, and seconds that it may take.
MANY, MOST_SECONDS = 10_000, 5.0
#: The number of measurements of each call, and the limit of the ratio to Python that loads sqlite3 alone.
ROUNDS, MOST = 40, 3.5


def measure() -> Iterator[Figure]:
    """Measure `config get` and `config set`, in the checkout's environment and in an installed one."""
    with tempfile.TemporaryDirectory(prefix="guestapi-bench-") as name:
        directory = Path(name)
        config = directory / "guestapi.toml"
        config.write_text(f'[store]\nurl = "sqlite:///{directory}/store.db"\n')
        settings = Settings(store=StoreSettings(url=f"sqlite:///{directory}/store.db"))
        with Writer(settings, create=True).change() as change:
            steps.add(change, "default", "c1", config={"user.a": "1"})
        for where, command in (
            ("the checkout", Path(sys.prefix, "bin/guestapi")),
            ("as installed", install(directory)),
        ):
            yield from _costs(where, command, config)
        yield from _bulk(directory, Path(sys.prefix, "bin/guestapi"), config)


def _costs(where: str, command: Path, config: Path) -> Iterator[Figure]:
    calls: dict[str, list[str | Path]] = {
        "python -I -c 'import sqlite3'": [command.parent / "python3", "-I", "-c", "import sqlite3"],
        "config get": [command, "--config", config, "config", "get", "c1", "user.a"],
        "config set": [command, "--config", config, "config", "set", "c1", "user.a=2"],
    }
    # The calls take turns, so that other load on the machine affects all of them alike.
    rounds = [[processor_milliseconds(call, {}) for call in calls.values()] for _ in range(ROUNDS)]
    base, *found = map(median, zip(*rounds, strict=True))
    yield Figure(f"{where}: processor time of python -I -c 'import sqlite3'", base, "ms")
    for name, value in zip(list(calls)[1:], found, strict=True):
        yield Figure(f"{where}: processor time of guestapi {name}", value, "ms")
        yield Figure(f"{where}: guestapi {name}, in times of that", value / base, "", MOST)


def _bulk(directory: Path, command: Path, config: Path) -> Iterator[Figure]:
    """Measure commands about many instances: added, unchanged, exported and listed."""
    definitions = directory / "many.yaml"
    with definitions.open("w") as file:
        for number in range(MANY):
            file.write(f"---\nname: b{number}\nconfig:\n  user.role: web\n  user.number: '{number}'\n")
            file.write("devices:\n  eth0:\n    type: nic\n    name: eth0\n")
    calls: list[tuple[str, list[str | Path], float | None]] = [
        (f"apply of {MANY:,} instances, all new", ["apply", "-f", definitions], MOST_SECONDS),
        (f"apply of {MANY:,} instances, none changed", ["apply", "-f", definitions], MOST_SECONDS),
        (f"export of {MANY:,} instances", ["export", "--all"], None),
        (f"list of {MANY:,} instances", ["list"], None),
    ]
    for what, words, most in calls:
        began = time.monotonic()
        subprocess.run([command, "--config", config, *words], check=True, stdout=subprocess.DEVNULL)
        yield Figure(f"guestapi {what}", time.monotonic() - began, "s", most)
