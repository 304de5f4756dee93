#!/usr/bin/env python3
"""Asks the host about this instance, and reports to the host that the workload is ready.

One file for Python 3.6 and newer, without other packages: copy it into the instance. It uses the socket of the guest
API, so it works in every instance that has one: with guestapi, Incus or LXD on the host.
"""

import argparse
import base64
import http.client
import io
import json
import math
import os
import signal
import socket
import struct
import sys
import time
import urllib.parse
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Tuple

#: Where the socket is, if $GUESTAPI_SOCKET and --socket do not say: with Incus or guestapi, then with LXD.
SOCKETS = ("/dev/incus/sock", "/dev/lxd/sock")
#: Exit statuses.
FOUND, ABSENT, UNREACHABLE, MISUSE, REFUSED = range(5)
#: Seconds for which a host that cannot be asked is asked again, unless --timeout says otherwise: longer than a restart.
TIMEOUT = 30.0
#: Seconds until the next attempt: first, and longest. They double between.
FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0
#: The longest time that one request may wait for a key, in seconds (docs/guests.md, "Wait").
LONGEST_WAIT = 60
#: Seconds between two requests for a key where the host cannot wait for it.
POLL_SECONDS = 1.0
#: Seconds without a frame after which the host is asked for a sign of life. It sends a ping every ten seconds.
SILENCE_SECONDS = 30.0
#: WebSocket opcodes (RFC 6455, section 5.2).
TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA
#: The longest frame that is accepted, in bytes: an event has an old and a new value, escaped as JSON.
LONGEST_FRAME = 64 << 20

Answer = Tuple[int, "http.client.HTTPMessage", bytes]


class CommandError(Exception):
    """The command ends.

    Attributes:
        status: exit status.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Pause:
    """Waits between attempts, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._next = FIRST_PAUSE

    def wait(self, reason: str, seconds: float = 0.0) -> None:
        """Wait for the next attempt.

        Args:
            reason: why the last one failed, for the user.
            seconds: the least time to wait.

        Raises:
            CommandError: the time is over.
        """
        left = self._end - time.monotonic()
        if left <= seconds:
            raise CommandError(UNREACHABLE, reason)
        time.sleep(min(max(self._next, seconds), left))
        self._next = min(2 * self._next, LAST_PAUSE)


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection on a Unix socket."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("host", timeout=seconds)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = connected(self._path, self.timeout or TIMEOUT)


def connected(path: str, seconds: float) -> socket.socket:
    """Return a socket that is connected to `path`; `seconds` limits each operation on it.

    Raises:
        OSError: no process listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


class Host:
    """The host, asked through the socket."""

    def __init__(self, path: Optional[str], seconds: float) -> None:
        """Address the host.

        Args:
            path: the socket; None: the first that exists.
            seconds: how long to try again while the host cannot be asked.
        """
        self._path = path
        self._seconds = seconds

    def ask(
        self,
        method: str,
        target: str,
        headers: Optional[Dict[str, str]] = None,
        body: Optional[bytes] = None,
        waits: float = 0.0,
    ) -> Answer:
        """Send a request, and again while the host cannot answer it.

        Args:
            method: of the request.
            target: of the request.
            headers: of the request.
            body: of the request.
            waits: seconds that the host may wait before it answers.

        Returns:
            Status, header fields and body of the answer.

        Raises:
            CommandError: the host cannot be asked, or it refuses.
        """
        pause = Pause(self._seconds)
        while True:
            connection = UnixConnection(self.path(), self._seconds + waits)
            least = 0.0
            try:
                connection.request(method, target, body, headers or {})
                response = connection.getresponse()
                answer = response.status, response.headers, response.read()
            except (OSError, http.client.HTTPException) as error:
                reason = "the host cannot be asked at {}: {}".format(self.path(), error or type(error).__name__)
            else:
                if answer[0] < 300 or answer[0] in (304, 404):
                    return answer
                reason, least = self.judge(*answer)
            finally:
                connection.close()
            pause.wait(reason, least)

    def path(self) -> str:
        """Return the socket's path."""
        if self._path:
            return self._path
        return next((path for path in SOCKETS if os.path.exists(path)), SOCKETS[0])

    @staticmethod
    def judge(status: int, headers: "http.client.HTTPMessage", body: bytes) -> Tuple[str, float]:
        """Return why the request failed, and the least number of seconds until the next attempt.

        Raises:
            CommandError: another attempt would fail, too.
        """
        text = body.decode("utf-8", "replace").strip() or "status {}".format(status)
        if status >= 500 and status != 507:
            # Also for an instance that is not registered yet.
            return "the host answers: " + text, 0.0
        if status == 429:
            seconds = headers.get("Retry-After", "")
            if seconds.isdigit() and int(seconds) <= LAST_PAUSE:
                return "the host answers: " + text, float(seconds)
        raise CommandError(REFUSED, text)

    def find(self, target: str, waits: float = 0.0) -> Answer:
        """As `ask`, for ``GET``.

        Raises:
            CommandError: the host has nothing there, too.
        """
        answer = self.ask("GET", target, waits=waits)
        if answer[0] == 404:
            raise CommandError(ABSENT, answer[2].decode("utf-8", "replace").strip() or "not found")
        return answer

    def features(self) -> List[str]:
        """Return what the host offers beyond the API of Incus and LXD."""
        status, _headers, body = self.ask("GET", "/1.0/guestapi")
        return list(json.loads(body.decode())["features"]) if status == 200 else []


