"""The recorded daemons: their configuration, and the intended differences between each and guestapi."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestapi.model import Device
from tests.wire import recordings
from tests.wire.differences import LXD_RULES, RULES, Difference
from tests.wire.recordings import Case


@dataclass(frozen=True)
class Peer:
    """A recorded daemon.

    Attributes:
        name: its recordings are NAME.jsonl and NAME-events.jsonl.
        dialect: the dialect of its guest socket.
        location: the location of its instances, for guestapi to state.
        config: the configuration that each ``state`` stands for.
        hwaddr: configuration that every recorded container had in addition.
        rules: the intended differences.
        waits: cases that wait for a time limit of the server, and its seconds; None: there is no such limit.
        timeouts: for these cases, the seconds to wait where the recording received nothing; otherwise five.
    """

    name: str
    dialect: str
    location: str | None
    config: Mapping[str, dict[str, str]]
    hwaddr: dict[str, str]
    rules: list[Difference]
    waits: Mapping[str, float | None]
    timeouts: Mapping[str, float]
    devices: dict[str, Device] = field(default_factory=lambda: recordings.DEVICES)

    @property
    def project(self) -> str:
        """The project of the replayed containers."""
        return f"recorded-{self.dialect}"

    @property
    def socket(self) -> str:
        """The path of the guest socket in a container."""
        return f"/dev/{self.dialect}/sock"

    def load(self) -> list[Case]:
        """Return all its recorded exchanges."""
        return recordings.load(self.name)

    def load_events(self) -> list[dict[str, Any]]:
        """Return its recorded event streams: handshakes, frames of clients, and what listeners received."""
        text = Path(__file__).with_name(f"{self.name}-events.jsonl").read_text(encoding="ascii")
        return [json.loads(line) for line in text.splitlines()]


INCUS = Peer(
    name="incus-7.0.2",
    dialect="incus",
    location="peerhost",
    config=recordings.CONFIG,
    hwaddr={"volatile.eth0.hwaddr": "10:66:6a:36:7b:81"},
    rules=RULES,
    waits={
        "no-request": 3,
        "partial-header": 3,
        "patch-short-body-3s": 3,
        "idle-20s-then-request": 20,
        "idle-after-response": 30,
    },
    timeouts={"idle-after-response": 35, "cr-only": 1.2},
)

LXD = Peer(
    name="lxd-5.0.2",
    dialect="lxd",
    location=None,
    config=recordings.LXD_CONFIG,
    hwaddr={"volatile.eth0.hwaddr": "00:16:3e:11:16:f4"},
    rules=LXD_RULES,
    waits=dict.fromkeys(
        ("partial-request-line", "partial-header", "idle-after-response", "second-request-partial"), None
    ),
    timeouts={
        "cr-only": 1.2,
        # More than any time limit of another dialect.
        **dict.fromkeys(
            ("partial-request-line", "partial-header", "idle-after-response", "second-request-partial"), 35
        ),
    },
)
