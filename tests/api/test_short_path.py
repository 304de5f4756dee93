"""What is answered on the short path is, byte for byte, what Falcon answers; all else is left to Falcon."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from typing import Any

import pytest

from guestapi.api.app import create
from guestapi.callers.credentials import Credentials
from guestapi.dialects import DIALECTS
from guestapi.model import KeyPolicy
from guestapi.notifications.broker import Broker
from guestapi.store.errors import StoreError
from guestapi.wsgi import CACHEABLE, CALLER, DIALECT, INSTANCE, RAW_PATH, RAW_URI, ROUTE
from tests.api.fakes import EmptyLog, MemoryStore, caller, instance

CONFIG = {
    "user.foo": "bar",
    "user.a/b": "é",
    "user.meta-data": "x: y\n",
    "limits.memory": "1GiB",
    "volatile.eth0.hwaddr": "00:16:3e:00:00:01",
}
DEVICES = {"eth0": {"type": "nic", "nictype": "bridged"}, "root": {"type": "disk", "path": "/"}}
ANSWERED = [
    "/",
    "/1.0",
    "/1.0/config",
    "/1.0/config/user.foo",
    "/1.0/config/user.a%2Fb",
    "/1.0/devices",
    "/1.0/meta-data",
]
NOT_SET = ["/1.0/config/user.none"]
REFUSED = [
    "/1.0/config/limits.memory",
    "/1.0/config/user.foo/",
    "/1.0/none",
    "/1.0/device/none",
    "/2.0",
    "/1.0/config/%ff",
]


def answers(
    path: str, dialect: str, method: str = "GET", who: Any = None, store: MemoryStore | None = None
) -> tuple[list[Any], list[Any], bool]:
    """What the application answers, what Falcon alone does, and whether the first did it without Falcon."""
    store = store or MemoryStore(instance(CONFIG, DEVICES))
    application = create(store, Broker(EmptyLog(), queue_limit=1, subscriptions_per_instance=1))
    found = []
    calls: list[Any] = [application, application.apps[dialect], application.short_paths[dialect].answer]
    for called in calls:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "x",
            "SCRIPT_NAME": "",
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.input": io.BytesIO(),
            RAW_PATH: path,
            RAW_URI: path,
            CALLER: who or caller(),
            DIALECT: dialect,
        }
        started: list[Any] = []
        body = called(environ, lambda *begun, started=started: started.extend(begun[:2]))
        found.append(
            [
                *started,
                None if body is None else b"".join(body),
                environ.get(INSTANCE),
                environ.get(CACHEABLE),
                environ.get(ROUTE),
            ]
        )
    return found[0], found[1], found[2][2] is not None


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("path", [*ANSWERED, "/1.0/device/eth0", *NOT_SET, *REFUSED])
def test_the_same_answer(path: str, dialect: str) -> None:
    """Status, header fields in their order, body, and what the server is told, are those of Falcon."""
    ours, falcons, short = answers(path, dialect)
    assert ours == falcons
    # What is not there, and would be cacheable if it were.
    missing = ours[0] == "404 Not Found" and ours[4] is True
    assert short is (missing or ours[0] == "200 OK")
    assert short or path not in (*ANSWERED, *NOT_SET)


@pytest.mark.parametrize("method", ["HEAD", "PATCH", "POST", "get", "OPTIONS"])
def test_other_methods(method: str) -> None:
    """Only GET is answered on the short path."""
    store = MemoryStore(instance(CONFIG, DEVICES))
    ours, falcons, _short = answers("/1.0/config/user.foo", "incus", method, store=store)
    assert ours == falcons
    assert ours[2] != b"bar"


def test_refused_callers() -> None:
    """Whoever may have no answer gets Falcon's refusal."""
    user = caller()._replace(credentials=Credentials(1, 1000, 1000))
    for who in (user, caller(instance_id=None), caller()._replace(run=99)):
        ours, falcons, short = answers("/1.0/config/user.foo", "incus", who=who)
        assert ours == falcons
        assert ours[0] != "200 OK"
        assert not short


def test_api_that_is_switched_off() -> None:
    """An instance whose API is off gets what Falcon says, and what is open regardless."""
    for path in ANSWERED:
        store = MemoryStore(instance({**CONFIG, "security.guestapi": "false", "security.devlxd": "false"}, DEVICES))
        for dialect in DIALECTS:
            ours, falcons, _short = answers(path, dialect, store=store)
            assert ours == falcons


def test_instance_with_policies() -> None:
    """What policies say is said by Falcon's way."""
    for policy in (KeyPolicy("user.foo", hidden=True), KeyPolicy("user.foo", once=True), KeyPolicy("*", secret=True)):
        store = MemoryStore(replace(instance(CONFIG, DEVICES), policies=(policy,)))
        assert not answers("/1.0/config", "incus", store=store)[2]


def test_store_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that cannot be read is reported as ever."""
    store = MemoryStore(instance(CONFIG, DEVICES))

    def fail(_number: int) -> None:
        raise StoreError("cannot be read")

    monkeypatch.setattr(store, "instance", fail)
    ours, falcons, short = answers("/1.0/config/user.foo", "incus", store=store)
    assert ours == falcons
    assert ours[0].startswith("500")
    assert not short
