"""``guestapi identity`` and its line of ``guestapi check``."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestapi.identity import keys
from guestapi.identity.keys import FILE
from guestapi.identity.messages import MESSAGE_BYTES
from guestapi.identity.signer import TokenMaker
from guestapi.settings import IdentitySettings
from tests.cli.command import Guestapi
from tests.cli.test_audit import Journal
from tests.cli.test_audit import journal as journal

TOML = """
[identity]
trust_domain = "example.org"
audiences = ["https://vault.example.org"]
keys = "{keys}"
socket = "{socket}"
"""


@pytest.fixture
def directory(guestapi: Guestapi, tmp_path: Path) -> Path:
    """The directory of the keys, of a host that has signed identity."""
    made = tmp_path / "keys"
    made.mkdir(mode=0o700)
    with guestapi.config.open("a") as file:
        file.write(TOML.format(keys=made, socket=tmp_path / "sock"))
    return made


@contextmanager
def signing(settings: IdentitySettings) -> Iterator[None]:
    """A signer that answers one request."""
    maker = TokenMaker(settings)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(settings.socket)
        listener.listen()

        def run() -> None:
            connection, _address = listener.accept()
            with connection:
                connection.send(maker.answer(connection.recv(MESSAGE_BYTES)))

        thread = threading.Thread(target=run)
        thread.start()
        yield
        thread.join(30)


def error_of(guestapi: Guestapi, *words: str) -> str:
    """What a command that fails says."""
    done = guestapi(*words)
    assert done.code != 0
    return done.err


def found(guestapi: Guestapi) -> tuple[bool, str]:
    """What ``guestapi check`` says of identity."""
    done = guestapi("check", "--format", "json")
    (line,) = (one for one in json.loads(done.out) if one["check"] == "identity")
    return line["ok"], line["text"]


def test_rotation_is_recorded(guestapi: Guestapi, directory: Path, journal: Journal) -> None:
    """The journal has who made a key, and neither the key nor its name."""
    guestapi.good("identity", "keys", "rotate")
    (entry,) = journal.read()
    assert entry["AUDIT_ACTION"] == ["identity.rotate"]
    assert entry["AUDIT_COMMAND"] == ["guestapi identity keys rotate"]
    assert keys.require(directory).keys[0].d not in str(entry)


def test_rotate_and_jwks(guestapi: Guestapi, directory: Path) -> None:
    """The first key signs from now on, the next one later; both are printed, without anything secret."""
    assert "there is no key yet" in error_of(guestapi, "identity", "keys", "jwks")
    first = guestapi.good("identity", "keys", "rotate")
    assert first.endswith("signs from now on\n")
    second = guestapi.good("identity", "keys", "rotate", "--in", "2h")
    begins = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + 7200))
    assert f"signs from {begins}" in second
    assert "the last rotation goes on until" in error_of(guestapi, "identity", "keys", "rotate")
    document = json.loads(guestapi.good("identity", "keys", "jwks"))
    assert [one["kid"] for one in document["keys"]] == [first.split()[1], second.split()[1]]
    private = [one.d for one in keys.require(directory).keys]
    assert not [one for one in private if one in json.dumps(document)]
    bundle = json.loads(guestapi.good("identity", "keys", "jwks", "--spiffe"))
    assert {one["use"] for one in bundle["keys"]} == {"jwt-svid"}
    third = guestapi.good("identity", "keys", "rotate", "--compromised")
    document = json.loads(guestapi.good("identity", "keys", "jwks"))
    assert [one["kid"] for one in document["keys"]] == [third.split()[1]]


@pytest.mark.parametrize("word", ["0", "-1", "31d", "soon", "1h30m", ""])
def test_times(guestapi: Guestapi, directory: Path, word: str) -> None:
    """What is no time up to 30 days is a mistake, and makes no key."""
    assert "is not a time like 60s, 5m or 2h, up to 30d" in error_of(
        guestapi, "identity", "keys", "rotate", "--in", word
    )
    assert keys.read(directory) is None


def test_signer_needs_systemd(guestapi: Guestapi, directory: Path) -> None:
    """The signer binds no socket of its own: its unit says whose it is."""
    error = error_of(guestapi, "identity", "signer")
    assert "the signer needs one socket from systemd" in error
    assert "guestapi-signer.socket" in error


def test_off(guestapi: Guestapi) -> None:
    """A host without signed identity has no line for it, and its signer does not start."""
    assert "identity" not in [one["check"] for one in json.loads(guestapi("check", "--format", "json").out)]
    assert "identity.trust_domain is not set" in error_of(guestapi, "identity", "signer")


def test_check(guestapi: Guestapi, directory: Path) -> None:
    """``guestapi check`` says what is missing, one thing after the other, and at last which key signs."""
    settings = IdentitySettings(
        trust_domain="example.org", audiences=("a",), keys=str(directory), socket=str(directory.parent / "sock")
    )
    ok, text = found(guestapi)
    assert (ok, "'guestapi identity keys rotate' makes one" in text) == (False, True)
    guestapi.good("identity", "keys", "rotate")
    ok, text = found(guestapi)
    assert (ok, "'systemctl enable --now guestapi-signer.socket' starts it" in text) == (False, True)
    (directory / FILE).chmod(0o644)
    ok, text = found(guestapi)
    assert (ok, "mode 0644 lets others in" in text, "--compromised" in text) == (False, True, True)
    (directory / FILE).chmod(0o600)
    with signing(settings):
        ok, text = found(guestapi)
    signing_key = keys.require(directory).keys[0].kid
    assert (ok, f"example.org, key {signing_key} signs since" in text) == (True, True)
    # A signer that looks elsewhere.
    Path(settings.socket).unlink()
    with signing(IdentitySettings(trust_domain="x", keys=str(directory / "absent"), socket=settings.socket)):
        ok, text = found(guestapi)
    assert (ok, "the signer cannot use the keys" in text) == (False, True)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('trust_domain = "Example.org"', "identity.trust_domain: 'Example.org' is not"),
        ('trust_domain = "a/b"', "identity.trust_domain: 'a/b' is not"),
        ('trust_domain = ""', "identity.trust_domain: '' is not"),
        ('audiences = [""]', "identity.audiences: '' is not"),
        ('audiences = ["a\\u0000"]', "identity.audiences: 'a\\x00' is not"),
        (f'audiences = ["{"ä" * 129}"]', "is not 1 to 256 bytes"),
        (f'issuer = "{"a" * 257}"', "identity.issuer: "),
        ('keys = "keys"', "identity.keys: 'keys' is not an absolute path"),
        ('socket = "sock"', "identity.socket: 'sock' is not an absolute path"),
        ('audience = ["a"]', "identity.audience: unknown key"),
    ],
)
def test_settings(guestapi: Guestapi, line: str, text: str) -> None:
    """What no token could say is refused when the settings are read."""
    with guestapi.config.open("a") as file:
        file.write(f"[identity]\n{line}\n")
    assert text in error_of(guestapi, "instance", "list")
