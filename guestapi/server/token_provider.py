"""The provider of Ubuntu Pro's guest tokens that the operator has plugged in (``server.ubuntu_pro``)."""

from __future__ import annotations

import importlib
import logging

from guestapi.api.resources.ubuntu_pro import GuestAttach, GuestToken, GuestTokens
from guestapi.model import Instance
from guestapi.server.instance_locks import InstanceLocks
from guestapi.server.store_thread import in_thread
from guestapi.settings import SettingsError

log = logging.getLogger(__name__)


class OffloadedTokens:
    """A provider whose tokens are issued in threads beside the event loop. It implements `GuestTokens`."""

    def __init__(self, provider: GuestTokens) -> None:
        """Use `provider`, whose `issue` may wait."""
        self._provider = provider
        self._locks = InstanceLocks()

    def guest_attach(self, instance: Instance) -> GuestAttach:
        """As the provider's; ``off`` if it fails."""
        try:
            return self._provider.guest_attach(instance)
        except Exception:
            log.exception("the provider of Ubuntu Pro tokens fails")
            return "off"

    def issue(self, instance: Instance) -> GuestToken | None:
        """As the provider's, for one request of an instance at a time; None if it fails."""
        try:
            with self._locks.hold(instance.id):
                return in_thread(self._provider.issue, instance)
        except Exception:
            log.exception("the provider of Ubuntu Pro tokens fails")
            return None


def load_tokens(name: str) -> OffloadedTokens | None:
    """Make the provider that the settings name.

    Args:
        name: of a class or function that makes one, like ``package.module:Provider``; ``off``: there is none.

    Raises:
        SettingsError: it cannot be made.
    """
    if name == "off":
        return None
    module, _, attribute = name.partition(":")
    try:
        return OffloadedTokens(getattr(importlib.import_module(module), attribute)())
    except Exception as error:
        raise SettingsError(f"server.ubuntu_pro: {name!r} cannot be used: {error}") from error
