"""``/1.0``: the instance itself, and how it tells its host that it is ready."""

from __future__ import annotations

import json
import re
from typing import NoReturn, Protocol

import falcon

from guestapi.api.buckets import Buckets
from guestapi.api.encoding import JSON, encode, quote
from guestapi.api.errors import BadRequest, TooManyChanges, UnknownCaller
from guestapi.model import Init, Instance


class Notes(Protocol):
    """Where the state is noted: `api.app.Store`."""

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `store.writing.Writer.set_ready`."""
        ...


class Version:
    """``GET /1.0`` of old: no more than the version."""

    lasting = True

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON object."""
        resp.content_type = JSON
        resp.data = encode({"api_version": "1.0"})


class State:
    """``GET /1.0`` and ``PATCH /1.0``."""

    lasting = True

    def __init__(self, notes: Notes, host: str, buckets: Buckets) -> None:
        """Args:
        notes: where a state is noted.
        host: this host's name, the location of every instance that has no other.
        buckets: how often an instance may say something: each change is written, and told to the operator.
        """
        self._notes = notes
        self._buckets = buckets
        self._host = host

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """A JSON object, its keys in this order."""
        instance: Instance = req.context.instance
        resp.content_type = JSON
        resp.data = encode(
            {
                "state": "Ready" if instance.ready else "Started",
                "api_version": "1.0",
                "instance_type": instance.type,
                "location": self._host if instance.location is None else instance.location,
            }
        )

    def on_patch(self, req: falcon.Request, resp: falcon.Response) -> None:
        """``{"state": "Ready"}`` or ``Started``; what the Content-Type says does not matter (curl says "form")."""
        instance: Instance = req.context.instance
        state = read_state(req.env["wsgi.input"].read())
        if state not in ("Ready", "Started"):
            raise BadRequest(f"Invalid state {quote(state)}")
        if not self._buckets.take(instance.id):
            raise TooManyChanges
        if not self._notes.set_ready(instance.id, instance.run, state == "Ready", instance.init):
            raise UnknownCaller
        resp.data = b""


def read_state(body: bytes) -> str:
    """The field ``state`` of the JSON object at the start of `body`; "" if it is absent or null.

    As Go's decoder does, it matches the name without case, lets the last one of several win, skips other fields, and
    does not look at what follows the object.

    Raises:
        BadRequest: there is no JSON object, or its state is no string.
    """
    # As Go: each byte that is no UTF-8 becomes one U+FFFD, where Python's "replace" makes one of several.
    text = _ESCAPED.sub("\ufffd", body.decode("utf-8", "surrogateescape")).lstrip(" \t\r\n")
    if not text:
        raise BadRequest('the body is empty; send {"state": "Ready"}')
    try:
        document, _end = _DECODER.raw_decode(text)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError:
        raise BadRequest('the body is not valid JSON; send {"state": "Ready"}') from None
    if document is None:
        return ""
    if not isinstance(document, _Object):
        raise BadRequest('the body is not a JSON object; send {"state": "Ready"}')
    state = ""
    for name, value in document:
        if name.casefold() == "state" and value is not None:
            if not isinstance(value, str):
                raise BadRequest('state is not a string; send {"state": "Ready"}')
            # A lone surrogate has no UTF-8; Go replaces it.
            state = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return state


_ESCAPED = re.compile("[\udc80-\udcff]")


class _Object(list[tuple[str, object]]):
    """A JSON object with its fields in order, doubles included."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# No number is ever looked at, and an int of thousands of digits would be refused.
_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=float, parse_constant=_refuse_constant)
