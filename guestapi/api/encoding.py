"""JSON as Go's encoding/json writes it: compact, and an LF at the end."""

from __future__ import annotations

import msgspec

JSON = "application/json"


def encode(document: object, *, html: bool = False) -> bytes:
    """`document` in the order given; with `html`, escaped as encoding/json does by default, for browsers."""
    # Go escapes these two line separators always; outside strings they cannot stand.
    text = msgspec.json.encode(document).replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029")
    if html:
        for character in b"<>&":
            text = text.replace(bytes([character]), b"\\u%04x" % character)
    return text + b"\n"


def quote(text: str) -> str:
    r"""`text` in double quotes, with anything unprintable escaped, as Go's %q writes it (``a"b`` is ``"a\"b"``)."""
    return '"' + "".join(map(_quote_character, text)) + '"'


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
