"""Any bytes give a result or a refusal, and neither a traceback nor a hang; `targets` has the properties in detail."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS
from tests.http.test_request_differential import REQUESTS, mutated

#: The number of inputs for each target; some seconds in total.
EXAMPLES = {
    "requests": 1000,
    "exchange": 400,
    "attributes": 150,
    "notices": 150,
    "frames": 500,
    "settings": 500,
    "command": 150,
    "ring": 500,
    "conditions": 2000,
    "signer": 500,
}

_NUMBER = b"9" * 5000
_CHUNKED = b"PATCH /1.0 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
_ADD = b'--config\0input\0instance\0add\0c2\n[store]\nurl = "'
#: Inputs that caused a fault in the past.
FOUND = [
    ("requests", _CHUNKED + b"1 ;a\r\na\r\n0\r\n\r\n"),
    ("requests", _CHUNKED + b'0\r\n{"a: y\r\n\r\n'),
    ("requests", _CHUNKED + b"0\r\nTransfer-Encoding: x\r\n\r\n"),
    ("requests", b"GET ?a:// HTTP/1.0\r\n\r\n"),
    ("exchange", b"\0GET ?a:// HTTP/1.0\r\n\r\n"),
    ("requests", b"GET /a? HTTP/1.1\r\nHost: x\r\n\r\nGET /a?? HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("settings", b"a = " + b"[" * 5000),
    ("settings", b"a = " + _NUMBER),
    ("ring", b'{"id":"a","pid":' + _NUMBER + b"}"),
    ("ring", b'{"id":"' + b"[" * 5000),
    ("ring", b"1\0lxc\0e\xff=\xff\0h\xff\0\0"),
    ("command", b"instance\0remove\0\xff"),
    ("command", b"instance\0list\0--project\0\xff"),
    ("command", b"image\0show\0\xff"),
    ("command", b"--config\0\xff\0check"),
    ("command", b"--config\0\xff\0check\0--format\0json"),
    ("command", _ADD + b'sqlite:////a\\u0000b"\n'),
    ("command", _ADD + b'sqlite://a:b@c:x/"\n'),
]


def inputs(name: str) -> st.SearchStrategy[bytes]:
    """Inputs from a seed with replaced parts, or from a list of words."""
    target = TARGETS[name]
    word = st.sampled_from(target.words) | st.binary(max_size=3)
    words = st.lists(word, max_size=12).map(b"".join)

    @st.composite
    def patched(draw: st.DrawFn) -> bytes:
        made = bytearray(draw(st.sampled_from(target.seeds)))
        for _time in range(draw(st.integers(0, 3))):
            where = draw(st.integers(0, len(made)))
            made[where : where + draw(st.integers(0, 8))] = draw(word)
        return bytes(made)

    return patched() | words


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    """The seeds violate no property."""
    for seed in TARGETS[name].seeds:
        TARGETS[name].check(seed)


@pytest.mark.parametrize(("name", "data"), FOUND, ids=lambda value: repr(value)[:40])
def test_past_findings(name: str, data: bytes) -> None:
    """An input that caused a fault causes none now."""
    TARGETS[name].check(data)


@pytest.mark.parametrize("name", TARGETS)
def test_anything(name: str) -> None:
    """No generated input violates a property."""
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None)
    @given(inputs(name))
    def check(data: bytes) -> None:
        target.check(data)

    check()


@settings(max_examples=500, deadline=None)
@given(st.lists(REQUESTS | mutated(), min_size=1, max_size=4).map(b"".join), st.integers(0, 2))
def test_requests_on_a_connection(data: bytes, dialect: int) -> None:
    """Almost valid requests, one after another on a connection, each get a well-formed response."""
    TARGETS["requests"].check(data)
    TARGETS["exchange"].check(bytes([dialect]) + data)
