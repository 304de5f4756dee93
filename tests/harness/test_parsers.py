"""The harness has at least two versions of the parser, and tests run with each."""

from __future__ import annotations

import guestapi.http.request
from guestapi.http.request import parse_head
from guestapi.settings import LimitSettings
from tests.harness import parsers


def test_two_versions_are_tested() -> None:
    """Tests run with the locked version, and with another one that pyproject.toml allows."""
    assert len(parsers.find_parsers()) >= 2, "'make test' and 'make test-fast' call tools/parsers; call it yourself"


def test_each_version_is_used(parser: parsers.ParserVersion) -> None:
    """The module that parses heads uses the given version."""
    given = parsers.load(parser)
    assert given.__version__ == parser.version
    assert vars(guestapi.http.request)["ParseError"] is given.ParseError
    head = parse_head(b"GET /1.0 HTTP/1.1\r\nHost: x\r\n\r\n", LimitSettings())
    assert head is not None
    assert head.environ["PATH_INFO"] == "/1.0"
