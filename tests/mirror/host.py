"""A daemon with its mirror and a service, and programs in a container that use both sockets."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from queue import SimpleQueue
from typing import Any

from guestapi.dialects import DIALECTS
from guestapi.model import Instance
from guestapi.store.lookup import find_instance
from guestapi.store.view import view
from tests.harness.containers import Response
from tests.harness.daemon import Daemon
from tests.harness.mirroring import OURS, MirrorProcess
from tests.harness.service import Service
from tests.harness.waiting import TIMEOUT, until


class MirrorHost:
    """A daemon, its mirror, and a service."""

    def __init__(self, daemon: Daemon, service: Service, mirror: MirrorProcess) -> None:
        self.daemon = daemon
        self.service = service
        self.mirror = mirror
        self.theirs = f"{DIALECTS[daemon.kind].directory}/sock"

    def ask(self, name: str, path: str, *, method: str = "GET", body: str = "", project: str = "default") -> Response:
        """Send a request to guestapi."""
        return self.daemon.ask(name, path, OURS, method=method, body=body, project=project, entered=True)

    def ask_daemon(self, name: str, path: str, *, method: str = "GET", body: str = "") -> Response:
        """Send a request to the daemon, which looks for the exec session that the caller belongs to."""
        return self.daemon.ask(name, path, self.theirs, method=method, body=body)

    def set(self, name: str, key: str, value: str) -> None:
        """Set a key at the daemon by its API: its client's start takes three times as long."""
        self.daemon.query(f"/1.0/instances/{name}", "PATCH", {"config": {key: value}})

    def instance(self, name: str, project: str = "default") -> Instance | None:
        """Return an instance from the store, or None."""
        with view(self.service.settings.store.url) as store:
            return find_instance(store, project, name)

    def until(self, name: str, path: str, text: str, project: str = "default") -> None:
        """Wait until guestapi answers with this text."""
        until(lambda: self.ask(name, path, project=project).text == text, f"{name}: {path} is {text!r}")

    def wait(self, what: Callable[[], object]) -> None:
        """Poll until a condition holds."""
        until(what, lambda: self.service.log.read_text()[-4000:], pause=0.02)

    def settle(self, name: str) -> None:
        """Wait until the stored configuration and devices equal the daemon's."""

        def same() -> bool:
            wanted, known = self.daemon.query(f"/1.0/instances/{name}"), self.instance(name)
            assert known is not None
            keys = {key: value for key, value in wanted["expanded_config"].items() if key.startswith("user.")}
            return wanted["expanded_devices"] == known.devices and keys == {
                key: value for key, value in known.config.items() if key.startswith("user.")
            }

        self.wait(same)

    def shows(self, name: str, status: str) -> bool:
        """Return whether the daemon reports this status of an instance."""
        return self.status(name) == status

    def status(self, name: str) -> str:
        """Return the status of an instance according to the daemon."""
        status: str = self.daemon.query(f"/1.0/instances/{name}")["status"]
        return status

    def findings(self) -> list[dict[str, Any]]:
        """Return the findings of `guestapi check`."""
        found: list[dict[str, Any]] = json.loads(self.service.command("check", "--format", "json", check=False).stdout)
        return found

    @contextmanager
    def launched(self, name: str, *words: str, project: str = "default") -> Iterator[None]:
        """Run a container for the length of the block."""
        self.daemon.client("--project", project, "launch", "busybox", name, *words)
        try:
            yield
        finally:
            self.daemon.client("--project", project, "delete", "--force", name, check=False)


class ContainerShell:
    """A shell in a container, for use while the daemon does not run."""

    def __init__(self, host: MirrorHost, name: str) -> None:
        enter = ["nsenter", "-t", str(host.daemon.init(name)), "-a", "--setuid", "0", "--setgid", "0", "--"]
        self._process = subprocess.Popen(
            [*enter, "/bin/sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def __enter__(self) -> ContainerShell:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.communicate()

    def ask(self, path: str) -> str:
        """Return the body of guestapi's response, which must be one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"curl -s --max-time 20 --unix-socket {OURS} http://x{path}; echo\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


class Heard:
    """The events that a program in a container receives from one socket."""

    def __init__(self, host: MirrorHost, name: str, socket: str) -> None:
        self._process = host.daemon.listen(name, socket)
        self._lines: SimpleQueue[str] = SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Heard:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def next(self, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Return the next event; raise queue.Empty if there is none."""
        event: dict[str, Any] = json.loads(self._lines.get(timeout=timeout))
        return event

    def until(self, key: str, value: str) -> list[tuple[str, Any]]:
        """Return type and metadata of the events up to the one that gives a key this value, in order of time."""
        events = [self.next()]
        while (events[-1]["metadata"].get("key"), events[-1]["metadata"].get("value")) != (key, value):
            events.append(self.next())
        events.sort(key=lambda event: (datetime.fromisoformat(event["timestamp"]), event["timestamp"]))
        return [(event["type"], event["metadata"]) for event in events]
