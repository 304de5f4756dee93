"""``?wait=``: whether a request of the tree is answered now or waits for a change.

A request waits while the client knows what there is, and while there is nothing. That was read at some entry of the
change log, and the waiter begins there. So no change is missed in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import falcon

from guestapi.api.cloud_config import document_of
from guestapi.api.conditional import matches, tags_of, wait_of
from guestapi.api.errors import BadRequest, Refusal, TooManyWaits
from guestapi.api.gate import Gate
from guestapi.callers.identify import Caller
from guestapi.dialects import Dialect
from guestapi.http.websocket import CloseCode
from guestapi.notifications.broker import Broker, TooManySubscriptionsError
from guestapi.wsgi import CALLER, QUERY, WAIT, WAITED, Environ

#: Seconds after which a client with too many waiting requests may try again. They last for up to a minute.
_RETRY_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Condition:
    """On which condition a client wants an answer.

    Attributes:
        tags: of If-None-Match; None if it is absent.
        seconds: how long it waits; 0 if it does not.
    """

    tags: frozenset[str] | None
    seconds: int

    def knows(self, tag: str) -> bool:
        """Tell whether the client knows the representation with this ETag."""
        return matches(self.tags, tag)


def condition_of(environ: Mapping[str, str]) -> Condition:
    """Read the condition of a request.

    Args:
        environ: the request's header fields, named as in WSGI, and its `QUERY`.

    Raises:
        BadRequest: it is malformed, or the request waits and has a body.
    """
    found = Condition(tags_of(environ), wait_of(environ.get(QUERY, "")))
    if found.seconds and ("HTTP_TRANSFER_ENCODING" in environ or environ.get("CONTENT_LENGTH", "").strip("0")):
        raise BadRequest("a request that waits has no body")
    return found


class LongPolls:
    """The requests of a dialect that wait."""

    def __init__(self, broker: Broker, gate: Gate, dialect: Dialect) -> None:
        """Begin without any.

        Args:
            broker: where they wait.
            gate: the gate that let them through. It decides again while they wait.
            dialect: says whether some keys depend on others.
        """
        self._merges = dialect.merges_ssh_keys
        self._broker = broker
        self._gate = gate

    def must_wait(
        self, req: falcon.Request, condition: Condition, key: str | None, tag: str | None, event_id: int
    ) -> bool:
        """Tell whether the request waits. Then there is nothing else to do with it.

        Args:
            req: the request.
            condition: its own.
            key: the configuration key that is asked for; None: the whole tree.
            tag: ETag of what there is; None if there is nothing.
            event_id: the id of the change log's last entry at the same moment.

        Raises:
            TooManyWaits: the instance has as many waiting requests as it may have.
        """
        environ = cast("Environ", req.env)
        waiter = environ.get(WAITED)
        if waiter is not None:
            known = tag is None if not waiter.was_set else tag is not None and condition.knows(tag)
            if waiter.over or not known:
                return False
            waiter.after = event_id
        else:
            if not condition.seconds or not (tag is None or condition.knows(tag)):
                return False
            caller = environ[CALLER]
            assert caller.init is not None, "admitted by the gate"
            asked = key
            if self._merges and key is not None and document_of(key) is not None:
                # SSH keys and the other document decide about it, too.
                key = None
            try:
                waiter = self._broker.wait(
                    req.context.instance.id,
                    key,
                    self._authorizer(caller, str(req.uri_template), asked),
                    caller.init.alive,
                    was_set=tag is not None,
                    seconds=condition.seconds,
                    after=event_id,
                    root=caller.is_root,
                )
            except TooManySubscriptionsError:
                raise TooManyWaits(_RETRY_SECONDS) from None
        environ[WAIT] = waiter
        return True

    def _authorizer(self, caller: Caller, template: str, key: str | None) -> Callable[[], int | None]:
        # It refers to what the gate needs, not to the request, which is freed while it waits.
        gate = self._gate

        def authorize() -> int | None:
            try:
                gate.admit(caller, "GET", template, key)
            except Refusal:
                return CloseCode.POLICY_VIOLATION
            return None

        return authorize


def is_known(req: falcon.Request, condition: Condition, tag: str) -> bool:
    """Tell whether the answer is 304: the client knows what there is, and did not wait for it to be set."""
    waiter = cast("Environ", req.env).get(WAITED)
    return condition.knows(tag) and (waiter is None or waiter.was_set)
