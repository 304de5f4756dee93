"""``guestapi check``: whether everything is in place."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import click

from guestapi import gunicorn_conf
from guestapi.callers.credentials import peer_pidfd
from guestapi.callers.machines import is_alive
from guestapi.callers.namespaces import open_namespace
from guestapi.cli.common import Operator, has_format, print_json
from guestapi.cli.grouping import Verb
from guestapi.cli.identity import check_identity
from guestapi.cli.mirror import SNAP_SOCKET
from guestapi.cli.printing import mark
from guestapi.cli.relay import look_at_relay
from guestapi.cli.takeover import OURS
from guestapi.cli.words import printable
from guestapi.dialects import DIALECTS, Dialect
from guestapi.errors import GuestapiError
from guestapi.model import DAEMONS, Instance, Problem, SourceStatus
from guestapi.settings import ListenSocket
from guestapi.sources.sanitize import FLEET
from guestapi.store import images
from guestapi.store.engine import database_file
from guestapi.store.errors import StoreError
from guestapi.store.lookup import find_corruption, list_images, list_instances, list_problems, list_sources
from guestapi.store.placements import list_placed, read_status
from guestapi.store.writing import Writer
from guestapi.systemd import is_off

#: Bytes that a change may need on the disk: some values of 2 MiB and what is told of them, in the write-ahead log and
#: then in the database.
_ROOM = 16 << 20

#: Seconds to wait for an answer of the service.
_ANSWER_SECONDS = 5.0
#: Seconds after which a mirror or follower that has said nothing says nothing any more; it should every ten.
_STALE_SECONDS = 30.0
#: The unit that mirrors the LXD of the snap.
_SNAP_UNIT = "guestapi-mirror-lxd-snap"
#: The unit that follows the fleet.
_FLEET_UNIT = "guestapi-fleet"
#: The programs by which a runtime is known to be installed.
_RUNTIMES = {
    "docker": ("dockerd",),
    "libvirt": ("libvirtd", "virtqemud"),
    "lxc": ("lxc-start",),
    "nspawn": ("systemd-nspawn",),
    "oci": ("crun", "runc"),
    "podman": ("podman",),
}
#: The most problems of a source that are shown.
_MOST_PROBLEMS = 50


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: its name, whether it passed, and what was found or what to do."""

    check: str
    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class SocketFinding:
    """A finding about one listener, and whether the service answers on it."""

    finding: Finding
    answers: bool


@click.command(cls=Verb)
@has_format
@click.option("--settings", "settings_only", is_flag=True, help="Check the configuration files only.")
@click.pass_context
def check(ctx: click.Context, as_json: bool, settings_only: bool) -> None:
    """Check that everything is in place. Prints a line for each check, and exits 1 if one fails."""
    operator: Operator = ctx.obj
    findings = list(_look(operator, settings_only))
    if as_json:
        print_json([{"check": one.check, "ok": one.ok, "text": one.text} for one in findings])
    else:
        for one in findings:
            click.echo(f"{mark(one.ok)} {one.check}: {printable(one.text)}")
    if not all(one.ok for one in findings):
        ctx.exit(1)


def _look(operator: Operator, settings_only: bool) -> Iterator[Finding]:
    settings = _attempt("configuration", lambda: (operator.settings, str(operator.file or "defaults, no file")))
    yield settings
    if not settings.ok:
        return
    yield _attempt("gunicorn", lambda: _gunicorn(operator.settings.gunicorn_file))
    yield _attempt("store.url", lambda: _place(operator))
    if operator.settings.hooks.template:
        text = (
            "is not read any more once a follower has taken it over into the profile 'default' of project "
            f"{operator.settings.hooks.project!r}; 'guestapi profile show default' shows that, take it out of the file"
        )
        yield Finding("hooks.template", True, text)
    if settings_only:
        return
    yield _kernel()
    # First of all that follows: a connection starts the service, which makes the store if there is none.
    sockets = list(_sockets(operator.settings.guest_listeners))
    if _is_missing(operator) and not any(one.answers for one in sockets):
        yield Finding("store", True, f"{_place(operator)[1]}: not there yet, the service makes it when it starts")
    else:
        store = _attempt("store", lambda: _store(operator))
        yield store
        if store.ok:
            yield _attempt("instances", lambda: _instances(operator))
            yield _attempt("images", lambda: _images(operator))
            yield from _sources(operator)
            yield from _fleet(operator)
            with operator.view() as view:
                known = {status.name for status in list_sources(view)}
                relay = look_at_relay(list_instances(view), operator.settings.handover)
            yield from _followers_off(known)
            yield from _snap_off(known)
            if relay is not None:
                yield Finding("relay", *relay)
    if operator.settings.identity.trust_domain is not None:
        yield _attempt("identity", lambda: check_identity(operator.settings.identity))
    yield from (one.finding for one in sockets)


