"""SSH host keys that an instance publishes, as lines of known_hosts (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"). Pure.

Rule: a line is made of what was parsed and checked, never of what the instance has sent. So no value adds a marker such
as ``@cert-authority``, a name of another host, or a second line.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator

#: What a host can be called in known_hosts: a name or an address, or one in brackets with a port. No pattern.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,254}|\[[A-Za-z0-9_:][A-Za-z0-9._:-]{0,254}\]:[0-9]{1,5}")
#: For each type of a key: how many fields follow its name (RFC 4253, section 6.6; RFC 5656, section 3.1; RFC 8709).
_FIELDS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
}
_ED25519_BYTES = 32


def is_host(name: str) -> bool:
    """Whether a line of known_hosts can begin with this name."""
    return _HOST.fullmatch(name) is not None


def read_keys(value: bytes) -> tuple[list[str], int]:
    """Read public keys as ssh-keygen writes them, one a line: type, base64, and perhaps a comment.

    Args:
        value: what the instance says.

    Returns:
        The keys, each its type and base64, without comment; and how many lines are not such keys.
    """
    lines = [line for line in value.splitlines() if line.strip()]
    keys = list(filter(None, map(_read_key, lines)))
    return keys, len(lines) - len(keys)


def _read_key(line: bytes) -> str | None:
    words = line.split(maxsplit=2)
    if len(words) < 2:
        return None
    kind = words[0].decode("latin-1")
    fields = _FIELDS.get(kind)
    if fields is None:
        return None
    try:
        blob = base64.b64decode(words[1], validate=True)
        name, *rest = _strings(blob)
    except (binascii.Error, ValueError):
        return None
    if name != words[0] or len(rest) != fields or not all(rest):
        return None
    if kind == "ssh-ed25519" and len(rest[0]) != _ED25519_BYTES:
        return None
    if kind.startswith("ecdsa") and rest[0] != words[0].rpartition(b"-")[2]:
        return None
    return f"{kind} {base64.b64encode(blob).decode()}"


def _strings(blob: bytes) -> Iterator[bytes]:
    """The strings of which a key consists (RFC 4251, section 5).

    Raises:
        ValueError: it consists of something else.
    """
    position = 0
    while position < len(blob):
        end = position + 4 + int.from_bytes(blob[position : position + 4])
        if end > len(blob):
            raise ValueError("a string is cut off")
        yield blob[position + 4 : end]
        position = end
