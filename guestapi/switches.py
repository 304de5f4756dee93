"""The configuration keys that decide what a guest may do, and what their values can be."""

from __future__ import annotations

FALSE = frozenset({"false", "0", "no", "off"})
TRUE = frozenset({"true", "1", "yes", "on"})

#: Switch the API off for an instance (default: on); by dialect.
INCUS, LXD = "security.guestapi", "security.devlxd"
#: Allow an instance to export images (default: off); by dialect.
INCUS_IMAGES, LXD_IMAGES = "security.guestapi.images", "security.devlxd.images"

SWITCHES = frozenset({INCUS, LXD, INCUS_IMAGES, LXD_IMAGES})
