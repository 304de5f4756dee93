"""The targets of fuzzing.

Each target takes bytes, and raises an exception if a property is violated. hypothesis generates the bytes in the tests
of this directory, atheris in ``make fuzz``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guestapi.http.websocket import LONGEST_FRAME, ClientFrames, frame
from tests.fuzz.attributes import check_attributes
from tests.fuzz.commands import check_command, check_ring, check_settings
from tests.fuzz.conditions import check_conditions
from tests.fuzz.differential import check_requests
from tests.fuzz.exchange import FINGERPRINT, PAUSE, check_exchange, check_signer
from tests.fuzz.notices import check_notices


def check_frames(data: bytes) -> None:
    """Feed `data` as frames of a WebSocket client: any split gives the same result, and little of it is stored.

    Raises:
        AssertionError: one of these is violated.
    """
    whole = ClientFrames().feed(data)
    frames = ClientFrames()
    reply, pong, ended = b"", False, False
    for start in range(len(data)):
        result = frames.feed(data[start : start + 1])
        reply, pong, ended = reply + result.reply, pong or result.pong, result.ended
        assert len(frames._buffer) <= LONGEST_FRAME
        if ended:
            break
    assert (reply, pong, ended) == (whole.reply, whole.pong, whole.ended)
    while reply:
        assert reply[0] in (0x88, 0x8A), "neither close nor pong"
        assert reply[1] <= 125, "no control frame"
        assert reply.startswith(frame(reply[0] & 0x0F, reply[2 : 2 + reply[1]]))
        reply = reply[2 + reply[1] :]


def _words(*lines: bytes) -> tuple[bytes, ...]:
    return tuple(word for line in lines for word in line.split(b"|"))


@dataclass(frozen=True, slots=True)
class Target:
    """A target.

    Attributes:
        check: raises an exception if these bytes violate a property.
        share: its share of the total time.
        longest: the useful maximum of bytes.
        seeds: the first inputs.
        words: the parts that inputs are made of.
    """

    check: Callable[[bytes], None]
    share: int
    longest: int
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...]


_HOST = b"\r\nHost: x\r\n"
_KEY = b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
_WEBSOCKET = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n" + _KEY
_HTTP = (
    b"GET / HTTP/1.1" + _HOST + b"\r\n",
    b"HEAD /1.0/config/user.foo HTTP/1.1" + _HOST + b"Connection: close\r\n\r\n",
    b"PATCH /1.0 HTTP/1.1" + _HOST + b'Content-Length: 17\r\n\r\n{"state":"Ready"}GET /1.0 HTTP/1.0\r\n\r\n',
    b"PATCH /1.0 HTTP/1.1" + _HOST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5;a=b\r\n{"sta\r\nc\r\nte":"Ready"}\r\n0\r\nX: y\r\n\r\n',
    b"PUT /1.0/guestapi/attributes/a/b HTTP/1.1" + _HOST + b"If-None-Match: *\r\nContent-Length: 1\r\n\r\nx"
    b"DELETE /1.0/guestapi/attributes/a/b HTTP/1.1" + _HOST + b"\r\n",
    b"GET http://x/1.0/../config//user.a%2Fb?a=b HTTP/1.1" + _HOST + b"\r\n",
    b"OPTIONS * HTTP/1.1" + _HOST + b"\r\nGET /1.0/meta-data HTTP/1.1" + _HOST + b"\r\n",
    b"GET /1.0/guestapi/notices HTTP/1.1" + _HOST + b"\r\nPOST /1.0/guestapi/notices/aa/ack HTTP/1.1" + _HOST + b"\r\n"
    b"POST /1.0/guestapi/notices/aa/ack HTTP/1.1" + _HOST + b"Content-Length: 2\r\n\r\n{}",
    b"CONNECT x:80 HTTP/1.1" + _HOST + b"\r\n",
    b"GET /1.0/guestapi/identity?audience=%c3%a9+%26%3d%25%2b&nonce=%00 HTTP/1.1" + _HOST + b"\r\n",
)
_HTTP_WORDS = _words(
    b"/1.0/guestapi/attributes|/a/b|If-Match: |If-None-Match: |PUT|DELETE",
    b"/1.0/guestapi/notices|/aa/ack|/bb/ack|?type=notice",
    b"GET|HEAD|PATCH|POST|OPTIONS|CONNECT|HTTP/1.0|HTTP/1.1|/1.0|/1.0/config|/1.0/config/user.foo|/1.0/devices",
    b"/1.0/meta-data|/1.0/events|/1.0/images/|/export|?type=config|?since=0|?since=-1|%2F|%00|//|/../|http://x|*",
    b"\r\n|\r\n\r\n|\n| |\t|: |Host: x\r\n|Connection: close\r\n|Connection: keep-alive\r\n|Content-Length: ",
    b"Transfer-Encoding: chunked\r\n|Expect: 100-continue\r\n|0\r\n\r\n|1\r\na\r\n|;a=b|X_Y: z\r\n|\0|\xc3\xa9|\x80",
    b'{"state":"Ready"}|{"state":null}|[[[[|"\\ud800"|1e999|Range: bytes=|0-|-1|1-2,4-|If-Range: |Accept: ',
    b"/1.0/guestapi/identity?audience=a|&audience=|&nonce=|%6e|%c3|%ff|&&|&=|+|",
    b"Last-Event-ID: |text/event-stream\r\n|Upgrade: websocket\r\n|Origin: http://x\r\n|Sec-WebSocket-Key: ",
)

TARGETS: dict[str, Target] = {
    "requests": Target(check_requests, 2, 600, _HTTP, _HTTP_WORDS),
    "exchange": Target(
        check_exchange,
        4,
        1200,
        (
            *(b"\0" + request for request in _HTTP),
            b"\0GET /1.0/events HTTP/1.1" + _HOST + _WEBSOCKET + b"\r\n" + PAUSE + b"\x8a\x80\1\2\3\4\x88\x80\1\2\3\4",
            b"\1GET /1.0/events?since=0&type=config HTTP/1.1" + _HOST + b"\r\n" + PAUSE + b"x",
            b"\1GET /1.0/events HTTP/1.1" + _HOST + b"Accept: text/event-stream\r\nLast-Event-ID: 1\r\n\r\n",
            PAUSE.join((b"\2GET /1.0/devices HTTP/1.0\r\n\r\n", b"GET /1.0/device/eth0 HTTP/1.0\r\n\r\n")),
            f"\0GET /1.0/images/{FINGERPRINT}/export HTTP/1.1\r\nHost: x\r\nRange: bytes=1-3,7-\r\n\r\n".encode(),
        ),
        (*_HTTP_WORDS, PAUSE, _WEBSOCKET, FINGERPRINT.encode(), b"\x89\x80\1\2\3\4", b"\x88\x82\0\0\0\0\3\xe8"),
    ),
    "attributes": Target(
        check_attributes,
        2,
        600,
        (
            b"PUT a/b\nvalue\0GET a/b\0GET a/b !\0PUT a/b *\nother\0PUT a/b =\n2\0DELETE a/b =\0DELETE a/b\0GET a/b",
            b"\0".join(b"PUT a/%d\n16384" % number for number in range(17))
            + b"\0PUT b/c\n0\0PUT a/0\n16383\0PUT b/c\n1",
            b"PUT a/b\n16385\0PUT a/..\n1\0PUT %2e%2e/a\n1\0PUT ../a\n1\0GET a/%00\0PUT a//b\n1\0PUT /a\n1",
            (
                b"PUT hostkeys/a\nssh-ed25519 "
                b"AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f root@c1\n"
            ),
        ),
        _words(
            b"PUT |GET |DELETE |a/b|a/c|hostkeys/|..|.|%2F|%00| *| =| !|\0|\n|16384|16385|0|1|\xff",
            b"ssh-ed25519 |ssh-rsa |ecdsa-sha2-nistp256 |AAAAC3NzaC1lZDI1NTE5AAAAI|====|@cert-authority * |\r|\x1b[2J",
        ),
    ),
    "notices": Target(
        check_notices,
        2,
        600,
        (
            b"send 0 60 stop\0ack 0 0\0ack 0 0\0ack 1 0\0list 0\0list 1\0pass 60\0ack 0 0\0list 0",
            (
                b"send 0 60 stop\0start 0\0ack 0 0\0ack 2 0\0send 0 60 freeze\0"
                b"ack 0 1\0ack 2 1\0stop 0\0ack 2 1\0send 0 5 x"
            ),
            b"send 1 9 Good bye\0add 1\0ack 1 0\0start 1\0ack 2 0\0send 1 9 stop\0kill 1\0ack 2 1\0list 2",
            b"send 0 60 stop\0back 86400\0list 0\0ack 0 0\0on 172800\0list 0\0pass 61\0list 0\0back 172800\0ack 0 0",
            (
                b"send 0 60 stop\0send 0 30 migrate\0send 1 30 x\0cancel 1 0\0cancel 0 0\0"
                b"ack 0 0\0own 0\0cancel 0\0rename 0\0ack 0 1"
            ),
            b"\0".join([b"send 0 %d restart" % number for number in range(17)]) + b"\0pass 2\0send 0 1 x\0own 0\0own 1",
            (
                b"send 0 60 stop\0ack 0 0\0late 0 0\0late 1 0\0again 0\0"
                b"late 0 0\0ack 0 0\0ack 2 0\0send 0 9 stop\0late 2 1\0ack 0 1"
            ),
            (
                b"send 0 60 stop\0like 0\0own 0\0like 0\0"
                b"raw 0 0123456789abcdef\0raw 1 ..\0raw 0 /\0send 0 5 \xff\0send 0 5 \n"
            ),
        ),
        _words(
            b"send |ack |own |late |like |again |raw |list |cancel |start |stop |add ",
            b"kill |rename |pass |on |back |0|1|2|3| |\0|60 |86400",
            b"stop|restart|migrate|freeze|text|\n|\xff|\xc3\xa4|/|..|0123456789abcdef",
        ),
    ),
    "frames": Target(
        check_frames,
        1,
        300,
        (b"\x89\x83\1\2\3\4abc", b"\x8a\x80\0\0\0\0\x88\x82\0\0\0\0\3\xe8", b"\x81\xff" + b"\x7f" * 8, b"\x82\x00"),
        (b"\x89", b"\x8a", b"\x88", b"\x80\1\2\3\4", b"\xfd\1\2\3\4" + b"a" * 125, b"\xfe\0\x7e", b"\xc9", b"\x09"),
    ),
    "settings": Target(
        check_settings,
        1,
        400,
        (
            b'[store]\nurl = "sqlite:////a"\nlock_seconds = 1.5\n',
            b'[[listener]]\npath = "/a"\ndialect = "lxd"\n[limits]\nhead = 4096\n',
            b'[hooks]\non-failure = "refuse"\nproject = "p"\n[hooks.template]\n"user.a" = "b"\n[log]\nlevel = "info"\n',
            b"[images]\ndirectory = '/a'\n[events]\nkeep_seconds = 1\n[callers]\npidfd = false\n",
        ),
        _words(
            b'[|]|[[|]]|{|}|"|\'|"""|=|.|,|\n|#|\\u0000|\\|nan|inf|-|_|0x|1e5|true|1979-05-27T07:32:00Z|9999999999999',
            b"store|url|listener|path|dialect|limits|body|head_seconds|hooks|template|on-failure|log|requests",
        ),
    ),
    "command": Target(
        check_command,
        3,
        500,
        (
            b"instance\0list\0--format\0json",
            b"instance\0add\0c2\0--uuid\0x\0--config\0user.a=@input\0--device\0eth0,type=nic\nvalue",
            b"instance\0start\0c1\0--pid\x001",
            b"config\0set\0c1\0user.a=b\0user.b=@-\nvalue",
            b"device\0add\0c1\0eth1\0type=nic",
            b"image\0import\0input\0--alias\0a\nimage",
            b"events\0c1\0--since\x000\0--format\0json",
            b"check\0--format\0json",
            b"attributes\0known-hosts\0c1\0--host\0[a]:22",
            b"attributes\0show\0c1\0--format\0json",
            b"notice\0c3\0stop\0--in\0005m\0--wait",
            b"notice\0c3\0a \x1b[31m\0--in\0001s",
            b"notices\0list\0--format\0json",
            b"notices\0cancel\0c3\x000123456789abcdef",
            b"--config\0input\0check\0--settings\n[limits]\nhead = 4096\n",
            b"restore\0input\nSQLite format 3\0",
        ),
        _words(
            b"attributes|known-hosts|--host|a/b|wait|policy|allow|notice|notices|cancel|c3|--in|--wait|7d|1s",
            b"instance|config|device|image|events|check|restore|completion",
            b"add|list|show|start|stop|remove|set|get|unset",
            b"--format|json|table|--project|--type|--uuid|--location|--config|--device|--pid|--help|--|-|@input|@-",
            b"input|c1|\0|\n|\xff|\xc2\xb2|--origin|--replace",
            b"user.foo=|type=nic|\\u0000|\\ud800|\x1b[31m",
        ),
    ),
    "ring": Target(
        check_ring,
        1,
        400,
        (
            b"1\0lxc\0ac1\0alxc\0astart-host\0eLXC_NAME=c1\0eLXC_PID=1\0hweb\0\0",
            b'1\0oci\0i{"id":"0123456789abcdef","pid":1,"status":"created","bundle":"/a"}\0\0',
            b'{"id":"0123456789abcdef","pid":1,"status":"created","bundle":"/a","annotations":{"a":"b"}}',
            b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n",
        ),
        _words(
            b'1\0|lxc|oci|nspawn|\0a|\0e|\0h|\0i|\0\0|=|{|}|"id":|"pid":|"bundle":|"status":|"annotations":|null|[|]',
            b"36 35 98:0 / |/a |rw | - |ext3 |master:1 |\\040|\n|\xff|\\ud800|99999999999999999999",
        ),
    ),
    "conditions": Target(
        check_conditions,
        1,
        200,
        (
            b'"5d41"\0wait=60',
            b' , W/"5d41" ,,"a,b",\t"\xff"\0a=b&%77ait=%35&c',
            b"*\0wait=1",
            b'"5d41\0wait=05',
            b'"5d41"\0wait=5&wait=5',
            # On either side of each bound.
            *(b'"5d41"\0wait=%d' % seconds for seconds in (0, 9, 61, 99)),
            *(b'"5d%c41"' % byte for byte in b"\x1f !#~\x7f\x80"),
            *(b'"a"%cW/"b"' % byte for byte in b"\t ,;"),
        ),
        _words(
            b'"5d41"|"5d41|"|W/|w/|,| |\t|*|\0|wait=|wait|%77|%61|%69|%74|%57|=|&|;|+|%|%3|%31|%36%30|%00|-|.|1e9',
            b"0|1|5|59|60|61|05|9999999999999|\x7f|\x80|\xff|\xb2|%c2%b2",
        ),
    ),
    "signer": Target(
        check_signer,
        1,
        400,
        (
            b'{"audience":"a","uuid":"6ba7b810-9dad-41d1-80b4-00c04fd430c8","name":"c","project":"p","type":"container","location":"","run":1}',
        ),
        _words(
            b'"audience":|"nonce":|"uuid":|"name":|"project":|"type":|"location":|"run":|"sub":|"a"|null|{|}|,|[|]',
            b'"virtual-machine"|"container"|6ba7b810-9dad-41d1-80b4-00c04fd430c8|\\n|\\u0000|\\ud800|\xff|-1|1e999|../',
        ),
    ),
}
