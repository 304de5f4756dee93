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
from guestapi.store.errors import StoreError
from guestapi.wsgi import EXCEEDED_LIMIT

requests = logging.getLogger("guestapi.requests")

#: From which status on a request is logged, for each choice of ``log.requests``.
_LOGGED_FROM = {"all": 0, "refused": 400, "none": 1000}

#: Seconds between two lines about the same instance and limit.
_TELL_SECONDS = 10.0


class GunicornLogger(gunicorn.glogging.Logger):
    """gunicorn's logger, whose errors go where ours go. Its access log stays as gunicorn's ``accesslog`` says."""

    def setup(self, cfg: Any) -> None:
        """As gunicorn.glogging.Logger; called again on reload."""
        super().setup(cfg)
        journal.set_up(cfg.loglevel)


class Excesses:
    """Counts what exceeds a limit, and tells the operator now and then; by instance, so that none hides another."""

    def __init__(self, look: Callable[[int], Instance | None], clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        look: what the store holds under an instance's id.
        clock: in seconds.
        """
        self._look = look
        self._clock = clock
        self._counts: dict[tuple[int | None, str], int] = {}
        self._told: dict[tuple[int | None, str], float] = {}

    def count(self, instance_id: int | None, limit: str) -> None:
        """An instance, or None for callers in no known one, has exceeded this limit."""
        key = instance_id, limit
        self._counts[key] = self._counts.get(key, 0) + 1

    def tell(self) -> int:
        """Log what there is, a line for each instance and limit every so many seconds; how much it comes to."""
        now = self._clock()
        self._told = {key: then for key, then in self._told.items() if now < then + _TELL_SECONDS}
        total = 0
        for key in [key for key in self._counts if key not in self._told]:
            count = self._counts.pop(key)
            self._told[key] = now
            total += count
            instance_id, limit = key
            instance = _find(self._look, instance_id)
            fields = {"LIMIT": limit, "COUNT": str(count), **_instance_fields(instance)}
            who = f"{instance.project}/{instance.name}" if instance else "callers in no known instance"
            requests.warning("%s: over the limit %s, %d times", who, limit, count, extra={"fields": fields})
        return total


class RequestLog:
    """Logs requests, at most so many a second: a guest can make as many as it likes.

    Attributes:
        tells_from: the smallest status of those that are logged.
    """

    def __init__(self, settings: Log, look: Callable[[int], Instance | None]) -> None:
        """Args:
        settings: what is logged.
        look: what the store holds under an instance's id.
        """
        self._look = look
        self.excesses = Excesses(look)
        self.tells_from = _LOGGED_FROM[settings.requests]
        self._each_second = settings.requests_per_second
        self._second = 0
        self._lines = 0

    def answered(self, answer: Answer) -> None:
        """Log a response of the application, if it is of those that are logged."""
        status = answer.code
        if EXCEEDED_LIMIT in answer.environ:
            self.excesses.count(answer.caller.instance_id if answer.caller else None, answer.environ[EXCEEDED_LIMIT])
        elif status >= self.tells_from and self._may_log():
            environ = answer.environ
            fields = _fields(answer.caller, answer.dialect, status, answer.instance)
            who = _who(answer.caller, answer.instance)
            request = f"{environ['REQUEST_METHOD']} {environ['RAW_URI'][:200]}"
            milliseconds = answer.seconds * 1000
            requests.info("%s: %s -> %d, %.1f ms", who, request, status, milliseconds, extra={"fields": fields})

    def refused(self, caller: Caller | None, dialect: str, status: int, text: str, limit: str | None) -> None:
        """Log what the server itself refused; or count it, if the instance has exceeded a limit."""
        if limit is not None:
            self.excesses.count(caller.instance_id if caller else None, limit)
        elif status >= self.tells_from and self._may_log():
            instance = _find(self._look, caller.instance_id) if caller else None
            fields = _fields(caller, dialect, status, instance)
            requests.info("%s: %d, %s", _who(caller, instance), status, text, extra={"fields": fields})

    def _may_log(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            if self._lines > self._each_second:
                requests.warning("%d more requests were not logged", self._lines - self._each_second)
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= self._each_second


def _find(look: Callable[[int], Instance | None], instance_id: int | None) -> Instance | None:
    if instance_id is None:
        return None
    try:
        return look(instance_id)
    except StoreError:
        return None


def _who(caller: Caller | None, instance: Instance | None) -> str:
    if instance is not None:
        return f"{instance.project}/{instance.name}"
    return f"pid {caller.credentials.pid}" if caller else "unknown caller"


def _instance_fields(instance: Instance | None) -> dict[str, str]:
    return {} if instance is None else {"INSTANCE": instance.name, "PROJECT": instance.project}


def _fields(caller: Caller | None, dialect: str, status: int, instance: Instance | None) -> dict[str, str]:
    fields = {"DIALECT": dialect, "STATUS": str(status), **_instance_fields(instance)}
    if caller is not None:
        fields |= {"CALLER_PID": str(caller.credentials.pid), "CALLER_UID": str(caller.credentials.uid)}
    return fields
