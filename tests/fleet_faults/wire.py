"""A network between a host and the servers of its fleet, which can be slow, silent, cut, and cut again and again."""

from __future__ import annotations

import random
import selectors
import socket
import time
from collections import deque
from contextlib import suppress
from threading import Thread

#: Bytes that are read at a time.
_PIECE = 4096


class _Way:
    """One direction of a connection: what was read from `source`, and when it may be written to `target`."""

    def __init__(self, source: socket.socket, target: socket.socket, *, answers: bool) -> None:
        self.source, self.target, self.answers = source, target, answers
        self.pieces: deque[tuple[float, bytes]] = deque()


class Wire:
    """Passes connections at ports of its own on to Unix sockets of servers. Its modes may be set at any time.

    Attributes:
        delay: most seconds by which each piece is late; later ones never overtake it.
        silent: nothing passes, and no connection ends.
        mute: no answer passes, and no connection ends.
        mute_after: `mute` begins when questions with these bytes have passed, in this order.
        cut_bytes: each connection is cut after about so many bytes; None: never.
    """

    def __init__(self, servers: list[str]) -> None:
        """Listen.

        Args:
            servers: the paths of their sockets.
        """
        self.delay = 0.0
        self.silent = self.mute = False
        self.mute_after: list[bytes] = []
        self.cut_bytes: int | None = None
        self.cuts = 0
        self._open = True
        self._ended = False
        self._servers = servers
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _server in servers]
        self.ports = [one.getsockname()[1] for one in self._listeners]
        self._selector = selectors.DefaultSelector()
        for listener, server in zip(self._listeners, servers, strict=True):
            self._selector.register(listener, selectors.EVENT_READ, server)
        self._ways: list[_Way] = []
        self._left: dict[socket.socket, int] = {}
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End everything."""
        self._ended = True
        self._thread.join()
        for way in list(self._ways):
            self._end(way)
        for listener in self._listeners:
            listener.close()

    def cut(self) -> None:
        """End all connections, and take no new one."""
        self._open = False

    def mend(self) -> None:
        """Pass everything on from now on. Connections in which something was kept back are cut."""
        silenced = self.silent or self.mute
        self.delay, self.cut_bytes = 0.0, None
        if silenced:
            self._open = False
            while self._ways:
                time.sleep(0.01)
        self.silent = self.mute = False
        self._open = True

    def _run(self) -> None:
        while not self._ended:
            # What is late is waited for, and otherwise what the modes are.
            late = any(way.pieces for way in self._ways) and not self.silent
            for key, _events in self._selector.select(0.005 if late else 0.1):
                if isinstance(key.data, _Way):
                    self._read(key.data)
                else:
                    self._accept(key.fileobj, key.data)  # type: ignore[arg-type]
            if not self._open:
                for way in list(self._ways):
                    self._end(way)
            for way in list(self._ways):
                self._write(way)

    def _accept(self, listener: socket.socket, server: str) -> None:
        host, _address = listener.accept()
        if not self._open:
            host.close()
            return
        ours = socket.socket(socket.AF_UNIX)
        try:
            ours.connect(server)
        except OSError:
            host.close()
            ours.close()
            return
        host.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.cut_bytes is not None:
            self._left[host] = random.randrange(2 * self.cut_bytes)
        for way in (_Way(host, ours, answers=False), _Way(ours, host, answers=True)):
            self._ways.append(way)
            self._selector.register(way.source, selectors.EVENT_READ, way)

    def _read(self, way: _Way) -> None:
        if way not in self._ways:
            return
        try:
            piece = way.source.recv(_PIECE)
        except OSError:
            piece = b""
        if not piece:
            self._end(way)
            return
        if not way.answers and self.mute_after and self.mute_after[0] in piece:
            del self.mute_after[0]
            self.mute = not self.mute_after
        due = time.monotonic() + random.uniform(0, self.delay)
        way.pieces.append((max(due, way.pieces[-1][0]) if way.pieces else due, piece))

    def _write(self, way: _Way) -> None:
        while way.pieces and way in self._ways and not self.silent and not (self.mute and way.answers):
            due, piece = way.pieces[0]
            if due > time.monotonic():
                return
            host = way.target if way.answers else way.source
            left = self._left.get(host)
            if left is not None:
                self._left[host] = left - len(piece)
                if left < len(piece):
                    piece = piece[:left]
            with suppress(OSError):
                way.target.sendall(piece)
            way.pieces.popleft()
            if left is not None and self._left[host] < 0:
                self.cuts += 1
                self._end(way)

    def _end(self, way: _Way) -> None:
        """End both directions."""
        for one in [one for one in self._ways if {one.source, one.target} == {way.source, way.target}]:
            self._ways.remove(one)
            self._left.pop(one.source, None)
            with suppress(KeyError, ValueError):
                self._selector.unregister(one.source)
        for end in (way.source, way.target):
            end.close()
