"""``guestapi config get`` and ``guestapi config set``: what they do, however they were called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from guestapi.errors import OperatorError
from guestapi.store.lookup import get_instance
from guestapi.store.view import view

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from guestapi.store.lookup import Moment
    from guestapi.store.transaction import Change


def get_value(url: str, project: str, name: str, key: str) -> str:
    """The value of an instance's configuration key, whatever layer it comes from.

    Args:
        url: ``store.url``.
        project: of the instance.
        name: of the instance.
        key: the key.

    Raises:
        OperatorError: there is no such instance, or the key is not set.
        StoreError: the store cannot be read.
    """
    with view(url) as store:
        return find_value(store, project, name, key)


def find_value(store: Moment, project: str, name: str, key: str) -> str:
    """The value of an instance's configuration key, as `get_value`, of a store that is open."""
    value = get_instance(store, project, name).config.get(key)
    if value is None:
        raise OperatorError(f"{key} is not set", f"'guestapi config show {name}' shows what is")
    return value


def set_values(
    changing: AbstractContextManager[Change], project: str, name: str, wanted: Mapping[str, str]
) -> list[str]:
    """Set an instance's configuration keys, all at once.

    Args:
        changing: a transaction.
        project: of the instance.
        name: of the instance.
        wanted: values by key; an empty one unsets the key.

    Returns:
        What looks like a mistake, in a sentence each.

    Raises:
        OperatorError: there is no such instance, or a key or value cannot be.
        StoreError: the store cannot be written.
    """
    # PERF: to look at a value takes none of these.
    from guestapi.known import check_settings
    from guestapi.store import steps

    warnings = check_settings(wanted)
    with changing as change:
        steps.configure(change, steps.get_editable(change, project, name), wanted)
    return warnings
