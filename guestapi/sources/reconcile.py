"""Makes the store equal to the sources: writes the differences of observations in one transaction.

Rules: an instance that cannot be used never affects another, and raises no error. It is recorded as a `Problem`, which
``guestapi check`` shows. An instance that cannot be stored as its source has it is not served from old data: it
counts as not running until it can. `decide` and `sanitize` hold the decisions that need no store.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from uuid import UUID, uuid5

from guestapi.callers import machines
from guestapi.errors import OperatorError
from guestapi.model import DAEMONS, Device, Init, Instance, Problem
from guestapi.names import MOST_ENTRIES, count_entries, is_text, size_of, to_text
from guestapi.sources.decide import Candidates, Decision, choose_devices, choose_init, decide
from guestapi.sources.observed import Observed
from guestapi.sources.sanitize import Acceptable, sanitize
from guestapi.store import changes, profiles, statuses, steps
from guestapi.store.layers import Layer, Layers
from guestapi.store.lookup import find_by_key, find_instance, find_owner, is_placed
from guestapi.store.rows import load, load_layers
from guestapi.store.transaction import Change, savepoint

log = logging.getLogger(__name__)

#: Begins the temporary name of an instance whose name another one gets in the same transaction. No name has a NUL.
_PARKED = "\0"
#: Most characters of a reason that are recorded: a name at the source may have any length.
_REASON = 500


@dataclass(frozen=True, slots=True)
class _Reconciliation:
    """The transaction and arguments of one call, and the keys that had problems before."""

    change: Change
    source: str
    is_alive: Callable[[Init], bool]
    troubled: Collection[str]
    #: Keys without new observations: their devices and problems stay.
    unchanged: set[str] = field(default_factory=set)


def reconcile(
    change: Change,
    source: str,
    observations: Iterable[Observed],
    *,
    complete: bool = False,
    gone: Collection[str] = (),
    refused: Collection[Problem] = (),
    is_alive: Callable[[Init], bool] = machines.is_alive,
) -> list[Problem]:
    """Make a source's instances in the store equal to what was observed.

    Args:
        change: the transaction; a hundred observations take about a quarter of a second.
        source: name of the source.
        observations: instances that exist there, in any order.
        complete: whether these are all; then the source's other instances in the store are gone.
        gone: keys that the source no longer has.
        refused: containers that exist there and cannot be instances.
        is_alive: whether a process still runs.

    Returns:
        The problems. One with a `Problem.holder` may be solved by a look at that container: if it is gone, a call with
        its key in `gone` and the same observation succeeds.
    """
    troubled = statuses.list_problem_keys(change, source)
    work = _Reconciliation(change, source, is_alive, troubled)
    pending: dict[str, Observed] = {}
    doubled = []
    for observed in observations:
        if observed.key in pending or not is_text(observed.key):
            doubled.append(observed)
        else:
            pending[observed.key] = observed
    by_source = {problem.key: problem for problem in refused if problem.key not in pending}
    known = statuses.list_keys(change, source) | troubled if complete else set(gone)
    problems = []
    for key in sorted(known - pending.keys() - by_source.keys()):
        problems += _record(work, key, _let_go(work, key))
    for key, problem in by_source.items():
        if (own := find_by_key(change, source, key)) is not None:
            steps.stop(change, own)
        problems += _record(work, key, [replace(problem, source=source, refused=True)])
    for observed in _in_order(work, pending):
        found = _settle(work, observed)
        if found or observed.key not in work.unchanged:
            problems += _record(work, observed.key, found)
    for observed in doubled:
        # Not recorded, because its key is missing or another instance's.
        problems.append(_problem(work, observed, "it is not registered: its source gives it no key of its own"))
        log.warning("%s", _sentence(problems[-1]))
    return problems


def is_current(instance: Instance, source: str, observed: Observed) -> bool:
    """Whether `reconcile` would change nothing. Only for daemons, which provide everything.

    Args:
        instance: as the store has it.
        source: name of the source.
        observed: what it sees.
    """
    if instance.profiles:
        # What counts is not what the source provides.
        return False
    acceptable = sanitize(source, observed, size_of(observed.config, observed.devices or {}))
    return not acceptable.left_out and (
        instance.source,
        instance.key,
        instance.project,
        instance.name,
        instance.type,
        instance.hostname,
        instance.location,
        instance.cloud_init_id,
        instance.init,
        instance.init and (instance.init.root_uid, instance.init.user_namespace),
        instance.config,
        instance.devices,
        observed.ready in (None, instance.ready),
    ) == (
        source,
        observed.key,
        observed.project,
        observed.name,
        observed.type,
        acceptable.hostname,
        acceptable.location,
        observed.cloud_init_id or instance.cloud_init_id,
        observed.init,
        observed.init and (observed.init.root_uid, observed.init.user_namespace),
        acceptable.config,
        acceptable.devices,
        True,
    )


def _in_order(work: _Reconciliation, pending: dict[str, Observed]) -> Iterable[Observed]:
    """Order the observations so that a name is released before another instance gets it."""
    while pending:
        waiting = len(pending)
        blocked = []
        for key, observed in list(pending.items()):
            source, holder = find_owner(work.change, observed.project, observed.name) or (None, None)
            other = pending.get(holder) if source == work.source and holder not in (None, key) else None
            if other is not None and (other.project, other.name) != (observed.project, observed.name):
                blocked.append(other.key)
            else:
                yield pending.pop(key)
        if pending and len(pending) == waiting:
            # A circle of names: one instance gets a temporary name, and its own before the transaction ends.
            first = find_by_key(work.change, work.source, blocked[0])
            assert first is not None, "it was found by its name"
            steps.park(work.change, first, f"{_PARKED}{first.id}")


def _settle(work: _Reconciliation, observed: Observed) -> list[Problem]:
    """Write one observation as a whole or not at all; return the problems."""
    change = work.change
    try:
        with savepoint(change):
            return _take_over(work, observed)
    except (OperatorError, sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeError) as error:
        reason = error.message if isinstance(error, OperatorError) else f"the store refuses it ({error})"
        hint = error.hint if isinstance(error, OperatorError) else None
        decision = Decision(refusal=f"it is not registered: {reason}", hint=hint)
        return [_refuse(work, observed, find_by_key(change, work.source, observed.key), decision)]


def _take_over(work: _Reconciliation, observed: Observed) -> list[Problem]:
    change, source = work.change, work.source
    own = find_by_key(change, source, observed.key)
    if own is not None and (own.project, own.name) != (observed.project, observed.name) and is_placed(change, own):
        # What a fleet has placed here keeps its name, so the container is another instance from now on.
        steps.unbind(change, own)
        own = None
    candidates = Candidates(own, _named(change, observed, own), _running(change, observed, own))
    decision = decide(
        source, observed, candidates, is_alive=work.is_alive, is_empty=lambda instance: _is_empty(change, instance)
    )
    if decision.refusal is not None:
        return [_refuse(work, observed, own, decision)]
    if decision.replaced is not None:
        steps.remove(change, decision.replaced)
    known = decision.instance
    before = load_layers(change.connection, known.id) if known is not None else Layers()
    layers = before
    if source not in DAEMONS and (known is None or _is_without_profiles(change, known, before)):
        layers = replace(before, profiles=(profiles.ensure_default(change, observed.project),))
    others = replace(layers, source=Layer())
    room = change.configuration_bytes - size_of(others.config, others.devices)
    places = MOST_ENTRIES - count_entries(others.config, others.devices)
    acceptable = sanitize(source, observed, max(room, 0), entries=max(places, 0))
    if known is None:
        _create(work, observed, acceptable, layers)
    else:
        _update(work, observed, acceptable, known, before, layers)
    return [_problem(work, observed, reason) for reason in acceptable.left_out]


def _is_without_profiles(change: Change, known: Instance, layers: Layers) -> bool:
    """Whether an instance was added by hand, without profiles; those of this host are not for what a fleet places."""
    return known.source is None and not layers.profiles and not is_placed(change, known)


def _named(change: Change, observed: Observed, own: Instance | None) -> Instance | None:
    """Return the instance that has the wanted name."""
    if own is not None and (own.project, own.name) == (observed.project, observed.name):
        return own
    return find_instance(change, observed.project, observed.name)


def _running(change: Change, observed: Observed, own: Instance | None) -> Instance | None:
    """Return the instance that has the same init."""
    if observed.init is None or (own is not None and own.init == observed.init):
        return own if observed.init is not None else None
    found = steps.find_by_init(change, observed.init)
    return load(change.connection, found[0]) if found is not None else None


def _create(work: _Reconciliation, observed: Observed, acceptable: Acceptable, layers: Layers) -> None:
    created = steps.add(
        work.change,
        observed.project,
        observed.name,
        type=observed.type or "container",
        instance_uuid=_free_uuid(work, observed),
        location=acceptable.location,
        config=acceptable.config,
        devices=acceptable.devices,
        source=work.source,
        key=observed.key,
        hostname=acceptable.hostname,
        cloud_init_id=observed.cloud_init_id,
        checked=True,
        init=observed.init,
        profiles=layers.profiles,
    )
    _finish(work, observed, created)


def _update(
    work: _Reconciliation,
    observed: Observed,
    acceptable: Acceptable,
    known: Instance,
    before: Layers,
    layers: Layers,
) -> None:
    source = work.source
    by_daemon = source in DAEMONS
    init = choose_init(source, observed, known.init, work.is_alive)
    wanted = dict(acceptable.devices) if acceptable.devices is not None else None
    devices: Mapping[str, Device] | None = choose_devices(source, observed, wanted, known, init)
    hostname = acceptable.hostname
    if observed.devices is None and observed.init is not None and observed.init == known.init:
        # A restarted follower knows nothing more of an init whose start it did not see.
        work.unchanged.add(observed.key)
        hostname = known.hostname if observed.hostname is None else hostname
    columns: dict[str, object] = {
        "project": observed.project,
        "name": steps.check_name(observed.project, observed.name),
        "type": known.type if observed.type is None or is_placed(work.change, known) else observed.type,
        "source": source,
        "source_key": observed.key,
        "hostname": hostname,
    }
    if by_daemon:
        columns["location"] = acceptable.location
    if observed.cloud_init_id is not None:
        columns["cloud_init_id"] = observed.cloud_init_id
    provided = Layer(acceptable.config, before.source.devices if devices is None else devices)
    layers = replace(layers, source=provided)
    live_options = changes.LIVE_OPTIONS if by_daemon else None
    _finish(work, observed, steps.write(work.change, known, steps.Wanted(before, layers, init, columns, live_options)))


def _finish(work: _Reconciliation, observed: Observed, instance: Instance) -> None:
    if instance.init is not None and observed.ready is not None:
        statuses.merge_ready(work.change, instance, observed.ready)


def _let_go(work: _Reconciliation, key: str) -> list[Problem]:
    """Remove the instance of a container that is gone, or release it if it has settings of the operator's."""
    instance = find_by_key(work.change, work.source, key)
    if instance is None:
        return []
    if work.source not in DAEMONS and instance.init is not None and work.is_alive(instance.init):
        reason = f"{work.source} does not list it, although its init, process {instance.init.pid}, runs"
        return [Problem(work.source, key, instance.project, instance.name, reason)]
    if is_placed(work.change, instance):
        steps.unbind(work.change, instance)
    elif work.source in DAEMONS or _is_empty(work.change, instance):
        steps.remove(work.change, instance)
    else:
        layers = load_layers(work.change.connection, instance.id)
        steps.write(work.change, instance, steps.Wanted(layers, layers, None, {"source_key": None}))
    return []


