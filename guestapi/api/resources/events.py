"""``/1.0/events``: what changes, as it changes."""

from __future__ import annotations

from collections.abc import Callable

import falcon

from guestapi.api.encoding import JSON
from guestapi.api.errors import NOSNIFF, NotAuthorized, Refusal, TooManyStreams
from guestapi.api.gate import Gate
from guestapi.api.handover import HANDOVER, Handover
from guestapi.api.handshake import accept, form_of, since_of, types_of
from guestapi.callers.identify import Caller
from guestapi.http.websocket import CloseCode
from guestapi.notifications.broker import Broker, TooManyListenersError
from guestapi.notifications.events import Form

#: When to come back who has too many: streams last, and so does their being too many.
_RETRY_SECONDS = 10


class Events:
    """``GET /1.0/events``: a WebSocket, server-sent events, or one JSON document a line."""

    def __init__(self, broker: Broker, gate: Gate) -> None:
        """Args:
        broker: where to listen.
        gate: the gate that let the request through; it is asked again while the stream lasts.
        """
        self._broker = broker
        self._gate = gate

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Register a listener, and hand the connection over."""
        form = form_of(req.env)
        if req.method == "HEAD":
            resp.content_type = JSON
            resp.set_headers(NOSNIFF)
            return
        if form is Form.WEBSOCKET:
            status = "101 Switching Protocols"
            headers = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accept(req.env))]
        else:
            status = "200 OK"
            kind = JSON if form is Form.LINES else "text/event-stream"
            headers = [("Connection", "close"), ("Content-Type", kind), *NOSNIFF.items()]
            if form is Form.SERVER_SENT:
                headers.append(("Cache-Control", "no-store"))
        try:
            caller: Caller = req.env["guestapi.caller"]
            assert caller.init is not None, "admitted by the gate"
            listener = self._broker.subscribe(
                req.context.instance.id,
                types_of(req.query_string),
                since_of(req.env, form),
                self._may(caller),
                caller.init.alive,
            )
        except TooManyListenersError:
            raise TooManyStreams(_RETRY_SECONDS) from None
        req.env[HANDOVER] = Handover(status, tuple(headers), form, listener)

    def _may(self, caller: Caller) -> Callable[[], int | None]:
        # Bound to what the gate wants to know, not to the request, which is let go of after the hand-over.
        gate = self._gate

        def may() -> int | None:
            try:
                gate.admit(caller, "GET", "/1.0/events")
            except NotAuthorized:
                return CloseCode.POLICY_VIOLATION
            except Refusal:
                return CloseCode.GOING_AWAY
            return None

        return may
