"""podman and Docker: their containers that have our socket's directory mounted.

Rules: the operator decides by a mount, because an image cannot bring one from the host. The instance has the
container's name, and the full id is its key. Whatever an image can bring (annotations, labels, volumes, environment)
decides nothing. It becomes configuration only if the operator allows that for all images (``annotations = true``).
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from guestapi.callers.namespaces import NotAnInitError, examine, start_time
from guestapi.model import Device, Init
from guestapi.settings import PodmanSettings, Settings
from guestapi.sources import bundles
from guestapi.sources.bundles import CONFIG_PREFIX, configuration
from guestapi.sources.docker_api import ContainerGoneError, Engine, EngineError, Events
from guestapi.sources.docker_model import ContainerMount, EngineContainer, operators
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.places import Look, Places
from guestapi.sources.processes import born, in_cgroup
from guestapi.sources.source import Unclear

#: Digits of the id in the host name that engines set by default.
_SHORT_ID = 12
#: Seconds by which an init may seem younger than its container, because one time is by the clock and the other counts
#: from boot. It is more than a step of the clock, and less than the time until a PID is reused.
_CLOCK_SECONDS = 60.0
#: Most seconds of a look at all containers, and at one.
_ROUND_SECONDS, _ONE_SECONDS = 60.0, 15.0
#: Most containers with rings that are remembered while the engine's events are not available.
_RUNG = 10_000
#: PID modes of a container without a PID namespace of its own.
_SHARED = ("host", "container:", "ns:")
#: How often a look at a container is repeated that changes meanwhile.
_TRIES = 3
#: Bytes of an annotation that a message about it shows.
_SHOWN = 80


@dataclass(frozen=True, slots=True)
class Runtime:
    """What differs between engines.

    Attributes:
        name: of the source.
        unit: the unit that offers the API.
        has_annotations: whether the engine's own API has annotations besides labels.
    """

    name: str
    unit: str
    has_annotations: bool


PODMAN = Runtime("podman", "podman.socket", has_annotations=True)
DOCKER = Runtime("docker", "docker.socket", has_annotations=False)


@dataclass(frozen=True, slots=True)
class _Round:
    """One look at an engine.

    Attributes:
        look: device and inode of our socket directories now.
        until: when the look ends, in seconds of the monotonic clock, even if containers are left.
        volumes: by name, whether a volume shows one of the places. Several containers may share a volume.
    """

    look: Look
    until: float
    volumes: dict[str, bool] = field(default_factory=dict)


class Keys:
    """Containers to look at soon, handed from one thread to another. Readable when there are some."""

    def __init__(self) -> None:
        self._keys: deque[str] = deque(maxlen=_RUNG)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._event

    def append(self, key: str) -> None:
        """Add one."""
        self._keys.append(key)
        os.eventfd_write(self._event, 1)

    def take(self) -> set[str]:
        """Remove and return all that were added."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return set()
        found = set()
        while self._keys:
            found.add(self._keys.popleft())
        return found


class EngineChanges:
    """An engine's events, together with the containers whose hooks rang. `read` never blocks."""

    def __init__(self, events: Events, rung: Keys) -> None:
        """Describe the source.

        Args:
            events: the engine's events, closed with this object.
            rung: the containers whose hooks rang; not closed with this object.
        """
        self._events, self._rung = events, rung
        self._epoll = select.epoll()
        for one in (events, rung):
            self._epoll.register(one.fileno(), select.EPOLLIN)

    def fileno(self) -> int:
        """For poll(2)."""
        return self._epoll.fileno()

    def read(self) -> frozenset[str] | None:
        """Return ids of containers to look at; None: look at all.

        Raises:
            SourceError: the event stream has ended.
        """
        rung = self._rung.take()
        found = self._events.read()
        return found | rung if found is not None else None

    def close(self) -> None:
        """End the stream."""
        self._epoll.close()
        self._events.close()


