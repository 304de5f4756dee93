"""``/1.0``: the instance itself, and how it reports to its host that it is ready."""

from __future__ import annotations

import json
import re
from typing import NoReturn, Protocol

import falcon

from guestapi.api.errors import BadRequest, TooManyChanges, UnknownCaller
from guestapi.dialects import Dialect
from guestapi.encoding import JSON, json_line, quote
from guestapi.model import Init, Instance
from guestapi.rate_limit import RateLimit


class StateStore(Protocol):
    """Where the state is recorded. `api.app.Store` implements it."""

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """As `store.writing.Writer.set_ready`."""
        ...


class Version:
    """``GET /1.0`` of ``lxd-legacy``: the version alone."""

    cacheable = True

    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object."""
        resp.content_type = JSON
        resp.data = json_line({"api_version": "1.0"})


class StateResource:
    """``GET /1.0`` and ``PATCH /1.0``."""

    cacheable = True

    def __init__(self, store: StateStore, host: str, rate_limit: RateLimit, dialect: Dialect) -> None:
        """Serve the state.

        Args:
            store: where a state is recorded.
            host: the location of every instance that has no other.
            rate_limit: how often an instance may change its state. Each change is written and logged.
            dialect: says what is told besides, and how PATCH is answered.
        """
        self._dialect = dialect
        self._store = store
        self._rate_limit = rate_limit
        self._host = host

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON object, its keys in this order."""
        instance: Instance = req.context.instance
        self._describe(instance, resp, ready=instance.ready)

    def _describe(self, instance: Instance, resp: falcon.Response, *, ready: bool) -> None:
        resp.content_type = JSON
        resp.data = json_line(
            {
                "state": "Ready" if ready else "Started",
                "api_version": "1.0",
                "instance_type": instance.type,
                "location": self._host if instance.location is None else instance.location,
                **dict(self._dialect.description),
            }
        )

    def on_patch(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Record ``{"state": "Ready"}`` or ``{"state": "Started"}``. The Content-Type is ignored (curl sends "form").

        Raises:
            BadRequest: the body is not such a document.
            TooManyChanges: the instance changes its state too often.
            UnknownCaller: the instance has stopped meanwhile.
        """
        instance: Instance = req.context.instance
        body = req.env["wsgi.input"].read()
        state = self._read(body)
        if state not in ("Ready", "Started"):
            if self._dialect.patch_reads:
                self._describe(instance, resp, ready=instance.ready)
                return
            raise BadRequest(f"Invalid state {quote(state)}")
        if not self._rate_limit.take(instance.id):
            raise TooManyChanges(self._rate_limit.retry_after)
        if not self._store.set_ready(instance.id, instance.run, state == "Ready", instance.init):
            raise UnknownCaller
        if self._dialect.patch_reads:
            self._describe(instance, resp, ready=state == "Ready")
        else:
            resp.data = b""

    def _read(self, body: bytes) -> str:
        try:
            return read_state(body)
        except BadRequest as error:
            if self._dialect.patch_reads:
                return ""
            raise BadRequest(self._dialect.bad_body + error.text) from None


def read_state(body: bytes) -> str:
    """Read the field ``state`` of the JSON object at the start of `body`; "" if it is absent or null.

    Like Go's decoder, it ignores the case of the name, lets the last of several fields win, and ignores other fields
    and what follows the object.

    Raises:
        BadRequest: there is no JSON object, or its state is not a string.
    """
    # Bytes that are not UTF-8 become lone surrogates, which are not in JSON's grammar either.
    text = body.decode("utf-8", "surrogateescape").lstrip(" \t\r\n")
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
            state = value
    if len(state) > _LONGEST_STATE:
        raise BadRequest("the state is too long")
    # As with Go, each byte that is not UTF-8 and each lone surrogate becomes one U+FFFD.
    return _SURROGATE.sub("\ufffd", state)


_SURROGATE = re.compile("[\ud800-\udfff]")
#: The longest state, in characters, that an error text quotes. Quoting 64 KiB of hostile ones takes 50 ms.
_LONGEST_STATE = 1024


class _Object(list[tuple[str, object]]):
    """A JSON object: its fields in order, repeated ones included."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Numbers are ignored. Python refuses to parse an int of thousands of digits.
_DECODER = json.JSONDecoder(object_pairs_hook=_Object, parse_int=float, parse_constant=_refuse_constant)
