"""In any order of changes, restores, restarts and clients, the tree tells each client a history that was so."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from guestapi.api.app import create
from guestapi.callers.credentials import Credentials
from guestapi.callers.identify import Caller
from guestapi.notifications.waiting import Waiter
from guestapi.server.store_thread import OffloadedStore
from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.backup import back_up, restore
from guestapi.store.lookup import get_instance
from guestapi.store.view import view
from guestapi.store.writing import Writer
from guestapi.wsgi import CALLER, DIALECT, WAIT, WAITED, Environ
from tests.api.fakes import INIT, ROOT, StandIn

PATHS = ["/1.0/guestapi/tree", "/1.0/guestapi/tree/config/user.a", "/1.0/guestapi/tree/config/user.b"]
KEYS = ["user.a", "user.b"]
#: Few, so that contents come back; one is too large to be kept in a worker's memory.
VALUES = ["", "1", "2", "3", "large" * 20_000]
WORKERS = 2


@dataclass(eq=False)
class Client:
    """A client that asks for one path in a loop, as docs/guests.md says."""

    path: str
    worker: int
    tag: str | None = None
    content: bytes | None = None
    waiter: Waiter | None = None
    seen: list[bytes | None] = field(default_factory=list)
    at: int = 0


class History(RuleBasedStateMachine):
    """One instance, two workers, clients that wait at either; stores are put back meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.file = Path(self.directory.name, "store.db")
        self.settings = Settings(store=StoreSettings(url=f"sqlite:///{self.file}"))
        self.writer = Writer(self.settings, create=True)
        with self.writer.change() as change:
            instance = steps.add(change, "default", "c1", init=INIT)
        self.caller = Caller(Credentials(1, ROOT, ROOT), instance.id, instance.run, StandIn())
        self.workers: list[OffloadedStore] = []
        self.applications: list[Callable[..., Any]] = []
        #: What each ETag of each path has named; for all stores and all workers.
        self.named: dict[tuple[str, str], bytes] = {}
        self.clients: list[Client] = []
        self.backups: list[Path] = []

    def teardown(self) -> None:
        """Nothing is left of it."""
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        """Two workers."""
        for _number in range(WORKERS):
            self.workers.append(OffloadedStore(self.settings))
            self.applications.append(create(self.workers[-1], self.workers[-1].broker))

    @rule(key=st.sampled_from(KEYS), value=st.sampled_from(VALUES))
    def configure(self, key: str, value: str) -> None:
        """The operator sets or unsets a key."""
        with self.writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {key: value})

    @rule(ready=st.booleans())
    def set_ready(self, ready: bool) -> None:
        """The workload says how it is."""
        assert self.caller.instance_id is not None
        self.writer.set_ready(self.caller.instance_id, self.caller.run, ready)

    @rule()
    def save(self) -> None:
        """The operator makes a backup."""
        self.backups.append(Path(self.directory.name, f"backup-{len(self.backups)}"))
        back_up(self.settings.store.url, self.backups[-1])

    @rule(which=st.integers(0, 9))
    def put_back(self, which: int) -> None:
        """The operator restores one."""
        if self.backups:
            restore(self.settings, self.backups[which % len(self.backups)])

    @rule(which=st.integers(0, 9))
    def copy_back(self, which: int) -> None:
        """Somebody puts a copy of an older store in its place."""
        if self.backups:
            draft = self.file.with_name("draft")
            shutil.copyfile(self.backups[which % len(self.backups)], draft)
            for suffix in ("-wal", "-shm"):
                self.file.with_name(f"store.db{suffix}").unlink(missing_ok=True)
            draft.replace(self.file)
            self.writer = Writer(self.settings)
            for client in self.clients:
                client.at = 0

    @rule(number=st.integers(0, WORKERS - 1))
    def restart(self, number: int) -> None:
        """A worker ends, with what waits at it, and another one takes its place."""
        self.workers[number] = OffloadedStore(self.settings)
        self.applications[number] = create(self.workers[number], self.workers[number].broker)
        for client in self.clients:
            if client.worker == number:
                client.waiter = None

    @rule(path=st.sampled_from(PATHS), number=st.integers(0, WORKERS - 1))
    def come(self, path: str, number: int) -> None:
        """Another client."""
        if len(self.clients) < 6:
            self.clients.append(Client(path, number))
            self.ask(self.clients[-1])

    @rule(number=st.integers(0, WORKERS - 1), most=st.integers(1, 3))
    def deliver(self, number: int, most: int) -> None:
        """A worker reads the change log, as far as it comes."""
        for _round in range(most):
            self.workers[number].broker.poll()
            self.workers[number].broker.waiting.wake_some()
        for client in self.clients:
            if client.worker == number and client.waiter is not None and client.waiter.due:
                self.ask(client)

    @rule()
    def settle(self) -> None:
        """Nothing changes for as long as a round trip takes: each client knows what there is now."""
        for number in range(WORKERS):
            while self.workers[number].broker.poll() | self.workers[number].broker.waiting.wake_some():
                pass
        for client in self.clients:
            while client.waiter is None or client.waiter.due:
                self.ask(client)
            truth = self.truth(client.path)
            # Who asks for a key that is not set waits for it, whatever it knows.
            assert client.content == truth or (truth is None and not client.waiter.was_set), client.path

    @rule(which=st.integers(0, 5))
    def follow(self, which: int) -> None:
        """A client goes on with the events after what it has read: they lead from there to what there is now."""
        if not self.clients:
            return
        client = self.clients[which % len(self.clients)]
        self.ask(client, at_once=True)
        if client.path == PATHS[0] or client.content is None:
            return
        key = client.path.rpartition("/")[2]
        value = client.content.decode()
        self.configure(key, "x" if value != "x" else "y")
        self.configure("user.c", "x")
        self.configure(key, "3")
        log = self.workers[client.worker].broker.log
        found = log.entries(client.at, 100, instance_id=self.caller.instance_id).found
        for entry in found:
            metadata = json.loads(entry.metadata)
            if metadata["key"] == key:
                assert metadata["old_value"] == value, "neither a gap nor something twice"
                value = metadata["value"]
        assert value == "3"

    def truth(self, path: str) -> bytes | None:
        """What there is at a path."""
        with view(self.settings.store.url) as store:
            config = get_instance(store, "default", "c1").config
        if path != PATHS[0]:
            value = config.get(path.rpartition("/")[2])
            return None if value is None else value.encode()
        status, _headers, body = self.call(Client(path, 0), {})
        assert status == 200
        tree = json.loads(body)
        assert tree["config"] == config
        return body

    def ask(self, client: Client, *, at_once: bool = False) -> None:
        """Ask once, or once again after a wait."""
        fields = {} if client.tag is None else {"HTTP_IF_NONE_MATCH": client.tag}
        waiter, client.waiter = client.waiter, None
        if waiter is not None:
            waiter.due = False
        if at_once and waiter is not None:
            waiter.cancel()
            waiter = None
        environ = self.environ(client, "" if at_once else "wait=60", {} if at_once else fields)
        if waiter is not None:
            environ[WAITED] = waiter
        status, headers, body = self.send(client, environ)
        waits = environ.get(WAIT)
        if waits is not None:
            client.waiter = waits
            return
        if waiter is not None:
            waiter.cancel()
        if status == 404:
            client.tag = client.content = None
        else:
            assert status in (200, 304), (status, body)
            tag, event_id = headers["etag"], int(headers["guestapi-event-id"])
            assert event_id >= client.at, "an older state after a newer one"
            client.at = event_id
            if status == 200:
                assert self.named.setdefault((client.path, tag), body) == body, "one ETag for two contents"
                client.tag, client.content = tag, body
            else:
                assert tag == client.tag
        client.seen.append(client.content)

    def call(self, client: Client, fields: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Ask once, without waiting."""
        return self.send(client, self.environ(client, "", fields))

    def send(self, client: Client, environ: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Call the application of the client's worker."""
        said: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            said[:] = int(status[:3]), {name.lower(): value for name, value in headers}

        body = b"".join(self.applications[client.worker](cast("Environ", environ), start_response))
        return said[0], said[1], body

    def environ(self, client: Client, query: str, fields: dict[str, str]) -> dict[str, Any]:
        """A request."""
        return {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": client.path,
            "RAW_PATH": client.path,
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "0",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_HOST": "x",
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            **fields,
            CALLER: self.caller,
            DIALECT: "incus",
        }


TestHistory = History.TestCase
TestHistory.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)
