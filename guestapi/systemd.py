"""Socket activation, watchdog and notifications, and a few commands of systemctl. Without systemd they do nothing."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from pathlib import Path

from guestapi.dialects import DIALECTS, HANDOVER
from guestapi.settings import ListenSocket, SettingsError

log = logging.getLogger(__name__)

#: Seconds that systemctl may take: more than a service has to stop (systemd-system.conf(5), DefaultTimeoutStopSec=).
_SYSTEMCTL_SECONDS = 120.0
#: Seconds that systemd may take to accept a notification: one that a start or a reload waits for, and any other.
_AWAITED_SECONDS, _OTHER_SECONDS = 30.0, 1.0
#: The first descriptor that systemd passes (sd_listen_fds(3)).
_FIRST_DESCRIPTOR = 3


def activated() -> int:
    """Return how many sockets systemd passed to this process (sd_listen_fds(3)). The environment is not changed."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    return int(os.environ.get("LISTEN_FDS", "0"))


def dialects_of(count: int, paths: list[str], listeners: tuple[ListenSocket, ...]) -> list[str]:
    """Find the dialect of each socket that systemd passed.

    Args:
        count: number of sockets.
        paths: path of each socket.
        listeners: sockets of the configuration.

    Returns:
        Names of dialects in the order of descriptors: ``FileDescriptorName=`` if that is a dialect or `HANDOVER`,
        otherwise that of the configured socket with the same path.

    Raises:
        SettingsError: neither names the dialect of a socket.
    """
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    by_path = {listener.path: listener.dialect for listener in listeners}
    found = []
    for index in range(count):
        name = names[index] if index < len(names) else ""
        dialect = name if name in DIALECTS or name == HANDOVER else by_path.get(paths[index])
        if dialect is None:
            known = ", ".join(DIALECTS)
            raise SettingsError(f"{paths[index]}: FileDescriptorName={name or 'unknown'} is none of {known}")
        found.append(dialect)
    return found


def descriptors(count: int) -> range:
    """Return the descriptors that systemd passed."""
    return range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count)


def is_off(unit: str) -> bool:
    """Tell whether systemd knows the unit, does not run it, and would not run it after the next boot."""
    return _systemctl("is-enabled", unit).stdout.strip() == "disabled" and not is_active(unit)


def reopen(unit: str, path: Path) -> bool:
    """Restart a socket unit whose socket file was removed. This ends all connections of the service.

    Args:
        unit: of the socket, used by ``guestapi.service``.
        path: where it must listen.

    Returns:
        Whether that was tried, because the unit is active and has this path.
    """
    # systemctl(1): "/run/x (Stream)", a line each.
    listens = _systemctl("show", "--value", "--property=Listen", unit).stdout.splitlines()
    if not is_active(unit) or f"{path} (Stream)" not in listens:
        return False
    log.warning("%s was removed with its directory; restarting %s", path, unit)
    # In one transaction, because a socket unit cannot be started while its service runs.
    done = _systemctl("restart", unit, "guestapi.service")
    if done.returncode:
        log.error("systemctl restart %s guestapi.service: %s", unit, done.stderr.strip())
    return True


def is_active(pattern: str) -> bool:
    """Tell whether a unit, or one of those that match a pattern, is active."""
    return "active" in _systemctl("is-active", pattern).stdout.split()


def _systemctl(*words: str) -> subprocess.CompletedProcess[str]:
    """Run systemctl. If there is none, it fails."""
    try:
        return subprocess.run(
            ["systemctl", *words], capture_output=True, text=True, check=False, timeout=_SYSTEMCTL_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def watchdog_seconds() -> float | None:
    """Return the interval in seconds within which systemd expects ``WATCHDOG=1`` (sd_watchdog_enabled(3)), or None."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


def notify(*fields: str) -> None:
    """Send assignments to systemd, like ``READY=1`` or ``STATUS=...`` (sd_notify(3)).

    That of libsystemd waits for as long as systemd is busy. This one gives up, because instances matter more: soon, but
    late with ``READY=1`` or ``RELOADING=1``, without which a start or a reload fails. With ``WATCHDOG=1`` they are
    repeated.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        awaited = fields[0] in ("READY=1", "RELOADING=1") and "WATCHDOG=1" not in fields
        sock.settimeout(_AWAITED_SECONDS if awaited else _OTHER_SECONDS)
        try:
            sock.sendto("\n".join(fields).encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError as error:
            log.warning("systemd was not told %s: %s", fields[0], error)
