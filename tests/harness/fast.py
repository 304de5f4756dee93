"""`pytest --fast`: the tests that start no service, container, daemon or machine, and need no root.

A test is deselected if it is marked `root`, or if the return annotation of one of its fixtures names one of `HOSTS`. A
test that has neither and starts a `Service` itself fails: `forbid` names the missing mark.
"""

from __future__ import annotations

import os
import re

import pytest

#: Set for this process and those of pytest-xdist if `--fast` is given.
_VARIABLE = "GUESTAPI_TESTS_FAST"

#: Classes of the harness that start processes on the host.
HOSTS = frozenset({"Service", "Container", "Machine", "Installed", "Daemon", "Host", "Lxc"})


def enable() -> None:
    """Make `forbid` fail from now on."""
    os.environ[_VARIABLE] = "1"


def forbid() -> None:
    """Fail in a run of fast tests. Everything that starts processes on the host calls this.

    Raises:
        AssertionError: this run has `--fast`.
    """
    assert _VARIABLE not in os.environ, "a test that starts something on the host is marked with pytest.mark.root"


def needs_host(item: pytest.Item) -> bool:
    """Return whether a test needs root or processes on the host, according to its marks and its fixtures."""
    if item.get_closest_marker("root"):
        return True
    info = getattr(item, "_fixtureinfo", None)
    definitions = info.name2fixturedefs.values() if info else ()
    annotations = (str(getattr(each[-1].func, "__annotations__", {}).get("return", "")) for each in definitions if each)
    return any(HOSTS & set(re.findall(r"\w+", annotation)) for annotation in annotations)
