"""One request, answered: the application is called, its response is sent, and perhaps kept to be sent again."""

from __future__ import annotations

import io
import logging
import time
from typing import Any, cast

from guestapi.callers.identify import Caller
from guestapi.http.body import Body
from guestapi.http.errors import ProtocolError
from guestapi.http.request import Head
from guestapi.http.response import date_line, response_end, response_fields
from guestapi.notifications.waiting import Waiter
from guestapi.server.context import WorkerContext
from guestapi.server.exchange import Exchange
from guestapi.server.response_cache import CallerCache
from guestapi.server.sendfile import send_content
from guestapi.server.transport import Transport
from guestapi.wsgi import (
    CALLER,
    DIALECT,
    HANDOVER,
    RAW_PATH,
    WAIT,
    ChangedFileError,
    Content,
    Environ,
    Handover,
    Headers,
)

log = logging.getLogger(__name__)

#: From this size on, in bytes, a response is refused to an instance that leaves too much unread.
_LARGE_CONTENT = 65536

_NO_BODY = io.BytesIO()


def answer(
    context: WorkerContext,
    transport: Transport,
    head: Head,
    caller: Caller,
    dialect: str,
    cache: CallerCache | None,
    *,
    limited: bool,
    began: float | None = None,
) -> bool | Handover | Waiter:
    """Answer one request.

    Args:
        context: the worker's.
        transport: of its connection.
        head: the request's. Its body is still to be read.
        caller: who asks.
        dialect: name of the listening socket's dialect.
        cache: of the caller; None if nothing is kept for it.
        limited: whether limits apply: not to the worker's own probe.
        began: when the request came, in seconds of the monotonic clock; None: now.

    Returns:
        Whether another request may follow; the stream that the connection becomes; or for what the request waits.

    Raises:
        ProtocolError: the request is refused.
        DeadlineError: the client did not accept the response in time.
        OSError: the connection is lost.
    """
    began = began or time.monotonic()
    environ = cast("Environ", head.environ)
    environ.update(context.environ)
    environ[CALLER] = caller
    environ[DIALECT] = dialect
    body: Body | None = None
    if head.length == 0:
        environ["wsgi.input"] = _NO_BODY
    else:
        most = context.limits.body
        if head.length is not None and head.length > most:
            raise ProtocolError(413, f"the body is larger than {most} bytes")
        transport.set_deadline(context.limits.body_seconds)
        environ["wsgi.input"] = body = Body(transport, head.length, most, head.expects)
    status: str
    headers: Headers
    content: bytes | Content
    status, headers, content = "200 OK", [("Content-Length", "0")], b""
    if environ[RAW_PATH] != "*" or environ["REQUEST_METHOD"] != "OPTIONS":
        status, headers, content = _call_application(context, environ)
    try:
        handover = environ.pop(HANDOVER, None)
        if handover is not None:
            seconds = time.monotonic() - began
            context.on_exchange(Exchange(environ, caller, dialect, handover.status, [], 0, seconds))
            return handover
        waiter = environ.pop(WAIT, None)
        if waiter is not None:
            return waiter
        close = _ends(context, head, environ, body)
        protocol = environ["SERVER_PROTOCOL"]
        fields = response_fields(status, headers, protocol)
        end = response_end(protocol, close=close)
        sent = _send(context, transport, b"".join((fields, date_line(), end)), content, caller if limited else None)
        exchange = Exchange(environ, caller, dialect, status, headers, sent, time.monotonic() - began)
        context.on_exchange(exchange)
        request = head.alone
        if (
            request is not None
            and cache is not None
            and isinstance(content, bytes)
            and not close
            and cache.seen.add(request)
        ):
            context.cache.put(cache, request, exchange, fields, end + content)
        return not close
    finally:
        if isinstance(content, Content):
            content.close()


def _call_application(context: WorkerContext, environ: Environ) -> tuple[str, Headers, bytes | Content]:
    """Get the whole response, or its length: nothing is sent before the response is known to be complete."""
    started: list[Any] = []

    def start_response(status: str, headers: Headers, _exc_info: object = None) -> None:
        started[:] = status, headers

    chunks = context.application(environ, start_response)
    if isinstance(chunks, Content):
        return started[0], started[1], chunks
    content = chunks[0] if isinstance(chunks, list) and len(chunks) == 1 else b"".join(chunks)
    return started[0], started[1], content


def _ends(context: WorkerContext, head: Head, environ: Environ, body: Body | None) -> bool:
    """Finish the request's body; tell whether the connection ends after the response."""
    # CONNECT would make a tunnel of the connection (RFC 9110, section 9.3.6), so nothing after it is a request.
    close = not head.keep_alive or context.stopping or environ["REQUEST_METHOD"] == "CONNECT"
    if body is not None:
        if body.failure is not None:
            # The application has read only a part of the body, so its response does not count.
            raise body.failure
        close = close or not _skip_rest(body)
    return close


def _send(
    context: WorkerContext, transport: Transport, prefix: bytes, content: bytes | Content, limited: Caller | None
) -> int:
    """Send a response.

    Args:
        context: the worker's.
        transport: of the connection.
        prefix: its head.
        content: its body.
        limited: who asked, if limits apply.

    Returns:
        Bytes of the body.
    """
    if isinstance(content, Content):
        transport.send(prefix)
        try:
            # Each time the client accepts some of it, it has ``send_seconds`` again.
            send_content(transport, content, context.limits.send_seconds, context.disk.apply)
        except ChangedFileError as error:
            # The head was sent. The missing end tells the client that the file is useless.
            log.error("%s", error)
            raise
        return content.length
    if len(content) > _LARGE_CONTENT and limited is not None:
        # Many requests may have passed the check before any of them had its large value.
        context.admission.check_unsent(limited.instance_id, root=limited.is_root)
    transport.send(prefix, content)
    return len(content)


def _skip_rest(body: Body) -> bool:
    """Read what the application left of a body; return whether another request may follow it."""
    if body.untouched:
        return False
    try:
        body.drain()
    except ProtocolError:
        # The response did not depend on it.
        return False
    return True
