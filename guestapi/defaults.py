"""Defaults and bounds of the settings that every command needs: those of the store and of the change log.

They stand apart from `settings`, so that a command that needs no others does not load what reads all of them.
"""

from __future__ import annotations

#: Where guestapi.toml is, and the variable of the environment that names another.
FILE = "/etc/guestapi/guestapi.toml"
FILE_VARIABLE = "GUESTAPI_CONFIG"

#: The tables of guestapi.toml.
TABLES = frozenset(
    {
        "callers",
        "events",
        "fleet",
        "hooks",
        "identity",
        "images",
        "limits",
        "listener",
        "log",
        "metrics",
        "server",
        "sources",
        "store",
    }
)

STORE_URL = "sqlite:////var/lib/guestapi/store.db"
LOCK_SECONDS = 5.0
#: The longest time that a setting may be, in seconds.
MOST_SECONDS = 3600
CONFIGURATION_BYTES, LEAST_CONFIGURATION_BYTES, MOST_CONFIGURATION_BYTES = 1 << 24, 1 << 20, 1 << 28
KEEP_ENTRIES, MOST_ENTRIES = 10_000, 10_000_000
KEEP_SECONDS = 3600
