"""The store as a follower's `Ledger`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from guestapi.audit_log import by_source
from guestapi.model import Init, Problem, SourceStatus
from guestapi.settings import HookSettings, Settings
from guestapi.sources.observed import Observed
from guestapi.sources.reconcile import reconcile
from guestapi.sources.recorder import Status
from guestapi.store import profiles, statuses
from guestapi.store.errors import ConflictError
from guestapi.store.lookup import list_instances
from guestapi.store.writing import Writer

log = logging.getLogger(__name__)


class StoreLedger:
    """Writes what a follower observes to the store. Used by one thread."""

    def __init__(self, settings: Settings, source: str, doorbell: Path) -> None:
        """Begin with what the store holds.

        Args:
            settings: the store's; and ``hooks.template``, which is taken over into the profile ``default``.
            source: name of the source.
            doorbell: where its hooks ring.
        """
        self._settings = settings
        self._source = source
        self._doorbell = str(doorbell)
        self._opened: Writer | None = None

    @property
    def _writer(self) -> Writer:
        if self._opened is None:
            opened = Writer(self._settings, create=True, audit=by_source(self._source))
            _take_template(opened, self._settings.hooks)
            self._opened = opened
        return self._opened

    def known(self) -> Mapping[str, Init | None]:
        """As `Ledger.known`; makes the store if it is missing."""
        with self._writer.change() as change:
            found = list_instances(change, source=self._source)
            # Refused containers are among them, so that a problem is removed with its container.
            refused = statuses.list_problem_keys(change, self._source)
        return {**dict.fromkeys(refused), **{one.key: one.init for one in found if one.key is not None}}

    def write(
        self, observed: Sequence[Observed], gone: Collection[str], refused: Sequence[Problem]
    ) -> Sequence[Problem]:
        """As `Ledger.write`."""
        with self._writer.change() as change:
            return reconcile(change, self._source, observed, gone=gone, refused=refused)

    def note(self, status: Status) -> None:
        """As `Ledger.note`."""
        connected = bool(status.contact) and not status.fault
        noted = SourceStatus(self._source, self._doorbell, connected, status.contact, status.lag, status.fault)
        with self._writer.change() as change:
            statuses.record_status(change, noted)


def _take_template(writer: Writer, hooks: HookSettings) -> None:
    """Take ``hooks.template`` over into the profile ``default``. What cannot be taken keeps no container waiting."""
    try:
        with writer.change() as change:
            left_out = profiles.take_template(change, hooks.project, hooks.template)
    except ConflictError as error:
        left_out = [f"hooks.template is not taken over into profile {profiles.DEFAULT!r}: {error}"]
    for sentence in left_out:
        log.warning("%s", sentence)
