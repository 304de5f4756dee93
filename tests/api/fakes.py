"""An instance, its callers and a store in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from guestapi.api.app import GuestApplication, create
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller, LiveInit
from guestapi.callers.namespaces import IdMap
from guestapi.model import Device, Image, Init, Instance, KeyPolicy, Notification
from guestapi.notifications.broker import Broker
from guestapi.store.attributes import MOST_ATTRIBUTES, Outcome
from guestapi.store.images import open_files
from guestapi.store.notices import Notice
from guestapi.store.rows import Entries
from guestapi.wsgi import CALLER, DIALECT, Environ

T = TypeVar("T")

#: The host UID of root in the instance.
ROOT = 100_000
CLOUD_INIT_ID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"


#: The init of instance 7.
INIT = Init(pid=4242, start_time=1, boot_id="00000000-0000-0000-0000-000000000000", namespace=4026532000)


class StandIn(LiveInit):
    """An init whose life the test sets."""

    def __init__(self, *, living: bool = True) -> None:
        self.init = INIT
        self.root_uid = ROOT
        self.living = living

    def __del__(self) -> None:
        """Close nothing."""

    def users(self, caller: int) -> IdMap:
        """Return nobody: it cannot be told."""
        return ()

    def alive(self) -> bool:
        """Return what the test has set."""
        return self.living

    __slots__ = ("living",)


class Mapped(StandIn):
    """An init whose container has its users from `ROOT` on."""

    __slots__ = ()

    def users(self, caller: int) -> IdMap:
        """Return its map."""
        return ((0, ROOT, 65536),)


def caller(*, uid: int = ROOT, run: int = 1, living: bool = True, instance_id: int | None = 7) -> Caller:
    """Return a caller in instance 7."""
    init = None if instance_id is None else StandIn(living=living)
    return Caller(Credentials(4242, uid, uid), instance_id, run, init)


def instance(
    config: Mapping[str, str] | None = None,
    devices: Mapping[str, Device] | None = None,
    *,
    run: int = 1,
    ready: bool = False,
    location: str | None = None,
) -> Instance:
    """Return instance 7, called c1, in its first run."""
    return Instance(
        id=7,
        revision=1,
        run=run,
        project="default",
        name="c1",
        type="container",
        uuid=CLOUD_INIT_ID,
        cloud_init_id=CLOUD_INIT_ID,
        location=location,
        ready=ready,
        init=INIT,
        config=config or {},
        devices=devices or {},
    )


@dataclass
class MemoryStore:
    """A store of one instance that records calls. If `fault` is set, it is raised instead."""

    held: Instance | None
    reported: list[tuple[int, int, bool]] = field(default_factory=list)
    fault: Exception | None = None
    over: bool = False
    images: dict[str, Image] = field(default_factory=dict)
    large_values: dict[str, str] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)
    where: Path = Path("/nonexistent")
    event_id: int = 0
    announced: list[Notice] = field(default_factory=list)
    said: dict[str, bytes] = field(default_factory=dict)
    outcome: Outcome | None = None

    def instance(self, instance_id: int) -> Instance | None:
        """Return the instance if the id is its own."""
        if self.fault is not None:
            raise self.fault
        return self.held if self.held is not None and self.held.id == instance_id else None

    def seen(self, instance_id: int) -> Instance | None:
        """Return what `instance` does."""
        return self.instance(instance_id)

    def set_ready(self, instance_id: int, run: int, ready: bool, init: Init | None = None) -> bool:
        """Record the state; refuse it if the run is over."""
        self.reported.append((instance_id, run, ready))
        return not self.over

    def read_value(self, instance: Instance, key: str) -> str | None:
        """Return one of the large values, if this is the instance in the store."""
        self.read.append(key)
        return self.large_values.get(key) if instance is self.held else None

    def policies_of(self, instance_id: int) -> tuple[KeyPolicy, ...]:
        """Return the policies of the instance."""
        found = self.instance(instance_id)
        return () if found is None else found.policies

    def snapshot_of(self, instance_id: int) -> tuple[Instance | None, int]:
        """Return the instance and the event id."""
        return self.instance(instance_id), self.event_id

    def read_value_at(self, instance: Instance, key: str, build: Callable[[str], T]) -> tuple[T | None, int]:
        """Return the result of `build` for the value, and the event id."""
        value = self.read_value(instance, key)
        return None if value is None else build(value), self.event_id

    def spend(self, instance: Instance, key: str, pid: int, uid: int) -> str | None:
        """Give the value, and have the instance without it from now on."""
        if self.held is None:
            return None
        config = dict(self.held.config)
        value = config.pop(key, None)
        self.held = replace(self.held, config=config)
        return value

    def read_whole(self, instance: Instance, build: Callable[[Instance], T]) -> tuple[Instance, int, T] | None:
        """Return the instance with its large values, the event id, and the result of `build` for it."""
        if self.held is None:
            return None
        whole = replace(self.held, config={**self.held.config, **self.large_values}, large=frozenset())
        return whole, self.event_id, build(whole)

    def notices(self, instance_id: int) -> list[Notice]:
        """Return what was announced, if this is the instance in the store."""
        return list(self.announced) if self.instance(instance_id) else []

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """Mark a notice."""
        self.announced = [one._replace(status="acknowledged") if one.id == notice_id else one for one in self.announced]
        return any(one.id == notice_id for one in self.announced)

    def attributes(self, instance: Instance) -> list[str]:
        """Return the paths of what was said."""
        return sorted(self.said)

    def attribute(self, instance: Instance, path: str) -> bytes | None:
        """Return what was said."""
        return self.said.get(path)

    def write_attribute(
        self, instance: Instance, path: str, value: bytes | None, holds: Callable[[bytes | None], bool] | None
    ) -> Outcome:
        """Keep what is said, if the condition holds; or return `outcome`, if there is one."""
        present = self.said.get(path)
        if self.outcome is not None:
            return self.outcome
        if holds is not None and not holds(present):
            return Outcome.CONDITION
        if value is not None and present is None and len(self.said) >= MOST_ATTRIBUTES:
            return Outcome.TOO_MANY
        self.said.pop(path, None)
        if value is not None:
            self.said[path] = value
        return Outcome.DONE if present is not None or value is None else Outcome.CREATED

    def image(self, fingerprint: str) -> Image | None:
        """Return one of the images."""
        return self.images.get(fingerprint)

    def open_image(self, image: Image) -> list[int]:
        """Open the image's files in the directory."""
        return open_files(self.where, image)


