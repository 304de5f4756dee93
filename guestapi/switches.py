"""What decides what a guest may do: configuration keys and what their values can be, and what has to be allowed."""

from __future__ import annotations

FALSE = frozenset({"false", "0", "no", "off"})
TRUE = frozenset({"true", "1", "yes", "on"})

#: Switch the API off for an instance (default: on); by dialect.
INCUS, LXD = "security.guestapi", "security.devlxd"
#: Allow an instance to export images (default: off); by dialect.
INCUS_IMAGES, LXD_IMAGES = "security.guestapi.images", "security.devlxd.images"

#: What an instance has only if the operator allows it (`guestapi policy allow`): to say things of itself.
ATTRIBUTES = "attributes"

SWITCHES = frozenset({INCUS, LXD, INCUS_IMAGES, LXD_IMAGES})
