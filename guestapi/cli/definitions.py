"""Definitions of instances as YAML: what `show` and `export` print, and `add`, `apply` and `edit` take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

import yaml

from guestapi.cli.words import printable
from guestapi.errors import OperatorError
from guestapi.known import check_device, check_settings
from guestapi.model import Device, InstanceType
from guestapi.store.definitions import Definition

_KEYS = ("name", "project", "type", "uuid", "cloud_init_id", "location", "profiles", "config", "devices")
#: What `show --format json`, Incus and LXD print beside it: facts, which are not defined.
_FACTS = frozenset(
    {
        *("status", "state", "pid", "source", "key", "hostname", "attributes"),
        *("architecture", "created_at", "description"),
        *("ephemeral", "expanded_config", "expanded_devices", "last_used_at", "stateful", "status_code"),
    }
)
_HINT = f"a definition has {', '.join(_KEYS)}"
#: libyaml is ten times as fast. Python's own parser reads the same.
_LOADER: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Loader(_LOADER):  # type: ignore[misc]  # which of two it is, is known when it runs
    """Takes every scalar for the text that it is, and a key that stands there twice for a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As yaml.constructor.BaseConstructor."""
        found = super().construct_mapping(node, deep=deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands there twice", node.start_mark)
        return cast("dict[Any, Any]", found)


class _Dumper(_DUMPER):  # type: ignore[misc]  # as above
    """Writes text of several lines as such."""


class _QuotingDumper(_DUMPER):  # type: ignore[misc]  # as above
    """Writes all text in quotes, with escapes."""


def _represent(dumper: Any, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and text.replace("\n", "").replace("\t", "").isprintable() else None
    return cast("yaml.ScalarNode", dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style))


def _quote(dumper: Any, text: str) -> yaml.ScalarNode:
    return cast("yaml.ScalarNode", dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


_Dumper.add_representer(str, _represent)
_QuotingDumper.add_representer(str, _quote)


def to_yaml(*documents: object) -> str:
    """Documents of texts, lists and mappings as a YAML stream, from which exactly the same texts are read."""
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1 << 20}
    options |= {"default_flow_style": False, "explicit_start": len(documents) > 1}
    text = str(yaml.dump_all(documents, Dumper=_Dumper, **options))
    if list(yaml.load_all(text, Loader=_Loader)) == [_as_read(one) for one in documents]:
        return text
    # Some texts of several lines, and some characters, are not read as they were written.
    return str(yaml.dump_all(documents, Dumper=_QuotingDumper, **options))


def _as_read(document: object) -> object:
    """A document as `_Loader` reads it: whatever is neither a list nor a mapping is text."""
    if isinstance(document, dict):
        return {key: _as_read(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_as_read(one) for one in document]
    return document if isinstance(document, str) else json.dumps(document)


def _load_json(text: str) -> object:
    """What a JSON text has, with text for every scalar, as `_Loader` reads it; None if it is not JSON."""
    try:
        return _as_read(json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=_unique))
    except ValueError:
        return None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        # YAML's loader says where.
        raise ValueError("a key stands there twice")
    return found


def as_document(definition: Definition) -> dict[str, Any]:
    """A definition as it stands in a document; what says nothing is left out."""
    document: dict[str, Any] = {"name": definition.name, "project": definition.project, "type": definition.type}
    for key in ("uuid", "cloud_init_id", "location"):
        if (value := getattr(definition, key)) is not None:
            document[key] = value
    if definition.profiles:
        document["profiles"] = list(definition.profiles)
    devices = {name: dict(device) for name, device in definition.devices.items()}
    return document | {"config": dict(definition.config), "devices": devices}


def parse(text: bytes, where: str, *, name: str | None = None, project: str | None = None) -> list[Definition]:
    """The definitions that a YAML stream or a JSON document has, one by one or in lists.

    Args:
        text: the stream.
        where: what it is called in an error.
        name: of the instance, where a definition has none.
        project: of the instances, where a definition has none.

    Raises:
        OperatorError: it is not YAML, or something else than definitions.
    """
    return [_definition(one, where, name, project) for one in _flat(load_documents(text, where, _HINT))]


def load_documents(text: bytes, where: str, hint: str) -> list[object]:
    """The documents of a YAML stream, or the one of a JSON text: texts, lists and mappings.

    Args:
        text: the stream.
        where: what it is called in an error.
        hint: what would be right.

    Raises:
        OperatorError: it is not YAML.
    """
    try:
        # YAML takes most of JSON, but reads some characters otherwise: a line separator is folded there.
        if text.lstrip()[:1] in (b"{", b"[") and (found := _load_json(text.decode())) is not None:
            return [found]
        return list(yaml.load_all(text.decode(), Loader=_Loader))
    except UnicodeDecodeError:
        raise OperatorError(f"{where}: is not valid UTF-8 text", "a definition is YAML") from None
    except RecursionError:
        raise OperatorError(f"{where}: is nested too deeply", hint) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}: line {mark.line + 1}" if mark is not None else where
        problem = printable(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error))
        raise OperatorError(f"{place}: {problem}".replace("\n", " "), "a definition is YAML") from None


def check(definition: Definition) -> list[str]:
    """What in a definition looks like a slip, in a sentence each.

    Raises:
        InvalidNameError: a switch would have a value that is neither true nor false.
    """
    found = check_settings(definition.config)
    for name, device in definition.devices.items():
        found += check_device(name, device)
    return found


def _flat(documents: list[object]) -> Iterator[object]:
    for document in documents:
        if isinstance(document, list):
            yield from document
        elif document != "":
            yield document


def _definition(document: object, where: str, name: str | None, project: str | None) -> Definition:
    if not isinstance(document, dict):
        raise OperatorError(f"{where}: is not a definition of an instance, but {kind_of(document)}", _HINT)
    found = {key: value for key, value in document.items() if key not in _FACTS}
    # Loaded where there is one: what is wrong is said of the instance.
    called = str(found.get("name", name or ""))
    if not called:
        raise OperatorError(f"{where}: a definition has no name", _HINT)
    where = f"{where}: {called}"
    if unknown := [str(key) for key in found if key not in _KEYS]:
        raise OperatorError(f"{where}: {unknown[0][:40]!r} is nothing that can be defined", _HINT)
    for key in ("name", "project", "type", "uuid", "cloud_init_id", "location"):
        if not isinstance(found.get(key, ""), str):
            raise OperatorError(f"{where}: {key} is text, not {kind_of(found[key])}", _HINT)
    kinds = get_args(InstanceType)
    kind = found.get("type") or "container"
    if kind not in kinds:
        raise OperatorError(f"{where}: type is {' or '.join(kinds)}, not {kind[:40]!r}", _HINT)
    return Definition(
        called,
        found.get("project") or project or "default",
        cast("InstanceType", kind),
        _text_or_none(found.get("uuid")),
        _text_or_none(found.get("cloud_init_id")),
        _text_or_none(found.get("location")),
        _profiles(found.get("profiles") or [], where),
        as_texts(found.get("config") or {}, f"{where}: config"),
        as_devices(found.get("devices") or {}, where),
    )


def _text_or_none(value: Any) -> str | None:
    # What JSON has for nothing, too.
    return None if value in (None, "", "null", "~") else str(value)


def _profiles(found: object, where: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise OperatorError(f"{where}: profiles is a list of names, not {kind_of(found)}", "write 'profiles: [NAME]'")
    return tuple(found)


def as_devices(found: object, where: str) -> Mapping[str, Device]:
    """The devices that a part of a document has.

    Raises:
        OperatorError: it is something else.
    """
    if not isinstance(found, dict):
        raise OperatorError(
            f"{where}: devices is a mapping, not {kind_of(found)}", "write 'NAME: {type: nic}' below it"
        )
    return {str(name): as_texts(one, f"{where}: device {str(name)[:40]}") for name, one in found.items()}


def as_texts(found: object, where: str) -> dict[str, str]:
    """The keys and values that a part of a document has.

    Raises:
        OperatorError: it is something else.
    """
    if not isinstance(found, dict):
        raise OperatorError(f"{where} is a mapping, not {kind_of(found)}", "write 'KEY: VALUE' below it")
    for key, value in found.items():
        if not isinstance(value, str) or not isinstance(key, str):
            raise OperatorError(f"{where}: {str(key)[:40]!r} is text, not {kind_of(value)}", "write 'KEY: VALUE'")
    return found


def kind_of(value: object) -> str:
    """What a part of a document is, for an error."""
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "text"
