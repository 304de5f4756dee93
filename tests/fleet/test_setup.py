"""`guestapi fleet`: making and upgrading the tables, and the hosts."""

from __future__ import annotations

import pytest

from guestapi.fleet.schema import HOST_BYTES
from tests.fleet.conftest import Fleet
from tests.harness.postgresql import documented

pytestmark = pytest.mark.root


def test_init_and_upgrade(empty: Fleet) -> None:
    """A fleet is made once. What comes before and what comes again is refused, with the command that is right."""
    guestapi = empty.guestapi
    assert guestapi.fails("fleet", "upgrade").endswith("'guestapi fleet init' makes one")
    assert guestapi.fails("fleet", "host", "list") == (
        "there is no fleet in this database yet; 'guestapi fleet init' makes one"
    )
    assert guestapi.good("fleet", "init").startswith("made fleet ")
    assert "'guestapi fleet upgrade'" in guestapi.fails("fleet", "init")
    assert guestapi.good("fleet", "upgrade") == "version 2\n"
    with empty.admin() as connection:
        connection.execute("UPDATE guestapi.fleet SET version = 9")
    assert guestapi.fails("fleet", "upgrade") == (
        "the fleet has tables of version 9, this guestapi knows version 2; upgrade guestapi on this host"
    )


def test_the_commands_of_the_document(empty: Fleet) -> None:
    """The commands of docs/fleet.md make a fleet of three hosts, which log in as it says."""
    commands = [line.split() for line in documented("console").splitlines()]
    assert len(commands) == 5
    printed = [empty.guestapi.good(*words[1:]) for words in commands]
    assert printed[1] == "guestapi_host_h017\n"
    assert [line.split()[0] for line in printed[-1].splitlines()[1:]] == ["h017", "h018", "h019"]
    with empty.host("h017") as connection:
        assert connection.execute("SELECT guestapi.me()").fetchone() == ("h017",)


def test_upgrade_repairs_access(fleet: Fleet) -> None:
    """An upgrade writes functions, policies and rights anew, whatever was done to them; it keeps all rows."""
    with fleet.admin() as connection:
        connection.execute("DROP POLICY host ON guestapi.instances")
        connection.execute("GRANT EXECUTE ON FUNCTION lo_create(oid), guestapi.note(text, uuid[]) TO PUBLIC")
        connection.execute("DROP FUNCTION guestapi.release")
    assert fleet.guestapi.good("fleet", "upgrade") == "version 2\n"
    with fleet.host("h1") as connection:
        assert connection.execute("SELECT name FROM guestapi.instances").fetchall() == [("web1",)]
        for call in ("lo_create(0)", "guestapi.note('h1', '{}')"):
            assert connection.execute(
                "SELECT has_function_privilege(%s, 'EXECUTE')", (SIGNATURES[call],)
            ).fetchone() == (False,)
        assert connection.execute("SELECT guestapi.release(gen_random_uuid(), 1)").fetchone() == (False,)


SIGNATURES = {"lo_create(0)": "lo_create(oid)", "guestapi.note('h1', '{}')": "guestapi.note(text, uuid[])"}


def test_hosts(fleet: Fleet) -> None:
    """Hosts are listed with their instances, how far they are behind, and their last contact."""
    with fleet.host("h2") as connection:
        connection.execute("SELECT guestapi.contact(1, '1.0', %s)", ("tired\x1b[31m",))
    rows = [line.split() for line in fleet.guestapi.good("fleet", "host", "list").splitlines()[1:]]
    assert [row[:5] for row in rows] == [["h1", "active", "1", "1", "never"], ["h2", "active", "1", "0", "0"]]
    assert "\x1b" not in fleet.guestapi.good("fleet", "host", "list")
    listed = fleet.guestapi("fleet", "host", "list", "--format", "json").json
    assert [(one["name"], one["behind"], one["state"]) for one in listed] == [("h1", 1, "active"), ("h2", 0, "active")]


@pytest.mark.parametrize("name", ["", "H1", "h 1", "-h", "h_1", 'h"; DROP ROLE x; --', "ä", "h" * (HOST_BYTES + 1)])
def test_names_of_hosts(shared: Fleet, name: str) -> None:
    """What cannot be the name of a host is refused before it is part of any statement."""
    assert "small letters, digits" in shared.guestapi.fails("fleet", "host", "add", "--", name)


def test_a_host_twice(fleet: Fleet) -> None:
    """A host is added once; one that is not there cannot be fenced."""
    longest = "h" * HOST_BYTES
    assert fleet.guestapi.good("fleet", "host", "add", longest) == f"guestapi_host_{longest}\n"
    assert "belongs to the fleet already" in fleet.guestapi.fails("fleet", "host", "add", longest)
    assert "there is no host 'h9'" in fleet.guestapi.fails("fleet", "host", "fence", "h9")


def test_without_rights(fleet: Fleet) -> None:
    """A host's role that tries to be the administrator hears in one sentence who is needed."""
    config = fleet.guestapi.config
    url = fleet.server.url(fleet.database)
    config.write_text(config.read_text().replace(url, fleet.server.url(fleet.database, "guestapi_host_h1")))
    for words in (("upgrade",), ("host", "add", "h3"), ("host", "fence", "h2")):
        assert fleet.guestapi.fails("fleet", *words).endswith("need a superuser of PostgreSQL")


def test_unreachable(fleet: Fleet) -> None:
    """A database that cannot be reached is one sentence, without the password of the URL; so is none at all."""
    config = fleet.guestapi.config
    url = fleet.server.url(fleet.database)
    text = config.read_text()
    config.write_text(text.replace(url, "postgresql://me:geheim@127.0.0.1:1/guestapi"))
    error = fleet.guestapi.fails("fleet", "host", "list")
    assert error.startswith("the fleet at postgresql://127.0.0.1:1/guestapi cannot be reached: ")
    assert "geheim" not in error
    config.write_text(text.replace(f'url = "{url}"', ""))
    assert fleet.guestapi.fails("fleet", "init").startswith("fleet.url is not set")
    config.write_text(text.replace(url, "mysql://db"))
    assert "does not begin with postgresql://" in fleet.guestapi.fails("fleet", "init")
