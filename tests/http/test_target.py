"""Request targets: splitting, the clean form of a path, and the decoding of a segment."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestapi.http.target import authority, clean, decode_segment, is_clean, split_target

#: Paths of significant segments.
PATHS = st.lists(
    st.sampled_from(["", ".", "..", "...", "a", ".a", "a.", "%2F", "%2e", "é", " "]), min_size=1, max_size=8
).map(lambda segments: "/" + "/".join(segments))


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        ("/", "/", ""),
        ("/1.0/config?recursion=1", "/1.0/config", "recursion=1"),
        ("/a?b?c", "/a", "b?c"),
        ("/a?", "/a", ""),
        ("/a#b;c?d#e", "/a#b;c", "d#e"),
        ("/a%2Fb", "/a%2Fb", ""),
        ("/a?%zz", "/a", "%zz"),
        ("http://x/1.0?y", "/1.0", "y"),
        ("HTTPS+x://user@host:80/1.0", "/1.0", ""),
        ("http://x", "", ""),
        ("http://x?y", "", "y"),
        ("http:///1.0", "/1.0", ""),
    ],
)
def test_target_is_split(target: str, path: str, query: str) -> None:
    """A target in origin or absolute form is split at the first question mark, without decoding."""
    assert split_target(target) == (path, query)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("http://x/1.0?y", "http://x"),
        ("HTTPS+x://user@host:80", "HTTPS+x://user@host:80"),
        ("http:///1.0", "http://"),
        ("/1.0", ""),
        ("//x/1.0", ""),
        ("/http://x/", ""),
        ("*", ""),
        ("host:80", ""),
    ],
)
def test_authority(target: str, expected: str) -> None:
    """Scheme and authority are what stands before the path in absolute form; in any other form there are none."""
    assert authority(target) == expected


@pytest.mark.parametrize(
    "target", ["", "*", "1.0", "host:80", "?a", "http:/x", "1http://x/", "http://x#a", "/%", "/%2", "/a%g0", "/%%41"]
)
def test_target_is_refused(target: str) -> None:
    """A target that is neither a path nor an absolute URI, or has an invalid percent escape in its path, is refused."""
    assert split_target(target) is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "/"),
        ("//", "/"),
        ("//1.0", "/1.0"),
        ("///1.0", "/1.0"),
        ("/1.0//config", "/1.0/config"),
        ("/1.0/./config", "/1.0/config"),
        ("/1.0/config/.", "/1.0/config"),
        ("/1.0/config/..", "/1.0"),
        ("/1.0/config/../", "/1.0/"),
        ("/../../1.0", "/1.0"),
        ("/..", "/"),
        ("/1.0//", "/1.0/"),
        ("/a/%2e%2e/b", "/a/%2e%2e/b"),
        ("/.../..a/.b", "/.../..a/.b"),
    ],
)
def test_clean_form(path: str, expected: str) -> None:
    """Empty, `.` and `..` segments are removed; a trailing slash and escapes stay."""
    assert clean(path) == expected


@given(PATHS)
def test_clean_form_is_clean(path: str) -> None:
    """A clean path has no segment to remove, and cleaning it again changes nothing."""
    cleaned = clean(path)
    assert cleaned.startswith("/")
    assert not {"", ".", ".."} & set(cleaned[1:].rstrip("/").split("/")) or cleaned == "/"
    assert not cleaned.endswith("//")
    assert is_clean(cleaned)


@given(PATHS | st.text(st.characters(max_codepoint=255), max_size=12))
def test_is_clean_agrees_with_clean(path: str) -> None:
    """`is_clean` is true for exactly the paths that `clean` does not change."""
    assert is_clean(path) == (clean(path) == path)


@pytest.mark.parametrize(
    ("segment", "expected"),
    [
        ("user.foo", "user.foo"),
        ("user.a%2Fb", "user.a/b"),
        ("user.a%2fb", "user.a/b"),
        ("user.%2525", "user.%25"),
        ("a+b", "a+b"),
        ("user.j%C3%BC", "user.jü"),
        ("user.jÃ¼", "user.jü"),
        ("%00", "\0"),
        ("user.\xff", "user.\ufffd"),
        ("user.%ff", "user.\ufffd"),
    ],
)
def test_segment_is_decoded_once(segment: str, expected: str) -> None:
    """A segment is percent-decoded once, as UTF-8; `+` is unchanged, and invalid bytes become U+FFFD."""
    assert decode_segment(segment) == expected


@given(st.binary(max_size=20) | st.lists(st.sampled_from([b"%", b"%4", b"%41", b"%c3", b"a", b"\xa9"])).map(b"".join))
def test_segment_never_fails(raw: bytes) -> None:
    """Any bytes are decoded: each escape gives a byte, every other byte itself, and all of them are read as UTF-8."""
    decoded = re.sub(rb"%([0-9A-Fa-f]{2})", lambda escape: bytes.fromhex(escape[1].decode()), raw)
    assert decode_segment(raw.decode("latin-1")) == decoded.decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_segment_round_trip(key: str) -> None:
    """Every key that is escaped byte by byte is decoded to the same key."""
    assert decode_segment("".join(f"%{byte:02x}" for byte in key.encode())) == key
