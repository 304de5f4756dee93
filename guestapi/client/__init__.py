"""A client of the guest API for programs in instances: `Guest`, and `AsyncGuest` for asyncio.

Needs the extra ``client``: ``pip install 'guestapi[client]'``. It works with guestapi, Incus and LXD on the host, and
imports nothing of the service.
"""

from guestapi.client.asynchronous import AsyncGuest
from guestapi.client.blocking import Guest
from guestapi.client.protocol import Event, GuestError, HostRefusedError, HostUnavailableError

__all__ = ["AsyncGuest", "Event", "Guest", "GuestError", "HostRefusedError", "HostUnavailableError"]
