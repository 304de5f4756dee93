"""The walk of the isolation proof: a random sequence of events of instances.

``python -m tests.proof.walk STEPS``, in a PID namespace of its own, walks at least STEPS steps and prints the number of
each event as JSON. ``--no-shrink`` does not shorten a failing sequence, which would take minutes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from tests.proof.policies import KINDS, PATTERNS, READER
from tests.proof.world import CLAIM, LATER, NOTICES, PATHS, SOON, TOKEN, TREE, TREE_TOKEN, HeldConnection, Node, World

#: The highest numbers of processes, held connections and streams at a time.
NODES, HELD, STREAMS = 16, 40, 12
#: Sources with containers whose names collide, and the keys of these containers.
SOURCES, KEYS = ["lxc", "podman", "incus"], ["first", "second"]
#: The number of instances that run before the first step.
INSTANCES = 3
#: How often to try to get an ended container's PID and namespace number again; other processes take them, too.
TRIES = 7
#: Seconds after which the number of an ended namespace may be free; doubled at each try.
FREE_SECONDS = 0.01
#: Steps before the walk starts again with an empty host.
STEPS = 100

T = TypeVar("T")

#: An index into any list: the drawn value must not depend on processes and the service.
ANY = st.integers(0, 720719)
NAME = st.none() | ANY
ASKED = st.sampled_from(PATHS)
TOKENS = st.sampled_from([TOKEN, TREE_TOKEN])
DIALECT = st.sampled_from(["incus", "incus", "lxd", "lxd-legacy"])


def pick(among: Sequence[T], which: int) -> T:
    """Return an element."""
    return among[which % len(among)]


def tell(found: AssertionError) -> None:
    """Say on standard error what a step has found."""
    sys.stderr.write(f"found by a step: {found}\n")


class Walk(RuleBasedStateMachine):
    """A state machine whose rules are the steps. A rule does nothing if its step is not possible.

    `World` checks responses.
    """

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        try:
            # What a stream still has is looked at here.
            self.world.clear()
        except AssertionError as found:
            tell(found)
            raise
        for name in range(INSTANCES):
            self.occupy(name, self.world.make(self.world.host, container=True, privileged=name > 0))

    def teardown(self) -> None:
        """Say what a step has found. What the kernel hands out again may differ when hypothesis repeats the steps."""
        found = sys.exc_info()[1]
        if isinstance(found, AssertionError):
            tell(found)

    def step(self, name: str) -> None:
        """Count a step."""
        self.world.happened["steps"] += 1
        self.world.happened[f"did: {name}"] += 1

    def inits(self) -> list[Node]:
        """Return the inits of the running containers."""
        return [node for node in self.world.nodes if node.is_init]

    def idle(self) -> list[HeldConnection]:
        """Return connections without a pending request; those of running instances are repeated, for more weight."""
        idle = [held for held in self.world.held if held.asked is None]
        return idle + 2 * [held for held in idle if any(map(self.world.lasts, held.identities))]

    def callers(self) -> list[Node]:
        """Return the processes that can connect; those in instances are repeated, for a higher weight."""
        nodes = self.world.nodes
        return [self.world.host, *nodes, *2 * [node for node in nodes if self.world.recognised(node) is not None]]

    def pid(self, which: int, again: bool) -> int | None:
        """Return a PID that was in use before, if there is one and `again` is set."""
        free = self.world.free_pids
        return pick(free, which) if free and again else None

    @rule(which=ANY, again=st.booleans(), kind=st.sampled_from(["", "shifted", "privileged", "privileged"]), name=NAME)
    def start_container(self, which: int, again: bool, kind: str, name: int | None) -> None:
        """Start a container on the host, and perhaps register it."""
        if len(self.world.nodes) < NODES:
            self.step("start a container")
            pid = self.pid(which, again)
            kinds = {"shifted": kind == "shifted", "privileged": kind == "privileged"}
            init = self.world.make(self.world.host, container=True, pid=pid, **kinds)
            self.occupy(name, init)

    @rule(which=ANY, around=ANY, again=st.booleans(), shifted=st.booleans(), name=NAME)
    def nest_container(self, which: int, around: int, again: bool, shifted: bool, name: int | None) -> None:
        """Start a container in another one, at most three levels deep."""
        possible = [node for node in self.inits() if node.around is None or node.around.around is None]
        if possible and len(self.world.nodes) < NODES:
            self.step("nest a container")
            inside = pick(possible, around)
            init = self.world.make(inside, container=True, shifted=shifted, pid=self.pid(which, again))
            self.occupy(name, init)

    @rule(which=ANY, init=ANY, again=st.booleans(), uid=st.sampled_from([0, 0, 0, 1000]))
    def start_process(self, which: int, init: int, again: bool, uid: int) -> None:
        """Start a process in a container, as root or another user."""
        if self.inits() and len(self.world.nodes) < NODES:
            self.step("start a process")
            self.world.make(pick(self.inits(), init), container=False, uid=uid, pid=self.pid(which, again))

    @rule(node=ANY)
    def kill(self, node: int) -> None:
        """Kill a process, or a container's init and so all its processes, without an update of the store."""
        if self.world.nodes:
            self.step("kill")
            self.world.end(pick(self.world.nodes, node))

    @rule(name=ANY)
    def remove(self, name: int) -> None:
        """Remove an instance, running or not; its name can be used again."""
        if self.world.rows:
            self.step("remove")
            self.world.remove(pick(list(self.world.rows), name))

    @rule(name=ANY, init=ANY)
    def register(self, name: int, init: int) -> None:
        """Register a running container."""
        if self.inits():
            self.step("register")
            self.occupy(name, pick(self.inits(), init))

    def occupy(self, name: int | None, init: Node) -> None:
        """Start an instance, added if necessary, with this init, and stop the instance that had it."""
        if name is None:
            return
        chosen = pick(self.world.names, name)
        if chosen not in self.world.rows:
            self.world.add(chosen)
        for other, row in self.world.rows.items():
            if row.init is init:
                self.world.stop(other)
        self.world.start(chosen, init)

    @rule(name=ANY)
    def stop(self, name: int) -> None:
        """Record that an instance has stopped, whether it has or not."""
        if self.world.rows:
            self.step("stop")
            self.world.stop(pick(list(self.world.rows), name))

    @rule(name=ANY, path=ASKED)
    def restart(self, name: int, path: str) -> None:
        """Stop and start an instance with the same init: its earlier connections become invalid."""
        running = self.running()
        if running and len(self.world.held) < HELD:
            self.step("restart")
            chosen = pick(running, name)
            init = self.world.rows[chosen].init
            assert init is not None
            held = self.world.connect(init, "incus")
            self.world.ask(held, path)
            self.occupy(self.world.names.index(chosen), init)
            self.world.ask(held, path)

    def running(self) -> list[str]:
        """Return the instances whose init is alive."""
        return [name for name, row in self.world.rows.items() if row.init is not None and row.init.alive]

    @rule(source=st.sampled_from(SOURCES), key=st.sampled_from(KEYS), name=ANY, init=NAME, late=st.booleans())
    def observe(self, source: str, key: str, name: int, init: int | None, late: bool) -> None:
        """Have a source observe one of its containers, perhaps with the name and the init of another instance."""
        self.step("observe")
        node = None if init is None or not self.inits() else pick(self.inits(), init)
        self.world.observe(source, key, pick(self.world.names, name), node, late=late)

    @rule(source=st.sampled_from(SOURCES), key=st.sampled_from(KEYS), name=ANY, again=st.booleans(), path=ASKED)
    def start_at_source(self, source: str, key: str, name: int, again: bool, path: str) -> None:
        """Start a container, have its source observe it, and send a request from it."""
        if len(self.world.nodes) < NODES and len(self.world.held) < HELD:
            self.step("start at a source")
            init = self.world.make(self.world.host, container=True, pid=self.pid(name, again))
            self.world.observe(source, key, pick(self.world.names, name), init)
            self.world.ask(self.world.connect(init, "incus"), path)

    @rule(source=st.sampled_from(SOURCES), key=st.sampled_from(KEYS), name=ANY, configured=st.booleans(), path=ASKED)
    def live_at_source(self, source: str, key: str, name: int, configured: bool, path: str) -> None:
        """Start, rename and end a container at a source, and send requests at each stage."""
        free = [one for one in self.world.names if one not in self.world.rows]
        if (
            len(free) < 2
            or self.world.find_owned(source, key) is not None
            or len(self.world.nodes) >= NODES
            or len(self.world.held) >= HELD
        ):
            return
        self.step("live at a source")
        first, second = pick(free, name), pick(free, name + 1)
        init = self.world.make(self.world.host, container=True)
        self.world.observe(source, key, first, init)
        held = self.world.connect(init, "incus")
        self.world.ask(held, path)
        self.world.observe(source, key, second, init)
        self.world.ask(held, path)
        if configured:
            self.world.configure(second)
        self.world.end(init)
        self.world.ask(held, path)
        self.world.let_go(source, key)
        self.world.ask(held, path)

    @rule(source=st.sampled_from(SOURCES), key=st.sampled_from(KEYS), ended=st.booleans())
    def let_go(self, source: str, key: str, ended: bool) -> None:
        """Have a source report that a container is gone, whether its init has ended or not."""
        self.step("let go")
        row = self.world.find_owned(source, key)
        if ended and row is not None and row.init is not None and row.init.alive:
            self.world.end(row.init)
        self.world.let_go(source, key)

    @rule(name=ANY)
    def configure(self, name: int) -> None:
        """Have the operator change all values that an instance can read."""
        if self.world.rows:
            self.step("configure")
            self.world.configure(pick(list(self.world.rows), name))

    @rule(name=ANY, key=st.sampled_from(["security.guestapi", "security.devlxd"]))
    def switch(self, name: int, key: str) -> None:
        """Have the operator switch an instance's API off, or on again."""
        if self.world.rows:
            self.step("switch")
            self.world.switch(pick(list(self.world.rows), name), key)

    @rule(name=NAME, pattern=st.sampled_from(PATTERNS), kind=st.sampled_from([*KINDS, "uids"]))
    def put_policy(self, name: int | None, pattern: str, kind: str) -> None:
        """Have a policy hold for an instance or for all, in the place of an earlier one."""
        if self.world.rows:
            self.step("put a policy")
            self.world.put_policy(self.some_row(name), pattern, kind)

    @rule(name=NAME, which=ANY)
    def remove_policy(self, name: int | None, which: int) -> None:
        """Have a policy hold no more."""
        if self.world.rows:
            chosen = self.some_row(name)
            held = self.world.policies if chosen is None else self.world.rows[chosen].policies
            if held:
                self.step("remove a policy")
                self.world.remove_policy(chosen, pick(list(held), which))

    @rule(name=ANY, kind=st.sampled_from(list(KINDS)), uid=st.sampled_from([0, READER, READER + 1]), path=TOKENS)
    def ask_for_token(self, name: int, kind: str, uid: int, path: str) -> None:
        """Ask for the token of an instance twice, as root or another user, while a policy holds for it."""
        running = self.running()
        if running and len(self.world.nodes) < NODES and len(self.world.held) < HELD:
            self.step("ask for a token")
            chosen = pick(running, name)
            init = self.world.rows[chosen].init
            assert init is not None
            self.world.put_policy(chosen, "user.token", kind)
            held = self.world.connect(self.world.make(init, container=False, uid=uid), "incus")
            for _time in range(2):
                self.world.ask(held, path)

    @rule(name=ANY, kinds=st.tuples(*2 * [st.sampled_from(list(KINDS))]), uid=st.sampled_from([0, READER]))
    def wait_for_token(self, name: int, kinds: tuple[str, str], uid: int) -> None:
        """Have a request wait for the token of an instance while another policy comes, and then another token."""
        running = self.running()
        if running and len(self.world.nodes) < NODES and len(self.world.held) < HELD:
            self.step("wait for a token")
            chosen = pick(running, name)
            init = self.world.rows[chosen].init
            assert init is not None
            self.world.put_policy(chosen, "user.token", kinds[0])
            held = self.world.connect(self.world.make(init, container=False, uid=uid), "incus")
            self.world.ask(held, TREE_TOKEN)
            self.world.wait(held, TREE_TOKEN)
            self.world.put_policy(chosen, "user.token", kinds[1])
            self.world.configure(chosen)
            self.world.receive(held)

    def some_row(self, name: int | None) -> str | None:
        """Return the name of an instance; None for all."""
        return None if name is None else pick(list(self.world.rows), name)

    @rule(node=ANY, dialect=DIALECT, path=st.none() | ASKED)
    def connect(self, node: int, dialect: str, path: str | None) -> None:
        """Connect, and send a request at once or later."""
        if len(self.world.held) < HELD:
            self.step("connect")
            held = self.world.connect(pick(self.callers(), node), dialect)
            if path is not None:
                self.world.ask(held, path)

    @rule(node=ANY, path=ASKED, before=st.booleans(), shifted=st.booleans(), fresh=st.booleans())
    def take_over(self, node: int, path: str, before: bool, shifted: bool, fresh: bool) -> None:
        """Connect, end the process, give its PID to another container, and only then send a request.

        The process is any, or a new one of a running instance, which goes on without it.
        """
        if self.world.nodes and len(self.world.nodes) < NODES and len(self.world.held) < HELD:
            self.step("take over")
            running = self.running()
            if fresh and running:
                init = self.world.rows[pick(running, node)].init
                assert init is not None
                victim = self.world.make(init, container=False)
            else:
                victim = pick(self.world.nodes, node)
            held = self.world.connect(victim, "incus")
            if before:
                self.world.ask(held, path)
            self.world.end(victim)
            self.world.make(self.world.host, container=True, shifted=shifted, pid=victim.pid)
            self.world.ask(held, path)

    def succeed(self, init: Node) -> Node:
        """Return a container with the PID of one that has ended, and with its namespace number if possible.

        The kernel assigns the lowest free number, so all lower ones are taken for the time being.
        """
        world = self.world
        fillers: list[Node] = []
        for number in range(TRIES):
            # No event reports that the number of an ended namespace is free.
            time.sleep(FREE_SECONDS * 2**number)
            successor = world.make(world.host, container=True, privileged=True, pid=init.pid)
            if (successor.pid, successor.namespace) == (init.pid, init.namespace):
                world.happened["pid and namespace number used again"] += 1
                break
            if number == TRIES - 1:
                break
            world.end(successor)
            if successor.namespace < init.namespace:
                # These take the number that the successor had, and all lower ones.
                while not fillers or fillers[-1].namespace < init.namespace:
                    fillers.append(world.make(world.host, container=True, privileged=True))
                world.end(fillers.pop())
        for filler in fillers:
            world.end(filler)
        return successor

    @rule(name=ANY, path=ASKED)
    def replace_silent(self, name: int, path: str) -> None:
        """End an instance before its first request, and give its PID and namespace number to another container.

        After a request, the connection or a pidfd of its init would keep the kernel from assigning the number again.
        """
        if len(self.world.nodes) < NODES and len(self.world.held) < HELD:
            self.step("replace a silent one")
            init = self.world.make(self.world.host, container=True, privileged=True)
            self.occupy(name, init)
            self.world.end(init)
            successor = self.succeed(init)
            self.world.ask(self.world.connect(successor, "incus"), path)

    @rule(name=ANY, path=ASKED, other=NAME, stopped=st.booleans())
    def replace(self, name: int, path: str, other: int | None, stopped: bool) -> None:
        """End an instance, and give its PID and perhaps its name to another container."""
        running = self.running()
        if not running or len(self.world.held) >= HELD - 1:
            return
        self.step("replace")
        ended = pick(running, name)
        init = self.world.rows[ended].init
        assert init is not None
        held = self.world.connect(init, "incus")
        self.world.ask(held, path)
        self.world.end(init)
        if stopped:
            self.world.stop(ended)
        successor = self.world.make(self.world.host, container=True, pid=init.pid)
        self.occupy(other, successor)
        self.world.ask(held, path)
        self.world.ask(self.world.connect(successor, "incus"), path)

    @rule(held=ANY, path=ASKED)
    def ask(self, held: int, path: str) -> None:
        """Send a request on a connection that was held open."""
        if self.idle():
            self.step("ask")
            self.world.ask(pick(self.idle(), held), path)

    @rule(held=ANY, node=ANY, path=ASKED)
    def ask_from_elsewhere(self, held: int, node: int, path: str) -> None:
        """Pass a connection to another process, perhaps of another instance, which sends a request."""
        if self.idle() and self.world.nodes:
            self.step("ask from elsewhere")
            self.world.ask_from(pick(self.world.nodes, node), pick(self.idle(), held), path)

    @rule(held=ANY, path=ASKED)
    def send(self, held: int, path: str) -> None:
        """Send a request; other steps come before its response is received."""
        if self.idle():
            self.step("send")
            self.world.send(pick(self.idle(), held), path)

    @rule(held=ANY, path=st.sampled_from([TREE, TREE_TOKEN]))
    def wait(self, held: int, path: str) -> None:
        """Send a request that waits for a change; other steps come before its response is received."""
        if self.idle():
            self.step("wait")
            self.world.wait(pick(self.idle(), held), path)

    @rule()
    def end_waits(self) -> None:
        """Receive the responses of all requests that wait."""
        if any(held.waits for held in self.world.held):
            self.step("end waits")
            self.world.end_waits()

    @rule(path=ASKED)
    def ask_all(self, path: str) -> None:
        """Send a request on every connection, and receive all responses."""
        if self.world.held:
            self.step("ask all")
            for held in self.world.held:
                if held.asked is None:
                    self.world.send(held, path)
            for held in self.world.held:
                self.world.receive(held)

    @rule(held=ANY)
    def say_ready(self, held: int) -> None:
        """Report Ready from the workload of an instance."""
        # Only on a connection with a known instance; otherwise the expected state of the instances would be unknown.
        certain = [
            one
            for one in self.idle()
            if one.answered
            and len(one.identities) == 1
            and None not in one.identities
            and one.dialect.describes_instance
        ]
        if certain:
            self.step("say ready")
            self.world.say_ready(pick(certain, held))

    @rule(held=ANY, named=st.booleans(), removed=st.sampled_from([False, False, True]), again=st.none() | ASKED)
    def say(self, held: int, named: bool, removed: bool, again: str | None) -> None:
        """Have an instance say something of itself, or take it back, and perhaps ask for something."""
        certain = [one for one in self.idle() if one.answered and len(one.identities) == 1]
        if certain:
            self.step("say")
            chosen = pick(certain, held)
            self.world.say(chosen, named=named, removed=removed)
            if again is not None:
                self.world.ask(chosen, again)

    @rule(name=ANY, named=st.booleans(), path=ASKED)
    def say_and_ask(self, name: int, named: bool, path: str) -> None:
        """Have an instance that may say things of itself, whoever is allowed them; then ask for that, and for more."""
        running = self.running()
        if running and len(self.world.held) < HELD:
            self.step("say and ask")
            chosen = pick(running, name)
            row = self.world.rows[chosen]
            assert row.init is not None
            if not (row.allowed or self.world.allowed):
                self.world.permit(chosen)
            held = self.world.connect(row.init, "incus")
            self.world.say(held, named=named, removed=False)
            for one in (CLAIM, path):
                self.world.ask(held, one)

    @rule(name=ANY, seconds=st.sampled_from([LATER, LATER, SOON]))
    def announce(self, name: int, seconds: float) -> None:
        """Have the operator announce something to an instance, which may not run."""
        if self.world.rows:
            self.step("announce")
            self.world.announce(pick(list(self.world.rows), name), seconds)

    @rule(name=ANY)
    def cancel(self, name: int) -> None:
        """Have the operator take a notice back."""
        announced = [name for name, row in self.world.rows.items() if row.notices]
        if announced:
            self.step("cancel")
            self.world.cancel(pick(announced, name))

    @rule(held=ANY, which=ANY)
    def acknowledge(self, held: int, which: int) -> None:
        """Acknowledge any notice on any connection: it may be another's, over, or acknowledged before."""
        if self.idle() and self.world.announced:
            self.step("acknowledge")
            self.world.acknowledge(pick(self.idle(), held), pick(self.world.announced, which))

    @rule(name=ANY, other=ANY, seconds=st.sampled_from([LATER, LATER, SOON]), restarted=st.booleans(), path=ASKED)
    def announce_and_acknowledge(self, name: int, other: int, seconds: float, restarted: bool, path: str) -> None:
        """Announce something; another instance acknowledges it, then its own does twice, perhaps after a restart."""
        running = self.running()
        if running and len(self.world.held) < HELD - 1:
            self.step("announce and acknowledge")
            chosen = pick(running, name)
            init, foreign = (self.world.rows[one].init for one in (chosen, pick(running, other)))
            assert init is not None
            assert foreign is not None
            number = self.world.announce(chosen, seconds)
            if number is None:
                return
            if restarted:
                self.world.stop(chosen)
                self.world.start(chosen, init)
            held = self.world.connect(foreign, "incus")
            self.world.acknowledge(held, number)
            self.world.ask(held, NOTICES)
            held = self.world.connect(init, "incus")
            for _time in range(2):
                self.world.acknowledge(held, number)
            for one in (NOTICES, path):
                self.world.ask(held, one)

    @rule(name=NAME)
    def permit(self, name: int | None) -> None:
        """Allow attributes to an instance or to all, or no more."""
        if self.world.rows:
            self.step("permit")
            self.world.permit(self.some_row(name))

    @rule(held=ANY, websocket=st.booleans(), resumes=st.booleans())
    def stream(self, held: int, websocket: bool, resumes: bool) -> None:
        """Turn a connection into an event stream."""
        if self.idle() and len(self.world.streams) < STREAMS:
            self.step("stream")
            self.world.listen_on(pick(self.idle(), held), websocket, resumes=resumes)

    @rule(node=ANY, dialect=DIALECT, websocket=st.booleans())
    def connect_stream(self, node: int, dialect: str, websocket: bool) -> None:
        """Connect, and turn the connection into an event stream."""
        if len(self.world.streams) < STREAMS:
            self.step("connect a stream")
            self.world.listen_on(self.world.connect(pick(self.callers(), node), dialect), websocket)

    @rule()
    def listen(self) -> None:
        """Receive the events of all streams."""
        if self.world.streams:
            self.step("listen")
            self.world.listen()

    @rule(held=ANY)
    def close(self, held: int) -> None:
        """Close a connection."""
        if self.world.held:
            self.step("close")
            self.world.drop(pick(self.world.held, held))


def main(steps: int, *, shrink: bool = True) -> None:
    """Walk. A failure raises hypothesis's error with the steps that lead to it, minimal with `shrink`."""
    Walk.world = World()
    how = settings(
        max_examples=max(1, steps // STEPS),
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        # In CI hypothesis derandomizes by default, so each walk would be the same.
        derandomize=False,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
    )
    happened = Walk.world.happened
    try:
        while happened["steps"] < steps:
            run_state_machine_as_test(Walk, settings=how)
        Walk.world.close()
    except BaseException:
        sys.stderr.write(Walk.world.service.log.read_text())
        raise
    print(json.dumps(happened))  # noqa: T201 - the calling process reads it


if __name__ == "__main__":
    main(int(sys.argv[1]), shrink="--no-shrink" not in sys.argv)
