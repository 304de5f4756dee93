#!/usr/bin/python3 -IS
"""The hook of every container runtime: rings the doorbell of its follower, and waits until the container is registered.

``guestapi-hook [--config FILE] SOURCE [WORD]...`` is a program of its own; ``guestapi hook SOURCE`` calls it too. It
runs for each container that starts, so it imports only built-in modules: ``python3 -I -S`` starts in 5 ms of processor
time, and the hook takes two more.

A ring is fields, each ended by a NUL: the protocol's version, the source, then any number of fields of which the first
letter says the kind (``a`` an argument, ``e`` a variable of the environment, ``h`` the host name inside, ``i`` standard
input), and an empty field at the end, without which it is not whole. The answer is one line: ``ok``, or ``no`` and a
sentence.

It waits two seconds at most for the answer, and for its standard input. What it does before it rings does not count:
where many containers start at once that may take long, and a container whose hook has not rung is found by the
follower's next look alone. When the time has passed, or when no process listens, the container starts without being
registered; or it does not start, if guestapi.toml says ``on-failure = "refuse"`` under ``[hooks]``.
"""

import _signal  # type: ignore[import-not-found]  # typeshed has the module around it alone, which imports enum
import _socket
import posix
import sys

#: Seconds that the hook waits for the answers, and before for its standard input.
LIMIT_SECONDS = 2.0
#: Where followers listen, unless guestapi.toml says otherwise.
DOORBELLS = b"/run/guestapi/sources"
_CONFIGURATION = b"/etc/guestapi/guestapi.toml"
#: Most bytes that are read of standard input and of guestapi.toml.
STATE_BYTES, _CONFIGURATION_BYTES = 1 << 20, 1 << 20
#: Bytes of the longest answer.
_ANSWER_BYTES = 4096
#: Prefixes of the variables that are sent to each source's follower.
_VARIABLES = {b"lxc": b"LXC_", b"nspawn": b"MAINPID"}
#: Sources whose hooks have a state on standard input (runtime-spec, config.md, "POSIX-platform Hooks").
_WITH_STATE = (b"oci", b"podman")
#: Followers that a hook rings: an OCI hook does not know whether podman or Docker manages the container.
_FOLLOWERS = {b"oci": (b"podman", b"oci")}
#: Sources whose runtime answers nothing while a hook runs. Their hooks do not wait for an answer.
_UNATTENDED = (b"podman",)
#: include/uapi/linux/sched.h.
_CLONE_NEWUTS = 0x04000000


class HookError(Exception):
    """The container was not registered; the text is one sentence for the operator."""


class _TooLateError(Exception):
    """The deadline has passed."""


def run(words: list[bytes], environ: dict[bytes, bytes]) -> int:
    """Ring, and wait for the answer.

    Args:
        words: the source, then the runtime's arguments; ``--config FILE`` may stand before them.
        environ: the environment.

    Returns:
        The exit status: 1 if the container was not registered and the operator wants it not to start then.
    """
    file = environ.get(b"GUESTAPI_CONFIG")
    while words and words[0].startswith(b"--config"):
        name, equals, value = words[0].partition(b"=")
        if name != b"--config" or not (equals or words[1:]):
            break
        file, words = (value, words[1:]) if equals else (words[1], words[2:])
    if not words or words[0].startswith(b"-"):
        _say("usage: guestapi-hook [--config FILE] SOURCE [WORD]...")
        return 2
    source = words[0]
    if _is_end(source, words[1:], environ):
        # The follower notices the end of an init by its pidfd.
        return 0
    try:
        _ring(source, words[1:], environ, file)
    except HookError as error:
        if source in _UNATTENDED:
            # It runs for every container with a bind mount, also for users who may not ring; most of them do not use
            # the guest API.
            return 0
        return _failed(f"{source.decode(errors='replace')} hook: {error}", file)
    return 0


def _is_end(source: bytes, words: list[bytes], environ: dict[bytes, bytes]) -> bool:
    """Whether the runtime announces the end of a container, as configurations of guestapi 0.1 make it do."""
    if source == b"lxc":
        # lxc.container.conf(5): with lxc.hook.version = 0, the arguments are name, section and type.
        return environ.get(b"LXC_HOOK_TYPE", (words + [b""] * 3)[2]) in (b"stop", b"post-stop")
    return source == b"nspawn" and words[:1] == [b"stop"]


def _ring(source: bytes, words: list[bytes], environ: dict[bytes, bytes], file: bytes | None) -> None:
    """Ring every follower that may know the container, and wait for those that can answer while the hook runs."""
    _signal.signal(_signal.SIGALRM, _on_alarm)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, [_signal.SIGALRM])
    try:
        fields = _fields(source, words, environ)
        directory = _doorbells(file)
        followers = _FOLLOWERS.get(source, (source,))
        _signal.setitimer(_signal.ITIMER_REAL, LIMIT_SECONDS)
        rung = [_ring_one(directory, follower, fields) for follower in followers]
    except _TooLateError:
        raise HookError(f"not registered within {LIMIT_SECONDS:g} s; the follower registers it later") from None
    finally:
        _signal.setitimer(_signal.ITIMER_REAL, 0)
    if not any(rung):
        place = " or ".join(
            f"{directory.decode(errors='replace')}/{one.decode(errors='replace')}.sock" for one in followers
        )
        unit = f"guestapi-{followers[0].decode(errors='replace')}.service"
        raise HookError(f"no service listens at {place}; 'systemctl start {unit}' registers the container")


