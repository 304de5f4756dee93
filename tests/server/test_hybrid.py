"""Hybrid vsock: a VMM that connects to a Unix socket of the host for its guest; a small program stands in for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from guestapi.relay.loop import Relay, SocketListener
from guestapi.relay.service import _port
from guestapi.store.images import directory as directory_of_images
from guestapi.store.images import import_image, remove_image
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER, Service
from tests.harness.waiting import TIMEOUT, until
from tests.server.inside import Talk

pytestmark = pytest.mark.root

#: The first bytes of an image.
GZIP = b"\x1f\x8b" + bytes(20)

#: A port at which these tests speak the dialect lxd-6, which has none of its own.
LXD_6_PORT = 8446

#: Connects to the path of its own socket, "_" and a port whenever it is told a port, as for a guest; gives the
#: connection, which is the guest's end here, to the test. At its own socket it answers a program of the host that wants
#: to connect to a port of the guest: with the last word, with the end of the connection, or never.
_VMM = """
import socket, sys, threading
pipe = socket.socket(fileno=int(sys.argv[2]))
own = socket.socket(fileno=int(sys.argv[3]))
own.listen()
def answer():
    kept = []
    while True:
        host = own.accept()[0]
        if host.makefile("rb").readline() != b"CONNECT 8444\\n":
            continue
        if sys.argv[4] == "silence":
            kept.append(host)
        elif sys.argv[4] != "end":
            host.sendall(sys.argv[4].encode() + b"\\n")
threading.Thread(target=answer, daemon=True).start()
for port in sys.stdin:
    host = socket.socket(socket.AF_UNIX)
    host.connect(sys.argv[1] + "_" + port.strip())
    socket.send_fds(pipe, [b"x"], [host.fileno()])
    host.close()
