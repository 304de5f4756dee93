"""The client for asyncio: as `guestapi.client.blocking`, with awaitable methods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import httpx
from websockets.asyncio.client import unix_connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus

import guestapi.client.protocol as protocol
from guestapi.client.protocol import Attempts, Event


class AsyncGuest:
    """The instance, as its host describes it. A method that cannot ask the host tries again until the timeout."""

    def __init__(self, socket: str | None = None, timeout: float = protocol.TIMEOUT) -> None:
        """Connect to nothing yet.

        Args:
            socket: path of the guest API's socket; None: the first that exists.
            timeout: seconds for which to try again while the host cannot be asked.
        """
        self._socket = protocol.find_socket(socket)
        self._timeout = timeout
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=self._socket), base_url="http://host", timeout=timeout
        )

    async def __aenter__(self) -> AsyncGuest:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, method: str, target: str, body: bytes | None = None, waits: float = 0.0) -> httpx.Response:
        """Send a request, and again while the host cannot answer it.

        Args:
            method: HTTP method.
            target: path and query.
            body: of the request.
            waits: seconds that the host may wait before it answers.

        Returns:
            An answer with a status below 300, 304 or 404.

        Raises:
            HostUnavailableError: the host cannot be asked.
            HostRefusedError: the host refuses.
        """
        attempts = Attempts(self._timeout)
        while True:
            least = 0.0
            try:
                response = await self._http.request(method, target, content=body, timeout=self._timeout + waits)
            except httpx.TransportError as error:
                reason = f"the host cannot be asked at {self._socket}: {error or type(error).__name__}"
            else:
                status = response.status_code
                if protocol.is_answer(status):
                    return response
                least = protocol.judge(status, response.headers.get("Retry-After", ""), response.content)
                reason = f"the host answers: {protocol.explain(status, response.content)}"
            await asyncio.sleep(attempts.pause(reason, least))

    async def get(self, key: str) -> str:
        """Return the value of a configuration key.

        Raises:
            KeyError: it is not set.
            HostUnavailableError: the host cannot be asked.
            HostRefusedError: the host refuses.
        """
        response = await self.ask("GET", protocol.key_target(key))
        if response.status_code == 404:
            raise KeyError(key)
        return response.content.decode()

    async def keys(self) -> list[str]:
        """Return the names of the configuration keys that are set."""
        return protocol.parse_keys((await self.ask("GET", "/1.0/config")).content)

    async def config(self) -> dict[str, str]:
        """Return the configuration. A key that is unset meanwhile is left out."""
        found = {}
        for key in await self.keys():
            try:
                found[key] = await self.get(key)
            except KeyError:
                pass  # It was unset after the list was made.
        return found

    async def state(self) -> dict[str, Any]:
        """Return ``GET /1.0``: version of the API, and what the host says of the instance."""
        found: dict[str, Any] = (await self.ask("GET", "/1.0")).json()
        return found

    async def metadata(self) -> str:
        """Return cloud-init's meta-data."""
        return (await self.ask("GET", "/1.0/meta-data")).content.decode()

    async def devices(self) -> dict[str, dict[str, str]]:
        """Return the devices by name."""
        found: dict[str, dict[str, str]] = (await self.ask("GET", "/1.0/devices")).json()
        return found

    async def ready(self, ready: bool = True) -> None:
        """Report whether the workload is ready.

        Raises:
            HostUnavailableError: the host cannot be asked.
            HostRefusedError: the host refuses.
        """
        response = await self.ask("PATCH", "/1.0", protocol.state_body(ready))
        if response.status_code == 404:
            raise protocol.HostRefusedError(404, protocol.explain(404, response.content))

    async def features(self) -> list[str]:
        """Return what the host offers beyond the API of Incus and LXD."""
        response = await self.ask("GET", protocol.FEATURES)
        return list(response.json()["features"]) if response.status_code == 200 else []

    async def wait(self, key: str, timeout: float) -> str:
        """Wait until a key is set, and return its value.

        Args:
            key: its name.
            timeout: the most seconds to wait.

        Raises:
            TimeoutError: it is not set.
            HostUnavailableError: the host cannot be asked.
            HostRefusedError: the host refuses.
        """
        end = time.monotonic() + timeout
        can_wait = "tree" in await self.features()
        while True:
            left = end - time.monotonic()
            if can_wait and left > 0:
                response = await self.ask("GET", protocol.wait_target(key, left), waits=left)
            else:
                response = await self.ask("GET", protocol.key_target(key))
            if response.status_code == 200:
                return response.content.decode()
            if time.monotonic() >= end:
                raise TimeoutError(f"{key} is not set")
            if not can_wait:
                await asyncio.sleep(min(protocol.POLL_SECONDS, max(0.0, end - time.monotonic())))

    async def watch(self, *types: str, since: int | None = None) -> AsyncIterator[Event]:
        """Yield changes as they happen. After a restart of the host, it connects again.

        With guestapi on the host, it then resumes where it was, so no change is missed. Incus and LXD keep no events.

        Args:
            types: only events of these types; none: all.
            since: the id of the event after which to begin; None: begin now.

        Raises:
            HostUnavailableError: the host cannot be asked.
            HostRefusedError: the host refuses.
        """
        if since is None and "tree" in await self.features():
            since = int((await self.ask("GET", protocol.TREE)).headers["Guestapi-Event-Id"])
        attempts = Attempts(self._timeout)
        while True:
            least, reason = 0.0, "the host ends the stream of events"
            uri = "ws://host" + protocol.events_target(since, types)
            try:
                async with unix_connect(self._socket, uri, max_size=protocol.LONGEST_EVENT, compression=None) as stream:
                    attempts = Attempts(self._timeout)
                    async for text in stream:
                        event = protocol.parse_event(text)
                        since = event.id if event.id is not None else since
                        yield event
            except InvalidStatus as error:
                response = error.response
                least = protocol.judge(
                    response.status_code, response.headers.get("Retry-After", ""), bytes(response.body)
                )
                reason = f"the host answers: {protocol.explain(response.status_code, bytes(response.body))}"
            except (OSError, EOFError, ConnectionClosed, InvalidMessage) as error:
                reason = f"the host cannot be asked at {self._socket}: {error or type(error).__name__}"
            await asyncio.sleep(attempts.pause(reason, least))
