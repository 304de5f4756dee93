"""``/1.0/events``: the changes of an instance, as they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import falcon

from guestapi.api.errors import NOSNIFF, NotAuthorized, Refusal, TooManyStreams
from guestapi.api.gate import Gate
from guestapi.api.handshake import accept, event_format_of, since_of, types_of
from guestapi.callers.identify import Caller
from guestapi.dialects import Dialect
from guestapi.encoding import JSON
from guestapi.http.websocket import CloseCode
from guestapi.key_policy import rule_of
from guestapi.model import Instance, KeyPolicy
from guestapi.notifications.broker import Broker, TooManySubscriptionsError
from guestapi.notifications.events import EncodedEvent, EventFormat
from guestapi.switches import ATTRIBUTES
from guestapi.wsgi import CALLER, HANDOVER, QUERY, Environ, Handover

#: Seconds after which a client with too many streams may try again. Streams last, so this is long.
_RETRY_SECONDS = 10


class PolicyStore(Protocol):
    """Where it is read what a guest may hear of. `api.app.Store` implements it."""

    def instance(self, instance_id: int) -> Instance | None:
        """As `store.reading.Reader.instance`."""
        ...

    def policies_of(self, instance_id: int) -> tuple[KeyPolicy, ...]:
        """As `store.reading.Reader.policies_of`."""
        ...


class EventFeed:
    """``GET /1.0/events``: a WebSocket, server-sent events, or one JSON document a line."""

    def __init__(self, broker: Broker, gate: Gate, store: PolicyStore, dialect: Dialect) -> None:
        """Serve streams.

        Args:
            broker: where clients are subscribed.
            gate: the gate that let the request through. It decides again while the stream lasts.
            store: where it is read what holds for an instance now.
            dialect: says what a WebSocket needs.
        """
        self._dialect = dialect
        self._broker = broker
        self._gate = gate
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Subscribe the client and hand the connection over to the server.

        Raises:
            BadRequest: the handshake or the id to resume after is malformed.
            ForeignOrigin: a page of another origin opens the WebSocket.
            TooManyStreams: the instance has as many streams as it may have.
        """
        environ = cast("Environ", req.env)
        event_format = event_format_of(req.env)
        if req.method == "HEAD":
            resp.content_type = JSON
            resp.set_headers(NOSNIFF)
            return
        if event_format is EventFormat.WEBSOCKET:
            status = "101 Switching Protocols"
            dialect = self._dialect
            accepted = accept(req.env, checks_origin=dialect.checks_origin, checks_key=dialect.checks_key)
            headers = [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Accept", accepted)]
        else:
            status = "200 OK"
            content_type = JSON if event_format is EventFormat.LINES else "text/event-stream"
            headers = [("Connection", "close"), ("Content-Type", content_type), *NOSNIFF.items()]
            if event_format is EventFormat.SERVER_SENT:
                headers.append(("Cache-Control", "no-store"))
        caller = environ[CALLER]
        assert caller.init is not None, "admitted by the gate"
        query = environ.get(QUERY, "")
        try:
            subscription = self._broker.subscribe(
                req.context.instance.id,
                types_of(query),
                since_of(req.env, query),
                self._authorizer(caller),
                caller.init.alive,
                self._viewer(req.context.instance.id),
            )
        except TooManySubscriptionsError:
            raise TooManyStreams(_RETRY_SECONDS) from None
        environ[HANDOVER] = Handover(status, tuple(headers), event_format, subscription)

    def _viewer(self, instance_id: int) -> Callable[[EncodedEvent], EncodedEvent | None]:
        get_policies, get_instance = self._store.policies_of, self._store.instance

        def view(event: EncodedEvent) -> EncodedEvent | None:
            # Policies that hold when it is sent, not when it happened.
            if event.type == "attribute":
                instance = get_instance(instance_id)
                return event if instance is not None and ATTRIBUTES in instance.allowed else None
            if not (policies := get_policies(instance_id)) or event.key is None:
                return event
            rule = rule_of(policies, event.key)
            if rule.hidden:
                return None
            return event.blank() if rule.blank else event

        return view

    def _authorizer(self, caller: Caller) -> Callable[[], int | None]:
        # It refers to what the gate needs, not to the request, which is freed after the handover.
        gate = self._gate

        def authorize() -> int | None:
            try:
                gate.admit(caller, "GET", "/1.0/events")
            except NotAuthorized:
                return CloseCode.POLICY_VIOLATION
            except Refusal:
                return CloseCode.GOING_AWAY
            return None

        return authorize
