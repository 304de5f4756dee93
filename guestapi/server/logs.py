"""What the service logs, of gunicorn and of requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import gunicorn.glogging

from guestapi import journal
from guestapi.callers.identify import Caller
from guestapi.model import Instance
from guestapi.server.answer import Answer
from guestapi.settings import Log
from guestapi.store.schema import StoreError

requests = logging.getLogger("guestapi.requests")

#: From which status on a request is logged, for each choice of ``log.requests``.
_LOGGED_FROM = {"all": 0, "refused": 400, "none": 1000}


class GunicornLogger(gunicorn.glogging.Logger):
    """gunicorn's logger, whose errors go where ours go. Its access log stays as gunicorn's ``accesslog`` says."""

    def setup(self, cfg: Any) -> None:
        """As gunicorn.glogging.Logger; called again on reload."""
        super().setup(cfg)
        journal.set_up(cfg.loglevel)


class RequestLog:
    """Logs requests, at most so many a second: a guest can make as many as it likes."""

    def __init__(self, settings: Log, look: Callable[[int], Instance | None]) -> None:
        """Args:
        settings: what is logged.
        look: what the store holds under an instance's id.
        """
        self._look = look
        self._from = _LOGGED_FROM[settings.requests]
        self._each_second = settings.requests_per_second
        self._second = 0
        self._lines = 0

    def answered(self, answer: Answer) -> None:
        """Log a response of the application, if it is of those that are logged."""
        status = answer.code
        if status >= self._from and self._may_log():
            environ = answer.environ
            fields = _fields(answer.caller, answer.dialect, status, answer.instance)
            who = _who(answer.caller, answer.instance)
            request = f"{environ['REQUEST_METHOD']} {environ['RAW_URI'][:200]}"
            milliseconds = answer.seconds * 1000
            requests.info("%s: %s -> %d, %.1f ms", who, request, status, milliseconds, extra={"fields": fields})

    def refused(self, caller: Caller | None, dialect: str, status: int, text: str) -> None:
        """Log what the server itself refused."""
        if status >= self._from and self._may_log():
            instance = self._find(caller)
            fields = _fields(caller, dialect, status, instance)
            requests.info("%s: %d, %s", _who(caller, instance), status, text, extra={"fields": fields})

    def _find(self, caller: Caller | None) -> Instance | None:
        if caller is None or caller.instance_id is None:
            return None
        try:
            return self._look(caller.instance_id)
        except StoreError:
            return None

    def _may_log(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            if self._lines > self._each_second:
                requests.warning("%d more requests were not logged", self._lines - self._each_second)
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= self._each_second


def _who(caller: Caller | None, instance: Instance | None) -> str:
    if instance is not None:
        return f"{instance.project}/{instance.name}"
    return f"pid {caller.credentials.pid}" if caller else "unknown caller"


def _fields(caller: Caller | None, dialect: str, status: int, instance: Instance | None) -> dict[str, str]:
    fields = {"DIALECT": dialect, "STATUS": str(status)}
    if instance is not None:
        fields |= {"INSTANCE": instance.name, "PROJECT": instance.project}
    if caller is not None:
        fields |= {"CALLER_PID": str(caller.credentials.pid), "CALLER_UID": str(caller.credentials.uid)}
    return fields
