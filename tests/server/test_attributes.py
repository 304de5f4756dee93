"""Attributes from inside real containers, with a service of two workers."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from guestapi.store.attributes import MOST_ATTRIBUTES, MOST_BYTES, VALUE_BYTES
from tests.harness.containers import Container
from tests.harness.service import COMMAND, Service
from tests.server.inside import Talk, asking, talk, talks

pytestmark = pytest.mark.root

ATTRIBUTES = "/1.0/guestapi/attributes"
#: How many write at the same time.
WRITERS = 64


@pytest.fixture(scope="module")
def own() -> Iterator[Service]:
    """A service of two workers that nearly does not limit how often an instance writes."""
    limits = "[limits]\nconnections_per_instance = 512\nwrites_per_second = 100000\nwrites_burst = 100000\n"
    with Service(dialects=["incus"], toml=limits) as running:
        yield running


@pytest.fixture
def web(own: Service) -> Iterator[Container]:
    """A container that may have attributes."""
    with own.container("web") as container:
        own.command("policy", "allow", "attributes", "--instance", "web")
        yield container


def listed(container: Container) -> list[str]:
    """The paths of the container's attributes."""
    paths: list[str] = json.loads(container.ask(ATTRIBUTES).body)
    return [path.removeprefix(f"{ATTRIBUTES}/") for path in paths]


def test_only_root_and_only_allowed(own: Service) -> None:
    """Allowed at once when the command has returned, and at once no more; root alone, whatever a policy names."""
    with own.container("web") as web:
        assert web.ask(f"{ATTRIBUTES}/a/b", "PUT", b"x").status == 403
        assert "attributes" not in web.ask("/1.0/guestapi").text
        own.command("policy", "allow", "attributes", "--instance", "web")
        own.command("policy", "add", "*", "--instance", "web", "--uid", "1000")
        assert "attributes" in web.ask("/1.0/guestapi").text
        assert web.ask(f"{ATTRIBUTES}/a/b", "PUT", b"x").status == 201
        for method in ("GET", "PUT", "DELETE"):
            assert web.ask(f"{ATTRIBUTES}/a/b", method, become=["uid:1000"]).status == 401
        own.command("policy", "disallow", "attributes", "--instance", "web")
        assert [web.ask(f"{ATTRIBUTES}/a/b", method).status for method in ("GET", "PUT", "DELETE")] == [403] * 3
        own.command("policy", "allow", "attributes")
        assert web.ask(f"{ATTRIBUTES}/a/b").text == "x"
        own.command("policy", "disallow", "attributes")


def write_all(guests: list[Talk], paths: list[list[str]], value: bytes) -> Counter[int]:
    """Have each guest write its paths, all at the same time; how often each status was answered."""

    def write(guest: Talk, own: list[str]) -> list[int]:
        return [guest.ask(f"{ATTRIBUTES}/{path}", method="PUT", body=value).status for path in own]

    with ThreadPoolExecutor(len(guests)) as pool:
        return Counter(status for found in pool.map(write, guests, paths) for status in found)


def test_quotas_are_exact(web: Container) -> None:
    """64 that write at the same time, by two workers, get what one would get: no attribute and no byte more or less."""
    with talks(web, WRITERS) as guests:
        paths = [[f"n{number}/{part}" for part in range(4)] for number in range(WRITERS)]
        assert write_all(guests, paths, b"x") == {201: MOST_ATTRIBUTES, 507: 4 * WRITERS - MOST_ATTRIBUTES}
        assert len(listed(web)) == MOST_ATTRIBUTES
        for path in listed(web):
            assert web.ask(f"{ATTRIBUTES}/{path}", "DELETE").status == 204
        most = MOST_BYTES // VALUE_BYTES
        one_each = [[f"b/{number}"] for number in range(WRITERS)]
        assert write_all(guests, one_each, b"x" * VALUE_BYTES) == {201: most, 507: WRITERS - most}
        assert len(listed(web)) == most


def test_conditions_are_exact(web: Container) -> None:
    """Of 64 that make the same attribute at the same time, one succeeds; counted up by If-Match, none is lost."""
    with talks(web, WRITERS) as guests, ThreadPoolExecutor(WRITERS) as pool:

        def create(guest: Talk) -> int:
            return guest.ask(f"{ATTRIBUTES}/lock/it", "If-None-Match: *", method="PUT", body=b"0").status

        assert Counter(pool.map(create, guests)) == {201: 1, 412: WRITERS - 1}

        def count(guest: Talk) -> None:
            status = 412
            while status == 412:
                read = guest.ask(f"{ATTRIBUTES}/lock/it")
                new = str(int(read.body) + 1).encode()
                condition = f"If-Match: {read.headers['etag']}"
                status = guest.ask(f"{ATTRIBUTES}/lock/it", condition, method="PUT", body=new).status
            assert status == 204

        few = guests[:16]
        list(pool.map(count, few))
    assert web.ask(f"{ATTRIBUTES}/lock/it").text == str(len(few))


