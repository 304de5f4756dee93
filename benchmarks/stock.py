"""The same Falcon application under gunicorn's own gevent worker: ``gunicorn -k gevent benchmarks.stock:application``.

That worker has no peer credentials, so the caller is identified at its start: ``GUESTAPI_CONFIG`` names the
configuration, ``BENCHMARK_INSTANCE`` the instance of all requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from guestapi import settings
from guestapi.api import app
from guestapi.callers import namespaces
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller, LiveInit
from guestapi.server.store_thread import OffloadedStore
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.wsgi import CALLER, DIALECT, RAW_PATH, RAW_URI, Environ, StartResponse

_SETTINGS = settings.load(settings.find(None))
_STORE = OffloadedStore(_SETTINGS)
_APPLICATION = app.create(_STORE, _STORE.broker, _SETTINGS.limits)


def _caller() -> Caller:
    with view(_SETTINGS.store.url) as store:
        instance = get_instance(store, "default", os.environ["BENCHMARK_INSTANCE"])
    init = instance.init
    assert init is not None
    root = namespaces.examine(init.pid).root_uid
    assert root is not None
    live = LiveInit(init, os.pidfd_open(init.pid), root)
    return Caller(Credentials(init.pid, root, root), instance.id, instance.run, live)


_CALLER = _caller()


def application(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    """Answer a request, as a WSGI application."""
    environ[CALLER] = _CALLER
    environ[DIALECT] = "incus"
    environ[RAW_PATH] = environ[RAW_URI].partition("?")[0]
    return _APPLICATION(environ, start_response)
