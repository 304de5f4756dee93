"""The file of the keys: who may read it, what a rotation makes of it, and what everybody is told of it."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from joserfc.jwk import ECKey

from guestapi.errors import OperatorError
from guestapi.identity import keys
from guestapi.identity.keys import FILE, LIFETIME, RETAINED, KeyRing, KeysError

NOW = 1_800_000_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty directory as systemd-tmpfiles makes it."""
    made = tmp_path / "keys"
    made.mkdir(mode=0o700)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""

    def set_clock(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: seconds)

    set_clock(NOW)
    return set_clock


def names(ring: KeyRing, now: float) -> list[str]:
    """The names of the published keys."""
    return [one["kid"] for one in ring.jwks(now)["keys"]]


def test_rotation(directory: Path, clock: Callable[[float], None]) -> None:
    """The new key is published before it signs; the old one is until its last token is void by any sensible clock."""
    first = keys.rotate(directory, 3600).keys[0].kid
    assert keys.require(directory).signing(NOW).kid == first
    clock(NOW + 100)
    ring = keys.rotate(directory, 3600)
    second, begins = ring.keys[-1].kid, NOW + 3700
    for now, signing, published in (
        (NOW + 100, first, [first, second]),
        (begins - 1, first, [first, second]),
        (begins, second, [first, second]),
        (begins + LIFETIME, second, [first, second]),
        (begins + RETAINED - 1, second, [first, second]),
        (begins + RETAINED, second, [second]),
        # A clock that was set back.
        (NOW - 1000, first, [first, second]),
    ):
        assert (ring.signing(now).kid, names(ring, now)) == (signing, published), now
    assert RETAINED > LIFETIME
    clock(begins + RETAINED - 1)
    with pytest.raises(OperatorError, match="the last rotation goes on until"):
        keys.rotate(directory, 3600)
    assert keys.require(directory) == ring
    clock(begins + RETAINED)
    third = keys.rotate(directory, 3600)
    assert [one.kid for one in third.keys] == [second, third.keys[-1].kid]
    assert third.signing(begins + RETAINED).kid == second


def test_compromised(directory: Path, clock: Callable[[float], None]) -> None:
    """A key that somebody else may know is gone at once, also during a rotation, and from the disk."""
    keys.rotate(directory, 1)
    before = keys.rotate(directory, 3600)
    ring = keys.rotate(directory, 3600, compromised=True)
    assert len(ring.keys) == 1
    assert names(ring, NOW) == [ring.signing(NOW).kid]
    text = (directory / FILE).read_text()
    assert [one.d in text for one in (*before.keys, *ring.keys)] == [False, False, True]
    assert os.listdir(directory) == [FILE]


def test_published(directory: Path) -> None:
    """What everybody is told has no private part, and a second library takes it; the name is RFC 7638's thumbprint."""
    ring = keys.rotate(directory, 1)
    for spiffe, use in ((False, "sig"), (True, "jwt-svid")):
        document = ring.jwks(time.time(), spiffe=spiffe)
        (found,) = document["keys"]
        assert found.keys() == {"kty", "crv", "x", "y", "kid", "use", "alg"}
        assert (found["use"], found["alg"], found["crv"]) == (use, "ES256", "P-256")
        assert ring.keys[0].d not in json.dumps(document)
        # RFC 7517 leaves other words for ``use`` to whoever agrees on them, as SPIFFE does; joserfc has none of those.
        assert ECKey.import_key(found | {"use": "sig"}).thumbprint() == found["kid"] == ring.keys[0].kid
        assert ("spiffe_refresh_hint" in document) == spiffe
    # Neither a log nor a traceback has it.
    assert ring.keys[0].d not in repr(ring)
    assert ring.keys[0].d not in repr(ring.keys[0])


def test_file(directory: Path) -> None:
    """The file is its owner's alone, whatever the umask."""
    before = os.umask(0)
    try:
        keys.rotate(directory, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o602])
def test_others_may_not_read(directory: Path, mode: int) -> None:
    """A file or directory that lets others in is not used, and the error says how to mend it."""
    keys.rotate(directory, 1)
    (directory / FILE).chmod(mode)
    with pytest.raises(KeysError, match=rf"{FILE}: mode {mode:04o} lets others in"):
        keys.read(directory)
    (directory / FILE).chmod(0o600)
    directory.chmod(0o750)
    with pytest.raises(KeysError, match="mode 0750 lets others in"):
        keys.read(directory)


@pytest.mark.root
def test_owner(directory: Path) -> None:
    """A rotation by root leaves the file to the owner of the directory; a file of somebody else is not used."""
    os.chown(directory, 64_043, 64_044)
    keys.rotate(directory, 1)
    found = (directory / FILE).stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (64_043, 64_044, 0o600)
    assert keys.read(directory) is not None
    os.chown(directory / FILE, 0, 0)
    with pytest.raises(KeysError, match="belongs to user 0, its directory to 64043"):
        keys.read(directory)


def test_not_there(directory: Path) -> None:
    """Without a file there are no keys, and without a directory no rotation; each error says what to do."""
    assert keys.read(directory) is None
    with pytest.raises(KeysError, match="no key yet; 'guestapi identity keys rotate'"):
        keys.require(directory)
    with pytest.raises(KeysError, match="systemd-tmpfiles"):
        keys.rotate(directory / "absent", 1)
    directory.chmod(0o500)
    if os.geteuid() != 0:
        with pytest.raises(KeysError, match="run this as root"):
            keys.rotate(directory, 1)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"keys":[]}', b'{"keys":[{"kty":"EC"}]}', b"\xff", b'{"keys":[' + b" " * 70000]
)
def test_damaged_file(directory: Path, content: bytes) -> None:
    """What cannot be understood is an error that repeats nothing of it."""
    (directory / FILE).write_bytes(content)
    (directory / FILE).chmod(0o600)
    with pytest.raises(KeysError, match="no keys can be read from it") as caught:
        keys.read(directory)
    assert caught.value.__cause__ is None


def test_wrong_numbers(directory: Path) -> None:
    """A private number that is not the public point's is not a key, and the error does not have it."""
    ring, other = keys.rotate(directory, 1), keys.generate(0)
    text = (directory / FILE).read_text().replace(ring.keys[0].d, other.d)
    (directory / FILE).write_text(text)
    with pytest.raises(KeysError, match="is damaged") as caught:
        keys.require(directory).keys[0].load()
    assert other.d not in str(caught.value)


@pytest.mark.parametrize("made", ["link", "fifo", "directory"])
def test_no_file(directory: Path, made: str, tmp_path: Path) -> None:
    """A link, a FIFO or a directory in the place of the file is refused, and nothing waits for it."""
    if made == "link":
        (tmp_path / "other").write_text("{}")
        (directory / FILE).symlink_to(tmp_path / "other")
    elif made == "fifo":
        os.mkfifo(directory / FILE, 0o600)
    else:
        (directory / FILE).mkdir(mode=0o700)
    with pytest.raises(KeysError, match=FILE):
        keys.read(directory)


def test_rotation_is_atomic(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rotation that fails before its last step changes nothing and leaves nothing."""
    ring = keys.rotate(directory, 1, compromised=True)

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(KeysError, match="No space left"):
            keys.rotate(directory, 1)
    assert keys.require(directory) == ring
    assert os.listdir(directory) == [FILE]
