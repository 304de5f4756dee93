"""A simulated LXC: inits in PID namespaces, and monitors that answer for them."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from guestapi.sources.lxc import monitor
from tests.harness.agent import CLONE_NEWPID, unshare
from tests.harness.following import install_hook
from tests.harness.service import Service
from tests.harness.waiting import TIMEOUT

#: The monitor's answers about its container's configuration.
_CONFIG = {b"lxc.hook.start-host": b"/opt/guestapi/bin/guestapi-hook lxc"}


class PlayedContainer:
    """A PID 1 that sends a request to the service when the test tells it to."""

    def __init__(self, socket_path: Path) -> None:
        """Start a process.

        Args:
            socket_path: the service's socket; the file system is the host's.
        """
        self._ours, theirs = socket.socketpair()
        self._parent = os.fork()
        if self._parent == 0:
            self._ours.close()
            try:
                self._become(socket_path, theirs)
            finally:
                os._exit(1)
        theirs.close()
        self.pid = int(self._ours.recv(20))

    def _become(self, path: Path, control: socket.socket) -> None:
        unshare(CLONE_NEWPID)
        child = os.fork()
        if child:
            control.send(str(child).encode())
            os.waitpid(child, 0)
            os._exit(0)
        while control.recv(1):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(b"GET /1.0/config/user.name HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answer = b""
                while part := connection.recv(4096):
                    answer += part
            control.sendall(answer.split(b" ")[1])
        os._exit(0)

    def ask(self) -> None:
        """Let it send a request."""
        self._ours.send(b"x")

    def status(self) -> int:
        """Return the status of the response."""
        self._ours.settimeout(TIMEOUT)
        return int(self._ours.recv(3))

    def end(self) -> None:
        """End it, and wait until its parent has reaped it."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has ended by itself.
        os.waitpid(self._parent, 0)
        self._ours.close()


class PlayedLxc:
    """An lxcpath with running containers, as a follower sees it."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.path = service.root / "lxc"
        self.path.mkdir(exist_ok=True)
        self.containers: dict[str, PlayedContainer] = {}
        self._listeners: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._ended = False
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> PlayedLxc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in list(self.containers):
            self.end(name)
        self._ended = True
        self._thread.join()

    def start(self, name: str) -> PlayedContainer:
        """Start a container and its monitor, without running its hook."""
        (self.path / name).mkdir(exist_ok=True)
        container = PlayedContainer(self._service.socket)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(b"\0" + monitor.address(str(self.path), name))
        listener.listen()
        self.containers[name], self._listeners[name] = container, listener
        self._selector.register(listener, selectors.EVENT_READ, name)
        return container

    def end(self, name: str) -> None:
        """End a container and its monitor."""
        self._selector.unregister(self._listeners[name])
        self._listeners.pop(name).close()
        self.containers.pop(name).end()

    def hook(self, name: str, command: list[str | Path] | None = None) -> subprocess.Popen[str]:
        """Run the container's hook as LXC does."""
        if command is None:
            command = [install_hook(self._service.root), "--config", self._service.config, "lxc"]
        return subprocess.Popen(command, env=self.environ(name), stderr=subprocess.PIPE, text=True)

    def environ(self, name: str) -> Mapping[str, str]:
        """Return the environment of LXC's hook."""
        kind = {"LXC_HOOK_TYPE": "start-host", "LXC_HOOK_VERSION": "1"}
        return {"LXC_NAME": name, "LXC_PID": str(self.containers[name].pid), **kind}

    def _serve(self) -> None:
        while not self._ended:
            for key, _events in self._selector.select(0.05):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    connection, _address = key.fileobj.accept()
                except OSError:
                    continue
                with connection:
                    connection.settimeout(1)
                    try:
                        self._answer(connection, key.data)
                    except OSError:
                        pass  # The client has only tested whether the monitor listens.

    def _answer(self, connection: socket.socket, name: str) -> None:
        head = connection.recv(16)
        if len(head) != 16:
            return
        command, length, _pointer = struct.unpack("@iiQ", head)
        asked = connection.recv(length).rstrip(b"\0") if length else b""
        container = self.containers.get(name)
        if command == 4 and container is not None:
            connection.sendall(struct.pack("@iiQ", 0, 0, container.pid))
        else:
            value = _CONFIG.get(asked, b"")
            connection.sendall(struct.pack("@iiQ", 0, len(value), 0) + value)