class EngineSource:
    """The containers of one engine."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        """Describe the source.

        Args:
            runtime: the engine.
            settings: the engine's socket, and the paths of the guest API's sockets.
        """
        self.name = runtime.name
        self._runtime = runtime
        chosen: PodmanSettings = getattr(settings.sources, runtime.name)
        self._annotations = chosen.annotations
        self._engine = Engine(chosen.socket)
        self._project = settings.hooks.project
        self._places = Places.of(settings.guest_listeners)
        self._rung = Keys()

    def observe(self, known: Mapping[str, Init | None]) -> Iterator[Observed | Unclear | Problem]:
        """Observe all containers with our mount, running or not.

        Args:
            known: the inits that the store has, by key.

        Raises:
            SourceError: the engine cannot be asked.
        """
        this = _Round(self._places.look(), time.monotonic() + _ROUND_SECONDS)
        try:
            listed = self._engine.containers()
        except EngineError as error:
            hint = f"'systemctl enable --now {self._runtime.unit}', or give sources.{self.name}.socket"
            raise EngineError(error.message, hint) from None
        for one in listed:
            if time.monotonic() > this.until and one.id not in known:
                # The next look observes these.
                continue
            try:
                if one.mounts is not None and not any(self._is_ours(mount, this) for mount in operators(one.mounts)):
                    continue
            except EngineError as error:
                yield Unclear(one.id, str(error))
                continue
            found = self._observe(one.id, known.get(one.id), this)
            if found is not None:
                yield found

    def observe_one(self, key: str, known: Init | None) -> Observed | Unclear | Problem | None:
        """Observe one container; None: it is gone, or has not our mount.

        Args:
            key: its full id.
            known: the init that the store has of it.
        """
        return self._observe(key, known, _Round(self._places.look(), time.monotonic() + _ONE_SECONDS))

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """Observe a container whose init does not run yet, by its bundle and its conmon, without the API.

        podman does not answer for a container while its hooks run. It is asked right afterwards for networks, and for
        the reason why a container cannot be registered.
        """
        bundle = bundles.read_state(ring.state)
        look = self._places.look()
        if bundle is None or not bundle.is_stored or bundle.pid is None or not any(map(look.has, bundle.binds)):
            return None
        self._rung.append(bundle.id)
        name = bundles.conmon_name(bundle.pid, bundle.id)
        if name is None or not bundle.has_own_pid_namespace:
            return None
        try:
            init = examine(bundle.pid)
        except NotAnInitError:
            return None
        disks = bundles.podman_disks(mount for mount in bundle.mounts if not look.has(mount.source))
        devices, of_devices = bundles.disk_devices(disks)
        config, problems = configuration(bundle.annotations) if self._annotations else ({}, ())
        hostname = bundle.hostname if bundle.hostname != bundle.id[:_SHORT_ID] else None
        problems = (*of_devices, *problems)
        return Observed(bundle.id, self._project, name, "container", hostname, init, config, devices, problems=problems)

    def changes(self) -> EngineChanges:
        """Subscribe to the engine's events and the rings.

        Raises:
            SourceError: the events are not available.
        """
        return EngineChanges(self._engine.events(), self._rung)

    def _observe(self, key: str, known: Init | None, this: _Round) -> Observed | Unclear | Problem | None:
        try:
            for _ in range(_TRIES):
                if time.monotonic() > this.until:
                    return Unclear(key, f"{self.name} has taken too long to tell of container {key[:_SHORT_ID]}")
                container = self._engine.container(key)
                mounts = operators(container.mounts or [])
                others = [mount for mount in mounts if not self._is_ours(mount, this)]
                if len(others) == len(mounts):
                    return None
                if container.host_config.pid_mode.startswith(_SHARED):
                    return self._shares(container)
                found = self._describe(container, others, known)
                if found is not None:
                    return found
        except ContainerGoneError:
            return None
        except EngineError as error:
            return Unclear(key, str(error))
        return Unclear(key, f"{self.name} container {key[:_SHORT_ID]} has changed during each of {_TRIES} looks")

    def _describe(
        self, container: EngineContainer, mounts: list[ContainerMount], known: Init | None
    ) -> Observed | None:
        """Observe a container with our mount and other `mounts`; None: it changed during the look."""
        key, name, problems = container.id, container.name.removeprefix("/"), list[str]()
        init = None
        if container.state.pid > 0:
            try:
                init = examine(container.state.pid)
            except NotAnInitError:
                if self._engine.container(key).state != container.state:
                    return None
                # It has ended and the engine has not noticed yet, or its PID was reused.
                is_right = _is_gone(container.state.pid)
            else:
                is_right = init == known or _belongs(init, container)
            if not is_right:
                problems.append(f"{self.name} says that process {container.state.pid} is its init, which it is not")
                init = None
        devices, of_devices = _devices(container, mounts)
        told = self._told(container)
        config, of_config = configuration(told) if self._annotations else ({}, self._relies(container, name, told))
        hostname = container.config.hostname
        return Observed(
            key,
            self._project,
            name,
            "container",
            hostname if hostname and hostname != key[:_SHORT_ID] else None,
            init,
            config,
            devices,
            problems=(*problems, *of_devices, *of_config),
        )

    def _shares(self, container: EngineContainer) -> Problem | None:
        """Report a container that shares another's PID namespace; nothing if it does not run."""
        if container.state.pid <= 0:
            return None
        name = container.name.removeprefix("/")
        whose = "the host" if container.host_config.pid_mode == "host" else "another container"
        reason = f"{self.name} container {name} is not registered: it shares the PID namespace of {whose}"
        hint = "its processes are answered as those of the container whose namespace it is, on the host not at all"
        return Problem(self.name, container.id, self._project, name, reason, hint, refused=True)

    def _is_ours(self, mount: ContainerMount, this: _Round) -> bool:
        if this.look.has(mount.source):
            return True
        if mount.type != "volume":
            return False
        if mount.name not in this.volumes:
            try:
                options = self._engine.volume(mount.name).options or {}
            except ContainerGoneError:
                # It was removed meanwhile, so no container has it mounted.
                options = {}
            is_bind = "bind" in options.get("o", "").split(",")
            this.volumes[mount.name] = is_bind and this.look.has(options.get("device", ""))
        return this.volumes[mount.name]

    def _told(self, container: EngineContainer) -> dict[str, str]:
        """Return annotations and labels, the image's and the operator's merged."""
        found = dict(container.config.labels or {})
        if self._runtime.has_annotations:
            found |= self._engine.annotations(container.id)
        return found

    def _relies(self, container: EngineContainer, name: str, told: Mapping[str, str]) -> tuple[str, ...]:
        """Yield a sentence for each annotation of the operator that guestapi 0.1 used, but none for the image's."""
        wanted = {key: value for key, value in told.items() if key.startswith("guestapi.")}
        if not wanted or not self._runtime.has_annotations:
            return ()
        of_image: Mapping[str, str] = {}
        digest = container.image.removeprefix("sha256:")
        if digest:
            try:
                of_image = self._engine.image_annotations(digest)
            except EngineError:
                # The image is gone or has none to compare, so it is unknown whose annotations these are.
                return ()
        labels = container.config.labels or {}
        operator = {k: v for k, v in wanted.items() if of_image.get(k) != v and k not in labels}
        found = []
        if operator.get("guestapi.name", name) != name:
            other = operator["guestapi.name"][:_SHOWN]
            found.append(
                f"the annotation guestapi.name={other!r} is not used: the container's own name is; "
                "'podman rename' gives it another"
            )
        keys = sorted(key for key in operator if key.startswith(CONFIG_PREFIX))
        if keys:
            found.append(
                f"annotations like {keys[0][:_SHOWN]!r} are not used: 'guestapi config set {name}' sets a key, or "
                f"sources.{self.name}.annotations = true uses them all"
            )
        return tuple(found)


