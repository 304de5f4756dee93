"""``/1.0/guestapi/notices``: what the operator has announced to the instance, which may acknowledge it."""

from __future__ import annotations

from typing import Protocol

import falcon

from guestapi.api.errors import NotFound, TooManyAcknowledgements
from guestapi.encoding import JSON, json_line
from guestapi.model import Instance
from guestapi.rate_limit import RateLimit
from guestapi.store.notices import ACKNOWLEDGED, Notice


class NoticeStore(Protocol):
    """Where notices are. `api.app.Store` implements it."""

    def notices(self, instance_id: int) -> list[Notice]:
        """As `store.reading.Reader.notices`."""
        ...

    def acknowledge(self, instance: Instance, notice_id: str) -> bool:
        """As `store.writing.Writer.acknowledge`. It may wait for another writer; other requests continue meanwhile."""
        ...


class Notices:
    """``GET /1.0/guestapi/notices``: those that are not past. The answer depends on the time, so nothing keeps it."""

    def __init__(self, store: NoticeStore) -> None:
        self._store = store

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer with a JSON list, the next notice first."""
        instance: Instance = req.context.instance
        resp.content_type = JSON
        resp.set_header("Cache-Control", "no-store")
        resp.data = json_line([one.document for one in self._store.notices(instance.id)])


class Acknowledgement:
    """``POST /1.0/guestapi/notices/{notice}/ack``."""

    def __init__(self, store: NoticeStore, rate_limit: RateLimit) -> None:
        """Take acknowledgements.

        Args:
            store: where they are recorded.
            rate_limit: how often an instance may acknowledge. Each new acknowledgement is written and logged.
        """
        self._store = store
        self._rate_limit = rate_limit

    def on_post(self, req: falcon.Request, resp: falcon.Response, notice: str) -> None:
        """Record it, and answer 204; said again, the same.

        Raises:
            NotFound: the notice is past, or not one of this instance.
            TooManyAcknowledgements: the instance acknowledges too often.
        """
        instance: Instance = req.context.instance
        if not self._rate_limit.take(instance.id):
            raise TooManyAcknowledgements(self._rate_limit.retry_after)
        # A request that changes nothing does not wait for the store.
        found = next((one for one in self._store.notices(instance.id) if one.id == notice), None)
        if found is None or (found.status != ACKNOWLEDGED and not self._store.acknowledge(instance, notice)):
            raise NotFound
        resp.status = falcon.HTTP_204
