"""Connections to the real service from a real container: keep-alive, limits, deadlines and fairness."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator

import gevent
import gevent.socket
import h11
import pytest

from guestapi.callers.credentials import Credentials, credentials
from guestapi.callers.identify import Caller, Identifier
from guestapi.server.acceptor import admit
from guestapi.server.admission import Admission, ConnectionQuota
from guestapi.server.connection import Connection
from guestapi.server.context import WorkerContext
from guestapi.settings import LimitSettings
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.wsgi import JUST_IDENTIFIED, Environ
from tests.harness.containers import Container, parse, request
from tests.harness.service import Service
from tests.server.fakes import EmptyStore
from tests.server.inside import Talk, asking, talk, talks

READY = b'{"state":"Ready"}'
#: The limits of the service `hasty` in seconds, and by how many seconds a machine under load may exceed them.
SHORT, LENIENT = 0.6, 4.0


@pytest.fixture(scope="module")
def hasty() -> Iterator[Service]:
    """A service of one worker with short deadlines and four connections for each instance."""
    limits = f"head_seconds = {SHORT}\nbody_seconds = {SHORT}\nidle_seconds = 1.5\nsend_seconds = {SHORT}\n"
    toml = f"[limits]\nconnections_per_instance = 4\n{limits}"
    with Service(workers=1, toml=toml, gunicorn="timeout = 3\n", dialects=["incus"]) as running:
        yield running


@pytest.fixture(scope="module")
def c2(hasty: Service) -> Iterator[Container]:
    """A container of that service, with a value of 2 MiB."""
    with hasty.container("c2", {"user.foo": "bar", "user.large": "é" * (1 << 20)}) as container:
        yield container


def state(service: Service, name: str) -> bool:
    """Return whether the instance is ready, and reset its state."""
    ready = service.instance(name).ready
    with service.writer.change() as change:
        instance = get_instance(change, "default", name)
        steps.set_ready(change, instance.id, instance.run, False)
    return ready


def test_keep_alive(c1: Container) -> None:
    """A connection serves any number of requests, also after refusals, until the client sends Connection: close."""
    with talk(c1) as guest:
        for _time in range(3):
            assert guest.ask("/1.0/config/user.foo").text == "bar"
            assert guest.ask("/1.0/config/security.x").status == 403
        response = guest.ask("/", "Connection: close")
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert guest.end() == b""


def test_pipelining(c1: Container) -> None:
    """Fifty pipelined requests, some with bodies, are answered in order."""
    expected = []
    raw = b""
    for number in range(50):
        if number % 5 == 4:
            raw += asking("/1.0", method="PATCH", body=f'{{"state":"{number}"}}'.encode())
            expected.append(f'Invalid state "{number}"\n')
        else:
            raw += asking(f"/1.0/config/user.{'foo' if number % 2 else 'bar'}")
            expected.append("bar" if number % 2 else "not found\n")
    with talk(c1) as guest:
        guest.send(raw)
        assert [response.text for response in guest.receive(50)] == expected


@pytest.mark.parametrize(
    "raw",
    [
        request("/1.0", "PATCH", READY),
        asking("/1.0", "Transfer-Encoding: chunked", method="PATCH") + b"11\r\n" + READY + b"\r\n0\r\n\r\n",
        asking("/1.0", "Transfer-Encoding: chunked", method="PATCH")
        + b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in READY)
        + b"0\r\nX-Trailer: z\r\n\r\n",
        asking("/1.0", f"Content-Length: {len(READY)}", method="PATCH", version="HTTP/1.0").replace(
            b"Host: x\r\n", b"Connection: keep-alive\r\n"
        )
        + READY,
    ],
    ids=["length", "one chunk", "many chunks and a trailer", "HTTP/1.0"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_body(service: Service, c1: Container, raw: bytes, at_once: bool) -> None:
    """A body, by length or chunked, is read completely, in one piece or byte by byte; then comes the next request."""
    with talk(c1) as guest:
        for number in range(0, len(raw), len(raw) if at_once else 1):
            guest.send(raw[number : len(raw) if at_once else number + 1])
        (response,) = guest.receive()
        assert (response.status, response.body) == (200, b"")
        assert guest.ask("/1.0/config/user.foo").text == "bar"
    assert state(service, "c1")


def test_unread_body_is_skipped(c1: Container) -> None:
    """A body that the application does not read is skipped, not parsed as a request, by length and in chunks."""
    inner = asking("/1.0/config/user.foo")
    in_chunks = asking("/nowhere", "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
    with talk(c1) as guest:
        guest.send(asking("/nowhere", body=inner) + in_chunks + asking("/"))
        assert [response.status for response in guest.receive(3)] == [404, 404, 200]


@pytest.mark.parametrize(("line", "most", "status"), [(b"", 16384, 414), (b"GET / HTTP/1.1\r\n", 65536, 431)])
def test_endless_head_in_pieces(c1: Container, line: bytes, most: int, status: int) -> None:
    """A line or head that exceeds its limit is refused, also when it arrives in pieces."""
    endless = line + b"X: y" * most
    with talk(c1) as guest:
        for number in range(0, most, 1024):
            guest.send(endless[number : number + 1024])
            guest.wait_read()
        guest.send(endless[most : most + 1])
        refusal = guest.last()
        assert refusal.status == status
        assert "retry-after" not in refusal.headers


def test_expect_continue(service: Service, c1: Container) -> None:
    """A client that expects 100 Continue gets it before the body is read; then the exchange continues."""
    expect = "Expect: 100-continue"
    with talk(c1) as guest:
        assert guest.ask("/1.0", expect, f"Content-Length: {len(READY)}", method="PATCH").status == 100
        guest.send(READY)
        assert guest.receive()[0].status == 200
        assert state(service, "c1")
        # After a refusal before the body, the client may or may not send the body, so the connection must end.
        assert guest.ask("/1.0/config", expect, "Content-Length: 5", method="PATCH").status == 405
        assert guest.end() == b""


def test_head(c1: Container) -> None:
    """A response to HEAD has GET's Content-Length and no body; a pipelined request after it is answered."""
    with talk(c1) as guest:
        guest.send(asking("/1.0/config/user.foo", method="HEAD") + asking("/1.0/config/user.no", method="HEAD"))
        first, second = guest.receive(2, "HEAD")
        assert (first.status, first.headers["content-length"]) == (200, "3")
        assert (second.status, second.headers["content-length"]) == (404, str(len("not found\n")))
        assert guest.ask("/").status == 200


