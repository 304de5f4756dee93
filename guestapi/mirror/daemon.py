"""Asking a running Incus or LXD through its REST API on a Unix socket. Only what a mirror needs of it."""

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

#: Seconds that the daemon has for an answer: it looks at every instance for some of them.
_ANSWER_SECONDS = 60.0
#: Seconds that it has for what concerns one instance alone, which takes it milliseconds: it looks at the instance's
#: storage too, which may hang while that of others does not.
ONE_SECONDS = 5.0
#: Seconds that it has for taking a connection, and between a ping and its pong.
_SIGN_OF_LIFE_SECONDS = 10.0
#: Bytes of one answer: the configurations of 16 instances that have as much as they may, or of many thousand others.
_ANSWER_BYTES = 256 << 20
#: Bytes of one event; a lifecycle event has some hundred.
_EVENT_BYTES = 1 << 20

#: Not the library's own, to which it writes tracebacks: what goes wrong is raised as one sentence.
_SILENT = logging.Logger("guestapi.mirror.websocket", logging.CRITICAL + 1)

T = TypeVar("T")


class Daemon:
    """A client of one daemon. `events` may be used by another thread than the rest."""

    def __init__(self, socket: str) -> None:
        """Connect to nothing yet.

        Args:
            socket: path of the daemon's Unix socket.
        """
        self.socket = socket
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket),
            base_url="http://daemon",
            timeout=httpx.Timeout(_ANSWER_SECONDS, connect=_SIGN_OF_LIFE_SECONDS),
        )

    def server(self) -> Server:
        """The daemon itself.

        Raises:
            DaemonError: it does not answer, or does not trust us.
        """
        server = self._get("/1.0", Server)
        if server.auth != "trusted":
            raise DaemonError(f"{self.socket}: the daemon does not trust us", "add the mirror's user to its group")
        return server

    def instances(self) -> tuple[list[DaemonInstance], dict[tuple[str, str], str]]:
        """All instances of all projects, without their state: half a millisecond for each.

        Returns:
            The instances; and of those whose description cannot be read, by project and name, what is wrong with it.

        Raises:
            DaemonError: it does not answer.
        """
        found, unreadable = [], {}
        for raw in self._get("/1.0/instances?recursion=1&all-projects=true", list[msgspec.Raw]):
            try:
                found.append(self._decode(bytes(raw), DaemonInstance))
            except DaemonError as error:
                # Its name is all that is needed to say so. Without one, the whole answer is of no use.
                named = self._decode(bytes(raw), NamedInstance)
                unreadable[named.project, named.name] = str(error)
        return found, unreadable

    def places(self) -> set[tuple[str, str]]:
        """Project and name of all instances, of all members of a cluster: these the daemon knows by itself.

        Raises:
            DaemonError: it does not answer.
        """
        return {target_of(url)[1:] for url in self._get("/1.0/instances?all-projects=true", list[str])}

    def instance(self, project: str, name: str) -> DaemonInstance:
        """One instance, without its state.

        Raises:
            GoneError: there is none.
            SlowError: it is not told in time: the member that has it hangs.
            DaemonError: it does not answer.
        """
        with _in_time():
            return self._get(_url(project, name), DaemonInstance, ONE_SECONDS)

    def state(self, project: str, name: str) -> InstanceState:
        """The state of one instance, for which the daemon looks into it: 25 to 45 ms (also with ``recursion=2``).

        Raises:
            GoneError: there is none.
            SlowError: it is not told in time: something of the instance hangs.
            RefusedError: it cannot be told now: it is about to start, or to end.
            DaemonError: it does not answer.
        """
        with _in_time():
            return self._get(_url(project, name, "/state"), InstanceState, ONE_SECONDS)

    def tasks(self) -> set[tuple[str, str]]:
        """Project and name of the instances that the daemon is doing something with, like restarting them.

        Raises:
            SlowError: it is not told in time: each member of a cluster is asked.
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
            while_: asked between a look at the instance and the change; the change is made only if it says so, and the
                instance is still as it was at the look (RFC 9110, section 13.1.1).

        Returns:
            Whether it was done; the daemon may have news of why not.

        Raises:
            GoneError: there is no such instance.
            SlowError: the daemon does not answer in time.
            RefusedError: the daemon does not do it.
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
        """The names of all projects.

        Raises:
            DaemonError: it does not answer.
        """
        return [unquote(urlsplit(url).path.rpartition("/")[2]) for url in self._get("/1.0/projects", list[str])]

    def images(self, project: str) -> list[DaemonImage]:
        """The images of a project.

        Raises:
            DaemonError: it does not answer.
        """
        return self._get(f"/1.0/images?recursion=1&project={quote(project, safe='')}", list[DaemonImage])

    @contextmanager
    def export(self, project: str, fingerprint: str) -> Iterator[httpx.Response]:
        """Download an image; its bytes are to be read within the block.

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
        """Follow what happens, from now on until the end of the block, or until the daemon ends it.

        Raises:
            DaemonError: the daemon is not there. The events raise it when the daemon ends, or gives no sign of life.
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
                # What the library sends when a ping was not answered.
                text = f"{self.socket}: the daemon gives no sign of life in {_SIGN_OF_LIFE_SECONDS:g} s"
                raise DaemonError(text) from None
            raise self._explain(error) from None
        except WebSocketException as error:
            raise self._explain(error) from None
        raise DaemonError(f"{self.socket}: the daemon has ended its event stream")

    def close(self) -> None:
        """Let go of the connections."""
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
    """What takes too long concerns one instance, not the daemon as a whole."""
    try:
        yield
    except AnswerTimeError as error:
        raise SlowError(str(error)) from None


def _url(project: str, name: str, below: str = "") -> str:
    return f"/1.0/instances/{quote(name, safe='')}{below}?project={quote(project, safe='')}"
