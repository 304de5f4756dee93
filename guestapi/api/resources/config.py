"""``/1.0/config``: what the operator set, as far as the guest may read it."""

from __future__ import annotations

import falcon

from guestapi.api.encoding import JSON, encode
from guestapi.api.errors import NotAuthorized, NotFound
from guestapi.dialects import Dialect


class Keys:
    """``GET /1.0/config``: the URLs of the readable keys that are set, sorted, not encoded."""

    lasting = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON list."""
        resp.content_type = JSON
        resp.data = encode([f"/1.0/config/{key}" for key in req.context.instance.config if self._dialect.reads(key)])


class Key:
    """``GET /1.0/config/{key}``: the value, byte for byte."""

    lasting = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response, key: str) -> None:
        """The value; 403 outside the readable prefixes, set or not; 404 if it is not set."""
        if not self._dialect.reads(key):
            raise NotAuthorized
        value = req.context.instance.config.get(key)
        if value is None:
            raise NotFound
        resp.data = value.encode()
