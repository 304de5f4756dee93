"""systemd-nspawn@.service: the unit's main process is systemd-nspawn, the container's init is below it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from guestapi.callers.namespaces import NotAnInitError, examine
from guestapi.sources.register import Report, ReportError, pid_of

#: Seconds to wait for the init to be there: the unit is "started" when nspawn says so, which is after it is.
_PATIENCE = 1.0


def report(action: str, name: str, environ: Mapping[str, str]) -> Report:
    """What the unit tells.

    Args:
        action: ``start`` or ``stop``.
        name: the machine's.
        environ: with systemd's ``MAINPID`` (systemd.exec(5)).

    Raises:
        ReportError: the init cannot be found.
    """
    if action == "stop":
        return Report(name, None)
    main = pid_of(environ.get("MAINPID", ""))
    if main is None:
        raise ReportError(
            "MAINPID is not a PID; 'guestapi hook nspawn' is for ExecStartPost= of systemd-nspawn@.service"
        )
    until = time.monotonic() + _PATIENCE
    while True:
        for pid in _descendants(main):
            try:
                examine(pid)
            except NotAnInitError:
                continue
            return Report(name, pid)
        if time.monotonic() > until:
            raise ReportError(f"no container's init is to be found below process {main}")
        time.sleep(0.01)


def _descendants(pid: int) -> list[int]:
    """Children of a process, then theirs; nearest first."""
    found = [pid]
    for one in found:
        try:
            children = Path(f"/proc/{one}/task/{one}/children").read_text().split()
        except OSError:
            continue
        found += map(int, children)
        if len(found) > 1000:
            break
    return found[1:]
