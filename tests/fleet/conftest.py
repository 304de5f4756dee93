"""Fixtures: a PostgreSQL server for each module, and a database of its own with a fleet of two hosts for each test."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from guestapi.fleet import setup
from tests.cli.command import Guestapi
from tests.harness.postgresql import Postgres, running

_NUMBERS = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server."""
    with running() as one:
        yield one


class Fleet:
    """A database of a server, with the sessions and commands of those who use it."""

    def __init__(self, server: Postgres, directory: Path) -> None:
        self.server = server
        self.database = f"fleet{next(_NUMBERS)}"
        with server.connect() as connection:
            connection.execute(f"CREATE DATABASE {self.database}".encode())
        self.guestapi = Guestapi(directory)
        with self.guestapi.config.open("a") as file:
            file.write(f'[fleet]\nurl = "{server.url(self.database)}"\n')

    def admin(self) -> psycopg.Connection[Any]:
        """A session of the superuser."""
        return self.server.connect(self.database)

    def host(self, name: str, role: str | None = None) -> psycopg.Connection[Any]:
        """A session with the certificate of a host, as its own role or another."""
        url = self.server.url_of_host(name, self.database, role or f"guestapi_host_{name}")
        return psycopg.connect(url, autocommit=True)

    def place(self, host: str, name: str, value: bytes = b"secret") -> UUID:
        """Add an instance with a key and a device."""
        number = uuid4()
        with self.admin() as connection, connection.transaction():
            connection.execute(
                "INSERT INTO guestapi.instances (uuid, project, name, cloud_init_id, host, revision) "
                "VALUES (%s, 'default', %s, gen_random_uuid(), %s, 1)",
                (number, name, host),
            )
            connection.execute("SELECT guestapi.note(%s, ARRAY[%s])", (host, number))
            connection.execute("INSERT INTO guestapi.config VALUES (%s, 'user.password', %s)", (number, value))
            connection.execute("""INSERT INTO guestapi.devices VALUES (%s, 'eth0', '{"type": "nic"}')""", (number,))
        return number


@pytest.fixture
def empty(server: Postgres, tmp_path: Path) -> Fleet:
    """An empty database."""
    return Fleet(server, tmp_path)


@pytest.fixture
def fleet(empty: Fleet) -> Fleet:
    """A fleet with hosts h1 and h2, whose instances are web1 and web2."""
    return _filled(empty)


@pytest.fixture(scope="module")
def shared(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """As `fleet`, for all tests of the module that change nothing in it."""
    return _filled(Fleet(server, tmp_path_factory.mktemp("shared")))


def _filled(empty: Fleet) -> Fleet:
    with empty.admin() as connection:
        setup.init(connection)
        for name in ("h1", "h2"):
            setup.add_host(connection, name)
    empty.place("h1", "web1")
    empty.place("h2", "web2")
    return empty
