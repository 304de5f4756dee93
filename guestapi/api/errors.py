"""Every refusal, as an exception, and the one place where refusals become bytes: one line, and LF.

No text here carries anything of the host. What went wrong inside goes to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import falcon

from guestapi.api.encoding import JSON, encode, quote

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
#: Where in the environ it says which limit a request has exceeded.
LIMIT = "guestapi.limit"
NOSNIFF = {"X-Content-Type-Options": "nosniff"}


class Refusal(falcon.HTTPError):
    """A request is refused: `text`, one line for the guest, is all that it is told."""

    status_code = 500
    text = "internal error"

    def __init__(self, text: str | None = None, *, headers: dict[str, str] | None = None) -> None:
        self.text = text or self.text
        super().__init__(self.status_code, title=self.text, headers={**NOSNIFF, **(headers or {})})

    def body(self) -> tuple[str, bytes]:
        """What the guest is told: Content-Type and bytes."""
        return TEXT, f"{self.text}\n".encode()


class UnknownCaller(Refusal):
    """The caller is in no known instance, or it can no longer be told in which. 500: cloud-init tries again."""

    text = "pid not in container?"


class NotRoot(Refusal):
    """The caller is not root in its instance."""

    status_code = 401
    text = "Access denied for non-root user"


class NotAuthorized(Refusal):
    """The instance is switched off, or this may not be read."""

    status_code = 403
    text = "not authorized"


class NotFound(Refusal):
    """The endpoint is there, what was asked of it is not."""

    status_code = 404
    text = "not found"


class ImageNotFound(Refusal):
    """There is no image for the caller under this name, whatever the reason; told as the main API tells it."""

    status_code = 404

    def __init__(self, name: str) -> None:
        super().__init__(f"Image {quote(name)} not found")

    def body(self) -> tuple[str, bytes]:
        """A JSON object, as `api.Response` of Incus has its fields."""
        document = {"type": "error", "status": "", "status_code": 0, "operation": "", "error_code": self.status_code}
        return JSON, encode({**document, "error": self.text, "metadata": None}, html=True)


class RangeNotSatisfiable(Refusal):
    """None of the bytes that were asked for is there (RFC 9110, section 15.5.17)."""

    status_code = 416


class PreconditionFailed(Refusal):
    """It is not what the client takes it for (RFC 9110, section 15.5.13)."""

    status_code = 412
    text = "precondition failed"


class NoSuchPath(Refusal):
    """There is no such endpoint."""

    status_code = 404
    text = "404 page not found"


class MethodNotAllowed(Refusal):
    """The endpoint does not offer this method; ``Allow`` says which it does (RFC 9110, section 15.5.6)."""

    status_code = 405

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__(f'method "{method}" not allowed', headers={"Allow": ", ".join(allowed)})


class BadRequest(Refusal):
    """The request cannot be understood; the text says what would be right."""

    status_code = 400
    text = "bad request"


class TooLarge(Refusal):
    """The body is larger than the server takes."""

    status_code = 413
    text = "body too large"


class OverLimit(Refusal):
    """The instance has or does more than it may (RFC 6585, section 4).

    Attributes:
        limit: which setting says so; noted in the environ, under `LIMIT`, for the log.
    """

    status_code = 429
    limit: str

    def __init__(self, retry_after: int) -> None:
        super().__init__(headers={"Retry-After": str(retry_after)})


class TooManyChanges(OverLimit):
    """The instance changes its state too often."""

    text = "too many changes of state"
    limit = "writes_per_second"


class TooManyStreams(OverLimit):
    """The instance has as many streams open as it may."""

    text = "too many event streams of this instance"
    limit = "streams_per_instance"


class PassingFault(Refusal):
    """Something on the host is wrong just now. 500, never 503: cloud-init tries again on 500 alone."""

    text = "temporarily unavailable, try again"


def render(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """The body of every refusal (a Falcon error serializer)."""
    if isinstance(error, OverLimit):
        request.env[LIMIT] = error.limit
    if isinstance(error, Refusal):
        response.content_type, response.data = error.body()
    else:
        response.content_type, response.data = TEXT, f"{error.title}\n".encode()


def unexpected(request: falcon.Request, response: falcon.Response, error: Exception, _params: object) -> None:
    """A mistake of ours: the traceback is for the log, the guest learns nothing of it (a Falcon error handler)."""
    log.error("unexpected error", exc_info=error)
    refusal = Refusal()
    response.status = refusal.status
    response.set_headers(NOSNIFF)
    render(request, response, refusal)
