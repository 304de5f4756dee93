"""The client of the engines' API: false, hanging, slow, malformed or endless answers give an error within bounds."""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from guestapi.callers.namespaces import examine
from guestapi.settings import DockerSettings, ListenSocket, Settings, SourcesSettings
from guestapi.sources import docker_api, podman
from guestapi.sources.docker_api import ContainerGoneError, Engine, EngineError, TooLargeError
from guestapi.sources.docker_model import ContainerMount, Listed, operators
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.podman import DOCKER, EngineSource
from guestapi.sources.source import Unclear
from tests.harness.containers import Container

ID = "4c968e2d83da5e58786057a40629ec4ffcb029d43760237a45fb3879b77aacfe"

Answering = Callable[[socket.socket], None]


class FakeEngine:
    """A server on a Unix socket that handles each connection with the test's function, in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked: list[str] = []
        self.does: Answering = lambda connection: None
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.path)
        self._socket.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def set_answer(self, content: bytes, status: str = "200 OK") -> None:
        """Answer each request with this body."""
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        self.does = lambda connection: connection.sendall(head + content)

    def _run(self) -> None:
        while True:
            try:
                connection, _address = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    self.asked.append(connection.recv(65536).split(b" ")[1].decode())
                    self.does(connection)
                except OSError:
                    pass  # The client has closed the connection.


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    """An engine with the test's answers."""
    made = FakeEngine(tmp_path / "sock")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set short deadlines and small sizes."""
    monkeypatch.setattr(docker_api, "_LIST_SECONDS", 0.4)
    monkeypatch.setattr(docker_api, "_ONE_SECONDS", 0.4)
    monkeypatch.setattr(docker_api, "_LIST_BYTES", 1 << 20)
    monkeypatch.setattr(docker_api, "_EVENT_BYTES", 1 << 16)


def refused(fake: FakeEngine, seconds: float = 10.0) -> str:
    """Return the message of the error that listing raises."""
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        Engine(fake.path).containers()
    assert time.monotonic() - began < seconds
    sentence = str(caught.value)
    assert sentence.isprintable()
    assert fake.path in sentence
    return sentence


def test_list_and_inspect(fake: FakeEngine) -> None:
    """An engine's lists and containers are decoded without labels, which come from images; null is an empty value."""
    fake.set_answer(
        json.dumps(
            [
                {"Id": ID, "Names": ["/web"], "Labels": {"x": "y"}, "Mounts": None},
                {"Id": ID[::-1], "Names": None, "Mounts": [{"Type": "bind", "Source": "/a", "Destination": "/b"}]},
            ]
        ).encode()
    )
    first, second = Engine(fake.path).containers()
    assert (first.id, first.mounts) == (ID, None)
    assert second.mounts == [ContainerMount("bind", "", "/a", "/b")]
    fake.set_answer(json.dumps({"Id": ID, "Name": "/web", "State": {"Pid": 7}, "Mounts": [], "Config": {}}).encode())
    assert Engine(fake.path).container(ID).state.pid == 7
    assert fake.asked == ["/containers/json?all=1", f"/containers/{ID}/json"]


def test_missing_container(fake: FakeEngine) -> None:
    """404 raises an error of its own class, which shows the engine's message on one line."""
    fake.set_answer(b'{"message":"no such\\ncontainer"}', "404 Not Found")
    with pytest.raises(ContainerGoneError, match=r"404 no such\?container"):
        Engine(fake.path).container(ID)


def test_answer_about_another_container(fake: FakeEngine) -> None:
    """An answer about another container than the requested one is an error."""
    fake.set_answer(json.dumps({"Id": ID[::-1], "Name": "/web"}).encode())
    with pytest.raises(EngineError, match="answered with another"):
        Engine(fake.path).container(ID)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        b"\xff\xfe",
        b'[{"Id":7}]',
        b'[{"Id":"web"}]',
        b'[{"Id":"' + ID.encode() + b'","Mounts":7}]',
        b'[{"Id":"' + ID[:12].encode() + b'"}]',
        b'[{"Id":"../../' + ID[6:].encode() + b'"}]',
    ],
    ids=lambda content: content[:30].decode("latin-1"),
)
def test_no_list(fake: FakeEngine, content: bytes) -> None:
    """A body that is not a list of containers with complete ids is an error."""
    fake.set_answer(content)
    refused(fake)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
        b"\x00" * 100_000,
    ],
    ids=lambda answer: answer[:30].decode("latin-1"),
)
def test_no_http(fake: FakeEngine, answer: bytes) -> None:
    """Malformed HTTP, a truncated answer, and an endless head are errors."""
    fake.does = lambda connection: connection.sendall(answer)
    refused(fake)