def test_events(own: Service, web: Container) -> None:
    """A client hears of its own attributes, only if it names their type, and not without permission."""
    with own.container("db") as db, ExitStack() as stack:
        own.command("policy", "allow", "attributes", "--instance", "db")
        plain, named, other = (stack.enter_context(talk(one)) for one in (web, web, db))
        plain.send(asking("/1.0/events"))
        for guest in (named, other):
            guest.send(asking("/1.0/events?type=attribute,config"))
        for guest in (plain, named, other):
            assert guest.socket.recv(4096)
        assert web.ask(f"{ATTRIBUTES}/a/b", "PUT", b"value").status == 201
        assert web.ask(f"{ATTRIBUTES}/a/b", "DELETE").status == 204
        for name in ("web", "db"):
            own.configure(name, user_end="end")
        heard = {}
        for name, guest in (("plain", plain), ("named", named), ("other", other)):
            data = b""
            while b"user.end" not in data:
                data += guest.socket.recv(65536)
            assert b'"value"' in data
            events = [json.loads(line) for line in data.splitlines() if line.startswith(b"{")]
            heard[name] = [one["metadata"] for one in events if one["type"] == "attribute"]
        assert heard == {
            "plain": [],
            "named": [{"action": "set", "path": "a/b"}, {"action": "removed", "path": "a/b"}],
            "other": [],
        }
        own.command("policy", "disallow", "attributes", "--instance", "web")
        with talk(web) as resumed:
            resumed.send(asking("/1.0/events?since=0&type=attribute,config"))
            data = b""
            while b"user.end" not in data:
                data += resumed.socket.recv(65536)
        assert b'"path"' not in data


@pytest.mark.parametrize("killed", [False, True], ids=["stopped", "killed"])
def test_kept_over_restarts(web: Container, own: Service, killed: bool) -> None:
    """What was answered is there after the service was stopped, or killed with its workers, and started again."""
    value = bytes(range(256)) * 64
    assert web.ask(f"{ATTRIBUTES}/a/b", "PUT", value).status == 201
    if killed:
        own.kill()
    else:
        own.stop()
    own.start()
    read = web.ask(f"{ATTRIBUTES}/a/b")
    assert (read.status, read.body) == (200, value)
    command = [str(COMMAND), "--config", str(own.config), "attributes", "get", "web", "a/b"]
    assert subprocess.check_output(command) == value


def test_large_and_cut(web: Container) -> None:
    """A body over 16 KiB is 413, also in chunks and when announced; one that is cut short writes nothing."""
    with talk(web) as guest:
        path = f"{ATTRIBUTES}/a/b"
        assert guest.ask(path, method="PUT", body=b"x" * (VALUE_BYTES + 1)).status == 413
        expecting = guest.ask(path, "Expect: 100-continue", f"Content-Length: {VALUE_BYTES + 1}", method="PUT")
        assert expecting.status == 413
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    with talk(web) as guest:
        head = asking(path, "Transfer-Encoding: chunked", method="PUT")
        guest.send(head + chunk + b"1\r\nx\r\n0\r\n\r\n")
        assert guest.receive()[0].status == 413
        guest.send(head + chunk + b"0\r\n\r\n")
        assert guest.receive()[0].status == 201
    with talk(web) as guest:
        guest.send(asking(f"{ATTRIBUTES}/a/c", "Content-Length: 5", method="PUT") + b"abc")
        guest.socket.shutdown(1)
        guest.end()
    assert listed(web) == ["a/b"]


def test_rate() -> None:
    """Over the rate of writes, an instance gets 429 with Retry-After; another one is not concerned."""
    with (
        Service(workers=1, dialects=["incus"], toml="[limits]\nwrites_burst = 3\nwrites_per_second = 0.01\n") as own,
        own.container("web") as web,
        own.container("db") as db,
    ):
        own.command("policy", "allow", "attributes")
        answers = [web.ask(f"{ATTRIBUTES}/a/{number}", "PUT", b"x") for number in range(4)]
        assert [one.status for one in answers] == [201, 201, 201, 429]
        assert answers[-1].headers["retry-after"] == "100"
        assert db.ask(f"{ATTRIBUTES}/a/b", "PUT", b"x").status == 201
        assert len(listed(web)) == 3
