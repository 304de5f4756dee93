"""``/1.0/config``: the configuration keys that a guest may read."""

from __future__ import annotations

from typing import Protocol

import falcon

from guestapi.api.cloud_config import is_ssh_key, merge, synthesized
from guestapi.api.errors import NotAuthorized, NotFound
from guestapi.dialects import Dialect
from guestapi.encoding import JSON, json_line
from guestapi.model import Instance


class ValueStore(Protocol):
    """Where large values are. `api.app.Store` implements it."""

    def read_value(self, instance: Instance, key: str) -> str | None:
        """As `store.reading.ValueReader.value`."""
        ...


def get_value(store: ValueStore, instance: Instance, key: str) -> str | None:
    """Return the value of a configuration key of an instance, be it large or not; None if it is not set.

    Raises:
        StoreError: a large value cannot be read.
    """
    return store.read_value(instance, key) if key in instance.large else instance.config.get(key)


class ConfigKeys:
    """``GET /1.0/config``: the URLs of the readable keys that are set, sorted, not encoded."""

    cacheable = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list."""
        resp.content_type = JSON
        instance: Instance = req.context.instance
        keys = sorted(instance.config.keys() | instance.large) if instance.large else instance.config
        if self._dialect.merges_ssh_keys:
            more = synthesized(instance.config, instance.large)
            keys = sorted({key for key in keys if not is_ssh_key(key)}.union(more))
        resp.data = json_line([f"/1.0/config/{key}" for key in keys if self._dialect.is_readable(key)])


class ConfigKey:
    """``GET /1.0/config/{key}``: the value, byte for byte."""

    cacheable = True

    def __init__(self, dialect: Dialect, store: ValueStore) -> None:
        """Serve values.

        Args:
            dialect: says which keys are readable.
            store: where large values are read.
        """
        self._dialect = dialect
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response, key: str) -> None:
        """Answer with the value.

        Raises:
            NotAuthorized: the key has no readable prefix, be it set or not.
            NotFound: it is not set.
        """
        if not self._dialect.is_readable(key):
            raise NotAuthorized
        instance: Instance = req.context.instance
        value = get_value(self._store, instance, key)
        if self._dialect.merges_ssh_keys:
            value = merge(instance.config, instance.large, key, value)
        if value is None:
            raise NotFound
        resp.data = value.encode()