def test_engine_that_hangs(fake: FakeEngine) -> None:
    """An engine that accepts the request and sends nothing is an error at the deadline."""
    fake.does = lambda connection: time.sleep(5)
    assert "no whole answer in 0.4 s" in refused(fake, 3)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_engine_that_trickles(fake: FakeEngine, head: bytes) -> None:
    """The deadline applies to the whole answer including its head, not to each byte."""

    def trickle(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.05)

    fake.does = trickle
    assert "no whole answer in 0.4 s" in refused(fake, 3)


@pytest.mark.parametrize("length", [b"Content-Length: 2147483648", b"Transfer-Encoding: chunked"])
def test_answer_of_gigabytes(fake: FakeEngine, length: bytes) -> None:
    """Of an answer of two gigabytes, with Content-Length or chunked, only the limit is read."""
    sent = [0]

    def flood(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        while sent[0] < 1 << 31:
            sent[0] += connection.send(chunk if b"chunked" in length else chunk[7:-2])

    fake.does = flood
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_api, "_LIST_SECONDS", 10.0)
        with pytest.raises(TooLargeError, match="more than 1 MiB"):
            Engine(fake.path).containers()
    assert sent[0] < 16 << 20


def test_no_engine(tmp_path: Path) -> None:
    """A missing socket, and one without a listening process, are errors."""
    with pytest.raises(EngineError, match="No such file"):
        Engine(str(tmp_path / "none")).containers()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "dead"))
    with pytest.raises(EngineError, match="Connection refused"):
        Engine(str(tmp_path / "dead")).containers()


def event(key: str, more: str = "") -> bytes:
    """Return an event as engines write it."""
    return json.dumps(
        {"Type": "container", "Action": "start", "Actor": {"ID": key, "Attributes": {"x": more}}}
    ).encode()


