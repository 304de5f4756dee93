"""What operators do wrong: for each mistake an exit code, one sentence that names it, and what would be right."""

from __future__ import annotations

import shlex
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import Done, Guestapi
from tests.harness.scratch import SCRATCH
from tests.harness.service import COMMAND, USER
from tests.store.processes import other_process

LONG = "k" * 256

#: What is typed, the exit code, and what the sentence or its hint names. HERE stands for the test's directory.
MISTAKES = [
    # Nouns and verbs.
    ("frobnicate", 2, "there are apply"),
    ("instnace list", 2, "did you mean 'instance'"),
    ("instance", 2, "there are add"),
    ("config", 2, "there are edit"),
    ("device", 2, "there are add"),
    ("profile", 2, "there are add"),
    ("image", 2, "there are import"),
    ("project", 2, "there are list"),
    ("hook", 2, "there are lxc"),
    ("instance frobnicate", 2, "there are add"),
    ("instance lst", 2, "did you mean 'list'"),
    ("config gte c1 user.a", 2, "did you mean 'get'"),
    ("hook nothing", 2, "there are lxc"),
    ("completion tcsh", 2, "'bash'"),
    ("follow docker2", 2, "'docker'"),
    ("mirror docker", 2, "'incus'"),
    ("takeover x", 2, "'incus'"),
    # Options.
    ("--nothing", 2, "--nothing"),
    ("--config", 2, "requires an argument"),
    ("--project", 2, "requires an argument"),
    ("instance list --colour red", 2, "--columns"),
    ("instance list --format xml", 2, "'compact'"),
    ("instance list -c q", 2, "n (name)"),
    ("instance list --project", 2, "requires an argument"),
    ("instance add c3 --type vm", 2, "'virtual-machine'"),
    ("instance show c1 --format xml", 2, "'yaml'"),
    ("instance register c1", 2, "'--pid'"),
    ("instance register c1 --pid 0", 2, "x>=1"),
    ("instance register c1 --pid self", 2, "'self'"),
    ("instance wait c1", 2, "--ready, --running and --stopped"),
    ("instance wait c1 --ready --running", 2, "exactly one"),
    ("instance wait c1 --ready --timeout x", 2, "'x'"),
    ("instance wait c1 --ready --timeout -1", 2, "not a number of seconds"),
    ("instance wait c1 --ready --timeout soon", 2, "not a number of seconds; write 30"),
    ("instance wait c1 --ready --timeout nan", 2, "not a number of seconds"),
    ("instance wait c1 --ready --timeout inf", 2, "not a number of seconds"),
    ("instance add c9 --profile none", 1, "no profile 'none'"),
    ("profile list --project none", 1, "guestapi project list"),
    ("config show c1 --format yaml", 2, "'json'"),
    ("events --type nothing", 2, "config, device, lifecycle"),
    ("events --since x", 2, "'x'"),
    ("apply", 2, "'--file'"),
    ("apply -f - -f -", 2, "once only"),
    ("apply -f HERE/empty --force", 2, "--prune"),
    ("export", 2, "--all"),
    ("export c1 --all", 2, "--all"),
    ("serve --socket x=/a", 2, "lxd-legacy"),
    ("serve --workers 0", 2, "256"),
    ("image set none", 2, "--public"),
    # Arguments: missing, too many, in the wrong place, twice.
    ("instance add", 2, "NAME"),
    ("instance add c3 c4", 2, "c4"),
    ("instance show", 2, "NAME"),
    ("instance remove", 2, "NAME"),
    ("instance rename c1", 2, "NEW-NAME"),
    ("config get", 2, "NAME"),
    ("config get c1", 2, "KEY"),
    ("config get c1 a b", 2, "(b)"),
    ("config set c1", 2, "KEY=VALUE"),
    ("config set c1 user.a", 2, "'user.a' is not KEY=VALUE"),
    ("config set c1 user.a=1 user.b", 2, "'user.b' is not KEY=VALUE"),
    ("config set c1 user.a=1 user.a=2", 2, "'user.a' is given twice"),
    ("config set c1 =1", 2, "'=1' is not KEY=VALUE"),
    ("config set c1 a=@- b=@-", 2, "once only"),
    ("config unset c1", 2, "KEY"),
    ("instance add c3 --config user.a", 2, "KEY=VALUE"),
    ("instance add c3 --config a=@- --config b=@-", 2, "once only"),
    ("instance add c3 --device eth0", 2, "eth0,type=nic"),
    ("instance add c3 --device eth0,nic", 2, "KEY=VALUE"),
    ("instance add c3 --device a,type=nic --device a,type=nic", 2, "'a' is given twice"),
    ("device add c1 eth1", 2, "TYPE"),
    ("device add c1 eth1 type=nic", 2, "eth1 nic"),
    ("device add c1 eth1 nic type=nic", 2, "by itself"),
    ("device add c1 eth1 nic mtu", 2, "KEY=VALUE"),
    ("device set c1 eth0 mtu=1 mtu=2", 2, "twice"),
    ("device get c1 eth0", 2, "KEY"),
    ("profile device add small eth0 type=nic", 2, "eth0 nic"),
    ("image import", 2, "FILE"),
    ("image import a b c", 2, "one file, or two"),
    ("backup", 2, "FILE"),
    ("check x", 2, "(x)"),
    ("instance list foo=bar", 2, "status"),
    ("instance list status=runing", 2, "running, stopped, dead"),
    # Names.
    ("instance show none", 1, "guestapi instance list"),
    ("instance info c1 --project none", 1, "guestapi instance list"),
    ("instance unregister none", 1, "guestapi instance list"),
    ("instance remove c1 none", 1, "guestapi instance list"),
    ("instance rename none x", 1, "guestapi instance list"),
    ("instance rename c1 c2", 1, "choose another name"),
    ("instance rename c1 a/b", 1, "without '/'"),
    ("instance wait none --ready", 1, "guestapi instance list"),
    ("instance wait c1 --ready --timeout 0", 1, "guestapi instance list"),
    ("instance list --project none", 1, "guestapi project list"),
    ("instance add c1", 1, "guestapi apply"),
    ("instance add a/b", 1, "without '/'"),
    ("instance add ''", 1, "1 to 255 bytes"),
    (f"instance add {LONG}", 1, "1 to 255 bytes"),
    ("instance add c3 --project 'a b'", 1, "no blanks"),
    ("instance add c3 --uuid 7", 1, "00000000-0000"),
    ("instance add c3 --location ''", 1, "location"),
    ("instance register none --pid 1", 1, "process 1 "),
    ("instance register c1 --pid 99999999", 1, "as the host sees it"),
    ("config get none user.a", 1, "guestapi instance list"),
    ("config get c1 user.none", 1, "guestapi config show c1"),
    ("config edit none", 1, "guestapi instance list"),
    ("config edit c1", 1, "guestapi instance show"),
    ("config unset c1 ''", 1, "must not be empty"),
    (f"config set c1 {LONG * 5}=1", 1, "at most 1024"),
    ("device add c1 eth0 nic", 1, "guestapi device set"),
    ("device add c1 eth1 ''", 1, "like nic or disk"),
    ("device set c1 eth1 a=1", 1, "guestapi instance show c1"),
    ("device get c1 eth0 mtu", 1, "guestapi device show c1 eth0"),
    ("device remove c1 eth1", 1, "guestapi instance show c1"),
    ("device unset c1 eth0 type", 1, "like nic or disk"),
    ("profile create small", 1, "guestapi profile set"),
    ("profile show none", 1, "guestapi profile list"),
    ("profile assign c1 none", 1, "guestapi profile list"),
    ("profile get small user.a", 1, "guestapi profile show small"),
    ("image show none", 1, "guestapi image list"),
    ("events none", 1, "guestapi instance list"),
    ("events --project none", 1, "guestapi project list"),
    ("export none", 1, "guestapi instance list"),
    # Values.
    ("config set c1 security.devlxd=maybe", 1, "true, 1, yes, on; or false, 0, no, off"),
    ("config set c1 security.guestapi perhaps", 1, "true or false"),
    ("instance add c3 --config security.guestapi.images=2", 1, "true or false"),
    ("profile set small security.devlxd.images=", 0, ""),
    ("profile set small security.devlxd.images=ja", 1, "true or false"),
    # Files.
    ("--config /nowhere/x instance list", 1, "give a readable file"),
    ("--config HERE instance list", 1, "give a readable file"),
    ("--config HERE/text instance list", 1, "not TOML"),
    ("config set c1 user.a=@/nowhere", 1, "@-"),
    ("config set c1 user.a=@HERE", 1, "Is a directory"),
    ("config set c1 user.a=@HERE/latin", 1, "UTF-8"),
    ("instance add c3 --file /nowhere", 1, "--file takes a definition"),
    ("instance add c3 --file HERE/text", 1, "a definition has name"),
    ("apply -f /nowhere", 1, "a file or a directory"),
    ("apply -f HERE/dir", 1, "*.yaml"),
    ("apply -f HERE/text", 1, "a definition has name"),
    ("apply -f HERE/latin", 1, "UTF-8"),
    ("apply -f HERE/empty --prune", 1, "would remove everything"),
    ("image import /nowhere", 1, "files of an image"),
    ("image import HERE", 1, "files of an image"),
    ("image import HERE/text", 1, "squashfs"),
    ("image import HERE/empty", 1, "is empty"),
    ("backup HERE/text", 1, "--force"),
    ("backup HERE", 1, "name of a file in it"),
    ("backup /nowhere/x", 1, "a directory that exists"),
    ("restore /nowhere", 1, "guestapi backup"),
    ("restore HERE/text", 1, "nothing was changed"),
]


