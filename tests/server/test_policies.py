"""Key policies from inside real containers: users, streams that are open, and a value that is given once."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from operator import lt

import pytest

from tests.harness.containers import Container
from tests.harness.service import USER, Service
from tests.harness.waiting import until
from tests.server.inside import asking, talk, talks
from tests.store.processes import log_entries

pytestmark = pytest.mark.root

TREE = "/1.0/guestapi/tree"
PATHS = ("/1.0/config/user.token", f"{TREE}/config/user.token")
TOKEN = "c0ffee-and-more"


@pytest.fixture(scope="module")
def own() -> Iterator[Service]:
    """A service of two workers for policies, which hands over what it counts."""
    service = Service(dialects=["incus"])
    directory = service.root / "metrics"
    directory.mkdir()
    os.chown(directory, USER, USER)
    service.write_config(f'[limits]\nconnections_per_instance = 512\n[metrics]\ndirectory = "{directory}"\n')
    with service:
        yield service


def statuses(container: Container, *become: str) -> list[int]:
    """Ask for the token by both paths as another user."""
    return [container.ask(path, become=become).status for path in PATHS]


@pytest.mark.parametrize("base", [100_000, None])
def test_users_inside(own: Service, base: int | None) -> None:
    """The user that a policy names reads the key, in an unprivileged container and in a privileged one; others do not.

    Root of a user namespace that such a user makes is that user; root of one that another user makes is that one.
    """
    with own.container("users", {"user.token": TOKEN}, base=base) as container:
        assert statuses(container, "uid:1000") == [401, 401]
        own.command("policy", "add", "user.tok*", "--instance", "users", "--uid", "1000")
        assert statuses(container) == [200, 200]
        assert statuses(container, "uid:1000") == [200, 200]
        assert statuses(container, "uid:1000", "userns") == [200, 200]
        assert statuses(container, "uid:1001") == [401, 401]
        assert statuses(container, "uid:1001", "userns") == [401, 401]
        assert container.ask(TREE, become=["uid:1000"]).status == 401
        assert container.ask("/1.0/config", become=["uid:1000"]).status == 401
        own.command("policy", "remove", "user.tok*", "--instance", "users")
        assert statuses(container, "uid:1000") == [401, 401]


def test_init_in_another_user_namespace(own: Service) -> None:
    """An init that has entered a user namespace of its own lends its map to nobody."""
    with own.container("hostile", {"user.token": TOKEN}) as container:
        own.command("policy", "add", "user.token", "--instance", "hostile", "--uid", "0", "--uid", "5")
        container.change_init("uid:1000", "userns")
        assert statuses(container, "uid:1000") == [401, 401]
        assert statuses(container, "uid:1000", "userns") == [401, 401]
        assert statuses(container, "uid:5") == [200, 200]


def test_open_streams_obey(own: Service) -> None:
    """From when the command has returned, a stream that is open, one that resumes and the tree obey the policy."""
    with own.container("streams", {"user.token": "0"}) as container, talks(container, 3) as guests:
        live, resumed, reader = guests
        live.send(asking("/1.0/events?since=0"))
        assert live.socket.recv(4096)
        own.configure("streams", user_token="seen")
        data = b""
        while b"seen" not in data:
            data += live.socket.recv(65536)
        own.command("policy", "add", "user.token", "--instance", "streams", "--hidden")
        own.configure("streams", user_token=TOKEN, user_after="after")
        resumed.send(asking("/1.0/events?since=0"))
        for guest in (live, resumed):
            data = b""
            while b"user.after" not in data:
                data += guest.socket.recv(65536)
            assert b"user.token" not in data
            assert b"seen" not in data
        assert reader.ask(PATHS[0]).status == reader.ask(PATHS[1]).status == 404
        assert "token" not in reader.ask(TREE).text + reader.ask("/1.0/config").text
        own.command("policy", "add", "user.token", "--instance", "streams", "--secret")
        own.configure("streams", user_token=f"{TOKEN}-2", user_after="again")
        data = b""
        while b"again" not in data:
            data += live.socket.recv(65536)
        assert b'"key":"user.token","old_value":"","value":""' in data
        assert TOKEN.encode() not in data
        assert reader.ask(PATHS[0]).text == f"{TOKEN}-2"


def test_events_that_wait_obey(own: Service) -> None:
    """What waits in a worker for a client that reads nothing obeys a policy that comes meanwhile."""
    big = "x" * 4096
    with own.container("stuck") as container, talk(container) as guest:
        guest.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        guest.send(asking("/1.0/events"))
        assert guest.socket.recv(4096)
        for number in range(200):
            own.configure("stuck", user_token=f"{number:05}{big}")
        own.command("policy", "add", "user.token", "--instance", "stuck", "--secret")
        own.configure("stuck", user_end="end")
        data = b""
        while b"user.end" not in data:
            data += guest.socket.recv(1 << 20)
        events = [json.loads(line)["metadata"] for line in data.splitlines() if b"user.token" in line]
        blank = [event["value"] == event["old_value"] == "" for event in events]
        assert any(blank)
        assert blank == sorted(blank), "from some event on, all of them"


def test_secret_is_shown_to_nobody(own: Service) -> None:
    """A secret value is in no command of the operator's but those that are asked to reveal it.

    Nor is it in a log, in what is counted, or in what the change log has of it.
    """
    with own.container("shown", {"user.token": TOKEN}) as container:
        own.command("policy", "add", "user.*", "--instance", "shown", "--secret")
        own.configure("shown", user_token=f"{TOKEN}-2", user_other=f"{TOKEN}-3")
        assert container.ask(PATHS[0]).text == f"{TOKEN}-2"
        shown = [
            ("config", "show", "shown"),
            ("config", "show", "shown", "--format", "json"),
            ("config", "show", "shown", "--origin"),
            ("instance", "info", "shown"),
            ("instance", "info", "shown", "--format", "json"),
            ("instance", "list", "--format", "json"),
            ("policy", "list"),
            ("top", "--once"),
        ]
        for words in shown:
            assert TOKEN not in own.command(*words).stdout, words
        reports = sorted((own.root / "metrics").glob("worker-*"))
        before = [report.stat().st_mtime_ns for report in reports]
        assert reports
        until(lambda: all(map(lt, before, (report.stat().st_mtime_ns for report in reports))), "reports of all workers")
        assert TOKEN not in "".join(path.read_text() for path in (own.root / "metrics").iterdir())
        assert TOKEN not in str(log_entries(own.settings))
        assert f"{TOKEN}-2" in own.command("config", "show", "shown", "--reveal").stdout
        assert f"{TOKEN}-2" in own.command("instance", "info", "shown", "--reveal").stdout
        assert TOKEN not in own.log.read_text()


def test_once_for_200_clients(own: Service) -> None:
    """Of 200 clients that ask at once by either path, and 20 that wait, one gets the value."""
    with own.container("once") as container, talks(container, 220) as guests:
        own.command("policy", "add", "user.token", "--instance", "once", "--once")
        for guest in guests[200:]:
            guest.send(asking(f"{PATHS[1]}?wait=60"))
            guest.wait_read()
        own.configure("once", user_token=TOKEN)
        for number, guest in enumerate(guests[:200]):
            guest.send(asking(PATHS[number % 2]))
        got = [guest.receive()[0] for guest in guests[:200]]
        assert {answer.status for answer in got} <= {200, 404}
        given = [answer for answer in got if answer.status == 200]
        own.command("policy", "remove", "user.token", "--instance", "once")
        own.configure("once", user_token="after")
        given += [answer for guest in guests[200:] if (answer := guest.receive()[0]).text == TOKEN]
        assert [(answer.text, answer.headers["cache-control"]) for answer in given] == [(TOKEN, "no-store")]
        (spend,) = json.loads(own.command("policy", "spent", "--format", "json").stdout)
        assert (spend["instance"], spend["key"], spend["uid"]) == ("once", "user.token", 100_000)
        assert f"the value of user.token was given once, to pid {spend['pid']} of user 100000" in own.log.read_text()
        assert TOKEN not in own.log.read_text()