def _attempt(check_name: str, look: Callable[[], tuple[object, str]]) -> Finding:
    try:
        return Finding(check_name, True, look()[1])
    except GuestapiError as error:
        return Finding(check_name, False, str(error))


def _gunicorn(file: Path) -> tuple[object, str]:
    return gunicorn_conf.read(file), str(file) if file.exists() else f"defaults, there is no {file}"


def _kernel() -> Finding:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pidfd = peer_pidfd(ours)
    if pidfd is None:
        text = f"Linux {os.uname().release} has no SO_PEERPIDFD (6.5): callers are recognised by /proc, which is weaker"
        return Finding("kernel", True, text)
    try:
        os.close(open_namespace(os.getpid(), pidfd))
    finally:
        os.close(pidfd)
    return Finding("kernel", True, f"Linux {os.uname().release}, callers are recognised by pidfd")


def _place(operator: Operator) -> tuple[object, str]:
    file = database_file(operator.settings.store.url)
    if not file.parent.is_dir():
        raise StoreError(f"{operator.file}: store.url: the directory {file.parent} does not exist")
    return file, str(file)


def _store(operator: Operator) -> tuple[object, str]:
    file = database_file(operator.settings.store.url)
    writer = Writer(operator.settings)
    with writer.change() as change:
        fault = find_corruption(change)
    if fault is not None:
        raise StoreError(f"{file}: {fault}", "'guestapi restore FILE' puts a backup back")
    status, parent = file.stat(), file.parent.stat()
    shared = status.st_gid == parent.st_gid and status.st_mode & 0o060 == 0o060
    if status.st_uid != parent.st_uid and not shared:
        raise StoreError(
            f"{file}: belongs to user {status.st_uid}, its directory to {parent.st_uid}", "chown --reference it"
        )
    if status.st_mode & 0o600 != 0o600:
        raise StoreError(f"{file}: mode {status.st_mode & 0o777:04o}, its owner needs 0600; chmod u+rw it")
    place = os.statvfs(file)
    free = place.f_bavail * place.f_frsize
    if free < _ROOM:
        raise StoreError(f"{file}: only {free >> 20} MiB are free on its disk")
    return writer, str(file)


def _instances(operator: Operator) -> tuple[object, str]:
    with operator.view() as store:
        found = list_instances(store)
    running = [one for one in found if one.init is not None]
    dead = [one.name for one in running if one.init and not is_alive(one.init)]
    text = f"{len(found)} known, {len(running) - len(dead)} running"
    if dead:
        text += f"; ended without notice: {', '.join(dead)} ('guestapi instance stop' tells the store)"
    return found, text


def _images(operator: Operator) -> tuple[object, str]:
    where = images.directory(operator.settings)
    with operator.view() as store:
        known = list_images(store)
    faults = []
    for one in known:
        try:
            for descriptor in images.open_files(where, one):
                os.close(descriptor)
        except images.ImageFileError as error:
            faults.append(str(error))
    if faults:
        raise StoreError(f"{len(known)} known, {len(faults)} cannot be given out: {'; '.join(faults)}")
    size = sum(one.size for one in known)
    return known, f"{len(known)} known, {size} bytes in {where}" if known else "0 known"


def _sources(operator: Operator) -> Iterator[Finding]:
    with operator.view() as store:
        statuses, problems = list_sources(store), list_problems(store)
        known = [one for one in list_instances(store) if one.source]
    for status in statuses:
        owned = [one for one in known if one.source == status.name]
        running = [one for one in owned if one.init and is_alive(one.init)]
        yield _source(status, len(owned), len(running))
        yield from _problems([problem for problem in problems if problem.source == status.name])
        if status.name in DAEMONS:
            yield _guest_socket(DIALECTS[status.name], running, operator.settings.guest_listeners)


