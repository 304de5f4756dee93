"""The recorded event streams of a live Incus, replayed: handshakes, client frames and received events."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guestapi.model import Device, Instance
from guestapi.store import steps
from guestapi.store.lookup import get_instance
from guestapi.store.transaction import Change
from tests.harness.containers import Container, receive, send
from tests.harness.service import Service
from tests.wire.recordings import unfold

FILE = Path(__file__).with_name("incus-7.0.2-events.jsonl")
CASES: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="ascii").splitlines()]
HEARD = [case for case in CASES if "events" in case and not case["case"].startswith("burst")]
BURSTS = [case for case in CASES if case["case"].startswith("burst")]
HANDSHAKES = [case for case in CASES if "events" not in case]

#: Cases with another result than the recorded one, and why; compared are (status, bytes after the head, closed).
DIFFERENCES: dict[str, tuple[str, tuple[int, str, bool]]] = {
    "head-events": ("HEAD is answered, it is no stream", (200, "", False)),
    "patch-events": ("405 where Incus runs the read", (405, 'method "PATCH" not allowed\n', False)),
    "hs-no-version": ("one sentence", (400, "Sec-WebSocket-Version: 13 is needed\n", False)),
    "hs-version-8": ("one sentence", (400, "Sec-WebSocket-Version: 13 is needed\n", False)),
    "hs-origin": ("one sentence", (403, "the Origin is not this Host\n", False)),
    "hs-origin-null": ("one sentence", (403, "the Origin is not this Host\n", False)),
}

DEVICES: dict[str, Device] = {
    "eth0": {"name": "eth0", "nictype": "bridged", "parent": "br0", "type": "nic"},
    "root": {"path": "/", "pool": "default", "type": "disk"},
}


@pytest.fixture(scope="module")
def c1(service: Service) -> Iterator[Container]:
    """The recorded container."""
    with service.container("c1", {"user.foo": "bar"}, DEVICES, project="recorded-events") as container:
        yield container


def split(data: bytes) -> tuple[int, str]:
    """Return the status and the bytes after the head; Incus ends the lines of a stream's head with a bare LF."""
    head, _, rest = data.decode("latin-1").replace("\n\n", "\r\n\r\n", 1).partition("\r\n\r\n")
    return (int(head.split()[1]) if head else 0), rest


@pytest.mark.parametrize("case", HANDSHAKES, ids=lambda case: str(case["case"]))
def test_recorded_handshake(case: dict[str, Any], c1: Container) -> None:
    """Each recorded handshake and client frame has the recorded result, except for the differences listed above."""
    steps: list[list[Any]] = []
    recorded = b""
    for step in case["steps"]:
        if step[0] == "send":
            steps += [send(unfold(step[1])), receive(99, "GET", 0.15)]
        elif step[0] == "receive":
            recorded += step[1].encode("latin-1")
        else:
            steps += [step, receive(99, "GET", 0.15)]
    result = c1.exchange(*steps)
    received = b"".join(result.received)
    expected = DIFFERENCES.get(case["case"], ("", (*split(recorded), case["closed"])))[1]
    assert (*split(received), result.closed) == expected
    if expected[0] == 101:
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in received
    if expected[0] in (400, 403):
        assert b"Sec-WebSocket-Version: 13\r\n" in received


def act(service: Service) -> None:
    """Make the changes that were made while the recorded listeners were connected, as far as guestapi has them."""
    one: list[dict[str, str]] = [
        {"user.foo": "baz"},
        {"user.foo": "baz"},
        {"user.new": "1"},
        {"user.new": ""},
        {"user.uni": "hé <&> ☃\n\u2028"},
        {"cloud-init.user-data": "#cloud-config\n"},
        {"user.user-data": "#cloud-config\nruncmd: [ls]\n"},
        {"environment.X": "2"},
        {"limits.processes": "1000"},
        {"security.nesting": "true"},
        {"user.a": "1", "user.b": "2", "user.c": "3"},
    ]
    for config in one:
        configure(service, config)
    share = {"path": "/mnt", "source": "/root/share", "type": "disk"}
    devices(service, mnt=share)
    devices(service, mnt={**share, "source": "/root/share2"})
    devices(service, mnt={**share, "source": "/root/share2", "readonly": "true"})
    devices(service)
    devices(service, eth0={**DEVICES["eth0"], "limits.ingress": "100Mbit"})
    devices(service, eth0={**DEVICES["eth0"], "limits.ingress": "100Mbit", "limits.priority": "3"})
    devices(service)
    with service.writer.change() as change:
        instance = steps.configure(change, of(change), {"user.foo": "q"})
        steps.replace_devices(change, instance, {**instance.devices, "none0": {"type": "none"}})
    configure(service, {"user.p": "1"})
    configure(service, {"user.p": ""})
    with service.writer.change() as change:
        steps.set_ready(change, of(change).id, of(change).run, True)


