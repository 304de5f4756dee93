"""Request targets (RFC 9112, section 3.2) and paths.

They are parsed as by Go's net/http, because existing clients were written for a server in Go. All functions take the
raw target, still percent-encoded. ``%2F`` in a segment belongs to the segment, so paths are split before they are
decoded.
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
    """Split a request target in origin form or absolute form.

    Args:
        target: one character for each byte (ISO 8859-1), as WSGI represents bytes.

    Returns:
        The path, still percent-encoded and possibly empty, and the query without its question mark. None if the target
        has neither form.
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


def authority(target: str) -> str:
    """Return scheme and authority of a request target in absolute form, like ``http://x``; of any other, nothing."""
    found = None if target.startswith("/") else _ABSOLUTE.match(target)
    return "" if found is None else found[0]


def clean(path: str) -> str:
    """Remove empty, ``.`` and ``..`` segments from a path. A trailing slash stays; nothing is decoded."""
    # normpath keeps two leading slashes, which POSIX gives a special meaning. They have none here.
    cleaned = normpath("/" + path.lstrip("/"))
    return cleaned + "/" if path.endswith("/") and cleaned != "/" else cleaned


def is_clean(path: str) -> bool:
    """Tell whether `clean` would return the path unchanged. This is quicker than `clean`."""
    if path[:1] != "/" or "//" in path:
        return False
    return "/." not in path or clean(path) == path


def decode_segment(segment: str) -> str:
    """Percent-decode a segment. Bytes that are not UTF-8 become U+FFFD, which no key contains."""
    if "%" not in segment and segment.isascii():
        return segment
    return unquote_to_bytes(segment.encode("latin-1")).decode("utf-8", "replace")
