"""The recordings of a live Incus, replayed byte for byte against the real service from real containers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from guestapi.store import images, steps
from guestapi.store.lookup import get_instance
from tests.harness.containers import BASE, Container, Exchanged, Response, exchanged, from_host, parse, receive, send
from tests.harness.service import Service
from tests.wire import recordings
from tests.wire.differences import SENTENCE, expected
from tests.wire.recordings import DEVICES, HWADDR, Case

CASES = recordings.load()

#: Cases that wait for a time limit of the server, and its seconds. They run in parallel with all other cases.
SLOW = {
    "no-request": 3,
    "partial-header": 3,
    "patch-short-body-3s": 3,
    "idle-20s-then-request": 20,
    "idle-after-response": 30,
}
#: Where a process is put into a cgroup that bears another container's name.
CGROUP = Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").is_dir() else Path("/sys/fs/cgroup")

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@pytest.fixture(scope="module")
def containers(service: Service) -> Iterator[dict[str, Container]]:
    """The recorded containers: c1, one with an ID map of its own, and a privileged one."""
    with (
        service.container("c1", devices=DEVICES, location="peerhost", project="recorded") as c1,
        service.container("ciso", base=BASE + 65536, location="peerhost", project="recorded") as ciso,
        service.container("cpriv", base=None, location="peerhost", project="recorded") as cpriv,
    ):
        yield {"c1": c1, "ciso": ciso, "cpriv": cpriv}


@pytest.fixture(scope="module")
def fingerprints(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Import images like the recorded ones; return the fingerprint of each by the recorded fingerprint."""
    where, files = images.directory(service.settings), tmp_path_factory.mktemp("images")
    (files / "public.tar.gz").write_bytes(recordings.public_image(CASES))
    for name in ("private.tar.gz", "metadata.tar.xz", "rootfs.squashfs"):
        (files / name).write_bytes(name.encode() * 100)
    public = images.import_image(service.writer, where, [files / "public.tar.gz"], public=True).fingerprint
    private = images.import_image(service.writer, where, [files / "private.tar.gz"]).fingerprint
    both = [files / "metadata.tar.xz", files / "rootfs.squashfs"]
    split = images.import_image(service.writer, where, both, public=True).fingerprint
    yield {recordings.PUBLIC: public, recordings.PRIVATE: private, recordings.SPLIT: split}
    for fingerprint in (public, private, split):
        images.remove_image(service.writer, where, fingerprint)


@contextmanager
def in_cgroup(container: Container, name: str) -> Iterator[None]:
    """Move a container's init, and so its children, into a cgroup that is named like another container's."""
    group = CGROUP / name
    group.mkdir(exist_ok=True)
    before = Path(f"/proc/{container.pid}/cgroup").read_text().split("0::", 1)[1].strip().lstrip("/")
    (group / "cgroup.procs").write_text(str(container.pid))
    try:
        yield
    finally:
        (CGROUP / before / "cgroup.procs").write_text(str(container.pid))
        group.rmdir()


def steps_of(case: Case) -> list[list[Any]]:
    """Return the case's steps for an exchange; where no response was recorded, a short wait checks that none comes."""
    steps = []
    for step in case.steps:
        if step[0] == "send":
            steps.append(send(recordings.unfold(step[1])))
        elif step[0] == "receive":
            patience = 10 if step[1] else {"idle-after-response": 35, "cr-only": 1.2}.get(case.name, 5)
            steps.append(receive(max(1, len(step[1])), case.method, patience))
        else:
            steps.append(step)
    return steps


def sender(case: Case, service: Service, containers: dict[str, Container]) -> Callable[[list[list[Any]]], Exchanged]:
    """Return a function that exchanges bytes with the service as the recorded kind of caller."""
    c1 = containers["c1"]
    from_c1: dict[str, dict[str, Any]] = {
        "root": {},
        "init": {},
        "user": {"become": ["uid:1000"]},
        "pidns": {"become": ["pidns"]},
        "usernsroot": {"become": ["uid:1000", "userns"]},
        "gone": {"how": "exited"},
    }
    if case.sender in from_c1:
        return lambda steps: c1.exchange(*steps, **from_c1[case.sender])
    if case.sender in ("cpriv", "ciso"):
        return lambda steps: containers[case.sender].exchange(*steps)
    if case.sender in ("cgmonitor", "cgpayload"):

        def from_another_cgroup(steps: list[list[Any]]) -> Exchanged:
            with in_cgroup(c1, f"lxc.{case.sender[2:]}.c2"):
                return c1.exchange(*steps)

        return from_another_cgroup
    if case.sender == "nsenter":
        return lambda steps: entered(c1, steps)
    uid = {"host": None, "hostuser": 65534, "hostidmap": BASE}[case.sender]
    become = [] if uid is None else [f"uid:{uid}"]
    return lambda steps: from_host(service.socket, *steps, become=become)


def entered(container: Container, steps: list[list[Any]]) -> Exchanged:
    """Exchange bytes as the host's root in the container's mount and PID namespaces, but not in its user namespace."""
    import subprocess

    command = {"do": "exchange", "steps": steps, "socket": "/dev/incus/sock"}
    done = subprocess.run(
        ["nsenter", "-t", str(container.pid), "-m", "-p", "/usr/bin/python3", "-I", "-S", "/tmp/agent.py"],
        input=json.dumps(command).encode() + b"\n",
        capture_output=True,
        check=True,
    )
    return exchanged(json.loads(done.stdout))