class EmptyLog:
    """An empty change log."""

    replaced = 0

    def latest(self) -> int:
        """Return the id 0."""
        return 0

    def entries(
        self,
        after: int,
        limit: int,
        *,
        instance_id: int | None = None,
        until: int | None = None,
        most_bytes: int | None = None,
    ) -> Entries:
        """Return no entries."""
        return Entries(found=[], more=False, oldest=0, any_policies=False)

    def entry_part(self, entry: Notification, start: int) -> bytes | None:
        """Return nothing."""
        return None


@dataclass
class Answered:
    """A response of the application."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """Calls the WSGI application as a worker does."""

    def __init__(self, store: MemoryStore, dialect: str = "incus", who: Caller | None = None) -> None:
        self.application: GuestApplication = create(
            store, Broker(EmptyLog(), queue_limit=10, subscriptions_per_instance=1)
        )
        self.store = store
        self.dialect = dialect
        #: The environ of the last request, as the application left it.
        self.environ: dict[str, Any] = {}
        self.who = caller() if who is None else who

    def ask(
        self,
        path: str,
        method: str = "GET",
        body: bytes = b"",
        query: str = "",
        fields: Mapping[str, str] | None = None,
        target: str | None = None,
        length: int | None = None,
    ) -> Answered:
        """Send one request.

        Args:
            path: of the request.
            method: of the request.
            body: of the request.
            query: of the request.
            fields: header fields by name.
            target: the sent target, if it is not the path.
            length: the Content-Length, if there is one.
        """
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "RAW_PATH": path,
            "RAW_URI": path if target is None else target,
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "x",
            "CONTENT_TYPE": "application/x-www-form-urlencoded",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": io.StringIO(),
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in (fields or {}).items()},
            CALLER: self.who,
            DIALECT: self.dialect,
        }
        if length is not None:
            environ["CONTENT_LENGTH"] = str(length)
        self.environ = environ
        said: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            said[:] = status, headers

        chunks = self.application(cast("Environ", environ), start_response)
        try:
            content = b"".join(chunks)
        finally:
            # A server calls close() if there is one (PEP 3333).
            getattr(chunks, "close", lambda: None)()
        names = [name.lower() for name, _value in said[1]]
        assert len(names) == len(set(names)), "a header field is sent twice"
        return Answered(int(said[0][:3]), {name.lower(): value for name, value in said[1]}, content)
