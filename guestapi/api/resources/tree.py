"""``/1.0/guestapi``: what the API has beyond that of Incus and LXD. The tree is all that a guest may read at once.

Each response says at which entry of the change log it was read, so that a client that follows the events from there on
misses nothing and hears nothing twice.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, cast
from weakref import ref

import falcon

from guestapi.api.conditional import etag
from guestapi.api.errors import NotAuthorized, NotFound, UnknownCaller
from guestapi.api.gate import Gate
from guestapi.api.resources.config import ValueStore, as_read, give_once, is_given_once, readable_keys
from guestapi.api.resources.devices import visible_devices
from guestapi.api.resources.metadata import meta_data
from guestapi.api.waiting import Condition, LongPolls, condition_of, is_known
from guestapi.dialects import Dialect
from guestapi.encoding import JSON, json_line, to_json
from guestapi.key_policy import visible
from guestapi.model import Instance
from guestapi.wsgi import CALLER, INSTANCE, Environ

#: What ``GET /1.0/guestapi`` lists on every host.
FEATURES = ("tree", "notices")
#: Of how many instances with large values the ETag of the tree is remembered.
KNOWN_TAGS = 1024

T = TypeVar("T")


class TreeStore(ValueStore, Protocol):
    """Where an instance is read together with its place in the change log. `api.app.Store` implements it."""

    def snapshot_of(self, instance_id: int) -> tuple[Instance | None, int]:
        """As `store.reading.Reader.snapshot_of`."""
        ...

    def read_value_at(self, instance: Instance, key: str, build: Callable[[str], T]) -> tuple[T | None, int]:
        """As `store.reading.ValueReader.value_at`, and what `build` makes of it."""
        ...

    def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
        """As `store.reading.ValueReader.whole`, and what `build` makes of it."""
        ...


class KnownTags:
    """The ETags of trees with large values, as long as the instances are in memory unchanged."""

    def __init__(self) -> None:
        self._tags: OrderedDict[int, tuple[ref[Instance], str]] = OrderedDict()

    def get(self, instance: Instance) -> str | None:
        """The ETag of an instance's tree; None if it is not known.

        Args:
            instance: the very object for which it was put.
        """
        found = self._tags.get(instance.id)
        return found[1] if found is not None and found[0]() is instance else None

    def put(self, instance: Instance, tag: str) -> None:
        """Note the ETag of an instance's tree."""
        self._tags.pop(instance.id, None)
        self._tags[instance.id] = (ref(instance), tag)
        if len(self._tags) > KNOWN_TAGS:
            self._tags.popitem(last=False)


class Features:
    """``GET /1.0/guestapi``: what there is below it."""

    cacheable = True

    def __init__(self, features: Sequence[str]) -> None:
        """Serve the list; `features` are those that every instance of the host has."""
        self._features = features

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object. What has to be allowed to an instance stands behind the others."""
        instance: Instance = req.context.instance
        resp.content_type = JSON
        resp.data = json_line({"features": [*self._features, *sorted(instance.allowed)]})


class Tree:
    """``GET /1.0/guestapi/tree``: all that the guest may read, as one JSON object."""

    def __init__(self, store: TreeStore, gate: Gate, polls: LongPolls, dialect: Dialect, host: str) -> None:
        """Serve trees.

        Args:
            store: where instances are read.
            gate: the gate that let the request through.
            polls: where requests wait.
            dialect: says what is readable.
            host: name of this host, the location of every instance that has no other.
        """
        self._store = store
        self._gate = gate
        self._polls = polls
        self._dialect = dialect
        self._host = host
        self._tags = KnownTags()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object, its keys sorted.

        Raises:
            BadRequest: If-None-Match or ``wait`` is malformed.
            TooManyWaits: the instance has as many waiting requests as it may have.
        """
        condition = condition_of(req.env)
        instance, event_id = _observe(self._store, self._gate, req)
        if any(map(self._dialect.is_readable, instance.large)):
            stored = cast("Environ", req.env)[INSTANCE]
            assert stored is not None, "admitted by the gate"
            tag = self._tags.get(stored)
            if tag is not None:
                # That nothing has changed is told without the large values.
                if self._polls.must_wait(req, condition, None, tag, event_id):
                    return
                if is_known(req, condition, tag):
                    _answer(req, resp, condition, b"", tag, event_id)
                    return
            whole = self._store.read_whole(instance, lambda found: self._build(visible(found)))
            if whole is None:
                raise UnknownCaller
            self._gate.readmit(req, whole[0])
            found, event_id, (content, tag) = whole
            if found.revision == stored.revision:
                self._tags.put(stored, tag)
        else:
            content, tag = self._build(instance)
        if not self._polls.must_wait(req, condition, None, tag, event_id):
            resp.content_type = JSON
            _answer(req, resp, condition, content, tag, event_id)

    def _build(self, instance: Instance) -> tuple[bytes, str]:
        """Return the tree of an instance, and its ETag. Large values may be encoded in a thread: piece by piece."""
        config, dialect = instance.config, self._dialect
        pairs = [
            to_json(key) + b":" + to_json(as_read(instance, dialect, key, config.get(key)))
            for key in readable_keys(instance, dialect)
        ]
        rest = {
            "devices": visible_devices(instance, dialect.listed_nic_types),
            "instance_type": instance.type,
            "location": self._host if instance.location is None else instance.location,
            "meta_data": meta_data(instance, dialect, config.get("user.meta-data")),
            "name": instance.name,
            "project": instance.project,
            "state": "Ready" if instance.ready else "Started",
            "uuid": instance.uuid,
        }
        head = b'{"api_version":"1.0","config":{'
        content = b"".join((head, b",".join(pairs), b"},", to_json(rest)[1:], b"\n"))
        return content, etag(content)


