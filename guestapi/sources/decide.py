"""Decides which instance of the store an observation is about, and whether the source may have it. Pure.

Rules: a source's own key identifies an instance for ever; its name is a property. A name that belongs to another owner
is refused, whether or not the owner's instance runs, and that instance is not changed. Two kinds of instances have no
owner, and the first container of their name adopts them: those that were added by hand and do not run, and those whose
source has released them because their container is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from guestapi.model import DAEMONS, Device, Init, Instance
from guestapi.sources.observed import Observed

#: Sources whose runtimes list devices themselves. For other sources, the mounts and links of the init are devices.
_TELLING = frozenset({"podman", "docker", "oci"})


@dataclass(frozen=True, slots=True)
class Candidates:
    """The instances of the store that an observation could be about; any of them may be the same.

    Attributes:
        by_key: has the same source and key.
        by_name: has the same project and name.
        by_init: has the same init.
    """

    by_key: Instance | None = None
    by_name: Instance | None = None
    by_init: Instance | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision about an observation.

    Attributes:
        instance: the instance that it is about; None: a new one, unless it is refused.
        replaced: an instance to remove first: it has the name or the key, and no settings of the operator's.
        refusal: why the observation is refused, in one sentence; None: it is not.
        hint: what to do about the refusal.
        holder: key of the same source's instance that has the name.
    """

    instance: Instance | None = None
    replaced: Instance | None = None
    refusal: str | None = None
    hint: str | None = None
    holder: str | None = None


def decide(
    source: str,
    observed: Observed,
    candidates: Candidates,
    *,
    is_alive: Callable[[Init], bool],
    is_empty: Callable[[Instance], bool],
) -> Decision:
    """Decide which instance an observation is about.

    Args:
        source: name of the source.
        observed: what it sees.
        candidates: the instances that it could be about.
        is_alive: whether a process still runs.
        is_empty: whether an instance has no settings of the operator's.

    Returns:
        The decision.
    """
    own, named, running = candidates.by_key, candidates.by_name, candidates.by_init
    if running is not None and running.source is not None and (running.source, running.key) != (source, observed.key):
        return _refused(
            f"its init, process {observed.init.pid if observed.init else 0}, is the init of {_described(running)}",
            "one of the two sources must leave this container to the other",
        )
    if named is None or (own is not None and named.id == own.id):
        if own is None and running is not None and running.source is None and source not in DAEMONS:
            # Registered by hand or by an earlier version, under another name.
            return Decision(running)
        return Decision(own)
    if named.source is not None and named.source != source:
        return _refused(
            f"the name belongs to {_described(named)}",
            f"rename one of the two, or remove that instance by 'guestapi instance remove {named.name}'",
        )
    if named.source == source and named.key is not None:
        return _refused(
            f"the name belongs to {_described(named)}, another container of {source}",
            "rename or remove one of the two",
            holder=named.key,
        )
    return _adopted(source, observed, own, named, is_alive, is_empty)


def _adopted(
    source: str,
    observed: Observed,
    own: Instance | None,
    named: Instance,
    is_alive: Callable[[Init], bool],
    is_empty: Callable[[Instance], bool],
) -> Decision:
    """Decide about a name that belongs to an instance without a container."""
    remove = f"'guestapi instance remove {named.name}' makes room for it"
    if source in DAEMONS:
        # Its configuration would be mixed with the daemon's for good, and could not be changed.
        return _refused(f"the name belongs to {_described(named)}", remove)
    if named.init is not None and named.init != observed.init and is_alive(named.init):
        return _refused(f"the name belongs to {_described(named)}, which runs with process {named.init.pid}", remove)
    if own is None:
        return Decision(named)
    if is_empty(named):
        return Decision(own, replaced=named)
    if is_empty(own):
        return Decision(named, replaced=own)
    return _refused(f"the name belongs to {_described(named)}, and both have settings of the operator's", remove)


def choose_init(source: str, observed: Observed, known: Init | None, is_alive: Callable[[Init], bool]) -> Init | None:
    """Return the init that an instance has after an observation.

    An observation may be older than the store: the container may have been registered since. So a live init is replaced
    only by another live one. A mirror asks its daemon in order, so its observations always count.

    Args:
        source: name of the source.
        observed: what it sees.
        known: the init that the store has.
        is_alive: whether a process still runs.
    """
    new = observed.init
    if known is None or new == known or source in DAEMONS:
        return new
    return known if is_alive(known) and (new is None or not is_alive(new)) else new


def choose_devices(
    source: str, observed: Observed, devices: dict[str, Device] | None, known: Instance | None, init: Init | None
) -> dict[str, Device] | None:
    """Return the devices of the source's layer after an observation; None to keep those that it has.

    Before the init runs, mounts and links are as the runtime made them; afterwards a hostile root inside can change
    them. So devices are taken once for each init. A runtime that lists devices itself is believed each time.

    Args:
        source: name of the source.
        observed: what it sees.
        devices: what the store can take of its devices.
        known: the instance as the store has it.
        init: which init it has after the observation.
    """
    if source in DAEMONS:
        return devices
    if init is None:
        return None
    if known is not None and known.source == source and known.init == init:
        return devices if source in _TELLING else None
    if devices is None:
        return None if known is not None and known.init == init else {}
    return devices


def _refused(reason: str, hint: str, *, holder: str | None = None) -> Decision:
    return Decision(refusal=f"it is not registered: {reason}", hint=hint, holder=holder)


def _described(instance: Instance) -> str:
    if instance.source is None:
        owner = "added by hand or by a hook"
    else:
        owner = f"of {instance.source}" if instance.key is not None else f"left by {instance.source}"
    return f"instance {instance.name!r} in project {instance.project!r}, {owner}"
