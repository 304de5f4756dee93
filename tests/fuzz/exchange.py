"""A real `Connection` that receives any bytes, and a check of its responses.

Everything is in this process, without the kernel's peer credentials and without a database.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import re
import shutil
import socket
import sys
import tempfile
import termios
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import jwt
from gevent.hub import get_hub

from guestapi.api.app import create
from guestapi.api.resources.identity import IdentityTokens
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller
from guestapi.dialects import DIALECTS
from guestapi.identity import keys
from guestapi.identity.messages import TokenAnswer, TokenRequest, decode_answer, decode_request, encode
from guestapi.identity.signer import TokenMaker
from guestapi.model import Image, ImageFile, Notification
from guestapi.notifications.broker import Broker
from guestapi.rate_limit import RateLimit
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext
from guestapi.server.exchange import Exchange
from guestapi.settings import IdentitySettings, LimitSettings
from guestapi.store.notices import Notice
from guestapi.store.rows import Entries
from tests.api.fakes import MemoryStore, caller, instance

#: Separates pieces that are sent one after another. It occurs neither in HTTP nor in the WebSocket frames of the seeds.
PAUSE = b"\xff\xfe"
#: Seconds after which a connection hangs.
TIMEOUT = 10
#: The fingerprint of the only image.
FINGERPRINT = "0123456789abcdef" * 4
#: For whom there are tokens of identity.
AUDIENCES = ("a", "é &=%+")

#: The PID of the process that connects; any will do.
_PID = 4242

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [ -~]+")
_FIELD = re.compile(rb"([A-Za-z0-9-]+): ([!-~\x80-\xff](?:[ \t!-~\x80-\xff]*[!-~\x80-\xff])?)?")


class ShortLog:
    """A change log with three entries."""

    replaced = 0

    def latest(self) -> int:
        """Return the last id."""
        return 3

    _METADATA = '{"key":"user.foo","old_value":"","value":"<bar>"}'

    def entries(
        self, after: int, limit: int, *, instance_id: int | None = None, until: int = 3, most_bytes: int = 0
    ) -> Entries:
        """Return the entries: two for the guest, of which one is large, and one for the operator."""
        entries = [
            Notification(
                number,
                7,
                "default",
                "c1",
                "config",
                "2026-01-02T03:04:05Z",
                self._METADATA if number != 3 else "",
                number != 2,
                len(self._METADATA) if number == 3 else 0,
            )
            for number in (1, 2, 3)
        ]
        found = [one for one in entries if one.id > after and one.id <= until and (one.for_guest or not instance_id)]
        return Entries(found[:limit], len(found) > limit, 1, any_policies=False)

    def entry_part(self, entry: Notification, start: int) -> bytes | None:
        """Return ten bytes at a time."""
        return self._METADATA[start : start + 10].encode()


class Known:
    """An identifier that knows every caller (`callers.identify.Identifier`)."""

    def identify(self, _connection: socket.SocketType, _who: Credentials) -> Caller:
        """Return root of instance 7."""
        return caller()

    def confirm(self, _connection: socket.SocketType, known: Caller) -> Caller:
        """Confirm the caller."""
        return known

    def find_container(self, _connection: socket.SocketType, _who: Credentials) -> int:
        """Return the only container."""
        return 1


class Complaints(logging.Handler):
    """Collects log records that no guest may cause."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the record."""
        self.records.append(self.format(record))


