"""Notifications of systemd."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from guestapi import systemd


@pytest.fixture
def notified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that systemd would read."""
    path = tmp_path / "notify"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind(str(path))
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield sock


def test_all_fields_are_one_message(notified: socket.socket) -> None:
    """Each field has a line."""
    systemd.notify("READY=1", "STATUS=fine")
    assert notified.recv(100) == b"READY=1\nSTATUS=fine"


def test_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that begins with @ is one in the abstract namespace (unix(7))."""
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.bind("")
        name = sock.getsockname()
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name[1:].decode())
        systemd.notify("READY=1")
        assert sock.recv(100) == b"READY=1"


def test_without_systemd(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without the variable nothing happens, and with a socket that is gone the log says so."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    assert caplog.records == []
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    systemd.notify("READY=1")
    assert "systemd was not told READY=1: " in caplog.text


def fill(path: str) -> None:
    """Send until the queue of the socket at `path` is full, from many sockets, each of which may have little unread."""
    sent = 1
    while sent:
        sent = 0
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
            sock.setblocking(False)
            try:
                while True:
                    sock.sendto(b"full", path)
                    sent += 1
            except BlockingIOError:
                pass


@pytest.mark.timeout(60)
def test_systemd_that_does_not_read(notified: socket.socket, caplog: pytest.LogCaptureFixture) -> None:
    """A systemd that hangs keeps nobody from going on."""
    fill(notified.getsockname())
    with caplog.at_level(logging.WARNING):
        systemd.notify("WATCHDOG=1")
    assert "systemd was not told WATCHDOG=1: timed out" in caplog.text


def test_what_a_start_waits_for(notified: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A systemd that is busy for longer than other messages wait still gets READY=1."""
    monkeypatch.setattr(systemd, "_OTHER_SECONDS", 0.001)
    fill(notified.getsockname())
    telling = Thread(target=systemd.notify, args=("READY=1",))
    telling.start()
    telling.join(0.2)
    assert telling.is_alive()
    while notified.recv(100) != b"READY=1":
        pass
    telling.join()
