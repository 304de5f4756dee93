"""A program that asks for user.role in a container all the time, and what its record says.

    witness.py RECORD

Two threads ask: one on a connection that it keeps as long as it has the data there, one on a new connection for each
request. (A caller that was not known stays so on its connection.) Each request becomes a line of the record. Times are
of CLOCK_MONOTONIC, which all containers of a machine share. Runs on the system's Python alone.
"""

from __future__ import annotations

import http.client
import socket
import sys
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

#: Seconds that one request may wait: longer than any restart takes on an emulated processor.
_TIMEOUT = 600.0
#: Seconds between two requests.
_PAUSE = 0.02


class WitnessedAnswer(NamedTuple):
    """The answer to a request.

    Attributes:
        how: "kept" or "new": the connection.
        began: when the request began.
        ended: when the answer was there.
        status: of it; 0: there was none.
        body: of it, or what happened.
    """

    how: str
    began: float
    ended: float
    status: int
    body: str


def read_record(text: str) -> list[WitnessedAnswer]:
    """Return what a record has, but for a line that is not complete yet."""
    found = []
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            how, began, ended, status, body = line.rstrip("\n").split(" ", 4)
            found.append(WitnessedAnswer(how, float(began), float(ended), int(status), body))
    return found


def those_with(body: str, answers: Iterable[WitnessedAnswer]) -> list[WitnessedAnswer]:
    """Return the answers that have the instance's data."""
    return [one for one in answers if (one.status, one.body) == (200, body)]


def check_order(body: str, old: Iterable[WitnessedAnswer], new: Iterable[WitnessedAnswer]) -> float:
    """Check that no two hosts had an instance at a time, by the records of containers of both.

    Nothing that was asked at the old host after the first answer of the new one has an answer with the instance's data.
    Both have asked after that, on both kinds of connections.

    Returns:
        Seconds from the last answer of the old host to the first one of the new host. Negative: an answer that was on
        its way took long.
    """
    everything = list(old)
    first = min(one.ended for one in those_with(body, new))
    served = those_with(body, everything)
    assert [one for one in served if one.began > first] == []
    assert {one.how for one in served} == {"kept", "new"}
    assert {one.how for one in everything if one.began > first} == {"kept", "new"}
    return first - max(one.ended for one in served)


class _WitnessConnection(http.client.HTTPConnection):
    """An HTTP connection over the guest socket."""

    def connect(self) -> None:
        """Connect to the guest socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect("/dev/incus/sock")


def _ask(how: str, connection: _WitnessConnection) -> str:
    """Send one request, and return its line."""
    began = time.monotonic()
    try:
        connection.request("GET", "/1.0/config/user.role")
        answer = connection.getresponse()
        status, body = answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        status, body = 0, f"{type(error).__name__}: {error}"
    return f"{how} {began:.6f} {time.monotonic():.6f} {status} {' '.join(body.split())}\n"


def _ask_always(how: str, record: str) -> None:
    # Each line is one write(2), so lines of both threads stay whole.
    with open(record, "a", buffering=1) as file:
        connection = _WitnessConnection("x")
        while True:
            line = _ask(how, connection)
            file.write(line)
            if how == "new" or line.split()[3] != "200":
                connection.close()
            time.sleep(_PAUSE)


if __name__ == "__main__":
    for each in ("kept", "new"):
        threading.Thread(target=_ask_always, args=(each, sys.argv[1])).start()
