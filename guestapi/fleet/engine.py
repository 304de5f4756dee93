"""The connection to a fleet's database. This module alone imports psycopg.

A server whose process is stopped never answers. Its kernel still acknowledges what is sent, so no option of libpq ends
the wait. Therefore a `Session` has a thread that shuts the socket down when a question has no answer in time. An
operator's change may wait for a lock or a standby as long as it takes: `session` shuts the socket down only if the
server takes no new session either.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread, current_thread, main_thread
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from guestapi.errors import SourceError
from guestapi.store.errors import ConflictError

if TYPE_CHECKING:
    import psycopg

#: Seconds to wait for a server to accept a connection, before the next one of the URL is tried. As a multiple of it at
#: most, for a host whose last try was too slow: a server that is gone is waited for as long.
_CONNECT_SECONDS = 5
_MOST_CONNECT_FACTOR = 2.0
#: Seconds between two looks whether a question has no answer in time.
_WATCH_SECONDS = 0.2
#: Seconds for which an operator's question has no answer before a new session finds out whether the server lives.
_DOUBT_SECONDS = 3.0
#: Nothing of a schema that somebody else can write to is found by accident. Nothing is compiled: a table of one row is
#: never analyzed by itself, so the planner takes a look for costly. To compile it takes fifty times as long as to look.
_OPTIONS = "-c search_path=pg_catalog -c client_encoding=UTF8 -c jit=off"
#: A session that was given up ends, also while it waits for a lock: a host may have few.
_HOSTS_OPTIONS = f"{_OPTIONS} -c client_connection_check_interval=1s"
#: What was acknowledged survives the primary whatever a role's own setting is: from here on in a session, or to the end
#: of a transaction. What is stronger than `on` in new sessions of the role stays.
_WAIT_FOR_STANDBYS = (
    "SELECT set_config('synchronous_commit', CASE reset_val WHEN 'remote_apply' THEN reset_val ELSE 'on' END, %s) "
    "FROM pg_settings WHERE name = 'synchronous_commit'"
)
_PASSWORD = re.compile(r"(?<=://)([^/@\s]*@)")
_SUPERUSER = (
    "to change instances needs a role in guestapi_operator; "
    "'guestapi fleet init', 'upgrade' and 'host' need a superuser of PostgreSQL"
)


class FleetError(SourceError):
    """The fleet's database cannot be used."""


class LateError(FleetError):
    """The fleet's database has not answered in time."""


class UncertainError(FleetError):
    """A change was sent, and it is not certain that it was made and stays.

    Attributes:
        lost: the server was lost before it answered. Another one may know what became of the change.
    """

    def __init__(self, message: str, hint: str | None = None, *, lost: bool = False) -> None:
        super().__init__(message, hint)
        self.lost = lost


