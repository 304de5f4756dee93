"""Names and values that may enter the store, and the errors for others."""

from __future__ import annotations

import string
import unicodedata
import uuid
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestapi import names
from guestapi.names import InvalidNameError

LETTERS = string.ascii_letters + string.digits
#: Possible arguments: any character, and the lone surrogates by which Python passes invalid UTF-8.
ANYTHING = st.text(max_size=80)
ARGUMENTS = st.text(st.characters(), max_size=80)


def taken(check: Callable[[str], str], text: str) -> bool:
    """Return whether `check` accepts `text`; it must return it unchanged, or refuse it with one sentence."""
    sentence = ""
    try:
        assert check(text) == text
    except InvalidNameError as error:
        sentence = str(error)
    assert sentence.isprintable()
    return not sentence


@given(ARGUMENTS | st.text(LETTERS + "-", max_size=70))
@example("c1\n")
@example("web_q3JkLm")
@example("\ud800")
def test_instance_names(name: str) -> None:
    """An instance's name, which a runtime has chosen, is printable, without a slash, and possible for a directory."""
    good = name.isprintable() and "/" not in name and name not in ("", ".", "..")
    assert taken(names.check_instance, name) == (good and len(name.encode()) <= 255)


@pytest.mark.parametrize("name", ["0", "C1", "a" * 255, "a--b", "index-", "web_q3JkLm", "-a", "a.b", "bücher", "a b"])
def test_accepted_instance_names(name: str) -> None:
    """Every name that LXC, Incus or podman give containers is accepted."""
    assert taken(names.check_instance, name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\n", "a\0", "a" * 256, "é" * 128, "\x1b[2J", "\udcff"])
def test_refused_instance_names(name: str) -> None:
    """A name that is impossible for a directory, or not printable, is refused."""
    assert not taken(names.check_instance, name)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("web", True),
        ("web.example.org", True),
        ("a_b", True),
        ("", False),
        ("-a", False),
        ("a b", False),
        ("a" * 65, False),
        ("a\nb", False),
        ("bücher", False),
    ],
)
def test_host_names(name: str, good: bool) -> None:
    """A host name has only letters, digits, '.', '-' and '_', because it is written unquoted into YAML."""
    assert taken(names.check_hostname, name) == good


@pytest.mark.parametrize("name", ["default", "a.b_c-d", "...", "_p", "a+b@c", "é", "a" * 255])
def test_accepted_project_names(name: str) -> None:
    """Every name of a project that Incus accepts is accepted."""
    assert taken(names.check_project, name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-p", "a/b", "a b", "a'b", 'a"', "*", "p\n", "\x1b[2J", "p\x9b", "p\udcff", "a" * 256]
)
def test_refused_project_names(name: str) -> None:
    """A project's name that looks like a path, an option or a terminal's escape sequence is refused."""
    assert not taken(names.check_project, name)


@given(ARGUMENTS)
@example("\x7f")
@example("user.\x9b31m")
@example("user.\udcff")
@example("user.a/b?c=d e\u2028\U0001f600")
def test_keys(key: str) -> None:
    """A key is not empty, valid UTF-8, and without control characters; all other characters are permitted."""
    good = bool(key) and not any(unicodedata.category(character) in ("Cc", "Cs") for character in key)
    assert taken(names.check_key, key) == (good and len(key.encode()) <= 1024)


@pytest.mark.parametrize(("character", "most"), [("a", 1024), ("é", 512), ("\u20ac", 341), ("\U0001f600", 256)])
def test_keys_are_measured_in_bytes(character: str, most: int) -> None:
    """A key has up to 1,024 bytes of UTF-8, whatever the number of characters."""
    assert taken(names.check_key, character * most)
    assert not taken(names.check_key, character * (most + 1))


@given(ANYTHING)
@example("\0\r\n%s\x1b")
@example("")
def test_values_are_any_text(value: str) -> None:
    """A value is any valid UTF-8, also empty, or with control characters and NUL."""
    assert taken(lambda text: names.check_value(text, "value of 'user.a'"), value)


def test_keys_of_daemons_may_have_control_characters() -> None:
    """A key that a daemon has accepted may contain control characters; one that is typed may not."""
    assert taken(lambda key: names.check_key(key, control=True), "user.\n\x1b\x00\x9b")
    assert not taken(names.check_key, "user.\n")


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.dictionaries(st.text(), st.text())))
def test_size_is_in_bytes(config: dict[str, str], devices: dict[str, dict[str, str]]) -> None:
    """The size of a configuration is the size of all its texts in UTF-8."""
    texts = [*config, *config.values(), *devices, *(text for one in devices.values() for text in (*one, *one.values()))]
    assert names.size_of(config, devices) == len("".join(texts).encode())


def test_errors_name_the_value() -> None:
    """An error begins with the caller's name of the value, and does not quote all of a long one."""
    with pytest.raises(InvalidNameError, match=r"^value of 'user\.a': must be valid UTF-8$"):
        names.check_value("\udcff", "value of 'user.a'")
    with pytest.raises(InvalidNameError) as raised:
        names.check_key("k" * 100_000)
    assert len(str(raised.value)) < 200


