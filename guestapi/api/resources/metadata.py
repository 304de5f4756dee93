"""``/1.0/meta-data``: what cloud-init calls by that name."""

from __future__ import annotations

import falcon

from guestapi.dialects import Dialect
from guestapi.model import Instance


class MetaData:
    """``GET /1.0/meta-data``: YAML made of two lines, then whatever ``user.meta-data`` holds, as it is."""

    lasting = True

    def __init__(self, dialect: Dialect) -> None:
        self._name_is_id = dialect.name_is_instance_id

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Text, though the type that is sent does not say so."""
        instance: Instance = req.context.instance
        identity = instance.name if self._name_is_id else instance.cloud_init_id
        head = f"#cloud-config\ninstance-id: {identity}\nlocal-hostname: {instance.name}\n"
        resp.data = (head + instance.config.get("user.meta-data", "")).encode()
