"""Containers of crun and runc that neither podman nor Docker manages, by the runtimes' state files.

Rules: the directory of a container's state is its key, so two runtimes may use the same id; the whole id is its name.
The operator decides by a bind mount of our socket's directory in the bundle. The entry of a dead container stays there
until ``delete``, so an init is taken for alive only if its start time is the one that the runtime noted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import inotify_simple
from inotify_simple import INotify
from msgspec import Struct, field

from guestapi.callers.namespaces import NotAnInitError, examine
from guestapi.errors import SourceError
from guestapi.model import Init
from guestapi.settings import Settings
from guestapi.sources import bundles
from guestapi.sources.bundles import Bind, Bundle, BundleError
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem
from guestapi.sources.places import Look, Places
from guestapi.sources.source import Unclear

#: Files that crun and runc write into a container's directory when its init exists.
_CRUN, _RUNC = "status", "state.json"
#: mount(2), MS_RDONLY.
_READONLY = 1
_MADE = inotify_simple.flags.CREATE | inotify_simple.flags.MOVED_TO
_CHANGED = _MADE | inotify_simple.flags.DELETE | inotify_simple.flags.ONLYDIR
_WRITTEN = inotify_simple.flags.MOVED_TO | inotify_simple.flags.CLOSE_WRITE | inotify_simple.flags.ONLYDIR


class _CrunStatus(Struct):
    pid: int
    start: int = field(default=0, name="process-start-time")
    bundle: str = ""


class _RuncMount(Struct):
    source: str = ""
    destination: str = ""
    device: str = ""
    flags: int = 0


class _RuncNamespace(Struct):
    type: str = ""
    path: str = ""


class _RuncConfig(Struct):
    hostname: str = ""
    mounts: list[_RuncMount] | None = None
    namespaces: list[_RuncNamespace] | None = None
    labels: list[str] | None = None


class _RuncState(Struct):
    id: str
    init_process_pid: int
    init_process_start: int
    config: _RuncConfig


@dataclass(frozen=True, slots=True)
class _Kept:
    """A runtime's state file. ``start``: the init's start time, in clock ticks."""

    bundle: Bundle
    start: int


class OciSource:
    """The containers in the state directories of crun and runc."""

    name = "oci"

    def __init__(self, settings: Settings) -> None:
        """Describe the source.

        Args:
            settings: the runtimes' state directories, and the paths of the guest API's sockets.
        """
        self._roots = settings.sources.oci.roots
        self._annotations = settings.sources.oci.annotations
        self._project = settings.hooks.project
        self._places = Places.of(settings.guest_listeners)

    def observe(self, known: Mapping[str, Init | None]) -> Iterator[Observed | Unclear | Problem]:
        """All containers with our mount, running or dead but not deleted.

        Args:
            known: not used; the state files identify the init.

        Raises:
            SourceError: a state directory cannot be read.
        """
        look = self._places.look()
        for root in self._roots:
            try:
                found = sorted(os.listdir(root))
            except FileNotFoundError:
                # The runtime makes the directory with its first container.
                continue
            except OSError as error:
                raise SourceError(f"{root}: {error.strerror}") from None
            for one in found:
                key = f"{root}/{one}"
                if bundles.is_id(one) and (seen := self._observe(key, key in known, look)) is not None:
                    yield seen

    def observe_one(self, key: str, known: Init | None) -> Observed | Unclear | Problem | None:
        """Observe one container; None: it is gone, has not our mount, or is podman's.

        Args:
            key: the directory of its state.
            known: the init that the store has of it.
        """
        return self._observe(key, known is not None, self._places.look())

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """Observe a container whose init does not run yet, by its bundle.

        Raises:
            SourceError: the state is malformed, or the container's state directory is unknown.
        """
        bundle = bundles.read_state(ring.state)
        if bundle is None or bundle.pid is None or not self._is_ours(bundle, self._places.look()):
            return None
        key = self._key(bundle)
        if not bundle.has_own_pid_namespace:
            return self._shares(key, bundle)
        try:
            return self._describe(key, bundle, examine(bundle.pid))
        except NotAnInitError as error:
            raise SourceError(error.message, error.hint) from None

    def changes(self) -> Directories:
        """Watch the state directories by inotify(7)."""
        return Directories(self._roots)

    def _observe(self, key: str, is_known: bool, look: Look) -> Observed | Unclear | Problem | None:
        try:
            kept = _read(key)
        except BundleError as error:
            # It is being made or deleted; or it has not our mount, and then it does not matter.
            return Unclear(key, str(error)) if os.path.isdir(key) and is_known else None
        if not self._is_ours(kept.bundle, look):
            return None
        init = _init(kept)
        if not kept.bundle.has_own_pid_namespace:
            return self._shares(key, kept.bundle)
        return self._describe(key, kept.bundle, init)

    def _is_ours(self, bundle: Bundle, look: Look) -> bool:
        return not bundle.is_stored and any(map(look.has, bundle.binds))

    def _key(self, bundle: Bundle) -> str:
        """Return the state directory of a container that is being made."""
        found = [key for root in self._roots if os.path.isdir(key := f"{root}/{bundle.id}")]
        if not found:
            raise SourceError(
                f"container {bundle.id} has no directory below {' or '.join(self._roots)}",
                "if its runtime is called with --root, give that directory in sources.oci.roots",
            )
        for key in found:
            # The runtime writes these after its hooks.
            if not any(os.path.exists(f"{key}/{file}") for file in (_CRUN, _RUNC)):
                return key
        return found[0]

    def _shares(self, key: str, bundle: Bundle) -> Problem:
        reason = f"container {bundle.id} is not registered: it has no PID namespace of its own"
        hint = "its processes are answered as those of the container whose namespace it is, on the host not at all"
        return Problem(self.name, key, self._project, bundle.id, reason, hint, refused=True)

    def _describe(self, key: str, bundle: Bundle, init: Init | None) -> Observed:
        look = self._places.look()
        disks = [
            bundles.disk(one.source, one.path, readonly=one.readonly)
            for one in bundle.mounts
            if not look.has(one.source)
        ]
        devices, of_devices = bundles.disk_devices(disks)
        config, of_config = bundles.configuration(bundle.annotations) if self._annotations else ({}, ())
        return Observed(
            key,
            self._project,
            bundle.id,
            "container",
            bundle.hostname or None,
            init,
            config,
            devices,
            problems=(*of_devices, *of_config),
        )


class Directories:
    """Changes below the state directories. `read` never blocks."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        """Begin.

        Args:
            roots: the state directories. A missing one is watched for.

        Raises:
            SourceError: no watch can be added.
        """
        self._roots = roots
        try:
            self._inotify = INotify()
        except OSError as error:
            raise SourceError(f"the state directories cannot be watched: {error.strerror}") from None
        self._watched: dict[int, str] = {}
        self._watch_roots()

    def fileno(self) -> int:
        """For poll(2)."""
        return int(self._inotify.fileno())

    def close(self) -> None:
        """End it."""
        self._inotify.close()

    def read(self) -> frozenset[str] | None:
        """Return the containers to look at; None: all, because a state directory was made."""
        found: set[str] = set()
        everything = False
        for event in self._inotify.read(timeout=0):
            if event.mask & inotify_simple.flags.Q_OVERFLOW:
                everything = True
                continue
            directory = self._watched.get(event.wd)
            if event.mask & inotify_simple.flags.IGNORED:
                self._watched.pop(event.wd, None)
                everything |= directory in self._roots
            elif directory in self._roots:
                key = f"{directory}/{event.name}"
                if bundles.is_id(event.name):
                    found.add(key)
                    if event.mask & _MADE:
                        self._watch(key, _WRITTEN)
            elif directory is not None and os.path.dirname(directory) in self._roots:
                found.add(directory)
            else:
                # A new entry where a state directory is missing.
                everything |= any(root.startswith(f"{directory}/{event.name}") for root in self._roots)
        if everything:
            self._watch_roots()
            return None
        return frozenset(found)

    def _watch_roots(self) -> None:
        for root in self._roots:
            if self._watch(root, _CHANGED):
                for one in _listed(root):
                    self._watch(f"{root}/{one}", _WRITTEN)
                continue
            above = os.path.dirname(root)
            while not self._watch(above, _MADE | inotify_simple.flags.ONLYDIR) and above != "/":
                above = os.path.dirname(above)

    def _watch(self, directory: str, mask: int) -> bool:
        try:
            self._watched[self._inotify.add_watch(directory, mask)] = directory
        except OSError:
            # It was removed again, or is not a directory.
            return False
        return True


def _listed(root: str) -> list[str]:
    try:
        return os.listdir(root)
    except OSError:
        # It was removed again, which is another event.
        return []


def _read(key: str) -> _Kept:
    """Read the state in the directory `key`.

    Raises:
        BundleError: it cannot be read, or is not written yet.
    """
    container = os.path.basename(key)
    if os.path.exists(f"{key}/{_RUNC}"):
        content = bundles.read_file(f"{key}/{_RUNC}")
        state = bundles.decode(content, _RuncState)
        if state is None:
            raise BundleError(f"{key}/{_RUNC} is not what runc writes")
        return _Kept(_of_runc(container, state), state.init_process_start)
    status = bundles.decode(bundles.read_file(f"{key}/{_CRUN}"), _CrunStatus)
    if status is None:
        raise BundleError(f"{key}/{_CRUN} is not what crun writes")
    bundle = bundles.read_config(f"{key}/config.json", container, status.pid, status.bundle)
    return _Kept(bundle, status.start)


def _of_runc(container: str, state: _RuncState) -> Bundle:
    labels = dict(label.partition("=")[::2] for label in state.config.labels or [])
    return Bundle(
        container,
        state.init_process_pid,
        state.config.hostname,
        tuple(
            Bind(mount.source, mount.destination, bool(mount.flags & _READONLY))
            for mount in state.config.mounts or []
            if mount.device == "bind"
        ),
        labels,
        any(one.type == "NEWPID" and not one.path for one in state.config.namespaces or []),
        bundles.is_stored(labels.get("bundle", "")),
    )


def _init(kept: _Kept) -> Init | None:
    if kept.bundle.pid is None or kept.bundle.pid <= 0:
        return None
    try:
        init = examine(kept.bundle.pid)
    except NotAnInitError:
        return None
    return init if init.start_time == kept.start else None
