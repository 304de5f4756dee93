"""``/1.0/meta-data``: cloud-init's meta-data."""

from __future__ import annotations

import falcon

from guestapi.dialects import Dialect
from guestapi.model import Instance


class MetaData:
    """``GET /1.0/meta-data``: YAML of two lines, then the value of ``user.meta-data`` as it is."""

    cacheable = True

    def __init__(self, dialect: Dialect) -> None:
        self._name_is_id = dialect.name_is_instance_id

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with YAML. As with Incus, the Content-Type does not say so."""
        instance: Instance = req.context.instance
        identity = instance.name if self._name_is_id else instance.cloud_init_id
        head = f"#cloud-config\ninstance-id: {identity}\nlocal-hostname: {instance.name}\n"
        resp.data = (head + instance.config.get("user.meta-data", "")).encode()
