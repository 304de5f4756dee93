"""JSON and quoted text as Go writes them, because existing clients read the output of a server in Go."""

from __future__ import annotations

import json
from typing import Any

#: Content-Type of JSON.
JSON = "application/json"

_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode


def to_json(document: object, *, html: bool = False) -> bytes:
    """Encode `document` as compact JSON in the order given, as Go's encoding/json does.

    Args:
        document: what msgspec can encode.
        html: whether to escape ``<``, ``>`` and ``&`` too, as encoding/json does by default.

    Returns:
        UTF-8 without a line break.
    """
    # PERF: loaded here, so that a command that only writes to the change log (`text_to_json`) does not load it.
    import msgspec

    return _escape(msgspec.json.encode(document), html)


def text_to_json(document: dict[str, Any], *, html: bool = False) -> bytes:
    """The same bytes as `to_json` gives, of a document that has nothing but strings in dictionaries; loads no library.

    Args:
        document: strings and dictionaries of strings, by strings.
        html: as of `to_json`.

    Returns:
        UTF-8 without a line break.
    """
    return _escape(_ENCODE(document).encode(), html)


def _escape(text: bytes, html: bool) -> bytes:
    # Go always escapes these two line separators. None of the replaced characters can stand outside strings.
    text = text.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    if html:
        for character in b"<>&":
            text = text.replace(bytes([character]), b"\\u%04x" % character)
    return text


def json_line(document: object, *, html: bool = False) -> bytes:
    """As `to_json`, with an LF at the end: the body of a response."""
    return to_json(document, html=html) + b"\n"


def quote(text: str) -> str:
    r"""Put `text` in double quotes and escape what is not printable, as Go's %q does (``a"b`` becomes ``"a\"b"``)."""
    return '"' + "".join(map(_quote_character, text)) + '"'


def printable(text: str) -> str:
    r"""Escape what is not printable, as `quote` does: control characters, and those that change the direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _quote_character(c) for c in text)


_SHORT = {
    '"': '\\"',
    "\\": "\\\\",
    "\a": "\\a",
    "\b": "\\b",
    "\f": "\\f",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
    "\v": "\\v",
}


def _quote_character(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
