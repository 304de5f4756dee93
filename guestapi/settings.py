"""guestapi.toml -> `Settings`. Every error is a `SettingsError` that names the file, the key and what is expected.

Rules: every default and every unit of guestapi.toml is defined here, once. Nothing else reads the file. gunicorn's own
settings (workers and the rest) are in a file of their own (`gunicorn_conf`).
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta, Struct

from guestapi import defaults
from guestapi.dialects import DIALECTS, HANDOVER, HANDOVER_SOCKET
from guestapi.errors import OperatorError

DEFAULT_FILE = Path(defaults.FILE)

#: Bytes of an audience and of an issuer in a token.
WORD_BYTES = 256
#: SPIFFE-ID, section 2.1.
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")

Seconds = Annotated[float, Meta(gt=0, le=defaults.MOST_SECONDS)]


class SettingsError(OperatorError):
    """The configuration cannot be used."""


class StoreSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where instances are stored.

    Attributes:
        url: of the database.
        lock_seconds: how long a writer waits for another writer's transaction.
        configuration_bytes: the most bytes of an instance's configuration and devices together.
    """

    url: str = defaults.STORE_URL
    lock_seconds: Seconds = defaults.LOCK_SECONDS
    configuration_bytes: Annotated[
        int, Meta(ge=defaults.LEAST_CONFIGURATION_BYTES, le=defaults.MOST_CONFIGURATION_BYTES)
    ] = defaults.CONFIGURATION_BYTES


