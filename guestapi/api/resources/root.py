"""``/``: which APIs there are."""

from __future__ import annotations

import falcon

from guestapi.api.encoding import JSON, encode


class Root:
    """``GET /``: the URLs of the APIs."""

    lasting = True

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON list."""
        resp.content_type = JSON
        resp.data = encode(["/1.0"])
