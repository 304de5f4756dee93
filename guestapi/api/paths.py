"""Request targets (RFC 9112, section 3.2) and paths, as Go's net/http takes them, whose clients are ours.

Pure functions over the raw, still percent-encoded target. A ``%2F`` inside a segment is part of the segment: paths
are split first and decoded after.
"""

from __future__ import annotations

import re
from posixpath import normpath
from urllib.parse import unquote_to_bytes

#: RFC 3986, section 3: scheme, and authority of user, host and port; what follows is the path.
_ABSOLUTE = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[A-Za-z0-9._~!$&'()*+,;=:-]*@)?"
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=-]*)(?::[0-9]*)?(?=[/?#]|$)"
)
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def split_target(target: str) -> tuple[str, str] | None:
    """Path and query of a request target in origin form or absolute form; None if it is neither.

    Args:
        target: one character for each byte (ISO 8859-1), as WSGI has strings.

    Returns:
        The path, still percent-encoded and possibly empty, and the query without its question mark.
    """
    if not target.startswith("/"):
        found = _ABSOLUTE.match(target)
        if found is None:
            return None
        target = target[found.end() :]
        if target and target[0] not in "/?":
            return None
    path, _, query = target.partition("?")
    return None if _BAD_ESCAPE.search(path) else (path, query)


def clean(path: str) -> str:
    """The canonical form of a path: no empty, ``.`` or ``..`` segments; a trailing slash stays. Nothing is decoded."""
    # normpath keeps two leading slashes, which POSIX lets mean something else; here they do not.
    cleaned = normpath("/" + path.lstrip("/"))
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned


def is_clean(path: str) -> bool:
    """Whether `clean` would leave the path as it is. Most are, and this is quicker than to clean them."""
    if path[:1] != "/" or "//" in path:
        return False
    return "/." not in path or clean(path) == path


def decode_segment(segment: str) -> str:
    """A percent-decoded segment. Bytes that are no UTF-8 become U+FFFD, which no key holds."""
    if "%" not in segment and segment.isascii():
        return segment
    return unquote_to_bytes(segment.encode("latin-1")).decode("utf-8", "replace")