def _fleet(operator: Operator) -> Iterator[Finding]:
    """The fleet, if this host has ever followed one."""
    with operator.view() as store:
        status, placed = read_status(store), list_placed(store)
        problems = list_problems(store, FLEET)
    if status is None:
        if operator.settings.fleet.url is not None and not is_off(f"{_FLEET_UNIT}.service"):
            yield Finding("fleet", False, f"has never been followed; 'systemctl status {_FLEET_UNIT}' may say why")
        return
    if not status.cursor.fleet and not placed and is_off(f"{_FLEET_UNIT}.service"):
        return  # It has left.
    age = time.time() - status.contact
    counts = f"{len(placed)} instances"
    if status.connected and -_STALE_SECONDS < age < _STALE_SECONDS:
        text = f"follows, {counts}, revision {status.cursor.revision}; last contact {age:.0f} s ago"
        yield Finding("fleet", True, f"{text}, lag {status.lag:.3f} s")
    else:
        text = f"{counts} as last known (revision {status.cursor.revision}); {_contact(status.contact)}"
        reason = status.fault or "the follower itself does not run"
        yield Finding("fleet", False, f"{text}; {reason}; 'systemctl status {_FLEET_UNIT}' may say more")
    yield from _problems(problems)


def _contact(contact: float) -> str:
    if not contact:
        return "no contact yet"
    since = datetime.fromtimestamp(contact).astimezone().isoformat(" ", "seconds")
    return f"last contact {since}, {time.time() - contact:.0f} s ago"


def _followers_off(known: Collection[str]) -> Iterator[Finding]:
    """Runtimes of this host whose containers nothing registers; `known`: sources that have a mirror or a follower."""
    for source, programs in _RUNTIMES.items():
        if source == "oci" and any(map(shutil.which, (*_RUNTIMES["podman"], *_RUNTIMES["docker"]))):
            continue  # An engine runs crun or runc here.
        unit = f"guestapi-{source}.service"
        if source not in known and any(map(shutil.which, programs)) and is_off(unit):
            kind = "virtual machines" if source == "libvirt" else "containers"
            text = f"{unit} is switched off, so {kind} of {source} are not registered"
            yield Finding(f"follower {source}", True, f"{text}; 'systemctl enable --now {unit}' registers them")


def _snap_off(known: Collection[str]) -> Iterator[Finding]:
    """The LXD of the snap, if nothing mirrors it; `known`: sources that have a mirror or a follower."""
    if "lxd" not in known and Path(SNAP_SOCKET).exists():
        text = f"{SNAP_SOCKET} is there, but {_SNAP_UNIT} does not run, so its instances are not known"
        yield Finding("mirror lxd", True, f"{text}; docs/incus.md says how to set it up")


def _is_missing(operator: Operator) -> bool:
    """Whether there is no database file. One that cannot be looked at is another matter."""
    try:
        database_file(operator.settings.store.url).stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _source(status: SourceStatus, owned: int, running: int) -> Finding:
    by_daemon = status.name in DAEMONS
    what = "mirror" if by_daemon else "follower"
    age = time.time() - status.contact
    counts = f"{owned} instances, {running} running"
    # A contact in the future was written before the clock was set back, so not by a running mirror or follower.
    if not status.connected or not -_STALE_SECONDS < age < _STALE_SECONDS:
        stale = (
            f"{counts} as last known; {_contact(status.contact)}; {status.fault or f'the {what} itself does not run'}"
        )
        if not by_daemon:
            stale += "; containers that start meanwhile are not registered"
            if is_off(f"guestapi-{status.name}.service"):
                stale += f"; 'guestapi follow {status.name} --forget' if that is not wanted any more"
        return Finding(f"{what} {status.name}", False, f"{stale}; 'systemctl status {_units(status)}' may say more")
    text = f"follows {status.socket or status.name}, {counts}; last contact {age:.0f} s ago, lag {status.lag:.3f} s"
    return Finding(f"{what} {status.name}", not status.fault, f"{text}; {status.fault}" if status.fault else text)