def test_older_http(c1: Container) -> None:
    """HTTP/1.0 is answered with HTTP/1.0: the connection ends after one response, unless the client asks otherwise."""
    with talks(c1, 2) as (once, again):
        once.send(b"GET / HTTP/1.0\r\n\r\n")
        raw = once.end()
        assert raw.startswith(b"HTTP/1.0 200 OK\r\n")
        assert parse(raw)[0].headers["connection"] == "close"
        for _time in range(2):
            again.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert again.receive()[0].headers["connection"] == "keep-alive"


def test_half_close(c1: Container) -> None:
    """A client that closes its side after its requests still gets all responses."""
    with talk(c1) as guest:
        guest.send(asking("/1.0/config/user.foo") * 3)
        guest.socket.shutdown(socket.SHUT_WR)
        assert [response.text for response in parse(guest.end())] == ["bar"] * 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"GET / HT",
        b"GET / HTTP/1.1",
        b"GET / HTTP/1.1\r\nHost: x\r\n",
        asking("/1.0", "Content-Length: 5", method="PATCH") + b"ab",
    ],
)
def test_early_end(c1: Container, raw: bytes) -> None:
    """A client that closes its side in the middle of a request gets a refusal and the end of the connection at once."""
    with talk(c1) as guest:
        guest.send(raw)
        guest.socket.shutdown(socket.SHUT_WR)
        assert [response.status for response in parse(guest.end())] == ([400] if raw else [])


