"""One request and its response, for the log and for gunicorn's hooks."""

from __future__ import annotations

from guestapi.callers.identify import Caller
from guestapi.metrics.counters import Durations
from guestapi.model import Instance
from guestapi.wsgi import CALLER, INSTANCE, Environ, Headers


class Exchange:
    """A request that was answered. gunicorn's hooks get it as ``resp`` and read its attributes.

    Attributes:
        environ: of the request, without its instance.
        caller: who asked; None while the exchange is cached.
        dialect: name of the socket's dialect.
        status: of the response, like ``200 OK``.
        code: of the response, as a number.
        headers: header fields of the response, as the application set them.
        sent: bytes of the response's body.
        seconds: from the end of the request's head to the end of the response.
        instance: the admitted instance; None if none was admitted, or while the exchange is cached.
        durations: where it was counted; None: not yet.
    """

    __slots__ = (
        "caller",
        "code",
        "dialect",
        "durations",
        "environ",
        "headers",
        "instance",
        "seconds",
        "sent",
        "status",
    )

    def __init__(
        self,
        environ: Environ,
        caller: Caller,
        dialect: str,
        status: str,
        headers: Headers,
        sent: int,
        seconds: float,
    ) -> None:
        self.environ = environ
        self.caller: Caller | None = caller
        self.dialect = dialect
        self.status = status
        self.code = int(status[:3])
        self.headers = headers
        self.sent = sent
        self.seconds = seconds
        self.instance: Instance | None = environ.pop(INSTANCE, None)
        self.durations: Durations | None = None

    def detach(self) -> None:
        """Drop caller and instance, so that a cached exchange keeps neither of them in memory."""
        del self.environ[CALLER]
        self.instance = self.caller = None

    def repeat(self, caller: Caller, instance: Instance | None, seconds: float) -> None:
        """Describe the same exchange with another caller of the same instance.

        Args:
            caller: who asks now.
            instance: its instance.
            seconds: how long the response took.
        """
        self.caller = self.environ[CALLER] = caller
        self.instance = instance
        self.seconds = seconds
