"""A host of a fleet, with a store of its own and followers in this process."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from guestapi.fleet.follower import FleetFollower
from guestapi.fleet.joining import connect_host
from guestapi.model import Init
from guestapi.settings import FleetSettings, Settings, StoreSettings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import placements
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from tests.fleet.conftest import Fleet


def settings_of(fleet: Fleet, host: str = "h1") -> Settings:
    """The settings of a host, whose store stands beside the test's own."""
    url = f"sqlite:///{fleet.guestapi.directory}/{host}.db"
    return Settings(store=StoreSettings(url=url), fleet=FleetSettings(host=host))


class FollowingHost:
    """A host of the fleet, with a store of its own."""

    def __init__(self, fleet: Fleet, name: str = "h1") -> None:
        self.fleet, self.name = fleet, name
        self.settings = settings_of(fleet, name)
        self.url = fleet.server.url(fleet.database)
        self.writer = Writer(self.settings, create=True)
        self.told: list[str] = []

    def follower(self) -> FleetFollower:
        """A follower in this process, whose rounds the test counts."""
        return FleetFollower(self.settings, partial(connect_host, self.url, self.settings.fleet), self.told.append)

    def follow(self) -> None:
        """Connect, and look once."""
        self.follower().follow(until=lambda: True)

    @property
    def names(self) -> set[str]:
        """The names of the instances in its store."""
        with view(self.settings.store.url) as store:
            return {one.name for one in placements.list_placed(store).values()}

    @property
    def cursor(self) -> placements.Cursor:
        """Up to where its store is as the database."""
        with view(self.settings.store.url) as store:
            return placements.read_cursor(store)

    def shown(self, name: str) -> Any:
        """An instance of its store."""
        with view(self.settings.store.url) as store:
            return get_instance(store, "default", name)


def this_process() -> Init:
    """An init that runs."""
    return Init(os.getpid(), 1, "boot", 7)


def observe(host: FollowingHost, name: str, key: str, *, running: bool = True) -> None:
    """What a follower of LXC sees."""
    init = this_process() if running else None
    observed = Observed(key, "default", name, init=init, devices={"root": {"type": "disk", "path": "/"}})
    with host.writer.change() as change:
        reconcile(change, "lxc", [observed], is_alive=lambda _init: running)
