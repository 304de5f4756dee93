"""Stand-ins for parts of a worker."""

from __future__ import annotations

from guestapi.model import Init


class EmptyStore:
    """A store without instances."""

    def running_in(self, _namespace: int) -> list[tuple[int, int, Init]]:
        """Return no instance."""
        return []
