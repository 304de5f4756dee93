"""A container starts or has ended: write it down, in time, whatever the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from guestapi.callers.namespaces import examine, is_alive
from guestapi.errors import SourceError
from guestapi.model import Device
from guestapi.settings import Settings, StoreSettings
from guestapi.store import steps
from guestapi.store.errors import StoreBusyError
from guestapi.store.lookup import find_instance
from guestapi.store.writing import Writer

#: Seconds that a hook waits for another writer, each of the two times that it tries. A runtime waits for its hooks.
_LOCK_SECONDS = 0.7


#: Digits of the highest possible PID, 2²² (include/linux/threads.h, PID_MAX_LIMIT).
_PID_DIGITS = 7


class ReportError(SourceError):
    """What the runtime says cannot be understood; the text is one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Report:
    """What a runtime tells of a container.

    Attributes:
        name: the instance's.
        pid: of the container's init, as seen from here; None: the container has ended.
        config: keys that the container itself brings along.
        devices: what the container's own configuration gives it.
        passing: nobody gave it a name, so its instance goes with it.
    """

    name: str
    pid: int | None
    config: Mapping[str, str] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)
    passing: bool = False


def pid_of(text: str) -> int | None:
    """The PID that a runtime gives as `text`; None if that is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _PID_DIGITS else None


def register(settings: Settings, report: Report) -> None:
    """Write a report down; once more if the store is busy.

    Raises:
        StoreError: the store cannot be written.
        InvalidNameError: name, key or value cannot be taken.
        NotAnInitError: the process is no container's init.
    """
    quick = msgspec.structs.replace(settings, store=StoreSettings(url=settings.store.url, lock_seconds=_LOCK_SECONDS))
    writer = Writer(quick, create=True)
    try:
        _write(writer, quick, report)
    except StoreBusyError:
        _write(writer, quick, report)


def _write(writer: Writer, settings: Settings, report: Report) -> None:
    project = settings.hooks.project
    init = examine(report.pid) if report.pid is not None else None
    with writer.change() as change:
        instance = find_instance(change, project, report.name)
        if instance is not None:
            # A daemon of this host may have one of that name too, which is not this one.
            instance = steps.get_editable(change, project, report.name)
        if init is None:
            if instance is None or (instance.init is not None and is_alive(instance.init)):
                # Not this one has ended: another container of that name has, and says so late.
                return
            if report.passing:
                steps.remove(change, instance)
            else:
                steps.stop(change, instance)
        elif instance is None:
            config = {**settings.hooks.template, **report.config}
            steps.start(change, steps.add(change, project, report.name, config=config, devices=report.devices), init)
        else:
            # What the operator has set stays; what the container brings along is as it is now.
            instance = steps.configure(change, instance, report.config)
            instance = steps.replace_devices(change, instance, {**instance.devices, **report.devices})
            steps.start(change, instance, init)
