"""What became of a request, for whoever keeps account of it."""

from __future__ import annotations

from guestapi.callers.identify import Caller
from guestapi.model import Instance
from guestapi.wsgi import CALLER, INSTANCE, Environ, Headers


class Answer:
    """What became of a request: for the logs and for gunicorn's hooks, which know such an object as ``resp``.

    Attributes:
        code: the status as a number.
        instance: the one that was admitted, if one was.
        sent: bytes of the body.
        seconds: from the end of the request's head to the end of the answer.
    """

    __slots__ = ("caller", "code", "dialect", "environ", "headers", "instance", "seconds", "sent", "status")

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

    def forget(self) -> None:
        """Keep of the caller and of the instance nothing alive: the answer is kept, to be given again."""
        del self.environ[CALLER]
        self.instance = self.caller = None

    def again(self, caller: Caller, instance: Instance | None, seconds: float) -> None:
        """It was given once more."""
        self.caller = self.environ[CALLER] = caller
        self.instance = instance
        self.seconds = seconds