def _units(status: SourceStatus) -> str:
    """The units of a source, and of what it follows."""
    source = status.name
    if status.socket == SNAP_SOCKET:
        return f"snap.lxd.daemon {_SNAP_UNIT}"
    if source in DAEMONS:
        return f"{source} guestapi-mirror" if source == "incus" else f"{source} guestapi-mirror-{source}"
    return f"guestapi-{source}"


def _problems(problems: list[Problem]) -> Iterator[Finding]:
    """What could not be taken over from one source: a container that is not registered is a failure."""
    for problem in sorted(problems, key=lambda one: not one.refused)[:_MOST_PROBLEMS]:
        text = f"{problem.name} in project {problem.project}: {problem.reason}"
        yield Finding(
            f"source {problem.source}", not problem.refused, f"{text}; {problem.hint}" if problem.hint else text
        )
    if len(problems) > _MOST_PROBLEMS:
        more = len(problems) - _MOST_PROBLEMS
        refused = sum(one.refused for one in problems) > _MOST_PROBLEMS
        yield Finding(f"source {problems[0].source}", not refused, f"and {more} more, see the journal")


def _sockets(listeners: tuple[ListenSocket, ...]) -> Iterator[SocketFinding]:
    """Each listener by itself. One whose unit is switched off is in order if there is another that is not."""
    found = [_socket(listener) for listener in listeners]
    off = [not finding.ok and is_off(DIALECTS[one.dialect].unit) for one, finding in zip(listeners, found, strict=True)]
    for listener, finding, is_switched_off in zip(listeners, found, off, strict=True):
        answers = finding.ok
        if is_switched_off:
            unit = DIALECTS[listener.dialect].unit
            text = f"{listener.path}: {unit} is switched off"
            if all(off):
                text += f"; 'systemctl enable --now {unit}' switches it on"
            finding = Finding(finding.check, not all(off), text)
        yield SocketFinding(finding, answers)


def _guest_socket(dialect: Dialect, running: list[Instance], listeners: tuple[ListenSocket, ...]) -> Finding:
    """Whether the daemon's instances have our socket, and how they get it."""
    name = f"guest socket {dialect.name}"
    path = Path(dialect.socket)
    ours = path.with_name(OURS)
    try:
        if path.samefile(ours):
            return Finding(name, True, f"taken over: {path} is the socket of guestapi")
        taking = f"; {ours} is there, but {path} is the daemon's: is guestapi-takeover@{dialect.name} running?"
    except OSError:
        taking = ""
    directories = {
        str(Path(listener.path).parent)
        for listener in listeners
        if DIALECTS[listener.dialect].directory == dialect.directory and listener.path != dialect.socket
    }
    having = sum(
        any(
            device.get("path") == dialect.directory and device.get("source") in directories
            for device in one.devices.values()
        )
        for one in running
    )
    if having or (directories and not running):
        text = (
            f"device: {having} of {len(running)} running instances have the socket of guestapi at {dialect.directory}"
        )
        return Finding(name, True, text)
    text = f"the daemon answers its instances itself; docs/incus.md says how guestapi gets to answer them{taking}"
    return Finding(name, False, text)


def _socket(listener: ListenSocket) -> Finding:
    name = f"socket {listener.dialect}"
    unit = DIALECTS[listener.dialect].unit
    hint = f"'systemctl restart {unit}', or take it out of the configuration"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_ANSWER_SECONDS)
            connection.connect(listener.path)
            connection.sendall(b"OPTIONS * HTTP/1.0\r\n\r\n")
            answer = connection.recv(4096)
    except TimeoutError:
        return Finding(
            name, False, f"{listener.path}: no answer in {_ANSWER_SECONDS:.0f} s; 'journalctl -u guestapi' may say why"
        )
    except OSError as error:
        return Finding(name, False, f"{listener.path}: {error.strerror}; {hint}")
    if not answer.startswith(b"HTTP/1.0 200 "):
        return Finding(name, False, f"{listener.path}: something else answers there")
    mode = os.stat(listener.path).st_mode & 0o777
    if mode & 0o666 != 0o666:
        return Finding(name, False, f"{listener.path}: mode {mode:04o}, guests need 0666; SocketMode=0666 in the unit")
    return Finding(name, True, f"{listener.path} answers")
