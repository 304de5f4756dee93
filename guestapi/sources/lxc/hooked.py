"""LXC's hooks (lxc.container.conf(5)): ``start-host``, before the init runs, ``stop`` and ``post-stop``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from guestapi.model import Device
from guestapi.sources.register import Report, ReportError, pid_of

#: How deep ``lxc.include`` is followed, and how many lines are read in all: a configuration may include itself.
_DEPTH, _LINES = 8, 10_000
#: ``lxc.net.N.type`` to the ``nictype`` that instances know.
_NIC_TYPES = {"veth": "bridged", "macvlan": "macvlan", "ipvlan": "ipvlan", "phys": "physical"}
#: Where guestapi's own directories are mounted; they are no devices of the container's.
_OWN = ("dev/incus", "dev/lxd")


def report(environ: Mapping[str, str], arguments: Sequence[str]) -> Report:
    """What LXC tells its hook.

    Args:
        environ: with ``LXC_NAME``, ``LXC_PID`` at the start, ``LXC_CONFIG_FILE``, and, with ``lxc.hook.version = 1``,
            ``LXC_HOOK_TYPE``.
        arguments: with ``lxc.hook.version = 0``: name, section (``lxc``), the hook's type, and for some types more.

    Raises:
        ReportError: it is not what LXC says.
    """
    name = environ.get("LXC_NAME") or (arguments[0] if arguments else "")
    kind = environ.get("LXC_HOOK_TYPE") or (arguments[2] if len(arguments) > 2 else "")
    if not name:
        raise ReportError("LXC_NAME is not set; 'guestapi hook lxc' is for lxc.hook.start-host and lxc.hook.post-stop")
    if kind in ("stop", "post-stop"):
        return Report(name, None)
    if kind != "start-host":
        raise ReportError(f"LXC hook {kind!r} is none of start-host, stop and post-stop")
    pid = pid_of(environ.get("LXC_PID", ""))
    if pid is None:
        raise ReportError("LXC_PID is not a PID; LXC sets it for lxc.hook.start-host")
    file = environ.get("LXC_CONFIG_FILE")
    return Report(name, pid, devices=devices(Path(file)) if file else {})


def devices(file: Path) -> dict[str, Device]:
    """NICs, mounts and root file system of a container's configuration, by the names that they have inside."""
    nics: dict[str, dict[str, str]] = {}
    found: dict[str, Device] = {}
    for key, value in _settings(file, _DEPTH):
        parts = key.split(".")
        if key.startswith("lxc.net.") and len(parts) >= 4:
            nics.setdefault(parts[2], {})[".".join(parts[3:])] = value
        elif key == "lxc.mount.entry":
            found |= _mount(value)
        elif key == "lxc.rootfs.path" and value:
            found["root"] = {"type": "disk", "path": "/"}
    for number, nic in nics.items():
        if nic.get("type") in _NIC_TYPES:
            name = nic.get("name") or f"eth{number}"
            found[name] = {"type": "nic", "name": name, "nictype": _NIC_TYPES[nic["type"]]}
            wanted = {"link": "parent", "hwaddr": "hwaddr", "mtu": "mtu"}
            found[name] |= {ours: nic[theirs] for theirs, ours in wanted.items() if nic.get(theirs)}
    return found


def _mount(entry: str) -> dict[str, Device]:
    """A bind mount as a disk, named after where it is; nothing for what is mounted otherwise (fstab(5))."""
    fields = [field.replace("\\040", " ") for field in entry.split()]
    if len(fields) < 4 or not {"bind", "rbind"} & set(fields[3].split(",")):
        return {}
    target = fields[1].strip("/")
    if not target or target in _OWN:
        return {}
    disk = {"type": "disk", "source": fields[0], "path": f"/{target}"}
    if "ro" in fields[3].split(","):
        disk["readonly"] = "true"
    return {target.replace("/", "-"): disk}


def _settings(file: Path, depth: int) -> Iterator[tuple[str, str]]:
    """Keys and values in order, included files in their place; what cannot be read is left out."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[:_LINES]
    except (OSError, ValueError):
        # ValueError: an included name has a NUL in it.
        return
    for line in lines:
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key.startswith("#"):
            continue
        if key != "lxc.include":
            yield key, value
        elif depth:
            for one in _included(Path(value)):
                yield from _settings(one, depth - 1)


def _included(path: Path) -> list[Path]:
    """The file, or the files that a directory has for this (lxc.container.conf(5), ``lxc.include``)."""
    try:
        return sorted(path.glob("*.conf")) if path.is_dir() else [path]
    except OSError:
        return []
