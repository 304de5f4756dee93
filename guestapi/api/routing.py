"""Which resource answers a path.

Falcon's own router gets a path that is already decoded, so it takes ``user.a%2Fb`` for two segments, and it answers
unknown methods with 400. This router decodes and compares one segment at a time, and knows for each route which methods
it has. It is a Falcon custom router (falcon.readthedocs.io, "Custom Routers").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import falcon

from guestapi.api.errors import refuse_method
from guestapi.dialects import Dialect
from guestapi.http.target import decode_segment
from guestapi.wsgi import RAW_PATH

Responder = Callable[..., None]
#: Resource, responders, parameters of the path, and template.
Route = tuple[object, "Methods", dict[str, str], str]


class Methods(dict[str, Responder]):
    """The responders of one route by method. Any other method is refused as the dialect does."""

    def __init__(self, resource: object, dialect: Dialect) -> None:
        super().__init__()
        self._dialect = dialect
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT"):
            if responder := getattr(resource, f"on_{method.lower()}", None):
                self[method] = responder
        if "GET" in self:
            # RFC 9110, section 9.3.2: the same answer without its body, which Falcon omits.
            self["HEAD"] = self["GET"]
        self.allowed = sorted(self)

    def __missing__(self, method: str) -> Responder:
        def refuse(_request: falcon.Request, _response: falcon.Response, **_params: str) -> NoReturn:
            raise refuse_method(method, self.allowed, self._dialect)

        return refuse


class Router:
    """Routes by the segments of the raw path (`RAW_PATH`). A segment like ``{key}`` matches any segment."""

    def __init__(self, dialect: Dialect) -> None:
        """Begin without routes.

        Args:
            dialect: says how fixed segments are compared, and how a method is refused.
        """
        self._dialect = dialect
        self._decodes = dialect.decodes_routes
        self._fixed: dict[str, Route] = {}
        self._templates: list[tuple[list[str], object, Methods, str]] = []
        #: Those templates of which only the last segment is a parameter, by what stands before it, with its name.
        self._last: dict[str, tuple[object, Methods, str, str]] = {}
        self._most_slashes = 0

    def add_route(self, uri_template: str, resource: object, **_options: Any) -> None:
        """Answer paths that match `uri_template` with `resource`."""
        methods = Methods(resource, self._dialect)
        self._most_slashes = max(self._most_slashes, uri_template.count("/"))
        if "{" in uri_template:
            self._templates.append((uri_template.split("/"), resource, methods, uri_template))
            parent, _, last = uri_template.rpartition("/")
            if "{" not in parent:
                self._last[parent] = resource, methods, last[1:-1], uri_template
        else:
            self._fixed[uri_template] = (resource, methods, {}, uri_template)

    def find(self, uri: str, req: falcon.Request | None = None) -> Route | None:
        """Find the route for the request's raw path. `uri`, which is decoded as a whole, is ignored."""
        path: str = req.env[RAW_PATH] if req is not None else uri
        return self._fixed.get(path) or self._find_decoded(path)

    def _find_decoded(self, path: str) -> Route | None:
        # PERF: most paths have nothing to decode, and are a fixed part and a key.
        if "%" not in path and path.isascii():
            parent, _, last = path.rpartition("/")
            if last and (known := self._last.get(parent)) is not None:
                resource, methods, name, template_text = known
                return resource, methods, {name: last}, template_text
        # A guest can send thousands of segments.
        if path.count("/") > self._most_slashes:
            return None
        sent = path.split("/")
        segments = sent if "%" not in path and path.isascii() else [decode_segment(segment) for segment in sent]
        # An encoded slash is not a separator, so decoded segments are joined for comparison only if they have none.
        if self._decodes and "%" in path and not any("/" in segment for segment in segments):
            found = self._fixed.get("/".join(segments))
            if found is not None:
                return found
        for template, resource, methods, name in self._templates:
            if len(template) == len(segments):
                params = _match(template, segments) if self._decodes else _match_sent(template, sent, segments)
                if params is not None:
                    return resource, methods, params, name
        return None


def _match(template: list[str], segments: list[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for wanted, segment in zip(template, segments, strict=True):
        if wanted.startswith("{"):
            # An empty segment is a trailing slash. Go's ServeMux treats a lone encoded slash in the same way.
            if segment in ("", "/"):
                return None
            params[wanted[1:-1]] = segment
        elif wanted != segment:
            return None
    return params


def _match_sent(template: list[str], sent: list[str], decoded: list[str]) -> dict[str, str] | None:
    """As `_match`, as gorilla/mux does with encoded paths: fixed segments count as they were sent."""
    params: dict[str, str] = {}
    for wanted, raw, segment in zip(template, sent, decoded, strict=True):
        if wanted.startswith("{") and raw:
            params[wanted[1:-1]] = segment
        elif wanted != raw:
            return None
    return params
