"""guestapi top: what it shows in 80 columns, what its keys do, and what it prints into a pipe."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from guestapi.cli.top import TopState
from guestapi.cli.top_view import InstanceLine, Overview, SourceLine, WorkerLine, choose, print_once
from guestapi.metrics.handover import ReportDirectory
from guestapi.metrics.report import Counts, InstanceActivity, WorkerReport
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from tests.cli.command import Guestapi
from tests.harness.service import COMMAND

OVERVIEW = Overview(
    wanted=2,
    known=12,
    running=10,
    workers=(WorkerLine(4711, True, 95, 12, 3), WorkerLine(4712, False, 90_000, 0, 0)),
    sources=(SourceLine("incus", True, 2.0, 0.012, 0), SourceLine("lxc", False, None, 0.0, 3)),
    instances=(
        InstanceLine("default", "web", 120, 0, 9, 2),
        InstanceLine("default", "x" * 60, 3, 0, 1, 1),
        InstanceLine("shop", "no[red]isy\x1b[2J", 300, 57, 2, 0),
    ),
)
#: What it looks like in 80 columns.
SHOWN = """\
1 of 2 workers answer; 10 of 12 instances run; 423 requests/s, 57 refusals/s

WORKER  STATE       UP  CONNECTIONS  STREAMS
4711    answers  1 min           12        3
4712    silent     1 d            0        0

SOURCE  STATE         CONTACT      LAG  PROBLEMS
incus   followed          2 s  0.012 s         0
lxc     not followed    never  0.000 s         3

PROJECT  INSTANCE                 REQUESTS/S  REFUSALS/S  CONNECTIONS  STREAMS
shop     no[red]isy\\x1b[2J               300          57            2        0
default  web                             120           0            9        2
default  xxxxxxxxxxxxxxxxxxxxxx…           3           0            1        1
"""


def shown(overview: Overview, width: int = 80) -> str:
    """What is printed, without the blanks at the ends of lines."""
    out = io.StringIO()
    print_once(overview, Console(file=out, width=width))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def test_in_80_columns() -> None:
    """Everything fits into 80 columns; what is too long is cut off, and no name drives the terminal."""
    assert shown(choose(OVERVIEW, "requests", "")) == SHOWN


def test_sort_and_filter() -> None:
    """Instances are sorted by numbers, the largest first, or by name; a filter looks at names and projects."""
    orders = {
        sort: [one.name[:3] for one in choose(OVERVIEW, sort, "").instances]
        for sort in ("refusals", "connections", "streams", "name")
    }
    assert orders == {
        "refusals": ["no[", "web", "xxx"],
        "connections": ["web", "no[", "xxx"],
        "streams": ["web", "xxx", "no["],
        "name": ["web", "xxx", "no["],
    }
    assert [one.name for one in choose(OVERVIEW, "requests", "we").instances] == ["web"]
    assert [one.project for one in choose(OVERVIEW, "requests", "shop").instances] == ["shop"]
    assert choose(OVERVIEW, "requests", "none").instances == ()


def test_keys() -> None:
    """A letter sorts, / begins a filter that ends with Enter and goes with Escape, q ends it; others do nothing."""
    state = TopState("requests", "")
    for key, sort in (("x", "refusals"), ("c", "connections"), ("s", "streams"), ("n", "name"), ("?", "name")):
        state.press(key)
        assert state.sort == sort
    assert f"by {state.sort}" in state.footer
    for key in "/wq\x01eb\x7f":
        state.press(key)
    assert (state.wanted, state.typing, state.ended) == ("wqe", True, False)
    assert state.footer == "filter: wqe_"
    state.press("\r")
    assert "filter: wqe" in state.footer
    state.press("\x1b")
    assert state.wanted == ""
    state.press("q")
    assert state.ended


@pytest.fixture
def reporting(c1: Guestapi, tmp_path: Path) -> Guestapi:
    """The command beside a service that has just handed over what two workers do for c1."""
    directory = tmp_path / "metrics"
    directory.mkdir()
    with c1.config.open("a") as file:
        file.write(f'[metrics]\ndirectory = "{directory}"\n')
    with view(c1.settings.store.url) as store:
        number = get_instance(store, "default", "c1").id
    reports = ReportDirectory(directory)
    for worker in (1, 2):
        activity = [InstanceActivity(number, 20 * worker, worker, 2, 1), InstanceActivity(99, 7, 0, 0, 0)]
        # Far in the future is as stale as long ago, so the time of the test is taken.
        report = WorkerReport(
            pid=worker,
            at=time.time() + 3,
            started=time.time(),
            answers=True,
            counts=Counts(),
            connections=2,
            streams=1,
            instances=activity,
        )
        reports.write_worker(worker, report)
    reports.write_service(workers=2, started=2, alive={1, 2})
    return c1


def test_in_a_pipe(reporting: Guestapi) -> None:
    """Into a pipe it prints once, plainly, the sums of all workers; an instance that is gone has no line."""
    lines = reporting.good("top").splitlines()
    assert lines[0] == "2 of 2 workers answer; 0 of 1 instances run; 60 requests/s, 3 refusals/s"
    assert [line.split() for line in lines[lines.index("") + 5 :] if line][1:] == [
        ["default", "c1", "60", "3", "4", "2"]
    ]
    assert "c1" not in reporting.good("top", "--filter", "other")
    assert "\x1b" not in "".join(lines)


def test_without_a_service(c1: Guestapi, tmp_path: Path) -> None:
    """Where no service hands anything over, that is said."""
    with c1.config.open("a") as file:
        file.write(f'[metrics]\ndirectory = "{tmp_path}/none"\n')
    assert "the service does not run" in c1.fails("top")


def test_on_a_terminal(reporting: Guestapi) -> None:
    """On a terminal it stays until q is pressed, and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "--config", reporting.config, "top"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={"TERM": "xterm", "PATH": os.environ["PATH"], "COLUMNS": "80", "LINES": "24"},
    )
    os.close(theirs)
    read = b""
    until = time.monotonic() + 60
    while b"q quit" not in read:
        assert time.monotonic() < until, read
        if select.select([ours], [], [], 1)[0]:
            read += os.read(ours, 65536)
    os.write(ours, b"n/c1\rq")
    # What it still writes has to be read, or it could not end.
    while process.poll() is None:
        assert time.monotonic() < until
        try:
            if select.select([ours], [], [], 0.1)[0]:
                read += os.read(ours, 65536)
        except OSError:
            break  # It has ended: there is nobody at the other end.
    assert process.wait(30) == 0
    os.close(ours)
    # The other screen was entered and left again (xterm's control sequences, private mode 1049).
    assert b"\x1b[?1049h" in read
    assert b"\x1b[?1049l" in read
