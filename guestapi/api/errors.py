"""Every refusal as an exception, and the one place that renders refusals: one line of text and LF.

No text here discloses anything of the host. What went wrong inside is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import falcon

from guestapi.dialects import DIALECTS, Dialect
from guestapi.encoding import JSON, quote, to_json
from guestapi.wsgi import DIALECT, EXCEEDED_LIMIT

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
#: The most characters of a method that a refusal repeats.
_METHOD = 64
NOSNIFF = {"X-Content-Type-Options": "nosniff"}


class Refusal(falcon.HTTPError):
    """A request is refused.

    Attributes:
        status_code: of the response.
        text: one line for the guest, which learns nothing else.
    """

    status_code = 500
    text = "internal error"

    def __init__(self, text: str | None = None, *, headers: dict[str, str] | None = None) -> None:
        """Refuse a request.

        Args:
            text: one line for the guest; None for the text of the class.
            headers: additional header fields.
        """
        self.text = text or self.text
        super().__init__(self.status_code, title=self.text, headers={**NOSNIFF, **(headers or {})})

    def body(self) -> tuple[str, bytes]:
        """Return Content-Type and bytes of the response's body."""
        return TEXT, f"{self.text}\n".encode()


class UnknownCaller(Refusal):
    """The caller is in no registered instance, or not any more. On status 500, cloud-init tries again."""

    text = "pid not in container?"


class NotRoot(Refusal):
    """The caller is not root in its instance."""

    status_code = 401
    text = "Access denied for non-root user"


class NotAuthorized(Refusal):
    """The API is switched off for the instance, or the guest may not read this."""

    status_code = 403
    text = "not authorized"


class NotFound(Refusal):
    """The endpoint exists, what was asked of it does not."""

    status_code = 404
    text = "not found"


class ImageNotFound(Refusal):
    """The caller can have no image of this name, whatever the reason. The response is that of the daemon's main API."""

    status_code = 404

    def __init__(self, name: str, dialect: Dialect) -> None:
        """Refuse an image.

        Args:
            name: as the caller has it.
            dialect: says it in its words.
        """
        self._end = dialect.main_api_end.encode()
        super().__init__(dialect.no_image.format(quote(name)))

    def body(self) -> tuple[str, bytes]:
        """Return a JSON object with the fields of the main API's errors."""
        document = {"type": "error", "status": "", "status_code": 0, "operation": "", "error_code": self.status_code}
        return JSON, to_json({**document, "error": self.text, "metadata": None}, html=True) + self._end


class RangeNotSatisfiable(Refusal):
    """The image has none of the requested bytes (RFC 9110, section 15.5.17)."""

    status_code = 416


class PreconditionFailed(Refusal):
    """A condition of the request is not met (RFC 9110, section 15.5.13)."""

    status_code = 412
    text = "precondition failed"


class NoSuchPath(Refusal):
    """There is no such endpoint."""

    status_code = 404
    text = "404 page not found"


class MethodNotAllowed(Refusal):
    """The endpoint does not have this method; ``Allow`` lists those it has (RFC 9110, section 15.5.6)."""

    status_code = 405

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__(f'method "{method[:_METHOD]}" not allowed', headers={"Allow": ", ".join(allowed)})


class NotImplementedHere(Refusal):
    """The endpoint does not have this method, although others do (RFC 9110, section 15.6.2)."""

    status_code = 501
    text = "Not Implemented"


def refuse_method(method: str, allowed: Sequence[str], dialect: Dialect) -> Refusal:
    """Make the refusal of a method that an endpoint does not have.

    Args:
        method: of the request.
        allowed: what the endpoint has.
        dialect: of the socket.
    """
    if dialect.knows_methods is None:
        return MethodNotAllowed(method, allowed)
    return NotImplementedHere() if method in dialect.knows_methods else NotFound()


class BadRequest(Refusal):
    """The request is malformed. The text says what would be right."""

    status_code = 400
    text = "bad request"


class OverLimit(Refusal):
    """The instance exceeds a limit (RFC 6585, section 4).

    Attributes:
        limit: name of the setting in ``[limits]``. It is noted in the environ (`EXCEEDED_LIMIT`) for the log.
    """

    status_code = 429
    limit: str

    def __init__(self, retry_after: int) -> None:
        """Refuse a request for `retry_after` seconds."""
        super().__init__(headers={"Retry-After": str(retry_after)})


class TooManyChanges(OverLimit):
    """The instance changes its state too often."""

    text = "too many changes of state"
    limit = "writes_per_second"


class TooManyTokens(OverLimit):
    """The instance asks for tokens too often."""

    text = "too many requests for a token"
    limit = "writes_per_second"


class TooLargeAttribute(Refusal):
    """The value of an attribute has too many bytes (RFC 9110, section 15.5.14)."""

    status_code = 413


class QuotaExceeded(Refusal):
    """The instance would have more attributes than it may have (RFC 4918, section 11.5)."""

    status_code = 507


class TooManyWrites(OverLimit):
    """The instance writes attributes too often."""

    text = "too many writes of attributes"
    limit = "writes_per_second"


class TooManyAcknowledgements(OverLimit):
    """The instance acknowledges notices too often."""

    text = "too many acknowledgements"
    limit = "writes_per_second"


class TooManyStreams(OverLimit):
    """The instance has as many event streams as it may have."""

    text = "too many event streams of this instance"
    limit = "streams_per_instance"


class TooManyWaits(OverLimit):
    """The instance has as many event streams and waiting requests as it may have."""

    text = "too many waiting requests and event streams of this instance"
    limit = "streams_per_instance"


class TemporarilyUnavailable(Refusal):
    """The host has a temporary fault. The status is 500, not 503, because cloud-init tries again only on 500."""

    text = "temporarily unavailable, try again"


def render(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError) -> None:
    """Render a refusal (a Falcon error serializer)."""
    if isinstance(error, OverLimit):
        request.env[EXCEEDED_LIMIT] = error.limit
    if isinstance(error, Refusal):
        words = DIALECTS[request.env[DIALECT]].words
        if error.text in words:
            error.text = words[error.text]
        response.content_type, response.data = error.body()
    else:
        response.content_type, response.data = TEXT, f"{error.title}\n".encode()


def handle_unexpected(request: falcon.Request, response: falcon.Response, error: Exception, _params: object) -> None:
    """Log an error that nobody expected, and tell the guest nothing of it (a Falcon error handler)."""
    log.error("unexpected error", exc_info=error)
    refusal = Refusal()
    response.status = refusal.status
    response.set_headers(NOSNIFF)
    render(request, response, refusal)
