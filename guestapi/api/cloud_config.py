"""SSH keys of an instance, merged into the cloud-config of its vendor-data or user-data. Pure.

The keys are the values of ``cloud-init.ssh-keys.NAME``, like ``root:ssh-ed25519 AAAA...`` or ``bob:gh:bob``: a user and
a public key, or what ssh-import-id fetches. cloud-init knows them as ``users`` of a cloud-config.

1. Keys are merged into vendor-data and into user-data. For cloud-init, ``users`` of user-data takes the place of
   ``users`` of vendor-data; so where vendor-data alone defines users, the keys are merged into vendor-data alone.
2. Only a plain cloud-config is rewritten: its first line is ``#cloud-config``, and the rest is one YAML mapping whose
   ``users`` has a form that cloud-init knows. All else is answered as it is set: scripts, ``## template: jinja``, MIME,
   compressed data, and what is longer than `_LONGEST`.
3. Of a document, either form may be set: ``cloud-init.user-data`` or ``user.user-data``. If neither is, both forms have
   what the keys make of an empty cloud-config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import yaml

_KEYS = "cloud-init.ssh-keys."
_NAMESPACES = ("cloud-init.", "user.")
_VENDOR, _USER = "vendor-data", "user-data"
_HEAD = "#cloud-config"
#: The longest document that is rewritten, in characters: it takes 20 to 100 ms, in which nobody is served.
_LONGEST = 16384
#: How many documents are kept as they were rewritten, so that it is done once for each.
_KEPT = 256
#: Names of users as useradd(8) takes them, and a colon.
_KEY = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]{0,31}\$?):(\S[^\r\n]*)")
#: What ssh-import-id(1) takes: a protocol and a name there.
_IMPORT_ID = re.compile(r"(?:lp|gh):\S+")
#: The user that an image has by default (cloudinit.readthedocs.io, "Users and groups").
_DEFAULT_USER = "default"


def is_ssh_key(key: str) -> bool:
    """Tell whether a configuration key is one of an instance's SSH keys."""
    return key.startswith(_KEYS)


def document_of(key: str) -> str | None:
    """Return which document a configuration key is a form of, ``vendor-data`` or ``user-data``; None if of neither."""
    namespace, _, document = key.partition(".")
    return document if f"{namespace}." in _NAMESPACES and document in (_VENDOR, _USER) else None


def synthesized(config: Mapping[str, str], is_set: frozenset[str]) -> Iterator[str]:
    """Yield the keys that an instance has only because it has SSH keys: both forms of each document that is not set.

    Args:
        config: the instance's configuration.
        is_set: further keys that are set.
    """
    keys = _ssh_keys(config)
    if not keys:
        return
    for document in (_VENDOR, _USER):
        forms = [namespace + document for namespace in _NAMESPACES]
        if any(form in config or form in is_set for form in forms) or not _takes_keys(config, document):
            continue
        yield from forms


def merge(config: Mapping[str, str], is_set: frozenset[str], key: str, value: str | None) -> str | None:
    """Return what a guest reads as the configuration key `key`, a form of vendor-data or user-data.

    Args:
        config: the instance's configuration.
        is_set: further keys that are set.
        key: the form that is asked for.
        value: as it is set; None: it is not.

    Returns:
        The value; None if there is none.
    """
    document = document_of(key)
    keys = _ssh_keys(config)
    if document is None or not keys:
        return value
    if value is None:
        return _add(_HEAD + "\n", keys) if key in synthesized(config, is_set) else None
    return _add(value, keys) if _takes_keys(config, document) else value


def _ssh_keys(config: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """User and key of every SSH key, by the names of the configuration keys."""
    found = (_KEY.fullmatch(config[key].strip()) for key in sorted(config) if is_ssh_key(key))
    return tuple((one[1], one[2]) for one in found if one is not None)


def _takes_keys(config: Mapping[str, str], document: str) -> bool:
    """Whether keys are merged into a document: into user-data not if vendor-data alone defines users."""
    if document == _VENDOR:
        return True
    vendor, user = (
        next((config[form] for namespace in _NAMESPACES if (form := namespace + one) in config), "")
        for one in (_VENDOR, _USER)
    )
    return not (_defines_users(vendor) and not _defines_users(user))


@lru_cache(maxsize=_KEPT)
def _defines_users(text: str) -> bool:
    parsed = _parse(text)
    return parsed is not None and bool(parsed.get("users"))


@lru_cache(maxsize=_KEPT)
def _add(text: str, keys: tuple[tuple[str, str], ...]) -> str:
    """A document with keys, or as it is if it cannot take them."""
    parsed = _parse(text)
    users = None if parsed is None else _as_list(parsed.get("users"))
    if parsed is None or users is None:
        return text
    for name, key in keys:
        _give(users, name, key)
    parsed["users"] = users
    try:
        return f"{_HEAD}\n" + yaml.dump(
            parsed, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=4096
        )
    except (yaml.YAMLError, ValueError, RecursionError):
        # It can be nested more deeply than can be written.
        return text


def _parse(text: str) -> dict[str, Any] | None:
    """The mapping of a plain cloud-config; None if it is anything else."""
    head, _, rest = text.partition("\n")
    if len(text) > _LONGEST or head.rstrip() != _HEAD:
        return None
    try:
        if "<<" in rest and _has_alias(rest):
            # Merging aliases, a short document can stand for gigabytes.
            return None
        parsed = yaml.load(rest, Loader=yaml.CSafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    if parsed is None:
        return {}
    return parsed if isinstance(parsed, dict) else None


def _has_alias(text: str) -> bool:
    return any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.CSafeLoader))


def _as_list(users: object) -> list[Any] | None:
    """The value of ``users`` as a list of names and mappings, from any form of it; None if it has none of them."""
    if users is None or users == "":
        return [_DEFAULT_USER]
    if isinstance(users, str):
        return [name.strip() for name in users.split(",") if name.strip()]
    if isinstance(users, dict):
        if not all(isinstance(user, dict) or user is None for user in users.values()):
            return None
        return [{"name": name, **(user or {})} for name, user in users.items()]
    if isinstance(users, list) and all(isinstance(user, (str, dict)) for user in users):
        return list(users)
    return None


def _give(users: list[Any], name: str, key: str) -> None:
    """Give a user a key, and add the user if it is not in the list."""
    option = "ssh_import_id" if _IMPORT_ID.fullmatch(key) else "ssh_authorized_keys"
    for place, user in enumerate(users):
        if user == name:
            users[place] = {"name": name, option: [key]}
            return
        if isinstance(user, dict) and user.get("name") == name:
            # cloud-init takes the option with dashes too.
            spelled = next((form for form in (option, option.replace("_", "-")) if form in user), option)
            has = user.get(spelled) or []
            has = has if isinstance(has, list) else [has]
            users[place] = {**user, spelled: has if key in has else [*has, key]}
            return
    users.append({"name": name, option: [key]})