def quoted(key: str) -> str:
    """Return a key as a segment of a path."""
    return urllib.parse.quote(key, safe="")


def get(host: Host, key: str, seconds: float) -> bytes:
    """Return the value of a key.

    Args:
        host: to ask.
        key: its name.
        seconds: how long to wait until the key is set; 0: not at all.

    Raises:
        CommandError: it is not set, or the host cannot be asked, or it refuses.
    """
    if not seconds:
        return host.find("/1.0/config/" + quoted(key))[2]
    end = time.monotonic() + seconds
    can_wait = "tree" in host.features()
    while True:
        left = max(0.0, end - time.monotonic())
        if can_wait and left:
            wait = min(math.ceil(left), LONGEST_WAIT)
            target = "/1.0/guestapi/tree/config/{}?wait={}".format(quoted(key), wait)
            status, _headers, body = host.ask("GET", target, waits=wait)
        else:
            status, _headers, body = host.ask("GET", "/1.0/config/" + quoted(key))
        if status == 200:
            return body
        if time.monotonic() >= end:
            raise CommandError(ABSENT, body.decode("utf-8", "replace").strip() or "not found")
        if not can_wait:
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))


def keys(host: Host) -> List[str]:
    """Return the names of the keys that are set."""
    prefix = "/1.0/config/"
    paths = json.loads(host.find("/1.0/config")[2].decode())
    return [path[len(prefix) :] if path.startswith(prefix) else path for path in paths]


def report(host: Host, ready: bool) -> None:
    """Report whether the workload is ready."""
    body = json.dumps({"state": "Ready" if ready else "Started"}).encode()
    status, _headers, text = host.ask("PATCH", "/1.0", {"Content-Type": "application/json"}, body)
    if status == 404:
        raise CommandError(REFUSED, text.decode("utf-8", "replace").strip())


def write_attribute(host: Host, path: str, value: Optional[bytes]) -> None:
    """Say something of this instance, or take it back.

    Args:
        host: to ask.
        path: the attribute, NAMESPACE/KEY.
        value: any bytes; None: take it back.

    Raises:
        CommandError: the host refuses or cannot be asked, or has no attributes.
    """
    target = "/1.0/guestapi/attributes/" + "/".join(map(quoted, path.split("/")))
    method = "DELETE" if value is None else "PUT"
    status, _headers, text = host.ask(method, target, body=value)
    if status == 404:
        raise CommandError(REFUSED, text.decode("utf-8", "replace").strip() or "not found")


def read_attribute(host: Host, path: Optional[str]) -> bytes:
    """Return what this instance says of itself.

    Args:
        host: to ask.
        path: the attribute, NAMESPACE/KEY; None: the names of all, one a line.

    Raises:
        CommandError: it is not set; or the host refuses or cannot be asked, or has no attributes.
    """
    prefix = "/1.0/guestapi/attributes/"
    target = prefix[:-1] if path is None else prefix + "/".join(map(quoted, path.split("/")))
    status, _headers, body = host.ask("GET", target)
    if status == 404:
        # Incus and LXD know neither this attribute nor any other.
        code = ABSENT if "attributes" in host.features() else REFUSED
        raise CommandError(code, body.decode("utf-8", "replace").strip() or "not found")
    if path is not None:
        return body
    return "".join(one[len(prefix) :] + "\n" for one in json.loads(body.decode())).encode()


