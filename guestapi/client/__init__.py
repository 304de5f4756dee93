"""A client of the guest API for programs in instances: `Guest`, and `AsyncGuest` for asyncio.

It is a distribution of its own, guestapi-client (in client/), which needs httpx and websockets alone. It works with
guestapi, Incus and LXD on the host.
"""

from guestapi.client.asynchronous import AsyncGuest
from guestapi.client.blocking import Guest
from guestapi.client.protocol import Event, GuestError, HostRefusedError, HostUnavailableError

__all__ = ["AsyncGuest", "Event", "Guest", "GuestError", "HostRefusedError", "HostUnavailableError"]
