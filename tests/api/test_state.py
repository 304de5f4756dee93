"""`read_state`: the body of PATCH /1.0, read as leniently as Go reads it, or refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestapi.api.errors import BadRequest
from guestapi.api.resources.state import read_state


@pytest.mark.parametrize(
    ("body", "state"),
    [
        (b'{"state":"Ready"}', "Ready"),
        (b' \t\r\n{ "state" : "Started" }\n', "Started"),
        (b'{"STATE":"Ready"}', "Ready"),
        (b'{"sTaTe":"Ready"}', "Ready"),
        ('{"ſtate":"Ready"}'.encode(), "Ready"),
        (b'{"state":"Ready","state":"Started"}', "Started"),
        (b'{"state":"Ready","STATE":"Started"}', "Started"),
        (b'{"state":"Ready","state":null}', "Ready"),
        (b'{"state":null}', ""),
        (b"{}", ""),
        (b"null", ""),
        (b'{"other":{"state":"Ready"},"x":[1,2.5e3,true,null]}', ""),
        (b'{"state":"Ready"}trailing', "Ready"),
        (b'{"state":"Ready"}{"state":"Started"}', "Ready"),
        (b'{"state":"\\u0052eady"}', "Ready"),
        (b'{"state":"\\ud83d\\ude00"}', "\U0001f600"),
        (b'{"state":"a\\ud800b"}', "a\ufffdb"),
        (b'{"state":"\\udc00\\ud800"}', "\ufffd\ufffd"),
        (b'{"state":"\\ud800"}', "\ufffd"),
        (b'{"state":"\xff"}', "\ufffd"),
        ('{"state":"\ufeffx"}'.encode(), "\ufeffx"),
        (b'{"state":""}', ""),
    ],
)
def test_read(body: bytes, state: str) -> None:
    """Names are compared without case, the last of several counts; null, other fields and a tail are ignored."""
    assert read_state(body) == state


def test_long_states_are_not_quoted() -> None:
    """A state that is much too long is refused without being quoted."""
    with pytest.raises(BadRequest) as refusal:
        read_state(b'{"state":"' + b"\xff" * 60_000 + b'"}')
    assert len(refusal.value.text) < 100


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n",
        b"Ready",
        b'"Ready"',
        b"[]",
        b'["state","Ready"]',
        b'[["state","Ready"]]',
        b"1",
        b"true",
        b"{",
        b'{"state"',
        b'{"state":"Ready"',
        b'{"state":"Ready}',
        b"{'state':'Ready'}",
        b'{"state":"Ready",}',
        b'{"state":1}',
        b'{"state":true}',
        b'{"state":["Ready"]}',
        b'{"state":{"state":"Ready"}}',
        b'{"state":1,"state":"Ready"}',
        b'{"state":NaN}',
        b'{"x":NaN,"state":"Ready"}',
        b'{"x":-Infinity,"state":"Ready"}',
        b'{"x":01,"state":"Ready"}',
        b'{"state":"a\nb"}',
        b'{"state":"\\x41"}',
        b'{"state":"\\ud8"}',
        b'\xef\xbb\xbf{"state":"Ready"}',
        b"[" * 65536,
        b'{"state":' * 7000,
        b'{"x":' + b"[" * 30000 + b"]" * 30000 + b',"state":1}',
    ],
)
def test_refused(body: bytes) -> None:
    """A body that does not begin with a JSON object, or whose state is no string, is refused in one line."""
    with pytest.raises(BadRequest) as refused:
        read_state(body)
    assert refused.value.title
    assert refused.value.title.isprintable()


def test_unknown_fields_are_skipped() -> None:
    """An unknown field is skipped, even with a number beyond any machine's range."""
    assert read_state(b'{"x":' + b"1" * 20000 + b',"state":"Ready"}') == "Ready"
    assert read_state(b'{"x":1e999999,"state":"Ready"}') == "Ready"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(["state", "State"]), inner),
    max_leaves=8,
)
PIECES = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b'"', b":", b",", b'"state"', b'"Ready"', b"null", b"\\", b"\\ud800", b"1", b"NaN"]
    )
    | st.binary(max_size=3)
).map(b"".join)


@given(st.binary() | PIECES)
@example(b'{"\\ud800":"Ready"}')
@example(b'{"state":"\\ud800\\ud800\\udc00"}')
def test_any_body_is_a_state_or_refused(body: bytes) -> None:
    """Any body gives a text that can be encoded in UTF-8, or BadRequest, and no other exception."""
    try:
        state = read_state(body)
    except BadRequest:
        return
    state.encode()
    # A state that is not empty has its name in the body, or an escape in it.
    assert state == "" or b"state" in body.lower() or b"\\u" in body


def state_of(document: object) -> str | None:
    """Return the state of a document according to the documentation of `read_state`; None if it must be refused."""
    try:
        json.dumps(document, allow_nan=False)
    except ValueError:
        return None
    if document is None:
        return ""
    if not isinstance(document, dict):
        return None
    said = [value for name, value in document.items() if name.casefold() == "state" and value is not None]
    if not all(isinstance(value, str) and len(value) <= 1024 for value in said):
        return None
    return str(said[-1]) if said else ""


@given(JSON | st.dictionaries(st.sampled_from(["state", "State", "x"]), st.none() | st.integers() | st.text()))
def test_state_of_any_document(document: object) -> None:
    """The last state of a document counts, with its name in any case; other documents are refused."""
    expected = state_of(document)
    body = json.dumps(document).encode()
    if expected is None:
        with pytest.raises(BadRequest):
            read_state(body)
    else:
        assert read_state(body) == expected


@given(st.text(st.characters(exclude_categories=["Cs"])), st.booleans())
def test_any_state_is_read_as_sent(state: str, escaped: bool) -> None:
    """Any text as the state is read unchanged, escaped or not."""
    assert read_state(json.dumps({"state": state}, ensure_ascii=escaped).encode()) == state