def notices(host: Host) -> List[Dict[str, Any]]:
    """Return what the host has announced.

    Raises:
        CommandError: it announces nothing, or cannot be asked, or refuses.
    """
    found = json.loads(host.find("/1.0/guestapi/notices")[2].decode())
    return list(found)


def acknowledge(host: Host, notice: str) -> None:
    """Acknowledge a notice.

    Raises:
        CommandError: it is past or unknown, or the host cannot be asked, or it refuses.
    """
    status, _headers, text = host.ask("POST", "/1.0/guestapi/notices/{}/ack".format(quoted(notice)))
    if status == 404:
        raise CommandError(ABSENT, text.decode("utf-8", "replace").strip() or "not found")


def follow_notices(host: Host, seconds: float) -> Iterator[Dict[str, Any]]:
    """Yield each notice that is pending, and then each as it comes or changes, until the command is interrupted.

    Raises:
        CommandError: the host cannot be asked, or it refuses.
    """
    # First the place in the log, then the list: what comes between is told twice rather than not at all.
    event_id = host.find("/1.0/guestapi/tree")[1].get("Guestapi-Event-Id", "0")
    known = notices(host)
    for notice in known:
        yield notice
    for text in events(host, seconds, int(event_id), "notice"):
        event = json.loads(text)
        if event["type"] == "notice" and event["metadata"] not in known:
            yield event["metadata"]


def token(host: Host, audience: str, nonce: Optional[str]) -> bytes:
    """Return a signed token that says which instance this is.

    Args:
        host: to ask.
        audience: for whom the token is.
        nonce: a word that the token repeats; None: there is none.

    Raises:
        CommandError: the host gives none, or cannot be asked, or refuses.
    """
    query = {"audience": audience}
    if nonce is not None:
        query["nonce"] = nonce
    return host.find("/1.0/guestapi/identity?" + urllib.parse.urlencode(query))[2]


class Frames:
    """The frames of a WebSocket, for a client that only receives (RFC 6455)."""

    def __init__(self, sock: socket.socket, received: bytes) -> None:
        self._sock = sock
        self._received = received

    def __iter__(self) -> Iterator[str]:
        """Yield each text message.

        Raises:
            OSError: the connection is lost.
        """
        message = b""
        while True:
            first, payload = self._read()
            opcode = first & 0x0F
            if opcode == PING:
                self._send(PONG, payload)
            elif opcode == CLOSE:
                self._send(CLOSE, payload[:2])
                return
            elif opcode != PONG:
                message += payload
                if first & 0x80:
                    yield message.decode("utf-8", "replace")
                    message = b""

    def _read(self) -> Tuple[int, bytes]:
        first, second = self._take(2)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", self._take(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._take(8))
        if size > LONGEST_FRAME:
            raise OSError("an event has {} bytes".format(size))
        return first, self._take(size)

    def _take(self, size: int) -> bytes:
        parts, had = [self._received], len(self._received)
        asked = False
        while had < size:
            try:
                part = self._sock.recv(max(65536, min(size - had, 1 << 20)))
            except socket.timeout:
                if asked:
                    raise
                # Silence: an idle host answers.
                self._send(PING, b"")
                asked = True
                continue
            if not part:
                raise OSError("the host has closed the connection")
            asked = False
            parts.append(part)
            had += len(part)
        received = b"".join(parts)
        self._received = received[size:]
        return received[:size]

    def _send(self, opcode: int, payload: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
        self._sock.sendall(struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload)) + mask + masked)


