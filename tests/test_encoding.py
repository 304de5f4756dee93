"""JSON and quoted text as Go writes them, which clients expect."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.encoding import json_line, quote, text_to_json, to_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", '""'),
        ("Ready?", '"Ready?"'),
        ('a"b', r'"a\"b"'),
        ("a\\b", r'"a\\b"'),
        ("a'b", '"a\'b"'),
        ("\a\b\f\n\r\t\v", r'"\a\b\f\n\r\t\v"'),
        ("\0\x1b\x7f", r'"\x00\x1b\x7f"'),
        ("\x80\x9f\xa0\xad", r'"\u0080\u009f\u00a0\u00ad"'),
        ("\u200b\u2028\ufeff\ue000", r'"\u200b\u2028\ufeff\ue000"'),
        ("\U000e0001\U0010ffff", r'"\U000e0001\U0010ffff"'),
        ("é☃😀\ufffd", '"é☃😀\ufffd"'),
    ],
)
def test_quote(text: str, quoted: str) -> None:
    r"""Text is quoted as by Go's %q: short escapes, \x below 0x80, \u and \U; printable text is unchanged."""
    assert quote(text) == quoted


@given(TEXT)
def test_quote_is_one_printable_line(text: str) -> None:
    """Quoted text is one printable line, and can be read back unchanged."""
    quoted = quote(text)
    assert quoted.isprintable()
    # Go's escapes have the same meaning in Python.
    assert eval(quoted, {"__builtins__": {}}) == text


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([], b"[]\n"),
        (["/1.0"], b'["/1.0"]\n'),
        ({"b": "1", "a": {"d": "", "c": "2"}}, b'{"b":"1","a":{"d":"","c":"2"}}\n'),
        (["<b>&</b>"], b'["<b>&</b>"]\n'),
        (["é☃😀"], '["é☃😀"]\n'.encode()),
        (["\u2028\u2029"], b'["\\u2028\\u2029"]\n'),
        ({"\u2028": "x"}, b'{"\\u2028":"x"}\n'),
        (['"\\/'], b'["\\"\\\\/"]\n'),
        (["\n\r\t\x01\x1f\x7f"], b'["\\n\\r\\t\\u0001\\u001f\x7f"]\n'),
    ],
)
def test_encode(document: object, expected: bytes) -> None:
    """JSON is compact, in the given order, without HTML escaping, ends with LF; U+2028 and U+2029 are escaped."""
    assert json_line(document) == expected


@given(st.dictionaries(TEXT, st.lists(TEXT, max_size=3), max_size=3))
def test_encode_round_trip(document: dict[str, list[str]]) -> None:
    """Any text can be read back from the JSON unchanged, and a document is one line."""
    encoded = json_line(document)
    assert json.loads(encoded) == document
    assert encoded.count(b"\n") == 1


@given(st.dictionaries(TEXT, st.one_of(TEXT, st.dictionaries(TEXT, TEXT, max_size=3)), max_size=4), st.booleans())
def test_log_and_responses_have_one_encoding(document: dict[str, object], html: bool) -> None:
    """`text_to_json`, which loads no library, gives the same bytes as `to_json`."""
    assert text_to_json(document, html=html) == to_json(document, html=html)
