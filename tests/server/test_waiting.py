"""Requests that wait for a change, from inside real containers: `?wait=` below `/1.0/guestapi/tree`."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from guestapi.store import steps
from guestapi.store.lookup import get_instance
from tests.harness.containers import Container, Response
from tests.harness.service import Service
from tests.harness.waiting import until
from tests.server.inside import asking, talk, talks
from tests.server.test_events import resident

pytestmark = pytest.mark.root

TREE = "/1.0/guestapi/tree"


def key(name: str, seconds: int = 60) -> str:
    """Return the path of a key with a wait."""
    return f"{TREE}/config/user.{name}?wait={seconds}"


def known(tag: str) -> str:
    """Return the header field of a client that has the representation with this ETag."""
    return f"If-None-Match: {tag}"


@pytest.fixture(scope="module")
def few() -> Iterator[Service]:
    """A service of one worker in which an instance may have three streams and waiting requests."""
    with Service(workers=1, toml="[limits]\nstreams_per_instance = 3\n", dialects=["incus"]) as running:
        yield running


def test_change_ends_the_wait(service: Service, c1: Container) -> None:
    """A client that waits for a key or the tree gets the new content, and an event id from which it can resume."""
    service.configure("c1", user_wait="old")
    with talks(c1, 2) as (one, other):
        tag, whole = one.ask(key("wait")).headers["etag"], other.ask(TREE).headers["etag"]
        one.send(asking(key("wait"), known(tag)))
        other.send(asking(f"{TREE}?wait=60", known(whole)))
        for guest in (one, other):
            guest.wait_read()
        service.configure("c1", user_wait="new")
        changed, tree = one.receive()[0], other.receive()[0]
    assert (changed.status, changed.text) == (200, "new")
    assert changed.headers["etag"] != tag
    assert json.loads(tree.text)["config"]["user.wait"] == "new"
    assert int(tree.headers["guestapi-event-id"]) >= int(changed.headers["guestapi-event-id"]) > 0
    service.configure("c1", user_wait="")


def test_key_that_is_not_set(service: Service, c1: Container) -> None:
    """A wait for a key that is not set ends when it is set; a client that has a value gets 404 when it is unset."""
    with talk(c1) as guest:
        guest.send(asking(key("later")))
        guest.wait_read()
        service.configure("c1", user_other="x")
        service.configure("c1", user_later="here")
        found = guest.receive()[0]
        assert (found.status, found.text) == (200, "here")
        guest.send(asking(key("later"), known(found.headers["etag"])))
        guest.wait_read()
        service.configure("c1", user_later="", user_other="")
        assert guest.receive()[0].status == 404


def test_end_of_the_time(c1: Container) -> None:
    """After its time, a wait ends with 304 and the ETag, or with 404; the connection stays open."""
    with talk(c1) as guest:
        tag = guest.ask(key("foo")).headers["etag"]
        over = guest.ask(key("foo", 1), known(tag))
        assert (over.status, over.body, over.headers["etag"]) == (304, b"", tag)
        assert guest.ask(key("absent", 1)).status == 404
        assert guest.ask(key("foo", 1), known('"other"')).text == "bar"
        assert guest.ask("/1.0/config/user.foo").text == "bar"


def test_readiness_ends_the_wait(service: Service, c1: Container) -> None:
    """A change of the readiness ends a wait for the tree."""
    with talks(c1, 2) as (guest, reporter):
        for state in ("Ready", "Started"):
            tag = guest.ask(TREE).headers["etag"]
            guest.send(asking(f"{TREE}?wait=60", known(tag)))
            guest.wait_read()
            body = json.dumps({"state": state}).encode()
            assert reporter.ask("/1.0", method="PATCH", body=body).status == 200
            assert json.loads(guest.receive()[0].text)["state"] == state


@pytest.mark.parametrize("wait", ["0", "-1", "61", "1e9", "", "5&wait=5"])
def test_bad_wait(c1: Container, wait: str) -> None:
    """Any other time is refused, and the text states what is accepted."""
    for path in (TREE, f"{TREE}/config/user.foo"):
        answer = c1.ask(f"{path}?wait={wait}")
        assert answer.status == 400
        assert answer.text.startswith("wait is ")


def test_bad_tags(c1: Container) -> None:
    """A tag without quotes is refused, a list is accepted, and one above the limit of a header field gets 431."""
    with talk(c1) as guest:
        tag = guest.ask(TREE).headers["etag"]
        assert guest.ask(TREE, known(tag.strip('"'))).status == 400
        assert guest.ask(TREE, known(f'"a", W/{tag}')).status == 304
        assert guest.ask(TREE, known('"a"'), known(tag)).status == 304
        guest.send(asking(TREE, known(",".join(['"0123456789"'] * 1400))))
        assert guest.last().status == 431
    assert c1.ask(f"{TREE}?wait=5", "GET", b"a body").status == 400


def test_too_many(few: Service) -> None:
    """Waiting requests and event streams of an instance share a limit; beyond it they get 429 with Retry-After."""
    with few.container("c1") as one, few.container("c2") as two, talks(one, 4) as guests, talk(two) as neighbour:
        for guest in guests[:2]:
            guest.send(asking(key("x")))
            guest.wait_read()
        guests[2].send(asking("/1.0/events"))
        assert guests[2].socket.recv(4096).startswith(b"HTTP/1.1 200")
        refused = guests[3].ask(key("x"))
        assert (refused.status, refused.headers["retry-after"]) == (429, "10")
        assert refused.text == "too many waiting requests and event streams of this instance\n"
        events = guests[3].ask("/1.0/events")
        assert (events.status, events.text) == (429, "too many event streams of this instance\n")
        # A request that need not wait is not counted.
        assert guests[3].ask(TREE).status == 200
        assert guests[3].ask(key("x", 1), method="HEAD").status == 429
        neighbour.send(asking(key("x")))
        neighbour.wait_read()
        few.configure("c2", user_x="1")
        assert neighbour.receive()[0].text == "1"
        # A client that disconnects frees its place.
        guests[0].socket.shutdown(socket.SHUT_RDWR)
        until(lambda: guests[3].ask(key("x", 1)).status == 404, "a place")


@pytest.mark.parametrize("together", [False, True])
def test_next_request_ends_the_wait(c1: Container, together: bool) -> None:
    """The next request on the same connection ends a wait, also one that comes together with the request that waits."""
    with talk(c1) as guest:
        began = time.monotonic()
        asked = asking(key("never"))
        if not together:
            guest.send(asked)
            guest.wait_read()
            asked = b""
        guest.send(asked + asking("/1.0/config/user.foo"))
        first, second = guest.receive(2)
        assert (first.status, second.text) == (404, "bar")
        assert time.monotonic() - began < 60


@pytest.mark.parametrize("how", ["switch", "stop", "remove"])
def test_end_of_an_instance_ends_its_waits(service: Service, how: str) -> None:
    """A wait ends with the gate's response at once when the instance is switched off, stops or is removed."""
    name = f"waits-{how}"
    with Container(service.binds, hostname=name) as container:
        service.add(name, container)
        with talk(container) as guest:
            guest.send(asking(key("x")))
            guest.wait_read()
            with service.writer.change() as change:
                instance = get_instance(change, "default", name)
                if how == "switch":
                    steps.configure(change, instance, {"security.guestapi": "false"})
                elif how == "remove":
                    steps.remove(change, instance)
                else:
                    steps.stop(change, instance)
            assert guest.receive()[0].status == (403 if how == "switch" else 500)
        if how != "remove":
            service.remove(name)