def _refuse(work: _Reconciliation, observed: Observed, own: Instance | None, decision: Decision) -> Problem:
    """Record a refusal. An instance that was registered before is no longer served: its data is out of date."""
    if own is not None:
        steps.stop(work.change, own)
        if own.name.startswith(_PARKED):
            steps.park(work.change, own, f"{observed.name[:200]}.{own.id}")
    problem = _problem(work, observed, decision.refusal or "", decision.hint)
    return replace(problem, refused=True, holder=decision.holder)


def _record(work: _Reconciliation, key: str, problems: list[Problem]) -> list[Problem]:
    if not problems and key not in work.troubled:
        return []
    recordable = [
        replace(one, project=to_text(one.project), name=to_text(one.name), reason=to_text(one.reason[:_REASON]))
        for one in problems
    ]
    for new in statuses.record_problems(work.change, work.source, key, recordable):
        log.warning("%s", _sentence(new))
    return recordable


def _problem(work: _Reconciliation, observed: Observed, reason: str, hint: str | None = None) -> Problem:
    return Problem(work.source, observed.key, observed.project, observed.name, reason, hint)


def _sentence(problem: Problem) -> str:
    hint = f"; {problem.hint}" if problem.hint else ""
    return f"{problem.source}: {problem.name} in project {problem.project}: {problem.reason}{hint}"


def _is_empty(change: Change, instance: Instance) -> bool:
    """Whether an instance has no settings of the operator's."""
    if instance.kept or instance.profiles != (profiles.DEFAULT,):
        return False
    return not load_layers(change.connection, instance.id).operator


def _free_uuid(work: _Reconciliation, observed: Observed) -> str | None:
    """Return the UUID for a new instance; one that another instance has is replaced by one derived from it."""
    if observed.uuid is None or steps.find_by_uuid(work.change, observed.uuid) is None:
        return observed.uuid
    return str(uuid5(UUID(observed.uuid), f"{work.source}/{observed.key}"))
