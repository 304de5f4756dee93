"""The world of the isolation proof: real processes in real namespaces, the real service, and the expected responses.

It runs with the service in a PID namespace of its own, so that it can choose the next PID.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import select
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jwt

from guestapi.callers.namespaces import examine, start_time
from guestapi.dialects import DIALECTS, Dialect
from guestapi.model import Init, Instance, KeyPolicy
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.store import notices, permissions, policies, steps
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import list_instances
from guestapi.store.notices import Notice
from guestapi.store.view import view
from tests.harness.containers import BASE
from tests.harness.service import Service
from tests.harness.signing import TRUST_DOMAIN, SigningProcess
from tests.harness.waiting import TIMEOUT
from tests.proof.policies import KINDS, TOKEN_KEY, Rule, Token, rule_for

#: No connection may reach a limit or a deadline.
LIMITS = """[limits]
connections_per_instance = 65536
streams_per_instance = 65536
head_seconds = 3600
idle_seconds = 3600
writes_per_second = 1000000
writes_burst = 1000000
"""
#: The form of every secret, which no other part of a response has.
SECRET = re.compile(rb"tok[0-9a-f]{32}")
WRITTEN_SECRET = re.compile(SECRET.pattern.decode())
#: Ticks in a second, the unit of a process's start time (proc_pid_stat(5)).
TICKS = os.sysconf("SC_CLK_TCK")
#: The number of IDs of a container, as usual in /etc/subuid.
IDS = 65536

EVENTS = "/1.0/events"
NAMED_EVENTS = "/1.0/events?type=attribute,config,device,notice"
RESUMED = "/1.0/events?since=0&type=attribute,config,device,notice"
TOKEN = "/1.0/config/user.token"
TREE, TREE_TOKEN = "/1.0/guestapi/tree", "/1.0/guestapi/tree/config/user.token"
#: For whom tokens of identity are here.
AUDIENCE = "proof"
IDENTITY = f"/1.0/guestapi/identity?audience={AUDIENCE}"
ATTRIBUTES = "/1.0/guestapi/attributes"
#: What each instance says of itself.
CLAIM = f"{ATTRIBUTES}/proof/claim"
NOTICES = "/1.0/guestapi/notices"
#: After how many seconds most notices are due, which is long after the walk, and the others, which are past at once.
LATER, SOON = 7 * 86400.0, 0.01
PATHS = [
    "/",
    "/1.0",
    "/1.0/config",
    TOKEN,
    "/1.0/devices",
    "/1.0/meta-data",
    "/1.0/guestapi",
    TREE,
    TREE_TOKEN,
    IDENTITY,
    ATTRIBUTES,
    CLAIM,
    NOTICES,
]


def secret() -> str:
    """Return a unique random secret."""
    return f"tok{secrets.token_hex(16)}"


@dataclass(eq=False)
class Node:
    """A process that takes commands: the host's, a container's init, or another one inside a container.

    Attributes:
        control: the socket for commands.
        pid, started: as the service sees it; `started` in ticks since boot.
        container: the init of its container; None: it is on the host.
        around: the init of the container around its container; None: that one is on the host.
        root, count: the host's UID of root in its user namespace, and the number of IDs in it.
        uid: its UID on the host.
        namespace: the inode number of the PID namespace whose init it is; 0: it is not an init.
        privileged: it is an init without a user namespace of its own.
    """

    control: socket.socket
    pid: int
    started: int
    container: Node | None
    around: Node | None
    root: int
    count: int
    uid: int
    namespace: int = 0
    privileged: bool = False
    alive: bool = True

    @property
    def is_init(self) -> bool:
        """Whether it is PID 1 of its namespace."""
        return self.container is self

    def command(self, what: str, given: int | None = None, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        """Execute a command (see node.py); return its answer and the descriptors that it passes."""
        message = json.dumps({"do": what, **arguments}).encode()
        socket.send_fds(self.control, [message], [] if given is None else [given])
        said, found, _flags, _address = socket.recv_fds(self.control, 65536, 1)
        assert said, f"process {self.pid} has ended"
        answer: dict[str, Any] = json.loads(said)
        assert "error" not in answer, answer["error"]
        return answer, found

    def inside(self, container: Node) -> bool:
        """Whether it ends with that container."""
        at = self.container
        while at is not None and at is not container:
            at = at.around
        return at is not None


@dataclass(eq=False)
class Row:
    """An instance in the store."""

    stored: Instance
    init: Node | None = None
    ready: bool = False
    secrets: set[bytes] = field(default_factory=set)
    token: Token = field(default_factory=Token)
    policies: dict[str, KeyPolicy] = field(default_factory=dict)
    #: It may have attributes, whatever its project may; and those that it has, by URL.
    allowed: bool = False
    said: dict[str, bytes] = field(default_factory=dict)
    #: What was announced to its present run and is neither past nor cancelled.
    notices: list[Notice] = field(default_factory=list)


@dataclass(frozen=True)
class Identity:
    """An instance in one of its runs."""

    row: Row
    run: int
    init: Node


@dataclass(frozen=True)
class PossibleOutcome:
    """A possible response to a request whose connection was identified as `identity`. `body` None: any body.

    A token of identity stands there as `described` has it.
    """

    identity: Identity | None
    status: int
    body: bytes | None


@dataclass(eq=False)
class HeldConnection:
    """A connection that is held open.

    Attributes:
        node: the process that called connect(2).
        identities: the possible identifications: one, if nothing has changed between connect and the first response.
        answered: it has had a response, so it was identified.
        asked: the path of the last request, while its response is pending.
        waits: that request may wait for a change.
        tag: the ETag of the last answer; `""` if it had none.
        received: what was received after the last response.
        outcomes: the possible responses to that request.
        forbidden: values that it may not have, since it was resumed when policies kept them from its instance.
        may_end: it is a stream that the service may have ended, for example because its instance was switched off.
    """

    socket: socket.socket
    node: Node
    dialect: Dialect
    identities: set[Identity | None]
    answered: bool = False
    asked: str | None = None
    waits: bool = False
    tag: str = '""'
    received: bytes = b""
    outcomes: set[PossibleOutcome] = field(default_factory=set)
    may_end: bool = False
    forbidden: set[bytes] = field(default_factory=set)


class World:
    """The host, its instances, and the service."""

    def __init__(self) -> None:
        self.happened: Counter[str] = Counter()
        self.service = Service()
        self.signer = SigningProcess(self.service.root, (AUDIENCE,))
        self.service.write_config(LIMITS + self.signer.toml)
        self.service.command("identity", "keys", "rotate")
        self.keys = jwt.PyJWKSet.from_json(self.service.command("identity", "keys", "jwks").stdout)
        self.signer.start(self.service.config)
        self.service.start()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-S", Path(__file__).with_name("node.py"), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.host = Node(ours, self._process.pid, 0, None, None, 0, 1 << 32, 0)
        self.names = [secret() for _name in range(5)]
        #: Names of attributes that are secrets.
        self.claims: set[str] = set()
        #: The ids of all notices, and of those that their instances have acknowledged.
        self.announced: list[str] = []
        self._acknowledged: set[str] = set()
        self.nodes: list[Node] = []
        self.rows: dict[str, Row] = {}
        #: Policies of the project, by pattern.
        self.policies: dict[str, KeyPolicy] = {}
        #: All instances may have attributes.
        self.allowed = False
        self.held: list[HeldConnection] = []
        self.streams: list[HeldConnection] = []
        #: PIDs that have been in use.
        self.pids: list[int] = []
        #: The last observation of each container, and the process of each init.
        self._seen: dict[tuple[str, str], Observed] = {}
        self._inits: dict[Init, Node] = {}
        self._namespaces: set[int] = set()

    def close(self) -> None:
        """Remove everything, stop the service, and check its log."""
        self.clear()
        self.host.control.close()
        self._process.wait(TIMEOUT)
        log = self.service.log.read_text()
        self.signer.__exit__(None, None, None)
        self.service.__exit__(None, None, None)
        assert "Traceback" not in log, log
        assert "unexpected" not in log, log
        # The log names instances and what they ask for, and has no value.
        assert set(WRITTEN_SECRET.findall(log)) <= {*self.names, *self.claims}

    def clear(self) -> None:
        """Close all connections, and end all processes and instances; the service must end the streams."""
        for held in self.held:
            held.socket.close()
        self.held.clear()
        self.listen()
        for node in [node for node in self.nodes if node.is_init and node.around is None]:
            self.end(node)
        for name in list(self.rows):
            self.remove(name)
        for pattern in list(self.policies):
            self.remove_policy(None, pattern)
        if self.allowed:
            self.permit(None)
        self._seen.clear()
        self._inits.clear()
        self.announced.clear()
        self._acknowledged.clear()
        for stream in self.streams:
            stream.socket.settimeout(TIMEOUT)
            self._must_end(stream)
        self.streams.clear()

    # Processes.

    def make(
        self,
        parent: Node,
        *,
        container: bool,
        shifted: bool = False,
        privileged: bool = False,
        uid: int = 0,
        pid: int | None = None,
    ) -> Node:
        """Have a process make another one.

        Args:
            parent: the process that makes it.
            container: make it the init of a new container.
            shifted: the container's root is another user than root around it.
            privileged: the container's root is the host's root.
            uid: its UID in its user namespace.
            pid: its PID, which must be free; None: any.
        """
        if privileged:
            base, root, count = 0, 0, IDS
        elif parent is self.host:
            root, count = (BASE + IDS if shifted else BASE), IDS
            base = root
        elif container:
            base, count = (parent.count // 2, parent.count // 2) if shifted else (0, parent.count)
            root = parent.root + base
        else:
            base, root, count = 0, parent.root, parent.count
        if pid is not None:
            # The last assigned PID of this PID namespace (proc_sys_kernel(5)).
            Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
        answer, (control,) = parent.command(
            "make", container=container, privileged=privileged, base=base, count=count, uid=uid
        )
        own: int = answer["pid"]
        node = Node(
            socket.socket(fileno=control),
            own,
            start_time(own),
            parent.container,
            parent.container,
            root,
            count,
            root + uid,
            privileged=privileged,
        )
        if container:
            node.container = node
            number = node.namespace = os.stat(f"/proc/{own}/ns/pid").st_ino
            self.happened["namespaces"] += 1
            self.happened["namespace numbers used again"] += number in self._namespaces
            self._namespaces.add(number)
        elif parent.container is not None:
            node.around = parent.container.around
        self.happened["processes"] += 1
        self.happened["pids used again"] += own in self.pids
        self.happened["pids used again on purpose"] += own == pid
        if own not in self.pids:
            self.pids.append(own)
        self.nodes.append(node)
        return node

    def end(self, node: Node) -> None:
        """Kill a process, and with an init all processes of its container, without an update of the store."""
        # Two processes with the same PID that start within one tick cannot be distinguished by /proc.
        while time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS < node.started + 1:
            time.sleep(0.001)
        ended = [one for one in self.nodes if one is node or (node.is_init and one.inside(node))]
        os.kill(node.pid, signal.SIGKILL)
        for one in ended:
            # No event reports that a PID is free.
            while Path(f"/proc/{one.pid}").exists():
                time.sleep(0.0002)
            one.alive = False
            one.control.close()
            self.nodes.remove(one)
        self._changed()

    @property
    def free_pids(self) -> list[int]:
        """Return the PIDs that were in use and are free."""
        taken = {node.pid for node in self.nodes}
        return [pid for pid in self.pids if pid not in taken]

    # Instances.

    def add(self, name: str) -> None:
        """Add an instance with that name."""
        with self.service.writer.change() as change:
            row = Row(steps.add(change, "default", name))
        row.secrets.add(name.encode())
        self.rows[name] = row
        self.configure(name)

    def configure(self, name: str) -> None:
        """Give an instance new secrets."""
        row = self.rows[name]
        with self.service.writer.change() as change:
            row.stored = self._renew(change, row)
        self._changed()

    def _renew(self, change: Any, row: Row) -> Instance:
        value, key, device, option = secret(), secret(), secret(), secret()
        row.secrets |= {text.encode() for text in (value, key, device, option)}
        old = {key: "" for key in row.stored.config if key.startswith("user.")}
        stored = steps.configure(change, row.stored, {**old, "user.token": value, f"user.{key}": "x"})
        row.token.set(value, self.rule(row))
        nic = {"type": "nic", "nictype": "ipvlan", "token": option}
        renewed: Instance = steps.replace_devices(change, stored, {device: nic})
        return renewed

    def switch(self, name: str, key: str) -> None:
        """Switch an instance's API off, or on again."""
        row = self.rows[name]
        value = "" if row.stored.config.get(key) else "false"
        with self.service.writer.change() as change:
            row.stored = steps.configure(change, row.stored, {key: value})
        self._changed()

    # Policies.

    def rule(self, row: Row) -> Rule:
        """Return what holds for the token of an instance."""
        return rule_for(TOKEN_KEY, self.policies, row.policies)

    def put_policy(self, name: str | None, pattern: str, kind: str) -> None:
        """Have a policy hold, for an instance or for all; a value that is to be given once is a new one."""
        policy = KINDS[kind]._replace(pattern=pattern)
        row = None if name is None else self.rows[name]
        with self.service.writer.change() as change:
            policies.put(change, "default", None if row is None else row.stored, policy)
        (self.policies if row is None else row.policies)[pattern] = policy
        self.happened[f"policies {kind}"] += 1
        self._policy_changed(row)
        if policy.once:
            for one in [row] if row is not None else list(self.rows.values()):
                self.configure(one.stored.name)

    def remove_policy(self, name: str | None, pattern: str) -> None:
        """Have a policy hold no more."""
        row = None if name is None else self.rows[name]
        with self.service.writer.change() as change:
            policies.remove(change, "default", None if row is None else row.stored, pattern)
        del (self.policies if row is None else row.policies)[pattern]
        self._policy_changed(row)

    def permit(self, name: str | None) -> None:
        """Allow attributes to an instance or to all, or no more."""
        row = None if name is None else self.rows[name]
        allowed = self.allowed if row is None else row.allowed
        with self.service.writer.change() as change:
            decide = permissions.disallow if allowed else permissions.allow
            decide(change, "default", None if row is None else row.stored, "attributes")
        if row is None:
            self.allowed = not allowed
        else:
            row.allowed = not allowed
        self._changed()

    def announce(self, name: str, seconds: float) -> str | None:
        """Announce a secret text to an instance; return the notice's id, or None if that is refused.

        Args:
            name: of the instance.
            seconds: after which it is due: `LATER`, or `SOON`, after which it is past when this returns.
        """
        row = self.rows[name]
        text = secret()
        possible = row.stored.init is not None and len(row.notices) < notices.MOST_NOTICES
        row.secrets.add(text.encode())
        try:
            with self.service.writer.change() as change:
                sent = notices.send(change, row.stored, text, seconds)
        except ConflictError:
            assert not possible, "a notice is refused, although the instance runs and has few"
            return None
        assert possible, "a notice is for an instance that does not run, or that has too many"
        row.notices.append(sent)
        self.announced.append(sent.id)
        self._changed()
        self.happened["announced"] += 1
        if seconds == SOON:
            while notices.now() <= sent.due:
                time.sleep(SOON)
            row.notices.remove(sent)
            self._changed()
        return sent.id

    def cancel(self, name: str) -> None:
        """Take back the next notice of an instance."""
        row = self.rows[name]
        notice = self._listed(row)[0]
        with self.service.writer.change() as change:
            notices.cancel(change, row.stored, notice.id)
        row.notices.remove(notice)
        self._changed()
        self.happened["cancelled"] += 1

    def _policy_changed(self, row: Row | None) -> None:
        for one in [row] if row is not None else self.rows.values():
            one.token.conceal(self.rule(one))
            one.token.reveal(self.rule(one))
        for stream in self.streams:
            rows = [identity.row for identity in stream.identities if identity is not None]
            stream.forbidden &= set().union(*(one.token.forbidden(self.rule(one)) for one in rows))
        self._changed()

    # Runs.

    def start(self, name: str, init: Node) -> None:
        """Record a start of an instance with this init, and give it new secrets."""
        row = self.rows[name]
        with self.service.writer.change() as change:
            started = steps.start(change, self._renew(change, row), examine(init.pid))
        if started.run != row.stored.run:
            row.notices.clear()
        row.stored = started
        assert row.stored.init is not None
        self._inits[row.stored.init] = init
        row.init, row.ready = init, False
        self._changed()

    def stop(self, name: str) -> None:
        """Record that an instance has stopped."""
        row = self.rows[name]
        with self.service.writer.change() as change:
            row.stored = steps.stop(change, row.stored)
        row.init, row.ready = None, False
        row.notices.clear()
        self._changed()

    def observe(self, source: str, key: str, name: str, init: Node | None, *, late: bool = False) -> None:
        """Have a source observe one of its containers, perhaps with the name of another instance.

        Args:
            source: the source.
            key: the source's key of the container.
            name: the container's name at the source.
            init: its init; None: it does not run.
            late: repeat the last observation of it.
        """
        seen = self._seen.get((source, key)) if late else None
        if seen is None:
            value, other, device, option = secret(), secret(), secret(), secret()
            seen = Observed(
                key,
                "default",
                name,
                init=None if init is None else examine(init.pid),
                config={"user.token": value, f"user.{other}": "x"},
                devices={device: {"type": "nic", "nictype": "ipvlan", "token": option}},
            )
            if seen.init is not None and init is not None:
                self._inits[seen.init] = init
        self._seen[source, key] = seen
        # Which value a waiting request would spend at once cannot be told from the store afterwards.
        self.end_waits()
        with self.service.writer.change() as change:
            problems = reconcile(change, source, [seen])
        self.happened[f"observed by {source}"] += 1
        self._sync(source, key, seen, refused=bool(problems))

    def find_owned(self, source: str, key: str) -> Row | None:
        """Return the instance of a source's container, or None."""
        owned = [row for row in self.rows.values() if (row.stored.source, row.stored.key) == (source, key)]
        return owned[0] if owned else None

    def let_go(self, source: str, key: str) -> None:
        """Have a source report that a container is gone, perhaps in error."""
        self.end_waits()
        with self.service.writer.change() as change:
            reconcile(change, source, [], gone=[key])
        self.happened["let go"] += 1
        self._sync(source, key, None, refused=False)

    def _sync(self, source: str, key: str, seen: Observed | None, *, refused: bool) -> None:
        """Compare the store with the observation: only the observed instance may change, without foreign secrets."""
        with view(self.service.settings.store.url) as store:
            found = {one.id: one for one in list_instances(store)}
        rows = {row.stored.id: row for row in self.rows.values()}
        brought = {one.encode() for one in WRITTEN_SECRET.findall(str(seen))} if seen is not None else set()
        for number, row in rows.items():
            before, now = row.stored, found.get(number)
            its_own = (before.source, before.key) == (source, key)
            waits = before.key is None and (before.source in (None, source))
            # Its workload may have reported Ready since.
            if now is None or now != replace(
                before,
                ready=now.ready,
                revision=now.revision,
                policies=now.policies,
                allowed=now.allowed,
                config=_config(before, now, row),
            ):
                assert its_own or (waits and not refused), f"{before} was changed by {source} {key}"
            if now is None:
                self.happened["removed by a source"] += 1
                row.init = None
                continue
            if refused and its_own:
                assert now.init is None, "an instance that its source does not confirm runs"
                assert (now.config, now.devices, now.name) == (
                    _config(before, now, row),
                    before.devices,
                    before.name,
                )
            owner = (now.source, now.key)
            assert owner == (before.source, before.key) or its_own or owner == (source, key)
            if before.key is not None and now.key != before.key:
                # What its container has said went with it.
                row.said.clear()
            self.happened["released"] += its_own and now.key is None
            self.happened["adopted"] += not its_own and owner == (source, key)
            self.happened["renamed by a source"] += now.name != before.name
            allowed = row.secrets | (brought if owner == (source, key) else set())
            self._store(row, now, allowed)
        for number in found.keys() - rows.keys():
            now = found[number]
            assert (now.source, now.key) == (source, key)
            rows[number] = Row(replace(now, init=None))
            self._store(rows[number], now, brought)
        self.rows = {found[number].name: row for number, row in rows.items() if number in found}
        if seen is not None and not refused:
            mine = self.find_owned(source, key)
            assert mine is not None
            assert mine.stored.name == seen.name
            assert mine.stored.init == seen.init or (mine.init is not None and mine.init.alive)
        self.happened["observations refused"] += refused
        self._changed()

    def _store(self, row: Row, now: Instance, allowed: set[bytes]) -> None:
        """Take over the stored state of an instance, in which there must be no secret of another one."""
        has = {one.encode() for one in WRITTEN_SECRET.findall(str((now.name, now.config, now.devices)))}
        assert has <= allowed, f"{now} has another instance's secret"
        if now.init != row.stored.init or now.run != row.stored.run:
            row.init, row.ready = (None if now.init is None else self._inits[now.init]), False
            row.notices.clear()
        row.stored = now
        row.secrets = allowed
        if (value := now.config.get(TOKEN_KEY)) is not None:
            row.token.set(value, self.rule(row))

    def remove(self, name: str) -> None:
        """Remove an instance."""
        row = self.rows.pop(name)
        with self.service.writer.change() as change:
            steps.remove(change, row.stored)
        row.init = None
        self._changed()

    # Connections.

    def connect(self, node: Node, dialect: str) -> HeldConnection:
        """Have a process connect."""
        _answer, (number,) = node.command("connect", path=str(self.service.sockets[dialect]))
        connection = socket.socket(fileno=number)
        connection.settimeout(TIMEOUT)
        held = HeldConnection(connection, node, DIALECTS[dialect], {self.recognised(node)})
        self.held.append(held)
        self.happened["connections"] += 1
        return held

    def send(self, held: HeldConnection, path: str) -> None:
        """Send a request without waiting for the response."""
        self._ask(held, path)
        held.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    def wait(self, held: HeldConnection, path: str) -> None:
        """Send a request that waits, while what the last answer told is still so, or while there is nothing."""
        self._ask(held, path)
        held.waits = True
        self._expect(held, path)
        self.happened["waits"] += 1
        fields = f"Host: x\r\nIf-None-Match: {held.tag}\r\n"
        held.socket.sendall(f"GET {path}?wait=60 HTTP/1.1\r\n{fields}\r\n".encode())

    def end_waits(self) -> None:
        """Receive the responses of all requests that wait."""
        for held in self.held:
            if held.waits:
                self.receive(held)

    def receive(self, held: HeldConnection) -> None:
        """Receive the response, and check it. If the request still waits, another one ends that."""
        if not held.waits:
            self._judge(held, self._response(held))
            return
        self.happened["waits that a change ended"] += bool(select.select([held.socket], [], [], 0)[0])
        held.socket.sendall(b"GET /1.0 HTTP/1.1\r\nHost: x\r\n\r\n")
        self._judge(held, self._response(held))
        self._ask(held, "/1.0")
        self._judge(held, self._response(held))

    def ask(self, held: HeldConnection, path: str) -> None:
        """Send a request and check its response."""
        self.send(held, path)
        self.receive(held)

    def ask_from(self, node: Node, held: HeldConnection, path: str) -> None:
        """Pass the connection to another process, which sends the request; check the response."""
        self._ask(held, path)
        question = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"
        answer, _none = node.command("ask", held.socket.fileno(), question=question)
        self.happened["asked by another instance"] += not node.inside(held.node.container or node)
        self._judge(held, answer["answer"].encode("latin-1"))

    def say_ready(self, held: HeldConnection) -> None:
        """Send PATCH with Ready on a connection whose instance is known."""
        (identity,) = held.identities
        self._ask(held, "PATCH")
        body = b'{"state":"Ready"}'
        held.socket.sendall(b"PATCH /1.0 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if self._judge(held, self._response(held)) == 200:
            assert identity is not None
            identity.row.ready = True

    def say(self, held: HeldConnection, *, named: bool, removed: bool) -> None:
        """Send PUT or DELETE of an attribute on a connection whose instance is known.

        Args:
            held: the connection.
            named: the attribute has a secret as its name, which events tell.
            removed: remove what every instance says.
        """
        (identity,) = held.identities
        path, value = CLAIM, secret().encode()
        if named and not removed:
            claim = secret()
            self.claims.add(claim)
            path = f"{ATTRIBUTES}/proof/{claim}"
        method = "DELETE" if removed else "PUT"
        if identity is not None:
            # Nobody else may have them, whether they are written or not.
            identity.row.secrets |= {value, path.rpartition("/")[2].encode()}
        self._ask(held, f"{method} {path}")
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {0 if removed else len(value)}\r\n\r\n"
        held.socket.sendall(head.encode() + (b"" if removed else value))
        if self._judge(held, self._response(held)) in (201, 204):
            assert identity is not None
            identity.row.said.pop(path, None)
            if not removed:
                identity.row.said[path] = value
            self._changed()
            self.happened["said"] += 1

    def acknowledge(self, held: HeldConnection, number: str) -> int:
        """Send an acknowledgement of a notice, of whomever it is; return the status."""
        path = f"POST {NOTICES}/{number}/ack"
        self._ask(held, path)
        held.socket.sendall(f"{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        status = self._judge(held, self._response(held))
        if status == 204:
            (row,) = {identity.row for identity in held.identities if identity is not None}
            self.happened["acknowledged again" if number in self._acknowledged else "acknowledged"] += 1
            self._acknowledged.add(number)
            row.notices = [
                one._replace(status=notices.ACKNOWLEDGED) if one.id == number else one for one in row.notices
            ]
            self._changed()
        elif status == 404:
            running = any(number == one.id for row in self.rows.values() for one in row.notices)
            self.happened["acknowledged by another" if running else "acknowledged what is over"] += 1
        return status

    def listen_on(self, held: HeldConnection, websocket: bool, *, resumes: bool = False) -> None:
        """Turn a connection into an event stream, perhaps one that begins with all that the change log has."""
        path = RESUMED if resumes else EVENTS if websocket else NAMED_EVENTS
        self._ask(held, path)
        upgrade = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        key = f"Sec-WebSocket-Key: {'A' * 22}==\r\n"
        fields = upgrade + key if websocket else ""
        rows = [identity.row for identity in held.identities if identity is not None]
        if resumes:
            held.forbidden = set().union(*(row.token.forbidden(self.rule(row)) for row in rows))
            self.happened["resumed"] += 1
        held.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
        if self._judge(held, self._response(held)) in (101, 200):
            self.held.remove(held)
            self.streams.append(held)
            self.happened["streams"] += 1

    def drop(self, held: HeldConnection) -> None:
        """Close a connection."""
        held.socket.close()
        self.held.remove(held)

    def listen(self) -> None:
        """Receive the events of all streams; a stream that ended must have had a reason."""
        for stream in list(self.streams):
            stream.socket.setblocking(False)
            try:
                while data := stream.socket.recv(1 << 20):
                    self._check_secrets(stream, data)
                    self.happened["bytes of events"] += len(data)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                pass
            assert stream.may_end, "a stream has ended, and its instance runs and was never switched off"
            stream.socket.close()
            self.streams.remove(stream)
            self.happened["streams ended"] += 1

    def _must_end(self, stream: HeldConnection) -> None:
        until = time.monotonic() + TIMEOUT
        try:
            while data := stream.socket.recv(1 << 20):
                self._check_secrets(stream, data)
                # Pings may arrive all the time.
                stream.socket.settimeout(max(0.001, until - time.monotonic()))
        except ConnectionResetError:
            pass
        stream.socket.close()
        self.happened["streams ended"] += 1

    def _response(self, held: HeldConnection) -> bytes:
        held.socket.settimeout(TIMEOUT)
        data, held.received = held.received, b""
        while b"\r\n\r\n" not in data:
            more = held.socket.recv(65536)
            assert more, f"closed after {data!r}"
            data += more
        head, _end, _body = data.partition(b"\r\n\r\n")
        found = re.search(rb"(?i)content-length: (\d+)", head)
        if not found and not head.startswith(b"HTTP/1.1 304"):
            return data
        size = len(head) + 4 + (int(found[1]) if found else 0)
        while len(data) < size:
            more = held.socket.recv(65536)
            assert more, "an answer is cut short"
            data += more
        held.received = data[size:]
        return data[:size]

    # Expectations.

    def recognised(self, node: Node) -> Identity | None:
        """Return the expected identification of a process that connects now: the innermost instance around it."""
        if not node.alive:
            return None
        at = node.container
        while at is not None:
            for row in self.rows.values():
                if row.init is at and at.alive:
                    return Identity(row, row.stored.run, at)
            at = at.around
        return None

    def _changed(self) -> None:
        """Add the outcomes in the new state to those of each pending request."""
        for held in self.held:
            if not held.answered:
                held.identities.add(self.recognised(held.node))
            if held.asked is not None:
                self._expect(held, held.asked)
        for stream in self.streams:
            statuses = {
                one.status for identity in stream.identities for one in self._outcomes(stream, identity, EVENTS)
            }
            stream.may_end = stream.may_end or statuses != {200}

    def _ask(self, held: HeldConnection, path: str) -> None:
        if not held.answered and not held.node.alive:
            # At the first request the process must be alive; otherwise another process may hold its socket.
            held.identities = {None}
        held.asked = path
        held.outcomes.clear()
        self._expect(held, path)
        self.happened["requests"] += 1
        for identity in held.identities:
            if not self.lasts(identity):
                self.happened["asked without an instance"] += 1
        others = {node.pid for node in self.nodes}
        old = {held.node.pid} if not held.node.alive else set()
        old |= {one.init.pid for one in held.identities if one is not None and not one.init.alive}
        self.happened["asked after the pid was used again"] += bool(old & others)

    def _expect(self, held: HeldConnection, path: str) -> None:
        held.outcomes |= {outcome for identity in held.identities for outcome in self._outcomes(held, identity, path)}

    def lasts(self, identity: Identity | None) -> bool:
        """Whether an identification is still valid."""
        if identity is None:
            return False
        row = identity.row
        known = self.rows.get(row.stored.name) is row
        return known and row.stored.run == identity.run and row.init is identity.init and identity.init.alive

    def _outcomes(self, held: HeldConnection, identity: Identity | None, path: str) -> Iterator[PossibleOutcome]:
        if identity is None or not self.lasts(identity):
            yield PossibleOutcome(identity, 500, b"pid not in container?\n")
            return
        row, dialect = identity.row, held.dialect
        rule = self.rule(row)
        init = identity.init
        if held.node.uid != init.root:
            inside = held.node.uid - init.root
            known = init.privileged or 0 <= inside < init.count
            if path not in (TOKEN, TREE_TOKEN) or not known or inside not in rule.readers:
                yield PossibleOutcome(identity, 401, b"Access denied for non-root user\n")
                return
            self.happened["asked as a reader"] += 1
        method = path.split()[0] if path[0] != "/" else "GET"
        if row.stored.config.get(dialect.switch) and (method, path) not in dialect.open_when_off:
            yield PossibleOutcome(identity, 403, b"not authorized\n")
        elif path in (TOKEN, TREE_TOKEN):
            token = row.token
            token.perhaps_spent = token.perhaps_spent or rule.once
            if rule.hidden or token.perhaps_spent:
                yield PossibleOutcome(identity, 404, b"not found\n")
            if not rule.hidden:
                yield PossibleOutcome(identity, 200, token.value)
                if held.waits:
                    yield PossibleOutcome(identity, 304, b"")
        elif path.rpartition(" ")[2].startswith(ATTRIBUTES):
            yield self._attribute_outcome(identity, method, path.rpartition(" ")[2])
        elif path == NOTICES:
            self.happened["asked for notices"] += bool(row.notices)
            documents = [one.document for one in self._listed(row)]
            yield PossibleOutcome(identity, 200, json.dumps(documents, separators=(",", ":")).encode() + b"\n")
        elif method == "POST":
            its_own = any(path == f"POST {NOTICES}/{one.id}/ack" for one in row.notices)
            yield PossibleOutcome(identity, 204, b"") if its_own else PossibleOutcome(identity, 404, b"not found\n")
        elif path in (EVENTS, NAMED_EVENTS, RESUMED):
            yield PossibleOutcome(identity, 200, None)
        elif path == IDENTITY:
            yield PossibleOutcome(identity, 200, described(row.stored))
        else:
            if held.waits:
                yield PossibleOutcome(identity, 304, b"")
            yield PossibleOutcome(identity, 200, _body(self, row, dialect, path, with_token=True))
            if row.token.perhaps_spent:
                yield PossibleOutcome(identity, 200, _body(self, row, dialect, path, with_token=False))

    def _listed(self, row: Row) -> list[Notice]:
        """Return the notices of an instance, the next first."""
        return sorted(row.notices, key=lambda one: (one.due, one.id))

    def _attribute_outcome(self, identity: Identity, method: str, path: str) -> PossibleOutcome:
        row = identity.row
        if not (row.allowed or self.allowed):
            return PossibleOutcome(identity, 403, b"not authorized\n")
        if path == ATTRIBUTES:
            return PossibleOutcome(identity, 200, json.dumps(sorted(row.said), separators=(",", ":")).encode() + b"\n")
        if method != "GET":
            return PossibleOutcome(identity, 201 if method == "PUT" and path not in row.said else 204, b"")
        if path not in row.said:
            return PossibleOutcome(identity, 404, b"not found\n")
        self.happened["asked for what was said"] += 1
        return PossibleOutcome(identity, 200, row.said[path])

    def _judge(self, held: HeldConnection, response: bytes) -> int:
        """Check a response, and keep only the identities that explain it."""
        self._check_secrets(held, response)
        head, end, body = response.partition(b"\r\n\r\n")
        assert end, f"no whole response: {response!r}"
        status = int(head.split(b" ")[1])
        said = 200 if status == 101 else status
        if said == 200 and held.asked == IDENTITY:
            body = self._verified(held, body.decode())
        right = [one for one in held.outcomes if one.status == said and one.body in (None, body)]
        assert right, f"got {response!r}, expected one of {held.outcomes}"
        if status == 200 and held.asked in (TOKEN, TREE_TOKEN):
            given = [one.identity.row for one in right if one.identity is not None]
            for row in given:
                self.happened["given once"] += row.token.give(body)
        held.identities = {one.identity for one in right}
        held.answered, held.asked, held.waits = True, None, False
        tag = re.search(rb"(?i)etag: (\S+)", head)
        held.tag = tag[1].decode() if tag else '""'
        self.happened[f"answered {status}"] += 1
        return status

    def _verified(self, held: HeldConnection, token: str) -> bytes:
        """Verify a token of identity; return the instance that it names, as `described`."""
        key = self.keys[jwt.get_unverified_header(token)["kid"]]
        claims = jwt.decode(token, key, algorithms=["ES256"], audience=AUDIENCE)
        self._check_secrets(held, json.dumps(claims).encode())
        self.happened["tokens of identity"] += 1
        said = claims["guestapi"]
        assert claims["sub"] == f"spiffe://{TRUST_DOMAIN}/guestapi/{said['uuid']}"
        return " ".join(map(str, (said["uuid"], said["name"], said["project"], said["run"]))).encode()

    def _check_secrets(self, held: HeldConnection, data: bytes) -> None:
        known = {one for identity in held.identities if identity is not None for one in identity.row.secrets}
        for found in SECRET.findall(data):
            self.happened["secrets"] += 1
            assert found in known, f"another instance's secret in {data!r}"
        if held in self.streams:
            rows = [identity.row for identity in held.identities if identity is not None]
            untold = held.forbidden.union(*(row.token.untold for row in rows))
            assert not untold.intersection(SECRET.findall(data)), f"a value that no event may have in {data!r}"


def described(instance: Instance) -> bytes:
    """Return what a token of identity says of an instance."""
    return " ".join(map(str, (instance.uuid, instance.name, instance.project, instance.run))).encode()


def _config(before: Instance, now: Instance, row: Row) -> Mapping[str, str]:
    """Return what an instance had as configuration, but for a token that somebody may have got since."""
    if not row.token.perhaps_spent or TOKEN_KEY in now.config:
        return before.config
    return {key: value for key, value in before.config.items() if key != TOKEN_KEY}


def _body(world: World, row: Row, dialect: Dialect, path: str, *, with_token: bool) -> bytes:
    """Return the expected body for an instance, of which the token may be spent."""
    instance = row.stored
    values = {**instance.config, TOKEN_KEY: row.token.value.decode()}
    config = {}
    for key in sorted(values):
        rule = rule_for(key, world.policies, row.policies)
        if dialect.is_readable(key) and not (rule.hidden or rule.once) and (with_token or key != TOKEN_KEY):
            config[key] = values[key]
    devices = {name: dict(sorted(device.items())) for name, device in sorted(instance.devices.items())}
    identity = instance.name if dialect.name_is_instance_id else instance.cloud_init_id
    meta_data = f"#cloud-config\ninstance-id: {identity}\nlocal-hostname: {instance.name}\n"
    state = "Ready" if row.ready else "Started"
    location = dialect.lone_location or platform.node()
    match path:
        case "PATCH" if not dialect.patch_reads:
            return b""
        case "/":
            found: object = ["/1.0"]
        case "/1.0" if not dialect.describes_instance:
            found = {"api_version": "1.0"}
        case "/1.0" | "PATCH":
            found = {
                "state": "Ready" if path == "PATCH" else state,
                "api_version": "1.0",
                "instance_type": "container",
                "location": location,
                **dict(dialect.description),
            }
        case "/1.0/config":
            found = [f"/1.0/config/{key}" for key in config]
        case "/1.0/devices" if dialect.listed_nic_types is not None:
            found = [f"/1.0/device/{name}" for name in instance.devices]
        case "/1.0/devices":
            found = devices
        case "/1.0/meta-data":
            return meta_data.encode()
        case "/1.0/guestapi":
            allowed = ["attributes"] if row.allowed or world.allowed else []
            found = {"features": ["tree", "notices", "identity", *allowed]}
        case _:
            assert path == TREE
            found = {
                "api_version": "1.0",
                "config": config,
                "devices": devices,
                "instance_type": "container",
                "location": location,
                "meta_data": meta_data,
                "name": instance.name,
                "project": "default",
                "state": state,
                "uuid": instance.uuid,
            }
    return json.dumps(found, separators=(",", ":")).encode() + b"\n"
