"""What a follower needs of a source: `Source`, implemented once for each container runtime.

Rules: a source looks, and writes nothing. `at_doorbell` runs while the runtime waits for its hook, so it asks /proc,
netlink and what the hook said, never the runtime, which answers nobody then. `observe` and `observe_one` may ask the
runtime; they run in another thread, one at a time, and bound what they wait for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from guestapi.model import Init
from guestapi.sources.doorbell import Ring
from guestapi.sources.observed import Observed, Problem


@dataclass(frozen=True, slots=True)
class Unclear:
    """A container that is there, but could not be looked at just now: what the store has of it stays.

    Attributes:
        key: as of `Observed`.
        reason: one sentence: what was tried, and what came of it.
    """

    key: str
    reason: str


#: What a source may find. A `Problem` with ``refused`` is of a container that runs and can be no instance.
Found = Observed | Problem | Unclear


class Changes(Protocol):
    """Says where to look again: a runtime's event stream, or files that are watched."""

    def fileno(self) -> int:
        """Becomes readable when there is something to `read`."""

    def read(self) -> Collection[str] | None:
        """The keys to look at again; None: everything. Does not wait.

        Raises:
            SourceError: nothing more will come. It is opened anew, and everything is looked at.
        """

    def close(self) -> None:
        """Hear no more."""


class Source(Protocol):
    """One container runtime of this host."""

    @property
    def name(self) -> str:
        """Of the source: ``lxc``, ``podman`` and so on."""

    def observe(self, known: Mapping[str, Init | None]) -> Iterable[Found]:
        """Everything that is there now.

        Args:
            known: key and init of the instances that the store has of this source.

        Raises:
            SourceError: the runtime cannot be asked, so nothing is known of any.
        """

    def observe_one(self, key: str, known: Init | None) -> Found | None:
        """One container as it is now; None: it is gone for good.

        Args:
            key: of the container.
            known: its init, as the store has it.

        Raises:
            SourceError: the runtime cannot be asked.
        """

    def at_doorbell(self, ring: Ring) -> Observed | Problem | None:
        """The container of which a hook tells, whose init has not run yet.

        Returns:
            None: it is none of this source's, or there is nothing to register.

        Raises:
            SourceError: what the hook says is not true, or cannot be understood.
        """

    def changes(self) -> Changes:
        """Begin to hear of changes.

        Raises:
            SourceError: they cannot be heard now.
        """
