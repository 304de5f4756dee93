"""Which resource answers a path.

Falcon's own router sees a path that is decoded already, so ``user.a%2Fb`` would be two segments to it, and it answers
methods that it has not heard of with 400. This one matches segment by segment, decoding each by itself, and knows for
every route which methods it offers. It is a plain Falcon custom router (falcon.readthedocs.io, "Custom Routers").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import falcon

from guestapi.api.errors import MethodNotAllowed
from guestapi.http.target import decode_segment

Responder = Callable[..., None]
Found = tuple[object, "Methods", dict[str, str], str]


class Methods(dict[str, Responder]):
    """Method to responder for one route. Any other method is answered with 405, by name."""

    def __init__(self, resource: object) -> None:
        super().__init__()
        for method in ("GET", "PATCH"):
            if responder := getattr(resource, f"on_{method.lower()}", None):
                self[method] = responder
        if "GET" in self:
            # RFC 9110, section 9.3.2: the same answer without its body, which Falcon leaves out.
            self["HEAD"] = self["GET"]
        self.allowed = sorted(self)

    def __missing__(self, method: str) -> Responder:
        def refuse(_request: falcon.Request, _response: falcon.Response, **_params: str) -> NoReturn:
            raise MethodNotAllowed(method, self.allowed)

        return refuse


class Router:
    """Routes by the segments of the raw path in ``environ["RAW_PATH"]``; a segment like ``{key}`` takes any."""

    def __init__(self) -> None:
        self._fixed: dict[str, Found] = {}
        self._templates: list[tuple[list[str], object, Methods, str]] = []

    def add_route(self, uri_template: str, resource: object, **_options: Any) -> None:
        """Answer paths like `uri_template` with `resource`."""
        methods = Methods(resource)
        if "{" in uri_template:
            self._templates.append((uri_template.split("/"), resource, methods, uri_template))
        else:
            self._fixed[uri_template] = (resource, methods, {}, uri_template)

    def find(self, uri: str, req: falcon.Request | None = None) -> Found | None:
        """The route for the request's raw path; None if there is none. `uri`, decoded whole, is not looked at."""
        path: str = req.env["RAW_PATH"] if req is not None else uri
        return self._fixed.get(path) or self._find_decoded(path)

    def _find_decoded(self, path: str) -> Found | None:
        segments = [decode_segment(segment) for segment in path.split("/")]
        # An encoded slash is no separator, so decoded segments are joined for comparison only where there is none.
        if "%" in path and not any("/" in segment for segment in segments):
            found = self._fixed.get("/".join(segments))
            if found is not None:
                return found
        for template, resource, methods, name in self._templates:
            if len(template) == len(segments):
                params = _match(template, segments)
                if params is not None:
                    return resource, methods, params, name
        return None


def _match(template: list[str], segments: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for wanted, segment in zip(template, segments, strict=True):
        if wanted.startswith("{"):
            # An empty segment is a trailing slash, and Go's ServeMux takes an encoded slash alone for one too.
            if segment in ("", "/"):
                return None
            params[wanted[1:-1]] = segment
        elif wanted != segment:
            return None
    return params
