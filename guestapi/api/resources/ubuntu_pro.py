"""``/1.0/ubuntu-pro``: whether a guest may attach itself to Ubuntu Pro, and the token with which it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import falcon

from guestapi.api.errors import NotAuthorized, TooManyTokens
from guestapi.encoding import JSON, json_line
from guestapi.model import Instance
from guestapi.rate_limit import RateLimit

#: ``on``: the guest attaches itself when it boots; ``available``: when its user asks for it.
GuestAttach = Literal["off", "available", "on"]


@dataclass(frozen=True, slots=True)
class GuestToken:
    """A token with which one guest can attach itself.

    Attributes:
        token: what the guest tells the contract server.
        expires: when it can be used no more, in RFC 3339.
        id: names it for the operator.
    """

    token: str
    expires: str
    id: str


class GuestTokens(Protocol):
    """Who gives guests tokens of Ubuntu Pro."""

    def guest_attach(self, instance: Instance) -> GuestAttach:
        """Tell whether an instance may attach itself. It answers at once."""
        ...

    def issue(self, instance: Instance) -> GuestToken | None:
        """Return a new token for an instance; None if there is none for it. Only the calling greenlet may wait."""
        ...


class NoTokens:
    """Gives no guest a token, which is so unless a host has another provider (`GuestTokens`)."""

    def guest_attach(self, _instance: Instance) -> GuestAttach:
        """Return ``off``."""
        return "off"

    def issue(self, _instance: Instance) -> GuestToken | None:
        """Return None."""
        return None


class UbuntuPro:
    """``GET /1.0/ubuntu-pro``: whether the guest may attach itself."""

    def __init__(self, tokens: GuestTokens) -> None:
        self._tokens = tokens

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object."""
        resp.content_type = JSON
        resp.data = json_line({"guest_attach": self._tokens.guest_attach(req.context.instance)})


class UbuntuProToken:
    """``POST /1.0/ubuntu-pro/token``: a token for the guest."""

    def __init__(self, tokens: GuestTokens, rate_limit: RateLimit) -> None:
        """Serve tokens.

        Args:
            tokens: who gives them.
            rate_limit: how often an instance may ask.
        """
        self._tokens = tokens
        self._rate_limit = rate_limit

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object, which nothing on the way keeps.

        Raises:
            NotAuthorized: the guest may not attach itself, or there is no token for it.
            TooManyTokens: the instance asks too often.
        """
        instance: Instance = req.context.instance
        if self._tokens.guest_attach(instance) == "off":
            raise NotAuthorized
        if not self._rate_limit.take(instance.id):
            raise TooManyTokens(self._rate_limit.retry_after)
        token = self._tokens.issue(instance)
        if token is None:
            raise NotAuthorized
        resp.content_type = JSON
        resp.set_header("Cache-Control", "no-store")
        resp.data = json_line({"expires": token.expires, "guest_token": token.token, "id": token.id})
