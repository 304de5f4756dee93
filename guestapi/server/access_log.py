"""What the service logs of requests, of exceeded limits, and of gunicorn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import gunicorn.glogging

from guestapi import journal
from guestapi.callers.identify import Caller
from guestapi.encoding import printable
from guestapi.journal import LogThrottle
from guestapi.metrics.counters import WorkerCounters
from guestapi.model import Instance, hybrid_number, is_hybrid
from guestapi.server.exchange import Exchange
from guestapi.server.log_budget import LogBudget
from guestapi.settings import LogSettings
from guestapi.store.errors import StoreError
from guestapi.wsgi import EXCEEDED_LIMIT

requests = logging.getLogger("guestapi.requests")

#: The smallest status that is logged, for each value of ``log.requests``.
_LOGGED_FROM = {"all": 0, "refused": 400, "none": 1000}

#: Of how many pairs of instance and limit it is remembered when they were logged.
_REMEMBERED = 4096
#: The most characters of a method, of a request target and of a refusal's text that are logged.
_METHOD, _TARGET, _TEXT = 32, 200, 200
#: Bytes of a target that stand in it as they are; others are percent-encoded.
_UNPRINTABLE = {byte: f"%{byte:02X}" for byte in range(256) if not 0x20 < byte < 0x7F}


class GunicornLogger(gunicorn.glogging.Logger):
    """gunicorn's logger. Its errors go where guestapi's go; its access log is as gunicorn's ``accesslog`` says."""

    def setup(self, cfg: Any) -> None:
        """Set logging up, as gunicorn's Logger. gunicorn calls this again on reload."""
        super().setup(cfg)
        journal.set_up(cfg.loglevel)

    def atoms(self, resp: Any, req: Any, environ: Any, request_time: Any) -> dict[str, Any]:
        """What a line of gunicorn's access log may contain, without what is not printable."""
        atoms = super().atoms(resp, req, environ, request_time)
        return {name: printable(value) if isinstance(value, str) else value for name, value in atoms.items()}


class ExcessLog:
    """Counts how often limits are exceeded, and logs it from time to time, for each instance and limit."""

    def __init__(
        self,
        get_instance: Callable[[int], Instance | None],
        clock: Callable[[], float] = time.monotonic,
        counters: WorkerCounters | None = None,
    ) -> None:
        """Count from zero.

        Args:
            get_instance: returns what the store has under an instance's id.
            clock: returns seconds.
            counters: the worker's.
        """
        self._get_instance = get_instance
        self._throttle = LogThrottle(keys=_REMEMBERED, clock=clock)
        self._counts: dict[tuple[int | None, str], int] = {}
        self._counters = counters or WorkerCounters()

    def count(self, instance_id: int | None, limit: str) -> None:
        """Count that an instance, or None for unknown callers, exceeded the limit of this name."""
        key = instance_id, limit
        self._counts[key] = self._counts.get(key, 0) + 1
        self._counters.count_limit(instance_id, limit)

    def flush(self) -> int:
        """Log what was counted, except for what was logged a short time ago.

        Returns:
            How many times limits were exceeded, as far as it was logged now.
        """
        total = 0
        for key in list(self._counts):
            if self._throttle.admit(key) is None:
                continue
            count = self._counts.pop(key)
            total += count
            instance_id, limit = key
            instance = _find(self._get_instance, instance_id)
            fields = {"LIMIT": limit, "COUNT": str(count), **_instance_fields(instance)}
            who = f"{instance.project}/{instance.name}" if instance else "callers in no registered instance"
            requests.warning("%s: limit %s exceeded %d times", who, limit, count, extra={"fields": fields})
        return total


