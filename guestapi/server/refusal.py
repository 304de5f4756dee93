"""What the server itself refuses: the answer, and a while in which the client can read it."""

from __future__ import annotations

import socket

from guestapi.callers.identify import Caller
from guestapi.http.response import error_response
from guestapi.server.context import WorkerContext
from guestapi.server.transport import DeadlineError, Transport

#: Seconds that a refused client's input is read on, as with Go's net/http.
_LINGER_SECONDS = 0.5
#: How many times it is read at most.
_LINGER_READS = 32


def refuse(
    context: WorkerContext,
    transport: Transport,
    caller: Caller | None,
    dialect: str,
    status: int,
    text: str,
    limit: str | None = None,
    *,
    linger: bool = True,
) -> None:
    """Answer what cannot be served. The connection ends after that.

    Args:
        context: the worker's.
        transport: of the connection.
        caller: who asked; None if that is not known.
        dialect: name of the listening socket's dialect.
        status: of the response.
        text: one line for the client.
        limit: name of the exceeded limit; None if there is none.
        linger: whether to read on, so that a client that still sends can read the response first.
    """
    context.on_refusal(caller, dialect, status, text, limit)
    try:
        transport.send(error_response(status, text, retry_after=status == 429))
        # If the socket were closed with unread input in it, the client's end of it would be reset at once.
        transport.shut_down(socket.SHUT_WR)
        transport.set_deadline(_LINGER_SECONDS)
        for _read in range(_LINGER_READS if linger else 0):
            transport.discard()
            if not transport.receive():
                break
    except (OSError, DeadlineError):
        pass  # The client does not wait for the response.


def refuse_uncounted(
    context: WorkerContext,
    transport: Transport,
    caller: Caller | None,
    dialect: str,
    status: int,
    text: str,
    limit: str | None = None,
) -> None:
    """As `refuse`, for a connection that does not count for its instance: only some of those may linger."""
    instance_id = caller.instance_id if caller else None
    quota = context.admission.quota
    lingers = quota.begin_linger(instance_id)
    try:
        refuse(context, transport, caller, dialect, status, text, limit, linger=lingers)
    finally:
        if lingers:
            quota.end_linger(instance_id)