class Session:
    """A session in which each question has an answer in time, or fails. Used by one thread.

    Attributes:
        deadline_factor: how many times as long as usual an answer may take.
    """

    def __init__(self, connection: psycopg.Connection[Any], seconds: float) -> None:
        """Watch a connection.

        Args:
            connection: in autocommit mode.
            seconds: after which a question without an answer fails.
        """
        self.deadline_factor = 1.0
        self._connection = connection
        self._seconds = seconds
        self._until: float | None = None
        self._closed = Event()
        self._late = False
        self._heard = False
        connection.add_notify_handler(self._hear)
        Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with suppress(Exception):
            self._connection.close()

    def ask(
        self, query: str, parameters: Sequence[object] | Mapping[str, object] = (), *, often: bool = False
    ) -> list[tuple[Any, ...]]:
        """Execute a statement, and return its rows.

        Args:
            query: the statement.
            parameters: of it.
            often: it is asked again and again, so it is planned once for the session. To plan it can take ten times as
                long as to execute it.

        Raises:
            LateError: it has no answer in time.
            FleetError: it fails.
        """
        import psycopg

        seconds = self._seconds * self.deadline_factor
        self._until = monotonic() + seconds
        try:
            cursor = self._connection.execute(query.encode(), parameters or None, prepare=often or None)
            return cursor.fetchall() if cursor.description is not None else []
        except psycopg.errors.UndefinedFunction:
            raise FleetError(
                "the fleet's tables are older than this guestapi", "run 'guestapi fleet upgrade'"
            ) from None
        except psycopg.Error as error:
            if self._late:
                raise LateError(f"the fleet's database has not answered for {seconds:g} s") from None
            raise FleetError(f"the fleet's database refuses: {_first_line(error)}") from None
        finally:
            self._until = None

    def wait_for_standbys(self) -> None:
        """Have the COMMIT of this transaction wait for a standby, if changes of the database do.

        Raises:
            FleetError: as of `ask`.
        """
        self.ask(_WAIT_FOR_STANDBYS, (True,))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Several questions that see the same moment.

        Raises:
            FleetError: one fails.
        """
        self.ask("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        try:
            yield
        except FleetError:
            # The session is not used any more.
            raise
        except BaseException:
            with suppress(FleetError):
                self.ask("ROLLBACK")
            raise
        self.ask("COMMIT")

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` for a notification; return whether one came, or the connection was closed."""
        if self._heard:
            self._heard = False
            return True
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLIN)
        if not poll.poll(max(0.0, seconds) * 1000):
            return False
        # Otherwise the next question would hear it, and one more would be asked for it.
        with suppress(Exception):
            self._connection.pgconn.consume_input()
            while self._connection.pgconn.notifies() is not None:
                pass
        return True

    def _hear(self, _notify: object) -> None:
        self._heard = True

    def _watch(self) -> None:
        while not self._closed.wait(_WATCH_SECONDS):
            if self.end_if_late():
                return

    def end_if_late(self) -> bool:
        """Shut the socket down if a question has no answer in time; return whether that is so."""
        until = self._until
        if until is None or monotonic() <= until:
            return False
        self._late = True
        _shut(self._connection)
        return True


