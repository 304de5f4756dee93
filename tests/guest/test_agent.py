"""guestapi-agent, from a client's socket through relay and handover to the service; Unix sockets stand for vsock."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import unix_connect

from guestapi.guest import agent
from guestapi.relay.loop import Relay
from tests.harness.scratch import SCRATCH
from tests.harness.service import USER, Service
from tests.harness.vmm import Vmm
from tests.harness.waiting import TIMEOUT, until
from tests.server.inside import Talk, asking

PROGRAM = Path(agent.__file__)
CID = 42
LARGE = "é" * (1 << 20)


class UnixHost(agent.Agent):
    """An agent whose host is a Unix socket."""

    path = ""

    def open_host(self) -> socket.socket:
        """As `Agent.open_host`."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        return sock

    def host_address(self, port: int) -> Any:
        """As `Agent.host_address`."""
        return f"{self.path}-{port}"


class HostListener:
    """A listening Unix socket; whoever connects is the virtual machine."""

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen(100)
        self.socket.setblocking(False)

    def fileno(self) -> int:
        """As of a socket."""
        return self.socket.fileno()

    def accept(self) -> tuple[int, tuple[int, int]]:
        """As of a socket of AF_VSOCK."""
        return self.socket.accept()[0].detach(), (CID, 1)


@contextmanager
def thread(step: Callable[[], None]) -> Iterator[None]:
    """Call `step` again and again in a thread."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.is_set():
            step()

    running = threading.Thread(target=run)
    running.start()
    try:
        yield
    finally:
        stopped.set()
        running.join()


@contextmanager
def forwarding(directory: Path, host_seconds: float = 20.0) -> Iterator[Path]:
    """Run an agent; its socket is yielded, and its host is `directory`/host-8444."""
    path = directory / "sock"
    listening = agent.bind(str(path))
    listening.setblocking(False)
    made = UnixHost([(listening, 8444)], host_seconds)
    made.path = str(directory / "host")

    def wake() -> None:
        made.loop.at("test", 0.05, lambda: None)
        made.loop.run()

    with thread(wake):
        yield path
    listening.close()


@contextmanager
def relayed(directory: Path, handover: Path) -> Iterator[None]:
    """Run a relay from `directory`/host-8444 and -8445."""
    listeners = [HostListener(str(directory / f"host-{port}")) for port in (8444, 8445)]
    relay = Relay(list(zip(listeners, ("incus", "lxd"), strict=True)), str(handover))
    with thread(lambda: relay.step(0.05)):
        yield
    relay.close()
    for listener in listeners:
        listener.socket.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user can enter."""
    with tempfile.TemporaryDirectory(prefix="guestapi-agent-", dir=SCRATCH) as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """A service with a handover socket and a virtual machine."""
    with tempfile.TemporaryDirectory(prefix="guestapi-handover-", dir=SCRATCH) as made:
        Path(made).chmod(0o755)
        os.chown(made, USER, USER)
        more = f'[[listener]]\npath = "{made}/handover"\ndialect = "handover"\n'
        with Service(toml=more, dialects=["incus"]) as running, Vmm() as vmm:
            running.command("instance", "add", "vm", "--type", "virtual-machine", "--config", "user.foo=bar")
            running.command("instance", "register", "vm", "--cid", str(CID), "--pid", str(vmm.pid))
            running.configure("vm", **{"user.large": LARGE})
            yield running


@pytest.fixture
def path(service: Service, directory: Path) -> Iterator[Path]:
    """The agent's socket, forwarded to that service."""
    with relayed(directory, Path(service.settings.handover)), forwarding(directory) as found:
        yield found


