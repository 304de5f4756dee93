"""Conditional requests, read from header fields and query by pure functions.

The ETag of a representation is a hash of its bytes, so one ETag never names two contents: not after a restart, not
after a restore, and not in another worker.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from urllib.parse import unquote_plus

from guestapi.api.errors import BadRequest

#: The longest time that a request may wait, in seconds.
LONGEST_WAIT = 60

#: RFC 9110, section 8.8.3. Any entity tag, and what may stand between two in a list (section 5.6.1).
_TAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')
_LIST = re.compile(rf"[ \t]*(?:{_TAG.pattern}[ \t]*)?(?:,[ \t]*(?:{_TAG.pattern}[ \t]*)?)*")
_SECONDS = re.compile(r"[1-9][0-9]?")
#: ``wait``, each letter percent-encoded.
_LONGEST_NAME = 12


def etag(content: bytes) -> str:
    """Return the ETag of a representation: the SHA-256 of its bytes."""
    return f'"{hashlib.sha256(content).hexdigest()}"'


def tags_of(environ: Mapping[str, str]) -> frozenset[str] | None:
    """Return the tags of If-None-Match, without ``W/``; ``*`` alone for any; None if the field is absent.

    Args:
        environ: the request's header fields, named as in WSGI.

    Raises:
        BadRequest: the field is not a list of tags.
    """
    found = _listed(environ.get("HTTP_IF_NONE_MATCH"), "If-None-Match")
    return None if found is None else frozenset(tag for _weak, tag in found)


def strong_tags_of(environ: Mapping[str, str]) -> frozenset[str] | None:
    """Return the tags of If-Match; ``*`` alone for any; None if the field is absent.

    Weak tags are left out: none of them matches, by strong comparison (RFC 9110, section 13.1.1).

    Args:
        environ: the request's header fields, named as in WSGI.

    Raises:
        BadRequest: the field is not a list of tags.
    """
    found = _listed(environ.get("HTTP_IF_MATCH"), "If-Match")
    return None if found is None else frozenset(tag for weak, tag in found if not weak)


def _listed(field: str | None, name: str) -> list[tuple[str, str]] | None:
    """The tags of a field in order, each with ``W/`` before it or not."""
    if field is None:
        return None
    if field.strip(" \t") == "*":
        return [("", "*")]
    found = _TAG.findall(field) if _LIST.fullmatch(field) else []
    if not found:
        raise BadRequest(f'{name} is not a list of tags; send them with their quotes, like "5d41", or *')
    return found


def matches(tags: frozenset[str] | None, tag: str) -> bool:
    """Tell whether tags of `tags_of` or `strong_tags_of` name a representation."""
    return tags is not None and (tag in tags or "*" in tags)


def wait_of(query: str) -> int:
    """Return how many seconds the client waits by ``wait=``; 0 if it does not.

    Args:
        query: the request's, percent-encoded.

    Raises:
        BadRequest: it is not a whole number from 1 to 60, or is there twice.
    """
    found: list[str] = []
    if "w" in query or "%" in query:
        for pair in query.split("&"):
            name, _equals, value = pair.partition("=")
            if name == "wait" or ("%" in name and len(name) <= _LONGEST_NAME and unquote_plus(name) == "wait"):
                found.append(value)
    if not found:
        return 0
    if len(found) > 1:
        raise BadRequest("wait is there twice; send it once")
    given = unquote_plus(found[0]) if len(found[0]) <= _LONGEST_NAME else ""
    if not _SECONDS.fullmatch(given) or int(given) > LONGEST_WAIT:
        raise BadRequest(f"wait is not a whole number of seconds from 1 to {LONGEST_WAIT}")
    return int(given)
