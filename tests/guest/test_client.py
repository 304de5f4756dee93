"""`guestapi.client` in a real container, blocking and with asyncio: values, and events during a restart."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestapi.client import AsyncGuest, Guest, GuestError, HostRefusedError, HostUnavailableError
from tests.guest.test_guestctl import RawServer, answer
from tests.harness.containers import Container
from tests.harness.machine import CHECKOUT
from tests.harness.service import Service


@contextmanager
def touring(container: Container, kind: str, path: str) -> Iterator[Iterator[dict[str, object]]]:
    """Run client_tour.py in the container; yield the documents that it prints."""
    enter = ["nsenter", "-t", str(container.pid), "-a", f"--wd={CHECKOUT}"]
    words = [sys.executable, "-m", "tests.guest.client_tour", kind, path]
    with subprocess.Popen([*enter, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield map(json.loads, process.stdout)
        finally:
            process.stdin.close()


@pytest.mark.root
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_tour(kind: str) -> None:
    """The values equal the API's, and the watch loses no change during a restart of the service."""
    devices = {"root": {"type": "disk", "path": "/"}}
    with (
        Service(workers=1) as service,
        service.container("tour", {"user.key": "värde"}, devices, base=None) as container,
        touring(container, kind, "/dev/incus/sock") as lines,
    ):
        assert next(lines) == {
            "config": {"user.key": "värde"},
            "absent": ["KeyError", "TimeoutError"],
            "devices": devices,
            "metadata": container.ask("/1.0/meta-data").text,
            "state": "Ready",
            "waited": "värde",
        }
        # The watch begins after the first line; from its first event on, the test makes the changes one by one.
        first = threading.Event()

        def change() -> None:
            for number in itertools.count():
                if first.is_set():
                    return
                service.configure("tour", user_key=str(number))

        changing = threading.Thread(target=change)
        changing.start()
        next(lines)
        first.set()
        changing.join()
        service.stop()
        service.configure("tour", user_key="while away")
        service.start()
        service.configure("tour", user_key="last")
        values = []
        for line in lines:
            metadata = line["metadata"]
            assert isinstance(metadata, dict)
            values.append(metadata["value"])
            if values[-1] == "last":
                break
        assert values[-2:] == ["while away", "last"]


@pytest.mark.parametrize("status", ["403 Forbidden", "429 Too Many Requests"])
def test_refusal(tmp_path: Path, status: str) -> None:
    """A refusal is raised at once, with the response's text and status."""
    stub = RawServer(tmp_path / "sock", *2 * [answer(status, "because\n", Retry_After="60")])
    with Guest(stub.path) as guest, pytest.raises(HostRefusedError, match=r"^because$") as refused:
        len(guest.config)
    assert refused.value.status == int(status[:3])
    with pytest.raises(GuestError, match=r"^because$"):
        asyncio.run(AsyncGuest(stub.path).config())
    stub.close()


def test_missing_socket(tmp_path: Path) -> None:
    """If nothing listens at the socket, each method fails after the timeout with an error that names the socket."""
    path = str(tmp_path / "sock")
    with Guest(path, timeout=0.1) as guest:
        for call in (guest.state, guest.ready, lambda: guest.wait("user.key", 1), lambda: next(guest.watch())):
            with pytest.raises(HostUnavailableError, match=path):
                call()
    with pytest.raises(HostUnavailableError, match=path):
        asyncio.run(AsyncGuest(path, timeout=0.1).state())


def test_temporary_failures(tmp_path: Path) -> None:
    """After a server error or an incomplete response, the request is repeated."""
    good = answer("200 OK", '["/1.0/config/user.a"]')
    stub = RawServer(tmp_path / "sock", answer("500 Internal Server Error", "later\n"), good[:-3], good)
    with Guest(stub.path) as guest:
        assert next(iter(guest.config)) == "user.a"
    stub.close()
