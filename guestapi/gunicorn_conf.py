"""Reads gunicorn.conf.py, gunicorn's own settings. It is Python, and read as gunicorn reads it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from guestapi.settings import SettingsError

_SOCKETS = "sockets are in guestapi.toml or a socket unit"
_LIMITS = "limits are in guestapi.toml"
_FIXED_BY_US = "guestapi sets it itself"

#: Settings that cannot be set here, and why.
_FIXED = {
    "bind": _SOCKETS,
    "daemon": "systemd runs the service in the background",
    "keepalive": _LIMITS,
    "limit_request_field_size": _LIMITS,
    "limit_request_fields": _LIMITS,
    "limit_request_line": _LIMITS,
    "logger_class": _FIXED_BY_US,
    "preload_app": _FIXED_BY_US,
    "reload": "'systemctl reload' does it",
    "threads": "workers have an event loop, set workers",
    "worker_class": _FIXED_BY_US,
}

#: The smallest values that make sense. gunicorn itself accepts smaller ones.
_LEAST = {"workers": 1, "timeout": 2, "graceful_timeout": 1, "worker_connections": 1}


def read(file: Path) -> dict[str, Any]:
    """Read what `file` sets.

    Args:
        file: gunicorn.conf.py. It need not exist.

    Returns:
        Values by the name of the setting.

    Raises:
        SettingsError: the file is not Python, or sets something that gunicorn does not know or that cannot be set here.
    """
    from gunicorn.config import Config

    if not file.exists():
        return {}
    names: dict[str, Any] = {"__file__": str(file), "__name__": "__config__"}
    try:
        exec(compile(file.read_bytes(), file, "exec"), names)
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{file}: {type(error).__name__}: {error}") from None
    config = Config()
    settings = {}
    for name, value in names.items():
        if name in _FIXED:
            raise SettingsError(f"{file}: {name}: cannot be set here; {_FIXED[name]}")
        if name not in config.settings:
            # The file may import modules and define names with an underscore. A function without one is a hook, perhaps
            # a misspelt one.
            imported = isinstance(value, ModuleType) or getattr(value, "__module__", "__config__") != "__config__"
            if name.startswith("_") or imported:
                continue
            raise SettingsError(f"{file}: {name}: gunicorn has no such setting")
        try:
            config.set(name, value)
        except Exception as error:
            raise SettingsError(f"{file}: {name}: {error}") from None
        if name in _LEAST and config.settings[name].get() < _LEAST[name]:
            raise SettingsError(f"{file}: {name}: {value} is too little, {_LEAST[name]} is the least")
        settings[name] = value
    return settings
