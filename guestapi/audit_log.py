"""Sends what is recorded of changes to the journal, with who made them.

Rules: an entry never fails the change that it is about, which is committed already. Without a journal there is none.
What a guest causes is bounded for each instance; what is left out is counted in the next entry about it.
"""

from __future__ import annotations

# PERF: the module that this one is the core of takes three milliseconds to load, which 'guestapi config set' has not.
import _socket
import os
from collections.abc import Callable, Iterator, Sequence

from guestapi.audit import MOST_NAMES, AuditRecord
from guestapi.encoding import printable

#: Where the journal takes entries (systemd.io/JOURNAL_NATIVE_PROTOCOL).
JOURNAL = "/run/systemd/journal/socket"
#: Of every entry, so that all are found by it.
MESSAGE_ID = "5d0b9a2e6f614c27a3f0c9d1b7e84a10"
#: What proc_pid_loginuid(5) says of a process that nobody logged in for.
_NOBODY = "4294967295"
#: Entries about an instance that guests and sources may cause: in a second over a longer time, and at once.
_PER_SECOND, _BURST = 1.0, 60
#: Of so many instances it is remembered how many entries were left out.
_REMEMBERED = 4096
#: Priority of an entry: notice (syslog(3)).
_NOTICE = "5"

Fields = list[tuple[str, str]]
AuditSink = Callable[[Sequence[AuditRecord]], None]


def by_operator(command: str) -> AuditSink:
    """What records changes of a command.

    Args:
        command: its words, without arguments.
    """

    def record(records: Sequence[AuditRecord]) -> None:
        who: Fields = [("AUDIT_BY", "operator"), ("AUDIT_USER", _user_name(str(os.getuid())))]
        if sudo := os.environ.get("SUDO_USER"):
            who.append(("AUDIT_SUDO_USER", sudo))
        if login := _login_user():
            who.append(("AUDIT_LOGIN_USER", login))
        who.append(("AUDIT_COMMAND", command))
        for one in records:
            _send(one, who, f"operator {sudo or login or who[1][1]}, {command}")

    return record


def by_source(source: str) -> AuditSink:
    """What records changes that a source was observed to have made."""
    return _Bounded([("AUDIT_BY", "source"), ("AUDIT_SOURCE", source)], f"source {source}").record


def by_guest() -> AuditSink:
    """What records changes that guests have made by the API."""
    return _Bounded([("AUDIT_BY", "guest")], "guest").record


class _Bounded:
    def __init__(self, who: Fields, name: str) -> None:
        self._who = who
        self._name = name
        # PERF: no command needs it.
        from guestapi.rate_limit import RateLimit

        self._limit = RateLimit(_PER_SECOND, _BURST)
        self._left_out: dict[int, int] = {}

    def record(self, records: Sequence[AuditRecord]) -> None:
        for one in records:
            if not self._limit.take(one.instance_id):
                if len(self._left_out) >= _REMEMBERED:
                    self._left_out.clear()
                self._left_out[one.instance_id] = self._left_out.get(one.instance_id, 0) + 1
                continue
            count = self._left_out.pop(one.instance_id, 0)
            _send(one, [*self._who, *([("AUDIT_LEFT_OUT", str(count))] if count else [])], self._name)


def _send(record: AuditRecord, who: Fields, name: str) -> None:
    fields = [
        ("MESSAGE", printable(f"{name}: {' '.join(_words(record))}")),
        ("MESSAGE_ID", MESSAGE_ID),
        ("PRIORITY", _NOTICE),
        ("SYSLOG_IDENTIFIER", "guestapi"),
        ("LOGGER", "guestapi.audit"),
        ("AUDIT_ACTION", record.action),
        *who,
        *_fields(record),
    ]
    try:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            # Nobody waits for a journal that does not read.
            connection.setblocking(False)
            connection.sendto(b"".join(_encoded(field, value) for field, value in fields), JOURNAL)
        finally:
            connection.close()
    except OSError:
        pass  # There is no journal, or it is busy: see the rules.


def _words(record: AuditRecord) -> Iterator[str]:
    yield record.action
    if record.instance:
        yield f"{record.project}/{record.instance}"
    elif record.project:
        yield f"in project {record.project}"
    for kind, names in (("keys", record.keys), ("devices", record.devices), ("profiles", record.profiles)):
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            yield f"{kind} {', '.join(names[:MOST_NAMES])}{more}"
    yield from filter(None, (record.image[:12], record.pattern, f"count {record.noticed}" if record.noticed else ""))


def _fields(record: AuditRecord) -> Iterator[tuple[str, str]]:
    for field, text in (
        ("PROJECT", record.project),
        ("INSTANCE", record.instance),
        ("AUDIT_BEFORE", record.before),
        ("AUDIT_IMAGE", record.image),
        ("AUDIT_PATTERN", record.pattern),
        ("AUDIT_COUNT", str(record.noticed or "")),
    ):
        if text:
            yield field, text
    for field, names in (
        ("AUDIT_KEY", record.keys),
        ("AUDIT_DEVICE", record.devices),
        ("AUDIT_PROFILE", record.profiles),
    ):
        for name in names[:MOST_NAMES]:
            yield field, name


def _encoded(field: str, value: str) -> bytes:
    data = value.encode(errors="backslashreplace")
    if b"\n" in data:
        return b"%s\n%s%s\n" % (field.encode(), len(data).to_bytes(8, "little"), data)
    return b"%s=%s\n" % (field.encode(), data)


def _login_user() -> str | None:
    try:
        with open("/proc/self/loginuid") as file:
            number = file.read().strip()
    except OSError:
        return None
    return None if number in ("", _NOBODY) else _user_name(number)


def _user_name(number: str) -> str:
    # PERF: loaded where a change was made.
    import pwd

    try:
        return pwd.getpwuid(int(number)).pw_name
    except KeyError:
        return number
