"""With real Incus 6 and 7 and LXD: everything that they accept is mirrored, except parts that the store refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from guestapi.dialects import DIALECTS
from tests.harness.mirroring import beside
from tests.mirror.host import MirrorHost

pytestmark = pytest.mark.root

#: A key that is longer than the store accepts, and keys that an earlier version refused.
TOO_LONG = "user." + "x" * 2000
LONG, CONTROL = "user." + "k" * 300, "user.a\x07\x1b[2Jb"
#: Bytes of a large value. Incus 7 refuses requests of several mebibytes.
LARGE = {"incus": 3 << 20, "incus-7": 128 << 10, "lxd": 3 << 20}


@pytest.fixture(scope="module", params=["incus", "incus-7", "lxd"])
def host(request: pytest.FixtureRequest) -> Iterator[MirrorHost]:
    """A daemon of each kind, for all tests."""
    with beside(request.param) as (daemon, service, mirror):
        yield MirrorHost(daemon, service, mirror)


def configure(host: MirrorHost, path: str, **config: str) -> None:
    """Set keys by the daemon's API, which accepts any; an empty value unsets."""
    document = host.daemon.query(path)
    document["config"] = {key: value for key, value in {**document["config"], **config}.items() if value}
    host.daemon.query(path, "PUT", document)


def left_out(host: MirrorHost) -> list[str]:
    """Return the findings of `guestapi check` about parts that are left out."""
    return [one["text"] for one in host.findings() if one["check"] == f"source {host.daemon.kind}"]


def test_unusual_keys_of_an_instance(host: MirrorHost) -> None:
    """Long keys, control characters and large values are served; only a key that is too long is left out, and named."""
    switch = DIALECTS[host.daemon.kind].switch
    with host.launched("odd", "-c", "user.secret=1"):
        configure(host, "/1.0/instances/odd", **{LONG: "long", CONTROL: "control", TOO_LONG: "x"})
        host.until("odd", f"/1.0/config/{LONG}", "long")
        assert host.ask("odd", f"/1.0/config/{quote(CONTROL, safe='')}").text == "control"
        listed = json.loads(host.ask("odd", "/1.0/config").text)
        assert [key.removeprefix("/1.0/config/") for key in listed] == [CONTROL, LONG, "user.secret"]
        data = "#cloud-config\nruncmd: []\n# " + "x" * LARGE[host.daemon.release]
        configure(host, "/1.0/instances/odd", **{"cloud-init.user-data": data})
        host.wait(lambda: host.ask("odd", "/1.0/config/cloud-init.user-data").status == 200)
        body = host.ask("odd", "/1.0/config/cloud-init.user-data").body
        assert hashlib.sha256(body).digest() == hashlib.sha256(data.encode()).digest()
        (sentence,) = left_out(host)
        assert sentence.startswith("odd in project default: configuration key 'user.xxx")
        # A removed key is not readable, and the switch works, whatever other keys the instance has.
        configure(host, "/1.0/instances/odd", **{"user.secret": "", "cloud-init.user-data": ""})
        host.wait(lambda: host.ask("odd", "/1.0/config/user.secret").status == 404)
        configure(host, "/1.0/instances/odd", **{switch: "false"})
        host.wait(lambda: host.ask("odd", f"/1.0/config/{LONG}").status == 403)
        host.mirror.kill()
        host.mirror.start()
        configure(host, "/1.0/instances/odd", **{switch: "", TOO_LONG: ""})
        host.until("odd", f"/1.0/config/{LONG}", "long")
        host.wait(lambda: left_out(host) == [])
    host.wait(lambda: host.instance("odd") is None)


def test_invalid_key_of_a_profile(host: MirrorHost) -> None:
    """A profile's key that is too long is left out of each instance, and nothing else is, also after a restart."""
    with host.launched("p1", "-c", "user.me=p1"), host.launched("p2", "-c", "user.me=p2"):
        configure(host, "/1.0/profiles/default", **{TOO_LONG: "x", "user.shared": "1"})
        try:
            for _time in ("now", "after a restart"):
                for name in ("p1", "p2"):
                    host.until(name, "/1.0/config/user.shared", "1")
                    host.until(name, "/1.0/config/user.me", name)
                assert len(left_out(host)) == 2
                host.mirror.kill()
                host.mirror.start()
            host.daemon.client("config", "set", "p1", "user.me=changed")
            host.until("p1", "/1.0/config/user.me", "changed")
        finally:
            configure(host, "/1.0/profiles/default", **{TOO_LONG: "", "user.shared": ""})
        host.wait(lambda: left_out(host) == [])
        assert host.ask("p2", "/1.0/config/user.shared").status == 404


# Without LXD 5.0, which accepts what Incus 6 accepts: it is guestapi that leaves the value out.
@pytest.mark.parametrize("host", ["incus", "incus-7"], indirect=True)
def test_configuration_beyond_the_bound(host: MirrorHost) -> None:
    """A value beyond the size limit is left out, and its old value is not served; Incus 7 itself refuses it."""
    with host.launched("big", "-c", "user.me=big", "-c", "user.large=old"):
        host.until("big", "/1.0/config/user.large", "old")
        if host.daemon.release == "incus-7":
            with pytest.raises(AssertionError, match="request body too large"):
                configure(host, "/1.0/instances/big", **{"user.large": "x" * (17 << 20)})
            return
        configure(host, "/1.0/instances/big", **{"user.large": "x" * (17 << 20), "user.me": "still"})
        host.until("big", "/1.0/config/user.me", "still")
        assert host.ask("big", "/1.0/config/user.large").status == 404
        (sentence,) = left_out(host)
        assert "'user.large' is left out" in sentence
        assert "16777216" in sentence


@pytest.mark.parametrize("name", ["a" * 63, "x--y", "index"])
def test_names_that_the_daemon_accepts(host: MirrorHost, name: str) -> None:
    """An instance with any name that the daemon accepts is registered, with the same meta-data as the daemon's."""
    with host.launched(name, "-c", "user.me=1"):
        host.until(name, "/1.0/config/user.me", "1")
        assert host.ask(name, "/1.0/meta-data").text == host.ask_daemon(name, "/1.0/meta-data").text


def test_root_is_recorded(host: MirrorHost) -> None:
    """The recorded root UID is the one in the init's ID map."""
    with host.launched("root"):
        host.wait(lambda: (known := host.instance("root")) is not None and known.running)
        known = host.instance("root")
        assert known is not None
        assert known.init is not None
        inside, outside, _count = Path(f"/proc/{known.init.pid}/uid_map").read_text().split()[:3]
        assert inside == "0"
        assert known.init.root_uid == int(outside)


def test_name_of_another_owner(host: MirrorHost) -> None:
    """An instance with the name of one that was added by hand is a problem until that one is removed."""
    host.service.command("instance", "add", "taken", "--config", "user.me=hand")
    with host.launched("taken", "-c", "user.me=daemon"):
        host.wait(lambda: any("taken in project default: it is not registered" in text for text in left_out(host)))
        assert host.ask("taken", "/1.0/config/user.me").status == 500
        (known,) = (one for one in [host.instance("taken")] if one is not None)
        assert (known.source, known.config) == (None, {"user.me": "hand"})
        host.service.command("instance", "remove", "taken")
        host.daemon.client("config", "set", "taken", "user.now=1")
        host.until("taken", "/1.0/config/user.me", "daemon")
        host.wait(lambda: left_out(host) == [])
