"""The connection to a fleet's database. This module alone imports psycopg."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from guestapi.errors import SourceError

if TYPE_CHECKING:
    import psycopg

#: Seconds to wait for a server to accept a connection, before the next one of the URL is tried.
_CONNECT_SECONDS = 5
_PASSWORD = re.compile(r"(?<=://)([^/@\s]*@)")


class FleetError(SourceError):
    """The fleet's database cannot be used."""


@contextmanager
def session(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A session at the server that takes changes, of those that the URL names; in autocommit mode.

    Args:
        url: a connection URI of libpq. What it does not say, such as the user and the certificate, is as in psql.

    Raises:
        FleetError: psycopg is not installed, no server takes changes, or a statement fails.
    """
    try:
        import psycopg
    except ImportError as error:
        raise FleetError(
            f"a fleet needs psycopg 3 and libpq: {str(error).splitlines()[0]}",
            "'apt install libpq5', and docs/fleet.md says how to install guestapi[fleet]",
        ) from None
    try:
        connection = psycopg.connect(
            url,
            autocommit=True,
            connect_timeout=_CONNECT_SECONDS,
            target_session_attrs="read-write",
            application_name="guestapi",
            # Nothing of a schema that somebody else can write to is found by accident.
            options="-c search_path=pg_catalog -c client_encoding=UTF8",
        )
    except psycopg.Error as error:
        raise FleetError(f"the fleet at {_printable(url)} cannot be reached: {_first_line(error)}") from None
    with connection:
        try:
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            raise FleetError(
                f"{connection.info.user!r} may not do that in the fleet's database: {_first_line(error)}",
                "'guestapi fleet init', 'upgrade' and 'host' need a superuser of PostgreSQL",
            ) from None
        except psycopg.errors.UndefinedTable:
            raise FleetError("there is no fleet in this database yet", "'guestapi fleet init' makes one") from None
        except psycopg.Error as error:
            raise FleetError(f"the fleet's database refuses: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:1]) or type(error).__name__


def _printable(url: str) -> str:
    """The URL without user and password."""
    return _PASSWORD.sub("", url.partition("?")[0])
