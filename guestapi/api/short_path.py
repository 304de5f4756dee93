"""The short path to an answer that depends on the request's path and the instance alone.

Falcon takes as long for its own objects of a request and a response as everything else takes together. These resources
use two attributes of the request and set two of the response, so they get objects that have nothing else. Whatever is
neither a plain success nor missing goes the usual way, from the beginning, and is answered there; so is all that is
asked of an instance with key policies.
"""

from __future__ import annotations

from guestapi.api.errors import TEXT, NotFound
from guestapi.api.gate import Gate
from guestapi.api.routing import Router
from guestapi.dialects import Dialect
from guestapi.model import Instance
from guestapi.wsgi import CACHEABLE, INSTANCE, RAW_PATH, ROUTE, Environ, StartResponse


class _Context:
    __slots__ = ("instance",)

    def __init__(self, instance: Instance) -> None:
        self.instance = instance


class _Request:
    """What a cacheable resource reads of a `falcon.Request`."""

    __slots__ = ("context", "env")

    def __init__(self, instance: Instance, environ: Environ) -> None:
        self.context = _Context(instance)
        self.env = environ


class _Response:
    """What a cacheable resource sets of a `falcon.Response`."""

    __slots__ = ("content_type", "data")

    def __init__(self) -> None:
        self.content_type: str | None = None
        self.data = b""


class ShortPath:
    """Answers ``GET`` of cacheable resources of one dialect."""

    def __init__(self, router: Router, gate: Gate, content_type: str, dialect: Dialect) -> None:
        """Answer nothing yet.

        Args:
            router: the dialect's.
            gate: the dialect's.
            content_type: of a response of which its resource does not say.
            dialect: as whose server it answers.
        """
        self._router = router
        self._gate = gate
        self._content_type = content_type
        self._not_found = f"{dialect.words.get(NotFound.text, NotFound.text)}\n".encode()

    def answer(self, environ: Environ, start_response: StartResponse) -> list[bytes] | None:
        """Answer a GET request; None if Falcon has to."""
        route = self._router.find(environ[RAW_PATH])
        if route is None or not getattr(route[0], "cacheable", False):
            return None
        _resource, methods, params, template = route
        try:
            instance = self._gate.admit_first(environ, template, params.get("key"))
            if instance.policies:
                return None
            environ[INSTANCE] = instance
            environ[CACHEABLE] = True
            environ[ROUTE] = template
            response = _Response()
            methods["GET"](_Request(instance, environ), response, **params)
            data = response.data
        except NotFound:
            # A program asks at its start for keys that are not set.
            start_response(
                "404 Not Found",
                [
                    ("x-content-type-options", "nosniff"),
                    ("content-type", TEXT),
                    ("content-length", str(len(self._not_found))),
                ],
            )
            return [self._not_found]
        except Exception:
            # Falcon meets it again, answers accordingly, and logs what has to be logged.
            data = b""
        if not data:
            environ.pop(INSTANCE, None)
            environ.pop(CACHEABLE, None)
            environ.pop(ROUTE, None)
            return None
        length, kind = ("content-length", str(len(data))), response.content_type
        # In Falcon's order.
        headers = [length, ("content-type", self._content_type)] if kind is None else [("content-type", kind), length]
        start_response("200 OK", headers)
        return [data]
