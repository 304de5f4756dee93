"""kill -9 at every moment: of the operator's command, of a worker that writes, of the arbiter."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.store.reading import Reader
from guestapi.store.writing import Writer
from tests.faults.killing import KilledCommands, killed_before
from tests.harness.containers import BASE, Container
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.inside import asking, talk, talks
from tests.store.processes import config_of, init, log_entries

pytestmark = pytest.mark.root


@pytest.fixture
def own() -> Iterator[Service]:
    """A service to be killed."""
    with Service(workers=1, dialects=["incus"]) as running:
        yield running


@pytest.mark.parametrize("beside_a_worker", [False, True])
def test_killed_operator_s_command(tmp_path: Path, beside_a_worker: bool) -> None:
    """After `guestapi config set` is killed at any moment, the whole change and its events are stored, or nothing."""
    config = tmp_path / "guestapi.toml"
    config.write_text(f'[store]\nurl = "sqlite:///{tmp_path}/store.db"\n')
    settings = Settings(store=StoreSettings(url=f"sqlite:///{tmp_path}/store.db"))
    with Writer(settings, create=True).change() as change:
        steps.start(change, steps.add(change, "default", "c1"), init(1))
    events = len(log_entries(settings))
    with ExitStack() as stack:
        reader = Reader(settings.store.url)
        if beside_a_worker:
            # The last process to close the database removes the log; with the reader, that is not the command.
            stack.callback(reader.close)
            reader.latest()
        commands = KilledCommands(config, "config", "set", "c1", "user.a=NUMBER", "user.b=NUMBER")
        stack.callback(commands.end)
        whole = 0
        for number in count(1):
            ended = commands.run(number, number)
            before = config_of(settings)
            assert before.get("user.a") == before.get("user.b"), "an incomplete change"
            whole += before.get("user.a") == str(number)
            # The two events of the first run, and two for each change.
            assert len(log_entries(settings)) == events + 2 + 2 * whole
            if beside_a_worker:
                seen = reader.instance(1)
                assert seen is not None
                assert seen.config == before
            if ended:
                break
    # Some kills came before the write and some after it; otherwise the test would be void.
    assert 2 < whole < number - 10


def test_killed_worker_during_a_commit(own: Service) -> None:
    """After a worker is killed while it writes a state, state and event are stored, or neither; others serve."""
    with own.container("c1", {"user.foo": "bar"}) as c1:
        events = len(log_entries(own.settings))
        for number in count(1):
            (worker,) = own.workers
            # Only calls that write, because a worker makes many others.
            with killed_before(worker, number, "pwrite64,fsync,fdatasync,ftruncate,unlink"), talk(c1) as guest:
                body = b'{"state":"Ready"}'
                guest.send(b"PATCH /1.0 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                answer = guest.socket.recv(4096)
            ready = own.instance("c1").ready
            assert len(log_entries(own.settings)) == events + ready
            if answer:
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert ready
                break
            assert c1.ask("/1.0/config/user.foo").text == "bar"
            if ready:
                with own.writer.change() as change:
                    instance = get_instance(change, "default", "c1")
                    steps.set_ready(change, instance.id, instance.run, False)
                events += 1
    assert number > 2


#: The calls by which a worker writes to the store, and by which it answers.
WRITES, SENDS = "pwrite64,fsync,fdatasync,ftruncate", "sendto,sendmsg"
SECRET = "c0ffee-and-more"
TOKENS = ("/1.0/config/user.token", "/1.0/guestapi/tree/config/user.token")


def ask_and_be_killed(own: Service, container: Container, calls: str, number: int) -> bool:
    """Let 200 clients ask for a value that is given once, both workers be killed before their call of this number.

    Returns:
        Whether nobody was killed.
    """
    with ExitStack() as stack:
        guests = stack.enter_context(talks(container, 200))
        # All are accepted: a worker that comes after a killed one serves none of them.
        for guest in guests:
            assert guest.ask("/1.0").status == 200
        for worker in own.workers:
            stack.enter_context(killed_before(worker, number, calls))
        for index, guest in enumerate(guests):
            try:
                guest.send(asking(TOKENS[index % 2]))
            except BrokenPipeError:
                pass  # Its worker has been killed.
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda guest: guest.end_or_answer(), guests))
    given = sum(SECRET.encode() in data for data in got)
    until(lambda: len(own.workers) == 2, "both workers")
    spent = json.loads(own.command("policy", "spent", "--format", "json").stdout)
    assert given <= len(spent) <= 1, "given to two, or to one of whom the operator does not know"
    assert [(one["key"], one["uid"]) for one in spent] == [("user.token", BASE)] * len(spent)
    # What was not given is there for the next client, and what was given for nobody.
    assert container.ask(TOKENS[0]).text == ("not found\n" if spent else SECRET)
    if calls == SENDS and number == 1:
        assert (given, len(spent)) == (0, 1), "committed before the first byte is sent"
    if calls == WRITES and number == 1:
        assert not spent, "nothing is given before it is written"
    survived = all(got)
    assert not survived or given == 1
    return survived


@pytest.mark.parametrize("calls", [WRITES, SENDS])
def test_killed_workers_that_give_a_value_once(calls: str) -> None:
    """While 200 clients ask by either path, workers are killed before each write or answer: one client has the value.

    Or nobody has it; and the operator sees to whom it was given.
    """
    with Service(dialects=["incus"], toml="[limits]\nconnections_per_instance = 512\n") as own:
        # Of the answers, the first ones show all that there is to see.
        for number in count(1) if calls == WRITES else (1, 2, 3):
            with own.container("c1") as container:
                own.command("policy", "add", "user.token", "--instance", "c1", "--once")
                own.configure("c1", user_token=SECRET)
                if ask_and_be_killed(own, container, calls, number):
                    break
        assert number > 2


def test_killed_arbiter_without_systemd(own: Service) -> None:
    """Workers whose arbiter was killed end by themselves, so that the next service can use the socket."""
    with own.container("c1", {"user.foo": "bar"}) as c1:
        (worker,) = own.workers
        os.kill(own.pid, signal.SIGKILL)
        assert own._process is not None
        own._process.wait()
        until(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")
        own.start()
        assert c1.ask("/1.0/config/user.foo").text == "bar"
        checked = json.loads(own.command("check", "--format", "json", check=False).stdout)
        assert [one["check"] for one in checked if not one["ok"]] == []
