"""A client of the Docker-compatible API on a Unix socket, as Docker's engine and podman offer it.

It has four requests: list, inspect, one volume, events. Fields: docs.docker.com/reference/api/engine.

Rules: the engine is not trusted. Each answer has one deadline and one bound on its size, so an engine that hangs,
trickles or sends gigabytes costs bounded time and memory, and one line in the log. Paths have no version: each engine
then uses its newest, and the fields used here are the same since 1.24.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import TypeVar
from urllib.parse import quote, urlencode

import h11
import msgspec
from msgspec import Struct, field

from guestapi.errors import SourceError
from guestapi.sources.docker_model import ID, Annotated, EngineContainer, LibpodContainer, Listed, Volume

#: Seconds until an answer must be complete: for the list, and for one container. podman's list was seen to take
#: 1.3 s while twenty containers start, and a container that is just being made blocks it.
_LIST_SECONDS, _ONE_SECONDS = 15.0, 5.0
#: Bytes of an answer. A list has about 2 KiB for a container, one container 8 KiB, and both as many labels as images
#: have: a few MiB of each image at the most (podman takes no configuration above 4 MiB).
_LIST_BYTES, _ONE_BYTES = 32 << 20, 16 << 20
#: Bytes of an event; it has the labels of the container's image too.
_EVENT_BYTES = 16 << 20
_CHUNK = 1 << 16
#: Events after which a container is observed again. Engines name two of these differently, and ignore unknown ones.
_EVENTS = ("create", "start", "die", "died", "rename", "remove", "destroy")

T = TypeVar("T")


class EngineError(SourceError):
    """The engine cannot be asked, or its answer cannot be understood."""


class ContainerGoneError(EngineError):
    """The engine has no such container or volume."""


class TooLargeError(EngineError):
    """An answer exceeds the bound on its size."""


class _Actor(Struct, frozen=True, rename="pascal"):
    id: str = field(default="", name="ID")


class _Event(Struct, frozen=True):
    actor: _Actor = field(default=_Actor(), name="Actor")


class _Refusal(Struct, frozen=True):
    message: str = ""


class Engine:
    """A client of one engine. Each request has its own connection, so threads may share the client."""

    def __init__(self, path: str) -> None:
        """Address the engine.

        Args:
            path: of the engine's socket.
        """
        self.path = path

    def containers(self) -> list[Listed]:
        """All containers, running or not.

        Raises:
            EngineError: it cannot be asked, or answers something else.
        """
        found = self._get("/containers/json?all=1", list[Listed], _LIST_SECONDS, _LIST_BYTES)
        for one in found:
            self._check_id(one.id)
        return found

    def container(self, key: str) -> EngineContainer:
        """One container.

        Args:
            key: its full id.

        Raises:
            ContainerGoneError: there is none.
            EngineError: it cannot be asked, or answers something else.
        """
        found = self._get(f"/containers/{quote(key, safe='')}/json", EngineContainer)
        if found.id != key:
            raise EngineError(f"{self.path}: the engine was asked for container {key[:12]} and answered with another")
        return found

    def volume(self, name: str) -> Volume:
        """One volume.

        Raises:
            ContainerGoneError: there is none.
            EngineError: it cannot be asked, or answers something else.
        """
        return self._get(f"/volumes/{quote(name, safe='')}", Volume)

    def annotations(self, key: str) -> Mapping[str, str]:
        """Return a container's annotations, its image's and the operator's merged. Only podman's own API has them.

        Raises:
            EngineError: it cannot be asked, or answers something else.
        """
        found = self._get(f"/v4.0.0/libpod/containers/{quote(key, safe='')}/json", LibpodContainer)
        return found.config.annotations or {}

    def image_annotations(self, image: str) -> Mapping[str, str]:
        """Return the annotations that an image brings into its containers. Only podman's own API has them.

        Raises:
            EngineError: it cannot be asked, or answers something else.
        """
        found = self._get(f"/v4.0.0/libpod/images/{quote(image, safe='')}/json", Annotated)
        return found.annotations or {}

    def events(self) -> Events:
        """Subscribe to the events of containers, from now on.

        Raises:
            EngineError: it cannot be asked.
        """
        filters = json.dumps({"type": ["container"], "event": list(_EVENTS)})
        until = time.monotonic() + _ONE_SECONDS
        connection = self._connect(until)
        try:
            _send(connection, f"/events?{urlencode({'filters': filters})}", until)
        except OSError as error:
            connection.close()
            raise self._explain(error) from None
        return Events(self.path, connection)

    def _get(self, target: str, kind: type[T], seconds: float = _ONE_SECONDS, limit: int = _ONE_BYTES) -> T:
        until = time.monotonic() + seconds
        try:
            with self._connect(until) as connection:
                _send(connection, target, until)
                status, body = _receive(connection, until, limit)
        except TimeoutError:
            raise EngineError(f"{self.path}: GET {target}: no whole answer in {seconds:g} s") from None
        except _TooMuchError:
            raise TooLargeError(f"{self.path}: GET {target}: the answer has more than {limit >> 20} MiB") from None
        except (OSError, h11.ProtocolError) as error:
            raise self._explain(error) from None
        if status != 200:
            said = _decoded(body, _Refusal)
            kind_of_error = ContainerGoneError if status == 404 else EngineError
            text = f"{self.path}: GET {target}: {status} {said.message[:200] if said else ''}".rstrip()
            raise kind_of_error(_printable(text))
        found = _decoded(body, kind)
        if found is None:
            raise EngineError(f"{self.path}: GET {target}: the answer is not what the API's documentation says")
        return found

    def _connect(self, until: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _allow(connection, until)
            connection.connect(self.path)
        except OSError as error:
            connection.close()
            raise self._explain(error) from None
        return connection

    def _check_id(self, key: str) -> None:
        if not ID.fullmatch(key):
            raise EngineError(f"{self.path}: {key[:80]!r} in the list of containers is not the id of one")

    def _explain(self, error: Exception) -> EngineError:
        if isinstance(error, EngineError):
            return error
        return EngineError(
            _printable(f"{self.path}: {getattr(error, 'strerror', None) or error or type(error).__name__}")
        )


class Events:
    """An engine's event stream. `read` never blocks."""

    def __init__(self, path: str, connection: socket.socket) -> None:
        """Read a stream.

        Args:
            path: of the engine's socket, for errors.
            connection: on which the request was sent; closed with this object.
        """
        self._path, self._connection = path, connection
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_CHUNK)
        self._parser.send(h11.Request(method="GET", target="/", headers=[("Host", "engine")]))
        self._parser.send(h11.EndOfMessage())
        self._line = bytearray()
        self._skipping = False
        connection.setblocking(False)

    def fileno(self) -> int:
        """Return the socket's descriptor for poll(2), readable when `read` has something."""
        return self._connection.fileno()

    def read(self) -> frozenset[str] | None:
        """Read what happened since the last call.

        Returns:
            Ids of containers to observe; None: observe all, because an event could not be read.

        Raises:
            EngineError: the stream has ended, or is none.
        """
        found: set[str] = set()
        everything = False
        try:
            data = self._connection.recv(_CHUNK)
            self._parser.receive_data(data)
            while True:
                event = self._parser.next_event()
                if event is h11.NEED_DATA:
                    break
                # ConnectionClosed, PAUSED: the engine sends nothing more.
                if isinstance(event, h11.Response) and event.status_code != 200:
                    raise EngineError(f"{self._path}: GET /events: the engine answers {event.status_code}")
                if isinstance(event, h11.Data):
                    everything |= not self._take(bytes(event.data), found)
                elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)) or event is h11.PAUSED:
                    raise EngineError(f"{self._path}: the engine has ended its event stream")
        except BlockingIOError:
            pass
        except (OSError, h11.ProtocolError) as error:
            raise EngineError(_printable(f"{self._path}: the event stream has ended: {error}")) from None
        return None if everything else frozenset(found)

    def close(self) -> None:
        """End it."""
        self._connection.close()

    def _take(self, data: bytes, found: set[str]) -> bool:
        """Add the ids of complete lines to `found`; return whether all could be read."""
        understood = True
        *lines, rest = data.split(b"\n")
        for line in lines:
            whole, self._line = bytes(self._line) + line, bytearray()
            if self._skipping:
                self._skipping = False
            elif whole.strip():
                event = _decoded(whole, _Event)
                if event is not None and ID.fullmatch(event.actor.id):
                    found.add(event.actor.id)
                else:
                    understood = False
        if not self._skipping:
            self._line += rest
            if len(self._line) > _EVENT_BYTES:
                self._line, self._skipping, understood = bytearray(), True, False
        return understood


class _TooMuchError(Exception):
    """An answer exceeds the bound on its size."""


def _send(connection: socket.socket, target: str, until: float) -> None:
    _allow(connection, until)
    connection.sendall(f"GET {target} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n".encode())


def _receive(connection: socket.socket, until: float, limit: int) -> tuple[int, bytes]:
    """Status and body of one answer."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_CHUNK)
    parser.send(h11.Request(method="GET", target="/", headers=[("Host", "engine"), ("Connection", "close")]))
    parser.send(h11.EndOfMessage())
    status, body = 0, bytearray()
    while True:
        event = parser.next_event()
        if event is h11.NEED_DATA:
            _allow(connection, until)
            parser.receive_data(connection.recv(_CHUNK))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > limit:
                raise _TooMuchError
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise ConnectionResetError("the engine has ended the connection")


def _allow(connection: socket.socket, until: float) -> None:
    """Give the next call the rest of the time."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


def _decoded(content: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
