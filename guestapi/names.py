"""Checks of the names and values that may enter the store. An error says what would be right."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

from guestapi.errors import OperatorError
from guestapi.model import Device

#: What runtimes set: labels of RFC 1123, section 2.1, with underscores, which some take; 64 bytes is HOST_NAME_MAX.
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
#: What Incus and LXD take, but for one that begins like an option; they set no limit.
_PROJECT = re.compile(r"""(?!-|\.\.?\Z)[^\s/'"*\x00-\x1f\x7f-\x9f]{1,255}""")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
#: C0, DEL and C1, what Unicode calls Cc.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

#: Bytes of a name that a runtime has chosen: the longest that a directory can have (limits.h, NAME_MAX).
NAME_BYTES = 255
#: Bytes of a key, of a device's name and of an option.
KEY_BYTES = 1024
#: How many keys, devices and options of devices an instance may have in all, profiles included: each costs time in
#: every list, however short it is (1.5 µs to read, 0.7 µs to list), so that this many take 6 ms.
MOST_ENTRIES = 4096


class InvalidNameError(OperatorError):
    """A name or value cannot be taken; the text is one sentence that says what would be right."""


def check_instance(name: str) -> str:
    """Return `name` if it can name an instance: whatever LXC, Incus or podman can call a container."""
    size = len(name.encode(errors="surrogatepass"))
    if not 1 <= size <= NAME_BYTES or not name.isprintable() or "/" in name or name in (".", ".."):
        raise InvalidNameError(
            f"instance name {name[:80]!r} cannot be one",
            f"1 to {NAME_BYTES} bytes of printable characters without '/' are needed",
        )
    return name


def check_profile(name: str) -> str:
    """Return `name` if it can name a profile: as an instance, but for what a list of names would be cut at."""
    size = len(name.encode(errors="surrogatepass"))
    if not 1 <= size <= NAME_BYTES or not name.isprintable() or set(name) & set("/, ") or name[0] in "-.":
        raise InvalidNameError(
            f"profile name {name[:80]!r} cannot be one",
            f"1 to {NAME_BYTES} bytes of printable characters are needed, no blank, ',' or '/', and neither '-' nor "
            "'.' first",
        )
    return name


def check_hostname(name: str) -> str:
    """Return `name` if it can be a host name inside."""
    if not _HOST_NAME.fullmatch(name):
        raise InvalidNameError(
            f"host name {name[:80]!r} cannot be one", "1 to 64 letters, digits, '.', '-' or '_' are needed"
        )
    return name


def check_project(name: str) -> str:
    """Return `name` if it can name a project."""
    if not (_PROJECT.fullmatch(name) and is_text(name)):
        raise InvalidNameError(
            f"project {name[:80]!r} cannot be one", "1 to 255 characters are needed, no blanks, quotes, '/' or '*'"
        )
    return name


def check_key(key: str, what: str = "configuration key", *, control: bool = False) -> str:
    """Return `key` if it can be a configuration key, a device's name or one of its options.

    Args:
        key: the key.
        what: what it is, for the error.
        control: control characters may stand in it, as daemons allow; a command line does not.
    """
    if not key:
        raise InvalidNameError(f"{what}: must not be empty", "give it a name")
    if not control and _CONTROL.search(key):
        raise InvalidNameError(f"{what} {key[:40]!r}: must not have control characters", "printable ones are needed")
    _check_bytes(key, KEY_BYTES, f"{what} {key[:40]!r}")
    return key


def check_value(value: str, what: str) -> str:
    """Return `value` if it can be a value; `what` describes it for the error. `size_of` bounds the sum."""
    _check_bytes(value, None, what)
    return value


def check_config(wanted: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `wanted` if it can be an instance's configuration."""
    return {check_key(key): check_value(value, f"value of {key[:40]!r}") for key, value in wanted.items()}


def check_devices(wanted: Mapping[str, Device], *, amending: Container[str] = ()) -> dict[str, Device]:
    """Return a copy of `wanted`, without options that are empty, if it can be an instance's devices.

    Args:
        wanted: definitions by name.
        amending: names of devices that may have no type, since they amend another layer's (`store.layers`); an empty
            option of these takes the other's away.
    """
    checked: dict[str, Device] = {}
    for name, definition in wanted.items():
        check_key(name, "device name")
        amends = "type" not in definition and name in amending
        if not definition.get("type") and not amends:
            raise InvalidNameError(f"device {name[:40]!r}: a type is needed", "one like nic or disk")
        checked[name] = check_options(name, definition, keep_empty=amends)
    return checked


def check_options(name: str, definition: Device, *, keep_empty: bool = False, control: bool = False) -> Device:
    """Return a copy of the definition of device `name`, without options that are empty unless `keep_empty`."""
    return {
        check_key(option, f"option of device {name[:40]!r}", control=control): check_value(
            value, f"{name[:40]}.{option[:40]}"
        )
        for option, value in definition.items()
        # As with configuration, empty is absent.
        if value or keep_empty
    }


def size_of(config: Mapping[str, str], devices: Mapping[str, Device]) -> int:
    """How many bytes keys and values have in all."""
    mappings = (config, *devices.values(), dict.fromkeys(devices, ""))
    return sum(len(text.encode()) for mapping in mappings for pair in mapping.items() for text in pair)


def count_entries(config: Mapping[str, str], devices: Mapping[str, Device]) -> int:
    """How many keys, devices and options there are; `MOST_ENTRIES` bounds them."""
    return len(config) + len(devices) + sum(map(len, devices.values()))


def check_location(location: str) -> str:
    """Return `location` if it can be the name of the host or cluster member."""
    return check_key(location, "location")


def check_alias(alias: str) -> str:
    """Return `alias` if it can be another name of an image: not one that would pass for a fingerprint or an option."""
    check_key(alias, "alias")
    if alias.startswith("-") or _FINGERPRINT.fullmatch(alias):
        raise InvalidNameError(
            f"alias {alias[:80]!r} cannot be one", "it must not begin with '-' or be 64 hexadecimal digits"
        )
    return alias


def is_fingerprint(text: str) -> bool:
    """Whether `text` is the whole fingerprint of some image: a SHA-256 in lower case."""
    return _FINGERPRINT.fullmatch(text) is not None


def is_text(text: str) -> bool:
    """Whether `text` can be a name at all: what was not valid UTF-8 has lone surrogates in it (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_text(text: str) -> str:
    """`text` with escapes where it is not valid UTF-8, so that it can be written anywhere."""
    return text.encode(errors="backslashreplace").decode()


def check_uuid(text: str) -> str:
    """Return the UUID in its canonical form (RFC 9562)."""
    # PERF: loaded here, since most commands need none.
    import uuid

    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidNameError(f"uuid {text[:80]!r} is none", f"a UUID like {uuid.UUID(int=0)} is needed") from None


def _check_bytes(text: str, limit: int | None, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # What the shell passed was not valid UTF-8: Python smuggles such bytes as lone surrogates (PEP 383).
        raise InvalidNameError(f"{what}: must be valid UTF-8") from None
    if limit is not None and size > limit:
        raise InvalidNameError(f"{what}: {size} bytes are too long", f"at most {limit} are possible")
