"""A program that uses all of `guestapi.client`: ``python client_tour.py blocking|asyncio SOCKET``.

It prints JSON: one line with all values that it has read, then one line for each event, until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Awaitable, Callable

from guestapi.client import AsyncGuest, Event, Guest


def print_document(document: object) -> None:
    """Print a JSON document in a line."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def print_event(event: Event) -> None:
    """Print an event."""
    print_document({"type": event.type, "metadata": event.metadata, "has_id": event.id is not None})


def error_of(call: Callable[[], object]) -> str:
    """Return the name of the error that a call raises; empty: none."""
    try:
        call()
    except (LookupError, TimeoutError) as error:
        return type(error).__name__
    return ""


def blocking(path: str) -> None:
    """Call every method of `Guest`, and print the results."""
    with Guest(path) as guest:
        guest.ready()
        print_document(
            {
                "config": dict(guest.config),
                "absent": [error_of(lambda: guest.config["user.no"]), error_of(lambda: guest.wait("user.no", 0.1))],
                "devices": guest.devices(),
                "metadata": guest.metadata(),
                "state": guest.state()["state"],
                "waited": guest.wait("user.key", 60),
            }
        )
        for event in guest.watch("config"):
            print_event(event)


async def error_of_awaited(call: Callable[[], Awaitable[object]]) -> str:
    """The same for an awaitable."""
    try:
        await call()
    except (LookupError, TimeoutError) as error:
        return type(error).__name__
    return ""


async def concurrently(path: str) -> None:
    """Call every method of `AsyncGuest`, and print the results."""
    async with AsyncGuest(path) as guest:
        await guest.ready()
        missing = [await error_of_awaited(lambda: guest.get("user.no"))]
        missing.append(await error_of_awaited(lambda: guest.wait("user.no", 0.1)))
        print_document(
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
            print_event(event)


def main() -> None:
    """Run one of the two until standard input ends."""
    kind, path = sys.argv[1:]
    task = (lambda: asyncio.run(concurrently(path))) if kind == "asyncio" else (lambda: blocking(path))
    threading.Thread(target=task, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
