"""The WSGI application: one Falcon app for each dialect, assembled from `resources` by what the dialect has."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import quote

import falcon
from falcon.routing import CompiledRouter

from guestapi.api import errors
from guestapi.api.gate import Gate
from guestapi.api.resources.attributes import AttributeList, AttributeResource
from guestapi.api.resources.config import ConfigKey, ConfigKeys
from guestapi.api.resources.devices import DeviceDefinition, Devices, DeviceUrls
from guestapi.api.resources.events import EventFeed
from guestapi.api.resources.identity import FEATURE as IDENTITY
from guestapi.api.resources.identity import IdentityTokens, SignedIdentity
from guestapi.api.resources.images import ImageExport
from guestapi.api.resources.metadata import MetaData
from guestapi.api.resources.notices import Acknowledgement, Notices
from guestapi.api.resources.root import Root
from guestapi.api.resources.state import StateResource, Version
from guestapi.api.resources.tree import FEATURES, Features, Tree, TreeKey
from guestapi.api.resources.ubuntu_pro import GuestTokens, NoTokens, UbuntuPro, UbuntuProToken
from guestapi.api.routing import Router
from guestapi.api.short_path import ShortPath
from guestapi.api.waiting import LongPolls
from guestapi.dialects import DIALECTS, Dialect, Redirect
from guestapi.http import target
from guestapi.model import Image, Init, Instance, KeyPolicy
from guestapi.notifications.broker import Broker
from guestapi.rate_limit import RateLimit
from guestapi.settings import LimitSettings
from guestapi.store.attributes import Outcome
from guestapi.store.errors import StoreError
from guestapi.store.notices import Notice
from guestapi.wsgi import DIALECT, QUERY, RAW_PATH, RAW_URI, Environ, StartResponse

T = TypeVar("T")


#: Of a response whose resource says nothing else.
_CONTENT_TYPE = "application/octet-stream"


class Store(Protocol):
    """What the API needs of the store: to read, and to record what a guest may report."""

    def instance(self, instance_id: int) -> Instance | None:
        """As `store.reading.Reader.instance`."""
        ...

    def seen(self, instance_id: int) -> Instance | None:
        """As `store.reading.Reader.seen`."""
        ...

    def policies_of(self, instance_id: int) -> tuple[KeyPolicy, ...]:
        """As `store.reading.Reader.policies_of`."""
        ...

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `store.writing.Writer.set_ready`. It may wait for another writer; other requests continue meanwhile."""
        ...

    def snapshot_of(self, instance_id: int) -> tuple[Instance | None, int]:
        """As `store.reading.Reader.snapshot_of`."""
        ...

    def read_value(self, instance: Instance, key: str) -> str | None:
        """As `store.reading.ValueReader.value`, for a key in `Instance.large`. Other requests continue meanwhile."""
        ...

    def read_value_at(self, instance: Instance, key: str, build: Callable[[str], T]) -> tuple[T | None, int]:
        """As `store.reading.ValueReader.value_at`, and what `build` makes of it. Other requests continue meanwhile."""
        ...

    def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
        """As `store.reading.ValueReader.whole`, and what `build` makes of it. Other requests continue meanwhile."""
        ...

    def spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        """As `store.policies.spend`, committed. Other requests continue meanwhile."""
        ...

    def notices(self, instance_id: int) -> list[Notice]:
        """As `store.reading.Reader.notices`."""
        ...

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """As `store.writing.Writer.acknowledge`. Other requests continue meanwhile."""
        ...

    def attributes(self, instance: Instance) -> list[str]:
        """As `store.reading.Reader.attributes`."""
        ...

    def attribute(self, instance: Instance, path: str) -> bytes | None:
        """As `store.reading.Reader.attribute`."""
        ...

    def write_attribute(
        self, instance: Instance, path: str, value: bytes | None, holds: Callable[[bytes | None], bool] | None
    ) -> Outcome:
        """As `store.attributes.write`, committed. Other requests continue meanwhile."""
        ...

    def image(self, fingerprint: str) -> Image | None:
        """As `store.reading.Reader.image`."""
        ...

    def open_image(self, image: Image) -> list[int]:
        """As `store.images.open_files`. It may wait for the disk; other requests continue meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class GuestApplication:
    """The WSGI callable (`guestapi.wsgi.Application`).

    Attributes:
        apps: the Falcon app of each dialect, by the dialect's name.
        short_paths: what is tried before it, for GET.
    """

    apps: dict[str, falcon.App[Any, Any]]
    short_paths: dict[str, ShortPath]

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request, as `guestapi.wsgi` describes."""
        path = environ[RAW_PATH]
        if not target.is_clean(path):
            redirect = DIALECTS[environ[DIALECT]].redirect
            if redirect.covers_all or environ["REQUEST_METHOD"] != "CONNECT":
                return _redirect(environ, start_response, redirect, target.clean(path))
        if environ["REQUEST_METHOD"] == "GET":
            # PERF: Falcon takes half of the time that such a request takes.
            answer = self.short_paths[environ[DIALECT]].answer(environ, start_response)
            if answer is not None:
                return answer
        app, query = self.apps[environ[DIALECT]], environ["QUERY_STRING"]
        if query:
            environ[QUERY], environ["QUERY_STRING"] = query, ""
        try:
            return app(cast("dict[str, Any]", environ), start_response)
        finally:
            if query:
                # For gunicorn's access log.
                environ["QUERY_STRING"] = query