def subscribe(host: Host, query: Dict[str, str]) -> Tuple[socket.socket, Frames]:
    """Open the stream of events once.

    Raises:
        OSError: the host cannot be asked.
        CommandError: the host refuses.
    """
    target = "/1.0/events" + ("?" + urllib.parse.urlencode(query) if query else "")
    sock = connected(host.path(), SILENCE_SECONDS)
    try:
        key = base64.b64encode(os.urandom(16)).decode()
        head = (
            "GET {} HTTP/1.1\r\nHost: host\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {}\r\n\r\n"
        )
        sock.sendall(head.format(target, key).encode())
        received = b""
        while b"\r\n\r\n" not in received:
            part = sock.recv(65536)
            if not part or len(received) > 1 << 20:
                raise OSError("the host has closed the connection")
            received += part
        head_bytes, _end, rest = received.partition(b"\r\n\r\n")
        first, _newline, fields = head_bytes.partition(b"\r\n")
        status = int(first.split()[1])
        if status != 101:
            headers = http.client.parse_headers(io.BytesIO(fields + b"\r\n\r\n"))
            length = headers.get("Content-Length", "")
            while len(rest) < (int(length) if length.isdigit() else 0):
                part = sock.recv(65536)
                if not part:
                    break
                rest += part
            raise OSError(Host.judge(status, headers, rest)[0])
        return sock, Frames(sock, rest)
    except BaseException:
        sock.close()
        raise


def events(host: Host, seconds: float, since: Optional[int], kinds: Optional[str]) -> Iterator[str]:
    """Yield each event as a JSON document, until the command is interrupted.

    After a restart of the host, a host with guestapi sends what happened meanwhile.

    Args:
        host: to ask.
        seconds: how long to try again while the host cannot be asked.
        since: the id of the event after which to begin; None: begin now.
        kinds: the types to receive, separated by commas; None: all.

    Raises:
        CommandError: the host cannot be asked, or it refuses.
    """
    if since is None and "tree" in host.features():
        # To resume there after a restart of the host.
        event_id = host.find("/1.0/guestapi/tree")[1].get("Guestapi-Event-Id", "")
        since = int(event_id) if event_id.isdigit() else None
    first = True
    pause = Pause(seconds)
    while True:
        query = {} if kinds is None else {"type": kinds}
        if since is not None:
            query["since"] = str(since)
        reason = "the host ends the stream of events"
        try:
            sock, frames = subscribe(host, query)
            if not first and since is None:
                sys.stderr.write("guestctl: the host was away; events may be missing\n")
            first = False
            pause = Pause(seconds)
            with sock:
                for text in frames:
                    if since is not None:
                        since = int(json.loads(text).get("id", since))
                    yield text
        except OSError as error:
            reason = "the host cannot be asked at {}: {}".format(host.path(), error)
        pause.wait(reason)


class Parser(argparse.ArgumentParser):
    """Exits with `MISUSE` where argparse would with 2."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong."""
        self.print_usage(sys.stderr)
        self.exit(MISUSE, "{}: {}\n".format(self.prog, message))


