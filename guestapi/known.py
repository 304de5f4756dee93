"""Configuration keys and devices as Incus knows them, to notice what an operator has mistyped.

Rules: guests are told whatever is set, so what is unknown here is no error, but a warning if it looks like a slip.
Refused is only what would mean the opposite of what was typed: a switch that is neither true nor false, which would
leave the API as it is by default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from guestapi.names import InvalidNameError
from guestapi.switches import FALSE, SWITCHES, TRUE

if TYPE_CHECKING:
    from guestapi.model import Device

#: What keys begin with that may go on in any way.
FREE = ("user.", "environment.", "image.", "linux.sysctl.", "volatile.", "limits.kernel.", "oci.", "smbios11.")

#: Instance options of Incus 6.0 (linuxcontainers.org/incus/docs/main/reference/instance_options/), and LXD's own names.
KEYS = frozenset(
    {
        *("agent.nic_config", "boot.autorestart", "boot.autostart", "boot.autostart.delay", "boot.autostart.priority"),
        *("boot.host_shutdown_action", "boot.host_shutdown_timeout", "boot.stop.priority", "cluster.evacuate"),
        *("cloud-init.network-config", "cloud-init.user-data", "cloud-init.vendor-data"),
        *("cloud-init.ssh-keys.KEYNAME", "limits.cpu", "limits.cpu.allowance", "limits.cpu.nodes"),
        *("limits.cpu.pin_strategy", "limits.cpu.priority", "limits.disk.priority", "limits.hugepages.1GB"),
        *("limits.hugepages.1MB", "limits.hugepages.2MB", "limits.hugepages.64KB", "limits.memory"),
        *("limits.memory.enforce", "limits.memory.hotplug", "limits.memory.hugepages", "limits.memory.swap"),
        *("limits.memory.swap.priority", "limits.network.priority", "limits.processes", "linux.kernel_modules"),
        *("linux.kernel_modules.load", "migration.incremental.memory", "migration.incremental.memory.goal"),
        *("migration.incremental.memory.iterations", "migration.stateful", "nvidia.driver.capabilities"),
        *("nvidia.require.cuda", "nvidia.require.driver", "nvidia.runtime", "raw.apparmor", "raw.idmap", "raw.lxc"),
        *("raw.qemu", "raw.qemu.conf", "raw.qemu.qmp.early", "raw.qemu.qmp.post-start", "raw.qemu.qmp.pre-start"),
        *("raw.qemu.scriptlet", "raw.seccomp", "security.agent.metrics", "security.bpffs.delegate_attachs"),
        *("security.bpffs.delegate_cmds", "security.bpffs.delegate_maps", "security.bpffs.delegate_progs"),
        *("security.bpffs.path", "security.csm", "security.devlxd", "security.devlxd.images", "security.guestapi"),
        *("security.guestapi.images", "security.idmap.base", "security.idmap.isolated", "security.idmap.size"),
        *("security.iommu", "security.nesting", "security.privileged", "security.protection.delete"),
        *("security.protection.shift", "security.protection.start", "security.secureboot", "security.sev"),
        *("security.sev.policy.es", "security.sev.session.data", "security.sev.session.dh"),
        *("security.syscalls.allow", "security.syscalls.deny", "security.syscalls.deny_compat"),
        *("security.syscalls.deny_default", "security.syscalls.intercept.bpf"),
        *("security.syscalls.intercept.bpf.devices", "security.syscalls.intercept.mknod"),
        *("security.syscalls.intercept.mount", "security.syscalls.intercept.mount.allowed"),
        *("security.syscalls.intercept.mount.fuse", "security.syscalls.intercept.mount.shift"),
        *("security.syscalls.intercept.sched_setscheduler", "security.syscalls.intercept.setxattr"),
        *("security.syscalls.intercept.sysinfo", "snapshots.expiry", "snapshots.expiry.manual", "snapshots.pattern"),
        *("snapshots.schedule", "snapshots.schedule.stopped"),
    }
)

_UNIX = "gid major minor mode path required source uid"
_NIC = (
    "acceleration attached boot.priority connected gvrp host_name hwaddr io.bus ipv4.address ipv4.gateway "
    "ipv4.host_address ipv4.host_table ipv4.host_tables ipv4.neighbor_probe ipv4.routes ipv4.routes.external "
    "ipv6.address ipv6.gateway ipv6.host_address ipv6.host_table ipv6.host_tables ipv6.neighbor_probe ipv6.routes "
    "ipv6.routes.external limits.egress limits.ingress limits.max limits.priority maas.subnet.ipv4 maas.subnet.ipv6 "
    "mode mtu name nested network nictype parent pci queue.tx.length security.acls "
    "security.acls.default.egress.action security.acls.default.egress.logged security.acls.default.ingress.action "
    "security.acls.default.ingress.logged security.ipv4_filtering security.ipv6_filtering security.mac_filtering "
    "security.port_isolation security.promiscuous vlan vlan.tagged vrf"
)
#: Devices and their options (linuxcontainers.org/incus/docs/main/reference/devices/), by type.
DEVICES = {
    kind: frozenset(options.split())
    for kind, options in {
        "disk": (
            "attached boot.priority ceph.cluster_name ceph.user_name dependent initial.gid initial.mode initial.uid "
            "io.bus io.cache io.threads limits.max limits.read limits.write path pool propagation raw.mount.options "
            "readonly recursive required shift size size.state source source.snapshot source.type wwn"
        ),
        "gpu": "gid gputype id mdev mig.ci mig.gi mig.uuid mode pci productid uid vendorid",
        "infiniband": "hwaddr mtu name nictype parent",
        "nic": _NIC,
        "none": "",
        "pci": "address firmware",
        "proxy": "bind connect gid listen mode nat proxy_protocol security.gid security.uid uid",
        "tpm": "path pathrm",
        "unix-block": _UNIX,
        "unix-char": _UNIX,
        "unix-hotplug": "gid mode ownership.inherit productid required subsystem uid vendorid",
        "usb": "attached busnum devnum gid mode productid required serial uid vendorid",
    }.items()
}


def check_settings(wanted: Mapping[str, str]) -> list[str]:
    """Look for slips in configuration that is about to be set.

    Args:
        wanted: values by key; an empty one unsets the key.

    Returns:
        What looks like one, in a sentence each.

    Raises:
        InvalidNameError: a switch would have a value that is neither true nor false.
    """
    for key in sorted(SWITCHES & wanted.keys()):
        if wanted[key] and wanted[key].lower() not in FALSE | TRUE:
            raise InvalidNameError(
                f"{key} is true or false, not {wanted[key][:40]!r}", "true, 1, yes, on; or false, 0, no, off"
            )
    found = []
    for key in wanted:
        near = None if not wanted[key] or key in KEYS or key.startswith(FREE) else _near_key(key)
        if near is not None:
            found.append(f"{key!r} is not a key that Incus knows; {near!r} is one")
    return found


def check_device(name: str, definition: Device, kind: str | None = None) -> list[str]:
    """Look for slips in what is about to be set of a device.

    Args:
        name: of the device.
        definition: its options; an empty one is taken away.
        kind: its type, if the definition has none.

    Returns:
        What looks like a slip, in a sentence each.
    """
    kind = definition.get("type") or kind
    if not kind:
        return []
    if kind not in DEVICES:
        near = _closest(kind, DEVICES, 0.6)
        meant = f"{near!r} is one" if near else f"there are {', '.join(DEVICES)}"
        return [f"device {name!r}: {kind!r} is not a type of device that Incus knows; {meant}"]
    found = []
    for option in definition:
        if option not in DEVICES[kind] and option != "type" and not option.startswith("user.") and definition[option]:
            near = _closest(option, DEVICES[kind], 0.6)
            meant = f"; {near!r} is one" if near else ""
            found.append(f"device {name!r}: {option!r} is not an option of a {kind} that Incus knows{meant}")
    return found


def _near_key(key: str) -> str | None:
    """The key that was probably meant; None if it looks like none."""
    first, dot, rest = key.partition(".")
    prefixes = {one.partition(".")[0] for one in (*FREE, *KEYS)}
    if dot and first not in prefixes and (near := _closest(first, prefixes)) and f"{near}." in FREE:
        return f"{near}.{rest}"
    return _closest(key, KEYS)


def _closest(word: str, known: Iterable[str], alike: float = 0.8) -> str | None:
    # PERF: loaded for what is not known alone.
    from difflib import get_close_matches

    names: Collection[str] = sorted(known)
    found = get_close_matches(word.lower().replace("_", "-"), names, 1, alike) or get_close_matches(
        word, names, 1, alike
    )
    return found[0] if found and found[0] != word else None