def read_events(fake: FakeEngine, *parts: bytes) -> list[frozenset[str] | None]:
    """Send these parts on an event stream; return what is read for each."""
    go = threading.Semaphore(0)

    def stream(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for part in parts:
            go.acquire()
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        go.acquire()

    fake.does = stream
    events = Engine(fake.path).events()
    found: list[frozenset[str] | None] = []
    try:
        for part in parts:
            go.release()
            seen: frozenset[str] | None = frozenset()
            while seen == frozenset():
                assert select.select([events], [], [], 5)[0], f"no event for {part[:40]!r}"
                seen = events.read()
            found.append(seen)
    finally:
        go.release()
        events.close()
    return found


def test_events(fake: FakeEngine) -> None:
    """Each complete line gives a container's id; a line may arrive in pieces."""
    line = event(ID) + b"\n"
    assert read_events(fake, line, event(ID[::-1]) + b"\n") == [frozenset({ID}), frozenset({ID[::-1]})]
    assert "%22rename%22" in fake.asked[0]


@pytest.mark.parametrize("line", [b"nonsense", b"{}", b'{"Actor":{"ID":"web"}}', b"\xff", b"[" * 60_000])
def test_odd_event(fake: FakeEngine, line: bytes) -> None:
    """A malformed event asks for a look at all containers; the next event is read again."""
    assert read_events(fake, line + b"\n", event(ID) + b"\n") == [None, frozenset({ID})]


def test_endless_event(fake: FakeEngine) -> None:
    """A line beyond the limit is not kept; the lines after it are read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_api, "_EVENT_BYTES", 1000)
        found = read_events(fake, event(ID, "x" * 5000), b"yyy\n" + event(ID[::-1]) + b"\n")
    assert found == [None, frozenset({ID[::-1]})]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
        b"garbage\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_no_event_stream(fake: FakeEngine, answer: bytes) -> None:
    """A refusal, a malformed answer or the end is an error, so that the follower opens another stream."""
    fake.does = lambda connection: connection.sendall(answer)
    events = Engine(fake.path).events()
    try:
        assert select.select([events], [], [], 5)[0]
        with pytest.raises(EngineError):
            events.read()
    finally:
        events.close()


@given(st.binary(max_size=300))
@hypothesis_settings(max_examples=200)
def test_any_body_is_a_list_or_an_error(content: bytes) -> None:
    """Any body decodes to a list of containers or to None."""
    found = docker_api._decoded(content, list[Listed])
    assert found is None or isinstance(found, list)


def test_operators_mounts() -> None:
    """Binds and named volumes are the operator's; a volume that an image declares has a name of 64 hex digits."""
    bind, named = ContainerMount("bind", "", "/a", "/b"), ContainerMount("volume", "data", "/v", "/c")
    image, tmpfs = ContainerMount("volume", ID, "/w", "/dev/incus"), ContainerMount("tmpfs", "", "", "/t")
    assert operators([bind, image, named, tmpfs, ContainerMount("volume", "", "/x", "/y")]) == [bind, named]


class LyingEngine(FakeEngine):
    """Answers by path; a path without an answer gets 500."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answers: dict[str, Any] = {}
        self.does = self._answer

    def _answer(self, connection: socket.socket) -> None:
        content = json.dumps(self.answers.get(self.asked[-1], {"message": "no"})).encode()
        status = "200 OK" if self.asked[-1] in self.answers else "500 No"
        connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)


class Observer:
    """The source docker with a simulated engine and one container with guestapi's mount."""

    def __init__(self, directory: Path) -> None:
        self.engine = LyingEngine(directory / "lying")
        place = directory / "guestapi"
        place.mkdir()
        sources = SourcesSettings(docker=DockerSettings(socket=self.engine.path))
        listener = (ListenSocket(path=str(place / "sock")),)
        self.source = EngineSource(DOCKER, Settings(listener=listener, sources=sources))
        self.mount = {"Type": "bind", "Source": str(place), "Destination": "/dev/incus"}

    def has(self, pid: int, started: str, mounts: list[dict[str, str]] | None = None, mode: str = "") -> None:
        """Let the engine have one container with these properties."""
        mounts = [self.mount] if mounts is None else mounts
        self.engine.answers["/containers/json?all=1"] = [{"Id": ID, "Names": ["/web"], "Mounts": mounts}]
        container = {"Id": ID, "Name": "/web", "State": {"Pid": pid, "StartedAt": started}, "Mounts": mounts}
        self.engine.answers[f"/containers/{ID}/json"] = {**container, "Config": {"Hostname": ID[:12]}}
        self.engine.answers[f"/containers/{ID}/json"]["HostConfig"] = {"PidMode": mode}

    def seen(self) -> list[object]:
        """Return the observations of the source."""
        return list(self.source.observe({ID: None}))


@pytest.fixture
def observer(tmp_path: Path) -> Iterator[Observer]:
    """A source with a simulated engine."""
    made = Observer(tmp_path)
    yield made
    made.engine.close()


@pytest.mark.root
def test_pid_of_another_process(observer: Observer) -> None:
    """A PID that has passed from an ended container to another one's init is not accepted as the init."""
    with Container() as other:
        observer.has(other.pid, "2020-01-01T00:00:00Z")
        (found,) = observer.seen()
        assert isinstance(found, Observed)
        assert found.init is None
        assert "which it is not" in found.problems[0]
        # podman reports no cgroup for a container without one, but the time of its start.
        observer.has(other.pid, datetime.now(UTC).isoformat())
        (found,) = observer.seen()
        assert isinstance(found, Observed)
        assert found.init == examine(other.pid)


@pytest.mark.parametrize("pid", [-1, 0])
def test_no_pid(observer: Observer, pid: int) -> None:
    """A PID that is not positive means that the container does not run."""
    observer.has(pid, "")
    (found,) = observer.seen()
    assert isinstance(found, Observed)
    assert found.init is None


@pytest.mark.parametrize(
    ("pid", "said"), [(os.getpid(), 1), (1 << 22, 0), (1 << 62, 0)], ids=["our own", "of nobody", "too large"]
)
def test_no_init(observer: Observer, pid: int, said: int) -> None:
    """A PID that is not a container's init means that the container does not run; an existing process is a problem."""
    observer.has(pid, "")
    (found,) = observer.seen()
    assert isinstance(found, Observed)
    assert (found.init, len(found.problems)) == (None, said)


@pytest.mark.parametrize("mode", ["host", "container:" + "b" * 64, "ns:/proc/1/ns/pid"])
def test_no_pid_namespace_of_its_own(observer: Observer, mode: str) -> None:
    """A container without a PID namespace of its own is not an instance, but a problem while it runs."""
    for pid, expected in ((os.getpid(), 1), (0, 0)):
        observer.has(pid, "", mode=mode)
        found = observer.seen()
        assert len(found) == expected
        assert all(isinstance(one, Problem) and one.refused for one in found)


def test_container_that_cannot_be_inspected(observer: Observer) -> None:
    """A listed container that cannot be inspected is unclear, so the store keeps what it has."""
    observer.has(0, "")
    del observer.engine.answers[f"/containers/{ID}/json"]
    (found,) = observer.seen()
    assert isinstance(found, Unclear)


def test_volume_that_cannot_be_inspected(observer: Observer) -> None:
    """A volume that cannot be inspected makes the container unclear, not gone."""
    observer.has(0, "", [{"Type": "volume", "Name": "ours", "Source": "/nowhere", "Destination": "/dev/incus"}])
    (found,) = observer.seen()
    assert isinstance(found, Unclear)


def test_long_round(observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time for a look is over, registered containers are unclear; new ones wait for the next look."""
    observer.has(0, "")
    monkeypatch.setattr(podman, "_ROUND_SECONDS", -1.0)
    (found,) = observer.seen()
    assert isinstance(found, Unclear)
    assert list(observer.source.observe({})) == []
