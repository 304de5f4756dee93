"""Who may have an answer at all, decided anew for every request.

In this order: the caller is in a known instance that is in the run in which the caller was recognised, and whose init
is alive; the caller is root in it; the instance is switched on, or the endpoint answers regardless.
"""

from __future__ import annotations

from collections.abc import Callable

import falcon

from guestapi.api.errors import NotAuthorized, NotRoot, Refusal, UnknownCaller
from guestapi.callers.identify import Caller
from guestapi.dialects import Dialect
from guestapi.model import Instance


def admit(
    caller: Caller, look: Callable[[int], Instance | None], dialect: Dialect, method: str, template: str
) -> Instance:
    """The instance that the caller may ask about.

    Args:
        caller: who asks.
        look: what the store holds under an instance's id now.
        dialect: of the socket that was connected to.
        method, template: what is asked, as HTTP method and route, like ``GET`` and ``/1.0/config/{key}``.

    Raises:
        UnknownCaller: in none, or not any more.
        NotRoot: not as this user.
        NotAuthorized: the instance is switched off.
        StoreError: it cannot be told now.
    """
    if caller.instance_id is None or caller.init is None:
        raise UnknownCaller
    instance = look(caller.instance_id)
    if instance is None or instance.run != caller.run or not caller.init.alive():
        raise UnknownCaller
    if instance.init != caller.init.init:
        # Another store lies there by now, in which the number is another instance's.
        raise UnknownCaller
    if not caller.is_root:
        raise NotRoot
    if not dialect.switched_on(instance.config):
        asked = ("GET" if method == "HEAD" else method, template)
        if asked not in dialect.open_when_off:
            raise NotAuthorized
    return instance


#: Where in the environ it says that the answer depends on the request and on ``guestapi.instance`` alone.
LASTING = "guestapi.lasting"


class Gate:
    """Falcon middleware that lets a request through to its resource, with its instance in ``req.context``."""

    def __init__(self, look: Callable[[int], Instance | None], dialect: Dialect) -> None:
        self._look = look
        self._dialect = dialect

    def process_resource(
        self, req: falcon.Request, _resp: falcon.Response, resource: object, _params: dict[str, str]
    ) -> None:
        """Refuse, or note the instance, and whether the answer will last: resources say so by ``lasting = True``."""
        env = req.env
        caller: Caller = env["guestapi.caller"]
        method: str = env["REQUEST_METHOD"]
        try:
            instance = self.admit(caller, method, str(req.uri_template))
        except Refusal:
            # For the log.
            if caller.instance_id is not None:
                env["guestapi.instance"] = self._look(caller.instance_id)
            raise
        req.context.instance = env["guestapi.instance"] = instance
        env[LASTING] = method in ("GET", "HEAD") and getattr(resource, "lasting", False)

    def admit(self, caller: Caller, method: str, template: str) -> Instance:
        """As the function `admit`, for this gate's store and dialect."""
        return admit(caller, self._look, self._dialect, method, template)