def connect(path: Path) -> Talk:
    """Connect to the agent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(str(path))
    return Talk(sock)


@pytest.mark.root
def test_requests(path: Path) -> None:
    """Requests on one connection are answered one after another, large values whole."""
    with connect(path).socket as sock:
        guest = Talk(sock)
        assert guest.ask("/1.0/config/user.foo").text == "bar"
        assert guest.ask("/1.0/config/user.large").text == LARGE
        assert guest.ask("/1.0/config/user.no").status == 404
        expecting = asking("/1.0", "Expect: 100-continue", "Content-Length: 17", method="PATCH")
        guest.send(expecting)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        guest.send(b'{"state":"Ready"}')
        assert guest.receive(1, "PATCH")[0].status == 200


@pytest.mark.root
def test_half_close(path: Path) -> None:
    """A client that has sent all and says so gets its answer, and then the end."""
    with connect(path).socket as sock:
        guest = Talk(sock)
        guest.send(asking("/1.0/config/user.foo", "Connection: close"))
        sock.shutdown(socket.SHUT_WR)
        assert guest.last().text == "bar"


@pytest.mark.root
def test_web_socket(path: Path, service: Service) -> None:
    """Events come over a WebSocket, and its close handshake passes."""
    with unix_connect(str(path), "ws://x/1.0/events") as stream:
        service.command("config", "set", "vm", "user.mood=fine")
        assert '"user.mood"' in str(stream.recv(TIMEOUT))
        stream.close()


@pytest.mark.root
def test_lines_of_events(path: Path, service: Service) -> None:
    """A stream of events ends when its client goes, and the service notices."""
    with connect(path).socket as sock:
        sock.sendall(asking("/1.0/events"))
        assert b"200 OK" in sock.recv(4096)
        service.command("config", "set", "vm", "user.mood=better")
        assert b'"better"' in sock.recv(4096)


@pytest.mark.root
def test_other_users(path: Path) -> None:
    """A user other than root gets the refusal that a container's user gets; root is answered meanwhile."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "s.sendall(b'GET /1.0 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n')\n"
        "data = b''\n"
        "while more := s.recv(4096): data += more\n"
        "sys.stdout.buffer.write(data)\n"
    )
    user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    done = subprocess.run([*user, "/usr/bin/python3", "-I", "-S", "-c", code, path], capture_output=True, check=True)
    assert done.stdout.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert done.stdout.endswith(b"\r\n\r\nAccess denied for non-root user\n")
    with connect(path).socket as sock:
        assert Talk(sock).ask("/1.0/config/user.foo").text == "bar"


