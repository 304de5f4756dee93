"""What systemd tells the service, and what the service tells systemd. Outside systemd, all of it does nothing."""

from __future__ import annotations

import os

import systemd.daemon

from guestapi.dialects import DIALECTS
from guestapi.settings import Listener, SettingsError

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


def watchdog_seconds() -> float | None:
    """How often at least systemd wants to hear ``WATCHDOG=1`` (sd_watchdog_enabled(3)); None if it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    if not microseconds or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


def notify(*fields: str) -> None:
    """Tell systemd, as sd_notify(3) has it: ``READY=1``, ``STATUS=...`` and so on."""
    systemd.daemon.notify("\n".join(fields))
