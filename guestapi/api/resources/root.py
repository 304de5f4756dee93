"""``/``: the versions of the API."""

from __future__ import annotations

import falcon

from guestapi.encoding import JSON, json_line


class Root:
    """``GET /``: the URLs of the API's versions."""

    cacheable = True

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list."""
        resp.content_type = JSON
        resp.data = json_line(["/1.0"])
