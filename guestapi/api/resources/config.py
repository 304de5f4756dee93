"""``/1.0/config``: the configuration keys that a guest may read."""

from __future__ import annotations

import falcon

from guestapi.api.errors import NotAuthorized, NotFound
from guestapi.dialects import Dialect
from guestapi.encoding import JSON, json_line


class ConfigKeys:
    """``GET /1.0/config``: the URLs of the readable keys that are set, sorted, not encoded."""

    cacheable = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list."""
        resp.content_type = JSON
        config = req.context.instance.config
        resp.data = json_line([f"/1.0/config/{key}" for key in config if self._dialect.is_readable(key)])


class ConfigKey:
    """``GET /1.0/config/{key}``: the value, byte for byte."""

    cacheable = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response, key: str) -> None:
        """Answer with the value.

        Raises:
            NotAuthorized: the key has no readable prefix, be it set or not.
            NotFound: it is not set.
        """
        if not self._dialect.is_readable(key):
            raise NotAuthorized
        value = req.context.instance.config.get(key)
        if value is None:
            raise NotFound
        resp.data = value.encode()
