"""``/1.0/config``: the configuration keys that a guest may read."""

from __future__ import annotations

from typing import Protocol, cast

import falcon

from guestapi.api.cloud_config import is_ssh_key, merge, synthesized
from guestapi.api.errors import NotAuthorized, NotFound
from guestapi.dialects import Dialect
from guestapi.encoding import JSON, json_line
from guestapi.key_policy import rule_of
from guestapi.model import Instance
from guestapi.wsgi import CACHEABLE, CALLER, INSTANCE, Environ


class ValueStore(Protocol):
    """Where large values are. `api.app.Store` implements it."""

    def read_value(self, instance: Instance, key: str) -> str | None:
        """As `store.reading.ValueReader.value`."""
        ...

    def spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        """As `store.policies.spend`, committed."""
        ...


def get_value(store: ValueStore, instance: Instance, key: str) -> str | None:
    """Return the value of a configuration key of an instance, be it large or not; None if it is not set.

    Raises:
        StoreError: a large value cannot be read.
    """
    return store.read_value(instance, key) if key in instance.large else instance.config.get(key)


def readable_keys(instance: Instance, dialect: Dialect) -> list[str]:
    """Return the keys of an instance that are set and that a guest may read, sorted."""
    keys = sorted(instance.config.keys() | instance.large) if instance.large else list(instance.config)
    if dialect.merges_ssh_keys:
        more = synthesized(instance.config, instance.large)
        keys = sorted({key for key in keys if not is_ssh_key(key)}.union(more))
    return [key for key in keys if dialect.is_readable(key)]


def as_read(instance: Instance, dialect: Dialect, key: str, value: str | None) -> str | None:
    """Return what a guest reads as a configuration key.

    Args:
        instance: the instance.
        dialect: says whether SSH keys are merged.
        key: the key.
        value: as it is set; None: it is not.

    Returns:
        The value; None if there is none.
    """
    return merge(instance.config, instance.large, key, value) if dialect.merges_ssh_keys else value


def is_given_once(environ: Environ, key: str) -> bool:
    """Tell whether a key of the request's instance is set and to be given once, and so is in no list."""
    instance = environ[INSTANCE]
    if instance is None or not instance.policies or not (key in instance.config or key in instance.large):
        return False
    rule = rule_of(instance.policies, key)
    return rule.once and not rule.hidden


def give_once(store: ValueStore, environ: Environ, resp: falcon.Response, key: str) -> None:
    """Answer with the value of such a key, if nobody else was quicker. HEAD does not spend it.

    Raises:
        NotFound: somebody was quicker.
        StoreError: it cannot be recorded that it was given, so it is not given.
    """
    instance, caller = environ[INSTANCE], environ[CALLER].credentials
    assert instance is not None, "admitted by the gate"
    environ[CACHEABLE] = False
    if environ["REQUEST_METHOD"] == "HEAD":
        value = get_value(store, instance, key)
    else:
        value = store.spend(instance, key, caller.pid, caller.uid)
    if value is None:
        raise NotFound
    resp.set_header("Cache-Control", "no-store")
    resp.data = value.encode()


class ConfigKeys:
    """``GET /1.0/config``: the URLs of the readable keys that are set, sorted, not encoded."""

    cacheable = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list."""
        resp.content_type = JSON
        resp.data = json_line([f"/1.0/config/{key}" for key in readable_keys(req.context.instance, self._dialect)])


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
        environ = cast("Environ", req.env)
        if is_given_once(environ, key):
            give_once(self._store, environ, resp, key)
            return
        instance: Instance = req.context.instance
        value = as_read(instance, self._dialect, key, get_value(self._store, instance, key))
        if value is None:
            raise NotFound
        resp.data = value.encode()
