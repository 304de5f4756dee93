"""guestapi.toml and gunicorn.conf.py: the shipped files, the defaults, and the errors for mistakes."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from guestapi import gunicorn_conf, settings
from guestapi.dialects import DIALECTS
from guestapi.settings import Settings, SettingsError

CONF = Path(__file__).resolve().parents[1] / "conf"


def loaded(directory: Path, toml: str) -> Settings:
    """Return the settings of a file with this content."""
    file = directory / "guestapi.toml"
    file.write_text(toml)
    return settings.load(file)


def refusal(directory: Path, toml: str) -> str:
    """Return the error of a file with this content, which must be one line that names the file."""
    with pytest.raises(SettingsError) as raised:
        loaded(directory, toml)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{directory}/guestapi.toml: ")
    return sentence.removeprefix(f"{directory}/guestapi.toml: ")


def test_shipped_file_has_the_defaults(tmp_path: Path) -> None:
    """Every value in conf/guestapi.toml is the default, so deleting a line changes nothing."""
    shipped = loaded(tmp_path, (CONF / "guestapi.toml").read_text())
    empty = loaded(tmp_path, "")
    assert shipped == empty
    assert settings.load(None).store == shipped.store
    assert settings.load(None).listener == shipped.listener


def test_shipped_file_has_every_key() -> None:
    """conf/guestapi.toml has every setting."""
    lines = (CONF / "guestapi.toml").read_text().splitlines()
    written = {line.split(" = ")[0] for line in lines if " = " in line and not line.startswith("#")}
    default = Settings()
    tables = (
        *(default.store, default.limits, default.events, default.callers, default.hooks, default.log, default.server),
        *(
            default.identity,
            default.metrics,
            default.sources,
            default.sources.lxc,
            default.sources.podman,
            default.sources.docker,
            default.sources.oci,
        ),
    )
    fields = {field.encode_name for table in tables for field in msgspec.structs.fields(table)}
    # The template is an empty table of its own.
    tables_of_tables = {"lxc", "podman", "docker", "oci"}
    without_default = {"trust_domain", "issuer"}
    assert written == (fields - {"template"} - tables_of_tables - without_default) | {"path", "dialect"}


def test_every_key_of_the_shipped_files_is_explained() -> None:
    """Each key, or group of keys, has a comment above it."""
    for name in ("guestapi.toml", "gunicorn.conf.py"):
        previous = ""
        for line in (CONF / name).read_text().splitlines():
            if re.match(r"\w+ = ", line):
                assert previous.startswith(("#", "[")) or " = " in previous, f"{name}: {line}"
            previous = line


def test_defaults_of_the_protocol() -> None:
    """The store's file, the listeners and the times that clients depend on have their documented defaults."""
    default = settings.load(None)
    assert default.store.url == "sqlite:////var/lib/guestapi/store.db"
    assert {one.dialect: one.path for one in default.listener} == {
        "incus": "/var/lib/incus/guestapi/sock",
        "lxd": "/var/lib/lxd/devlxd/sock",
    }
    limits = default.limits
    assert (limits.head_seconds, limits.body_seconds, limits.idle_seconds) == (3, 3, 30)
    assert (limits.body, limits.stream_queue, limits.stream_send_seconds) == (64 * 1024, 1000, 5)