@given(st.uuids())
def test_uuids_are_canonical(identity: uuid.UUID) -> None:
    """Every spelling of a UUID gives its canonical form."""
    for spelling in (str(identity), str(identity).upper(), identity.hex, identity.urn, f"{{{identity}}}"):
        assert names.check_uuid(spelling) == str(identity)


@pytest.mark.parametrize("text", ["", "1", "x" * 32, "6ba7b810-9dad-11d1-80b4-00c04fd430c", "\udcff" * 32])
def test_invalid_uuids(text: str) -> None:
    """Any other text is refused with an example."""
    with pytest.raises(InvalidNameError, match="00000000-0000-0000-0000-000000000000"):
        names.check_uuid(text)


@pytest.mark.parametrize(("location", "good"), [("node-1.example.org", True), ("", False), ("a\nb", False)])
def test_locations(location: str, good: bool) -> None:
    """A location is a printable word on one line."""
    assert taken(names.check_location, location) == good


@pytest.mark.parametrize("alias", ["debian/13", "a", "a" * 63, "g" * 64, "a-", "a" * 65])
def test_accepted_aliases(alias: str) -> None:
    """An alias is any name that is neither a fingerprint nor an option."""
    assert names.check_alias(alias) == alias


@pytest.mark.parametrize("alias", ["-", "-a", "--all", "a" * 64, "0" * 64, "", "a\n"])
def test_refused_aliases(alias: str) -> None:
    """A fingerprint, an option, and an empty or unprintable text are refused as an alias."""
    with pytest.raises(InvalidNameError):
        names.check_alias(alias)


def test_control_characters_in_options() -> None:
    """An option with a control character is accepted only from a daemon."""
    definition = {"type": "nic", "a\x01": "b"}
    assert names.check_options("eth0", definition, control=True) == definition
    with pytest.raises(InvalidNameError):
        names.check_options("eth0", definition)
    with pytest.raises(InvalidNameError):
        names.check_devices({"eth0": definition})
    assert names.check_options("eth0", {"type": "nic", "mtu": ""}) == {"type": "nic"}
    assert names.check_options("eth0", {"type": "nic", "mtu": ""}, keep_empty=True) == {"type": "nic", "mtu": ""}


def test_devices_have_a_type() -> None:
    """A device needs a type, unless it amends one of the source; empty options are left out."""
    nic = {"type": "nic", "mtu": ""}
    assert names.check_devices({"eth0": nic}) == {"eth0": {"type": "nic"}}
    for definition in ({}, {"mtu": "1500"}, {"type": ""}):
        with pytest.raises(InvalidNameError, match="a type is needed"):
            names.check_devices({"eth0": definition})
    amended = {"eth0": {"mtu": "", "name": "x"}}
    assert names.check_devices(amended, amending={"eth0"}) == amended
    with pytest.raises(InvalidNameError):
        names.check_devices(amended, amending={"eth1"})
    with pytest.raises(InvalidNameError):
        names.check_devices({"eth0": {"type": ""}}, amending={"eth0"})
    assert names.check_devices({"eth0": nic}, amending={"eth0"}) == {"eth0": {"type": "nic"}}
    with pytest.raises(InvalidNameError):
        names.check_devices({"": {"type": "nic"}})


@pytest.mark.parametrize("name", ["a", "x" * names.NAME_BYTES, "é" * (names.NAME_BYTES // 2), "a-b.c_d"])
def test_profile_names(name: str) -> None:
    """A profile may have a name of one byte, of exactly as many as are allowed, and of other letters."""
    assert names.check_profile(name) == name


@pytest.mark.parametrize("name", ["", "x" * (names.NAME_BYTES + 1), "a b", "a,b", "a/b", "-a", ".a", "a\n"])
def test_names_that_no_profile_has(name: str) -> None:
    """A name that is too long, or that a list of names would be cut at, is refused."""
    with pytest.raises(InvalidNameError):
        names.check_profile(name)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("0123456789abcdef" * 4, True),
        ("a" * 63, False),
        ("a" * 65, False),
        ("A" * 64, False),
        ("g" * 64, False),
        ("a" * 64 + "\n", False),
        ("", False),
    ],
)
def test_fingerprints(text: str, good: bool) -> None:
    """A fingerprint is 64 hexadecimal digits in lower case, and nothing else."""
    assert names.is_fingerprint(text) == good


@pytest.mark.parametrize(("text", "good"), [("é", True), ("", True), ("a\udcff", False), ("\ud800", False)])
def test_text_that_was_no_utf8(text: str, good: bool) -> None:
    """What was not valid UTF-8 is found, and can be written with escapes in its place."""
    assert names.is_text(text) == good
    assert names.is_text(names.to_text(text))
    assert (names.to_text(text) == text) == good
