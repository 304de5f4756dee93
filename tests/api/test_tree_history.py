"""In any order of changes, restores, restarts and clients, the tree gives each client a consistent history."""

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
from guestapi.notifications.subscription import ChangeLog
from guestapi.notifications.waiting import Waiter
from guestapi.records import Notification
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
#: Few, so that contents recur; one is too large for a worker's memory.
VALUES = ["", "1", "2", "3", "large" * 20_000]
WORKERS = 2


@dataclass(eq=False)
class TreeClient:
    """A client that requests one path in a loop, as in docs/guests.md."""

    path: str
    worker: int
    tag: str | None = None
    content: bytes | None = None
    waiter: Waiter | None = None
    seen: list[bytes | None] = field(default_factory=list)
    at: int = 0


class TreeHistory(RuleBasedStateMachine):
    """One instance, and two workers with waiting clients; meanwhile the operator restores stores."""

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
        #: The content of each ETag by path, for all stores and workers.
        self.named: dict[tuple[str, str], bytes] = {}
        self.clients: list[TreeClient] = []
        self.backups: list[Path] = []

    def teardown(self) -> None:
        """Remove the directory."""
        for client in self.clients:
            self.leave(client)
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        """Start two workers."""
        for _number in range(WORKERS):
            self.workers.append(OffloadedStore(self.settings))
            self.applications.append(create(self.workers[-1], self.workers[-1].broker))

    @rule(key=st.sampled_from(KEYS), value=st.sampled_from(VALUES))
    def configure(self, key: str, value: str) -> None:
        """Set or unset a key."""
        with self.writer.change() as change:
            steps.configure(change, get_instance(change, "default", "c1"), {key: value})

    @rule(ready=st.booleans())
    def set_ready(self, ready: bool) -> None:
        """Store a readiness."""
        assert self.caller.instance_id is not None
        self.writer.set_ready(self.caller.instance_id, self.caller.run, ready)

    @rule()
    def save(self) -> None:
        """Make a backup."""
        self.backups.append(Path(self.directory.name, f"backup-{len(self.backups)}"))
        back_up(self.settings.store.url, self.backups[-1])

    @rule(which=st.integers(0, 9))
    def put_back(self, which: int) -> None:
        """Restore a backup."""
        if self.backups:
            restore(self.settings, self.backups[which % len(self.backups)])

    @rule(which=st.integers(0, 9))
    def copy_back(self, which: int) -> None:
        """Replace the store by a copy of an older one, without `restore`."""
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
        """End a worker and its waiting requests, and start another one."""
        self.workers[number] = OffloadedStore(self.settings)
        self.applications[number] = create(self.workers[number], self.workers[number].broker)
        for client in self.clients:
            if client.worker == number:
                self.leave(client)

    @rule(path=st.sampled_from(PATHS), number=st.integers(0, WORKERS - 1))
    def add_client(self, path: str, number: int) -> None:
        """Connect another client."""
        if len(self.clients) < 6:
            self.clients.append(TreeClient(path, number))
            self.ask(self.clients[-1])

    @rule(number=st.integers(0, WORKERS - 1), most=st.integers(1, 3))
    def deliver(self, number: int, most: int) -> None:
        """Have a worker read a part of the change log, and answer clients whose wait has ended."""
        for _round in range(most):
            self.workers[number].broker.poll()
            self.workers[number].broker.waiting.wake_some()
        for client in self.clients:
            if client.worker == number and client.waiter is not None and client.waiter.due:
                self.ask(client)

    @rule()
    def settle(self) -> None:
        """Deliver everything: then each client has the current content."""
        for number in range(WORKERS):
            while self.workers[number].broker.poll() | self.workers[number].broker.waiting.wake_some():
                pass
        for client in self.clients:
            while client.waiter is None or client.waiter.due:
                self.ask(client)
            truth = self.truth(client.path)
            # A request for a key that is not set waits, whatever the client has.
            assert client.content == truth or (truth is None and not client.waiter.was_set), client.path

    @rule(which=st.integers(0, 5))
    def follow(self, which: int) -> None:
        """Follow the events after a client's content: they lead to the current content, without a gap."""
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
            metadata = json.loads(_metadata(log, entry))
            if metadata["key"] == key:
                assert metadata["old_value"] == value, "a gap or a duplicate"
                value = metadata["value"]
        assert value == "3"

    def leave(self, client: TreeClient) -> None:
        """A client goes, and waits no more."""
        if client.waiter is not None:
            client.waiter.cancel()
            client.waiter = None

    def truth(self, path: str) -> bytes | None:
        """Return the current content of a path; None: not set."""
        with view(self.settings.store.url) as store:
            config = get_instance(store, "default", "c1").config
        if path != PATHS[0]:
            value = config.get(path.rpartition("/")[2])
            return None if value is None else value.encode()
        status, _headers, body = self.call(TreeClient(path, 0), {})
        assert status == 200
        tree = json.loads(body)
        assert tree["config"] == config
        return body

    def ask(self, client: TreeClient, *, at_once: bool = False) -> None:
        """Send a request, or repeat it after a wait."""
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

    def call(self, client: TreeClient, fields: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Send a request without a wait."""
        return self.send(client, self.environ(client, "", fields))

    def send(self, client: TreeClient, environ: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Call the application of the client's worker."""
        head: list[Any] = []

        def start_response(status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
            head[:] = int(status[:3]), {name.lower(): value for name, value in headers}

        body = b"".join(self.applications[client.worker](cast("Environ", environ), start_response))
        return head[0], head[1], body

    def environ(self, client: TreeClient, query: str, fields: dict[str, str]) -> dict[str, Any]:
        """Return the environ of a request."""
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


TestHistory = TreeHistory.TestCase
TestHistory.settings = hypothesis_settings(max_examples=40, stateful_step_count=30, deadline=None)


def _metadata(log: ChangeLog, entry: Notification) -> bytes:
    """The metadata of an entry of the change log, read part by part if it is large."""
    content = b"" if entry.left_out else entry.metadata.encode()
    while len(content) < entry.left_out:
        part = log.entry_part(entry, len(content))
        assert part is not None
        content += part
    return content