"""


class Firecracker:
    """A stand-in."""

    def __init__(self, path: Path, answer: str = "end") -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(TIMEOUT)
        path.unlink(missing_ok=True)
        with theirs, socket.socket(socket.AF_UNIX) as own:
            own.bind(str(path))
            words = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/python3", "-I", "-S"]
            self._process = subprocess.Popen(
                [*words, "-c", _VMM, str(path), str(theirs.fileno()), str(own.fileno()), answer],
                pass_fds=[theirs.fileno(), own.fileno()],
                stdin=subprocess.PIPE,
            )
        self.pid = self._process.pid

    def connect(self, port: int = 8444) -> Talk:
        """Connect as its guest does."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % port)
        self._process.stdin.flush()
        _data, descriptors, _flags, _address = socket.recv_fds(self._ours, 1, 1)
        return Talk(socket.socket(fileno=descriptors[0]))

    def __enter__(self) -> Firecracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._ours.close()


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Where sockets are."""
    made = Path(tempfile.mkdtemp(prefix="guestapi-hybrid-", dir=SCRATCH))
    made.chmod(0o755)
    (made / "handover").mkdir()
    os.chown(made / "handover", USER, USER)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Service]:
    """A service with a handover socket, and two virtual machines that do not run yet."""
    more = f'[[listener]]\npath = "{directory}/handover/sock"\ndialect = "handover"\n'
    with Service(toml=more, dialects=["incus"]) as running:
        for name in ("one", "two"):
            running.command("instance", "add", name, "--type", "virtual-machine", "--config", f"user.who={name}")
        yield running


@pytest.fixture
def path(service: Service, directory: Path) -> Iterator[Path]:
    """The path of a VMM's own socket, with a relay at those of its ports."""
    path = directory / "v.sock"
    listeners = []
    for port, dialect in ((8444, "incus"), (8445, "lxd"), (LXD_6_PORT, "lxd-6")):
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(f"{path}_{port}")
        os.chmod(f"{path}_{port}", 0o666)
        listening.listen()
        listening.setblocking(False)
        assert _port(listening) == port
        listeners.append((listening, dialect))
    relay = Relay([(SocketListener(one), dialect) for one, dialect in listeners], service.settings.handover)
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            relay.step(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    yield path
    stopped.set()
    thread.join()
    relay.close()
    for listening, _dialect in listeners:
        os.unlink(listening.getsockname())
        listening.close()


def test_the_vmm_that_connects_is_the_machine(service: Service, path: Path) -> None:
    """Two VMMs at the same socket, and each is answered about its own instance; an unknown one about none."""
    with Firecracker(path) as one, Firecracker(path) as two, Firecracker(path) as unknown:
        for name, vmm in (("one", one), ("two", two)):
            service.command("instance", "register", name, "--hybrid-vsock", "--pid", str(vmm.pid))
        for name, vmm in (("one", one), ("two", two), ("one", one)):
            guest = vmm.connect()
            with guest.socket:
                assert guest.ask("/1.0/config/user.who").text == name
                assert json.loads(guest.ask("/1.0").text)["instance_type"] == "virtual-machine"
        guest = one.connect(8445)
        with guest.socket:
            assert guest.ask("/1.0/config/user.who").text == "one"
        guest = unknown.connect()
        with guest.socket:
            assert guest.ask("/1.0/config/user.who").status == 500
    until(lambda: f"pid {unknown.pid}" in service.log.read_text(), "the log line of the refusal")
    assert {one["name"]: one["status"] for one in service.listed()} == {"one": "dead", "two": "dead"}


@pytest.mark.parametrize(
    ("port", "key"),
    [
        (8444, "security.guestapi.images"),
        (8445, "security.devlxd.images"),
        (LXD_6_PORT, "security.devlxd.images"),
    ],
    ids=["incus", "lxd", "lxd-6"],
)
def test_images(service: Service, path: Path, tmp_path: Path, port: int, key: str) -> None:
    """A virtual machine exports an image while the key of its dialect says so, and is refused otherwise."""
    content = GZIP + bytes([port % 256])
    (tmp_path / "image.tar.gz").write_bytes(content)
    image = import_image(
        service.writer, directory_of_images(service.settings), [tmp_path / "image.tar.gz"], public=True
    )
    other = {"security.guestapi.images": "security.devlxd.images"}.get(key, "security.guestapi.images")
    with Firecracker(path) as vmm:
        service.command("instance", "register", "one", "--hybrid-vsock", "--pid", str(vmm.pid))
        guest = vmm.connect(port)
        with guest.socket:
            for set_key, value, status in ((key, "true", 200), (key, "false", 403), (other, "true", 403)):
                service.command("config", "set", "one", f"{set_key}={value}")
                answer = guest.ask(f"/1.0/images/{image.fingerprint}/export")
                assert answer.status == status
                assert (answer.body == content) is (status == 200)
        service.command("config", "unset", "one", key, other)
    remove_image(service.writer, directory_of_images(service.settings), image.fingerprint)


def test_the_end_of_a_vmm(service: Service, path: Path) -> None:
    """When the VMM has ended, its connections are answered with nothing, whoever has them."""
    with Firecracker(path) as vmm:
        service.command("instance", "register", "one", "--hybrid-vsock", "--pid", str(vmm.pid))
        guest, late = vmm.connect(), vmm.connect()
        assert guest.ask("/1.0/config/user.who").text == "one"
    with guest.socket, late.socket:
        guest.send(b"GET /1.0/config/user.who HTTP/1.1\r\nHost: x\r\n\r\n")
        assert guest.end() == b""
        late.send(b"GET /1.0/config/user.who HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"one" not in late.end_or_answer()


def test_a_process_of_the_host(service: Service, path: Path) -> None:
    """A program that connects where a VMM would is nobody, be it root's."""
    with Firecracker(path) as vmm:
        service.command("instance", "register", "one", "--hybrid-vsock", "--pid", str(vmm.pid))
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(f"{path}_8444")
        with sock:
            assert Talk(sock).ask("/1.0/config/user.who").status == 500


def test_register(service: Service) -> None:
    """A CID and hybrid vsock exclude each other, and a process that does not exist is refused."""
    words = ["instance", "register", "one", "--hybrid-vsock", "--pid"]
    both = service.command(*words, str(os.getpid()), "--cid", "42", check=False)
    assert "has no --cid" in both.stderr
    assert "no process" in service.command(*words, str(2**22 + 1), check=False).stderr
    neither = service.command("instance", "register", "one", check=False)
    assert "--vsock-socket" in neither.stderr


@pytest.mark.parametrize("answer", ["OK 1073741824", "end", "silence"])
def test_register_by_the_vmms_socket(service: Service, path: Path, answer: str) -> None:
    """The VMM is found by its own socket, whether or not its guest takes the connection that this makes."""
    with Firecracker(path, answer) as other, Firecracker(path, answer) as vmm:
        until(lambda: is_listening(path), "the VMM's socket")
        service.command("instance", "register", "one", "--vsock-socket", str(path), "--replace")
        assert next(one["pid"] for one in service.listed() if one["name"] == "one") == vmm.pid
        for one, status in ((vmm, 200), (other, 500)):
            guest = one.connect()
            with guest.socket:
                assert guest.ask("/1.0/config/user.who").status == status


def test_what_is_no_vmm(service: Service, path: Path, tmp_path: Path) -> None:
    """Where nothing listens, or something that answers like no VMM does, nothing is registered."""
    words = ["instance", "register", "one", "--vsock-socket"]
    for place in (tmp_path / "nothing", tmp_path):
        assert "give the path that the VMM has" in service.command(*words, str(place), check=False).stderr
    with Firecracker(path, "HTTP/1.1 400 Bad Request"):
        until(lambda: is_listening(path), "the VMM's socket")
        assert "is not a VMM" in service.command(*words, str(path), check=False).stderr


def is_listening(path: Path) -> bool:
    """Whether a connection to a socket is accepted."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0
