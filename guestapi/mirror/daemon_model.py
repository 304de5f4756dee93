"""What Incus and LXD say through their REST API, as far as a mirror needs it, and how asking them may fail.

The fields are those of the API's documentation (linuxcontainers.org/incus/docs/main/rest-api-spec); both daemons share
them. Others are ignored, so a newer daemon may have more.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from msgspec import Struct, field

from guestapi.errors import SourceError


class DaemonError(SourceError):
    """The daemon cannot be asked; the text is one sentence for the operator."""


class RefusedError(DaemonError):
    """The daemon is there, but does not do this, or not now."""


class GoneError(RefusedError):
    """The daemon knows no such thing (any more)."""


class SlowError(RefusedError):
    """The daemon has not said in time what it was asked of one instance, or of what it is doing."""


class UnreadableError(DaemonError):
    """What the daemon says cannot be read."""


class ChangedError(RefusedError):
    """It is not any more as it was when it was looked at."""


class AnswerTimeError(DaemonError):
    """An answer did not come in time."""


class InstanceState(Struct):
    """How an instance is now. ``pid``: of its init, as the daemon sees it; 0 or less: it has none."""

    pid: int = 0


class DaemonInstance(Struct):
    """An instance, as ``GET /1.0/instances?recursion=1`` has it. What is empty may be null."""

    name: str
    type: str
    status: str = ""
    project: str = "default"
    location: str = ""
    created_at: str = ""
    config: dict[str, str] | None = None
    expanded_config: dict[str, str] | None = None
    expanded_devices: dict[str, dict[str, str]] | None = None


class Environment(Struct):
    """What the daemon says of itself."""

    server: str = ""
    server_version: str = ""
    server_name: str = ""
    server_clustered: bool = False
    server_pid: int = 0


class Server(Struct):
    """``GET /1.0``; ``auth``: whether it trusts us."""

    environment: Environment = field(default_factory=Environment)
    auth: str = ""
    api_extensions: list[str] = []


class DaemonImage(Struct):
    """An image, as ``GET /1.0/images?recursion=1`` has it."""

    fingerprint: str
    type: str = "container"
    public: bool = False
    cached: bool = False
    filename: str = ""
    project: str = ""


class NamedInstance(Struct):
    """As much of an instance as says which one it is."""

    name: str
    project: str = "default"


class LifecycleEvent(Struct):
    """A lifecycle event.

    Attributes:
        action: like ``instance-updated``.
        source: URL of what it happened to.
        project: of that.
        context: more about it.
    """

    action: str
    source: str
    project: str = ""
    context: dict[str, Any] | None = None

    @property
    def target(self) -> tuple[str, str, str]:
        """What it happened to: kind like ``instances``, project, and name."""
        return target_of(self.source, self.project)


class Operation(Struct):
    """An operation that the daemon is working on.

    Attributes:
        class_: ``websocket`` for a client's session, ``task`` for the daemon's own work.
        resources: URLs of what it is about, by kind; may be null.
    """

    class_: str = field(name="class")
    resources: dict[str, list[str]] | None = None


class DaemonEvent(Struct):
    """One of the event stream; ``timestamp`` in RFC 3339; ``location``: the cluster member on which it happened."""

    type: str
    timestamp: str = ""
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    location: str = ""


class Answer(Struct):
    """What every answer has."""

    metadata: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


def happened(event: DaemonEvent) -> LifecycleEvent | None:
    """What a lifecycle event tells; None if it is of another form."""
    try:
        return msgspec.json.decode(event.metadata, type=LifecycleEvent)
    except msgspec.DecodeError:
        return None


def target_of(source: str, project: str = "") -> tuple[str, str, str]:
    """Return what a URL of the API is about: kind like ``instances``, project, and name."""
    url = urlsplit(source)
    parts = [unquote(part) for part in url.path.split("/") if part]
    named = parse_qs(url.query).get("project", [project or "default"])[0]
    return (parts[1] if len(parts) > 1 else ""), named, (parts[2] if len(parts) > 2 else "")
