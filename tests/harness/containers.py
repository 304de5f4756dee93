"""Real containers for tests, and raw HTTP exchanges from inside them."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.harness import agent
from tests.harness.fast import forbid
from tests.harness.waiting import TIMEOUT

HERE = Path(__file__).parent

#: The host UID of root in a container, by default.
BASE = 100_000


@dataclass(frozen=True)
class Response:
    """One HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


@dataclass(frozen=True)
class Exchanged:
    """The result of an exchange: the bytes of each ``receive``, whether the server closed, and the seconds in all."""

    received: list[bytes]
    closed: bool
    seconds: float

    @property
    def responses(self) -> list[Response]:
        """All responses, parsed."""
        return [response for data in self.received for response in parse(data)]


@dataclass(frozen=True)
class Ran:
    """The exit status and output of a program that ran in a container."""

    code: int
    out: str
    err: str


def parse(data: bytes, method: str = "GET") -> list[Response]:
    """Return the responses in the bytes of a connection. One without a Content-Length ends with the bytes."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        status = int(lines[0].split(" ")[1])
        length = 0 if method == "HEAD" or status == 100 else int(headers.get("content-length", len(data)))
        found.append(Response(status, headers, data[:length]))
        data = data[length:]
    return found


def send(data: bytes) -> list[Any]:
    """Return a step of an exchange: send bytes."""
    return ["send", base64.b64encode(data).decode()]


def receive(count: int = 1, method: str = "GET", timeout: float = TIMEOUT) -> list[Any]:
    """Return a step of an exchange: receive this many responses to that method."""
    return ["receive", count, method, timeout]


def request(path: str, method: str = "GET", body: bytes = b"") -> bytes:
    """Return the bytes of a request."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n".encode() + body


class Container:
    """A container that runs until the end of its ``with`` block. `pid` is the PID of its init on the host."""

    def __init__(
        self,
        binds: Sequence[tuple[Path, str]] = (),
        *,
        base: int | None = BASE,
        hostname: str = "c1",
        enter: Sequence[str] = (),
    ) -> None:
        """Start a container.

        Args:
            binds: host directories and their mount points in the container.
            base: the host UID of root in the container; None: no user namespace, a privileged container.
            hostname: the host name in the container.
            enter: a prefix of the launcher's command, to start it in other namespaces; `pid` is as seen from there.
        """
        forbid()
        self._enter = list(enter)
        options = {
            "binds": [[str(host), guest] for host, guest in binds],
            "base": base,
            "hostname": hostname,
            "agent": str(HERE / "agent.py"),
            "checkout": str(HERE.parents[1]),
        }
        self._launcher = subprocess.Popen(
            [*enter, "/usr/bin/python3", "-I", "-S", str(HERE / "launch.py"), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._launcher.stdout is not None
        line = self._launcher.stdout.readline()
        assert line, "the container did not start"
        self.pid = int(line)

    @property
    def launcher(self) -> int:
        """The PID of the process that started it, which is a child of this one."""
        return self._launcher.pid

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill the container, without an update of the store."""
        if self._launcher.poll() is None:
            if not self._enter:
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # It has ended by itself, and its launcher is about to end.
            # Its init ends when its standard input does.
            for pipe in (self._launcher.stdin, self._launcher.stdout):
                assert pipe is not None
                pipe.close()
            self._launcher.wait(TIMEOUT)

    def command(self, **command: Any) -> dict[str, Any]:
        """Have the agent execute a command (see agent.py)."""
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps(command).encode() + b"\n")
        self._launcher.stdin.flush()
        answer: dict[str, Any] = json.loads(self._launcher.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def change_init(self, *become: str) -> None:
        """Have PID 1 itself apply ``uid:1000``, ``userns`` or ``pidns``. Commands work as before."""
        self.command(do="change init", become=list(become))

    def exchange(
        self, *steps: list[Any], socket: str = "/dev/incus/sock", become: Sequence[str] = (), how: str = "self"
    ) -> Exchanged:
        """Exchange bytes with the service from inside the container."""
        return exchanged(self.command(do="exchange", steps=list(steps), socket=socket, become=list(become), how=how))

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        *,
        socket: str = "/dev/incus/sock",
        become: Sequence[str] = (),
        how: str = "self",
    ) -> Response:
        """Send one request from inside the container; return its response."""
        steps = [send(request(path, method, body)), receive(1, method)]
        (response,) = parse(self.exchange(*steps, socket=socket, become=become, how=how).received[0], method)
        return response

    def run(self, *argv: str, stdin: bytes = b"", become: Sequence[str] = (), timeout: float = TIMEOUT) -> Ran:
        """Run a program in the container."""
        answer = self.command(
            do="run", argv=argv, input=base64.b64encode(stdin).decode(), become=list(become), timeout=timeout
        )
        out, err = (base64.b64decode(answer[name]).decode() for name in ("out", "err"))
        return Ran(answer["code"], out, err)

    def listening(self, kind: str, argument: str, socket: str = "/dev/incus/sock") -> Listening:
        """Return a client of the event stream in the container (see listening.py), to be used in a ``with`` block."""
        return Listening(self.pid, kind, argument, self._enter, socket)


class Listening:
    """A running listening.py in a container."""

    def __init__(
        self, pid: int, kind: str, argument: str, around: Sequence[str] = (), socket: str = "/dev/incus/sock"
    ) -> None:
        enter = [*around, "nsenter", "-t", str(pid), "-a", "--setuid", "0", "--setgid", "0"]
        path = f"PYTHONPATH={HERE.parents[1]}:{sysconfig.get_path('purelib')}"
        self._process = subprocess.Popen(
            [*enter, "env", path, "/usr/bin/python3", str(HERE / "listening.py"), kind, argument, socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Listening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            # The listener is nsenter's child. Killed first, it is reaped by nsenter. As an orphan it would wait for the
            # host's PID 1 to reap it, and its container could not end before.
            pid = self._process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children or [str(pid)]:
                try:
                    os.kill(int(child), signal.SIGKILL)
                except ProcessLookupError:
                    pass  # It has just ended.
            self._process.communicate()

    def read_document(self) -> Any:
        """Return the next document that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client has ended"
        return json.loads(line)

    def end(self) -> list[Any]:
        """Close its standard input; return the documents that it prints until it ends."""
        out, _none = self._process.communicate(timeout=TIMEOUT)
        return [json.loads(line) for line in out.splitlines()]


def exchanged(answer: dict[str, Any]) -> Exchanged:
    """Return an agent's answer to an exchange."""
    return Exchanged([base64.b64decode(data) for data in answer["received"]], answer["closed"], answer["seconds"])


def from_host(
    path: Path, *steps: list[Any], become: Sequence[str] = (), how: str = "self", socket_path: str | None = None
) -> Exchanged:
    """Perform an exchange from a process of the host, in no container."""
    command = {
        "do": "exchange",
        "steps": list(steps),
        "socket": socket_path or str(path),
        "become": list(become),
        "how": how,
    }
    answer = agent.in_child(command)
    assert "error" not in answer, answer["error"]
    return exchanged(answer)


def ask_from_host(path: Path, target: str, method: str = "GET", become: Sequence[str] = ()) -> Response:
    """Send one request from a process of the host; return its response."""
    return from_host(path, send(request(target, method)), receive(1, method), become=become).responses[0]
