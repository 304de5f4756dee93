"""The other kind of answer: not bytes, but the connection itself is handed over, to be a stream of events.

A resource puts a `Handover` into the environ, under `HANDOVER`; the server looks there before it looks at the
response. So a request is either answered or handed over, never both.
"""

from __future__ import annotations

from dataclasses import dataclass

from guestapi.notifications.broker import Listener
from guestapi.notifications.events import Form

#: Where in the environ.
HANDOVER = "guestapi.handover"


@dataclass(frozen=True, slots=True)
class Handover:
    """A stream that begins with this response, registered already.

    Attributes:
        status: of the response, like ``101 Switching Protocols``.
        headers: of the response.
        form: how events are framed from then on.
        listener: what there is to send.
    """

    status: str
    headers: tuple[tuple[str, str], ...]
    form: Form
    listener: Listener