def of(change: Change) -> Instance:
    """Return the recorded instance."""
    return get_instance(change, "recorded-events", "c1")


def configure(service: Service, config: dict[str, str]) -> None:
    """Change the configuration once."""
    with service.writer.change() as change:
        steps.configure(change, of(change), config)


def devices(service: Service, **changed: Device) -> None:
    """Change the devices once, starting from the recorded ones."""
    with service.writer.change() as change:
        steps.replace_devices(change, of(change), {**DEVICES, **changed})


def heard(data: str) -> list[dict[str, Any]]:
    """Return the events in a stream's bytes, in any framing, without their timestamps."""
    found = []
    for text in re.findall(r'\{"type":"(?:config|device)".*?\}\}(?=\n)', data):
        event = json.loads(text.encode("latin-1"))
        assert list(event) == ["type", "timestamp", "metadata"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{0,8}[1-9])?(Z|[+-]\d\d:\d\d)", event["timestamp"])
        del event["timestamp"]
        found.append(event)
    return found


def ours(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events that guestapi sends for the recorded ones.

    To change a disk's source, Incus removes the device and adds it again; guestapi updates a device of the same name
    and type. Incus sends keys that were set in one change in any order, guestapi in the order of their names.
    """
    found: list[dict[str, Any]] = []
    for event in recorded:
        last = found[-1]["metadata"] if found else {}
        metadata = event["metadata"]
        if last.get("action") == "removed" and metadata.get("action") == "added" and last["name"] == metadata["name"]:
            found[-1] = {"type": "device", "metadata": {**metadata, "action": "updated"}}
        else:
            found.append(event)
    at_once = [event for event in found if event["metadata"].get("key") in ("user.a", "user.b", "user.c")]
    at_once.sort(key=lambda event: str(event["metadata"]["key"]))
    return [
        at_once.pop(0) if event["metadata"].get("key") in ("user.a", "user.b", "user.c") else event for event in found
    ]


def clients_of(cases: list[dict[str, Any]]) -> str:
    """Return the recorded requests for listening.py, each with the last event that its listener receives."""
    wanted = []
    for case in cases:
        request = unfold(case["steps"][0][1]).decode("latin-1")
        query = request.split(" ")[1].partition("?type=")[2]
        last = {"": "user.end", "config": "user.end", "device": '"end"'}.get(re.split("[,&]", query)[0], "")
        wanted.append([request, last])
    return json.dumps(wanted)


def mark_the_end(service: Service) -> None:
    """Make the last change that every listener receives; no event of an earlier change follows it."""
    with service.writer.change() as change:
        instance = steps.configure(change, of(change), {"user.end": "1"})
        steps.replace_devices(change, instance, {**instance.devices, "end": {"type": "none"}})
    with service.writer.change() as change:
        instance = steps.configure(change, of(change), {"user.end": ""})
        steps.replace_devices(change, instance, DEVICES)


def without_end(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events before those of `mark_the_end`."""
    names = [event["metadata"].get("key", event["metadata"].get("name")) for event in events]
    ends = [number for number, name in enumerate(names) if name in ("user.end", "end")]
    return events[: ends[0]] if ends else events


def test_recorded_listeners(service: Service, c1: Container) -> None:
    """Through both workers, a listener with any recorded filter receives the recorded events in the recorded order."""
    with c1.listening("raw", clients_of(HEARD)) as clients:
        assert clients.say() == "ready"
        act(service)
        mark_the_end(service)
        results = clients.say()
    for case, data in zip(HEARD, results, strict=True):
        assert without_end(heard(data)) == ours(case["events"]), case["case"]
        if case["case"].startswith("ws-"):
            assert data.split("\r\n\r\n", 1)[1].startswith("\x89\tkeepalive")


def test_recorded_burst(service: Service, c1: Container) -> None:
    """Twenty keys that are set in one change produce twenty events."""
    with c1.listening("raw", clients_of(BURSTS)) as clients:
        assert clients.say() == "ready"
        configure(service, {event["metadata"]["key"]: "v" for event in BURSTS[0]["events"]})
        mark_the_end(service)
        results = clients.say()
    for case, data in zip(BURSTS, results, strict=True):
        recorded = sorted(case["events"], key=lambda event: str(event["metadata"]["key"]))
        assert without_end(heard(data)) == recorded
