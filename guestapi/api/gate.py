"""Who may have an answer at all, decided anew for every request.

In this order: the caller is in a registered instance, in the run in which it was identified, and the instance's init is
alive; the caller is root in the instance, or a policy names its user for the key that it asks for; the API is switched
on for the instance, or the endpoint answers regardless.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import falcon

from guestapi.api.errors import NotAuthorized, NotRoot, Refusal, UnknownCaller
from guestapi.callers.identify import Caller
from guestapi.dialects import Dialect
from guestapi.key_policy import rule_of, visible
from guestapi.model import Instance
from guestapi.wsgi import CACHEABLE, CALLER, INSTANCE, JUST_IDENTIFIED, ROUTE, Environ

#: The routes of single keys, the only ones that a policy can open for a user other than root.
_KEY_ROUTES = frozenset({"/1.0/config/{key}", "/1.0/guestapi/tree/config/{key}"})


def admit(
    caller: Caller,
    get_instance: Callable[[int], Instance | None],
    dialect: Dialect,
    method: str,
    template: str,
    key: str | None = None,
    seen: Instance | None = None,
) -> Instance:
    """Decide whether a caller may have an answer.

    Args:
        caller: who asks.
        get_instance: returns what the store has under an instance's id now.
        dialect: of the socket.
        method: HTTP method of the request.
        template: route of the request, like ``/1.0/config/{key}``.
        key: the configuration key that the request names; None if it names none.
        seen: the caller's instance as it was when the caller was identified, if that was an instant ago
            (`wsgi.JUST_IDENTIFIED`). Then the look that has identified the caller stands for this one.

    Returns:
        The caller's instance.

    Raises:
        UnknownCaller: it is in no registered instance, or not any more.
        NotRoot: it is not root in its instance, and no policy lets it read the key.
        NotAuthorized: the API is switched off for the instance.
        StoreError: the store cannot be read now.
    """
    if caller.instance_id is None or caller.init is None:
        raise UnknownCaller
    instance = seen or get_instance(caller.instance_id)
    if instance is None or instance.run != caller.run or not (seen or caller.init.alive()):
        raise UnknownCaller
    if instance.init != caller.init.init:
        # The store was replaced, and the id belongs to another instance in it.
        raise UnknownCaller
    if not caller.is_root and not _may_read(caller, instance, method, template, key):
        raise NotRoot
    if not dialect.switched_on(instance.config):
        endpoint = ("GET" if method == "HEAD" else method, template)
        if endpoint not in dialect.open_when_off:
            raise NotAuthorized
    return instance


def _may_read(caller: Caller, instance: Instance, method: str, template: str, key: str | None) -> bool:
    """Tell whether a policy names the caller's user for the key that it asks for."""
    if not instance.policies or key is None or template not in _KEY_ROUTES or method not in ("GET", "HEAD"):
        return False
    uids = rule_of(instance.policies, key).uids
    return bool(uids) and caller.uid_inside in uids


class Gate:
    """Falcon middleware. It lets a request through to its resource, with the instance in ``req.context``."""

    def __init__(
        self,
        get_instance: Callable[[int], Instance | None],
        dialect: Dialect,
        get_seen: Callable[[int], Instance | None] | None = None,
    ) -> None:
        """Decide by a store.

        Args:
            get_instance: returns what the store has under an instance's id now.
            dialect: of the socket.
            get_seen: as `get_instance`, as of the last identification of a caller; None if nothing knows that.
        """
        self._get_instance = get_instance
        self._get_seen = get_seen
        self._dialect = dialect

    def process_resource(
        self, req: falcon.Request, _resp: falcon.Response, resource: object, params: dict[str, str]
    ) -> None:
        """Refuse the request, or note its instance and whether the server may cache the answer.

        A resource says by ``cacheable = True`` that its answer depends on the request and the instance alone.
        """
        environ = cast("Environ", req.env)
        caller = environ[CALLER]
        method = environ["REQUEST_METHOD"]
        environ[ROUTE] = route = str(req.uri_template)
        try:
            instance = self.admit(caller, method, route, params.get("key"))
        except Refusal:
            # The log names the instance.
            if caller.instance_id is not None:
                environ[INSTANCE] = self._get_instance(caller.instance_id)
            raise
        environ[INSTANCE] = instance
        req.context.instance = visible(instance)
        environ[CACHEABLE] = method in ("GET", "HEAD") and getattr(resource, "cacheable", False)

    def admit(self, caller: Caller, method: str, template: str, key: str | None = None) -> Instance:
        """As the function `admit`, with this gate's store and dialect."""
        return admit(caller, self._get_instance, self._dialect, method, template, key)

    def admit_first(self, environ: Environ, template: str, key: str | None = None) -> Instance:
        """As `admit`, a GET; of a caller that was identified an instant ago, nothing is looked at twice."""
        caller = environ[CALLER]
        seen = None
        if self._get_seen is not None and caller.instance_id is not None and JUST_IDENTIFIED in environ:
            seen = self._get_seen(caller.instance_id)
        return admit(caller, self._get_instance, self._dialect, "GET", template, key, seen)

    def readmit(self, req: falcon.Request, instance: Instance | None, key: str | None = None) -> Instance:
        """As `admit`, for a request that was admitted already and whose instance was read once more.

        Args:
            req: the request.
            instance: what the store has under the instance's id now.
            key: the configuration key that the request names; None if it names none.

        Returns:
            The instance as its guest sees it, noted in the request in the place of the earlier one.
        """
        environ = cast("Environ", req.env)
        if instance is None or instance is not environ[INSTANCE]:
            method, template = environ["REQUEST_METHOD"], str(req.uri_template)
            instance = admit(environ[CALLER], lambda _id: instance, self._dialect, method, template, key)
            environ[INSTANCE] = instance
            req.context.instance = visible(instance)
        found: Instance = req.context.instance
        return found
