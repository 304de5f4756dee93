"""``/1.0/guestapi/attributes``: what the instance says of itself, if the operator allows it to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import falcon

from guestapi.api.conditional import etag, matches, strong_tags_of, tags_of
from guestapi.api.errors import (
    BadRequest,
    NotAuthorized,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    Refusal,
    TooLargeAttribute,
    TooManyWrites,
    UnknownCaller,
)
from guestapi.encoding import JSON, json_line
from guestapi.model import Instance
from guestapi.rate_limit import RateLimit
from guestapi.store.attributes import MOST_ATTRIBUTES, MOST_BYTES, VALUE_BYTES, Outcome, is_path
from guestapi.switches import ATTRIBUTES
from guestapi.wsgi import INSTANCE, Environ

#: What the path of every attribute begins with.
_PREFIX = "/1.0/guestapi/attributes/"


class AttributeStore(Protocol):
    """Where attributes are. `api.app.Store` implements it."""

    def attributes(self, instance: Instance) -> list[str]:
        """As `store.reading.Reader.attributes`."""
        ...

    def attribute(self, instance: Instance, path: str) -> bytes | None:
        """As `store.reading.Reader.attribute`."""
        ...

    def write_attribute(
        self, instance: Instance, path: str, value: bytes | None, holds: Callable[[bytes | None], bool] | None
    ) -> Outcome:
        """As `store.attributes.write`, committed. It may wait for other writers; other requests continue meanwhile."""
        ...


class AttributeList:
    """``GET /1.0/guestapi/attributes``: the URLs of the attributes that are set, sorted."""

    def __init__(self, store: AttributeStore) -> None:
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list.

        Raises:
            NotAuthorized: the instance may not have attributes.
        """
        instance = _allowed(req)
        resp.content_type = JSON
        resp.data = json_line([_PREFIX + path for path in self._store.attributes(instance)])


class AttributeResource:
    """``GET``, ``PUT`` and ``DELETE /1.0/guestapi/attributes/{namespace}/{name}``."""

    def __init__(self, store: AttributeStore, rate_limit: RateLimit) -> None:
        """Serve attributes.

        Args:
            store: where they are.
            rate_limit: how often an instance may write. Each write takes a token, whatever becomes of it.
        """
        self._store = store
        self._rate_limit = rate_limit

    def on_get(self, req: falcon.Request, resp: falcon.Response, namespace: str, name: str) -> None:
        """Answer with the value, byte for byte.

        Raises:
            NotAuthorized: the instance may not have attributes.
            BadRequest: no attribute can be called so, or a condition is malformed.
            NotFound: it is not set.
            PreconditionFailed: If-Match names another value.
        """
        instance, path = _allowed(req), _path(namespace, name)
        wanted, known = strong_tags_of(req.env), tags_of(req.env)
        value = self._store.attribute(instance, path)
        if value is None:
            raise NotFound
        tag = etag(value)
        if wanted is not None and not matches(wanted, tag):
            raise PreconditionFailed
        resp.set_header("ETag", tag)
        if matches(known, tag):
            resp.status = falcon.HTTP_304
        else:
            resp.data = value

    def on_put(self, req: falcon.Request, resp: falcon.Response, namespace: str, name: str) -> None:
        """Set it to the bytes of the body; answer 201 if it is new, else 204. The Content-Type is ignored.

        Raises:
            NotAuthorized: the instance may not have attributes.
            BadRequest: no attribute can be called so, or a condition is malformed.
            TooLargeAttribute: the value has more than `VALUE_BYTES`.
            TooManyWrites: the instance writes too often.
            PreconditionFailed: a condition does not hold.
            QuotaExceeded: the instance has as much as it may have.
            UnknownCaller: the instance has stopped meanwhile.
        """
        instance, path = _allowed(req), _path(namespace, name)
        value = _read_value(req)
        outcome = self._write(req, instance, path, value)
        resp.status = falcon.HTTP_201 if outcome is Outcome.CREATED else falcon.HTTP_204
        resp.set_header("ETag", etag(value))

    def on_delete(self, req: falcon.Request, resp: falcon.Response, namespace: str, name: str) -> None:
        """Remove it; answer 204, also if it was not there.

        Raises:
            NotAuthorized: the instance may not have attributes.
            BadRequest: no attribute can be called so, or a condition is malformed.
            TooManyWrites: the instance writes too often.
            PreconditionFailed: a condition does not hold.
            UnknownCaller: the instance has stopped meanwhile.
        """
        instance, path = _allowed(req), _path(namespace, name)
        self._write(req, instance, path, None)
        resp.status = falcon.HTTP_204

    def _write(self, req: falcon.Request, instance: Instance, path: str, value: bytes | None) -> Outcome:
        holds = _condition(req)
        if not self._rate_limit.take(instance.id):
            raise TooManyWrites(self._rate_limit.retry_after)
        outcome = self._store.write_attribute(instance, path, value, holds)
        if refusal := _REFUSALS.get(outcome):
            raise refusal()
        return outcome


#: What is answered where nothing was written.
_REFUSALS: dict[Outcome, Callable[[], Refusal]] = {
    Outcome.CONDITION: PreconditionFailed,
    Outcome.TOO_MANY: lambda: QuotaExceeded(f"an instance has at most {MOST_ATTRIBUTES} attributes"),
    Outcome.TOO_LARGE: lambda: QuotaExceeded(f"the attributes of an instance have at most {MOST_BYTES} bytes together"),
    Outcome.NOT_ALLOWED: NotAuthorized,
    Outcome.GONE: UnknownCaller,
}


def _allowed(req: falcon.Request) -> Instance:
    """The request's instance, if it may have attributes."""
    instance = cast("Environ", req.env)[INSTANCE]
    assert instance is not None, "admitted by the gate"
    if ATTRIBUTES not in instance.allowed:
        raise NotAuthorized
    return instance


def _path(namespace: str, name: str) -> str:
    path = f"{namespace}/{name}"
    if not is_path(path):
        raise BadRequest("namespace and key have 1 to 64 letters, digits, dots, dashes and underscores each")
    return path


def _read_value(req: falcon.Request) -> bytes:
    """The body, which is not read if its length says that it is too large."""
    length = req.env.get("CONTENT_LENGTH", "")
    value = b"" if length.isdigit() and int(length) > VALUE_BYTES else req.env["wsgi.input"].read()
    if len(value) > VALUE_BYTES or (length.isdigit() and int(length) > VALUE_BYTES):
        raise TooLargeAttribute(f"the value of an attribute has at most {VALUE_BYTES} bytes")
    return cast("bytes", value)


def _condition(req: falcon.Request) -> Callable[[bytes | None], bool] | None:
    """What the request demands of the present value (RFC 9110, sections 13.1.1 and 13.1.2); None: nothing."""
    wanted, known = strong_tags_of(req.env), tags_of(req.env)
    if wanted is None and known is None:
        return None

    def holds(present: bytes | None) -> bool:
        if present is None:
            return wanted is None
        tag = etag(present)
        return (wanted is None or matches(wanted, tag)) and not matches(known, tag)

    return holds
