"""What of an observation the store can take. Pure.

Rules: what cannot be taken is left out alone and named; everything else is taken. Switches come first, so that what an
operator switched off is off whatever else the instance has.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass

from guestapi import names
from guestapi.dialects import DIALECTS
from guestapi.model import DAEMONS, Device
from guestapi.names import InvalidNameError
from guestapi.sources.observed import Observed

#: Keys that decide whether the API is on, and whether images may be exported.
SWITCHES = frozenset(key for dialect in DIALECTS.values() for key in (dialect.switch, dialect.images_switch))
#: Name of the source that is a fleet.
FLEET = "fleet"
#: What no container may set for itself: what its image, its labels or its annotations bring.
_RESERVED = "security."
#: The most sentences of one instance that are kept; further ones are counted.
_SENTENCES = 20


@dataclass(frozen=True, slots=True)
class Acceptable:
    """What the store can take of an observation.

    Attributes:
        config: the source's layer of configuration.
        devices: the source's layer of devices; None: those that are known are to be kept.
        hostname: the host name inside; None: it follows from the name.
        location: the cluster member; None: this host.
        left_out: one sentence for each thing that was left out.
    """

    config: Mapping[str, str]
    devices: Mapping[str, Device] | None
    hostname: str | None
    location: str | None
    left_out: tuple[str, ...]


def sanitize(
    source: str,
    observed: Observed,
    limit: int,
    *,
    entries: int = names.MOST_ENTRIES,
    amending: Container[str] = (),
) -> Acceptable:
    """Leave out what the store cannot take.

    Args:
        source: name of the source.
        observed: what it sees.
        limit: how many bytes configuration and devices may have in all.
        entries: how many keys, devices and options there may be in all.
        amending: names of devices that need no type, since the instance has them otherwise.

    Returns:
        What is left.
    """
    left_out = list(observed.problems)
    # A daemon and a fleet have what an operator has set there.
    by_daemon = source in DAEMONS or source == FLEET
    config: dict[str, str] = {}
    for key, value in observed.config.items():
        if not by_daemon and key.startswith(_RESERVED):
            left_out.append(f"{_quoted(key)} is left out: a container cannot set this for itself")
        else:
            config[key] = value
    config = _valid_config(config, left_out, control=by_daemon)
    devices = (
        None
        if observed.devices is None
        else _valid_devices(observed.devices, left_out, control=by_daemon, amending=amending)
    )
    if names.size_of(config, devices or {}) > limit or names.count_entries(config, devices or {}) > entries:
        config, devices = _fitting(config, devices, limit, entries, left_out)
    hostname = _valid_or_none(names.check_hostname, observed.hostname, left_out)
    location = _valid_or_none(names.check_location, observed.location, left_out)
    if len(left_out) > _SENTENCES:
        more = len(left_out) - _SENTENCES + 1
        left_out[_SENTENCES - 1 :] = [f"{more} further things are left out"]
    return Acceptable(config, devices, hostname, location, tuple(left_out))


def _valid_config(config: Mapping[str, str], left_out: list[str], *, control: bool) -> dict[str, str]:
    valid = {}
    for key, value in config.items():
        try:
            names.check_key(key, control=control)
            names.check_value(value, f"value of {_quoted(key)}")
        except InvalidNameError as error:
            left_out.append(f"{error}, so it is left out")
            continue
        # An empty value is none.
        if value:
            valid[key] = value
    return valid


def _valid_devices(
    devices: Mapping[str, Device], left_out: list[str], *, control: bool, amending: Container[str]
) -> dict[str, Device]:
    valid = {}
    for name, definition in devices.items():
        try:
            names.check_key(name, "device name", control=control)
            if not definition.get("type") and name not in amending:
                raise InvalidNameError(f"device {_quoted(name)} has no type")
            valid[name] = names.check_options(name, definition, control=control)
        except InvalidNameError as error:
            left_out.append(f"{error}, so it is left out")
    return valid


def _fitting(
    config: Mapping[str, str],
    devices: Mapping[str, Device] | None,
    limit: int,
    entries: int,
    left_out: list[str],
) -> tuple[dict[str, str], dict[str, Device] | None]:
    """Leave out what is largest until the rest fits: switches stay before devices, devices before other keys."""
    chosen = {key: config[key] for key in SWITCHES & config.keys()}
    chosen_devices: dict[str, Device] = {}
    room, places = limit - names.size_of(chosen, {}), entries - len(chosen)
    given = devices or {}
    for size, name in sorted((names.size_of({}, {name: definition}), name) for name, definition in given.items()):
        count = 1 + len(given[name])
        if reason := _too_much(size, room, limit, count, places, entries):
            left_out.append(f"device {_quoted(name)} is left out: {reason}")
        else:
            chosen_devices[name] = given[name]
            room, places = room - size, places - count
    for size, key in sorted((names.size_of({key: value}, {}), key) for key, value in config.items()):
        if key in chosen:
            continue
        if reason := _too_much(size, room, limit, 1, places, entries):
            left_out.append(f"{_quoted(key)} is left out: {reason}")
        else:
            chosen[key] = config[key]
            room, places = room - size, places - 1
    return chosen, None if devices is None else chosen_devices


def _too_much(size: int, room: int, limit: int, count: int, places: int, entries: int) -> str | None:
    """Why something does not fit; None if it does."""
    if size > room:
        return f"its {size} bytes are too much for {limit} in all"
    if count > places:
        return f"there may be {entries} keys, devices and options in all"
    return None


def _valid_or_none(check: Callable[[str], str], text: str | None, left_out: list[str]) -> str | None:
    if not text:
        return None
    try:
        return check(text)
    except InvalidNameError as error:
        left_out.append(f"{error}, so it is left out")
        return None


def _quoted(key: str) -> str:
    return repr(key[:40])
