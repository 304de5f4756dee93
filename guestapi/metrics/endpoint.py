"""Answers a monitoring system: ``/metrics``, ``/healthz`` and ``/readyz``, on sockets of the host.

It is a process of its own: what it costs and what it imports is not the workers', and whoever asks it asks no worker.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gevent
from gevent import pywsgi
from gevent.event import Event
from gevent.pool import Pool
from gevent.socket import socket as gevent_socket
from gevent.timeout import with_timeout
from prometheus_client import CONTENT_TYPE_LATEST

from guestapi import systemd
from guestapi.errors import OperatorError
from guestapi.metrics.exposition import write_metrics
from guestapi.metrics.handover import ReportDirectory
from guestapi.metrics.health import find_failure, find_fault
from guestapi.settings import Settings

#: The most connections at a time, and the most seconds of each: local users may connect to a loopback port.
_MOST_CONNECTIONS = 64
_CONNECTION_SECONDS = 10.0
_BACKLOG = 16
_TEXT = "text/plain; charset=utf-8"

WsgiApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class BoundedHandler(pywsgi.WSGIHandler):
    """A connection that ends after some seconds, whatever its client does."""

    def handle(self) -> None:
        """As of gevent's class."""
        with_timeout(_CONNECTION_SECONDS, super().handle, timeout_value=None)


def make_application(settings: Settings) -> WsgiApplication:
    """The WSGI application that answers.

    Args:
        settings: where the reports and the store are.
    """
    reports, url = ReportDirectory(Path(settings.metrics.directory)), settings.store.url

    def health(fault: str | None) -> tuple[str, str, bytes]:
        if fault is None:
            return "200 OK", _TEXT, b"ok\n"
        return "503 Service Unavailable", _TEXT, f"{fault}\n".encode()

    routes: dict[str, Callable[[], tuple[str, str, bytes]]] = {
        "/metrics": lambda: ("200 OK", CONTENT_TYPE_LATEST, write_metrics(reports, url)),
        "/healthz": lambda: health(find_failure(reports.read())),
        "/readyz": lambda: health(find_fault(reports.read(), url)),
    }

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        route = routes.get(environ["PATH_INFO"])
        if route is None:
            status, kind, body = "404 Not Found", _TEXT, b"there are /metrics, /healthz and /readyz\n"
        elif environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", _TEXT, b"GET is needed\n"
        else:
            status, kind, body = route()
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return application


def serve(settings: Settings, paths: Sequence[Path] = ()) -> None:
    """Answer until told to stop.

    Args:
        settings: where the reports and the store are.
        paths: of sockets to make, mode 0660; sockets from systemd win over them.

    Raises:
        OperatorError: there is no socket, or one cannot be made.
    """
    activated = systemd.activated()
    sockets = [gevent_socket(fileno=number) for number in systemd.descriptors(activated)]
    if not activated:
        sockets = [_bind(path) for path in paths]
    if not sockets:
        raise OperatorError(
            "there is no socket to listen on", "'systemctl start guestapi-metrics.socket', or give --socket PATH"
        )
    application, pool = make_application(settings), Pool(_MOST_CONNECTIONS)
    servers = [
        pywsgi.WSGIServer(one, application, spawn=pool, log=None, handler_class=BoundedHandler) for one in sockets
    ]
    stopped = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopped.set)
    for server in servers:
        server.start()
    systemd.notify("READY=1")
    stopped.wait()
    for server in servers:
        server.stop(timeout=1)
    if not activated:
        for path in paths:
            path.unlink(missing_ok=True)


def _bind(path: Path) -> gevent_socket:
    listening = gevent_socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        path.chmod(0o660)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise OperatorError(f"{path}: cannot be bound: {error.strerror}") from None
    return listening
