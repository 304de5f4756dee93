"""gunicorn's pre_request, post_request and access log, for operators who set them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from guestapi.server.exchange import Exchange

log = logging.getLogger(__name__)


class HookRequest:
    """What gunicorn's hooks and access log read of a request."""

    def __init__(self, exchange: Exchange) -> None:
        environ = exchange.environ
        self.method = environ["REQUEST_METHOD"]
        self.uri = environ["RAW_URI"]
        self.path = environ["RAW_PATH"]
        self.query = environ["QUERY_STRING"]
        self.version = (1, int(environ["SERVER_PROTOCOL"][-1]))
        self.headers = [
            (name.removeprefix("HTTP_").replace("_", "-"), value)
            for name, value in environ.items()
            if name.startswith("HTTP_") or name in ("CONTENT_TYPE", "CONTENT_LENGTH")
        ]


class GunicornHooks:
    """Calls gunicorn's hooks of requests.

    Attributes:
        wanted: whether there is anything to call.
    """

    def __init__(self, config: Any, logger: Any, worker: object) -> None:
        """Read which hooks are set.

        Args:
            config: gunicorn's configuration.
            logger: gunicorn's logger, which writes its access log.
            worker: what hooks get as their worker.
        """
        self._logger = logger
        self._worker = worker
        self._pre_request = _unless_default(config, "pre_request")
        self._post_request = _unless_default(config, "post_request")
        self.wanted = bool(self._pre_request or self._post_request or logger.access_log_enabled)

    def call(self, exchange: Exchange) -> None:
        """Call the hooks of one request. Both run after it, when its response was sent."""
        request = HookRequest(exchange)
        try:
            if self._pre_request:
                self._pre_request(self._worker, request)
            self._logger.access(exchange, request, exchange.environ, timedelta(seconds=exchange.seconds))
            if self._post_request:
                self._post_request(self._worker, request, exchange.environ, exchange)
        except Exception:
            log.exception("a hook of gunicorn.conf.py failed")


def _unless_default(config: Any, name: str) -> Callable[..., object] | None:
    setting = config.settings[name]
    return None if setting.get() is type(setting).default else setting.get()
