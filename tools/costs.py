"""What each test costs: a plugin of pytest that prints the processor time of the tests, with all that they start.

    .venv/bin/pytest -p tools.costs [--numprocesses 6 --dist loadscope --no-loadscope-reorder]

As root. Each test process enters a control group of its own, whose time is read before and after each test: processes
that a test starts, and their children, are in the same group. Where version 1 of the cpuacct controller is mounted, it
counts also what moves into another group of version 2, as daemons and machines do; elsewhere these are missing.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_PROPERTY = "processor seconds"
_VERSION_1 = Path("/sys/fs/cgroup/cpuacct")
#: The most modules and tests that are printed.
_MOST = 25


class CostMeter:
    """The processor time of one process with its children, in a control group that it enters."""

    def __init__(self) -> None:
        self._old = _VERSION_1.is_dir()
        self._group = (_VERSION_1 if self._old else Path("/sys/fs/cgroup")) / f"guestapi-costs-{os.getpid()}"
        self._group.mkdir()
        (self._group / "cgroup.procs").write_text(str(os.getpid()))

    def read(self) -> float:
        """Return the seconds so far."""
        if self._old:
            return int((self._group / "cpuacct.usage").read_text()) / 1e9
        return int((self._group / "cpu.stat").read_text().split()[1]) / 1e6

    def leave(self) -> None:
        """Leave the group; remove it if nothing is left in it."""
        (self._group.parent / "cgroup.procs").write_text(str(os.getpid()))
        try:
            self._group.rmdir()
        except OSError:
            pass  # A process of a test has not ended yet.


class Costs:
    """The plugin: measures in each process that runs tests, and sums up in the one that prints."""

    def __init__(self) -> None:
        self._meter = CostMeter()
        self._tests: defaultdict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure a test, with its share of fixtures."""
        self._began = self._meter.read()
        # pluggy's wrappers have no type for the result of their yield.
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        """Add the time since the last report to this one."""
        report: Any = yield
        now = self._meter.read()
        report.user_properties.append((_PROPERTY, now - self._began))
        self._began = now
        return report  # type: ignore[no-any-return]  # as above

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Sum up the three reports of a test."""
        # Properties of the item are in each of its reports; what was added here comes last.
        found = [value for name, value in report.user_properties if name == _PROPERTY]
        self._tests[report.nodeid] += float(str(found[-1])) if found else 0.0

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print modules and tests, the most expensive first."""
        modules: defaultdict[str, float] = defaultdict(float)
        for nodeid, seconds in self._tests.items():
            modules[nodeid.partition("::")[0]] += seconds
        terminalreporter.section(f"{_PROPERTY}: {sum(modules.values()):.0f} in all tests")
        for counted in (modules, self._tests):
            for name, seconds in sorted(counted.items(), key=lambda one: -one[1])[:_MOST]:
                terminalreporter.write_line(f"{seconds:7.1f}  {name}")

    def pytest_unconfigure(self) -> None:
        """Leave the control group."""
        self._meter.leave()


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin, in each process."""
    config.pluginmanager.register(Costs())