class RequestLog:
    """Logs requests, as many as the budget of their instance allows, because a guest can send any number of them.

    Attributes:
        logged_from: the smallest status that is logged.
        excesses: exceeded limits.
    """

    def __init__(
        self,
        settings: LogSettings,
        get_instance: Callable[[int], Instance | None],
        clock: Callable[[], float] = time.monotonic,
        counters: WorkerCounters | None = None,
    ) -> None:
        """Log nothing yet.

        Args:
            settings: what is logged.
            get_instance: returns what the store has under an instance's id.
            clock: returns seconds.
            counters: the worker's.
        """
        self._get_instance = get_instance
        self._counters = counters or WorkerCounters()
        self.excesses = ExcessLog(get_instance, clock, self._counters)
        self.logged_from = _LOGGED_FROM[settings.requests]
        self._budget = LogBudget(settings.requests_per_second, settings.instance_bytes_per_second, clock)
        self._left_out: dict[int, int] = {}
        self._throttle = LogThrottle(keys=_REMEMBERED, clock=clock)

    def log_exchange(self, exchange: Exchange) -> None:
        """Log a response of the application, or count it if its request exceeded a limit."""
        status, caller = exchange.code, exchange.caller
        environ = exchange.environ
        if EXCEEDED_LIMIT in environ:
            self.excesses.count(caller.instance_id if caller else None, environ[EXCEEDED_LIMIT])
        elif status >= self.logged_from and self._budget.admit(_budget_key(caller)):
            target = environ["RAW_URI"][:_TARGET].translate(_UNPRINTABLE)
            request = f"{environ['REQUEST_METHOD'][:_METHOD]} {target}"
            instance = exchange.instance or self._find(caller)
            self._log(
                caller, instance, exchange.dialect, status, f"{request} -> {status}, {exchange.seconds * 1000:.1f} ms"
            )

    def log_refusal(self, caller: Caller | None, dialect: str, status: int, text: str, limit: str | None) -> None:
        """Log what the server itself refused, or count it if it exceeded a limit.

        Args:
            caller: who asked; None if it is not known.
            dialect: name of the socket's dialect.
            status: of the response.
            text: of the response.
            limit: name of the exceeded limit; None if there is none.
        """
        if limit is not None:
            self.excesses.count(caller.instance_id if caller else None, limit)
        elif status >= self.logged_from and self._budget.admit(_budget_key(caller)):
            self._log(caller, self._find(caller), dialect, status, f"{status}, {printable(text[:_TEXT])}")

    def flush(self) -> int:
        """Log from time to time which limits were exceeded, and how many requests of an instance were not logged.

        Returns:
            As `ExcessLog.flush`.
        """
        for key, count in self._budget.take_left_out().items():
            self._left_out[key] = self._left_out.get(key, 0) + count
            self._counters.lines_left_out += count
        for key in list(self._left_out):
            if self._throttle.admit(key) is not None:
                count = self._left_out.pop(key)
                instance = _find(self._get_instance, key if key > 0 else None)
                fields = {"COUNT": str(count), **_instance_fields(instance)}
                who = _who(None, instance)
                requests.warning("%s: %d more requests were not logged", who, count, extra={"fields": fields})
        return self.excesses.flush()

    def _find(self, caller: Caller | None) -> Instance | None:
        return _find(self._get_instance, caller.instance_id) if caller else None

    def _log(self, caller: Caller | None, instance: Instance | None, dialect: str, status: int, text: str) -> None:
        fields = _fields(caller, dialect, status, instance)
        line = f"{_who(caller, instance)}: {text}"
        size = len(line) + sum(len(name) + len(value) + 2 for name, value in fields.items())
        self._budget.charge(_budget_key(caller), size)
        self._counters.lines += 1
        requests.info("%s", line, extra={"fields": fields})


def _budget_key(caller: Caller | None) -> int:
    """Who pays for a line: the instance; a number below 0 for an unregistered container; 0 for all others."""
    if caller is None:
        return 0
    return caller.instance_id if caller.instance_id is not None else -(caller.container or 0)


def _find(get_instance: Callable[[int], Instance | None], instance_id: int | None) -> Instance | None:
    if instance_id is None:
        return None
    try:
        return get_instance(instance_id)
    except StoreError:
        return None


def _who(caller: Caller | None, instance: Instance | None) -> str:
    if instance is not None:
        return f"{instance.project}/{instance.name}"
    if caller is None:
        return "unknown caller"
    cid = caller.credentials.cid
    return f"pid {_pid(caller)}" if cid is None or is_hybrid(cid) else f"CID {cid}"


def _pid(caller: Caller) -> int:
    """The process that asks; of a virtual machine without a CID, its VMM, be it known or not."""
    cid = caller.credentials.cid
    return caller.credentials.pid if cid is None else cid - hybrid_number(0)


def _instance_fields(instance: Instance | None) -> dict[str, str]:
    return {} if instance is None else {"INSTANCE": instance.name, "PROJECT": instance.project}


def _fields(caller: Caller | None, dialect: str, status: int, instance: Instance | None) -> dict[str, str]:
    fields = {"DIALECT": dialect, "STATUS": str(status), **_instance_fields(instance)}
    if caller is not None and caller.credentials.cid is not None and not is_hybrid(caller.credentials.cid):
        fields |= {"CALLER_CID": str(caller.credentials.cid)}
    elif caller is not None:
        fields |= {"CALLER_PID": str(_pid(caller)), "CALLER_UID": str(caller.credentials.uid)}
    return fields
