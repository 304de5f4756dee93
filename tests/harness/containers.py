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

HERE = Path(__file__).parent

#: Which host UID is root in a container that says nothing else.
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
    """What came back in an exchange: raw bytes of each ``receive``, whether the server closed, seconds in all."""

    received: list[bytes]
    closed: bool
    seconds: float

    @property
    def responses(self) -> list[Response]:
        """All responses, parsed."""
        return [response for data in self.received for response in parse(data)]


@dataclass(frozen=True)
class Ran:
    """A program that ran inside."""

    code: int
    out: str
    err: str


def parse(data: bytes, method: str = "GET") -> list[Response]:
    """Responses in the bytes of a connection; they must have a Content-Length, end with the bytes, or be of HEAD."""
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
    """An exchange's step: send bytes."""
    return ["send", base64.b64encode(data).decode()]


def receive(count: int = 1, method: str = "GET", patience: float = 10) -> list[Any]:
    """An exchange's step: receive so many responses to that method."""
    return ["receive", count, method, patience]


def request(path: str, method: str = "GET", body: bytes = b"") -> bytes:
    """A request's bytes."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{length}\r\n".encode() + body


class Container:
    """A container that runs until the end of its ``with`` block. `pid` is its init, as the host sees it."""

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
            binds: host directories and where they are mounted inside.
            base: which host UID is root inside; None: no user namespace, a privileged container.
            hostname: its name inside.
            enter: words before the launcher's command, to start it in other namespaces; `pid` is as seen from there.
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
        """The PID of the process that has started it, which is our child."""
        return self._launcher.pid

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it, as by a power cut: nobody is told."""
        if self._launcher.poll() is None:
            if not self._enter:
                try:
                    os.kill(self.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # It has ended by itself, and its launcher is about to.
            # Its init ends with its standard input, at the latest.
            for pipe in (self._launcher.stdin, self._launcher.stdout):
                assert pipe is not None
                pipe.close()
            self._launcher.wait(10)

    def command(self, **command: Any) -> dict[str, Any]:
        """Have the agent do something (see agent.py)."""
        assert self._launcher.stdin is not None
        assert self._launcher.stdout is not None
        self._launcher.stdin.write(json.dumps(command).encode() + b"\n")
        self._launcher.stdin.flush()
        answer: dict[str, Any] = json.loads(self._launcher.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def change_init(self, *become: str) -> None:
        """Have PID 1 itself become something else: ``uid:1000``, ``userns``, ``pidns``. Commands work as before."""
        self.command(do="change init", become=list(become))

    def exchange(
        self, *steps: list[Any], socket: str = "/dev/incus/sock", become: Sequence[str] = (), how: str = "self"
    ) -> Exchanged:
        """Exchange bytes with the service from inside."""
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
        """One request from inside, and its response."""
        steps = [send(request(path, method, body)), receive(1, method)]
        (response,) = parse(self.exchange(*steps, socket=socket, become=become, how=how).received[0], method)
        return response

    def run(self, *argv: str, stdin: bytes = b"", become: Sequence[str] = (), timeout: float = 60) -> Ran:
        """Run a program inside."""
        answer = self.command(
            do="run", argv=argv, input=base64.b64encode(stdin).decode(), become=list(become), timeout=timeout
        )
        out, err = (base64.b64decode(answer[name]).decode() for name in ("out", "err"))
        return Ran(answer["code"], out, err)

    def listening(self, kind: str, argument: str) -> Listening:
        """A client of the event stream inside (see listening.py), for the length of a ``with`` block."""
        return Listening(self.pid, kind, argument, self._enter)


class Listening:
    """A running listening.py."""

    def __init__(self, pid: int, kind: str, argument: str, around: Sequence[str] = ()) -> None:
        enter = [*around, "nsenter", "-t", str(pid), "-a", "--setuid", "0", "--setgid", "0"]
        path = f"PYTHONPATH={HERE.parents[1]}:{sysconfig.get_path('purelib')}"
        self._process = subprocess.Popen(
            [*enter, "env", path, "/usr/bin/python3", str(HERE / "listening.py"), kind, argument],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Listening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            # nsenter's child is what listens. Killed first, it is reaped by nsenter; as an orphan it would be left to
            # the host's PID 1, and its container could not end before that has looked.
            pid = self._process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children or [str(pid)]:
                try:
                    os.kill(int(child), signal.SIGKILL)
                except ProcessLookupError:
                    pass  # It has just ended.
            self._process.communicate()

    def say(self) -> Any:
        """The next document that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the client has ended"
        return json.loads(line)

    def end(self) -> list[Any]:
        """End its standard input; what it prints until it ends."""
        out, _none = self._process.communicate(timeout=30)
        return [json.loads(line) for line in out.splitlines()]


def exchanged(answer: dict[str, Any]) -> Exchanged:
    """An agent's answer to an exchange."""
    return Exchanged([base64.b64decode(data) for data in answer["received"]], answer["closed"], answer["seconds"])


def from_host(
    path: Path, *steps: list[Any], become: Sequence[str] = (), how: str = "self", socket_path: str | None = None
) -> Exchanged:
    """The same exchange by a process on the host, in no container."""
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
    """One request by a process on the host."""
    return from_host(path, send(request(target, method)), receive(1, method), become=become).responses[0]
