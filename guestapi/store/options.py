"""What the store has to be told: the part of the settings that it uses, however they were read.

For type checking alone, so at run time nothing imports this module.
"""

from __future__ import annotations

from typing import Protocol


class StoreOptions(Protocol):
    """As the table ``[store]`` of guestapi.toml."""

    @property
    def url(self) -> str:
        """Of the database."""
        ...

    @property
    def lock_seconds(self) -> float:
        """How long a writer waits for another writer's transaction."""
        ...

    @property
    def configuration_bytes(self) -> int:
        """The most bytes of an instance's configuration and devices together."""
        ...


class LogOptions(Protocol):
    """As the table ``[events]`` of guestapi.toml: how far back the change log reaches."""

    @property
    def keep_entries(self) -> int:
        """The most entries."""
        ...

    @property
    def keep_seconds(self) -> int:
        """The greatest age of an entry."""
        ...


class Options(Protocol):
    """Both tables."""

    @property
    def store(self) -> StoreOptions:
        """The table ``[store]``."""
        ...

    @property
    def events(self) -> LogOptions:
        """The table ``[events]``."""
        ...