def test_clients_that_disconnect(service: Service, c1: Container) -> None:
    """Clients that disconnect before, during or after a response do not harm the workers."""
    before = service.workers
    for data in (b"", b"GET", asking("/") * 500, asking("/1.0", "Content-Length: 9", method="PATCH")):
        with talks(c1, 8) as guests:
            for guest in guests:
                guest.send(data)
    assert c1.ask("/1.0/config/user.foo").text == "bar"
    assert service.workers == before


def test_h11_accepts_the_responses(c1: Container) -> None:
    """h11 as a client accepts every kind of response, and sends its next request on the same connection."""
    client = h11.Connection(h11.CLIENT)
    with talk(c1) as guest:
        for method, path, status in [
            ("GET", "/", 200),
            ("HEAD", "/1.0", 200),
            ("GET", "/x", 404),
            ("PUT", "/", 405),
            ("GET", "//", 307),
            ("OPTIONS", "*", 200),
        ]:
            guest.send(client.send(h11.Request(method=method, target=path, headers=[("Host", "x")])) or b"")
            client.send(h11.EndOfMessage())
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    client.receive_data(guest.socket.recv(65536))
                elif isinstance(event, h11.Response):
                    assert (event.status_code, dict(event.headers).get(b"connection")) == (status, None)
            client.start_next_cycle()


def test_large_value_to_a_slow_reader(c2: Container) -> None:
    """A client that reads in small pieces gets two MiB complete, while other clients are answered."""
    with talks(c2, 2) as (slow, other):
        slow.send(asking("/1.0/config/user.large") + asking("/1.0/config/user.foo"))
        data = b""
        while len(data) < 1 << 20:
            data += slow.socket.recv(4096)
            if len(data) % (1 << 18) == 0:
                assert other.ask("/1.0/config/user.foo").text == "bar"
        while data.count(b"HTTP/1.1 200") < 2 or not data.endswith(b"\r\n\r\nbar"):
            data += slow.socket.recv(1 << 20)
        large, small = parse(data)
        assert large.body == "é".encode() * (1 << 20)
        assert small.text == "bar"


def until_end(guest: Talk, drip: bytes = b"", every: float = 0.1) -> tuple[bytes, float]:
    """Send a byte from time to time; return what the server sends until it closes, and after how many seconds."""
    began = time.monotonic()
    data = b""
    guest.socket.settimeout(every)
    while time.monotonic() - began < 20:
        try:
            for byte in drip[:1]:
                guest.send(bytes([byte]))
            more = guest.socket.recv(65536)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            more = b""
        if not more:
            return data, time.monotonic() - began
        data += more
    pytest.fail("the server did not close")