@contextmanager
def session(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A session at the server that takes changes, of those that the URL names; in autocommit mode.

    Its changes wait for a synchronous standby to have them on its disk, whatever the role's `synchronous_commit` is.

    Args:
        url: a connection URI of libpq. What it does not say, such as the user and the certificate, is as in psql.

    Raises:
        FleetError: psycopg is not installed, no server takes changes, or a statement fails.
    """
    connection = _connect(url, {})
    import psycopg

    with connection, _watching(connection, url) as watch:
        try:
            connection.execute(_WAIT_FOR_STANDBYS, (False,))
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            raise FleetError(
                f"{connection.info.user!r} may not do that in the fleet's database: {_first_line(error)}", _SUPERUSER
            ) from None
        except psycopg.errors.UniqueViolation as error:
            if error.diag.table_name == "profiles":
                raise ConflictError("another profile has that name already; nothing was changed") from None
            raise ConflictError("another instance has that name or UUID already; nothing was changed") from None
        except psycopg.errors.UndefinedTable:
            raise FleetError("there is no fleet in this database yet", "'guestapi fleet init' makes one") from None
        except psycopg.Error as error:
            if watch.late:
                raise FleetError("the server of the fleet's database has stopped answering") from None
            raise FleetError(f"the fleet's database refuses: {_first_line(error)}") from None


class _Watch:
    """Ends a connection whose server is stopped; see `_watching`."""

    def __init__(self, connection: psycopg.Connection[Any], url: str) -> None:
        self._connection, self._url = connection, url
        self.closed = Event()
        self.late = False

    def run(self) -> None:
        """Look now and then whether there is a question without an answer, until the connection is closed."""
        from psycopg.pq import TransactionStatus

        asked = 0.0
        while not self.closed.wait(_WATCH_SECONDS):
            if self._connection.info.transaction_status != TransactionStatus.ACTIVE:
                asked = 0.0
                continue
            asked += _WATCH_SECONDS
            if asked > _DOUBT_SECONDS:
                if not self._answers():
                    self.late = True
                    _shut(self._connection)
                    return
                asked = 0.0

    def _answers(self) -> bool:
        """Whether the server takes a new session, or refuses it with an error."""
        import psycopg.conninfo

        info = self._connection.info
        # The URL may name other servers, too.
        place = {"host": info.host, "port": str(info.port), **({"hostaddr": info.hostaddr} if info.hostaddr else {})}
        try:
            psycopg.connect(
                psycopg.conninfo.make_conninfo(self._url, **place), connect_timeout=_CONNECT_SECONDS
            ).close()
        except psycopg.errors.ConnectionTimeout:
            return False
        except psycopg.Error:
            pass
        return True


@contextmanager
def _watching(connection: psycopg.Connection[Any], url: str) -> Iterator[_Watch]:
    """Within the block, a question ends with an error when the server of the connection is dead or stopped."""
    watch = _Watch(connection, url)
    Thread(target=watch.run, daemon=True).start()
    try:
        yield watch
    finally:
        watch.closed.set()


def commit(connection: psycopg.Connection[Any]) -> None:
    """Commit, and wait until it is certain. Ctrl-C ends the wait only if it comes again.

    Raises:
        UncertainError: it is not certain that the change was made and stays.
        FleetError: it was not made.
    """
    import psycopg

    notices: list[str] = []
    connection.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    try:
        with _delayed_interrupt():
            connection.execute("COMMIT")
    except _GivenUpError:
        connection.close()
        raise UncertainError(
            "not certain: the database has the change, but has not confirmed that it stays; the command was ended",
            "no standby may be there: 'guestapi fleet check' says so",
        ) from None
    except psycopg.OperationalError as error:
        if connection.closed or connection.broken:
            raise UncertainError(
                f"not certain: the server was lost while it made the change: {_first_line(error)}", lost=True
            ) from None
        raise
    if any("locally" in notice or "replicat" in notice for notice in notices):
        raise UncertainError(
            "not certain: the primary has the change, but no standby has confirmed it",
            "if the primary is lost now, the change is, too",
        )


class _GivenUpError(Exception):
    """Ctrl-C was pressed twice."""


@contextmanager
def _delayed_interrupt() -> Iterator[None]:
    """Within the block, the first Ctrl-C prints what is being waited for, and the second raises _GivenUpError.

    KeyboardInterrupt would make psycopg cancel the wait for standbys, and the change look as if it were made.
    """
    pressed = 0

    def press(_number: int, _frame: object) -> None:
        nonlocal pressed
        pressed += 1
        if pressed > 1:
            raise _GivenUpError
        os.write(2, b"waiting for the database to confirm the change; Ctrl-C again gives up\n")

    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def open_session(
    url: str,
    options: Mapping[str, str | os.PathLike[str]],
    seconds: float,
    deadline_factor: float = 1.0,
    kind: Callable[[psycopg.Connection[Any], float], Session] = Session,
) -> Session:
    """Open a session whose questions are answered in time, or fail.

    Args:
        url: as of `session`.
        options: parameters of libpq that win over those of the URL.
        seconds: as of `Session`.
        deadline_factor: of the session, and up to a bound of the time to connect.
        kind: makes the session.

    Raises:
        LateError: no server has answered in time.
        FleetError: psycopg is not installed, or no server takes changes.
    """
    given = {name: str(value) for name, value in options.items()}
    connection = _connect(url, given, _HOSTS_OPTIONS, min(deadline_factor, _MOST_CONNECT_FACTOR))
    opened = kind(connection, seconds)
    opened.deadline_factor = deadline_factor
    return opened


def printable_url(url: str) -> str:
    """The URL without user and password."""
    return _PASSWORD.sub("", url.partition("?")[0])


def _connect(
    url: str, options: Mapping[str, str], settings: str = _OPTIONS, factor: float = 1.0
) -> psycopg.Connection[Any]:
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError as error:
        raise FleetError(
            f"a fleet needs psycopg 3 and libpq: {str(error).splitlines()[0]}",
            "'apt install libpq5', and docs/fleet.md says how to install guestapi[fleet]",
        ) from None
    try:
        return psycopg.connect(
            psycopg.conninfo.make_conninfo(url, **options),
            autocommit=True,
            connect_timeout=round(_CONNECT_SECONDS * factor),
            target_session_attrs="read-write",
            application_name="guestapi",
            options=settings,
        )
    except psycopg.Error as error:
        kind = LateError if isinstance(error, psycopg.errors.ConnectionTimeout) else FleetError
        raise kind(f"the fleet at {printable_url(url)} cannot be reached: {_first_line(error)}") from None


def _shut(connection: psycopg.Connection[Any]) -> None:
    """Have a thread that waits for the connection get an error."""
    with suppress(OSError, ValueError), socket.socket(fileno=os.dup(connection.fileno())) as ours:
        ours.shutdown(socket.SHUT_RDWR)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:1]) or type(error).__name__
