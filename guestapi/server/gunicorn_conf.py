"""conf/gunicorn.conf.py: gunicorn's own settings. It is Python, and read as gunicorn reads it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from guestapi.settings import SettingsError

_SOCKETS = "sockets are in guestapi.toml or a socket unit"
_LIMITS = "limits are in guestapi.toml"
_OURS = "it is not for an operator to choose"

#: What cannot be set here, and why.
_FIXED = {
    "bind": _SOCKETS,
    "daemon": "systemd runs the service in the background",
    "keepalive": _LIMITS,
    "limit_request_field_size": _LIMITS,
    "limit_request_fields": _LIMITS,
    "limit_request_line": _LIMITS,
    "logger_class": _OURS,
    "preload_app": _OURS,
    "reload": "'systemctl reload' does it",
    "threads": "workers have an event loop, set workers",
    "worker_class": _OURS,
}

#: The least that makes sense; gunicorn itself takes less.
_LEAST = {"workers": 1, "timeout": 2, "graceful_timeout": 1, "worker_connections": 1}


def read(file: Path) -> dict[str, Any]:
    """What `file` sets, by name; nothing if it does not exist.

    Raises:
        SettingsError: it is no Python, or sets what gunicorn does not know, does not take, or what is not to be set.
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
            # A Python file may need more than settings: what it imports, and names of its own with an underscore. A
            # function without one is a hook, or a misspelt one.
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
