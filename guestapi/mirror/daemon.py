"""A client of the REST API of a running Incus or LXD on its Unix socket: the requests that a mirror needs."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx
import msgspec
from websockets.exceptions import ConnectionClosedError, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, unix_connect

from guestapi.mirror.daemon_model import (
    Answer,
    AnswerTimeError,
    ChangedError,
    DaemonError,
    DaemonEvent,
    DaemonImage,
    DaemonInstance,
    GoneError,
    InstanceState,
    NamedInstance,
    Operation,
    RefusedError,
    Server,
    SlowError,
    UnreadableError,
    target_of,
)

#: Seconds for an answer. For some, the daemon examines every instance.
_ANSWER_SECONDS = 60.0
#: Seconds for an answer about one instance, which takes milliseconds. The daemon also examines the instance's storage,
#: which may hang while that of others does not.
ONE_SECONDS = 5.0
#: Seconds for the daemon's own description. A cluster that elects the leader of its database takes several.
_DESCRIPTION_SECONDS = 20.0
#: Seconds for accepting a connection, and from a ping to its pong.
_SIGN_OF_LIFE_SECONDS = 10.0
#: Seconds for which an unused connection stays open. A mirror sends a request every ten seconds at least.
_IDLE_SECONDS = 30.0
#: Most bytes of an answer: the configurations of 16 instances of the largest size, or of many thousand others.
_ANSWER_BYTES = 256 << 20
#: Most bytes of an event; a lifecycle event has some hundred.
_EVENT_BYTES = 1 << 20

#: Not the library's own logger, which would write tracebacks. Errors are raised with one sentence.
_SILENT = logging.Logger("guestapi.mirror.websocket", logging.CRITICAL + 1)

T = TypeVar("T")


class DaemonClient:
    """A client of one daemon. `events` may be used by another thread than the other methods."""

    def __init__(self, socket: str) -> None:
        """Connect to nothing yet.

        Args:
            socket: path of the daemon's Unix socket.
        """
        self.socket = socket
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket, limits=httpx.Limits(keepalive_expiry=_IDLE_SECONDS)),
            base_url="http://daemon",
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_SIGN_OF_LIFE_SECONDS),
        )

    def server(self) -> Server:
        """Return the daemon's own description.

        Raises:
            DaemonError: it does not answer, or does not trust us.
        """
        server = self._get("/1.0", Server, _DESCRIPTION_SECONDS)
        if server.auth != "trusted":
            raise DaemonError(f"{self.socket}: the daemon does not trust us", "add the mirror's user to its group")
        return server

    def instances(self) -> tuple[list[DaemonInstance], dict[tuple[str, str], str]]:
        """Return all instances of all projects, without their state: half a millisecond for each.

        Returns:
            The instances; and the errors of malformed descriptions, by project and name.

        Raises:
            DaemonError: it does not answer.
        """
        found, unreadable = [], {}
        for raw in self._get("/1.0/instances?recursion=1&all-projects=true", list[msgspec.Raw]):
            try:
                found.append(self._decode(bytes(raw), DaemonInstance))
            except DaemonError as error:
                # A name is enough to report the error. Without a name, the whole answer is malformed.
                named = self._decode(bytes(raw), NamedInstance)
                unreadable[named.project, named.name] = str(error)
        return found, unreadable

    def places(self) -> set[tuple[str, str]]:
        """Return project and name of all instances of a cluster. The daemon asks no other member for that.

        Raises:
            DaemonError: it does not answer.
        """
        return {target_of(url)[1:] for url in self._get("/1.0/instances?all-projects=true", list[str])}

    def instance(self, project: str, name: str) -> DaemonInstance:
        """One instance, without its state.

        Raises:
            GoneError: there is none.
            SlowError: there is no answer in time, because the member that has it hangs.
            DaemonError: it does not answer.
        """
        with _in_time():
            return self._get(_url(project, name), DaemonInstance, ONE_SECONDS)

    def state(self, project: str, name: str) -> InstanceState:
        """Return the state of one instance, for which the daemon examines it: 25 to 45 ms (also with ``recursion=2``).

        Raises:
            GoneError: there is none.
            SlowError: there is no answer in time, because something of the instance hangs.
            RefusedError: there is no state now, because the instance is about to start or to end.
            DaemonError: it does not answer.
        """
        with _in_time():
            return self._get(_url(project, name, "/state"), InstanceState, ONE_SECONDS)

    def tasks(self) -> set[tuple[str, str]]:
        """Return project and name of the instances with a running operation, like a restart.

        Raises:
            SlowError: there is no answer in time: the daemon asks each member of its cluster.
            DaemonError: it does not answer.
        """
        path = "/1.0/operations?recursion=1&all-projects=true"
        with _in_time():
            found = self._get(path, dict[str, list[Operation]], ONE_SECONDS)
        urls = (
            url
            for operation in found.get("running", [])
            if operation.class_ == "task"
            for url in (operation.resources or {}).get("instances", [])
        )
        return {target_of(url)[1:] for url in urls}

    def configure(self, project: str, name: str, config: Mapping[str, str], *, while_: Callable[[], bool]) -> bool:
        """Set keys of an instance, unless it has changed meanwhile.

        Args:
            project: of the instance.
            name: of the instance.
            config: the keys.
            while_: called between the look at the instance and the change, which is made only if it returns True and
                the instance is still as it was at the look (RFC 9110, section 13.1.1).

        Returns:
            Whether the change was made. If not, an event may say why.

        Raises:
            GoneError: there is no such instance.
            SlowError: the daemon does not answer in time.
            RefusedError: the daemon refuses.
            DaemonError: it does not answer.
        """
        path = _url(project, name)
        with _in_time():
            look = self._ask("GET", path, seconds=ONE_SECONDS)
        if not while_():
            return False
        headers = {"If-Match": look.headers.get("etag", "*")}
        try:
            with _in_time():
                self._ask("PATCH", path, json.dumps({"config": dict(config)}), headers, ONE_SECONDS)
        except ChangedError:
            return False
        return True

    def projects(self) -> list[str]:
        """Return the names of all projects.

        Raises:
            DaemonError: it does not answer.
        """
        return [unquote(urlsplit(url).path.rpartition("/")[2]) for url in self._get("/1.0/projects", list[str])]

    def images(self, project: str) -> list[DaemonImage]:
        """Return the images of a project.

        Raises:
            DaemonError: it does not answer.
        """
        return self._get(f"/1.0/images?recursion=1&project={quote(project, safe='')}", list[DaemonImage])

    @contextmanager
    def export(self, project: str, fingerprint: str) -> Iterator[httpx.Response]:
        """Download an image. Its bytes must be read within the block.

        Raises:
            GoneError: there is none.
            DaemonError: it does not answer.
        """
        path = f"/1.0/images/{quote(fingerprint, safe='')}/export?project={quote(project, safe='')}"
        try:
            with self._http.stream("GET", path) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    self._refuse("GET", path, response)
                yield response
        except httpx.HTTPError as error:
            raise self._explain(error) from None

    @contextmanager
    def events(self) -> Iterator[Iterator[DaemonEvent]]:
        """Subscribe to events until the end of the block, or until the daemon ends the stream.

        Raises:
            DaemonError: the daemon does not run. The iterator raises it if the daemon ends or answers no ping.
        """
        try:
            stream = unix_connect(
                self.socket,
                "ws://daemon/1.0/events?type=lifecycle&all-projects=true",
                open_timeout=_SIGN_OF_LIFE_SECONDS,
                ping_interval=_SIGN_OF_LIFE_SECONDS,
                ping_timeout=_SIGN_OF_LIFE_SECONDS,
                close_timeout=1,
                max_size=_EVENT_BYTES,
                compression=None,
                logger=_SILENT,
            )
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from None
        with stream:
            yield self._read(stream)

    def _read(self, stream: ClientConnection) -> Iterator[DaemonEvent]:
        try:
            for message in stream:
                yield self._decode(message, DaemonEvent)
        except ConnectionClosedError as error:
            if error.sent is not None and error.sent.code == CloseCode.INTERNAL_ERROR:
                # The library sends this code when a ping was not answered.
                text = f"{self.socket}: the daemon gives no sign of life in {_SIGN_OF_LIFE_SECONDS:g} s"
                raise DaemonError(text) from None
            raise self._explain(error) from None
        except WebSocketException as error:
            raise self._explain(error) from None
        raise DaemonError(f"{self.socket}: the daemon has ended its event stream")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _get(self, path: str, kind: type[T], seconds: float = _ANSWER_SECONDS) -> T:
        answer = self._ask("GET", path, seconds=seconds)
        return self._decode(bytes(self._decode(answer.content, Answer).metadata), kind)

    def _ask(
        self,
        method: str,
        path: str,
        body: str | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = _ANSWER_SECONDS,
    ) -> httpx.Response:
        timeout = httpx.Timeout(seconds, connect=_SIGN_OF_LIFE_SECONDS)
        until = time.monotonic() + seconds
        content = bytearray()
        try:
            with self._http.stream(method, path, content=body, headers=headers, timeout=timeout) as stream:
                for block in stream.iter_bytes():
                    content += block
                    if len(content) > _ANSWER_BYTES:
                        raise DaemonError(
                            f"{self.socket}: {method} {path}: the answer is larger than {_ANSWER_BYTES >> 20} MiB"
                        )
                    if time.monotonic() > until:
                        raise AnswerTimeError(f"{self.socket}: {method} {path}: no whole answer in {seconds:g} s")
        except httpx.ReadTimeout:
            raise AnswerTimeError(f"{self.socket}: {method} {path}: no answer in {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise self._explain(error) from None
        response = httpx.Response(
            stream.status_code, headers={"etag": stream.headers.get("etag", "*")}, content=bytes(content)
        )
        if response.status_code != httpx.codes.OK:
            self._refuse(method, path, response)
        return response

    def _refuse(self, method: str, path: str, response: httpx.Response) -> None:
        try:
            said = msgspec.json.decode(response.content, type=Answer).error
        except msgspec.DecodeError:
            said = ""
        kinds: dict[int, type[DaemonError]] = {
            httpx.codes.NOT_FOUND: GoneError,
            httpx.codes.PRECONDITION_FAILED: ChangedError,
        }
        raise kinds.get(response.status_code, RefusedError)(
            f"{self.socket}: {method} {path}: {response.status_code} {said}".rstrip()
        )

    def _decode(self, content: bytes | str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnreadableError(f"{self.socket}: the daemon's answer cannot be read: {error}") from None

    def _explain(self, error: Exception) -> DaemonError:
        return DaemonError(f"{self.socket}: {error or type(error).__name__}")


@contextmanager
def _in_time() -> Iterator[None]:
    """Convert a timeout into an error about one instance, not about the daemon."""
    try:
        yield
    except AnswerTimeError as error:
        raise SlowError(str(error)) from None


def _url(project: str, name: str, below: str = "") -> str:
    return f"/1.0/instances/{quote(name, safe='')}{below}?project={quote(project, safe='')}"
