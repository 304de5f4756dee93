"""Which names and values may enter the store, whoever brings them. An error says what would be right."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from guestapi.errors import OperatorError
from guestapi.model import Device

#: RFC 1123, section 2.1: letters, digits and inner hyphens, at most 63 of them (RFC 1035, section 2.3.4).
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
#: What Incus and LXD take, but for one that begins like an option; they set no limit.
_PROJECT = re.compile(r"""(?!-|\.\.?\Z)[^\s/'"*\x00-\x1f\x7f-\x9f]{1,255}""")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
#: C0, DEL and C1, what Unicode calls Cc.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")

KEY_BYTES = 255
VALUE_BYTES = 2 * 1024 * 1024


class InvalidNameError(OperatorError):
    """A name or value cannot be taken; the text is one sentence that says what would be right."""


def check_instance(name: str) -> str:
    """Return `name` if it can name an instance, which is also its host name inside."""
    if not _LABEL.fullmatch(name):
        raise InvalidNameError(f"instance name {name!r}: 1 to 63 letters, digits or inner hyphens are needed")
    return name


def check_project(name: str) -> str:
    """Return `name` if it can name a project."""
    if not (_PROJECT.fullmatch(name) and is_text(name)):
        raise InvalidNameError(f"project {name!r}: 1 to 255 characters are needed, no blanks, quotes, '/' or '*'")
    return name


def check_key(key: str, what: str = "configuration key") -> str:
    """Return `key` if it can be a configuration key, a device's name or one of its options."""
    if not key:
        raise InvalidNameError(f"{what}: must not be empty")
    if _CONTROL.search(key):
        raise InvalidNameError(f"{what} {key!r}: must not have control characters")
    _check_bytes(key, KEY_BYTES, f"{what} {key[:40]!r}")
    return key


def check_value(value: str, what: str) -> str:
    """Return `value` if it can be a value; `what` says whose, for the error."""
    _check_bytes(value, VALUE_BYTES, what)
    return value


def check_config(wanted: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of `wanted` if it can be an instance's configuration."""
    return {check_key(key): check_value(value, f"value of {key!r}") for key, value in wanted.items()}


def check_devices(wanted: Mapping[str, Device]) -> dict[str, Device]:
    """Return a copy of `wanted`, without options that are empty, if it can be an instance's devices."""
    checked: dict[str, Device] = {}
    for name, definition in wanted.items():
        check_key(name, "device name")
        if not definition.get("type"):
            raise InvalidNameError(f"device {name!r}: a type is needed, like nic or disk")
        checked[name] = {
            check_key(option, f"option of device {name!r}"): check_value(value, f"{name}.{option}")
            for option, value in definition.items()
            # As with configuration, empty is absent.
            if value
        }
    return checked


def check_location(location: str) -> str:
    """Return `location` if it can be the name of the host or cluster member."""
    return check_key(location, "location")


def check_alias(alias: str) -> str:
    """Return `alias` if it can be another name of an image: not one that would pass for a fingerprint or an option."""
    check_key(alias, "alias")
    if alias.startswith("-") or _FINGERPRINT.fullmatch(alias):
        raise InvalidNameError(f"alias {alias!r}: must not begin with '-' or be 64 hexadecimal digits")
    return alias


def is_fingerprint(text: str) -> bool:
    """Whether `text` is the whole fingerprint of some image: a SHA-256 in lower case."""
    return _FINGERPRINT.fullmatch(text) is not None


def is_text(text: str) -> bool:
    """Whether `text` can be a name at all: what was no UTF-8 has lone surrogates in it (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_uuid(text: str) -> str:
    """Return the UUID in its canonical form (RFC 9562)."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise InvalidNameError(f"uuid {text!r}: a UUID like {uuid.UUID(int=0)} is needed") from None


def _check_bytes(text: str, limit: int, what: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # What the shell passed was no UTF-8: Python smuggles such bytes as lone surrogates (PEP 383).
        raise InvalidNameError(f"{what}: must be valid UTF-8") from None
    if size > limit:
        raise InvalidNameError(f"{what}: {size} bytes are too long, at most {limit} are possible")