def create(
    store: Store,
    broker: Broker,
    limits: LimitSettings | None = None,
    tokens: GuestTokens | None = None,
    identity: IdentityTokens | None = None,
) -> GuestApplication:
    """Make the application.

    Args:
        store: what it reads and writes.
        broker: where it subscribes clients to events.
        limits: how often an instance may write; None for the defaults.
        tokens: who gives guests tokens of Ubuntu Pro; None for nobody.
        identity: signed tokens that say which instance their bearer is; None: there are none.
    """
    limits = limits or LimitSettings()
    state_changes = RateLimit(limits.writes_per_second, limits.writes_burst)
    made = {
        name: _create(store, broker, state_changes, dialect, tokens or NoTokens(), identity)
        for name, dialect in DIALECTS.items()
    }
    return GuestApplication(
        {name: app for name, (app, _short_path) in made.items()},
        {name: short_path for name, (_app, short_path) in made.items()},
    )


def _create(
    store: Store,
    broker: Broker,
    state_changes: RateLimit,
    dialect: Dialect,
    tokens: GuestTokens,
    identity: IdentityTokens | None,
) -> tuple[falcon.App[Any, Any], ShortPath]:
    gate = Gate(store.instance, dialect, store.seen)
    router = Router(dialect)
    # Falcon documents custom routers, but its annotations know only its own.
    app: falcon.App[Any, Any] = falcon.App(router=cast("CompiledRouter", router), middleware=[gate])
    app.resp_options.default_media_type = _CONTENT_TYPE
    app.set_error_serializer(errors.render)
    app.add_error_handler(Exception, errors.handle_unexpected)
    app.add_error_handler(falcon.HTTPRouteNotFound, _handle_unknown_path)
    app.add_error_handler(StoreError, _handle_store_error)
    app.add_error_handler(OSError, _handle_body_error)
    app.add_route("/", Root())
    app.add_route("/1.0", _state(store, state_changes, dialect))
    app.add_route("/1.0/config", ConfigKeys(dialect))
    app.add_route("/1.0/config/{key}", ConfigKey(dialect, store))
    app.add_route("/1.0/events", EventFeed(broker, gate, store, dialect))
    app.add_route("/1.0/images/{fingerprint}/export", ImageExport(store, dialect))
    app.add_route("/1.0/meta-data", MetaData(dialect, store))
    if dialect.ubuntu_pro:
        app.add_route("/1.0/ubuntu-pro", UbuntuPro(tokens))
        app.add_route("/1.0/ubuntu-pro/token", UbuntuProToken(tokens, state_changes))
    polls = LongPolls(broker, gate, dialect)
    host = dialect.lone_location or platform.node()
    app.add_route("/1.0/guestapi", Features(FEATURES if identity is None else (*FEATURES, IDENTITY)))
    app.add_route("/1.0/guestapi/tree", Tree(store, gate, polls, dialect, host))
    app.add_route("/1.0/guestapi/tree/config/{key}", TreeKey(store, gate, polls, dialect))
    app.add_route("/1.0/guestapi/notices", Notices(store))
    app.add_route("/1.0/guestapi/notices/{notice}/ack", Acknowledgement(store, state_changes))
    if identity is not None:
        app.add_route("/1.0/guestapi/identity", SignedIdentity(identity, gate, host))
    app.add_route("/1.0/guestapi/attributes", AttributeList(store))
    app.add_route("/1.0/guestapi/attributes/{namespace}/{name}", AttributeResource(store, state_changes))
    if dialect.listed_nic_types is None:
        app.add_route("/1.0/devices", Devices())
    else:
        app.add_route("/1.0/devices", DeviceUrls(dialect.listed_nic_types))
        app.add_route("/1.0/device/{name}", DeviceDefinition(dialect.listed_nic_types))
    return app, ShortPath(router, gate, _CONTENT_TYPE, dialect)


def _state(store: Store, state_changes: RateLimit, dialect: Dialect) -> StateResource | Version:
    if not dialect.describes_instance:
        return Version()
    host = dialect.lone_location or platform.node()
    return StateResource(store, host, state_changes, dialect)


def _handle_unknown_path(_request: object, _response: object, _error: Exception, _params: object) -> None:
    raise errors.NoSuchPath


def _handle_store_error(_request: object, _response: object, error: Exception, _params: object) -> None:
    errors.log.error("%s", error)
    raise errors.TemporarilyUnavailable


def _handle_body_error(_request: object, _response: object, _error: Exception, _params: object) -> None:
    # wsgi.input cannot be read. The server sends its own response instead of this one.
    raise errors.BadRequest


def _redirect(environ: Environ, start_response: StartResponse, redirect: Redirect, path: str) -> Iterable[bytes]:
    """Redirect to the clean path, and keep the query, as the router of the dialect's daemon does."""
    query = environ["QUERY_STRING"]
    # What is encoded stays as it is. What may not stand in a URI is encoded now.
    location = quote(path.encode("latin-1"), safe=redirect.literal)
    if redirect.keeps_authority:
        location = target.authority(environ[RAW_URI]) + location
    if query:
        location += "?" + quote(query.encode("latin-1"), safe="/%!$&'()*+,;=:@-._~?")
    headers = [("Location", location)]
    body = b""
    if redirect.page and environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        headers.append(("Content-Type", "text/html; charset=utf-8"))
        body = f'<a href="{escape(location, quote=False)}">{redirect.status[4:]}</a>.\n\n'.encode("latin-1")
    headers.append(("Content-Length", str(len(body))))
    start_response(redirect.status, headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