def _devices(container: EngineContainer, mounts: list[ContainerMount]) -> tuple[dict[str, Device], tuple[str, ...]]:
    """Return the operator's mounts, and networks, from the engine: no guest can change them."""
    devices, problems = bundles.disk_devices(
        bundles.disk(mount.name or mount.source, mount.destination, readonly=not mount.rw) for mount in mounts
    )
    networks = container.network_settings.networks or {}
    nics = {name: one for name, one in sorted(networks.items()) if one is not None and one.mac_address}
    for name, network in nics.items():
        nic = {"type": "nic", "network": name, "hwaddr": network.mac_address}
        if len(nics) == 1:
            devices.setdefault("eth0", {**nic, "name": "eth0"})
        else:
            # The engine does not say which of them is eth0 inside.
            devices.setdefault(name, nic)
    return devices, problems


def _is_gone(pid: int) -> bool:
    try:
        start_time(pid)
    except ProcessLookupError:
        return True
    return False


def _belongs(init: Init, container: EngineContainer) -> bool:
    """Whether a process is a container's init, and not one that reuses the PID of an ended init."""
    if in_cgroup(init.pid, container.id):
        return True
    try:
        started = datetime.fromisoformat(container.state.started_at).timestamp()
    except ValueError:
        return False
    return born(init) <= started + _CLOCK_SECONDS
