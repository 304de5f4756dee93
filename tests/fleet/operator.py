"""`guestapi --fleet` for tests."""

from __future__ import annotations

from typing import Any

from tests.cli.command import Guestapi
from tests.fleet.conftest import Fleet
from tests.harness.service import COMMAND


class FleetOperator:
    """`guestapi --fleet`, by a role in guestapi_operator."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        with fleet.admin() as connection:
            if connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'anna'").fetchone() is None:
                connection.execute("CREATE ROLE anna LOGIN IN ROLE guestapi_operator")
        config = fleet.guestapi.config
        config.write_text(
            config.read_text().replace(fleet.server.url(fleet.database), fleet.server.url(fleet.database, "anna"))
        )
        self.local: Guestapi = fleet.guestapi

    def good(self, *words: str, stdin: str | bytes = "") -> str:
        """A command that must succeed."""
        return self.local.good("--fleet", *words, stdin=stdin)

    def fails(self, *words: str, stdin: str | bytes = "") -> str:
        """A command that must fail."""
        return self.local.fails("--fleet", *words, stdin=stdin)

    def program(self, *words: str) -> list[str]:
        """A command in a process of its own."""
        return [str(COMMAND), "--config", str(self.local.config), "--fleet", *words]

    def info(self, name: str) -> Any:
        """All that is known of an instance."""
        return self.local("--fleet", "instance", "info", name, "--format", "json").json

    def revisions(self) -> dict[str, int]:
        """The revision of each host."""
        with self.fleet.admin() as connection:
            return dict(connection.execute("SELECT name, revision FROM guestapi.hosts").fetchall())