@pytest.mark.parametrize(
    ("toml", "key", "neighbour"),
    [
        ("stor = 1", "stor", "store"),
        ("[stores]\nurl = ''", "stores", "store"),
        ("file = '/etc/passwd'", "file", "listener"),
        ("[store]\nURL = 'sqlite:////x'", "store.URL", "lock_seconds"),
        ("[limits]\nbodies = 5", "limits.bodies", "header_fields"),
        ("[log]\nlevel = 'info'\nrequest = 'all'", "log.request", "requests"),
        ("[[listener]]\npath = '/a'\n[[listener]]\npath = '/b'\ndialekt = 'lxd'", "listener.dialekt", "dialect"),
        ("[[listener]]\npath = '/a'\n[listener.more]\nx = 1", "listener.more", "path"),
        ("[server]\nworkers = 2", "server.workers", "gunicorn"),
    ],
)
def test_unknown_keys_are_named(tmp_path: Path, toml: str, key: str, neighbour: str) -> None:
    """An unknown key is an error that names it with its table, and the known keys there."""
    sentence = refusal(tmp_path, toml)
    assert sentence.startswith(f"{key}: unknown key")
    assert neighbour in sentence.partition("known here:")[2].replace(",", "").split()


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("store = 5", "store"),
        ("listener = 5", "listener"),
        ("listener = ['/a']", "listener"),
        ("[[listener]]\ndialect = 'lxd'", "listener"),
        ("[[listener]]\npath = '/x'\ndialect = 'klingon'", "listener.dialect"),
        ("[[listener]]\npath = 'x/sock'", "listener.path"),
        ("[store]\nurl = 5", "store.url"),
        ("[store]\nlock_seconds = 0", "store.lock_seconds"),
        ("[store]\nlock_seconds = -1.5", "store.lock_seconds"),
        ("[store]\nlock_seconds = 3601", "store.lock_seconds"),
        ("[store]\nlock_seconds = inf", "store.lock_seconds"),
        ("[store]\nlock_seconds = nan", "store.lock_seconds"),
        ("[store]\nlock_seconds = '5'", "store.lock_seconds"),
        ("[limits]\nbody = 65536.5", "limits.body"),
        ("[limits]\nbody = true", "limits.body"),
        ("[limits]\nbody = 0", "limits.body"),
        ("[limits]\nheader_fields = 257", "limits.header_fields"),
        ("[limits]\nconnections_per_instance = 0", "limits.connections_per_instance"),
        ("[limits]\nidle_seconds = 2025-01-01", "limits.idle_seconds"),
        ("[events]\nkeep_entries = 0", "events.keep_entries"),
        ("[events]\nkeep_seconds = 0", "events.keep_seconds"),
        ("[callers]\npidfd = 1", "callers.pidfd"),
        ("[log]\nlevel = 'loud'", "log.level"),
        ("[log]\nrequests = true", "log.requests"),
        ("[server]\ngunicorn = []", "server.gunicorn"),
        ("[images]\ndirectory = 'images'", "images.directory"),
        ("[images]\ndirectory = 5", "images.directory"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, toml: str, key: str) -> None:
    """A value of the wrong type or out of range is an error that names file and key, and states what is wrong."""
    where, _, what = refusal(tmp_path, toml).partition(": ")
    # An entry of a list may be named by its index.
    assert re.sub(r"\[(\d+|\.\.\.)\]", "", where) == key
    assert len(what.split()) >= 2


@pytest.mark.parametrize(
    ("toml", "found"),
    [
        ("[store]\nlock_seconds = 1", 1.0),
        ("[store]\nlock_seconds = 3600", 3600.0),
        ("[store]\nlock_seconds = 0.05", 0.05),
    ],
)
def test_seconds_may_be_whole_or_not(tmp_path: Path, toml: str, found: float) -> None:
    """A time is accepted with and without a fraction, up to and including the limit."""
    assert loaded(tmp_path, toml).store.lock_seconds == found


def test_every_dialect_can_be_listened_for(tmp_path: Path) -> None:
    """Listeners replace the default ones, keep their order, and may have any dialect."""
    toml = "".join(f"[[listener]]\npath = '/run/{name}'\ndialect = '{name}'\n" for name in DIALECTS)
    listener = loaded(tmp_path, toml + "[[listener]]\npath = '/run/plain'\n").listener
    assert [(one.path, one.dialect) for one in listener] == [
        *((f"/run/{name}", name) for name in DIALECTS),
        ("/run/plain", "incus"),
    ]


@pytest.mark.parametrize("content", [b"[store\n", b"= 1\n", b"x = 1\nx = 2\n", b"\xff\xfe[store]\n", b"\x00"])
def test_invalid_toml(tmp_path: Path, content: bytes) -> None:
    """A file that is not TOML, or not valid UTF-8, is an error that names it."""
    file = tmp_path / "guestapi.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"guestapi\.toml: not TOML: "):
        settings.load(file)