class FuzzedWorker:
    """The parts of a worker in one process."""

    def __init__(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        file = directory / FINGERPRINT
        file.write_bytes(b"image" * 100)
        files = (ImageFile(".tar.gz", 500, file.stat().st_mtime_ns),)
        image = Image(FINGERPRINT, "container", True, False, 0.0, files, ())
        images = {f"security.{name}.images": "true" for name in ("guestapi", "devlxd")}
        config = {"user.foo": "bar", "user.a/b": "é", "user.meta-data": "x: y\n", "cloud-init.user-data": "", **images}
        devices = {"eth0": {"type": "nic", "nictype": "ipvlan"}, "root": {"type": "disk", "path": "/"}}
        held = replace(instance(config, devices), allowed=frozenset({"attributes"}))
        announced = [Notice("aa", "stop", "", 1e9, 5.0), Notice("bb", "text", "a \x1b[2J ä", 1e9, 6.0)]
        store = MemoryStore(held, images={FINGERPRINT: image}, where=directory, announced=announced)
        limits = LimitSettings(writes_per_second=1e6, writes_burst=10**6)
        broker = Broker(ShortLog(), queue_limit=10, subscriptions_per_instance=2)
        #: Method and status of each response in order; the method is None if the server itself refused.
        self.said: list[tuple[str | None, int]] = []
        self.context = WorkerContext(
            create(
                store, broker, limits, identity=IdentityTokens(OwnSigner(), frozenset(AUDIENCES), RateLimit(1e6, 10**6))
            ),
            # Duck-typed: the real one needs the kernel's credentials.
            Known(),  # type: ignore[arg-type]  # has the methods that are used
            limits,
            store.instance,
            self._answered,
            lambda _caller, _dialect, status, _text, _limit: self.said.append((None, status)),
            Admission(limits, ConnectionQuota(2, 2, lambda _instance_id: None), descriptors=20_000),
            multiprocess=True,
        )
        self.complaints = Complaints()
        logging.getLogger("guestapi").addHandler(self.complaints)
        # The hub prints the exceptions of greenlets, and continues.
        get_hub().handle_error = self._failed  # type: ignore[method-assign, assignment]

    def _answered(self, exchange: Exchange) -> None:
        self.said.append((exchange.environ["REQUEST_METHOD"], exchange.code))

    def _failed(self, context: Any, kind: Any, value: Any, _traceback: Any) -> None:
        self.complaints.records.append(f"{context}: {kind}: {value}")

    def answers(self, pieces: list[bytes], dialect: str) -> bytes:
        """Return everything that is received for these bytes on a connection of its own."""
        self.said.clear()
        self.complaints.records.clear()
        ours, theirs = socket.socketpair()
        assert self.context.admission.pending.add(_PID, lambda: 1)
        Connection(self.context, ours, dialect, Credentials(_PID, 0, 0)).start()
        with gevent.Timeout(TIMEOUT), gevent.socket.socket(fileno=theirs.detach()) as client:
            receiving = gevent.spawn(_receive, client)
            try:
                for piece in pieces:
                    client.sendall(piece)
                    # The bytes that the other side has not read (tty_ioctl(4), also for unix(7)).
                    while _number(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4))) and not receiving.ready():
                        gevent.idle()
                client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # The server has closed the connection.
            data: bytes = receiving.get()
        while self.context.connections:
            gevent.idle()
        assert not self.complaints.records, self.complaints.records
        return data


class OwnSigner:
    """A signer in this process: what a worker sends and receives, without a socket."""

    def sign(self, request: TokenRequest) -> TokenAnswer:
        """Return the answer."""
        answer = decode_answer(_maker().answer(encode(request)))
        assert answer.token, f"no token, {answer.refused}: {request}"
        return answer


def check_signer(data: bytes) -> None:
    """Send `data` to the signer as a worker does: it is refused, or signed as one that says no more than was asked for.

    Raises:
        AssertionError: neither.
    """
    answer = decode_answer(_maker().answer(data))
    if not answer.token:
        assert answer.refused in ("request", "audience"), answer
        return
    request = decode_request(data)
    assert request.audience in AUDIENCES
    said = jwt.decode(answer.token, options={"verify_signature": False})
    assert said.keys() - {"nonce"} == {"iss", "sub", "aud", "iat", "nbf", "exp", "jti", "guestapi"}
    assert said["sub"] == f"spiffe://x/guestapi/{request.uuid}"
    assert re.fullmatch(r"[0-9a-f-]{36}", request.uuid)
    assert (said["aud"], said.get("nonce")) == (request.audience, request.nonce)


