"""The recorded exchanges with live daemons, in a format of this project: PEER.jsonl, one case a line.

``case``: its name. ``as``: the kind of sender (`KINDS`). ``state``: the instance's configuration before the exchange
(`CONFIG`). ``steps``: ``send`` bytes, ``wait`` seconds, ``shutdown``, ``receive`` responses. ``closed``: the server had
closed the connection 30 ms after the last response. ``ready_after``: the instance's state after the exchange.

Bytes are text with one character for each byte. A list of pieces stands for their concatenation; the piece [text,
times] repeats the text. A response has only the compared parts: status, Content-Type, nosniff, Location, the other
header fields of images, and the body with its chunks joined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent

_BASIC = {
    "user.foo": "bar",
    "cloud-init.user-data": "#cloud-config\n{}\n",
    "security.nesting": "true",
    "environment.X": "1",
}
_ODD = {
    "user.uni": "héllo ☃ 😀",
    "user.nl": "a\nb\r\nc\n",
    "user.pct": "%s%d%%",
    "user.html": "<b>&</b>",
    "user.space": "  x  ",
    "user.a/b": "slash",
    "user.with space": "sp",
    "user.jü": "uml",
    "user.pc%41": "pct",
    "user.q?x": "qmark",
    "user.": "dotonly",
    "user.json": '{"a": 1}',
    "user.bin": "\x01\x02\x7f",
    "user.long": "x" * 70000,
    "user.2k": "y" * 2048,
    "user.4k": "z" * 4096,
    "user.plus+": "plus",
    "user.semi;": "semi",
    "cloud-init.user-data": "#cloud-config\n{}\n",
}
_CLOUD_INIT = {
    "cloud-init.user-data": "#cloud-config\nruncmd: [ls]\n",
    "cloud-init.vendor-data": "#cloud-config\n{}\n",
    "cloud-init.network-config": "version: 2\n",
    "user.user-data": "#cloud-config\n{}\n",
    "user.vendor-data": "v",
    "user.network-config": "n",
}

#: The configuration that each ``state`` stands for.
CONFIG: dict[str, dict[str, str]] = {
    "plain": {"user.foo": "bar"},
    "basic": _BASIC,
    "odd": _ODD,
    "cloud-init": _CLOUD_INIT,
    "profile": {"user.both": "instance", "user.fromprofile": "p", "cloud-init.vendor-data": "#cloud-config\n{}\n"},
    "none": {},
    "images": {"user.foo": "bar", "security.guestapi.images": "true"},
    "images-off": {"security.guestapi.images": "false"},
    **{f"size {size}": {"user.size": "s" * size} for size in (2000, 2048, 2049, 4096, 5000)},
}

#: The fingerprints of the recorded images: a public one, whose bytes were recorded, a private one and a split one.
PUBLIC = "429bc2e451d8a560c27cf01b5a82a4adc3d908408fb4bb564f2d3a8503bdad06"
PRIVATE = "bb960cdb220dbfe2a987122c59eab1bda63ff7936c3bbaabb1e637d711195a75"
SPLIT = "2153261497f9376ff1df8b8aa26e472c0d8b7925c72c1fc5fe37437195317649"

#: The same for LXD's recording, as far as it differs.
LXD_CONFIG: dict[str, dict[str, str]] = {
    **CONFIG,
    "odd": {**_ODD, "user.pct": "100%s %d %% %n %!", "user.pc%41": "percent-name"},
    "cloud-init": {**_CLOUD_INIT, "user.user-data": "old style"},
    "meta-data": {"user.meta-data": "instance-id: mine\nlocal-hostname: other"},
    "off": {"user.foo": "bar", "security.devlxd": "false"},
    "images": {"user.foo": "bar", "security.devlxd.images": "true"},
    "images-off": {"security.devlxd.images": "false"},
    **{f"size {size}": {"user.size": "s" * size} for size in (2000, 2049, 4000, 4096)},
}

DEVICES = {
    "eth0": {"name": "eth0", "nictype": "bridged", "parent": "br0", "type": "nic"},
    "root": {"path": "/", "pool": "default", "type": "disk"},
}


@dataclass(frozen=True)
class Case:
    """One recorded exchange."""

    name: str
    sender: str
    state: str
    steps: list[list[Any]]
    closed: bool
    ready_after: bool | None

    @property
    def method(self) -> str:
        """The method of the first request."""
        return self.sent.split(b" ", 1)[0].decode("latin-1")

    @property
    def sent(self) -> bytes:
        """All bytes that were sent."""
        return b"".join(unfold(step[1]) for step in self.steps if step[0] == "send")

    def renamed(self, names: Mapping[str, str]) -> Case:
        """Return the case with these fingerprints, and their first twelve digits, in place of the recorded ones."""
        text = json.dumps(self.steps)
        for old, new in names.items():
            text = text.replace(old, new).replace(old[:12], new[:12])
        return replace(self, steps=json.loads(text))

    @property
    def ready_before(self) -> bool:
        """Whether the instance was ready before the exchange, according to the recorded responses."""
        return any('"state":"Ready"' in response.get("body", "") for response in self.expected if response)

    @property
    def expected(self) -> list[dict[str, Any]]:
        """All responses."""
        return [response for step in self.steps if step[0] == "receive" for response in step[1]]


def unfold(pieces: str | list[Any]) -> bytes:
    """Return the bytes that a text, or a list of pieces, stands for."""
    if isinstance(pieces, str):
        return pieces.encode("latin-1")
    return b"".join(
        piece.encode("latin-1") if isinstance(piece, str) else piece[0].encode("latin-1") * piece[1] for piece in pieces
    )


def public_image(cases: list[Case]) -> bytes:
    """Return the recorded bytes of the public image."""
    named = [case for case in cases if case.name == "image-true-public"]
    (body,) = [case.expected[0]["body"] for case in named if case.sender == "root"]
    return bytes(body, "latin-1")


def load(peer: str) -> list[Case]:
    """Return all recorded exchanges of a peer."""
    found = []
    for line in (_HERE / f"{peer}.jsonl").read_text(encoding="ascii").splitlines():
        entry = json.loads(line)
        for step in entry["steps"]:
            if step[0] == "receive":
                for response in step[1]:
                    if "body" in response:
                        response["body"] = unfold(response["body"]).decode("latin-1")
        found.append(
            Case(entry["case"], entry["as"], entry["state"], entry["steps"], entry["closed"], entry.get("ready_after"))
        )
    return found