@pytest.mark.root
def test_other_users_that_stall(path: Path) -> None:
    """Hundreds of silent connections of another user keep no connection of root out."""
    code = (
        "import socket, sys\n"
        "made = [socket.socket(socket.AF_UNIX) for _ in range(300)]\n"
        "for one in made: one.connect(sys.argv[1])\n"
        "print('connected', flush=True); sys.stdin.read()\n"
    )
    user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    words = [*user, "/usr/bin/python3", "-I", "-S", "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stalling:
        assert stalling.stdout is not None
        assert stalling.stdout.readline() == b"connected\n"
        with connect(path).socket as sock:
            assert Talk(sock).ask("/1.0/config/user.foo").text == "bar"


@pytest.mark.root
def test_a_host_that_restarts(service: Service, directory: Path) -> None:
    """A connection that comes while the host does not answer waits, and is answered when it does."""
    with forwarding(directory) as path, connect(path).socket as sock:
        sock.sendall(asking("/1.0/config/user.foo"))
        time.sleep(0.3)
        with relayed(directory, Path(service.settings.handover)):
            assert Talk(sock).receive()[0].text == "bar"
        with connect(path).socket as other, relayed(directory, Path(service.settings.handover)):
            assert Talk(other).ask("/1.0/config/user.foo").text == "bar"


@pytest.mark.root
def test_a_host_that_does_not_answer(directory: Path) -> None:
    """After a while the client is told, with a status on which cloud-init tries again."""
    with forwarding(directory, host_seconds=0.3) as path, connect(path).socket as sock:
        guest = Talk(sock)
        guest.send(asking("/1.0"))
        response = guest.last()
        assert (response.status, response.text) == (500, "the host does not answer, try again\n")


@pytest.mark.root
def test_a_slow_reader(directory: Path) -> None:
    """What a client does not read waits in the host, not in the agent."""
    host = HostListener(str(directory / "host-8444"))
    with forwarding(directory) as path, connect(path).socket as sock, host.socket:
        sock.sendall(b"x")
        with accepted(host) as ours:
            ours.setblocking(False)
            sent, quiet = 0, 0
            while quiet < 20:
                try:
                    sent += ours.send(bytes(65536))
                    quiet = 0
                except BlockingIOError:
                    quiet += 1
                    time.sleep(0.01)
            assert sent < 4 << 20
            received = 0
            while received < sent:
                received += len(sock.recv(1 << 20))
            assert received == sent


@pytest.mark.root
def test_a_client_that_goes_after_its_half_close(directory: Path) -> None:
    """Its connection to the host ends at once, although neither side sends anything."""
    host = HostListener(str(directory / "host-8444"))
    with forwarding(directory) as path, host.socket:
        with connect(path).socket as sock:
            sock.sendall(b"all")
            sock.shutdown(socket.SHUT_WR)
            with_host = accepted(host)
            assert with_host.recv(3, socket.MSG_WAITALL) == b"all"
            assert with_host.recv(1) == b""
        with with_host:
            waiting = select.poll()
            waiting.register(with_host, 0)
            assert waiting.poll(TIMEOUT * 1000) == [(with_host.fileno(), select.POLLHUP)]


@pytest.mark.root
def test_a_client_that_goes_without_an_answer(directory: Path) -> None:
    """What it has sent reaches the host, and then its end."""
    host = HostListener(str(directory / "host-8444"))
    with forwarding(directory) as path, host.socket:
        with connect(path).socket as sock:
            sock.sendall(b"x")
            ours = accepted(host)
            sock.sendall(bytes(65536))
        with ours:
            received = b""
            while more := ours.recv(1 << 20):
                received += more
            assert received == b"x" + bytes(65536)


@pytest.mark.root
def test_a_client_that_goes_before_the_host_answers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up its place at once, and nothing of it is sent to the host later."""
    monkeypatch.setattr(agent, "MOST", 1)
    listening = agent.bind(str(directory / "sock"))
    listening.setblocking(False)
    with listening:
        made = UnixHost([(listening, 8444)])
        made.path = str(directory / "host")
        with connect(directory / "sock").socket as sock:
            sock.sendall(b"first")
            made.loop.run()
        made.loop.run()
        host = HostListener(str(directory / "host-8444"))
        with connect(directory / "sock").socket as sock, host.socket:
            sock.sendall(b"second")
            found: list[socket.socket] = []

            def is_dialled() -> bool:
                made.loop.run()
                return accepts(host, found)

            until(is_dialled, "a connection")
            made.loop.run()
            with found[0] as ours:
                ours.settimeout(TIMEOUT)
                assert ours.recv(100) == b"second"


@pytest.mark.root
def test_an_answer_before_a_reset(directory: Path) -> None:
    """A host that answers and closes before it has read the request: the client reads the whole answer."""
    host = HostListener(str(directory / "host-8444"))
    answer = b"HTTP/1.1 429 Too Many Requests\r\n\r\n" + bytes(320 << 10)
    with forwarding(directory) as path, connect(path).socket as sock, host.socket:
        sock.sendall(b"x" * 65536)
        with accepted(host) as ours:
            # Something has come, and is not read: to close it is a reset.
            assert ours.recv(1, socket.MSG_PEEK) == b"x"
            ours.sendall(answer)
        sock.sendall(b"x" * 65536)
        assert Talk(sock).end() == answer


def accepts(host: HostListener, found: list[socket.socket]) -> bool:
    """Accept a connection, if there is one."""
    try:
        found.append(host.socket.accept()[0])
    except BlockingIOError:
        return False
    return True


def accepted(host: HostListener) -> socket.socket:
    """Wait for a connection, and accept it."""
    found: list[socket.socket] = []
    until(lambda: accepts(host, found), "a connection")
    found[0].settimeout(TIMEOUT)
    return found[0]


def test_python_3_7() -> None:
    """The program uses nothing newer than Python 3.7, the first with AF_VSOCK; vermin checks it without that Python."""
    words = ["--no-tips", "--eval-annotations", "--violations", "-t=3.7-", str(PROGRAM)]
    done = subprocess.run(
        [Path(sys.executable).with_name("vermin"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_command_line(directory: Path) -> None:
    """A wrong word is refused; the program listens where it is told, for every user, and ends when told to."""
    words = ["/usr/bin/python3", str(PROGRAM)]
    wrong = subprocess.run([*words, "--listen", "nowhere"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "PATH=PORT is needed" in wrong.stderr
    path = directory / "made" / "sock"
    with subprocess.Popen([*words, "--listen", f"{path}=8444"]) as running:
        until(path.exists, "the socket")
        until(lambda: path.stat().st_mode & 0o777 == 0o666, "its mode")
        running.terminate()
        assert running.wait(TIMEOUT) == 0
