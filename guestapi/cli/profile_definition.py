"""Definitions of profiles as YAML: what ``profile show`` prints, and ``profile edit`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guestapi.cli.definitions import as_devices, as_texts, kind_of, load_documents
from guestapi.errors import OperatorError
from guestapi.known import check_device, check_settings
from guestapi.model import Device, Profile

_KEYS = ("description", "config", "devices")
#: What `show` prints beside it: who the profile is and which instances have it, which are not edited.
_FACTS = frozenset({"name", "project", "used_by", "users"})
_WHERE = "this is not a definition of a profile"
_HINT = "'guestapi profile show' prints one: description, config and devices"


@dataclass(frozen=True)
class ProfileDefinition:
    """What of a profile can be edited, and whose definition it is.

    Attributes:
        name: of the profile; empty: the definition does not say it.
        project: as `name`.
        description: what the operator says of it.
        config: its configuration.
        devices: its devices.
    """

    name: str
    project: str
    description: str
    config: Mapping[str, str]
    devices: Mapping[str, Device]

    def check(self) -> list[str]:
        """What looks like a slip, in a sentence each.

        Raises:
            InvalidNameError: a switch would have a value that is neither true nor false.
        """
        return [
            *check_settings(self.config),
            *(one for name, device in self.devices.items() for one in check_device(name, device)),
        ]


def as_document(profile: Profile) -> dict[str, Any]:
    """A profile as it stands in a document."""
    return {
        "name": profile.name,
        "project": profile.project,
        "description": profile.description,
        "config": dict(profile.config),
        "devices": {name: dict(device) for name, device in profile.devices.items()},
    }


def parse(text: bytes) -> ProfileDefinition:
    """The definition that a YAML or JSON document has.

    Raises:
        OperatorError: it is something else.
    """
    documents = [one for one in load_documents(text, _WHERE, _HINT) if one != ""]
    if not documents:
        raise OperatorError(f"{_WHERE}: it is empty", _HINT)
    if len(documents) > 1:
        raise OperatorError(f"{_WHERE}: there are {len(documents)}, not one", _HINT)
    document = documents[0]
    if not isinstance(document, dict):
        raise OperatorError(f"{_WHERE}, but {kind_of(document)}", _HINT)
    found = {key: value for key, value in document.items() if key not in _FACTS}
    if unknown := [str(key) for key in found if key not in _KEYS]:
        raise OperatorError(f"{_WHERE}: {unknown[0][:40]!r} is nothing that a profile has", _HINT)
    description = found.get("description", "")
    if not isinstance(description, str):
        raise OperatorError(f"{_WHERE}: description is text, not {kind_of(description)}", _HINT)
    return ProfileDefinition(
        str(document.get("name", "")),
        str(document.get("project", "")),
        description,
        as_texts(found.get("config") or {}, f"{_WHERE}: config"),
        as_devices(found.get("devices") or {}, _WHERE),
    )