@cache
def _maker() -> TokenMaker:
    directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    keys.rotate(directory, 1.0)
    return TokenMaker(IdentitySettings(trust_domain="x", audiences=AUDIENCES, keys=str(directory)))


@cache
def worker() -> FuzzedWorker:
    """Return the worker of this process."""
    return FuzzedWorker()


def check_exchange(data: bytes) -> None:
    """Send `data` on a connection, with the dialect in its first byte, and `PAUSE` between pieces.

    Raises:
        AssertionError: a response is malformed or missing, or a record is logged that no guest may cause.
        gevent.Timeout: it hangs.
    """
    dialect = list(DIALECTS)[data[0] % len(DIALECTS)] if data else "incus"
    serving = worker()
    received = serving.answers(data[1:].split(PAUSE), dialect)
    for method, status in serving.said:
        received = _check_answer(received, method, status)
    assert not received, f"an unexpected response: {received!r}"


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, sys.byteorder)


def _receive(client: gevent.socket.socket) -> bytes:
    data = b""
    try:
        while more := client.recv(65536):
            data += more
    except ConnectionResetError:
        pass
    return data


def _check_answer(data: bytes, method: str | None, status: int) -> bytes:
    """Check one response at the beginning of `data`; return the rest."""
    while data.startswith(b"HTTP/1.1 100 Continue\r\n\r\n"):
        data = data[25:]
    if not data and status == 101:
        # A client that sends frames before the response gets no response.
        return b""
    head, end, rest = data.partition(b"\r\n\r\n")
    assert end, f"an incomplete head: {data!r}"
    line, *lines = head.split(b"\r\n")
    found = _STATUS.fullmatch(line)
    assert found, line
    assert int(found[1]) == status
    fields: dict[bytes, bytes] = {}
    for one in lines:
        field = _FIELD.fullmatch(one)
        assert field, one
        assert field[1].lower() not in fields, one
        fields[field[1].lower()] = field[2] or b""
    if b"content-length" not in fields:
        if status == 204:
            # It has no content, so it says nothing of its length (RFC 9110, section 8.6).
            return rest
        assert (method, status) in (("GET", 101), ("GET", 200)), head
        _check_stream(rest, fields)
        return b""
    assert b"date" in fields
    length = 0 if method == "HEAD" else int(fields[b"content-length"])
    body, rest = rest[:length], rest[length:]
    assert len(body) == length, "cut short"
    if body and fields.get(b"content-type") == b"application/json":
        json.loads(body)
    if fields.get(b"content-type") == b"application/jwt":
        assert fields[b"cache-control"] == b"no-store"
        claims = jwt.decode(body, options={"verify_signature": False}) if body else {"aud": AUDIENCES[0]}
        assert claims["aud"] in AUDIENCES
    if status >= 400 and body and fields[b"content-type"].startswith(b"text/plain"):
        assert body.endswith(b"\n")
        assert body.count(b"\n") == 1
    return rest


def _check_stream(data: bytes, fields: dict[bytes, bytes]) -> None:
    """Check the data of a stream: complete frames or lines."""
    if fields.get(b"upgrade") != b"websocket":
        assert not data or data.endswith(b"\n")
        for line in data.splitlines():
            text = line.removeprefix(b"data: ")
            assert not text.startswith(b"{") or json.loads(text)
        return
    while data:
        first, second = data[0], data[1]
        assert first & 0xF0 == 0x80, "a frame is not whole in itself"
        assert second < 0x80, "a frame of the server is masked"
        start = {126: 4, 127: 10}.get(second, 2)
        length = int.from_bytes(data[2:start]) if start > 2 else second
        assert first & 0x0F < 8 or length <= 125, "a control frame is too long"
        assert len(data) >= start + length, "a frame is cut short"
        data = data[start + length :]