def _ring_one(directory: bytes, follower: bytes, fields: list[bytes]) -> bool:
    """Ring one doorbell; False if no process listens there."""
    path = b"%s/%s.sock" % (directory, follower)
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    answer = b""
    try:
        connection.connect(path)
        connection.sendall(b"\0".join([b"1", follower, *fields, b"", b""]))
        connection.shutdown(_socket.SHUT_WR)
        if follower in _UNATTENDED:
            return True
        while not answer.endswith(b"\n") and len(answer) < _ANSWER_BYTES:
            part = connection.recv(_ANSWER_BYTES)
            if not part:
                break
            answer += part
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    except (BrokenPipeError, ConnectionResetError):
        pass  # The follower has ended, or it answered before it had read everything.
    except OSError as error:
        raise HookError(f"{path.decode(errors='replace')}: {error.strerror}") from None
    finally:
        connection.close()
    if answer.startswith(b"no "):
        raise HookError(answer[3:].decode(errors="replace").rstrip("\n"))
    if answer != b"ok\n":
        raise HookError("the follower ended before it had answered; the next one registers the container")
    return True


def _on_alarm(_number: int, _frame: object) -> None:
    raise _TooLateError


def _fields(source: bytes, words: list[bytes], environ: dict[bytes, bytes]) -> list[bytes]:
    fields = [b"a" + word for word in words]
    if source in _VARIABLES:
        begin = _VARIABLES[source]
        fields += [b"e%s=%s" % one for one in environ.items() if one[0].startswith(begin)]
    if source == b"lxc":
        hostname = _hostname(environ.get(b"LXC_PID", b""))
        fields += [b"h" + hostname] if hostname else []
    if source in _WITH_STATE:
        fields.append(b"i" + _state())
    return fields


def _state() -> bytes:
    state = b""
    _signal.setitimer(_signal.ITIMER_REAL, LIMIT_SECONDS)
    while len(state) < STATE_BYTES and (part := posix.read(0, STATE_BYTES - len(state))):
        state += part
    _signal.setitimer(_signal.ITIMER_REAL, 0)
    return state


def _hostname(pid: bytes) -> bytes | None:
    """Return the host name of an init that has not run yet; None: the runtime set none, or it cannot be read."""
    if not pid.isdigit():
        return None
    before = posix.uname().nodename
    try:
        namespace = posix.open(b"/proc/%s/ns/uts" % pid, posix.O_RDONLY | posix.O_CLOEXEC)
        if hasattr(posix, "setns"):
            # Since Python 3.12.
            posix.setns(namespace, _CLONE_NEWUTS)
        else:
            import ctypes

            if ctypes.CDLL(None).setns(namespace, _CLONE_NEWUTS) != 0:
                return None
        posix.close(namespace)
    except OSError:
        # No such process, or CAP_SYS_ADMIN is missing: the follower asks LXC later.
        return None
    after = posix.uname().nodename
    return after.encode(errors="surrogateescape") if after != before else None


def _doorbells(file: bytes | None) -> bytes:
    """Return the directory of the doorbells, from guestapi.toml or the default."""
    for line in _lines(file):
        if b"doorbells" in line:
            key, _equals, value = line.partition(b"=")
            if key.strip() == b"doorbells" and value.count(b'"') == 2 and b"\\" not in value:
                return value.split(b'"')[1]
            found = _setting(file, "sources", "doorbells")
            return found.encode(errors="surrogateescape") if isinstance(found, str) else DOORBELLS
    return DOORBELLS


def _lines(file: bytes | None) -> list[bytes]:
    """Return the lines of guestapi.toml without comments."""
    return [line for line in _configuration(file).split(b"\n") if not line.lstrip().startswith(b"#")]


def _configuration(file: bytes | None) -> bytes:
    """Return the content of guestapi.toml; nothing if it cannot be read."""
    try:
        descriptor = posix.open(file or _CONFIGURATION, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return posix.read(descriptor, _CONFIGURATION_BYTES)
    except OSError:
        return b""
    finally:
        posix.close(descriptor)


def _setting(file: bytes | None, table: str, key: str) -> object:
    """Return a value of guestapi.toml; None if it is missing. PERF: this takes as long as everything else together."""
    import tomllib

    try:
        found = tomllib.loads(_configuration(file).decode())[table][key]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found


def _failed(sentence: str, file: bytes | None) -> int:
    """Log the failure, and return the exit status that guestapi.toml asks for."""
    refuse = any(b"refuse" in line for line in _lines(file)) and _setting(file, "hooks", "on-failure") == "refuse"
    sentence += "; the container does not start" if refuse else "; the container goes on without"
    _say(sentence)
    _to_journal(sentence)
    return int(refuse)


def _say(sentence: str) -> None:
    try:
        posix.write(2, sentence.encode(errors="replace") + b"\n")
    except OSError:
        pass  # The runtime has closed it.


def _to_journal(sentence: str) -> None:
    """Send one entry by the journal's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL), if there is a journal."""
    text = sentence.replace("\n", " ").encode(errors="replace")
    with_fields = b"MESSAGE=%s\nPRIORITY=3\nSYSLOG_IDENTIFIER=guestapi\n" % text
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
    try:
        connection.sendto(with_fields, b"/run/systemd/journal/socket")
    except OSError:
        pass
    finally:
        connection.close()


def main() -> int:
    """The program's entry point."""
    return run([word.encode(errors="surrogateescape") for word in sys.argv[1:]], dict(posix.environ))


if __name__ == "__main__":
    sys.exit(main())
