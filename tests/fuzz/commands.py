"""The operator's command in this process, with any arguments and input, over a fresh store; and hooks' rings."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

from click.testing import CliRunner

from guestapi.callers.namespaces import boot_id
from guestapi.cli.main import main
from guestapi.model import Device, Init
from guestapi.settings import Settings, SettingsError, StoreSettings, load
from guestapi.sources import bundles, doorbell, mountinfo
from guestapi.store import steps
from guestapi.store.doorbell import Doorbell
from guestapi.store.writing import Writer

#: Commands that stay in the foreground, use more than the store, or write to any given path.
_ENDLESS = frozenset({"serve", "mirror", "takeover", "follow", "hook", "backup"})
#: Files that can be read endlessly.
_FOREIGN = (b"/dev", b"/proc", b"/sys")


@cache
def _place() -> Path:
    """Return a directory with a configuration, a store with an instance c1 and one that runs, c3, and a copy of it."""
    directory = Path(tempfile.mkdtemp(prefix="guestapi-fuzz-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    state = directory / "state"
    state.mkdir()
    url = f"sqlite:///{state}/store.db"
    (directory / "guestapi.toml").write_text(
        f'[[listener]]\npath = "{directory}/sock"\n[store]\nurl = "{url}"\nlock_seconds = 0.1\n'
    )
    with Writer(Settings(store=StoreSettings(url=url)), create=True).change() as change:
        nic: Device = {"type": "nic", "nictype": "ipvlan"}
        steps.add(change, "default", "c1", config={"user.foo": "bar"}, devices={"eth0": nic})
        steps.add(change, "default", "c3", init=Init(1, 1, boot_id(), 1))
    shutil.copytree(state, directory / "fresh")
    return directory


def check_command(data: bytes) -> None:
    """Run the command with the arguments in the first line of `data`, separated by NUL.

    The rest of `data` is its standard input, and the file ``input``.

    Raises:
        AssertionError: it ends with a traceback, an unknown exit code or an error in another form.
    """
    line, _end, given = data.partition(b"\n")
    words = [os.fsdecode(word) for word in line.split(b"\0")]
    if _ENDLESS & set(words) or any(name in data for name in _FOREIGN):
        return
    place = _place()
    shutil.rmtree(place / "state")
    shutil.copytree(place / "fresh", place / "state")
    (place / "state" / "input").write_bytes(given)
    environment = {"GUESTAPI_CONFIG": str(place / "guestapi.toml")}
    with contextlib.chdir(place / "state"), patch.object(Doorbell, "wait", side_effect=KeyboardInterrupt) as wait:
        done = CliRunner().invoke(main, words, input=given, env=environment, prog_name="guestapi")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{words} ends with a traceback") from done.exception
    if wait.called and done.stderr == "\nAborted!\n":
        return  # As by a key that interrupts it.
    assert done.exit_code in (0, 1, 2, 3), done.exit_code
    assert done.exit_code != 3 or {"notice", "--wait"} <= set(words), words
    assert "Traceback" not in done.stderr, done.stderr
    if done.exit_code == 1 and done.stderr:
        assert done.stderr.startswith("Error: "), done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("Hint: ")), done.stderr
        assert all(line.isprintable() for line in lines), done.stderr


def check_ring(data: bytes) -> None:
    """Parse `data` as a hook's ring, and as the files that a runtime leaves for a follower.

    Raises:
        AssertionError: a refusal has more than one sentence.
    """
    refusals = []
    ring = doorbell.Ring("oci", state=data)
    try:
        ring = doorbell.parse(data)
    except doorbell.RingError as error:
        refusals.append(str(error))
    try:
        bundles.read_state(ring.state)
    except bundles.BundleError as error:
        refusals.append(str(error))
    assert all("\n" not in refusal for refusal in refusals), refusals
    mounts = mountinfo.parse(data)
    assert len(mountinfo.visible(mounts)) <= len(mounts) <= data.count(b"\n") + 1


def check_settings(data: bytes) -> None:
    """Read `data` as guestapi.toml.

    Raises:
        AssertionError: the refusal has more than one sentence, or does not begin with the file.
    """
    file = _place() / "other.toml"
    file.write_bytes(data)
    try:
        load(file)
    except SettingsError as error:
        text = str(error)
    else:
        return
    assert text.startswith(f"{file}: "), text
    text.encode()
