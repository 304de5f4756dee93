"""Fixtures, the order and groups of tests, and skips: without root some tests skip; in CI a skip is a failure.

Several modules may run at a time, each in a process with a `service` of its own (pytest-xdist), but never two tests of
one module, so names on the host need to be unique only in a module. Modules that share the `machine` count as one.
"""

from __future__ import annotations

import gc
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import guestapi.http.request
from tests.harness import fast, parsers, scratch
from tests.harness.containers import Container
from tests.harness.enterable import closed_directories, run_where_enterable
from tests.harness.machine import Installed, stage
from tests.harness.service import Service
from tests.hostile.table import pytest_terminal_summary as pytest_terminal_summary

CI = os.environ.get("CI") == "true"
# How long an example takes, or finding one, depends on the machine's load, so neither fails a test.
hypothesis.settings.register_profile(
    "steady", hypothesis.settings(), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")
_FLEETS = [Path(__file__).with_name(name) for name in ("fleet", "fleet_faults")]

#: Modules that share the one `machine`, in the order in which they use it: the last one uninstalls guestapi.
_MACHINE = (
    *("faults/test_unit.py", "mirror/test_units.py", "server/test_restart.py", "server/test_sandbox.py"),
    *("sources/test_lxc_unit.py", "server/test_signer_unit.py", "server/test_systemd.py"),
)
#: Parameters for each of which a module starts a daemon or an engine, or builds a root, of its own.
_KINDS = re.compile("incus-7|incus|lxd|Podman|Docker|bookworm|trixie|testing")
#: The modules that do.
_EACH = ("test_daemons.py", "test_oddities.py", "test_engine_followers.py", "test_engines.py", "test_roots.py")
#: What takes longest begins first, so that no process has it left when the others have ended.
_LONG = (
    *("test_daemons.py", "test_isolation.py", "test_faulty.py", "server/test_tree_history.py"),
    "test_libvirt_daemon.py",
    # The machine's tests have begun to make what these install (`staged`), or make it themselves meanwhile.
    *("test_deb.py", "test_guides.py", "test_oddities.py", "sources/test_lxc.py", "test_replay.py"),
    *("test_replay_lxd.py", "test_attacks.py", "test_engine_followers.py", "test_engines.py", "test_worker.py"),
    *("faults/test_follower.py", "sources/test_follower.py", "test_oci_alone.py", "test_identify.py"),
    *("test_guestctl.py", "test_typed.py", "test_oci_followers.py", "fleet/test_follower.py", "server/test_images.py"),
    *("test_targets.py", "test_follower_units.py", "test_misuse.py", "test_snippets.py", "test_killed.py"),
    *("test_profiles.py", "test_mutate.py", "test_events.py", "test_announced_stops.py", "test_roots.py"),
    *("test_demo.py", "test_entry.py", "test_neighbours.py", "test_handshake.py", "test_layout.py"),
)


def _group(nodeid: str) -> str:
    """Return what a test is in: tests of one group run one after another, in one process."""
    file, _, name = nodeid.partition("::")
    if file.endswith(_MACHINE):
        return "machine"
    if file.endswith(("test_replay.py", "test_replay_lxd.py")):
        # Both have a control group that is named like that of another container.
        return "replays"
    if file.endswith("test_isolation.py"):
        # Each walk has a service and a PID namespace of its own.
        return nodeid
    kind = _KINDS.search(name.partition("[")[2]) if file.endswith(_EACH) else None
    return f"{file} {kind[0]}" if kind else file


def _order(nodeid: str) -> tuple[int, int]:
    """Return the key to sort tests by: of two modules, the longer one first."""
    file = nodeid.partition("::")[0]
    for step, name in enumerate(_MACHINE):
        if file.endswith(name):
            return 0, step
    return next((number for number, name in enumerate(_LONG, 1) if file.endswith(name)), len(_LONG) + 1), 0


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Return pytest-xdist's scheduler with the groups of this module."""
    # Imported here because xdist is neither needed nor necessarily installed if one test runs at a time.
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it has no types

    class Groups(LoadScopeScheduling):  # type: ignore[misc]  # its base class has no types either
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Groups(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--fast`."""
    parser.addoption(
        "--fast", action="store_true", help="only tests that need no service, container, daemon or machine"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Prepare `--fast`; otherwise make the tests run where the service's user can enter the checkout."""
    scratch.use()
    # A shell starts what is to run in the background with SIGINT ignored, which all children would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--fast"):
        fast.enable()
    elif os.geteuid() == 0 and closed_directories():
        # The output that pytest has captured goes to the terminal, which the new process uses.
        config.pluginmanager.getplugin("capturemanager").stop_global_capturing()
        run_where_enterable()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the collector of garbage away from the tests themselves, which it would look through again and again."""
    gc.disable()
    try:
        # pluggy's wrappers have no type for the result of their yield.
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests of fleets out with `--fast`: all need PostgreSQL, and cannot be imported without its library."""
    return True if config.getoption("--fast") and collection_path in _FLEETS else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the longest tests first; deselect, or skip without root, those that need the host; in CI skip none."""
    if config.getoption("--fast"):
        slow = [item for item in items if fast.needs_host(item)]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]
        return
    items.sort(key=lambda item: _order(item.nodeid))
    if os.geteuid() == 0 or CI:
        return
    for item in items:
        if fast.needs_host(item):
            item.add_marker(pytest.mark.skip(reason="needs root: containers, and a service of another user"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """In CI turn a skip into a failure."""
    # pluggy's wrappers have no type for the result of their yield.
    report = yield
    if CI and report.skipped:  # type: ignore[attr-defined]
        report.outcome = "failed"  # type: ignore[attr-defined]
        report.longrepr = f"skipped in CI: {report.longrepr}"  # type: ignore[attr-defined]
    return report


@pytest.fixture(scope="module", params=parsers.find_parsers(), ids=lambda parser: f"gunicorn_h1c-{parser.version}")
def parser(request: pytest.FixtureRequest) -> Iterator[parsers.ParserVersion]:
    """Parse heads of requests with this version of gunicorn_h1c, in this process."""
    with parsers.use(request.param, guestapi.http.request):
        yield request.param


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """A service with two workers that all tests share; each uses instances of its own."""
    with Service() as running:
        yield running


@pytest.fixture(scope="session")
def c1(service: Service) -> Iterator[Container]:
    """A container that runs as instance c1. A test that changes its configuration must change it back."""
    with service.container("c1", {"user.foo": "bar"}) as container:
        yield container


@pytest.fixture(scope="session")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``make install`` installs, made once for all processes of this run, which takes a quarter of a minute."""
    own = tmp_path_factory.getbasetemp()
    return stage((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "staged")


@pytest.fixture(scope="session")
def machine(staged: Path) -> Iterator[Installed]:
    """A machine with a real systemd as PID 1 and guestapi installed."""
    with Installed(staged) as booted:
        yield booted