def check(done: Done, code: int, named: str) -> None:
    """One sentence behind ``Error:``, nothing else but a hint and how the command is called; no traceback."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    lines = done.err.splitlines()
    (sentence,) = (line for line in lines if line.startswith("Error: "))
    hints = [line for line in lines if line.startswith(("Hint: ", "Try '"))]
    assert hints or "; " in sentence or ": not TOML" in sentence or "UTF-8" in sentence, "says what would be right"
    assert all(line.startswith(("Usage: ", "Try '", "Error: ", "Hint: ")) for line in lines if line)
    assert named in done.err


def fill(guestapi: Guestapi) -> Guestapi:
    """Add what mistakes are made with: c1 with a NIC, another instance, and a profile."""
    guestapi.good("instance", "add", "c1", "--config", "user.a=1", "--device", "eth0,type=nic,name=eth0")
    guestapi.good("instance", "add", "c2")
    guestapi.good("profile", "create", "small")
    return guestapi


@pytest.fixture
def filled(guestapi: Guestapi) -> Guestapi:
    """The command, with two instances and a profile."""
    return fill(guestapi)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Guestapi, Any]:
    """The command with the same and some files, and its state, which no mistake changes: so all share it."""
    directory = tmp_path_factory.mktemp("mistakes")
    (directory / "text").write_text("hello\n")
    (directory / "latin").write_bytes(b"\xff\xfe")
    (directory / "empty").touch()
    (directory / "dir").mkdir()
    guestapi = fill(Guestapi(directory))
    return guestapi, guestapi.state()


@pytest.mark.parametrize(("line", "code", "named"), MISTAKES, ids=[line[:60] for line, _code, _named in MISTAKES])
def test_mistake(unchanged: tuple[Guestapi, Any], line: str, code: int, named: str) -> None:
    """Each mistake is told in one sentence with what would be right, and changes nothing."""
    guestapi, before = unchanged
    done = guestapi(*shlex.split(line.replace("HERE", str(guestapi.directory))))
    if code:
        check(done, code, named)
    else:
        assert (done.code, done.err) == (0, "")
    assert guestapi.state() == before


def test_the_table_is_long() -> None:
    """There are many ways to be wrong."""
    assert len(MISTAKES) > 140


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("config set c1 limits.memroy=1GiB", "'limits.memory' is one"),
        ("config set c1 cloud_init.user-data=x", "'cloud-init.user-data' is one"),
        ("config set c1 usr.role=x", "'user.role' is one"),
        ("config set c1 Limits.CPU=1", "'limits.cpu' is one"),
        ("device add c1 eth1 nik", "'nic' is one"),
        ("device add c1 eth1 network-card", "there are disk"),
        ("device set c1 eth0 mtuu=1", "'mtu' is one"),
        ("device add c1 root disk path=/ sorce=/x", "'source' is one"),
        ("instance add c3 --device eth0,type=nic,netwrok=br0", "'network' is one"),
        ("profile create other limits.memroy=1", "'limits.memory' is one"),
        ("profile device add small eth0 nik", "'nic' is one"),
    ],
)
def test_slips_are_warned_of(filled: Guestapi, line: str, named: str) -> None:
    """What Incus does not know, and what looks like something that it knows, is done and warned of."""
    done = filled(*shlex.split(line))
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("Warning: ")
    assert named in done.err


@pytest.mark.parametrize(
    "line",
    [
        "config set c1 user.anything=1 environment.X=1 limits.kernel.nofile=1 linux.sysctl.net.ipv4.ip_forward=1",
        "config set c1 security.devlxd=ON security.guestapi=No limits.memory=1GiB limits.memory.swap=false",
        "config set c1 my.own.key=1 volatile.eth0.hwaddr=0a:00",
        "config unset c1 limits.memroy",
        "device set c1 eth0 user.note=x limits.max=1Mbit parent=br0 network=",
    ],
)
def test_what_is_no_slip(filled: Guestapi, line: str) -> None:
    """What Incus knows, free keys, and what is taken away, passes without a word."""
    assert filled.good(*shlex.split(line)) == ""


WRITE = ["instance add x", "config set c1 user.a=2", "config unset c1 user.a", "device remove c1 eth0", "rm c1"]
READ = ["instance list", "instance show c1", "config get c1 user.a", "device list c1", "export --all", "events c1"]


@pytest.mark.parametrize("line", WRITE)
def test_locked_store(c1: Guestapi, line: str) -> None:
    """While another writer holds the store, what changes something says so, by both ways of calling it."""
    with other_process(c1.settings, "with Writer(settings).change():\n    send('in')\n    receive()\n") as other:
        assert other.read_line() == "in"
        check(c1(*line.split()), 1, "try again")
        check(c1.program(*line.split()), 1, "try again")
        other.write_line("done")
        other.done()


@pytest.mark.parametrize("line", READ)
def test_missing_store(guestapi: Guestapi, line: str) -> None:
    """Where no store is, whoever looks is told how it is made."""
    check(guestapi(*line.split()), 1, "guestapi instance add")
    check(guestapi.program(*line.split()), 1, "guestapi instance add")


@pytest.mark.parametrize("line", READ + WRITE)
def test_newer_store(c1: Guestapi, line: str) -> None:
    """A store of a newer version is refused, and both versions are named."""
    with closing(sqlite3.connect(c1.directory / "store.db")) as connection:
        connection.execute("PRAGMA user_version = 99")
    for done in (c1(*line.split()), c1.program(*line.split())):
        assert done.code == 1
        assert "version 99" in done.err


@pytest.fixture(scope="module", params=[0o755, 0o700], ids=["seen", "unseen"])
def of_root(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The configuration for a store of root's with an instance. Other users see its directory, or do not."""
    place = Path(tempfile.mkdtemp(prefix="guestapi-", dir=SCRATCH))
    place.chmod(0o755)
    state = place / "state"
    state.mkdir()
    config = place / "guestapi.toml"
    config.write_text(f'[store]\nurl = "sqlite:///{state}/store.db"\n')
    subprocess.run([COMMAND, "--config", config, "instance", "add", "c1"], check=True, stdin=subprocess.DEVNULL)
    state.chmod(request.param)
    yield config
    shutil.rmtree(place)


@pytest.mark.root
@pytest.mark.parametrize("line", READ + WRITE)
def test_other_user(of_root: Path, line: str) -> None:
    """Who is not root is told to be, not that the store is missing; whether he sees its directory or not."""
    done = subprocess.run(
        [COMMAND, "--config", of_root, *line.split()],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        user=USER,
        group=USER,
        extra_groups=[],
        cwd="/",
    )
    check(Done(done.returncode, done.stdout, done.stderr), 1, "run this as root")
    assert "missing" not in done.stderr
