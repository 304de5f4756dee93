"""Clients in a real container that wait in a loop and then follow the events, as docs/guests.md tells them.

Meanwhile the operator changes keys, restores backups, and reloads the service, and workers are killed.
tests/api/test_tree_history.py has the same properties in one process, where each entry of the log is delivered alone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from guestapi.store.backup import back_up, restore
from guestapi.store.reading import Reader
from tests.harness.agent import complete
from tests.harness.containers import Container, Response, parse
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.inside import Talk, asking, talks

pytestmark = pytest.mark.root

TREE = "/1.0/guestapi/tree"
KEYS = ("user.a", "user.b")
PATHS = (TREE, *(f"{TREE}/config/{key}" for key in KEYS))
#: Few, so that contents recur. An empty one unsets the key.
VALUES = st.sampled_from(["", "1", "2", "3", "large"])
#: In the place of "large": too large for a worker's memory.
LARGE = "large" * 20_000
CLIENTS = 6
#: Seconds within which a change ends a wait: less than the time of the wait, which would end it, too.
SOON = 25


class ServedTree:
    """A service, one instance, and what its configuration has been."""

    def __init__(self, service: Service, container: Container) -> None:
        self.service = service
        self.container = container
        #: The configuration after each change, by the id of the change log's last entry then.
        self.states: dict[int, dict[str, str]] = {}
        #: What each ETag named, of each path.
        self.named: dict[tuple[str, str], bytes] = {}
        self.backups: list[Path] = []
        self.note()

    def note(self) -> None:
        """Note the state after a change."""
        reader = Reader(self.service.settings.store.url)
        config = self.service.instance("history").config
        self.states[reader.latest()] = {key: config[key] for key in config if key.startswith("user.")}
        reader.close()

    def state_at(self, event_id: int) -> dict[str, str]:
        """Return the configuration that there was at an entry of the change log."""
        return self.states[max(number for number in self.states if number <= event_id)]

    def configure(self, key: str, value: str) -> None:
        """Set or unset a key."""
        self.service.configure("history", **{key.replace(".", "_"): LARGE if value == "large" else value})
        self.note()

    @property
    def now(self) -> dict[str, str]:
        """The configuration as it is."""
        return self.states[max(self.states)]


class TreeReader:
    """A program in the instance that asks for one path, again and again, and waits for news of it."""

    def __init__(self, world: ServedTree, path: str) -> None:
        self.world = world
        self.path = path
        self.at = 0
        self.tag = '""'
        self.content: bytes | None = None
        self.connection = ExitStack()
        self.connect()
        self.step()

    def connect(self) -> None:
        """Connect, after what there was before, and ask."""
        self.connection.close()
        (self.talk,) = self.connection.enter_context(talks(self.world.container, 1))
        self.send("")

    def send(self, query: str = "?wait=30") -> None:
        """Ask."""
        try:
            self.talk.send(asking(self.path + query, f"If-None-Match: {self.tag}"))
        except (BrokenPipeError, ConnectionResetError):
            self.connect()

    def step(self) -> None:
        """Take the next answer, whenever it comes, and ask again."""
        received = self.talk.end_or_answer()
        if not complete(received, 1, "GET"):
            # Its worker was killed.
            self.connect()
            return
        (answer,) = parse(received)
        self.hear(answer)
        if answer.headers.get("connection") == "close":
            self.connect()
        else:
            self.send()

    def hear(self, answer: Response) -> None:
        """Check an answer, and keep it."""
        assert answer.status in (200, 304, 404), answer
        if answer.status == 404:
            self.tag, self.content = '""', None
            return
        tag, event_id = answer.headers["etag"], int(answer.headers["guestapi-event-id"])
        assert event_id >= self.at, "an older state after a newer one"
        self.at = event_id
        if answer.status == 200:
            assert self.world.named.setdefault((self.path, tag), answer.body) == answer.body, "one ETag, two contents"
            self.tag, self.content = tag, answer.body
        assert tag == self.tag
        assert self.config == self.relevant(self.world.state_at(event_id)), "not the state of its event id"

    @property
    def config(self) -> dict[str, str]:
        """What it knows of the configuration."""
        if self.content is None:
            return {}
        if self.path == TREE:
            found: dict[str, str] = json.loads(self.content)["config"]
            return found
        return {self.path.rpartition("/")[2]: self.content.decode()}

    def relevant(self, config: dict[str, str]) -> dict[str, str]:
        """Return the part of a configuration that its path shows."""
        return config if self.path == TREE else {key: config[key] for key in config if self.path.endswith(key)}

    def catch_up(self) -> None:
        """Go on until it has the state that lasts."""
        while self.config != self.relevant(self.world.now):
            began = time.monotonic()
            self.step()
            # Who asks for a key that is not set any more waits until it is, and may have asked after that change.
            if self.relevant(self.world.now):
                assert time.monotonic() - began < SOON, "a change has not ended the wait"

    def events(self) -> Iterator[dict[str, str]]:
        """Follow the events of keys from what it knows on, also when its worker is killed."""
        since = self.at
        while True:
            with talks(self.world.container, 1) as (talk,):
                talk.send(asking(f"/1.0/events?type=config&since={since}"))
                data = b""
                while part := _received(talk):
                    *lines, data = (data + part).split(b"\n")
                    for line in lines:
                        if line.startswith(b'{"type":"config"'):
                            event = json.loads(line)
                            assert event["id"] > since, "an event that it has"
                            since = event["id"]
                            metadata: dict[str, str] = event["metadata"]
                            yield metadata


def _received(talk: Talk) -> bytes:
    try:
        return talk.socket.recv(1 << 20)
    except ConnectionResetError:
        return b""


class ServedHistory(RuleBasedStateMachine):
    """What operator and clients do, in any order."""

    world: ClassVar[ServedTree]

    def __init__(self) -> None:
        super().__init__()
        self.clients: list[TreeReader] = []

    def teardown(self) -> None:
        """Have all see the last state, and go."""
        self.settle()
        for client in self.clients:
            client.connection.close()

    @initialize()
    def begin(self) -> None:
        """Start a client of each path."""
        for path in PATHS:
            self.add_client(path)

    @rule(path=st.sampled_from(PATHS))
    def add_client(self, path: str) -> None:
        """Start another client."""
        if len(self.clients) < CLIENTS:
            self.clients.append(TreeReader(self.world, path))

    @rule(changes=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4), last=st.booleans())
    def configure(self, changes: list[tuple[str, str]], last: bool) -> None:
        """Change keys, one after another, each at once or when all have seen the one before."""
        for key, value in changes:
            self.world.configure(key, value)
            if last:
                self.settle()

    @rule()
    def settle(self) -> None:
        """Change nothing until each client has the state."""
        for client in self.clients:
            client.catch_up()

    @rule()
    def save(self) -> None:
        """Make a backup."""
        self.world.backups.append(self.world.service.root / f"backup-{len(self.world.backups)}")
        back_up(self.world.service.settings.store.url, self.world.backups[-1])

    @rule(which=st.integers(0, 99))
    def put_back(self, which: int) -> None:
        """Restore a backup."""
        if self.world.backups:
            restore(self.world.service.settings, self.world.backups[which % len(self.world.backups)])
            self.world.note()

    @rule(value=VALUES)
    def reload(self, value: str) -> None:
        """Reload the service, which ends all waits, and change a key meanwhile."""
        old = self.world.service.workers
        os.kill(self.world.service.pid, signal.SIGHUP)
        self.world.configure(KEYS[0], value)
        until(lambda: not set(old) & set(self.world.service.workers), "other workers")

    @rule(value=VALUES, both=st.booleans())
    def kill(self, value: str, both: bool) -> None:
        """Kill a worker or both, and change a key meanwhile."""
        old = self.world.service.workers
        for worker in old if both else old[:1]:
            os.kill(worker, signal.SIGKILL)
        self.world.configure(KEYS[0], value)
        until(lambda: old[0] not in (new := self.world.service.workers) and len(new) == 2, "another worker")

    @rule(which=st.integers(0, 99), values=st.lists(VALUES, min_size=1, max_size=3), killed=st.booleans())
    def follow(self, which: int, values: list[str], killed: bool) -> None:
        """From what a client has, the events lead to the state: each change once, in order, without a gap."""
        if not self.clients:
            return
        client = self.clients[which % len(self.clients)]
        if client.content is None and client.path != TREE:
            # It was told no event id. Whoever begins with nothing begins with the tree.
            return
        config = dict(client.config)
        events = client.events()
        self.world.configure("user.b", "begun" if self.world.now.get("user.b") != "begun" else "")
        for number, value in enumerate(values):
            self.world.configure(KEYS[number % 2], value)
            if killed and number == 1:
                self.kill(value, True)
        # The events before this one are those that the client has not, however long it has not asked.
        end = str(len(self.world.states))
        self.world.configure("user.c", end)
        for metadata in events:
            key = metadata["key"]
            if client.path == TREE or client.path.endswith(key):
                assert metadata["old_value"] == config.get(key, ""), "a gap or a duplicate"
                config[key] = metadata["value"]
            if (key, metadata["value"]) == ("user.c", end):
                break
        known = {key: value for key, value in config.items() if value}
        assert client.relevant(known) == client.relevant(self.world.now)


def test_history() -> None:
    """A client sees each state that lasts, and no older one after a newer one; an ETag names one content."""
    toml = "[limits]\nhead_seconds = 600\nidle_seconds = 600\n"
    with Service(dialects=["incus"], toml=toml) as service, service.container("history") as container:
        ServedHistory.world = ServedTree(service, container)
        run_state_machine_as_test(
            ServedHistory,
            settings=settings(
                max_examples=6,
                stateful_step_count=20,
                deadline=None,
                database=None,
                # Each example takes seconds, so a failing one is not shortened.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
