"""What systemd tells the service, and what the service tells systemd. Outside systemd, all of it does nothing."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import systemd.daemon

from guestapi.dialects import DIALECTS
from guestapi.settings import Listener, SettingsError

log = logging.getLogger(__name__)

#: Seconds that systemctl has: more than a service has to stop (systemd-system.conf(5), DefaultTimeoutStopSec=).
_PATIENCE = 120.0
#: sd_listen_fds(3): the first descriptor that is handed over.
_FIRST = 3


def activated() -> int:
    """How many sockets systemd has handed to this process (sd_listen_fds(3)). The environment stays as it is."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    return int(os.environ.get("LISTEN_FDS", "0"))


def dialects_of(count: int, paths: list[str], listeners: tuple[Listener, ...]) -> list[str]:
    """The dialect of each socket that was handed over, in the order of their descriptors.

    Args:
        count: how many there are.
        paths: what each is bound to.
        listeners: of the configuration, for sockets whose name says nothing.

    Returns:
        By ``FileDescriptorName=`` if that is a dialect, else by the configured listener of that path.

    Raises:
        SettingsError: neither says which dialect a socket speaks.
    """
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    by_path = {listener.path: listener.dialect for listener in listeners}
    found = []
    for index in range(count):
        name = names[index] if index < len(names) else ""
        dialect = name if name in DIALECTS else by_path.get(paths[index])
        if dialect is None:
            known = ", ".join(DIALECTS)
            raise SettingsError(f"{paths[index]}: FileDescriptorName={name or 'unknown'} is none of {known}")
        found.append(dialect)
    return found


def descriptors(count: int) -> range:
    """The descriptors that were handed over."""
    return range(_FIRST, _FIRST + count)


def is_off(unit: str) -> bool:
    """Whether systemd knows the unit, and neither runs it nor would at the next start of this host."""
    return _systemctl("is-enabled", unit).stdout.strip() == "disabled" and not _is_active(unit)


def reopen(unit: str, path: Path) -> bool:
    """Have systemd open a socket again of which the name is lost; what was connected to the service ends with that.

    Args:
        unit: of the socket, used by ``guestapi.service``.
        path: what it shall be opened at.

    Returns:
        Whether it was tried: the unit is active, and that is its path.
    """
    # systemctl(1): "/run/x (Stream)", a line each.
    listens = _systemctl("show", "--value", "--property=Listen", unit).stdout.splitlines()
    if not _is_active(unit) or f"{path} (Stream)" not in listens:
        return False
    log.warning("%s was lost with its directory; %s opens it anew", path, unit)
    # In one transaction: a socket unit cannot be started while its service runs.
    done = _systemctl("restart", unit, "guestapi.service")
    if done.returncode:
        log.error("systemctl restart %s guestapi.service: %s", unit, done.stderr.strip())
    return True


def _is_active(unit: str) -> bool:
    return _systemctl("is-active", unit).stdout.strip() == "active"


def _systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    """Run systemctl; where there is none, it fails."""
    try:
        return subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def watchdog_seconds() -> float | None:
    """How often at least systemd wants to hear ``WATCHDOG=1`` (sd_watchdog_enabled(3)); None if it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


def notify(*fields: str) -> None:
    """Tell systemd, as sd_notify(3) has it: ``READY=1``, ``STATUS=...`` and so on."""
    systemd.daemon.notify("\n".join(fields))
