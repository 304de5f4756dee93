"""What a program in an instance does with `guestapi.client`: ``python client_tour.py blocking|asyncio SOCKET``.

It prints JSON: what it read, one line; then each event, a line each, until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable

from guestapi.client import AsyncGuest, Event, Guest


def say(document: object) -> None:
    """Print a line."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def say_event(event: Event) -> None:
    """Print an event."""
    say({"type": event.type, "metadata": event.metadata, "has_id": event.id is not None})


def absent(call: Callable[[], object]) -> str:
    """Return the name of the error that a call raises."""
    try:
        call()
    except (LookupError, TimeoutError) as error:
        return type(error).__name__
    return ""


def blocking(path: str) -> None:
    """Everything that `Guest` can do."""
    with Guest(path) as guest:
        guest.ready()
        say(
            {
                "config": dict(guest.config),
                "absent": [absent(lambda: guest.config["user.no"]), absent(lambda: guest.wait("user.no", 0.1))],
                "devices": guest.devices(),
                "metadata": guest.metadata(),
                "state": guest.state()["state"],
                "waited": guest.wait("user.key", 60),
            }
        )
        for event in guest.watch("config"):
            say_event(event)


async def absent_there(call: Callable[[], Awaitable[object]]) -> str:
    """As `absent`."""
    try:
        await call()
    except (LookupError, TimeoutError) as error:
        return type(error).__name__
    return ""


async def concurrently(path: str) -> None:
    """Everything that `AsyncGuest` can do."""
    async with AsyncGuest(path) as guest:
        await guest.ready()
        missing = [await absent_there(lambda: guest.get("user.no"))]
        missing.append(await absent_there(lambda: guest.wait("user.no", 0.1)))
        say(
            {
                "config": await guest.config(),
                "absent": missing,
                "devices": await guest.devices(),
                "metadata": await guest.metadata(),
                "state": (await guest.state())["state"],
                "waited": await guest.wait("user.key", 60),
            }
        )
        async for event in guest.watch("config"):
            say_event(event)


def main() -> None:
    """Run one of the two, until standard input ends."""
    kind, path = sys.argv[1:]
    task = (lambda: asyncio.run(concurrently(path))) if kind == "asyncio" else (lambda: blocking(path))
    threading.Thread(target=task, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