class ListenSocket(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A listening socket.

    Attributes:
        path: of the socket.
        dialect: name of its dialect, or `HANDOVER`.
    """

    path: str
    dialect: str = "incus"


class LimitSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a guest may use, with sizes in bytes and times in seconds.

    The times are those of Incus 7.0.2 (3 s for the head, 3 s for the body, 30 s idle), which existing clients know.
    ``header_fields`` cannot exceed 256, the size of gunicorn_h1c's table (MAX_HEADERS). ``requests_per_second`` 0 means
    no limit. ``unsent_per_instance`` is large enough for one of the largest values (2 MiB).
    """

    connections_per_instance: Annotated[int, Meta(ge=1, le=65536)] = 256
    request_line: Annotated[int, Meta(ge=512, le=65536)] = 16384
    header_fields: Annotated[int, Meta(ge=8, le=256)] = 128
    header_field: Annotated[int, Meta(ge=512, le=65536)] = 16384
    head: Annotated[int, Meta(ge=1024, le=1 << 20)] = 65536
    body: Annotated[int, Meta(ge=1024, le=1 << 20)] = 65536
    head_seconds: Seconds = 3.0
    body_seconds: Seconds = 3.0
    idle_seconds: Seconds = 30.0
    send_seconds: Seconds = 10.0
    writes_per_second: Annotated[float, Meta(gt=0, le=1_000_000)] = 5.0
    writes_burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    requests_per_second: Annotated[float, Meta(ge=0, le=1_000_000)] = 0.0
    requests_burst: Annotated[int, Meta(ge=1, le=1_000_000)] = 200
    unsent_per_instance: Annotated[int, Meta(ge=1 << 16, le=1 << 40)] = 1 << 24
    streams_per_instance: Annotated[int, Meta(ge=0, le=65536)] = 64
    stream_queue: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    stream_send_seconds: Seconds = 5.0


class EventSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far back the change log reaches.

    Attributes:
        keep_entries: the most entries.
        keep_seconds: the greatest age of an entry.
    """

    keep_entries: Annotated[int, Meta(ge=1, le=defaults.MOST_ENTRIES)] = defaults.KEEP_ENTRIES
    keep_seconds: Annotated[int, Meta(ge=1)] = defaults.KEEP_SECONDS


class HookSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename={"on_failure": "on-failure"}):
    """What hooks of container runtimes do.

    Attributes:
        on_failure: whether a container starts although it cannot be registered (``on-failure`` in the file).
        project: of the instances that they add.
        template: what the first follower takes over into the profile ``default`` of that project.
    """

    on_failure: Literal["continue", "refuse"] = "continue"
    project: str = "default"
    template: dict[str, str] = {}


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is logged.

    Attributes:
        level: the least that is logged.
        requests: which requests: all, those with a status from 400 on, or none.
        requests_per_second: the most lines about requests in a second.
        instance_bytes_per_second: the most bytes of such lines in a second for each instance, over a longer time.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    requests: Literal["all", "refused", "none"] = "refused"
    requests_per_second: Annotated[int, Meta(ge=1, le=1_000_000)] = 100
    instance_bytes_per_second: Annotated[int, Meta(ge=64, le=1 << 30)] = 1024


class CallerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How callers are identified.

    Attributes:
        pidfd: whether to use SO_PEERPIDFD and ioctls where the kernel has them, or /proc alone.
        wait_seconds: on a host with a mirror or a follower, how long a caller waits whose instance is not registered
            yet.
        waiting: how many callers of a worker may wait; containers share these places.
    """

    pidfd: bool = True
    wait_seconds: Annotated[float, Meta(ge=0, le=10)] = 2.0
    waiting: Annotated[int, Meta(ge=0, le=65536)] = 64


class ImageSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where image files are.

    Attributes:
        directory: an absolute path; None for ``images`` beside the database.
    """

    directory: str | None = None


class LxcSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``paths``: the lxcpaths in which containers are looked for (``lxc.lxcpath`` in lxc.system.conf(5))."""

    paths: tuple[str, ...] = ("/var/lib/lxc",)


class PodmanSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How containers of podman are found.

    ``socket``: where the Docker-compatible API listens. ``annotations``: whether annotations and labels named
    ``guestapi.config.KEY`` become configuration. The engine does not tell those of the image from the operator's, so
    who makes an image then chooses what its containers are told. ``security.*`` is never taken from them.
    """

    socket: str = "/run/podman/podman.sock"
    annotations: bool = False


class DockerSettings(PodmanSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How containers of Docker are found, by the same keys."""

    socket: str = "/run/docker.sock"


class OciSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How containers of crun and runc are found, where these are used alone.

    ``roots``: the runtimes' state directories (their option ``--root``). ``annotations``: as of `PodmanSettings`.
    """

    roots: tuple[str, ...] = ("/run/crun", "/run/runc")
    annotations: bool = False


class SourcesSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where each follower of a runtime looks for containers.

    ``doorbells``: the directory of the sockets at which hooks ring.
    """

    doorbells: str = "/run/guestapi/sources"
    lxc: LxcSettings = LxcSettings()
    podman: PodmanSettings = PodmanSettings()
    docker: DockerSettings = DockerSettings()
    oci: OciSettings = OciSettings()


class MetricsSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How what is counted comes from the workers to ``guestapi metrics`` and ``guestapi top``.

    Attributes:
        directory: an absolute path, where the service can write. If it is not there, nothing is handed over.
    """

    directory: str = "/run/guestapi/metrics"


class ServerSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The web server.

    Attributes:
        gunicorn: path of gunicorn's own configuration file, relative to guestapi.toml. It need not exist.
        ubuntu_pro: what gives guests tokens of Ubuntu Pro, like ``package.module:Provider``; ``off``: nothing.
    """

    gunicorn: str = "gunicorn.conf.py"
    ubuntu_pro: str = "off"


class FleetSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fleet that this host belongs to, or that is looked after from here.

    Attributes:
        url: of its database, as libpq takes it; None: there is none.
        host: the name of this host in the fleet; None: its host name.
        certificate: path of the certificate of this host; None: as the URL or libpq says, like the next two.
        key: path of its private key.
        ca: path of the certificates of the authority that has signed the database's.
    """

    url: str | None = None
    host: str | None = None
    certificate: str | None = None
    key: str | None = None
    ca: str | None = None


class IdentitySettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tokens that say which instance their bearer is.

    Attributes:
        trust_domain: of SPIFFE, in which instances have their names; None: there are no tokens.
        issuer: who signs, as tokens say it; None: the trust domain, as an https URL.
        audiences: for whom instances may have tokens.
        keys: an absolute path, the directory with the file of the keys.
        socket: an absolute path, where the signer listens.
    """

    trust_domain: str | None = None
    issuer: str | None = None
    audiences: tuple[str, ...] = ()
    keys: str = "/var/lib/guestapi-signer"
    socket: str = "/run/guestapi/signer.sock"

    @property
    def issuer_or_default(self) -> str:
        """Who signs."""
        return self.issuer or f"https://{self.trust_domain}"


class Settings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All settings, with defaults for those that guestapi.toml does not have.

    Attributes:
        file: from which they were read; None if there is no file. The other attributes are the tables of the file.
    """

    store: StoreSettings = StoreSettings()
    listener: tuple[ListenSocket, ...] = (
        ListenSocket(path=DIALECTS["incus"].socket),
        ListenSocket(path=DIALECTS["lxd"].socket, dialect="lxd"),
    )
    limits: LimitSettings = LimitSettings()
    events: EventSettings = EventSettings()
    callers: CallerSettings = CallerSettings()
    hooks: HookSettings = HookSettings()
    images: ImageSettings = ImageSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    fleet: FleetSettings = FleetSettings()
    identity: IdentitySettings = IdentitySettings()
    server: ServerSettings = ServerSettings()
    sources: SourcesSettings = SourcesSettings()
    file: Path | None = None

    @property
    def guest_listeners(self) -> tuple[ListenSocket, ...]:
        """The sockets that guests connect to."""
        return tuple(one for one in self.listener if one.dialect != HANDOVER)

    @property
    def handover(self) -> str:
        """Path of the socket at which connections of virtual machines are handed over."""
        return next((one.path for one in self.listener if one.dialect == HANDOVER), HANDOVER_SOCKET)

    @property
    def gunicorn_file(self) -> Path:
        """Path of gunicorn's configuration file, which need not exist."""
        return (self.file or DEFAULT_FILE).parent / self.server.gunicorn


def find(explicit: str | None) -> Path | None:
    """Find the file to read.

    Args:
        explicit: the value of ``--config``; None if it was not given.

    Returns:
        `explicit`, otherwise ``$GUESTAPI_CONFIG``, otherwise /etc/guestapi/guestapi.toml; None if that does not exist.
    """
    named = explicit or os.environ.get(defaults.FILE_VARIABLE)
    if named:
        return Path(named)
    return DEFAULT_FILE if DEFAULT_FILE.exists() else None


def load(file: Path | None) -> Settings:
    """Read the settings.

    Args:
        file: guestapi.toml; None for the defaults.

    Raises:
        SettingsError: the file cannot be read, is not TOML, or has an unknown key or an impossible value.
    """
    if file is None:
        return Settings()
    try:
        document = tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        hint = "run this as root" if isinstance(error, PermissionError) else "give a readable file with --config"
        raise SettingsError(f"{file}: {error.strerror}; {hint}") from None
    except ValueError as error:
        # tomllib's own errors, bytes that are not UTF-8, and numbers with more digits than Python accepts.
        raise SettingsError(f"{file}: not TOML: {error}") from None
    except RecursionError:
        raise SettingsError(f"{file}: not TOML: nested too deeply") from None
    _refuse_unknown(document, Settings, file, "")
    try:
        settings = msgspec.convert(document, Settings)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise SettingsError(f"{file}: {where.strip('.`') or 'the file'}: {what[0].lower()}{what[1:]}") from None
    if not settings.listener:
        raise SettingsError(f"{file}: listener: is empty; at least one socket is needed")
    paths = [listener.path for listener in settings.listener]
    for path in paths:
        if paths.count(path) > 1:
            raise SettingsError(f"{file}: listener.path: {path!r} is there twice")
    for listener in settings.listener:
        if listener.dialect not in DIALECTS and listener.dialect != HANDOVER:
            known = ", ".join((*DIALECTS, HANDOVER))
            raise SettingsError(f"{file}: listener.dialect: {listener.dialect!r} is none of {known}")
        if not listener.path.startswith("/"):
            raise SettingsError(f"{file}: listener.path: {listener.path!r} is not an absolute path")
    if settings.images.directory is not None and not settings.images.directory.startswith("/"):
        raise SettingsError(f"{file}: images.directory: {settings.images.directory!r} is not an absolute path")
    if settings.fleet.url is not None and not settings.fleet.url.startswith(("postgresql://", "postgres://")):
        raise SettingsError(f"{file}: fleet.url: does not begin with postgresql://")
    _check_identity(settings.identity, file)
    sources = settings.sources
    places = [("podman.socket", sources.podman.socket), ("docker.socket", sources.docker.socket)]
    if not settings.metrics.directory.startswith("/"):
        raise SettingsError(f"{file}: metrics.directory: {settings.metrics.directory!r} is not an absolute path")
    places += [("doorbells", sources.doorbells), *(("lxc.paths", path) for path in sources.lxc.paths)]
    for key, place in (*places, *(("oci.roots", root) for root in sources.oci.roots)):
        if not place.startswith("/"):
            raise SettingsError(f"{file}: sources.{key}: {place!r} is not an absolute path")
    return msgspec.structs.replace(settings, file=file)


def _check_identity(identity: IdentitySettings, file: Path) -> None:
    """Refuse what no token could say."""
    if identity.trust_domain is not None and not _TRUST_DOMAIN.fullmatch(identity.trust_domain):
        raise SettingsError(
            f"{file}: identity.trust_domain: {identity.trust_domain!r} is not 1 to 255 of a-z, 0-9, '.', '-' and '_'"
        )
    for key, word in (("issuer", identity.issuer_or_default), *(("audiences", one) for one in identity.audiences)):
        if not word.isprintable() or not 1 <= len(word.encode()) <= WORD_BYTES:
            raise SettingsError(
                f"{file}: identity.{key}: {word!r} is not 1 to {WORD_BYTES} bytes of printable characters"
            )
    for key, place in (("keys", identity.keys), ("socket", identity.socket)):
        if not place.startswith("/"):
            raise SettingsError(f"{file}: identity.{key}: {place!r} is not an absolute path")


def _refuse_unknown(document: dict[str, Any], struct: type[Struct], file: Path, prefix: str) -> None:
    """Refuse unknown keys, and name the known ones. msgspec would only name the unknown key."""
    hints = get_type_hints(struct)
    known = {field.encode_name: hints[field.name] for field in msgspec.structs.fields(struct) if field.name != "file"}
    for key, value in document.items():
        if key not in known:
            raise SettingsError(f"{file}: {prefix}{key}: unknown key; known here: {', '.join(sorted(known))}")
        inner = (*get_args(known[key]), known[key])[0]
        if isinstance(inner, type) and issubclass(inner, Struct):
            for table in value if isinstance(value, list) else [value]:
                if isinstance(table, dict):
                    _refuse_unknown(table, inner, file, f"{prefix}{key}.")