def positive(text: str) -> float:
    """Parse a number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("{!r} is not a number of seconds above 0".format(text))
    return seconds


def event_id(text: str) -> int:
    """Parse the id of an event."""
    if not (text.isdigit() and len(text) < 19):
        raise argparse.ArgumentTypeError("{!r} is not an id of an event".format(text))
    return int(text)


def attribute(text: str) -> str:
    """Parse the path of an attribute; the host decides what the names can be."""
    if len(text.split("/")) != 2 or text.startswith("/") or text.endswith("/"):
        raise argparse.ArgumentTypeError("{!r} is not NAMESPACE/KEY".format(text))
    return text


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    common = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--socket", metavar="PATH", help="socket of the guest API (default: that of Incus, then LXD)")
    common.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=positive,
        help="how long to try again while the host cannot be asked (default: {:.0f})".format(TIMEOUT),
    )
    top = Parser(
        prog="guestctl",
        parents=[common],
        description="Ask the host about this instance.",
        epilog="Exit status: 0 found or done, 1 absent, 2 the host cannot be asked, 3 misuse, 4 refused by the host.",
    )
    verbs = top.add_subparsers(dest="verb", metavar="COMMAND", parser_class=Parser)
    one = verbs.add_parser("get", parents=[common], help="print the value of a configuration key")
    one.add_argument("key", metavar="KEY")
    one.add_argument(
        "--wait", metavar="SECONDS", type=positive, default=0.0, help="wait at most this long until the key is set"
    )
    verbs.add_parser("list", parents=[common], help="print the names of the configuration keys that are set")
    verbs.add_parser("devices", parents=[common], help="print the devices, as JSON")
    verbs.add_parser("metadata", parents=[common], help="print cloud-init's meta-data")
    stream = verbs.add_parser("events", parents=[common], help="print changes as they happen, one JSON document a line")
    stream.add_argument("--since", metavar="ID", type=event_id, help="begin after the event with this id")
    stream.add_argument("--type", metavar="TYPES", help="only these types, like config,device")
    ready = verbs.add_parser("ready", parents=[common], help="report to the host that the workload is ready")
    ready.add_argument("--not", dest="ready", action="store_false", help="report that it is not ready any more")
    put = verbs.add_parser("put", parents=[common], help="say something of this instance: set an attribute")
    put.add_argument("path", metavar="NAMESPACE/KEY", type=attribute)
    put.add_argument("value", metavar="VALUE", nargs="?", help="default: what is read from standard input")
    delete = verbs.add_parser("delete", parents=[common], help="take it back: remove an attribute")
    delete.add_argument("path", metavar="NAMESPACE/KEY", type=attribute)
    own = verbs.add_parser("attribute", parents=[common], help="read what this instance says of itself")
    actions = own.add_subparsers(dest="action", metavar="ACTION", parser_class=Parser)
    got = actions.add_parser("get", parents=[common], help="print the value of an attribute")
    got.add_argument("path", metavar="NAMESPACE/KEY", type=attribute)
    actions.add_parser("list", parents=[common], help="print the names of the attributes that are set")
    notice = verbs.add_parser("notices", parents=[common], help="print what the host has announced, as JSON")
    what = notice.add_mutually_exclusive_group()
    what.add_argument("--follow", action="store_true", help="go on with what is announced from now on, one a line")
    what.add_argument("--ack", metavar="ID", help="acknowledge this notice")
    signed = verbs.add_parser("token", parents=[common], help="print a signed token that says which instance this is")
    signed.add_argument("audience", metavar="AUDIENCE", help="for whom the token is")
    signed.add_argument("--nonce", metavar="NONCE", help="a word that the token repeats")
    return top


def write(content: bytes) -> None:
    """Write to standard output, and end the line on a terminal."""
    out = sys.stdout.buffer
    out.write(content)
    if sys.stdout.isatty() and not content.endswith(b"\n"):
        out.write(b"\n")
    out.flush()


def run(options: Any) -> None:
    """Run the command.

    Raises:
        CommandError: as its exit status says.
    """
    seconds = getattr(options, "timeout", TIMEOUT)
    host = Host(getattr(options, "socket", None) or os.environ.get("GUESTAPI_SOCKET"), seconds)
    if options.verb == "get":
        write(get(host, options.key, options.wait))
    elif options.verb == "list":
        write("".join(key + "\n" for key in keys(host)).encode())
    elif options.verb == "devices":
        write(host.find("/1.0/devices")[2])
    elif options.verb == "metadata":
        write(host.find("/1.0/meta-data")[2])
    elif options.verb == "ready":
        report(host, options.ready)
    elif options.verb == "token":
        write(token(host, options.audience, options.nonce))
    elif options.verb == "put":
        given = options.value
        write_attribute(host, options.path, sys.stdin.buffer.read() if given is None else os.fsencode(given))
    elif options.verb == "delete":
        write_attribute(host, options.path, None)
    elif options.verb == "attribute":
        write(read_attribute(host, options.path if options.action == "get" else None))
    elif options.verb == "notices":
        if options.ack is not None:
            acknowledge(host, options.ack)
        elif options.follow:
            for notice in follow_notices(host, seconds):
                write(json.dumps(notice).encode() + b"\n")
        else:
            write(host.find("/1.0/guestapi/notices")[2])
    else:
        for text in events(host, seconds, options.since, options.type):
            write(text.rstrip("\n").encode() + b"\n")


def main(words: Optional[List[str]] = None) -> int:
    """Run ``guestctl``.

    Args:
        words: the command line without the program's name; None: that of this process.

    Returns:
        The exit status.
    """
    top = parser()
    options = top.parse_args(words)
    if options.verb is None:
        verbs = "get, list, devices, metadata, events, ready, put, delete, attribute, notices or token"
        top.error("a command is missing: " + verbs)
    if options.verb == "attribute" and options.action is None:
        top.error("attribute needs an action: get or list")
    try:
        run(options)
    except CommandError as failure:
        sys.stderr.write("guestctl: {}\n".format(failure))
        return failure.status
    except KeyboardInterrupt:
        return 130
    return FOUND


if __name__ == "__main__":
    # A pipe that is closed ends the command as it ends cat.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
