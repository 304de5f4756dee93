"""OCI runtimes' hooks (podman, crun, runc): the container's state as JSON on standard input.

github.com/opencontainers/runtime-spec, config.md "POSIX-platform Hooks", and runtime.md "State".
"""

from __future__ import annotations

import json

from guestapi.sources.register import Report, ReportError

#: How much of a state is read: a real one has some kilobytes, most of them annotations.
STATE_BYTES = 1 << 20
#: How many digits of an id, which has 64, name a container that has no other name, as podman shows it.
_SHORT_ID = 12
_CONFIG = "guestapi.config."


def report(state: bytes) -> Report:
    """What the runtime tells its hook, in ``createRuntime`` and in ``poststop``.

    Annotations: ``guestapi.name`` is the instance's name, ``guestapi.config.KEY`` its configuration.

    Raises:
        ReportError: it is no state.
    """
    try:
        document = json.loads(state)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("id"), str) or not document["id"]:
        raise ReportError("standard input is not the state of an OCI container; 'guestapi hook oci' is for its hooks")
    annotations = document.get("annotations") or {}
    if not isinstance(annotations, dict) or not all(isinstance(value, str) for value in annotations.values()):
        raise ReportError("the state's annotations are not strings")
    named = annotations.get("guestapi.name")
    name = named or document["id"][:_SHORT_ID]
    if not name.isprintable():
        # JSON can escape what is no text, such as half of a surrogate pair, and no store can look that up.
        raise ReportError(f"the container's name {name!r} is not printable text")
    if document.get("status") == "stopped":
        return Report(name, None, passing=not named)
    pid = document.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        raise ReportError("the state has no pid; the hook is for the stages createRuntime and poststop")
    config = {key.removeprefix(_CONFIG): value for key, value in annotations.items() if key.startswith(_CONFIG)}
    return Report(name, pid, config=config, passing=not named)
