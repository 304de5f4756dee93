"""The answers of the REST API of Incus and LXD that a mirror uses, and the errors of requests.

The fields are those of the API's documentation (linuxcontainers.org/incus/docs/main/rest-api-spec); both daemons have
them. Other fields are ignored, so a newer daemon may have more.
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
    """The daemon refuses the request, perhaps only now."""


class GoneError(RefusedError):
    """The daemon has no such object."""


class SlowError(RefusedError):
    """The daemon did not answer in time for one instance, or for its operations."""


class UnreadableError(DaemonError):
    """The daemon's answer is malformed."""


class ChangedError(RefusedError):
    """The object has changed since it was read."""


class AnswerTimeError(DaemonError):
    """An answer did not come in time."""


class InstanceState(Struct):
    """The state of an instance. ``pid``: of its init, in the daemon's PID namespace; 0 or less: none."""

    pid: int = 0


class DaemonInstance(Struct):
    """An instance in ``GET /1.0/instances?recursion=1``. Empty values may be null."""

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
    """The daemon's environment."""

    server: str = ""
    server_version: str = ""
    server_name: str = ""
    server_clustered: bool = False


class Server(Struct):
    """``GET /1.0``. ``auth``: whether the daemon trusts this client."""

    environment: Environment = field(default_factory=Environment)
    auth: str = ""
    api_extensions: list[str] = []


class DaemonImage(Struct):
    """An image in ``GET /1.0/images?recursion=1``."""

    fingerprint: str
    type: str = "container"
    public: bool = False
    cached: bool = False
    filename: str = ""
    project: str = ""


class NamedInstance(Struct):
    """The fields that identify an instance."""

    name: str
    project: str = "default"


class LifecycleEvent(Struct):
    """A lifecycle event.

    Attributes:
        action: like ``instance-updated``.
        source: URL of the object that it is about.
        project: of that object.
        context: further fields.
    """

    action: str
    source: str
    project: str = ""
    context: dict[str, Any] | None = None

    @property
    def target(self) -> tuple[str, str, str]:
        """The object that it is about: kind like ``instances``, project, and name."""
        return target_of(self.source, self.project)


class Operation(Struct):
    """An operation that the daemon is working on.

    Attributes:
        class_: ``websocket`` for a client's session, ``task`` for the daemon's own work.
        resources: URLs of the objects that it is about, by kind; may be null.
    """

    class_: str = field(name="class")
    resources: dict[str, list[str]] | None = None


class DaemonEvent(Struct):
    """An event of the stream. ``timestamp``: in RFC 3339; ``location``: the cluster member on which it happened."""

    type: str
    timestamp: str = ""
    metadata: msgspec.Raw = msgspec.Raw(b"{}")
    location: str = ""


class Answer(Struct):
    """The fields of every answer."""

    metadata: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""


def happened(event: DaemonEvent) -> LifecycleEvent | None:
    """Parse a lifecycle event; None if it has another form."""
    try:
        return msgspec.json.decode(event.metadata, type=LifecycleEvent)
    except msgspec.DecodeError:
        return None


def target_of(source: str, project: str = "") -> tuple[str, str, str]:
    """Parse a URL of the API: kind like ``instances``, project, and name."""
    url = urlsplit(source)
    parts = [unquote(part) for part in url.path.split("/") if part]
    named = parse_qs(url.query).get("project", [project or "default"])[0]
    return (parts[1] if len(parts) > 1 else ""), named, (parts[2] if len(parts) > 2 else "")
