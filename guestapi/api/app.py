"""The WSGI application: one Falcon app a dialect, put together from `resources` by what the dialect has."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol, cast
from urllib.parse import quote

import falcon
from falcon.routing import CompiledRouter

from guestapi.api import errors
from guestapi.api.buckets import Buckets
from guestapi.api.gate import Gate
from guestapi.api.resources.config import Key, Keys
from guestapi.api.resources.devices import DeviceDefinition, Devices, DeviceUrls
from guestapi.api.resources.events import Events
from guestapi.api.resources.images import Export
from guestapi.api.resources.metadata import MetaData
from guestapi.api.resources.root import Root
from guestapi.api.resources.state import State, Version
from guestapi.api.routing import Router
from guestapi.dialects import DIALECTS, Dialect
from guestapi.http import target
from guestapi.model import Image, Init, Instance
from guestapi.notifications.broker import Broker
from guestapi.settings import Limits
from guestapi.store.errors import StoreError

Environ = dict[str, Any]
StartResponse = Callable[..., Any]


class Store(Protocol):
    """What the API needs of the host: to look, and to note the one thing that a guest may say."""

    def instance(self, instance_id: int) -> Instance | None:
        """As `store.reading.Reader.instance`."""
        ...

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `store.writing.Writer.set_ready`; may wait for another writer, but without holding up other requests."""
        ...

    def image(self, fingerprint: str) -> Image | None:
        """As `store.reading.Reader.image`."""
        ...

    def open_image(self, image: Image) -> list[int]:
        """As `store.images.open_files`; may wait for the disk, but without holding up other requests."""
        ...


@dataclass(frozen=True, slots=True)
class Application:
    """The WSGI callable. ``environ["guestapi.dialect"]`` names the dialect of the socket that was connected to."""

    apps: dict[str, falcon.App[Any, Any]]

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request.

        The environ has, besides what PEP 3333 asks for, ``guestapi.caller`` (a `Caller`), ``guestapi.dialect``, and
        ``RAW_PATH``, the path as it was sent. On return ``guestapi.instance`` is there if the caller was admitted.
        """
        path = environ["RAW_PATH"]
        if not target.is_clean(path) and environ["REQUEST_METHOD"] != "CONNECT":
            return _redirect(environ, start_response, target.clean(path))
        return self.apps[environ["guestapi.dialect"]](environ, start_response)


def create(store: Store, broker: Broker, limits: Limits | None = None) -> Application:
    """The application over `store`, in every dialect; who listens to events is registered with `broker`."""
    limits = limits or Limits()
    buckets = Buckets(limits.writes_per_second, limits.writes_burst)
    return Application({name: _create(store, broker, buckets, dialect) for name, dialect in DIALECTS.items()})


def _create(store: Store, broker: Broker, buckets: Buckets, dialect: Dialect) -> falcon.App[Any, Any]:
    gate = Gate(store.instance, dialect)
    # Falcon documents custom routers, its annotations know only its own.
    router = cast("CompiledRouter", Router())
    app: falcon.App[Any, Any] = falcon.App(router=router, middleware=[gate])
    app.resp_options.default_media_type = "application/octet-stream"
    app.set_error_serializer(errors.render)
    app.add_error_handler(Exception, errors.unexpected)
    app.add_error_handler(falcon.HTTPRouteNotFound, _no_such_path)
    app.add_error_handler(StoreError, _store_fault)
    app.add_error_handler(OSError, _body_fault)
    app.add_route("/", Root())
    state = State(store, platform.node(), buckets) if dialect.describes_instance else Version()
    app.add_route("/1.0", state)
    app.add_route("/1.0/config", Keys(dialect))
    app.add_route("/1.0/config/{key}", Key(dialect))
    app.add_route("/1.0/events", Events(broker, gate))
    app.add_route("/1.0/images/{fingerprint}/export", Export(store, dialect))
    app.add_route("/1.0/meta-data", MetaData(dialect))
    if dialect.listed_nic_types is None:
        app.add_route("/1.0/devices", Devices())
    else:
        app.add_route("/1.0/devices", DeviceUrls(dialect.listed_nic_types))
        app.add_route("/1.0/device/{name}", DeviceDefinition(dialect.listed_nic_types))
    return app


def _no_such_path(_request: object, _response: object, _error: Exception, _params: object) -> None:
    raise errors.NoSuchPath


def _store_fault(_request: object, _response: object, error: Exception, _params: object) -> None:
    errors.log.error("%s", error)
    raise errors.PassingFault


def _body_fault(_request: object, _response: object, _error: Exception, _params: object) -> None:
    # wsgi.input cannot be read: the server, whose matter that is, will say why in place of this.
    raise errors.BadRequest


def _redirect(environ: Environ, start_response: StartResponse, path: str) -> Iterable[bytes]:
    """To the clean form of the path, with method and query kept (RFC 9110, section 15.4.8), as Go's ServeMux does."""
    query = environ["QUERY_STRING"]
    # What is encoded already stays so; what may not stand in a URI is encoded now.
    location = quote(path.encode("latin-1"), safe="/%!$&'()*+,;=:@-._~")
    if query:
        location += "?" + quote(query.encode("latin-1"), safe="/%!$&'()*+,;=:@-._~?")
    headers = [("Location", location)]
    body = b""
    if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
        headers.append(("Content-Type", "text/html; charset=utf-8"))
        body = f'<a href="{escape(location, quote=False)}">Temporary Redirect</a>.\n\n'.encode("latin-1")
    headers.append(("Content-Length", str(len(body))))
    start_response("307 Temporary Redirect", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
