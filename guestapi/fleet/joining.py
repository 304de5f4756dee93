"""How a host comes to the fleet's database: by its own role, with its certificate."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from guestapi.fleet.engine import Session, open_session
from guestapi.fleet.schema import ROLE_PREFIX
from guestapi.settings import FleetSettings

#: Seconds after which the server counts as stopped. Longer than a question to it takes, shorter than an operator waits.
ANSWER_SECONDS = 3.0


def host_name(settings: FleetSettings) -> str:
    """Return the name of this host in the fleet."""
    return settings.host or socket.gethostname().lower()


def connect_host(url: str, settings: FleetSettings, deadline_factor: float = 1.0) -> Session:
    """Open a session by the role of this host.

    Args:
        url: of the database.
        settings: the host's name and certificate.
        deadline_factor: of the session.

    Raises:
        FleetError: it cannot be opened.
    """
    options = {"user": ROLE_PREFIX + host_name(settings)}
    if settings.ca is not None:
        options |= {"sslrootcert": settings.ca, "sslmode": "verify-full"}
    if settings.certificate is not None:
        options["sslcert"] = settings.certificate
    if settings.key is not None:
        options["sslkey"] = _credential(settings.key)
    return open_session(url, options, ANSWER_SECONDS, deadline_factor)


def _credential(path: str) -> str:
    """The key as systemd has handed it over (LoadCredential= in systemd.exec(5)), else the file itself."""
    handed = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), Path(path).name)
    return str(handed) if handed.exists() else path
