"""`systemctl restart` and `reload` while clients in containers send requests and an operator changes instances."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness.containers import Container
from tests.harness.machine import Installed
from tests.harness.waiting import TIMEOUT

pytestmark = pytest.mark.root

#: The number of containers, and of clients and listeners in each.
CONTAINERS, CLIENTS = 4, 4

#: An operator's program. It adds instances (NAME:PID), prints the id of the log's last entry, and changes every
#: instance repeatedly. On a first line of input it makes a last change and prints the ids of each instance's events; on
#: a second one it removes all.
OPERATOR = """
import json, select, sys
from guestapi import settings
from guestapi.callers.namespaces import examine
from guestapi.store import steps
from guestapi.store.lookup import get_instance, get_latest_entry, read_entries
from guestapi.store.view import view
from guestapi.store.writing import Writer

loaded = settings.load(settings.find(None))
writer = Writer(loaded)
names = [word.partition(":")[0] for word in sys.argv[1:]]
with writer.change() as change:
    for word in sys.argv[1:]:
        name, _, pid = word.partition(":")
        steps.start(change, steps.add(change, "default", name, config={"user.foo": "bar"}), examine(int(pid)))
with view(loaded.store.url) as store:
    begin = get_latest_entry(store)
print(begin, flush=True)

def change_all(key, value):
    for name in names:
        with writer.change() as change:
            steps.configure(change, get_instance(change, "default", name), {key: value})

number = 0
while not select.select([sys.stdin], [], [], 0.05)[0]:
    number += 1
    change_all("user.n", str(number))
sys.stdin.readline()
change_all("user.end", "1")
sent = {name: [] for name in names}
with view(loaded.store.url) as store:
    for entry in read_entries(store, begin, 1_000_000).found:
        if entry.for_guest:
            sent[entry.instance].append(entry.id)
print(json.dumps(sent), flush=True)
sys.stdin.readline()
with writer.change() as change:
    for name in names:
        steps.remove(change, get_instance(change, "default", name))
"""


class ChangingOperator:
    """The running OPERATOR. `begin` is the id of the last entry of the log before its first change."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout
        self.begin = self._out.readline().strip()

    def end(self) -> dict[str, list[int]]:
        """Stop the changes; return the ids of each instance's events."""
        self._in.write("end\n")
        self._in.flush()
        sent: dict[str, list[int]] = json.loads(self._out.readline())
        return sent


@contextmanager
def operating(machine: Installed, containers: dict[str, Container]) -> Iterator[ChangingOperator]:
    """Run an operator on that machine, with these containers as instances."""
    words = [f"{name}:{container.pid}" for name, container in containers.items()]
    command = [*machine.enter, "/opt/guestapi/bin/python", "-c", OPERATOR, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield ChangingOperator(process)
            process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_nothing_is_lost(machine: Installed, verb: str) -> None:
    """In six restarts or reloads no connect fails, no response is cut, and no event is lost or sent twice."""
    binds = [(Path("/var/lib/incus/guestapi"), "/dev/incus")]
    # The first request starts the service, which creates the store.
    machine.ask()
    with ExitStack() as stack:
        names = [f"{verb}-{number}" for number in range(CONTAINERS)]
        containers = {name: stack.enter_context(Container(binds, enter=machine.enter)) for name in names}
        operator = stack.enter_context(operating(machine, containers))
        work = f"{operator.begin} {CLIENTS}"
        clients = [stack.enter_context(one.listening("last", work)) for one in containers.values()]
        for client in clients:
            assert client.read_document() == "ready"
        for count in (4, 1, 3, 3, 1, 2):
            machine.set_workers(count)
            machine.run("systemctl", verb, "guestapi.service")
            machine.ask()
        machine.wait_for_workers(2)
        sent = operator.end()
        for name, client in zip(names, clients, strict=True):
            seen = client.read_document()
            assert [loop for loop in seen["loops"] if loop["failed"]] == []
            assert all(loop["good"] > 10 for loop in seen["loops"])
            for listener in seen["listeners"]:
                assert listener["lost"] == []
                assert set(listener["codes"]) == {1001}
                assert listener["ids"] == sent[name]
