"""What both clients send, and how they read what the host answers. Pure: no I/O."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

#: Where the socket is, if the program does not say: with Incus or guestapi, then with LXD.
SOCKETS = ("/dev/incus/sock", "/dev/lxd/sock")
#: Seconds for which a host that cannot be asked is asked again: longer than a restart takes.
TIMEOUT = 30.0
#: Seconds until the next attempt: first, and longest. They double between.
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0
#: The longest time that one request may wait for a key, in seconds (docs/guests.md).
_LONGEST_WAIT = 60
#: Seconds between two requests for a key where the host cannot wait for it.
POLL_SECONDS = 1.0
#: The longest event that is accepted, in bytes: it has an old and a new value, escaped as JSON.
LONGEST_EVENT = 64 << 20

FEATURES = "/1.0/guestapi"
TREE = "/1.0/guestapi/tree"


class GuestError(Exception):
    """The host did not do what it was asked for; the text says why."""


class HostUnavailableError(GuestError):
    """The host could not be asked until the timeout."""


class HostRefusedError(GuestError):
    """The host refuses.

    Attributes:
        status: HTTP status code.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the instance.

    Attributes:
        type: ``config``, ``device``, or ``gap`` if the host no longer has all events after the requested one.
        timestamp: when it happened, in RFC 3339.
        metadata: what changed (docs/events.md).
        id: its number in the host's log; None where the host has none.
    """

    type: str
    timestamp: str
    metadata: Mapping[str, Any]
    id: int | None = None


class Attempts:
    """How long to wait until the next attempt, and when to give up."""

    def __init__(self, seconds: float) -> None:
        """Begin.

        Args:
            seconds: how long to try.
        """
        self._end = time.monotonic() + seconds
        self._next = _FIRST_PAUSE

    def pause(self, reason: str, least: float = 0.0) -> float:
        """Return the seconds until the next attempt.

        Args:
            reason: why the last attempt failed.
            least: the least seconds to wait.

        Raises:
            HostUnavailableError: the time is over.
        """
        left = self._end - time.monotonic()
        if left <= least:
            raise HostUnavailableError(reason)
        pause, self._next = min(max(self._next, least), left), min(2 * self._next, _LAST_PAUSE)
        return pause


def find_socket(path: str | None) -> str:
    """Return the path of the socket: `path`, or the first of `SOCKETS` that exists."""
    return path or next(filter(os.path.exists, SOCKETS), SOCKETS[0])


def key_target(key: str) -> str:
    """Return the target of a configuration key."""
    return "/1.0/config/" + quote(key, safe="")


def wait_target(key: str, seconds: float) -> str:
    """Return the target of a request that waits until a key is set."""
    return f"{TREE}/config/{quote(key, safe='')}?wait={max(1, min(math.ceil(seconds), _LONGEST_WAIT))}"


def events_target(since: int | None, types: tuple[str, ...]) -> str:
    """Return the target of a stream of events."""
    query = {**({"since": str(since)} if since is not None else {}), **({"type": ",".join(types)} if types else {})}
    return f"/1.0/events?{urlencode(query)}" if query else "/1.0/events"


def judge(status: int, retry_after: str, body: bytes) -> float:
    """Return the least seconds until another attempt after a failure.

    Args:
        status: HTTP status code.
        retry_after: the header field of that name; empty if there is none.
        body: of the answer.

    Raises:
        HostRefusedError: another attempt would fail, too.
    """
    if status >= 500 and status != 507:
        # Also for an instance that is not registered yet.
        return 0.0
    if status == 429 and retry_after.isdigit() and int(retry_after) <= _LAST_PAUSE:
        return float(retry_after)
    raise HostRefusedError(status, explain(status, body))


def explain(status: int, body: bytes) -> str:
    """Return the host's sentence."""
    return body.decode(errors="replace").strip() or f"status {status}"


def is_answer(status: int) -> bool:
    """Whether a status answers the question, be it that there is nothing."""
    return status < 300 or status in (304, 404)


def parse_keys(body: bytes) -> list[str]:
    """Return the names of keys in the answer to ``GET /1.0/config``."""
    return [str(path).removeprefix("/1.0/config/") for path in json.loads(body)]


def parse_event(text: str | bytes) -> Event:
    """Parse an event."""
    found = json.loads(text)
    return Event(found["type"], found["timestamp"], found["metadata"], found.get("id"))


def state_body(ready: bool) -> bytes:
    """Return the body of a report about readiness."""
    return json.dumps({"state": "Ready" if ready else "Started"}).encode()