class TreeKey:
    """``GET /1.0/guestapi/tree/config/{key}``: the value, byte for byte as ``/1.0/config/{key}`` has it."""

    def __init__(self, store: TreeStore, gate: Gate, polls: LongPolls, dialect: Dialect) -> None:
        """Serve values.

        Args:
            store: where instances are read.
            gate: the gate that let the request through.
            polls: where requests wait.
            dialect: says which keys are readable.
        """
        self._store = store
        self._gate = gate
        self._polls = polls
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response, key: str) -> None:
        """Answer with the value.

        Raises:
            NotAuthorized: the key has no readable prefix, be it set or not.
            NotFound: it is not set.
            BadRequest: If-None-Match or ``wait`` is malformed.
            TooManyWaits: the instance has as many waiting requests as it may have.
        """
        condition = condition_of(req.env)
        if not self._dialect.is_readable(key):
            raise NotAuthorized
        instance, event_id = _observe(self._store, self._gate, req, key)
        environ = cast("Environ", req.env)
        if is_given_once(environ, key):
            # No two of its ETags are the same, so none of them tells anything of the value.
            tag = f'"{secrets.token_hex(16)}"'
            if self._polls.must_wait(req, condition, key, tag, event_id):
                return
            resp.set_headers({"ETag": tag, "Guestapi-Event-Id": str(event_id)})
            if is_known(req, condition, tag):
                resp.status = falcon.HTTP_304
                return
            try:
                give_once(self._store, environ, resp, key)
            except NotFound:
                # Somebody was quicker. Whoever waits, goes on waiting.
                if not self._polls.must_wait(req, condition, key, None, event_id):
                    raise
            return
        found: tuple[bytes, str] | None = None
        if key in instance.large:
            found, event_id = self._store.read_value_at(instance, key, _tagged)
        elif (value := as_read(instance, self._dialect, key, instance.config.get(key))) is not None:
            found = _tagged(value)
        if self._polls.must_wait(req, condition, key, found and found[1], event_id):
            return
        if found is None:
            raise NotFound
        _answer(req, resp, condition, *found, event_id)


def _tagged(value: str) -> tuple[bytes, str]:
    content = value.encode()
    return content, etag(content)


def _observe(store: TreeStore, gate: Gate, req: falcon.Request, key: str | None = None) -> tuple[Instance, int]:
    """Read the request's instance, and the id of the change log's last entry, at one moment."""
    instance_id = cast("Environ", req.env)[CALLER].instance_id
    assert instance_id is not None, "admitted by the gate"
    instance, event_id = store.snapshot_of(instance_id)
    return gate.readmit(req, instance, key), event_id


def _answer(
    req: falcon.Request, resp: falcon.Response, condition: Condition, content: bytes, tag: str, event_id: int
) -> None:
    resp.set_headers({"ETag": tag, "Guestapi-Event-Id": str(event_id)})
    if is_known(req, condition, tag):
        resp.status = falcon.HTTP_304
    else:
        resp.data = content
