"""What statements share: rows that are written by the thousand, and values that are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from guestapi.model import Device
from guestapi.names import is_text

if TYPE_CHECKING:
    import psycopg

#: Characters and bytes of the rows that a statement has at the most, unless one row alone has more.
_BATCH_SIZE = 4 << 20


def write_rows(connection: psycopg.Connection[Any], statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Execute a statement that takes an array for each column of its rows, for some of them at a time."""
    batch: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        more = sum(len(value) for value in row if isinstance(value, (str, bytes)))
        if batch and size + more > _BATCH_SIZE:
            connection.execute(statement.encode(), [list(column) for column in zip(*batch, strict=True)])
            batch, size = [], 0
        batch.append(row)
        size += more
    if batch:
        connection.execute(statement.encode(), [list(column) for column in zip(*batch, strict=True)])


def as_places(places: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Projects and names as the parameters of a statement, but for those that nothing in the database can have."""
    wanted = [place for place in places if all(map(is_storable, place))]
    return {"projects": [project for project, _ in wanted], "names": [name for _, name in wanted]}


def is_storable(text: str) -> bool:
    """Whether PostgreSQL takes this as a text."""
    return is_text(text) and "\0" not in text


def as_devices(definitions: Mapping[str, Any] | None) -> dict[str, Device]:
    """Devices out of what the database says; what is not an object of texts, as no command writes it, is left out."""
    return {name: one for name, one in (definitions or {}).items() if is_device(one)}


def is_device(definition: Any) -> bool:
    """Whether it is an object of texts."""
    return isinstance(definition, dict) and all(isinstance(value, str) for value in definition.values())


def as_texts(values: Mapping[str, str] | None) -> dict[str, str]:
    """Configuration out of hexadecimal digits, as `json_object_agg` has it; what is no UTF-8 is replaced."""
    return {key: bytes.fromhex(value).decode(errors="replace") for key, value in (values or {}).items()}