def test_reload_answers_waits() -> None:
    """A reload answers each wait as after its time, and closes; a client that repeats it gets every state."""
    with Service(gunicorn="graceful_timeout = 30\n", dialects=["incus"]) as own, own.container("c1") as container:
        own.configure("c1", user_n="0")
        with talks(container, 20) as guests:
            tag = guests[0].ask(key("n")).headers["etag"]
            for number, guest in enumerate(guests):
                guest.send(asking(key("n"), known(tag)) if number % 2 else asking(key("absent")))
                guest.wait_read()
            os.kill(own.pid, signal.SIGHUP)
            for number, guest in enumerate(guests):
                answer = guest.last()
                assert (answer.status, answer.headers["connection"]) == (304 if number % 2 else 404, "close")
        seen: list[str] = []
        stopped = threading.Event()

        def loop() -> None:
            tag = '""'
            while not stopped.is_set():
                with talk(container) as guest:
                    guest.send(asking(key("n"), known(tag)))
                    answer = guest.receive()[0]
                    if answer.status == 200:
                        tag = answer.headers["etag"]
                        seen.append(answer.text)

        with ThreadPoolExecutor(1) as pool:
            client = pool.submit(loop)
            for number in range(1, 5):
                until(lambda: seen and seen[-1] == str(number - 1), "the state before")  # noqa: B023 - asked at once
                if number % 2:
                    os.kill(own.pid, signal.SIGHUP)
                own.configure("c1", user_n=str(number))
            until(lambda: seen[-1] == "4", "the last state")
            stopped.set()
            own.configure("c1", user_n="end")
            client.result(30)
        assert [int(one) for one in seen if one != "end"] == [0, 1, 2, 3, 4]


def test_killed_worker_loses_no_state(service: Service) -> None:
    """A client whose worker was killed repeats its request with the ETag, and gets the current content."""
    with Service(dialects=["incus"]) as own, own.container("c1") as container:
        own.configure("c1", user_n="0")
        with talk(container) as guest:
            tag = guest.ask(key("n")).headers["etag"]
            guest.send(asking(key("n"), known(tag)))
            guest.wait_read()
            for worker in own.workers:
                os.kill(worker, signal.SIGKILL)
            assert guest.end() == b""
        own.configure("c1", user_n="1")
        assert _ask(container, known(tag)).text == "1"
        again = _ask(container, known('"x"')).headers["etag"]
        own.configure("c1", user_n="0")
        assert (_ask(container, known(again)).text, _ask(container, known('"x"')).headers["etag"]) == ("0", tag)


def _ask(container: Container, line: str) -> Response:
    with talk(container) as guest:
        return guest.ask(key("n"), line)


def test_waiting_requests_are_small() -> None:
    """A waiting request takes less than 16 kB of a worker's memory, measured with 500 of them."""
    toml = "[limits]\nstreams_per_instance = 600\nconnections_per_instance = 600\n"
    with Service(workers=1, toml=toml, dialects=["incus"]) as own, own.container("c1") as container:
        (worker,) = own.workers
        assert container.ask("/").status == 200
        before = resident(worker)
        with talks(container, 500) as guests:
            for guest in guests:
                guest.send(asking(key("x")))
            for guest in guests:
                guest.wait_read()
            each = (resident(worker) - before) / 500
            own.configure("c1", user_x="here")
            assert {guest.receive()[0].text for guest in guests} == {"here"}
        assert each < 16, f"{each:.1f} kB"