@pytest.mark.parametrize("name", ["missing.toml", "missing/guestapi.toml", "."])
def test_unreadable_file(tmp_path: Path, name: str) -> None:
    """A named file that is missing or unreadable is an error; the defaults are not used."""
    with pytest.raises(SettingsError, match="give a readable file with --config") as raised:
        settings.load(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_which_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--config takes precedence over $GUESTAPI_CONFIG, and that over /etc/guestapi; only that one may be missing."""
    fallback = tmp_path / "etc.toml"
    monkeypatch.setattr(settings, "DEFAULT_FILE", fallback)
    monkeypatch.delenv("GUESTAPI_CONFIG", raising=False)
    assert settings.find(None) is None
    fallback.touch()
    assert settings.find(None) == fallback
    monkeypatch.setenv("GUESTAPI_CONFIG", "")
    assert settings.find(None) == fallback
    monkeypatch.setenv("GUESTAPI_CONFIG", "/nowhere/env.toml")
    assert settings.find(None) == Path("/nowhere/env.toml")
    assert settings.find("/nowhere/option.toml") == Path("/nowhere/option.toml")


def test_place_of_the_gunicorn_file(tmp_path: Path) -> None:
    """gunicorn's file is beside guestapi.toml, unless an absolute path is given."""
    assert loaded(tmp_path, "").gunicorn_file == tmp_path / "gunicorn.conf.py"
    assert loaded(tmp_path, "[server]\ngunicorn = 'g.py'").gunicorn_file == tmp_path / "g.py"
    assert loaded(tmp_path, "[server]\ngunicorn = '/srv/g.py'").gunicorn_file == Path("/srv/g.py")
    assert settings.load(None).gunicorn_file == Path("/etc/guestapi/gunicorn.conf.py")


def gunicorn_refusal(directory: Path, code: str) -> str:
    """Return the error of a gunicorn.conf.py with this content, which must be one line that names the file."""
    file = directory / "gunicorn.conf.py"
    file.write_text(code)
    with pytest.raises(SettingsError) as raised:
        gunicorn_conf.read(file)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.startswith(f"{file}: ")
    return sentence.removeprefix(f"{file}: ")


def test_shipped_gunicorn_file_is_accepted() -> None:
    """conf/gunicorn.conf.py is accepted as shipped, and sets the number of workers."""
    found = gunicorn_conf.read(CONF / "gunicorn.conf.py")
    assert found["workers"] == 2
    assert found["graceful_timeout"] < found["timeout"]


def test_gunicorn_file_of_0_1_is_accepted(tmp_path: Path) -> None:
    """The gunicorn.conf.py of 0.1 is still accepted: it imports nothing of guestapi, and its settings are known."""
    file = tmp_path / "gunicorn.conf.py"
    file.write_text(
        "workers = 2\nworker_connections = 10000\ntimeout = 10\ngraceful_timeout = 4\n"
        "max_requests = 0\nmax_requests_jitter = 0\naccesslog = None\n"
    )
    assert gunicorn_conf.read(file) == {
        "workers": 2,
        "worker_connections": 10000,
        "timeout": 10,
        "graceful_timeout": 4,
        "max_requests": 0,
        "max_requests_jitter": 0,
        "accesslog": None,
    }


def test_gunicorn_file_may_be_missing(tmp_path: Path) -> None:
    """Without the file nothing is set."""
    assert gunicorn_conf.read(tmp_path / "none.py") == {}


def test_gunicorn_file_is_python(tmp_path: Path) -> None:
    """The file may import, compute, have names with an underscore, and define hooks; only settings are returned."""
    file = tmp_path / "gunicorn.conf.py"
    file.write_text("import os\n_cores = 3\nworkers = _cores + 1\ndef on_starting(server):\n    pass\n")
    found = gunicorn_conf.read(file)
    assert found.keys() == {"workers", "on_starting"}
    assert found["workers"] == 4


@pytest.mark.parametrize("name", ["wrokers", "worker", "WORKERS", "graceful_timout", "workers_"])
def test_misspelt_gunicorn_settings_are_named(tmp_path: Path, name: str) -> None:
    """A setting that gunicorn does not know is an error that names it."""
    assert gunicorn_refusal(tmp_path, f"workers = 2\n{name} = 4\n").startswith(f"{name}: ")


@pytest.mark.parametrize(
    "line",
    [
        "bind = 'unix:/tmp/x'",
        "bind = ['0.0.0.0:80']",
        "worker_class = 'sync'",
        "logger_class = 'gunicorn.glogging.Logger'",
        "preload_app = True",
    ],
)
def test_fixed_gunicorn_settings_are_refused(tmp_path: Path, line: str) -> None:
    """A setting that the service itself decides is refused by name."""
    assert gunicorn_refusal(tmp_path, line).startswith(f"{line.partition(' ')[0]}: cannot be set here")


@pytest.mark.parametrize("line", ["workers = 'two'", "workers = -1", "timeout = None", "loglevel = 5"])
def test_impossible_gunicorn_values_are_named(tmp_path: Path, line: str) -> None:
    """A value that gunicorn refuses is an error that names the setting."""
    assert gunicorn_refusal(tmp_path, line).startswith(f"{line.partition(' ')[0]}: ")


@pytest.mark.parametrize("code", ["workers = ", "import nothing_of_that_name", "1 / 0"])
def test_broken_gunicorn_file(tmp_path: Path, code: str) -> None:
    """A file that is no Python, or raises an exception, is an error of one sentence that names it."""
    gunicorn_refusal(tmp_path, code)
