"""``/1.0/meta-data``: cloud-init's meta-data."""

from __future__ import annotations

import re

import falcon

from guestapi.api.resources.config import ValueStore, get_value
from guestapi.dialects import Dialect
from guestapi.encoding import to_json
from guestapi.model import Instance

#: Names that YAML takes as they are.
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class MetaData:
    """``GET /1.0/meta-data``: YAML of two lines, then the value of ``user.meta-data`` as it is."""

    cacheable = True

    def __init__(self, dialect: Dialect, store: ValueStore) -> None:
        """Serve meta-data.

        Args:
            dialect: says which instance-id the instance has, and how the document begins.
            store: where large values are read.
        """
        self._store = store
        self._dialect = dialect

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with YAML. As with Incus, the Content-Type does not say so."""
        instance: Instance = req.context.instance
        resp.data = meta_data(instance, self._dialect, get_value(self._store, instance, "user.meta-data")).encode()


def meta_data(instance: Instance, dialect: Dialect, own: str | None) -> str:
    """Write an instance's meta-data.

    Args:
        instance: the instance.
        dialect: says which instance-id the instance has.
        own: the value of ``user.meta-data``; None if it is not set.
    """
    identity = _yaml(instance.name) if dialect.name_is_instance_id else instance.cloud_init_id
    return f"{dialect.meta_data_head}instance-id: {identity}\nlocal-hostname: {instance.host_name}\n{own or ''}"


def _yaml(name: str) -> str:
    """`name` as a YAML string; a runtime may have given it any printable characters."""
    return name if _PLAIN.fullmatch(name) else to_json(name).decode()
