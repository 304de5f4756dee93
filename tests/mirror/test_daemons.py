"""With a real Incus and a real LXD: guestapi's answers to their containers equal the daemon's own."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty

import pytest

from guestapi.dialects import DIALECTS
from guestapi.store.lookup import list_images
from guestapi.store.view import view
from tests.harness.machine import CHECKOUT
from tests.harness.mirroring import OURS, beside
from tests.harness.waiting import until
from tests.mirror.host import ContainerShell, Heard, MirrorHost

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=["incus", "incus-7", "lxd"])
def host(request: pytest.FixtureRequest) -> Iterator[MirrorHost]:
    """A daemon of each kind, for all tests."""
    with beside(request.param) as (daemon, service, mirror):
        yield MirrorHost(daemon, service, mirror)


@pytest.fixture(scope="module")
def c1(host: MirrorHost) -> Iterator[str]:
    """A container for many tests."""
    # Incus 7.0 refuses user-data that has no YAML.
    data = "cloud-init.user-data=#cloud-config\n{}\n"
    with host.launched("c1", "-c", "user.foo=bar", "-c", data, "-c", "user.empty="):
        yield "c1"


#: Every readable path; intended differences are in `test_answers_are_the_daemons`.
PATHS = [
    *("/", "/1.0", "/1.0/config", "/1.0/config/user.foo", "/1.0/config/cloud-init.user-data", "/1.0/devices"),
    *("/1.0/config/user.none", "/1.0/config/volatile.uuid", "/1.0/meta-data", "/1.0/nothing", "/1.0/images/abc/export"),
]


def has_content(file: Path) -> bool:
    """Return whether a file exists and is not empty."""
    return file.exists() and file.stat().st_size > 0


def test_first_request_of_a_new_container_is_answered(host: MirrorHost) -> None:
    """A container whose init sends a request at once, before the mirror has its start, is answered at the first try."""
    ask = f"curl -s --max-time 20 --unix-socket {OURS} http://x/1.0/config/user.first"
    host.daemon.client("init", "busybox", "first")
    try:
        init = f"#!/bin/sh\n{ask} >/answer\nexec /sbin/init\n"
        host.daemon.client("file", "push", "--mode", "0755", "-", "first/first", stdin=init)
        host.daemon.client("config", "set", "first", "raw.lxc=lxc.cgroup.relative=1\nlxc.init.cmd=/first")
        for run in range(3):
            host.set("first", "user.first", str(run))
            host.daemon.client("start", "first")
            # An exec session of the daemon would take ten times as long.
            answer = Path(f"/proc/{host.daemon.init('first')}/root/answer")
            until(partial(has_content, answer), "an answer")
            assert answer.read_text() == str(run)
            host.daemon.client("stop", "--force", "first")
    finally:
        host.daemon.client("delete", "--force", "first")


def test_answers_are_the_daemons(host: MirrorHost, c1: str) -> None:
    """Status, type and body of every response equal those of the daemon, requested by the same program."""
    for path in PATHS:
        ours, theirs = host.ask(c1, path), host.ask_daemon(c1, path)
        if path == "/1.0" and host.daemon.kind == "lxd":
            # LXD 5.0 gives its guests neither state nor location.
            assert {**json.loads(ours.text), "state": "", "location": "none"} == json.loads(theirs.text)
        elif path == "/1.0/config":
            # LXD's list is in no order.
            assert json.loads(ours.text) == sorted(json.loads(theirs.text))
        else:
            assert (ours.status, ours.headers["content-type"], ours.body) == (
                theirs.status,
                theirs.headers["content-type"],
                theirs.body,
            ), path


def begin(host: MirrorHost, name: str, *listeners: Heard) -> None:
    """Change a key until every listener receives events."""
    for listener in listeners:
        for number in range(100):
            host.set(name, "user.begin", str(number))
            try:
                listener.next(0.5)
            except Empty:
                continue
            break
    host.set(name, "user.begin", "now")
    for listener in listeners:
        listener.until("user.begin", "now")


def put(host: MirrorHost, name: str, config: dict[str, str], devices: dict[str, dict[str, str]]) -> None:
    """Change an instance in one request: set these keys, unset the empty ones, and replace all devices."""
    path = f"/1.0/instances/{name}"
    instance = host.daemon.query(path)
    wanted = {key: value for key, value in {**instance["config"], **config}.items() if value}
    host.daemon.query(path, "PUT", {**instance, "config": wanted, "devices": devices})


def changes(host: MirrorHost, name: str) -> Iterator[None]:
    """Make changes of all kinds, one at a time."""
    client = host.daemon.client
    client("config", "set", name, "user.a=1")
    yield
    client("config", "set", name, "user.a=<2> & é")
    yield
    client("config", "set", name, "user.a=<2> & é", "security.privileged=false", "environment.A=1", "user.b=1")
    yield
    client("config", "unset", name, "user.b")
    yield
    disk = {"type": "disk", "source": "/usr/share", "path": "/mnt/a"}
    put(
        host,
        name,
        {"user.c": "3", "user.a": "", "cloud-init.vendor-data": "x"},
        {"z": disk, "b": {**disk, "path": "/mnt/b"}},
    )
    yield
    put(host, name, {"user.a": "4"}, {"z": {**disk, "readonly": "true"}, "c": {**disk, "path": "/mnt/c"}})
    yield
    put(host, name, {}, {})
    yield
    client("profile", "set", "default", "user.p=1")
    yield
    client("profile", "device", "add", "default", "d", "disk", "source=/usr/share", "path=/mnt/d")
    yield
    client("profile", "device", "remove", "default", "d")
    yield
    client("profile", "unset", "default", "user.p")
    yield


def kind(event: tuple[str, dict[str, str]]) -> str:
    """Return the kind of an event."""
    return event[1].get("action", event[0])


def test_events_are_the_daemons(host: MirrorHost, c1: str) -> None:
    """For each change, direct or by a profile, guestapi sends the same events as the daemon."""
    with Heard(host, c1, OURS) as ours, Heard(host, c1, host.theirs) as theirs:
        begin(host, c1, ours, theirs)
        for number, _changed in enumerate(changes(host, c1)):
            # The mirror may combine two changes in a row.
            host.settle(c1)
            host.set(c1, "user.mark", str(number))
            received, wanted = ours.until("user.mark", str(number)), theirs.until("user.mark", str(number))
            assert sorted(received, key=str) == sorted(wanted, key=str), number
            # The daemon sends the events of a kind in any order.
            assert list(map(kind, received)) == list(map(kind, wanted)), number


def test_restart_is_noticed(host: MirrorHost) -> None:
    """After a restart from outside or inside, and after a crash and a start, the new run is registered."""
    with host.launched("again", "-c", "user.a=1"):
        for words in (("restart", "--force"), ("stop", "--force"), ("start",), ("restart", "--force")):
            host.daemon.client(*words, "again")
            if words[0] != "stop":
                assert host.ask("again", "/1.0/config/user.a").text == "1"
                assert host.instance("again") is not None
        os.kill(host.daemon.init("again"), signal.SIGKILL)
        host.wait(lambda: (known := host.instance("again")) is not None and known.init is None)
        host.daemon.client("start", "again")
        assert host.ask("again", "/1.0/config/user.a").text == "1"


def test_rename_and_delete_are_noticed(host: MirrorHost) -> None:
    """An instance keeps its identity when it is renamed, and is removed when it is deleted."""
    names = ["old", "new", "other"]
    host.daemon.client("init", "busybox", names[0], "-c", "user.a=1")
    host.wait(lambda: host.instance(names[0]) is not None)
    first = host.instance(names[0])
    assert first is not None

    def is_gone(name: str) -> bool:
        """Return whether the store has no such instance."""
        return host.instance(name) is None

    # To a name that sorts before the old one, and to one that sorts after it.
    for before, after in (names[:2], names[1:], [names[2], names[1]]):
        host.daemon.client("rename", before, after)
        host.wait(partial(host.instance, after))
        host.wait(partial(is_gone, before))
        renamed = host.instance(after)
        assert renamed is not None
        assert (renamed.id, renamed.uuid) == (first.id, first.uuid)
    host.daemon.client("start", "new")
    assert "local-hostname: new\n" in host.ask("new", "/1.0/meta-data").text
    host.daemon.client("delete", "--force", "new")
    host.wait(lambda: host.instance("new") is None)


def test_two_projects_with_one_name(host: MirrorHost, c1: str) -> None:
    """Two instances of one name in two projects each get their own configuration, with their project's profiles."""
    # Incus 7.0 permits no such characters.
    client, other = host.daemon.client, "other-1" if host.daemon.release == "incus-7" else "other+1@x"
    client("project", "create", other, "-c", "features.images=false", "-c", "features.profiles=true")
    try:
        client("--project", other, "profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        client("--project", other, "profile", "set", "default", "raw.lxc", "lxc.cgroup.relative=1")
        source = host.service.sockets[host.daemon.kind].parent
        device = ("guestapi", "disk", f"source={source}", "path=/dev/guestapi")
        client("--project", other, "profile", "device", "add", "default", *device)
        client("--project", other, "profile", "set", "default", "user.profile=other")
        with host.launched(c1, "-c", "user.foo=other", project=other):
            assert host.ask(c1, "/1.0/config/user.foo", project=other).text == "other"
            assert host.ask(c1, "/1.0/config/user.profile", project=other).text == "other"
            assert host.ask(c1, "/1.0/config/user.foo").text == "bar"
            assert host.ask(c1, "/1.0/config/user.profile").status == 404
            client("--project", other, "profile", "set", "default", "user.profile=changed")
            host.until(c1, "/1.0/config/user.profile", "changed", project=other)
        host.wait(lambda: host.instance(c1, other) is None)
        assert host.instance(c1) is not None
    finally:
        client("project", "delete", other, check=False)


def test_nested_container_is_its_instance(host: MirrorHost, c1: str) -> None:
    """A process in a nested container is identified as the daemon's instance."""
    inside = ["nsenter", "-t", str(host.daemon.init(c1)), "-a", "--setuid", "0", "--setgid", "0"]
    nest = ["/bin/busybox", "unshare", "--user", "--map-root-user", "--pid", "--fork", "/bin/busybox", "sh", "-c"]
    done = subprocess.run(
        [*inside, *nest, f"curl -s --unix-socket {OURS} http://x/1.0/config/user.foo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "bar", done


@contextmanager
def changing(host: MirrorHost, name: str) -> Iterator[None]:
    """Change the key ``user.now`` repeatedly until the end of the block."""
    ended = threading.Event()

    def change() -> None:
        for number in count():
            if ended.is_set():
                return
            host.set(name, "user.now", str(number))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# Without Incus 7.0: in its namespace /usr, from which the container gets Python, has another C library.
@pytest.mark.parametrize("host", ["incus", "lxd"], indirect=True)
def test_guestctl_and_client(host: MirrorHost) -> None:
    """At the daemon's own socket, `guestctl` and `guestapi.client` get keys, devices and events, and set readiness."""
    with host.launched("ctl", "-c", "user.key=bar"):
        for path in ("/usr", *{str(Path(each).resolve()) for each in (sys.prefix, CHECKOUT)}):
            name = path.strip("/").replace("/", "-")
            host.daemon.client("config", "device", "add", "ctl", name, "disk", f"source={path}", f"path={path}")
        guestctl = ["/usr/bin/python3", "-I", str(CHECKOUT / "guestapi/guest/guestctl.py"), "--socket", host.theirs]
        assert host.daemon.run("ctl", *guestctl, "get", "user.key") == "bar"
        assert host.daemon.run("ctl", *guestctl, "get", "user.key", "--wait", "9") == "bar"
        assert host.daemon.run("ctl", *guestctl, "list") == "user.key\n"
        assert json.loads(host.daemon.run("ctl", *guestctl, "devices")) == json.loads(
            host.ask_daemon("ctl", "/1.0/devices").text
        )
        host.daemon.run("ctl", *guestctl, "ready")
        tour = ["/usr/bin/env", f"PYTHONPATH={CHECKOUT}", sys.executable, "-m", "tests.guest.client_tour"]
        for words in (
            [*guestctl, "events"],
            [*tour, "blocking", host.theirs],
            [*tour, "asyncio", host.theirs],
        ):
            with host.daemon.running_in("ctl", *words) as lines:
                if words[-1] != "events":
                    results = json.loads(next(lines))
                    assert results["config"]["user.key"] == "bar"
                    assert results["absent"] == ["KeyError", "TimeoutError"]
                with changing(host, "ctl"):
                    event = json.loads(next(lines))
                assert event["metadata"]["key"] == "user.now"


def test_key_policies(host: MirrorHost) -> None:
    """Key policies hold for what a daemon sets: in values, the tree and events, whatever else is changed there."""
    kinds = ("hidden", "secret", "once")
    with host.launched("policies"):
        for kind in kinds:
            host.service.command("policy", "add", f"user.{kind}", "--instance", "policies", f"--{kind}")
        with Heard(host, "policies", OURS) as heard:
            begin(host, "policies", heard)
            for kind in kinds:
                host.set("policies", f"user.{kind}", f"value-of-{kind}")
                # The mirror may combine two changes in a row.
                host.settle("policies")
            host.set("policies", "user.end", "1")
            told = heard.until("user.end", "1")
        changed = [metadata for _type, metadata in told if metadata.get("key") in {f"user.{kind}" for kind in kinds}]
        assert changed == [{"key": f"user.{kind}", "old_value": "", "value": ""} for kind in ("secret", "once")]
        tree = json.loads(host.ask("policies", "/1.0/guestapi/tree").text)["config"]
        assert "value-of-secret" in tree.values()
        assert not {"user.hidden", "user.once"} & set(tree)
        shown = host.service.command("config", "show", "policies").stdout
        assert "value-of-hidden" in shown
        assert "value-of-secret" not in shown
        assert "value-of-once" not in shown
        for kind, status in (("hidden", 404), ("secret", 200), ("once", 200), ("once", 404)):
            assert host.ask("policies", f"/1.0/config/user.{kind}").status == status, kind
        # The daemon's configuration is read anew, and the key has its value there still.
        host.set("policies", "user.end", "2")
        host.until("policies", "/1.0/config/user.end", "2")
        assert host.ask("policies", "/1.0/config/user.once").status == 404
        host.set("policies", "user.once", "another")
        host.until("policies", "/1.0/config/user.once", "another")


def test_switch_of_the_daemon(host: MirrorHost) -> None:
    """The daemon's own key switches guestapi's answers to an instance off and on."""
    key = DIALECTS[host.daemon.kind].switch
    with host.launched("off", "-c", "user.a=1"):
        assert host.ask("off", "/1.0/config/user.a").status == 200
        host.daemon.client("config", "set", "off", f"{key}=false")
        host.wait(lambda: host.ask("off", "/1.0/config/user.a").status == 403)
        host.daemon.client("config", "unset", "off", key)
        host.wait(lambda: host.ask("off", "/1.0/config/user.a").status == 200)


def test_switch_with_the_device_in_the_daemons_place(host: MirrorHost) -> None:
    """As docs/incus.md says: the key takes the mount of a profile's device away, and a restart brings it back.

    An instance that masks the device has the daemon's own socket; with Incus 7.0 it must be stopped for that.
    """
    key, directory = DIALECTS[host.daemon.kind].switch, DIALECTS[host.daemon.kind].directory
    client, socket = host.daemon.client, f"{directory}/sock"
    device = [f"source={host.service.sockets[host.daemon.kind].parent}", f"path={directory}"]

    def ours() -> bool:
        """Whether the socket in the daemon's place is guestapi's."""
        files = host.daemon.run("switched", "sh", "-c", f"busybox stat -c %d:%i {OURS} {socket} || true").split()
        return len(files) == 2 and len(set(files)) == 1

    client("profile", "create", "in-place")
    try:
        client("profile", "device", "add", "in-place", "in-place", "disk", *device)
        with host.launched("switched", "--profile", "default", "--profile", "in-place"):
            assert ours()
            client("config", "set", "switched", f"{key}=false", check=False)
            assert not ours()
            client("restart", "--force", "switched")
            assert ours()
            mask = ("config", "device", "add", "switched", "in-place", "none")
            if host.daemon.release == "incus-7":
                client(*mask, check=False)
                assert "in-place" not in host.daemon.query("/1.0/instances/switched")["devices"]
                client("stop", "--force", "switched")
                client(*mask)
                client("start", "switched")
            else:
                client(*mask)
            assert not ours()
    finally:
        client("profile", "delete", "in-place")


def test_ready_reaches_the_daemon(host: MirrorHost) -> None:
    """Ready and Started are reported to the daemon, and a restart resets them; LXD has no such state."""
    with host.launched("ready"):
        for state, shown in (("Ready", "Ready"), ("Started", "Running"), ("Ready", "Ready")):
            answer = host.ask("ready", "/1.0", method="PATCH", body=json.dumps({"state": state}))
            assert answer.status == 200
            assert json.loads(host.ask("ready", "/1.0").text)["state"] == state
            if host.daemon.kind == "incus":
                host.wait(partial(host.shows, "ready", shown))
                assert json.loads(host.ask_daemon("ready", "/1.0").text)["state"] == state
        host.daemon.client("restart", "--force", "ready")
        assert json.loads(host.ask("ready", "/1.0").text)["state"] == "Started"
        assert host.status("ready") == "Running"


#: An init that reports Started at guestapi's socket when it is stopped, and ends three seconds later.
LEAVING = f"""#!/bin/sh
leave() {{
    curl -s --unix-socket {OURS} -X PATCH -d '{{"state": "Started"}}' http://x/1.0
    sleep 3
    exit 0
}}
trap leave USR1
while :; do sleep 0.1; done
"""


@pytest.mark.parametrize("host", ["incus"], indirect=True)
def test_readiness_during_a_restart(host: MirrorHost) -> None:
    """Readiness that an instance reports during its restart does not disturb the restart."""
    host.daemon.client("init", "busybox", "leaving")
    try:
        host.daemon.client("file", "push", "--mode", "0755", "-", "leaving/first", stdin=LEAVING)
        raw = "lxc.cgroup.relative=1\nlxc.init.cmd=/first\nlxc.signal.halt=SIGUSR1"
        host.daemon.client("config", "set", "leaving", f"raw.lxc={raw}")
        host.daemon.client("start", "leaving")
        host.ask("leaving", "/1.0", method="PATCH", body='{"state": "Ready"}')
        host.wait(partial(host.shows, "leaving", "Ready"))
        host.daemon.client("restart", "leaving")
        assert host.status("leaving") == "Running"
        assert json.loads(host.ask("leaving", "/1.0").text)["state"] == "Started"
    finally:
        host.daemon.client("delete", "--force", "leaving")


@pytest.mark.parametrize("host", ["incus"], indirect=True)
def test_readiness_in_a_restricted_project(host: MirrorHost, c1: str) -> None:
    """In a restricted project, whose daemon refuses readiness, guestapi still stores it; others are unaffected."""
    client = host.daemon.client
    client("project", "create", "strict", "-c", "features.images=false", "-c", "restricted=true")
    try:
        client("project", "set", "strict", "restricted.devices.disk=allow")
        client("--project", "strict", "profile", "device", "add", "default", "root", "disk", "path=/", "pool=default")
        source = host.service.sockets["incus"].parent
        device = ("guestapi", "disk", f"source={source}", "path=/dev/guestapi")
        client("--project", "strict", "profile", "device", "add", "default", *device)
        # The raw.lxc of these tests is possible only without the restriction.
        client("project", "set", "strict", "restricted=false")
        client("--project", "strict", "profile", "set", "default", "raw.lxc", "lxc.cgroup.relative=1")
        with host.launched("strict", project="strict"):
            client("--project", "strict", "profile", "unset", "default", "raw.lxc")
            client("project", "set", "strict", "restricted=true")
            assert host.ask("strict", "/1.0", method="PATCH", body='{"state": "Ready"}', project="strict").status == 200
            host.wait(lambda: "strict in project strict: its readiness is not taken" in host.service.log.read_text())
            assert json.loads(host.ask("strict", "/1.0", project="strict").text)["state"] == "Ready"
            for state, shown in (("Started", "Running"), ("Ready", "Ready")):
                host.ask(c1, "/1.0", method="PATCH", body=json.dumps({"state": state}))
                host.wait(partial(host.shows, c1, shown))
            assert host.service.log.read_text().count("its readiness is not taken") == 1
    finally:
        client("project", "delete", "strict", check=False)


@pytest.mark.parametrize("host", ["incus"], indirect=True)
def test_readiness_reported_to_the_daemon_is_mirrored(host: MirrorHost) -> None:
    """Readiness that a guest reports to Incus itself is mirrored; LXD's guests cannot report it."""
    with host.launched("told"):
        host.ask_daemon("told", "/1.0", method="PATCH", body='{"state": "Ready"}')
        host.wait(lambda: json.loads(host.ask("told", "/1.0").text)["state"] == "Ready")


def test_backup_with_the_same_uuid(host: MirrorHost) -> None:
    """An instance and its imported backup, which have the same UUID, each get their own configuration."""
    with host.launched("origin", "-c", "user.me=origin"):
        backup = "/var/cache/origin.tar"
        host.daemon.client("export", "origin", backup, "--instance-only", "--compression", "none")
        host.daemon.client("import", backup, "again")
        try:
            host.daemon.client("config", "set", "again", "user.me=again")
            host.daemon.client("start", "again")
            both = [host.daemon.query(f"/1.0/instances/{name}")["config"] for name in ("origin", "again")]
            assert both[0]["volatile.uuid"] == both[1]["volatile.uuid"]
            for name in ("origin", "again"):
                host.until(name, "/1.0/config/user.me", name)
        finally:
            host.daemon.client("delete", "--force", "again")
        assert host.ask("origin", "/1.0/config/user.me").text == "origin"


def test_images_are_the_daemons(host: MirrorHost, c1: str, tmp_path: Path) -> None:
    """An instance that may export images gets the daemon's public ones from guestapi, byte for byte, and no others."""
    for name, content in (("metadata.tar", b"metadata.yaml"), ("rootfs.tar", b"rootfs/etc/hostname")):
        with tarfile.open(tmp_path / name, "w") as tar:
            member = tarfile.TarInfo(content.decode())
            text = b'{"architecture": "x86_64", "creation_date": 1}'
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    split = host.daemon.import_image("split", tmp_path / "metadata.tar", tmp_path / "rootfs.tar")
    unified = host.daemon.query("/1.0/images/aliases/busybox")["target"]
    get = (
        "curl -s --max-time 20 -D - -o /tmp/image --unix-socket {} http://x/1.0/images/{}/export; sha256sum /tmp/image"
    )

    def exported(socket: str, fingerprint: str) -> list[str]:
        """Return status, Content-Disposition and hash of a response."""
        lines = host.daemon.run(c1, "/bin/busybox", "sh", "-c", get.format(socket, fingerprint)).splitlines()
        return [lines[0].split()[1], *(line for line in lines if line.startswith("Content-Disposition")), lines[-1]]

    def is_exported(fingerprint: str) -> bool:
        """Return whether guestapi exports the image."""
        return exported(OURS, fingerprint)[0] == "200"

    assert exported(OURS, unified)[0] == "403"
    host.daemon.client("config", "set", c1, f"{DIALECTS[host.daemon.kind].images_switch}=true")
    host.wait(lambda: exported(OURS, unified)[0] == "404")
    for fingerprint in (unified, split):
        host.daemon.query(f"/1.0/images/{fingerprint}", "PATCH", {"public": True})
        host.wait(partial(is_exported, fingerprint))
    assert exported(OURS, unified) == exported(host.theirs, unified)
    assert exported(OURS, unified)[-1].startswith(unified)
    with view(host.service.settings.store.url) as store:
        known = {image.fingerprint: [file.extension for file in image.files] for image in list_images(store)}
    assert known == {unified: [".tar"], split: [".tar", ".tar"]}
    host.daemon.query(f"/1.0/images/{unified}", "PATCH", {"public": False})
    host.wait(lambda: exported(OURS, unified)[0] == "404")
    host.daemon.client("image", "delete", "split")
    host.wait(lambda: exported(OURS, split)[0] == "404")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_daemon_that_stops_and_starts(host: MirrorHost, c1: str, ending: signal.Signals) -> None:
    """Without the daemon, guestapi answers from the last known state and check reports it; then it catches up."""
    host.ask(c1, "/1.0", method="PATCH", body='{"state": "Ready"}')
    if host.daemon.kind == "incus":
        host.wait(lambda: host.status(c1) == "Ready")
    with ContainerShell(host, c1) as inside:
        inside.ask("/1.0/config/user.foo")
        host.daemon.kill(ending)
        try:
            assert "is lost" in host.mirror.status("is lost")
            (finding,) = (one for one in host.findings() if one["check"] == f"mirror {host.daemon.kind}")
            assert not finding["ok"]
            assert "as last known" in finding["text"]
            assert inside.ask("/1.0/config/user.foo") == "bar"
        finally:
            host.daemon.start()
    host.mirror.status("follows")
    host.daemon.client("config", "set", c1, f"user.away={ending}")
    host.until(c1, "/1.0/config/user.away", str(int(ending)))
    (finding,) = (one for one in host.findings() if one["check"] == f"mirror {host.daemon.kind}")
    assert finding["ok"], finding
    # Incus itself resets it at its start.
    state = "Started" if host.daemon.kind == "incus" else "Ready"
    assert json.loads(host.ask(c1, "/1.0").text)["state"] == state


def test_changes_while_the_mirror_is_down(host: MirrorHost, c1: str) -> None:
    """A mirror that was killed finds the changes at its next start, and listeners receive them as events."""
    with Heard(host, c1, OURS) as ours:
        begin(host, c1, ours)
        host.mirror.kill()
        host.daemon.client("config", "set", c1, "user.missed=1")
        host.daemon.client("init", "busybox", "meanwhile")
        host.mirror.start()
        assert ours.until("user.missed", "1") == [("config", {"key": "user.missed", "old_value": "", "value": "1"})]
        host.wait(lambda: host.instance("meanwhile") is not None)
        host.mirror.kill()
        host.daemon.client("delete", "meanwhile")
        host.mirror.start()
        host.wait(lambda: host.instance("meanwhile") is None)


def test_many_instances(host: MirrorHost) -> None:
    """Each of 20 instances, created one after another, has its own configuration and a profile's change, or gets it."""
    names = [f"many{number}" for number in range(20)]
    # To start one takes the daemon longest. Others have their starts in the tests above.
    running = names[::4]
    for name in names:
        document = {"name": name, "source": {"type": "image", "alias": "busybox"}, "config": {"user.me": name}}
        host.daemon.query("/1.0/instances", "POST", document)
        if name in running:
            host.daemon.query(f"/1.0/instances/{name}/state", "PUT", {"action": "start", "timeout": 30})
    for name in running:
        with ContainerShell(host, name) as inside:
            assert inside.ask("/1.0/config/user.me") == name
    host.daemon.client("profile", "set", "default", "user.all=1")
    for name in names:
        host.settle(name)
    # The instances end with their daemon after this test.
