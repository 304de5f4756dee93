"""The head of a request (RFC 9112): bytes -> WSGI environ.

One grammar decides what is a request: `_HEAD` below. gunicorn_h1c (gunicorn's C parser) only turns a head that fits the
grammar, with each line ended by CRLF, into an environ, of which only the fields are used. What a client sees does not
depend on the version of that parser: versions differ in bare LF, folds, empty lines, spaces, targets and lengths.

1. A line ends with CRLF or, as for Incus, with a bare LF. No bare CR, no NUL and no other control character but a tab
   in a field's value.
2. Request line: method, one space, target, one space, version; nothing before it, not even an empty line.
3. Field line: name, colon, value. White space neither at the beginning of the line (a fold) nor before the colon.
4. Host, Content-Length and Transfer-Encoding at most once.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from gunicorn_h1c import ParseError, parse_to_wsgi_environ

from guestapi.http.errors import ProtocolError
from guestapi.http.target import split_target
from guestapi.settings import LimitSettings

Environ = dict[str, Any]

#: RFC 9110, section 5.6.2: "token", with possessive quantifiers, so that no input makes the match slow.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
#: RFC 9112, section 3, and bytes beyond ASCII, which net/http of Go and curl send and accept.
_REQUEST_LINE = rb"(" + _TOKEN + rb") ([!-~\x80-\xff]++) (HTTP/([0-9])\.[0-9])"
_HEAD = re.compile(_REQUEST_LINE + rb"\r?\n((?:" + _TOKEN + rb":[\t -~\x80-\xff]*+\r?\n)*+\r?\n)")
_LINE = re.compile(_REQUEST_LINE + rb"\r?")
#: Fields that may stand only once: two of them can be read in two ways (RFC 9112, sections 3.2 and 6.3).
_SINGLE = (b"\nhost:", b"\ncontent-length:", b"\ntransfer-encoding:")
#: The bytes that Go's net/http accepts in Host (httpguts.ValidHostHeader): those of RFC 3986's "host" and "port".
_HOST = re.compile(r"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*")
#: A number of 15 digits fits into 64 bits.
_LENGTH = re.compile("[0-9]{1,15}")
#: The request line that the parser sees: `_HEAD` has parsed the client's.
_ANY_LINE = b"GET / HTTP/1.1\r\n"
#: How many sets of field lines are kept, and how many heads; and the most bytes of one.
KNOWN_FIELDS, KNOWN_HEADS, KNOWN_BYTES = 64, 128, 512
#: Fields of a head that gunicorn_h1c parses at most (MAX_HEADERS of its C code).
_PARSER_FIELDS = 256


class Head:
    """A parsed head: what the server needs to know of a request.

    Attributes:
        environ: the WSGI environ (PEP 3333), and ``RAW_PATH`` and ``RAW_URI`` as they were sent.
        size: bytes of the head.
        length: bytes of the body; None if it comes in chunks.
        expects: whether the client waits for ``100 Continue`` before it sends the body.
        keep_alive: whether the client may send another request on this connection.
        raw: its bytes.
        alone: the received bytes, if they are this head and nothing else and it has no body; otherwise None.
    """

    __slots__ = ("alone", "environ", "expects", "keep_alive", "length", "raw", "size")

    def __init__(
        self, environ: Environ, size: int, length: int | None, expects: bool, keep_alive: bool, raw: bytes
    ) -> None:
        self.environ = environ
        self.size = size
        self.length = length
        self.expects = expects
        self.keep_alive = keep_alive
        self.raw = raw
        self.alone: bytes | None = None


class _Meaning(NamedTuple):
    """What the field lines of a head say to the server; the attributes are those of `Head`."""

    length: int | None
    expects: bool
    keep_alive: bool


class KnownFields:
    """Field lines that came lately, parsed: a client sends the same with each request, and so do others of its kind.

    Whose they are does not matter: what is made of them depends on their bytes alone.
    """

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[Environ, dict[bool, _Meaning]]] = {}

    def parse(self, lines: bytes, limits: LimitSettings) -> tuple[Environ, dict[bool, _Meaning]]:
        """Parse field lines that fit the grammar.

        Args:
            lines: with the empty line that ends them.
            limits: sizes in bytes; the same at each call.

        Returns:
            The environ, a new one each time; and what the lines mean, by whether the request is of HTTP/1.1, as far as
            it is known: the caller adds what it finds.
        """
        found = self._found.get(lines)
        if found is not None:
            return found[0].copy(), found[1]
        environ = _parse_fields(lines, limits)
        meanings: dict[bool, _Meaning] = {}
        if len(lines) <= KNOWN_BYTES:
            if len(self._found) == KNOWN_FIELDS:
                # The oldest.
                del self._found[next(iter(self._found))]
            self._found[lines] = environ.copy(), meanings
        return environ, meanings


class KnownHeads:
    """Heads that came lately, parsed: as `KnownFields`, of whole requests. All guests ask for some paths at a boot."""

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[bytes, tuple[Environ, int | None, bool, bool]] = {}

    def get(self, received: bytes) -> Head | None:
        """Return the head that these bytes are, if it is known; its environ is a new one each time."""
        found = self._found.get(received)
        if found is None:
            return None
        environ, length, expects, keep_alive = found
        return Head(environ.copy(), len(received), length, expects, keep_alive, received)

    def add(self, head: Head) -> None:
        """Keep a head that was just parsed, if it is one that others may send, too: a short GET without a query."""
        environ, raw = head.environ, head.raw
        if len(raw) > KNOWN_BYTES or environ["REQUEST_METHOD"] != "GET" or environ["RAW_URI"] != environ["RAW_PATH"]:
            return
        if len(self._found) == KNOWN_HEADS:
            # The oldest.
            del self._found[next(iter(self._found))]
        self._found[raw] = environ.copy(), head.length, head.expects, head.keep_alive


def ends_head(received: bytes, start: int = 0) -> bool:
    """Tell whether the empty line that ends a head stands at or after `start`."""
    start = max(0, start - 3)
    return received.find(b"\n\r\n", start) >= 0 or received.find(b"\n\n", start) >= 0


def is_too_large(received: bytes, limits: LimitSettings) -> bool:
    """Tell whether the beginning of a head exceeds a limit, whatever follows."""
    return len(received) > limits.head or (len(received) > limits.request_line and b"\n" not in received)


def parse_head(
    received: bytes, limits: LimitSettings, *, asterisk: bool = False, known: KnownFields | None = None
) -> Head | None:
    """Parse the head at the start of `received`.

    Args:
        received: bytes as received from the client.
        limits: sizes in bytes and numbers of fields.
        asterisk: whether other methods than OPTIONS may have the target ``*``.
        known: fields that came lately, always under the same limits; None for none.

    Returns:
        The head; None if it is not complete yet.

    Raises:
        ProtocolError: the server does not accept this request.
    """
    size = _find_end(received)
    _check_sizes(received, size, limits)
    if not size:
        # A request line that is complete and wrong is refused at once, as by Incus.
        if (line_end := received.find(b"\n")) >= 0 and not _LINE.fullmatch(received, 0, line_end):
            raise _explain(received)
        return None
    head = received[:size]
    match = _HEAD.fullmatch(head)
    if match is None:
        raise _explain(head)
    method, target, protocol, major, fields = match.groups()
    if major != b"1":
        # "PRI * HTTP/2.0" (RFC 9113, section 3.4) and its like are not requests at all.
        raise ProtocolError(505 if target[:1] == b"/" else 400, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    environ, meanings = (_parse_fields(fields, limits), {}) if known is None else known.parse(fields, limits)
    if target == b"*" and method != b"OPTIONS" and not asterisk:
        raise ProtocolError(400, "only OPTIONS has the target *")
    environ["REQUEST_METHOD"] = method.decode("ascii")
    # A later HTTP/1.x is answered as HTTP/1.1 (RFC 9110, section 2.5).
    newer = protocol != b"HTTP/1.0"
    environ["SERVER_PROTOCOL"] = "HTTP/1.1" if newer else "HTTP/1.0"
    _set_target(environ, target.decode("latin-1"))
    meaning = meanings.get(newer)
    if meaning is None:
        meaning = meanings[newer] = _check(environ, newer=newer)
    return Head(environ, size, *meaning, head)


def refuse_cut_line(received: bytes) -> ProtocolError | None:
    """Judge a head that will not be completed, because the time is over or the client sends no more.

    Incus answers what cannot be a request line with 400, and closes without an answer if only the rest is missing.

    Args:
        received: what there is of the head, at least one byte.

    Returns:
        The refusal to answer with; None if the connection ends without an answer.
    """
    line = received.partition(b"\n")[0]
    return None if _LINE.fullmatch(line) else _explain(line + b"\n")


def _find_end(received: bytes) -> int:
    """Return the size of the head with the empty line that ends it; 0 if that is not there yet."""
    with_cr, without = received.find(b"\n\r\n") + 3, received.find(b"\n\n") + 2
    if with_cr == 2:
        return 0 if without == 1 else without
    return with_cr if without == 1 else min(with_cr, without)


def _check_sizes(received: bytes, size: int, limits: LimitSettings) -> None:
    """Refuse what is too large, whether it is complete or not.

    Args:
        received: bytes as received.
        size: of the head if it is complete, otherwise 0.
        limits: sizes in bytes and numbers of fields.
    """
    end = size or len(received)
    if end > limits.request_line:
        line_end = received.find(b"\n", 0, end)
        line = received[: end if line_end < 0 else line_end].removesuffix(b"\r")
        if len(line) > limits.request_line:
            raise ProtocolError(414, f"the request line is longer than {limits.request_line} bytes")
    if end > limits.head:
        raise ProtocolError(431, f"the head is larger than {limits.head} bytes")
    # Request line and empty line are not fields. Of a head that is not complete no field is looked at.
    if received.count(b"\n", 0, size) - 2 > min(limits.header_fields, _PARSER_FIELDS):
        raise ProtocolError(431, f"the head has more than {min(limits.header_fields, _PARSER_FIELDS)} header fields")
    if size > limits.header_field:
        lines = received[:size].split(b"\n")
        if any(len(line.removesuffix(b"\r")) > limits.header_field for line in lines[1:]):
            raise ProtocolError(431, f"a header field is longer than {limits.header_field} bytes")


def _parse_fields(fields: bytes, limits: LimitSettings) -> Environ:
    """Parse the field lines of a head, which fit the grammar, and the empty line."""
    if fields.count(b"\r\n") != fields.count(b"\n"):
        fields = fields.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    if b"_" in fields:
        # In an environ, X_Y cannot be told from X-Y. So fields with an underscore in their name are dropped.
        lines = fields.splitlines(keepends=True)
        fields = b"".join(line for line in lines if b"_" not in line.partition(b":")[0])
    # PERF: a tenth of what a regular expression takes.
    lower = (b"\n" + fields).lower()
    host, length, encoding = _SINGLE
    if lower.count(host) > 1 or lower.count(length) > 1 or lower.count(encoding) > 1:
        raise ProtocolError(400, "Host, Content-Length or Transfer-Encoding stands in the head more than once")
    try:
        environ: Environ = parse_to_wsgi_environ(
            _ANY_LINE + fields,
            limit_request_line=len(_ANY_LINE),
            limit_request_fields=_PARSER_FIELDS,
            limit_request_field_size=limits.header_field,
        )
    except ParseError:
        # The grammar allows no more than this parser, but for lengths that contradict each other or are not numbers.
        raise ProtocolError(400, "the length of the body is not clear") from None
    del environ["_consumed"]
    return environ


def _check(environ: Environ, *, newer: bool) -> _Meaning:
    host = environ.get("HTTP_HOST")
    if host is None:
        if newer:
            raise ProtocolError(400, "the Host header field is missing")
    elif not _HOST.fullmatch(host):
        raise ProtocolError(400, "the Host header field is malformed")
    connection = environ.get("HTTP_CONNECTION")
    keep_alive = newer
    if connection is not None:
        options = {option.strip().lower() for option in connection.split(",")}
        keep_alive = "close" not in options and (newer or "keep-alive" in options)
    expect = environ.get("HTTP_EXPECT")
    if expect is not None and expect.lower() != "100-continue":
        raise ProtocolError(417, "only 100-continue can be expected")
    return _Meaning(_body_length(environ), expect is not None and newer, keep_alive)


def _set_target(environ: Environ, target: str) -> None:
    """Set ``RAW_PATH`` and ``RAW_URI`` as they were sent, and decode ``PATH_INFO`` as PEP 3333 requires."""
    path, _, query = target.partition("?")
    # A path, by far the most frequent target, needs no more than this.
    if path[:1] != "/" or "%" in path:
        split = ("*", "") if target == "*" else split_target(target)
        if split is None:
            raise ProtocolError(400, "the request target is neither a path nor an absolute URI")
        path, query = split
    environ["RAW_PATH"], environ["RAW_URI"], environ["QUERY_STRING"] = path, target, query
    environ["PATH_INFO"] = unquote_to_bytes(path.encode("latin-1")).decode("latin-1") if "%" in path else path


def _body_length(environ: Environ) -> int | None:
    """Return the length of the body in bytes (RFC 9112, section 6.3); None if it comes in chunks."""
    encoding = environ.get("HTTP_TRANSFER_ENCODING")
    length = environ.get("CONTENT_LENGTH")
    if encoding is not None:
        if length is not None:
            raise ProtocolError(400, "Content-Length and Transfer-Encoding exclude each other")
        if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
            raise ProtocolError(400, "HTTP/1.0 has no Transfer-Encoding")
        if encoding.lower() != "chunked":
            raise ProtocolError(501, "no transfer encoding but chunked is supported")
        return None
    if length is None:
        return 0
    if not _LENGTH.fullmatch(length):
        raise ProtocolError(400, "the Content-Length is not a number of at most 15 digits")
    return int(length)


def _explain(head: bytes) -> ProtocolError:
    """Say what is wrong with a head, or with a request line, that does not fit the grammar."""
    line, _, fields = head.partition(b"\n")
    if line in (b"", b"\r"):
        return ProtocolError(400, "an empty line stands before the request line")
    if not _LINE.fullmatch(line):
        return ProtocolError(400, "the request line is not: method, one space, target, one space, HTTP/1.1")
    if re.search(rb"(?m)^[\t ]", fields):
        return ProtocolError(400, "a header field is folded over several lines")
    return ProtocolError(400, "a header field is not: name, colon, value without control characters")
