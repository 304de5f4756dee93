"""JSON and quoted text as Go writes them, because existing clients read the output of a server in Go."""

from __future__ import annotations

import msgspec

#: Content-Type of JSON.
JSON = "application/json"


def to_json(document: object, *, html: bool = False) -> bytes:
    """Encode `document` as compact JSON in the order given, as Go's encoding/json does.

    Args:
        document: what msgspec can encode.
        html: whether to escape ``<``, ``>`` and ``&`` too, as encoding/json does by default.

    Returns:
        UTF-8 without a line break.
    """
    # Go always escapes these two line separators. None of the replaced characters can stand outside strings.
    text = msgspec.json.encode(document).replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
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
