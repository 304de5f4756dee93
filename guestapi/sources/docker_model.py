"""The part of the Docker-compatible API's answers that is used here (docs.docker.com/reference/api/engine)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from msgspec import Struct, field

#: A full id: a shorter one could be the prefix of another.
ID = re.compile("[0-9a-f]{64}")


class ContainerMount(Struct, frozen=True, rename="pascal"):
    """A mount of a container.

    Attributes:
        type: ``bind``: of a path of the host, which only the operator can give; ``volume``, ``tmpfs`` and others.
        name: of the volume.
        source: path on the host.
        destination: path inside.
        rw: whether it can be written to.
    """

    type: str = ""
    name: str = ""
    source: str = ""
    destination: str = ""
    rw: bool = field(default=True, name="RW")


class Listed(Struct, frozen=True, rename="pascal"):
    """A container in the list. ``mounts`` None: this engine's list has no mounts."""

    id: str
    names: list[str] | None = None
    mounts: list[ContainerMount] | None = None


class State(Struct, frozen=True, rename="pascal"):
    """The state of a container.

    Attributes:
        pid: of its init; 0: it does not run.
        started_at: when it was last started, RFC 3339.
    """

    pid: int = 0
    started_at: str = ""


class HostConfig(Struct, frozen=True, rename="pascal"):
    """The operator's settings; modes are empty, ``private``, ``host``, or ``container:ID``."""

    pid_mode: str = ""
    uts_mode: str = field(default="", name="UTSMode")


class Config(Struct, frozen=True, rename="pascal"):
    """Host name inside, and labels: those of the image and the operator's are merged here."""

    hostname: str = ""
    labels: dict[str, str] | None = None


class Network(Struct, frozen=True, rename="pascal"):
    """A container's interface in one network."""

    mac_address: str = ""


class NetworkSettings(Struct, frozen=True, rename="pascal"):
    """Networks by name."""

    networks: dict[str, Network | None] | None = None


class EngineContainer(Struct, frozen=True, rename="pascal"):
    """The answer to inspect. ``image``: the container's image; ``sha256:`` alone if it has none."""

    id: str
    name: str
    image: str = ""
    state: State = State()
    host_config: HostConfig = HostConfig()
    config: Config = Config()
    mounts: list[ContainerMount] | None = None
    network_settings: NetworkSettings = NetworkSettings()


class Annotated(Struct, frozen=True, rename="pascal"):
    """Annotations of a container or an image, as podman's own API has them."""

    annotations: dict[str, str] | None = None
    labels: dict[str, str] | None = None


class LibpodContainer(Struct, frozen=True, rename="pascal"):
    """A container, as podman's own API has it."""

    config: Annotated = Annotated()


class Volume(Struct, frozen=True, rename="pascal"):
    """A volume. ``options``: of the local driver those of mount(8): ``type``, ``device``, ``o``."""

    options: dict[str, str] | None = None


def operators(names: Sequence[ContainerMount]) -> list[ContainerMount]:
    """Return the mounts that only the operator can give: binds and named volumes, not volumes that an image declares.

    A volume that an image declares has no name; engines give it one of 64 hexadecimal digits.
    """
    return [
        one for one in names if one.type == "bind" or (one.type == "volume" and one.name and not ID.fullmatch(one.name))
    ]
