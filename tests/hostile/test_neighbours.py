"""Attacks by several containers, and with another container's connection: no instance is served as another."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack

import pytest

from tests.harness.containers import Container, Response, parse
from tests.hostile.arena import Arena, inside
from tests.hostile.test_attacks import assert_harmless
from tests.server.inside import Talk, asking, talk

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("hostile")]

#: Sends a request over a socket that it inherited.
_ASK = """
import socket, sys
with socket.socket(fileno=int(sys.argv[1])) as connection:
    connection.settimeout(300)
    connection.sendall(sys.stdin.buffer.read())
    sys.stdout.buffer.write(connection.recv(65536))
"""


def ask_over(guest: Talk, container: Container, path: str) -> Response:
    """Send a request over another container's connection, from inside this one."""
    enter = ["nsenter", "-t", str(container.pid), "-a", "--setuid", "0", "--setgid", "0"]
    number = guest.socket.fileno()
    ran = subprocess.run(
        [*enter, "/usr/bin/python3", "-I", "-S", "-c", _ASK, str(number)],
        pass_fds=[number],
        input=asking(path),
        capture_output=True,
        check=True,
    )
    (response,) = parse(ran.stdout)
    return response


@pytest.mark.parametrize("name", ["silence", "busy", "queue"])
def test_attack_from_unregistered_container(arena: Arena, mallory: Container, stranger: Container, name: str) -> None:
    """An attack by an unregistered container gets only "unknown" answers, and does not disturb the instances."""
    report = arena.attack(name, stranger)
    report.name = f"{name}, unknown"
    assert_harmless(arena, report)
    assert stranger.ask("/1.0/config/user.foo").status == 500
    assert mallory.ask("/1.0/config/user.foo").text == "bar"


def test_many_attack(arena: Arena) -> None:
    """While four instances run four attacks at the same time, a fifth gets correct answers."""
    names = ["busy", "silence", "heads", "churn"]
    with ExitStack() as stack:
        attackers = [stack.enter_context(arena.service.container(f"many{name}", {"user.foo": "bar"})) for name in names]
        running = [
            stack.enter_context(inside(container, "attacks.py", name, "2"))
            for name, container in zip(names[1:], attackers[1:], strict=True)
        ]
        report = arena.attack(names[0], attackers[0])
        report.name = "four at a time"
        for program in running:
            program.ended()
        assert_harmless(arena, report)


def test_passed_connection_acts_for_its_connector(arena: Arena, mallory: Container) -> None:
    """A socket that was passed to another container acts for the instance that connected it, and for no other."""
    with arena.service.container("giver", {"user.foo": "the giver's"}) as giver:
        with talk(giver) as given, talk(mallory) as own:
            assert given.ask("/1.0/config/user.foo").text == "the giver's"
            assert ask_over(given, mallory, "/1.0/config/user.foo").text == "the giver's"
            assert ask_over(own, giver, "/1.0/config/user.foo").text == "bar"
            assert json.loads(ask_over(given, mallory, "/1.0/config").body) == ["/1.0/config/user.foo"]
        with talk(giver) as given:
            giver.kill()
            refused = ask_over(given, mallory, "/1.0/config/user.foo")
            assert (refused.status, refused.text) == (500, "pid not in container?\n")