@pytest.mark.parametrize("raw", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_head_must_come_in_time(c2: Container, raw: bytes) -> None:
    """A connection whose head is not complete within its time is closed, whether bytes still come or not."""
    with talks(c2, 2) as (stopping, dripping):
        for guest in (stopping, dripping):
            guest.send(raw)
        data, seconds = until_end(stopping)
        assert data == b""
        assert SHORT - 0.3 < seconds < SHORT + LENIENT
        # The bytes that were sent did not extend its time: it ended with the other connection or soon after.
        assert until_end(dripping, b"x" if raw else b"")[1] < LENIENT


def test_head_that_drips_is_cut(c2: Container) -> None:
    """Bytes of a head do not extend its deadline."""
    with talk(c2) as guest:
        guest.send(b"GET / HTTP/1.1\r\nX: ")
        data, seconds = until_end(guest, b"x")
        assert data == b""
        assert SHORT - 0.3 < seconds < SHORT + LENIENT


@pytest.mark.parametrize("lines", [["Content-Length: 1000"], ["Transfer-Encoding: chunked"]])
def test_body_must_come_in_time(c2: Container, lines: list[str]) -> None:
    """A body that arrives byte by byte is refused with 400 when its time is over."""
    with talk(c2) as guest:
        guest.send(asking("/1.0", *lines, method="PATCH") + (b"3e8\r\n" if "chunked" in lines[0] else b""))
        data, seconds = until_end(guest, b"x")
        assert [response.status for response in parse(data)] == [400]
        assert SHORT - 0.3 < seconds < SHORT + LENIENT


def test_idle_connection_is_closed(c2: Container) -> None:
    """After a response a connection may be idle for longer than a head may take; then it is closed."""
    with talk(c2) as guest:
        assert guest.ask("/").status == 200
        data, seconds = until_end(guest)
        assert data == b""
        assert 1.2 < seconds < 1.5 + LENIENT


def test_client_that_never_reads_is_dropped(c2: Container) -> None:
    """A client that never reads a large response is disconnected; other clients are answered meanwhile."""
    with talks(c2, 2) as (never, other):
        never.send(asking("/1.0/config/user.large") * 3)
        began = time.monotonic()
        while not never.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            assert other.ask("/1.0/config/user.foo").text == "bar"
            try:
                never.socket.send(b" ")
            except (BrokenPipeError, ConnectionResetError):
                break
            assert time.monotonic() - began < SHORT + LENIENT, "still there"
        assert len(never.end()) < 2 << 20


def test_fairness(c1: Container) -> None:
    """While some connections pipeline requests without end, single requests are answered."""
    with talks(c1, 5) as (*greedy, modest):
        for guest in greedy:
            guest.socket.setblocking(False)
        block = asking("/1.0/config/user.foo") * 200
        for _time in range(50):
            for guest in greedy:
                try:
                    guest.socket.send(block)
                    guest.socket.recv(1 << 20)
                except BlockingIOError:
                    pass
            assert modest.ask("/1.0/config/user.foo").text == "bar"


def test_connections_per_instance(hasty: Service, c2: Container) -> None:
    """A connection beyond an instance's limit gets 429 with Retry-After; another instance is served."""
    with hasty.container("c3", {"user.foo": "other"}) as c3, talks(c2, 5) as guests:
        answers = [guest.ask("/") for guest in guests[:4]]
        assert [answer.status for answer in answers] == [200] * 4
        refused = guests[4].last()
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert refused.headers["content-type"] == "text/plain; charset=utf-8"
        assert c3.ask("/1.0/config/user.foo").text == "other"
        guests[0].send(asking("/", "Connection: close"))
        guests[0].end()
        assert c2.ask("/").status == 200


def test_unknown_callers_cannot_stop_the_worker(hasty: Service, c2: Container) -> None:
    """Unknown callers that exceed their limit of connections do not stop the worker."""
    before = hasty.workers
    strangers = [socket.socket(socket.AF_UNIX) for _number in range(6)]
    for stranger in strangers:
        stranger.connect(str(hasty.socket))
    # Longer than the worker's timeout: after it, the arbiter would replace a worker that hangs.
    until = time.monotonic() + 5
    while time.monotonic() < until and hasty.workers == before:
        for stranger in strangers:
            try:
                stranger.sendall(asking("/"))
                stranger.recv(4096)
            except OSError:
                continue  # A refusal is permitted.
        time.sleep(0.1)
    assert hasty.workers == before
    assert c2.ask("/1.0/config/user.foo").text == "bar"
    for stranger in strangers:
        stranger.close()


@pytest.mark.root
def test_curl_sees_the_refusal() -> None:
    """curl sends its request while the connection is refused, and still shows the 429 instead of a broken pipe."""
    limits = "[limits]\nconnections_per_instance = 4\nidle_seconds = 600\n"
    with (
        Service(workers=1, toml=limits, dialects=["incus"]) as service,
        service.container("c1") as container,
        talks(container, 4) as guests,
    ):
        assert all(guest.ask("/").status == 200 for guest in guests)
        command = ["curl", "-sS", "--unix-socket", "/dev/incus/sock", "-w", "%{http_code}", "-o", "/dev/null"]
        for _time in range(5):
            ran = container.run(*command, "http://x/")
            assert (ran.out, ran.err) == ("429", "")


@pytest.mark.parametrize("size", [0, 10, 20_000, 100_000])
def test_one_send_for_a_response(size: int) -> None:
    """Head and body are sent by one system call: on a socket that preserves message boundaries they are one message."""

    def application(_environ: object, start_response: object) -> Iterable[bytes]:
        assert callable(start_response)
        start_response("200 OK", [("Content-Length", str(size))])
        return [b"x" * size]

    refused: list[int] = []
    context = WorkerContext(
        application,
        Identifier(EmptyStore()),
        LimitSettings(),
        lambda _number: None,
        lambda _answer: None,
        lambda _caller, _dialect, status, _text, _limit: refused.append(status),
        Admission(LimitSettings(), ConnectionQuota(2, 2, lambda _instance_id: None), descriptors=20_000),
        multiprocess=False,
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Connection(context, ours, "incus", None).start()
    with (
        gevent.Timeout(10),
        gevent.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=theirs.detach()) as client,
    ):
        for _time in range(2):
            client.sendall(request("/"))
            (response,) = parse(client.recv(1 << 20))
            assert (response.status, len(response.body)) == (200, size)
        client.sendall(b"x\r\n\r\n")
        assert parse(client.recv(1 << 20))[0].status == 400
        assert client.recv(1) == b""
    assert refused == [400]
    with gevent.Timeout(10):
        while context.connections:
            gevent.sleep(0.001)


class RecordingIdentifier(Identifier):
    """An identifier that records its calls."""

    def __init__(self) -> None:
        super().__init__(EmptyStore())
        self.asked: list[str] = []

    def identify(self, connection: socket.SocketType, who: Credentials) -> Caller:
        """Record the call."""
        self.asked.append("identify")
        return super().identify(connection, who)

    def confirm(self, connection: socket.SocketType, caller: Caller) -> Caller:
        """Record the call."""
        self.asked.append("confirm")
        return super().confirm(connection, caller)


@pytest.mark.parametrize(
    ("first", "asked"),
    [
        (request("/"), ["identify"]),
        (request("/")[:-1], ["identify", "confirm"]),
        (b"", ["identify", "confirm"]),
    ],
    ids=["whole", "cut", "later"],
)
def test_one_identification_for_a_connection(first: bytes, asked: list[str]) -> None:
    """A connection is identified once, whatever the number of requests.

    It is confirmed once, unless the first request was there, whole, when its caller was identified. The application is
    told so, for this request alone.
    """
    just_identified: list[bool] = []

    def application(environ: Environ, start_response: object) -> Iterable[bytes]:
        assert callable(start_response)
        just_identified.append(JUST_IDENTIFIED in environ)
        start_response("200 OK", [("Content-Length", "0")])
        return [b""]

    identifier = RecordingIdentifier()
    context = WorkerContext(
        application,
        identifier,
        LimitSettings(),
        lambda _number: None,
        lambda _answer: None,
        lambda *_what: None,
        Admission(LimitSettings(), ConnectionQuota(2, 2, lambda _instance_id: None), descriptors=20_000),
        multiprocess=False,
    )
    ours, theirs = socket.socketpair()
    theirs.sendall(first)
    assert admit(ours, credentials(ours), "incus", context)
    with gevent.Timeout(10), gevent.socket.socket(fileno=theirs.detach()) as client:
        while not identifier.asked:
            gevent.sleep(0.001)
        for rest in (request("/")[len(first) :], *[request("/")] * 4):
            client.sendall(rest)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 OK")
    assert identifier.asked == asked
    assert just_identified == [asked == ["identify"], False, False, False, False]