def prepare(case: Case, service: Service, name: str) -> None:
    """Give the instance the recorded configuration and state."""
    with service.writer.change() as change:
        instance = get_instance(change, "recorded", name)
        wanted = {**recordings.CONFIG[case.state], **HWADDR}
        gone = dict.fromkeys(instance.config.keys() - wanted.keys(), "")
        instance = steps.configure(change, instance, {**wanted, **gone})
        steps.set_ready(change, instance.id, instance.run, case.ready_before)


def compare(case: Case, service: Service, name: str, result: Exchanged) -> None:
    """Compare status, Content-Type, nosniff, Location, image fields, body, closure, and the state afterwards."""
    wanted, closed, ready = expected(case)
    got = [response for data in result.received for response in parse(data, case.method)]
    assert [response.status for response in got] == [response["status"] for response in wanted]
    for response, want in zip(got, wanted, strict=True):
        if want["status"] == 100:
            continue
        kind, body, want_kind, want_body = in_same_parts(response, want)
        assert kind == want_kind
        assert (response.headers.get("x-content-type-options") == "nosniff") == want.get("nosniff", False)
        assert response.headers.get("location") == want.get("location")
        if fields := want.get("fields"):
            assert {name: response.headers.get(name) for name in fields} == fields
        if want["status"] == 405:
            assert "GET" in response.headers["allow"].split(", ")
        compare_body(body, "" if case.method == "HEAD" else want_body, want.get("type"))
    assert result.closed == closed
    if ready is not None:
        assert service.instance(name, "recorded").ready == ready


def in_same_parts(response: Response, want: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return both Content-Types and bodies with the boundaries replaced by a stand-in of the same length."""
    return (
        *_without_boundary(response.headers.get("content-type", ""), response.body.decode("latin-1")),
        *_without_boundary(want.get("type", ""), want["body"]),
    )


def _without_boundary(kind: str, body: str) -> tuple[str, str]:
    boundary = kind.partition("boundary=")[2]
    stand_in = "-" * len(boundary)
    return (kind.replace(boundary, stand_in), body.replace(boundary, stand_in)) if boundary else (kind, body)


def compare_body(got: str, want: str, kind: str | None) -> None:
    """Compare two bodies exactly, except for UUIDs, sentences of guestapi's own, and lists that Go does not sort."""
    if want == SENTENCE:
        assert re.fullmatch(r"[^\n]{8,120}\n", got)
    elif kind == "application/json" and want.startswith("["):
        assert (
            got
            == json.dumps(sorted(json.loads(want.encode("latin-1"))), separators=(",", ":"), ensure_ascii=False)
            .encode()
            .decode("latin-1")
            + "\n"
        )
    else:
        assert _UUID.sub("UUID", got) == _UUID.sub("UUID", want)


def instance_of(case: Case) -> str:
    """Return the name of the instance that a case is about."""
    return case.sender if case.sender in ("cpriv", "ciso") else "c1"


@pytest.fixture(scope="module", autouse=True)
def waits(service: Service) -> Iterator[dict[str, Future[Exchanged]]]:
    """Start every slow case before the first test; the tests at the end wait for the results."""
    with ThreadPoolExecutor(len(SLOW)) as pool, ExitStack() as stack:
        begun = {}
        for case in (case for case in CASES if case.name in SLOW):
            name = f"slow-{case.name}"
            # A container's agent runs one exchange at a time, so each slow case has a container of its own.
            container = stack.enter_context(service.container(name, location="peerhost", project="recorded"))
            prepare(case, service, name)
            begun[case.name] = pool.submit(container.exchange, *steps_of(case))
        yield begun


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in SLOW], ids=lambda case: case.name)
def test_recorded_exchange(
    case: Case, service: Service, containers: dict[str, Container], fingerprints: dict[str, str]
) -> None:
    """Each recorded exchange has the recorded result, except for the differences in the table."""
    case, name = case.renamed(fingerprints), instance_of(case)
    prepare(case, service, name)
    compare(case, service, name, sender(case, service, containers)(steps_of(case)))


@pytest.mark.parametrize(("name", "seconds"), SLOW.items())
def test_recorded_wait(service: Service, waits: dict[str, Future[Exchanged]], name: str, seconds: float) -> None:
    """A connection ends after 3 s without a head, 3 s without a body, or 30 s idle; after 20 s idle it still works."""
    (case,) = (case for case in CASES if case.name == name)
    result = waits[name].result()
    compare(case, service, f"slow-{name}", result)
    # The upper bound allows for a busy machine, but still tells the limits apart.
    assert seconds <= result.seconds + 0.1 < seconds + 15


def test_every_difference_is_needed() -> None:
    """Every rule in the table of differences applies to a recorded case."""
    from tests.wire.differences import RULES

    used = {next((rule.cases for rule in RULES if rule.fits(case)), None) for case in CASES}
    assert {rule.cases for rule in RULES} <= used
