"""`pytest --fast`: the tests that start no service, container, daemon or machine, and need no root.

A test is left out if it is marked `root`, or if one of its fixtures yields one of `HOSTS`, as the fixture's annotation
says. A test that has neither and starts a `Service` itself fails: `forbid` names the mark that is missing.
"""

from __future__ import annotations

import os
import re

import pytest

#: Set for this process, and for pytest-xdist's, while `--fast` holds.
_VARIABLE = "GUESTAPI_TESTS_FAST"

#: Classes of the harness that start something on the host.
HOSTS = frozenset({"Service", "Container", "Machine", "Installed", "Daemon", "Host", "Lxc"})


def enable() -> None:
    """Let `forbid` fail from now on."""
    os.environ[_VARIABLE] = "1"


def forbid() -> None:
    """Called by what starts something on the host: fail if this is a run of fast tests.

    Raises:
        AssertionError: this run has `--fast`.
    """
    assert _VARIABLE not in os.environ, "a test that starts something on the host is marked with pytest.mark.root"


def needs_host(item: pytest.Item) -> bool:
    """Whether a test needs root and something on the host, as its marks and its fixtures say."""
    if item.get_closest_marker("root"):
        return True
    info = getattr(item, "_fixtureinfo", None)
    definitions = info.name2fixturedefs.values() if info else ()
    annotations = (str(getattr(each[-1].func, "__annotations__", {}).get("return", "")) for each in definitions if each)
    return any(HOSTS & set(re.findall(r"\w+", annotation)) for annotation in annotations)
