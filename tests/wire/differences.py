"""Every intended difference between the recordings and this service, with its reason.

Everything else must be equal. The first rule that fits a case applies. ``change`` replaces the recorded responses by
the expected ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tests.wire import recordings
from tests.wire.recordings import Case

Responses = list[dict[str, Any]]

#: A body that is one sentence in guestapi's own words, followed by LF.
SENTENCE = "<one sentence>\n"


@dataclass(frozen=True)
class Difference:
    """A rule: which recorded cases differ, what is expected in their place, and why."""

    cases: str
    reason: str
    status: int | None = None
    body: str | None = None
    closed: bool | None = None
    ready_after: bool | None = None
    type: str | None = None
    nosniff: bool | None = None
    #: The expected state where the recorded one is empty.
    state: str | None = None
    #: The expected responses, in place of all recorded ones.
    replaces: Responses | None = None
    #: The number of responses before the one that differs.
    after: int = 0
    applies: Callable[[Case], bool] = field(default=lambda _case: True)

    def fits(self, case: Case) -> bool:
        """Whether this rule applies to `case`."""
        return any(fnmatchcase(case.name, pattern) for pattern in self.cases.split()) and self.applies(case)

    def change(self, responses: Responses) -> Responses:
        """Return the expected responses."""
        if self.replaces is not None:
            return self.replaces
        if self.state is not None:
            state = f'"state":"{self.state}"'
            return [{**one, "body": one["body"].replace('"state":""', state)} for one in responses]
        if self.status is None and self.body is None:
            return responses
        changed = dict(responses[self.after]) if responses else {}
        if self.status is not None:
            changed = {"status": self.status, "type": "text/plain; charset=utf-8", "nosniff": True}
        changed["body"] = self.body or ""
        if self.type is not None:
            changed["type"] = self.type
        if self.nosniff is not None:
            changed["nosniff"] = self.nosniff
        return [*responses[: self.after], changed, *([] if self.closed else responses[self.after + 1 :])]


def _read_by_another_method(case: Case) -> bool:
    """Whether Incus ran the read for a method that the endpoint does not offer, or tried to for a missing image."""
    known = case.name.endswith("-image") and case.expected[0]["type"] == "application/json"
    return case.method not in ("GET", "HEAD") and (case.expected[0]["status"] == 200 or known)


def _method_body(case: Case) -> str:
    return f'method "{case.method}" not allowed\n'


_METHODS = (
    "put-* post-* delete-* options-* trace-* foo-* lowerget-* mixedget-* "
    "patch-root patch-config patch-key patch-devices patch-metadata patch-image image-post image-put"
)

_NO_SUCH_IMAGE = (
    '{"type":"error","status":"","status_code":0,"operation":"","error_code":404,'
    '"error":"Image \\"%\\" not found","metadata":null}\n'
)

_OWN_WORDS = "Go's text of JSON and I/O errors; guestapi's text states what to send instead"
_MALFORMED = (
    "malformed HTTP: the same status and close, but the body is a sentence, with nosniff as in every other error"
)

RULES = [
    Difference(
        "connect-root connect-config connect-image",
        "405 for a method that is not offered, also CONNECT",
        405,
        "<method>",
        closed=True,
    ),
    Difference(_METHODS, "405 with Allow where Incus runs the read", 405, "<method>", applies=_read_by_another_method),
    Difference(
        "image-percent",
        "a percent sign is no wildcard: the same 404 as for any other image that a guest may not export",
        404,
        _NO_SUCH_IMAGE,
        type="application/json",
    ),
    Difference("head-api", "HEAD is implied by GET", 200, "", type="application/json", nosniff=False),
    Difference(
        "get-*-gone",
        "the text for a caller that has exited contains no path of the host",
        500,
        "pid not in container?\n",
    ),
    Difference("patch-array patch-number-state patch-array-state patch-big-number", _OWN_WORDS, 400, SENTENCE),
    Difference("patch-bad-json-* patch-empty-body patch-space-body patch-deep", _OWN_WORDS, 400, SENTENCE),
    # Python's JSON decoder stops at its own nesting depth, Go's at 10000.
    Difference("patch-deep-field", _OWN_WORDS, 400, SENTENCE),
    Difference("patch-big-body", "bodies are limited to 64 KiB", 413, SENTENCE, closed=True),
    Difference("get-unread-body-100k", "bodies are limited to 64 KiB, read or not", 413, SENTENCE, closed=True),
    Difference("get-unread-body-400k", "bodies are limited to 64 KiB, read or not", 413, SENTENCE, closed=True),
    Difference("patch-short-body-3s", _OWN_WORDS, 400, SENTENCE),
    Difference(
        "patch-early-json-short-body",
        "an incomplete body is refused, even after complete JSON",
        400,
        SENTENCE,
        ready_after=False,
    ),
    Difference("cl-te", "Content-Length with Transfer-Encoding is refused (RFC 9112, 6.1)", 400, SENTENCE, closed=True),
    Difference("two-cl-same", "a second Content-Length is refused, also an equal one", 400, SENTENCE, closed=True),
    Difference("header-fold", "folded header lines are refused (RFC 9112, 5.2)", 400, SENTENCE, closed=True),
    Difference("te-bad-chunk", "guestapi's own text", 400, SENTENCE, closed=True),
    Difference("second-request-partial", _MALFORMED, 400, SENTENCE, closed=True, after=1),
    Difference("te-gzip", _MALFORMED, 501, SENTENCE, closed=True),
    Difference("http20 http30", _MALFORMED, 505, SENTENCE, closed=True),
    Difference("h2-preface", "as all malformed HTTP; Go sends an empty body here", 400, SENTENCE, closed=True),
    Difference("expect-bad", "as all malformed HTTP; Go sends an empty body here", 417, SENTENCE, closed=True),
    Difference("url-64k url-1000k url-1100k", "the request line is limited to 16 KiB", 414, SENTENCE, closed=True),
    Difference("header-64k header-1000k header-1100k", "a field is limited to 16 KiB", 431, SENTENCE, closed=True),
    Difference("many-headers-[45]*", "a head is limited to 128 fields", 431, SENTENCE, closed=True),
    Difference(
        "*",
        _MALFORMED,
        400,
        SENTENCE,
        closed=True,
        applies=lambda case: bool(case.expected) and case.expected[-1].get("body", "").startswith("400 Bad Request"),
    ),
]


_NO_LXD_IMAGE = (
    '{"type":"error","status":"","status_code":0,"operation":"","error_code":404,'
    '"error":"Image not found","metadata":null}\n\n'
)
_LXD_METHODS = (
    "put-* post-* delete-* options-* trace-* foo-* lowerget-* mixedget-* "
    "patch-root patch-config patch-key patch-devices patch-metadata patch-image image-post"
)


def _tells_state(case: Case) -> bool:
    return any('"state":""' in response.get("body", "") for response in case.expected)


LXD_RULES = [
    Difference(
        "connect-root connect-api connect-config connect-key connect-devices connect-metadata connect-image",
        "405 for a method that is not offered, also CONNECT",
        405,
        "<method>",
        closed=True,
    ),
    Difference("connect-unknown", "data after CONNECT is not read as a request (RFC 9110, 9.3.6)", closed=True),
    Difference(
        _LXD_METHODS, "405 with Allow where LXD runs the read", 405, "<method>", applies=_read_by_another_method
    ),
    Difference(
        "get-*",
        "the text for a caller that has exited contains no path of the host",
        500,
        "pid not in container?\n",
        applies=lambda case: case.sender == "gone",
    ),
    Difference(
        "get-api",
        "a nested PID namespace belongs to its instance",
        200,
        '{"state":"Started","api_version":"1.0","instance_type":"container","location":"none"}\n',
        type="application/json",
        nosniff=False,
        applies=lambda case: case.sender == "pidns",
    ),
    Difference(
        "get-metadata",
        "a nested PID namespace belongs to its instance",
        200,
        "#cloud-config\ninstance-id: 00000000-0000-0000-0000-000000000000\nlocal-hostname: c1\n",
        type="application/octet-stream",
        nosniff=False,
        applies=lambda case: case.sender == "pidns",
    ),
    Difference(
        "image-percent",
        "a percent sign is no wildcard: the same 404 as for any other image that a guest may not export",
        404,
        _NO_LXD_IMAGE,
        type="application/json",
    ),
    Difference(
        "image-true-public-1",
        "the whole fingerprint is needed, because abbreviated ones would reveal which images exist",
        404,
        _NO_LXD_IMAGE,
        type="application/json",
    ),
    Difference(
        "image-secret",
        "the same 404 as for a missing image, because another text would reveal that a private image exists",
        404,
        _NO_LXD_IMAGE,
        type="application/json",
    ),
    Difference(
        "image-project",
        "a guest cannot choose a project; unknown parameters are ignored",
        200,
        recordings.public_image(recordings.load("lxd-5.0.2")).decode("latin-1"),
        type="application/octet-stream",
        nosniff=False,
    ),
    Difference("image-range-bad", "a refusal has a Content-Length, so the connection stays open", closed=False),
    Difference(
        "patch-expect-continue",
        "the body is read, because its state is stored",
        replaces=[
            {"status": 100},
            {
                "status": 200,
                "type": "application/json",
                "body": '{"state":"Started","api_version":"1.0","instance_type":"container","location":"none"}\n',
            },
        ],
        closed=False,
        ready_after=False,
    ),
    Difference(
        "patch-ready* patch-trailing patch-two-objects",
        "the state is stored; LXD 5.0 has none",
        state="Ready",
        ready_after=True,
        applies=_tells_state,
    ),
    Difference(
        "patch-*", "the state is stored; LXD 5.0 has none", state="Started", ready_after=False, applies=_tells_state
    ),
    Difference("*", "the response has the state; LXD 5.0 has none", state="Started", applies=_tells_state),
    Difference("header-fold", "folded header lines are refused (RFC 9112, 5.2)", 400, SENTENCE, closed=True),
    Difference("http20 http30", _MALFORMED, 505, SENTENCE, closed=True),
    Difference("h2-preface", "as all malformed HTTP; LXD redirects it", 400, SENTENCE, closed=True),
    Difference("expect-bad", "as all malformed HTTP; Go sends an empty body here", 417, SENTENCE, closed=True),
    Difference("url-1000k url-1052k", "the request line is limited to 16 KiB", 414, SENTENCE, closed=True),
    Difference("header-1052k header-1100k", "a field is limited to 16 KiB", 431, SENTENCE, closed=True),
    Difference("many-headers-*", "a head is limited to 128 fields", 431, SENTENCE, closed=True),
    Difference(
        "*",
        _MALFORMED,
        400,
        SENTENCE,
        closed=True,
        applies=lambda case: bool(case.expected) and case.expected[-1].get("body", "").startswith("400 Bad Request"),
    ),
]


def expected(rules: list[Difference], case: Case) -> tuple[Responses, bool, bool | None]:
    """Return the expected responses, whether the connection is then closed, and the expected readiness after it."""
    for rule in rules:
        if rule.fits(case):
            responses = rule.change(case.expected)
            if responses and responses[0].get("body") == "<method>":
                responses[0]["body"] = _method_body(case)
            closed = case.closed if rule.closed is None else rule.closed
            ready = case.ready_after if rule.ready_after is None else rule.ready_after
            return responses, closed, ready
    return case.expected, case.closed, case.ready_after
